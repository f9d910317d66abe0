"""The concern that says what is minimised: noise levels, noise, weights, error."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, opt


class ObjectiveOptions(Concern):
    """What is minimised"""

    do_edm_style_training: bool = opt(
        False, "noise levels and weights of Karras et al. 2022", not_yet="EDM-style training")
    snr_gamma: float | None = opt(
        None, "Min-SNR weighting (Hang et al. 2023), 5 in the paper; without it the plain error", unit="gamma", gt=0)
    noise_offset: float = opt(0.0, "noise added to each channel's mean, 0.05 to 0.1 are usual", unit="std", ge=0)
    prediction_type: Literal["epsilon", "v_prediction"] | None = opt(
        None, "what the UNet predicts; without it the model's own scheduler config says so")
