"""One live line: where the run is, how it goes, when it will be done. Rewritten in place, or now and then in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

import torch

from trainkit.errors import LineFormatter

LOSS_MEMORY = 0.98  # the shown loss is an average over about the last 50 steps
REDRAW_SECONDS = 0.1
LOG_SECONDS = 30.0


@dataclass
class Pace:
    """Speed and remaining time. The first step is left out: it compiles, allocates and warms up."""

    total: int
    start: int
    first_end: float | None = None
    now: float = 0.0
    step: int = 0

    def mark(self, step: int, now: float) -> None:
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
    """Writes to `stream`: with a carriage return on a terminal, else a plain line every `log_seconds`."""

    def __init__(self, stream: TextIO | None = None, *, log_seconds: float = LOG_SECONDS):
        self.stream = stream if stream is not None else sys.stderr
        self.live, self.log_seconds = self.stream.isatty(), log_seconds
        self.pace = Pace(0, 0)
        self.loss: float | None = None
        self._next, self._shown = 0.0, 0

    def begin(self, start: int, total: int) -> None:
        self.pace = Pace(total, start)

    def update(self, step: int, values: Mapping[str, float], *, note: str = "") -> None:
        """Show `step` finished steps; `values` as logged: loss, images, lr/<group>, d/<group>."""
        now = time.monotonic()
        self.pace.mark(step, now)
        loss = values.get("loss", math.nan)
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else LOSS_MEMORY * self.loss + (1 - LOSS_MEMORY) * loss
        if now >= self._next or step == self.pace.total:
            self._next = now + (REDRAW_SECONDS if self.live else self.log_seconds)
            self._write(line(self.pace, self.loss, values, note=note))

    def task(self, what: str, done: int, total: int) -> None:
        """Show how far some work before the first step has come."""
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + (REDRAW_SECONDS if self.live else self.log_seconds)
            self._write(f"{what} {done}/{total}")

    def clear(self) -> None:
        """Empty the live line, so that something else can be written there."""
        if self.live and self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def close(self) -> None:
        """Leave the last line standing."""
        if self.live and self._shown:
            self.stream.write("\n")
            self._shown = 0

    def _write(self, text: str) -> None:
        if self.live:
            self.stream.write("\r" + text.ljust(self._shown))
            self._shown = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def line(pace: Pace, loss: float | None, values: Mapping[str, float], *, note: str = "") -> str:
    """`137/400 · loss 0.0842 · lr 1.0e-04 · 5.30 it/s · 822 images · 0:49 left · 0.7 GB · next save 250`."""
    name, rate = step_size(values)
    parts = [
        f"{pace.step}/{pace.total}", None if loss is None else f"loss {loss:.4f}",
        f"fourier_component {values['fourier_component']:.4f}" if "fourier_component" in values else None,
        None if rate is None else f"{name} {rate:.1e}",
        None if pace.per_second is None else f"{pace.per_second:.2f} it/s",
        f"{values['images']:.0f} images" if "images" in values else None,
        None if pace.remaining is None else f"{clock(pace.remaining)} left", memory(), note,
    ]
    return " · ".join(p for p in parts if p)


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
        self.setFormatter(LineFormatter(secrets))

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.clear()
        super().emit(record)
