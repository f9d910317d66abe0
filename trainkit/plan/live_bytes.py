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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WEIGHTS, ADAPTERS, OPTIMIZER, GRADIENTS, GRAPH = KINDS = ("weights", "adapters", "optimizer", "gradients", "graph")
META = torch.device("meta")  # stands for the card: its tensors have shapes and dtypes and no numbers, and need no GPU
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
        out, flops = answer(func, args, kwargs or {})
        self.flops += flops
        for result in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(result, Tensor):
                self.add(result, GRAPH)
        return out


# ----------------------------------------------------------------------------------------------------------------------
# Shapes that were worked out before: the same block comes many times

aten = torch.ops.aten
INTO_FIRST = {aten.addmm_.default, aten.add_.Tensor, aten.mul_.Tensor}  # write into their first argument, as it is
Output = tuple[torch.Size, tuple[int, ...], torch.dtype] | None  # shape and strides; None where there is no output


@dataclass(frozen=True)
class Answer:
    """What an operator returns on the meta device, and its FLOPs.

    kind  of the whole answer: a tensor, or a tuple or list of them
    """

    kind: type
    outputs: tuple[Output, ...]
    flops: int

    def again(self) -> Any:
        """The same, in new storages."""
        found = [None if one is None else torch.empty_strided(*one[:2], dtype=one[2], device=META)
                 for one in self.outputs]
        return found[0] if self.kind is Tensor else self.kind(found)


_remembered: dict[Any, Answer] = {}
_makes_new: dict[Any, bool] = {}  # operator -> whether its outputs share no memory with its inputs


def answer(func: Any, args: tuple, kwargs: dict) -> tuple[Any, int]:
    """What the operator returns, and its FLOPs. On the meta device, one that was asked before is not worked out again.
    """
    if func in INTO_FIRST and args[0].device.type == "meta":
        return args[0], 0
    if func not in _makes_new:
        places = (*func._schema.arguments, *func._schema.returns)
        _makes_new[func] = all(place.alias_info is None for place in places)
    key = (func, look(args), look([*kwargs.items()])) if _makes_new[func] else None
    try:
        known = _remembered.get(key)
    except TypeError:  # an argument that cannot be looked up, such as a tensor with values
        key = known = None
    if known is not None:
        return known.again(), known.flops
    out = func(*args, **kwargs)
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    outputs = [out] if isinstance(out, Tensor) else [*out] if isinstance(out, (list, tuple)) else []
    if key is not None and outputs and all(one is None or is_plain(one) for one in outputs):
        shapes = tuple(None if one is None else (one.shape, one.stride(), one.dtype) for one in outputs)
        _remembered[key] = Answer(Tensor if isinstance(out, Tensor) else type(out), shapes, flops)
    return out, flops


def look(value: Any) -> Any:
    """What an operator's answer depends on, fit for a table; not so for tensors with values."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.device.type == "meta" else [value]
    if isinstance(value, (list, tuple)):
        return tuple(look(one) for one in value)
    return type(value), value


def is_plain(output: Any) -> bool:
    """Whether it is a tensor on the meta device that has its storage to itself."""
    if not isinstance(output, Tensor) or output.device.type != "meta":
        return False
    like = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device=META)
    return like.untyped_storage().nbytes() == output.untyped_storage().nbytes() and output.storage_offset() == 0


def weights_of(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once and rounded up as the allocator does."""
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // BLOCK) * BLOCK for size in sizes.values())

