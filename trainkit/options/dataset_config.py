"""Files that name several sources of images, each with settings of its own: --dataset_config, as kohya's trainers read.

A file has [general] and [[datasets]] with [[datasets.subsets]], as in kohya's sd-scripts (docs/config_README-en.md and
library/config_util.py at 48d368f); or [[sources]], one table a source. A key is kohya's or the name of our flag. What a
subset does not say, its data set says, then [general], then the flags of the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainkit.errors import Problem, printable, shell_word
from trainkit.options.names import nearest
from trainkit.options.sizes import read_resolution, sides_of
from trainkit.reading import parse_json, parse_toml, read_text

TableLevel = Literal["general", "datasets", "subsets", "sources"]
FLAG = "--dataset_config"
PARSERS = {".toml": parse_toml, ".json": parse_json}
WHERE_IMAGES = ("image_dir", "dataset_name", "metadata_file")  # one of them says where a source's images are
FILTERS = {  # kohya's names of interpolations: ours
    "lanczos": "lanczos", "nearest": "nearest", "bilinear": "bilinear", "linear": "bilinear", "bicubic": "bicubic",
    "cubic": "bicubic", "area": "box", "box": "box", "hamming": "hamming",
}
RENAMED = {  # kohya's name or ours: as `SourceSpec` and the flags call it
    "num_repeats": "repeats", "class_tokens": "prompt", "is_reg": "is_class", "flip_aug": "random_flip",
    "batch_size": "train_batch_size", "resize_interpolation": "image_interpolation_mode", "folder": "image_dir",
    "instance_data_dir": "image_dir", "train_data_dir": "image_dir", "instance_prompt": "prompt",
}
OF_IMAGES = (  # flags that each source may have a value of its own for
    "repeats", "resolution", "resolutions", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
    "bucket_no_upscale", "center_crop", "random_flip", "image_interpolation_mode", "image_column", "caption_column",
    "dataset_config_name", "dataset_revision", "alpha_mask", "conditioning_data_dir",
)
OF_CAPTIONS = (
    "caption_extension", "caption_prefix", "caption_suffix", "caption_dropout_rate", "caption_dropout_every_n_epochs",
    "shuffle_caption", "keep_tokens", "keep_tokens_separator", "caption_tag_dropout_rate", "caption_separator",
    "secondary_separator", "enable_wildcard",
)
OF_SOURCES = (*WHERE_IMAGES, "prompt", "is_class", "loss_weight", "train_batch_size", "random_crop")
OF_ONE_SOURCE = (*WHERE_IMAGES, "is_class")  # said by no other table than that of the source
KNOWN = frozenset({*OF_IMAGES, *OF_CAPTIONS, *OF_SOURCES})


@dataclass(frozen=True)
class Without:
    """A key of kohya's that we have no use for.

    harmless  the values with which it asks for nothing; None: every value
    instead   what to do where it asks for something
    """

    harmless: tuple[object, ...] | None
    instead: str = ""


WITHOUT = {
    "color_aug": Without((False,), "colours are never changed here: save variants of the images as files of their own"),
    "face_crop_aug_range": Without((None,), "crops around faces are not made: crop the images yourself"),
    "token_warmup_min": Without(None),
    "token_warmup_step": Without((0,), "the number of tags does not grow with the steps: caption_tag_dropout_rate = "
                                 "0.1 leaves out some in all steps"),
    "cache_info": Without(None),  # what reading an image says is always remembered
    "custom_attributes": Without(None),  # for programs of one's own
    "validation_seed": Without(None),
    "validation_split": Without((0,), "a loss on images kept aside is not there yet: move them into a folder of their "
                                "own, and watch --validation_prompt"),
    "network_multiplier": Without((1,), "the adapter has its full strength for all images: loss_weight = 0.5 lets a "
                                  "source count half"),
}


@dataclass(frozen=True)
class SourceSpec:
    """One source of images, everything inherited.

    name        of its table, for messages: "[[datasets]] 1, subset 2"
    group       the data set it belongs to, from 0: a folder that stands in one twice is read once
    images      values of ImageOptions by flag, still as they were written
    captions    values of CaptionOptions by flag, likewise
    batch_size  images of it in a forward pass at most
    """

    name: str
    group: int
    image_dir: str | None = None
    dataset_name: str | None = None
    metadata_file: str | None = None
    prompt: str | None = None
    is_class: bool = False
    loss_weight: float | None = None
    batch_size: int | None = None
    images: Mapping[str, object] = field(default_factory=dict)
    captions: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetConfig:
    """What a file says; without sources where there are problems."""

    path: Path
    sources: tuple[SourceSpec, ...] = ()
    problems: tuple[Problem, ...] = ()

    def run_values(self) -> dict[str, object]:
        """Flags of the run that the file decides: what all sources say alike, the largest size and batch.

        Previews have the largest resolution, and a step as many images as the largest batch.
        """
        said: dict[str, list[object]] = {}
        for source in self.sources:
            batch = {} if source.batch_size is None else {"train_batch_size": source.batch_size}
            for name, value in {**source.images, **source.captions, **batch}.items():
                said.setdefault(name, []).append(value)
        complete = {name: values for name, values in said.items() if len(values) == len(self.sources)}
        found = {name: values[0] for name, values in complete.items() if all(value == values[0] for value in values)}
        largest: dict[str, Callable[[object], int]] = {"resolution": pixels, "train_batch_size": lambda n: int(f"{n}")}
        return found | {name: max(complete[name], key=rank) for name, rank in largest.items() if name in complete}


def pixels(resolution: object) -> int:
    """Of an image of this --resolution."""
    sides = sides_of(read_resolution(resolution))
    return math.prod(sides) if len(sides) > 1 else sides[0] ** 2


def read_dataset_config(path: Path) -> DatasetConfig:
    """The sources that a file names; everything that is wrong with it, at once."""
    try:
        table = _parse(path)
    except (OSError, ValueError) as error:
        return DatasetConfig(path, problems=(_unreadable(path, error),))
    problems = [*_unknown_tables(path, table)]
    sources, more = _sources(path, table)
    problems += more
    if not (sources or problems):
        problems.append(Problem("no source of images", f"{FLAG} {printable(str(path))}",
                                "the file has neither [[datasets.subsets]] nor [[sources]] that is used",
                                "[[sources]] with image_dir = 'FOLDER' below it", kind="data"))
    return DatasetConfig(path, () if problems else tuple(sources), tuple(problems))


def _parse(path: Path) -> dict[str, object]:
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ValueError(f"{path.suffix or 'no ending'} is not one of {', '.join(PARSERS)}")
    table = parse(read_text(path, of_windows=True))
    if not isinstance(table, dict):
        raise ValueError("it holds no tables")
    return table


def _unreadable(path: Path, error: Exception) -> Problem:
    why = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
    fix = f"put the file there, or name another one: {FLAG} FILE.toml" if isinstance(error, OSError) else \
        "correct this place in the file"
    if re.search(r"escape|backslash|'\\\\'", why, re.IGNORECASE):  # "C:\images"
        fix = r"write paths with a backslash in single quotes: image_dir = 'C:\images'"
    if "overwrite" in why.lower():
        fix = "the key stands there twice: delete one of the two lines"
    return Problem("the file of data sets cannot be read", f"{FLAG} {printable(str(path))}", why, fix)


def _unknown_tables(path: Path, table: Mapping[str, object]) -> Iterator[Problem]:
    known = {"general": dict, "datasets": list, "sources": list}
    for name, value in table.items():
        where = f"{FLAG} {printable(str(path))}"
        if name not in known:
            match = nearest(name, ["general", "datasets", "sources"])
            place = f"did you mean {match}? else " if match else "" if name not in KNOWN | {*RENAMED} else \
                "move it below [general]; else "
            yield Problem(f"unknown table or key {printable(name)}", where,
                          "the file has [general], [[datasets]] with [[datasets.subsets]], and [[sources]]",
                          f"{place}remove it")
        elif not _is_of(value, known[name]):
            written = f"[{name}]" if known[name] is dict else f"[[{name}]]"
            yield Problem(f"{name} is no {written}", where, "it is one table" if name == "general" else
                          "it is a list of tables, each of which begins so", f"write {written}")


def _is_of(value: object, kind: type) -> bool:
    inner = value if isinstance(value, list) else []
    return isinstance(value, kind) and all(isinstance(one, dict) for one in inner)


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def _sources(path: Path, table: Mapping[str, object]) -> tuple[list[SourceSpec], list[Problem]]:
    problems: list[Problem] = []
    general = _read(path, "[general]", "general", _tables(table.get("general"), one=True)[0], problems)
    found: list[SourceSpec | None] = []
    for number, dataset in enumerate(_tables(table.get("datasets"))):
        subsets = _tables(dataset.get("subsets"))
        name = f"[[datasets]] {number + 1}"
        above = general | _read(path, name, "datasets", dataset, problems)
        if not subsets:
            problems.append(Problem(f"{name} has no subset", f"{FLAG} {printable(str(path))}",
                                    "its images are named in [[datasets.subsets]]",
                                    "[[datasets.subsets]] with image_dir = 'FOLDER' below it"))
        problems += _mixed(path, name, subsets)
        for i, subset in enumerate(subsets):
            place = f"{name}, subset {i + 1}"
            values = above | _read(path, place, "subsets", subset, problems)
            found.append(_source(path, place, number, values, problems))
    for number, one in enumerate(_tables(table.get("sources"))):
        name = f"[[sources]] {number + 1}"
        values = general | _read(path, name, "sources", one, problems)
        found.append(_source(path, name, len(_tables(table.get("datasets"))), values, problems))
    return [source for source in found if source], problems


def _tables(value: object, *, one: bool = False) -> list[dict[str, object]]:
    if one:
        return [value if isinstance(value, dict) else {}]
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []


def _mixed(path: Path, name: str, subsets: Sequence[Mapping[str, object]]) -> Iterator[Problem]:
    with_metadata = ["metadata_file" in subset for subset in subsets]
    if any(with_metadata) and not all(with_metadata):
        yield Problem(f"{name} has subsets with and without metadata_file", f"{FLAG} {printable(str(path))}",
                      "kohya's trainers refuse it, because the two are read in different ways",
                      "move the subsets with metadata_file into a [[datasets]] of their own")


def _read(path: Path, place: str, level: TableLevel, table: Mapping[str, object], problems: list[Problem]
          ) -> dict[str, object]:
    """The values of one table under our names; what cannot be used is a problem."""
    values: dict[str, object] = {}
    for key, value in table.items():
        if key == "subsets" and level == "datasets":
            if not _is_of(value, list):
                problems.append(_problem(path, place, "subsets is no [[datasets.subsets]]", "it is a list of tables",
                                         "write [[datasets.subsets]]"))
            continue
        name = RENAMED.get(key, key)
        if name in values:
            problems.append(_problem(path, place, f"{printable(key)} is given twice, under two names",
                                     "which of the two counts would be a guess", "remove one"))
        if problem := _incompatible(path, place, level, key, name, value):
            problems.append(problem)
        elif name in KNOWN:
            values[name] = value
    return values


def _incompatible(path: Path, place: str, level: TableLevel, key: str, name: str, value: object) -> Problem | None:
    if key in WITHOUT:
        without = WITHOUT[key]
        asks = without.harmless is not None and value not in without.harmless
        return _problem(path, place, f"{key} = {_written(value)} cannot be done", without.instead,
                        f"remove {key}") if asks else None
    if name not in KNOWN:
        match = nearest(key, [*RENAMED, *KNOWN, *WITHOUT])
        return _problem(path, place, f"unknown key {printable(key)}", "neither kohya's trainers nor this one read it",
                        f"did you mean {match}? else remove it" if match else "remove it")
    if name in OF_ONE_SOURCE and level in ("general", "datasets"):
        return _problem(path, place, f"{key} stands in the wrong table", "it belongs to one source of images",
                        f"move it below [[{'datasets.subsets' if level == 'datasets' else 'sources'}]]")
    return _wrong_value(path, place, key, name, value)


SWITCHES = {"is_class", "random_crop", "enable_bucket", "bucket_no_upscale", "center_crop", "random_flip",
            "shuffle_caption", "enable_wildcard"}
TEXTS = {*WHERE_IMAGES, "prompt", "caption_extension", "caption_prefix", "caption_suffix", "caption_separator",
         "keep_tokens_separator", "secondary_separator"}
NUMBERS = {"repeats": 0, "train_batch_size": 1, "loss_weight": 0}  # the smallest one


def _wrong_value(path: Path, place: str, key: str, name: str, value: object) -> Problem | None:
    """What the flags' own limits do not say."""
    wanted = ""
    if name in SWITCHES and not isinstance(value, bool):
        wanted = "true or false"
    elif name in TEXTS and not isinstance(value, str):
        wanted = "text in quotes"
    elif name in NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < NUMBERS[name]
                              or name != "loss_weight" and not isinstance(value, int)):
        wanted = f"a {'number' if name == 'loss_weight' else 'whole number'} from {NUMBERS[name]} on"
    elif key == "resize_interpolation" and value not in FILTERS:
        wanted = f"one of {', '.join(FILTERS)}"
    elif name == "resolution":
        try:
            read_resolution(value)
        except ValueError as error:
            return _problem(path, place, f"{key} cannot be {_written(value)}", f"{error}", f"{key} = 1024")
    return _problem(path, place, f"{key} cannot be {_written(value)}", f"it is {wanted}", f"{key} = {wanted}") \
        if wanted else None


def _written(value: object) -> str:
    return printable(str(value).lower() if isinstance(value, bool) else repr(value))[:80]


def _problem(path: Path, place: str, what: str, why: str, fix: str) -> Problem:
    return Problem(what, f"{FLAG} {printable(str(path))}, {place}", why, fix)


def _source(path: Path, place: str, group: int, values: Mapping[str, object], problems: list[Problem]
            ) -> SourceSpec | None:
    """None: it is not used, or cannot be."""
    given = [name for name in WHERE_IMAGES if name in values]
    if not given:
        problems.append(_problem(path, place, "no images are named", "a source has image_dir, or dataset_name",
                                 "image_dir = 'FOLDER'"))
    if "dataset_name" in given and len(given) > 1:
        problems.append(_problem(path, place, f"dataset_name and {given[0]}", "a source is one of them",
                                 f"remove {given[0]}"))
    if not given or values.get("repeats") == 0:
        return None
    images = {name: values[name] for name in OF_IMAGES if name in values}
    if "random_crop" in values:
        images.setdefault("center_crop", not values["random_crop"])
    if "image_interpolation_mode" in images:
        images["image_interpolation_mode"] = FILTERS.get(str(images["image_interpolation_mode"]),
                                                         images["image_interpolation_mode"])
    text = {name: value for name, value in values.items() if isinstance(value, str)}
    batch, weight = values.get("train_batch_size"), values.get("loss_weight")
    return SourceSpec(
        place, group, text.get("image_dir"), text.get("dataset_name"), text.get("metadata_file"), text.get("prompt"),
        bool(values.get("is_class")), float(weight) if isinstance(weight, (int, float)) else None,
        batch if isinstance(batch, int) else None, images,
        {name: values[name] for name in OF_CAPTIONS if name in values and values[name] != ""})


# ----------------------------------------------------------------------------------------------------------------------
# Places


def found_path(path: str, config: Path) -> tuple[Path, str]:
    """(a file or folder that the file names, what to say about where it was found).

    A relative path counts from the folder that the program is started in, as in kohya's trainers. Where nothing is
    there, it counts from the folder of the file.
    """
    plain = Path(path)
    beside = config.parent / path
    if plain.is_absolute() or _exists(plain) or not _exists(beside):
        return plain, ""
    return beside, (f"{printable(path)} is read beside {printable(config.name)}: there is none in "
                    f"{shell_word(Path.cwd())}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
