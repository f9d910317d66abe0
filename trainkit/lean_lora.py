"""A LoRA linear layer with fewer, larger kernels than PEFT's: the same numbers, less overhead a layer.

PEFT builds the update from two modules, a product by the scale and a sum, each with its own node in the graph. Two
shorter ways, chosen by the size of the weight:

    small, fp32   y = x (W + c · B A)ᵀ + b           one product more than the bare layer
    otherwise     y = x Wᵀ + b + c · (x Aᵀ) Bᵀ       added in place, with the backward pass written out

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

MERGE_UP_TO = 2**16  # entries of W; measured on a CPU, larger layers are faster without forming W + c · B A


class LowRankUpdate(torch.autograd.Function):
    """y = x Wᵀ + b + c · (x Aᵀ) Bᵀ with W and b frozen.

        dx = dy W + g A,   g = c · dy B,   dA = gᵀ x,   dB = c · dyᵀ h,   h = x Aᵀ

    x [..., in]   W [out,in]   b [out] or None   A [r,in]   B [out,r]   c the scale   returns [..., out]
    Products run in autocast's dtype, or x's without autocast; gradients come back in their parameter's dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [n,in]
        y = F.linear(rows, W.to(dtype), None if b is None else b.to(dtype))  # [n,out]
        h = rows @ A.to(dtype).t()  # [n,r]
        y.addmm_(h, B.to(dtype).t(), alpha=c)
        ctx.save_for_backward(rows, h, W, A, B)
        ctx.c, ctx.x_shape, ctx.x_dtype = c, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, h, W, A, B = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])  # [n,out]
        g = (dy @ B.to(dy.dtype)).mul_(ctx.c)  # [n,r]
        dA, dB = g.t() @ rows, (dy.t() @ h).mul_(ctx.c)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ W.to(dy.dtype)).addmm_(g, A.to(dy.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, dA.to(A.dtype), dB.to(B.dtype), None


class LeanLinear(Linear):
    """PEFT's LoRA layer that takes the short way where nothing else is asked of it, and PEFT's own way otherwise."""

    lean_adapter: str

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs or not self._plain():
            return super().forward(x, *args, **kwargs)
        base, name = self.base_layer, self.lean_adapter
        W, A, B, c = base.weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if worth_merging(x, W):
            return F.linear(x, torch.addmm(W, B, A, alpha=c), base.bias)
        return LowRankUpdate.apply(x, W, base.bias, A, B, c)

    def _plain(self) -> bool:
        """One active adapter, not merged or disabled, no dropout, a frozen base layer whose forward nobody wrapped."""
        name = self.lean_adapter
        dropout = self.lora_dropout[name]
        return (self.active_adapters == [name] and not self.disable_adapters and not self.merged
                and not (isinstance(dropout, nn.Dropout) and dropout.training)
                and "forward" not in vars(self.base_layer) and not self.base_layer.weight.requires_grad)


def worth_merging(x: Tensor, W: Tensor) -> bool:
    """Never in half precision, where W + c · B A would round a young update away."""
    return (W.numel() <= MERGE_UP_TO and x.dtype == W.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type))


def install(layer: nn.Module, adapter: str) -> bool:
    """Make a PEFT layer lean where it holds a plain LoRA on a plain linear layer -> whether it is one now.

    Only the class changes: parameters, state dict and PEFT's own switches stay what they were.
    """
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return False
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        return False
    layer.__class__, layer.lean_adapter = LeanLinear, adapter
    return True
