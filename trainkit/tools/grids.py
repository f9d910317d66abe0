"""Labelled grids of images: what changes from column to column, and from row to row."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainkit.errors import Problem, counted
from trainkit.inference import lora_file, missing_file
from trainkit.options.prompt_lines import SEEDS, PromptLine, finite, steps
from trainkit.options.samplers import SAMPLERS, sampler_named


@dataclass(frozen=True)
class Axis:
    """What changes along the columns or the rows of a grid: one of AXES, with its values; prompts have none here."""

    name: str
    values: tuple[object, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One image of a grid. None is what the flags say.

    step  of the run that the first LoRA is
    """

    line: PromptLine
    strength: float | None = None
    step: int | None = None
    seed: int | None = None
    scheduler: str | None = None


def whole(text: str) -> int:
    if not re.fullmatch("-?[0-9]+", text):
        raise ValueError(f"{text} is no whole number")
    return int(text)


AXES: dict[str, Callable[[str], object]] = {  # and how a value of each is read
    "strength": finite, "step": lambda text: steps(str(whole(text))), "seed": whole, "scheduler": sampler_named,
    "prompt": str,
}
PROMPTS = Axis("prompt")


def axis(text: str) -> Axis:
    """What a user writes behind --grid, such as strength=0,0.5,1 or prompt."""
    name, _, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if name not in AXES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(AXES)}")
    if bool(values) == (name == PROMPTS.name):
        raise argparse.ArgumentTypeError("give the prompts with --prompt, and only --grid prompt" if values else
                                         f"{name} has no values: --grid {name}=A,B,C")
    try:
        return Axis(name, tuple(dict.fromkeys(AXES[name](value) for value in values)))
    except ValueError as error:
        why = f"{listed} is no list of numbers" if "convert" in f"{error}" else error
        raise argparse.ArgumentTypeError(f"{name}: {why}") from error


def axes(args: argparse.Namespace) -> tuple[Axis, Axis]:
    """Of the columns and of the rows; with one axis, the rows are the prompts."""
    across, down = axes_asked(args)
    return across, down


def labelled(axis: Axis, lines: Sequence[PromptLine]) -> list[tuple[str, dict[str, object]]]:
    """Each value of an axis: what stands beside its images, and what it is of a `Cell`."""
    if axis.name == PROMPTS.name:
        return [(line.prompt or "(no prompt)", {"line": line}) for line in lines]
    return [(SAMPLERS[str(value)].label if axis.name == "scheduler" else
             f"{axis.name} {value:g}" if isinstance(value, float) else f"{axis.name} {value}", {axis.name: value})
            for value in axis.values]


def cells(args: argparse.Namespace) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """-> the labels of the columns, and for each row its label and its images."""
    across, down = (labelled(axis, args.lines) for axis in axes(args))
    first = Cell(args.lines[0])
    return [label for label, _ in across], [
        (label, [replace(first, **below, **beside) for _, beside in across])  # type: ignore[arg-type]
        for label, below in down]


def loras_of(args: argparse.Namespace, cell: Cell, named: Sequence[tuple[Path, float]]
             ) -> tuple[tuple[Path, float], ...]:
    """The LoRAs of an image: the strength is for those without one behind their name, and the step of the first."""
    changed = [(file, strength if cell.strength is None or has is not None else cell.strength)
               for (file, strength), has in zip(named, args.named_strength, strict=True)]
    if cell.step is not None:
        changed[0] = (lora_file(Path(f"{args.runs[0]}@{cell.step}")), changed[0][1])
    return tuple(changed)


def grid_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """What of the other flags does not go with the axes."""
    if not args.grid:
        return
    if len(args.grid) > 2 or len({axis.name for axis in axes_asked(args)}) < len(axes_asked(args)):
        yield Problem(f"--grid {' and '.join(axis.name for axis in args.grid)}", "--grid", "a grid has two different "
                      "axes: its columns and its rows", "give --grid once or twice, each with another name")
        return
    names = {axis.name for axis in axes_asked(args)}
    if "prompt" not in names and len(args.lines) > 1:
        yield Problem(f"{len(args.lines)} prompts in a grid of {' and '.join(sorted(names))}", "--grid",
                      "all images of this grid have one prompt", "give one prompt, or one axis: --grid prompt")
    seeds = {line.seed for line in args.lines if line.seed is not None} or set(args.seeds)
    if "seed" not in names and len(args.seeds) > 1:
        yield Problem(f"{counted(len(seeds), 'seed')} in a grid of {' and '.join(sorted(names))}", "--seeds",
                      "all images of this grid have one seed", "give one seed, or --grid seed=A,B,C")
    if "strength" in names and None not in args.named_strength:
        yield Problem("--grid strength without a LoRA whose strength is open", "--grid strength", "it is for LoRAs "
                      "that have no :X behind their name", "add --lora FILE, or leave :X out")
    if args.guidance_image:
        yield Problem("--guidance_image with --grid", "--grid", "a grid has no axis for images",
                      "leave one of both out")
    yield from value_problems(args)


def axes_asked(args: argparse.Namespace) -> list[Axis]:
    return [*args.grid, *([PROMPTS] if len(args.grid) == 1 else [])]


def value_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Seeds that are none, and steps that the run does not have."""
    values = {axis.name: axis.values for axis in args.grid}
    yield from (Problem(f"seed {seed}", "--grid seed", "it is no number of 64 bits", f"{SEEDS[0]} to {SEEDS[-1]}")
                for seed in values.get("seed", ()) if seed not in SEEDS)
    if "step" in values and (not args.runs or not args.runs[0].is_dir()):
        yield Problem("--grid step without the folder of a run", "--grid step", "it is for the steps of the first LoRA",
                      "--lora RUN, the folder of a run with checkpoints")
    elif "step" in values:
        files = [lora_file(Path(f"{args.runs[0]}@{step}")) for step in values["step"]]
        yield from (replace(missing_file("--grid step", file, "it is read first"), fix="leave this step out, or give "
                            "one that the run has") for file in files if not file.is_file())
