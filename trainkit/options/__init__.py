"""Options: one frozen model a concern, from which the command line, config files and docs/flags.md are made.

Importing this package imports neither torch nor any model library, so that `--help` answers at once.
"""

from trainkit.options.base import REDACTED, Compat, Concern, Flag
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
from trainkit.options.inputs import DataOptions, ImageOptions, ModelOptions
from trainkit.options.lora import LoraOptions
from trainkit.options.matching import MatchingOptions
from trainkit.options.objective import ObjectiveOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.optionset import OptionSet, parse
from trainkit.options.prior import PriorOptions
from trainkit.options.running import PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.sources import PRESETS
from trainkit.options.text_encoders import PivotalOptions, TextOptions
from trainkit.options.trainers import CONCERNS, TEXT_TO_IMAGE, TRAINERS

__all__ = [
    "CONCERNS", "PRESETS", "REDACTED", "TEXT_TO_IMAGE", "TRAINERS", "CaptionOptions", "CaptionedDataOptions",
    "CaptionedOptimizerOptions", "CaptionedPrecisionOptions", "CaptionedRunOptions", "CaptionedTextOptions",
    "CaptionedValidationOptions", "Compat", "Concern",
    "DataOptions", "Flag", "FourierOptions", "GuidanceOptions", "LoraOptions", "MatchingOptions", "ModelOptions",
    "ObjectiveOptions", "OptimizerOptions", "OptionSet", "ImageOptions", "PivotalOptions", "PrecisionOptions",
    "PriorOptions", "RunOptions", "TextOptions", "ValidationOptions", "parse",
]
