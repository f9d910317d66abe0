"""Which concerns each trainer has."""

from __future__ import annotations

from trainkit.options.base import Concern
from trainkit.options.captioned import (
    CaptionedDataOptions,
    CaptionedOptimizerOptions,
    CaptionedPrecisionOptions,
    CaptionedRunOptions,
    CaptionedTextOptions,
    CaptionedValidationOptions,
)
from trainkit.options.fourier import FourierOptions
from trainkit.options.guidance import GuidanceOptions
from trainkit.options.inputs import DataOptions, ModelOptions
from trainkit.options.lora import LoraOptions
from trainkit.options.matching import MatchingOptions
from trainkit.options.objective import ObjectiveOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.prior import PriorOptions
from trainkit.options.running import PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.words import PivotalOptions, TextOptions

CONCERNS: dict[str, type[Concern]] = {  # of the DreamBooth trainer
    "model": ModelOptions, "data": DataOptions, "prior": PriorOptions, "text": TextOptions, "pivotal": PivotalOptions,
    "lora": LoraOptions, "objective": ObjectiveOptions, "fourier_loss": FourierOptions,
    "optimizer": OptimizerOptions, "precision": PrecisionOptions, "validation": ValidationOptions, "run": RunOptions,
}
TEXT_TO_IMAGE: dict[str, type[Concern]] = {
    "model": ModelOptions, "data": CaptionedDataOptions, "text": CaptionedTextOptions, "guidance": GuidanceOptions,
    "lora": LoraOptions, "objective": ObjectiveOptions, "fourier_loss": FourierOptions, "matching": MatchingOptions,
    "optimizer": CaptionedOptimizerOptions, "precision": CaptionedPrecisionOptions,
    "validation": CaptionedValidationOptions, "run": CaptionedRunOptions,
}
TRAINERS = {"DreamBooth": CONCERNS, "text-to-image": TEXT_TO_IMAGE}
SCRIPTS = {"DreamBooth": "train_dreambooth_lora_sdxl_advanced.py", "text-to-image": "train_text_to_image_lora.py"}


def only_script_with(name: str) -> str | None:
    """The one trainer that has a flag of this name; None where each has it, or none."""
    having = [trainer for trainer, concerns in TRAINERS.items()
              if any(name in kind.model_fields for kind in concerns.values())]
    return SCRIPTS[having[0]] if len(having) == 1 else None
