"""The files of a data folder by kind, each folder listed once; nothing is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.data.sources.captions import METADATA, SIDECARS
from trainkit.data.sources.glimpse import HEIC, SUFFIXES
from trainkit.errors import printable

TEXTS = {  # what tools write captions into beside an image; SIDECARS of these are read
    *SIDECARS, ".text", ".cap", ".caps", ".captions", ".tag", ".tags", ".prompt", ".prompts", ".desc", ".description",
    ".label", ".labels", ".wd14",
}
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}  # folders beside train/
MASK_ENDING = "-masklabel"  # of the stem of a mask beside its image, as OneTrainer has it
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "@eaDir", "Icon\r"}
APPLE_DOUBLE = "._"  # how macOS's companions of files begin, on disks of other systems
MOST_BELOW = 20_000  # entries looked at in folders that are not read


@dataclass
class Contents:
    """One folder's entries by kind, each kind by name. Hidden ones are in none."""

    images: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)  # images named as masks are
    texts: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)  # to folders
    special: dict[Path, str] = field(default_factory=dict)  # no file, though named as one: why

    @property
    def size(self) -> int:
        return len(self.images) + len(self.masks) + len(self.texts) + len(self.others)


@dataclass
class Tree:
    """A data folder: what is read of it, and what is not."""

    read: dict[Path, Contents] = field(default_factory=dict)
    below: dict[Path, Contents] = field(default_factory=dict)  # subfolders and linked folders that are not read
    held_out: set[str] = field(default_factory=set)  # subfolders that hold other splits than train/, where there is one
    masks: tuple[Path, ...] = ()  # folders that hold masks of the images

    @property
    def images(self) -> list[Path]:
        return [image for contents in self.read.values() for image in contents.images]

    def without(self, folder: Path) -> Tree:
        """The same without a folder of masks and what is below it."""
        read, below = ({path: contents for path, contents in part.items() if not lies_in(path, folder)}
                       for part in (self.read, self.below))
        return Tree(read, below, self.held_out, (*self.masks, folder))

    def by_name(self) -> dict[str, Path]:
        """The images that are read, by their paths under the data folder with forward slashes."""
        root = next(iter(self.read))
        starts = {folder: "" if folder == root else f"{folder.relative_to(root).as_posix()}/" for folder in self.read}
        return {starts[folder] + image.name: image for folder, contents in self.read.items()
                for image in contents.images}


def lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def is_mask(path: Path) -> bool:
    """Whether an image's name says that it is the mask of another one."""
    stem = path.stem.lower()
    return is_image(path) and stem.endswith(MASK_ENDING) and stem != MASK_ENDING


def is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or suffix in HEIC and reads_heic()


def reads_heic() -> bool:
    """Whether the package that reads iPhone photos is installed; it is imported with the first image."""
    from importlib.util import find_spec

    return find_spec("pillow_heif") is not None


def scan(folder: Path, ending: str | None = None) -> Contents:
    """The folder's entries. Raises OSError.

    ending  of caption files, where it is none of TEXTS
    """
    found = Contents()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if not entry.name.startswith(".") and entry.name not in JUNK:
                _sort_in(found, entry, path, {*TEXTS, ending})
            elif is_image(path) and not entry.name.startswith(APPLE_DOUBLE):
                found.special[path] = "hidden: its name begins with a dot"
    return found


def _sort_in(found: Contents, entry: os.DirEntry[str], path: Path, endings: Container[str | None]) -> None:
    suffix, image = path.suffix.lower(), is_image(path)
    named_as_file = image or suffix in endings or entry.name in METADATA
    try:
        is_file, is_folder = entry.is_file(), entry.is_dir()
    except OSError:  # a circle of links
        is_file = is_folder = False
    if is_file:
        _kind_of(found, path, image=image, text=suffix in endings).append(path)
    elif is_folder:
        (found.links if entry.is_symlink() else found.folders).append(path)
    if not is_file and (named_as_file or not is_folder):
        found.special[path] = _no_file(entry, is_folder)


def _kind_of(found: Contents, path: Path, *, image: bool, text: bool) -> list[Path]:
    if image:
        return found.masks if is_mask(path) else found.images
    return found.texts if text else found.others


def _no_file(entry: os.DirEntry[str], is_folder: bool) -> str:
    if is_folder:
        return "a folder"
    if entry.is_symlink():
        return f"a link to {printable(str(Path(entry.path).readlink()))}, which is not there"
    mode = entry.stat(follow_symlinks=False).st_mode
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def walk(folder: Path, *, subfolders: bool, ending: str | None = None) -> Tree:
    """The folder and, where subfolders are read, those below it: not hidden, not linked, not held out.

    ending  see `scan`
    Raises OSError for what is to be read.
    """
    tree = Tree({folder: scan(folder, ending)})
    top = tree.read[folder]
    names = {path.name for path in top.folders}
    if subfolders:
        tree.held_out = {name for name in names if name.lower() in HELD_OUT} if "train" in names else set()
        tree.read |= dict(_below(top, tree.held_out, ending))
        links = [link for contents in tree.read.values() for link in contents.links]
    else:
        tree.below = dict(_unread(_below(top, (), ending)))
        links = top.links
    for link in links:
        if not folder.resolve().is_relative_to(link.resolve()):
            tree.below |= dict(_unread(iter([(link, _scan_if_possible(link))])))
    return tree


def _below(contents: Contents, without: Container[str], ending: str | None) -> Iterator[tuple[Path, Contents]]:
    for path in contents.folders:
        if path.name not in without:
            inner = scan(path, ending)
            yield path, inner
            yield from _below(inner, (), ending)


def _scan_if_possible(folder: Path) -> Contents:
    try:
        return scan(folder)
    except OSError:
        return Contents()


def _unread(folders: Iterator[tuple[Path, Contents]]) -> Iterator[tuple[Path, Contents]]:
    """As many folders as may be looked at for what somebody expects to be read; one that cannot be is passed over."""
    looked_at = 0
    try:
        for path, contents in folders:
            yield path, contents
            looked_at += contents.size + 1
            if looked_at > MOST_BELOW:
                return
    except OSError:
        return
