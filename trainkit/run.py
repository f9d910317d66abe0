"""The run: device and precision, one writer per folder, records, trackers, the progress line, signals, and its end.

    with start_run(opts) as run:
        ...
        start = checkpoints.resume(opts.run.resume_from_checkpoint)
        run.begin(start, total)
        for step, micros in batches:                              # step counts from 0
            for batch in micros:
                losses = train_step(...)                          # [B]
                run.backward(losses.sum() / batch.num_instance)
            stats = run.update(optimizer, adapters.parameters(), step=step)
            run.log(step + 1, stats | optimizer.describe())       # finished steps
            if due(step + 1, opts.run.checkpointing_steps, last=step + 1 == total) or run.stopping:
                run.end_if_asked(step + 1, checkpoints.save(step + 1))
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.errors import EXIT_CODES, Problem, UserError
from trainkit.files import Json, disk_errors
from trainkit.runtime import ranks, trackers
from trainkit.runtime.gradients import Gradients, Steppable
from trainkit.runtime.lock import OutputLock
from trainkit.runtime.progress import LineHandler, Progress
from trainkit.runtime.record import Metrics, Record, redact_json
from trainkit.runtime.shelf import pointed
from trainkit.runtime.signals import Signals, Wish, end_with_launcher

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from trainkit.options import OptionSet
    from trainkit.preview import Previews

log = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def due(step: int, every: int | None, *, last: bool = False) -> bool:
    """Whether something done `every` so many finished steps is due after `step` of them; always after the last."""
    return last or (bool(every) and step > 0 and step % every == 0)


def start_run(opts: OptionSet, project: str = "dreambooth-lora-sdxl") -> Run:
    """Everything a run needs before its first model is loaded.

    Raises UserError: the output folder is another run's or cannot be written, a tracker is missing.
    """
    names = trackers.chosen_trackers(opts.run.report_to)
    out_dir = Path(opts.run.output_dir)
    with disk_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    lock = OutputLock(out_dir) if int(os.environ.get("RANK", 0)) == 0 else None
    if lock is not None:
        lock.acquire()
    try:
        return Run(opts, names, project=project, lock=lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


class Run:
    """What lasts from the first to the last line of a training; a context manager that ends itself properly."""

    def __init__(self, opts: OptionSet, tracker_names: list[str], *, project: str, lock: OutputLock | None):
        end_with_launcher()
        self.opts, self.out_dir, self.seed, self.lock = opts, Path(opts.run.output_dir), opts.run.seed, lock
        self.accelerator = make_accelerator(opts, tracker_names)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.precision = self.accelerator.mixed_precision
        self.weight_dtype = WEIGHT_DTYPES[self.precision]
        self.gradients = Gradients(
            self.device, fp16=self.precision == "fp16", max_skipped=opts.run.max_skipped_steps,
            last_checkpoint=lambda: pointed(self.out_dir),
        )
        self.progress, self.signals, self.metrics = Progress(), Signals(), Metrics(self.out_dir)
        self._handler = LineHandler(self.progress)
        self._agreed: Wish | None = None
        self._step, self._over = 0, False
        self._clock, self._seconds_before = time.monotonic(), 0.0
        self._open(tracker_names, project)

    def _open(self, tracker_names: list[str], project: str) -> None:
        logging.getLogger().addHandler(self._handler)
        logging.getLogger("trainkit").setLevel(logging.INFO if self.is_main else logging.ERROR)
        trackers.quiet_libraries()
        torch.manual_seed(self.seed)  # for libraries that draw by themselves; ours draw from trainkit.rng
        if self.opts.precision.allow_tf32:
            torch.set_float32_matmul_precision("high")
        options = redact_json(self.opts.flat(), self.secrets)
        if self.is_main:
            self.record = Record(
                self.out_dir, seed=self.seed, world=self.world, device=describe_device(self.device),
                precision=self.precision, options=with_origins(options, self.opts.origins),
            )
        if tracker_names:
            trackers.start_trackers(self.accelerator, project, options, out_dir=self.out_dir)
        self.signals.install()

    @property
    def secrets(self) -> list[str]:
        token = self.opts.run.hub_token
        return [] if token is None else [token.get_secret_value()]

    # -- the loop -------------------------------------------------------------------------------------------------

    def begin(self, start: int, total: int) -> None:
        """Just before the loop, with `start` finished steps of `total`: from now on signals wait for a save."""
        self.signals.patient = True
        self._clock, self._step = time.monotonic(), start
        if self.is_main:
            self._seconds_before = self.metrics.begin(start)
            self.record.add(total_steps=total, start_step=start, global_batch=self.global_batch)
            self.progress.begin(start, total)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in --mixed_precision; does nothing under "no"."""
        return torch.autocast(self.device.type, dtype=self.weight_dtype, enabled=self.precision != "no")

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss: losses.sum() / batch.num_instance."""
        self.gradients.backward(loss)

    def update(self, optimizer: Steppable, parameters: Iterable[Tensor], *, step: int) -> dict[str, float]:
        """Optimizer step `step`, counted from 0 -> {"loss", "grad_norm", "skipped"} over all ranks.

        Raises UserError(kind="nonfinite") after too many steps in a row whose loss or gradient was not finite.
        """
        votes = [float(self.signals.wish == kind) for kind in ("stopped", "preempted")]
        done = self.gradients.update(
            optimizer, parameters, step=step, max_grad_norm=self.opts.optimizer.max_grad_norm, votes=votes,
        )
        self._agreed = "stopped" if done.votes[0] else "preempted" if done.votes[1] else None
        return {"loss": done.loss, "grad_norm": done.grad_norm, "skipped": float(self.gradients.skipped)}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `step` finished steps: a row in metrics.jsonl, the trackers, the progress line. Rank 0 only."""
        self._step = step
        if not self.is_main:
            return
        row = {"step": step, **values, "images": step * self.global_batch, "seconds": round(self.seconds, 3)}
        self.metrics.write({k: v if math.isfinite(v) else None for k, v in row.items()})
        trackers.log_values(self.accelerator, {k: v for k, v in values.items() if math.isfinite(v)}, step=step)
        self.progress.update(step, row, note=self._note(step))

    def draw(self, step: int, previews: Previews) -> None:
        """Previews after `step` finished steps, on rank 0 while the others wait; the trackers get them too."""
        from PIL import Image

        if self.is_main:
            *pictures, _ = previews.draw(step) or [None]
            self.log_images(step, {"validation": [Image.open(path) for path in pictures]} if pictures else {})
        ranks.barrier()

    def log_images(self, step: int, images: Mapping[str, list[Image]]) -> None:
        """Pictures of one size per name, to the trackers. Rank 0 only."""
        if self.is_main:
            trackers.log_images(self.accelerator, images, step=step)

    @property
    def stopping(self) -> Wish | None:
        """What a signal asked for, once every rank knows: "preempted", "stopped" or None. Changes in `update` only."""
        return self._agreed

    def end_if_asked(self, step: int, saved: Path) -> None:
        """Raise the UserError that ends the run when a signal asked for it; `saved` is this step's checkpoint."""
        if self._agreed is not None:
            self.signals.wish = self._agreed  # on a rank that got no signal itself
            raise self.signals.error(where=str(saved), why=f"step {step} is finished and saved")

    @property
    def share(self) -> dict[str, int]:
        """This rank's part in each global batch, as `loader.micro_batches` takes it."""
        return {"rank": self.rank, "world": self.world, "num_workers": self.opts.run.dataloader_num_workers,
                "accumulation": self.opts.run.gradient_accumulation_steps}

    @property
    def global_batch(self) -> int:
        """Pictures in an optimizer step."""
        return self.opts.run.global_batch(self.world)

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._clock

    def _note(self, step: int) -> str:
        every, total = self.opts.run.checkpointing_steps, self.progress.pace.total
        notes = [f"{self.gradients.skipped} skipped"] if self.gradients.skipped else []
        if step < total:
            notes.append(f"next save {min(total, (step // every + 1) * every)}")
        return " · ".join(notes)

    # -- across restarts ------------------------------------------------------------------------------------------

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        tensors, data = self.gradients.pack()
        return tensors, data | {"seed": self.seed}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        if data["seed"] != self.seed:
            raise UserError(Problem(
                what=f"the checkpoint was made with --seed {data['seed']}, this run has {self.seed}", where="--seed",
                why="the order of the pictures and all noise follow from the seed",
                fix=f"add --seed {data['seed']}, or give a new --output_dir",
            ))
        self.gradients.unpack(tensors, data)

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self, status: str = "done", *, exit_code: int = 0) -> None:
        """Complete run.json, close the trackers, give signals and the folder back. A second call does nothing."""
        if self._over:
            return
        self._over = True
        self.progress.close()
        if self.is_main:
            self.record.finish(status=status, exit_code=exit_code, seconds=round(self.seconds, 3), step=self._step)
        self.signals.restore()
        logging.getLogger().removeHandler(self._handler)
        self.accelerator.end_training()
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record how the run ended; running out of memory becomes a UserError that names what helps."""
        if isinstance(error, torch.OutOfMemoryError):
            self.finish("memory", exit_code=EXIT_CODES["memory"])
            raise out_of_memory(error, self.device) from error
        if isinstance(error, UserError):
            self.finish(error.problems[0].kind, exit_code=error.exit_code)
        else:
            self.finish("done" if error is None else "failed", exit_code=0 if error is None else 1)


def make_accelerator(opts: OptionSet, tracker_names: list[str]) -> Accelerator:
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


def out_of_memory(error: torch.OutOfMemoryError, device: torch.device) -> UserError:
    return UserError(Problem(
        what="out of memory", where=describe_device(device), why=str(error).partition("\n")[0], kind="memory",
        fix="add --gradient_checkpointing, --cache_latents and --mixed_precision bf16, then halve --train_batch_size "
            "and double --gradient_accumulation_steps (the same gradient); "
            "--resume_from_checkpoint latest keeps what is saved",
    ))
