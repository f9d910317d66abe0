"""Run a trainer as a user does, cheaply: `forked` pays the imports once a session, `launched` is the real thing."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import ROOT

TRAINER = "train_dreambooth_lora_sdxl_advanced"
may_start = True  # whether the test that runs is marked `trains`; conftest.py says so before each


@dataclass(frozen=True)
class Done:
    code: int
    output: str
    seconds: float = 0.0  # since the start, or since the signal


def make_images(folder: Path, *, n: int = 6, captions: bool = True) -> Path:
    """`n` small images of different sizes and colours, with metadata.jsonl unless `captions` is off."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        h, w = 40 + 8 * (i % 3), 40 + 12 * (i % 2)
        ground = np.full((h, w, 3), 255, np.uint8)
        ground[8:-8, 8:-8] = rng.integers(0, 255, 3)
        Image.fromarray(ground).save(folder / f"p{i}.png")
        lines.append(json.dumps({"file_name": f"p{i}.png", "text": f"3d icon in the style of TOK, thing {i}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def command(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    """A short complete command line; `changes` override or add flags, None removes one, True is a bare switch."""
    flags: dict[str, object] = dict(
        pretrained_model_name_or_path=model, instance_data_dir=data, instance_prompt="3d icon in the style of TOK",
        output_dir=out, resolution=32, train_batch_size=2, max_train_steps=2, rank=2, seed=0, report_to="none",
        learning_rate=1e-3, lr_warmup_steps=0,
    )
    flags |= changes
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items() if v is not None and v is not False]


@dataclass
class Started:
    """A trainer in a forked child."""

    pid: int
    log: Path
    begun: float

    def wait(self) -> Done:
        _, status = os.waitpid(self.pid, 0)
        return Done(_code(status), self.output(), time.monotonic() - self.begun)

    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def started(argv: list[str], *, trainer: str = TRAINER, log: Path, patch: Callable[[], None] = lambda: None) -> Started:
    """Start the main of a trainer or tool in a forked child: the real code path without nine seconds of imports.

    patch  is called in the child before the trainer
    """
    return _start(preloaded(trainer).main, [f"{trainer}.py", *argv], log, patch)


def _start(call: Callable[[], object], argv: list[str], log: Path, patch: Callable[[], None] = lambda: None) -> Started:
    require_mark()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(call, argv, log, patch)
    return Started(pid, log, time.monotonic())


def forked(argv: list[str], *, trainer: str = TRAINER, log: Path, patch: Callable[[], None] = lambda: None,
           kill_when: Callable[[], bool] | None = None, number: int = signal.SIGKILL) -> Done:
    """Run the trainer in a forked child to its end.

    kill_when  what the signal `number` waits for
    """
    run = started(argv, trainer=trainer, log=log, patch=patch)
    if kill_when:
        _kill_when([run.pid], kill_when, number)
        run.begun = time.monotonic()
    return run.wait()


def forked_script(words: list[str], *, cwd: Path, log: Path) -> Done:
    """`python WORDS` in the folder `cwd`, a file and its arguments, in a forked child as well."""
    preloaded(TRAINER)

    def run() -> None:
        os.chdir(cwd)
        runpy.run_path(words[0], run_name="__main__")

    return _start(run, words, log).wait()


def forked_ranks(argv: list[str], *, trainer: str = TRAINER, log: Path, kill_when: Callable[[], bool] | None = None,
                 number: int = signal.SIGKILL, victims: Sequence[int] = (0, 1), on_cpu: bool = True) -> list[Done]:
    """`forked` as two processes of one run -> how each ended. Launchers send a signal to every process.

    victims  which ranks get the signal
    on_cpu   whether Accelerate is told that a CPU is meant
    """
    common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{free_port()}")
    common |= {"ACCELERATE_USE_CPU": "1"} if on_cpu else {}
    places = [common | dict(RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    runs = [started(argv, trainer=trainer, log=log.with_name(f"{log.name}-rank{place['RANK']}"),
                    patch=partial(os.environ.update, place)) for place in places]
    try:
        if kill_when:
            _kill_when([run.pid for run in runs], kill_when, number, victims)
        return _wait_for_all(runs)
    except AssertionError as error:
        for run in runs:
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
        raise AssertionError(f"{error}", *(run.output() for run in runs)) from error


def _wait_for_all(runs: Sequence[Started], *, timeout: float = 120) -> list[Done]:
    """How each ended, with the seconds from now."""
    begun, ended = time.monotonic(), {}
    while len(ended) < len(runs):
        assert time.monotonic() < begun + timeout, "a process hangs"
        for run in runs:
            if run.pid not in ended and (found := os.waitpid(run.pid, os.WNOHANG)) != (0, 0):
                ended[run.pid] = Done(_code(found[1]), run.output(), time.monotonic() - begun)
        time.sleep(0.01)
    return [ended[run.pid] for run in runs]


def _code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def require_mark() -> None:
    assert may_start, "mark this test `trains`: `scripts/test.sh fast` must start no trainer"


def preloaded(trainer: str):
    """The trainer's module, with the slow libraries imported into this process."""
    for name in ("diffusers", "transformers", "peft", "accelerate", "datasets"):
        importlib.import_module(name)
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  (lazy attribute: the import is the point)

    return importlib.import_module(trainer)


def _child(call: Callable[[], object], argv: list[str], log: Path, patch: Callable[[], None]) -> None:
    """Never returns: the child must not run pytest's own exit code."""
    import traceback

    from trainkit.errors import exit_with_message

    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not pytest's own
    sys.argv = argv
    code = 0
    try:
        patch()
        exit_with_message(call)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill_when(pids: Sequence[int], ready: Callable[[], bool], number: int, victims: Sequence[int] = (0,), *,
               timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in pids):
        if ready():
            for rank in victims:
                os.kill(pids[rank], number)
            return
        time.sleep(0.01)
    raise AssertionError("the run ended or hung before it could be killed")


def launched(command_line: list[str], *, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """Run a command in the project's folder with the venv's tools first on PATH."""
    if any(re.search(r"train_\w+\.py", word) for word in command_line):
        require_mark()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | (env or {})
    done = subprocess.run(
        command_line, cwd=ROOT, env=full, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    return Done(done.returncode, done.stdout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """The start of a command line for several processes, at a port of its own: tests run beside each other."""
    ranks = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def wait_for_metrics(out: Path, run: subprocess.Popen, *, timeout: float = 120) -> None:
    """Until a run has logged its first step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and run.poll() is None:
        if (out / "metrics.jsonl").is_file() and metrics(out):
            return
        time.sleep(0.05)
    raise AssertionError("the run logged no step")
