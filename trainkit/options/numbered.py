"""Folders as kohya's trainers want them: `10_sks dog` holds images that an epoch uses 10 times, captioned `sks dog`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

NUMBERED = re.compile(r"([1-9]\d{0,2})_(.+)")  # 2024_summer and 01_intro are something else


def numbered_folders(folder: Path) -> dict[Path, re.Match[str]]:
    """Those right below a folder, by name; none where it cannot be read."""
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except (OSError, ValueError):  # a name that no folder can have is told elsewhere
        return {}
    return {path: match for path in below if (match := NUMBERED.fullmatch(path.name))}


def are_in_order(found: Mapping[Path, re.Match[str]], others: int = 0) -> bool:
    """1_, 2_, 3_ …: somebody's order, not repeats.

    others  folders beside them without a number
    """
    numbers = sorted(int(match[1]) for match in found.values())
    return len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)) and not others
