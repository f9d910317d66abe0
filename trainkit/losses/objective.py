"""The training loss: one number per sample, weighted as an error on x0. Letters as in diffusion.

Nothing here averages over the batch. The trainer sums the [B] losses and divides by the number of instance samples in
the whole optimizer step, so micro-batches and processes of any size give the same gradient.

Weights, errors and Huber schedules are tables of small functions; any entry of one goes with any entry of the others
and with any parametrisation. docs/objectives.md lists them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainkit.condition import Condition
from trainkit.diffusion import EDM, Level, LevelSampler, Prediction, Schedule, V, col, make_levels

if TYPE_CHECKING:
    from trainkit.options import Compat, ObjectiveOptions


def per_sample(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over everything but the batch: [B,...] -> [B]; with a mask [B,1,h,w], of x times the mask.

    So a sample counts by its mask's mean, and one whose mask is 0 everywhere not at all.
    """
    return (x if mask is None else x * mask).flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# x0 loss weights: (level, prediction, options) -> [B], factor on |x̂0 − x0|²/σ_data². One line in WEIGHTS adds one


def min_snr(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """min(snr, γ): the x0 error counts by its SNR, but nearly clean samples do not drown the others.

    On the network's output this is min(snr,γ)/snr for ε and min(snr,γ)/(snr+1) for v and EDM; at SNR 0 the latter is 0.
    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", §3.4 (γ = 5).
    """
    return level.snr.clamp(max=gamma_of(o))


def min_snr_diffusers(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """Min-SNR as the Diffusers DreamBooth scripts weigh it: min(snr,γ)/snr on ε, min(snr,γ)/snr + 1 on v.

    The v weight runs from 1 to 2 and rises with the noise, where Min-SNR falls towards 0: a known slip, fixed in
    other scripts (huggingface/diffusers #5654) and kept here only for `--compat diffusers`. Finite at SNR 0.
    """
    weight = (gamma_of(o) / level.snr).clamp(max=1) + isinstance(pred, V)  # on the output
    return weight * pred.x0_gain(level)


def soft_min_snr(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """snr·γ/(snr + γ): Min-SNR without its kink, written so that it also holds at SNR 0.

    Source: Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
    Transformers", soft-min-SNR.
    """
    return level.snr * (gamma_of(o) / (level.snr + gamma_of(o)))


def gamma_of(o: ObjectiveOptions) -> float:
    """γ of the Min-SNR weights, which the options refuse without --snr_gamma."""
    assert o.snr_gamma is not None, "--snr_gamma"
    return o.snr_gamma


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
    "min_snr": min_snr, "soft_min_snr": soft_min_snr, "debiased": debiased, "p2": p2,
    "snr": plain_noise, "edm": edm, "x0": plain_x0, "min_snr_diffusers": min_snr_diffusers,
}


def on_output(name: str, pred: Prediction, o: ObjectiveOptions) -> Callable[[Level], Tensor]:
    """The weight `name` as a factor on the squared error of the network's own output: level -> [B]."""
    if name == "uniform":  # plain error on the output, whatever it is
        return lambda level: torch.ones_like(level.s)
    return lambda level: pred.loss_weight(level, WEIGHTS[name](level, pred, o))


# ----------------------------------------------------------------------------------------------------------------------
# Errors: out − target [B,C,h,w] and level -> [B,C,h,w]; Huber's has a place c where it turns from e² to |e|

Error = Callable[[Tensor, Level], Tensor]


def l2(e: Tensor, level: Level) -> Tensor:
    return e**2


def l1(e: Tensor, level: Level) -> Tensor:
    return e.abs()


def huber(e: Tensor, level: Level, *, c: Callable[[Level], Tensor]) -> Tensor:
    """2c(√(e² + c²) − c): e² well below c, 2c|e| well above (Charbonnier's or pseudo-Huber loss, times 2)."""
    return col(c(level), e) * smooth_l1(e, level, c=c)


def smooth_l1(e: Tensor, level: Level, *, c: Callable[[Level], Tensor]) -> Tensor:
    """2(√(e² + c²) − c): e²/c well below c, 2|e| well above; written as a quotient to keep the digits of small e."""
    turn = col(c(level), e)
    return 2 * e**2 / ((e**2 + turn**2).sqrt() + turn)


# Level, c at full noise -> c [B]. Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance
# using Scheduled Pseudo-Huber Loss", as in kohya-ss/sd-scripts; σ there is 1/√snr here.
HUBER_SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "constant": lambda level, c: torch.full_like(level.s, c),
    "exponential": lambda level, c: c**level.time,
    "snr": lambda level, c: (1 - c) / (1 + level.snr.rsqrt()) ** 2 + c,
}


def turning_point(o: ObjectiveOptions) -> Callable[[Level], Tensor]:
    """c of Huber's errors as --huber_schedule and --huber_c say: level -> [B]."""
    return partial(HUBER_SCHEDULES[o.huber_schedule], c=o.huber_c)


ERRORS: dict[str, Callable[[ObjectiveOptions], Error]] = {
    "l2": lambda o: l2, "l1": lambda o: l1, "huber": lambda o: partial(huber, c=turning_point(o)),
    "smooth_l1": lambda o: partial(smooth_l1, c=turning_point(o)),
}


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class Samples(Protocol):
    """What a loss asks of a micro-batch (trainkit.data.batch.Batch)."""

    @property
    def loss_weight(self) -> Tensor:
        """[B], 1 for instances and prior_loss_weight for class images."""

    @property
    def is_class(self) -> Tensor:
        """[B] bool"""

    @property
    def mask(self) -> Tensor | None:
        """[B,1,h,w], a factor on the error of each place; None: 1 everywhere."""

    @property
    def counts(self) -> bool:
        """False: it stands for a micro-batch that its rank lacks, and must show in no mean."""

    @property
    def prompts(self) -> Sequence[str]:
        """B of them."""

    @property
    def images(self) -> Sequence[str]:
        """B digests of files."""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""

    @property
    def num_instance(self) -> int:
        """Instance samples in the whole optimizer step, by which losses are divided."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass of a micro-batch, for terms: what the network was asked, what it said, what its loss is made of.
    """

    out: Tensor  # [B,C,h,w] fp32
    x0: Tensor  # [B,C,h,w]
    z: Tensor  # [B,C,h,w]
    n: Tensor  # [B,C,h,w]
    level: Level
    batch: Samples
    condition: Condition | None  # what the network was given
    pred: Prediction
    target: Tensor  # [B,C,h,w], what the output should have been
    losses: Tensor  # [B], the ordinary loss as it enters the sum
    factor: Tensor  # [B], what an error of the output counts

    @cached_property
    def x0_hat(self) -> Tensor:
        """The x0 that the output implies [B,C,h,w]."""
        return self.pred.to_x0(self.out, self.z, self.level)


class Term(Protocol):
    """A loss beside the ordinary one.

    observe  whether this pass is one of training: then the term may remember of it what it keeps from step to step
    """

    def __call__(self, forward: Forward, *, observe: bool) -> Tensor:
        """-> [B], as it enters the sum."""


@dataclass(frozen=True)
class Objective:
    """What one forward pass is for: at which noise levels, and the weighted error of the output, plus terms.

        loss_b = loss_weight_b · w_b · mean error(out − target)  +  Σ_k term_k(pass)_b

    Class images are weighed by their noise level like any other sample unless there is a `prior_weight`.
    name    sets the pass's noise apart from another pass of the same step; "" is the ordinary one
    shared  whether every sample of the step, on every rank, has the same noise level
    Returns [B], fp32.
    """

    levels: LevelSampler
    pred: Prediction
    weight: Callable[[Level], Tensor]  # -> [B], factor on the output's error (see `on_output`)
    prior_weight: Callable[[Level], Tensor] | None = None  # the same for class images
    error: Error = l2
    terms: tuple[Term, ...] = ()
    name: str = ""
    shared: bool = False

    def __call__(self, out: Tensor, *, x0: Tensor, z: Tensor, n: Tensor, level: Level, batch: Samples,
                 condition: Condition | None = None, observe: bool = True) -> Tensor:
        """-> losses [B] of the network's output for z = noised x0; latents and noise are [B,C,h,w].

        observe  whether terms may remember of the pass what they keep from step to step
        """
        out = out.float()  # half-precision squares lose what the loss is made of
        target = self.pred.target(x0, n, level)
        error = per_sample(self.error(out - target, level), batch.mask)  # [B]
        factor = self.weight(level)
        if self.prior_weight is not None:
            factor = torch.where(batch.is_class, self.prior_weight(level), factor)
        factor = factor * batch.loss_weight
        losses = error * factor
        if not self.terms:
            return losses
        forward = Forward(out, x0, z, n, level, batch, condition, self.pred, target, losses=losses, factor=factor)
        return sum((term(forward, observe=observe) for term in self.terms), start=losses)

    def scaled(self, factor: Callable[[Level], Tensor]) -> Objective:
        """The same with every sample's weight times factor(level) [B], which terms see too."""
        def times(weight: Callable[[Level], Tensor]) -> Callable[[Level], Tensor]:
            return lambda level: weight(level) * factor(level)

        prior_weight = times(self.prior_weight) if self.prior_weight else None
        return replace(self, weight=times(self.weight), prior_weight=prior_weight)

    def plus(self, *terms: Term) -> Objective:
        """The same with more terms."""
        return replace(self, terms=(*self.terms, *terms))

    def only(self, term: Term) -> Objective:
        """The term alone, at the same levels."""
        return replace(self.scaled(lambda level: torch.zeros_like(level.s)), terms=(term,))


def make_objective(
    o: ObjectiveOptions, schedule: Schedule, compat: Compat | None = None, *, base_loss: str = "l2",
) -> Objective:
    """The objective the options ask for, of a model trained on that schedule.

    base_loss  the error where --loss_type names a term beside it
    """
    prediction = schedule.prediction
    name = o.loss_weighting or ("min_snr" if o.snr_gamma else default_weight(o, prediction, compat))
    prior_weight = None
    if compat == "diffusers":  # its prior loss is never weighed by SNR
        prior_weight = on_output(default_weight(o, prediction, compat), prediction, o)
        if name == "min_snr" and not isinstance(prediction, EDM):  # with EDM it refuses Min-SNR: nothing to be like
            name = "min_snr_diffusers"
    error = ERRORS[base_loss if o.loss_type == "fourier" else o.loss_type](o)
    return Objective(make_levels(o, schedule, compat), prediction, on_output(name, prediction, o),
                     prior_weight=prior_weight, error=error)


def default_weight(o: ObjectiveOptions, prediction: Prediction, compat: Compat | None) -> str:
    """The weight when neither --loss_weighting nor --snr_gamma asks for one.

    Diffusers' trainers weigh the x0 error by σ⁻², which is snr, under the EDM flag, and not at all on EDM checkpoints.
    """
    on_edm = isinstance(prediction, EDM)
    if not (on_edm or o.do_edm_style_training):
        return "uniform"
    if compat == "diffusers":
        return "x0" if on_edm else "snr"
    return "edm"
