"""What a card has on it while the stock pipeline generates images, with all its parts there or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainkit.condition import Condition
from trainkit.diffusion import Level
from trainkit.families import Family
from trainkit.families.base import in_tiles
from trainkit.options.sizes import Size
from trainkit.plan.live_bytes import BLOCK, GRAPH, META, WEIGHTS, LiveBytes, Peak, weights_of

StepResult = TypeVar("StepResult")
GUIDED = 2  # rows of the UNet for each image that is generated with guidance


def in_dtype(family: Family, dtype: torch.dtype, *, vae: torch.dtype) -> Family:
    """The family with its UNet and text encoders in `dtype`, and its VAE in its own."""
    for network in (family.denoiser, *family.text_encoders):
        nn.Module.to(network, dtype)
    nn.Module.to(family.vae, vae)
    return family


def draw(family: Family, images: int, size: Size, *, tiles: bool, aside: bool = False, block: int = BLOCK) -> Peak:
    """The stock pipeline generates so many images at once, with guidance, and decodes one after the other.

    family  on the meta device; the caller is inside of `as_on_cuda`
    size    (h, w) in pixels
    tiles   whether large images are decoded in tiles
    aside   whether only the part that works is on the card. The VAE may stay there beside the UNet, as it does in the
            second of two passes.
    """
    peaks: list[Peak] = []
    encoders, parts = family.text_encoders, [family.denoiser, family.vae]

    def work(networks: Sequence[nn.Module], alive: Iterable[Tensor], step: Callable[[], StepResult]) -> StepResult:
        there = weights_of(networks if aside else [*parts, *encoders])
        with LiveBytes("meta", {WEIGHTS: there, GRAPH: alive}, block=block) as live, torch.no_grad():
            result = step()
        peaks.append(live.peak)
        return result

    given = work(encoders, (), lambda: family.encode_prompts([""] * GUIDED * images, None))
    texts = [*given.values()]
    latents = work(parts, texts, lambda: denoised(family, given, GUIDED * images, size)[:images].to(family.vae.dtype))
    family.vae.enable_slicing()  # as trainkit.inference and trainkit.data.class_images do
    with in_tiles(family.vae, family.vae_factor) if tiles else nullcontext():
        work([family.vae], [*texts, latents], lambda: family.vae.decode(latents))
    return max(peaks, key=lambda peak: peak.total)


def denoised(family: Family, texts: Mapping[str, Tensor], rows: int, size: Size) -> Tensor:
    """The network's answer to so many rows of that size -> [B,C,h,w]

    texts  of a prompt or of several, of which the first is taken
    """
    z = torch.empty(rows, *latent_shape(family, size), device=META)
    scale = torch.empty(rows, device=META)
    level = Level(scale, scale, cond=torch.zeros(rows, dtype=torch.long, device=META), time=scale)
    given = Condition({name: tensor[:1].expand(rows, *tensor.shape[1:]) for name, tensor in texts.items()},
                      time_ids=torch.empty(rows, 6, device=META))
    return family.denoise(z, level, given)


def latent_shape(family: Family, size: Size) -> tuple[int, int, int]:
    """(C,h,w) of the latents of an image of that size"""
    return family.latent_channels, size[0] // family.vae_factor, size[1] // family.vae_factor
