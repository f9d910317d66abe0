"""Runs that are killed or stopped: at random, in every stage of a save, by signals; with one process and with two."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from typing import get_args

from experiments.trials import EVERY, STEPS, WEIGHTS, Bench, Result, is_ready, kill_me, last_line
from tests.support.trainers import metrics
from trainkit import checkpoints
from trainkit.checkpoints import Stage
from trainkit.errors import EXIT_CODES
from trainkit.runtime.checkpoint_folders import CheckpointFolders, is_whole
from trainkit.runtime.signals import WISHES
from trainkit.runtime.weight_files import step_of

KILLS, SIGNALS = 50, 30
STOPS = (1, 4, STEPS - 1)  # finished steps
SECONDS_FOR_A_SIBLING = 60.0  # in which the other process must have ended
SAVE = 3 * EVERY  # the save in which a stage is hit: older checkpoints are there to be pruned

MODES: dict[str, dict[str, object]] = {
    "plain LoRA, AdamW": {},
    "accumulation, flips, live crops, dropout": dict(
        gradient_accumulation_steps=2, random_flip=True, lora_dropout=0.2, train_batch_size=1),
    "DoRA, Prodigy, EMA, cached latents": dict(
        use_dora=True, optimizer="prodigy", learning_rate=1.0, use_ema=True, cache_latents=True),
    "new tokens, trained for half of the steps": dict(train_text_encoder_ti=True, train_text_encoder_ti_frac=0.5),
    "text encoder LoRA, cosine": dict(train_text_encoder=True, lr_scheduler="cosine"),
    "class images, Min-SNR": dict(with_prior_preservation=True, class_prompt="an icon", num_class_images=3,
                                  snr_gamma=5.0),
    "EDM, LoHa": dict(do_edm_style_training=True, lora_type="loha"),
    "LoKr, schedule-free AdamW, bf16": dict(
        lora_type="lokr", lokr_factor=4, optimizer="schedule_free_adamw", mixed_precision="bf16"),
    "Fourier loss, 8-bit Adam": dict(loss_type="fourier", optimizer="adamw8bit", optimizer_args="min_8bit_size=16"),
    "HinaAdaptive with its rules": dict(optimizer="hina_adaptive", optimizer_args="preset=fork"),
    "Huber loss, offset noise, LoRA+": dict(loss_type="huber", noise_offset=0.1, loraplus_lr_ratio=4.0),
}


def kills(bench: Bench, result: Result) -> None:
    """A run that saves every second step is killed (`kill -9`) at a random moment. The same command must continue it.
    """
    chance, seconds = random.Random(0), bench_seconds(bench)
    for number in range(KILLS):
        out = bench.fresh("killed")
        end = time.monotonic() + chance.uniform(0.05, 0.95) * seconds
        bench.run(out, kill_when=lambda end=end: time.monotonic() > end)
        before = whole_checkpoints(out)
        done = bench.resume(out)
        first = step_of(Path(before[-1])) if before else 0
        steps = [row["step"] for row in metrics(out)] if done.code == 0 else []
        result.count(f"kill {number}", went_on=done.code == 0 and bench.ends_as_whole(out) and steps == [*range(1, 11)],
                     why=f"resumed from step {first}: exit {done.code}, {last_line(done.output)}")


def bench_seconds(bench: Bench) -> float:
    begun = time.monotonic()
    bench.uninterrupted("timed")
    return time.monotonic() - begun


def whole_checkpoints(out: Path) -> list[str]:
    return [str(folder) for folder in CheckpointFolders(out).all() if is_whole(folder)]


def save_stages(bench: Bench, result: Result) -> None:
    """A run of one process is killed after each of the eight stages of a save. The same command must continue it."""
    for stage in get_args(Stage):
        out = bench.fresh("stage")
        killed = bench.run(out, patch=lambda stage=stage: kill_after(stage))
        assert killed.code == -signal.SIGKILL, killed.output
        torn = [folder.name for folder in CheckpointFolders(out).all() if not is_whole(folder)]
        done = bench.resume(out)
        result.count(f"kill after {stage}", went_on=not torn and done.code == 0 and bench.ends_as_whole(out),
                     why=f"torn: {torn}, exit {done.code}, {last_line(done.output)}")


def save_stages_of_two(bench: Bench, result: Result) -> None:
    """The same with two processes. The first is killed. The second must end by itself, and both must continue."""
    whole = bench.fresh("whole2")
    ended = bench.ranks(whole)
    assert [done.code for done in ended] == [0, 0], [done.output for done in ended]
    for stage in get_args(Stage):
        out = bench.fresh("stage2")
        killed, other = bench.ranks(out, patch=lambda stage=stage: kill_after(stage))
        assert killed.code == -signal.SIGKILL, killed.output
        resumed = bench.ranks(out, "--resume_from_checkpoint=latest")
        result.largest("seconds until the other process ended", other.seconds)
        says_how = "--resume_from_checkpoint" in other.output
        went_on = all(done.code == 0 for done in resumed) and bench.ends_as_whole(out, whole)
        result.count(f"kill of the first process after {stage}",
                     went_on=went_on and other.code > 0 and says_how and other.seconds < SECONDS_FOR_A_SIBLING,
                     why=f"the other: exit {other.code}, {last_line(other.output)}; resumed: "
                         f"{[done.code for done in resumed]}, {last_line(resumed[0].output)}")


def kill_after(stage: Stage) -> None:
    """In the child: SIGKILL when the first process has finished `stage` of a save."""
    checkpoints.reached = lambda at, step: kill_me() if (at, step) == (stage, SAVE) else None


def signals(bench: Bench, result: Result) -> None:
    """SIGTERM, Ctrl-C or SIGUSR1 comes at a random moment. The run must save and end, and the same command continue it.
    """
    chance = random.Random(1)
    for number in range(SIGNALS):
        kind = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]
        out, wait = bench.fresh("signalled"), chance.uniform(0.0, 0.8)
        first: list[float] = []

        def late(out: Path = out, wait: float = wait, first: list[float] = first) -> bool:
            if not first and is_ready(lambda: bool(metrics(out))):
                first.append(time.monotonic())
            return bool(first) and time.monotonic() - first[0] > wait

        stopped = bench.run(out, kill_when=late, number=kind, max_train_steps=STEPS, validation_prompt="a TOK icon",
                            validation_steps=3, num_validation_images=1)
        result.largest("seconds from the signal to the end", stopped.seconds)
        usable = all((folder / WEIGHTS).is_file() for folder in CheckpointFolders(out).all())
        done = bench.resume(out, validation_prompt="a TOK icon", validation_steps=3, num_validation_images=1)
        in_time = stopped.code in (0, EXIT_CODES[WISHES[kind.name]])
        result.count(f"{kind.name} {wait:.2f} s after the first step",
                     went_on=in_time and usable and done.code == 0 and bench.ends_as_whole(out),
                     why=f"exit {stopped.code}, {last_line(stopped.output)}; resumed: {last_line(done.output)}")


def resume(bench: Bench, result: Result) -> None:
    """Runs of 10 steps are stopped after 1, 4 and 9 steps, and continued. Every bit must be that of a run without a
    stop.
    """
    for number, (mode, flags) in enumerate(MODES.items()):
        folders = dict(class_data_dir=bench.folder / "class") if "class_prompt" in flags else {}
        whole = bench.uninterrupted(f"mode{number}", **flags | folders)
        for stop in STOPS:
            out = bench.fresh("stopped")
            bench.run(out, f"--stop_after_steps={stop}", **flags | folders)
            done = bench.resume(out, **flags | folders)
            same = done.code == 0 and bench.ends_as_whole(out, whole) and losses(out) == losses(whole)
            result.count(f"{mode}, stopped after {stop}", went_on=same,
                         why=f"exit {done.code}, {last_line(done.output)}")


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(out)}


def watched(out: Path, stop: threading.Event, found: list[int]) -> None:
    """Count whole checkpoints every 5 ms, for as long as the run lasts."""
    while not stop.is_set():
        found.append(sum(map(is_whole, CheckpointFolders(out).all())))
        time.sleep(0.005)


def one_is_always_there(bench: Bench, result: Result) -> None:
    """With `--checkpoints_total_limit=1`, we look every 5 ms. After the first checkpoint, there must always be one
    complete checkpoint on the disk. Each look is an attempt.
    """
    out, stop, found = bench.fresh("watched"), threading.Event(), []
    watcher = threading.Thread(target=watched, args=(out, stop, found))
    watcher.start()
    try:
        done = bench.run(out, checkpoints_total_limit=1, max_train_steps=30, checkpointing_steps=1)
    finally:
        stop.set()
        watcher.join()
    since_first = found[next(i for i, count in enumerate(found) if count):]
    # a folder that is pruned between being listed and being read makes one look miss it
    gaps = sum(pair == (0, 0) for pair in zip(since_first, since_first[1:], strict=False))
    result.tried = len(since_first)
    result.went_on, result.lost = len(since_first) - gaps, gaps
    if gaps or done.code:
        result.defects.append(f"{gaps} looks found none; exit {done.code}")


TRIALS = (kills, save_stages, save_stages_of_two, signals, resume, one_is_always_there)
