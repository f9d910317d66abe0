"""SDXL at its released sizes on the card: no weight has numbers, so none takes memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from experiments.benchmark import sdxl
from trainkit.families import base
from trainkit.families.base import ModelLayout, Parts
from trainkit.options import ModelOptions

small = base.load_parts


def load_parts(options: ModelOptions, layout: ModelLayout, encoders: Sequence[type], *, weight_dtype: torch.dtype,
               device: torch.device) -> Parts:
    """The parts of a small model's folder, with networks of SDXL's sizes in place of its own."""
    parts = small(options, layout, encoders, weight_dtype=weight_dtype, device=device)
    with torch.device("cuda"):
        texts = sdxl.text_encoders(eos_token_id=parts.tokenizers[0].eos_token_id)
        denoiser = sdxl.unet().to(weight_dtype)
        parts.storage.store(denoiser)
        return replace(parts, denoiser=denoiser, vae=sdxl.vae(), text_encoders=texts)


def put_in_place() -> None:
    base.load_parts = load_parts  # type: ignore[assignment]
