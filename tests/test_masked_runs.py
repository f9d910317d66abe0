"""Whole runs with masks and class images: resumed, and shared by two processes, they train the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.compare import same_checkpoint
from tests.support.trainers import command, forked, forked_ranks, make_images

pytestmark = pytest.mark.trains
COMMON = dict(max_train_steps=3, checkpointing_steps=1, train_batch_size=2, optimizer="torch.optim.SGD",
              learning_rate=1.0)


@pytest.fixture(scope="module")
def masked_flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Five images, four of them with a mask of their left half, and class images without masks."""
    folder = tmp_path_factory.mktemp("masked")
    images = make_images(folder / "data", n=5)
    for path in sorted(images.glob("*.png"))[:4]:
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
            mask.paste(255, (0, 0, image.width // 2, image.height))
        mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    of_class = make_images(folder / "class", n=4, captions=False)
    return dict(COMMON, data=images, masked_loss=True, with_prior_preservation=True, class_data_dir=of_class,
                class_prompt="an icon", num_class_images=4)


def argv(model: Path, flags: dict[str, object], out: Path, **changes: object) -> list[str]:
    return command(model, flags["data"], out, **{k: v for k, v in flags.items() if k != "data"} | changes)


@pytest.fixture(scope="module")
def whole(tiny_sdxl: Path, masked_flags: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = forked(argv(tiny_sdxl, masked_flags, out, gradient_accumulation_steps=2), log=out.with_name("log"))
    assert done.code == 0, done.output
    return out


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_a_resumed_masked_run_with_class_images_equals_an_uninterrupted_one(whole, tiny_sdxl, masked_flags, tmp_path):
    out = tmp_path / "out"
    done = forked(argv(tiny_sdxl, masked_flags, out, gradient_accumulation_steps=2,
                       resume_from_checkpoint=whole / "checkpoint-1"), log=tmp_path / "log")
    assert done.code == 0, done.output
    same_checkpoint(whole / "checkpoint-3", out / "checkpoint-3")


def test_two_processes_train_with_masks_what_one_does(whole, tiny_sdxl, masked_flags, tmp_path):
    both = forked_ranks(argv(tiny_sdxl, masked_flags, tmp_path / "two"), log=tmp_path / "log")
    assert [done.code for done in both] == [0, 0], both[0].output
    one, two = lora(whole), lora(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_without_masks_other_weights_are_trained(whole, tiny_sdxl, masked_flags, tmp_path):
    done = forked(argv(tiny_sdxl, masked_flags, tmp_path / "out", gradient_accumulation_steps=2, masked_loss=False),
                  log=tmp_path / "log")
    assert done.code == 0, done.output
    one, other = lora(whole), lora(tmp_path / "out")
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-3
