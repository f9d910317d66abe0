"""Two real gloo processes train what one process trains on the same global batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.trainers import TRAINER, command, launched, make_images, metrics, torchrun

pytestmark = pytest.mark.trains

STEP = 1e-3  # the learning rate: Adam turns a gradient that is all rounding into a step of that size


def test_two_processes_equal_one(tiny_sdxl, tmp_path):
    images = make_images(tmp_path / "data", n=5)
    one = command(tiny_sdxl, images, tmp_path / "one", train_batch_size=4, max_train_steps=3, checkpointing_steps=3)
    two = command(tiny_sdxl, images, tmp_path / "two", train_batch_size=1, gradient_accumulation_steps=2,
                  max_train_steps=3, checkpointing_steps=3)
    for line in ([sys.executable, f"{TRAINER}.py", *one], [*torchrun(2), f"{TRAINER}.py", *two]):
        done = launched(line, env={"ACCELERATE_USE_CPU": "1"})
        assert done.code == 0, done.output
    assert [m["step"] for m in metrics(tmp_path / "two") if "loss" in m] == [1, 2, 3], "only rank 0 writes"
    close(tmp_path / "one", tmp_path / "two")


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_sdxl, tmp_path):
    """torchrun on a CPU without accelerate's word for it: two runs of one image stream into one folder."""
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=2), tmp_path / "out")
    done = launched([*torchrun(2), f"{TRAINER}.py", *argv])
    assert done.code != 0 and "ACCELERATE_USE_CPU=1" in done.output
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def close(a: Path, b: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    one, two = load_file(a / name), load_file(b / name)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=STEP / 50, msg=lambda m, k=key: f"{k}: {m}")
    assert any(t.abs().max() > 1e-4 for k, t in one.items() if "lora_B" in k), "nothing was trained: a vacuous test"
    losses = [[m["loss"] for m in metrics(d) if "loss" in m] for d in (a, b)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
