"""Cache folders as a whole: where they are, what they hold, which entries are damaged, which nobody needs any more."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from trainkit.data.cache import (
    ENTRY,
    PART,
    STALE_SECONDS,
    SUFFIX,
    DamagedEntry,
    StoredTensors,
    UnreadableEntry,
    entry_paths,
    read_entry,
)
from trainkit.data.cache_uses import FOLDER, KnownUse, alone, known_uses
from trainkit.files import Json, read_object
from trainkit.reading import parse_json

POSTERIOR = ("mean", "logvar")  # tensors of an image's entry; a caption's are a network's condition
TEXT, MASK = "embeds", "mask"
MOST_HEADER = 2**20  # bytes

ShowDone = Callable[[float], None]


def find_caches(folder: Path) -> list[Path]:
    """The cache folders in `folder`: itself, and all below it; also those that the runs there say they use."""
    found: dict[Path, None] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if "run.json" in files and (named := _cache_of_run(here)):
            found[named] = None
        if FOLDER in folders or any(PART.fullmatch(name) and _has_entry(here / name) for name in folders):
            found[here] = None
            folders[:] = [name for name in folders if name != FOLDER and not PART.fullmatch(name)]
    return list({path.resolve(): path for path in found}.values())


def _cache_of_run(run: Path) -> Path | None:
    named = setting(run, "latent_cache_dir")
    return Path(named) if isinstance(named, str) and is_cache(Path(named)) else None


def is_cache(folder: Path) -> bool:
    return folder.is_dir() and ((folder / FOLDER).is_dir() or any(
        PART.fullmatch(path.name) and _has_entry(path) for path in folder.iterdir()))


def _has_entry(part: Path) -> bool:
    try:
        return any(ENTRY.fullmatch(path.name) for path in part.iterdir())
    except OSError:
        return False


def setting(run: Path, flag: str) -> Json:
    """What a run was given for a flag, from its run.json; None where that does not say."""
    options = read_object(run / "run.json").get("options")
    given = options.get(flag) if isinstance(options, dict) else None
    return given.get("value") if isinstance(given, dict) else None


# ----------------------------------------------------------------------------------------------------------------------
# What is there


@dataclass(frozen=True)
class CacheEntry:
    """One file of a cache folder, as the file system sees it."""

    path: Path
    size: int  # bytes
    written: float  # seconds since 1970

    @property
    def key(self) -> str:
        return self.path.name.removesuffix(SUFFIX)


@dataclass
class CacheContents:
    """A cache folder: its entries, and who uses them."""

    folder: Path
    entries: Sequence[CacheEntry]
    uses: Sequence[KnownUse]

    @classmethod
    def of(cls, folder: Path) -> CacheContents:
        uses = known_uses(folder)  # before the entries, as a run writes its list of them first
        return cls(folder, [*_entries(folder)], uses)

    @cached_property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @cached_property
    def keys(self) -> Mapping[Path, set[str]]:
        """Of the entries that each run has used, by output folder."""
        found: dict[Path, set[str]] = {}
        for use in self.uses:
            found.setdefault(use.run, set()).update(use.keys)
        return found

    @property
    def last_used(self) -> float | None:
        """Seconds since 1970; of a folder that says nothing of its uses, when the last entry was written."""
        times = [use.last for use in self.uses] or [entry.written for entry in self.entries]
        return max(times, default=None)


def _entries(folder: Path) -> Iterator[CacheEntry]:
    for path in entry_paths(folder):
        with suppress(FileNotFoundError):  # another process has just deleted it
            stat = path.stat()
            yield CacheEntry(path, stat.st_size, stat.st_mtime)


@dataclass
class EntryGroup:
    """Entries of one kind: their number, bytes, and how often each number format and each size is there."""

    entries: int = 0
    size: int = 0
    forms: Counter[str] = field(default_factory=Counter)


def kinds(entries: Sequence[CacheEntry], show: ShowDone) -> dict[str, EntryGroup]:
    """Latents, captions, masks, and what is none of them, by name; reads the headers alone."""
    found: dict[str, EntryGroup] = {}
    for done, entry in enumerate(entries, 1):
        name, form = _kind(_header(entry.path))
        kind = found.setdefault(name, EntryGroup())
        kind.entries, kind.size = kind.entries + 1, kind.size + entry.size
        kind.forms[form] += 1
        show(done)
    return found


def _header(path: Path) -> dict[str, Json]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = parse_json(file.read(length).decode()) if 0 < length <= MOST_HEADER else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _kind(header: Mapping[str, Json]) -> tuple[str, str]:
    named = {POSTERIOR[0]: "latents", TEXT: "captions", MASK: "masks"}
    first = next((tensor for tensor in named if tensor in header), TEXT)
    name = named[first]
    tensor = header.get(first)
    if not isinstance(tensor, dict) or not isinstance(tensor.get("shape"), list):
        return "not readable", ""
    shape = tensor["shape"][:1] if name == "captions" else tensor["shape"][:0:-1]
    form = "x".join(map(str, shape)) + (" tokens" if name == "captions" else "")
    return name, f"{form} {str(tensor.get('dtype')).lower()}"


# ----------------------------------------------------------------------------------------------------------------------
# What is damaged, what nobody needs


def fault(path: Path) -> str:
    """Why an entry cannot be used; "" where it can, or where another process has deleted it. Reads all of it."""
    try:
        tensors = read_entry(path)
    except DamagedEntry as error:
        return f"{error}"
    except UnreadableEntry as error:
        return f"it cannot be opened: {error}" if path.exists() else ""
    if unfinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        return f"there are NaN or infinite values in {', '.join(unfinite)}"
    return _wrong_form(tensors)


def _wrong_form(tensors: StoredTensors) -> str:
    if set(POSTERIOR) & tensors.keys():
        mean, logvar = (tensors.get(name) for name in POSTERIOR)
        right = mean is not None and logvar is not None and mean.dim() == 3 and mean.shape == logvar.shape
        return "" if right else "mean and logvar should be two tensors [C,h,w]"
    dimensions = {name: tensors[name].dim() for name in (TEXT, MASK) if name in tensors}
    return "" if dimensions in ({TEXT: 2}, {MASK: 3}) else "it holds no latent, no caption and no mask"


@dataclass(frozen=True)
class Garbage:
    """What `collect` found: entries that nobody needs, and records of runs that are gone."""

    entries: Sequence[CacheEntry]
    uses: Sequence[KnownUse]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


def collect(folder: Path, *, older_than: float | None, delete: bool) -> tuple[CacheContents, Garbage]:
    """Find what no run needs, and delete it if `delete`. Meanwhile no run can begin to use the folder.

    older_than  seconds; then a run that has not been started for so long needs nothing, either
    """
    with alone(folder):
        contents = CacheContents.of(folder)
        garbage = _garbage(contents, older_than)
        if delete:
            for entry in garbage.entries:
                entry.path.unlink(missing_ok=True)
            for use in garbage.uses:
                use.forget()
    return contents, garbage


def _garbage(contents: CacheContents, older_than: float | None) -> Garbage:
    now = time.time()
    ends = [use for use in contents.uses if use.alive is False and not (
        use.run_exists and (older_than is None or now - use.last < older_than))]
    needed = set[str]().union(*(use.keys for use in contents.uses if use not in ends))
    return Garbage([*_unneeded(contents.entries, needed, now - STALE_SECONDS)], ends)


def _unneeded(entries: Sequence[CacheEntry], needed: Collection[str], before: float) -> Iterator[CacheEntry]:
    """A run that could not write down its use may still need what is new."""
    return (entry for entry in entries if entry.key not in needed and entry.written < before)
