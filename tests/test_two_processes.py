"""Two real gloo processes train what one process trains on the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.compare import same_checkpoint
from tests.support.trainers import (
    TRAINER,
    Done,
    command,
    forked,
    forked_ranks,
    launched,
    make_images,
    metrics,
    torchrun,
    wait_for_metrics,
)
from trainkit import preview
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Shard, make_order
from trainkit.options import DataOptions

pytestmark = pytest.mark.trains
BUCKETS = dict(enable_bucket=True, resolution=64, min_bucket_reso=16, max_bucket_reso=96, bucket_reso_steps=16)


def test_two_processes_equal_one(tiny_sdxl, tmp_path):
    """Captions and latents are encoded in parts and sent to the other process.

    With SGD: Adam would make a whole step of a gradient that is all rounding.
    """
    images = make_images(tmp_path / "data", n=5)
    common = dict(max_train_steps=3, checkpointing_steps=3, cache_latents=True, cached_crops=2,
                  optimizer="torch.optim.SGD", learning_rate=1.0)
    one = command(tiny_sdxl, images, tmp_path / "one", train_batch_size=4, **common)
    two = command(tiny_sdxl, images, tmp_path / "two", train_batch_size=1, gradient_accumulation_steps=2, **common)
    both = launched([*torchrun(2), f"{TRAINER}.py", *two], env={"ACCELERATE_USE_CPU": "1"})
    for done in (forked(one, log=tmp_path / "log"), both):
        assert done.code == 0, done.output
    assert [m["step"] for m in metrics(tmp_path / "two") if "loss" in m] == [1, 2, 3], "only rank 0 writes"
    close(tmp_path / "one", tmp_path / "two")


def test_two_processes_equal_one_where_images_have_several_sizes(tiny_sdxl, tmp_path):
    """A rank that lacks a micro-batch adds nothing, neither to the gradient nor to a mean in the log."""
    images = make_images(tmp_path / "data", n=5)
    common = dict(max_train_steps=3, checkpointing_steps=3, train_batch_size=2, optimizer="torch.optim.SGD",
                  learning_rate=1.0, loss_type="fourier", fourier_warmup_steps=0, fourier_ramp_steps=0, **BUCKETS)
    one = command(tiny_sdxl, images, tmp_path / "one", gradient_accumulation_steps=2, **common)
    both = forked_ranks(command(tiny_sdxl, images, tmp_path / "two", **common), log=tmp_path / "log2")
    for done in (forked(one, log=tmp_path / "log"), *both):
        assert done.code == 0, done.output
    rows, _ = read_rows(DataOptions(instance_data_dir=f"{images}", instance_prompt="TOK", **BUCKETS))
    order = make_order(rows, 4, batch_size=2, seed=0)
    slots = [slot for step in range(3) for micro in order.slots(step, Shard(1, 2)) for slot in micro]
    assert not all(slot.counts for slot in slots), "no rank lacks a micro-batch: a vacuous test"
    close(tmp_path / "one", tmp_path / "two")
    logged = [[[m[name] for name in ("fourier_component", "fourier_raw", "fourier_weight_eff")]
               for m in metrics(tmp_path / d) if "loss" in m] for d in ("one", "two")]
    torch.testing.assert_close(torch.tensor(logged[0]), torch.tensor(logged[1]), rtol=1e-4, atol=0)


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_sdxl, tmp_path):
    """torchrun on a CPU without accelerate's word for it: two runs of one image stream into one folder."""
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=2), tmp_path / "out")
    ended = forked_ranks(argv, log=tmp_path / "log", on_cpu=False)
    assert all(done.code != 0 for done in ended) and any("ACCELERATE_USE_CPU=1" in done.output for done in ended)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_image_that_another_rank_has_looked_at_is_refused_by_all_and_explained_by_rank_0(tiny_sdxl, tmp_path):
    images = make_images(tmp_path / "data", n=4)
    (images / "p1.png").write_bytes(b"no image")  # in the part of rank 1
    first, second = forked_ranks(command(tiny_sdxl, images, tmp_path / "out"), log=tmp_path / "log")
    assert (first.code, second.code) == (3, 3) and not (tmp_path / "out").exists()
    assert "1 of 4 images cannot be read" in first.output and "p1.png: no image of a known format" in first.output
    assert second.output.startswith("rank 1: 1 of 4 images cannot be read; next: ") and second.output.count("\n") == 1


def test_kill_9_of_rank_0_is_told_with_what_goes_on_and_mended_at_the_next_start(tiny_sdxl, tmp_path, monkeypatch):
    """Rank 0 is killed while it draws previews and the other process waits for them."""
    out, images = tmp_path / "out", make_images(tmp_path / "data", n=5)
    monkeypatch.setattr(preview.Previews, "missing", lambda *_, **__: False)  # those before the first step
    common = dict(train_batch_size=1, max_train_steps=8, checkpointing_steps=2)

    def go(log: str, *more: str, **how: object) -> list[Done]:
        slow = dict(validation_prompt="a cat", num_validation_images=500, validation_steps=4) if how else {}
        return forked_ranks([*command(tiny_sdxl, images, out, **common, **slow), *more], log=tmp_path / log, **how)

    def status() -> tuple[str, int]:
        record = json.loads((out / "run.json").read_text("utf-8"))
        return record["status"], record["step"]

    killed, left = go("log", kill_when=(out / "checkpoint-4").exists, victims=[0])
    assert (killed.code, left.code) == (-signal.SIGKILL, 1) and left.seconds < 5, left
    assert left.output.count("\n") == 1 and "another process of this run has ended" in left.output
    assert "--resume_from_checkpoint latest" in left.output
    assert status() == ("running", None)
    refused = go("log2", "--resume_from_checkpoint=latest", "--rank=3")
    assert [done.code for done in refused] == [2, 1] and status() == ("killed", 4)
    resumed = go("log3", "--resume_from_checkpoint=latest")
    assert [done.code for done in resumed] == [0, 0] and status() == ("done", 8), resumed
    whole = command(tiny_sdxl, images, tmp_path / "whole", **common)
    assert all(done.code == 0 for done in forked_ranks(whole, log=tmp_path / "log4"))
    same_checkpoint(out / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")


def test_kill_9_of_another_rank_ends_the_run_with_what_goes_on(tiny_sdxl, tmp_path):
    out = tmp_path / "out"
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=5), out, train_batch_size=1, max_train_steps=5000,
                   checkpointing_steps=2)
    left, killed = forked_ranks(argv, log=tmp_path / "log", kill_when=(out / "checkpoint-4").exists, victims=[1])
    assert (left.code, killed.code) == (1, -signal.SIGKILL) and left.seconds < 5, left
    assert "another process of this run has ended" in left.output and "--resume_from_checkpoint latest" in left.output
    record = json.loads((out / "run.json").read_text("utf-8"))
    assert (record["status"], record["exit_code"]) == ("sibling", 1)


def test_ctrl_c_in_torchrun_saves_once_and_exits(tiny_sdxl, tmp_path):
    """Torchrun passes it on to both processes; a second one would end them without a checkpoint."""
    out = tmp_path / "out"
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=5), out, train_batch_size=1, max_train_steps=5000,
                   checkpointing_steps=5000)
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([*torchrun(2), f"{TRAINER}.py", *argv], cwd=ROOT, stdout=log, stderr=log,
                               env=os.environ | {"ACCELERATE_USE_CPU": "1"})
        wait_for_metrics(out, run)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) != 0, "torchrun has a code of its own"
    told = (tmp_path / "log").read_text("utf-8")
    assert "ended by Ctrl-C" in told and "rank 1: ended by Ctrl-C; next: the same command with --resume" in told
    assert [(p / "manifest.json").is_file() for p in out.glob("checkpoint-*")] == [True]
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "stopped"


def close(a: Path, b: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    one, two = load_file(a / name), load_file(b / name)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    assert any(t.abs().max() > 1e-4 for k, t in one.items() if "lora_B" in k), "nothing was trained: a vacuous test"
    losses = [[m["loss"] for m in metrics(d) if "loss" in m] for d in (a, b)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
