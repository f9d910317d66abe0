"""Distribution matching in training: which pass of a step carries the term, at which noise levels.

    extra  a second pass at one noise level for all samples, for the term alone
    combo  that second pass also carries the ordinary loss
    swap   no second pass: with probability p the step itself is at one level for all
    reuse  no second pass: the term takes the ordinary samples whose levels lie in the window

The levels of all four come from the run's own distribution of noise levels, cut to a window of SNR, [0.1925, 3.07] by
default: timesteps 200 to 599 of Stable Diffusion's schedule. The term is `freq_loss.DistributionMatchingLoss`.
Source: Yuan et al. 2024, "Real-Fake: Effective Training Data Synthesis Through Distribution Matching" (the statistic);
docs/frequency.md has the modes side by side, measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainkit import rng
from trainkit.devices import upload
from trainkit.diffusion import Level, LevelSampler
from trainkit.errors import Problem, UserError
from trainkit.frequency import DistributionMatchingLoss
from trainkit.losses.objective import Forward, Objective
from trainkit.losses.passes import Memory, Passes, always
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.options import MatchingOptions

BISECTIONS = 60  # of [0, 1]: to the last bit of an fp64 number
EXTRA = "matching"  # sets the noise of the second pass apart


class Matcher(Memory, Protocol):
    """What this module asks of the loss; see freq_loss.DistributionMatchingLoss."""

    def __call__(self, x0_hat: Tensor, x0: Tensor, *, snr: Tensor, weight: Tensor, alike: Tensor | None,
                 picture: Tensor, observe: bool) -> Tensor: ...

    def low(self, x: Tensor) -> Tensor: ...

    def require(self, latents: tuple[int, int, int]) -> None: ...


# ----------------------------------------------------------------------------------------------------------------------
# The window of noise levels


@dataclass(frozen=True)
class Window:
    """The part of a distribution of noise levels whose SNR lies within bounds: u in [first, end) of its [0,1)."""

    levels: LevelSampler
    first: float
    end: float

    @property
    def probability(self) -> float:
        """Of the window under the distribution itself."""
        return self.end - self.first

    def __call__(self, u: Tensor, size: tuple[int, int] | None = None) -> Level:
        return self.levels(self.first + u.double() * self.probability, size)


def window_of(levels: LevelSampler, min_snr: float, max_snr: float) -> Window:
    """The window in which SNR is between the bounds. Raises UserError where the distribution has no such level."""
    low_noise, high_noise = sorted([crossing(levels, max_snr), crossing(levels, min_snr)])
    if high_noise - low_noise <= 0:
        raise UserError(Problem(
            f"no noise level with an SNR from {min_snr:g} to {max_snr:g}", "--dist_match_min_snr, --dist_match_max_snr",
            "the run's own noise levels (--min_timestep, --max_timestep, --timestep_sampling) have none there",
            "widen the window, or the range of timesteps"))
    return Window(levels, low_noise, high_noise)


def crossing(levels: LevelSampler, snr: float) -> float:
    """The u at which the SNR of a distribution, monotone in u, passes `snr`; 0 or 1 where it never does."""
    ends = levels(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).snr
    falls = bool(ends[0] >= ends[1])
    lo, hi = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (lo + hi) / 2
        above = bool(levels(torch.tensor([middle], dtype=torch.float64)).snr > snr)
        lo, hi = (middle, hi) if above == falls else (lo, middle)
    return hi


# ----------------------------------------------------------------------------------------------------------------------
# The term


def numbered(names: Sequence[str], like: Tensor) -> Tensor:
    """A number for each name, the same for the same name on every rank -> [B] long."""
    return upload([torch.tensor([rng.seed_of(name) for name in names])], like.device)[0]


def text_features(forward: Forward) -> Tensor:
    """The mean text embedding -> [B,D]."""
    assert forward.condition is not None, "the pass was given no text"
    return forward.condition["embeds"].float().mean(1)


ALIKE: dict[str, Callable[[Forward, Matcher], Tensor | None]] = {
    "none": lambda forward, matcher: None,
    "class": lambda forward, matcher: numbered(forward.batch.prompts, forward.x0),  # images with the same caption
    "text": lambda forward, matcher: text_features(forward),
    "latent": lambda forward, matcher: matcher.low(forward.z).flatten(1),
}


@dataclass(frozen=True)
class MatchingTerm:
    """The term of an objective: weighs the samples, says by what they are compared, and asks the loss.

    snr_gamma  Min-SNR's γ, min(1, γ/snr) here; at γ = 5 it is 1 in all of the default window
    bounds     SNR outside of which samples do not count, where levels are not drawn from the window
    """

    matcher: Matcher
    kernel: str
    snr_gamma: float | None = None
    bounds: tuple[float, float] | None = None

    def __call__(self, forward: Forward, *, observe: bool) -> Tensor:
        snr, weight = forward.level.snr, forward.batch.loss_weight.float()
        if self.snr_gamma:
            weight = weight * (self.snr_gamma / snr).clamp(max=1)
        if self.bounds:
            weight = weight * ((snr >= self.bounds[0]) & (snr <= self.bounds[1]))
        return self.matcher(forward.x0_hat, forward.x0, snr=snr, weight=weight,
                            alike=ALIKE[self.kernel](forward, self.matcher),
                            picture=numbered(forward.batch.images, forward.x0), observe=observe)


# ----------------------------------------------------------------------------------------------------------------------
# Modes: (the ordinary objective, the term, the window, options, seed) -> step -> the objectives of its passes

Choice = Callable[[int], Sequence[Objective]]


def extra(plain: Objective, term: MatchingTerm, window: Window, o: MatchingOptions, seed: int) -> Choice:
    """A second forward and backward pass for the term alone."""
    return always(plain, replace(plain.only(term), levels=window, name=EXTRA, shared=True))


def combo(plain: Objective, term: MatchingTerm, window: Window, o: MatchingOptions, seed: int) -> Choice:
    """The second pass carries the ordinary loss too: it is trained on as more data."""
    return always(plain, replace(plain.plus(term), levels=window, name=EXTRA, shared=True))


def swap(plain: Objective, term: MatchingTerm, window: Window, o: MatchingOptions, seed: int) -> Choice:
    """No second pass: with probability p a step, on every rank, is at one level for all and carries the term.

    The distribution of the levels becomes (1−p)·base + p·window, and the ordinary loss is weighed by base over that,
    1/(1−p) outside of the window and 1/(1−p + p/q) in it, so that its expectation stays; q is the window's probability
    under the base distribution.
    """
    p = o.dist_match_swap
    low, high = sorted(window(torch.tensor([0.0, 1 - 2**-40], dtype=torch.float64)).snr.tolist())

    def ratio(level: Level) -> Tensor:
        inside = (level.snr >= low) & (level.snr <= high)
        return torch.where(inside, 1 / (1 - p + p / window.probability), 1 / (1 - p))

    ordinary = plain.scaled(ratio)
    swapped = replace(ordinary.plus(term), levels=window, shared=True)
    return lambda step: (swapped if rng.uniform([(seed, step)], "swap") < p else ordinary,)


def reuse(plain: Objective, term: MatchingTerm, window: Window, o: MatchingOptions, seed: int) -> Choice:
    """No second pass: the ordinary samples whose levels happen to lie in the window, each at its own."""
    inside = replace(term, bounds=(o.dist_match_min_snr, o.dist_match_max_snr))
    return always(plain.plus(inside))


MODES: dict[str, Callable[[Objective, MatchingTerm, Window, MatchingOptions, int], Choice]] = {
    "extra": extra, "combo": combo, "swap": swap, "reuse": reuse,
}


# ----------------------------------------------------------------------------------------------------------------------
# From options to passes


def make_matcher(o: MatchingOptions) -> Matcher:
    """The loss that --dist_match and its companions describe, over all ranks.

    With aspect buckets some micro-batches have one image; `make_passes` refuses runs in which every one has.
    """
    return DistributionMatchingLoss(**o.loss, gather=ranks.gather_rows, lone=True)


def problems(
    o: MatchingOptions, captions: Mapping[str, str], latents: tuple[int, int, int],
    matcher: Callable[[MatchingOptions], Matcher] = make_matcher,
) -> Iterator[Problem]:
    """What keeps the options from being trained with, in the words of the loss that `matcher` makes.

    captions  of the images, by what tells these apart
    latents   shape (C,h,w) of one sample
    """
    if not o.active:
        return
    try:
        matcher(o).require(latents)
    except (ValueError, ImportError) as error:
        why, _, fix = str(error).rpartition(": ")
        yield Problem("distribution matching cannot be computed like this", "--dist_match_...", why or fix,
                      fix if why else "see the --dist_match flags in --help")
    if len(captions) == 1 and o.statistic == "u":
        yield Problem("distribution matching of one image", "--dist_match_gain",
                      "it is about what different images have wrong in common", "add images, or leave it out")
    elif o.dist_match_kernel == "class" and captions and len(set(captions.values())) == len(captions):
        yield Problem("no two images are of one class", "--dist_match_kernel class",
                      "a class is made of the images with the same caption, and every caption here is another",
                      "--dist_match_kernel text compares by likeness of the captions, none all with all")


def make_passes(
    o: MatchingOptions, plain: Objective, *, seed: int, snr_gamma: float | None, together: int,
    memories: Mapping[str, Memory], matcher: Callable[[MatchingOptions], Matcher] = make_matcher,
) -> Passes:
    """The passes of a run: the ordinary one alone, or those of --dist_match_mode with the term that `matcher` makes.

    snr_gamma  Min-SNR's γ where the ordinary loss is weighed by it
    together   samples of a micro-batch over all ranks
    memories   what other terms of the ordinary loss remember
    Without --dist_match and --dist_match_gain nothing of this is built, so such a run is the plain one bit for bit.
    Raises UserError where the run draws no noise level in the window, or no sample has another beside it.
    """
    if not o.active:
        return Passes(always(plain), memories)
    if together == 1 and o.statistic != "diagonal" and not o.dist_match_bank:
        raise UserError(Problem(
            "distribution matching with one image a micro-batch", "--train_batch_size 1",
            "it is about what several images have wrong in common, and there is one",
            "--train_batch_size 2 or more"))
    window = window_of(plain.levels, o.dist_match_min_snr, o.dist_match_max_snr)
    loss = matcher(o)
    term = MatchingTerm(loss, o.dist_match_kernel, snr_gamma)
    return Passes(MODES[o.mode](plain, term, window, o, seed), {**memories, "matching": loss})
