"""Which concerns each trainer has, and the flags of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce

from trainkit.options.base import Concern, Flag
from trainkit.options.captioned import (
    CaptionedDataOptions,
    CaptionedOptimizerOptions,
    CaptionedPrecisionOptions,
    CaptionedRunOptions,
    CaptionedTextOptions,
    CaptionedValidationOptions,
)
from trainkit.options.captions import CaptionOptions
from trainkit.options.fourier import FourierOptions
from trainkit.options.guidance import GuidanceOptions
from trainkit.options.inputs import DataOptions, ModelOptions
from trainkit.options.lora import LoraOptions
from trainkit.options.matching import MatchingOptions
from trainkit.options.objective import ObjectiveOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.prior import PriorOptions
from trainkit.options.running import PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.text_encoders import PivotalOptions, TextOptions

CONCERNS: dict[str, type[Concern]] = {  # of the DreamBooth trainer
    "model": ModelOptions, "data": DataOptions, "captions": CaptionOptions, "prior": PriorOptions, "text": TextOptions,
    "pivotal": PivotalOptions, "lora": LoraOptions, "objective": ObjectiveOptions, "fourier_loss": FourierOptions,
    "optimizer": OptimizerOptions, "precision": PrecisionOptions, "validation": ValidationOptions, "run": RunOptions,
}
TEXT_TO_IMAGE: dict[str, type[Concern]] = {
    "model": ModelOptions, "data": CaptionedDataOptions, "captions": CaptionOptions, "text": CaptionedTextOptions,
    "guidance": GuidanceOptions, "lora": LoraOptions, "objective": ObjectiveOptions, "fourier_loss": FourierOptions,
    "matching": MatchingOptions,
    "optimizer": CaptionedOptimizerOptions, "precision": CaptionedPrecisionOptions,
    "validation": CaptionedValidationOptions, "run": CaptionedRunOptions,
}
TRAINERS = {"DreamBooth": CONCERNS, "text-to-image": TEXT_TO_IMAGE}
SCRIPTS = {"DreamBooth": "train_dreambooth_lora_sdxl_advanced.py", "text-to-image": "train_text_to_image_lora.py"}


def only_script_with(name: str) -> str | None:
    """The one trainer that has a flag of this name; None where each has it, or none."""
    having = [trainer for trainer, concerns in TRAINERS.items()
              if any(name in concern_class.model_fields for concern_class in concerns.values())]
    return SCRIPTS[having[0]] if len(having) == 1 else None


@cache
def known_flags() -> dict[str, Flag]:
    """Every flag of any trainer by name, in the order of docs/flags.md; one of several is the first trainer's."""
    found = {}
    for concern in reduce(merged, map(list, TRAINERS.values())):
        concern_classes = [concerns[concern] for concerns in TRAINERS.values() if concern in concerns]
        for name in reduce(merged, (list(concern_class.model_fields) for concern_class in concern_classes)):
            found[name] = next(concern_class.flag(name, concern) for concern_class in concern_classes
                               if name in concern_class.model_fields)
    return found


def merged(names: list[str], others: Sequence[str]) -> list[str]:
    """`names` with those of `others` that are missing, each behind its predecessor there."""
    found = list(names)
    for before, name in zip([None, *others], others, strict=False):
        if name not in found:
            found.insert(found.index(before) + 1 if before else 0, name)
    return found
