"""Modes and presets of the Fourier loss: which scales it compares, and how much their high frequencies count.

A mode turns its scales into terms, as a function of progress, the fraction of the run that is over.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypedDict, TypeVar

HIGH_FREQ_BOUNDS = (1.0, 3.0)  # between which a high-frequency weight is clipped

# Factor of the high-frequency weight: its highest and lowest value, progress in [0,1] -> value
CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda high, low, progress: high - (high - low) * progress,
    "cosine": lambda high, low, progress: low + (high - low) * (1 + math.cos(math.pi * progress)) / 2,
    "exponential": lambda high, low, progress: low + (high - low) * math.exp(-5 * progress),
}

# ----------------------------------------------------------------------------------------------------------------------
# Modes

T = TypeVar("T")
ScaleTerm = tuple[float, int, float]  # a term's weight, its scale, its high-frequency weight before it is clipped


class ModeSettings(Protocol):
    """What a mode reads of a `FourierLoss`."""

    @property
    def high_freq_weight(self) -> float | None: ...

    @property
    def mix(self) -> tuple[float, float] | None: ...

    @property
    def adaptive_scaling(self) -> bool | None: ...

    def curve(self, progress: float) -> float: ...


def even(loss: ModeSettings, progress: float, terms: Sequence[ScaleTerm]) -> list[ScaleTerm]:
    return [(weight, scale, 1.0) for weight, scale, _ in terms]


def weighted(loss: ModeSettings, progress: float, terms: Sequence[ScaleTerm]) -> list[ScaleTerm]:
    return [(weight, scale, filled(loss.high_freq_weight)) for weight, scale, _ in terms]


def adaptive(loss: ModeSettings, progress: float, terms: Sequence[ScaleTerm]) -> list[ScaleTerm]:
    return [(weight, scale, loss.curve(progress)) for weight, scale, _ in terms]


def unified(loss: ModeSettings, progress: float, terms: Sequence[ScaleTerm]) -> list[ScaleTerm]:
    """α of all scales and β of the full size; adaptive_scaling moves weight from the first to the second."""
    alpha, beta = filled(loss.mix)
    if loss.adaptive_scaling:
        alpha, beta = alpha * (1.5 - 0.5 * progress), beta * (1 + 0.5 * progress)
        alpha, beta = alpha / (alpha + beta), beta / (alpha + beta)
    a, full = loss.curve(progress), filled(loss.high_freq_weight)
    return [*((alpha * weight, scale, a * high) for weight, scale, high in terms), (beta, 1, a * full)]


def filled(setting: T | None) -> T:
    """A setting that is read, so that `FourierLoss` has put a value in place of its None."""
    assert setting is not None
    return setting


def clip(high: float) -> float:
    """A high-frequency weight as it counts."""
    return min(max(high, HIGH_FREQ_BOUNDS[0]), HIGH_FREQ_BOUNDS[1])


class ModeFields(TypedDict, total=False):
    """Fields of FourierLoss with a mode's value for each."""

    high_freq_weight: float
    scales: tuple[int, ...]
    scale_high_freq_weights: tuple[float, ...]
    adaptive_max_weight: float
    adaptive_min_weight: float
    adaptive_mode: str
    mix: tuple[float, float]
    adaptive_scaling: bool


class Mode(NamedTuple):
    """How a mode makes its terms of those that its scales give, and the fields that it reads, with their defaults."""

    terms: Callable[[ModeSettings, float, Sequence[ScaleTerm]], list[ScaleTerm]]
    fields: ModeFields
    decay: float = 0.5  # the weight of a scale is scale^−decay


UNIFIED: ModeFields = {
    "high_freq_weight": 2.0, "scales": (1, 2, 4), "adaptive_max_weight": 2.5, "adaptive_min_weight": 0.8,
    "adaptive_mode": "linear", "mix": (0.6, 0.4), "adaptive_scaling": True}
MODES: dict[str, Mode] = {
    "basic": Mode(even, {}),
    "weighted": Mode(weighted, {"high_freq_weight": 2.0}),
    "multiscale": Mode(even, {"scales": (1, 2)}, decay=1),
    "adaptive": Mode(adaptive, {"adaptive_max_weight": 2.0, "adaptive_min_weight": 0.5, "adaptive_mode": "linear"}),
    "unified": Mode(unified, UNIFIED),
    "unified_basic": Mode(unified, UNIFIED | {
        "scales": (1,), "high_freq_weight": 1.5, "adaptive_max_weight": 2.0, "adaptive_min_weight": 1.0}),
    "unified_balanced": Mode(unified, UNIFIED | {"scales": (1, 2)}),
    "unified_detail": Mode(unified, UNIFIED | {
        "high_freq_weight": 2.5, "scale_high_freq_weights": (2.0, 2.5, 3.0), "adaptive_max_weight": 3.0,
        "adaptive_min_weight": 1.0, "adaptive_mode": "cosine", "mix": (0.7, 0.3)}),
    "unified_adaptive": Mode(unified, UNIFIED | {
        "scales": (1, 2), "adaptive_max_weight": 2.8, "adaptive_min_weight": 0.5, "adaptive_mode": "exponential"}),
}

# ----------------------------------------------------------------------------------------------------------------------
# Presets

PRESETS: dict[str, dict[str, object]] = {
    "conservative": dict(weight=0.01, mode="basic", norm="l2", high_freq_weight=1.5, warmup_steps=500),
    "balanced": dict(weight=0.05, mode="weighted", norm="l2", high_freq_weight=2.0, warmup_steps=300),
    "aggressive": dict(weight=0.10, mode="multiscale", norm="l1", scales="1,2,4", warmup_steps=200),
    "super_resolution": dict(weight=0.08, mode="adaptive", norm="l2", adaptive_max_weight=3.0, adaptive_min_weight=1.0,
                             warmup_steps=400),
    "fine_detail": dict(weight=0.12, mode="weighted", norm="l1", high_freq_weight=2.5, warmup_steps=100),
    "unified_basic": dict(weight=0.03, mode="unified_basic", norm="l2", warmup_steps=250),
    "unified_balanced": dict(weight=0.06, mode="unified_balanced", norm="l2", warmup_steps=250),
    "unified_detail": dict(weight=0.08, mode="unified_detail", norm="l2", warmup_steps=200),
    "unified_adaptive": dict(weight=0.07, mode="unified_adaptive", norm="l2", warmup_steps=300),
    "unified_custom": dict(weight=0.05, mode="unified", norm="l2", high_freq_weight=2.0, scales="1,2,4",
                           adaptive_max_weight=2.5, adaptive_min_weight=0.8, warmup_steps=250),
}


def get_fourier_loss_config(name: str = "balanced") -> dict[str, object]:
    """The settings of a preset, by the names of their flags, to be edited and given to `FourierLoss.from_config`.

    Raises ValueError for a name that is no preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"fourier_config {name!r} is no preset{nearest(str(name), PRESETS)}: choose one of "
                         f"{', '.join(PRESETS)}")
    return {f"fourier_{field}": value for field, value in PRESETS[name].items()}


def nearest(name: str, choices: Iterable[str]) -> str:
    """", did you mean …?" where a choice is like the name, else nothing."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f", did you mean {found[0]}?" if found else ""
