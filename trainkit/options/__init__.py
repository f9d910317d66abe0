"""Options: one frozen model a concern, from which the command line, config files and docs/flags.md are made.

Importing this room imports neither torch nor any model library, so that `--help` answers at once.
"""

from trainkit.options.base import REDACTED, Concern, Flag
from trainkit.options.inputs import DataOptions, ModelOptions
from trainkit.options.lora import LoraOptions
from trainkit.options.objective import ObjectiveOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.optionset import OptionSet, parse
from trainkit.options.prior import PriorOptions
from trainkit.options.running import PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.sources import PRESETS
from trainkit.options.words import PivotalOptions, TextOptions

CONCERNS: dict[str, type[Concern]] = {
    "model": ModelOptions, "data": DataOptions, "prior": PriorOptions, "text": TextOptions, "pivotal": PivotalOptions,
    "lora": LoraOptions, "objective": ObjectiveOptions, "optimizer": OptimizerOptions, "precision": PrecisionOptions,
    "validation": ValidationOptions, "run": RunOptions,
}

__all__ = [
    "CONCERNS", "PRESETS", "REDACTED", "Concern", "DataOptions", "Flag", "LoraOptions", "ModelOptions",
    "ObjectiveOptions", "OptimizerOptions", "OptionSet", "PivotalOptions", "PrecisionOptions", "PriorOptions",
    "RunOptions", "TextOptions", "ValidationOptions", "parse",
]
