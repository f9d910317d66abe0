"""How large an update is, and in how many directions: its singular values, without the product where that is larger."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.lora_file.layer import LayerUpdate

ENERGY = 0.9  # of the sum of squares


def singular_values(layer: LayerUpdate, W: Tensor | None = None) -> Tensor:
    """Of ΔW, the largest first, fp64. Without the base's W, those of a DoRA are of the factors' product alone.

    With B = Q R and Aᵀ = P S, the values of B A are those of R Sᵀ, which is r × r.
    """
    if W is not None and layer.magnitude is not None:
        return torch.linalg.svdvals(layer.like(W).delta(W))
    product = layer.update.map(lambda factor: factor.double()).low_rank()
    A, B = product.A, product.B
    if len(A) < min(len(B), A.shape[1]):
        R, S = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
        return torch.linalg.svdvals(R @ S.T) * abs(product.scale)
    return torch.linalg.svdvals(B @ A) * abs(product.scale)


def norm(values: Tensor) -> float:
    """‖ΔW‖, Frobenius."""
    return float(values.square().sum().sqrt())


def effective_rank(values: Tensor) -> int:
    """How many directions hold 90 % of ‖ΔW‖²; 0 of an update that is zero."""
    energy = values.square().cumsum(0)
    return int((energy < ENERGY * energy[-1]).sum()) + 1 if float(energy[-1]) else 0
