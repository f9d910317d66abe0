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
    """Frequency-aware distribution matching: what all images of a batch have wrong in common"""

    read_with: ClassVar[Prerequisite] = needs(
        "dist_match>0 or dist_match_gain>0", "--dist_match or --dist_match_gain above 0")

    dist_match: float = opt(
        0.0, "strength of the sum form (Real-Fake, Yuan et al. 2024, whose script has 0.003), which grows with the "
        "batch; 0: off", unit="lambda", card="Distribution matching, lambda", ge=0, off=0.0)
    dist_match_gain: float = opt(
        0.0, "strength of the unbiased form beside the ordinary loss, the same at every batch size; 0: off",
        unit="gain", card="Distribution matching, gain", ge=0, off=0.0)
    dist_match_statistic: Literal["sum", "diagonal", "u"] | None = opt(
        None, "what is measured: the squared sum of the errors, its part that each image has alone (a control), or "
        "its part that two images share (U statistic). Without it sum with --dist_match, u with --dist_match_gain",
        card="Matching, statistic")
    dist_match_method: Literal["dct", "wavelet", "fft"] | None = opt(
        None, "how coarse and fine are told apart: orthogonally at every size (dct), by wavelets, or by a disc of "
        "frequencies (fft). Without it wavelet with --dist_match, dct with --dist_match_gain",
        card=always("Matching, method"))
    dist_match_wavelet: str = opt("db3", "wavelet of the method wavelet, as PyWavelets names it", unit="name",
                                  read_with=WAVELETS, min_length=1)
    dist_match_levels: int = opt(
        2, "halvings (J): low is what is left of the latent at 1/2^J of its size", unit="levels", ge=1, le=8)
    dist_match_boundary: Literal["zero", "periodization"] = opt(
        "zero", "what a wavelet sees beyond the border: zeros, or the other side, where 2^J divides the sides",
        read_with=WAVELETS)
    dist_match_backend: Literal["matrix", "pytorch_wavelets"] = opt(
        "matrix", "what computes wavelets: our own matrices, or the package of this name")
    dist_match_weights: str = opt(
        "0.7,0.3", "weights of the bands, separated by commas: low and high, or J + 1 bands from the lowest",
        unit="weights", card="Matching, weights")
    dist_match_band_norm: Literal["grid", "dof", "whiten"] | None = opt(
        None, "what a band's error is divided by: the size of the latent, the band's own share of it, or this and the "
        "band's usual error at the noise level. Without it whiten for the statistic u, else grid")
    dist_match_timestep_weight: Literal["x0", "eps", "whiten"] | None = opt(
        None, "what an error counts at each noise level: as it is in the image, as it is in the noise, or in units "
        "of the usual error there. Without it x0, but eps for --dist_match_mode reuse without whitened bands")
    dist_match_kernel: Literal["none", "class", "text", "latent"] = opt(
        "none", "which images are compared: all alike, those with the same caption, or the more, the closer their "
        "captions (text) or their coarse noisy latents (latent) are", card="Matching, kernel")
    dist_match_mode: Literal["extra", "combo", "swap", "reuse"] | None = opt(
        None, "where the batch at one noise level comes from: a second forward pass a step for this term alone "
        "(extra) or for the ordinary loss too (combo), some of the steps themselves (swap), or the ordinary batch, at "
        "whatever levels are in the window (reuse). Without it extra with --dist_match, combo with --dist_match_gain",
        card=always("Matching, mode"))
    dist_match_min_snr: float = opt(
        0.1925, "lowest signal-to-noise ratio the term is computed at; 0.1925 is timestep 599 of Stable Diffusion's "
        "schedule", unit="SNR", ge=0)
    dist_match_max_snr: float = opt(
        3.07, "highest signal-to-noise ratio the term is computed at; 3.07 is timestep 200", unit="SNR", gt=0)
    dist_match_swap: float = opt(
        0.5, "share of the steps whose batch has one noise level, with --dist_match_mode swap", unit="0..1",
        read_with="dist_match_mode=swap", gt=0, lt=1)
    dist_match_bank: float = opt(
        0.0, "decay of a running mean of the errors of past batches, which counts as decay / (1 - decay) of them; for "
        "sets of hundreds of images, since it holds each image's own errors too; 0: none", unit="0..1",
        card="Matching, bank", ge=0, lt=1, off=0.0)

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
