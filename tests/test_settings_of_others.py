"""Accelerate's unused settings are told, W&B without a login is our message, NaN from the start blames no rate."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from trainkit.errors import UserError
from trainkit.files import require_space, size_text
from trainkit.runtime import ranks, trackers
from trainkit.training.gradients import Gradients


@pytest.mark.parametrize("name, value, words", [
    ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "dynamo_backend (EAGER)"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "not compiled"), ("ACCELERATE_USE_IPEX", "true", "use_ipex"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps counts"),
    ("ACCELERATE_DOWNCAST_BF16", "yes", "--mixed_precision")])
def test_a_setting_that_is_not_used_is_one_line(name, value, words):
    told, = ranks.unused_settings({name: value})
    assert words in told and "\n" not in told


@pytest.mark.parametrize("name, value", [
    ("ACCELERATE_DYNAMO_BACKEND", "NO"), ("ACCELERATE_DYNAMO_BACKEND", "no"), ("ACCELERATE_DYNAMO_BACKEND", ""),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), ("ACCELERATE_DOWNCAST_BF16", "no"),
    ("ACCELERATE_USE_IPEX", "false"),
    ("ACCELERATE_MIXED_PRECISION", "bf16")])
def test_a_setting_that_is_off_is_not_told(name, value):
    assert not [*ranks.unused_settings({name: value})]


@pytest.mark.parametrize("given, wanted, refused", [
    ("fp8", None, True), ("FP8", None, True), ("fp4", None, True), ("fp8", "bf16", False), ("bf16", None, False),
    ("", None, False), ("no", None, False)])
def test_a_precision_of_accelerates_that_is_none_of_ours_is_refused(given, wanted, refused):
    found = [*ranks.precision_problems({"ACCELERATE_MIXED_PRECISION": given}, wanted)]
    assert bool(found) == refused and all("--mixed_precision bf16" in problem.fix for problem in found)


@pytest.mark.parametrize("error", [AttributeError("'NoneType' object has no attribute 'config'\nmore"),
                                   RuntimeError("api_key not configured (no-tty)"), ValueError("")], ids=repr)
def test_wandb_that_does_not_start_is_our_message(tmp_path, error):
    def fail(*args: object) -> None:
        raise error

    accelerator = SimpleNamespace(log_with=["wandb"], init_trackers=fail, trackers=[object()])
    with pytest.raises(UserError, match="Weights & Biases would not start") as refused:
        trackers.start_trackers(accelerator, "x", {}, out_dir=tmp_path)
    assert "wandb login" in refused.value.problems[0].fix and "more" not in f"{refused.value}"
    assert not accelerator.trackers, "which accelerate would fail to end"


def test_an_error_of_another_tracker_is_not_called_wandbs(tmp_path):
    def fail(*args: object) -> None:
        raise ValueError("x")

    accelerator = SimpleNamespace(log_with=["tensorboard"], init_trackers=fail, logging_dir=tmp_path / "logs")
    with pytest.raises(ValueError, match="x"):
        trackers.start_trackers(accelerator, "x", {}, out_dir=tmp_path)


def optimizer(parameter: torch.nn.Parameter) -> SimpleNamespace:
    inner = torch.optim.SGD([parameter], lr=0.1)
    return SimpleNamespace(active=[inner], params=[parameter], step=inner.step, zero_grad=inner.zero_grad)


@pytest.mark.parametrize("bad_from, words", [(0, "not the learning rate"), (2, "lower --learning_rate")])
def test_a_run_that_was_never_finite_is_not_told_to_lower_its_rate(bad_from, words):
    parameter, gradients = torch.nn.Parameter(torch.ones(1)), Gradients(torch.device("cpu"), max_skipped=2)
    with pytest.raises(UserError) as ended:
        for step in range(9):
            gradients.backward((parameter * (math.nan if step >= bad_from else 1.0)).sum())
            gradients.update(optimizer(parameter), step=step, max_grad_norm=None)
    assert words in f"{ended.value}" and ended.value.exit_code == 5
    assert bad_from or "another base model" in ended.value.problems[0].fix


@pytest.mark.parametrize("size, shown", [(1, "1 KiB"), (200_000, "195 KiB"), (3 * 2**20, "3.0 MiB")])
def test_a_small_checkpoint_is_not_of_0_mib(tmp_path, monkeypatch, size, shown):
    assert size_text(size) == shown
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=f"a checkpoint of {shown}"):
        require_space(tmp_path, size)
