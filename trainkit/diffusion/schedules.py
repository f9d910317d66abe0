"""The noise levels a checkpoint was trained on: discrete timesteps for ε and v, a range of σ for EDM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.diffusion.level import Level
from trainkit.diffusion.predictions import EDM, EDM_SIGNS, PREDICTIONS, Prediction
from trainkit.errors import Problem, refuse

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from trainkit.options import ObjectiveOptions

SchedulerConfig = Mapping[str, Any]  # scheduler/scheduler_config.json of a checkpoint

EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
RHO = 7.0  # Karras et al. 2022, table 1: how far σ grids crowd towards small σ
WHERE = "prediction_type in the model's scheduler/scheduler_config.json, or --prediction_type"


def karras(progress: Tensor, lo: float, hi: float, rho: float = RHO) -> Tensor:
    """σ between lo (progress 0) and hi (1), evenly spaced in σ^(1/ρ) (Karras et al. 2022, eq. 5)."""
    low, high = lo ** (1 / rho), hi ** (1 / rho)
    return (low + progress * (high - low)) ** rho


def exponential(progress: Tensor, lo: float, hi: float, rho: float = RHO) -> Tensor:
    """σ between lo (progress 0) and hi (1), evenly spaced in ln σ; rho is not used."""
    return lo * (hi / lo) ** progress


GRIDS: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {"karras": karras, "exponential": exponential}


class NoiseSchedule:
    """The discrete noise levels a checkpoint was trained on, and the parametrisation it was trained in.

        a_t = √ᾱ_t,   s_t = √(1 − ᾱ_t),   a² + s² = 1

    alphas_cumprod [T]  ᾱ, falling with t; prediction_type one of PREDICTIONS.
    Raises UserError for a parametrisation we do not know, and for ε on a schedule that ends at SNR 0.
    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4; Lin et al. 2024, "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", §3.1–3.2 (why ε cannot learn at SNR 0).
    """

    # Rescaled schedules end at ᾱ = 0 or at the smallest fp16 number, 2⁻²⁴; ordinary ones above 1e-3.
    zero_snr_below = 1e-6
    rho = RHO

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str):
        assert alphas_cumprod.ndim == 1, f"alphas_cumprod is [T], got {tuple(alphas_cumprod.shape)}"
        ac = alphas_cumprod.float().cpu()  # [T]
        assert bool(((ac >= 0) & (ac < 1)).all()), "alphas_cumprod must lie in [0,1): every level has some noise"
        self.prediction_type = prediction_type
        self.a, self.s = ac.sqrt(), (1 - ac).sqrt()  # [T] each, on the CPU where timesteps are drawn
        self.num_train_timesteps = len(ac)  # T, the number of timesteps
        refuse(problems(prediction_type, ends_at_zero_snr=self.ends_at_zero_snr))

    @property
    def prediction(self) -> Prediction:
        """The parametrisation as an object."""
        return PREDICTIONS[self.prediction_type]()

    @property
    def ends_at_zero_snr(self) -> bool:
        return bool(self.a.min() ** 2 < self.zero_snr_below)

    @property
    def sigmas(self) -> Tensor:
        """σ = s/a of every timestep -> [T] fp64, rising; ∞ where the signal is gone."""
        return self.s.double() / self.a.double()

    def at(self, position: Tensor) -> Level:
        """The level of positions [B] in [0,T): timestep ⌊position⌋, on the CPU; move it with `Level.to`."""
        t = position.long()
        return Level(self.a[t], self.s[t], cond=t, time=t / self.num_train_timesteps)

    def nearest(self, sigma: Tensor) -> Level:
        """The level whose ln σ is nearest that of sigma [B] (fp64, finite): the network knows no other levels."""
        ln = self.sigmas.log()
        return self.at(torch.bucketize(sigma.log(), (ln[1:] + ln[:-1]) / 2))

    def sigma_range(self, first: int, end: int) -> tuple[float, float]:
        """Smallest and largest finite σ of the timesteps first .. end−1; (∞, −∞) where there is none."""
        finite = [sigma for sigma in self.sigmas[first:end].tolist() if math.isfinite(sigma)]
        return min(finite, default=math.inf), max(finite, default=-math.inf)


@dataclass(frozen=True)
class EDMSchedule:
    """The σ range of a checkpoint trained as in Karras et al. 2022, such as Playground v2.5: a = 1, s = σ.

    A position runs from 0 (σ_min) to T = `num_train_timesteps` (σ_max), evenly in ln σ, which the network is given.
    grid  the spacing of the checkpoint's own σ grid, one of GRIDS; only `--compat diffusers` draws from it.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = RHO
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    grid: str = "karras"

    @property
    def prediction(self) -> Prediction:
        """The parametrisation as an object."""
        return EDM(self.sigma_data, EDM_SIGNS[self.prediction_type])

    def at(self, position: Tensor) -> Level:
        """The level of positions [B] in [0,T)."""
        return self.nearest(exponential(position / self.num_train_timesteps, self.sigma_min, self.sigma_max))

    def nearest(self, sigma: Tensor) -> Level:
        """The level of sigma [B] itself: the network takes any."""
        s = sigma.float()
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        time = (s.log() - ends[0]) / (ends[1] - ends[0])
        return Level(torch.ones_like(s), s, cond=0.25 * s.log(), time=time.clamp(0, 1), sigma_data=self.sigma_data)

    def sigma_range(self, first: int, end: int) -> tuple[float, float]:
        """σ at positions `first` and `end`."""
        at = torch.tensor([first, end], dtype=torch.float64) / self.num_train_timesteps
        lo, hi = exponential(at, self.sigma_min, self.sigma_max).tolist()
        return lo, hi


Schedule = NoiseSchedule | EDMSchedule


# ----------------------------------------------------------------------------------------------------------------------
# From a checkpoint's scheduler config


def is_edm(config: SchedulerConfig) -> bool:
    """Whether the scheduler config is that of an EDM checkpoint."""
    return str(config.get("_class_name")).startswith("EDM")


@dataclass(frozen=True)
class ScheduleChange:
    """What the flags of the same names change of a checkpoint's scheduler config."""

    prediction_type: str | None = None
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_options(cls, o: ObjectiveOptions) -> ScheduleChange:
        return cls(o.prediction_type, o.rescale_betas_zero_snr)


AS_SAVED = ScheduleChange()


def effective_config(config: SchedulerConfig, change: ScheduleChange = AS_SAVED) -> dict[str, Any]:
    """The scheduler config as the flags change it: what is trained, drawn in previews, and keyed in checkpoints.

    A schedule that ends at SNR 0 must be sampled from its last timestep, hence the trailing spacing (Lin et al. 2024,
    §3.3).
    """
    changed = dict(config)
    if change.prediction_type:
        changed["prediction_type"] = change.prediction_type
    if change.rescale_betas_zero_snr:
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changed


def rescheduled(scheduler: SchedulerMixin, change: ScheduleChange) -> SchedulerMixin:
    """A pipeline's scheduler as the flags change it."""
    if change == AS_SAVED:
        return scheduler
    return type(scheduler).from_config(effective_config(scheduler.config, change))


def config_problems(config: SchedulerConfig) -> Iterator[Problem]:
    """What in an effective scheduler config cannot be trained."""
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    yield from problems(str(config.get("prediction_type", "epsilon")), ends_at_zero_snr=zero_snr and not is_edm(config))
    if is_edm(config) and zero_snr:
        yield Problem("--rescale_betas_zero_snr on an EDM model", "--rescale_betas_zero_snr",
                      f"its scheduler ({config['_class_name']}) has a range of σ and no betas", "leave out the flag")


def problems(prediction_type: str, *, ends_at_zero_snr: bool) -> Iterator[Problem]:
    """Parametrisations that cannot be trained on a schedule, ending at SNR 0 or not."""
    if prediction_type not in PREDICTIONS:
        yield Problem(
            f"prediction type {prediction_type!r} cannot be trained", WHERE, f"known: {', '.join(PREDICTIONS)}",
            "use a checkpoint that predicts one of these; if this one does, name it with --prediction_type")
    if prediction_type == "epsilon" and ends_at_zero_snr:
        yield Problem(
            "epsilon prediction on a noise schedule that ends at SNR 0", WHERE,
            "at SNR 0 the input is pure noise, so predicting the noise says nothing about the image",
            "add --prediction_type v_prediction (or train without rescale_betas_zero_snr)")


def schedule_fault(schedule: Schedule, config: SchedulerConfig) -> str:
    """Why a network cannot have been trained on these levels; "" where it can."""
    if isinstance(schedule, EDMSchedule):
        if not 0 < schedule.sigma_min < schedule.sigma_max:
            return f"sigma_min {schedule.sigma_min:g} is not below sigma_max {schedule.sigma_max:g}"
        return "" if schedule.grid in GRIDS else f"sigma_schedule {schedule.grid!r} is none of {', '.join(GRIDS)}"
    steps = config.get("num_train_timesteps", schedule.num_train_timesteps)
    if steps != schedule.num_train_timesteps:
        return f"num_train_timesteps is {steps}, and there are {schedule.num_train_timesteps} betas"
    return ""


def make_schedule(config: SchedulerConfig) -> Schedule:
    """The schedule of an effective scheduler config; raises UserError as `config_problems` says.

    The betas are rescaled to end at SNR 0 (Lin et al. 2024, algorithm 1), where the config says so, before anything is
    read off them.
    """
    from diffusers import DDPMScheduler

    refuse(config_problems(config))
    prediction_type = str(config.get("prediction_type", "epsilon"))
    if not is_edm(config):
        alphas = DDPMScheduler.from_config(dict(config)).alphas_cumprod
        if not bool(((alphas >= 0) & (alphas < 1)).all()) or not bool((alphas.diff() <= 0).all()):
            raise ValueError("its betas add no noise from one timestep to the next")
        return NoiseSchedule(alphas, prediction_type)
    names = {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "sigma_data": "sigma_data", "rho": "rho",
             "num_train_timesteps": "num_train_timesteps", "sigma_schedule": "grid"}
    known = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    return EDMSchedule(prediction_type=prediction_type, **known)
