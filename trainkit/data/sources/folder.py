"""Images of a folder, listed by name with the captions beside them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.sources.captions import (
    METADATA,
    SIDECARS,
    listing,
    metadata_files,
    read_metadata,
    read_sidecars,
)
from trainkit.errors import Problem, printable, shell_word

if TYPE_CHECKING:
    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)


SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
COMPANIONS = {*SIDECARS, ".json", ".jsonl", ".csv", ".parquet", ".md", ".npz", ".safetensors", ".ini", ".db", ""}
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}  # folders beside train/
IMAGES = "FOLDER_OF_IMAGES"  # in the fix of a message


@dataclass(frozen=True)
class Folder:
    """A folder of images and what its user calls it."""

    path: Path
    flag: str  # "--instance_data_dir"
    prompt_flag: str | None  # gives the caption of an image without one: "--instance_prompt"
    caption_column: str | None = None  # of its metadata; None: the first of CAPTION_COLUMNS that is there
    image_column: str = "image"
    captioned: bool = False  # in the imagefolder layout: subfolders count, and an image may have several captions


def list_image_folder(data: ImageOptions) -> tuple[list[Listed], list[Problem]]:
    """(images of the folder the options name, problems)."""
    where = Folder(Path(f"{data.folder}"), f"--{data.folder_flag}", data.prompt_flag and f"--{data.prompt_flag}",
                   data.wanted_column, data.image_column, data.captioned)
    found, problems = list_folder(where)
    return found, problems or ([] if found else [_no_images(where)])


def list_folder(where: Folder, *, verbose: bool = True) -> tuple[list[Listed], list[Problem]]:
    """(images in the order of their names with the captions beside them, problems).

    verbose  log what looks meant for training but is not; False where the same folder is read once more
    """
    folder = where.path
    try:
        held_out = _held_out(where)
        files = {below: sorted(path for path in below.iterdir() if path.is_file())
                 for below in _folders(where, held_out)}
    except OSError as error:
        return [], [_unreadable_folder(where, error)]
    images = [path for paths in files.values() for path in paths if _is_image(path)]
    named, beside, problems = _read_captions(where, files)
    if verbose:
        _report_ignored([path for paths in files.values() for path in paths], held_out)
        _report_captions(images, named, beside, prompt_flag=where.prompt_flag)
    everything = {path for path in (*images, *named) if path.relative_to(folder).parts[0] not in held_out}
    found = []
    for path in sorted(everything, key=lambda path: path.relative_to(folder).as_posix()):
        caption, *others = named.get(path) or ([beside[path]] if path in beside else [""])
        found.append(Listed(printable(path.relative_to(folder).as_posix()), path, caption, tuple(others)))
    return found, problems


def _is_image(path: Path) -> bool:
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
    """({image: captions} of all metadata, of two the nearer one's; {image: caption} of sidecars; problems)."""
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
        texts, caption_problems = read_sidecars(folder, filter(_is_image, paths))
        beside |= texts
        problems += bad + caption_problems
    if twice:
        log.warning("%d images are named by the metadata of two folders; the nearer one's is used: %s", len(twice),
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
    return Problem("the image folder cannot be read", f"{where.flag} {error.filename or where.path}",
                   why.get(type(error), f"{error.strerror}"), f"{where.flag} {IMAGES}", kind="data")


def _no_images(where: Folder) -> Problem:
    below = [] if where.captioned else sorted(path.name for path in where.path.iterdir() if path.is_dir())
    why = f"subfolders are not searched; there are: {listing(map(printable, below))}" if below else \
        f"it holds no file named {', '.join(sorted(SUFFIXES))}"
    target = shell_word(where.path / below[0]) if below else IMAGES
    return Problem("no images", f"{where.flag} {where.path}", why, f"{where.flag} {target}", kind="data")


def _report_ignored(files: list[Path], held_out: Collection[str]) -> None:
    """Say which files look as if they were meant to be trained on, but are not."""
    odd = [printable(p.name) for p in files
           if p.suffix.lower() not in SUFFIXES | COMPANIONS and not p.name.startswith(".")]
    if odd:
        log.warning("%d files are of no kind this trainer reads and are left out: %s", len(odd), listing(odd))
    if held_out:
        log.warning("of several splits only train is read; left out: %s", listing(sorted(held_out)))


def _report_captions(
    images: list[Path], named: Mapping[Path, tuple[str, ...]], beside: Mapping[Path, str], *, prompt_flag: str | None
) -> None:
    """Say where captions compete and which images the metadata forgot."""
    both = [printable(p.name) for p in beside if named.get(p) and named[p] != (beside[p],)]
    if both:
        log.warning("%d images have two captions; the metadata's is used: %s", len(both), listing(both))
    forgotten = [printable(p.name) for p in images if named and p not in named and p not in beside]
    if forgotten and prompt_flag:
        log.warning("%d images are not in the metadata and get %s: %s", len(forgotten), prompt_flag,
                    listing(forgotten))
    stems = Counter(path.with_suffix("") for path in beside)
    shared = sorted(printable(path.name) for path in beside if stems[path.with_suffix("")] > 1)
    if shared:
        log.warning("%d images share a caption file with another of the same name: %s", len(shared), listing(shared))

