"""One live line: where the run is, how it goes, when it will be done. Rewritten in place, or now and then in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import torch

from trainkit import terminal
from trainkit.errors import LineFormatter, counted

LOSS_MEMORY = 0.98  # the shown loss is an average over about the last 50 steps
REDRAW_SECONDS = 0.1
LOG_SECONDS = 30.0


@dataclass
class Pace:
    """Speed and remaining time. The first step is left out: it compiles, allocates and warms up."""

    total: int
    start: float
    first_end: float | None = None
    now: float = 0.0
    step: float = 0

    def mark(self, step: float, now: float) -> None:
        self.step, self.now = step, now
        if self.first_end is None:
            self.start, self.first_end = step, now

    @property
    def per_second(self) -> float | None:
        """Optimizer steps a second, previews and checkpoints included; None until two steps are done."""
        seconds = self.now - (self.first_end or self.now)
        return (self.step - self.start) / seconds if seconds > 0 else None

    @property
    def remaining(self) -> float | None:
        """Seconds to the end."""
        return (self.total - self.step) / self.per_second if self.per_second else None


class Progress:
    """Writes to `stream`: on a terminal one line that is rewritten and never wraps, else a line every `log_seconds`."""

    def __init__(self, stream: TextIO | None = None, *, log_seconds: float = LOG_SECONDS):
        self.stream = stream if stream is not None else sys.stderr
        self.live, self.log_seconds = terminal.is_terminal(self.stream), log_seconds
        self.pace = Pace(0, 0)
        self.loss: float | None = None
        self._task, self._task_pace = "", Pace(0, 0)
        self._next, self._shown = 0.0, 0

    def begin(self, start: int, total: int) -> None:
        """Just before the loop, whose first line is not held back."""
        self.pace, self._next = Pace(total, start), 0.0

    def update(self, step: int, values: Mapping[str, float], *, notes: Sequence[str] = ()) -> None:
        """Show `step` finished steps; `values` as logged: loss, images, lr/<group>, d/<group>."""
        now = time.monotonic()
        self.pace.mark(step, now)
        loss = values.get("loss", math.nan)
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else LOSS_MEMORY * self.loss + (1 - LOSS_MEMORY) * loss
        if self._due(now) or step == self.pace.total:
            self._write(line(self.pace, self.loss, values, notes=notes, width=self.width))

    def task(self, what: str, done: float, total: int) -> None:
        """Show how far some other work has come: `done` of `total`, which may count parts of one."""
        now = time.monotonic()
        if what != self._task or done < self._task_pace.step:
            self._task, self._task_pace = what, Pace(total, 0)
            self._next = min(self._next, now)  # the first word of a task is not held back
        self._task_pace.mark(done, now)
        if self._due(now) or done == total:
            self._write(task_line(what, self._task_pace, width=self.width))

    @property
    def width(self) -> int | None:
        """Columns that a line may take: a full last one would make some terminals wrap. None: any number."""
        return max(1, terminal.columns(self.stream) - 1) if self.live else None

    def clear(self) -> None:
        """Empty the live line, so that something else can be written there."""
        if self.live and self._shown:
            self.stream.write("\r" + self._erased("") + "\r")
            self.stream.flush()
            self._shown = 0

    def close(self) -> None:
        """Leave the last line standing."""
        if self.live and self._shown:
            self.stream.write("\n")
            self._shown = 0

    def _due(self, now: float) -> bool:
        if now < self._next:
            return False
        self._next = now + (REDRAW_SECONDS if self.live else self.log_seconds)
        return True

    def _erased(self, text: str) -> str:
        """`text`, and nothing of what stood there before, be it the echo of a key."""
        if terminal.knows_codes(self.stream):
            return text + terminal.ERASE
        return text.ljust(min(self._shown, self.width or 0))

    def _write(self, text: str) -> None:
        if self.live:
            self.stream.write("\r" + self._erased(text))
            self._shown = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


@contextmanager
def watched(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Some work outside of a run, with a line of its own: inside, call the answer with how much of `total` is done.

    Log records inside stand above the line, which is gone at the end.
    """
    progress = Progress()
    handler = LineHandler(progress)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    progress.task(what, 0, total)
    try:
        yield lambda done: progress.task(what, done, total)
    finally:
        progress.clear()
        logging.getLogger().removeHandler(handler)


def line(pace: Pace, loss: float | None, values: Mapping[str, float], *, notes: Sequence[str] = (),
         width: int | None = None) -> str:
    """`137/400 · loss 0.0842 · lr 1.0e-04 · 5.30 it/s · 822 images · 0:49 left · 0.7 GB · next save 250`.

    Where the terminal is too narrow for all of it, the parts with the highest numbers here are left out first.
    """
    name, rate = step_size(values)
    fourier = values.get("fourier_component")
    return terminal.fitted([
        (0, f"{pace.step:.0f}/{pace.total}"),
        (1, "" if loss is None else f"loss {loss:.4f}"),
        (6, "" if fourier is None else f"fourier_component {fourier:.4f}"),
        (3, "" if rate is None else f"{name} {rate:.1e}"),
        (5, "" if pace.per_second is None else f"{pace.per_second:.2f} it/s"),
        (9, counted(int(values["images"]), "image") if "images" in values else ""),
        (2, time_left(pace)),
        (8, memory()),
        *((4 + 3 * place, note) for place, note in enumerate(notes)),
    ], width)


def task_line(what: str, pace: Pace, *, width: int | None = None) -> str:
    """`caching latents 12/22 · 0:03 left`."""
    return terminal.fitted([(0, f"{what} {math.floor(pace.step)}/{pace.total}"), (1, time_left(pace))], width)


def time_left(pace: Pace) -> str:
    """`0:49 left`; "" at the end, and while it is not known."""
    return f"{clock(pace.remaining)} left" if pace.remaining and pace.step < pace.total else ""


def step_size(values: Mapping[str, float]) -> tuple[str, float | None]:
    """The first group's learning rate; times d where the optimizer estimates one (Prodigy's rate alone stays at 1)."""
    group = next((k.partition("/")[2] for k in values if k.startswith("lr/")), None)
    if group is None:
        return "lr", None
    d = values.get(f"d/{group}")
    return ("lr", values[f"lr/{group}"]) if d is None else ("d·lr", d * values[f"lr/{group}"])


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 49 -> 0:49."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


def memory() -> str:
    """Memory of the accelerator now and at its peak, else of this process."""
    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return f"{now / 1e9:.1f} of {peak / 1e9:.1f} GB peak"
    import psutil

    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


class LineHandler(logging.StreamHandler):
    """Log records on the progress line's stream, each on a line of its own."""

    def __init__(self, progress: Progress, secrets: Iterable[str] = ()):
        super().__init__(progress.stream)
        self.progress = progress
        self.setFormatter(LineFormatter(progress.stream, secrets))

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.clear()
        super().emit(record)
