"""A look into any table, whatever it is called: which images it names and what it says about them.

Nothing of this is trained on. It tells a table of captions that lies under the wrong name or in the wrong place from a
file that has nothing to do with the images.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import unescape
from itertools import islice
from pathlib import Path

from trainkit.data.sources.records import DELIMITERS
from trainkit.data.sources.text import UnclearText, decode_text, one_line
from trainkit.reading import parse_json

MAX_BYTES = 16 * 2**20  # looked at of one file
MAX_ROWS = 50_000
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
HEIC = {".heic", ".heif", ".hif"}  # read where pillow-heif is installed
ENDINGS = "|".join(map(re.escape, sorted(SUFFIXES | HEIC, reverse=True)))
IMAGE_NAME = re.compile(rf"[^\\/\"'<>|:*?\t\r\n,;=]+(?:{ENDINGS})\b", re.IGNORECASE)
MEMBERS = re.compile(r"xl/sharedStrings\.xml|xl/worksheets/sheet\d+\.xml|content\.xml")  # of .xlsx and .ods
XML_TEXT = re.compile(r"<(?:t|text:p)(?: [^>]*)?>([^<]*)<")


def key(name: str) -> str:
    """A name without what people and systems change in it: letter case, composed accents, spaces around it."""
    return unicodedata.normalize("NFC", name).casefold().strip()


class KnownImages:
    """Images by name and by stem, wherever they lie."""

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.paths:
            self.by_name[key(path.name)].append(path)
            self.by_stem[key(path.stem)].append(path)

    def named(self, cell: str) -> list[Path]:
        """The images whose file name ends this path, which may have been written on any system."""
        return self.by_name.get(key(cell.replace("\\", "/").rpartition("/")[2]), [])

    def stemmed(self, cell: str) -> list[Path]:
        """The same for a name without a suffix."""
        return self.by_stem.get(key(cell.replace("\\", "/").rpartition("/")[2]), [])


@dataclass
class Mentions:
    """What a file says about images."""

    images: set[Path] = field(default_factory=set)
    captions: dict[Path, str] = field(default_factory=dict)  # text that stands beside an image's name
    cells: dict[Path, str] = field(default_factory=dict)  # the name as it is written


def mentions(file: Path, images: KnownImages) -> Mentions:
    """Which of the images a file names, and the texts beside them. Raises OSError."""
    by_name, by_stem = Mentions(), Mentions()
    for row, keyed in islice(rows(file), MAX_ROWS):
        for place, cell in enumerate(row[:1] if keyed else row):
            if named := images.named(cell):
                _note(by_name, named, cell, row[:place] + row[place + 1 :])
            elif place == 0 and (stemmed := images.stemmed(cell)):
                _note(by_stem, stemmed, cell, row[1:])
    enough = min(2, len(images.paths))
    return by_name if by_name.images or len(by_stem.images) < enough else by_stem


def _note(found: Mentions, images: list[Path], cell: str, others: list[str]) -> None:
    texts = [one_line(text) for text in others if any(map(str.isalpha, text)) and not IMAGE_NAME.fullmatch(text)]
    for image in images:
        found.images.add(image)
        found.cells.setdefault(image, cell)
        if texts:
            found.captions.setdefault(image, max(texts, key=len))


# ---------------------------------------------------------------------------------------------------------- any table


TableRow = tuple[list[str], bool]  # texts; whether the first of them alone may be an image's name


def rows(file: Path) -> Iterator[TableRow]:
    """The texts of each row of a table. Raises OSError."""
    if file.suffix.lower() in (".parquet", ".arrow", ".feather"):
        yield from _arrow_rows(file)
        return
    with file.open("rb") as opened:
        data = opened.read(MAX_BYTES)
    if data.startswith(b"PK"):
        yield from _sheet_rows(data)
        return
    text = _any_text(data)
    try:
        yield from _json_rows(parse_json(text))
    except ValueError:
        yield from _line_rows(text)


def _any_text(data: bytes) -> str:
    try:
        return decode_text(data)[0]
    except UnclearText as error:
        return error.readings[0].text if error.readings else data.decode("latin-1")


def _arrow_rows(file: Path) -> Iterator[TableRow]:
    """Columns of text alone: those of images would be large."""
    from pyarrow import ArrowException, ipc, memory_map, parquet, types

    try:
        if file.suffix.lower() == ".parquet":
            table = parquet.ParquetFile(file)
            names = [f.name for f in table.schema_arrow if types.is_string(f.type) or types.is_large_string(f.type)]
            batches = table.iter_batches(columns=names, batch_size=1024)
        else:
            batches = iter(ipc.open_file(memory_map(str(file))).read_all().to_batches())
        for batch in batches:
            yield from (([v for v in row.values() if isinstance(v, str)], False) for row in batch.to_pylist())
    except ArrowException:
        return


def _sheet_rows(data: bytes) -> Iterator[TableRow]:
    """Neighbouring texts of a spreadsheet, two at a time."""
    for xml in _members(data):
        texts = [unescape(text) for text in XML_TEXT.findall(xml)]
        yield from (([a, b], True) for a, b in zip(texts, texts[1:], strict=False))


def _members(data: bytes) -> list[str]:
    """The parts of a spreadsheet that hold text; none where it is damaged or has a password."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [archive.open(name) for name in archive.namelist() if MEMBERS.fullmatch(name)]
            return [part.read(MAX_BYTES).decode("utf-8", "replace") for part in parts]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, OSError):
        return []


def _json_rows(item: object, depth: int = 4) -> Iterator[TableRow]:
    """Objects as rows of their texts; {name: texts} as a row an entry."""
    if not depth:
        return
    if isinstance(item, list):
        yield _texts(item), False
        for one in item:
            yield from _json_rows(one, depth - 1)
    if isinstance(item, dict):
        yield _texts(list(item.values())), False
        for name, value in item.items():
            yield [str(name), *_texts(list(value.values()) if isinstance(value, dict) else [value])], True
            yield from _json_rows(value, depth - 1)


def _texts(values: list[object]) -> list[str]:
    """The texts among values, and in lists among them."""
    inner = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one for one in inner if isinstance(one, str)]


def _line_rows(text: str) -> Iterator[TableRow]:
    """Lines of JSON, or of cells; a line in prose as the image's name in it and the rest."""
    lines = text.splitlines()
    delimiter = max(DELIMITERS, key=lambda d: sum(line.count(d) > 0 for line in lines[:20]))
    for line in lines:
        try:
            item = parse_json(line)
        except ValueError:
            item = None
        if isinstance(item, dict):
            yield from _json_rows(item)
            continue
        if name := IMAGE_NAME.search(line):
            rest = (line[: name.start()] + " " + line[name.end() :]).strip(" ,;:|=\t-\"'")
            yield [name[0].strip(), rest], True
            yield [name[0].split()[-1], rest], True
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
            yield [cell.strip() for cell in cells], False
        except csv.Error:
            continue
