"""Frequencies of latents: bands of them, the loss of what a batch's errors share in each band, the loss of spectra."""

from trainkit.frequency.spectra import (
    DB3,
    FOURIER_CHOICES,
    GATES,
    KERNELS,
    MODES,
    NORMALIZERS,
    PRESETS,
    STATISTICS,
    Bands,
    DistributionMatchingLoss,
    FourierLoss,
    FourierPart,
    LowPass,
    coefficients,
    frequency_decomposition,
    get_fourier_loss_config,
    taps,
    warn_once,
    wiener,
)

__all__ = [
    "DB3", "FOURIER_CHOICES", "GATES", "KERNELS", "MODES", "NORMALIZERS", "PRESETS", "STATISTICS", "Bands",
    "DistributionMatchingLoss", "FourierLoss", "FourierPart", "LowPass", "coefficients", "frequency_decomposition",
    "get_fourier_loss_config", "taps", "warn_once", "wiener",
]
