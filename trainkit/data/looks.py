"""What the pixels of an image say about its use for training: whether it is blurred, and which images look alike.

It is measured while an image is decoded for its verdict, and remembered as the verdict is.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trainkit.commands import tool
from trainkit.data.buckets import size_choices
from trainkit.data.geometry import resized_size
from trainkit.data.verdicts import Verdict, judge_and_remember
from trainkit.digests import code_version
from trainkit.errors import shell_word
from trainkit.options.inputs import CHECKED_FLAGS, ImageOptions
from trainkit.options.sizes import Size, size_of

if TYPE_CHECKING:
    from trainkit.data.batch import Source

BLURRED = 20.0  # variance of the Laplacian in the sharpest tiles, on 8-bit grey
ALIKE_BITS, ALIKE_COLOURS = 8, 24.0  # of 64 bits of the hash; root mean square difference of colours, of 255
TILE = 32  # pixels; sharpness is that of the sharpest tiles, so that a soft background does not count
SHARPEST = 95  # percent of the tiles have less detail than what is measured
COLOURS = 16  # pixels a side of the image that two images are compared by
SMALLER = 1.25  # an image that is enlarged by this factor or more is smaller than --resolution
SIDE_STEP = 64  # pixels; --resolution is advised in multiples of it
NO_HASHES = "near-duplicates are not looked for: pip install imagehash"


@dataclass(frozen=True, slots=True)
class Look:
    """What the pixels of one image say.

    sharpness  variance of the Laplacian, of the grey image at the size that it is trained at
    phash      64 bits; None without the package imagehash
    colours    [COLOURS, COLOURS, 3], 0..255
    """

    sharpness: float
    phash: int | None
    colours: np.ndarray

    refused = ""  # a look is remembered whatever it says

    @property
    def is_blurred(self) -> bool:
        return self.sharpness < BLURRED

    def pack(self) -> str:
        return json.dumps([self.sharpness, self.phash, base64.b64encode(self.colours.tobytes()).decode()])

    @classmethod
    def unpack(cls, text: str) -> Look:
        sharpness, phash, colours = json.loads(text)
        return cls(sharpness, phash, _square(base64.b64decode(colours)))


@dataclass(frozen=True)
class Looker:
    """Measures an image that was decoded, at the size that the options ask for."""

    options: ImageOptions

    def __call__(self, image: Image.Image) -> Look:
        small = image.resize((COLOURS, COLOURS), Image.Resampling.BOX)
        return Look(sharpness(image, self._trained_size(image)), perceptual_hash(image), _square(small.tobytes()))

    @property
    def kind(self) -> str:
        """The name of what is measured: sharpness depends on the size, so that each size has entries of its own."""
        o = self.options
        sizes: list[object] = [o.resolutions or o.resolution]
        if o.enable_bucket:
            sizes += [o.min_bucket_reso, o.max_bucket_reso, o.bucket_reso_steps, o.bucket_no_upscale]
        return f"look {sizes}"

    def _trained_size(self, image: Image.Image) -> Size:
        size = (image.height, image.width)
        cut = size_choices(self.options)[0](size) or size_of(self.options.resolution)
        return resized_size(size, cut) if min(cut) > 0 else size


def _square(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(COLOURS, COLOURS, 3)


def judge_with_looks(sources: Sequence[Source], options: ImageOptions) -> list[tuple[Verdict, Look | None]]:
    """A verdict and a look of each image, each decoded once; None of an image that is refused.

    Those that a run of the same sizes has looked at before, and that were not touched since, are not read.
    """
    look = Looker(options)
    version = f"{code_version(sys.modules[__name__])} {hashes_available()}"
    return judge_and_remember(sources, look, look.kind, version, Look.unpack)


# ----------------------------------------------------------------------------------------------------------------------
# One image


def sharpness(image: Image.Image, size: Size) -> float:
    """Variance of the Laplacian in the sharpest tiles, the image scaled down to `size` (h, w); it is never enlarged.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", doi:10.1109/ICPR.2000.903548.
    """
    grey = image.convert("L")
    if size[0] < image.height:
        grey = grey.resize((max(1, size[1]), size[0]), Image.Resampling.BOX, reducing_gap=2.0)
    z = np.pad(np.asarray(grey, np.float32), 1, mode="edge")
    laplacian = 4 * z[1:-1, 1:-1] - z[:-2, 1:-1] - z[2:, 1:-1] - z[1:-1, :-2] - z[1:-1, 2:]
    h, w = (side // TILE * TILE for side in laplacian.shape)
    if not (h and w):
        return float(laplacian.var())
    tiles = laplacian[:h, :w].reshape(h // TILE, TILE, w // TILE, TILE).var(axis=(1, 3))
    return float(np.percentile(tiles, SHARPEST))


def hashes_available() -> bool:
    return find_spec("imagehash") is not None


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits that are alike for images that look alike; None without the package imagehash."""
    if not hashes_available():
        return None
    import imagehash

    return int(str(imagehash.phash(image)), 16)


# ----------------------------------------------------------------------------------------------------------------------
# Several images


def look_alikes(looks: Sequence[Look]) -> list[list[int]]:
    """Clusters of images that look alike, as places in the list; images without a hash are alone."""
    hashed = [i for i, look in enumerate(looks) if look.phash is not None]
    hashes = np.array([looks[i].phash for i in hashed], dtype=np.uint64)
    parent = list(range(len(looks)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for k, i in enumerate(hashed[:-1]):
        near = np.flatnonzero(np.bitwise_count(hashes[k + 1 :] ^ hashes[k]) <= ALIKE_BITS) + k + 1
        for j in (hashed[place] for place in near.tolist()):
            if colour_difference(looks[i], looks[j]) <= ALIKE_COLOURS:
                parent[root(j)] = root(i)
    clusters: dict[int, list[int]] = defaultdict(list)
    for i in range(len(looks)):
        clusters[root(i)].append(i)
    return [cluster for cluster in clusters.values() if len(cluster) > 1]


def colour_difference(one: Look, other: Look) -> float:
    """Root mean square difference, of 255."""
    return float(np.sqrt(np.square(one.colours.astype(np.float32) - other.colours).mean()))


def fitting_resolution(factors: Sequence[float], resolution: int | str) -> str:
    """Advice where most images are enlarged: the --resolution that enlarges a quarter of them at most; else "".

    factors  by which each image is enlarged at `resolution`
    """
    small = sum(factor >= SMALLER for factor in factors)
    if not f"{resolution}".isdigit() or int(resolution) <= SIDE_STEP or 2 * small <= len(factors):
        return ""
    fits = int(int(resolution) / _upper_quartile(factors)) // SIDE_STEP * SIDE_STEP
    if fits < SIDE_STEP:
        return f"{small} of {len(factors)} images are too small for any --resolution: use larger images"
    enlarged = sum(factor * fits > int(resolution) for factor in factors)
    return f"--resolution={fits} fits: it enlarges {enlarged} of {len(factors)} images"


def _upper_quartile(numbers: Sequence[float]) -> float:
    return quantiles(numbers, n=4, method="inclusive")[2] if len(numbers) > 1 else numbers[0]


def sheet_command(data: ImageOptions) -> str:
    """The command that shows all images with what was found; "" for a data set that is no file of this machine."""
    if not Path(data.source).exists():
        return ""
    given = {*data.model_fields_set, "resolution"}  # whose default each trainer has of its own
    values = {name: getattr(data, name) for name in CHECKED_FLAGS if name in given}
    flags = ["--" + name if value is True else f"--{name}={shell_word(f'{value}')}" for name, value in values.items()
             if value != ImageOptions.model_fields[name].default]
    return " ".join([tool("check_dataset"), shell_word(Path(data.source)), *flags, "--html=sheet.html"])
