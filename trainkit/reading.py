"""Small text files that others wrote, read within bounds: whatever they hold is a value or one ValueError.

A config, a model card or a line of metadata may be damaged, made by another program, or made to harm. Nothing in one
may end in a traceback, take minutes, or run a program out of memory or stack.
"""

from __future__ import annotations

import codecs
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 16 * 2**20
MOST_DEPTH = 64  # lists and tables in one another
MOST_VALUES = 1_000_000
BAD_TEXT = (ValueError, RecursionError, KeyError, AttributeError, TypeError, IndexError, OverflowError)  # of parsers


def read_text(path: Path, *, most: int = MOST_BYTES, of_windows: bool = False) -> str:
    """A UTF-8 file of `most` bytes at most. Raises ValueError where it is none, OSError where it cannot be read.

    of_windows  also what Windows' programs write: a mark before UTF-8, and UTF-16 with its mark (`>` of PowerShell 5)
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most / 2**20:g} MiB")
    encoding = "utf-8"
    if of_windows:
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"it is not {name}: byte 0x{data[error.start]:02x} at {error.start:,}") from error


def parse_json(text: str) -> Any:
    return bounded(json.loads, text)


def parse_toml(text: str) -> Any:
    return bounded(tomllib.loads, text)


def parse_yaml(text: str) -> Any:
    import yaml

    def load(text: str) -> object:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{error}") from error

    return bounded(load, text)


def bounded(parse: Callable[[str], object], text: str) -> Any:
    """What `parse` makes of a text. Raises ValueError: it makes nothing of it, or something deep or large."""
    try:
        data = parse(text)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep") from error
    except BAD_TEXT as error:
        raise ValueError(f"{error}".strip() or type(error).__name__) from error
    _refuse_deep(data)
    return data


def _refuse_deep(data: object) -> None:
    """Also what holds itself, as YAML's aliases can make it."""
    level, count = [data], 0
    for _ in range(MOST_DEPTH):
        level = [inner for value in level for inner in _parts(value)]
        count += len(level)
        if not level:
            return
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def _parts(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*value.values()]
    return [*value] if isinstance(value, (list, tuple, set)) else []
