"""Rows: every picture of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.captions import SHOWN, SIDECARS, listing, one_line, printable, read_metadata, read_sidecars
from trainkit.data.images import Source, UnreadablePicture, content_digest, decode, is_animated
from trainkit.errors import Problem

if TYPE_CHECKING:
    from datasets import Dataset

    from trainkit.options import DataOptions

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
COMPANIONS = {*SIDECARS, ".json", ".jsonl", ".csv", ".parquet", ".md", ".npz", ".safetensors", ".ini", ".db", ""}
DECODERS = 4  # threads that check pictures at the start; Pillow decodes without the interpreter lock


@dataclass(frozen=True)
class Row:
    """One picture that an epoch visits once; a repeat is a row of its own, with its own crops."""

    id: str  # file name under the folder, or "row 17" of a data set, or "class/" + file name; the same on every machine
    source: Source
    caption: str
    size: tuple[int, int]  # h, w, upright
    digest: str  # of the file's content
    repeat: int = 0  # 0 .. repeats - 1
    share: float = 1.0  # weight of its loss: 1 for instances, prior_loss_weight for class pictures
    is_class: bool = False  # a picture of the class, there to keep what the model knew of it


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
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def __str__(self) -> str:
        return f"column {self.column}, row {self.index}"


@dataclass(frozen=True)
class Folder:
    """A folder of pictures and what its user calls it."""

    path: Path
    flag: str  # "--instance_data_dir"
    prompt_flag: str  # gives the caption of a picture without one: "--instance_prompt"
    caption_column: str | None = None  # of its metadata; None: the first of CAPTION_COLUMNS that is there


@dataclass(frozen=True)
class Listed:
    """A picture that is there by name; its content has not been read."""

    id: str
    source: Source
    caption: str


def read_rows(data: DataOptions) -> tuple[list[Row], list[Problem]]:
    """(rows, problems) of --instance_data_dir or --dataset_name; every picture is decoded once to be sure it can be.

    Rows are in a fixed order (by name, or the data set's own), repeats of a picture beside each other. With problems
    the rows may be incomplete.
    """
    if bool(data.instance_data_dir) == bool(data.dataset_name):
        return [], [_not_one_source(both=bool(data.dataset_name))]
    listed, problems = _list_instances(data) if data.instance_data_dir else _list_table(data)
    rows, unreadable = check(listed, where=data.instance_data_dir or data.dataset_name)
    prompted = [row if row.caption else replace(row, caption=data.instance_prompt) for row in rows]
    return [replace(row, repeat=i) for row in prompted for i in range(data.repeats)], problems + unreadable


def _not_one_source(both: bool) -> Problem:
    if both:
        return Problem("two data sources", "--instance_data_dir, --dataset_name", "a run trains on one of them",
                       "drop one of the two flags")
    return Problem("no data source", "--instance_data_dir, --dataset_name", "there is nothing to train on",
                   "--instance_data_dir FOLDER_OF_PICTURES")


# ------------------------------------------------------------------------------------------------------------ folder


def _list_instances(data: DataOptions) -> tuple[list[Listed], list[Problem]]:
    folder = Path(data.instance_data_dir)
    found, problems = list_folder(Folder(folder, "--instance_data_dir", "--instance_prompt", data.caption_column))
    return found, problems or ([] if found else [_no_pictures(folder)])


def list_folder(where: Folder, *, tell: bool = True) -> tuple[list[Listed], list[Problem]]:
    """(pictures in the order of their names with the captions beside them, problems).

    tell  log what looks meant for training but is not; False where the same folder is read once more
    """
    folder = where.path
    try:
        files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name)
    except OSError as error:
        why = {FileNotFoundError: "there is no such folder", NotADirectoryError: "it is a file, not a folder"}
        return [], [Problem("the picture folder cannot be read", f"{where.flag} {folder}",
                            why.get(type(error), f"{error.strerror}"), f"{where.flag} FOLDER_OF_PICTURES",
                            kind="data")]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    entries, problems = read_metadata(folder, where.caption_column)
    captions = {folder / entry.name: entry.caption for entry in entries}
    beside, bad = read_sidecars(folder, pictures)
    if tell:
        _report_ignored(files)
        _report_captions(pictures, captions, beside, prompt_flag=where.prompt_flag)
    everything = sorted({*pictures, *captions}, key=lambda path: path.relative_to(folder).as_posix())
    found = [Listed(printable(path.relative_to(folder).as_posix()), path, captions.get(path) or beside.get(path, ""))
             for path in everything]
    return found, problems + bad


def _no_pictures(folder: Path) -> Problem:
    below = sorted(path.name for path in folder.iterdir() if path.is_dir())
    why = f"subfolders are not searched; there are: {listing(map(printable, below))}" if below else \
        f"it holds no file named {', '.join(sorted(SUFFIXES))}"
    target = folder / below[0] if below else "FOLDER_OF_PICTURES"
    return Problem("no pictures", f"--instance_data_dir {folder}", why,
                   f"--instance_data_dir {shlex.quote(printable(str(target)))}", kind="data")


def _report_ignored(files: list[Path]) -> None:
    """Say which files look as if they were meant to be trained on, but are not."""
    odd = [printable(p.name) for p in files
           if p.suffix.lower() not in SUFFIXES | COMPANIONS and not p.name.startswith(".")]
    if odd:
        log.warning("%d files are of no kind this trainer reads and are left out: %s", len(odd), listing(odd))


def _report_captions(
    pictures: list[Path], named: dict[Path, str], beside: dict[Path, str], *, prompt_flag: str
) -> None:
    """Say where captions compete and which pictures the metadata forgot."""
    both = [printable(p.name) for p in beside if named.get(p) and named[p] != beside[p]]
    if both:
        log.warning("%d pictures have two captions; the metadata's is used: %s", len(both), listing(both))
    forgotten = [printable(p.name) for p in pictures if named and p not in named and p not in beside]
    if forgotten:
        log.warning("%d pictures are not in the metadata and get %s: %s", len(forgotten), prompt_flag,
                    listing(forgotten))
    stems = [path.stem for path in beside]
    shared = sorted({printable(path.name) for path in beside if stems.count(path.stem) > 1})
    if shared:
        log.warning("%d pictures share a caption file with another of the same name: %s", len(shared), listing(shared))


# ------------------------------------------------------------------------------------------------------------- table


def _list_table(data: DataOptions) -> tuple[list[Listed], list[Problem]]:
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        return [], [_no_table(data, error)]
    problems = list(_table_problems(data, table))
    if problems:
        return [], problems
    pictures = table.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))
    captions = table[data.caption_column] if data.caption_column else [""] * len(table)
    found = [Listed(f"row {i}", TableCell(pictures, i, data.image_column), one_line(caption or ""))
             for i, caption in enumerate(captions)]
    return found, [] if found else [Problem("the data set is empty", f"--dataset_name {data.dataset_name}",
                                            "its train split has no rows", "--dataset_name ANOTHER", kind="data")]


def _no_table(data: DataOptions, error: Exception) -> Problem:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return Problem("the data set cannot be loaded", f"--dataset_name {data.dataset_name}",
                   one_line(f"{root}")[:500] or type(root).__name__,
                   "check the name (a local folder needs its path) and the network, or use --instance_data_dir",
                   kind="data")


def _table_problems(data: DataOptions, table: Dataset) -> Iterator[Problem]:
    from datasets import Image, Value

    pictures = [name for name, kind in table.features.items() if isinstance(kind, Image)]
    texts = [name for name, kind in table.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    wanted = [("--image_column", data.image_column, pictures, "pictures")]
    if data.caption_column:
        wanted.append(("--caption_column", data.caption_column, texts, "text"))
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
    row = Row(found.id, found.source, found.caption, (picture.height, picture.width), content_digest(data))
    return row, is_animated(data)


def _unreadable(bad: list[tuple[Listed, str]], total: int, where: str) -> Problem:
    names = [shlex.quote(f"{found.source}") for found, _ in bad[:SHOWN] if isinstance(found.source, Path)]
    aside = shlex.quote(str(Path(where) / "unreadable"))
    fix = f"mkdir -p {aside} && mv {' '.join(names)} {aside}" if names else "leave these rows out of the data set"
    return Problem(f"{len(bad)} of {total} pictures cannot be read", where,
                   listing(f"{found.id}: {why}" for found, why in bad), fix, kind="data")
