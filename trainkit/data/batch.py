"""What belongs together travels together: a row's pixels or latents, its caption, its sizes and its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainkit.devices import upload
from trainkit.digests import Place
from trainkit.errors import UserError
from trainkit.rng import Key

if TYPE_CHECKING:
    from trainkit.options import CaptionOptions


class Source(Protocol):
    """Where an image's file content comes from; a Path is one."""

    def read_bytes(self) -> bytes: ...


def place_of(source: Source) -> Place | None:
    """What is remembered of an image is bound to this; None: nothing can be remembered."""
    return source if isinstance(source, Path) else getattr(source, "place", None)


@dataclass(frozen=True)
class Mask:
    """Which places of an image count in the loss: a grey image of its shape, or its own transparency."""

    source: Source
    digest: str  # of the file's content
    alpha: bool = False  # the channel of that name is meant
    area: float = 1.0  # mean over the whole image, 0 to 1
    fills: bool = False  # whether places where it is black are filled before the VAE reads the image


@dataclass(frozen=True)
class Handling:
    """How the images of one source are trained on, where a run has several sources with settings of their own."""

    captions: CaptionOptions
    random_flip: bool = False
    center_crop: bool = False
    interpolation: str = "lanczos"
    batch_size: int | None = None  # images of it in a forward pass at most; None: as many as the run has


@dataclass(frozen=True, slots=True)
class Row:
    """One image that an epoch visits once; a repeat is a row of its own, with its own crops."""

    id: str  # file name under the folder, or "row 17" of a data set, or "class/" + file name; the same on every machine
    source: Source
    caption: str  # the first, or only one
    size: tuple[int, int]  # h, w, upright
    digest: str  # of the file's content
    repeat: int = 0  # 0 .. repeats - 1
    loss_weight: float = 1.0  # weight of its loss: 1 for instances, prior_loss_weight for class images
    is_class: bool = False  # an image of the class, there to keep what the model knew of it
    others: tuple[str, ...] = ()  # further captions
    cut: tuple[int, int] | None = None  # h, w in pixels of what is cut out of it; None: as --resolution says
    mask: Mask | None = None  # None: all places count

    @property
    def pixels_digest(self) -> str:
        """Of what its pixels come from: the file, and the mask where it changes them."""
        return f"{self.digest} {self.mask.digest} {self.mask.alpha}" if self.mask and self.mask.fills else self.digest
    handling: Handling | None = None  # of its source; None: as the flags say

    @property
    def all_captions(self) -> tuple[str, ...]:
        """At least one; each visit is trained with one of them."""
        return self.caption, *self.others


@dataclass(frozen=True, slots=True)
class Listed:
    """An image that is there by name; its content has not been read."""

    id: str
    source: Source
    caption: str
    others: tuple[str, ...] = ()
    mask: Source | None = None  # what holds its mask: a file, or for its transparency the image itself


class Slot(NamedTuple):
    """One place in one optimizer step."""

    key: Key  # (seed, step, place in the global batch): what its random numbers are drawn by
    row: int  # position in the list of rows
    visit: int  # the epoch of that row
    num_instance: int  # instance rows in the whole step, over all ranks
    counts: bool = True  # False: it fills a micro-batch that its rank lacks, and weighs 0


@dataclass(frozen=True)
class Sample:
    """One way to see a row: resized to `resized`, mirrored if `flip`, `shape` cut out at (top, left).

    Filled for a slot it also has a caption and either pixels or the VAE's posterior (mean, logvar).
    """

    row: Row
    resized: tuple[int, int]  # h, w
    top: int
    left: int  # measured in the mirrored image when flip
    flip: bool
    shape: tuple[int, int]  # h, w in pixels
    slot: Slot | None = None
    prompt: str = ""
    pixels: Tensor | None = None  # [3,H,W] in -1..1
    mean: Tensor | None = None  # [C,h,w]
    logvar: Tensor | None = None  # [C,h,w]
    mask: Tensor | None = None  # [1,h,w] factor on the loss of each place of the latent; None: 1 everywhere


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch on one rank: samples of one shape, instances first, then class images if there are any.

    B counts both. Exactly one of `pixels` and `mean` is set.
    """

    step: int  # the optimizer step, from 0, that this is a part of
    keys: tuple[Key, ...]  # B of them
    rows: tuple[int, ...]  # B positions in the list of rows
    prompts: tuple[str, ...]  # B captions, one of each row's
    time_ids: Tensor  # [B,6]
    loss_weight: Tensor  # [B]
    is_class: Tensor  # [B] bool
    num_instance: int  # instance rows in the whole optimizer step, all ranks and micro-batches: the loss divisor
    images: tuple[str, ...] = ()  # B digests of files
    counts: bool = True  # False: the rank lacks a micro-batch, and this one, of weight 0, stands for it
    pixels: Tensor | None = None  # [B,3,H,W]
    mean: Tensor | None = None  # [B,C,h,w]
    logvar: Tensor | None = None  # [B,C,h,w]
    mask: Tensor | None = None  # [B,1,h,w]

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = dict(zip(tensors, upload([*tensors.values()], device), strict=True))
        return replace(self, **moved)


def collate(items: Sequence[Sample | UserError]) -> Batch | UserError:
    """Stack samples of one shape; the first error among them instead, if there is one."""
    samples: list[Sample] = []
    for item in items:
        if isinstance(item, UserError):
            return item
        samples.append(item)
    assert len({s.shape for s in samples}) == 1, "a micro-batch has samples of one shape"
    keys, places, _, (num_instance, *_), (counts, *_) = zip(*(s.slot for s in samples if s.slot), strict=True)
    # SDXL's size conditioning: original h, w · crop top, left · target h, w (arXiv:2307.01952, 2.2)
    sizes = [[*s.row.size, s.top, s.left, *s.shape] for s in samples]
    tensors = {name: [getattr(s, name) for s in samples] for name in ("pixels", "mean", "logvar", "mask")}
    return Batch(
        step=keys[0][1], keys=keys, rows=places, prompts=tuple(s.prompt for s in samples), num_instance=num_instance,
        counts=counts,
        time_ids=torch.tensor(sizes, dtype=torch.float32), images=tuple(s.row.digest for s in samples),
        loss_weight=torch.tensor([s.row.loss_weight * counts for s in samples]),
        is_class=torch.tensor([s.row.is_class for s in samples]),
        **{name: torch.stack(values) for name, values in tensors.items() if values[0] is not None},
    )
