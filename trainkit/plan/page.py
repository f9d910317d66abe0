"""The plan in words: what each phase needs, what is outside of the card, how long, and the ladder. 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from functools import reduce

from trainkit.options.base import Value
from trainkit.options.cli import shown
from trainkit.plan.cards import FASTEST, SLOWEST, Card
from trainkit.plan.ladder import Flags, Step
from trainkit.plan.live_bytes import KINDS
from trainkit.plan.models import ModelConfigs
from trainkit.plan.need import CUDA, GAPS, GIB, Need
from trainkit.plan.phases import Trace, TracedOptions, largest

COMPUTED = "Computed from the model's configs. Nothing of it was measured on a card."
PYTHON = 2.5  # GiB of host memory that Python, PyTorch with CUDA and the other libraries take: assumed
FIRST, NUMBER, WIDTH = 13, 9, 78  # columns of the table, and of lines
FITS, TOO_MUCH = "✓", "✗"


def gib(number: int) -> str:
    return f"{number / GIB:.1f}" if number >= 0.05 * GIB else "–" if not number else "<0.1"


def size(number: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} bytes"


def flag(name: str, value: Value) -> str:
    """As it is typed: --cache_latents, --no_cache_latents, --rank=8, --validation_prompt=none"""
    if isinstance(value, bool):
        return f"--{'' if value else 'no_'}{name}"
    return f"--{name}={shown(value)}"


def typed(flags: Flags) -> str:
    return " ".join(flag(name, value) for name, value in flags.items())


def page(opt: TracedOptions, configs: ModelConfigs, asked: Trace, card: Card | None, steps: Sequence[Step]
         ) -> Iterator[str]:
    """The lines of the whole plan.

    steps  of the ladder for the card; none without a card
    """
    yield from heading(opt, configs)
    yield from table(asked)
    yield ""
    yield from around(opt, asked)
    if card is not None:
        yield ""
        yield from ladder(card, steps)


def heading(opt: TracedOptions, configs: ModelConfigs) -> Iterator[str]:
    o = opt.run
    several = f" x {o.gradient_accumulation_steps}" if o.gradient_accumulation_steps > 1 else ""
    precision = {"no": "fp32", None: "fp32"}.get(opt.precision.mixed_precision, opt.precision.mixed_precision)
    yield f"Memory plan of {configs.name}"
    size = " x ".join(map(str, dict.fromkeys(largest(opt.data))))
    yield (f"{size} px, batch {o.train_batch_size}{several}, {opt.lora.lora_type} of rank "
           f"{opt.lora.rank}, {opt.optimizer.algorithm}, {precision}")
    yield COMPUTED
    yield ""


def table(asked: Trace) -> Iterator[str]:
    """A row for each phase: bytes at its peak by kind, their sum, and what a card must have free for it. GiB."""
    names = [*KINDS, "peak", "need"]
    yield "GiB".ljust(FIRST) + " ".join(name.rjust(NUMBER - 1) for name in names)
    for phase in asked.phases:
        peak = phase.peak
        numbers = [*(peak.kinds.get(kind, 0) for kind in KINDS), peak.total, Need(peak.total).bytes]
        yield phase.name.ljust(FIRST) + " ".join(gib(number).rjust(NUMBER - 1) for number in numbers)
    yield f"need = {1 + GAPS:g} x peak + {CUDA / GIB:.1f} GiB for CUDA itself (assumed, 0.3 GiB more or less)"


def around(opt: TracedOptions, asked: Trace) -> Iterator[str]:
    """Host memory, disk, operations."""
    crops = opt.data.cached_crops if opt.data.cache_latents and not opt.data.center_crop else 1
    host = asked.loaded + asked.state_on_host
    parts = f"{host / GIB:.1f} of weights, {PYTHON:g} for Python (assumed)"
    yield f"Host memory  about {host / GIB + PYTHON:.0f} GiB: {parts}"
    if opt.data.cache_latents:
        where = "on disk" if opt.data.latent_cache_dir else "of host memory"
        yield f"Cache        {size(crops * asked.latent)} {where} for each image, {size(asked.prompt)} for each caption"
    checkpoint, beside = asked.checkpoint + 4 * asked.adapters, 2 * asked.adapters
    yield f"Disk         {size(checkpoint)} for each checkpoint, and {size(beside)} for the LoRA beside it"
    yield f"Work         {asked.flops / 1e12:.1f} TFLOP for each optimizer step"


def ladder(card: Card, steps: Sequence[Step]) -> Iterator[str]:
    """A line for each step, its cost below it, and what to type."""
    yield f"On {card.name}, of which {card.free / GIB:.1f} GiB are for the run, the largest phase needs:"
    rungs: Flags = {}
    before = None
    for step in steps:
        mark = FITS if step.need.fits(card.free) else TOO_MUCH
        name = "as asked" if not step.flags else f"+ {typed(step.flags)}"
        yield f" {name:<54} {step.need.bytes / GIB:>5.1f} GiB {mark} {step.worst}"
        if step.flags:
            yield f"     costs: {step.cost}{slower(before, step)}"
        rungs, before = {**rungs, **step.flags}, step
    yield ""
    yield from conclusion(card, steps, rungs)


def slower(before: Step | None, step: Step) -> str:
    """How many more operations a step has."""
    if before is None:
        return ""
    more = step.trace.flops / before.trace.flops - 1
    return f"; {more:.0%} more work a step" if more > 0.02 else ""


def conclusion(card: Card, steps: Sequence[Step], rungs: Flags) -> Iterator[str]:
    last = steps[-1]
    if not last.need.fits(card.free):
        yield f"It does not fit: {last.worst} needs {last.need.bytes / GIB:.1f} GiB with every flag above."
        return
    yield "It fits as it is." if not rungs else "It fits with these flags:"
    yield from (f"  {line}" for line in command_lines(rungs))
    if last.need.is_tight(card.free):
        yield "It is tight: what CUDA itself takes is assumed, and may be 0.3 GiB more."
    seconds = card.seconds(last.trace.flops)
    if seconds is not None:
        fast, slow = seconds
        yield f"An optimizer step takes about {fast:.2g} to {slow:.2g} s, if the card reaches"
        yield f"{FASTEST:.0%} to {SLOWEST:.0%} of its {card.tflops:g} TFLOPS (assumed)."


def command_lines(flags: Flags) -> list[str]:
    """The flags as a command goes on with them, in lines that end in a backslash."""
    words = [flag(name, value) for name, value in flags.items()]
    return " \\\n".join(
        textwrap.wrap(" ".join(words), WIDTH - 4, break_on_hyphens=False)).split("\n") if words else []


def all_flags(steps: Sequence[Step]) -> Flags:
    """Of every rung."""
    return reduce(lambda found, step: {**found, **step.flags}, steps, {})
