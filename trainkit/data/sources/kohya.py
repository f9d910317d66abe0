"""Folders as kohya's trainers want them, `10_name`: which are read so, and what is said where that is unclear."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainkit.data.sources.account import LeftOut
from trainkit.data.sources.captions import metadata_files
from trainkit.data.sources.tree import Tree, scan
from trainkit.errors import Problem, counted, listing, printable, shell_word
from trainkit.options.numbered import NUMBERED, are_in_order, numbered_folders

OF_THE_CLASS = re.compile(r"(?<![a-z])(reg|regs|regulari[sz]ation|class)(?![a-z])", re.IGNORECASE)


def layout_in_use(folder: Path, *, always: bool = False) -> dict[Path, re.Match[str]]:
    """The folders `10_name` below a folder, where they are read as kohya's trainers do; {} where they are not.

    That is where nothing else than such a layout can be meant: there are no images beside the folders, no metadata, no
    other folders with images, none whose name says that it holds class images beside others, and the numbers do not
    only count the folders.

    always  as --compat kohya asks: whatever else is there
    """
    found = numbered_folders(folder)
    if always or not found:
        return found
    try:
        top = scan(folder)
        others = [path for path in top.folders if path not in found and scan(path).images]
    except OSError:
        return {}
    of_class = [path for path, match in found.items() if OF_THE_CLASS.search(match[2])]
    unclear = top.images or others or 0 < len(of_class) < len(found) or are_in_order(found) \
        or any(map(metadata_files, [folder, *found]))
    with_images = unclear or any(scan(path).images for path in found if path in top.folders)
    return {} if unclear or not with_images else found


def beside_numbered(folder: Path, found: Mapping[Path, re.Match[str]]) -> Iterator[LeftOut]:
    """The images beside the folders of a layout, which kohya's trainers pass over."""
    try:
        top = scan(folder)
    except OSError:
        return
    for path in top.images:
        yield LeftOut(printable(path.name), "an image beside the folders with numbers")
    for path in top.folders:
        try:
            images = [] if path in found else scan(path).images
        except OSError:
            continue
        if images:
            yield LeftOut(f"{printable(path.name)}/", f"no number in its name; {counted(len(images), 'image')}")


def number_notice(folder: Path) -> str:
    """What to say where the data folder itself is called so, and no --repeats are given."""
    match = NUMBERED.fullmatch(folder.absolute().name)
    return f"the number in the folder's name {printable(folder.absolute().name)} is not read: --repeats {match[1]} " \
        "uses each image so often in an epoch" if match and match[1] != "1" else ""


def kohya_problems(folder: Path, flag: str, images: Mapping[Path, int], tree: Tree) -> list[Problem]:
    """That some subfolders carry numbers of repeats, and that something else is there, too.

    Metadata beside or in them says that they are meant as imagefolder.

    images  how many each folder holds
    """
    tops = dict.fromkeys(folder / path.relative_to(folder).parts[0] for path in images if path != folder)
    found = {path: match for path in tops if (match := NUMBERED.fullmatch(path.name))}
    if not found or any(map(metadata_files, [*tree.read, *found])) or are_in_order(found, len(tops) - len(found)) \
            or layout_in_use(folder):
        return []
    why = listing(f"{printable(path.name)}/ asks for each image {'once' if match[1] == '1' else f'{match[1]} times'}"
                  for path, match in found.items())
    of_class = [path for path, match in found.items() if OF_THE_CLASS.search(match[2])]
    if of_class and len(of_class) < len(found):
        return [_class_beside_others(folder, flag, of_class)]
    rename = next(iter(found))
    return [Problem("some folders have numbers of repeats in their names, and there are other images, too",
                    f"{flag} {printable(str(folder))}", f"in kohya's layout, {why}",
                    "--compat kohya reads these folders alone, as kohya's trainers do; where the number means nothing, "
                    f"rename the folder: mv -n -- {shell_word(rename)} "
                    f"{shell_word(rename.with_name(found[rename][2]))}", kind="data")]


def _class_beside_others(folder: Path, flag: str, of_class: Sequence[Path]) -> Problem:
    names = " ".join(map(shell_word, of_class))
    home = shell_word(folder.with_name(f"{folder.absolute().name}-class"))
    return Problem("a folder of class images lies among your own", f"{flag} {printable(str(folder))}",
                   f"by its name, {listing(printable(path.name) for path in of_class)} holds class images "
                   "(regularisation images), which kohya's trainers read from another folder",
                   f"mkdir -p -- {home} && mv -n -- {names} {home}/, and add --with_prior_preservation "
                   f"--class_data_dir {home} --class_prompt PROMPT (of the DreamBooth trainer); "
                   "--compat kohya trains on them as on your own images", kind="data")
