"""Adapted linear layers with fewer, larger kernels than PEFT's: the same numbers, less overhead a layer.

PEFT builds the update from two modules, a product by the scale and a sum, each with its own node in the graph. Two
shorter ways, chosen by the size of the weight:

    small, fp32   y = x (W + c · B A)ᵀ + b           one product more than the bare layer
    otherwise     y = x Wᵀ + b + c · (x Aᵀ) Bᵀ       added in place, with the backward pass written out

DoRA scales the rows of V = W + c · B A by s = m / ‖V‖, y = x (s V)ᵀ + b, where ‖V‖ counts as a constant in the
gradient. PEFT multiplies B and A out for ‖V‖ in every pass, by way of an identity; here it is the norm of the V that
the small way has anyhow, and otherwise a sum of parts that are r wide (`row_norms`).

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; Liu et al. 2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation", eq. 5 and §4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainkit.devices import in_fp64
from trainkit.frozen_weights import BaseWeight, StoredLinear, frozen_weight, product_dtype

MERGE_UP_TO = 2**16  # entries of W; measured on a CPU, larger layers are faster without forming W + c · B A


class Context(Protocol):
    """autograd's context of a call, with what our forward passes keep in it besides tensors."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    W: BaseWeight
    c: float
    x_shape: torch.Size
    x_dtype: torch.dtype

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class LowRankUpdate(torch.autograd.Function):
    """y = x Wᵀ + b + c · (x Aᵀ) Bᵀ with W and b frozen.

        dx = dy W + g A,   g = c · dy B,   dA = gᵀ x,   dB = c · dyᵀ h,   h = x Aᵀ

    x [..., in]   W [out,in], a tensor or stored   b [out] or None   A [r,in]   B [out,r]   c the scale
    returns [..., out]
    Products run in autocast's dtype, or x's without autocast; gradients come back in their parameter's dtype.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, W: BaseWeight, b: Tensor | None, A: Tensor, B: Tensor, c: float) -> Tensor:
        y, rows, h = products(x, W, b, A, B, c)
        ctx.save_for_backward(rows, h, A, B)
        ctx.W, ctx.c, ctx.x_shape, ctx.x_dtype = W, c, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        dx, dA, dB = update_gradients(ctx, dy, *ctx.saved_tensors)
        return dx, None, None, dA, dB, None


def products(x: Tensor, W: BaseWeight, b: Tensor | None, A: Tensor, B: Tensor, c: float
             ) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [n,out], the rows of x [n,in] and h = x Aᵀ [n,r], in the dtype that products run in."""
    dtype = product_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    y = F.linear(rows, W.to(dtype), None if b is None else b.to(dtype))
    h = rows @ A.to(dtype).t()
    return y.addmm_(h, B.to(dtype).t(), alpha=c), rows, h


def update_gradients(ctx: Context, dz: Tensor, rows: Tensor, h: Tensor, A: Tensor, B: Tensor
                     ) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (where it is asked for), dA and dB of z = x Wᵀ + c · (x Aᵀ) Bᵀ from dz [..., out].

    A backward pass unpacks ctx.saved_tensors once: under gradient checkpointing they are gone afterwards.
    """
    dz = dz.reshape(-1, dz.shape[-1])  # [n,out]
    g = (dz @ B.to(dz.dtype)).mul_(ctx.c)  # [n,r]
    dA, dB = g.t() @ rows, (dz.t() @ h).mul_(ctx.c)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = (dz @ ctx.W.to(dz.dtype)).addmm_(g, A.to(dz.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
    return dx, dA.to(A.dtype), dB.to(B.dtype)


class DecomposedUpdate(torch.autograd.Function):
    """y = s ∘ z + b,   z = x Wᵀ + c · (x Aᵀ) Bᵀ, with W and b frozen.

        dz = s ∘ dy,   ds = Σ dy ∘ z over the rows of x;   dx, dA, dB from dz as in `LowRankUpdate`

    s [out] fp32, DoRA's m / ‖V‖; everything else as there.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, W: BaseWeight, b: Tensor | None, A: Tensor, B: Tensor, s: Tensor, c: float
                ) -> Tensor:
        z, rows, h = products(x, W, None, A, B, c)
        ctx.save_for_backward(rows, h, A, B, z, s)
        ctx.W, ctx.c, ctx.x_shape, ctx.x_dtype = W, c, x.shape, x.dtype
        y = z * s.to(z.dtype)
        return (y if b is None else y.add_(b.to(z.dtype))).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, z, s = ctx.saved_tensors
        ds = torch.linalg.vecdot(dy.reshape(z.shape), z, dim=0)  # [out]
        dx, dA, dB = update_gradients(ctx, dy * s.to(dy.dtype), *saved)
        return dx, None, None, dA, dB, ds.to(s.dtype), None


def row_norms(W: Tensor, A: Tensor, B: Tensor, c: float, squares: Tensor) -> Tensor:
    """‖W + c · B A‖ of each row, without the product -> [out] fp32.

        ‖w + c b A‖² = ‖w‖² + c b · (2 A wᵀ + c A Aᵀ bᵀ)

    squares  ‖w‖² of each row [out], which never changes
    """
    cross = (W @ A.to(W.dtype).t()).float()  # [out,r]
    inner = torch.addmm(cross, B, A @ A.t(), beta=2, alpha=c)
    return torch.add(squares, (B * inner).sum(1), alpha=c).sqrt_()


class LeanLinear(Linear):
    """PEFT's LoRA layer that takes the short way where nothing else is asked of it, and PEFT's own way otherwise."""

    lean_adapter: str

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self._short(x) if not (args or kwargs) and self._plain() else super().forward(x, *args, **kwargs)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A [r,in] and B [out,r] of ΔW = c · B A."""
        return self.lora_A[self.lean_adapter].weight, self.lora_B[self.lean_adapter].weight

    def _short(self, x: Tensor) -> Tensor:
        W, b, c = frozen_weight(self.base_layer), self.base_layer.bias, self.scaling[self.lean_adapter]
        A, B = self.low_rank()
        if isinstance(W, Tensor) and should_merge(x, W):
            return F.linear(x, torch.addmm(W, B, A, alpha=c), b)
        return LowRankUpdate.apply(x, W, b, A, B, c)

    def _plain(self) -> bool:
        """One active adapter, not merged or disabled, no dropout, a frozen base layer whose forward nobody wrapped."""
        name = self.lean_adapter
        dropout = self.lora_dropout[name]
        return (self.active_adapters == [name] and not self.disable_adapters and not self.merged
                and not (isinstance(dropout, nn.Dropout) and dropout.training)
                and "forward" not in vars(self.base_layer) and not frozen_weight(self.base_layer).requires_grad)


class LeanDora(LeanLinear):
    """The same for DoRA."""

    squares: Tensor  # ‖w‖² of each row of the frozen base [out]

    def _short(self, x: Tensor) -> Tensor:
        W, b, c = frozen_weight(self.base_layer), self.base_layer.bias, self.scaling[self.lean_adapter]
        m, (A, B) = self.lora_magnitude_vector[self.lean_adapter].weight, self.low_rank()
        if isinstance(W, Tensor) and should_merge(x, W):
            V = torch.addmm(W, B, A, alpha=c)
            return F.linear(x, V * (m / torch.linalg.vector_norm(V.detach(), dim=1)).unsqueeze(1), b)
        with torch.no_grad():
            norms = row_norms(W.to(W.dtype), A, B, c, self.squares)
        return DecomposedUpdate.apply(x, W, b, A, B, m / norms, c)


class StartedLinear(LeanLinear):
    """A layer whose factors start at A0 and B0 instead of at no update (PiSSA, OLoRA): ΔW = c · (B A − B0 A0).

    The papers take c · B0 A0 off the base's weight. Here the weight stays as it is and the update counts from the
    start, which is the same in exact numbers, starts at the base to the last bit in any precision, and leaves a base
    that can still be asked for its own answer.
    """

    start_A: Tensor  # [r,in]
    start_B: Tensor  # [out,r]

    def start(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the parameters."""
        return {"start_A": self.start_A, "start_B": self.start_B}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """B A − B0 A0 = (B − B0) A + B0 (A − A0), one product of rank 2r without cancellation -> [2r,in], [out,2r]"""
        A, B = super().low_rank()
        return torch.cat([A, A - self.start_A]), torch.cat([B - self.start_B, self.start_B], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What PEFT merges into the base."""
        A, B = self.low_rank()
        return (B @ A).mul_(self.scaling[adapter]).to(frozen_weight(self.base_layer).dtype)

    def _plain(self) -> bool:
        assert self.disable_adapters or self.merged or super()._plain(), "PEFT's own way knows no start"
        return not self.disable_adapters and not self.merged


class LeanWhole:
    """A LoHa or LoKr layer of PEFT's on a linear layer: in fp32 y = x (W + ΔW)ᵀ + b, one product instead of two.

    Both have the whole ΔW at hand in every pass; nothing but the class of a layer changes.
    """

    lean_adapter: str

    # Of PEFT's class, which comes after this one; a common base would be another layout for layer.__class__.
    base_layer: nn.Linear
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_delta_weight: Callable[[str], Tensor]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base, name = self.base_layer, self.lean_adapter
        plain = (self.active_adapters == [name] and not self.disable_adapters and not self.merged
                 and x.dtype == frozen_weight(base).dtype == torch.float32
                 and not torch.is_autocast_enabled(x.device.type) and "forward" not in vars(base))
        if args or kwargs or not plain:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's
        return F.linear(x, base.weight + self.get_delta_weight(name), base.bias)


class LeanLoha(LeanWhole, loha.Linear):
    pass


class LeanLokr(LeanWhole, lokr.Linear):
    pass


PLAIN = (nn.Linear, StoredLinear)
WHOLE = {loha.Linear: LeanLoha, lokr.Linear: LeanLokr}


def should_merge(x: Tensor, W: Tensor) -> bool:
    """Never in half precision, where W + c · B A would round a young update away."""
    return (W.numel() <= MERGE_UP_TO and x.dtype == W.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type))


def install(layer: BaseTunerLayer, adapter: str) -> bool:
    """Make a PEFT layer lean where it is one of the above on a plain linear layer -> whether it is one now.

    Only the class changes: parameters, state dict and PEFT's own switches stay what they were.
    """
    if type(layer) in WHOLE and type(layer.base_layer) in PLAIN:
        layer.__class__, layer.lean_adapter = WHOLE[type(layer)], adapter
        return True
    if type(layer) is not Linear or type(layer.base_layer) not in PLAIN or layer.fan_in_fan_out:
        return False
    variant = layer.lora_variant.get(adapter)
    if layer.lora_bias[adapter] or not (variant is None or type(variant) is DoraLinearVariant):
        return False
    layer.__class__, layer.lean_adapter = LeanLinear if variant is None else LeanDora, adapter
    if variant is not None:
        W = layer.base_layer.weight.detach()
        squares = in_fp64(W).square().sum(1).float()
        layer.register_buffer("squares", squares.to(W.device), persistent=False)
    return True


def install_started(layer: BaseTunerLayer, adapter: str) -> None:
    """Let the update of a PEFT layer count from what its factors hold now."""
    assert install(layer, adapter) and type(layer) is LeanLinear, "PiSSA and OLoRA are for plain LoRA on linear layers"
    start_here(layer)


def start_here(layer: LeanLinear) -> None:
    """Remember the factors as they are: the update counts from them."""
    layer.__class__ = StartedLinear
    A, B = LeanLinear.low_rank(layer)
    layer.register_buffer("start_A", A.detach().clone(), persistent=False)
    layer.register_buffer("start_B", B.detach().clone(), persistent=False)
