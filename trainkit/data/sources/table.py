"""Images of a `datasets` table: a Hub data set, or a folder in one of its layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.images import UnreadableImage
from trainkit.data.sources.captions import (
    CAPTION_COLUMNS,
    BadEntry,
    listing,
    one_line,
    read_captions,
)
from trainkit.errors import Problem
from trainkit.process import quiet_imported

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets.features.features import FeatureType

    from trainkit.options import ImageOptions



@dataclass(frozen=True)
class TableCell:
    """The image in one cell of a `datasets` table, fetched when read."""

    table: Dataset
    index: int
    column: str

    def read_bytes(self) -> bytes:
        cell = self.table[self.index][self.column]  # {"bytes": ..., "path": ...} or None
        if cell is None:
            raise UnreadableImage("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        if not (cell["path"] and Path(cell["path"]).is_file()):
            raise UnreadableImage("the cell holds no image and names no file")
        return Path(cell["path"]).read_bytes()

    def __str__(self) -> str:
        return f"column {self.column}, row {self.index}"


def list_table(data: ImageOptions) -> tuple[list[Listed], list[Problem]]:
    """(images of the data set's train split, problems)."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    quiet_imported()
    try:
        table = load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        return [], [_no_table(data, error)]
    texts = [name for name, kind in table.features.items() if _holds_text(kind, several=data.captioned)]
    column = _caption_column(data, texts)
    problems = list(_table_problems(data, table, texts, column))
    if problems:
        return [], problems
    images = table.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))
    found, bad = [], []
    for i, cell in enumerate(table[column] if column else [None] * len(table)):
        try:
            caption, *others = read_captions(cell, several=data.captioned) or ("",)
            found.append(Listed(f"row {i}", TableCell(images, i, data.image_column), caption, tuple(others)))
        except BadEntry as error:
            bad.append(f"row {i}: {column} {error}")
    return found, list(_row_problems(data, bad, empty=not len(table)))


def _row_problems(data: ImageOptions, bad: Sequence[str], *, empty: bool) -> Iterator[Problem]:
    where = f"--dataset_name {data.dataset_name}"
    if empty:
        yield Problem("the data set is empty", where, "its train split has no rows", "--dataset_name ANOTHER",
                      kind="data")
    if bad:
        yield Problem(f"{len(bad)} unusable captions", where, listing(bad), "fix these rows, or leave them out",
                      kind="data")


def _no_table(data: ImageOptions, error: Exception) -> Problem:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return Problem("the data set cannot be loaded", f"--dataset_name {data.dataset_name}",
                   one_line(f"{root}")[:500] or type(root).__name__,
                   f"check the name (a local folder needs its path) and the network, or use --{data.folder_flag}",
                   kind="data")


def _caption_column(data: ImageOptions, texts: Sequence[str]) -> str | None:
    """The column that was asked for; where every image should have a caption, else one that is usually it."""
    usual = [name for name in CAPTION_COLUMNS if data.captioned and name in texts]
    return data.wanted_column or next(iter(usual), data.caption_column)


def _holds_text(feature_type: FeatureType, *, several: bool) -> bool:
    from datasets import LargeList, List, Value

    if several and isinstance(feature_type, (List, LargeList)):
        feature_type = feature_type.feature
    return isinstance(feature_type, Value) and "string" in feature_type.dtype


def _holds_images(feature_type: FeatureType) -> bool:
    """Images as the library knows them, or files' content that it was not told are images."""
    from datasets import Image, Value

    content = feature_type.get("bytes") if isinstance(feature_type, dict) else feature_type
    return isinstance(feature_type, Image) or isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _table_problems(
    data: ImageOptions, table: Dataset, texts: Sequence[str], column: str | None
) -> Iterator[Problem]:
    images = [name for name, kind in table.features.items() if _holds_images(kind)]
    wanted: list[tuple[str, str, Sequence[str], str]] = [
        ("--image_column", data.image_column, images, "images")]
    if column:
        wanted.append(("--caption_column", column, texts, "text"))
    for flag, name, usable, kind in wanted:
        if name in usable:
            continue
        what = f"column {name!r} does not hold {kind}" if name in table.features else f"there is no column {name!r}"
        yield Problem(what, f"{flag} {name}, --dataset_name {data.dataset_name}",
                      f"columns there: {', '.join(table.features)}; with {kind}: {', '.join(usable) or 'none'}",
                      f"{flag} {usable[0]}" if usable else "--dataset_name ANOTHER")

