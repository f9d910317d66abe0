"""Noise: how much of it, how it is drawn, and what the network is asked to say about it.

Letters, here and in objective.py:

    x0  clean latent        n  noise            z = a·x0 + s·n  noised latent
    a   signal scale        s  noise scale      snr = (a/s)²
    t   timestep            u  a draw in [0,1)  out  what the network returned

B batch, C channels, h,w latent height and width, T timesteps of the schedule.

Three things that vary on their own are three kinds of object: a *level sampler* draws how noisy each sample is
(u [B] -> Level), a *prediction* is one parametrisation of the network, `Noise` draws n. Training code composes them
and asks no flag; a new parametrisation or timestep law is a new object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit import rng
from trainkit.errors import Problem, refuse

if TYPE_CHECKING:
    from trainkit.options import ObjectiveOptions


def col(v: Tensor, like: Tensor) -> Tensor:
    """One number per sample, shaped to multiply `like`: [B] -> [B,1,1,1]."""
    return v.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, eq=False)
class Level:
    """How noisy each sample of a batch is; `cond` is what the network is told about it."""

    a: Tensor  # [B] fp32
    s: Tensor  # [B] fp32, > 0
    cond: Tensor  # [B] the timestep, for the schedules here

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio (a/s)² -> [B], for latents of unit variance."""
        return (self.a / self.s) ** 2

    def to(self, device: torch.device | str) -> Level:
        return Level(self.a.to(device), self.s.to(device), self.cond.to(device))


LevelSampler = Callable[[Tensor], Level]  # u [B] in [0,1) -> Level


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

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str):
        assert alphas_cumprod.ndim == 1, f"alphas_cumprod is [T], got {tuple(alphas_cumprod.shape)}"
        ac = alphas_cumprod.float().cpu()  # [T]
        assert bool(((ac >= 0) & (ac < 1)).all()), "alphas_cumprod must lie in [0,1): every level has some noise"
        self.prediction_type = prediction_type
        self.a, self.s = ac.sqrt(), (1 - ac).sqrt()  # [T] each, on the CPU where timesteps are drawn
        refuse(problems(prediction_type, ends_at_zero_snr=self.ends_at_zero_snr))

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.a)

    @property
    def prediction(self) -> Prediction:
        """The parametrisation as an object."""
        return PREDICTIONS[self.prediction_type]()

    @property
    def ends_at_zero_snr(self) -> bool:
        return bool(self.a.min() ** 2 < self.zero_snr_below)

    def level(self, t: Tensor) -> Level:
        """The level of timesteps t [B] (long, on the CPU); move it with `Level.to`."""
        return Level(self.a[t], self.s[t], cond=t)


def problems(prediction_type: str, *, ends_at_zero_snr: bool) -> Iterator[Problem]:
    """Parametrisations that cannot be trained on a schedule, ending at SNR 0 or not."""
    where = "prediction_type in the model's scheduler/scheduler_config.json, or --prediction_type"
    if prediction_type not in PREDICTIONS:
        yield Problem(
            f"prediction type {prediction_type!r} cannot be trained", where, f"known: {', '.join(PREDICTIONS)}",
            "use a checkpoint that predicts one of these; if this one does, name it with --prediction_type")
    if prediction_type == "epsilon" and ends_at_zero_snr:
        yield Problem(
            "epsilon prediction on a noise schedule that ends at SNR 0", where,
            "at SNR 0 the input is pure noise, so predicting the noise says nothing about the picture",
            "add --prediction_type v_prediction (or use a checkpoint without rescale_betas_zero_snr)")


@dataclass(frozen=True, eq=False)
class UniformTimesteps:
    """Every timestep equally often: t = ⌊u·T⌋, Ho et al. 2020, algorithm 1."""

    schedule: NoiseSchedule

    def __call__(self, u: Tensor) -> Level:
        t = (u.double() * self.schedule.steps).long()  # [B]; in fp32, u·T may round up to T
        return self.schedule.level(t)


LEVEL_SAMPLERS: dict[str, Callable[[NoiseSchedule], LevelSampler]] = {"uniform": UniformTimesteps}


def make_levels(o: ObjectiveOptions, schedule: NoiseSchedule) -> LevelSampler:
    """The law of the noise levels that the options ask for."""
    assert not o.do_edm_style_training, "refused with the options"
    return LEVEL_SAMPLERS["uniform"](schedule)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise whose mean may wander per sample and channel, so that a picture's overall brightness is learned.

        n = ε + offset · ε_c,      ε [B,C,h,w], ε_c [B,C,1,1] standard normal;   variance 1 + offset²

    Source: N. Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org.
    """

    offset: float = 0.0

    def __call__(self, shape: Sequence[int], keys: Sequence[rng.Key]) -> Tensor:
        """Noise for one latent shape (C,h,w) per key -> n [B,C,h,w], fp32 on the CPU; depends on the keys only."""
        channels, _, _ = shape
        n = rng.normal(shape, keys, name="noise")  # [B,C,h,w]
        if self.offset:
            n = n + self.offset * rng.normal((channels, 1, 1), keys, name="offset")
        return n


class Prediction(ABC):
    """What the network outputs, how to read x0 back from it, and what its error is worth.

    The currency of every loss weight is the error on x0; `x0_gain` changes it into the network's own:

        |out − target|² = x0_gain · |to_x0(out) − x0|²

    x0, n, z, out [B,C,h,w];  weights and gains [B].
    """

    def add_noise(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
        """The noised latent z = a·x0 + s·n."""
        return col(level.a, x0) * x0 + col(level.s, x0) * n

    def model_input(self, z: Tensor, level: Level) -> Tensor:
        """What the network sees of z; a preconditioned parametrisation scales it."""
        return z

    @abstractmethod
    def target(self, x0: Tensor, n: Tensor, z: Tensor, level: Level) -> Tensor:
        """What the network should output."""

    @abstractmethod
    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        """The clean latent that the network's output implies."""

    @abstractmethod
    def x0_gain(self, level: Level) -> Tensor:
        """How much an error on x0 is magnified in the output -> [B]."""

    def loss_weight(self, level: Level, w_x0: Tensor) -> Tensor:
        """Weight of |out − target|² that makes |x̂0 − x0|² worth w_x0 -> [B]."""
        return w_x0 / self.x0_gain(level)


@dataclass(frozen=True)
class Eps(Prediction):
    """The network outputs the noise n: x0 = (z − s·out)/a, gain = snr. Undefined at SNR 0 (Ho et al. 2020, eq. 14)."""

    def target(self, x0: Tensor, n: Tensor, z: Tensor, level: Level) -> Tensor:
        return n

    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        return (z - col(level.s, z) * out) / col(level.a, z)

    def x0_gain(self, level: Level) -> Tensor:
        return level.snr


@dataclass(frozen=True)
class V(Prediction):
    """The network outputs v = a·n − s·x0, with a² + s² = 1: x0 = a·z − s·out, gain = snr + 1, defined at every level.

    Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", §4 and appendix D.
    """

    def target(self, x0: Tensor, n: Tensor, z: Tensor, level: Level) -> Tensor:
        return col(level.a, z) * n - col(level.s, z) * x0

    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        return col(level.a, z) * z - col(level.s, z) * out

    def x0_gain(self, level: Level) -> Tensor:
        return level.snr + 1


PREDICTIONS: dict[str, type[Prediction]] = {"epsilon": Eps, "v_prediction": V}
