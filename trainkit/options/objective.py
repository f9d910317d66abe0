"""The concern that says what is minimised: noise levels, noise, weights, error."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, always, opt
from trainkit.options.prerequisites import needs

SNR_CAPPED = ("min_snr", "soft_min_snr")  # weightings that --snr_gamma caps
HUBER = needs(
    "loss_type=huber|smooth_l1 or loss_type=fourier and fourier_base_loss=huber|smooth_l1",
    "--loss_type or --fourier_base_loss huber or smooth_l1")


class ObjectiveOptions(Concern):
    """What is minimised"""

    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2", "snr", "edm", "x0"] | None = opt(
        None, "what an error counts at each noise level; without it min_snr when --snr_gamma is given, else edm for "
        "EDM training, else uniform", card="Loss weighting")
    snr_gamma: float | None = opt(
        None, "gamma of Min-SNR weighting (Hang et al. 2023), 5 in the paper", unit="gamma",
        read_with=needs(f"no loss_weighting or loss_weighting={'|'.join(SNR_CAPPED)}",
                        f"--loss_weighting {' or '.join(SNR_CAPPED)}"), card=always("Min-SNR gamma"), gt=0, off=None)
    p2_k: float = opt(1.0, "k of P2 weighting (Choi et al. 2022)", unit="SNR", read_with="loss_weighting=p2", gt=0)
    p2_gamma: float = opt(
        1.0, "gamma of P2 weighting, 0.5 or 1 in the paper", unit="gamma", read_with="loss_weighting=p2", ge=0)
    loss_type: Literal["l2", "l1", "huber", "smooth_l1", "fourier"] = opt(
        "l2", "the error of one number: squared, absolute, or squared up to about --huber_c and absolute above; "
        "fourier: --fourier_base_loss and a distance of spectra (docs/fourier.md)", card="Loss")
    huber_c: float = opt(
        0.1, "where huber and smooth_l1 turn from squared to absolute", unit="error", read_with=HUBER, gt=0)
    huber_schedule: Literal["constant", "exponential", "snr"] = opt(
        "snr", "how that place moves with the noise level: not at all, or from 1 without noise down to --huber_c "
        "(Khrapov et al. 2024)", read_with=HUBER)
    noise_offset: float = opt(
        0.0, "noise added to each channel's mean, 0.05 to 0.1 are usual", unit="std", card="Noise offset", ge=0,
        off=0.0)
    multires_noise_iterations: int = opt(
        0, "resolutions that noise is summed over (Whitaker 2023), 6 to 10 are usual; 0: white noise", unit="grids",
        ge=0, off=0)
    multires_noise_discount: float = opt(
        0.3, "strength of each coarser resolution relative to the one before", unit="factor",
        read_with="multires_noise_iterations", gt=0, le=1)
    input_perturbation: float = opt(
        0.0, "extra noise in the input that the target does not know (Ning et al. 2023), 0.1 in the paper", unit="std",
        ge=0, off=0.0)
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "cosmap"] | None = opt(
        None, "law of the timesteps (Esser et al. 2024); without it uniform, and for EDM training --edm_sigmas")
    logit_mean: float = opt(0.0, "mean of the logit-normal law: below 0 favours little noise", unit="logit",
                            read_with="timestep_sampling=logit_normal")
    logit_std: float = opt(1.0, "standard deviation of the logit-normal law", unit="logit",
                           read_with="timestep_sampling=logit_normal", gt=0)
    mode_scale: float = opt(
        1.29, "strength of the mode law: above 0 favours the middle, below 0 the ends", unit="scale",
        read_with="timestep_sampling=mode", ge=-1, le=1.75)
    min_timestep: int = opt(0, "first timestep that is drawn", unit="timestep", ge=0)
    max_timestep: int | None = opt(
        None, "timestep below which all are drawn; without it all", unit="timestep", ge=1, off=None)
    do_edm_style_training: bool = opt(
        False, "noise levels and weights of Karras et al. 2022 on an epsilon or v model; EDM models always have them",
        card="EDM training", differs="log-normal noise levels and EDM weights, where it was plain training by algebra; "
        "--compat diffusers: as there")
    edm_sigmas: Literal["lognormal", "karras", "uniform"] | None = opt(
        None, "law of the noise levels sigma, also without --do_edm_style_training; uniform: timesteps, or the "
        "logarithm of sigma in EDM models. Without it lognormal for EDM training")
    edm_p_mean: float = opt(-1.2, "mean of the logarithm of sigma in the log-normal law", unit="ln sigma")
    edm_p_std: float = opt(1.2, "standard deviation of the logarithm of sigma", unit="ln sigma", gt=0)
    prediction_type: Literal["epsilon", "v_prediction"] | None = opt(
        None, "what the UNet predicts; without it the model's own scheduler config says so", card="Prediction")
    rescale_betas_zero_snr: bool = opt(
        False, "rescale the noise schedule to end in pure noise (Lin et al. 2024), for v-prediction; images must be "
        "drawn with the same setting and trailing timesteps", card="Schedule ends at SNR 0")

    @property
    def capped_gamma(self) -> float | None:
        """--snr_gamma where the weights of the loss are capped by it."""
        return self.snr_gamma if self.loss_weighting in (None, *SNR_CAPPED) else None
