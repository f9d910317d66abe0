"""Start-up: keep libraries from importing what they only might need."""

from __future__ import annotations

import sys


def leave_out(*packages: str) -> None:
    """For the rest of this process, packages that are not imported yet count as not installed.

    PEFT and Transformers import bitsandbytes wherever it is installed: most of a second, and 45 MB of memory, in every
    run that has no use for it. None in sys.modules is the documented way to make an import fail.
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
