"""The header of a safetensors file: names, shapes and metadata, without its numbers. Anything else is refused in words.

No pickle is ever opened: a .pt or .ckpt file can run code when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainkit.errors import Problem, UserError

MOST_HEADER = 32 * 2**20  # bytes; a LoRA of every layer of SDXL has less than one MiB, and its thumbnail some KiB
STARTS = {  # of files that are not safetensors -> what they are
    b"PK\x03\x04": "it is a zip archive, such as a PyTorch file (.pt, .ckpt), which could run code when it is read",
    b"\x80": "it is a pickle (.pt, .ckpt), which could run code when it is read",
    b"<": "it is a web page: the download needs another address, or a login",
    b"version https://git-lfs": "it is a Git LFS pointer, and the file itself was not downloaded: run git lfs pull",
}


@dataclass(frozen=True)
class Header:
    """Names and shapes of a file's tensors, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(file: Path, where: str = "") -> Header:
    """The header of a file. UserError: the file cannot be read, is another kind of file, or its end is missing."""
    from safetensors import SafetensorError, safe_open

    try:
        refuse_others(file)
        with safe_open(file, framework="pt") as opened:
            return Header({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()},  # noqa: SIM118
                          opened.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(file, where, error) from error


def read_tensors(file: Path, where: str = "") -> dict[str, Tensor]:
    """All tensors of a file. UserError as `read_header`, and where a number is not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        refuse_others(file)
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(file, where, error) from error
    wrong = next((name for name, t in tensors.items() if not (t.is_floating_point() and t.isfinite().all())), None)
    if wrong is not None:
        raise damaged(file, where, ValueError(f"{wrong} holds what is no finite real number"))
    return tensors


def refuse_others(file: Path) -> None:
    """Raises ValueError for what is no safetensors file, before a library makes of it what it can."""
    with file.open("rb") as opened:
        start = opened.read(24)
    length = int.from_bytes(start[:8], "little")
    kind = next((words for first, words in STARTS.items() if start.startswith(first) and start[8:9] != b"{"), None)
    if kind:
        raise ValueError(kind)
    if len(start) < 8:
        raise ValueError(f"it has {len(start)} bytes, and is no safetensors file")
    if length > MOST_HEADER:
        raise ValueError(f"its header would have {length:,} bytes: it is no safetensors file")


def damaged(file: Path, where: str, error: Exception) -> UserError:
    why = f"{error}".strip().partition("\n")[0] or type(error).__name__
    return UserError(Problem(f"the LoRA file {file.name} cannot be read", where or str(file), why,
                             "copy or download it again, or name another file", "data"))
