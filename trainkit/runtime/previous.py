"""A run that starts anew in the folder of an earlier run: the earlier run's files move to previous-N/."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from trainkit.files import Json, read_object
from trainkit.runtime.checkpoint_folders import CheckpointFolders
from trainkit.runtime.lock import OWNER
from trainkit.runtime.record import RUNNING
from trainkit.runtime.weight_files import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    embeddings_file,
    low_rank_file,
    lycoris_file,
    run_name,
    step_files,
    weight_names,
)

log = logging.getLogger(__name__)

ABOUT = ("run.json", "latest.json", "README.md")  # tell of results, and are none themselves
RESULTS = ("metrics.jsonl", "report.html", "samples", "earlier", DIFFUSERS_FILE, KOHYA_FILE)


def make_way(out_dir: Path, *, logging_dir: str = "logs") -> Path | None:
    """Move what an earlier run has left in `out_dir` to previous-N/, N counted from 1, and say so -> that folder.

    Renames only: nothing is copied, and nothing deleted. What no run of ours writes stays where it is, and so does what
    this run has written already: its run.json, and its trackers' logs. None where no earlier run has left a result.
    """
    record = read_object(out_dir / "run.json")
    names = {run_name(out_dir), str(record.get("name"))}
    results = [path for path in results_of(out_dir, names) if path.exists() or path.is_symlink()]
    if not results:
        return None
    about = [out_dir / name for name in ABOUT if name != "run.json" or record.get("status") != RUNNING]
    found = [*results, *(path for path in about if path.exists()), *earlier_logs(out_dir, logging_dir)]
    places = (out_dir / f"previous-{number}" for number in count(1))
    place = next(place for place in places if not place.exists())
    place.mkdir()
    for path in found:
        target = place / path.relative_to(out_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    log.warning("this run starts anew: the files of the run before it in this folder are now in %s%s", place,
                described(record))
    return place


def results_of(out_dir: Path, names: set[str]) -> Iterator[Path]:
    """Where results of a run of one of these names would be."""
    yield from (out_dir / name for name in RESULTS)
    for name in sorted(names):
        yield from (out_dir / file for file in (
            weight_names(name)[1], embeddings_file(name), lycoris_file(name), low_rank_file(name)))
        yield from step_files(out_dir, name)
    yield from CheckpointFolders(out_dir).all()


def earlier_logs(out_dir: Path, logging_dir: str) -> list[Path]:
    """The trackers' files that are older than this run's lock."""
    folder, owner = out_dir / logging_dir, out_dir / OWNER
    if not folder.is_relative_to(out_dir) or folder == out_dir or not folder.is_dir():
        return []
    taken = owner.stat().st_mtime_ns if owner.exists() else None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [path for path in files if taken is None or path.lstat().st_mtime_ns < taken]


def described(record: dict[str, Json]) -> str:
    """` (it was at step 400: done)`, as far as its record says."""
    step, status = record.get("step"), record.get("status")
    return f" (it was at step {step}: {status})" if isinstance(step, int) and isinstance(status, str) else ""
