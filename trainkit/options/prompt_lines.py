"""A file of prompts, one a line, with kohya's options behind each: `a fox --n blurry --w 512 --d 1 --l 7 --s 20`.

Source: kohya-ss/sd-scripts, library/train_util.py (line_to_prompt_dict, load_prompts).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainkit.errors import Problem, refuse, unwritable
from trainkit.options.samplers import sampler_named
from trainkit.reading import read_text

SIDE_STEP = 8  # pixels: the stock pipelines take no other sides
SEEDS = range(-(2**63), 2**64)  # that torch.manual_seed takes
OPTION = re.compile(r"(?:^|\s)--(\S*)")
Quantity = TypeVar("Quantity", int, float)
MOST_NAMED = 10  # problems of a file that are told at once


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and what its line says of how to generate it; None where it says nothing.

    width, height  in pixels
    scheduler      a name of trainkit/options/samplers.py
    strength       of a second pass
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    scheduler: str | None = None
    strength: float | None = None


def side(text: str) -> int:
    return within(int(text), f"a multiple of {SIDE_STEP} pixels", lambda n: n >= SIDE_STEP and n % SIDE_STEP == 0)


def seed(text: str) -> int:
    return within(int(text), "a number of 64 bits", SEEDS.__contains__)


def steps(text: str) -> int:
    return within(int(text), "1 or more", lambda n: n >= 1)


def finite(text: str) -> float:
    return within(float(text), "finite", math.isfinite)


def part(text: str) -> float:
    return within(float(text), "above 0, and 1 at most", lambda x: 0 < x <= 1)


def within(number: Quantity, wanted: str, good: Callable[[Quantity], bool]) -> Quantity:
    if not good(number):
        raise ValueError(f"it must be {wanted}")
    return number


OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {  # kohya's letter -> the field, and its value from text
    "n": ("negative_prompt", str), "w": ("width", side), "h": ("height", side), "d": ("seed", seed),
    "l": ("guidance_scale", finite), "s": ("steps", steps), "ss": ("scheduler", sampler_named),
    "t": ("strength", part),
}
WHOLE = "whole number"
NUMBERS = {"guidance_scale": "number", "strength": "number"}
KNOWN = ", ".join(f"--{letter}" for letter in OPTIONS)


def read_prompt_lines(file: Path, flag: str) -> list[PromptLine]:
    """The lines of a file in UTF-8 (or UTF-16 with its mark), without empty lines and those that begin with #.

    flag  that named the file
    UserError: it cannot be read, has no prompt, or lines with unknown options; all lines are named in one message.
    """
    where = f"{flag} {file}"
    try:
        text = read_text(file, of_windows=True)
    except (OSError, ValueError) as error:
        refuse([Problem("the file of prompts cannot be read", where, getattr(error, "strerror", None) or f"{error}",
                        "give a text file in UTF-8, one prompt a line", "data")])
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not kept:
        refuse([Problem("the file has no prompts", where, "it is empty, or has only comments", "write one prompt a "
                        "line, such as: a red fox --n blurry --d 1", "data")])
    found = [(number, *parse_line(line)) for number, line in kept]
    faults = [(number, fault) for number, _, line_faults in found for fault in line_faults]
    if faults:
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        listed = "; ".join(f"line {number}: {fault}" for number, fault in faults[:MOST_NAMED])
        refuse([Problem("the file of prompts has options that cannot be used", where, f"{listed}{more}",
                        f"use {KNOWN}, each with its value", "data")])
    return [line for _, line, _ in found]


def parse_line(line: str) -> tuple[PromptLine, list[str]]:
    """-> what the line says, and what is wrong in it."""
    starts = [*OPTION.finditer(line)]
    ends = [start.start() for start in starts[1:]] + [len(line)]
    prompt = line[: starts[0].start()] if starts else line
    values: dict[str, object] = {}
    faults = [why] if (why := unwritable(line)) else []
    for start, end in zip(starts, ends, strict=False):
        try:
            name, value = value_of(start[1], line[start.end() : end].strip())
            if name in values:
                raise ValueError(f"--{start[1]} stands there twice")
            values[name] = value
        except ValueError as error:
            faults.append(f"{error}")
    return PromptLine(prompt.strip(), **values), faults  # type: ignore[arg-type]


def value_of(letter: str, text: str) -> tuple[str, object]:
    """The field that an option is for, and its value. Raises ValueError."""
    if letter.lower() not in OPTIONS:
        raise ValueError(f"--{letter} is not known")
    name, parse = OPTIONS[letter.lower()]
    if not text and name != "negative_prompt":
        raise ValueError(f"--{letter} has no value")
    try:
        return name, parse(text)
    except (ValueError, OverflowError) as error:
        said = f"{error}" if f"{error}".startswith(("it must", "there is")) else ""
        raise ValueError(f"--{letter} {text}: {said or f'it is no {NUMBERS.get(name, WHOLE)}'}") from error
