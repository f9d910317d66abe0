"""Masks: which places of an image count in the loss, read once at the start, and cut as the image is at each visit.

In a mask 255 is trained on and 0 is not, as in OneTrainer and in kohya's trainers. A mask of another size than its
image is scaled with it. In the latent a place has the mean of the pixels that it stands for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from trainkit import digests
from trainkit.data import images
from trainkit.data.batch import Mask, Row, Sample, Source
from trainkit.data.cache import Store, content_key, fill_together, missing_views, own_part
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import UnreadableImage, content_digest, decode_alpha, decode_mask, load_mask
from trainkit.data.sources.text import one_line
from trainkit.data.verdicts import DECODERS, recalled
from trainkit.errors import Problem, counted, listing

if TYPE_CHECKING:
    from PIL import Image

    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the mask of the same key would come out differently
MEANT_AS_ONE = 1  # a mask with no higher level is black to the eye, and was probably written as 0 and 1
BLACK = "black everywhere, so nothing of the image is trained on"
WHITE = "white everywhere, so the whole image is trained on"
ALMOST_BLACK = "almost black: it has no level above 1, and levels go to 255"
OTHER_SHAPE = 0.02  # of the ratio of width and height: what rounding to pixels does not explain


@dataclass(frozen=True)
class MaskVerdict:
    """What reading a mask says."""

    size: tuple[int, int] = (0, 0)  # h, w, upright; (0, 0): the image has no transparency
    digest: str = ""  # of the file's content
    area: float = 1.0  # mean of the mask, 0 to 1
    lowest: int = 255
    highest: int = 255
    refused: str = ""  # why it cannot be used

    @property
    def remark(self) -> str:
        """What makes it no mask though it can be read; "": it covers some places and leaves others."""
        if not self.highest:
            return BLACK
        return WHITE if self.lowest == 255 else ALMOST_BLACK if self.highest <= MEANT_AS_ONE else ""

    def pack(self) -> str:
        return json.dumps([self.size, self.digest, self.area, self.lowest, self.highest])

    @classmethod
    def unpack(cls, text: str) -> MaskVerdict:
        (h, w), digest, area, lowest, highest = json.loads(text)
        return cls((h, w), digest, area, lowest, highest)


def judge_masks(sources: Sequence[Source], *, alpha: bool) -> list[MaskVerdict]:
    """A verdict on each mask; those that earlier runs read, and that were not touched since, are not read again.

    alpha  whether the sources are images whose transparency is meant
    """
    version = f"{digests.code_version(images, sys.modules[__name__])} {PIL.__version__} {' '.join(images.FORMATS)}"
    decoder = decode_alpha if alpha else decode_mask
    return recalled(sources, "transparency" if alpha else "mask", version, MaskVerdict.unpack,
                    partial(_read_all, decoder=decoder))


def _read_all(sources: Sequence[Source], decoder: Callable[[bytes], Image.Image | None]) -> list[MaskVerdict]:
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(partial(_read, decoder=decoder), sources))


def _read(source: Source, decoder: Callable[[bytes], Image.Image | None]) -> MaskVerdict:
    try:
        data = source.read_bytes()
        mask = decoder(data)
    except (OSError, UnreadableImage) as error:
        return MaskVerdict(refused=one_line(f"{error}"))
    if mask is None:
        return MaskVerdict(digest=content_digest(data))
    levels = np.asarray(mask)
    return MaskVerdict((mask.height, mask.width), content_digest(data), float(levels.mean() / 255),
                       int(levels.min()), int(levels.max()))


def has_another_shape(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask (h, w) cannot be of an image (h, w) that was scaled and rounded to whole pixels."""
    (h, w), (height, width) = mask, image
    fits = abs(w - h * width / height) <= 1 or abs(h - w * height / width) <= 1
    return not fits and abs(w * height / (h * width) - 1) > OTHER_SHAPE


# ----------------------------------------------------------------------------------------------------------------------
# At the start


@dataclass
class MaskedRows:
    """Rows with their masks, and what is wrong with masks.

    bad  rows whose mask cannot be used, with the reason; they are not among the others
    """

    rows: list[Row]
    bad: list[tuple[Row, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def masks(self) -> list[Mask]:
        return [row.mask for row in self.rows if row.mask]


def with_masks(rows: Sequence[Row], sources: Mapping[str, Source], data: ImageOptions, where: str,
               judge: Callable[[Sequence[str], Sequence[Source]], list[MaskVerdict]]) -> MaskedRows:
    """The rows with their masks, each read once. What a user should know of them is logged.

    sources  what holds the mask of a row, by its id
    where    the data set, for messages
    judge    ids of rows, what holds their masks -> a verdict on each
    """
    if not data.masked:
        return MaskedRows([*rows])
    names = [row.id for row in rows if row.id in sources]
    verdicts = dict(zip(names, judge(names, [sources[name] for name in names]), strict=True))
    found = MaskedRows([])
    for row in rows:
        verdict = verdicts.get(row.id, MaskVerdict())
        if why := refusal(verdict, row.size):
            found.bad.append((row, why))
            continue
        mask = Mask(sources[row.id], verdict.digest, data.alpha_mask, verdict.area,
                    fills=data.fill_masked_area) if any(verdict.size) else None
        found.rows.append(replace(row, mask=mask))
    found.problems = [*_problems(found, verdicts, data, where)]
    if found.masks and not found.problems:
        _report(found, verdicts)
    return found


def refusal(verdict: MaskVerdict, image: tuple[int, int]) -> str:
    """Why a mask cannot be that of an image (h, w); "": it can."""
    if verdict.refused:
        return f"its mask cannot be read: {verdict.refused}"
    if not any(verdict.size) or not has_another_shape(verdict.size, image):
        return ""
    (h, w), (height, width) = verdict.size, image
    turned = not has_another_shape((w, h), image)
    hint = "; turned by 90° it would fit: save it as viewers show the image" if turned else ""
    return f"its mask is {w}x{h} and the image {width}x{height}, which is another shape{hint}"


def _problems(found: MaskedRows, verdicts: Mapping[str, MaskVerdict], data: ImageOptions, where: str
              ) -> Iterator[Problem]:
    if found.bad and not (data.bad_images == "skip" and found.rows):
        yield Problem(f"{counted(len(found.bad), 'mask')} of {len(found.rows) + len(found.bad)} images cannot be used",
                      where, listing(f"{row.id}: {why}" for row, why in found.bad),
                      "make these masks anew, in the shape of their images", kind="data")
    elif verdicts and data.alpha_mask and not found.masks:
        yield Problem("no image has a mask", f"--alpha_mask, {where}", "no image has transparency",
                      "save the images with transparency, as PNG or WebP, or leave out --alpha_mask", kind="data")
    elif found.rows and not data.unmasked_weight and all(row.mask and not row.mask.area for row in found.rows):
        yield Problem("all masks are black", where, "no place of any image would be trained on",
                      "what is to be trained on is white in a mask (255): paint it, or invert the masks", kind="data")


def _report(found: MaskedRows, verdicts: Mapping[str, MaskVerdict]) -> None:
    """Say which images have no mask, and which masks do not do what masks are for."""
    def named(names: Sequence[str], one: str, several: str, what: str) -> None:
        if names:
            log.warning("%s %s: %s", counted(len(names), one, several), what, listing(names))

    ids = {row.id for row in found.rows}
    read = {name: verdict for name, verdict in verdicts.items() if name in ids and any(verdict.size)}
    named([row.id for row in found.rows if not row.mask], "image without a mask is", "images without a mask are",
          "trained on as a whole")
    for remark in (BLACK, ALMOST_BLACK, WHITE):
        named([name for name, verdict in read.items() if verdict.remark == remark], "mask is", "masks are", remark)


# ----------------------------------------------------------------------------------------------------------------------
# At each visit


class Masks:
    """Sample -> the factor on the loss of each place of its latent [1,h,w]; 1 everywhere for a row without a mask.

        max(m, least)               m = mean of the mask over the pixels of the place, 0 to 1
        max(m, least) / its mean    with `normalized`; 0 where nothing of the mask is in the crop

    factor  pixels a side of a place of the latent
    store   where m is kept of every way to see an image, by `fill`; None: the mask is read at each visit
    """

    def __init__(self, policy: CropPolicy, *, factor: int, least: float = 0.0, normalized: bool = False,
                 store: Store | None = None):
        self.policy, self.factor, self.least, self.normalized, self.store = policy, factor, least, normalized, store

    def __call__(self, sample: Sample) -> Tensor:
        """Raises UserError when the mask can no longer be read."""
        if sample.row.mask is None:
            h, w = sample.shape
            return torch.ones(1, h // self.factor, w // self.factor)
        means = self.store[self.key(sample)]["mask"] if self.store is not None else self.means([sample])[0]
        weights = means.clamp(min=self.least)
        return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny) if self.normalized else weights

    def means(self, samples: Sequence[Sample]) -> Tensor:
        """m of several samples of one image -> [V,1,h,w]. Cut as the image is; scaled by plain means, since filters
        that sharpen would brighten what is black beside an edge.
        """
        pixels = self.policy.views(load_mask(samples[0].row), samples, "box")  # [V,1,H,W] in -1..1
        return avg_pool2d(pixels / 2 + 0.5, self.factor)

    def key(self, sample: Sample) -> str:
        assert sample.row.mask is not None
        crop = [*sample.resized, sample.top, sample.left, sample.flip, *sample.shape]
        return content_key("mask", VERSION, sample.row.mask.digest, sample.row.mask.alpha, crop, self.factor)

    def fill(self, rows: Sequence[Row], *, seed: int) -> None:
        """Put m of every variant of every row into the store, where it lacks it; each rank makes a part."""
        assert self.store is not None, "there is no store to fill"
        masked = [row for row in rows if row.mask]
        fill_together(self.store, masked, own_part(masked), partial(self._fill, self.store, seed=seed))

    def _fill(self, store: Store, rows: Sequence[Row], *, seed: int) -> None:
        missing = missing_views(partial(self._all_views, rows, seed), store)
        for _, views in groupby(missing, key=lambda view: (view[1].row.id, view[1].resized)):
            keys, samples = zip(*views, strict=True)
            for key, mask in zip(keys, self.means(samples), strict=True):
                store[key] = {"mask": mask.clone()}  # else it would keep its whole batch alive

    def _all_views(self, rows: Sequence[Row], seed: int) -> Iterator[tuple[str, Sample]]:
        return ((self.key(sample), sample) for row in rows for sample in self.policy.variants(row, seed))
