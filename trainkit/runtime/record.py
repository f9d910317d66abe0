"""A run directory explains itself: run.json (what was asked, where it came from, on what) and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import platform
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from trainkit.files import Json, atomic_write, disk_errors, read_object, read_objects, write_json
from trainkit.options.trainers import known_flags
from trainkit.redact import REDACTED, SECRET_NAME, redact
from trainkit.runtime.weight_files import run_name

log = logging.getLogger(__name__)

RUNNING, KILLED = "running", "killed"  # the status while a run lasts, and what the next start makes of one left so
PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "safetensors",
    "bitsandbytes", "pillow", "numpy",
)
SECRET_FLAGS = [name for name, flag in known_flags().items() if flag.secret]


def versions() -> dict[str, str]:
    """Versions of python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def redact_json(data: Json, known: Iterable[str] = ()) -> Json:
    """A JSON value without secrets: in every string, and behind every key that is named as one."""
    known = tuple(known)
    if isinstance(data, str):
        return redact(data, known)
    if isinstance(data, Mapping):
        return {redact(str(k), known): REDACTED if v and isinstance(v, str) and SECRET_NAME.search(str(k).upper())
                else redact_json(v, known) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [redact_json(v, known) for v in data]
    return data if data is None or isinstance(data, (bool, int, float)) else redact(str(data), known)


def redacted_command(argv: list[str]) -> list[str]:
    """The command line with the values of secret flags, in either spelling, masked."""
    shown = list(argv)
    for i, word in enumerate(argv):
        flag, sign, _ = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") not in SECRET_FLAGS:
            continue
        if sign:
            shown[i] = f"{flag}={REDACTED}"
        elif i + 1 < len(argv):
            shown[i + 1] = REDACTED
    return [redact(word) for word in shown]


class RunRecord:
    """run.json: written when the run starts, completed when it ends however it ends.

    Where an earlier run left one, that one stays until `begin`: a command that is refused before its first step takes
    nothing from the run it was aimed at. One that is left with the status "running" is that of a run that was killed,
    as this process holds the folder: it is completed here, from the metrics.
    {run_id, name, status, exit_code, started, ended, seconds, step, seed, world, device, precision, command, versions,
     options: {flag: {value, origin}}, total_steps, start_step, global_batch, and what `add` was given}
    """

    def __init__(self, out_dir: Path, **facts: Json):
        self.path = out_dir / "run.json"
        complete_killed(self.path)
        self.data = {
            "run_id": secrets.token_hex(6), "name": run_name(out_dir), "status": RUNNING, "exit_code": None,
            "started": timestamp(), "ended": None, "seconds": None, "step": None, **facts,
            "command": redacted_command(sys.argv), "versions": versions(),
        }
        self.waits = self.path.exists()

    def begin(self, **facts: Json) -> None:
        """The loop is about to start: from now on the file is this run's."""
        self.waits = False
        self.add(**facts)

    def add(self, **facts: Json) -> None:
        """Add what became known later: data set, model hash, number of steps."""
        self.data |= redact_json(facts)
        self.write()

    def finish(self, *, status: str, exit_code: int, seconds: float, step: int) -> None:
        self.add(status=status, exit_code=exit_code, ended=timestamp(), seconds=seconds, step=step)

    def write(self) -> None:
        """To the disk, unless an earlier run's file is still to be kept."""
        if not (self.waits and self.path.exists()):
            with disk_errors(self.path):
                write_json(self.path, self.data)


class Metrics:
    """metrics.jsonl: one JSON object per optimizer step, in order of steps, even across restarts."""

    def __init__(self, out_dir: Path):
        self.path = out_dir / "metrics.jsonl"

    def begin(self, start: int) -> float:
        """Drop rows after step `start`, which will be written again -> seconds of training up to there."""
        with disk_errors(self.path):
            return self._begin(start)

    def write(self, values: Mapping[str, Json]) -> None:
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _begin(self, start: int) -> float:
        if not self.path.exists():
            return 0.0
        rows = [row for row in metric_rows(self.path) if row["step"] <= start]
        atomic_write(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        return seconds_of(rows[-1]) if rows else 0.0


def metric_rows(path: Path) -> Iterator[dict[str, Json]]:
    """The rows of a metrics.jsonl: objects with a step. Whatever else is in the file is skipped."""
    return (row for row in read_objects(path) if type(row.get("step")) is int)


def seconds_of(row: Mapping[str, Json]) -> float:
    """Seconds of training up to a row; 0 where it does not say."""
    seconds = row.get("seconds")
    return float(seconds) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else 0.0


def complete_killed(path: Path) -> None:
    """Complete the run.json of a run that was killed: how far it came, and when it was last heard of."""
    record = read_object(path)
    if record.get("status") != RUNNING:
        return
    metrics = path.with_name("metrics.jsonl")
    last = next(reversed([*metric_rows(metrics)]), {})
    heard = max(file.stat().st_mtime for file in (path, metrics) if file.exists())
    facts = {"status": KILLED, "step": last.get("step"), "seconds": seconds_of(last), "ended": timestamp(heard)}
    with disk_errors(path):
        write_json(path, record | facts)
    log.info("the run before in this folder was killed after step %s; %s says so now", facts["step"] or 0, path.name)


def timestamp(seconds: float | None = None) -> str:
    """Local time with its offset, now or of a time in seconds: 2026-11-21T22:05:09+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
