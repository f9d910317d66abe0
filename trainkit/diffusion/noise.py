"""The noise that is added: white, with a wandering mean, over several resolutions; and perturbed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit import rng

if TYPE_CHECKING:
    from trainkit.options import ObjectiveOptions


@dataclass(frozen=True)
class Noise:
    """Gaussian noise that may have more of its power in low frequencies, so that a picture's large shapes are learned.

        n = ε̃ + offset · ε_c      ε̃ [B,C,h,w] of variance 1, ε_c [B,C,1,1] standard normal;   variance 1 + offset²

    ε̃ is white, or with `multires_iterations` a sum over resolutions (see `multires`), of variance 1 on average over the
    places of a latent. Everything depends on the keys only and is drawn on the CPU in fp32.

    Sources: N. Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org; J. Whitaker 2023, "Multi-Resolution Noise
    for Diffusion Model Training", wandb.ai; Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion
    Models", algorithm 1 (γ = 0.1).
    """

    offset: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    input_perturbation: float = 0.0

    @classmethod
    def from_options(cls, o: ObjectiveOptions) -> Noise:
        return cls(o.noise_offset, o.multires_noise_iterations, o.multires_noise_discount, o.input_perturbation)

    def __call__(self, shape: Sequence[int], keys: Sequence[rng.Key]) -> Tensor:
        """Noise for one latent shape (C,h,w) per key -> n [B,C,h,w]."""
        channels, _, _ = shape
        n = rng.normal(shape, keys, name="noise")  # [B,C,h,w]
        if self.multires_iterations:
            n = torch.stack([self.multires(white, key) for white, key in zip(n, keys, strict=True)])
        if self.offset:
            n = n + self.offset * rng.normal((channels, 1, 1), keys, name="offset")
        return n

    def multires(self, white: Tensor, key: rng.Key) -> Tensor:
        """Add coarser and coarser noise to `white` [C,h,w] and bring the variance back to 1 -> [C,h,w].

            ( white + Σᵢ discountⁱ · up(ε_i) ) / √( 1 + Σᵢ discount²ⁱ · vᵢ ),   i = 0 .. iterations−1

        ε_i standard normal of sides h/rⁱ, w/rⁱ with r drawn from [2,4), enlarged bilinearly by `up`, which leaves
        variance vᵢ; the sum ends at a side of 1. A divisor computed, not measured, keeps n exactly Gaussian and samples
        apart from one another.
        """
        channels, *sides = white.shape
        total, variance = white, 1.0
        for i in range(self.multires_iterations):
            r = 2 + 2 * float(rng.uniform([key], f"multires-ratio-{i}"))
            coarse = [max(1, int(side / r**i)) for side in sides]
            rows, columns = (upsampling(small, side) for small, side in zip(coarse, sides, strict=True))
            grid = rng.normal((channels, *coarse), [key], f"multires-{i}")[0]  # [C,h/rⁱ,w/rⁱ]
            total = total + self.multires_discount**i * (rows @ grid @ columns.T)
            variance += self.multires_discount ** (2 * i) * mean_variance(rows) * mean_variance(columns)
            if 1 in coarse:
                break
        return total / variance**0.5

    def perturbed(self, n: Tensor, keys: Sequence[rng.Key]) -> Tensor:
        """The noise that z is made with, n + γ·ε' -> [B,C,h,w]; targets keep n, so the network learns to mend errors.

        γ = input_perturbation; the variance grows by γ².
        """
        if not self.input_perturbation:
            return n
        return n + self.input_perturbation * rng.normal(n.shape[1:], keys, name="perturbation").to(n.device)


def upsampling(small: int, large: int) -> Tensor:
    """Bilinear enlargement of a side as a matrix -> [large, small]."""
    return F.interpolate(torch.eye(small)[None], size=large, mode="linear", align_corners=False)[0].T


def mean_variance(matrix: Tensor) -> float:
    """Variance that white noise has after `matrix` [large, small], averaged over the large side."""
    return float((matrix**2).sum(1).mean())
