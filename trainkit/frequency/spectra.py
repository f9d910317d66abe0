"""The Fourier loss: the spectrum of a prediction against that of its target.

    METRICS, NORMALIZERS, GATES   how spectra are compared, by what they are divided, at which noise levels they count
    parsed_bands, coefficients    how much each frequency counts
    FourierLoss                   the loss; `presets` has its modes and presets

B samples, C channels, h,w latent height and width; X the orthonormal DFT of a plane.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import lru_cache, partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.frequency.bands import TINY, cached, refuse_unknown, widened
from trainkit.frequency.presets import CURVES, MODES, ScaleTerm, clip, filled, nearest

LEAST_SIDE = 2  # of pooled latents; a side of 1 has its mean alone
LEAST_SPREAD = 1e-3  # latents and noise have a variance of about 1: what is flatter counts as being this flat
CAP_RATIO = 10.0  # how many times its base a sample's Fourier loss may be before it counts less
CAP_FLOOR = 0.1  # ... and how little it may count then

# ----------------------------------------------------------------------------------------------------------------------
# Spectra of [B,C,h,w]: orthonormal, and half of each, because the spectrum of real numbers is symmetric


def power(x: Tensor) -> Tensor:
    """|X|² -> [B,C,h,w//2 + 1]."""
    X = torch.fft.rfft2(x, norm="ortho")
    return X.real.square() + X.imag.square()


def complex_error(p: Tensor, t: Tensor, norm: str, eps: float) -> Tensor:
    """|X_p − X_t|^q; for l1 √(|X_p − X_t|² + ε²) − ε, which has a gradient everywhere."""
    squares = power(p - t)
    return squares if norm == "l2" else (squares + eps**2).sqrt() - eps


def magnitude_error(p: Tensor, t: Tensor, norm: str, eps: float) -> Tensor:
    """| |X_p| − |X_t| |^q with |X| = √(re² + im² + ε²): another sign or a shift is no error."""
    difference = (power(p) + eps**2).sqrt() - (power(t) + eps**2).sqrt()
    return difference.square() if norm == "l2" else difference.abs()


# Pred, target, norm, eps -> Δ [B,C,h,w//2 + 1]
METRICS: dict[str, Callable[[Tensor, Tensor, str, float], Tensor]] = {
    "magnitude": magnitude_error, "complex": complex_error,
}
# Standard deviation (x -> [B,1,1,1]), pred, target -> both, divided
NORMALIZERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda spread, p, t: (p, t),
    "target": lambda spread, p, t: (p / (of_target := spread(t)), t / of_target),
    "separate": lambda spread, p, t: (p / spread(p), t / spread(t)),
}


def pooled(x: Tensor, scale: int) -> Tensor:
    """Means of scale x scale; what is left over at the ends is left out."""
    return F.avg_pool2d(x, scale) if scale > 1 else x


def planes(x: Tensor) -> Tensor:
    """[B,...,h,w] -> [B,C,h,w]"""
    return x.unsqueeze(1).flatten(1, -3)


# ----------------------------------------------------------------------------------------------------------------------
# How much each frequency counts

NAMED_BANDS = {"low": (0.0, 1 / 3), "mid": (1 / 3, 2 / 3), "high": (2 / 3, 1.0)}


def parsed_bands(text: str) -> list[tuple[float, float, float]]:
    """"0.7-1:2,low:0.5" -> [(0, 1/3, 0.5), (0.7, 1, 2)], in order.

    Raises ValueError for what is no range and weight, and for ranges that overlap.
    """
    ranges, bare = [], text.replace(" ", "").lower()
    for part in bare.split(",") if bare else ():
        name, _, value = part.partition(":")
        try:
            low, high = NAMED_BANDS[name] if name in NAMED_BANDS else map(float, re.split("(?<!e)-", name))
            weight = float(value)
        except ValueError:
            low, high, weight = 0.0, 0.0, -1.0
        if not (0 <= low < high <= 1 and 0 <= weight < math.inf):
            raise ValueError(f"fourier_bands {part or text!r} is no range and weight: write high:2, low:0.5 or "
                             "0.25-0.5:3, with low, mid, high or a range within 0-1, and a weight of 0 or more")
        ranges.append((low, high, weight))
    ranges.sort()
    if any(end > start for (_, end, _), (start, _, _) in zip(ranges, ranges[1:], strict=False)):
        raise ValueError(f"fourier_bands {text!r} overlap, but a frequency has one weight: let each range begin where "
                         "the one below it ends, or later")
    return ranges


def written_bands(bands: Iterable[tuple[float, float, float]]) -> str:
    """The one spelling of ranges and weights."""
    names = {ends: name for name, ends in NAMED_BANDS.items()}
    return ",".join(f"{names.get((low, high), f'{plain(low)}-{plain(high)}')}:{plain(weight)}"
                    for low, high, weight in bands)


def plain(number: float) -> str:
    """2.0 -> "2"."""
    return repr(float(number)).removesuffix(".0")


def multiplicities(h: int, w: int) -> Tensor:
    """How often a coefficient of rfft2 stands in fft2 -> [h, w//2 + 1] of 1 and 2."""
    columns = torch.full((w // 2 + 1,), 2.0, dtype=torch.float64)
    columns[[0] if w % 2 else [0, -1]] = 1
    return columns.expand(h, -1)


def radius(h: int, w: int) -> Tensor:
    """ρ̂ = √2·√(f_y² + f_x²) of rfft2's frequencies, 1 in the corner -> [h, w//2 + 1]."""
    rows, columns = torch.fft.fftfreq(h, dtype=torch.float64), torch.fft.rfftfreq(w, dtype=torch.float64)
    return torch.hypot(rows[:, None], columns) * math.sqrt(2)


def coefficients(h: int, w: int, scale: int, bands: str, dc: bool) -> Tensor:
    """How much |error|^q of a coefficient counts in Q0 and in Q1 -> [2,h,w//2 + 1]; includes the mean over h·w."""
    rho = radius(h, w)
    in_q0 = multiplicities(h, w) / (h * w)
    for low, high, value in parsed_bands(bands):  # of the latents' own frequencies, which pooling stretches
        inside = (rho / scale >= low) & (rho / scale < (high if high < 1 else math.inf))
        in_q0 = torch.where(inside, in_q0 * value, in_q0)
    in_q0[0, 0] *= dc
    return torch.stack([in_q0, in_q0 * (4 * (rho - 0.5)).sigmoid()])


# ----------------------------------------------------------------------------------------------------------------------
# Gates: how much a sample, or each of its frequencies, counts at its noise level


def rings(h: int, w: int) -> Tensor:
    """The ring of |k|, below max(h,w), of a coefficient, and its weight in the ring's mean -> [2,h,w//2 + 1]."""
    ring, times = (radius(h, w) / math.sqrt(2) * max(h, w)).round().long(), multiplicities(h, w)
    return torch.stack([ring, times / torch.bincount(ring.flatten(), times.flatten())[ring]])


@torch.no_grad()
def wiener(clean: Tensor, snr: Tensor) -> Tensor:
    """S·snr/(S·snr + 1), the fraction of signal in each frequency, S of clean latents [B,C,h,w] -> [B,h,w//2 + 1].

    S is the mean of |X|² over channels and rings; noise has 1 in every frequency.
    """
    h, w = clean.shape[-2:]
    ring, ring_weights = cached(rings, h, w, like=clean)
    ring, parts = ring.long().flatten(), (power(clean).mean(1) * ring_weights).flatten(1)
    spectrum = parts.new_zeros(len(parts), max(h, w)).index_add(1, ring, parts)[:, ring]
    return (spectrum / (spectrum + 1 / snr.to(clean)[:, None]).clamp(min=TINY)).view(-1, h, w // 2 + 1)


class Gate(NamedTuple):
    """Factors of a sample, and of each of its frequencies, at its signal-to-noise ratio; None: 1.

    fields: the settings that the gate reads
    """

    sample: Callable[[Tensor, float, float], Tensor] | None = None  # snr [B], gate_min_snr, gate_max_snr -> [B]
    frequency: Callable[[Tensor, Tensor], Tensor] | None = None  # clean latents, snr [B] -> [B,h,w//2 + 1]
    fields: tuple[str, ...] = ()


GATES: dict[str, Gate] = {
    "none": Gate(),
    "snr": Gate(sample=lambda snr, low, high: (snr >= low).to(snr), fields=("gate_min_snr",)),
    "linear": Gate(sample=lambda snr, low, high: ((snr / low).log() / math.log(high / low)).clamp(0, 1),
                   fields=("gate_min_snr", "gate_max_snr")),
    "wiener": Gate(frequency=wiener),
}


# ----------------------------------------------------------------------------------------------------------------------
# Settings: their types and values, and which of them go together

FOURIER_CHOICES: dict[str, Iterable[str]] = {
    "mode": MODES, "norm": ("l1", "l2"), "metric": METRICS, "space": ("prediction", "x0"), "normalize": NORMALIZERS,
    "balance": ("cap", "none"), "timestep_gate": GATES, "adaptive_mode": CURVES,
}
FOURIER_LISTS = {"scales": int, "scale_weights": float, "scale_high_freq_weights": float, "mix": float}
NOT_NEGATIVE, POSITIVE = (lambda v: v >= 0, "0 or more"), (lambda v: v > 0, "above 0")
FOURIER_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("weight", "warmup_steps", "ramp_steps", "mix"), NOT_NEGATIVE),
    **dict.fromkeys(("high_freq_weight", "scales", "scale_weights", "scale_high_freq_weights", "adaptive_max_weight",
                     "adaptive_min_weight", "gate_min_snr", "gate_max_snr"), POSITIVE),
    "eps": (lambda v: 1e-15 <= v < 1, "from 1e-15, below which its square is 0, to below 1"),
}
FOURIER_TYPES: dict[str, tuple[type, Callable[[Any], object], str]] = {  # by a field's annotation
    "float": (Real, float, "a number"), "int": (Integral, int, "a whole number"), "str": (str, str, "text"),
    "bool": (bool, bool, "True or False"),
}


def typed(field: Field, value: object) -> object:
    """A setting that is no list, as its field's type (bands may be a list). Raises ValueError for another type."""
    type_name, optional, _ = str(field.type).partition(" | None")
    if type_name not in FOURIER_TYPES or optional and value is None:
        return value
    if field.name == "bands" and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    wanted, make, what = FOURIER_TYPES[type_name]
    if not isinstance(value, wanted) or isinstance(value, bool) and type_name != "bool":
        example = "None, for what the mode says" if optional else f"the default {field.default!r}"
        raise ValueError(f"fourier_{field.name} {value!r} is not {what}: give {what}, or {example}")
    try:
        return make(value)
    except OverflowError:  # of a whole number that no float holds
        return math.inf


def listed(name: str, value: object, number_type: type) -> tuple | None:
    """"1,2,4" or a sequence -> a tuple of that kind. Raises ValueError for anything else."""
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        numbers = tuple(number_type(part) for part in parts)
        if numbers and all(isinstance(part, str) or part == n for n, part in zip(numbers, parts, strict=True)):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    numbers_of = "whole numbers" if number_type is int else "numbers"
    raise ValueError(f"fourier_{name} {value!r} is no list of {numbers_of}: write it as 1,2,4")


def shown(value: object) -> str:
    """(1, 2, 4) -> "1,2,4"."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settings_in_use(loss: FourierLoss) -> dict[str, object]:
    """All settings except those that only other modes and gates read."""
    read = {"normalize", *MODES[loss.mode].fields, *GATES[loss.timestep_gate].fields}
    read |= {"scale_weights"} if "scales" in read else set()
    read |= {"scale_high_freq_weights"} if "mix" in read else set()
    optional = {field.name for field in fields(loss) if field.default is None}
    unread = (optional | {"gate_min_snr", "gate_max_snr"}) - read
    return {field.name: getattr(loss, field.name) for field in fields(loss) if field.name not in unread}


def refuse_values(loss: FourierLoss) -> None:
    """Raises ValueError for a setting that means nothing."""
    for name, choices in FOURIER_CHOICES.items():
        if getattr(loss, name) is not None:
            refuse_unknown(f"fourier_{name}", getattr(loss, name), choices)
    for name, (right, what) in FOURIER_NUMBERS.items():
        value = getattr(loss, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(right(number) and number < math.inf for number in values):
            raise ValueError(f"fourier_{name} {shown(value)} means nothing: give a finite number {what}")


def refuse_pairs(loss: FourierLoss) -> None:
    """Raises ValueError for settings that do not go together, if both are read."""
    read = settings_in_use(loss)
    if "gate_max_snr" in read and loss.gate_min_snr >= loss.gate_max_snr:
        raise ValueError(f"fourier_gate_min_snr {loss.gate_min_snr} is not below fourier_gate_max_snr "
                         f"{loss.gate_max_snr}: lower the first, or raise the second")
    high, low = loss.adaptive_max_weight, loss.adaptive_min_weight
    if "adaptive_max_weight" in read and filled(low) > filled(high):
        raise ValueError(f"fourier_adaptive_min_weight {low} is above fourier_adaptive_max_weight {high}: give the "
                         "higher one as maximum")
    if "mix" in read and (len(mix := filled(loss.mix)) != 2 or not sum(mix)):
        raise ValueError(f"fourier_mix {shown(mix)} is not two numbers, what all scales count and what the "
                         "full size does, with one above 0: write it as 0.6,0.4")
    for name in (n for n in ("scale_weights", "scale_high_freq_weights") if n in read):
        value, scales = getattr(loss, name), filled(loss.scales)
        if len(value) != len(scales):
            raise ValueError(f"fourier_{name} {shown(value)} has {len(value)} numbers for the {len(scales)} of "
                             f"fourier_scales {shown(scales)}: give one for each")


def mode_defaults(loss: FourierLoss) -> dict[str, object]:
    """Values in place of None, for the settings that the mode reads."""
    _, defaults, decay = MODES[loss.mode]
    values = {**defaults, "normalize": "target" if loss.metric == "magnitude" else "none"}
    if "scales" in defaults:
        scales = loss.scales or defaults["scales"]
        values["scale_weights"] = tuple(scale**-decay for scale in scales)
    if "mix" in defaults and (loss.scales or loss.high_freq_weight or "scale_high_freq_weights" not in defaults):
        values["scale_high_freq_weights"] = (loss.high_freq_weight or defaults["high_freq_weight"],) * len(scales)
    return {name: value for name, value in values.items() if getattr(loss, name) is None}


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@lru_cache
def warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def refuse_tensors(
    pred: Tensor, target: Tensor, *, mask: Tensor | None, clean: Tensor | None, **samples: Tensor | None,
) -> None:
    """Raises ValueError for tensors that do not fit pred; those in `samples` are one number a sample."""
    shape = tuple(pred.shape)
    if pred.is_complex() or target.is_complex():
        raise ValueError(f"pred and target of the Fourier loss are {pred.dtype} and {target.dtype}, but it compares "
                         "real tensors: give those, not their spectra")
    for name, like in {"target": target, "clean": clean}.items():
        if like is not None and like.shape != pred.shape:
            raise ValueError(f"pred {shape} and {name} {tuple(like.shape)} of the Fourier loss do not have one shape: "
                             f"give {name} the shape of pred")
    if not shape:
        raise ValueError("pred and target of the Fourier loss are single numbers: give [B,...,h,w]")
    for name, each in samples.items():
        if each is not None and each.shape != shape[:1]:
            raise ValueError(f"{name} {tuple(each.shape)} of the Fourier loss does not fit pred {shape}: give one "
                             f"number of each sample, [{shape[0]}]")
    if mask is not None and not broadcasts(mask.shape, shape):
        raise ValueError(f"mask {tuple(mask.shape)} of the Fourier loss does not fit pred {shape}: give a shape that "
                         "broadcasts to it, such as [B,1,h,w]")


def broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(small), reversed(shape), strict=False)
    return len(small) <= len(shape) and all(a in (1, b) for a, b in pairs)


class FourierPart(NamedTuple):
    """What the Fourier loss adds to the loss of each sample, all [B]."""

    added: Tensor  # factor · weight · raw
    raw: Tensor  # L_F, detached; 0 for a sample that does not count
    weight: Tensor  # weight · gain · ramp · g · b, detached


@dataclass(frozen=True)
class FourierLoss:
    """The spectrum of a prediction against that of its target, as losses [B].

        L_F = Σ_s A_s Q0_s + B_s Q1_s         Q0 = <Δ>, Q1 = <S·Δ>, S = sigmoid(4(ρ̂ − ½)), of latents pooled by s
        Δ   = | |X_p| − |X_t| |^q (magnitude) or |X_p − X_t|^q (complex), q = 1 or 2 by norm, X the orthonormal DFT
        <Δ> = mean over channels and all h·w frequencies; ρ̂ = √2·cycles per pixel, 1 in the corner

    A term of weight c with the high-frequency weight w is c·(Q0 + (w − 1)·Q1), w clipped to [1,3]; π = progress:

        basic       w = 1                                     weighted    w = high_freq_weight
        adaptive    w = a(π), from adaptive_max_weight to adaptive_min_weight by adaptive_mode
        multiscale  w = 1, c = ω_s/Σω of each scale; scales that leave less than 2x2 are left out
        unified…    α(π)·ω_s/Σω with w = h_s·a(π) of each scale, and β(π) with w = high_freq_weight·a(π) of scale 1

    None stands for the mode's own value (`MODES`), which is filled in where the mode reads it.
    mix         α, β; adaptive_scaling: α(1 + ½(1−π)) and β(1 + ½π), divided by their sum
    normalize   p and t are divided by the target's standard deviation (target: magnitude's default), each by its own
                (separate), or not at all (none: complex's default). The standard deviation is that of one sample at one
                scale, inside its mask, and 0.001 at least (`LEAST_SPREAD`)
    space       what pred and target are: prediction, or x0 (the mean of a channel does not count)
    bands       weights of ranges of ρ̂ of the latents, as "low:0.5,high:2" or "0.25-0.5:3", which may not overlap; the
                other frequencies keep 1
    balance     cap: b = clamp(10·base/L_F, 0.1, 1), without a gradient; none: b = 1
    timestep_gate  none; snr: g = 1 from gate_min_snr; linear: g from 0 to 1 in log SNR up to gate_max_snr; wiener:
                Δ times the fraction of signal in its frequency at that noise level, by the sample's own clean latents

    (complex, l2) is a quadratic form: its optimum is the conditional mean for any weights, as for MSE. magnitude sees
    neither sign nor shift, and its optimum has larger amplitudes than the mean: those of (μ + λR)/(1 + λ), where
    R = E|X_t|, the Rician mean (Rice 1945, "Mathematical Analysis of Random Noise"). Sources: Jiang et al. 2021, "Focal
    Frequency Loss for Image Reconstruction and Synthesis" (complex distance); Wiener 1949, "Extrapolation,
    Interpolation, and Smoothing of Stationary Time Series". Raises ValueError for values that do not go together.
    """

    weight: float = 0.05
    mode: str = "weighted"
    norm: str = "l2"
    high_freq_weight: float | None = None
    scales: tuple[int, ...] | None = None
    scale_weights: tuple[float, ...] | None = None
    scale_high_freq_weights: tuple[float, ...] | None = None
    adaptive_max_weight: float | None = None
    adaptive_min_weight: float | None = None
    adaptive_mode: str | None = None
    mix: tuple[float, float] | None = None
    adaptive_scaling: bool | None = None
    warmup_steps: int = 300
    ramp_steps: int = 0
    eps: float = 1e-8
    metric: str = "magnitude"
    space: str = "prediction"
    normalize: str | None = None
    balance: str = "cap"
    timestep_gate: str = "none"
    gate_min_snr: float = 0.1
    gate_max_snr: float = 10.0
    bands: str = ""

    def __post_init__(self) -> None:
        fill = vars(self).update  # the only place that may write to this frozen class
        fill({field.name: typed(field, getattr(self, field.name)) for field in fields(self)})
        fill({name: listed(name, getattr(self, name), type_name) for name, type_name in FOURIER_LISTS.items()})
        refuse_values(self)
        fill({"bands": written_bands(parsed_bands(self.bands))})
        fill(mode_defaults(self))
        refuse_pairs(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FourierLoss:
        """The loss with these settings, given by the names of their flags. Raises ValueError for an unknown name."""
        names = {f"fourier_{field.name}": field.name for field in fields(cls)}
        for key in config:
            if key not in names:
                raise ValueError(f"{key!r} is no setting of the Fourier loss{nearest(str(key), names)}: choose one "
                                 f"of {', '.join(names)}")
        return cls(**{names[key]: value for key, value in config.items()})

    def config(self) -> dict[str, object]:
        """The resolved settings by the names of their flags, for JSON, without those that mode and gate do not read."""
        return {f"fourier_{name}": shown(value) if isinstance(value, tuple) else value
                for name, value in settings_in_use(self).items()}

    def __call__(
        self, pred: Tensor, target: Tensor, *, base: Tensor, factor: Tensor | None = None, step: int, total_steps: int,
        mask: Tensor | None = None, snr: Tensor | None = None, clean: Tensor | None = None, gain: float = 1.0,
    ) -> FourierPart:
        """What is added to the losses `base` [B] of pred and target [B,...,h,w] at an optimizer step, from 0.

            added = factor · weight · gain · ramp(step) · g · b · L_F       b by base and factor · L_F

        factor  [B] the weight of one unit of L_F, which base includes already; None: 1
        mask    how much each place of pred and target counts; broadcasts to their shape
        snr     [B], for every gate; clean: latents of pred's shape, for wiener

        Raises ValueError for tensors that do not fit, and where one that the gate needs is missing.
        """
        refuse_tensors(pred, target, mask=mask, clean=clean, base=base, factor=factor, snr=snr)
        zeros = widened(base.detach()).new_zeros(len(base))
        nothing = FourierPart(zeros, zeros, zeros)

        # Nothing is computed while the weight is 0, or if no sample counts.
        rate = self.weight * self.ramp(step) * gain
        if not self._spatial(pred) or not rate:
            return nothing
        factor = torch.ones_like(zeros) if factor is None else factor.detach().to(zeros)
        weight = rate * self._gate(snr, clean, zeros)
        active = factor * weight != 0
        if active.device.type == "cpu" and not active.any():  # an accelerator would have to be waited for
            return nothing

        raw = self._compare(pred, target, active, min(step / max(total_steps, 1), 1.0), mask, snr, clean)
        if self.balance == "cap":
            size = factor * raw.detach()
            b = (CAP_RATIO * base.detach().to(size) / size).clamp(CAP_FLOOR, 1)
            weight = weight * b.nan_to_num(1)  # 0/0
        return FourierPart(factor * weight * raw, raw.detach(), weight)

    def distance(
        self, pred: Tensor, target: Tensor, *, progress: float = 0.0, mask: Tensor | None = None,
        snr: Tensor | None = None, clean: Tensor | None = None,
    ) -> Tensor:
        """g · L_F of pred and target [B,...,h,w] -> [B], fp32 (fp64 of fp64). Raises ValueError as a call does."""
        refuse_tensors(pred, target, mask=mask, clean=clean, snr=snr)
        zeros = widened(pred.detach()).new_zeros(len(pred))
        if not self._spatial(pred):
            return zeros
        gate = self._gate(snr, clean, zeros)
        return gate * self._compare(pred, target, gate > 0, progress, mask, snr, clean)

    def ramp(self, step: int) -> float:
        """0 in the warm-up; then 1, or over ramp_steps from 0 to 1."""
        since = step - self.warmup_steps
        return 0.0 if since < 0 else min(1.0, since / self.ramp_steps) if self.ramp_steps else 1.0

    def idle(self, step: int) -> bool:
        """Whether nothing is added at this step, whatever the tensors."""
        return not self.weight * self.ramp(step)

    def curve(self, progress: float) -> float:
        """a(π)."""
        high, low = filled(self.adaptive_max_weight), filled(self.adaptive_min_weight)
        return CURVES[filled(self.adaptive_mode)](high, low, progress)

    def require(self, latents: Sequence[int]) -> None:
        """Raises ValueError for latents of a shape (C,h,w) that have no frequencies to compare."""
        h, w = latents[-2:]
        if not any(coefficients(h // s, w // s, s, self.bands, self.space != "x0")[0].any()
                   for s in self._plan(h, w, 0.0)):
            raise ValueError(f"fourier_bands {self.bands} leaves nothing of latents of {h}x{w}: give a weight above 0 "
                             "to a range that they have")

    def pinned(self, total_steps: int) -> float:
        """The fraction of the steps in which a high-frequency weight is clipped to [1,3]."""
        steps = min(max(total_steps, 1), 1000)
        terms = self._terms(math.inf)
        return sum(any(w != clip(w) for _, _, w in MODES[self.mode].terms(self, k / steps, terms))
                   for k in range(steps)) / steps

    @property
    def only_rescales(self) -> bool:
        """Whether L_F is the mean squared error, so that adding it to one changes nothing but the learning rate."""
        form = (self.norm, self.metric, self.normalize, self.timestep_gate, self.space)
        plans = [self._plan(math.inf, math.inf, end) for end in (0.0, 1.0)]  # the curves are monotonic
        return (form == ("l2", "complex", "none", "none", "prediction")
                and all(scale == 1 and B == 0 for plan in plans for scale, (_, B) in plan.items())
                and all(value == 1 for _, _, value in parsed_bands(self.bands)))

    def _terms(self, side: float) -> list[ScaleTerm]:
        """(ω_s/Σω, s, h_s) of the scales that leave 2 or more of the latents' shorter side.

        Raises ValueError where none does. A mode without scales has the scale 1.
        """
        read = MODES[self.mode].fields
        scales = filled(self.scales) if "scales" in read else (1,)
        weights = filled(self.scale_weights) if "scales" in read else (1.0,)
        high_freq_weights = filled(self.scale_high_freq_weights) if "mix" in read else (1.0,) * len(scales)
        if side < LEAST_SIDE:
            raise ValueError(f"latents with a side of {side} have no frequencies for the Fourier loss, which needs 2x2 "
                             "or more: train at a higher resolution")
        valid = [term for term in zip(weights, scales, high_freq_weights, strict=True) if term[1] * LEAST_SIDE <= side]
        if not valid:
            raise ValueError(f"fourier_scales {shown(scales)} leave less than 2x2 of latents with a side of {side}: "
                             "add the scale 1, or train at a higher resolution")
        total = sum(weight for weight, _, _ in valid)
        return [(weight / total, scale, high_freq_weight) for weight, scale, high_freq_weight in valid]

    def _plan(self, h: float, w: float, progress: float) -> dict[int, tuple[float, float]]:
        """scale -> A_s, B_s. Raises ValueError for latents that are too small."""
        plan: dict[int, tuple[float, float]] = {}
        for weight, scale, high_freq_weight in MODES[self.mode].terms(self, progress, self._terms(min(h, w))):
            A, B = plan.get(scale, (0.0, 0.0))
            plan[scale] = A + weight, B + weight * (clip(high_freq_weight) - 1)
        return plan

    def _spatial(self, pred: Tensor) -> bool:
        """Whether there are spectra to compare; warns once of tensors with too few axes."""
        if pred.ndim < 3:
            warn_once(f"the Fourier loss needs tensors of at least 3 axes, [B,...,h,w], not {tuple(pred.shape)}: "
                      "it adds nothing for such batches")
        return pred.ndim >= 3 and pred.numel() > 0

    def _gate(self, snr: Tensor | None, clean: Tensor | None, like: Tensor) -> Tensor:
        """g -> [B]. Raises ValueError if the gate needs snr or clean and it is missing."""
        sample, frequency, _ = GATES[self.timestep_gate]
        if (sample or frequency) and snr is None or frequency and clean is None:
            raise ValueError(f"fourier_timestep_gate {self.timestep_gate} goes by the signal-to-noise ratio snr [B]"
                             f"{' and the clean latents' if frequency else ''}, which are missing: give them, or use "
                             "the gate none")
        if sample is None:
            return torch.ones_like(like)
        assert snr is not None
        return sample(snr.detach().to(like), self.gate_min_snr, self.gate_max_snr)

    def _compare(
        self, pred: Tensor, target: Tensor, active: Tensor, progress: float, mask: Tensor | None, snr: Tensor | None,
        clean: Tensor | None,
    ) -> Tensor:
        """L_F -> [B], 0 for a sample that is not active, whatever its pred."""
        with torch.autocast(pred.device.type, enabled=False):
            pred, clean = widened(pred), clean if GATES[self.timestep_gate].frequency else None
            target = target.detach().to(pred)
            mask, clean = (x if x is None else x.detach().to(pred).expand_as(pred) for x in (mask, clean))

            # A sample that is not active has no error, and no NaN of its pred reaches a gradient.
            pred = torch.where(active.view(-1, *[1] * (pred.ndim - 1)), pred, target)
            if mask is not None:
                pred, target = mask * pred, mask * target

            # All axes between the samples and the two last ones are channels.
            p, t = planes(pred), planes(target)
            mask, clean = (x if x is None else planes(x) for x in (mask, clean))
            h, w = p.shape[-2:]
            terms = (self._term(scale, A, B, p, t, mask=mask, clean=clean, snr=snr)
                     for scale, (A, B) in self._plan(h, w, progress).items())
            return sum(terms, start=p.new_zeros(len(p)))

    def _term(self, scale: int, A: float, B: float, p: Tensor, t: Tensor, *, mask: Tensor | None, clean: Tensor | None,
              snr: Tensor | None) -> Tensor:
        """A·Q0 + B·Q1 of masked pred and target, their mask and clean latents, each [B,C,h,w] -> [B]."""
        p, t = pooled(p, scale), pooled(t, scale)
        mask, clean = (x if x is None else pooled(x, scale) for x in (mask, clean))
        p, t = NORMALIZERS[filled(self.normalize)](partial(self._spread, mask=mask), p, t)
        error = METRICS[self.metric](p, t, self.norm, self.eps).mean(1)  # [B,h,w//2 + 1]
        frequency = GATES[self.timestep_gate].frequency
        if frequency is not None:  # pooling leaves noise 1/s² of its power
            assert clean is not None and snr is not None, "_gate refuses that"
            error = error * frequency(scale * clean, snr)
        in_q0, in_q1 = cached(coefficients, *p.shape[-2:], scale, self.bands, self.space != "x0", like=error)
        return (error * (A * in_q0 + B * in_q1)).sum((-2, -1))

    def _spread(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standard deviation inside the mask, which x is multiplied by already; LEAST_SPREAD or more -> [B,1,1,1]."""
        axes = (2, 3) if self.space == "x0" else (1, 2, 3)
        mean = x.mean(axes, True)
        area: Tensor | float = 1.0
        if mask is not None:
            mean = mask * (mean / mask.mean(axes, True).clamp(min=TINY))
            area = mask.square().mean((1, 2, 3), True).clamp(min=TINY)
        return ((x - mean).square().mean((1, 2, 3), True) / area + self.eps**2).sqrt().clamp(min=LEAST_SPREAD)
