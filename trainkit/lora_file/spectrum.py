"""How large an update is, and in how many directions: its singular values, without the product where that is larger.

With B = Q R and Aᵀ = P S, the singular values of B A are those of R Sᵀ, which is r × r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.adapters.updates import LowRank
from trainkit.lora_file.layer import LayerUpdate

ENERGY = 0.9  # of the sum of squares
SVD = tuple[Tensor, Tensor, Tensor]  # U [out,k], S [k] the largest first, Vh [k,in]


def singular_values(layer: LayerUpdate, W: Tensor | None = None) -> Tensor:
    """Of ΔW, the largest first, fp64. Without the base's W, those of a DoRA are of the factors' product alone."""
    if W is not None and layer.magnitude is not None:
        return torch.linalg.svdvals(layer.like(W).delta(W))
    product = layer.update.map(lambda factor: factor.double()).low_rank()
    A, B = product.A, product.B
    if len(A) < min(len(B), A.shape[1]):
        R, S = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
        return torch.linalg.svdvals(R @ S.T) * abs(product.scale)
    return torch.linalg.svdvals(B @ A) * abs(product.scale)


def svd(layer: LayerUpdate, W: Tensor | None = None) -> SVD:
    """ΔW = U diag(S) Vh in fp64. Without the base's W, a DoRA's is that of the factors' product alone."""
    if W is not None and layer.magnitude is not None:
        return svd_of(layer.like(W).delta(W))
    product = layer.update.map(lambda factor: factor.double()).low_rank()
    A, B = product.A, product.B * product.scale
    if len(A) >= min(len(B), A.shape[1]):
        return svd_of(B @ A)
    (Q, R), (P, S) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, values, Vh = torch.linalg.svd(R @ S.T)
    return Q @ U, values, Vh @ P.T


def svd_of(whole: Tensor) -> SVD:
    """Of a matrix [out,in] in fp64, by the eigenvectors of the smaller of X Xᵀ and Xᵀ X: three times as fast as an SVD.

    S are the norms of the rows of Uᵀ X, so that their squares add up to ‖X‖² whatever the eigenvectors' errors are.
    """
    if len(whole) > whole.shape[1]:
        U, S, Vh = svd_of(whole.T)
        return Vh.T, S, U.T
    U = torch.linalg.eigh(whole @ whole.T).eigenvectors.flip(1)  # the largest first
    rows = U.T @ whole
    S = torch.linalg.vector_norm(rows, dim=1)
    return U, S, rows / S.clamp(min=torch.finfo(S.dtype).tiny).unsqueeze(1)


def cut(found: SVD, rank: int) -> tuple[LowRank, float]:
    """The best product of a rank -> it, and ‖what is lost‖² (Eckart and Young 1936)."""
    U, S, Vh = found
    root = S[:rank].sqrt()
    return LowRank(root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root), float(S[rank:].square().sum())


def norm(values: Tensor) -> float:
    """‖ΔW‖, Frobenius."""
    return float(values.square().sum().sqrt())


def effective_rank(values: Tensor) -> int:
    """How many directions hold 90 % of ‖ΔW‖²; 0 of an update that is zero."""
    energy = values.square().cumsum(0)
    return int((energy < ENERGY * energy[-1]).sum()) + 1 if float(energy[-1]) else 0
