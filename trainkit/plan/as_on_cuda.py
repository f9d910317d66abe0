"""PyTorch on the meta device as it is on an NVIDIA card since Ampere: its attention kernels and its autocast.

The meta device has every operator's shapes and dtypes and no numbers. Two things it chooses otherwise than a card does:
attention would be spelled out with its whole matrix, and there is no autocast. Both are given here to the functions of
torch.nn.functional that the networks of this suite call.
Sources: docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html (flash attention
for half precision without a mask, the memory-efficient kernel else); docs.pytorch.org/docs/stable/amp.html, "CUDA Ops
that can autocast to float16" and "to float32".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
HALF = ("linear", "conv2d", "scaled_dot_product_attention")  # in autocast's dtype
FULL = ("group_norm", "layer_norm", "interpolate", "softmax", "mse_loss", "l1_loss", "smooth_l1_loss")  # in fp32
WIDEST_HEAD = 256  # channels that flash attention takes
HEAD_MULTIPLE = 8  # to which it pads them
Attention = Callable[..., Tensor]


class Autocast:
    """torch.autocast for the meta device; what it is now is kept in the class, as torch keeps it for a thread."""

    enabled, dtype = False, torch.float32

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True,
                 cache_enabled: bool | None = None):
        assert device_type == "meta"
        self.wanted = enabled, dtype or torch.bfloat16

    def __enter__(self) -> Autocast:
        self.before = Autocast.enabled, Autocast.dtype
        Autocast.enabled, Autocast.dtype = self.wanted
        return self

    def __exit__(self, *error: object) -> None:
        Autocast.enabled, Autocast.dtype = self.before


def cuda_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                   is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Shapes, and what is kept for the backward pass, of the kernel that a card takes -> [B,heads,T,width]"""
    width = query.shape[-1]
    if query.dtype in (torch.float16, torch.bfloat16) and attn_mask is None and width <= WIDEST_HEAD:
        padding = -width % HEAD_MULTIPLE
        q, k, v = (F.pad(t, (0, padding)) if padding else t for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale or width**-0.5)
        return out[0][..., :width] if padding else out[0]
    bias = None
    if attn_mask is not None:
        same = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = same.expand(*query.shape[:3], key.shape[2])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale)[0]


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """The same of the kernel that a CPU takes, to hold a trace against a real run."""
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def as_on_cuda(attention: Attention = cuda_attention) -> Iterator[None]:
    """Inside, the meta device behaves like a card; other devices are as they were."""
    with ExitStack() as stack:
        def patch(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name in HALF + FULL:
            kernel = attention if name == "scaled_dot_product_attention" else getattr(F, name)
            patch(F, name, on_meta(getattr(F, name), kernel, half=name in HALF))
        for owner in (torch, torch.amp):
            patch(owner, "autocast", _autocast(torch.autocast))
        patch(torch, "is_autocast_enabled", _asked(torch.is_autocast_enabled, lambda: Autocast.enabled))
        patch(torch, "get_autocast_dtype", _asked(torch.get_autocast_dtype, lambda: Autocast.dtype))
        patch(torch.amp, "is_autocast_available", _asked(torch.amp.is_autocast_available, lambda: True))
        yield


def on_meta(real: Callable[..., Tensor], kernel: Callable[..., Tensor], *, half: bool) -> Callable[..., Tensor]:
    """`kernel` for tensors on the meta device, cast as autocast does, and `real` for all others."""
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if first.device.type != "meta":
            return real(first, *args, **kwargs)
        if not Autocast.enabled:
            return kernel(first, *args, **kwargs)
        dtype = Autocast.dtype if half else torch.float32
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in (first, *args)]
        named = {k: a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for k, a in kwargs.items()}
        return kernel(*cast, **named)

    return call


def _autocast(real: Any) -> Callable[..., Any]:
    def make(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return (Autocast if device_type == "meta" else real)(device_type, *args, **kwargs)

    return make


def _asked(real: Callable[..., Any], answer: Callable[[], Any]) -> Callable[..., Any]:
    def ask(device_type: str | None = None) -> Any:
        if device_type == "meta":
            return answer()
        return real() if device_type is None else real(device_type)

    return ask
