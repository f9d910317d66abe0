"""Noise: how much of it, how it is drawn, and what the network is asked to say about it.

Letters, in these files and in objective.py:

    x0  clean latent        n  noise            z = a·x0 + s·n  noised latent
    a   signal scale        s  noise scale      snr = (a·σ_data/s)²      σ = s/a
    t   timestep            u  a draw in [0,1)  out  what the network returned

B batch, C channels, h,w latent height and width, T timesteps of the schedule.

Things that vary on their own are objects of their own: a *schedule* knows the noise levels a checkpoint was trained on,
a *level sampler* draws how noisy each sample is (u [B] -> Level), a *prediction* is one parametrisation of the network,
`draw_noise` draws n. Training code composes them and asks no flag; docs/objectives.md has the maths on one page.

    level.py        Level: how noisy each sample of a batch is
    predictions.py  ε, v and EDM: what the network outputs and how its error is weighted
    schedules.py    the discrete levels of ε and v checkpoints, the σ range of EDM ones
    sampling.py     distributions of the noise levels
    noise.py        offset and multi-resolution noise, input perturbation
"""

from trainkit.diffusion.level import Level, col
from trainkit.diffusion.noise import Noise, draw_noise, make_noise
from trainkit.diffusion.predictions import EDM, PREDICTIONS, Eps, Prediction, V
from trainkit.diffusion.sampling import LEVEL_DISTRIBUTIONS, LevelSampler, make_levels, range_problems
from trainkit.diffusion.schedules import (
    AS_SAVED,
    EDM_SCHEDULERS,
    EDMSchedule,
    NoiseSchedule,
    Schedule,
    ScheduleChange,
    config_problems,
    effective_config,
    is_edm,
    make_schedule,
    rescheduled,
    schedule_fault,
)

__all__ = [
    "AS_SAVED", "EDM", "EDM_SCHEDULERS", "LEVEL_DISTRIBUTIONS", "PREDICTIONS", "EDMSchedule", "Eps", "Level",
    "LevelSampler", "Noise", "NoiseSchedule", "Prediction", "Schedule", "ScheduleChange", "V", "col", "config_problems",
    "draw_noise", "effective_config", "is_edm", "make_levels", "make_noise", "make_schedule", "range_problems",
    "rescheduled", "schedule_fault",
]
