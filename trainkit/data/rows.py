"""Rows: every picture of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
import os
import shlex
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.captions import (
    CAPTION_COLUMNS,
    METADATA,
    SHOWN,
    SIDECARS,
    BadEntry,
    listing,
    metadata_files,
    one_line,
    printable,
    read_captions,
    read_metadata,
    read_sidecars,
)
from trainkit.data.images import Source, UnreadablePicture, content_digest, decode, is_animated
from trainkit.errors import Problem
from trainkit.rng import permutation

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets.features.features import FeatureType

    from trainkit.options import PictureOptions

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
COMPANIONS = {*SIDECARS, ".json", ".jsonl", ".csv", ".parquet", ".md", ".npz", ".safetensors", ".ini", ".db", ""}
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}  # folders beside train/
PICTURES = "FOLDER_OF_PICTURES"  # in the fix of a message
DECODERS = 4  # threads that check pictures at the start; Pillow decodes without the interpreter lock


@dataclass(frozen=True)
class Row:
    """One picture that an epoch visits once; a repeat is a row of its own, with its own crops."""

    id: str  # file name under the folder, or "row 17" of a data set, or "class/" + file name; the same on every machine
    source: Source
    caption: str  # the first, or only one
    size: tuple[int, int]  # h, w, upright
    digest: str  # of the file's content
    repeat: int = 0  # 0 .. repeats - 1
    share: float = 1.0  # weight of its loss: 1 for instances, prior_loss_weight for class pictures
    is_class: bool = False  # a picture of the class, there to keep what the model knew of it
    others: tuple[str, ...] = ()  # further captions

    @property
    def all_captions(self) -> tuple[str, ...]:
        """At least one; each visit is trained with one of them."""
        return self.caption, *self.others


@dataclass(frozen=True)
class TableCell:
    """The picture in one cell of a `datasets` table, fetched when read."""

    table: Dataset
    index: int
    column: str

    def read_bytes(self) -> bytes:
        cell = self.table[self.index][self.column]  # {"bytes": ..., "path": ...} or None
        if cell is None:
            raise UnreadablePicture("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        if not (cell["path"] and Path(cell["path"]).is_file()):
            raise UnreadablePicture("the cell holds no picture and names no file")
        return Path(cell["path"]).read_bytes()

    def __str__(self) -> str:
        return f"column {self.column}, row {self.index}"


@dataclass(frozen=True)
class Folder:
    """A folder of pictures and what its user calls it."""

    path: Path
    flag: str  # "--instance_data_dir"
    prompt_flag: str | None  # gives the caption of a picture without one: "--instance_prompt"
    caption_column: str | None = None  # of its metadata; None: the first of CAPTION_COLUMNS that is there
    image_column: str = "image"
    captioned: bool = False  # in the imagefolder layout: subfolders count, and a picture may have several captions


@dataclass(frozen=True)
class Listed:
    """A picture that is there by name; its content has not been read."""

    id: str
    source: Source
    caption: str
    others: tuple[str, ...] = ()


def read_rows(data: PictureOptions, *, seed: int = 0) -> tuple[list[Row], list[Problem]]:
    """(rows, problems) of the folder or --dataset_name; every picture is decoded once to be sure it can be.

    Rows are in a fixed order (by name, or the data set's own), repeats of a picture beside each other. With problems
    the rows may be incomplete.

    seed  decides which pictures --max_train_samples takes
    """
    wrong = _source_problem(data)
    if wrong:
        return [], [wrong]
    listed, problems = _list_table(data) if data.dataset_name else _list_folder(data)
    where = f"{data.dataset_name or data.folder}"
    rows, unreadable = check(_sample(listed, data.max_pictures, seed), where=where)
    if not data.prompt and not problems:
        problems = list(_caption_problems(rows, data, where))
    prompted = [row if row.caption else replace(row, caption=data.prompt) for row in rows]
    return [replace(row, repeat=i) for row in prompted for i in range(data.repeats)], problems + unreadable


def _source_problem(data: PictureOptions) -> Problem | None:
    """That there is no source, or two where none goes first: with captions --dataset_name does."""
    flags = f"--{data.folder_flag}, --dataset_name"
    if not (data.folder or data.dataset_name):
        return Problem("no data source", flags, "there is nothing to train on", f"--{data.folder_flag} {PICTURES}")
    if data.folder and data.dataset_name and not data.captioned:
        return Problem("two data sources", flags, "a run trains on one of them", "drop one of the two flags")
    return None


def _sample(listed: list[Listed], most: int | None, seed: int) -> list[Listed]:
    """`most` of the pictures, drawn by the seed, in the order they had."""
    if most is None or most >= len(listed):
        return listed
    return [listed[i] for i in sorted(permutation(len(listed), "max_train_samples", seed)[:most].tolist())]


def _caption_problems(rows: Sequence[Row], data: PictureOptions, where: str) -> Iterator[Problem]:
    """That no picture has a caption; where only some lack one, they are told."""
    lacking = [row.id for row in rows if not row.caption]
    if not lacking:
        return
    if len(lacking) < len(rows):
        log.warning("%d of %d pictures have no caption and are trained on with an empty one: %s", len(lacking),
                    len(rows), listing(lacking))
        return
    fix = "--caption_column COLUMN" if data.dataset_name else \
        f"write {METADATA[0]} with file_name and text in every line, or a .txt file beside each picture"
    yield Problem("no picture has a caption", where, listing(lacking), fix, kind="data")


# ------------------------------------------------------------------------------------------------------------ folder


def _list_folder(data: PictureOptions) -> tuple[list[Listed], list[Problem]]:
    where = Folder(Path(f"{data.folder}"), f"--{data.folder_flag}", data.prompt_flag and f"--{data.prompt_flag}",
                   data.wanted_column, data.image_column, data.captioned)
    found, problems = list_folder(where)
    return found, problems or ([] if found else [_no_pictures(where)])


def list_folder(where: Folder, *, tell: bool = True) -> tuple[list[Listed], list[Problem]]:
    """(pictures in the order of their names with the captions beside them, problems).

    tell  log what looks meant for training but is not; False where the same folder is read once more
    """
    folder = where.path
    try:
        held_out = _held_out(where)
        files = {below: sorted(path for path in below.iterdir() if path.is_file())
                 for below in _folders(where, held_out)}
    except OSError as error:
        return [], [_unreadable_folder(where, error)]
    pictures = [path for paths in files.values() for path in paths if _is_picture(path)]
    named, beside, problems = _read_captions(where, files)
    if tell:
        _report_ignored([path for paths in files.values() for path in paths], held_out)
        _report_captions(pictures, named, beside, prompt_flag=where.prompt_flag)
    everything = {path for path in (*pictures, *named) if path.relative_to(folder).parts[0] not in held_out}
    found = []
    for path in sorted(everything, key=lambda path: path.relative_to(folder).as_posix()):
        caption, *others = named.get(path) or ([beside[path]] if path in beside else [""])
        found.append(Listed(printable(path.relative_to(folder).as_posix()), path, caption, tuple(others)))
    return found, problems


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _held_out(where: Folder) -> set[str]:
    """Subfolders that hold other splits than train/, where there is one."""
    below = {path.name for path in where.path.iterdir() if path.is_dir()} if where.captioned else set()
    return {name for name in below if name.lower() in HELD_OUT} if "train" in below else set()


def _folders(where: Folder, held_out: Container[str]) -> Iterator[Path]:
    """The folder and, in the imagefolder layout, those below it: not hidden, not linked. Raises OSError."""
    if not where.captioned:
        yield where.path
        return
    for top, below, _ in os.walk(where.path, onerror=_raise):
        outside = held_out if Path(top) == where.path else ()
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in outside)
        yield Path(top)


def _raise(error: OSError) -> None:
    raise error


def _read_captions(
    where: Folder, files: Mapping[Path, list[Path]]
) -> tuple[dict[Path, tuple[str, ...]], dict[Path, str], list[Problem]]:
    """({picture: captions} of all metadata, of two the nearer one's; {picture: caption} of sidecars; problems)."""
    named: dict[Path, tuple[str, ...]] = {}
    beside: dict[Path, str] = {}
    problems: list[Problem] = []
    twice: list[str] = []
    for folder, paths in files.items():  # from the outside in
        entries, bad = read_metadata(
            folder, where.caption_column, image_column=where.image_column, several=where.captioned)
        nearer = {folder / entry.name: entry.captions for entry in entries}
        twice += [printable(path.name) for path in nearer if named.get(path, nearer[path]) != nearer[path]]
        named |= nearer
        texts, unfit = read_sidecars(folder, filter(_is_picture, paths))
        beside |= texts
        problems += bad + unfit
    if twice:
        log.warning("%d pictures are named by the metadata of two folders; the nearer one's is used: %s", len(twice),
                    listing(twice))
    if where.caption_column and not any(map(metadata_files, files)):
        problems.append(_nowhere(where))
    return named, beside, problems


def _nowhere(where: Folder) -> Problem:
    column, prompt = where.caption_column, f" or {where.prompt_flag}" if where.prompt_flag else ""
    return Problem(f"there is no column {column!r}", f"--caption_column {column}, {where.flag} {where.path}",
                   f"the folder has no {' or '.join(METADATA)} to look it up in",
                   f"add one, or drop --caption_column to use .txt captions{prompt}")


def _unreadable_folder(where: Folder, error: OSError) -> Problem:
    why = {FileNotFoundError: "there is no such folder", NotADirectoryError: "it is a file, not a folder"}
    return Problem("the picture folder cannot be read", f"{where.flag} {error.filename or where.path}",
                   why.get(type(error), f"{error.strerror}"), f"{where.flag} {PICTURES}", kind="data")


def _no_pictures(where: Folder) -> Problem:
    below = [] if where.captioned else sorted(path.name for path in where.path.iterdir() if path.is_dir())
    why = f"subfolders are not searched; there are: {listing(map(printable, below))}" if below else \
        f"it holds no file named {', '.join(sorted(SUFFIXES))}"
    target = shlex.quote(printable(str(where.path / below[0]))) if below else PICTURES
    return Problem("no pictures", f"{where.flag} {where.path}", why, f"{where.flag} {target}", kind="data")


def _report_ignored(files: list[Path], held_out: Collection[str]) -> None:
    """Say which files look as if they were meant to be trained on, but are not."""
    odd = [printable(p.name) for p in files
           if p.suffix.lower() not in SUFFIXES | COMPANIONS and not p.name.startswith(".")]
    if odd:
        log.warning("%d files are of no kind this trainer reads and are left out: %s", len(odd), listing(odd))
    if held_out:
        log.warning("of several splits only train is read; left out: %s", listing(sorted(held_out)))


def _report_captions(
    pictures: list[Path], named: Mapping[Path, tuple[str, ...]], beside: Mapping[Path, str], *, prompt_flag: str | None
) -> None:
    """Say where captions compete and which pictures the metadata forgot."""
    both = [printable(p.name) for p in beside if named.get(p) and named[p] != (beside[p],)]
    if both:
        log.warning("%d pictures have two captions; the metadata's is used: %s", len(both), listing(both))
    forgotten = [printable(p.name) for p in pictures if named and p not in named and p not in beside]
    if forgotten and prompt_flag:
        log.warning("%d pictures are not in the metadata and get %s: %s", len(forgotten), prompt_flag,
                    listing(forgotten))
    stems = Counter(path.with_suffix("") for path in beside)
    shared = sorted(printable(path.name) for path in beside if stems[path.with_suffix("")] > 1)
    if shared:
        log.warning("%d pictures share a caption file with another of the same name: %s", len(shared), listing(shared))


# ------------------------------------------------------------------------------------------------------------- table


def _list_table(data: PictureOptions) -> tuple[list[Listed], list[Problem]]:
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        return [], [_no_table(data, error)]
    texts = [name for name, kind in table.features.items() if _holds_text(kind, several=data.captioned)]
    column = _caption_column(data, texts)
    problems = list(_table_problems(data, table, texts, column))
    if problems:
        return [], problems
    pictures = table.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))
    found, bad = [], []
    for i, cell in enumerate(table[column] if column else [None] * len(table)):
        try:
            caption, *others = read_captions(cell, several=data.captioned) or ("",)
            found.append(Listed(f"row {i}", TableCell(pictures, i, data.image_column), caption, tuple(others)))
        except BadEntry as error:
            bad.append(f"row {i}: {column} {error}")
    return found, list(_row_problems(data, bad, empty=not len(table)))


def _row_problems(data: PictureOptions, bad: Sequence[str], *, empty: bool) -> Iterator[Problem]:
    where = f"--dataset_name {data.dataset_name}"
    if empty:
        yield Problem("the data set is empty", where, "its train split has no rows", "--dataset_name ANOTHER",
                      kind="data")
    if bad:
        yield Problem(f"{len(bad)} unusable captions", where, listing(bad), "mend these rows, or leave them out",
                      kind="data")


def _no_table(data: PictureOptions, error: Exception) -> Problem:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return Problem("the data set cannot be loaded", f"--dataset_name {data.dataset_name}",
                   one_line(f"{root}")[:500] or type(root).__name__,
                   f"check the name (a local folder needs its path) and the network, or use --{data.folder_flag}",
                   kind="data")


def _caption_column(data: PictureOptions, texts: Sequence[str]) -> str | None:
    """The column that was asked for; where every picture should have a caption, else one that is usually it."""
    usual = [name for name in CAPTION_COLUMNS if data.captioned and name in texts]
    return data.wanted_column or next(iter(usual), data.caption_column)


def _holds_text(kind: FeatureType, *, several: bool) -> bool:
    from datasets import LargeList, List, Value

    if several and isinstance(kind, (List, LargeList)):
        kind = kind.feature
    return isinstance(kind, Value) and "string" in kind.dtype


def _holds_pictures(kind: FeatureType) -> bool:
    """Pictures as the library knows them, or files' content that it was not told are pictures."""
    from datasets import Image, Value

    content = kind.get("bytes") if isinstance(kind, dict) else kind
    return isinstance(kind, Image) or isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _table_problems(
    data: PictureOptions, table: Dataset, texts: Sequence[str], column: str | None
) -> Iterator[Problem]:
    pictures = [name for name, kind in table.features.items() if _holds_pictures(kind)]
    wanted = [("--image_column", data.image_column, pictures, "pictures")]
    if column:
        wanted.append(("--caption_column", column, texts, "text"))
    for flag, name, usable, kind in wanted:
        if name in usable:
            continue
        what = f"column {name!r} does not hold {kind}" if name in table.features else f"there is no column {name!r}"
        yield Problem(what, f"{flag} {name}, --dataset_name {data.dataset_name}",
                      f"columns there: {', '.join(table.features)}; with {kind}: {', '.join(usable) or 'none'}",
                      f"{flag} {usable[0]}" if usable else "--dataset_name ANOTHER")


# ------------------------------------------------------------------------------------------------------------- check


def check(listed: Sequence[Listed], where: str) -> tuple[list[Row], list[Problem]]:
    """Decode every picture once, keep its size and digest; all that fail become one problem."""
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(_examine, listed))
    rows = [item for item, _ in checked if isinstance(item, Row)]
    animated = [item.id for item, moving in checked if moving]
    if animated:
        log.warning("%d files hold several frames; the first is used: %s", len(animated), listing(animated))
    bad = [(found, item) for found, (item, _) in zip(listed, checked, strict=True) if isinstance(item, str)]
    return rows, [_unreadable(bad, len(listed), where)] if bad else []


def _examine(found: Listed) -> tuple[Row | str, bool]:
    """(the row, or why there is none; whether the file is animated)."""
    try:
        data = found.source.read_bytes()
        picture = decode(data)
    except (OSError, UnreadablePicture) as error:
        return one_line(f"{error}"), False
    row = Row(found.id, found.source, found.caption, (picture.height, picture.width), content_digest(data),
              others=found.others)
    return row, is_animated(data)


def _unreadable(bad: list[tuple[Listed, str]], total: int, where: str) -> Problem:
    names = [shlex.quote(f"{found.source}") for found, _ in bad[:SHOWN] if isinstance(found.source, Path)]
    fix = f'for f in {" ".join(names)}; do mv -- "$f" "$f.unreadable"; done' if names else \
        "leave these rows out of the data set"
    return Problem(f"{len(bad)} of {total} pictures cannot be read", where,
                   listing(f"{found.id}: {why}" for found, why in bad), fix, kind="data")
