"""What became of every file in a data folder: how many were read, and which were left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainkit.data.batch import Listed
from trainkit.errors import Problem, counted


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is there and is not trained on."""

    name: str  # under the data folder, printable
    why: str


@dataclass(frozen=True)
class Account:
    """What a run trains on, for the line it starts with. What no one expects to be read does not count as left out."""

    images: int = 0
    captions: Mapping[str, int] = field(default_factory=dict)  # {"metadata.jsonl": 22}: images by where theirs is from
    left_out: tuple[LeftOut, ...] = ()
    in_all: int = 0  # images there, where --max_train_samples takes some of them
    masks: int = 0  # images with a mask
    mask_area: float = 0.0  # the part of these images that their masks leave, 0 to 1: the mean

    def __str__(self) -> str:
        of = f" of {self.in_all}" if self.in_all > self.images else ""
        parts = [counted(self.images, "image") if not of else f"{self.images}{of} images"]
        sources = [f"{counted(count, 'caption')} from {source}" for source, count in self.captions.items()]
        parts += sources or ["no captions"]
        if self.masks:
            parts.append(f"{counted(self.masks, 'mask')} with {100 * self.mask_area:.3g} % of the area")
        if self.left_out:
            few = ", ".join(f"{one.name} ({one.why})" for one in self.left_out[:3])
            more = ", …" if len(self.left_out) > 3 else ""
            parts.append(f"{counted(len(self.left_out), 'file')} not read: {few}{more}")
        return ", ".join(parts)


@dataclass(frozen=True)
class SourceListing:
    """What reading a folder or a data set gives."""

    listed: list[Listed]
    problems: list[Problem]
    account: Account = field(default_factory=Account)
