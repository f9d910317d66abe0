"""Which part of an image a visit sees: resize, flip and crop as pure functions of (seed, epoch, row).

Resizing and cropping give the numbers of torchvision's Resize -> hflip -> crop -> ToTensor -> Normalize(0.5, 0.5) on
PIL images, without needing torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainkit.rng import generator, permutation

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.options import DataOptions

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class CropPlan:
    """How one visit sees a picture: resize to `resized`, mirror if `flip`, cut a square at (top, left)."""

    resized: tuple[int, int]  # h, w
    top: int
    left: int  # measured in the mirrored picture when flip
    flip: bool


def resized_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(h, w) after the shorter side became `resolution`; the longer one is truncated, as torchvision's Resize does."""
    h, w = size
    long = int(resolution * max(h, w) / min(h, w))
    return (resolution, long) if h <= w else (long, resolution)


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """How pictures become squares of `resolution` pixels.

    `cached_crops` = K > 0 restricts random crops to K fixed places a row, so that their latents can be cached; 0 draws
    a fresh place at every visit. It has no effect with `center_crop`.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    cached_crops: int = 0

    @classmethod
    def from_options(cls, data: DataOptions) -> CropPolicy:
        return cls(resolution=data.resolution, center_crop=data.center_crop, random_flip=data.random_flip,
                   interpolation=data.image_interpolation_mode,
                   cached_crops=data.cached_crops if data.cache_latents else 0)

    @property
    def cacheable(self) -> bool:
        """Whether a row has finitely many plans, so that `variants` can list them."""
        return self.center_crop or self.cached_crops > 0

    def plan(self, row: Row, *, seed: int, epoch: int) -> CropPlan:
        """The crop and flip of this row (repeats differ) in this epoch: a pure function."""
        visit = (seed, epoch, row.id, row.repeat)
        corners = self._corners(row, seed)
        top, left = corners[_draw(len(corners), "crop", *visit)]
        flip = self.random_flip and _draw(2, "flip", *visit) == 1
        return CropPlan(resized_size(row.size, self.resolution), top, left, flip)

    def variants(self, row: Row, seed: int) -> list[CropPlan]:
        """Every plan `plan` may return for this row, each once."""
        assert self.cacheable, "a fresh random crop has no list of variants"
        resized, flips = resized_size(row.size, self.resolution), (False, True) if self.random_flip else (False,)
        return [CropPlan(resized, top, left, flip) for top, left in self._corners(row, seed) for flip in flips]

    def views(self, picture: Image.Image, plans: Sequence[CropPlan]) -> Tensor:
        """Pixels of several plans of one picture, resized once -> [V,3,H,W] in -1..1."""
        h, w = plans[0].resized
        assert {plan.resized for plan in plans} == {(h, w)}, "plans of different pictures"
        resized = picture.resize((w, h), INTERPOLATIONS[self.interpolation])
        return torch.stack([self._cut(resized, plan) for plan in plans])

    def pixels(self, picture: Image.Image, plan: CropPlan) -> Tensor:
        """-> [3,H,W] in -1..1."""
        return self.views(picture, [plan])[0]

    def time_ids(self, row: Row, plan: CropPlan) -> Tensor:
        """SDXL's size conditioning: original h, w · crop top, left · target h, w -> [6] (arXiv:2307.01952, 2.2)."""
        return torch.tensor([*row.size, plan.top, plan.left, self.resolution, self.resolution], dtype=torch.float32)

    def _corners(self, row: Row, seed: int) -> list[tuple[int, int]]:
        """(top, left) of every crop this row may get. One of the two ranges is a single place: the short side fits."""
        h, w = resized_size(row.size, self.resolution)
        slack_h, slack_w = h - self.resolution, w - self.resolution
        if self.center_crop:
            return [(round(slack_h / 2), round(slack_w / 2))]
        places = [(top, left) for top in range(slack_h + 1) for left in range(slack_w + 1)]
        if not self.cached_crops:
            return places
        chosen = permutation(len(places), "cached crops", seed, row.id, row.repeat)[: self.cached_crops]
        return [places[i] for i in chosen.tolist()]

    def _cut(self, resized: Image.Image, plan: CropPlan) -> Tensor:
        if plan.flip:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = (plan.left, plan.top, plan.left + self.resolution, plan.top + self.resolution)
        levels = torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1).contiguous()  # [3,H,W] 0..255
        return levels.float().div(255).sub(0.5).div(0.5)


def _draw(n: int, *key: int | str) -> int:
    """A number in 0..n-1 for `key`."""
    return int(torch.randint(n, (), generator=generator(*key)))
