"""Rows: every image of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainkit.data.batch import Listed, Row
from trainkit.data.images import UnreadableImage, content_digest, decode, is_animated
from trainkit.data.sources.account import Account
from trainkit.data.sources.captions import METADATA
from trainkit.data.sources.folder import IMAGES, list_image_folder
from trainkit.data.sources.table import list_table
from trainkit.data.sources.text import one_line
from trainkit.errors import SHOWN, Problem, listing, printable, shell_word
from trainkit.rng import permutation
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

DECODERS = 4  # threads that check images at the start; Pillow decodes without the interpreter lock
ENLARGED = 2.0  # an image enlarged by this factor or more is told: it teaches blur


class Rows(list[Row]):
    """The rows of a data set, and the account of what they were read from."""

    account = Account()


def read_rows(data: ImageOptions, *, seed: int = 0) -> tuple[Rows, list[Problem]]:
    """(rows, problems) of the folder or --dataset_name; every image is decoded once to be sure it can be.

    Rows are in a fixed order (by name, or the data set's own), repeats of an image beside each other. With problems
    the rows may be incomplete.

    seed  decides which images --max_train_samples takes
    """
    wrong = _source_problem(data)
    if wrong:
        return Rows(), [wrong]
    source = list_table(data) if data.dataset_name else list_image_folder(data)
    where, problems = printable(f"{data.dataset_name or data.folder}"), source.problems
    rows, unreadable = check(_sample(source.listed, data.max_images, seed), where=where)
    if not data.prompt and not problems:
        problems = list(_caption_problems(rows, data, where))
    warn_enlarged(rows, data.resolution)
    _warn_twins(rows)
    prompted = [row if row.caption else replace(row, caption=data.prompt) for row in rows]
    repeated = Rows(replace(row, repeat=i) for row in prompted for i in range(data.repeats))
    repeated.account = replace(source.account, images=len(rows), in_all=len(source.listed))
    log.info("%s: %s", where, repeated.account)
    return repeated, problems + unreadable


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


def warn_enlarged(rows: Sequence[Row], resolution: int) -> None:
    """Tell which images are far smaller than what they are trained at."""
    factors = {row.id: resolution / max(1, min(row.size)) for row in rows}
    small = sorted((name for name in factors if factors[name] >= ENLARGED), key=lambda name: -factors[name])
    if small:
        log.warning("%d images are far smaller than --resolution %d; enlarged they teach blur: %s", len(small),
                    resolution, listing(f"{name}, {factors[name]:.3g} times" for name in small))


def _warn_twins(rows: Sequence[Row]) -> None:
    """Tell which files hold the very same image."""
    by_content: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_content[row.digest].append(row)
    twins = [same for same in by_content.values() if len(same) > 1]
    if twins:
        log.warning("%d images are there more than once and are seen so much more often: %s", len(twins),
                    listing(" = ".join(row.id for row in same)
                            + (" (with different captions)" if len({row.all_captions for row in same}) > 1 else "")
                            for same in twins))


# ------------------------------------------------------------------------------------------------------------- check


def check(listed: Sequence[Listed], where: str) -> tuple[list[Row], list[Problem]]:
    """Decode every image once, keep its size and digest; all that fail become one problem.

    Several processes decode a part each. Those whose lists differ, because they share no disk, decode all of their own.
    """
    ids = "\n".join(found.id for found in listed).encode(errors="surrogateescape")
    alike = len(set(ranks.gather(content_digest(ids)))) == 1
    checked, notes = _examine_together(listed) if alike else _examine_all(listed)
    rows = [Row(found.id, found.source, found.caption, item.size, item.digest, others=found.others)
            for found, item in zip(listed, checked, strict=True) if isinstance(item, ImageFacts)]
    animated = [found.id for found, item in zip(listed, checked, strict=True)
                if isinstance(item, ImageFacts) and item.animated]
    if animated:
        log.warning("%d files hold several frames; the first is used: %s", len(animated), listing(animated))
    for note, names in notes.items():
        log.warning("%d images: %s: %s", len(names), note, listing(sorted(names)))
    bad = [(found, item) for found, item in zip(listed, checked, strict=True) if isinstance(item, UnreadableImage)]
    return rows, [_unreadable(bad, len(listed), where)] if bad else []


@dataclass(frozen=True)
class ImageFacts:
    """What decoding an image has told: its size (h, w), the digest of the file, whether there are more frames."""

    size: tuple[int, int]
    digest: str
    animated: bool


Notes = dict[str, set[str]]  # what Pillow and our decoder remark -> the images they remark it of
Checked = tuple[list["ImageFacts | UnreadableImage"], Notes]


def _examine_together(listed: Sequence[Listed]) -> Checked:
    """Each rank examines every world-th image."""
    parts = ranks.gather(_examine_all(listed[ranks.rank() :: ranks.world()]))
    checked = [parts[i % len(parts)][0][i // len(parts)] for i in range(len(listed))]
    texts = dict.fromkeys(text for _, notes in parts for text in notes)
    return checked, {text: set().union(*(notes.get(text, ()) for _, notes in parts)) for text in texts}


def _examine_all(listed: Sequence[Listed]) -> Checked:
    with _notes_by_image() as notes, ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_examine, listed)), notes


_now = threading.local()  # .id: the image that this thread is looking at


@contextmanager
def _notes_by_image() -> Iterator[Notes]:
    """Collected while the images are decoded."""
    notes: Notes = defaultdict(set)

    def keep(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
             line: str | None = None) -> None:
        notes[one_line(f"{message}")[:200]].add(getattr(_now, "id", "?"))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        yield notes


def _examine(found: Listed) -> ImageFacts | UnreadableImage:
    _now.id = found.id
    try:
        data = found.source.read_bytes()
        image = decode(data, note=warnings.warn)
    except UnreadableImage as error:
        return error
    except OSError as error:
        return UnreadableImage(f"{error}")
    return ImageFacts((image.height, image.width), content_digest(data), is_animated(data))


def _unreadable(bad: list[tuple[Listed, UnreadableImage]], total: int, where: str) -> Problem:
    """Images that another program reads are never to be moved away: their fix says how they can be read."""
    broken = [shell_word(found.source) for found, why in bad if isinstance(found.source, Path) and not why.fix]
    fixes = dict.fromkeys(why.fix for _, why in bad if why.fix)
    if broken:
        fixes[f'for f in {" ".join(broken[:SHOWN])}; do mv -- "$f" "$f.unreadable"; done'] = None
    return Problem(f"{len(bad)} of {total} images cannot be read", where,
                   listing(f"{found.id}: {one_line(str(why))}" for found, why in bad),
                   "; ".join(fixes) or "leave these rows out of the data set", kind="data")
