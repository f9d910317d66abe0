"""Errors a user can act on: what is wrong, where, why, and the next command. One message lists them all."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TextIO

from trainkit.terminal import BOLD, RED, YELLOW, folded, styled

Category = Literal["sibling", "usage", "data", "memory", "nonfinite", "disk", "preempted", "stopped"]

EXIT_CODES: dict[Category, int] = {  # a sibling's failure is told by that process
    "sibling": 1, "usage": 2, "data": 3, "memory": 4, "nonfinite": 5, "disk": 74, "preempted": 75, "stopped": 130,
}


SHOWN = 20  # entries of a list in a message


def printable(name: str) -> str:
    """A file name that every log, key and terminal can hold: undecodable bytes and control characters are escaped."""
    escaped = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def listing(items: Iterable[str]) -> str:
    """At most SHOWN items, one a line, and how many more there are."""
    items = list(items)
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n             ".join(items[:SHOWN] + more)


def shell_word(path: str | os.PathLike[str]) -> str:
    """A path as one word of a command: what the shell makes of it are the file name's own bytes.

    A name that no terminal can show, with control characters or bytes that are no text, is spelled $'...' as bash and
    zsh read it.
    """
    name = os.fspath(path)
    if name == printable(name):
        return shlex.quote(name)
    spelled = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(name))
    return f"$'{''.join(spelled)}'"


class LineFormatter(logging.Formatter):
    """How a log record reads in the terminal, before a run and in it: news as they are, the rest with its level.

    label  an attribute that a record may have: the first words of its message, shown in bold
    """

    def __init__(self, stream: TextIO | None):
        super().__init__("%(message)s")
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        label, colours, text = getattr(record, "label", ""), [BOLD], super().format(record)
        if record.levelno >= logging.WARNING:
            label, text = record.levelname, f"{record.levelname} {text}"
            colours.append(RED if record.levelno >= logging.ERROR else YELLOW)
        shown = folded(text, self.stream, indent=len(text) - len(text.removeprefix(label).lstrip()) if label else 0)
        return styled(label, *colours, stream=self.stream) + shown.removeprefix(label)


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way. `fix` is a command or an edit the user can make now."""

    what: str
    where: str
    why: str
    fix: str
    kind: Category = "usage"

    def __str__(self) -> str:
        text = f"{self.what}\n      where: {self.where}\n      why:   {self.why}\n      next:  {self.fix}"
        return "\n".join(map(printable, text.split("\n")))  # names of files and values come from anywhere


class UserError(Exception):
    """Stops the run with one message for all `problems`; usage problems decide the exit code when kinds mix."""

    def __init__(self, *problems: Problem):
        assert problems, "UserError needs at least one problem"
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems

    @property
    def exit_code(self) -> int:
        return min(EXIT_CODES[p.kind] for p in self.problems)

    def report(self, stream: TextIO | None = None) -> str:
        """The message; in colours where `stream` shows them. A run that was told to stop has done nothing wrong."""
        if all(p.kind in ("stopped", "preempted") for p in self.problems):
            return "\n".join(f"{p}".replace("\n      ", "\n  ") for p in self.problems)
        head = "cannot go on" if len(self.problems) == 1 else f"cannot go on: {len(self.problems)} problems"
        return "\n".join([styled(f"{head}:", BOLD, RED, stream=stream),
                          *(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))])


def refuse(problems: Iterable[Problem]) -> None:
    """Raise one UserError naming every problem; do nothing when there is none."""
    found = tuple(problems)
    if found:
        raise UserError(*found)


def exit_with_message(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes its report on stderr and its exit code (a traceback only with --debug).

    Until a run takes over, what is logged reads as it will then, on the first process alone.
    Of several processes the first tells the whole story and the others one line each. A Ctrl-C that no run is there to
    take, as while libraries are imported, is one line and the exit code of a stopped run.
    """
    rank = os.environ.get("RANK", "0")
    if logging.lastResort is not None:  # the handler of records for which there is none yet
        logging.lastResort.setFormatter(LineFormatter(sys.stderr))
        logging.lastResort.setLevel(logging.WARNING if rank == "0" else logging.ERROR)
    try:
        main()
    except KeyboardInterrupt:
        if debugging():
            raise
        print("stopped by Ctrl-C" if rank == "0" else f"rank {rank}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_CODES["stopped"])
    except UserError as error:
        if debugging():
            raise
        print(error.report(sys.stderr) if rank == "0" else f"rank {rank}: {error.problems[0].what}", file=sys.stderr)
        sys.exit(error.exit_code)


def debugging() -> bool:
    """Whether a traceback was asked for: read before, and whether or not, the options can be parsed."""
    yes = ("1", "true", "yes", "on")
    words = [word.lower() for word in sys.argv]
    return "--debug" in words or any(f"--debug={y}" in words for y in yes) or os.environ.get("LORA_DEBUG", "") in yes
