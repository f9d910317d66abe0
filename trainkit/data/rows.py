"""Rows: every image of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed, Row
from trainkit.data.images import UnreadableImage, content_digest, decode, is_animated
from trainkit.data.sources.captions import (
    METADATA,
    SHOWN,
    listing,
    one_line,
)
from trainkit.data.sources.folder import IMAGES, list_image_folder
from trainkit.data.sources.table import list_table
from trainkit.errors import Problem, shell_word
from trainkit.rng import permutation

if TYPE_CHECKING:

    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

DECODERS = 4  # threads that check images at the start; Pillow decodes without the interpreter lock


def read_rows(data: ImageOptions, *, seed: int = 0) -> tuple[list[Row], list[Problem]]:
    """(rows, problems) of the folder or --dataset_name; every image is decoded once to be sure it can be.

    Rows are in a fixed order (by name, or the data set's own), repeats of an image beside each other. With problems
    the rows may be incomplete.

    seed  decides which images --max_train_samples takes
    """
    wrong = _source_problem(data)
    if wrong:
        return [], [wrong]
    listed, problems = list_table(data) if data.dataset_name else list_image_folder(data)
    where = f"{data.dataset_name or data.folder}"
    rows, unreadable = check(_sample(listed, data.max_images, seed), where=where)
    if not data.prompt and not problems:
        problems = list(_caption_problems(rows, data, where))
    prompted = [row if row.caption else replace(row, caption=data.prompt) for row in rows]
    return [replace(row, repeat=i) for row in prompted for i in range(data.repeats)], problems + unreadable


def _source_problem(data: ImageOptions) -> Problem | None:
    """That there is no source, or two where none goes first: with captions --dataset_name does."""
    flags = f"--{data.folder_flag}, --dataset_name"
    if not (data.folder or data.dataset_name):
        return Problem("no data source", flags, "there is nothing to train on", f"--{data.folder_flag} {IMAGES}")
    if data.folder and data.dataset_name and not data.captioned:
        return Problem("two data sources", flags, "a run trains on one of them", "drop one of the two flags")
    return None


def _sample(listed: list[Listed], most: int | None, seed: int) -> list[Listed]:
    """`most` of the images, drawn by the seed, in the order they had."""
    if most is None or most >= len(listed):
        return listed
    return [listed[i] for i in sorted(permutation(len(listed), "max_train_samples", seed)[:most].tolist())]


def _caption_problems(rows: Sequence[Row], data: ImageOptions, where: str) -> Iterator[Problem]:
    """That no image has a caption; where only some lack one, they are told."""
    missing = [row.id for row in rows if not row.caption]
    if not missing:
        return
    if len(missing) < len(rows):
        log.warning("%d of %d images have no caption and are trained on with an empty one: %s", len(missing),
                    len(rows), listing(missing))
        return
    fix = "--caption_column COLUMN" if data.dataset_name else \
        f"write {METADATA[0]} with file_name and text in every line, or a .txt file beside each image"
    yield Problem("no image has a caption", where, listing(missing), fix, kind="data")


# ------------------------------------------------------------------------------------------------------------- check


def check(listed: Sequence[Listed], where: str) -> tuple[list[Row], list[Problem]]:
    """Decode every image once, keep its size and digest; all that fail become one problem."""
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(_examine, listed))
    rows = [item for item, _ in checked if isinstance(item, Row)]
    animated = [found.id for found, (_, moving) in zip(listed, checked, strict=True) if moving]
    if animated:
        log.warning("%d files hold several frames; the first is used: %s", len(animated), listing(animated))
    bad = [(found, item) for found, (item, _) in zip(listed, checked, strict=True) if isinstance(item, str)]
    return rows, [_unreadable(bad, len(listed), where)] if bad else []


def _examine(found: Listed) -> tuple[Row | str, bool]:
    """(the row, or why there is none; whether the file is animated)."""
    try:
        data = found.source.read_bytes()
        image = decode(data)
    except (OSError, UnreadableImage) as error:
        return one_line(f"{error}"), False
    row = Row(found.id, found.source, found.caption, (image.height, image.width), content_digest(data),
              others=found.others)
    return row, is_animated(data)


def _unreadable(bad: list[tuple[Listed, str]], total: int, where: str) -> Problem:
    names = [shell_word(found.source) for found, _ in bad[:SHOWN] if isinstance(found.source, Path)]
    fix = f'for f in {" ".join(names)}; do mv -- "$f" "$f.unreadable"; done' if names else \
        "leave these rows out of the data set"
    return Problem(f"{len(bad)} of {total} images cannot be read", where,
                   listing(f"{found.id}: {why}" for found, why in bad), fix, kind="data")
