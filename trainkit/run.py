"""The run: device and precision, one writer per folder, records, trackers, the progress line, signals, and its end.

    with start_run(opts, project) as run:
        ...                                                       # models, data, adapters, optimizer
        start = saves.resume(opts.run.resume_from_checkpoint)
        run.train(train_step, batches, optimizer, text, saves, previews, start=start, stop=stop, total=total)
        with optimizer.averaged():                                # the weights to look at
            ...                                                   # publish
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainkit.data.sampler import Shard
from trainkit.devices import WEIGHT_DTYPES, allow_tf32, only_deterministic, precision_notices
from trainkit.errors import Problem, UserError, is_out_of_memory, out_of_memory, refuse
from trainkit.files import DISK_ERRORS, Json, disk_error, disk_errors
from trainkit.plan import report
from trainkit.plan.phases import TracedOptions
from trainkit.runtime import ranks, trackers
from trainkit.runtime.checkpoint_folders import pointed
from trainkit.runtime.lock import OutputLock
from trainkit.runtime.progress import LineHandler, Progress
from trainkit.runtime.record import Metrics, RunRecord, redact_json
from trainkit.runtime.signals import RESUME, Moment, Signals, Wish, end_with_launcher
from trainkit.runtime.weight_files import run_name
from trainkit.training.gradients import Gradients, Steppable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from trainkit.checkpoints import Checkpoints
    from trainkit.conditioning.live_text import Text
    from trainkit.data.batch import Batch
    from trainkit.optim import Optim
    from trainkit.preview import Previews
    from trainkit.training.step import TrainStep

log = logging.getLogger(__name__)

SAVES_MEMORY = (
    "add --gradient_checkpointing, --cache_latents and --mixed_precision bf16, then halve --train_batch_size and "
    "double --gradient_accumulation_steps (the same gradient); --resume_from_checkpoint latest keeps what is saved")


class RunSettings(TracedOptions, Protocol):
    """What of a trainer's options is about the run, and on a card about its memory; an OptionSet with these concerns.
    """

    @property
    def origins(self) -> dict[str, str]: ...

    def flat(self) -> Mapping[str, Json]: ...

    def notices(self) -> list[str]: ...


def start_run(opts: RunSettings, project: str) -> Run:
    """Everything a run needs before its first model is loaded.

    project  what trackers file the run under

    Raises UserError: the output folder is another run's or cannot be written, a tracker is missing, the launcher
    wants DeepSpeed or the like.
    """
    # Gradients of trained attention underflow, and a CPU multiplies subnormal numbers many times more slowly. Threads
    # inherit the setting when they are made, so it comes before the first parallel operation.
    torch.set_flush_denormal(True)
    ranks.join(os.environ)
    refuse(ranks.precision_problems(os.environ, opts.precision.mixed_precision))
    names = trackers.chosen_trackers(opts.run.report_to)
    lock = take_folder(Path(opts.run.output_dir))
    with ExitStack() as on_failure:
        if lock is not None:
            on_failure.callback(lock.release)
        run = Run(opts, lock=lock, tracker_names=names)
        on_failure.pop_all()  # from here on the run gives the folder back, and tells how it ended
        on_failure.push(run)
        run.open(names, project)
        on_failure.pop_all()
    return run


def take_folder(out_dir: Path) -> OutputLock | None:
    """The output folder, there and locked; rank 0 locks for all. Raises UserError: it is a file, or another run's."""
    with disk_errors(out_dir):
        in_the_way = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
        if not out_dir.resolve().name:
            raise UserError(Problem(
                what=f"--output_dir {out_dir} has no name", where="--output_dir", fix="--output_dir runs/mine",
                why="its last part names the LoRA file",
            ))
        if not in_the_way.is_dir():
            raise UserError(Problem(
                what=f"--output_dir {out_dir} cannot be a folder", where="--output_dir", why=f"{in_the_way} is a file",
                fix="give another --output_dir, or move that file away",
            ))
        out_dir.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("RANK", 0)) != 0:
            return None
        lock = OutputLock(out_dir)
        lock.acquire()
        return lock


class Run:
    """What lasts from the first to the last line of a training; a context manager that ends itself properly."""

    def __init__(self, opts: RunSettings, *, lock: OutputLock | None, tracker_names: list[str]):
        end_with_launcher()
        self.opts, self.out_dir, self.seed, self.lock = opts, Path(opts.run.output_dir), opts.run.seed, lock
        self.accelerator = make_accelerator(opts, tracker_names)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.precision = self.accelerator.mixed_precision
        self.weight_dtype = WEIGHT_DTYPES[self.precision]
        # The context of a forward pass in --mixed_precision; it does nothing under "no".
        self.autocast = partial(torch.autocast, self.device.type, dtype=self.weight_dtype,
                                enabled=self.precision != "no")
        self.gradients = Gradients(
            self.device, fp16=self.precision == "fp16", max_skipped=opts.run.max_skipped_steps,
            last_checkpoint=lambda: pointed(self.out_dir),
        )
        self.progress, self.signals, self.metrics = Progress(), Signals(), Metrics(self.out_dir)
        self._handler = LineHandler(self.progress, self.secrets)
        self._agreed: Wish | None = None
        self._step, self._total, self._over = 0, 0, False
        self._clock, self._seconds_before = time.monotonic(), 0.0
        self.saves_memory: Callable[[], str] = lambda: SAVES_MEMORY  # what helps, once memory has run out
        self._options = redact_json(opts.flat(), self.secrets)
        if self.is_main:
            self.record = RunRecord(
                self.out_dir, seed=self.seed, world=self.world, device=describe_device(self.device),
                precision=self.precision, options=with_origins(self._options, opts.origins),
            )

    def open(self, tracker_names: list[str], project: str) -> None:
        """Logging, trackers and signals, which `finish` gives back. `start_run` calls it."""
        logging.getLogger().addHandler(self._handler)
        logging.getLogger("trainkit").setLevel(logging.INFO if self.is_main else logging.ERROR)
        trackers.quiet_libraries()
        torch.manual_seed(self.seed)  # for libraries that draw by themselves; ours draw from trainkit.rng
        allow_tf32(self.opts.precision.allow_tf32)
        if self.opts.precision.deterministic:
            only_deterministic()
        for notice in (*self.opts.notices(), *ranks.unused_settings(os.environ),
                       *precision_notices(self.device, self.precision)):
            log.warning("%s", notice)
        report.at_start(self.opts, self)
        if self.is_main:
            self.record.write()
        if tracker_names:
            trackers.start_trackers(self.accelerator, project, self._options, out_dir=self.out_dir)
        self.signals.install()

    @property
    def device_name(self) -> str:
        return describe_device(self.device)

    @property
    def name(self) -> str:
        """What the run's files are called: the last part of --output_dir."""
        return run_name(self.out_dir)

    @property
    def secrets(self) -> list[str]:
        token = self.opts.run.hub_token
        return [] if token is None else [token.get_secret_value()]

    def note(self, **facts: Json) -> None:
        """Add to run.json what has become known. Rank 0 only."""
        if self.is_main:
            self.record.add(**facts)

    # -- the loop -------------------------------------------------------------------------------------------------

    def begin(self, start: int, total: int, previews: Previews | None = None) -> None:
        """Just before the loop, with `start` finished steps of `total`: afterwards signals wait for a save.

        The output folder is this run's from here on. `previews` come before the first step, and at the start of a
        session where they are due and an earlier session has not left them.
        """
        self._clock, self._step, self._total = time.monotonic(), start, total
        if self.is_main:
            self.record.begin(total_steps=total, start_step=start, global_batch=self.global_batch)
            self._seconds_before = self.metrics.begin(start)
            self.progress.begin(start, total)
        if previews is not None:
            if self.is_main:
                previews.begin(start)
            if ranks.from_main(lambda: previews.missing(start, last=start == total)):
                self.preview(start, previews)
        self.signals.wait_for_a_save()

    def train(
        self, train_step: TrainStep, batches: Iterable[tuple[int, Sequence[Batch]]], optimizer: Optim, text: Text,
        saves: Checkpoints, previews: Previews, *, start: int, stop: int, total: int,
    ) -> None:
        """The loop: one optimizer step for each (step, micro-batches).

        start, stop, total  finished steps at the start and at the end of this session, and at the end of the run
        """
        self.begin(start, total, previews)
        saves.announce(start, stop=stop, total=total)
        for step, micro_batches in batches:  # step counts from 0
            optimizer.begin(step)  # who trains in this step, and at which rate
            for loss in train_step(micro_batches):  # a part of the step's loss for each forward pass
                self.backward(loss)
            stats = train_step.passes.describe() | self.update(optimizer, step=step, then=text.after_update)
            self.log(step + 1, stats | optimizer.describe())  # finished steps
            self.after_step(step + 1, optimizer, saves=saves, previews=previews, stop=stop)
        self.end_loop(saves, stop)
        self.progress.close()  # the last line stays
        if stop < total:
            log.info("stopped after %d of %d steps, as --stop_after_steps says: the same command without it and with "
                     "--resume_from_checkpoint latest goes on", stop, total)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss: losses.sum() / batch.num_instance."""
        self.gradients.backward(loss)

    def update(self, optimizer: Steppable, *, step: int, then: Callable[[int], None] = lambda done: None,
               ) -> dict[str, float]:
        """Optimizer step `step`, counted from 0 -> {"loss", "grad_norm", "skipped"} over all ranks.

        What is summed over ranks, checked and clipped are the groups that train in this step.
        then  called with the number of finished steps when the weights were updated, not when the step was skipped
        Raises UserError(kind="nonfinite") after too many steps in a row whose loss or gradient was not finite.
        """
        done = self.gradients.update(
            optimizer, step=step, max_grad_norm=self.opts.optimizer.max_grad_norm, votes=self._votes(),
        )
        self._agree(done.votes)
        if not done.skipped:
            then(step + 1)
        return {"loss": done.loss, "grad_norm": done.grad_norm, "skipped": float(self.gradients.skipped)}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `step` finished steps: a row in metrics.jsonl, the trackers, the progress line. Rank 0 only."""
        self._step = step
        if not self.is_main:
            return
        row = {"step": step, **values, "images": step * self.global_batch, "seconds": round(self.seconds, 3)}
        self.metrics.write({k: v if math.isfinite(v) else None for k, v in row.items()})
        trackers.log_values(self.accelerator, {k: v for k, v in values.items() if math.isfinite(v)}, step=step)
        self.progress.update(step, row, notes=self._notes(step))

    def preview(self, step: int, previews: Previews) -> None:
        """Previews after `step` finished steps, on rank 0 while the others wait; the trackers get them too.

        A signal ends them after a denoising step, and without files.
        """
        if self.is_main:
            images = [*previews.generate(step, self._watch_previews).values()]  # the last: the sheet of all
            self.log_images(step, {"validation": images[:-1]} if images else {})
        ranks.barrier()

    def _watch_previews(self, done: float, total: int) -> bool:
        self.progress.task("previews", done, total)
        return self.signals.wish is not None

    def log_images(self, step: int, images: Mapping[str, list[Image]]) -> None:
        """Images of one size per name, to the trackers. Rank 0 only."""
        if self.is_main:
            trackers.log_images(self.accelerator, images, step=step)

    @property
    def stopping(self) -> Wish | None:
        """What a signal asked for, once every rank knows: "preempted", "stopped" or None.

        Changes in `update`, and in `listen`.
        """
        return self._agreed

    def listen(self) -> None:
        """Agree with all ranks about signals outside of an update."""
        self._agree(ranks.sum_over_ranks(torch.tensor(self._votes(), device=self.device)).tolist())

    def _votes(self) -> list[float]:
        return [float(self.signals.wish == wish) for wish in ("stopped", "preempted")]

    def _agree(self, votes: Sequence[float]) -> None:
        self._agreed = "stopped" if votes[0] else "preempted" if votes[1] else None

    @property
    def healthy(self) -> bool:
        """Whether the last step was finite (one that only lowered fp16's scale counts as finite).

        While it is not, the run may be diverging and its weights may be spoiled already: save if you must, but delete
        no older checkpoint for it.
        """
        return self.gradients.in_a_row == 0

    def require_progress(self) -> None:
        """After the loop, before anything is published.

        Raises UserError(kind="nonfinite") when every finished step of the run, all sessions together, was skipped, or
        the last one: then the weights are those the losses went wrong with.
        """
        if self.gradients.skipped >= self._step > 0:
            raise self.gradients.never_finite(self._step, str(self.metrics.path))
        if not self.healthy:
            raise UserError(Problem(
                what=f"the run was diverging when it ended: the last {self.gradients.in_a_row} steps were skipped",
                where=str(self.metrics.path), why="their loss or gradient was not finite; nothing was published",
                kind="nonfinite", fix="lower --learning_rate and start anew, or resume from a checkpoint from before",
            ))

    def require_finite(self, optimizer: Steppable, step: int) -> None:
        """Before weights are written: UserError(kind="nonfinite") where a step was too long for their numbers."""
        if not all(bool(torch.isfinite(p).all()) for p in optimizer.params):
            raise UserError(Problem(
                what=f"the weights are not finite after step {step}", where=str(self.metrics.path), kind="nonfinite",
                why="a step was longer than their numbers reach; nothing was written",
                fix="lower the learning rate and start anew, or go back to a checkpoint (the newest is "
                    f"{pointed(self.out_dir) or 'none'})",
            ))

    def after_step(self, done: int, optimizer: Steppable, *, saves: Checkpoints, previews: Previews, stop: int) -> None:
        """What is due after `done` finished steps: save (and end there if a signal asks for it), previews, a last look.

        stop  finished steps at the end of this session
        """
        if saves.due(done, stop=stop, total=self._total) or self.stopping:
            self.save(done, optimizer, saves)
        if previews.due(done, last=done == stop):
            self.preview(done, previews)
            self.listen()
            if self.stopping:  # a signal has come since the update, and ended the previews
                self.save(done, optimizer, saves)
        if done == stop:
            self.require_finite(optimizer, done)
            self.require_progress()

    def save(self, done: int, optimizer: Steppable, saves: Checkpoints) -> None:
        """Save `done` finished steps, and end there when a signal asked for it."""
        self.require_finite(optimizer, done)
        self.end_if_stopping(done, saves.save(done, prune=self.healthy))

    def end_loop(self, saves: Checkpoints, stop: int) -> None:
        """After the last step of the session: from now on a signal ends the run at once."""
        if saves.saved == stop:
            saves.save(stop, prune=self.healthy)  # written already, but a kill may have come before its pruning
        self.signals.end_at_once(Moment(
            where=str(self.out_dir), fix=RESUME, why=f"{stop} steps are finished, the newest checkpoint is "
            f"{pointed(self.out_dir) or 'none'}, and the final files may be missing"))

    def end_if_stopping(self, step: int, saved: Path) -> None:
        """Raise the UserError that ends the run when a signal asked for it; `saved` is this step's checkpoint."""
        if self._agreed is not None:
            self.signals.wish = self._agreed  # on a rank that got no signal itself
            raise self.signals.error(where=str(saved), why=f"step {step} is finished and saved")

    def show_task(self, name: str, done: float, total: int) -> None:
        """How far a task before the loop has come, in the progress line. Rank 0 shows it."""
        self.signals.check()
        if self.is_main:
            self.progress.task(name, done, total)

    @property
    def shard(self) -> Shard:
        """This rank's part in each global batch."""
        return Shard(self.rank, self.world, self.opts.run.gradient_accumulation_steps)

    @property
    def global_batch(self) -> int:
        """Images in an optimizer step."""
        return self.opts.run.global_batch(self.world)

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._clock

    def _notes(self, step: int) -> list[str]:
        """For the end of the progress line, the more important first."""
        every, total = self.opts.run.checkpointing_steps, self.progress.pace.total
        skipped = f"{self.gradients.skipped} skipped" if self.gradients.skipped else ""
        save = min(total, (step // every + 1) * every) if every else total
        return [skipped, f"next save {save}" if step < total else ""]

    # -- across restarts ------------------------------------------------------------------------------------------

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return self.gradients.pack()

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        self.gradients.unpack(tensors, data)

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self, status: str | None = None, *, exit_code: int = 0) -> None:
        """Complete run.json, close the trackers, give signals and the folder back. A second call does nothing.

        status  how it ended; None: "done", or "stopped early" when the last logged step is not the run's last one
        """
        if self._over:
            return
        self._over = True
        status = status or ("done" if self._step >= self._total else "stopped early")
        with disk_errors(self.out_dir), ExitStack() as after:  # the rest happens even when run.json cannot be written
            if self.lock is not None:
                after.callback(self.lock.release)
            after.callback(self.accelerator.end_training)
            after.callback(logging.getLogger().removeHandler, self._handler)
            after.callback(self.signals.restore)
            self.progress.close()
            if self.is_main:
                self.record.finish(status=status, exit_code=exit_code, seconds=round(self.seconds, 3), step=self._step)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record how the run ended; running out of memory or disk becomes a UserError that names what helps."""
        if error is None:
            self.finish()
            return
        explained = self._explained(error)
        status, exit_code = "failed", 1
        if isinstance(explained, UserError):
            status, exit_code = explained.problems[0].kind, explained.exit_code
        try:
            self.finish(status, exit_code=exit_code)
        except (OSError, UserError) as late:  # the first error is the one to report
            log.warning("the run did not end properly: %s", str(late).partition("\n")[0])
        if explained is not error:
            raise explained from error

    def _explained(self, error: BaseException) -> BaseException:
        """`error`, as a UserError where memory or disk ran out, or a signal ended the run.

        Libraries make errors of their own of what a signal raises.
        """
        if self.signals.wish is not None and not self.signals.patient:
            return self.signals.error()
        if is_out_of_memory(error):
            return out_of_memory(error, describe_device(self.device), self._what_saves_memory())
        if isinstance(error, OSError) and (error.errno in DISK_ERRORS or not self.out_dir.is_dir()):
            return disk_error(error, Path(error.filename or self.out_dir), "read or write")
        return error

    def _what_saves_memory(self) -> str:
        try:
            return self.saves_memory()
        except Exception:  # whatever a plan stumbles over: that memory ran out is what must be told
            return SAVES_MEMORY


def make_accelerator(opts: RunSettings, tracker_names: list[str]) -> Accelerator:
    """Process group, device and precision, as launcher, environment and --mixed_precision say."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    out_dir = Path(opts.run.output_dir)
    places = ProjectConfiguration(project_dir=str(out_dir), logging_dir=str(out_dir / opts.run.logging_dir))
    return Accelerator(
        mixed_precision=opts.precision.mixed_precision, log_with=tracker_names or None, project_config=places,
    )


def with_origins(options: Mapping[str, Json], origins: Mapping[str, str]) -> dict[str, Json]:
    return {flag: {"value": value, "origin": origins.get(flag, "default")} for flag, value in options.items()}


def describe_device(device: torch.device) -> str:
    """`NVIDIA GeForce RTX 3060 (12 GB)` or `CPU x86_64, 2 cores`."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name} ({facts.total_memory / 2**30:.0f} GB)"
    return f"{device.type.upper()} {platform.machine()}, {os.cpu_count()} cores"
