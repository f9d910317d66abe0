"""One run at a time writes into an output folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from trainkit.errors import Problem, UserError
from trainkit.files import Json, read_object, write_json

OWNER = ".run.owner.json"  # who holds the folder, and since when
ORPHAN_SECONDS = 10  # how long data loader workers of a killed run may still hold its lock


class OutputLock:
    """A lock the operating system frees when its process dies, so that a killed run never blocks the next one.

    `.run.lock` is locked, `.run.owner.json` names the owner for the message. On a network file system it works between
    hosts where that file system supports locks (NFSv4, Lustre with flock, most others).
    """

    def __init__(self, out_dir: Path):
        from filelock import FileLock

        self.dir, self.owner_file = out_dir, out_dir / OWNER
        self.lock = FileLock(out_dir / ".run.lock", timeout=0)

    def acquire(self) -> None:
        """Raises UserError naming process and host when another run holds the folder."""
        from filelock import Timeout

        owner = read_object(self.owner_file)
        dead = owner.get("host") == platform.node() and not _alive(owner.get("pid"))
        try:
            self.lock.acquire(timeout=ORPHAN_SECONDS if dead else 0)
        except Timeout:
            who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
            raise UserError(Problem(
                what="another run is writing into this folder", where=str(self.dir),
                why=f"{who} holds it; two runs would overwrite each other's files",
                fix="wait for it, end it, or give this run its own --output_dir",
            )) from None
        try:
            write_json(self.owner_file, {"pid": os.getpid(), "host": platform.node()})
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        try:
            self.owner_file.unlink(missing_ok=True)
        finally:
            self.lock.release()


def _alive(pid: Json) -> bool:
    import psutil

    return isinstance(pid, int) and 0 < pid < 2**31 and psutil.pid_exists(pid)
