"""Noise schedules of every kind, and latents to put noise on."""

from __future__ import annotations

import torch

from trainkit.diffusion import EDMSchedule, NoiseSchedule


def alphas(*, zero_terminal_snr=False):
    """SDXL's ᾱ (scaled_linear betas); rescaled as in Lin et al. 2024, algorithm 1, on request -> [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return (a**2).float()


def schedules():
    """Every kind of schedule, by name."""
    return {
        "epsilon": NoiseSchedule(alphas(), "epsilon"), "v_prediction": NoiseSchedule(alphas(), "v_prediction"),
        "zero-SNR v": NoiseSchedule(alphas(zero_terminal_snr=True), "v_prediction"), "EDM": EDMSchedule(),
        "EDM v": EDMSchedule(sigma_data=1.0, prediction_type="v_prediction"),
    }


def latents(batch, *, seed=0):
    """x0, n [B,4,8,8]."""
    return torch.randn(2, batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
