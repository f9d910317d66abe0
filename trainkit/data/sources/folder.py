"""Images of a folder with the captions beside them, and an account of every other file there."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.sources.account import Account, LeftOut, SourceListing
from trainkit.data.sources.captions import (
    METADATA,
    SIDECARS,
    CaptionFiles,
    metadata_files,
    read_metadata,
    read_sidecars,
)
from trainkit.data.sources.glimpse import HEIC, SUFFIXES
from trainkit.data.sources.kohya import kohya_problems, number_notice
from trainkit.data.sources.masks import MaskPlace, find_masks
from trainkit.data.sources.tree import HELD_OUT, Tree, is_mask, lies_in, walk
from trainkit.data.sources.unread import find_unread, not_followed
from trainkit.errors import Problem, counted, listing, printable, shell_word

if TYPE_CHECKING:
    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

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
    ending: str | None = None  # of the caption files that are read; None: SIDECARS
    masks: MaskPlace | None = None  # None: masks are not used
    flat: bool = False  # subfolders are passed over, as kohya's trainers do, and what is in them is left out


def list_image_folder(data: ImageOptions, ending: str | None = None) -> SourceListing:
    """The images of the folder the options name.

    ending  of the caption files that are read; None: SIDECARS
    """
    where = Folder(Path(f"{data.folder}"), f"--{data.folder_flag}", data.prompt_flag and f"--{data.prompt_flag}",
                   data.wanted_column, data.image_column, data.captioned, ending, mask_place(data))
    if data.repeats == 1 and (notice := number_notice(where.path)):
        log.warning("%s", notice)
    return read_folder(where)


def mask_place(data: ImageOptions) -> MaskPlace | None:
    """Where the options say that mask files are."""
    if data.alpha_mask or not data.masked:
        return None
    return MaskPlace(Path(data.conditioning_data_dir) if data.conditioning_data_dir else None)


def list_folder(where: Folder, *, verbose: bool = True) -> tuple[list[Listed], list[Problem]]:
    """(images in the order of their names with the captions beside them, problems)."""
    found = read_folder(where, verbose=verbose, empty_is_wrong=False)
    return found.listed, found.problems


def read_folder(where: Folder, *, verbose: bool = True, empty_is_wrong: bool = True) -> SourceListing:
    """The images in the order of their names with the captions beside them; every other file is accounted for.

    verbose         log what is left out, and captions that compete; False where the same folder is read once more
    empty_is_wrong  whether a folder without images is a problem
    """
    folder = where.path
    try:
        tree = walk(folder, subfolders=where.captioned and not where.flat, ending=where.ending)
    except OSError as error:
        return SourceListing([], [unreadable_folder(where, error)])
    tree = without_masks(where, tree)
    there = tree.by_name()
    captions = read_all_captions(where, tree, there, verbose=verbose)
    images = dict(sorted((there | _named_only(captions, tree)).items()))  # a path under the folder: the image
    masks = find_masks(where.masks, where.flag, folder, tree, images)
    listed = [Listed(printable(name), path, *captions.of(path), masks.of.get(path)) for name, path in images.items()]
    bare = [found.source for found in listed if not (found.caption or where.ending) and isinstance(found.source, Path)]
    unread = find_unread(folder, tree, bare=bare, strange=captions.strange)
    problems = [*captions.problems, *unread.problems, *masks.problems,
                *_images_below(where, tree, [*images.values()], empty_is_wrong)]
    passed = _passed_over(folder, tree) if where.flat else not_followed(folder, tree) if where.captioned else []
    left_out = (*unread.left_out, *captions.spare, *masks.left_out, *passed)
    account = Account(len(listed), captions.sources(images.values()), left_out)
    if verbose:
        captions.report(tree.images, prompt_flag=where.prompt_flag)
        report_left_out(left_out)
    return SourceListing(listed, problems, account)


def without_masks(where: Folder, tree: Tree) -> Tree:
    """The tree without the folder of masks, where that lies in it."""
    folder = where.masks and where.masks.folder
    return tree if not folder or lies_in(where.path, folder) else tree.without(folder)


def _named_only(captions: Captions, tree: Tree) -> dict[str, Path]:
    """Images that only the metadata knows of, such as hidden ones, by their paths under the folder; held-out ones are
    not read.
    """
    root, known = next(iter(tree.read)), {*tree.images}
    others = {path.relative_to(root).as_posix(): path for path in captions.named if path not in known}
    return {name: path for name, path in others.items() if name.partition("/")[0] not in tree.held_out
            and not any(lies_in(path, folder) for folder in tree.masks)}


# ----------------------------------------------------------------------------------------------------------- captions


@dataclass
class Captions:
    """The captions of a folder's images by where they are from; an image's metadata goes before its sidecar."""

    named: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # of metadata, of two files the nearer one's
    beside: dict[Path, str] = field(default_factory=dict)  # of sidecars
    files: dict[Path, str] = field(default_factory=dict)  # the metadata file that names an image
    strange: list[Path] = field(default_factory=list)  # files of captions that no image has the name of
    spare: list[LeftOut] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # images named by the metadata of two folders, differently

    def of(self, image: Path) -> tuple[str, tuple[str, ...]]:
        """(the first caption, or "", further ones)."""
        first, *others = self.named.get(image) or (self.beside.get(image, ""),)
        return first, tuple(others)

    def sources(self, images: Iterable[Path]) -> dict[str, int]:
        """How many images have their caption from each kind of file."""
        return dict(Counter(self.files[image] if self.named.get(image) else "caption files"
                            for image in images if self.of(image)[0]))

    def report(self, images: list[Path], *, prompt_flag: str | None) -> None:
        """Say where captions compete, which are blank and which images the metadata forgot."""
        both = [p.name for p in self.beside if self.named.get(p) and self.named[p] != (self.beside[p],)]
        stems = Counter(path.with_suffix("") for path in self.beside)
        shared = sorted(path.name for path in self.beside if stems[path.with_suffix("")] > 1)
        blank = [path.name for path in sorted(p for p in {*self.named, *self.beside} if not self.of(p)[0])]
        forgotten = [p.name for p in images if self.named and p not in self.named and p not in self.beside]
        instead = f"{prompt_flag} is used" if prompt_flag else "an empty one is used"
        _warn("caption has", "captions have", "no word, only numbers and signs",
              [path.name for path, text in self.beside.items() if text and not any(map(str.isalpha, text))])
        _warn("image is", "images are", "named by the metadata of two folders; the nearer one's is used", self.twice)
        _warn("image has", "images have", "two captions; the metadata's is used", both)
        _warn("image shares", "images share", "a caption file with another of the same name", shared)
        _warn("image has", "images have", f"a blank caption: {instead}", blank)
        if prompt_flag:
            _warn("image is", "images are", f"not in the metadata: {instead}", forgotten)
            bare = [p.name for p in images if self.beside and not self.named and p not in self.beside]
            _warn("image has", "images have", f"no caption file: {instead}", bare)


def _warn(one: str, several: str, what: str, names: list[str]) -> None:
    if names:
        log.warning("%s %s: %s", counted(len(names), one, several), what, listing(map(printable, names)))


def read_all_captions(where: Folder, tree: Tree, there: Mapping[str, Path], *, verbose: bool = True) -> Captions:
    """All metadata and sidecars of the tree, from the outside in.

    there  the images of the tree, by their paths under the folder
    """
    found, files = Captions(), CaptionFiles(path for contents in tree.read.values() for path in contents.texts)
    for folder, contents in tree.read.items():
        known = there if folder == where.path else {image.name: image for image in contents.images}
        metadata = read_metadata(folder, where.caption_column, image_column=where.image_column,
                                 several=where.captioned, known=known, verbose=verbose)
        entries = [entry for entry in metadata.entries if not is_mask(Path(entry.name))]
        nearer = {known.get(entry.name) or folder / entry.name: entry.captions for entry in entries}
        found.twice += [path.name for path in nearer if found.named.get(path, nearer[path]) != nearer[path]]
        found.named |= nearer
        found.files |= dict.fromkeys(nearer, metadata.file)
        endings = (where.ending,) if where.ending else SIDECARS
        others = [path for path in contents.texts if where.ending and path.suffix.lower() != where.ending]
        texts = [path for path in contents.texts if path not in others] if others else contents.texts
        sidecars = read_sidecars(folder, contents.images, texts, files, endings)
        found.spare += [LeftOut(printable(path.name), f"captions are in {where.ending} files") for path in others]
        found.beside |= sidecars.captions
        found.strange += sidecars.strange
        found.spare += [LeftOut(printable(path.name), "its image has another caption file") for path in sidecars.spare]
        found.problems += metadata.problems + sidecars.problems
    files.keep()
    if where.caption_column and not any(map(metadata_files, tree.read)):
        found.problems.append(_nowhere(where))
    return found


def _nowhere(where: Folder) -> Problem:
    column, prompt = where.caption_column, f" or {where.prompt_flag}" if where.prompt_flag else ""
    return Problem(f"there is no column {column!r}", f"--caption_column {column}, {where.flag} {where.path}",
                   f"the folder has no {' or '.join(METADATA)} to look it up in",
                   f"add one, or drop --caption_column to use .txt captions{prompt}")


# ------------------------------------------------------------------------------------------------------------ problems


def unreadable_folder(where: Folder, error: OSError) -> Problem:
    why = {FileNotFoundError: "there is no such folder", NotADirectoryError: "it is a file, not a folder"}
    path = Path(error.filename or where.path)
    table = isinstance(error, NotADirectoryError) and path.suffix in (".parquet", ".arrow")
    return Problem("the image folder cannot be read", f"{where.flag} {path}", why.get(type(error), f"{error.strerror}"),
                   f"--dataset_name {shell_word(path)}" if table else f"{where.flag} {IMAGES}", kind="data")


def _images_below(where: Folder, tree: Tree, images: list[Path], empty_is_wrong: bool) -> list[Problem]:
    """Images in folders that are not read, folders in kohya's layout, and that there is no image at all."""
    unread = {path: len({*contents.images} - {*images}) for path, contents in tree.below.items()}
    reads_all = where.captioned or where.flat
    unread = {} if reads_all else {path: count for path, count in unread.items() if count}
    read = Counter(path.parent for path in images)
    if not where.flat and (kohya := kohya_problems(where.path, where.flag, unread or read, tree)):
        return kohya
    if unread:
        return [_subfolders(where, unread, images)]
    return [] if images or not empty_is_wrong else [no_images(where, tree)]


def _passed_over(folder: Path, tree: Tree) -> list[LeftOut]:
    """Subfolders with images, where only images right in the folder are read."""
    return [LeftOut(f"{printable(os.path.relpath(path, folder))}/", f"a subfolder with {len(contents.images)} images")
            for path, contents in tree.below.items() if contents.images]


def _subfolders(where: Folder, unread: Mapping[Path, int], images: list[Path]) -> Problem:
    counts = [f"{printable(os.path.relpath(path, where.path))}/: {counted(count, 'image')}"
              for path, count in unread.items()]
    why = f"subfolders are not searched; there are {listing(counts)}"
    if images:
        why += "\n             Move what is not meant to be trained on elsewhere"
    best = max(unread, key=lambda path: (path.name not in HELD_OUT, path.name == "train", unread[path]))
    moves = "; ".join(f"mv -n -- {shell_word(path)}/* {shell_word(where.path)}/" for path in [*unread][:5])
    fix = moves if images else f"{where.flag} {shell_word(best)}"
    below = counted(sum(unread.values()), "image in subfolders is", "images in subfolders are")
    what = f"{below} not read" if images else "no images"
    return Problem(what, f"{where.flag} {where.path}", why, fix, kind="data")


def no_images(where: Folder, tree: Tree) -> Problem:
    top = tree.read[where.path]
    tables = [path.name for contents in (*tree.read.values(), *tree.below.values()) for path in contents.others
              if path.suffix in (".parquet", ".arrow")]
    special = [f"{printable(path.name)} is {why}" for path, why in top.special.items()]
    masks = [f"{printable(path.name)} is a mask" for path in top.masks]
    others = [*special, *masks, *(printable(path.name) for path in top.others)]
    there = f"; there are: {listing(others)}" if others else ""
    why = f"it holds no {'other ' if masks else ''}file named {', '.join(sorted(SUFFIXES))}{there}"
    photos = any(path.suffix.lower() in HEIC for path in top.others)
    fix = "pip install pillow-heif, which reads HEIC" if photos else f"{where.flag} {IMAGES}"
    fix = f"--dataset_name {shell_word(where.path)}" if tables else fix
    why = f"its images are in tables ({printable(tables[0])})" if tables else why
    return Problem("no images", f"{where.flag} {where.path}", why, fix, kind="data")


def report_left_out(left_out: tuple[LeftOut, ...]) -> None:
    if left_out:
        log.warning("%s left out: %s", counted(len(left_out), "file is", "files are"),
                    listing(f"{one.name}: {one.why}" for one in left_out))
