"""The training loss: one number per sample, weighted by what an error on x0 is worth. Letters as in diffusion.

Nothing here averages over the batch. The trainer sums the [B] losses and divides by the number of instance samples in
the whole optimizer step, so micro-batches and processes of any size give the same gradient.

Weights, errors and Huber schedules are tables of small functions; any entry of one goes with any entry of the others
and with any parametrisation. docs/objectives.md lists them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trainkit.diffusion import EDM, Level, Prediction, V, col

if TYPE_CHECKING:
    from trainkit.options import ObjectiveOptions


def per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B,...] -> [B]."""
    return x.flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# Weights: (level, prediction, options) -> [B], the worth of |x̂0 − x0|²/σ_data²


def uniform(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """Plain error on the network's own output, whatever it predicts."""
    return pred.x0_gain(level) * level.sigma_data**2


def min_snr(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """min(snr, γ): the x0 error counts by its SNR, but nearly clean samples do not drown the others.

    On the network's output this is min(snr,γ)/snr for ε and min(snr,γ)/(snr+1) for v and EDM; at SNR 0 the latter is 0.
    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", §3.4 (γ = 5).
    """
    return level.snr.clamp(max=o.snr_gamma)


def min_snr_diffusers(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """Min-SNR as the Diffusers DreamBooth scripts weigh it: min(snr,γ)/snr on ε, min(snr,γ)/snr + 1 on v.

    The v weight runs from 1 to 2 and rises with the noise, where Min-SNR falls towards 0: a known slip, mended in
    other scripts (huggingface/diffusers #5654) and kept here only for `--compat diffusers`. Finite at SNR 0.
    """
    on_output = (o.snr_gamma / level.snr).clamp(max=1) + isinstance(pred, V)
    return on_output * pred.x0_gain(level)


def soft_min_snr(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """snr·γ/(snr + γ): Min-SNR without its kink, written so that it also holds at SNR 0.

    Source: Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
    Transformers", soft-min-SNR.
    """
    return level.snr * (o.snr_gamma / (level.snr + o.snr_gamma))


def debiased(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """√snr, which is 1/√snr on ε: high noise counts more than in plain training.

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models".
    """
    return level.snr.sqrt()


def p2(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """snr/(k + snr)^γ, which is 1/(k + snr)^γ on ε: the nearly clean levels count less.

    Source: Choi et al. 2022, "Perception Prioritized Training of Diffusion Models" (k = 1).
    """
    return level.snr / (o.p2_k + level.snr) ** o.p2_gamma


def plain_noise(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """snr: plain error on the noise, whatever the network predicts."""
    return level.snr


def edm(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """σ_data²·λ(σ) = snr + 1 (Karras et al. 2022, table 1): plain error on the output of an EDM or v network."""
    return level.snr + 1


def plain_x0(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """σ_data²: plain error on x0 itself."""
    return torch.full_like(level.s, level.sigma_data**2)


WEIGHTS: dict[str, Callable[[Level, Prediction, ObjectiveOptions], Tensor]] = {
    "uniform": uniform, "min_snr": min_snr, "soft_min_snr": soft_min_snr, "debiased": debiased, "p2": p2,
    "snr": plain_noise, "edm": edm, "x0": plain_x0, "min_snr_diffusers": min_snr_diffusers,
}


# ----------------------------------------------------------------------------------------------------------------------
# Errors: (out − target [B,C,h,w], c [B,1,1,1]) -> [B,C,h,w]; and c, the place where Huber's error turns from e² to |e|


def l2(e: Tensor, c: Tensor) -> Tensor:
    return e**2


def l1(e: Tensor, c: Tensor) -> Tensor:
    return e.abs()


def huber(e: Tensor, c: Tensor) -> Tensor:
    """2c(√(e² + c²) − c): e² well below c, 2c|e| well above (Charbonnier's or pseudo-Huber loss, times 2)."""
    return c * smooth_l1(e, c)


def smooth_l1(e: Tensor, c: Tensor) -> Tensor:
    """2(√(e² + c²) − c): e²/c well below c, 2|e| well above; written as a quotient to keep the digits of small e."""
    return 2 * e**2 / ((e**2 + c**2).sqrt() + c)


ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2, "l1": l1, "huber": huber, "smooth_l1": smooth_l1}

# Level, c at full noise -> c [B]. Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance
# using Scheduled Pseudo-Huber Loss", as in kohya-ss/sd-scripts; σ there is 1/√snr here.
HUBER_SCHEDULES: dict[str, Callable[[Level, float], Tensor]] = {
    "constant": lambda level, c: torch.full_like(level.s, c),
    "exponential": lambda level, c: c**level.time,
    "snr": lambda level, c: (1 - c) / (1 + level.snr.rsqrt()) ** 2 + c,
}


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@dataclass(frozen=True, eq=False)
class Outcome:
    """One forward pass of a micro-batch: what the network was asked, and what it said."""

    out: Tensor  # [B,C,h,w]
    x0: Tensor  # [B,C,h,w]
    z: Tensor  # [B,C,h,w]
    n: Tensor  # [B,C,h,w]
    level: Level
    share: Tensor  # [B], 1 for instances and prior_loss_weight for class images
    is_class: Tensor  # [B] bool
    prompts: Sequence[str] = ()  # B of them
    pictures: Sequence[str] = ()  # B digests of files
    text: Tensor | None = None  # [B,T,D], what the network was told
    step: int = 0  # finished optimizer steps
    num_instance: int = 1  # instance samples in the whole optimizer step, by which losses are divided


@dataclass(frozen=True, eq=False)
class Judged:
    """A pass with what its error came to: all that a term of the objective may want to know."""

    outcome: Outcome  # its `out` is fp32
    pred: Prediction
    target: Tensor  # [B,C,h,w], what the output should have been
    losses: Tensor  # [B], the ordinary loss as it enters the sum
    factor: Tensor  # [B], what an error of the output counts

    @cached_property
    def x0_hat(self) -> Tensor:
        """The x0 that the output implies [B,C,h,w]."""
        return self.pred.to_x0(self.outcome.out, self.outcome.z, self.outcome.level)


Term = Callable[[Judged], Tensor]  # -> [B], as it enters the sum


@dataclass(frozen=True)
class Objective:
    """Weighted error of the output, plus terms.

        loss_b = share_b · w_b · mean error(out − target)  +  Σ_k term_k(pass)_b

    Class images are weighed by their noise level like any other sample unless there is a `prior_weight`.
    w = pred.loss_weight makes the squared error worth its weight exactly; the other errors are scaled by the same w.
    Returns [B], fp32.
    """

    pred: Prediction
    weight: Callable[[Level], Tensor]  # -> [B], the worth of |x̂0 − x0|²/σ_data²
    prior_weight: Callable[[Level], Tensor] | None = None  # the same for class images
    error: Callable[[Tensor, Tensor], Tensor] = l2
    huber_c: Callable[[Level], Tensor] = partial(HUBER_SCHEDULES["constant"], c=0.1)  # -> [B]
    terms: tuple[Term, ...] = ()

    def __call__(self, o: Outcome) -> Tensor:
        judged = self.judge(replace(o, out=o.out.float()))  # half-precision squares lose what the loss is made of
        return sum((term(judged) for term in self.terms), start=judged.losses)

    def judge(self, o: Outcome) -> Judged:
        """The ordinary loss of a pass, and what it was made of."""
        target = self.pred.target(o.x0, o.n, o.level)
        error = per_sample(self.error(o.out - target, col(self.huber_c(o.level), o.out)))  # [B]
        factor = self.pred.loss_weight(o.level, self._worth(o.level, o.is_class)) * o.share
        return Judged(o, self.pred, target, losses=error * factor, factor=factor)

    def scaled(self, factor: Callable[[Level], Tensor]) -> Objective:
        """The same with every sample's weight times factor(level) [B], which terms are told too."""
        def times(weight: Callable[[Level], Tensor]) -> Callable[[Level], Tensor]:
            return lambda level: weight(level) * factor(level)

        prior_weight = times(self.prior_weight) if self.prior_weight else None
        return replace(self, weight=times(self.weight), prior_weight=prior_weight)

    def plus(self, *terms: Term) -> Objective:
        """The same with more terms."""
        return replace(self, terms=(*self.terms, *terms))

    def only(self, term: Term) -> Objective:
        """The term alone."""
        return replace(self.scaled(lambda level: torch.zeros_like(level.s)), terms=(term,))

    def _worth(self, level: Level, is_class: Tensor) -> Tensor:
        """What each sample's x0 error is worth -> [B]."""
        prior_weight = self.prior_weight or self.weight
        return torch.where(is_class, prior_weight(level), self.weight(level))


def make_objective(
    o: ObjectiveOptions, prediction: Prediction, compat: Literal["diffusers"] | None = None, *, base_loss: str = "l2",
) -> Objective:
    """The objective the options ask for.

    base_loss  the error where --loss_type names a term beside it
    """

    def weight(name: str) -> Callable[[Level], Tensor]:
        return partial(WEIGHTS[name], pred=prediction, o=o)

    name = o.loss_weighting or ("min_snr" if o.snr_gamma else unasked_weight(o, prediction, compat))
    prior_weight = None
    if compat == "diffusers":
        prior_weight = weight(unasked_weight(o, prediction, compat))  # its prior loss is never weighed by SNR
        if name == "min_snr" and not isinstance(prediction, EDM):  # with EDM it refuses Min-SNR: nothing to be like
            name = "min_snr_diffusers"
    error = ERRORS[base_loss if o.loss_type == "fourier" else o.loss_type]
    return Objective(prediction, weight(name), prior_weight=prior_weight, error=error,
                     huber_c=partial(HUBER_SCHEDULES[o.huber_schedule], c=o.huber_c))


def unasked_weight(o: ObjectiveOptions, prediction: Prediction, compat: Literal["diffusers"] | None) -> str:
    """The weight when neither --loss_weighting nor --snr_gamma asks for one.

    Diffusers' trainers weigh the x0 error by σ⁻², which is snr, under the EDM flag, and not at all on EDM checkpoints.
    """
    on_edm = isinstance(prediction, EDM)
    if not (on_edm or o.do_edm_style_training):
        return "uniform"
    if compat == "diffusers":
        return "x0" if on_edm else "snr"
    return "edm"
