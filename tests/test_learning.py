"""It learns: on the shipped model, a short run moves nouns it was not taught towards the style it was taught."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import learning
from tests.harness import ROOT, command, forked, launched, metrics
from trainkit.errors import UserError

STEPS = 150  # the quick start takes 400
DENOISING_STEPS = 8  # the quick start takes 20


def test_a_result_of_other_arguments_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file without arguments is one of the default's; nothing is trained here, every run has its result."""
    old = {"gap_closed": 0.5, "prior_drift": 0.1, "seconds": 60.0}
    for name, said in {"lora-seed0": old, "ti-seed0": old | {"steps": 300, "denoising_steps": 10}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(said), "utf-8")
    asked = ["--cases", "lora", "ti", "--seeds=1", f"--out={tmp_path}"]
    learning.main(asked)
    assert "| ti | **50** (50) | **0.100** (0.100) | 60 |" in capsys.readouterr().out
    for other in ("--steps=50", "--denoising_steps=20"):
        with pytest.raises(UserError, match="lora-seed0") as refused:
            learning.main([*asked, other])
        assert len(refused.value.problems) == 2 and "--out" in refused.value.problems[0].where


def trained(assets: Path, out: Path, **changes: object) -> Path:
    """A short run on the shipped model and icons, whose loss fell."""
    argv = command(
        assets / "tiny-sdxl-icons", assets / "icons-3d", out, resolution=64, train_batch_size=3, max_train_steps=STEPS,
        rank=8, lora_layers="all-linear", learning_rate=1e-3, snr_gamma=5.0, cache_latents=True, random_flip=True,
        **changes,
    )
    done = forked(argv, log=out.with_suffix(".log"))
    assert done.code == 0, done.output
    losses = [row["loss"] for row in metrics(out)]
    third = STEPS // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third]), "the loss did not fall"
    return out


def evaluated(assets: Path, out: Path, *more: str) -> dict[str, float]:
    """Style distance and share of the gap closed at strength 1."""
    line = [sys.executable, "scripts/evaluate.py", "--base", str(assets / "tiny-sdxl-icons"), "--strengths", "0,1",
            "--lora", str(out / "pytorch_lora_weights.safetensors"), "--steps", str(DENOISING_STEPS),
            "--out", str(out / "evaluation"), *more]
    drawn = launched(line, timeout=600)
    assert drawn.code == 0, drawn.output
    report = json.loads((ROOT / out / "evaluation" / "evaluation.json").read_text("utf-8"))
    base, lora = report["strengths"]
    assert lora["style_distance"] < base["style_distance"], drawn.output
    return lora


@pytest.mark.timeout(900)
def test_a_short_run_closes_part_of_the_style_gap_on_untaught_nouns(assets: Path, tmp_path: Path):
    assert evaluated(assets, trained(assets, tmp_path / "icons"))["share_of_gap_closed"] >= 0.10


@pytest.mark.timeout(900)
def test_new_tokens_hold_part_of_the_style(assets: Path, tmp_path: Path):
    """The LoRA alone, asked for by the word, closes less of the gap than with the tokens it was trained with."""
    out = trained(assets, tmp_path / "icons", train_text_encoder_ti=True, text_encoder_lr=1e-3)
    alone = evaluated(assets, out)["share_of_gap_closed"]
    together = evaluated(assets, out, "--embeddings", str(out / "icons_emb.safetensors"))["share_of_gap_closed"]
    assert together >= 0.2 and together > alone + 0.1
