"""Compile and load `hooks.cpp`. It must happen before `import torch`, which asks for its hooks once."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")
FOLDER = Path(__file__).resolve().parents[3] / "build" / "fake_cuda"  # git ignores build/


def available(device: str = "cuda") -> bool:
    """Whether the library is there, or can be compiled."""
    return library(device).is_file() or shutil.which("g++") is not None


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def library(device: str) -> Path:
    """One file for each device, each source and each build of torch."""
    version = (torch_folder() / "version.py").read_bytes()
    return FOLDER / f"{device}-{hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:12]}.so"


def compiled(device: str) -> Path:
    """The library, compiled on the first call; takes g++ some 20 CPU seconds."""
    target, torch = library(device), torch_folder()
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-DFAKE_{device.upper()}",
                        f"-I{torch / 'include'}",
                        f"-I{torch / 'include/torch/csrc/api/include'}", f"{SOURCE}", "-o", f"{draft}",
                        f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
        draft.replace(target)
    return target


def load(device: str = "cuda") -> None:
    """For one of cuda, mps and xpu, and for no other in the same process."""
    assert "torch" not in sys.modules, "load the hooks before torch is imported"
    torch = torch_folder()
    if not (torch / "lib" / "libtorch_cuda.so").exists():  # a build with CUDA has hooks of its own
        for file in (torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so", compiled(device)):
            ctypes.CDLL(f"{file}", mode=ctypes.RTLD_GLOBAL)
