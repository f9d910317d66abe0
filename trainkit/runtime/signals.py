"""Signals as a wish the loop can read: finish the step, save, end with the exit code that says why.

SIGTERM, SIGUSR1   the machine is wanted back (preemption, SLURM time limit): exit code 75, "run me again"
Ctrl-C             the user has seen enough: exit code 130; a second Ctrl-C ends at once
While nothing waits to be saved, before the first step and after the last, a signal ends the run where it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from trainkit.errors import EXIT_CODES, EndedBySignal, Problem, UserError

log = logging.getLogger(__name__)

Wish = Literal["preempted", "stopped"]

WISHES: dict[str, Wish] = {"SIGTERM": "preempted", "SIGUSR1": "preempted", "SIGINT": "stopped"}
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set for their children by accelerate and torchrun
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Moment:
    """A part of the run in which a signal ends it at once: what the message says about it."""

    where: str
    why: str
    fix: str


BEFORE = Moment("before the first step", "nothing was trained yet, so there was nothing to save",
                "start the same command again")
RESUME = "the same command with --resume_from_checkpoint latest goes on from there"


class Signals:
    """`wish` is None until a signal asks for an end; `patient` says whether the loop will look at it."""

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.patient = False
        self.moment = BEFORE
        self.name = ""
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}  # signal number -> what handled it before

    def install(self) -> None:
        """Python allows handlers in the main thread only; elsewhere (a notebook's worker) signals stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in WISHES:
            if hasattr(signal, name):  # SIGUSR1 is unknown to Windows
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def wait_for_a_save(self) -> None:
        """The loop begins: it looks at `wish`, and saves first."""
        self.check()
        self.patient = True

    def end_at_once(self, moment: Moment) -> None:
        """The loop is over: what follows writes whole files only, and can be done again."""
        self.patient, self.moment = False, moment
        self.check()

    def check(self) -> None:
        """End the run where a signal asked for it: a library may have swallowed what `_handle` raised."""
        if self.wish is not None and not self.patient:
            raise self.error()

    def error(self, where: str = "", why: str = "") -> UserError:
        """What ends the run: once step and place are saved, or else at the moment it is."""
        assert self.wish is not None, "nobody asked to stop"
        saved = Moment(where, why, RESUME) if where else self.moment
        return UserError(Problem(
            what=f"ended by {self.name}", where=saved.where, why=saved.why, kind=self.wish, fix=saved.fix,
        ))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked data loader worker: its parent decides
            return
        name = signal.Signals(number).name
        if self.wish == "stopped" and name == "SIGINT":
            os._exit(EXIT_CODES["stopped"])
        if self.wish is None:
            self.wish, self.name = WISHES[name], "Ctrl-C" if name == "SIGINT" else name
        if not self.patient:
            raise EndedBySignal(self.error())
        log.warning("%s: finishing this step, then saving%s", self.name,
                    "; Ctrl-C again ends at once" if name == "SIGINT" else "")


def end_with_launcher() -> None:
    """Linux: get SIGTERM when the launcher dies, because `accelerate launch` on one process passes no signal on."""
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
