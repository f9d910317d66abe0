"""Bit for bit: conditions, files of tensors, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether they have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def same_tensors(a: Path, b: Path) -> None:
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    unequal = [k for k in one if not torch.equal(one[k], two[k])]
    assert not unequal, f"{len(unequal)} of {len(one)} tensors differ, {unequal[0]} among them"


def same_checkpoint(a: Path, b: Path) -> None:
    files = sorted(p.name for p in a.glob("*.safetensors"))
    assert files == sorted(p.name for p in b.glob("*.safetensors")) and files
    for name in files:
        same_tensors(a / name, b / name)
