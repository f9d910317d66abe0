"""Files that change under a run, and disks that refuse: damaged checkpoints, no space at each write."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from experiments.trials import EVERY, STEPS, Bench, Result, last_line
from trainkit.errors import EXIT_CODES
from trainkit.runtime.checkpoint_folders import CheckpointFolders, is_whole

WRITES = 24  # writes of a run that are refused, one in each attempt, from the second save on
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def longer(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def one_bit_flipped(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swapped(path: Path, other: Path) -> None:
    """The file of the checkpoint before stands in its place."""
    shutil.copyfile(other, path)


def deleted(path: Path, other: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path, Path], None], ...] = (
    truncated, emptied, zeroed, longer, one_bit_flipped, swapped, deleted)


def damage(bench: Bench, result: Result) -> None:
    """Each file of the newest checkpoint is damaged in seven ways. The same command must name the damaged checkpoint,
    and continue from the one before it. Files that only other programs read do not matter here.
    """
    stopped = bench.fresh("stopped_at_8")
    bench.run(stopped, f"--stop_after_steps={STEPS - EVERY}")
    newest = CheckpointFolders(stopped).all()[-1].name
    before = CheckpointFolders(stopped).all()[-2].name
    for name in sorted(path.name for path in (stopped / newest).iterdir()):
        for harm in DAMAGES:
            out = bench.fresh("damaged")
            shutil.copytree(stopped, out)
            harm(out / newest / name, out / before / name)
            noticed = not is_whole(out / newest)
            done = bench.resume(out)
            named = not noticed or f"skipping {newest}" in done.output
            result.count(f"{name} {harm.__name__}", went_on=done.code == 0 and named and bench.ends_as_whole(out),
                         why=f"exit {done.code}, {last_line(done.output)}")


def full_disk(bench: Bench, result: Result) -> None:
    """The disk refuses one write. The run must end with exit code 74, or as if nothing had happened. All checkpoints
    must be complete, no temporary file may be left, and the same command must continue the run.
    """
    for code in REFUSALS:
        for nth in range(1, WRITES + 1, 1 if code == errno.ENOSPC else 4):
            out = bench.fresh("full")
            bench.run(out, f"--stop_after_steps={EVERY}")
            refused = bench.run(out, "--resume_from_checkpoint=latest",
                                patch=lambda nth=nth, code=code: refuse_write(nth, code))
            intact = all(map(is_whole, CheckpointFolders(out).all())) and bool(CheckpointFolders(out).all())
            litter = sorted(path.name for path in out.rglob("*.tmp"))
            done = bench.resume(out)
            well = refused.code in (0, EXIT_CODES["disk"]) and intact and not litter
            result.count(f"{os.strerror(code)} at write {nth}",
                         went_on=well and done.code == 0 and bench.ends_as_whole(out),
                         why=f"exit {refused.code}, {last_line(refused.output)}; litter {litter}; "
                             f"resumed: {last_line(done.output)}")


def refuse_write(nth: int, code: int) -> None:
    """In the child: the file system refuses to flush the `nth` file."""
    flush, count = os.fsync, 0

    def refusing(handle: int) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(code, os.strerror(code))
        flush(handle)

    os.fsync = refusing


TRIALS = (damage, full_disk)
