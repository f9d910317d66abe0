"""What the terminal behind a stream can show: whether it is one, how many columns it has, and colours."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TextIO

COLUMNS = 80  # of a terminal that does not say
BOLD, RED, YELLOW = "1", "31", "33"  # SGR codes of ECMA-48
ERASE = "\x1b[K"  # from the cursor to the end of the line
JOINT = " · "


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and hasattr(stream, "isatty") and stream.isatty()


def columns(stream: TextIO) -> int:
    """Columns of the terminal now; its user may change its size at any time."""
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):  # no terminal, or a stream without a file
        found = 0
    return found or COLUMNS


def knows_codes(stream: TextIO | None) -> bool:
    """Whether it obeys ECMA-48's control sequences. The old console of Windows prints them."""
    plain_windows = os.name == "nt" and "WT_SESSION" not in os.environ
    return is_terminal(stream) and os.environ.get("TERM") != "dumb" and not plain_windows


def shows_colours(stream: TextIO | None) -> bool:
    """On a terminal, unless NO_COLOR is set; FORCE_COLOR asks for colours in a file too. As Python itself decides it.

    Source: no-color.org, force-color.org; docs.python.org/3/using/cmdline.html#controlling-color.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or knows_codes(stream)


def styled(text: str, *codes: str, stream: TextIO | None) -> str:
    """`text` in bold or a colour, where the stream shows them."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if text and shows_colours(stream) else text


def folded(text: str, stream: TextIO | None, *, indent: int = 0) -> str:
    """Lines that are longer than the terminal broken between words, what follows indented; unchanged in a file."""
    if stream is None or not is_terminal(stream):
        return text
    width = max(20, columns(stream) - 1)
    folds = (textwrap.fill(line, width, subsequent_indent=" " * min(indent, width // 3), break_long_words=False,
                           break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True)
             if len(line) > width else line for line in text.split("\n"))
    return "\n".join(folds)


def fitted(parts: Sequence[tuple[int, str]], width: int | None) -> str:
    """The parts (importance, text), joined in their order; without the least important (highest) ones where the line
    would be longer than `width` columns. None: all of them. Empty parts are left out."""
    kept = [(importance, text) for importance, text in parts if text]
    while len(kept) > 1 and width is not None and len(JOINT.join(text for _, text in kept)) > width:
        kept.remove(max(kept, key=lambda part: part[0]))
    return JOINT.join(text for _, text in kept)[:width]
