"""The concern of frequency-aware distribution matching."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from trainkit.options.base import Concern, always, opt
from trainkit.options.prerequisites import Prerequisite, needs

WAVELETS = needs(  # the method that `MatchingOptions.loss` comes to
    "dist_match_method=wavelet or no dist_match_method and dist_match", "--dist_match_method wavelet")


class MatchingOptions(Concern):
    """Frequency-aware distribution matching: a loss for errors that all images of a batch have in common"""

    read_with: ClassVar[Prerequisite] = needs(
        "dist_match>0 or dist_match_gain>0", "--dist_match or --dist_match_gain above 0")

    dist_match: float = opt(
        0.0,
        "The strength of the sum form of distribution matching (Real-Fake, Yuan et al. 2024; their script uses "
        "0.003). Its effect grows with the batch size. With 0, it is off.", unit="lambda",
        card="Distribution matching, lambda", ge=0, off=0.0)
    dist_match_gain: float = opt(
        0.0,
        "The strength of the unbiased form of distribution matching. Its effect is the same at every batch size. "
        "With 0, it is off.", unit="gain", card="Distribution matching, gain", ge=0, off=0.0)
    dist_match_statistic: Literal["sum", "diagonal", "u"] | None = opt(
        None,
        "What is measured. sum: the squared sum of the errors of all images. diagonal: the part of this sum that "
        "each image has alone, as a control. u: the part that two images have in common (U statistic). Without this "
        "flag, it is sum with --dist_match and u with --dist_match_gain.", card="Matching, statistic")
    dist_match_method: Literal["dct", "wavelet", "fft"] | None = opt(
        None,
        "How low and high frequencies are separated. dct: by a cosine transform, at every size. wavelet: by "
        "wavelets. fft: by a disc of frequencies. Without this flag, it is wavelet with --dist_match and dct with "
        "--dist_match_gain.", card=always("Matching, method"))
    dist_match_wavelet: str = opt(
        "db3", "The name of the wavelet in PyWavelets, for the method wavelet.", unit="name", read_with=WAVELETS,
        min_length=1)
    dist_match_levels: int = opt(
        2, "How often the latent is halved (J). The low band is what is left at 1/2^J of its size.", unit="times",
        ge=1, le=8)
    dist_match_boundary: Literal["zero", "periodization"] = opt(
        "zero",
        "What a wavelet assumes outside the border. zero: zeros. periodization: the opposite side, if 2^J divides "
        "the sides.", read_with=WAVELETS)
    dist_match_backend: Literal["matrix", "pytorch_wavelets"] = opt(
        "matrix", "The code that computes wavelets. matrix: our own. pytorch_wavelets: the package of this name.")
    dist_match_weights: str = opt(
        "0.7,0.3",
        "The weights of the bands, separated by commas. Give two weights, for low and high, or J + 1 weights, from "
        "the lowest band up.", unit="weights", card="Matching, weights")
    dist_match_band_norm: Literal["grid", "dof", "whiten"] | None = opt(
        None,
        "What the error of a band is divided by. grid: the size of the latent. dof: the size of the band. whiten: "
        "the size of the band and its usual error at this noise level. Without this flag, it is whiten for the "
        "statistic u and grid otherwise.")
    dist_match_timestep_weight: Literal["x0", "eps", "whiten"] | None = opt(
        None,
        "How much an error counts at each noise level. x0: as it is in the image. eps: as it is in the noise. "
        "whiten: relative to the usual error at this level. Without this flag, it is x0. For --dist_match_mode reuse "
        "without whitened bands, it is eps.")
    dist_match_kernel: Literal["none", "class", "text", "latent"] = opt(
        "none",
        "Which images are compared. none: all of them, equally. class: those with the same caption. text: images "
        "with similar captions count more. latent: images with similar coarse noisy latents count more.",
        card="Matching, kernel")
    dist_match_mode: Literal["extra", "combo", "swap", "reuse"] | None = opt(
        None,
        "Which batch the term uses. extra: a second forward pass in each step, for the term alone. combo: a second "
        "forward pass, also for the ordinary loss. swap: some of the steps themselves, at one noise level. reuse: "
        "the ordinary batch. Without this flag, it is extra with --dist_match and combo with --dist_match_gain.",
        card=always("Matching, mode"))
    dist_match_min_snr: float = opt(
        0.1925,
        "The lowest signal-to-noise ratio at which the term is computed. 0.1925 is timestep 599 of Stable Diffusion.",
        unit="SNR", ge=0)
    dist_match_max_snr: float = opt(
        3.07,
        "The highest signal-to-noise ratio at which the term is computed. 3.07 is timestep 200 of Stable Diffusion.",
        unit="SNR", gt=0)
    dist_match_swap: float = opt(
        0.5, "The fraction of the steps whose batch has one noise level, for --dist_match_mode swap.", unit="0..1",
        read_with="dist_match_mode=swap", gt=0, lt=1)
    dist_match_bank: float = opt(
        0.0,
        "The decay of a running mean of past errors. It adds decay / (1 - decay) past batches to the present one. "
        "Use it only with hundreds of images, because the mean also holds the own errors of each image. With 0, it "
        "is off.", unit="0..1", card="Matching, bank", ge=0, lt=1, off=0.0)

    @field_validator("dist_match_weights")
    @classmethod
    def _weighs_bands(cls, value: str) -> str:
        try:
            weights = _numbers(value)
        except ValueError:
            raise ValueError("it should be numbers separated by commas") from None
        if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
            raise ValueError("no weight may be negative, and one must be above 0")
        return value

    @property
    def active(self) -> bool:
        """Whether there is such a term at all."""
        return self.gain > 0

    @property
    def gain(self) -> float:
        """The factor of the term: λ of the sum form, or the dimensionless gain of the unbiased one."""
        return self.dist_match or self.dist_match_gain

    @property
    def statistic(self) -> str:
        return self.dist_match_statistic or ("sum" if self.dist_match else "u")

    @property
    def mode(self) -> str:
        return self.dist_match_mode or ("extra" if self.dist_match else "combo")

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of freq_loss.DistributionMatchingLoss, defaults that depend on others filled in."""
        band_norm = self.dist_match_band_norm or ("whiten" if self.statistic == "u" else "grid")
        mixed = self.mode == "reuse" and band_norm != "whiten"  # whitening makes levels comparable
        return {
            "gain": self.gain, "statistic": self.statistic, "weights": _numbers(self.dist_match_weights),
            "method": self.dist_match_method or ("wavelet" if self.dist_match else "dct"),
            "wavelet": self.dist_match_wavelet, "levels": self.dist_match_levels, "boundary": self.dist_match_boundary,
            "backend": self.dist_match_backend, "kernel": self.dist_match_kernel, "bank": self.dist_match_bank,
            "band_norm": band_norm, "timestep_weight": self.dist_match_timestep_weight or ("eps" if mixed else "x0"),
            "window": (self.dist_match_min_snr, self.dist_match_max_snr),
        }

    def decisive(self) -> dict[str, object]:
        if not self.active:
            return {"distribution matching": "off"}
        unread = set() if self.loss["method"] == "wavelet" else {"wavelet", "boundary", "backend"}
        swap = self.dist_match_swap if self.mode == "swap" else None
        values = {name: value for name, value in self.loss.items() if name not in unread}
        return {"distribution matching": "on", "--dist_match_mode": self.mode, "--dist_match_swap": swap,
                **{f"--dist_match_{name}": value for name, value in values.items()}}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))
