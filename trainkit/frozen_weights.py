"""Frozen weights in few bytes: how --base_precision keeps them, and layers that compute with what is kept.

    fp16, bf16   rounded once
    int8         W ≈ s · Q for each row, Q whole numbers of −127 … 127, s = max |row| / 127
    fp8          the same with Q in e4m3 and the s that leaves the least error. Convolutions are in int8: e4m3 has
                 three binary digits, which are too few for them (docs/memory.md has the figures)
    nf4          blocks of 64 entries, each one of 16 values times the block's largest, in the layout of
                 bitsandbytes. Convolutions are in int8

A layer multiplies by the weight in the dtype of its products, made anew in the forward and again in the backward pass.
So one whole weight at a time is in memory, and nothing but the kept form from one pass to the next. Hooks that swap a
parameter's `.data` would not do: autograd saves the parameter and reads what it holds later.

`StoredLayer.weight` is the one dequantised weight, for everything else that asks: DoRA's norms, PiSSA's start, the
export. It is a copy, so writing into it changes nothing.
Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1 (e4m3); Dettmers et al.
2022, "LLM.int8()", arXiv:2208.07339, §2.1 (a scale for each row); Dettmers et al. 2023, "QLoRA: Efficient Finetuning
of Quantized LLMs", arXiv:2305.14314, §3 (NF4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from trainkit.errors import Problem, UserError

INSIDE = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.layers.")  # of a UNet, and of CLIP's text encoders
LEAST = 2.0**-100  # a row whose entries are all smaller is kept as zeros
WITHOUT_FP8 = ("mps",)  # PyTorch has no fp8 on Apple's GPUs

Kept = tuple[Tensor, ...]


class Format(Protocol):
    """A way to keep a weight."""

    def pack(self, W: Tensor) -> Kept:
        """What is kept of W [out,...], which is finite."""

    def unpack(self, parts: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight again -> [out,...] in `dtype`, rounded once."""


@dataclass(frozen=True)
class Cast:
    """The numbers themselves in another dtype."""

    dtype: torch.dtype

    def pack(self, W: Tensor) -> Kept:
        return (W.to(self.dtype),)

    def unpack(self, parts: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Int8Rows:
    """Whole numbers and a scale for each row."""

    def pack(self, W: Tensor) -> Kept:
        s = largest(W) / 127
        return (W.float() / s).round().to(torch.int8), s

    def unpack(self, parts: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        Q, s = parts
        return Q.to(dtype).mul_(s)


@dataclass(frozen=True)
class Fp8Rows:
    """e4m3 and a scale for each row.

        s = ⟨w, Q⟩ / ⟨Q, Q⟩ leaves least of ‖w − s Q‖² = ‖w‖² − ⟨w, Q⟩² / ⟨Q, Q⟩

    Q is the best of w over TRIED scales, in equal ratios up to 2.
    """

    dtype: torch.dtype = torch.float8_e4m3fn

    def pack(self, W: Tensor) -> Kept:
        W = W.float()
        least = largest(W) / torch.finfo(self.dtype).max
        tried = torch.stack([least * 2 ** (place / TRIED) for place in range(TRIED)])  # [TRIED,out,1,...]
        fits = [fit(W, (W / s).to(self.dtype).float()) for s in tried]
        best = torch.stack([s.square() * norm for s, norm in fits]).argmax(0, keepdim=True)  # [1,out,1,...]
        Q = (W / tried.gather(0, best)[0]).to(self.dtype)
        return Q, fit(W, Q.float())[0]

    def unpack(self, parts: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        Q, s = parts
        return Q.to(dtype).mul_(s)


def fit(W: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, the scale that brings Q nearest to W, and ⟨Q, Q⟩ -> [out,1,...] each"""
    norm = Q.square().flatten(1).sum(1).view(-1, *[1] * (W.ndim - 1)).clamp(min=LEAST)
    return (W * Q).flatten(1).sum(1).view(norm.shape) / norm, norm


@dataclass(frozen=True)
class Nf4Blocks:
    """Two of 16 values in a byte, and the largest |entry| of each block of BLOCK entries, row after row."""

    def pack(self, W: Tensor) -> Kept:
        values = torch.tensor(NF4, device=W.device)
        flat = F.pad(W.float().flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
        most = flat.abs().amax(1, keepdim=True)
        codes = torch.bucketize(flat / most.clamp(min=LEAST), (values[1:] + values[:-1]) / 2).to(torch.uint8)
        pairs = torch.stack([values.repeat_interleave(len(values)), values.repeat(len(values))], 1)  # [256,2] of a byte
        return codes[:, ::2] << 4 | codes[:, 1::2], most, pairs

    def unpack(self, parts: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        codes, most, pairs = parts
        blocks = F.embedding(codes.int(), pairs.to(dtype)).view(-1, BLOCK).mul_(most)
        return blocks.view(-1)[: shape.numel()].view(shape)


BLOCK = 64
NF4 = (  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
TRIED = 8


def largest(W: Tensor) -> Tensor:
    """The largest |entry| of each row -> [out,1,...] fp32"""
    return W.detach().float().abs().flatten(1).amax(1).clamp(min=LEAST).view(-1, *[1] * (W.ndim - 1))


FORMATS: dict[str, Format] = {
    "fp32": Cast(torch.float32), "fp16": Cast(torch.float16), "bf16": Cast(torch.bfloat16), "int8": Int8Rows(),
    "fp8": Fp8Rows(), "nf4": Nf4Blocks()}
OF_CONVOLUTIONS: dict[str, Format] = {**FORMATS, "fp8": FORMATS["int8"], "nf4": FORMATS["int8"]}


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class BaseWeight(Protocol):
    """A frozen weight: a tensor, or what is kept of one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def requires_grad(self) -> bool: ...

    def to(self, dtype: torch.dtype, /) -> Tensor: ...


@dataclass(frozen=True)
class StoredWeight:
    """What is kept of a weight, in the place of the tensor.

    dtype  that products run in outside of autocast
    """

    form: Format
    parts: Kept
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool = False

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """The weight, made anew."""
        return self.form.unpack(self.parts, self.shape, dtype)


class StoredLayer:
    """A frozen layer of torch's whose weight is kept in another form; only the class of a layer changes."""

    form: Format
    weight_shape: torch.Size
    num_parts: int
    like: Tensor  # [0], moves and changes its dtype as a weight would

    @property
    def stored(self) -> StoredWeight:
        parts = tuple(getattr(self, part_name(place)) for place in range(self.num_parts))
        return StoredWeight(self.form, parts, self.weight_shape, self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, made anew -> [out,...]"""
        return self.stored.to(self.like.dtype)

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move what is kept as bytes: `.to(dtype)` is about the dtype of the products."""
        kept = {id(part) for part in self.stored.parts}

        def as_bytes(tensor: Tensor) -> Tensor:
            return change(tensor.view(torch.uint8)).view(tensor.dtype) if id(tensor) in kept else change(tensor)

        return super()._apply(as_bytes, recurse)  # type: ignore[misc]  # nn.Module's


class StoredLinear(StoredLayer, nn.Linear):  # type: ignore[override]  # the weight is read-only here
    """y = x Wᵀ + b"""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self.stored, self.bias)


class StoredConv2d(StoredLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution with zeros around the image."""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenConvolution.apply(x, self.stored, self.bias, self)


STORED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}


def part_name(place: int) -> str:
    return f"stored_{place}"


def frozen_weight(layer: nn.Module) -> BaseWeight:
    """The weight of a layer to compute with, without making it."""
    if isinstance(layer, StoredLayer):
        return layer.stored
    weight: Any = layer.weight
    return weight


def product_dtype(x: Tensor) -> torch.dtype:
    """In which products run: autocast's dtype, or x's without autocast."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b with W and b frozen, dx = dy W

    x [..., in]   W [out,in]   b [out] or None   returns [..., out]
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: BaseWeight, b: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        ctx.W, ctx.x_dtype = W, x.dtype
        return F.linear(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return (dy @ ctx.W.to(dy.dtype)).to(ctx.x_dtype), None, None


class FrozenConvolution(torch.autograd.Function):
    """The same for a convolution; x [B,in,h,w]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: BaseWeight, b: Tensor | None, layer: nn.Conv2d) -> Tensor:
        dtype = product_dtype(x)
        ctx.W, ctx.x_dtype, ctx.x_shape = W, x.dtype, x.shape
        ctx.how = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dx = conv2d_input(ctx.x_shape, ctx.W.to(dy.dtype), dy, *ctx.how)
        return dx.to(ctx.x_dtype), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Storage of a whole network


@dataclass(frozen=True)
class Storage:
    """How the frozen weights of a run are kept.

    name  of FORMATS; "" leaves networks as they were loaded
    """

    name: str = ""

    def store(self, network: nn.Module) -> None:
        """Keep the linear layers and convolutions in a network's blocks so. Raises UserError for NaN and infinity.

        What is outside of the blocks has few numbers, and every layer depends on it: it stays as it is, and so do
        biases and norms.
        """
        if not self.name:
            return
        for path, layer in [*storable(network)]:
            formats = OF_CONVOLUTIONS if isinstance(layer, nn.Conv2d) else FORMATS
            store_layer(layer, formats[self.name], path)


AS_LOADED = Storage()


def storable(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a network's blocks that can be stored, by path."""
    for path, layer in network.named_modules():
        padded = isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros"
        if type(layer) in STORED and not padded and any(block in path for block in INSIDE):
            yield path, layer


@torch.no_grad()
def store_layer(layer: nn.Module, form: Format, path: str) -> None:
    """Keep the weight of a plain layer in a form."""
    W: Any = layer.weight
    if W.device.type != "meta" and not W.isfinite().all():
        raise UserError(Problem(
            "a weight of the base model is not finite", path, "NaN and infinity have no scale to be kept with",
            "copy the model's files there again, or name another model", "nonfinite"))
    parts = form.pack(W)
    like = W.detach().new_empty(0)
    del layer._parameters["weight"]
    for place, part in enumerate(parts):
        layer.register_buffer(part_name(place), part, persistent=False)
    layer.register_buffer("like", like, persistent=False)
    kept: Any = layer
    kept.form, kept.weight_shape, kept.num_parts = form, W.shape, len(parts)
    layer.__class__ = STORED[type(layer)]


def make_storage(name: str | None, weight_dtype: torch.dtype, device: torch.device) -> Storage:
    """--base_precision as an object. Raises UserError where it is wider than the products, or the device has it not.

    name  None, or what the products run in anyway, leaves weights as they are loaded
    """
    if name is None or FORMATS[name] == Cast(weight_dtype):
        return AS_LOADED
    form = FORMATS[name]
    if isinstance(form, Cast) and form.dtype.itemsize >= weight_dtype.itemsize:
        raise UserError(wider(name, str(weight_dtype).removeprefix("torch.")))
    if name == "fp8" and device.type in WITHOUT_FP8:
        raise UserError(Problem(f"--base_precision fp8 on {device.type}", "--base_precision fp8",
                                "PyTorch has no fp8 on this device", "--base_precision int8, which is as small"))
    return Storage(name)


def wider(name: str, compute: str) -> Problem:
    return Problem(f"--base_precision {name} with products in {compute}", "--base_precision, --mixed_precision",
                   "weights are made in the format of the products in each pass, so one that is not smaller gains "
                   "nothing", "leave --base_precision out, or choose int8 or fp8")
