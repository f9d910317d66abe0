"""Devices: waiting for one, and moving tensors to one without waiting."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: each tensor in a shared buffer begins on a multiple, which any dtype may stand on


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
