"""What belongs together travels together: a row's pixels or latents, its caption, its sizes and its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from trainkit.rng import Key


class Source(Protocol):
    """Where a picture's file content comes from; a Path is one."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Row:
    """One picture that an epoch visits once; a repeat is a row of its own, with its own crops."""

    id: str  # file name under the folder, or "row 17" of a data set, or "class/" + file name; the same on every machine
    source: Source
    caption: str  # the first, or only one
    size: tuple[int, int]  # h, w, upright
    digest: str  # of the file's content
    repeat: int = 0  # 0 .. repeats - 1
    share: float = 1.0  # weight of its loss: 1 for instances, prior_loss_weight for class pictures
    is_class: bool = False  # a picture of the class, there to keep what the model knew of it
    others: tuple[str, ...] = ()  # further captions

    @property
    def all_captions(self) -> tuple[str, ...]:
        """At least one; each visit is trained with one of them."""
        return self.caption, *self.others


@dataclass(frozen=True)
class Listed:
    """A picture that is there by name; its content has not been read."""

    id: str
    source: Source
    caption: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One place in one optimizer step: which row fills it and at which visit (epoch) of that row."""

    step: int
    index: int  # 0 .. global_batch - 1, class pictures from global_batch on; the same on 1 or N processes
    row: int  # position in the list of rows, repeats included
    epoch: int


@dataclass(frozen=True)
class Sample:
    """One row made ready for one slot. Exactly one of `pixels` and `mean` is set."""

    slot: Slot
    prompt: str
    time_ids: Tensor  # [6]  original h, w · crop top, left · target h, w  (pixels)
    share: float  # 1 for instances, prior_loss_weight for class pictures
    is_class: bool = False
    picture: str = ""  # digest of its file: the same for its repeats
    pixels: Tensor | None = None  # [3,H,W] in -1..1
    mean: Tensor | None = None  # [C,h,w] of the VAE posterior
    logvar: Tensor | None = None  # [C,h,w]


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one rank, instances first, then as many class pictures if there are any.

    B counts both. Exactly one of `pixels` and `mean` is set.
    """

    slots: tuple[Slot, ...]
    prompts: tuple[str, ...]  # B captions, one of each row's
    time_ids: Tensor  # [B,6]
    share: Tensor  # [B]
    is_class: Tensor  # [B] bool
    num_instance: int  # instance rows in the whole optimizer step, all ranks and micro-batches: the loss divisor
    pictures: tuple[str, ...] = ()  # B digests of files
    pixels: Tensor | None = None  # [B,3,H,W]
    mean: Tensor | None = None  # [B,C,h,w]
    logvar: Tensor | None = None  # [B,C,h,w]

    @property
    def step(self) -> int:
        """The optimizer step, from 0, that this is a part of."""
        return self.slots[0].step

    def keys(self, seed: int) -> list[Key]:
        """One randomness key per row: (seed, optimizer step, slot in the global batch)."""
        return [(seed, s.step, s.index) for s in self.slots]

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(samples: Sequence[Sample], num_instance: int) -> Batch:
    """Stack samples of one shape -> Batch."""

    def stack(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if values[0] is None else torch.stack(values)

    return Batch(
        slots=tuple(s.slot for s in samples), prompts=tuple(s.prompt for s in samples),
        time_ids=torch.stack([s.time_ids for s in samples]), share=torch.tensor([s.share for s in samples]),
        is_class=torch.tensor([s.is_class for s in samples]), num_instance=num_instance,
        pictures=tuple(s.picture for s in samples),
        pixels=stack("pixels"), mean=stack("mean"), logvar=stack("logvar"),
    )
