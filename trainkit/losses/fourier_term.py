"""The Fourier loss in training: on which pair it looks, what of it the log shows, and the gain that holds its fraction.

The loss itself is `freq_loss.FourierLoss`; docs/fourier.md has its formulas and what it did, measured.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.errors import Problem
from trainkit.frequency import FourierLoss, FourierPart
from trainkit.losses.objective import Forward, Samples
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.files import Json
    from trainkit.options import FourierOptions

log = logging.getLogger(__name__)

DECAY = 0.95  # of the running means behind the gain: the last twenty steps or so
GAINS = (1e-3, 1e3)
OF_SCALES = ("scales", "scale_weights", "scale_high_freq_weights")  # settings that mean something together
POWERS = {"l2": 2, "l1": 1}  # of an error, by --fourier_norm


class Gain:
    """The factor on the Fourier weight that makes the term `target` of the ordinary loss and the term together.

        gain = target/(1 − target) · mean(base) / mean(term/gain)

    over the past steps, the newest counting most; 1 before the first. A target of None leaves it at 1.
    """

    def __init__(self, target: float | None):
        self.target, self.value = target, 1.0
        self.base = self.unit = 0.0  # running sums of the ordinary loss, and of the term at gain 1

    def update(self, base: float, unit: float) -> None:
        """After a step whose ordinary loss was `base` and whose term would have been `unit` at gain 1."""
        if self.target is None or not (math.isfinite(base) and math.isfinite(unit) and base > 0 and unit > 0):
            return  # warming up, or a step that was skipped
        self.base = DECAY * self.base + base
        self.unit = DECAY * self.unit + unit
        wanted = self.target / (1 - self.target) * self.base / self.unit
        self.value = min(max(wanted, GAINS[0]), GAINS[1])


class FourierTerm:
    """The Fourier loss as a term of an objective, over all ranks.

    total_steps      optimizer steps of the run, over which adaptive modes move
    target_fraction  of the loss that the term shall be (None: as its weight makes it)
    """

    def __init__(self, loss: FourierLoss, *, total_steps: int, target_fraction: float | None = None):
        self.loss, self.total_steps, self.gain = loss, total_steps, Gain(target_fraction)
        self.sums: Tensor | None = None  # sums of this step, on the device
        self.rate = 0.0  # what this step's term was multiplied by, ramp and gain
        self.bounded = False  # whether it was said that the gain stands at a bound

    def __call__(self, forward: Forward, *, observe: bool) -> Tensor:
        """-> [B], weighted like the ordinary loss: an error of the output counts what it counts there.

        In the space x0, errors are in units of σ_data, where |out − target|² is gain·σ_data² times as large, and count
        by that. The loss multiplies latents by its mask, so with the norm l2 it gets the root of the batch's.
        """
        step, sigma = forward.batch.step, forward.level.sigma_data
        if self.loss.idle(step):
            return torch.zeros_like(forward.losses)
        pair, factor, clean = (forward.out, forward.target), forward.factor, forward.x0 / sigma
        if self.loss.space == "x0":
            pair, power = (forward.x0_hat / sigma, clean), POWERS[self.loss.norm]
            factor = factor * (forward.pred.x0_gain(forward.level) * sigma**2) ** (power / 2)
        mask = forward.batch.mask if forward.batch.mask is None else forward.batch.mask ** (1 / POWERS[self.loss.norm])
        part = self.loss(*pair, mask=mask, base=forward.losses, factor=factor, step=step, total_steps=self.total_steps,
                         snr=forward.level.snr, clean=clean, gain=self.gain.value)
        if observe:
            self.rate = self.gain.value * self.loss.ramp(step)
            self._note(part, forward.losses.detach(), factor, forward.batch)
        return part.added

    def describe(self) -> dict[str, float]:
        """What the term was of the step's loss, and of what it was made; the gain moves for the next step.

            fourier_component   its part of `loss`
            fourier_raw         mean distance of the spectra
            fourier_weight_eff  mean of all that multiplies it but the sample's weight
            fourier_base_ratio  weighted distance over the ordinary loss
            fourier_gain        factor that --fourier_target_share is held with, where it is given

        While warming up there is the first alone.
        """
        if self.sums is None:
            return {"fourier_component": 0.0}
        sums, self.sums = ranks.sum_over_ranks(self.sums).tolist(), None
        component, base, raw, weight, weighted, plain, count = sums
        self.gain.update(base, component / self.rate if self.rate else 0.0)
        self._warn_of_bound()
        found = {"fourier_component": component, "fourier_raw": raw / count, "fourier_weight_eff": weight / count,
                 "fourier_base_ratio": weighted / plain if plain else 0.0}
        return found if self.gain.target is None else found | {"fourier_gain": self.gain.value}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return {}, {"base": self.gain.base, "unit": self.gain.unit, "gain": self.gain.value}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        self.gain.base, self.gain.unit, self.gain.value = data["base"], data["unit"], data["gain"]

    def _warn_of_bound(self) -> None:
        """Say once that the fraction cannot be held."""
        if self.bounded or self.gain.value not in GAINS:
            return
        self.bounded, high = True, self.gain.value == GAINS[1]
        log.warning("--fourier_target_share %g cannot be held: its factor on the weight stands at its bound of %g, and "
                    "the term is a %s fraction; %s --fourier_weight %g", self.gain.target, self.gain.value,
                    *(("smaller", "raise") if high else ("larger", "lower")), self.loss.weight)

    def _note(self, part: FourierPart, base: Tensor, factor: Tensor, batch: Samples) -> None:
        added, n = part.added.detach(), batch.num_instance
        row = torch.stack([added.sum() / n, base.sum() / n, part.raw.sum(), part.weight.sum(),
                           (factor * part.raw).sum(), base.sum(), torch.ones_like(base).sum()]) * batch.counts
        self.sums = row if self.sums is None else self.sums + row


def problems(o: FourierOptions, loss_type: str, latents: tuple[int, int, int]) -> Iterator[Problem]:
    """All that keeps the Fourier loss from being computed, in its words; latents is the shape (C,h,w) of one sample."""
    if loss_type != "fourier":
        return
    settings = dict(o.loss)
    for _ in o.loss:  # each round leaves out what the one before refused
        try:
            FourierLoss(**settings).require(latents)
            return
        except ValueError as error:
            message = re.sub(r"\bfourier_", "--fourier_", str(error))
        why, _, fix = message.rpartition(": ")
        flag = re.match(r"--fourier_(\w+)", why)
        if flag and flag[1] not in settings:  # the default in its place goes with the others no better
            return
        yield Problem("the Fourier loss cannot be computed like this", flag[0] if flag else "--resolution", why, fix)
        if not flag:
            return
        for name in OF_SCALES if flag[1] in OF_SCALES else (flag[1],):
            settings.pop(name, None)


def make_fourier(o: FourierOptions, loss_type: str, *, total_steps: int, note: Callable[..., None],
                 ) -> Mapping[str, FourierTerm]:
    """The term that --loss_type fourier adds, by name; nothing for another loss.

    note  puts facts into the run's record: here every setting, those too that the mode filled in
    """
    if loss_type != "fourier":
        return {}
    loss = FourierLoss(**o.loss)
    note(fourier_loss={**loss.config(), "fourier_base_loss": o.fourier_base_loss,
                       "fourier_target_share": o.fourier_target_share})
    _warn(loss, o.fourier_base_loss, total_steps)
    return {"fourier": FourierTerm(loss, total_steps=total_steps, target_fraction=o.fourier_target_share)}


def _warn(loss: FourierLoss, base_loss: str, total_steps: int) -> None:
    """Say what the settings come to, where that is not what they look like."""
    reached = loss.ramp(total_steps - 1)
    if not reached:
        log.warning("--fourier_warmup_steps %d: the Fourier term counts in none of the %d steps", loss.warmup_steps,
                    total_steps)
    elif reached < 1:
        log.warning("--fourier_warmup_steps %d and --fourier_ramp_steps %d: the Fourier term never has its full "
                    "weight, but %.0f %% of it in the last of the %d steps", loss.warmup_steps, loss.ramp_steps,
                    100 * reached, total_steps)
    if loss.only_rescales and base_loss == "l2":
        log.warning("--fourier_mode %s with --fourier_metric complex and --fourier_norm l2 is the squared error once "
                    "more (Parseval): it only rescales the loss; weigh the frequencies, or use magnitude", loss.mode)
    if pinned := loss.pinned(total_steps):
        log.info("the high-frequency weight of the Fourier term is at a bound (1 to 3) in %.0f %% of the steps",
                 100 * pinned)
