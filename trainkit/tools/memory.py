"""How little of a card generating images takes: --memory auto, normal or low."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.options.captions import TOKENS
from trainkit.process import say

if TYPE_CHECKING:
    from trainkit.inference import Pipeline
    from trainkit.options.sizes import Size
    from trainkit.plan.cards import Card
    from trainkit.tools.second_pass import SecondPass

log = logging.getLogger(__name__)

MODES = ("auto", "normal", "low")


@dataclass(frozen=True)
class Drawing:
    """What is generated at once.

    width, height  in pixels, of the first pass; None is the model's
    """

    images: int
    width: int | None
    height: int | None
    second: SecondPass | None = None

    def size(self, native: Size) -> Size:
        """(h, w) of the largest pass. native: (h, w) that the model was made for"""
        width, height = self.width or native[1], self.height or native[0]
        width, height = self.second.size(width, height) if self.second else (width, height)
        return height, width


@dataclass(frozen=True)
class Way:
    """How a pipeline is on a card.

    tiles  large images are decoded in tiles
    aside  text encoders, UNet and VAE come to the card one after the other, and wait in the memory of the machine
    """

    tiles: bool = False
    aside: bool = False

    @contextmanager
    def reading(self, pipe: Pipeline) -> Iterator[None]:
        """Inside, the text encoders can read prompts."""
        from trainkit.devices import present
        from trainkit.inference import networks
        from trainkit.preview import visiting

        _, *encoders = networks(pipe)
        with ExitStack() as there:
            for name in encoders if self.aside else ():
                there.enter_context(visiting(getattr(pipe, name), present()))
            yield

    @contextmanager
    def drawing(self, pipe: Pipeline) -> Iterator[None]:
        """Inside, the pipeline, and others on its parts, can generate images from prompts that are read."""
        from trainkit.devices import empty_cache, present
        from trainkit.families.base import in_tiles

        with ExitStack() as there:
            if self.tiles:
                there.enter_context(in_tiles(pipe.vae, pipe.vae_scale_factor))
            if self.aside:
                empty_cache(present())
                pipe.enable_model_cpu_offload(device=present())
                there.callback(taken_back, pipe)
            yield


def taken_back(pipe: Pipeline) -> None:
    """All parts in the memory of the machine. The pipeline of a second pass leaves the VAE on the card."""
    from trainkit.devices import empty_cache, present

    pipe.remove_all_hooks()
    pipe.to("cpu", silence_dtype_warnings=True)
    empty_cache(present())


WAYS = {  # each needs less than the one before
    Way(): "as it is", Way(tiles=True): "the VAE decodes in tiles",
    Way(tiles=True, aside=True): "the VAE decodes in tiles, and only the part that works is on the card",
}
NORMAL, *_, LOW = WAYS


def add_memory(add: Callable[..., object]) -> None:
    """The flag."""
    add("--memory", choices=MODES, default="auto", help="How much memory of the card is used. auto, the default, "
        "computes what is needed. If the card has less, images are decoded in tiles, and if that is not enough, the "
        "parts of the model come to the card one after the other, which is slower. low always does both, normal "
        "neither. On a CPU it changes nothing.")


def way_for(args: argparse.Namespace, batches: Iterable[Drawing], copies: bool) -> Way:
    """What --memory asks for on this machine, in a line for the user.

    batches  those that may need most
    copies   whether the weights are kept a second time, to put other LoRAs on them
    """
    from trainkit.devices import present
    from trainkit.plan.report import here

    device = present()
    if device.type == "cpu" or args.memory == "normal":
        return NORMAL
    if args.memory == "low":
        say(f"memory: {WAYS[LOW]} (--memory low)")
        return LOW
    card = here(device) if device.type == "cuda" else None
    return NORMAL if card is None else fitting(args, card, batches, copies=copies)


def fitting(args: argparse.Namespace, card: Card, batches: Iterable[Drawing], *, copies: bool = False) -> Way:
    """The first way that fits what is free on the card, or else the last."""
    from trainkit.plan.need import GIB, Need

    tried = []
    for way, peak in needs(args, batches, copies=copies):
        tried.append((way, Need(peak)))
        if tried[-1][1].fits(card.free):
            break
    (_, asked), (way, need) = tried[0], tried[-1]
    of = f"computed, {card.free / GIB:.1f} GiB are free"
    if way == NORMAL:
        say(f"memory: about {need.bytes / GIB:.1f} GiB are needed ({of})")
    elif need.fits(card.free):
        say(f"memory: about {asked.bytes / GIB:.1f} GiB would be needed ({of}): {WAYS[way]}, which needs about "
            f"{need.bytes / GIB:.1f} GiB")
    else:
        log.warning("memory may be short: %s, which still needs about %.1f GiB (%s); a smaller --batch_size, --width, "
                    "--height or --hires_scale needs less", WAYS[way], need.bytes / GIB, of)
    return way


def needs(args: argparse.Namespace, batches: Iterable[Drawing], *, copies: bool = False) -> Iterator[tuple[Way, int]]:
    """Each way with the bytes of tensors on the card at its peak, from shapes alone."""
    import torch

    from trainkit.diffusion import ScheduleChange
    from trainkit.inference import dtype_on
    from trainkit.options import ModelOptions
    from trainkit.plan.as_on_cuda import as_on_cuda
    from trainkit.plan.drawing import draw, in_dtype
    from trainkit.plan.live_bytes import bytes_of, weights_of
    from trainkit.plan.models import read_configs
    from trainkit.plan.skeleton import family_on_meta

    configs = read_configs(ModelOptions(pretrained_model_name_or_path=args.base))
    dtype = dtype_on(torch.device("cuda"), args.dtype)
    family = family_on_meta(configs, dtype, ScheduleChange(args.prediction_type),
                            max_chunks=args.max_token_length // TOKENS)
    upcast = configs.is_sdxl and dtype == torch.float16 and family.vae.config.force_upcast  # by the stock pipeline
    in_dtype(family, dtype, vae=torch.float32 if upcast else dtype)
    second = bytes_of(weights_of([family.denoiser, *family.text_encoders])) if copies else 0
    sized = {(batch.images, batch.size(family.native_size)) for batch in batches}
    images, size = max(sized, key=lambda one: one[0] * math.prod(one[1]))
    with as_on_cuda():
        for way in WAYS:
            peak = draw(family, images, size, tiles=way.tiles, aside=way.aside).total
            yield way, peak + (0 if way.aside else second)
