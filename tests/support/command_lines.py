"""The options of both trainers, read from a command line without a trainer's module."""

from __future__ import annotations

from pydantic import create_model

from trainkit.options import (
    TEXT_TO_IMAGE,
    CaptionOptions,
    DataOptions,
    FourierOptions,
    LoraOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    OptionSet,
    PivotalOptions,
    PrecisionOptions,
    PriorOptions,
    RunOptions,
    TextOptions,
    ValidationOptions,
    parse,
)


class Options(OptionSet):
    model: ModelOptions
    data: DataOptions
    captions: CaptionOptions
    prior: PriorOptions
    text: TextOptions
    pivotal: PivotalOptions
    lora: LoraOptions
    objective: ObjectiveOptions
    fourier_loss: FourierOptions
    optimizer: OptimizerOptions
    precision: PrecisionOptions
    validation: ValidationOptions
    run: RunOptions


Captioned = create_model("Captioned", __base__=OptionSet, **{name: (kind, ...) for name, kind in TEXT_TO_IMAGE.items()})
REQUIRED = ["--pretrained_model_name_or_path=base", "--instance_prompt=a photo of TOK"]


def read(*argv: str) -> Options:
    return parse(Options, [*REQUIRED, *argv], description="")


def read_captioned(*argv: str) -> OptionSet:
    return parse(Captioned, ["--pretrained_model_name_or_path=base", "--train_data_dir=pics", *argv], description="")
