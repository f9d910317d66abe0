"""NVIDIA cards by their data sheets: memory, and how fast their tensor cores multiply in half precision.

TFLOPS are dense, with sums in fp32: NVIDIA's architecture whitepapers (Turing TU102, Ampere GA102, Ada, Blackwell RTX)
and data sheets (T4, V100, A10, A100, L4, L40S, H100). For GeForce cards since Ampere they are twice the shader's fp32
TFLOPS. The rows of the RTX 3090, 4080 and 4090 were looked up; the others are from memory of those papers. How much of
that a training reaches is assumed: SLOWEST is what one published run comes to (1.12 s a step of SDXL at 1024 px, batch
1, rank 32 on an RTX 3090 Ti, bmaltais/kohya_ss #827), FASTEST is usual for large models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainkit.errors import Problem, UserError
from trainkit.plan.need import GIB, OTHERS

SLOWEST, FASTEST = 0.16, 0.45  # of the data sheet's TFLOPS


@dataclass(frozen=True)
class Card:
    """A card, or only its memory where no more is known.

    free    bytes that a run may have
    tflops  None where the card is not in the table
    bf16    whether it computes in bf16, as NVIDIA's cards do since Ampere
    """

    name: str
    free: int
    tflops: float | None = None
    bf16: bool = True

    def seconds(self, flops: int) -> tuple[float, float] | None:
        """From the fastest to the slowest that so many operations may take."""
        if self.tflops is None:
            return None
        whole = flops / (self.tflops * 1e12)
        return whole / FASTEST, whole / SLOWEST


SHEETS: dict[str, tuple[int, float, bool]] = {  # GiB, TFLOPS, bf16
    "RTX 2060": (6, 25.8, False), "RTX 2070": (8, 29.9, False), "RTX 2080": (8, 40.3, False),
    "RTX 2080 Ti": (11, 53.8, False), "T4": (16, 65.0, False), "V100": (16, 125.0, False),
    "RTX 3060": (12, 25.4, True), "RTX 3060 Ti": (8, 32.4, True), "RTX 3070": (8, 40.6, True),
    "RTX 3080": (10, 59.5, True), "RTX 3090": (24, 71.0, True), "RTX 3090 Ti": (24, 80.0, True),
    "RTX 4060": (8, 30.2, True), "RTX 4060 Ti": (16, 44.1, True), "RTX 4070": (12, 58.3, True),
    "RTX 4070 Ti": (12, 80.2, True), "RTX 4080": (16, 97.5, True), "RTX 4090": (24, 165.2, True),
    "RTX 5070": (12, 61.7, True), "RTX 5070 Ti": (16, 87.9, True), "RTX 5080": (16, 112.6, True),
    "RTX 5090": (32, 209.5, True), "A10": (24, 125.0, True), "L4": (24, 121.0, True), "L40S": (48, 362.0, True),
    "A100": (40, 312.0, True), "H100": (80, 989.4, True),
}


def find(text: str) -> Card:
    """A card by its name ("rtx 3060", "3060") or by its memory ("8gb", "8"); the desktop keeps some of it.

    Raises UserError for what is neither.
    """
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", text.strip(), re.IGNORECASE)
    word = plain(text)
    named = {plain(name): name for name in SHEETS} | {plain(name).removeprefix("rtx"): name for name in SHEETS}
    if word in named:
        name = named[word]
        memory, tflops, bf16 = SHEETS[name]
        return Card(f"{name} ({memory} GB)", memory * GIB - OTHERS, tflops, bf16)
    if amount:
        return Card(f"a card with {float(amount[1]):g} GB", int(float(amount[1]) * GIB) - OTHERS)
    raise UserError(Problem(f"--plan knows no card {text!r}", f"--plan {text}",
                            "it takes gigabytes, or one of " + ", ".join(SHEETS), "--plan 8gb, for example"))


def plain(name: str) -> str:
    """A name as it is looked up: NVIDIA GeForce RTX 3060 -> rtx3060"""
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def installed(name: str, free: int) -> Card:
    """The card that CUDA calls so, with what is free on it; its speed where its name is in the table."""
    known = next((sheet for sheet in sorted(SHEETS, key=len, reverse=True) if plain(sheet) in plain(name)), None)
    _, tflops, bf16 = SHEETS[known] if known else (0, None, True)
    return Card(f"{name}, {free / GIB:.1f} GiB free", free, tflops, bf16)
