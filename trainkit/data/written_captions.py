"""Captions that we write: into files of the images' names or into metadata.jsonl, where the trainers read them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trainkit.data.sources.account import LeftOut
from trainkit.data.sources.captions import METADATA, SIDECARS, caption_files, is_portable, metadata_files, read_metadata
from trainkit.data.sources.folder import (
    Captions,
    Folder,
    no_images,
    read_all_captions,
    unreadable_folder,
    without_masks,
)
from trainkit.data.sources.masks import MaskFiles, MaskPlace, find_masks
from trainkit.data.sources.records import CAPTION_COLUMNS
from trainkit.data.sources.text import decode_text
from trainkit.data.sources.tree import Tree, walk
from trainkit.data.sources.unread import find_unread, not_followed
from trainkit.errors import Problem, counted, listing, printable, refuse, unwritable
from trainkit.files import atomic_write

SAVE_SECONDS = 30  # between two rewrites of metadata.jsonl: what a killed process may lose
SAVE_FACTOR = 20  # times what the last rewrite took, at least: rewriting a long file stays below 5 % of the time


# ----------------------------------------------------------------------------------------------------------------------
# What is there


@dataclass(frozen=True)
class CaptionedFolder:
    """A folder's images, subfolders included, with the captions that the trainers read there."""

    path: Path
    tree: Tree
    images: Mapping[str, Path]  # by path under the folder, in its order
    captions: Captions
    left_out: Sequence[LeftOut] = ()
    problems: Sequence[Problem] = ()
    endings: Sequence[str] = SIDECARS  # of the caption files that are read
    masks: MaskFiles = field(default_factory=MaskFiles)

    def has_caption(self, image: Path) -> bool:
        return bool(self.captions.of(image)[0])

    def caption_files(self) -> dict[Path, list[Path]]:
        """The caption files of each image; the first one is read."""
        return {image: files for contents in self.tree.read.values()
                for image, files in caption_files(contents.images, contents.texts, self.endings).items()}


def read_captioned_folder(path: Path, flag: str, *, overwrite: bool, caption_column: str | None = None,
                          ending: str | None = None, masks: MaskPlace | None = None) -> CaptionedFolder:
    """What lies there. Captions that are not read as they lie are a problem, unless all captions are overwritten.

    ending  of the caption files that are read; None: SIDECARS
    masks   where masks are; None: beside the images, if there are any
    """
    where = Folder(path, flag, None, caption_column, captioned=True, ending=ending, masks=masks)
    try:
        tree = walk(path, subfolders=True)
    except OSError as error:
        return CaptionedFolder(path, Tree(), {}, Captions(), problems=[unreadable_folder(where, error)])
    tree = without_masks(where, tree)
    images = dict(sorted(tree.by_name().items()))
    found = find_masks(masks or MaskPlace(), flag, path, tree, images)
    if masks is None:
        found.problems.clear()
    captions = read_all_captions(where, tree, images, verbose=False)
    bare = [] if overwrite else [image for image in images.values() if not captions.of(image)[0]]
    unread = find_unread(path, tree, bare=bare, strange=captions.strange)
    nothing = [] if images else [no_images(where, tree)]
    return CaptionedFolder(path, tree, images, captions, (*unread.left_out, *not_followed(path, tree)),
                           [*captions.problems, *unread.problems, *nothing], (ending,) if ending else SIDECARS, found)


# ----------------------------------------------------------------------------------------------------------------------
# Where captions are written


class CaptionWriter(Protocol):
    """Takes captions; what it has taken is on the disk after `save`, and much of it before."""

    skipped: list[Path]  # images whose caption someone else wrote meanwhile

    def problems(self, images: Sequence[Path]) -> Iterator[Problem]:
        """Why captions of these images could not be written, or would not be read."""
        ...

    def shared(self, images: Sequence[Path]) -> dict[Path, Path]:
        """{image: an image before it whose caption would be its own, too}."""
        ...

    def add(self, image: Path, caption: str) -> None: ...

    def save(self) -> None: ...


@dataclass
class SidecarWriter:
    """One text file an image, of its name. A caption file that the trainers read already keeps its name."""

    folder: CaptionedFolder
    suffix: str
    overwrite: bool
    skipped: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        there = self.folder.caption_files()
        self.targets = {image: next(iter(there.get(image, ())), image.with_suffix(self.suffix))
                        for image in self.folder.images.values()}

    def problems(self, images: Sequence[Path]) -> Iterator[Problem]:
        captions = self.folder.captions
        hidden = [_name(self.folder, image) for image in images if captions.named.get(image)]
        if hidden:
            yield Problem(f"{counted(len(hidden), 'image has', 'images have')} captions in metadata", "--overwrite",
                          f"these go before caption files: {listing(hidden)}", "add --format metadata", "data")

    def shared(self, images: Sequence[Path]) -> dict[Path, Path]:
        """Images that differ in the ending of their names alone."""
        first: dict[Path, Path] = {}
        return {image: other for image in images if (other := first.setdefault(self.targets[image], image)) != image}

    def add(self, image: Path, caption: str) -> None:
        target = self.targets[image]
        if not self.overwrite and _has_words(target):
            self.skipped.append(image)
        else:
            atomic_write(target, f"{caption}\n".encode())

    def save(self) -> None:
        """Every file is written at once."""


def _has_words(path: Path) -> bool:
    try:
        return bool(path.read_bytes().strip())
    except FileNotFoundError:
        return False


@dataclass
class MetadataWriter:
    """The column of captions in metadata.jsonl; other columns and other lines stay as they are.

    An image's line is in the nearest metadata.jsonl at or above it, else in a new one of the whole folder.
    """

    folder: CaptionedFolder
    overwrite: bool
    skipped: list[Path] = field(default_factory=list)
    new: dict[Path, dict[Path, str]] = field(default_factory=dict)  # by metadata file: captions to write
    due: float = 0.0

    def __post_init__(self) -> None:
        self.due = time.monotonic() + SAVE_SECONDS
        self.files = {folder: next(iter(metadata_files(folder)), None) for folder in self.folder.tree.read}

    def home(self, image: Path) -> Path:
        """The metadata file that an image's caption is written into."""
        above = [folder for folder in image.parents if folder in self.files]
        return next(filter(None, map(self.files.get, above)), self.folder.path / METADATA[0])

    def problems(self, images: Sequence[Path]) -> Iterator[Problem]:
        tables = {home for image in images if (home := self.home(image)).name != METADATA[0]}
        yield from (Problem(f"{path.name} is not rewritten", f"{printable(str(path))}", f"only {METADATA[0]} is",
                            "leave --format metadata out to write caption files", "data") for path in sorted(tables))
        odd = [_name(self.folder, image) for image in images if not _can_be_named(image, self.home(image).parent)]
        if odd:
            yield Problem(f"{counted(len(odd), 'image')} cannot be named in {METADATA[0]}", "--format metadata",
                          f"these names are no text or no path on every system: {listing(odd)}",
                          "rename them, or leave --format metadata out to write caption files", "data")

    def shared(self, images: Sequence[Path]) -> dict[Path, Path]:
        """None: every image has a line of its own."""
        return {}

    def add(self, image: Path, caption: str) -> None:
        self.new.setdefault(self.home(image), {})[image] = caption
        if time.monotonic() >= self.due:
            self.save()

    def save(self) -> None:
        begun = time.monotonic()
        for path, captions in self.new.items():
            self._rewrite(path, captions)
        self.new.clear()
        now = time.monotonic()
        self.due = now + max(SAVE_SECONDS, SAVE_FACTOR * (now - begun))

    def _rewrite(self, path: Path, captions: Mapping[Path, str]) -> None:
        """The file as it is now with these captions. UserError: it is damaged since."""
        root = path.parent
        names = {image: image.relative_to(root).as_posix() for image in self.folder.images.values()
                 if image.is_relative_to(root)}
        found = read_metadata(root, None, several=True, known={*names.values()}, verbose=False)
        refuse(found.problems)
        lines = decode_text(path.read_bytes())[0].split("\n") if path.exists() else []
        while lines and not lines[-1].strip():
            lines.pop()
        column = found.caption_column or CAPTION_COLUMNS[0]
        named = {entry.name: entry for entry in found.entries}
        for image, caption in captions.items():
            entry = named.get(names[image])
            if entry is None:
                lines.append(_json_line({found.name_column: names[image], column: caption}))
            elif entry.captions and not self.overwrite:
                self.skipped.append(image)
            else:
                lines[entry.line - 1] = _json_line({**json.loads(lines[entry.line - 1]), column: caption})
        atomic_write(path, "".join(f"{line}\n" for line in lines).encode())


def _json_line(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _can_be_named(image: Path, root: Path) -> bool:
    name = image.relative_to(root).as_posix()
    return is_portable(name) and not unwritable(name) and "\n" not in name


def _name(folder: CaptionedFolder, image: Path) -> str:
    return printable(image.relative_to(folder.path).as_posix())
