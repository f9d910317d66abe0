"""The sources that a run reads, each with the options it is read and trained with: one, or several of a plan.

Several come from the file of --dataset_config, or from folders named as kohya's trainers want them (`10_sks dog`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from trainkit.data.batch import Handling
from trainkit.data.sources.account import LeftOut, SourceListing
from trainkit.data.sources.folder import Folder, list_image_folder, mask_place, read_folder
from trainkit.data.sources.kohya import beside_numbered, layout_in_use
from trainkit.data.sources.metadata_file import read_metadata_file
from trainkit.data.sources.shards import find_shards, list_shards
from trainkit.data.sources.table import READERS, list_table
from trainkit.errors import Problem, printable
from trainkit.options.dataset_config import FLAG, SourceSpec, found_path, read_dataset_config
from trainkit.options.rules import bucket_problems

if TYPE_CHECKING:
    from trainkit.options import CaptionOptions, Compat, ImageOptions, PriorOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One source of images.

    name           stands in front of the names of its images; "" where a run has one source
    where          what a message calls it; "" for what the flags name
    prompt         the caption of its images without one
    flat           subfolders are passed over, as kohya's trainers do
    metadata_file  in kohya's form: it names the images and their captions
    settings       its own, where they differ from those of the run
    """

    data: ImageOptions
    captions: CaptionOptions
    name: str = ""
    where: str = ""
    prompt: str = ""
    is_class: bool = False
    loss_weight: float = 1.0
    flat: bool = False
    metadata_file: Path | None = None
    settings: Handling | None = None

    @property
    def place(self) -> str:
        """Where its images are, for a message."""
        place = printable(f"{self.metadata_file or self.data.dataset_name or self.data.folder}")
        return f"{place} ({self.where})" if self.where else place

    def read(self, compat: Compat | None) -> SourceListing:
        """The images that are there, by name, with their captions; and an account of all files."""
        data, ending = self.data, self.captions.extension(compat)
        if self.metadata_file is not None:
            return read_metadata_file(self.metadata_file, Path(data.folder) if data.folder else None, self.captions)
        if data.dataset_name and (shards := find_shards(data.dataset_name)):
            return list_shards(data, shards, ending)
        if data.dataset_name:
            return list_table(data)
        if not self.where:
            return list_image_folder(data, ending)
        flag = f"{self.where}: image_dir" if self.where.startswith(FLAG) else f"{self.where}:"
        return read_folder(Folder(Path(f"{data.folder}"), flag, "the prompt" if self.prompt else None,
                                  data.wanted_column, data.image_column, data.captioned, ending,
                                  mask_place(data), self.flat))


@dataclass
class SourcePlan:
    """All sources of a run, and what is wrong with what names them."""

    parts: list[Part]
    problems: list[Problem] = field(default_factory=list)
    note: str = ""  # how they were found, for the line a run starts with
    left_out: tuple[LeftOut, ...] = ()  # beside them


def sources_of(data: ImageOptions, captions: CaptionOptions, compat: Compat | None = None,
               prior: PriorOptions | None = None) -> SourcePlan:
    """What the flags name: one folder or data set, folders with numbers of repeats, or the sources of a file."""
    if data.captioned and data.folder and data.dataset_name in READERS and not Path(data.dataset_name).exists():
        # As in the Diffusers scripts: --dataset_name parquet --train_data_dir FOLDER
        named = None if data.dataset_name == "imagefolder" else data.folder
        data = data.model_copy(update={"dataset_name": named})
    class_weight = prior.prior_loss_weight if prior else 1.0
    found = _of_config(data, captions, class_weight) if data.dataset_config else \
        _of_numbers(data, captions, compat) or SourcePlan([Part(data, captions, prompt=data.prompt)])
    if prior and prior.with_prior_preservation and prior.class_data_dir:
        found.parts += _class_parts(Path(prior.class_data_dir), data, captions, compat, class_weight)
    several = len(found.parts) > 1 or bool(found.parts and found.parts[0].where)
    found.parts = _named([_with_own(part, data, captions) for part in found.parts]) if several else found.parts
    for part in found.parts:
        if part.where:
            found.problems += [replace(wrong, where=f"{part.where}: {wrong.where}")
                               for wrong in bucket_problems(part.data.model_dump() | {"compat": compat})]
    return found


def image_options(data: ImageOptions) -> list[ImageOptions]:
    """Of each source, as far as its file can be read; what cannot be is told when the sources are."""
    if not data.dataset_config:
        return [data]
    config = read_dataset_config(Path(data.dataset_config))
    found = []
    for source in config.sources:
        try:
            found.append(_with(data, source.images))
        except ValidationError:
            continue
    return found or [data]


def _with(data: ImageOptions, values: Mapping[str, object], **source: object) -> ImageOptions:
    """The options with other values, checked; `source` names the images instead of what named them."""
    said = {name: getattr(data, name) for name in data.model_fields_set}
    without = {data.folder_flag, "dataset_name", "dataset_config"} if source else {"dataset_config"}
    return type(data)(**{name: value for name, value in said.items() if name not in without} | dict(values) | source)


def _with_own(part: Part, data: ImageOptions, captions: CaptionOptions) -> Part:
    """With its settings, where they are not those of the run."""
    batch = part.settings.batch_size if part.settings else None
    settings = Handling(part.captions, part.data.random_flip, part.data.center_crop, part.data.image_interpolation_mode,
                   batch)
    of_run = Handling(captions, data.random_flip, data.center_crop, data.image_interpolation_mode)
    return replace(part, settings=None if settings == of_run else settings)


def _named(parts: Sequence[Part]) -> list[Part]:
    """With names that tell the images of all sources apart, and are the same on every machine."""
    names: Counter[str] = Counter()
    named = []
    for part in parts:
        base = printable(_name_of(part)) + ("/" if not part.is_class else " (class)/")
        names[base] += 1
        number = names[base]
        named.append(replace(part, name=base if number == 1 else f"{base[:-1]}#{number}/"))
    return named


def _name_of(part: Part) -> str:
    if part.data.dataset_name:
        return part.data.dataset_name.rstrip("/").rpartition("/")[2]
    return Path(f"{part.data.folder or part.metadata_file}").absolute().name


# ----------------------------------------------------------------------------------------------------------------------
# The sources of a file


def _of_config(data: ImageOptions, captions: CaptionOptions, class_weight: float) -> SourcePlan:
    path = Path(data.dataset_config or "")
    config = read_dataset_config(path)
    found = SourcePlan([], [*config.problems])
    groups: set[tuple[int, str | None, str | None]] = set()
    for source in config.sources:
        key = source.group, source.metadata_file or source.image_dir, source.dataset_name
        twice = source.name.startswith("[[datasets") and key in groups
        groups.add(key)
        if twice:
            log.warning("%s, %s: it names the images of an earlier subset of the data set, which is used alone, as in "
                        "kohya's trainers", printable(path.name), source.name)
            continue
        try:
            found.parts.append(_of_source(source, path, data, captions, class_weight))
        except ValidationError as error:
            found.problems += [_bad_value(source, path, one["loc"][0], one["msg"], one["input"])
                               for one in error.errors()]
    if found.parts and all(part.is_class for part in found.parts) and not found.problems:
        found.problems.append(Problem("no images of your own", f"{FLAG} {printable(str(path))}",
                                      "all sources hold class images (is_reg)", "add a source without is_reg"))
    return found


def _of_source(source: SourceSpec, path: Path, data: ImageOptions, captions: CaptionOptions, class_weight: float
               ) -> Part:
    """Raises ValidationError: a value is none that the flag may have."""
    where = f"{FLAG} {printable(path.name)}, {source.name}"
    written = {"image_dir": source.image_dir, "metadata_file": source.metadata_file,
               "conditioning_data_dir": source.images.get("conditioning_data_dir")}
    places = {name: found_path(f"{place}", path) for name, place in written.items() if place}
    for _, note in places.values():
        if note:
            log.warning("%s", note)
    folder = f"{places['image_dir'][0]}" if "image_dir" in places else None
    masks = {name: f"{place}" for name, (place, _) in places.items() if name == "conditioning_data_dir"}
    named = {"dataset_name": source.dataset_name} if source.dataset_name else {data.folder_flag: folder}
    weight = source.loss_weight if source.loss_weight is not None else class_weight if source.is_class else 1.0
    batch = Handling(captions, batch_size=source.batch_size)
    said = {name: getattr(captions, name) for name in captions.model_fields_set}
    return Part(
        _with(data, {**source.images, **masks}, **named), type(captions)(**said | dict(source.captions)), where=where,
        prompt=data.prompt if source.prompt is None else source.prompt, is_class=source.is_class, loss_weight=weight,
        flat=source.name.startswith("[[datasets"),
        metadata_file=places["metadata_file"][0] if "metadata_file" in places else None, settings=batch)


def _bad_value(source: SourceSpec, path: Path, name: object, why: str, value: object) -> Problem:
    why = why.removeprefix("Value error, ").replace("Input should", "it should")
    return Problem(f"{name} cannot be {value!r}", f"{FLAG} {printable(str(path))}, {source.name}", why,
                   f"--help {name} says what it may be")


# ----------------------------------------------------------------------------------------------------------------------
# Folders with numbers


def _of_numbers(data: ImageOptions, captions: CaptionOptions, compat: Compat | None) -> SourcePlan | None:
    """The sources of a folder in kohya's layout; None where it is none, or not meant as one."""
    if data.dataset_name or not data.folder:
        return None
    folder = Path(data.folder)
    found = layout_in_use(folder, always=compat == "kohya")
    if not found:
        return None
    parts = _numbered_parts(found, folder, data, captions)
    if data.prompt and any(part.prompt for part in parts):
        log.warning("images without a caption are captioned with the words of their folder, not with --%s",
                    data.prompt_flag)
    return SourcePlan(parts, note="read as kohya's trainers do: the names of its folders say repeats and prompts",
                 left_out=tuple(beside_numbered(folder, found)))


def _numbered_parts(found: Mapping[Path, re.Match[str]], folder: Path, data: ImageOptions, captions: CaptionOptions,
                    ) -> list[Part]:
    """--repeats, where it is given, goes before the numbers."""
    given = "repeats" in data.model_fields_set and data.repeats != 1
    part_of = partial(Part, captions=captions, flat=True)
    return [part_of(_with(data, {} if given else {"repeats": int(match[1])}, **{data.folder_flag: f"{path}"}),
                    where=printable(f"{folder.name}/{path.name}"), prompt=match[2]) for path, match in found.items()]


def _class_parts(folder: Path, data: ImageOptions, captions: CaptionOptions, compat: Compat | None, weight: float,
                 ) -> list[Part]:
    """The class images of a folder in kohya's layout; others are read, and generated, by `class_images`."""
    found = layout_in_use(folder, always=compat == "kohya")
    plain = type(captions)(caption_extension=captions.caption_extension)  # their captions stay what they are
    return [replace(part, is_class=True, loss_weight=weight) for part in _numbered_parts(found, folder, data, plain)]
