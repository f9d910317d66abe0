"""Losses in the frequencies of latents, for your own code too. This file needs torch and the folder trainkit/frequency.

    frequency_decomposition   splits a tensor [...,h,w] into a low and a high part, which add up to it
    LowPass, Bands            the same with every choice: DCT, wavelets or FFT; two or J + 1 bands
    DistributionMatchingLoss  the loss of what the errors of a batch have in common, band by band (docs/frequency.md)
    FourierLoss               the loss between the spectra of a prediction and its target (docs/fourier.md); its method
                              `distance` is the distance alone, without weight and warm-up
    get_fourier_loss_config   the settings of a preset of FourierLoss, to be edited

For example:

    import torch
    from freq_loss import DistributionMatchingLoss, FourierLoss, frequency_decomposition, get_fourier_loss_config

    pred, target = torch.randn(4, 4, 64, 64, requires_grad=True), torch.randn(4, 4, 64, 64)
    low, high = frequency_decomposition(target)

    base = (pred - target).square().mean((1, 2, 3))  # [B]
    fourier = FourierLoss.from_config(get_fourier_loss_config("balanced"))
    loss = (base + fourier(pred, target, base=base, step=300, total_steps=2000).added).mean()

    matching = DistributionMatchingLoss(gain=0.3)  # here pred and target are clean latents, predicted and true
    loss = loss + matching(pred, target, snr=torch.ones(4), weight=torch.ones(4)).mean()
    loss.backward()
"""

from trainkit.frequency import (
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
