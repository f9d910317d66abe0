"""What the bank of past errors makes of a small set of images: it holds each one's own error, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from freq_loss import DistributionMatchingLoss

SHAPE, STEPS = (4, 8, 8), 600
A = S = 0.5**0.5  # SNR 1


def charged(count: int, bank: float) -> float:
    """Mean term of the right denoiser of Gaussian images, of which there are `count`, once the bank is full."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *SHAPE, generator=generator)
    loss = DistributionMatchingLoss(gain=1, band_norm="dof", weights=(0.5, 0.5), bank=bank, levels=1)
    terms: list[Tensor] = []
    for _ in range(STEPS):
        x0 = images[torch.randperm(count, generator=generator)[:4]]
        x0_hat = A * (A * x0 + S * torch.randn(x0.shape, generator=generator))  # E[x0 | z]: |x̂0 − x0|²/D is 0.5
        terms.append(loss(x0_hat, x0, snr=torch.ones(4), weight=torch.ones(4)).mean())
    return float(torch.stack(terms[STEPS // 2:]).mean())


@pytest.mark.trains
def test_a_bank_charges_the_right_denoiser_of_few_images_for_their_own_errors():
    """1/(1 + SNR) of an error, here 0.25 of 0.5, is the same whenever the image comes; of that a bank holds 1/N."""
    own = 0.25 / 22
    assert charged(22, bank=0.99) == pytest.approx(own, rel=0.2)
    assert abs(charged(22, bank=0)) < own / 4 and abs(charged(400, bank=0.99)) < own / 4
