r"""Weights in prompts as WebUIs write them: `(word:1.3)`, `(word)`, `[word]`, and `\(` for a bracket in the text.

    (word:1.3)   1.3 times the weight          (word)  1.1 times
    [word]       the weight divided by 1.1     ((word))  1.1 · 1.1 times: what is inside of each other is multiplied

As in WebUIs, a bracket that is not closed counts up to the end of the prompt, and one that closes nothing is text.
Syntax: AUTOMATIC1111/stable-diffusion-webui, wiki page "Features", "Attention/emphasis".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainkit.errors import Problem

FACTORS = {"(": 1.1, "[": 1 / 1.1}  # of a pair of brackets
PARTS = re.compile(r"\\([()\[\]\\])|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|([()\[\]])")
EDITED = re.compile(r"(?<!\\)\[[^\[\]()]*[:|][^\[\]()]*\]")  # [from:to:0.5] and [one|other]
TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
OFF = "--no_prompt_weights"


@dataclass(frozen=True)
class WeightedText:
    """A prompt in pieces, each with its weight; neighbours have different weights."""

    pieces: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        """The whole prompt without brackets."""
        if len(self.pieces) == 1:
            return self.pieces[0][0]
        return " ".join(stripped for piece, _ in self.pieces if (stripped := piece.strip()))

    @property
    def is_weighted(self) -> bool:
        """Whether a weight is not 1."""
        return any(weight != 1 and piece.strip() for piece, weight in self.pieces)

    def changed(self, change: Callable[[str], str]) -> WeightedText:
        """The same weights for what `change` makes of each piece."""
        return WeightedText(tuple((change(piece), weight) for piece, weight in self.pieces))


def unweighted(prompt: str) -> WeightedText:
    """The prompt as it is written, brackets and all."""
    return WeightedText(((prompt, 1.0),))


def read_weights(prompt: str) -> WeightedText:
    """A prompt as WebUIs read it. A prompt without brackets and backslashes is one piece, as it is written."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many pieces are before each bracket that is open

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    end = 0
    for part in PARTS.finditer(prompt):
        pieces.append((prompt[end : part.start()], 1.0))
        end = part.end()
        escaped, number, bracket = part.groups()
        opening = "[" if bracket == "]" else "("
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif escaped or not opened[opening]:
            pieces.append((escaped or part[0], 1.0))
        else:
            close(opening, float(number) if number else FACTORS[opening])
    pieces.append((prompt[end:], 1.0))
    for opening, starts in opened.items():
        for _ in [*starts]:
            close(opening, FACTORS[opening])
    return WeightedText(tuple(_joined(pieces)) or (("", 1.0),))


def _joined(pieces: Sequence[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Neighbours of one weight together, without empty pieces; blanks take the weight of what is before them."""
    text, now = "", 1.0
    for piece, weight in pieces:
        weight = round(weight, 6)
        if not piece or (weight != now and text and not piece.strip()):
            text += piece
            continue
        if weight != now and text:
            yield text, now
            text = ""
        text, now = text + piece, weight
    if text:
        yield text, now


def escaped(prompt: str) -> str:
    """A prompt in the syntax of WebUIs that is read as this text, without weights."""
    return re.sub(r"([()\[\]\\])", r"\\\1", prompt)


def weight_problems(prompt: str, where: str) -> Iterator[Problem]:
    """What of the syntax of WebUIs a prompt has that is not read here, and weights that are none.

    where  the flag that gave the prompt
    """
    plain = f"write \\[ and \\( for brackets in the text, or read no weights at all: {OFF}"
    if tag := TAG.search(prompt):
        yield Problem(f"{tag[0]} in a prompt", where, "LoRAs are not named in prompts here",
                      "--lora FILE:0.8 for each LoRA, and take it out of the prompt")
    elif edited := EDITED.search(prompt):
        yield Problem(f"{edited[0]} in a prompt", where, "a prompt cannot change between steps here", plain)
    elif bad := next((weight for _, weight in read_weights(prompt).pieces if not 0 <= weight < math.inf), None):
        yield Problem(f"a part of a prompt has the weight {bad:g}", where, "weights are 0 or more",
                      "write what shall not be there into the negative prompt")
