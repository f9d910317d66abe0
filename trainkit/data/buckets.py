"""Which size an image is cut to: that of --resolution, or of the aspect bucket that is nearest to its shape.

A bucket is a size whose sides are multiples of a step, between two limits, with about as many pixels as --resolution.
The list of buckets is that of NovelAI 2022, "NovelAI Improvements on Stable Diffusion", as kohya's trainers make it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from trainkit.errors import Problem, listing
from trainkit.options.sizes import Size, size_of

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.options import Compat, ImageOptions

log = logging.getLogger(__name__)

SizeChoice = Callable[[Size], Size | None]  # size of an image -> size cut out of it; None: that of --resolution
Distance = Callable[[Size, Size], float]  # of an image and a bucket


# ----------------------------------------------------------------------------------------------------------------------
# The buckets, and the one of an image


def bucket_sizes(pixels: int, *, shortest: int, longest: int, step: int) -> list[Size]:
    """(h, w) of every bucket: the square, and for each side the longest other one within the pixels; by width."""
    square = max(step, math.isqrt(pixels) // step * step)
    found = {(square, square)}
    first, last = math.ceil(shortest / step) * step, longest // step * step
    for side in range(first, last + 1, step):
        other = min(last, pixels // side // step * step)
        if other >= first:
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: size[::-1])


def by_log_ratio(size: Size, bucket: Size) -> float:
    """|ln| of the aspect ratio over the bucket's: a wide image and a tall one of the same shape are treated alike."""
    return abs(math.log(size[1] * bucket[0] / (size[0] * bucket[1])))


def by_ratio(size: Size, bucket: Size) -> float:
    """The difference of width/height, as kohya's trainers choose."""
    return abs(size[1] / size[0] - bucket[1] / bucket[0])


def nearest(size: Size, *, buckets: Sequence[Size], distance: Distance) -> Size:
    """The bucket for an image; one of the very size of the image goes first."""
    return size if size in buckets else min(buckets, key=partial(distance, size))


def not_enlarged(size: Size, *, pixels: int, step: int) -> Size:
    """The size of an image, shrunk to at most so many pixels, each side rounded down to the step."""
    h, w = size
    if h * w > pixels:
        h, w = math.isqrt(pixels * h // w), math.isqrt(pixels * w // h)
    return h // step * step, w // step * step


def not_enlarged_by_kohya(size: Size, *, pixels: int, step: int) -> Size:
    """The same, but of a large image one side is made a multiple of the step: the one that keeps the ratio better."""
    h, w = size
    ratio = w / h
    if h * w > pixels:
        width = rounded(math.sqrt(pixels * ratio), step)
        height = rounded(pixels / math.sqrt(pixels * ratio), step)
        by_width = abs(width / rounded(width / ratio, step) - ratio)
        by_height = abs(rounded(height * ratio, step) / height - ratio)
        h, w = (int(width / ratio + 0.5), width) if by_width < by_height else (height, int(height * ratio + 0.5))
    return h // step * step, w // step * step


def rounded(side: float, step: int) -> int:
    """To a whole number, and then down to the step; one step at least."""
    return max(step, int(side + 0.5) // step * step)


# ----------------------------------------------------------------------------------------------------------------------
# What the options ask for

DISTANCES: dict[Compat | None, Distance] = {"kohya": by_ratio}
SHRINKING = {"kohya": not_enlarged_by_kohya}


def size_choices(data: ImageOptions, compat: Compat | None = None) -> list[SizeChoice]:
    """How an image gets its size, once for each size that it is trained at; compat is the trainer to choose like."""
    if not data.enable_bucket:
        return [partial(always, cut=size) for size in data.sizes] if data.resolutions else [partial(always, cut=None)]
    budgets = [h * w for h, w in data.sizes]
    if data.bucket_no_upscale:
        shrink = SHRINKING.get(compat or "", not_enlarged)
        return [partial(shrink, pixels=pixels, step=data.bucket_reso_steps) for pixels in budgets]
    distance = DISTANCES.get(compat, by_log_ratio)
    return [partial(nearest, buckets=buckets_of(data, pixels, compat), distance=distance) for pixels in budgets]


def smallest(data: ImageOptions) -> Size:
    """The smallest height and the smallest width that the options allow."""
    sizes = data.sizes
    if data.enable_bucket and data.bucket_no_upscale:
        sizes = [(data.bucket_reso_steps, data.bucket_reso_steps)]
    elif data.enable_bucket:
        sizes = [size for h, w in data.sizes for size in buckets_of(data, h * w)]
    return min(h for h, _ in sizes), min(w for _, w in sizes)


def always(size: Size, *, cut: Size | None) -> Size | None:
    """One and the same for every image."""
    return cut


def buckets_of(data: ImageOptions, pixels: int, compat: Compat | None = None) -> list[Size]:
    return bucket_sizes(pixels, shortest=data.min_bucket_reso, longest=data.longest_side(compat),
                        step=data.bucket_reso_steps)


def with_sizes(rows: Sequence[Row], data: ImageOptions, compat: Compat | None = None, *, repeats: int = 1
               ) -> Iterator[Row]:
    """A row for every use in an epoch: each image at each of its sizes, `repeats` times, beside each other."""
    choices = size_choices(data, compat)
    return (replace(row, repeat=place * repeats + i, cut=choose(row.size))
            for row in rows for place, choose in enumerate(choices) for i in range(repeats))


def problems(rows: Sequence[Row], data: ImageOptions, where: str) -> Iterator[Problem]:
    """Images that no bucket is small enough for."""
    small = dict.fromkeys(f"{row.id}, {row.size[1]}x{row.size[0]}" for row in rows if row.cut and min(row.cut) < 1)
    if small:
        yield Problem(
            f"{len(small)} of {len({row.id for row in rows})} images are smaller than the smallest bucket", where,
            f"--bucket_no_upscale enlarges none, and a bucket has {data.bucket_reso_steps} px a side at least: "
            f"{listing(small)}", "take these images out, or leave out --bucket_no_upscale", kind="data")


def keeps_more(cuts: Iterable[Size | None], data: ImageOptions) -> str:
    """The flag that would cut less off images which are cut to these sizes, and what it does; "" where none would."""
    if not data.enable_bucket:
        return "--enable_bucket keeps the shape of images"
    sides, step, longest = [side for cut in cuts if cut for side in cut], data.bucket_reso_steps, data.longest_side()
    if data.bucket_no_upscale:
        return ""
    if step <= data.min_bucket_reso // 2 and min(sides) < data.min_bucket_reso + step:
        return f"--min_bucket_reso {data.min_bucket_reso // 2} allows narrower buckets"
    return f"--max_bucket_reso {2 * longest} allows longer buckets" if max(sides) > longest - step else ""


LEAST = 0.85  # of the pixels of --resolution, below which a bucket is told


def warn_small_buckets(rows: Sequence[Row], data: ImageOptions, compat: Compat | None = None) -> None:
    """Tell when --max_bucket_reso makes wide and tall images much smaller than square ones."""
    if not data.enable_bucket or data.bucket_no_upscale:
        return
    longest, pixels = data.longest_side(compat), min(h * w for h, w in data.sizes)
    limit = longest - data.bucket_reso_steps
    small = [row for row in rows if row.cut and max(row.cut) > limit and math.prod(row.cut) < LEAST * pixels]
    if small:
        h, w = min((row.cut for row in small if row.cut), key=math.prod)
        log.warning("--max_bucket_reso %d: %d of %d images are trained on with fewer pixels than --resolution has, the "
                    "smallest at %dx%d, %.0f %% of them; --max_bucket_reso %d lets them have as many",
                    longest, len({row.id for row in small}), len({row.id for row in rows}), w, h,
                    100 * h * w / pixels, 2 * max(size_of(data.resolution)))
