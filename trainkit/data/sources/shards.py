"""Images in WebDataset shards: tar files in which the members of one sample share a name, such as 000.jpg and 000.txt.

Members are read where they lie; nothing is unpacked, so no name in a shard is ever a place on the disk.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.sources.account import Account, LeftOut, SourceListing
from trainkit.data.sources.captions import MAX_CAPTION, SIDECARS, BadEntry, read_captions
from trainkit.data.sources.records import CAPTION_COLUMNS
from trainkit.data.sources.shard_index import DamagedShard, ShardIndex, TarImage, TarShard
from trainkit.data.sources.text import UnclearText, decode_text
from trainkit.data.sources.tree import HELD_OUT
from trainkit.digests import TablePlace, cache_folder
from trainkit.errors import Problem, counted, listing, printable, shell_word
from trainkit.reading import parse_json
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

PACKED = {".tar.gz": "gunzip -k --", ".tgz": "gunzip -k --", ".tar.bz2": "bunzip2 -k --", ".tar.xz": "unxz -k --",
          ".tar.zst": "zstd -d --"}
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as WebDataset writes several shards: set-{000..012}.tar
MOST_SHARDS = 100_000
SPLIT = re.compile(r"[a-z]+", re.IGNORECASE)  # the first word of a shard's name


@dataclass(frozen=True, slots=True)
class TarMember:
    """The image in one member of a tar file."""

    shard: TarShard
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.shard.path.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise OSError("the shard is shorter than when it was indexed")
        return data

    @property
    def place(self) -> TablePlace:
        return TablePlace(f"{self.shard.path}", f"{self.offset}", self.shard.state)

    def __str__(self) -> str:
        return f"{self.shard.path}, {printable(self.name)}"


def find_shards(name: str) -> list[Path]:
    """The tar files that a name means: one, those of a folder, a pattern or numbers in braces; [] where it means none.
    """
    if not name.endswith(".tar"):
        path = Path(name)
        try:
            found = sorted(path.glob("*.tar")) if path.is_dir() else []
        except OSError:
            return []
        return _of_train(found) if not (found and _holds_tables(path)) else []
    if braces := NUMBERS.search(name):
        first, last = braces.groups()
        numbers = range(int(first), min(int(last), int(first) + MOST_SHARDS) + 1)
        return [Path(f"{name[:braces.start()]}{i:0{len(first)}}{name[braces.end():]}") for i in numbers]
    if glob.has_magic(name) and not Path(name).exists():
        return sorted(map(Path, glob.glob(name)))  # noqa: PTH207, the pattern may be absolute
    return [Path(name)] if Path(name).exists() else []


def _holds_tables(folder: Path) -> bool:
    return any(folder.glob("*.parquet")) or any(folder.glob("*.arrow"))


def _of_train(paths: list[Path]) -> list[Path]:
    """Without shards of other splits, where some are called train."""
    words = {path: (SPLIT.match(path.name) or [""])[0].lower() for path in paths}
    return [path for path in paths if words[path] not in HELD_OUT] if "train" in words.values() else paths


def packed_problem(name: str) -> Problem | None:
    """That shards are compressed: a member of one cannot be read without all before it."""
    path = Path(name)
    try:
        found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        return None
    packed = {one: unpack for one in found for ending, unpack in PACKED.items() if one.name.endswith(ending)}
    if not packed or len(packed) < len(found):
        return None
    unpack = next(iter(packed.values()))
    return Problem(counted(len(packed), "compressed shard"), f"--dataset_name {printable(name)}",
                   "images are read in any order, and from a compressed file only one after another",
                   f"{unpack} {' '.join(map(shell_word, [*packed][:5]))}", kind="data")


def list_shards(data: ImageOptions, paths: Sequence[Path], ending: str | None = None) -> SourceListing:
    """The images of the shards, in the order of the files and their members.

    ending  of the caption members that are read; None: .txt, .caption, and .json with a column of captions
    """
    folder = Path(data.latent_cache_dir) if data.latent_cache_dir else cache_folder()
    with closing(ShardIndex(folder)) as index:
        _index(index, paths[ranks.rank() :: ranks.world()])  # each process a part; then what its own disk lacks
        ranks.barrier()
        shards, damaged = _index(index, paths)
        reader = _Reader(data, ending)
        found = [one for shard in shards for one in reader.read(shard, index)]
    problems = _damaged(damaged) + reader.problems()
    if not found and not problems:
        problems = [Problem("no images", f"--dataset_name {printable(data.dataset_name or '')}",
                            f"{counted(len(paths), 'shard')} without a member named as an image is, such as 000.jpg",
                            "--dataset_name ANOTHER", kind="data")]
    cut = [printable(shard.path.name) for shard in shards if shard.cut]
    if cut:
        log.warning("%s no mark at the end, as if cut off: %s", counted(len(cut), "shard has", "shards have"),
                    listing(cut))
    return SourceListing(found, problems, Account(len(found), dict(reader.captions), tuple(reader.left_out)))


def _index(index: ShardIndex, paths: Sequence[Path]) -> tuple[list[TarShard], dict[Path, str]]:
    shards, damaged = [], {}
    for path in paths:
        try:
            shards.append(index.add(path))
        except DamagedShard as error:
            damaged[path] = f"{error}"
        except OSError as error:
            damaged[path] = error.strerror or f"{error}"
    return shards, damaged


def _damaged(shards: Mapping[Path, str]) -> list[Problem]:
    if not shards:
        return []
    names = " ".join(shell_word(path) for path in [*shards][:5])
    return [Problem(f"{counted(len(shards), 'shard')} cannot be read", f"{next(iter(shards)).parent}",
                    listing(f"{printable(path.name)}: {why}" for path, why in shards.items()),
                    "copy or download them again, or leave them out: "
                    f'for f in {names}; do mv -- "$f" "$f.damaged"; done', kind="data")]


class _Reader:
    """Images of shards with their captions, and the account of what is not read."""

    def __init__(self, data: ImageOptions, ending: str | None):
        self.column, self.several = data.wanted_column, data.captioned
        texts = (ending,) if ending else SIDECARS
        self.endings = (".json", *texts) if self.column else (*texts, ".json")
        self.captions: Counter[str] = Counter()
        self.left_out: list[LeftOut] = []
        self.bad: list[str] = []

    def read(self, shard: TarShard, index: ShardIndex) -> Iterator[Listed]:
        keys: set[str] = set()
        start = printable(shard.path.name)
        for member in index.images(shard):
            name = f"{start}/{printable(member.name)}"
            key = member.name.rpartition(".")[0]
            if key in keys:
                self.left_out.append(LeftOut(name, "its sample has another image"))
                continue
            keys.add(key)
            first, *others = self._captions(name, member) or ("",)
            yield Listed(name, TarMember(shard, member.name, member.offset, member.size), first, tuple(others))
        self.left_out += [LeftOut(f"{start}/*{ending}", f"{counted(number, 'member')} of no kind that is read")
                          for ending, number in index.others(shard)]

    def _captions(self, name: str, member: TarImage) -> tuple[str, ...]:
        for ending in self.endings:
            if ending not in member.texts:
                continue
            try:
                found = read_captions(self._value(ending, member.texts[ending]), several=self.several)
            except (BadEntry, UnclearText, ValueError) as error:
                self.bad.append(f"{name}: its {ending} {error}")
                return ()
            if found:
                self.captions[f"{ending} members"] += 1
                return found
        return ()

    def _value(self, ending: str, content: bytes) -> object:
        if len(content) > MAX_CAPTION:
            raise BadEntry(f"is longer than {MAX_CAPTION} bytes")
        text = decode_text(content)[0]
        if ending != ".json":
            return text
        table = parse_json(text)
        if not isinstance(table, dict):
            raise BadEntry("is no object")
        columns = [self.column] if self.column else CAPTION_COLUMNS
        return next((table[name] for name in columns if name in table), None)

    def problems(self) -> list[Problem]:
        if not self.bad:
            return []
        return [Problem(counted(len(self.bad), "unusable caption"), "--dataset_name", listing(self.bad),
                        "correct these members and pack the shards again", kind="data")]
