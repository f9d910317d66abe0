"""The training loss: one number per sample, weighted by what an error on x0 is worth. Letters as in diffusion.py.

Nothing here averages over the batch. The trainer sums the [B] losses and divides by the number of instance samples in
the whole optimizer step, so micro-batches and processes of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from trainkit.diffusion import Level, Prediction, V

if TYPE_CHECKING:
    from trainkit.options import ObjectiveOptions


def per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B,...] -> [B]."""
    return x.flatten(1).mean(1)


def uniform(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """Plain mean squared error on the network's own output, whatever it predicts."""
    return pred.x0_gain(level)


def min_snr(level: Level, pred: Prediction, o: ObjectiveOptions) -> Tensor:
    """min(snr, γ): the x0 error counts by its SNR, but nearly clean samples do not drown the others.

    On the network's output this is min(snr,γ)/snr for ε and min(snr,γ)/(snr+1) for v; at SNR 0 the latter is 0.
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


WEIGHTS: dict[str, Callable[[Level, Prediction, ObjectiveOptions], Tensor]] = {  # -> [B], the worth of |x̂0 − x0|²
    "uniform": uniform,
    "min_snr": min_snr,
    "min_snr_diffusers": min_snr_diffusers,
}


@dataclass(frozen=True)
class Objective:
    """Weighted squared error of the output, plus terms on the x0 it implies.

        loss_b = share_b · ( w_b · mean|out − target|²  +  Σ_k scale_k · term_k(x̂0, x0)_b ),   w = weight / x0_gain

    out, x0, z, n [B,C,h,w];  share [B] is 1 for instances and prior_loss_weight for class images, which are weighed by
    their noise level like any other sample.  Returns [B], fp32.
    """

    pred: Prediction
    weight: Callable[[Level], Tensor]  # -> [B], the worth of |x̂0 − x0|²
    terms: tuple[tuple[float, Callable[[Tensor, Tensor], Tensor]], ...] = ()  # (scale, term); term(x0_hat, x0) -> [B]

    def __call__(self, out: Tensor, *, x0: Tensor, z: Tensor, n: Tensor, level: Level, share: Tensor) -> Tensor:
        out = out.float()  # half-precision squares lose the small errors the loss is made of
        error = per_sample((out - self.pred.target(x0, n, z, level)) ** 2)  # [B]
        losses = error * self.pred.loss_weight(level, self.weight(level))  # [B]
        for scale, term in self.terms:
            losses = losses + scale * term(self.pred.to_x0(out, z, level), x0)
        return losses * share


def make_objective(
    o: ObjectiveOptions, prediction: Prediction, compat: Literal["diffusers"] | None = None
) -> Objective:
    """The objective the options ask for: plain MSE, or Min-SNR when --snr_gamma is given."""
    snr_weighted = "min_snr_diffusers" if compat == "diffusers" else "min_snr"
    name = "uniform" if o.snr_gamma is None else snr_weighted
    return Objective(prediction, partial(WEIGHTS[name], pred=prediction, o=o))
