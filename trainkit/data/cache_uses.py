"""Who uses a cache folder, and which of its entries: what `lora-tools cache` must know before it may delete one.

Each process of a run keeps three files in the folder's `.uses`: NAME.json says who it is, NAME.keys holds the keys of
all entries that the run has ever used (16 bytes each), and NAME.lock is locked while the process lives, so that the
operating system frees it when the process is killed. NAME is a digest of host, output folder and rank: a resumed run
goes on with the files of the run before.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainkit.files import atomic_write, read_object, write_json
from trainkit.runtime import ranks
from trainkit.runtime.lock import ORPHAN_SECONDS

log = logging.getLogger(__name__)

FOLDER = ".uses"
KEY_BYTES = 16
WAIT_SECONDS = 600  # for a process that is deleting entries
UNUSABLE = (OSError, NotImplementedError)  # Timeout of a lock is an OSError; NotImplementedError: no locks there


class Use:
    """This process's use of a cache folder, for as long as the object lives.

    Where it cannot be recorded, as on a disk that is full or only to be read from, the log says so once and the run
    goes on: it needs none of this.
    """

    def __init__(self, cache: Path, run_dir: Path):
        from filelock import FileLock

        run = run_dir.resolve()
        who = f"{platform.node()}\n{run}\n{ranks.rank()}".encode("utf-8", "surrogateescape")
        self.cache, self.recorded = cache, True
        self.path = cache / FOLDER / f"{hashlib.blake2b(who, digest_size=16).hexdigest()}.json"
        facts = {"run": f"{run}", "host": platform.node(), "pid": os.getpid()}
        self.lock = FileLock(self.path.with_suffix(".lock"), timeout=ORPHAN_SECONDS)
        with self._noting(), alone(cache):
            write_json(self.path, facts)
            self.lock.acquire()

    def refer(self, keys: bytes | bytearray) -> None:
        """Keep the entries of these keys for this run; when it returns, nobody is deleting any."""
        with self._noting(), alone(self.cache):
            path = self.path.with_suffix(".keys")
            before = packed_keys(path)
            if (every := _distinct(before + keys)) != before:
                atomic_write(path, every)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except UNUSABLE as error:
            if self.recorded:
                log.warning("the use of %s cannot be recorded there, so `lora-tools cache gc` might delete what this "
                            "run needs: %s", self.cache, error)
            self.recorded = False


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Inside, no other process deletes entries of the folder, and none begins to use it."""
    from filelock import FileLock

    (cache / FOLDER).mkdir(exist_ok=True)
    with FileLock(cache / FOLDER / "all.lock", timeout=WAIT_SECONDS):
        yield


def packed_keys(path: Path) -> bytes:
    """The keys in a file, one behind the other; b"" where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: len(data) // KEY_BYTES * KEY_BYTES]


def _distinct(keys: bytes) -> bytes:
    """Each key once, in order. Of 400,000 keys a Python set would take 40 MB."""
    return np.unique(np.frombuffer(keys, ">u8").reshape(-1, 2), axis=0).tobytes()


@dataclass(frozen=True)
class KnownUse:
    """What a folder says of one process that uses it or used it.

    last   when it last started, in seconds since 1970; now for one that lives
    alive  whether it still runs; None: it cannot be told
    """

    path: Path
    run: Path
    host: str
    pid: int
    last: float
    alive: bool | None

    @property
    def run_exists(self) -> bool:
        """Whether the run's folder is there, as far as this machine can tell."""
        return self.host != platform.node() or (self.run / "run.json").is_file()

    @property
    def keys(self) -> set[str]:
        """Of the entries that the run has used."""
        data = packed_keys(self.path.with_suffix(".keys"))
        return {data[i : i + KEY_BYTES].hex() for i in range(0, len(data), KEY_BYTES)}

    def forget(self) -> None:
        for suffix in (".json", ".keys", ".lock"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)


def known_uses(cache: Path) -> list[KnownUse]:
    """All uses of a folder that are recorded there, the last one first."""
    found = [_known(path) for path in (cache / FOLDER).glob("*.json")]
    return sorted(found, key=lambda use: -use.last)


def _known(path: Path) -> KnownUse:
    facts, alive = read_object(path), _alive(path.with_suffix(".lock"))
    pid = facts.get("pid")
    return KnownUse(path, Path(f"{facts.get('run', 'unknown')}"), f"{facts.get('host', 'unknown')}",
                    pid if isinstance(pid, int) else 0, time.time() if alive else path.stat().st_mtime, alive)


def _alive(lock: Path) -> bool | None:
    from filelock import FileLock, Timeout

    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except UNUSABLE:
        return None
