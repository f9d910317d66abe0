"""The concern of the Fourier loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from trainkit.options.base import Concern, opt
from trainkit.options.prerequisites import Prerequisite, needs

OF_TRAINER = ("fourier_config", "fourier_base_loss", "fourier_target_share")  # the others are freq_loss.FourierLoss's
MOVING = ("adaptive", "unified", "unified_basic", "unified_balanced", "unified_detail", "unified_adaptive")
_UNIFIED = "|".join(mode for mode in MOVING if mode != "adaptive")
UNIFIED = needs(f"fourier_mode={_UNIFIED}", "a unified --fourier_mode")


def _or_unified(mode: str) -> Prerequisite:
    """What a flag of this mode and of the unified ones is read with."""
    return needs(f"fourier_mode={mode}|{_UNIFIED}", f"--fourier_mode {mode} or a unified one")



class FourierOptions(Concern):
    """Fourier loss: how the spectra of output and target differ, with --loss_type fourier"""

    prefix: ClassVar[str] = "fourier_"
    read_with: ClassVar[str] = "loss_type=fourier"

    fourier_config: Literal[
        "conservative", "balanced", "aggressive", "super_resolution", "fine_detail", "unified_basic",
        "unified_balanced", "unified_detail", "unified_adaptive", "unified_custom"] | None = opt(
        None, "a preset of the flags below, which count for more where they are given (docs/fourier.md)",
        resume="in the data", card="Fourier preset")
    fourier_base_loss: Literal["l2", "l1", "huber", "smooth_l1"] = opt("l2", "the error it is added to")
    fourier_weight: float = opt(
        0.05, "strength of the term beside that error", unit="weight", card="Fourier weight", ge=0)
    fourier_mode: Literal[
        "basic", "weighted", "multiscale", "adaptive", "unified", "unified_basic", "unified_balanced",
        "unified_detail", "unified_adaptive"] = opt(
        "weighted", "what is compared: spectra as they are, high frequencies counting more, several resolutions, high "
        "frequencies counting more at first, or all of these", card="Fourier mode")
    fourier_norm: Literal["l2", "l1"] = opt("l2", "squared or absolute difference of the spectra")
    fourier_high_freq_weight: float | None = opt(
        None, "the more, the more high frequencies count against low ones; clipped to 1 to 3; without it as the mode "
        "has it, 2 in weighted", unit="factor", read_with=_or_unified("weighted"), gt=0)
    fourier_scales: str | None = opt(
        None, "resolutions that are compared, as divisors: 1,2,4; without it as the mode has them", unit="divisors",
        read_with=_or_unified("multiscale"), min_length=1)
    fourier_scale_weights: str | None = opt(
        None, "what each resolution counts; without it 1/scale, in unified modes 1/sqrt(scale)", unit="weights",
        read_with=_or_unified("multiscale"), min_length=1)
    fourier_scale_high_freq_weights: str | None = opt(
        None, "--fourier_high_freq_weight of each resolution, in unified modes", unit="factors",
        read_with=UNIFIED, min_length=1)
    fourier_adaptive_max_weight: float | None = opt(
        None, "high-frequency weight, in unified modes its factor, at the first step; without it as the mode has it",
        unit="factor", read_with=_or_unified("adaptive"), gt=0)
    fourier_adaptive_min_weight: float | None = opt(
        None, "the same at the last step", unit="factor", read_with=_or_unified("adaptive"), gt=0)
    fourier_adaptive_mode: Literal["linear", "cosine", "exponential"] | None = opt(
        None, "its course between the two; without it as the mode has it, linear in most",
        read_with=_or_unified("adaptive"))
    fourier_mix: str | None = opt(
        None, "what several resolutions and the full one count in unified modes: 0.6,0.4", unit="two_weights",
        read_with=UNIFIED, min_length=1)
    fourier_adaptive_scaling: bool | None = opt(
        None, "let that move over the run, from several resolutions towards the full one; without it on",
        read_with=UNIFIED)
    fourier_warmup_steps: int = opt(300, "optimizer steps before the term counts", unit="steps", ge=0, off=0)
    fourier_ramp_steps: int = opt(0, "steps after those in which its weight rises from 0", unit="steps", ge=0, off=0)
    fourier_eps: float = opt(1e-8, "keeps the slope of a magnitude finite at 0", unit="number", gt=0)
    fourier_metric: Literal["magnitude", "complex"] = opt(
        "magnitude", "what of a frequency is compared: its magnitude, which no shift and no sign changes, or all of it",
        card="Fourier metric")
    fourier_space: Literal["prediction", "x0"] = opt(
        "prediction", "whose spectra: those of the network's output, or of the image that it implies",
        card="Fourier space")
    fourier_normalize: Literal["target", "none", "separate"] | None = opt(
        None, "divide by the spread of the target, by nothing, or each spectrum by its own; without it target for "
        "magnitude and none for complex")
    fourier_balance: Literal["cap", "none"] = opt(
        "cap", "lower the weight, to a tenth at most, where the term is more than 10 times the error it is added to")
    fourier_timestep_gate: Literal["none", "snr", "linear", "wiener"] = opt(
        "none", "at which noise levels it counts: all, above --fourier_gate_min_snr, rising from there to "
        "--fourier_gate_max_snr, or frequency by frequency where the image outweighs the noise")
    fourier_gate_min_snr: float = opt(0.1, "signal-to-noise ratio below which snr and linear leave it out", unit="SNR",
                                      read_with="fourier_timestep_gate=snr|linear", gt=0)
    fourier_gate_max_snr: float = opt(10.0, "signal-to-noise ratio from which it fully counts in linear", unit="SNR",
                                      read_with="fourier_timestep_gate=linear", gt=0)
    fourier_bands: str | None = opt(
        None, "weights of ranges of frequency, where 1 is the highest there is: low:0.5,high:2 (thirds) or 0.25-0.5:3",
        unit="range:weight")
    fourier_target_share: float | None = opt(
        None, "hold the term at this share of error and term together, 0.05 to 0.2 are usual; the weight is then "
        "where it starts", unit="share", gt=0, le=0.9, off=None)

    @field_validator("fourier_scales", "fourier_scale_weights", "fourier_scale_high_freq_weights", "fourier_mix",
                     "fourier_bands", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A config file may have numbers and lists: 2, [1, 2.0, 4], ["low:0.5", "high:2"]."""
        if isinstance(value, list):
            return ",".join(map(_written, value))
        return _written(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @classmethod
    def shorthand(cls, value_of: Callable[[str], object]) -> tuple[str, Mapping[str, object]] | None:
        name = str(value_of("fourier_config")).lower()
        if name not in cls.choices("fourier_config"):
            return None
        from trainkit.frequency import get_fourier_loss_config

        return f"fourier_config {name}", get_fourier_loss_config(name)

    def decisive(self) -> dict[str, object]:
        """What the settings come to: a preset and its values written out are one run."""
        from trainkit.frequency import FourierLoss

        settings = {f"--{name}": value for name, value in FourierLoss(**self.loss).config().items()}
        return settings | {"--fourier_base_loss": self.fourier_base_loss,
                           "--fourier_target_share": self.fourier_target_share}

    @property
    def moves(self) -> bool:
        """Whether a step's loss depends on how long the run is."""
        return self.fourier_mode in MOVING

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of freq_loss.FourierLoss."""
        found = {name.removeprefix(self.prefix): value for name, value in self if name not in OF_TRAINER}
        return found | {"bands": self.fourier_bands or ""}


def _written(value: object) -> str:
    """As on the command line: 2.0 -> "2"."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
