"""What a user is told of the plan: all of it with --plan, a line at the start of a run, what helps after it failed."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from trainkit.errors import EXIT_CODES
from trainkit.plan import cards, page
from trainkit.plan.cards import Card
from trainkit.plan.ladder import Step, climb
from trainkit.plan.models import ModelConfigs, read_configs
from trainkit.plan.need import GIB, Need
from trainkit.plan.phases import PlannedOptions, TracedOptions, has_class_images, largest, learns_text, trace
from trainkit.process import say

log = logging.getLogger(__name__)

# More than SD 1.x and SDXL come to with adapters on attention; it only decides whether a plan is made at all.
MOST_WEIGHTS = 5 * GIB  # of the UNet in half precision, at their widths
MOST_GRAPH = 8 * GIB  # for each megapixel in a batch, in half precision
NARROWEST, WIDEST = 320, 1280  # channels of their UNets
CHECKPOINTED = 1 / 6  # of the graph with gradient checkpointing
UNUSUAL = 3  # times as much with other layers, high ranks, text encoders in training


class StartingRun(Protocol):
    """What of a run this reads and sets."""

    device: torch.device
    saves_memory: Callable[[], str]


def show(opt: PlannedOptions, asked: str) -> int:
    """Print the plan -> the exit code: that of memory where nothing fits the card.

    asked  a card as `cards.find` reads it; "" is the one in this machine, if there is one
    Raises UserError: there is no such model or card.
    """
    card, configs = cards.find(asked) if asked else here(), read_configs(opt.model)
    say("computing the memory of each phase from shapes")
    steps = [*climb(opt, configs, card)] if card else []
    first = steps[0].trace if steps else trace(opt, configs)
    sys.stdout.write("\n".join(page.page(opt, configs, first, card, steps)) + "\n")
    return 0 if card is None or steps[-1].need.fits(card.free) else EXIT_CODES["memory"]


def here(device: torch.device | None = None) -> Card | None:
    """The card, by default the first of this machine, with what is free on it now."""
    if not torch.cuda.is_available():
        return None
    return cards.installed(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0])


def at_start(opt: PlannedOptions, run: StartingRun) -> None:
    """On a card, say whether the run fits; make a plan only where memory may be short."""
    card = here(run.device) if run.device.type == "cuda" else None
    if card is None:
        return
    run.saves_memory = partial(what_helps, opt, card)
    configs = read_configs(opt.model)
    enough = at_most(opt, configs)
    if enough <= card.free:
        log.info("memory    less than %.0f GiB will be needed (computed) of %s", enough / GIB, card.name)
        return
    steps = [*climb(opt, configs, card)]
    need = steps[0].need
    if need.fits(card.free):
        log.info("memory    about %.1f GiB will be needed (computed) of %s", need.bytes / GIB, card.name)
    else:
        log.warning("memory may be short: about %.1f GiB will be needed for %s (computed), of %s. %s",
                    need.bytes / GIB, steps[0].worst, card.name, advice(steps, card))


def at_most(opt: TracedOptions, configs: ModelConfigs) -> int:
    """A cheap bound on what a run needs, in bytes, from the widths of its UNet, the batch and the precision."""
    widths = configs.of("unet/config.json")["block_out_channels"]
    images = opt.run.train_batch_size * (2 if has_class_images(opt) else 1)
    graph = MOST_GRAPH * widths[0] / NARROWEST * images * math.prod(largest(opt.data)) / 1e6
    graph *= CHECKPOINTED if opt.precision.gradient_checkpointing else 1
    bound = graph + MOST_WEIGHTS * (max(widths) / WIDEST) ** 2
    half = (opt.precision.mixed_precision or "no") != "no"
    unusual = opt.lora.lora_layers != "attention" or opt.lora.rank > 64 or learns_text(opt) or has_class_images(opt)
    return Need(int(bound * (1 if half else 2) * (UNUSUAL if unusual else 1))).bytes


def advice(steps: list[Step], card: Card) -> str:
    """What to type."""
    flags = page.typed(page.all_flags(steps))
    if steps[-1].need.fits(card.free):
        return f"Add {flags}, with which about {steps[-1].need.bytes / GIB:.1f} GiB are needed"
    return f"Even with {flags}, about {steps[-1].need.bytes / GIB:.1f} GiB are needed" if flags else "No flag helps"


def what_helps(opt: PlannedOptions, card: Card) -> str:
    """After a run has run out of memory on the card: the first flags that should fit, beyond what it had."""
    configs = read_configs(opt.model)
    asked = trace(opt, configs)
    too_much = max(Need(phase.peak.total).bytes for phase in asked.phases)
    tighter = Card(card.name, min(card.free, too_much - 1), card.tflops, card.bf16)
    steps = [*climb(opt, configs, tighter, asked)]
    return f"{advice(steps, tighter)}; --resume_from_checkpoint latest keeps what is saved"
