"""Pictures: decode a file the way a viewer shows it, then resize, flip and crop it as a pure function of the visit.

Resizing and cropping give the numbers of torchvision's Resize -> hflip -> crop -> ToTensor -> Normalize(0.5, 0.5) on
PIL pictures, without needing torchvision.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.rng import generator, permutation

if TYPE_CHECKING:
    from trainkit.data.rows import Row
    from trainkit.options import DataOptions

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # what photographs come in; 36 other openers stay shut
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold: a quarter of a GiB at 3 bytes a pixel
MAX_ASPECT = 50  # a longer strip, resized by its short side, would need gigabytes
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
}


class Source(Protocol):
    """Where a picture's file content comes from; a Path is one."""

    def read_bytes(self) -> bytes: ...


class UnreadablePicture(Exception):
    """This file content is no usable picture; the message says why, without naming the file."""


def content_digest(data: bytes) -> str:
    """128-bit BLAKE2b of a file's content, in hex: the picture's identity in caches."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes) -> Image.Image:
    """RGB picture as a viewer shows it: first frame, upright by EXIF, on white, 8 bits a channel.

    Raises UnreadablePicture, and nothing else, for content that cannot be used.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _refuse_shape(*picture.size)
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except UnreadablePicture:
        raise
    except UnidentifiedImageError:
        why = f"no picture of a known format ({', '.join(FORMATS)})" if data else "the file is empty"
        raise UnreadablePicture(why) from None
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged or hostile content
        raise UnreadablePicture(f"{error}" or type(error).__name__) from error


def is_animated(data: bytes) -> bool:
    """Whether a decodable file holds more frames than the one `decode` takes."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.format != "MPO" and getattr(picture, "is_animated", False)  # phones add a depth map in MPO
    except Exception:  # as in `decode`; only looking for a second frame can fail here, so there is something behind
        return True


def load_picture(row: Row) -> Image.Image:
    """The row's picture, RGB and upright; UserError when it can no longer be read or is not what was listed."""
    try:
        data = row.source.read_bytes()
        if content_digest(data) != row.digest:
            raise UnreadablePicture("the file has changed since this run listed it")
        return decode(data)
    except (OSError, UnreadablePicture) as error:
        problem = Problem(f"picture {row.id} can no longer be read", f"{row.source}", f"{error}",
                          "put the picture back and start the same command again", kind="data")
        raise UserError(problem) from error


def _refuse_shape(width: int, height: int) -> None:
    """Refuse from the header alone, before any pixel is decoded."""
    if width * height > MAX_PIXELS:
        raise UnreadablePicture(f"{width} x {height} is over {MAX_PIXELS / 1e6:.0f} megapixels; scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadablePicture(f"{width} x {height} is longer than {MAX_ASPECT} times its short side; crop it")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return _from_16_bit(picture)
    if picture.mode in ("I", "F"):
        raise UnreadablePicture("32 bits a channel have no agreed white level; convert it to 8 or 16 bits")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return _from_cmyk(picture) if picture.mode == "CMYK" else picture.convert("RGB")


def _from_16_bit(picture: Image.Image) -> Image.Image:
    """Levels 0..65535 -> 0..255. Pillow's own conversion saturates instead (Pillow#1108)."""
    levels = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_cmyk(picture: Image.Image) -> Image.Image:
    """Inks to sRGB by the embedded profile; by Pillow's plain formula when there is none."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture.convert("RGB")
    try:
        inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        log.warning("a CMYK picture's colour profile is unusable (%s); its colours are approximate", error)
        return picture.convert("RGB")


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
