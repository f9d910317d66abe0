"""Augmentations of icon batches on white, all in [0,1], drawn from an explicit generator."""

import torch
from torch import Generator, Tensor
from torch.nn import functional


def uniform(batch: int, low: float, high: float, draw: Generator, *shape: int) -> Tensor:
    return torch.rand(batch, *shape, generator=draw) * (high - low) + low


def move(pixels: Tensor, *, scale: tuple[float, float], shift: float, angle: float, draw: Generator) -> Tensor:
    """Random scale, shift (share of the side), turn (radians) and mirror; what comes in from outside is white."""
    batch = len(pixels)
    size, turn = 1 / uniform(batch, *scale, draw), uniform(batch, -angle, angle, draw)
    mirror = torch.sign(torch.rand(batch, generator=draw) - 0.5)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * size * turn.cos(), -size * turn.sin()
    theta[:, 1, 0], theta[:, 1, 1] = mirror * size * turn.sin(), size * turn.cos()
    theta[:, :, 2] = uniform(batch, -2 * shift, 2 * shift, draw, 2)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return 1 - functional.grid_sample(1 - pixels, grid, align_corners=False)  # [B,C,H,W]


def wobble(pixels: Tensor, strength: float, draw: Generator) -> Tensor:
    """Bend images as an unsure hand draws: smooth random offsets from a 5 x 5 grid, up to `strength` of the side."""
    offsets = uniform(len(pixels), -2 * strength, 2 * strength, draw, 2, 5, 5)
    field = functional.interpolate(offsets, size=pixels.shape[-2:], mode="bicubic", align_corners=True)  # [B,2,H,W]
    still = torch.eye(2, 3).expand(len(pixels), 2, 3)
    grid = functional.affine_grid(still, list(pixels.shape), align_corners=False) + field.permute(0, 2, 3, 1)
    return 1 - functional.grid_sample(1 - pixels, grid, align_corners=False)  # [B,C,H,W]


def tint(pixels: Tensor, strength: float, draw: Generator) -> Tensor:
    """Random gamma, saturation and channel gains, white staying white."""
    batch = len(pixels)
    grey = pixels.mean(1, keepdim=True)
    saturation = uniform(batch, 1 - strength, 1 + strength, draw, 1, 1, 1)
    gamma = torch.exp(uniform(batch, -strength, strength, draw, 1, 1, 1))
    gain = torch.exp(uniform(batch, -strength / 2, strength / 2, draw, 3, 1, 1))
    return (grey + saturation * (pixels - grey)).clamp(1e-3, 1) ** (gamma * gain)


def shade(pixels: Tensor, draw: Generator) -> Tensor:
    """Smooth random light, as glossy images have: a 3 x 3 field of gains, enlarged; pure white stays white."""
    field = functional.interpolate(
        uniform(len(pixels), 0.6, 1.3, draw, 1, 3, 3), size=pixels.shape[-2:], mode="bicubic"
    )
    background = (pixels.amin(1, keepdim=True) > 0.98).float()
    return (pixels * (background + (1 - background) * field)).clamp(0, 1)


def soften(pixels: Tensor, draw: Generator) -> Tensor:
    """Half of the batch loses detail through a smaller size; noise on all of it."""
    small = int(torch.randint(24, 56, (), generator=draw))
    blurred = functional.interpolate(pixels, size=(small, small), mode="area")
    blurred = functional.interpolate(blurred, size=pixels.shape[-2:], mode="bilinear")
    keep = (torch.rand(len(pixels), 1, 1, 1, generator=draw) < 0.5).float()
    noise = uniform(len(pixels), 0, 0.05, draw, 1, 1, 1) * torch.randn(pixels.shape, generator=draw)
    return (keep * pixels + (1 - keep) * blurred + noise).clamp(0, 1)
