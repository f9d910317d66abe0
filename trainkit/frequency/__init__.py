"""Losses in the frequencies of latents, and the bands that they are made of.

    bands.py                  split a tensor into frequency bands: DCT, wavelets, FFT
    distribution_matching.py  the loss of the errors that the samples of a batch share, band by band
    spectra.py                the Fourier loss: the spectrum of a prediction against that of its target
    presets.py                the Fourier loss's modes and presets

The package imports torch alone, and nothing else of trainkit: it can be copied into another project together with
freq_loss.py, its public face. docs/frequency.md and docs/fourier.md have the formulas and measurements.
"""

from trainkit.frequency.bands import DB3, Bands, LowPass, frequency_decomposition, taps
from trainkit.frequency.distribution_matching import KERNELS, STATISTICS, DistributionMatchingLoss
from trainkit.frequency.presets import MODES, PRESETS, get_fourier_loss_config
from trainkit.frequency.spectra import (
    FOURIER_CHOICES,
    GATES,
    NORMALIZERS,
    FourierLoss,
    FourierPart,
    coefficients,
    warn_once,
    wiener,
)

__all__ = [
    "DB3", "FOURIER_CHOICES", "GATES", "KERNELS", "MODES", "NORMALIZERS", "PRESETS", "STATISTICS", "Bands",
    "DistributionMatchingLoss", "FourierLoss", "FourierPart", "LowPass", "coefficients", "frequency_decomposition",
    "get_fourier_loss_config", "taps", "warn_once", "wiener",
]
