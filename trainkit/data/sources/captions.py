"""Captions that lie beside images: `<image>.txt` sidecars, and metadata.jsonl, metadata.csv or metadata.parquet.

A data set is somebody else's text: it never names a file outside its folder, and it becomes one plain line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trainkit.errors import Problem, printable, shell_word

log = logging.getLogger(__name__)

SIDECARS = (".txt", ".caption")  # the first one found wins
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order when --caption_column is not given
MAX_CAPTION = 65_536  # bytes; an encoder reads 77 tokens, so anything longer is not a caption
MAX_LINE = 1_048_576  # bytes of one metadata line
SHOWN = 20  # entries of a list in a message


class BadEntry(Exception):
    """One caption or metadata line that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Entry:
    """One image that the metadata names."""

    name: str  # path under the folder, forward slashes
    captions: tuple[str, ...]  # none of them blank
    where: str  # "metadata.jsonl:3"


def listing(items: Iterable[str]) -> str:
    """At most SHOWN items, one a line, and how many more there are."""
    items = list(items)
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n             ".join(items[:SHOWN] + more)


def one_line(text: str) -> str:
    """Text as a prompt: line breaks and runs of space become one space, control characters and lone surrogates, which
    no tokenizer can encode, vanish.
    """
    visible = (c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else "" for c in text)
    return " ".join("".join(visible).split())


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, the encoding it was in): UTF-8 with or without a mark, UTF-16 with one, else Western (cp1252)."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace"), "utf-16"
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"  # every byte has a meaning here


def inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, stays under `folder` (or under the blobs a Hub snapshot folder links to)."""
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(home) for home in homes)


# ---------------------------------------------------------------------------------------------------------- sidecars


def read_sidecars(folder: Path, images: Iterable[Path]) -> tuple[dict[Path, str], list[Problem]]:
    """({image: caption}, problems). Encodings other than UTF-8 are understood and reported."""
    texts = {(p.stem, p.suffix.lower()): p for p in folder.iterdir() if p.suffix.lower() in SIDECARS and p.is_file()}
    captions, bad, odd = {}, [], []
    for image in images:
        path = next((texts[image.stem, s] for s in SIDECARS if (image.stem, s) in texts), None)
        if path is None:
            continue
        try:
            captions[image], encoding = _read_sidecar(path, folder)
        except (OSError, BadEntry) as error:
            bad.append(f"{printable(path.name)}: {error}")
        else:
            odd += [f"{printable(path.name)} ({encoding})"] if not encoding.startswith("utf-8") else []
    if odd:
        log.warning("%d captions are not UTF-8 and were read as guessed: %s", len(odd), listing(odd))
    return captions, _problem(bad, "caption files", folder, "fix or delete these files")


def _read_sidecar(path: Path, folder: Path) -> tuple[str, str]:
    if not inside(path, folder):
        raise BadEntry("is a link out of the folder; copy the file into it")
    if path.stat().st_size > MAX_CAPTION:
        raise BadEntry(f"is {path.stat().st_size} bytes long; a caption has at most {MAX_CAPTION}")
    text, encoding = decode_text(path.read_bytes())
    return one_line(text), encoding


# ---------------------------------------------------------------------------------------------------------- metadata


def metadata_files(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA if (folder / name).is_file()]


def read_metadata(
    folder: Path, column: str | None, *, image_column: str = "image", several: bool = False
) -> tuple[list[Entry], list[Problem]]:
    """Every line of the folder's metadata file, captions from `column`; no file and no column is fine.

    image_column  the image's file is named in `file_name`, or in `<image_column>_file_name`
    several       whether an image may have a list of captions

    Every bad line is reported with its number, all in one problem.
    """
    files = metadata_files(folder)
    if len(files) != 1:
        return [], [_two_files(folder, files)] if files else []
    path = files[0]
    try:
        records, bad = _records(path)
    except OSError as error:
        return [], _problem([f"{error}"], "metadata files", path, f"chmod u+r {shell_word(path)}")
    columns = list(dict.fromkeys(key for _, record in records for key in record))
    named_in = _name_column(columns, image_column)
    chosen = column or next((c for c in CAPTION_COLUMNS if c in columns), None)
    problems = list(_column_problems(path, columns, named_in, chosen)) if records else []
    entries: dict[str, Entry] = {}
    for line, record in records if not problems else []:
        try:
            entry = _entry(path, line, record, named_in=named_in, column=chosen, several=several)
            _refuse_second(entries.get(entry.name), entry)
            entries[entry.name] = entry
        except BadEntry as error:
            bad.append(f"{error}")
    return list(entries.values()), problems + _problem(bad, f"lines of {path.name}", path, "fix or delete these lines")


def _two_files(folder: Path, files: list[Path]) -> Problem:
    return Problem("two metadata files", f"{folder}", "they may disagree about a caption",
                   f"keep one of them: rm {' '.join(shell_word(path) for path in files[1:])}", kind="data")


def _name_column(columns: list[str], image_column: str) -> str | None:
    """The column that names the images' files: that of the wanted images, else the only one there is."""
    others = [column for column in columns if column.endswith("_file_name")]
    wanted = (f"{image_column}_file_name", "file_name", *(others if len(others) == 1 else []))
    return next((column for column in wanted if column in columns), None)


def _column_problems(path: Path, columns: list[str], named_in: str | None, chosen: str | None) -> Iterator[Problem]:
    there = ", ".join(map(printable, columns))
    others = sorted((c for c in columns if c != named_in), key=lambda c: c not in CAPTION_COLUMNS)  # usual ones first
    if named_in is None:
        yield Problem("the metadata has no column 'file_name'", f"{path}", f"columns there: {there}",
                      "name each image in a column file_name", kind="data")
    if chosen is None:
        log.warning("%s has columns %s: none is named %s, so none is read as captions (--caption_column names one)",
                    path, there, " or ".join(CAPTION_COLUMNS))
    elif chosen not in columns:
        yield Problem(f"there is no column {chosen!r}", f"--caption_column {chosen}, {path}", f"columns there: {there}",
                      f"--caption_column {shell_word(others[0])}" if others else "drop --caption_column")


JsonRecord = dict[str, object]


def _records(path: Path) -> tuple[list[tuple[int, JsonRecord]], list[str]]:
    """([(line number, record)], complaints about lines that are none)."""
    parse = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    records, bad = [], []
    for line, item in parse(path.read_bytes()):
        if isinstance(item, str):
            bad.append(f"{path.name}:{line}: {item}")
        else:
            records.append((line, item))
    return records, bad


def _jsonl(data: bytes) -> Iterator[tuple[int, JsonRecord | str]]:
    for line, content in enumerate(decode_text(data)[0].split("\n"), 1):
        if len(content) > MAX_LINE:
            yield line, f"longer than {MAX_LINE} characters"
        elif content.strip():
            yield line, _json_object(content)


def _json_object(content: str) -> JsonRecord | str:
    try:
        item = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return item if isinstance(item, dict) else "not a JSON object"


def _csv(data: bytes) -> Iterator[tuple[int, JsonRecord | str]]:
    reader = csv.DictReader(io.StringIO(decode_text(data)[0], newline=""))
    try:
        for record in reader:
            yield reader.line_num, "more cells than columns" if None in record else record
    except csv.Error as error:
        yield reader.line_num, f"not CSV ({error})"


def _parquet(data: bytes) -> Iterator[tuple[int, JsonRecord | str]]:
    """Rows count from 1."""
    from pyarrow import ArrowException, parquet

    try:
        yield from enumerate(parquet.read_table(io.BytesIO(data)).to_pylist(), 1)
    except (ArrowException, OSError) as error:
        yield 1, f"not Parquet ({error})"


def _entry(
    path: Path, line: int, record: JsonRecord, *, named_in: str | None, column: str | None, several: bool
) -> Entry:
    """One record, checked. Raises BadEntry naming file and line."""
    where = f"{path.name}:{line}"
    name = record.get(named_in or "")
    if not isinstance(name, str):
        raise BadEntry(f"{where}: {named_in} is {_kind(name)}, not text")
    try:
        captions = read_captions(record.get(column) if column else None, several=several)
    except BadEntry as error:
        raise BadEntry(f"{where}: {column} {error}") from None
    try:
        return Entry(_existing(name, path.parent), captions, where)
    except (BadEntry, OSError) as error:
        raise BadEntry(f"{where}: {printable(name[:200])!r} {error}") from None


def read_captions(value: object, *, several: bool) -> tuple[str, ...]:
    """The captions in one cell, each a plain line; blank ones are none. Raises BadEntry for what is no caption."""
    captions = []
    for item in value if several and isinstance(value, list) else [value]:
        if not (item is None or isinstance(item, str)):
            raise BadEntry(f"is {_kind(item)}, not text" if item is value else f"holds {_kind(item)}, not text alone")
        if len((item or "").encode("utf-8", "replace")) > MAX_CAPTION:
            raise BadEntry(f"is longer than {MAX_CAPTION} bytes")
        captions.append(one_line(item or ""))
    return tuple(filter(None, captions))


def _existing(name: str, folder: Path) -> str:
    """`name` as the file system spells it (accents may be composed or not). Raises BadEntry when it cannot be used."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or "://" in name or re.match("[A-Za-z]:", name):
        raise BadEntry("is no relative path with forward slashes")
    if name.startswith("/") or ".." in parts or not inside((folder / name).parent, folder):
        raise BadEntry("leads out of the folder")
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if (folder / form).is_file():
            return PurePosixPath(form).as_posix()
    raise BadEntry("is not a regular file" if (folder / name).exists() else "is not in the folder")


def _refuse_second(first: Entry | None, second: Entry) -> None:
    if first:
        raise BadEntry(f"{second.where}: {printable(second.name)!r} was named by {first.where} already")


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _problem(bad: list[str], what: str, where: Path, fix: str) -> list[Problem]:
    """One data problem for all entries of `bad`; none when there are none."""
    return [Problem(f"{len(bad)} unusable {what}", f"{where}", listing(bad), fix, kind="data")] if bad else []
