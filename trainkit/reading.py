"""What others wrote, read within bounds: small text files, and headers of tensors. It is a value or one ValueError.

A config, a model card or a line of metadata may be damaged, made by another program, or made to harm. Nothing in one
may end in a traceback, take minutes, or run a program out of memory or stack.
"""

from __future__ import annotations

import codecs
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


# ----------------------------------------------------------------------------------------------------------------------
# Headers of safetensors files

# Bytes of a number, by the format's names; others, such as F4, are read by nobody here.
# Source: huggingface/safetensors, safetensors/src/tensor.rs
NUMBER_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}
MOST_HEADER_BYTES = 16 * 2**20  # SDXL's is 0.3 MiB


@dataclass(frozen=True)
class TensorHeader:
    """Shapes and number formats of a safetensors file's tensors by name, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    formats: Mapping[str, str]
    metadata: Mapping[str, str]


def read_tensor_header(path: Path) -> TensorHeader:
    """Read without a tensor. Raises ValueError for no safetensors file, or one that is not whole; OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= MOST_HEADER_BYTES:
            raise ValueError(f"no safetensors file: it begins with {start!r}, and the size of a header stands there")
        if length + 8 > size:
            raise ValueError(f"its header has {length:,} bytes, and the file {size:,}")
        text = file.read(length)
    try:
        entries = parse_json(text.decode())
    except ValueError as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is damaged: it is no object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is damaged: the metadata are not texts")
    end = max([0, *(_tensor_end(name, entry) for name, entry in entries.items())])
    if end + length + 8 != size:
        raise ValueError(f"it should have {end + length + 8:,} bytes and has {size:,}: it was not copied whole")
    return TensorHeader({name: tuple(entry["shape"]) for name, entry in entries.items()},
                        {name: entry["dtype"] for name, entry in entries.items()}, metadata)


def _tensor_end(name: str, entry: object) -> int:
    """Where a tensor ends, as its entry in the header says; ValueError where the entry contradicts itself."""
    try:
        assert isinstance(entry, dict)
        number, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        assert isinstance(number, str) and all(type(size) is int and size >= 0 for size in (*shape, begin, end))
        assert end - begin == math.prod(shape) * NUMBER_BYTES.get(number, math.nan) or number not in NUMBER_BYTES
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header is damaged: {name[:100]} is {str(entry)[:100]}") from error
    return int(end)
