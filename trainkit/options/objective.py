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
    """Objective: noise levels, noise, weights and loss"""

    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2", "snr", "edm", "x0"] | None = opt(
        None,
        "The noise-level weight: how much the error counts at each noise level. Without this flag, it is min_snr if "
        "--snr_gamma is given, edm for EDM training, and uniform otherwise.", card="Loss weighting")
    snr_gamma: float | None = opt(
        None, "Gamma of Min-SNR weighting (Hang et al. 2023). The paper uses 5.", unit="gamma",
        read_with=needs(f"no loss_weighting or loss_weighting={'|'.join(SNR_CAPPED)}",
                        f"--loss_weighting {' or '.join(SNR_CAPPED)}"),
        card=always("Min-SNR gamma"), gt=0, off=None)
    p2_k: float = opt(
        1.0, "k of P2 weighting (Choi et al. 2022).", unit="SNR", read_with="loss_weighting=p2", gt=0)
    p2_gamma: float = opt(
        1.0, "Gamma of P2 weighting. The paper uses 0.5 and 1.", unit="gamma", read_with="loss_weighting=p2", ge=0)
    loss_type: Literal["l2", "l1", "huber", "smooth_l1", "fourier"] = opt(
        "l2",
        "How the error of each number is measured. l2: squared. l1: absolute. huber and smooth_l1: squared for small "
        "errors and absolute for large ones. fourier: the error of --fourier_base_loss and, in addition, a distance "
        "of spectra (docs/fourier.md).", card="Loss")
    huber_c: float = opt(
        0.1, "The error at which huber and smooth_l1 change from squared to absolute.", unit="error", read_with=HUBER,
        gt=0)
    huber_schedule: Literal["constant", "exponential", "snr"] = opt(
        "snr",
        "How --huber_c depends on the noise level. constant: it does not. exponential and snr: it falls from 1 "
        "without noise down to --huber_c (Khrapov et al. 2024).", read_with=HUBER)
    noise_offset: float = opt(
        0.0, "Noise that is added to the mean of each channel. Usual values are 0.05 to 0.1.", unit="std",
        card="Noise offset", ge=0, off=0.0)
    multires_noise_iterations: int = opt(
        0,
        "The number of resolutions whose noise is added up (Whitaker 2023). Usual values are 6 to 10. With 0, the "
        "noise is white noise.", unit="grids", ge=0, off=0)
    multires_noise_discount: float = opt(
        0.3, "The strength of the noise at each coarser resolution, relative to the next finer one.", unit="factor",
        read_with="multires_noise_iterations", gt=0, le=1)
    input_perturbation: float = opt(
        0.0,
        "Extra noise in the input of the network, which it does not have to predict (Ning et al. 2023). The paper "
        "uses 0.1.", unit="std", ge=0, off=0.0)
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "cosmap"] | None = opt(
        None,
        "The distribution from which timesteps are chosen (Esser et al. 2024). Without this flag, it is uniform. For "
        "EDM training, it is --edm_sigmas.")
    logit_mean: float = opt(
        0.0, "The mean of the logit-normal distribution. Values below 0 prefer little noise.", unit="logit",
        read_with="timestep_sampling=logit_normal")
    logit_std: float = opt(
        1.0, "The standard deviation of the logit-normal distribution.", unit="logit",
        read_with="timestep_sampling=logit_normal", gt=0)
    mode_scale: float = opt(
        1.29,
        "The strength of the distribution called mode. Values above 0 prefer the middle of the timesteps. Values "
        "below 0 prefer the two ends.", unit="scale", read_with="timestep_sampling=mode", ge=-1, le=1.75)
    min_timestep: int = opt(
        0, "The smallest timestep that is trained on.", unit="timestep", ge=0)
    max_timestep: int | None = opt(
        None, "All timesteps that are trained on are below this number. Without this flag, there is no such limit.",
        unit="timestep", ge=1)
    do_edm_style_training: bool = opt(
        False,
        "Use the noise levels and weights of Karras et al. 2022 on a model that predicts epsilon or v. EDM models "
        "always have them.", card="EDM training",
        differs="the noise levels are log-normal and the EDM weights count; that script computes plain training, and "
        "--compat diffusers does the same")
    edm_sigmas: Literal["lognormal", "karras", "uniform"] | None = opt(
        None,
        "The distribution of the noise levels sigma. This flag also works without --do_edm_style_training. The value "
        "uniform means uniform timesteps. For EDM models, it means that the logarithm of sigma is uniform. Without "
        "this flag, it is lognormal for EDM training.")
    edm_p_mean: float = opt(
        -1.2, "The mean of the logarithm of sigma in the log-normal distribution.", unit="ln sigma")
    edm_p_std: float = opt(
        1.2, "The standard deviation of the logarithm of sigma in the log-normal distribution.", unit="ln sigma", gt=0)
    prediction_type: Literal["epsilon", "v_prediction"] | None = opt(
        None,
        "What the UNet predicts. Without this flag, the scheduler config of the model says it, or its single file. "
        "Some files of SD 2.x do not say it.",
        card="Prediction")
    rescale_betas_zero_snr: bool = opt(
        False,
        "Change the noise schedule so that it ends in pure noise (Lin et al. 2024). This is for models with "
        "v-prediction. Later, generate images with the same setting and with trailing timesteps.",
        card="Schedule ends at SNR 0")

    @property
    def capped_gamma(self) -> float | None:
        """--snr_gamma where the weights of the loss are capped by it."""
        return self.snr_gamma if self.loss_weighting in (None, *SNR_CAPPED) else None
