"""LoRA files without a training."""

from __future__ import annotations

from pathlib import Path

import torch

from trainkit import rng
from trainkit.adapters import add_adapters
from trainkit.export import write_diffusers
from trainkit.families import sdxl
from trainkit.options import LoraOptions


def random_lora(base: Path, file: Path, key: str = "test", *, use_dora: bool = False) -> Path:
    """A LoRA that changes the images a lot, another for another key."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    options = LoraOptions(rank=2, use_dora=use_dora)
    adapters = add_adapters(unet.requires_grad_(False), options, targets=sdxl.LORA_TARGETS, seed=0)
    with torch.no_grad():
        for path in adapters.layers:
            B = adapters.factors(path)[1]
            B.copy_(torch.randn(B.shape, generator=rng.generator(key, path)))
    write_diffusers([adapters], file, {})
    return file
