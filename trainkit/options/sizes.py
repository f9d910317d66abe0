"""Sizes of images as users write them: 1024 for a square, or 1024,768 for width and height, as kohya's trainers do."""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]  # h, w in pixels
KOHYAS_LIMIT = 1024  # pixels: kohya-ss/sd-scripts, library/config_util.py and train_util.py, max_bucket_reso
SIZES = "a side in pixels such as 1024, or width and height such as 1024,768"


def size_of(resolution: int | str) -> Size:
    """Of 1024, or of "1024,768"."""
    sides = sides_of(resolution)
    return sides[-1], sides[0]


def bucket_limit(given: int | None, sizes: Sequence[Size], compat: str | None) -> int:
    """The longest side of a bucket, in pixels: as given, or else twice the longest side of `sizes`; of kohya's, 1024.

    With kohya's default, a 3:2 photo at 1024 pixels is 1024x704, which is 69 % of the pixels of a square.
    """
    if given is not None:
        return given
    return KOHYAS_LIMIT if compat == "kohya" else 2 * max(max(size) for size in sizes)


def sides_of(sides: int | str) -> list[int]:
    """The numbers in 1024, or in "768,1024"."""
    return [int(side) for side in f"{sides}".split(",")]


def read_sides(value: object, *, most: int | None = None) -> str:
    """Sides however they are written, as in a config file [1024, 768] -> "1024,768".

    Raises ValueError: one is no whole number above 0, or there are more than `most`.
    """
    given = value if isinstance(value, (list, tuple)) else f"{value}".replace("x", ",").split(",")
    words = [f"{word}".strip() for word in given]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or most and len(words) > most:
        raise ValueError(f"it should be {SIZES}" if most else "it should be sides in pixels, such as 768,1024")
    return ",".join(f"{int(word)}" for word in words)


def read_resolution(value: object) -> int | str:
    """One number or two -> 1024, or "1024,768"; a square is one number however it is written."""
    sides = read_sides(value, most=2).split(",")
    return int(sides[0]) if len(set(sides)) == 1 else ",".join(sides)
