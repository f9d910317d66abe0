"""The card: `machine()` adds to torch's FakeTensorMode what a whole training needs. It is "cuda", "mps" or "xpu".

CPU tensors stay real, so that random draws, data, tokens and control flow are the true ones. A number that is asked of
a tensor on the card is made up, and the wait is noted with the lines that asked. What a card refuses and fake tensors
let pass is refused: a CPU generator for a draw on the card, an index on the card into a CPU tensor, a product or norm
of two number formats, and on "mps" every tensor in fp64; "xpu" is a card that has it, as torch's GradScaler asks
of one. Where the card is not "cuda", our code may ask torch.cuda nothing but whether it is there.
Scaled dot product attention takes the kernels that CUDA takes from compute capability 8.0 on, by their shape functions;
on other cards it is written out.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trainkit.plan.as_on_cuda import cuda_attention

aten = torch.ops.aten
MOST_READ = 1 << 22  # elements of a tensor that comes back from the card with made-up numbers; larger ones stay fake
COPY, COPY_INTO = aten._to_copy.default, aten.copy_.default
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
ONE_DTYPE = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.mv, aten.dot, aten.linear, aten.convolution,
             aten.native_layer_norm, aten.native_group_norm)  # kernels that take no tensors of two number formats
LIKE = (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.new_empty.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty_strided.default)
ASYNCHRONOUS = ", asynchronous"  # a copy that the host does not wait for
OURS = ("/trainkit/", "/train_", "/freq_loss.py")  # in the paths of files whose lines are named
REAL_ATTENTION = functional.scaled_dot_product_attention
REAL_TOLIST, REAL_POINTER = Tensor.tolist, Tensor.data_ptr
CAPABILITY = (8, 6)
MEMORY = 12 * 2**30  # bytes
Wait = tuple[str, str]  # what for, and the lines of ours that asked, innermost first


class Card:
    """The waits of the host for the device so far, in their order."""

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.waits = device, list[Wait]()

    def note(self, kind: str) -> None:
        self.waits.append((kind, _lines()))


def _lines() -> str:
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if any(part in name for part in OURS) and "/tests/" not in name:
            found.append(f"{Path(name).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "a library"


class _Watch(TorchDispatchMode):
    """Keeps the CPU real, answers who asks a fake tensor for a number, and notes who waits.

    number  the made-up one
    """

    def __init__(self, fake: FakeTensorMode, card: Card, number: float):
        super().__init__()
        self.fake, self.card, self.number = fake, card, number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if FakeTensor not in types and target in (None, "cpu", "meta"):
            with unset_fake_temporarily():
                return args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if func is aten._pin_memory.default:
            return args[0].clone()
        if func is aten.is_pinned.default:
            return False
        if func in LIKE and target == "cpu":  # a host tensor in the shape of one on the card
            with unset_fake_temporarily():
                return func(torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
        if func is aten.nonzero.default:  # how many there are is made up
            self.card.note("nonzero")
            return args[0].new_empty((1, args[0].dim()), dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.equal.default:
            self.card.note("equal")
            return False
        self._refuse(func, args, kwargs.get("generator"), target)
        self._note_index(func, args)
        if func in (COPY, COPY_INTO):
            read = self._copied(func, args, kwargs)
            if read is not None:
                return read
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        out = func(*args, **kwargs)
        if self.card.device == "mps":
            tree_map_only(Tensor, _refuse_float64, out)
        return out

    def _number(self, tensor: Tensor) -> bool | int | float:
        if tensor.device.type == self.card.device:
            self.card.note("item")
        kind = tensor.dtype
        return bool(self.number) if kind == torch.bool else self.number if kind.is_floating_point else int(self.number)

    def _refuse(self, func: Any, args: tuple, generator: torch.Generator | None, target: str | None) -> None:
        """What CUDA would raise."""
        if generator is not None and target and target != generator.device.type:
            raise RuntimeError(f"Expected a '{target}' device type for generator but found '{generator.device}'")
        if func in INDEXING and args[0].device.type == "cpu":
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if func.overloadpacket in ONE_DTYPE:
            dtypes = {tensor.dtype for tensor in args if isinstance(tensor, Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func}: expected tensors of the same dtype, but found {dtypes}")

    def _note_index(self, func: Any, args: tuple) -> None:
        if func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.device.type == "cpu" for index in indices):
                self.card.note("host to device, an index")
            if any(index.dtype == torch.bool for index in indices):
                self.card.note("nonzero")

    def _copied(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """Notes a copy between host and device -> the real tensor that a small copy to the host gives."""
        source = args[0] if func is COPY else args[1]
        place = kwargs.get("device", source.device) if func is COPY else args[0].device
        target = torch.device(place).type
        if source.device.type == target or "meta" in (source.device.type, target):
            return None
        late = kwargs.get("non_blocking", func is COPY_INTO and len(args) > 2 and args[2])
        self.card.note(f"{'device to host' if target == 'cpu' else 'host to device'}{ASYNCHRONOUS if late else ''}")
        if target != "cpu" or source.numel() > MOST_READ:
            return None
        with unset_fake_temporarily():
            if func is COPY:
                return torch.full(source.shape, self.number).to(kwargs.get("dtype") or source.dtype)
            return args[0] if isinstance(args[0], FakeTensor) else args[0].fill_(self.number)

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _refuse_float64(tensor: Tensor) -> Tensor:
    if tensor.device.type == "mps" and tensor.dtype == torch.float64:
        raise TypeError(f"{tensor.device} has no float64")
    return tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """As torch chooses on a card: flash for half precision without a mask, memory-efficient for the rest."""
    if query.device.type == "cpu":
        return REAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if query.device.type != "cuda":
        return _written_out(query, key, value, attn_mask)
    if torch.is_autocast_enabled("cuda"):  # it is in autocast's list of half-precision functions
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, (
        f"Expected query, key, and value to have the same dtype: {query.dtype} {key.dtype} {value.dtype}")
    with torch.autocast("cuda", enabled=False):
        return cuda_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    assert query.dtype == key.dtype == value.dtype, f"{query.dtype} {key.dtype} {value.dtype}"
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _apply(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """nn.Module._apply without swap_tensors, which fake tensors refuse: parameters that change place are replaced."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = fn(parameter)
            if new is not parameter and (new.device, new.dtype) != (parameter.device, parameter.dtype):
                module._parameters[name] = torch.nn.Parameter(new.detach(), parameter.requires_grad)
    module._buffers.update({name: fn(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


class _Stream:
    """A stream, an event or a context that does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args: _Stream()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...


def _tolist(card: Card, number: float) -> Callable[[Tensor], Any]:
    """One wait, as on a card."""
    def tolist(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return REAL_TOLIST(tensor)
        card.note("item")
        with unset_fake_temporarily():
            return REAL_TOLIST(torch.full(tensor.shape, number))

    return tolist


def _pointers() -> Callable[[Tensor], int]:
    """Addresses, a made-up one for each storage."""
    bases: dict[int, int] = {}

    def data_ptr(tensor: Tensor) -> int:
        if not isinstance(tensor, FakeTensor):
            return REAL_POINTER(tensor)
        base = bases.setdefault(tensor.untyped_storage()._cdata, 1 << 40 | len(bases) << 34)
        return base + tensor.storage_offset() * tensor.element_size()

    return data_ptr


def _answers(device: str, synchronized: Callable[[], None]) -> dict[Any, dict[str, Any]]:
    """What torch says of the card, by the module that is asked."""
    properties = SimpleNamespace(name="made-up card", total_memory=MEMORY, major=CAPABILITY[0], minor=CAPABILITY[1],
                                 multi_processor_count=28, has_fp64=True)
    common: dict[str, Any] = {
        "synchronize": lambda *a: synchronized(), "empty_cache": lambda: None, "device_count": lambda: 1,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None, "current_device": lambda: 0,
        "set_device": lambda *a: None,
    }
    if device == "mps":
        backend = {"is_available": lambda: True, "is_built": lambda: True, "is_macos_or_newer": lambda *a: True}
        return {torch.mps: common | {"is_available": lambda: True}, torch.backends.mps: backend}
    like_cuda = common | {
        "is_available": lambda: True, "is_bf16_supported": lambda *a, **k: True,
        "get_device_properties": lambda *a: properties, "get_device_capability": lambda *a: CAPABILITY,
        "get_device_name": lambda *a: properties.name, "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0, "memory_reserved": lambda *a: 0, "max_memory_reserved": lambda *a: 0,
        "reset_peak_memory_stats": lambda *a: None, "mem_get_info": lambda *a: (MEMORY - 2**30, MEMORY),
        "Stream": _Stream, "Event": _Stream, "stream": _Stream, "current_stream": _Stream,
        "is_current_stream_capturing": lambda: False, "_lazy_init": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
    }
    return {torch.get_device_module(device): like_cuda}


def _not_for_ours(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.cuda on a machine without CUDA, which libraries may call and we may not."""
    def asked(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        assert not any(part in caller for part in OURS), f"torch.cuda.{name} is asked of another device by {caller}"
        return real(*args, **kwargs)

    return asked


@contextmanager
def card_there(device: str = "cuda", synchronized: Callable[[], None] = lambda: None) -> Iterator[FakeTensorMode]:
    """Inside, torch believes in one card, and tensors may be on it."""
    with ExitStack() as stack:
        def patch(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for module, answers in _answers(device, synchronized).items():
            for name, answer in answers.items():
                patch(module, name, answer)
        if device == "cuda":
            for path in ("torch.cuda.amp.common", "torch.amp.grad_scaler"):
                patch(importlib.import_module(path), "amp_definitely_not_available", lambda: False)
        else:
            patch(torch.amp.autocast_mode, "is_autocast_available", lambda kind: kind in ("cpu", device))
            for name, real in list(vars(torch.cuda).items()):
                if inspect.isfunction(real) and not name.startswith("_") and name != "is_available":
                    patch(torch.cuda, name, _not_for_ours(name, real))
        patch(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CPU})
        patch(functional, "scaled_dot_product_attention", attention)
        patch(torch.nn.Module, "_apply", _apply)
        patch(Tensor, "data_ptr", _pointers())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def machine(number: float = 0.01, device: str = "cuda") -> Iterator[Card]:
    """Inside, CPU tensors are real and those on the device are fake.

    number  what is read from a fake tensor
    """
    card = Card(device)
    with card_there(device, lambda: card.note("synchronize")) as fake, _Watch(fake, card, number), \
            mock.patch.object(Tensor, "tolist", _tolist(card, number)), \
            mock.patch.object(FakeTensor, "tolist", _tolist(card, number)):
        yield card
