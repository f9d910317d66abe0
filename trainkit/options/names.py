"""The known name that an unknown one most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known name `word` most likely means: the only one it begins, else the most alike."""
    begun = [name for name in known if name.startswith(word)]
    alike = begun if len(begun) == 1 else difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return alike[0] if alike else None
