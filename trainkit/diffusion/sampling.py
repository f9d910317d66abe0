"""Distributions of the noise levels: pure functions u [B] in [0,1) -> Level, each the inverse of a cumulative one.

There are two sorts. A *timestep distribution* gives a time in 0..1, stretched over the timesteps asked for (EDM
checkpoints: over ln σ). A *σ distribution* gives σ between the ends of that range, and the level is the checkpoint's
nearest one (EDM: σ itself).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainkit.diffusion.level import Level
from trainkit.diffusion.predictions import EDM
from trainkit.diffusion.schedules import GRIDS, EDMSchedule, Schedule, karras
from trainkit.errors import Problem, refuse

if TYPE_CHECKING:
    from trainkit.options import Compat, ObjectiveOptions

log = logging.getLogger(__name__)

SigmaDistribution = Callable[[Tensor, float, float], Tensor]  # u [B], lo, hi -> σ [B] in lo..hi


class LevelSampler(Protocol):
    """A distribution of noise levels: u [B] in [0,1) -> Level. It may depend on the size (h, w) of the latents."""

    def __call__(self, u: Tensor, size: tuple[int, int] | None = None) -> Level: ...


def by_time(u: Tensor, size: tuple[int, int] | None = None, *, schedule: Schedule,
            distribution: Callable[[Tensor], Tensor], first: int, end: int) -> Level:
    """Levels by their time, distribution(u) in 0..1: position = first + distribution(u)·(end − first), below `end`."""
    position = first + distribution(u.double()) * (end - first)  # in fp32, u·T may round up to T
    return schedule.at(position.clamp(max=math.nextafter(end, 0)))


def by_sigma(u: Tensor, size: tuple[int, int] | None = None, *, schedule: Schedule, distribution: SigmaDistribution,
             lo: float, hi: float) -> Level:
    """Levels by their σ: distribution(u, lo, hi) gives σ in lo..hi."""
    return schedule.nearest(distribution(u.double(), lo, hi).clamp(lo, hi))


# ----------------------------------------------------------------------------------------------------------------------
# Distributions of time: u [B] fp64 -> time [B] in 0..1


def uniform(u: Tensor) -> Tensor:
    """Every timestep equally often (Ho et al. 2020, algorithm 1)."""
    return u


def logit_normal(u: Tensor, *, mean: float, std: float) -> Tensor:
    """The logit of time is normal: the middle of the schedule more often (Esser et al. 2024, §3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, *, scale: float) -> Tensor:
    """Heavy in the middle (scale > 0) or at the ends (< 0), never 0 anywhere (Esser et al. 2024, §3.1)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """The cosine schedule's density mapped onto a straight path of noising (Esser et al. 2024, §3.1)."""
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Distributions of σ: u [B] fp64 -> σ [B] in lo..hi


def lognormal(u: Tensor, lo: float, hi: float, *, mean: float, std: float) -> Tensor:
    """ln σ is normal(mean, std²), cut off at lo and hi (Karras et al. 2022, table 1: −1.2 and 1.2)."""
    below = torch.special.ndtr((torch.tensor([lo, hi], dtype=torch.float64).log() - mean) / std)
    return (mean + std * torch.special.ndtri(below[0] + u * (below[1] - below[0]))).exp()


def on_grid(u: Tensor, lo: float, hi: float, *, schedule: Schedule) -> Tensor:
    """The first T of the T+1 points, from σ_max down, of the checkpoint's own grid, as the Diffusers trainers draw."""
    assert isinstance(schedule, EDMSchedule), "a schedule of timesteps has no grid of σ"
    point = (u * schedule.num_train_timesteps).floor()
    return GRIDS[schedule.grid](1 - point / schedule.num_train_timesteps, lo, hi, schedule.rho)


# ----------------------------------------------------------------------------------------------------------------------
# The table, and what the options ask for of it

TIMESTEP_DISTRIBUTIONS: dict[str, Callable[[ObjectiveOptions], Callable[[Tensor], Tensor]]] = {
    "uniform": lambda o: uniform,
    "logit_normal": lambda o: partial(logit_normal, mean=o.logit_mean, std=o.logit_std),
    "mode": lambda o: partial(mode, scale=o.mode_scale),
    "cosmap": lambda o: cosmap,
}
SIGMA_DISTRIBUTIONS: dict[str, Callable[[Schedule, ObjectiveOptions], SigmaDistribution]] = {
    "lognormal": lambda schedule, o: partial(lognormal, mean=o.edm_p_mean, std=o.edm_p_std),
    "karras": lambda schedule, o: partial(karras, rho=schedule.rho),
    "diffusers_grid": lambda schedule, o: partial(on_grid, schedule=schedule),
}
LEVEL_DISTRIBUTIONS = (*TIMESTEP_DISTRIBUTIONS, *SIGMA_DISTRIBUTIONS)


def make_levels(
    o: ObjectiveOptions, schedule: Schedule, compat: Compat | None = None
) -> LevelSampler:
    """The distribution of noise levels that the options ask for. UserError for timesteps that the schedule lacks."""
    name = o.edm_sigmas or o.timestep_sampling or default_distribution(o, schedule, compat)
    first, end = o.min_timestep, o.max_timestep or schedule.num_train_timesteps
    lo, hi = schedule.sigma_range(first, end)
    say_unread(o, name)
    by_sigmas = name in SIGMA_DISTRIBUTIONS
    refuse(range_problems(first, end, schedule.num_train_timesteps, needs_sigma=by_sigmas and lo > hi))
    if by_sigmas:
        return partial(by_sigma, schedule=schedule, distribution=SIGMA_DISTRIBUTIONS[name](schedule, o), lo=lo, hi=hi)
    return partial(by_time, schedule=schedule, distribution=TIMESTEP_DISTRIBUTIONS[name](o), first=first, end=end)


def default_distribution(o: ObjectiveOptions, schedule: Schedule, compat: Compat | None) -> str:
    """Uniform, but log-normal σ for EDM; Diffusers' trainers draw from the grid or uniformly there."""
    on_edm = isinstance(schedule.prediction, EDM)
    if compat == "diffusers":
        return "diffusers_grid" if on_edm else "uniform"
    return "lognormal" if on_edm or o.do_edm_style_training else "uniform"


def say_unread(o: ObjectiveOptions, name: str) -> None:
    """Flags of the log-normal distribution under another one; said here because the model has a say in which it is."""
    for flag in ("edm_p_mean", "edm_p_std"):
        if name != "lognormal" and getattr(o, flag) != type(o).model_fields[flag].default:
            log.warning("--%s has no effect: the noise levels follow the distribution %s, not lognormal", flag, name)


def range_problems(first: int, end: int, num_train_timesteps: int, *, needs_sigma: bool = False) -> Iterator[Problem]:
    """Timesteps that a schedule of `num_train_timesteps` lacks, or among which a distribution of σ finds none."""
    where, fix = "--min_timestep, --max_timestep", f"stay within 0 and {num_train_timesteps}, or leave them out"
    if not first < end <= num_train_timesteps:
        yield Problem(f"no timesteps from {first} to below {end}", where, f"the model has {num_train_timesteps}", fix)
    elif needs_sigma:
        yield Problem(f"no finite σ from timestep {first} to below {end}", where,
                      "at SNR 0 the noise is infinitely larger than the signal", fix)
