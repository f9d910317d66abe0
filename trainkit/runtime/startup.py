"""Start-up: keep libraries from importing what they only might need. And its end: leave nothing of it behind."""

from __future__ import annotations

import sys

LEFT_OUT: set[str] = set()


def leave_out(*packages: str) -> None:
    """Until `bring_back`, packages that are not imported yet count as not installed.

    PEFT and Transformers import bitsandbytes wherever it is installed: most of a second, and 45 MB of memory, in every
    run that has no use for it. None in sys.modules is the documented way to make an import fail.
    """
    absent = [name for name in packages if name not in sys.modules]
    LEFT_OUT.update(absent)
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]


def bring_back() -> None:
    """Undo `leave_out`: the next training in this process, or a notebook's next cell, may want them."""
    while LEFT_OUT:
        name = LEFT_OUT.pop()
        if sys.modules.get(name, 0) is None:
            del sys.modules[name]
