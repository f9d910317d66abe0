"""scripts/evaluate.py: the base untouched, each strength from the same noise, the share of the gap by its formula."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import evaluate
from trainkit import rng
from trainkit.adapters import add_lora
from trainkit.errors import UserError
from trainkit.export import write_diffusers
from trainkit.families import sdxl

NOUNS = ("dog", "cat", "fish", "bird")


@pytest.fixture(scope="module")
def lora(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes the pictures a lot."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    options = SimpleNamespace(rank=2, lora_alpha=None, lora_dropout=0.0, lora_layers="attention", lora_unet_blocks=None)
    adapters = add_lora(unet.requires_grad_(False), options, targets=sdxl.LORA_TARGETS, seed=0)
    with torch.no_grad():
        for path in adapters.layers:
            B = adapters.factors(path)[1]
            B.copy_(torch.randn(B.shape, generator=rng.generator("test", path)))
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_diffusers(adapters, file, {})
    return file


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    folder.mkdir()
    lines = []
    for k, noun in enumerate(NOUNS):
        Image.new("RGBA", (64, 64), (60 * k, 0, 0, 0)).save(folder / f"{noun}.png")
        lines.append(json.dumps({"file_name": f"{noun}.png", "noun": noun, "text": f"3d icon, a {noun}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[list[Image.Image]]:
    """A judge that remembers what it was shown: training pictures are at 0.1, pictures drawn at 0.5, 0.4, 0.3 …"""
    shown: list[list[Image.Image]] = []

    def style_distance(pictures: list[Image.Image], reference: list[Image.Image], clip_dir: Path) -> float:
        shown.append(pictures)
        return 0.1 if len(shown) == 1 else 0.7 - 0.1 * len(shown)

    monkeypatch.setitem(sys.modules, "trainkit.evaluation", SimpleNamespace(style_distance=style_distance))
    monkeypatch.setattr(evaluate, "MIN_PICTURES", 6)
    return shown


def arguments(tiny_sdxl: Path, lora: Path, icons: Path, out: Path, *more: str) -> list[str]:
    return [f"--base={tiny_sdxl}", f"--lora={lora}", f"--reference={icons}", f"--training={icons}", f"--clip={icons}",
            "--steps=2", f"--out={out}", *more]


def test_every_strength_is_drawn_from_the_same_noise_and_measured(tiny_sdxl, lora, icons, judged, tmp_path, capsys):
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "out", "--strengths=1,1e-6,0.5", "--batch_size=3"))
    training, base, nothing, half, full = judged
    assert len(training) == 4 and len(base) == 8, "two pictures a noun reach the minimum of six"
    assert np.asarray(training[1])[0, 0].tolist() == [255, 255, 255], "hidden colours stay hidden"
    same, changed = (np.abs(np.stack(a).astype(int) - np.stack(b)) for a, b in ((base, nothing), (base, full)))
    assert same.max() <= 1 and changed.mean() > 1
    assert (np.stack(half) != np.stack(full)).any() and (np.asarray(base[0]) != np.asarray(base[4])).any()
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["strength"] for row in result["strengths"]] == [0.0, 1e-6, 0.5, 1.0]
    assert [row["share_of_gap_closed"] for row in result["strengths"]] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert str(tmp_path) not in json.dumps(result) and "75%" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "grid.png").width > 5 * 192


def test_a_picture_depends_on_its_noun_and_seed_not_on_the_others(tiny_sdxl, lora, icons, judged, tmp_path):
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "a", "--strengths=0"))
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "b", "--strengths=0", "--nouns=cat", "--batch_size=1"))
    cat, alone = judged[1][1], judged[3][0]
    assert np.abs(np.asarray(cat).astype(int) - np.asarray(alone)).max() <= 1


def test_all_that_is_wrong_is_said_at_once(tiny_sdxl, icons, tmp_path):
    wrong = arguments(tiny_sdxl, tmp_path / "no.safetensors", icons, tmp_path, "--prompt=icon", "--nouns=cat,unicorn",
                      f"--clip={tmp_path / 'nowhere'}")
    with pytest.raises(UserError) as caught:
        evaluate.main(wrong)
    assert [p.where for p in caught.value.problems] == ["--lora", "--clip", "--prompt", "--nouns"]
    assert "unicorn" in str(caught.value) and caught.value.exit_code == 2
