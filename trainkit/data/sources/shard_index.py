"""Where each member of WebDataset shards lies: a SQLite database, so that any image is read at once, in any order.

A shard is scanned once, and again when its size, times or inode change. What a scan finds is written in one
transaction: a killed program leaves no half of it, and several may scan at the same time.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainkit.data.sources.captions import MAX_CAPTION, SIDECARS
from trainkit.data.sources.glimpse import HEIC, SUFFIXES
from trainkit.errors import printable

log = logging.getLogger(__name__)

FILE = "shards-1.sqlite3"  # the number is raised when the tables change
WAIT_SECONDS = 120.0  # for another process that writes what it found
IMAGE, TEXT, OTHER = range(3)  # kinds of members
TABLES = f"""
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, path TEXT UNIQUE, state TEXT, cut INTEGER);
CREATE TABLE IF NOT EXISTS members (shard INTEGER, place INTEGER, kind INTEGER, key BLOB, ending TEXT, offset INTEGER,
                                    size INTEGER, text BLOB, PRIMARY KEY (shard, place)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS members_by_key ON members (shard, key) WHERE kind = {TEXT};
"""
TEXTS = (*SIDECARS, ".json")
PAGE = 1000  # images read at once
BLOCK = 512  # bytes that a tar file is made of


class DamagedShard(Exception):
    """The file is no whole tar file; the message says why."""


@dataclass(frozen=True)
class TarShard:
    """One tar file, in the state in which it was scanned."""

    path: Path
    number: int  # in the database
    state: str
    cut: bool = False  # it has no mark at its end


class TarImage(NamedTuple):
    """One image in a shard, and the texts of its sample by ending."""

    name: str  # with surrogates for bytes that are no UTF-8
    offset: int
    size: int
    texts: dict[str, bytes]


class ShardIndex:
    """The members of shards, kept in `folder`; where that cannot be written, until the end of the program."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.database = self._open()

    def close(self) -> None:
        self.database.close()

    def add(self, path: Path) -> TarShard:
        """The shard, scanned now if it was not yet. Raises OSError and DamagedShard."""
        name, state = ascii(os.path.realpath(path)), state_of(path)
        if known := self._known(path, name, state):
            return known
        cut = self._scan(path)
        if state_of(path) != state:
            raise DamagedShard("it changed while it was read: another program is writing it")
        with self.database:
            self.database.execute("BEGIN IMMEDIATE")
            if self._known(path, name, state) is None:  # else another process was faster
                self._keep(name, state, cut)
        self.database.execute("DELETE FROM scanned")
        known = self._known(path, name, state)
        assert known is not None
        return known

    def images(self, shard: TarShard) -> Iterator[TarImage]:
        """In the order of the tar file; a page at a time, since a reader keeps others from writing."""
        last = -1
        while page := self.database.execute(
                "SELECT place, key, ending, offset, size FROM members WHERE shard = ? AND place > ? "
                f"AND kind = {IMAGE} ORDER BY place LIMIT {PAGE}", (shard.number, last)).fetchall():
            for place, key, ending, offset, size in page:
                texts = self.database.execute(
                    "SELECT ending, text FROM members INDEXED BY members_by_key WHERE shard = ? AND key = ? "
                    f"AND kind = {TEXT} ORDER BY place DESC", (shard.number, key)).fetchall()
                yield TarImage(key.decode("utf-8", "surrogateescape") + ending, offset, size, dict(texts))
                last = place

    def others(self, shard: TarShard) -> list[tuple[str, int]]:
        """(ending, number) of members that are neither images nor captions."""
        return self.database.execute("SELECT ending, count(*) FROM members WHERE shard = ? AND kind = ? "
                                     "GROUP BY ending ORDER BY ending", (shard.number, OTHER)).fetchall()

    def _open(self) -> sqlite3.Connection:
        for path in (self.path, self.path, Path()):  # a damaged one is made anew; else one that nobody else sees
            try:
                if path.name:
                    path.parent.mkdir(parents=True, exist_ok=True)
                return _connected(f"{path}" if path.name else "")
            except sqlite3.OperationalError as error:
                log.warning("the index of shards cannot be kept in %s (%s), so they are scanned at every start",
                            printable(str(self.path)), error)
            except sqlite3.DatabaseError:
                log.warning("the index of shards %s is damaged and made anew", printable(str(self.path)))
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("the index of shards cannot be kept in %s (%s), so they are scanned at every start",
                            printable(str(self.path)), error.strerror)
        raise AssertionError("a database in a temporary file can be made")

    def _known(self, path: Path, name: str, state: str) -> TarShard | None:
        found = self.database.execute("SELECT id, cut FROM shards WHERE path = ? AND state = ?", (name, state))
        row = found.fetchone()
        return TarShard(path, row[0], state, bool(row[1])) if row else None

    def _scan(self, path: Path) -> bool:
        """Write the members into a table of this process's own; True: the file has no mark at its end."""
        with self.database:
            self.database.execute("DELETE FROM scanned")
            self.database.executemany("INSERT INTO scanned VALUES (?, ?, ?, ?, ?, ?, ?)", scan_tar(path))
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2 * BLOCK))
            return bool(file.read().strip(b"\0"))

    def _keep(self, name: str, state: str, cut: bool) -> None:
        self.database.execute("DELETE FROM members WHERE shard IN (SELECT id FROM shards WHERE path = ?)", (name,))
        self.database.execute("DELETE FROM shards WHERE path = ?", (name,))
        number = self.database.execute("INSERT INTO shards (path, state, cut) VALUES (?, ?, ?)",
                                       (name, state, cut)).lastrowid
        self.database.execute("INSERT INTO members SELECT ?, place, kind, key, ending, offset, size, text FROM scanned",
                              (number,))


def _connected(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, timeout=WAIT_SECONDS, isolation_level=None)
    try:
        database.executescript(TABLES)
        database.execute("CREATE TEMP TABLE scanned (place, kind, key, ending, offset, size, text)")
    except sqlite3.Error:
        database.close()
        raise
    return database


def state_of(path: Path) -> str:
    """What of a file changes when it does. Raises OSError."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_ctime_ns}"


# ----------------------------------------------------------------------------------------------------------------------
# One tar file

Scanned = tuple[int, int, bytes, str, int, int, bytes | None]  # place, kind, key, ending, offset, size, text


def scan_tar(path: Path) -> Iterator[Scanned]:
    """Every member, in its order; nothing is unpacked. Raises OSError and DamagedShard."""
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar, path.open("rb") as file:
            whole = (_whole(member, path.stat().st_size) for member in _members(tar))
            yield from (_scanned(place, member, file.fileno()) for place, member in enumerate(whole)
                        if not member.isdir())
    except tarfile.TarError as error:
        raise DamagedShard(f"{error}: it is no tar file, or was not copied whole") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else it remembers all
        yield member


def _whole(member: tarfile.TarInfo, size: int) -> tarfile.TarInfo:
    """Raises DamagedShard: a file of this size ends before the member does."""
    if member.offset_data + (member.size if member.isreg() else 0) > size:
        raise DamagedShard(f"it ends in the middle of {printable(member.name)}: it was not copied whole")
    return member


def _scanned(place: int, member: tarfile.TarInfo, file: int) -> Scanned:
    """Keys end at the first dot of the last part of a name, as in WebDataset."""
    folder, slash, base = member.name.rpartition("/")
    stem, dot, rest = base.partition(".")
    key, ending = f"{folder}{slash}{stem}", f"{dot}{rest}".lower() if dot else ""
    plain = member.isreg() and not member.issparse()
    kind = OTHER if not plain else IMAGE if ending in (*SUFFIXES, *HEIC) else TEXT if ending in TEXTS else OTHER
    text = os.pread(file, min(member.size, MAX_CAPTION + 1), member.offset_data) if kind == TEXT else None
    if kind == IMAGE:
        ending = f"{dot}{rest}"  # as it is written
    return (place, kind, key.encode("utf-8", "surrogateescape"), ending if plain else "links and devices",
            member.offset_data, member.size, text)

