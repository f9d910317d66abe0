"""Attempts to lose a training, each counted: it went on, it was refused by name, or something was lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file

from tests.support import trainers
from tests.support.compare import same_bits
from tests.support.tiny_models import build_tiny_sdxl
from tests.support.trainers import TRAINER, Done, command, make_images, preloaded

WEIGHTS = "pytorch_lora_weights.safetensors"
STEPS, EVERY = 10, 2  # of the short run that most trials interrupt
Patch = Callable[[], None]  # changes the child's process before the trainer starts

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What came of the attempts of one trial.

    went_on  the run ended as if nothing had happened, bit for bit where it was resumed
    refused  one message named what was wrong, and everything before it was intact
    lost     neither: each is a defect, with one line in `defects`
    """

    tried: int = 0
    went_on: int = 0
    refused: int = 0
    lost: int = 0
    defects: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)  # what: the largest value of all attempts

    def count(self, what: str, *, went_on: bool = False, refused: bool = False, why: str = "") -> None:
        """One attempt; where neither is true it is a defect, described by `what` and `why`."""
        self.tried += 1
        self.went_on += went_on
        self.refused += refused and not went_on
        if not (went_on or refused):
            self.lost += 1
            self.defects.append(f"{what}: {why}")
            log.warning("LOST %s: %s", what, why)

    @classmethod
    def read(cls, file: Path) -> Result:
        return cls(**json.loads(file.read_text("utf-8")))

    def largest(self, name: str, value: float) -> None:
        self.measured[name] = max(value, self.measured.get(name, value))


class Bench:
    """A folder to work in, a random SDXL of three levels, six images, and the run that others are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        trainers.may_start = True  # the tests' own check for their marker
        folder.mkdir(parents=True, exist_ok=True)
        self.data = make_images(folder / "data")
        self.model = folder / "sdxl"
        if not self.model.is_dir():
            build_tiny_sdxl(self.model)
        preloaded(TRAINER)

    def fresh(self, name: str) -> Path:
        """An empty place for a run's output."""
        out = self.folder / "runs" / name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        return out

    def command(self, out: Path, **changes: object) -> list[str]:
        flags: dict[str, object] = dict(max_train_steps=STEPS, checkpointing_steps=EVERY, checkpoints_total_limit=2)
        return command(self.model, self.data, out, **flags | changes)

    def run(self, out: Path, *more: str, patch: Patch = lambda: None, kill_when: Callable[[], bool] | None = None,
            number: int = signal.SIGKILL, argv: Sequence[str] | None = None, **changes: object) -> Done:
        """A training to its end, or until `kill_when`, in a process of its own."""
        run = trainers.started([*(argv or self.command(out, **changes)), *more], log=self.folder / "log", patch=patch)
        while kill_when and not has_ended(run.pid):
            if kill_when():
                os.kill(run.pid, number)
                run.begun = time.monotonic()
                break
            time.sleep(0.01)
        return run.wait()

    def ranks(self, out: Path, *more: str, patch: Patch = lambda: None, **changes: object) -> list[Done]:
        """The same in two gloo processes -> how each ended. `patch` is for both."""
        port, words = trainers.free_port(), [*self.command(out, **changes), *more]
        started = []
        for rank in (0, 1):
            environment = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "1"}

            def prepare(environment: Mapping[str, str] = environment) -> None:
                os.environ.update(environment)
                patch()

            started.append(trainers.started(words, log=self.folder / f"log{rank}", patch=prepare))
        return [run.wait() for run in started]

    def resume(self, out: Path, **changes: object) -> Done:
        return self.run(out, "--resume_from_checkpoint=latest", **changes)

    @cached_property
    def whole(self) -> Path:
        """The short run without any interruption."""
        return self.uninterrupted("whole")

    def uninterrupted(self, name: str, **changes: object) -> Path:
        out = self.fresh(name)
        done = self.run(out, **changes)
        assert done.code == 0, done.output
        return out

    def ends_as_whole(self, out: Path, whole: Path | None = None) -> bool:
        return same_bits(load_file(out / WEIGHTS), load_file((whole or self.whole) / WEIGHTS))


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")[:300]


def attempt(trial: Callable[[Bench, Result], None], bench: Bench, file: Path) -> Result:
    """The result of a trial: the one in `file`, or of trying now."""
    if file.is_file():
        return Result.read(file)
    result, begun = Result(), time.monotonic()
    trial(bench, result)
    result.measured["minutes of the trial"] = round((time.monotonic() - begun) / 60, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(result), indent=1), "utf-8")
    return result


def is_ready(look: Callable[[], bool]) -> bool:
    """What a look at files that are being written says; False while they cannot be read."""
    try:
        return look()
    except (OSError, ValueError):
        return False


def kill_me(number: int = signal.SIGKILL) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), number)
