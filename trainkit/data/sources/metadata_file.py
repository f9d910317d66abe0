"""Captions in kohya's metadata files, such as meta_cap.json: {"image": {"caption": …, "tags": …}}, or lines of JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.sources.account import Account, LeftOut, SourceListing
from trainkit.data.sources.captions import MAX_CAPTION, BadEntry, inside
from trainkit.data.sources.text import as_caption
from trainkit.data.sources.tree import is_image, scan
from trainkit.errors import Problem, counted, listing, printable, shell_word
from trainkit.reading import parse_json, read_text

if TYPE_CHECKING:
    from trainkit.options import CaptionOptions

MOST_BYTES = 512 * 2**20  # of the file: a million captions


def read_metadata_file(file: Path, folder: Path | None, captions: CaptionOptions) -> SourceListing:
    """The images that the file names, in its order. Other images of the folder are left out.

    folder  what relative names count from (image_dir); None: the file names images by their whole paths
    """
    where = f"metadata_file {printable(str(file))}"
    try:
        entries = list(_entries(file))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
        return SourceListing([], [Problem("a metadata file cannot be read", where, why,
                                          "correct it, or write it again with the program that made it", kind="data")])
    names = _Names(folder)
    listed, bad = [], []
    for name, entry in entries:
        try:
            path = names.find(name)
            caption = _caption(entry, captions)
            listed.append(Listed(printable(path.name if folder is None else os.path.relpath(path, folder)), path,
                                 caption))
        except BadEntry as error:
            bad.append(f"{printable(name)[:200]!r} {error}")
    problems = [Problem(f"{counted(len(bad), 'image')} of a metadata file cannot be used", where, listing(bad),
                        "correct these entries, or take them out", kind="data")] if bad else []
    if not entries:
        problems = [Problem("a metadata file names no image", where, "it is empty",
                            "make it with kohya's finetune/merge_captions_to_metadata.py, or name its images in "
                            "metadata.jsonl beside them", kind="data")]
    listed = _each_once(listed)
    used = {found.source for found in listed}
    others = tuple(LeftOut(printable(path.name), f"not in {printable(file.name)}") for path in names.there
                   if path not in used)
    with_caption = sum(bool(found.caption) for found in listed)
    account = Account(len(listed), {printable(file.name): with_caption} if with_caption else {}, others)
    return SourceListing(listed, problems, account)


def _entries(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(name of an image, what is said about it). Raises OSError and ValueError."""
    text = read_text(file, most=MOST_BYTES, of_windows=True)
    if file.suffix.lower() == ".jsonl":
        yield from (_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    table = parse_json(text)
    if not isinstance(table, dict):
        raise ValueError("it is no table of images")
    for name, entry in table.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{name!r}: it should be {{\"caption\": …, \"tags\": …}}")
        yield name, entry


def _line(number: int, line: str) -> tuple[str, Mapping[str, object]]:
    """Raises ValueError."""
    entry = parse_json(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
        raise ValueError(f"line {number} has no image_path")
    return entry["image_path"], entry


def _caption(entry: Mapping[str, object], captions: CaptionOptions) -> str:
    """Caption and tags as one; of several lines of a caption each gets the tags. Raises BadEntry."""
    parts = [entry.get(name) or "" for name in ("caption", "tags")]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise BadEntry("has a caption or tags that are no text")
    if sum(len(text.encode("utf-8", "replace")) for text in texts) > MAX_CAPTION:
        raise BadEntry(f"has a caption of more than {MAX_CAPTION} bytes")
    caption, tags = (as_caption(text) for text in texts)
    separator = f"{captions.caption_separator} "
    tags = separator.join(tags.split("\n"))
    return "\n".join(separator.join(filter(None, [line.strip().removesuffix(captions.caption_separator), tags]))
                     for line in caption.split("\n"))


class _Names:
    """Finds the image that an entry means."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        try:
            self.there = scan(folder).images if folder else []
        except OSError:
            self.there = []
        self.by_stem: dict[str, list[Path]] = {}
        for path in self.there:
            self.by_stem.setdefault(path.stem, []).append(path)
        self.known = {path.name: path for path in self.there}

    def find(self, name: str) -> Path:
        """Raises BadEntry."""
        if name in self.known:
            return self.known[name]
        path = Path(name)
        if self.folder is None:
            if not path.is_absolute():
                raise BadEntry("is no whole path: add image_dir, the folder that it counts from")
            if not is_image(path):
                raise BadEntry("is no image by its name")
        else:
            path = path if path.is_absolute() else self.folder / path
            if "\0" in name or not inside(path, self.folder):
                raise BadEntry(f"leads out of image_dir {shell_word(self.folder)}")
        if len(stems := self.by_stem.get(name, [])) == 1:
            return stems[0]  # kohya's scripts leave the ending out
        if len(stems) > 1:
            raise BadEntry(f"may be {' or '.join(printable(one.name) for one in stems)}: add the ending")
        if "\0" in name or not path.is_file():
            raise BadEntry("is not there")
        return path


def _each_once(listed: Iterable[Listed]) -> list[Listed]:
    """Images by name, those of one name told apart by a number."""
    counts: dict[str, int] = {}
    found = []
    for one in listed:
        number = counts[one.id] = counts.get(one.id, 0) + 1
        found.append(one if number == 1 else Listed(f"{one.id}#{number}", one.source, one.caption, one.others))
    return found
