"""Digests of large files, remembered: a file that was not touched is not read again.

What is remembered is bound to a file's path, size, times of change and inode; only the operating system sets the time
of its last change of state, so no copy with an old date is taken for the file before. The memory is a small SQLite
database in the user's cache folder. It saves time and nothing else: where it is locked, broken or cannot be written,
files are read again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER, FILE = "lora-trainer-suite", "digests.sqlite3"
WAIT_SECONDS = 2.0  # for another process that writes
FRESH_SECONDS = 2.0  # a file changed so lately may change again within one tick of the clock of its file system
FileKey = tuple[str, str, int, int, int, int]  # what for, path, size, times of content and state, inode


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / FOLDER
    default = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / FOLDER


def remembered(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    """`compute(path)`, or what it gave for the same untouched file before; `kind` names the computation."""
    before = _key(path, kind)
    found = _recall(before)
    if found is not None:
        return found
    value = compute(path)
    if _key(path, kind) == before and time.time_ns() - before[4] > FRESH_SECONDS * 1e9:
        _remember(before, value)
    return value


def _key(path: Path, kind: str) -> FileKey:
    stat = path.stat()
    return kind, str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _recall(key: FileKey) -> str | None:
    try:
        with _database() as database:
            row = database.execute("SELECT value FROM digests WHERE kind = ? AND path = ? AND size = ? AND mtime = ? "
                                   "AND ctime = ? AND inode = ?", _stored(key)).fetchone()
    except (sqlite3.Error, OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        log.debug("digests are not remembered: %s", error)
        return None
    return str(row[0]) if row else None


def _remember(key: FileKey, value: str) -> None:
    try:
        with _database() as database:
            database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?, ?)", (*_stored(key), value))
    except (sqlite3.Error, OSError, RuntimeError) as error:
        log.debug("a digest is not remembered: %s", error)


def _stored(key: FileKey) -> tuple[str, ...]:
    """All as text: an inode may be larger than SQLite's numbers, and a path need not be UTF-8."""
    return tuple(ascii(part) for part in key)


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """One entry a file and computation; what was remembered of an earlier state of the file is replaced."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(folder / FILE, timeout=WAIT_SECONDS)
    try:
        with database:  # a transaction, with a rollback journal: it works on network file systems, too
            database.execute("CREATE TABLE IF NOT EXISTS digests (kind TEXT, path TEXT, size TEXT, mtime TEXT, "
                             "ctime TEXT, inode TEXT, value TEXT, PRIMARY KEY (kind, path))")
            yield database
    finally:
        database.close()
