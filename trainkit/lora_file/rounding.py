"""Whether a file holds what it should: every entry of ΔW within what rounding the file's own numbers can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.adapters.updates import LowRank, Update, decomposed, rows_norm
from trainkit.lora_file.layer import LayerUpdate, Magnitude

EXACT = torch.finfo(torch.float64).eps  # of the arithmetic in which files are compared
Weight = Callable[[], Tensor]  # the base's W of a layer, [out,in] fp64, when it is needed


@dataclass(frozen=True)
class Rounded:
    """A matrix and how far each entry may be from its value before the numbers it is made of were rounded, fp64.

    Errors of products are bounded by |X| dY + dX |Y| + dX dY.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def read(cls, X: Tensor) -> Rounded:
        """A factor from a file, a convolution's kernel in a row; twice the rounding, as a scale was rounded with it."""
        return cls(X.double().flatten(1), 2 * rounding(X).flatten(1))

    def __matmul__(self, other: Rounded) -> Rounded:
        return self._product(other, torch.matmul)

    def kron(self, other: Rounded) -> Rounded:
        return self._product(other, torch.kron)

    def __mul__(self, other: Rounded | float) -> Rounded:
        if isinstance(other, Rounded):
            return self._product(other, torch.mul)
        return Rounded(self.value * other, self.error * abs(other))

    def _product(self, other: Rounded, times: Callable[[Tensor, Tensor], Tensor]) -> Rounded:
        X, Y = self.value.abs(), other.value.abs()
        error = times(X, other.error).add_(times(self.error, Y.add_(other.error)))
        return Rounded(times(self.value, other.value), error)

    def decomposed(self, W: Tensor, magnitude: Tensor, magnitude_error: float = 0.0) -> Rounded:
        """DoRA's ΔW where this is the low-rank update; the magnitudes [out] have a relative error.

        With s = m / ‖V‖ and e = ‖dV‖ / ‖V‖ + dm of a row, s V is off by |s| (dV + e (|V| + dV)), and by the arithmetic.
        """
        V = W + self.value
        norm = rows_norm(V)
        s, e = (magnitude.view(-1, 1) / norm).abs(), rows_norm(self.error) / norm + magnitude_error
        error = s * (self.error + e * (V.abs() + self.error)) + 4 * EXACT * (s * V.abs() + W.abs())
        return Rounded(decomposed(W, self.value, magnitude), error)

    def over_base(self, W: Tensor, scale: Tensor) -> Rounded:
        """ΔW = V · scale / ‖W‖ − W, where `scale` [out] was computed from the exact V and then rounded."""
        V, s = W + self.value, scale.double().view(-1, 1) / rows_norm(W)
        e = torch.finfo(scale.dtype).eps
        error = s.abs() * (self.error + e * (V.abs() + self.error)) + 4 * EXACT * (s.abs() * V.abs() + W.abs())
        return Rounded(V * s - W, error)


def rounding(X: Tensor) -> Tensor:
    """Largest error of rounding to the nearest number of X's dtype, entry by entry, fp64: max(u |X|, s/2).

    u is half of the dtype's eps, s its smallest subnormal.
    """
    limits = torch.finfo(X.dtype)
    return (X.double().abs() * limits.eps / 2).clamp(min=limits.tiny * limits.eps / 2)


def compare(found: LayerUpdate, wanted: LayerUpdate, weight: Weight | None) -> tuple[float, bool]:
    """-> max|found − wanted| relative to the largest entry of ΔW, and whether every entry is within rounding.

    weight  where there are magnitudes; without it, the factors' own product and the magnitudes are compared
    """
    if not same_magnitudes(found, wanted, exactly=weight is None):
        return math.inf, False
    W = weight() if weight and wanted.magnitude is not None else None
    by_input = wanted.magnitude is not None and wanted.magnitude.by_input
    exact = double(wanted)
    target = exact.update.delta() if W is None or by_input else exact.delta(W)
    try:
        stated = found.update.map(Rounded.read).delta()
    except RuntimeError:  # factors that do not fit one another
        return math.inf, False
    if stated.value.shape != target.shape:
        return math.inf, False
    if W is not None and found.magnitude is not None and not by_input:
        stated = decomposed_as(found.magnitude, stated, W, computed=wanted.magnitude)
    error = (stated.value - target).abs_()  # [out,in]
    largest, size = float(error.max()), float(target.abs().max())
    return largest / (size or 1.0), math.isfinite(largest) and bool((error <= stated.error).all())


def decomposed_as(held: Magnitude, stated: Rounded, W: Tensor, computed: Magnitude | None) -> Rounded:
    """ΔW by the form of the magnitudes that a file has, which were computed from those that are wanted."""
    if held.over_base:
        return stated.over_base(W, held.value)
    changed = computed is not None and computed.over_base
    return stated.decomposed(W, held.value.double(), 2 * torch.finfo(held.value.dtype).eps if changed else 0.0)


def same_magnitudes(found: LayerUpdate, wanted: LayerUpdate, *, exactly: bool) -> bool:
    """Whether both have magnitudes of one form, and where it is to be found out so, equal ones."""
    held, asked_for = found.magnitude, wanted.magnitude
    if held is None or asked_for is None:
        return held is asked_for
    if held.by_input != asked_for.by_input or held.value.numel() != asked_for.value.numel():
        return False
    needs_equal = exactly or held.by_input
    return not needs_equal or (held.over_base == asked_for.over_base
                               and torch.equal(held.value.double(), asked_for.value.double()))


def compare_factors(found: LayerUpdate, wanted: LayerUpdate, weight: Weight | None) -> tuple[float, bool]:
    """As `compare`, and (0, True) where the factors and the magnitudes are the wanted ones but for rounding."""
    trained, held = double(wanted).update, found.magnitude
    if not isinstance(found.update, type(trained)):
        trained = trained.low_rank()
    expected = wanted
    if held is not None and held.over_base and weight is not None:
        expected = wanted.over_base(weight())
    same = (held is None) == (expected.magnitude is None) and (
        held is None or torch.equal(held.value, expected.magnitude_value.to(held.value)))
    proven = same and isinstance(found.update, type(trained)) and are_rounded(found.update.map(Rounded.read), trained)
    return (0.0, True) if proven else compare(found, wanted, weight)


def double(layer: LayerUpdate) -> LayerUpdate:
    return LayerUpdate(layer.update.map(lambda factor: factor.double()), layer.kernel, layer.magnitude)


def are_rounded(stated: Update, trained: Update) -> bool:
    """Whether each factor is within its rounding of a trained one; then ΔW is, by |X| dY + dX |Y| + dX dY.

    One factor takes the quotient of the two scales. The components of B A may be balanced by powers of two.
    """
    found = {name: factor for name, factor in vars(stated).items() if isinstance(factor, Rounded)}
    wanted = {name: factor for name, factor in vars(trained).items() if isinstance(factor, Tensor)}
    shapes, expected = ({n: f.value.shape for n, f in found.items()}, {n: f.shape for n, f in wanted.items()})
    if shapes != expected or stated.scale == 0 or not all(bool(f.value.isfinite().all()) for f in found.values()):
        return False
    taker = next(name for name in ("D", "B", "B1") if name in wanted)
    wanted[taker] = wanted[taker] * (trained.scale / stated.scale)
    if isinstance(trained, LowRank):
        shift = (found["A"].value.abs().amax(1) / wanted["A"].abs().amax(1)).log2().round().exp2()  # [r]
        shift = torch.where(shift.isfinite() & (shift > 0), shift, 1.0)
        wanted = {"A": wanted["A"] * shift.unsqueeze(1), "B": wanted["B"] / shift}
    return all(bool(((found[name].value - factor).abs() <= found[name].error).all()) for name, factor in wanted.items())
