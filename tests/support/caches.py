"""What tests of cached latents share: a stand-in for the VAE, rows of a folder, and ways in which a file is damaged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.support.images import marked_folder, row_of
from trainkit.data.batch import Row

DAMAGE = {
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * 200,
    "cut": lambda data: data[:-1],
    "64 bytes of the payload overwritten": lambda data: data[:-64] + b"\xff" * 64,
    "no digest": lambda data: save(load(data)),
}


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for a VAE: 8x8 block means [B,3,4,4]."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, mean - 5


def folder_rows(folder: Path, n: int = 5) -> list[Row]:
    return [row_of(path) for path in sorted(marked_folder(folder, n).glob("*.png"))]
