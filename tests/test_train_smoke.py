"""The real trainer starts, trains, saves and publishes: three true command lines and a pairwise table of switches."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.pairs import pairwise
from tests.support.trainers import TRAINER, command, forked, forked_script, launched, make_images, metrics

pytestmark = pytest.mark.trains

# Each row switches some features; together every pair of values of two features meets at least once (tested below).
FEATURES = {
    "caching": [{}, {"cache_latents": True}, {"cache_latents": True, "latent_cache_dir": "CACHE"}],
    "crop": [{}, {"center_crop": True}, {"random_flip": True, "center_crop": True}, {"random_flip": True}],
    "optimizer": [{}, {"use_8bit_adam": True}, {"optimizer": "prodigy", "learning_rate": 1.0}],
    "weight": [{}, {"snr_gamma": 5.0}, {"noise_offset": 0.1, "snr_gamma": 5.0}],
    "precision": [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}],
    "adapter": [{}, {"lora_alpha": 1, "lora_layers": "all-linear"}, {"lora_dropout": 0.1},
                {"lora_unet_blocks": "unet.up_blocks.0.attentions.0"}],
    "batch": [{}, {"train_batch_size": 1, "gradient_accumulation_steps": 3}, {"train_batch_size": 3, "repeats": 2}],
    "schedule": [{}, {"lr_scheduler": "cosine", "lr_warmup_steps": 1}, {"lr_scheduler": "polynomial"}],
}
ROWS = pairwise(FEATURES)


def switches(row: tuple[int, ...]) -> dict[str, object]:
    chosen: dict[str, object] = {}
    for choices, index in zip(FEATURES.values(), row, strict=True):
        chosen |= choices[index]
    return chosen


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "bilder mit ä")


def test_the_table_meets_every_pair():
    met = {(i, r[i], j, r[j]) for r in ROWS for i, j in itertools.combinations(range(len(r)), 2)}
    sizes = [len(v) for v in FEATURES.values()]
    pairs = itertools.combinations(range(len(sizes)), 2)
    assert met == {(i, a, j, b) for i, j in pairs for a in range(sizes[i]) for b in range(sizes[j])}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "".join(map(str, r)))
def test_switches_compose(row, tiny_sdxl, images, tmp_path):
    chosen = {k: (tmp_path / "cache" if v == "CACHE" else v) for k, v in switches(row).items()}
    done = forked(command(tiny_sdxl, images, tmp_path / "out", **chosen), log=tmp_path / "log")
    assert done.code == 0, done.output
    losses = [m["loss"] for m in metrics(tmp_path / "out") if "loss" in m]
    assert len(losses) == 2 and all(0 < x < 1e4 for x in losses)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_accelerate_launch_trains_previews_and_publishes(tiny_sdxl, images, tmp_path):
    out = tmp_path / "deep" / "er" / "icons"
    argv = command(tiny_sdxl, images, out, validation_prompt="3d icon in the style of TOK, a cat", validation_steps=2,
                   num_validation_images=1, checkpointing_steps=1, report_to="all")
    done = launched(["accelerate", "launch", "--num_processes", "1", f"{TRAINER}.py", *argv])
    assert done.code == 0, done.output
    wanted = ["run.json", "metrics.jsonl", "samples/step_000002.png", "checkpoint-1/manifest.json",
              "checkpoint-2/manifest.json", "pytorch_lora_weights.safetensors", "icons.safetensors", "README.md",
              "report.html"]
    assert [w for w in wanted if not (out / w).is_file()] == []
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "done"
    assert list(out.glob("logs/**/events.out.tfevents.*")) and list(out.glob("**/wandb/offline-run-*"))


def test_the_script_runs_under_plain_python(tiny_sdxl, images, tmp_path):
    argv = command(tiny_sdxl, images, tmp_path / "out", report_to="tensorboard")
    done = launched([sys.executable, f"{TRAINER}.py", *argv])
    assert done.code == 0, done.output
    assert list((tmp_path / "out").glob("logs/**/events.out.tfevents.*"))


def test_it_runs_from_another_folder_on_a_local_data_set(tiny_sdxl, images, tmp_path):
    argv = command(tiny_sdxl, images, "relative-out", instance_data_dir=None, dataset_name=images,
                   caption_column="text", image_column="image")
    done = forked_script([str(ROOT / f"{TRAINER}.py"), *argv], cwd=tmp_path, log=tmp_path / "log")
    assert done.code == 0, done.output
    assert (tmp_path / "relative-out" / "relative-out.safetensors").is_file()
