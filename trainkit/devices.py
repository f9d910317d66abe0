"""Devices: what a card can do, waiting for one, and moving tensors to one without waiting."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision
HAS_BF16 = (8, 0)  # compute capability, from Ampere on; older cards emulate it, and their attention kernels refuse it
WITHOUT_FP64 = ("mps", "xpu")  # no Apple GPU has it, and not every Intel GPU (Arc A)
ALIGNMENT = 16  # bytes: each tensor in a shared buffer begins on a multiple, which any dtype may stand on


def present() -> torch.device:
    """The GPU of this machine, else its CPU: the choice of Accelerate, for programs that run without it."""
    for name in ("mps", "cuda", "xpu"):
        if torch.get_device_module(name).is_available():
            return torch.device(name)
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until everything that is queued on `device` is done; the CPU queues nothing.

    `torch.cuda.synchronize` takes the device. `torch.mps.synchronize` takes no argument, as there is one Apple GPU.
    """
    if device.type == "cpu":
        return
    wait = torch.get_device_module(device).synchronize
    if inspect.signature(wait).parameters:
        wait(device)
    else:
        wait()


def empty_cache(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the device; a CPU keeps none, nor does the meta device."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).empty_cache()


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a card; infinity where there is none."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def in_fp64(tensor: Tensor) -> Tensor:
    """The tensor in fp64, where it is or on the CPU."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FP64 else tensor).double()


def allow_tf32(allow: bool) -> None:
    """Matrix products and convolutions on NVIDIA cards in TF32 (10 bits of mantissa), or not.

    By itself PyTorch computes convolutions in TF32 and matrix products not.
    """
    torch.set_float32_matmul_precision("high" if allow else "highest")
    torch.backends.cudnn.allow_tf32 = allow


def only_deterministic() -> None:
    """From now on, operations give the same bits in every run on one device, or raise RuntimeError.

    Source: docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def uses_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


def precision_notices(device: torch.device, precision: str) -> Iterator[str]:
    """What the user should know about a precision on a card, in sentences for the log.

    precision  as Accelerate names it: no, fp16 or bf16
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    fast = "bf16" if capability >= HAS_BF16 else "fp16"
    if precision == "no":
        yield (f"the model is in fp32: --mixed_precision {fast} takes half the memory for its weights, and is usually "
               "faster")
    elif precision == "bf16" and fast == "fp16":
        yield (f"this card has no bf16 (compute capability {capability[0]}.{capability[1]}, it begins with 8.0): it is "
               "emulated, slow and takes more memory. --mixed_precision fp16 is what this card can do")


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors, of any shapes and dtypes, on `device`. On CUDA that is one copy, and the host does not wait for it.

    `tensor.to("cuda")` from ordinary memory stops the host until the copy is done, and all that was queued before it.
    What is on `device` already is returned as it is.
    """
    here = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type != "cuda" or not here:
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in here]
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for tensor, piece in zip(here, pinned.split(sizes), strict=True):
        _as(tensor, piece).copy_(tensor)
    pieces = iter(pinned.to(device, non_blocking=True).split(sizes))
    return [_as(tensor, next(pieces)) if tensor.device.type == "cpu" else tensor.to(device) for tensor in tensors]


def _as(tensor: Tensor, memory: Tensor) -> Tensor:
    """The first bytes of `memory` as a tensor like `tensor`."""
    return memory[:tensor.nbytes].view(tensor.dtype).view(tensor.shape)
