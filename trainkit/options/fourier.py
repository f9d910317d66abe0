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
    """Fourier loss: compares the spectra of output and target, with --loss_type fourier"""

    prefix: ClassVar[str] = "fourier_"
    read_with: ClassVar[str] = "loss_type=fourier"

    fourier_config: Literal[
        "conservative", "balanced", "aggressive", "super_resolution", "fine_detail", "unified_basic",
        "unified_balanced", "unified_detail", "unified_adaptive", "unified_custom"] | None = opt(
        None,
        "A preset for the flags of this group. A flag that you give yourself is stronger than the preset "
        "(docs/fourier.md).", resume="in the data", card="Fourier preset")
    fourier_base_loss: Literal["l2", "l1", "huber", "smooth_l1"] = opt(
        "l2", "The ordinary error, to which the Fourier term is added.")
    fourier_weight: float = opt(
        0.05, "The weight of the Fourier term. The ordinary error has weight 1.", unit="weight", card="Fourier weight",
        ge=0)
    fourier_mode: Literal[
        "basic", "weighted", "multiscale", "adaptive", "unified", "unified_basic", "unified_balanced",
        "unified_detail", "unified_adaptive"] = opt(
        "weighted",
        "What the term compares. basic: the spectra as they are. weighted: high frequencies count more. multiscale: "
        "several resolutions. adaptive: high frequencies count more at first. The modes whose names begin with "
        "unified combine these.", card="Fourier mode")
    fourier_norm: Literal["l2", "l1"] = opt(
        "l2", "Whether the difference of the spectra is squared (l2) or absolute (l1).")
    fourier_high_freq_weight: float | None = opt(
        None,
        "The weight of high frequencies, from 1 to 3. Values outside are cut to this range. Without this flag, the "
        "mode decides. In the mode weighted, it is 2.", unit="factor", read_with=_or_unified("weighted"), gt=0)
    fourier_scales: str | None = opt(
        None,
        "The resolutions that are compared, as divisors of the full one: 1,2,4. Without this flag, the mode decides.",
        unit="divisors", read_with=_or_unified("multiscale"), min_length=1)
    fourier_scale_weights: str | None = opt(
        None, "The weight of each resolution. Without this flag, it is 1/scale, and 1/sqrt(scale) in unified modes.",
        unit="weights", read_with=_or_unified("multiscale"), min_length=1)
    fourier_scale_high_freq_weights: str | None = opt(
        None, "The weight of high frequencies at each resolution, in unified modes.", unit="factors", read_with=UNIFIED,
        min_length=1)
    fourier_adaptive_max_weight: float | None = opt(
        None,
        "The weight of high frequencies at the first step. In unified modes, it is a factor on this weight. Without "
        "this flag, the mode decides.", unit="factor", read_with=_or_unified("adaptive"), gt=0)
    fourier_adaptive_min_weight: float | None = opt(
        None, "The same at the last step.", unit="factor", read_with=_or_unified("adaptive"), gt=0)
    fourier_adaptive_mode: Literal["linear", "cosine", "exponential"] | None = opt(
        None,
        "The curve from the first of these values to the second. Without this flag, the mode decides. It is linear "
        "in most modes.", read_with=_or_unified("adaptive"))
    fourier_mix: str | None = opt(
        None,
        "Two weights for the unified modes, for example 0.6,0.4. The first is for all resolutions together, the "
        "second for the full resolution alone.", unit="two_weights", read_with=UNIFIED, min_length=1)
    fourier_adaptive_scaling: bool | None = opt(
        None,
        "Let these two weights change over the run, from all resolutions towards the full one. Without this flag, it "
        "is on.", read_with=UNIFIED)
    fourier_warmup_steps: int = opt(
        300, "The number of optimizer steps at the start in which the term is not used.", unit="steps", ge=0, off=0)
    fourier_ramp_steps: int = opt(
        0, "The number of steps after those in which the weight of the term rises from 0.", unit="steps", ge=0, off=0)
    fourier_eps: float = opt(
        1e-8, "A small number that keeps the gradient of a magnitude finite at 0.", unit="number", gt=0)
    fourier_metric: Literal["magnitude", "complex"] = opt(
        "magnitude",
        "What is compared at each frequency. magnitude: only how strong the frequency is, which does not change when "
        "an image is shifted. complex: strength and phase.", card="Fourier metric")
    fourier_space: Literal["prediction", "x0"] = opt(
        "prediction",
        "Which spectra are compared. prediction: those of the network's output and its target. x0: those of the "
        "image that the output implies and the training image.", card="Fourier space")
    fourier_normalize: Literal["target", "none", "separate"] | None = opt(
        None,
        "What the compared values are divided by. target: the standard deviation of the target. separate: each by "
        "its own. none: nothing. Without this flag, it is target for magnitude and none for complex.")
    fourier_balance: Literal["cap", "none"] = opt(
        "cap",
        "With cap, the weight falls where the term is more than 10 times the ordinary error. It falls to a tenth at "
        "most. With none, the weight stays.")
    fourier_timestep_gate: Literal["none", "snr", "linear", "wiener"] = opt(
        "none",
        "The noise levels at which the term counts. none: all. snr: those above --fourier_gate_min_snr. linear: the "
        "weight rises from there to --fourier_gate_max_snr. wiener: each frequency counts where the image is "
        "stronger in it than the noise.")
    fourier_gate_min_snr: float = opt(
        0.1, "The signal-to-noise ratio below which the gates snr and linear switch the term off.", unit="SNR",
        read_with="fourier_timestep_gate=snr|linear", gt=0)
    fourier_gate_max_snr: float = opt(
        10.0, "The signal-to-noise ratio from which the gate linear has the full weight.", unit="SNR",
        read_with="fourier_timestep_gate=linear", gt=0)
    fourier_bands: str | None = opt(
        None,
        "Weights for ranges of frequency. 0.25-0.5:3 gives the weight 3 to this range, where 1 is the highest "
        "frequency. low:0.5,high:2 uses thirds of the whole range.", unit="range:weight")
    fourier_target_share: float | None = opt(
        None,
        "Keep the term at this fraction of the ordinary error and the term together. Usual values are 0.05 to 0.2. "
        "--fourier_weight is then only the starting value.", unit="fraction", gt=0, le=0.9, off=None)

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
