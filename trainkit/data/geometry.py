"""Which part of an image a visit sees: resize, flip and crop as pure functions of (seed, epoch, row).

Resizing and cropping give the numbers of torchvision's Resize -> hflip -> crop -> ToTensor -> Normalize(0.5, 0.5) on
PIL images, without needing torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainkit import rng
from trainkit.data.batch import Sample
from trainkit.options.sizes import Size, size_of

if TYPE_CHECKING:
    from trainkit.data.batch import Handling, Row
    from trainkit.options import ImageOptions

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
}


def resized_size(size: Size, cut: Size) -> Size:
    """Of an image that just covers what is cut out of it; the other side is truncated, as torchvision's Resize does."""
    (h, w), (height, width) = size, cut
    return (height, w * height // h) if w * height >= h * width else (h * width // w, width)


def cut_away(size: Size, cut: Size) -> float:
    """The part of an image, 0 to 1, that is not seen in what is cut out of it."""
    ratio = size[1] * cut[0] / (size[0] * cut[1])
    return 1 - min(ratio, 1 / ratio)


def enlargement(size: Size, cut: Size) -> float:
    """The factor by which an image is scaled to cover what is cut out of it."""
    return max(cut[0] / max(1, size[0]), cut[1] / max(1, size[1]))


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """How an image becomes what the network sees: scaled until it covers its size, and the rest cut off.

    `resolution`, a side or "width,height", is the size of rows that have none of their own (`Row.cut`).

    `cached_crops` = K > 0 restricts random crops to K fixed places an image, the same for all its repeats, so that
    their latents can be cached; 0 draws a fresh place at every visit. It has no effect with `center_crop`.
    """

    resolution: int | str
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    cached_crops: int = 0

    @classmethod
    def from_options(cls, data: ImageOptions) -> CropPolicy:
        return cls(resolution=data.resolution, center_crop=data.center_crop, random_flip=data.random_flip,
                   interpolation=data.image_interpolation_mode,
                   cached_crops=data.cached_crops if data.cache_latents else 0)

    @property
    def cacheable(self) -> bool:
        """Whether a row can be seen in finitely many ways, so that `variants` can list them."""
        return self.center_crop or self.cached_crops > 0

    def of(self, row: Row) -> CropPolicy:
        """The policy for a row, whose source may have settings of its own."""
        return _of_source(self, row.handling) if row.handling else self

    def sample(self, row: Row, *, seed: int, epoch: int) -> Sample:
        """What this row (repeats differ) is seen as in this epoch: a pure function."""
        return self.of(row)._sample(row, seed=seed, epoch=epoch)

    def _sample(self, row: Row, *, seed: int, epoch: int) -> Sample:
        visit = (seed, epoch, row.id, row.repeat)
        cut = row.cut or self.size
        resized = resized_size(row.size, cut)
        corners = self._corners(row, resized, seed)
        top, left = corners[rng.integer(len(corners), "crop", *visit)]
        flip = self.random_flip and rng.integer(2, "flip", *visit) == 1
        return Sample(row, resized, top, left, flip, cut)

    def variants(self, row: Row, seed: int) -> list[Sample]:
        """Everything `sample` may return for this row, each once."""
        return self.of(row)._variants(row, seed)

    def _variants(self, row: Row, seed: int) -> list[Sample]:
        assert self.cacheable, "a fresh random crop has no list of variants"
        cut = row.cut or self.size
        resized = resized_size(row.size, cut)
        flips = (False, True) if self.random_flip else (False,)
        return [Sample(row, resized, top, left, flip, cut) for top, left in self._corners(row, resized, seed)
                for flip in flips]

    @cached_property
    def size(self) -> Size:
        """What is cut out of the images of rows that have no size of their own."""
        return size_of(self.resolution)

    def views(self, image: Image.Image, samples: Sequence[Sample], interpolation: str = "") -> Tensor:
        """Pixels of several samples of one image, resized once -> [V,3,H,W] in -1..1; of a grey one [V,1,H,W].

        interpolation  of INTERPOLATIONS, in place of the policy's own
        """
        h, w = samples[0].resized
        assert {sample.resized for sample in samples} == {(h, w)}, "samples of different images"
        policy, views = self.of(samples[0].row), []
        resized = image.resize((w, h), INTERPOLATIONS[interpolation or policy.interpolation])
        for sample in samples:
            facing = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if sample.flip else resized
            left, top, (height, width) = sample.left, sample.top, sample.shape
            cut = facing.crop((left, top, left + width, top + height))
            pixels = torch.from_numpy(np.array(cut)).view(height, width, -1)
            views.append(pixels.permute(2, 0, 1).contiguous())  # [3,H,W] 0..255
        return torch.stack(views).float().div(255).sub(0.5).div(0.5)

    def _corners(self, row: Row, resized: tuple[int, int], seed: int) -> list[tuple[int, int]]:
        """(top, left) of every crop this row may get. One of the two ranges is a single place: the short side fits."""
        height, width = row.cut or self.size
        slack_h, slack_w = resized[0] - height, resized[1] - width
        if self.center_crop:
            return [(round(slack_h / 2), round(slack_w / 2))]
        places = [(top, left) for top in range(slack_h + 1) for left in range(slack_w + 1)]
        if not self.cached_crops:
            return places
        chosen = rng.permutation(len(places), "cached crops", seed, row.id, 0)[: self.cached_crops]
        return [places[i] for i in chosen.tolist()]


@lru_cache(maxsize=256)
def _of_source(policy: CropPolicy, handling: Handling) -> CropPolicy:
    return replace(policy, center_crop=handling.center_crop, random_flip=handling.random_flip,
                   interpolation=handling.interpolation)
