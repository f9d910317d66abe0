"""The process that a command runs in: what the command sets there for itself, it puts back when it ends.

A notebook calls `main()` again and again and goes on with its own work in between. Nothing is imported here that is not
there already, because --help and a refused command must answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

QUIET = {  # environment variables that the libraries read when they are imported; the user's own values stay
    "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns in every worker process that loads images
}
LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "diffusers", "huggingface_hub", "multiprocess", "numpy", "peft",
    "pytorch_optimizer", "pytorch_wavelets", "tensorboard", "torch", "torchvision", "transformers",
)
AUDIBLE = "torch.cuda"  # warns of a driver or a card that does not fit: the user's business
LIBRARY_LOGS = ("diffusers.utils.logging", "transformers.utils.logging", "datasets.utils.tqdm")
LOGGERS = ("", "trainkit", "accelerate", "bitsandbytes")  # whose handlers or levels a run changes; "" is the root
ACCELERATE_STATES = ("AcceleratorState", "GradientState", "PartialState")  # one of each in a process


def say(text: str) -> None:
    """A line for the user, before there is a run that logs; from the first of several processes alone."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextmanager
def own_settings() -> Iterator[None]:
    """Inside, libraries are quiet and Accelerate starts afresh; afterwards, everything is as it was before.

    Also what a run sets by itself: the environment, sys.argv, log levels and handlers, torch's global switches and
    random state, packages that were kept from being imported. As a decorator, `@own_settings()` on a `main`.
    """
    with ExitStack() as undo:
        for setting in (_environment, _warnings, _argv, _blocked_imports, _loggers, _library_logs, _torch, _accelerate):
            undo.enter_context(setting())
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextmanager
def _warnings() -> Iterator[None]:
    """What libraries say to the programmers who use them is not shown, unless `python -W` or PYTHONWARNINGS asks."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", module=r"tqdm\b")  # in a notebook, that it has no widgets
            warnings.filterwarnings(
                "ignore", category=UserWarning, module=rf"(?!{AUDIBLE}\b)({'|'.join(LIBRARIES)})\b")
        yield


@contextmanager
def _argv() -> Iterator[None]:
    before = list(sys.argv)
    try:
        yield
    finally:
        sys.argv[:] = before


@contextmanager
def _blocked_imports() -> Iterator[None]:
    """None in sys.modules makes an import fail: see trainkit/runtime/startup.py."""
    before = {name for name, module in sys.modules.items() if module is None}
    try:
        yield
    finally:
        for name in [name for name, module in sys.modules.items() if module is None and name not in before]:
            del sys.modules[name]


@contextmanager
def _loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import it misses kernels that we do not use
    try:
        yield
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers


@contextmanager
def _library_logs() -> Iterator[None]:
    """Levels of the libraries' logs and their progress bars; those imported inside get what they come with."""
    before = {name: (_verbosity(log), log.is_progress_bar_enabled()) for name, log in _imported(LIBRARY_LOGS).items()}
    quiet_imported()
    try:
        yield
    finally:
        for name, log in _imported(LIBRARY_LOGS).items():
            level, bar = before.get(name, (logging.WARNING, True))
            if level is not None and hasattr(log, "set_verbosity"):
                log.set_verbosity(level)
            (log.enable_progress_bar if bar else log.disable_progress_bar)()


def quiet_imported() -> None:
    """No progress bars and no advice of the libraries that are imported by now: they would tear the progress line.

    Their errors still show.
    """
    for log in _imported(LIBRARY_LOGS).values():
        log.disable_progress_bar()
        if hasattr(log, "set_verbosity_error"):
            log.set_verbosity_error()


def _verbosity(log: ModuleType) -> int | None:
    return log.get_verbosity() if hasattr(log, "get_verbosity") else None


def _imported(names: Iterable[str]) -> dict[str, ModuleType]:
    return {name: sys.modules[name] for name in names if sys.modules.get(name)}


@contextmanager
def _torch() -> Iterator[None]:
    torch = sys.modules.get("torch")
    before = None if torch is None else (
        torch.get_rng_state(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        if (torch := sys.modules.get("torch")) is not None:
            state, precision, tf32, benchmark, deterministic = before or (None, "highest", True, False, False)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cudnn.benchmark = benchmark
            torch.use_deterministic_algorithms(deterministic)
            torch.set_flush_denormal(False)
            if state is not None:
                torch.set_rng_state(state)


@contextmanager
def _accelerate() -> Iterator[None]:
    """The state of an Accelerator that was there before is kept for afterwards: a run makes its own."""
    states = _accelerate_states()
    before = {name: dict(shared) for name, shared in states.items()}
    for shared in states.values():
        shared.clear()
    try:
        yield
    finally:
        for name, shared in _accelerate_states().items():
            shared.clear()
            shared.update(before.get(name, {}))


def _accelerate_states() -> dict[str, dict]:
    module = sys.modules.get("accelerate.state")
    return {name: getattr(module, name)._shared_state for name in ACCELERATE_STATES} if module else {}
