"""Captions that lie beside images: `<image>.txt` sidecars, and metadata.jsonl, metadata.csv or metadata.parquet.

A data set is somebody else's text: it never names a file outside its folder, and it becomes one plain line.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from trainkit import digests
from trainkit.data.sources import encodings, text
from trainkit.data.sources.records import (
    CAPTION_COLUMNS,
    DELIMITERS,
    NAME_COLUMN,
    JsonRecord,
    find_column,
    read_records,
)
from trainkit.data.sources.text import UnclearText, as_caption, decode_text, iconv
from trainkit.errors import Problem, counted, listing, printable, shell_word

log = logging.getLogger(__name__)

SIDECARS = (".txt", ".caption")  # the first one found wins
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_CAPTION = 65_536  # bytes; an encoder reads 77 tokens, so anything longer is not a caption


class BadEntry(Exception):
    """One caption or metadata line that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Entry:
    """One image that the metadata names."""

    name: str  # path under the folder, forward slashes
    captions: tuple[str, ...]  # none of them blank
    file: str  # "metadata.jsonl"
    line: int  # from 1

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, stays under `folder` (or under the blobs a Hub snapshot folder links to)."""
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(home) for home in homes)


# ---------------------------------------------------------------------------------------------------------- sidecars


@dataclass
class Sidecars:
    """Captions of one folder's images in files of their names."""

    captions: dict[Path, str] = field(default_factory=dict)  # by image; blank where the file says nothing
    spare: list[Path] = field(default_factory=list)  # not read, since another file has the image's caption
    strange: list[Path] = field(default_factory=list)  # of no image's name
    problems: list[Problem] = field(default_factory=list)


class CaptionFiles:
    """Reads the caption files of a data folder, all of `paths`; one that earlier runs read is remembered."""

    def __init__(self, paths: Iterable[Path]):
        version = digests.code_version(sys.modules[__name__], text, encodings)
        self.memory = digests.FileMemory("caption", paths, version=version)
        self.new: dict[digests.Place, str] = {}  # encoding, line break, caption

    def read(self, path: Path, folder: Path) -> tuple[str, str]:
        """(the caption, the encoding it was in). Raises OSError, BadEntry and UnclearText."""
        if path.is_symlink() and not inside(path, folder):
            raise BadEntry("is a link out of the folder; copy the file into it")
        if path not in self.memory.values:
            self.new[path] = "\n".join(reversed(_read_sidecar(path)))
        encoding, _, caption = (self.memory.values.get(path) or self.new[path]).partition("\n")
        return caption, encoding

    def keep(self) -> None:
        """Remember for later runs what was read."""
        self.memory.keep(self.new)


def caption_files(images: Sequence[Path], texts: Sequence[Path], endings: Sequence[str] = SIDECARS
                  ) -> dict[Path, list[Path]]:
    """The caption files of each image among `texts`; the first one is read."""
    by_name: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in texts:
        by_name[path.stem, path.suffix.lower()].append(path)
    return {image: [path for suffix in endings for path in by_name.get((image.stem, suffix), ())] for image in images}


def read_sidecars(folder: Path, images: Sequence[Path], texts: Sequence[Path], files: CaptionFiles,
                  endings: Sequence[str] = SIDECARS) -> Sidecars:
    """What the files `texts` say about images; other encodings than UTF-8 are understood and reported, or refused.

    endings  of the files that are read, the first one found for an image
    """
    found, bad, odd = Sidecars(), [], []
    unclear: dict[Path, UnclearText] = {}
    for image, paths in caption_files(images, texts, endings).items():
        found.spare += paths[1:]
        for path in paths[:1]:
            try:
                found.captions[image], encoding = files.read(path, folder)
            except UnclearText as error:
                unclear[path] = error
            except (OSError, BadEntry) as error:
                bad.append(f"{printable(path.name)}: {error}")
            else:
                odd += [f"{printable(path.name)} ({encoding})"] if not encoding.startswith("utf-8") else []
    if odd:
        log.warning("%s not UTF-8, and read in the encoding that it seems to be: %s",
                    counted(len(odd), "caption is", "captions are"),
                    listing(odd))
    found.problems = [*_problem(bad, "caption files", folder, "fix or delete these files"), *_unclear(folder, unclear)]
    known = {image.stem for image in images}
    found.strange = [path for path in texts if path.stem not in known or path.suffix.lower() not in endings]
    return found


def _read_sidecar(path: Path) -> tuple[str, str]:
    if path.stat().st_size > MAX_CAPTION:
        raise BadEntry(f"is {path.stat().st_size} bytes long; a caption has at most {MAX_CAPTION}")
    caption, encoding = decode_text(path.read_bytes())
    return as_caption(caption), encoding


def _unclear(folder: Path, files: Mapping[Path, UnclearText]) -> list[Problem]:
    """One problem for all files whose encoding would be a guess, with the command that converts them."""
    if not files:
        return []
    by_encoding: dict[str, list[str]] = defaultdict(list)
    for path, error in files.items():
        if error.readings:
            by_encoding[error.readings[0].name].append(str(path))
    why = listing(f"{printable(path.name)} {error}" for path, error in files.items())
    if by_encoding:
        why += "\n             Where these are not the right words, the name after -f is another one"
    fix = iconv(by_encoding, str(folder)) if by_encoding else "save them as UTF-8 in the editor that wrote them"
    what = f"{counted(len(files), 'file')} with captions in an encoding that can only be guessed"
    return [Problem(what, f"{folder}", why, fix, kind="data")]


# ---------------------------------------------------------------------------------------------------------- metadata


def metadata_files(folder: Path) -> list[Path]:
    return [folder / name for name in METADATA if (folder / name).is_file()]


@dataclass(frozen=True)
class Metadata:
    """What a folder's metadata file says."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    file: str = ""  # its name; "" where there is none
    name_column: str = NAME_COLUMN
    caption_column: str | None = None  # None: it has none


def read_metadata(
    folder: Path, column: str | None, *, image_column: str = "image", several: bool = False,
    known: Container[str] = (), verbose: bool = True,
) -> Metadata:
    """Every line of the folder's metadata file, captions from `column`; no file and no column is fine.

    image_column  the image's file is named in `file_name`, or in `<image_column>_file_name`
    several       whether an image may have a list of captions
    known         images that are known to lie there, by their paths under the folder; others are looked for
    verbose       log that no column holds captions, and what the encoding seems to be

    Every bad line is reported with its number, all in one problem.
    """
    files = metadata_files(folder)
    if len(files) != 1:
        return Metadata(problems=[_two_files(folder, files)] if files else [])
    path = files[0]
    try:
        records, bad, encoding = read_records(path)
    except OSError as error:
        return Metadata(problems=_problem([f"{error}"], "metadata files", path, f"chmod u+r {shell_word(path)}"))
    except UnclearText as error:
        return Metadata(problems=_unclear(folder, {path: error}))
    if encoding == "cp1252" and verbose:
        log.warning("%s is not UTF-8 and was read in the encoding it seems to have (%s)", printable(path.name),
                    encoding)
    columns = list(dict.fromkeys(key for _, record in records for key in record))
    named_in = _name_column(columns, image_column)
    chosen = next(filter(None, (find_column(columns, c) for c in ([column] if column else CAPTION_COLUMNS))), column)
    problems = list(_column_problems(path, columns, named_in, chosen)) if records else []
    if records and chosen is None and verbose:
        log.warning("%s has columns %s: none is named %s, so none is read as captions (--caption_column names one)",
                    printable(str(path)), ", ".join(map(printable, columns)), " or ".join(CAPTION_COLUMNS))
    entries: dict[str, Entry] = {}
    for line, record in records if not problems else []:
        try:
            entry = _entry(path, line, record, named_in=named_in, column=chosen, several=several, known=known)
            _refuse_second(entries.get(entry.name), entry)
            entries[entry.name] = entry
        except BadEntry as error:
            bad.append(f"{error}")
    problems += _problem(bad, f"lines of {path.name}", path, "fix or delete these lines")
    return Metadata(list(entries.values()), problems, path.name, named_in or NAME_COLUMN, chosen)


def _two_files(folder: Path, files: list[Path]) -> Problem:
    return Problem("two metadata files", f"{folder}", "they may disagree about a caption",
                   f"keep one of them: rm {' '.join(map(shell_word, files[1:]))}", kind="data")


def _name_column(columns: list[str], image_column: str) -> str | None:
    """The column that names the images' files: that of the wanted images, else the only one there is."""
    others = [column for column in columns if column.endswith("_file_name")]
    wanted = (f"{image_column}_file_name", NAME_COLUMN, *(others if len(others) == 1 else []))
    return next(filter(None, (find_column(columns, column) for column in wanted)), None)


def _column_problems(path: Path, columns: list[str], named_in: str | None, chosen: str | None) -> Iterator[Problem]:
    there = ", ".join(map(printable, columns))
    others = sorted((c for c in columns if c != named_in), key=lambda c: c not in CAPTION_COLUMNS)  # usual ones first
    if named_in is None:
        cells = f"; columns are parted by a {', '.join(DELIMITERS.values())}" if path.suffix == ".csv" else ""
        yield Problem("the metadata has no column 'file_name'", f"{path}", f"columns there: {there}{cells}",
                      "name each image in a column file_name", kind="data")
    if chosen is not None and chosen not in columns:
        yield Problem(f"there is no column {chosen!r}", f"--caption_column {chosen}, {path}", f"columns there: {there}",
                      f"--caption_column {shlex.quote(printable(others[0]))}" if others else "drop --caption_column")


def _entry(
    path: Path, line: int, record: JsonRecord, *, named_in: str | None, column: str | None, several: bool,
    known: Container[str],
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
        return Entry(_existing(name, path.parent, known), captions, path.name, line)
    except (BadEntry, OSError) as error:
        raise BadEntry(f"{where}: {printable(name[:200])!r} {error}") from None


def read_captions(value: object, *, several: bool) -> tuple[str, ...]:
    """The captions in one cell, each in plain lines; blank ones are none. Raises BadEntry for what is no caption."""
    captions = []
    for item in value if several and isinstance(value, list) else [value]:
        if not (item is None or isinstance(item, str)):
            raise BadEntry(f"is {_kind(item)}, not text" if item is value else f"holds {_kind(item)}, not text alone")
        if len((item or "").encode("utf-8", "replace")) > MAX_CAPTION:
            raise BadEntry(f"is longer than {MAX_CAPTION} bytes")
        captions.append(as_caption(item or ""))
    return tuple(filter(None, captions))


def is_portable(name: str) -> bool:
    """Whether metadata may name an image so: a path that means the same on every system."""
    odd = "\0" in name or "\\" in name or "://" in name or re.match("[A-Za-z]:", name)
    return bool(PurePosixPath(name).parts) and not odd


def _existing(name: str, folder: Path, known: Container[str]) -> str:
    """`name` as the file system spells it (accents may be composed or not). Raises BadEntry when it cannot be used."""
    parts = PurePosixPath(name).parts
    if not is_portable(name):
        raise BadEntry("is no relative path with forward slashes")
    if name in known:
        return name
    if name.startswith("/") or ".." in parts or not inside((folder / name).parent, folder):
        raise BadEntry("leads out of the folder")
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if (folder / form).is_file():
            return PurePosixPath(form).as_posix()
    if (folder / parts[-1]).is_file():
        raise BadEntry(f"is not in the folder: names count from the folder of the metadata, write {parts[-1]!r}")
    known = _names(folder, folder.stat().st_mtime_ns)
    if alike := known.get(name.casefold()) or known.get(Path(name).stem.casefold()):
        raise BadEntry(f"is not in the folder, but {printable(alike)} is")
    raise BadEntry("is not a regular file" if (folder / name).exists() else "is not in the folder")


@lru_cache(maxsize=4)
def _names(folder: Path, changed: int) -> dict[str, str]:
    """The folder's names by what they are without regard to letter case, and to the suffix."""
    names = sorted(path.name for path in folder.iterdir())
    return {Path(name).stem.casefold(): name for name in names} | {name.casefold(): name for name in names}


def _refuse_second(first: Entry | None, second: Entry) -> None:
    if first:
        raise BadEntry(f"{second.where}: {printable(second.name)!r} was named by {first.where} already")


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _problem(bad: list[str], what: str, where: Path, fix: str) -> list[Problem]:
    """One data problem for all entries of `bad`; none when there are none."""
    return [Problem(f"{len(bad)} unusable {what}", f"{where}", listing(bad), fix, kind="data")] if bad else []
