"""bitsandbytes' optimizers with one wait for the device in a step.

By themselves they wait after every tensor, which are 1,120 waits in a step of SDXL with rank-16 LoRA on attention.
Their kernels follow one another on one stream, so one wait after the last says as much.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_wait(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class with another `step`. Its loop, states and arithmetic are the library's."""
    library: Any = importlib.import_module("bitsandbytes.optim.optimizer")
    base: Any = optimizer_class

    class OneWait(base):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            wait, tensors = library.sync_gpu, list[Tensor]()
            library.sync_gpu = tensors.append
            try:
                loss: float | None = super().step(closure)
            finally:
                library.sync_gpu = wait
            for tensor in tensors[-1:]:
                wait(tensor)
            return loss

    OneWait.__name__ = OneWait.__qualname__ = optimizer_class.__name__
    return OneWait
