"""A run that is stopped anywhere and resumed is, bit for bit, the run that was not stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.compare import same_checkpoint, same_tensors
from tests.support.trainers import (
    Done,
    command,
    forked,
    forked_ranks,
    make_images,
    metrics,
)
from trainkit import lora_files, preview
from trainkit.conditioning import cached_text
from trainkit.data import cache

pytestmark = pytest.mark.trains

MODES = {
    "mid-epoch with accumulation": dict(train_batch_size=2, gradient_accumulation_steps=2),
    "dropout and live crops": dict(lora_dropout=0.2, random_flip=True),
    "cached crops and prodigy": dict(cache_latents=True, random_flip=True, optimizer="prodigy", learning_rate=1.0),
    "buckets, class images and two resolutions": dict(
        enable_bucket=True, resolution=64, resolutions="48,64", min_bucket_reso=16, max_bucket_reso=96,
        bucket_reso_steps=16, train_batch_size=2, gradient_accumulation_steps=2, random_flip=True,
        with_prior_preservation=True, class_prompt="icon", num_class_images=2,
        class_data_dir=ROOT / "assets" / "icons-class"),
    "8-bit adam and cosine": dict(use_8bit_adam=True, lr_scheduler="cosine", rank=64, lora_layers="all-linear"),
    "captions that vary, and new tokens": dict(
        shuffle_caption=True, caption_dropout_rate=0.4, caption_tag_dropout_rate=0.3, keep_tokens=1, caption_variants=3,
        max_token_length=150, caption_suffix=", red, blue", train_text_encoder_ti=True),
    "a base model in int8": dict(base_precision="int8", train_text_encoder=True, gradient_checkpointing=True),
    "captions read anew": dict(
        shuffle_caption=True, caption_dropout_rate=0.3, caption_suffix=", red, blue", train_text_encoder=True),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), n=5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_resumed_equals_uninterrupted(mode, tiny_sdxl, images, tmp_path):
    """7 steps at once = 3 steps, stop, 4 steps: weights, optimizer state and logged losses, exactly."""

    def run(out: str, **changes: object) -> None:
        options = {"lr_scheduler": "constant"} | MODES[mode] | changes
        done = forked(command(tiny_sdxl, images, tmp_path / out / "lora", **options), log=tmp_path / f"{out}.log")
        assert done.code == 0, done.output

    run("whole", max_train_steps=7)
    run("parts", max_train_steps=7, stop_after_steps=3)
    run("parts", max_train_steps=7, resume_from_checkpoint="latest")
    whole, parts = (tmp_path / out / "lora" for out in ("whole", "parts"))
    same_checkpoint(whole / "checkpoint-7", parts / "checkpoint-7")
    losses = [{m["step"]: m["loss"] for m in metrics(folder) if "loss" in m} for folder in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_two_runs_with_one_seed_are_bitwise_equal_and_another_seed_differs(tiny_sdxl, images, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = forked(command(tiny_sdxl, images, tmp_path / out, seed=seed), log=tmp_path / "log")
        assert done.code == 0, done.output
    name = "pytorch_lora_weights.safetensors"
    same_tensors(tmp_path / "a" / name, tmp_path / "b" / name)
    with pytest.raises(AssertionError):
        same_tensors(tmp_path / "a" / name, tmp_path / "c" / name)


def test_kill_9_in_training_loses_at_most_one_interval(tiny_sdxl, images, tmp_path):
    out = tmp_path / "out"
    argv = command(tiny_sdxl, images, out, max_train_steps=60, checkpointing_steps=2, checkpoints_total_limit=2)
    killed = forked(argv, log=tmp_path / "log", kill_when=(out / "checkpoint-6").exists)
    assert killed.code == -signal.SIGKILL
    resumed = forked([*argv, "--resume_from_checkpoint=latest", "--stop_after_steps=12"], log=tmp_path / "log2")
    assert resumed.code == 0, resumed.output
    whole = command(tiny_sdxl, images, tmp_path / "whole", max_train_steps=60, checkpointing_steps=12)
    assert forked([*whole, "--stop_after_steps=12"], log=tmp_path / "log3").code == 0
    same_checkpoint(out / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits(sent, code, tiny_sdxl, images, tmp_path):
    out = tmp_path / "out"
    argv = command(tiny_sdxl, images, out, max_train_steps=5000, checkpointing_steps=5000)
    ended = forked(argv, log=tmp_path / "log", kill_when=lambda: is_ready(out, metrics), number=sent)
    assert ended.code == code, ended.output
    saved = [p for p in out.glob("checkpoint-*") if (p / "manifest.json").is_file()]
    assert len(saved) == 1


SLOW = dict(validation_prompt="a cat", num_validation_images=200)  # minutes of previews, unless a signal ends them
BUSY = {  # while the run is busy with something else than steps -> flags, when it is, flags of the next start
    "previews before the first step": (
        SLOW, lambda out: "total_steps" in (out / "run.json").read_text(), dict(num_validation_images=1)),
    "previews": (
        SLOW | dict(validation_steps=2, num_validation_images=1), lambda out: len(metrics(out)) == 2,
        dict(num_validation_images=1)),
    "class images": (
        dict(with_prior_preservation=True, class_prompt="an icon", num_class_images=200, sample_batch_size=1),
        lambda out: any((out.parent / "class").glob("*.png")), dict(num_class_images=2)),
    "captions": ({}, lambda out: (out.parent / "encoding").exists(), {}),
    "latents": (
        dict(cache_latents=True, cached_crops=200, latent_cache_dir=None),
        lambda out: (out.parent / "cached").exists(), dict(cached_crops=1)),
    "latents on disk": (
        dict(cache_latents=True, cached_crops=200), lambda out: (out.parent / "cached").exists(), dict(cached_crops=1)),
    "publishing": ({}, lambda out: (out / "pytorch_lora_weights.safetensors").exists(), {}),
}
WAYS = {"one process, Ctrl-C": (1, signal.SIGINT, 130), "two processes, SIGTERM": (2, signal.SIGTERM, 75)}


def slow_down(stage: str, out: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a stage take a minute, or leave a mark when it is reached."""
    generate, verify, entry = preview.Previews.generate, lora_files.verify, cache.Latents.entry
    encode = cached_text.FrozenText._encode_group

    def slow_previews(previews, step, watch):
        previews.shots *= 200 if step == 2 else 1
        return generate(previews, step, watch)

    def slow_verify(path, *args, **kwargs):
        time.sleep(60 if path.parent == out and "step" not in path.name else 0)
        return verify(path, *args, **kwargs)

    def slow_encode(*args):
        encode(*args)
        (out.parent / "encoding").touch()
        time.sleep(60)

    def marked_entry(*args):
        (out.parent / "cached").touch()
        return entry(*args)

    if stage == "previews":
        patch.setattr(preview.Previews, "generate", slow_previews)
    if stage == "publishing":
        patch.setattr(lora_files, "verify", slow_verify)
    if stage == "captions":
        patch.setattr(cached_text.FrozenText, "_encode_group", slow_encode)
    if "latents" in stage:
        patch.setattr(cache.Latents, "entry", marked_entry)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", BUSY)
def test_a_signal_ends_what_is_no_step_soon_and_the_next_start_goes_on(
    stage, way, tiny_sdxl, images, tmp_path, monkeypatch
):
    """With two processes, the second one waits for the first that draws, publishes or encodes the captions."""
    (flags, ready, after), (processes, number, code) = BUSY[stage], WAYS[way]
    out = tmp_path / "out"

    def go(log: str, *more: str, **changes: object) -> list[Done]:
        folders = dict(class_data_dir=tmp_path / "class") if "with_prior_preservation" in flags else {}
        folders |= dict(latent_cache_dir=tmp_path / "cache")
        argv = command(tiny_sdxl, images, out, max_train_steps=3, checkpointing_steps=100,
                       train_batch_size=2 // processes, **folders | flags | changes)
        kill = {} if changes or more else dict(kill_when=lambda: is_ready(out, ready), number=number)
        start = forked_ranks if processes == 2 else lambda *args, **how: [forked(*args, **how)]
        return start([*argv, *more], log=tmp_path / log, **kill)

    with monkeypatch.context() as patch:
        slow_down(stage, out, patch)
        ended = go("log")
    assert all(done.code == code and done.seconds < 5 for done in ended), ended
    steps = {"previews": 2, "publishing": 3}.get(stage)
    assert [p.name for p in out.glob("checkpoint-*")] == ([f"checkpoint-{steps}"] if steps else [])
    for done in ended:
        assert ("start the same command again" in done.output) == (steps is None)
        assert ("--resume_from_checkpoint latest" in done.output) == (steps is not None)
    assert all((p / "pytorch_lora_weights.safetensors").is_file() for p in out.glob("checkpoint-*"))
    resumed = go("log2", "--resume_from_checkpoint=latest", **after)
    assert all(done.code == 0 for done in resumed), resumed
    assert [row["step"] for row in metrics(out)] == [1, 2, 3] and (out / "README.md").is_file()


def is_ready(out: Path, ready) -> bool:
    try:
        return ready(out)
    except (OSError, ValueError):  # not there yet, or half a line
        return False
