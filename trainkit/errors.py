"""Errors a user can act on: what is wrong, where, why, and the next command. One message lists them all."""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TextIO

from trainkit.redact import redact
from trainkit.terminal import BOLD, RED, YELLOW, folded, styled

Category = Literal["sibling", "usage", "data", "memory", "nonfinite", "disk", "preempted", "stopped"]

EXIT_CODES: dict[Category, int] = {  # a sibling's failure is told by that process
    "sibling": 1, "usage": 2, "data": 3, "memory": 4, "nonfinite": 5, "disk": 74, "preempted": 75, "stopped": 130,
}

# What runs out of memory says, by library: PyTorch's allocators of CPU, CUDA, MPS, XPU and others, files mapped into
# memory, C++, oneDNN, CUDA's and AMD's libraries, the runtimes and drivers below them, JPEG and PNG decoders.
OUT_OF_MEMORY = re.compile(
    r"out of memory|cannot allocate memory|can't allocate memory|not enough memory|failed to allocate memory"
    r"|unable to allocate|insufficient memory|memory allocation (?:failed|failure)|\bbad_?alloc\b|error out of memory"
    r"|could not create a (?:primitive|memory)|_STATUS_ALLOC_FAILED|_ALLOCATION_FAILED|StatusAllocFailed"
    r"|rocblas_status_memory_error|cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|ENOMEM"
    r"|RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY"  # Intel's
    # No room for a workspace: what cuDNN says then, and cuBLAS at its first call
    r"|unable to find (?:a valid cuDNN algorithm|an engine to execute)|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|DataLoader worker \(pid[^)]*\) is killed by signal: Killed", re.IGNORECASE)  # by the system, short of memory
ASCII = {"√": "sqrt", "≥": ">=", "≤": "<=", "×": "x", "·": "-", "…": "...", "–": "-", "—": "-", "→": "->", "−": "-",
         "’": "'", "‘": "'", "“": '"', "”": '"'}  # what help and messages spell with other letters

IN_UTF8 = "write it in UTF-8, with no NUL in it; rename a folder whose name holds such bytes"


# ----------------------------------------------------------------------------------------------------------------------
# Text for the terminal


def printable(text: str) -> str:
    """One line that every log, key and terminal can hold: what is no visible character is escaped.

    Control characters could move the cursor or hide a part; a lone surrogate, which stands for a byte of a file's name
    that is no text, could not be written at all.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def readable(text: str, secrets: Iterable[str] = ()) -> str:
    """The lines of a message as a terminal may show them: printable, and without secrets."""
    return "\n".join(map(printable, redact(text, secrets).split("\n")))


def shell_word(path: str | os.PathLike[str]) -> str:
    """A path as one word of a command: what the shell makes of it are the file name's own bytes.

    A name that no terminal can show is spelled $'...', as bash and zsh read it.
    """
    name = os.fspath(path)
    if name == printable(name):
        return shlex.quote(name)
    data = name.encode("utf-8", "surrogatepass") if any("\ud800" <= c < "\udc80" for c in name) else os.fsencode(name)
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in data) + "'"


def unwritable(text: str) -> str:
    """Why a text cannot be given to tokenizers, files and records; "" for one that can."""
    odd = next(filter(_is_surrogate, text), None)
    if odd is not None:
        return f"it holds bytes that are not UTF-8, such as {printable(odd)}"
    return "it holds a NUL character" if "\0" in text else ""


def _is_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


class LineFormatter(logging.Formatter):
    """Log records as lines that a terminal may show: news as they are, the rest with its level.

    label  an attribute that a record may have: the first words of its message, shown in bold
    """

    def __init__(self, stream: TextIO | None, secrets: Iterable[str] = ()):
        super().__init__("%(message)s")
        self.stream, self.secrets = stream, tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        label, colours = getattr(record, "label", ""), [BOLD]
        text = readable(super().format(record), self.secrets)
        if record.levelno >= logging.WARNING:
            label, text = record.levelname, f"{record.levelname} {text}"
            colours.append(RED if record.levelno >= logging.ERROR else YELLOW)
        shown = folded(text, self.stream, indent=len(text) - len(text.removeprefix(label).lstrip()) if label else 0)
        return styled(label, *colours, stream=self.stream) + shown.removeprefix(label)


def plain_output() -> None:
    """No text can fail to be printed. What a console has no letter for, as ε in cp1252, is spelled in ASCII.

    A file or pipe gets UTF-8, so that --config reads what --print_config wrote there; PYTHONIOENCODING says otherwise.
    """
    codecs.register_error("plain", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            console = stream.isatty() or bool(os.environ.get("PYTHONIOENCODING"))
            stream.reconfigure(encoding=None if console else "utf-8", errors="plain")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or _escaped(c) for c in text), error.end


# ----------------------------------------------------------------------------------------------------------------------
# Problems


SHOWN = 20  # entries of a list in a message


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun, and with the verb that follows: "1 image is", "3 images are". Several: one + s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def listing(items: Iterable[str]) -> str:
    """At most SHOWN items, one a line, and how many more there are."""
    items = list(items)
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n             ".join(items[:SHOWN] + more)


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way. `fix` is a command or an edit the user can make now."""

    what: str
    where: str
    why: str
    fix: str
    kind: Category = "usage"

    def __str__(self) -> str:
        return readable(f"{self.what}\n      where: {self.where}\n      why:   {self.why}\n      next:  {self.fix}")


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


class EndedBySignal(KeyboardInterrupt):
    """What a signal raises where it ends the run at once. No `except Exception` on the way out can swallow it.

    error  the UserError that says what ended, where, and what is next
    """

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


def refuse(problems: Iterable[Problem]) -> None:
    """Raise one UserError naming every problem; do nothing when there is none."""
    found = tuple(problems)
    if found:
        raise UserError(*found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine: told by class, number or words, as libraries do it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, OSError, ValueError)) and bool(OUT_OF_MEMORY.search(f"{error}"))


def out_of_memory(error: BaseException, where: str, fix: str) -> UserError:
    why = f"{error}".partition("\n")[0] or type(error).__name__
    return UserError(Problem("out of memory", where, why, fix, "memory"))


def exit_with_message(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes its report on stderr and its exit code (a traceback only with --debug).

    Until a run takes over, what is logged reads as it will then, on the first process alone.
    Of several processes the first tells the whole story, and the others what happened and what is next. A Ctrl-C that
    no run is there to take, as while libraries are imported, is one line and the exit code of a stopped run.
    """
    rank = os.environ.get("RANK", "0")
    plain_output()
    if logging.lastResort is not None:  # the handler of records for which there is none yet
        logging.lastResort.setFormatter(LineFormatter(sys.stderr))
        logging.lastResort.setLevel(logging.WARNING if rank == "0" else logging.ERROR)
    try:
        naming_memory_errors(main)
    except EndedBySignal as ended:  # outside a run, which makes it a UserError itself
        if debugging():
            raise
        _exit_reporting(ended.error, rank)
    except KeyboardInterrupt:
        if debugging():
            raise
        print("stopped by Ctrl-C" if rank == "0" else f"rank {rank}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_CODES["stopped"])
    except UserError as error:
        if debugging():
            raise
        _exit_reporting(error, rank)


def _exit_reporting(error: UserError, rank: str) -> NoReturn:
    first = error.problems[0]
    brief = f"rank {rank}: {readable(first.what)}; next: {readable(first.fix)}"
    print(error.report(sys.stderr) if rank == "0" else brief, file=sys.stderr)
    sys.exit(error.exit_code)


def naming_memory_errors(main: Callable[[], None]) -> None:
    """Run `main`; running out of memory anywhere in it is a UserError."""
    try:
        main()
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        raise out_of_memory(error, Path(sys.argv[0]).name, "ask for less at once, by smaller batches or images, or "
                            "close other programs that need memory") from error


def debugging() -> bool:
    """Whether a traceback was asked for: read before, and whether or not, the options can be parsed."""
    yes = ("1", "true", "yes", "on")
    words = [word.lower() for word in sys.argv]
    return "--debug" in words or any(f"--debug={y}" in words for y in yes) or os.environ.get("LORA_DEBUG", "") in yes
