"""Folders as kohya's scripts want them, `10_name`: their number, how often an image is visited, is not read here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trainkit.data.sources.captions import metadata_files
from trainkit.data.sources.tree import Tree
from trainkit.errors import Problem, listing, printable, shell_word

NUMBERED = re.compile(r"([1-9]\d{0,2})_(.+)")  # 2024_summer and 01_intro are something else
OF_THE_CLASS = re.compile(r"\b(reg|regs|regulari[sz]ation|class)\b", re.IGNORECASE)


def number_notice(folder: Path) -> str:
    """What to say where the data folder itself is called so, and no --repeats are given."""
    match = NUMBERED.fullmatch(folder.absolute().name)
    return f"the number in the folder's name {printable(folder.absolute().name)} is not read: --repeats {match[1]} " \
        "uses each image so often in an epoch" if match and match[1] != "1" else ""


def kohya_problems(
    folder: Path, flag: str, images: Mapping[Path, int], tree: Tree, *, captioned: bool
) -> list[Problem]:
    """That subfolders carry numbers of repeats. Metadata beside or in them says that they are meant as imagefolder.

    images  how many each folder holds
    """
    tops = dict.fromkeys(folder / path.relative_to(folder).parts[0] for path in images if path != folder)
    found = {path: match for path in tops if (match := NUMBERED.fullmatch(path.name))}
    if not found or any(map(metadata_files, [*tree.read, *found])) or _are_in_order(found, tops):
        return []
    why = listing(f"{printable(path.name)}/ asks for each image {'once' if match[1] == '1' else f'{match[1]} times'}"
                  for path, match in found.items())
    return [Problem("numbers in the names of folders are not read", f"{flag} {printable(str(folder))}",
                    f"in kohya's layout they are repeats in an epoch: {why}", _fix(folder, flag, found, captioned),
                    kind="data")]


def _are_in_order(found: Mapping[Path, re.Match[str]], tops: Mapping[Path, None]) -> bool:
    """1_, 2_, 3_ …: somebody's order, not repeats."""
    numbers = sorted(int(match[1]) for match in found.values())
    return len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)) and len(found) == len(tops)


def _fix(folder: Path, flag: str, found: Mapping[Path, re.Match[str]], captioned: bool) -> str:
    regular = [path for path, match in found.items()
               if OF_THE_CLASS.search(f"{folder.name} {match[2]}".replace("_", " "))]
    instances = [path for path in found if path not in regular or flag == "--class_data_dir"]
    parts = [f"{flag} {shell_word(path)}" + ("" if flag == "--class_data_dir" else f" --repeats {found[path][1]}")
             for path in instances[:1]]
    if regular and flag != "--class_data_dir":
        prior = f"--with_prior_preservation --class_data_dir {shell_word(regular[0])} --class_prompt PROMPT"
        parts.append(f"{prior} (of the DreamBooth trainer)" if captioned else prior)
    renamed = next(iter(found))
    rename = f"mv -n -- {shell_word(renamed)} {shell_word(renamed.with_name(found[renamed][2]))}"
    several = len(instances) > 1
    more = "; a run has one --repeats, so of several folders" if several else "; where the number means nothing"
    return " ".join(parts) + f"{more}, rename each and give the folder above: {rename}" if parts else rename
