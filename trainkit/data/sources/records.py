"""Tables of captions: JSON lines, CSV and Parquet as numbered records, every bad line with its number."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from trainkit.data.sources.text import decode_text
from trainkit.reading import parse_json

MAX_LINE = 1_048_576  # characters of one metadata line
NAME_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order when --caption_column is not given
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

JsonRecord = dict[str, object]
Numbered = Iterator[tuple[int, JsonRecord | str]]  # line and record, or what is wrong with the line


def read_records(path: Path) -> tuple[list[tuple[int, JsonRecord]], list[str], str]:
    """([(line number, record)], complaints about lines that are none, the text's encoding).

    Raises OSError and UnclearText.
    """
    data = path.read_bytes()
    text, encoding = ("", "binary") if path.suffix == ".parquet" else decode_text(data)
    lines = _parquet(data) if path.suffix == ".parquet" else PARSERS[path.suffix](text)
    records, bad = [], []
    for line, item in lines:
        if isinstance(item, str):
            bad.append(f"{path.name}:{line}: {item}")
        else:
            records.append((line, item))
    return records, bad, encoding


def find_column(columns: list[str], name: str) -> str | None:
    """The column of that name; else the only one that differs from it in letter case and spaces alone."""
    alike = [column for column in columns if column.strip().casefold() == name.casefold()]
    return name if name in columns else alike[0] if len(alike) == 1 else None


def _jsonl(text: str) -> Numbered:
    for line, content in enumerate(text.split("\n"), 1):
        if len(content) > MAX_LINE:
            yield line, f"longer than {MAX_LINE} characters"
        elif content.strip():
            yield line, _json_object(content)


def _json_object(content: str) -> JsonRecord | str:
    try:
        item = parse_json(content)
    except ValueError as error:
        return f"not JSON ({error})"
    return item if isinstance(item, dict) else "not a JSON object"


def _csv(text: str) -> Numbered:
    """Cells may begin with a space after the delimiter; it belongs to neither a name nor a caption."""
    first, _, rest = text.partition("\n")
    stated = first.strip()[4:] if first.lower().startswith("sep=") else ""  # as Excel writes it
    delimiter, above = (stated, 1) if stated in DELIMITERS else (delimiter_of(text), 0)
    cells = io.StringIO(rest if above else text, newline="")
    reader = csv.DictReader(cells, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for record in reader:
            yield reader.line_num + above, _too_many(delimiter) if None in record else record
    except csv.Error as error:
        yield reader.line_num + above, f"not CSV: is a double quote not closed, or followed by more? ({error})"


def _too_many(delimiter: str) -> str:
    return f"more cells than columns: a text with a {DELIMITERS[delimiter]} in it stands in double quotes"


def delimiter_of(text: str) -> str:
    """The one that splits the first line into the most columns, file_name among them; a comma where none does."""
    def columns(delimiter: str) -> int:
        header = header_of(text, delimiter)
        return len(header) if any(name.casefold().endswith(NAME_COLUMN) for name in header) else 0

    return max(DELIMITERS, key=columns)


def header_of(text: str, delimiter: str) -> list[str]:
    """Names of the columns, without spaces around them."""
    cells = io.StringIO(text[:MAX_LINE], newline="")
    try:
        first = next(csv.reader(cells, delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        first = []
    return [name.strip() for name in first]


def _parquet(data: bytes) -> Numbered:
    """Rows count from 1."""
    from pyarrow import ArrowException, parquet

    try:
        yield from enumerate(parquet.read_table(io.BytesIO(data)).to_pylist(), 1)
    except (ArrowException, OSError) as error:
        yield 1, f"not Parquet ({error})"


PARSERS: dict[str, Callable[[str], Numbered]] = {".jsonl": _jsonl, ".csv": _csv}
