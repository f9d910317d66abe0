"""Which file is the mask of which image, by their names alone; nothing is opened.

A mask lies beside its image and is called as it is, with -masklabel behind (OneTrainer), or it lies in a folder of
masks and is called as its image is (kohya's trainers).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.data.sources.account import LeftOut
from trainkit.data.sources.glimpse import key
from trainkit.data.sources.tree import MASK_ENDING, Tree, lies_in, walk
from trainkit.errors import Problem, printable

FLAG = "--conditioning_data_dir"


@dataclass(frozen=True)
class MaskPlace:
    """Where masks are looked for. `folder` None: beside the images."""

    folder: Path | None = None


@dataclass
class MaskFiles:
    """The masks of images, and what was found that is none."""

    of: dict[Path, Path] = field(default_factory=dict)  # image: its mask
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_masks(place: MaskPlace | None, flag: str, root: Path, tree: Tree, images: Mapping[str, Path]) -> MaskFiles:
    """The masks of a data folder's images.

    place   None: masks are not used, and those beside images are left out
    flag    that names the data folder
    images  by their paths under the data folder
    """
    beside = {_under(root, mask): mask for contents in tree.read.values() for mask in contents.masks}
    if place is None or place.folder:
        why = "a mask; --masked_loss trains with it" if place is None else f"a mask, and {FLAG} names another folder"
        idle = [LeftOut(printable(name), why) for name in beside]
        found = _in_folder(place.folder, flag, root, images) if place and place.folder else MaskFiles()
        return MaskFiles(found.of, [*found.left_out, *idle], found.problems)
    found = _paired(images, beside)
    if images and not found.of:
        found.problems.append(_none_beside(flag, root, images, beside))
    return found


def _in_folder(folder: Path, flag: str, root: Path, images: Mapping[str, Path]) -> MaskFiles:
    where = f"{FLAG} {folder}"
    if lies_in(root, folder):
        return MaskFiles(problems=[Problem(
            "the masks' folder is the images' folder", f"{where}, {flag} {root}",
            "each image would be its own mask" if lies_in(folder, root) else "the images lie in it",
            f"--masked_loss alone reads masks beside the images: NAME{MASK_ENDING}.png", kind="data")])
    try:
        tree = walk(folder, subfolders=True)
    except OSError as error:
        why = {FileNotFoundError: "there is no such folder", NotADirectoryError: "it is a file, not a folder"}
        return MaskFiles(problems=[Problem("the masks' folder cannot be read", where,
                                           why.get(type(error), f"{error.strerror}"), f"{FLAG} FOLDER_OF_MASKS",
                                           kind="data")])
    masks = {_under(folder, mask): mask for contents in tree.read.values()
             for mask in (*contents.images, *contents.masks)}
    found = _paired(images, masks, start=f"{folder.name}/")
    if found.of or not images:
        return found
    there = f"it holds {printable(next(iter(masks)))}" if masks else "it holds no image"
    return MaskFiles(problems=[Problem(
        "no image has a mask", where, f"{there}, and an image is called {printable(next(iter(images)))}",
        f"call each mask as its image, with any ending, or give another folder: {FLAG} FOLDER_OF_MASKS", kind="data")])


def _none_beside(flag: str, root: Path, images: Mapping[str, Path], beside: Mapping[str, Path]) -> Problem:
    name = Path(next(iter(images)))
    there = f"; there is {printable(next(iter(beside)))}, and no image has its name" if beside else ""
    wanted = f"{printable(name.stem)}{MASK_ENDING}.png, beside it"
    return Problem("no image has a mask", f"--masked_loss, {flag} {root}",
                   f"the mask of {printable(name.name)} would be {wanted}{there}",
                   f"add the masks, or name their folder: {FLAG} FOLDER_OF_MASKS; or --alpha_mask, if what is not to "
                   "be trained on is transparent", kind="data")


def _paired(images: Mapping[str, Path], masks: Mapping[str, Path], start: str = "") -> MaskFiles:
    """Image and mask of one stem, in folders of one name; in a folder without subfolders, of one stem alone."""
    exact, alike = _by_stem(masks, str), _by_stem(masks, key)
    stems = Counter(key(Path(name).stem) for name in images)
    found = MaskFiles()
    for name, image in images.items():
        stem = Path(name).with_suffix("").as_posix()
        alone = [Path(stem).name] if stems[key(Path(name).stem)] == 1 and start else []
        candidates = next(filter(None, (exact.get(each) or alike.get(key(each)) for each in (stem, *alone))), [])
        if candidates:
            found.of[image] = masks[candidates[0]]
    used = {*found.of.values()}
    named = {stem for stem, names in alike.items() if any(masks[name] in used for name in names)}
    for name, mask in masks.items():
        if mask not in used:
            again = key(_stem(name)) in named
            why = "its image has another mask" if again else "a mask, and no image has its name"
            found.left_out.append(LeftOut(printable(start + name), why))
    return found


def _by_stem(names: Iterable[str], spelled: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[spelled(_stem(name))].append(name)
    return found


def _stem(name: str) -> str:
    """A mask's path without what makes it a mask: that of its image, but for the ending."""
    path = Path(name)
    stem = path.stem[: -len(MASK_ENDING)] if path.stem.lower().endswith(MASK_ENDING) else path.stem
    return path.with_name(stem).as_posix() if stem else name


def _under(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()

