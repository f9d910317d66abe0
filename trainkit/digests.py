"""What reading a file gave, remembered: a file that was not touched is not read again.

That is digests of weights, verdicts on images, and captions. What is remembered is bound to a file's path, size, times
of change and inode. Linux and macOS set the time of a file's last change of state themselves, so no copy with an old
date is taken for the file before. On Windows that time is the file's birth: an edit that keeps size and date is not
seen there. The memory is a small SQLite database in the user's cache folder. It saves time and nothing else: where it
is locked, broken or cannot be written, files are read again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

log = logging.getLogger(__name__)

FOLDER, FILE = "lora-trainer-suite", "digests.sqlite3"
WAIT_SECONDS = 2.0  # that a process waits in all, for others that write
FRESH_SECONDS = 2.0  # a file changed so lately may change again within one tick of the clock of its file system
MOST = 1_000_000  # entries kept, the last ones written; each takes about 250 bytes
TABLE = ("CREATE TABLE IF NOT EXISTS files (kind TEXT, folder TEXT, name TEXT, state TEXT, value TEXT, "
         "PRIMARY KEY (kind, folder, name))")
UNUSABLE = (sqlite3.Error, OSError, RuntimeError)  # RuntimeError: nobody's home


class FileState(NamedTuple):
    """A file and the state it is in, as they are stored."""

    folder: str
    name: str
    state: str  # version of the computation, size, times and inode

    @property
    def changed(self) -> int:
        """When the file's state last changed, in nanoseconds."""
        return int(self.state.rpartition(" ")[2])


class TablePlace(NamedTuple):
    """A row of a table, which is remembered as a file is: its name, and the state that the whole table is in."""

    table: str
    row: str
    state: str


Place = Path | TablePlace


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / FOLDER
    default = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / FOLDER


def remembered(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    """`compute(path)`, or what it gave for the same untouched file before; `kind` names the computation."""
    memory = FileMemory(kind, [path])
    if path not in memory.values:
        value = compute(path)
        memory.keep({path: value})
        return value
    return memory.values[path]


class FileMemory:
    """What earlier runs found in these files and rows of tables, as far as they are untouched since.

    kind     names the computation; a file has one entry for each
    version  what else its result depends on, see `code_version`; an entry of another version is replaced
    values   what was found, by file; a file that has to be read is not in it

    However many files there are, they take one query for each of their folders, and one transaction to keep.
    """

    def __init__(self, kind: str, places: Iterable[Place], *, version: str = ""):
        self.kind, self.version, self.since = kind, version, time.time_ns()
        self._folders: dict[str, str] = {}
        found = ((place, self._state(place)) for place in places)
        self._before = {place: state for place, state in found if state}
        stored = self._stored()
        self.values = {place: stored[state] for place, state in self._before.items() if state in stored}

    def keep(self, values: Mapping[Place, str]) -> None:
        """Remember what was found in files read after this memory was made.

        A file that has changed since then, or shortly before, is left out.
        """
        old = self.since - FRESH_SECONDS * 1e9
        before = {place: self._before[place] for place in values if place in self._before}
        lasting = [(self.kind, *state, values[place]) for place, state in before.items()
                   if state.changed < old and self._state(place) == state]
        if not lasting:
            return
        try:
            with _database() as database:
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", lasting)
                database.execute("DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?", (MOST,))
        except UNUSABLE as error:
            _log_once(error)

    def _state(self, place: Place) -> FileState | None:
        """None where there is no such file. All is text: an inode may be larger than SQLite's numbers."""
        if isinstance(place, TablePlace):
            return FileState(ascii(place.table), place.row, f"{self.version} {place.state} 0")
        folder, name = os.path.split(place)
        try:
            stat = place.stat()
            if folder not in self._folders:
                self._folders[folder] = ascii(os.path.realpath(folder))  # a path need not be UTF-8
        except OSError:
            return None
        state = f"{self.version} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_ctime_ns}"
        return FileState(self._folders[folder], ascii(name), state)

    def _stored(self) -> dict[FileState, str]:
        """Everything that is remembered of the folders."""
        found: dict[FileState, str] = {}
        folders = dict.fromkeys(state.folder for state in self._before.values())
        if not folders:
            return found
        try:
            with _database() as database:
                for folder in folders:
                    rows = database.execute("SELECT name, state, value FROM files WHERE kind = ? AND folder = ?",
                                            (self.kind, folder))
                    found |= {FileState(folder, name, state): value for name, state, value in rows}
        except UNUSABLE as error:
            _log_once(error)
        return found


@cache
def code_version(*modules: ModuleType) -> str:
    """Digest of modules' source: what they computed before an edit is computed anew."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        digest.update(Path(f"{module.__file__}").read_bytes())
    return digest.hexdigest()


_waited = 0.0  # seconds that this process has waited for others in vain
_logged = False


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """A transaction on the table of files. A rollback journal, SQLite's default, works on network file systems, too."""
    global _waited
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    database = sqlite3.connect(folder / FILE, timeout=max(0.0, WAIT_SECONDS - _waited))
    try:
        with database:
            database.execute(TABLE)
            yield database
    except sqlite3.OperationalError:
        _waited += time.monotonic() - start
        raise
    finally:
        database.close()


def _log_once(error: Exception) -> None:
    """Once, when somebody listens: checks before a run are made before its log is open."""
    global _logged
    if not _logged and log.isEnabledFor(logging.INFO):
        _logged = True
        log.info("what was read of files is not remembered, so they are read again at each start (%s): %s",
                 FILE, error)
