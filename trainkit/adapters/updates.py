"""What each kind of adapter adds to a weight, as a formula over whatever can be multiplied.

    LoRA   ΔW = c · B A                              Hu et al. 2021, arXiv:2106.09685, eq. 3
    LoHa   ΔW = c · (B1 A1) ∘ (B2 A2)                Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098, §2.2
    LoKr   ΔW = c · C ⊗ (B A)  or  c · C ⊗ D         Yeh et al. 2023 (LyCORIS), arXiv:2309.14859, §3
    full   ΔW itself
    DoRA   ΔW = m V / ‖V‖ − W,  V = W + c · B A      Liu et al. 2024, arXiv:2402.09353, eq. 5; ‖·‖ of each row

A factor is a Tensor, or anything with @, * and `kron`: the export reads files with numbers that carry their error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Factor = Any  # a Tensor, or a matrix with @, * and kron of its own, such as the export's numbers with their error


@dataclass(frozen=True)
class Update:
    """ΔW without the base's weight."""

    @property
    def scale(self) -> float:
        """c; a field of every kind."""
        raise NotImplementedError

    def delta(self) -> Any:
        """-> [out,in]"""
        raise NotImplementedError

    def low_rank(self) -> LowRank:
        """The same ΔW as one product of two factors, which every reader of LoRA files understands."""
        raise NotImplementedError

    def map(self, change: Callable[[Any], Factor]) -> Update:
        """`change` applied to every factor."""
        factors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scale"}
        return replace(self, **{name: change(factor) for name, factor in factors.items() if factor is not None})


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA."""

    A: Factor  # [r,in]
    B: Factor  # [out,r]
    scale: float = 1.0

    def delta(self) -> Any:
        return (self.B @ self.A) * self.scale

    def low_rank(self) -> LowRank:
        return self


@dataclass(frozen=True)
class Hadamard(Update):
    """LoHa: a product of entries, of rank r² at most."""

    B1: Factor  # [out,r]
    A1: Factor  # [r,in]
    B2: Factor  # [out,r]
    A2: Factor  # [r,in]
    scale: float = 1.0

    def delta(self) -> Any:
        return (self.B1 @ self.A1) * (self.B2 @ self.A2) * self.scale

    def low_rank(self) -> LowRank:
        """Entry by entry Σ_k B1 A1 · Σ_l B2 A2 is one sum over the pairs (k, l): r² components.

        Where the weight has no room for so many, ΔW itself is one factor, and the pairs are not written out.
        """
        out, width = self.B1.shape[0], self.A1.shape[1]
        if len(self.A1) ** 2 > min(out, width):
            B, A = split((self.B1 @ self.A1) * (self.B2 @ self.A2))
            return LowRank(A, B, self.scale)
        B = (self.B1.unsqueeze(2) * self.B2.unsqueeze(1)).flatten(1)  # [out,r²]
        A = (self.A1.unsqueeze(1) * self.A2.unsqueeze(0)).flatten(0, 1)  # [r²,in]
        return LowRank(A, B, self.scale)


@dataclass(frozen=True)
class Kronecker(Update):
    """LoKr: a small C [a,c] times a block, which is D [b,d] or the product B A of [b,r] and [r,d]."""

    C: Factor
    B: Factor | None = None
    A: Factor | None = None
    D: Factor | None = None
    scale: float = 1.0

    def delta(self) -> Any:
        if self.D is not None:
            return self.C.kron(self.D) * self.scale
        B, A = self.block()
        return self.C.kron(B @ A) * self.scale

    def low_rank(self) -> LowRank:
        """(C D') ⊗ (B A) = (C ⊗ B) (D' ⊗ A), with an identity as C or as D', whichever gives fewer components."""
        a, c = self.C.shape
        B, A = self.block()
        if a < c:
            return LowRank(self.C.kron(A), unit(a, A).kron(B), self.scale)
        return LowRank(unit(c, A).kron(A), self.C.kron(B), self.scale)

    @property
    def block_shape(self) -> tuple[int, int]:
        if self.D is not None:
            return tuple(self.D.shape)
        assert self.B is not None and self.A is not None, "the block is D, or B and A"
        return len(self.B), self.A.shape[1]

    def block(self) -> tuple[Tensor, Tensor]:
        """The block as B and A; where it is D, one of them is D and the other an identity."""
        if self.D is not None:
            return split(self.D)
        assert self.B is not None and self.A is not None, "the block is D, or B and A"
        return self.B, self.A


@dataclass(frozen=True)
class Whole(Update):
    """ΔW itself, as LyCORIS's "full" has it."""

    D: Factor  # [out,in]
    scale: float = 1.0

    def delta(self) -> Any:
        return self.D * self.scale

    def low_rank(self) -> LowRank:
        B, A = split(self.D)
        return LowRank(A, B, self.scale)


def unit(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out,in] as B A of the least rank that holds any: one factor is it, the other an identity."""
    out, width = whole.shape
    return (unit(out, whole), whole) if out < width else (whole, unit(width, whole))


def rows_norm(V: Tensor) -> Tensor:
    """‖V‖ of each row -> [out,1]"""
    return torch.linalg.vector_norm(V, dim=1, keepdim=True)


def decomposed(W: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's ΔW from the base's weight [out,in], the low-rank update [out,in] and the rows' magnitudes [out]."""
    V = W + delta
    return V * (magnitude.view(-1, 1) / rows_norm(V)) - W


def over_base(W: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """What stands for m where a program divides by ‖W‖ and not by ‖V‖: m ‖W‖ / ‖V‖ of each row -> [out]"""
    return magnitude.flatten() * (rows_norm(W) / rows_norm(W + delta)).flatten()


def of_paper(W: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """m again from `over_base` -> [out]"""
    return scale.flatten() * (rows_norm(W + delta) / rows_norm(W)).flatten()


def decomposed_by_input(W: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """ΔW of LyCORIS's older DoRA: one magnitude for each input [in], and the norm of each input's weights.

    W, delta [out,in · kernel]
    """
    V = (W + delta).unflatten(1, (magnitude.numel(), -1))  # [out,in,kernel]
    norm = torch.linalg.vector_norm(V, dim=(0, 2), keepdim=True)
    return (V * (magnitude.view(1, -1, 1) / norm)).flatten(1) - W
