"""Bytes of the tensors that are alive, by what they are for, and their largest sum at any moment.

PyTorch's own MemTracker (torch.distributed._tools.mem_tracker) puts a hook on every parameter, which frozen ones
refuse, so it cannot look at a LoRA. FLOPs are counted by torch's formulas (torch.utils.flop_counter).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WEIGHTS, ADAPTERS, OPTIMIZER, GRADIENTS, GRAPH = KINDS = ("weights", "adapters", "optimizer", "gradients", "graph")
BLOCK = 512  # bytes: what CUDA's caching allocator rounds a tensor up to


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at any moment, by kind, and what was computed until the end.

    flops  floating-point operations of matrix products, convolutions and attention; a multiply-add is two
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that appears on `device_type` counts until it is freed.

    known  storages that are there before, by kind; what appears later is the graph, and a gradient once it is complete
    block  bytes that the allocator hands out at once
    """

    def __init__(self, device_type: str, known: Mapping[str, Iterable[Tensor]], *, block: int = BLOCK):
        super().__init__()
        self.device_type, self.block = device_type, block
        self.now, self.most, self.flops = 0, 0, 0
        self.sums: Counter[str] = Counter()
        self.at_most: dict[str, int] = {}
        self._alive: dict[int, tuple[int, str]] = {}  # storage -> its bytes, and what they are for
        for kind, tensors in known.items():
            for tensor in tensors:
                self.add(tensor, kind)

    @property
    def peak(self) -> Peak:
        return Peak({kind: n for kind, n in self.at_most.items() if n}, self.flops)

    def add(self, tensor: Tensor, kind: str) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._alive[key] = size, kind
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.sums[kind] += size
        if self.now > self.most:
            self.most, self.at_most = self.now, dict(self.sums)

    def watch_gradients(self, parameters: Iterable[Tensor]) -> None:
        """From the moment it is complete, a gradient of these counts as one."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, kind = self._alive[key]
        self._alive[key] = size, GRADIENTS
        self.sums[kind] -= size
        self.sums[GRADIENTS] += size

    def _drop(self, key: int) -> None:
        size, kind = self._alive.pop(key)
        self.now -= size
        self.sums[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for result in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(result, Tensor):
                self.add(result, GRAPH)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once and rounded up as the allocator does."""
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // BLOCK) * BLOCK for size in sizes.values())


META = torch.device("meta")  # stands for the card: its tensors have shapes and dtypes and no numbers, and need no GPU
