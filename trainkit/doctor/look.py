"""A data set as a training run reads it, and what the pixels of each image say."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from trainkit.data.batch import Row, Sample, Source
from trainkit.data.buckets import with_sizes
from trainkit.data.caption_changes import finished
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import UnreadableImage, decode_alpha, decode_mask
from trainkit.data.looks import Look, Looker
from trainkit.data.masks import MaskVerdict, judge_masks
from trainkit.data.sources.account import LeftOut
from trainkit.data.sources.captions import SIDECARS
from trainkit.data.sources.folder import mask_place
from trainkit.data.sources.kohya import kohya_problems
from trainkit.data.sources.parts import sources_of
from trainkit.data.sources.shards import find_shards
from trainkit.data.sources.table import FILES, SAVED
from trainkit.data.sources.tree import is_image
from trainkit.data.verdicts import Verdict, judge_and_look
from trainkit.data.written_captions import CaptionedFolder, read_captioned_folder
from trainkit.errors import Problem, printable
from trainkit.options import CaptionedDataOptions
from trainkit.options.dataset_config import PARSERS
from trainkit.options.numbered import NUMBERED
from trainkit.runtime.progress import watched

if TYPE_CHECKING:
    from trainkit.options import CaptionOptions, ImageOptions

THUMBNAIL, MANY, SMALL_THUMBNAIL = 256, 1000, 144  # pixels; the small ones where there are many images


@dataclass(frozen=True)
class DataImage:
    """One image file, and what a run makes of it."""

    name: str  # as messages name it
    path: Path
    folder: Path  # the data folder that it is in, as it was given
    captions: tuple[str, ...]  # as trained on; () where it has none
    caption_file: Path | None  # what holds its caption; None: nothing does
    verdict: Verdict
    look: Look | None  # None: it cannot be read
    thumbnail: bytes = b""  # WebP
    samples: tuple[Sample, ...] = ()  # how it is cut; one for each resolution
    repeats: int = 1
    sidecars: tuple[Path, ...] = ()  # its caption files, whether they are read or not
    metadata: Path | None = None  # the metadata that names it
    mask: Path | None = None  # what holds its mask: another file, or with --alpha_mask itself
    mask_verdict: MaskVerdict | None = None  # None: it has no mask
    is_file: bool = True  # False: a row of a table or a member of a shard; `path` only names it

    @property
    def top(self) -> str:
        """The folder right under the data folder, "" for an image that lies in the data folder itself."""
        parts = self.path.relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else ""

    @property
    def visits(self) -> int:
        return self.repeats * len(self.samples)


@dataclass(frozen=True)
class DataSet:
    """All that was found in the folders."""

    options: ImageOptions
    captions: CaptionOptions
    folders: tuple[Path, ...]
    images: list[DataImage]
    prompt: str = ""  # the caption of images without one
    triggers: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)  # that no run would start with
    left_out: list[LeftOut] = field(default_factory=list)
    spare_masks: list[LeftOut] = field(default_factory=list)  # masks of no image

    @cached_property
    def sound(self) -> list[DataImage]:
        return [image for image in self.images if image.look]

    @cached_property
    def visits(self) -> int:
        """Uses of images in an epoch."""
        return sum(image.visits for image in self.sound)


@dataclass(frozen=True)
class _Found:
    """An image that is there by name, with what is said about it."""

    name: str
    path: Path
    folder: Path
    source: Source
    captions: tuple[str, ...]
    repeats: int
    caption_file: Path | None = None
    sidecars: tuple[Path, ...] = ()
    metadata: Path | None = None
    mask: Path | None = None


def is_data_set(path: Path) -> bool:
    """Whether it is a table, shards or a file that names several sources, and no folder of image files."""
    if path.suffix.lower() in PARSERS or find_shards(f"{path}"):
        return True
    tables = path.suffix.lower() in FILES or any((path / name).is_file() for name in SAVED)
    return tables or path.is_dir() and any(path.glob("*.parquet")) and not any(map(is_image, path.iterdir()))


def read_data_set(folders: Sequence[Path], options: ImageOptions, captions: CaptionOptions, *, prompt: str = "",
                  triggers: Sequence[str] = ()) -> DataSet:
    """Everything in the folders and data sets, each image decoded once."""
    found = DataSet(options, captions, tuple(folders), [], prompt, tuple(triggers))
    listed: list[_Found] = []
    for folder in folders:
        read = _from_sources if is_data_set(folder) else _from_folder
        listed += read(folder, found, f"{folder.name}/" if len(folders) > 1 else "")
    look = Shower(Looker(options), THUMBNAIL if len(listed) < MANY else SMALL_THUMBNAIL)
    with watched("images", len(listed)) as show:
        looks = judge_and_look([one.source for one in listed], look, show)
    rows, unclear = finished([_row(one, verdict, prompt) for one, (verdict, _) in zip(listed, looks, strict=True)],
                             captions)
    found.problems.extend(unclear)
    masks = _masks(listed, options)
    for one, (verdict, shown), row in zip(listed, looks, rows, strict=True):
        mask, said = masks.get(one.name, (None, None))
        pixels, thumbnail = shown or (None, b"")
        found.images.append(DataImage(
            one.name, one.path, one.folder, tuple(filter(None, row.all_captions)), one.caption_file, verdict, pixels,
            thumbnail, tuple(_samples(row, options)) if pixels else (), one.repeats, one.sidecars, one.metadata,
            mask, said, isinstance(one.source, Path)))
    return found


def _masks(listed: Sequence[_Found], options: ImageOptions) -> dict[str, tuple[Path, MaskVerdict]]:
    """What holds the mask of each image, and what reading it says, by its name; images without one are left out."""
    there = {one.name: one.mask for one in listed if one.mask}
    verdicts = judge_masks([*there.values()], alpha=options.alpha_mask)
    return {name: (source, verdict) for (name, source), verdict in zip(there.items(), verdicts, strict=True)
            if verdict.refused or any(verdict.size)}


def _from_folder(folder: Path, data: DataSet, start: str) -> list[_Found]:
    read = read_captioned_folder(folder, "--train_data_dir", overwrite=False, ending=data.captions.caption_extension,
                                 caption_column=data.options.caption_column, masks=mask_place(data.options))
    alpha = data.options.alpha_mask
    data.problems.extend([*_kohya(read), *read.problems, *read.masks.problems])
    data.spare_masks.extend(() if alpha else read.masks.left_out)
    data.left_out.extend([*read.left_out, *read.captions.spare])
    sidecars, listed = read.caption_files(), []
    for name, path in read.images.items():
        first, others = read.captions.of(path)
        files, metadata = tuple(sidecars.get(path, ())), _metadata_file(read, path)
        caption_file = metadata if read.captions.named.get(path) else next(iter(files), None)
        listed.append(_Found(printable(start + name), path, read.path, path, (first, *others),
                             _repeats(read.path, path, data.options), caption_file, files, metadata,
                             path if alpha else read.masks.of.get(path)))
    return listed


def _from_sources(path: Path, data: DataSet, start: str) -> list[_Found]:
    """The images of a data set, or of a file that names several sources."""
    flags = {name: getattr(data.options, name) for name in data.options.model_fields_set}
    flag = "dataset_config" if path.suffix.lower() in PARSERS else "dataset_name"
    plan = sources_of(CaptionedDataOptions(**flags | {flag: f"{path}"}), data.captions)
    data.problems.extend(plan.problems)
    listed = []
    for part in plan.parts:
        read = part.read(None)
        data.problems.extend(read.problems)
        data.left_out.extend(read.account.left_out)
        for one in read.listed:
            source = one.source if isinstance(one.source, Path) else None
            folder = Path(part.data.folder) if part.data.folder else source.parent if source else path
            files = tuple(file for ending in SIDECARS if source and (file := source.with_suffix(ending)).is_file())
            mask = source if data.options.alpha_mask else one.mask
            listed.append(_Found(start + part.name + one.id, source or folder / one.id, folder, one.source,
                                 (one.caption or part.prompt, *one.others), part.data.repeats,
                                 next(iter(files), None), files, mask=mask if isinstance(mask, Path) else None))
    return listed


def _row(one: _Found, verdict: Verdict, prompt: str) -> Row:
    first, *others = one.captions
    return Row(one.name, one.source, first or prompt, verdict.size, verdict.digest, others=tuple(others))


def _kohya(read: CaptionedFolder) -> list[Problem]:
    parents = Counter(path.parent for path in read.images.values())
    return kohya_problems(read.path, "--train_data_dir", parents, read.tree)


def _metadata_file(read: CaptionedFolder, image: Path) -> Path | None:
    file = read.captions.files.get(image)
    return next(folder / file for folder in image.parents if (folder / file).is_file()) if file else None


def _repeats(folder: Path, image: Path, options: ImageOptions) -> int:
    """--repeats, or the number in the name of a kohya folder."""
    parts = image.relative_to(folder).parts
    match = NUMBERED.fullmatch(parts[0] if len(parts) > 1 else folder.absolute().name)
    return int(match[1]) if match and options.repeats == 1 else options.repeats


def _samples(row: Row, options: ImageOptions) -> Iterator[Sample]:
    """How the image is cut at each resolution: out of the middle, as the mean of all random places."""
    policy = CropPolicy(resolution=options.resolution, center_crop=True)
    for sized in with_sizes([row], options):
        if not sized.cut or min(sized.cut) > 0:  # else it is smaller than the smallest bucket
            yield policy.variants(sized, seed=0)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


@dataclass(frozen=True)
class Shower:
    """Measures an image that was decoded, and makes it small."""

    look: Looker
    side: int

    def __call__(self, image: Image.Image) -> tuple[Look, bytes]:
        return self.look(image), _thumbnail(image, self.side)


def mask_thumbnail(source: Path, *, alpha: bool) -> bytes:
    """A mask as a WebP, small; nothing where it can no longer be read."""
    try:
        mask = (decode_alpha if alpha else decode_mask)(source.read_bytes())
    except (OSError, UnreadableImage):
        return b""
    return _thumbnail(mask, SMALL_THUMBNAIL) if mask else b""


def _thumbnail(image: Image.Image, side: int) -> bytes:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small.save(buffer, format="WEBP", quality=70)
    return buffer.getvalue()
