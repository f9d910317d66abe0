"""A run directory explains itself: run.json (what was asked, where it came from, on what) and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from trainkit.files import Json, atomic_write, disk_errors, run_name, write_json
from trainkit.options.base import REDACTED
from trainkit.options.sources import ENV_PREFIX
from trainkit.options.trainers import known_flags

log = logging.getLogger(__name__)

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "safetensors", "prodigyopt",
    "bitsandbytes", "pillow", "numpy",
)
SECRET_FLAGS = [name for name, flag in known_flags().items() if flag.secret]
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
                    *(ENV_PREFIX + name.upper() for name in SECRET_FLAGS))


def versions() -> dict[str, str]:
    """Versions of python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def redact(text: str, known: Iterable[str] = ()) -> str:
    """`text` without access tokens: those in `known`, those in the environment, and anything shaped like one."""
    for value in (*known, *(os.environ.get(name, "") for name in SECRET_VARIABLES)):
        if len(value) >= 4:
            text = text.replace(value, REDACTED)
    return TOKEN.sub(REDACTED, text)


def redact_json(data: Json, known: Iterable[str] = ()) -> Json:
    """The same for every string in a JSON value."""
    known = tuple(known)
    if isinstance(data, str):
        return redact(data, known)
    if isinstance(data, Mapping):
        return {str(k): redact_json(v, known) for k, v in data.items()}
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
    nothing from the run it was aimed at.
    {run_id, name, status, exit_code, started, ended, seconds, step, seed, world, device, precision, command, versions,
     options: {flag: {value, origin}}, total_steps, start_step, global_batch, and what `add` was given}
    """

    def __init__(self, out_dir: Path, **facts: Json):
        self.path = out_dir / "run.json"
        self.data = {
            "run_id": secrets.token_hex(6), "name": run_name(out_dir), "status": "running", "exit_code": None,
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
        if not self.waits:
            with disk_errors(self.path):
                write_json(self.path, self.data)


class Metrics:
    """metrics.jsonl: one JSON object per optimizer step, in order of steps, even across restarts."""

    def __init__(self, out_dir: Path):
        self.path = out_dir / "metrics.jsonl"

    def begin(self, start: int) -> float:
        """Drop rows after step `start`, which will be written again -> seconds of training up to there.

        At 0 the whole file, which is another run's, moves to earlier/.
        """
        with disk_errors(self.path):
            return self._begin(start)

    def write(self, values: Mapping[str, Json]) -> None:
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _begin(self, start: int) -> float:
        if not self.path.exists():
            return 0.0
        if start == 0:
            earlier = self.path.parent / "earlier"
            earlier.mkdir(exist_ok=True)
            self.path.rename(earlier / f"metrics-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.jsonl")
            return 0.0
        rows = [row for row in map(parsed, self.path.read_text("utf-8").splitlines()) if row and row["step"] <= start]
        atomic_write(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        return rows[-1]["seconds"] if rows else 0.0


def parsed(line: str) -> dict[str, Json] | None:
    """One row; None for a row that a kill cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def timestamp() -> str:
    """Local time with its offset: 2026-11-21T22:05:09+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
