"""Parametrisations: what the network outputs, how to read x0 back from it, and how its error is weighted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from trainkit.diffusion.level import Level, col


class Prediction(ABC):
    """What the network outputs, how to read x0 back from it, and how its error is weighted.

    `x0_gain` changes an error on x0 into one on the network's own output:

        |out − target|² = x0_gain · |to_x0(out) − x0|²

    and the currency of every loss weight is the error on x0 in units of σ_data (1 but for EDM), so that one weight
    formula in the SNR serves every parametrisation.

    x0, n, z, out [B,C,h,w];  weights and gains [B].
    """

    def add_noise(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
        """The noised latent z = a·x0 + s·n."""
        return col(level.a, x0) * x0 + col(level.s, x0) * n

    def model_input(self, z: Tensor, level: Level) -> Tensor:
        """What the network sees of z; a preconditioned parametrisation scales it."""
        return z

    @abstractmethod
    def target(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
        """What the network should output."""

    @abstractmethod
    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        """The clean latent that the network's output implies."""

    @abstractmethod
    def x0_gain(self, level: Level) -> Tensor:
        """How much a squared error on x0 is magnified in the output -> [B]."""

    def loss_weight(self, level: Level, x0_weight: Tensor) -> Tensor:
        """Weight of |out − target|² that gives |x̂0 − x0|²/σ_data² the weight `x0_weight` -> [B]."""
        return x0_weight / (self.x0_gain(level) * level.sigma_data**2)


@dataclass(frozen=True)
class Eps(Prediction):
    """The network outputs the noise n: x0 = (z − s·out)/a, gain = snr. Undefined at SNR 0 (Ho et al. 2020, eq. 14)."""

    def target(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
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

    def target(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
        return col(level.a, n) * n - col(level.s, n) * x0

    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        return col(level.a, z) * z - col(level.s, z) * out

    def x0_gain(self, level: Level) -> Tensor:
        return level.snr + 1


@dataclass(frozen=True)
class EDM(Prediction):
    """A preconditioned network on z = x0 + σ·n, told ln(σ)/4 (Karras et al. 2022, table 1 and eq. 7):

        x0 = c_skip·z + c_out·out      c_in  = 1/√(σ² + σ_data²)
        c_skip = σ_data²/(σ² + σ_data²)      c_out = sign · σ·σ_data/√(σ² + σ_data²)      gain = 1/c_out² = λ(σ)

    sign  +1, or −1 for the checkpoints whose EDM scheduler says prediction_type "v_prediction"
    The target is (x0 − c_skip·z)/c_out, written in x0 and n: the difference would lose its digits at small σ.
    """

    sigma_data: float = 0.5
    sign: int = 1

    def model_input(self, z: Tensor, level: Level) -> Tensor:
        return z * col(1 / self._deviation(level), z)

    def target(self, x0: Tensor, n: Tensor, level: Level) -> Tensor:
        scaled = col(level.s / self.sigma_data, n) * x0 - self.sigma_data * n
        return self.sign * scaled / col(self._deviation(level), n)

    def to_x0(self, out: Tensor, z: Tensor, level: Level) -> Tensor:
        c_skip = self.sigma_data**2 / (level.s**2 + self.sigma_data**2)  # [B]
        c_out = self.sign * level.s * self.sigma_data / self._deviation(level)  # [B]
        return col(c_skip, z) * z + col(c_out, z) * out

    def x0_gain(self, level: Level) -> Tensor:
        return (level.s**2 + self.sigma_data**2) / (level.s * self.sigma_data) ** 2

    def _deviation(self, level: Level) -> Tensor:
        """Standard deviation of z, √(σ² + σ_data²) -> [B]."""
        return (level.s**2 + self.sigma_data**2) ** 0.5


PREDICTIONS: dict[str, type[Eps] | type[V]] = {"epsilon": Eps, "v_prediction": V}  # of checkpoints with timesteps
EDM_SIGNS = {"epsilon": 1, "v_prediction": -1}  # the same words in the config of an EDM scheduler: the sign of c_out
