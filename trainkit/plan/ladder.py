"""Which flags make a run fit a card: rungs that are added one after the other, each with what it costs.

A rung is a row of RUNGS. Another way to save memory is another row, as soon as there is a flag for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.options.base import Value
from trainkit.plan.cards import Card
from trainkit.plan.models import ModelConfigs
from trainkit.plan.need import Need
from trainkit.plan.phases import PlannedOptions, Trace, TracedOptions, largest, makes_class_images, trace, with_flags

Flags = Mapping[str, Value]
HELPS = 0.99  # of what was needed before: a rung that leaves more is left out


@dataclass(frozen=True)
class Rung:
    """A way to need less memory.

    flags   what it sets, for a run and a card; {} where the run has it already or it does not help there
    phases  of which it can change the peak
    cost    what is lost by it, besides time
    """

    flags: Callable[[TracedOptions, Card], Flags]
    phases: tuple[str, ...]
    cost: str


def half_precision(opt: TracedOptions, card: Card) -> Flags:
    if (opt.precision.mixed_precision or "no") != "no":
        return {}
    return {"mixed_precision": "bf16" if card.bf16 else "fp16"}


def cached_latents(opt: TracedOptions, card: Card) -> Flags:
    return {} if opt.data.cache_latents else {"cache_latents": True}


def checkpointing(opt: TracedOptions, card: Card) -> Flags:
    return {} if opt.precision.gradient_checkpointing else {"gradient_checkpointing": True}


def one_at_a_time(opt: TracedOptions, card: Card) -> Flags:
    """As many images in an optimizer step as before, one in a batch."""
    batch, batches = opt.run.train_batch_size, opt.run.gradient_accumulation_steps
    return {} if batch == 1 else {"train_batch_size": 1, "gradient_accumulation_steps": batch * batches}


def eight_bits(opt: TracedOptions, card: Card) -> Flags:
    return {} if opt.model.base_precision in ("int8", "fp8", "nf4") else {"base_precision": "int8"}


def no_previews(opt: TracedOptions, card: Card) -> Flags:
    return {"validation_prompt": None} if opt.validation.validation_prompt else {}


def fewer_class_images(opt: TracedOptions, card: Card) -> Flags:
    prior: Any = getattr(opt, "prior", None)
    return {"sample_batch_size": 1} if makes_class_images(opt) and prior.sample_batch_size > 1 else {}


def smaller(side: int) -> Callable[[TracedOptions, Card], Flags]:
    def flags(opt: TracedOptions, card: Card) -> Flags:
        several: Flags = {"resolutions": None} if opt.data.resolutions else {}
        change: Flags = {"resolution": side, **several}
        before, after = (math.prod(largest(data)) for data in (opt.data, opt.data.model_copy(update=change)))
        return change if after < before else {}  # a source may have a size of its own, which no flag changes

    return flags


EVERY = ("class images", "caching", "training", "previews", "publishing")
RUNGS = (
    Rung(half_precision, ("training", "previews", "publishing"), "the base model is rounded to half precision"),
    Rung(cached_latents, ("caching", "training", "previews", "publishing"),
         "an image is seen in --cached_crops crops only"),
    Rung(checkpointing, ("training",), "the same gradients"),
    Rung(one_at_a_time, ("training",), "the same gradients, except for rounding; slower"),
    Rung(eight_bits, ("training", "previews", "publishing"), "the base model is rounded to 8 bits"),
    Rung(no_previews, ("previews",), "no images during the run"),
    Rung(fewer_class_images, ("class images",), "class images are generated one by one"),
    Rung(smaller(768), EVERY, "less detail is learned"),
    Rung(smaller(512), EVERY, "less detail is learned"),
)


@dataclass(frozen=True)
class Step:
    """The run with every rung so far.

    flags  of the last rung; {} for the run as it was asked for
    """

    flags: Flags
    cost: str
    trace: Trace

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.trace.phases, key=lambda phase: phase.peak.total).name

    def of(self, phase: str) -> int:
        """Bytes at the peak of a phase; 0 where the run has none of the name."""
        return next((there.peak.total for there in self.trace.phases if there.name == phase), 0)

    @property
    def need(self) -> Need:
        return Need(self.of(self.worst))


def climb(opt: PlannedOptions, configs: ModelConfigs, card: Card, asked: Trace | None = None) -> Iterator[Step]:
    """The run as it was asked for, then with one rung more at a time, until it fits or no rung is left.

    asked  the trace of the run as it was asked for, where it is there already
    """
    step, left = Step({}, "", asked or trace(opt, configs)), list(RUNGS)
    yield step
    while left and not step.need.fits(card.free):
        rung = next((rung for rung in left if step.worst in rung.phases and rung.flags(opt, card)), None)
        if rung is None:
            return
        left.remove(rung)
        flags = rung.flags(opt, card)
        changed = with_flags(opt, flags)
        same = {phase.name: phase.peak for phase in step.trace.phases if phase.name not in rung.phases}
        lower = Step(flags, rung.cost, trace(changed, configs, known=same))
        if lower.of(step.worst) <= HELPS * step.of(step.worst):
            opt, step = changed, lower
            yield step
