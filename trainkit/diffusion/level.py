"""How noisy each sample of a batch is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainkit.devices import upload


def col(v: Tensor, like: Tensor) -> Tensor:
    """One number per sample, shaped to multiply `like`: [B] -> [B,1,1,1]."""
    return v.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, eq=False)
class Level:
    """How noisy each sample of a batch is; `cond` is what the network is given about it."""

    a: Tensor  # [B] fp32
    s: Tensor  # [B] fp32, > 0
    cond: Tensor  # [B] the timestep (long), or ln(σ)/4 (fp32) for EDM
    time: Tensor  # [B] fp32 in 0..1, how far along the schedule: t/T, or the place of ln σ between its ends for EDM
    sigma_data: float = 1.0  # std of the clean latents as the checkpoint assumes it

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio (a·σ_data/s)² -> [B]."""
        return (self.a * self.sigma_data / self.s) ** 2

    def to(self, device: torch.device) -> Level:
        a, s, cond, time = upload([self.a, self.s, self.cond, self.time], device)
        return replace(self, a=a, s=s, cond=cond, time=time)
