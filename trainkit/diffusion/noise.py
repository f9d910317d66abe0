"""The noise that is added: white, with a wandering mean, over several resolutions; and perturbed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit import rng

if TYPE_CHECKING:
    from trainkit.options import ObjectiveOptions


Noise = Callable[[Sequence[int], Sequence[rng.Key]], tuple[Tensor, Tensor]]  # see `draw_noise`


def make_noise(o: ObjectiveOptions) -> Noise:
    """The noise that the options ask for."""
    return partial(draw_noise, offset=o.noise_offset, iterations=o.multires_noise_iterations,
                   discount=o.multires_noise_discount, perturbation=o.input_perturbation)


def draw_noise(
    shape: Sequence[int], keys: Sequence[rng.Key], *, offset: float = 0.0, iterations: int = 0, discount: float = 0.3,
    perturbation: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Noise for one latent shape (C,h,w) per key -> n and what z is made with [B,C,h,w], drawn on the CPU in fp32.

        n = ε̃ + offset · ε_c      ε̃ [B,C,h,w] of variance 1, ε_c [B,C,1,1] standard normal;   variance 1 + offset²

    ε̃ is white, or with `iterations` a sum over resolutions (see `multires`), of variance 1 on average over the places
    of a latent, so that more of its power is in low frequencies and an image's large shapes are learned. z is made
    with n + perturbation · ε' while targets keep n, so that the network learns to correct errors. Everything depends on
    the keys only.

    Sources: N. Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org; J. Whitaker 2023, "Multi-Resolution Noise
    for Diffusion Model Training", wandb.ai; Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion
    Models", algorithm 1 (γ = 0.1).
    """
    channels, _, _ = shape
    n = rng.normal(shape, keys, name="noise")  # [B,C,h,w]
    if iterations:
        n = torch.stack([multires(white, key, iterations, discount) for white, key in zip(n, keys, strict=True)])
    if offset:
        n = n + offset * rng.normal((channels, 1, 1), keys, name="offset")
    if not perturbation:
        return n, n
    return n, n + perturbation * rng.normal(shape, keys, name="perturbation")


def multires(white: Tensor, key: rng.Key, iterations: int, discount: float) -> Tensor:
    """Add coarser and coarser noise to `white` [C,h,w] and bring the variance back to 1 -> [C,h,w].

        ( white + Σᵢ discountⁱ · up(ε_i) ) / √( 1 + Σᵢ discount²ⁱ · vᵢ ),   i = 0 .. iterations−1

    ε_i standard normal of sides h/rⁱ, w/rⁱ with r drawn from [2,4), enlarged bilinearly by `up`, which leaves
    variance vᵢ; the sum ends at a side of 1. A divisor computed, not measured, keeps n exactly Gaussian and samples
    apart from one another.
    """
    channels, *sides = white.shape
    total, variance = white, 1.0
    for i in range(iterations):
        r = 2 + 2 * float(rng.uniform([key], f"multires-ratio-{i}"))
        coarse = [max(1, int(side / r**i)) for side in sides]
        rows, columns = (upsampling(small, side) for small, side in zip(coarse, sides, strict=True))
        grid = rng.normal((channels, *coarse), [key], f"multires-{i}")[0]  # [C,h/rⁱ,w/rⁱ]
        total = total + discount**i * (rows @ grid @ columns.T)
        variance += discount ** (2 * i) * mean_variance(rows) * mean_variance(columns)
        if 1 in coarse:
            break
    return total / variance**0.5


def upsampling(small: int, large: int) -> Tensor:
    """Bilinear enlargement of a side as a matrix -> [large, small]."""
    return F.interpolate(torch.eye(small)[None], size=large, mode="linear", align_corners=False)[0].T


def mean_variance(matrix: Tensor) -> float:
    """Variance that white noise has after `matrix` [large, small], averaged over the large side."""
    return float((matrix**2).sum(1).mean())
