"""scripts/evaluate.py: the base untouched, each strength from the same noise, the share of the gap by its formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import ROOT
from tests.support.loras import random_lora
from trainkit.errors import UserError
from trainkit.inference import load_pipeline
from trainkit.tools import evaluate

NOUNS = ("dog", "cat", "fish", "bird")


@pytest.fixture(scope="module")
def lora(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_lora(tiny_sdxl, tmp_path_factory.mktemp("lora") / "lora.safetensors")


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
    """A judge that remembers what it was shown: training images are at 0.1, images drawn at 0.5, 0.4, 0.3 …"""
    shown: list[list[Image.Image]] = []

    def style_distance(images: list[Image.Image], reference: list[Image.Image], clip_dir: Path) -> float:
        shown.append(images)
        return 0.1 if len(shown) == 1 else 0.7 - 0.1 * len(shown)

    monkeypatch.setattr("trainkit.evaluation.style_distance", style_distance)
    monkeypatch.setattr(evaluate, "MIN_IMAGES", 6)
    return shown


def arguments(tiny_sdxl: Path, lora: Path, icons: Path, out: Path, *more: str) -> list[str]:
    return [f"--base={tiny_sdxl}", f"--lora={lora}", f"--reference={icons}", f"--training={icons}",
            f"--clip={ROOT / 'assets/tiny-clip-icons'}", "--steps=2", f"--out={out}", *more]


@pytest.mark.trains
def test_every_strength_is_drawn_from_the_same_noise_and_measured(tiny_sdxl, lora, icons, judged, tmp_path, capsys):
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "out", "--strengths=1,1e-6,0.5", "--batch_size=3"))
    training, base, nothing, half, full = judged
    assert len(training) == 4 and len(base) == 8, "two images a noun reach the minimum of six"
    assert np.asarray(training[1])[0, 0].tolist() == [255, 255, 255], "hidden colours stay hidden"
    same, changed = (np.abs(np.stack(a).astype(int) - np.stack(b)) for a, b in ((base, nothing), (base, full)))
    assert same.max() <= 1 and changed.mean() > 1
    assert (np.stack(half) != np.stack(full)).any() and (np.asarray(base[0]) != np.asarray(base[4])).any()
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["strength"] for row in result["strengths"]] == [0.0, 1e-6, 0.5, 1.0]
    assert [row["share_of_gap_closed"] for row in result["strengths"]] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert str(tmp_path) not in json.dumps(result) and "75%" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "grid.png").width > 5 * 192


def test_long_prompts_are_read_as_generate_reads_them(tiny_sdxl, tmp_path, monkeypatch):
    """Two prompts that differ behind the 75th token only; without the flag they are one."""
    pipe = load_pipeline(str(tiny_sdxl), "float32")
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: pipe)
    wanted = [evaluate.Wanted("x", "cat " * 80 + end, 0) for end in ("dog", "fish")]
    same = {}
    for tokens in (75, 150):
        settings = evaluate.GenerationSettings(str(tiny_sdxl), strengths=(0.0,), steps=1, max_token_length=tokens)
        (_, (one, two)), = evaluate.generate(settings, wanted)
        same[tokens] = np.array_equal(np.asarray(one), np.asarray(two))
    assert same == {75: True, 150: False}


@pytest.mark.trains
def test_a_image_depends_on_its_noun_and_seed_not_on_the_others(tiny_sdxl, lora, icons, judged, tmp_path):
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "a", "--strengths=0"))
    evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / "b", "--strengths=0", "--nouns=cat,bird",
                            "--batch_size=1"))
    cat, alone = judged[1][1], judged[3][0]
    assert np.abs(np.asarray(cat).astype(int) - np.asarray(alone)).max() <= 1


def test_all_that_is_wrong_is_said_at_once(tiny_sdxl, icons, tmp_path):
    wrong = arguments(tiny_sdxl, tmp_path / "no.safetensors", icons, tmp_path, "--prompt=icon", "--nouns=cat,unicorn",
                      f"--clip={tmp_path / 'nowhere'}")
    with pytest.raises(UserError) as caught:
        evaluate.main(wrong)
    assert [p.where for p in caught.value.problems] == ["--lora", "--clip", "--prompt", "--nouns"]
    assert "unicorn" in str(caught.value) and caught.value.exit_code == 2


def refused(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        evaluate.main(list(words))
    return caught.value


def test_numbers_and_sides_too_small_are_refused(tiny_sdxl, lora, icons, tmp_path):
    (one := tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(one / "a.png")
    (afile := tmp_path / "file").write_text("")
    usual = arguments(tiny_sdxl, lora, icons, afile / "out")
    found = refused(*usual, "--steps=0", "--batch_size=0", "--strengths=nan,1", "--guidance_scale=inf", "--nouns=,",
                    f"--training={one}")
    assert [p.where for p in found.problems] == [
        "--steps", "--batch_size", "--strengths", "--guidance_scale", "--training", "--nouns",
        f"--out {afile / 'out'}"]
    assert found.exit_code == 2
    problem, = refused(*arguments(tiny_sdxl, lora, icons, tmp_path / "out", "--nouns=cat")).problems
    assert "1 real images" in problem.what and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("line", "said"), [
    ("", "images in"), ("xx", "no JSON"), ("[1]", "line 1"), ('{"file_name": "dog.png", "text": "a"}', "noun"),
    ('{"file_name": "dog.png", "noun": 3, "text": "a"}', "noun"),
    ('{"file_name": "../dog.png", "noun": "a", "text": "a"}', "leaves the folder"),
    ('{"file_name": "no.png", "noun": "a", "text": "a"}\n{"file_name": "dog.png", "noun": "b", "text": "b"}', "no.png"),
    ('{"file_name": "torn.png", "noun": "a", "text": "a"}\n{"file_name": "dog.png", "noun": "b", "text": "b"}', "torn"),
])
def test_a_damaged_reference_is_one_problem_of_the_data(line, said, tiny_sdxl, lora, icons, tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "train" / name).write_bytes((icons / "dog.png").read_bytes())
    (icons / "torn.png").write_bytes((icons / "dog.png").read_bytes()[:60])
    (icons / "metadata.jsonl").write_text(line, "utf-8")
    found = refused(*arguments(tiny_sdxl, lora, icons, tmp_path / "out", f"--training={tmp_path / 'train'}"))
    assert len(found.problems) == 1 and said in str(found) and found.exit_code == 3


@pytest.mark.trains
def test_learned_tokens_stand_for_their_words_but_for_the_base(tiny_sdxl, lora, icons, judged, tmp_path):
    from safetensors.torch import save_file

    rows, header = {"clip_l": torch.ones(2, 24), "clip_g": torch.ones(2, 32)}, {"tokens": '{"icon": ["<s0>", "<s1>"]}'}
    save_file(rows, file := tmp_path / "run_emb.safetensors", header)
    for name, more in (("without", ()), ("with", (f"--embeddings={file}",))):
        evaluate.main(arguments(tiny_sdxl, lora, icons, tmp_path / name, "--strengths=1", *more))
    alone = [word for word in arguments(tiny_sdxl, lora, icons, tmp_path / "alone") if not word.startswith("--lora")]
    evaluate.main([*alone, f"--embeddings={file}"])
    _, base, plain, _, same, taught, _, again, embedded = judged
    assert all(np.array_equal(a, b) for a, b in zip(base, same, strict=True)) and len(again) == len(embedded)
    assert any(not np.array_equal(a, b) for a, b in zip(plain, taught, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(base, embedded, strict=True))
    result = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert result["embeddings"] == "run_emb.safetensors" and "lora" not in result
    assert [row["strength"] for row in result["strengths"]] == [0.0, 1.0]


# ----------------------------------------------------------------------------------------------------------------------
# Models with one text encoder


@pytest.mark.trains
def test_an_sd_model_and_its_lora_are_measured_too(tiny_sd, icons, judged, tmp_path):
    file = random_lora(tiny_sd, tmp_path / "lora.safetensors")
    evaluate.main(arguments(tiny_sd, file, icons, tmp_path / "out", "--strengths=1e-6,1"))
    _, base, nothing, full = judged
    same, changed = (np.abs(np.stack(a).astype(int) - np.stack(b)) for a, b in ((base, nothing), (base, full)))
    assert same.max() <= 1 and changed.mean() > 1
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["strength"] for row in result["strengths"]] == [0.0, 1e-6, 1.0]


def test_the_pipeline_is_the_models_own(tiny_sd, tiny_sdxl):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    for base, kind in ((tiny_sd, StableDiffusionPipeline), (tiny_sdxl, StableDiffusionXLPipeline)):
        pipe = load_pipeline(str(base), "float32")
        assert type(pipe) is kind and getattr(pipe, "watermark", None) is None and pipe.unet.dtype == torch.float32


@pytest.mark.parametrize(("base", "said"), [("nowhere", "does not exist"), ("empty", "not a Stable Diffusion model")])
def test_what_is_no_model_is_refused_before_anything_is_drawn(base, said, lora, icons, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        evaluate.main(arguments(tmp_path / base, lora, icons, tmp_path / "out"))
    assert said in str(caught.value)


def test_a_lora_and_embeddings_of_another_model_are_refused(tiny_sd, lora, icons, judged, tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        evaluate.main(arguments(tiny_sd, lora, icons, tmp_path / "out"))
    with pytest.raises(UserError, match="two text encoders"):
        evaluate.main(arguments(tiny_sd, lora, icons, tmp_path / "out", f"--embeddings={lora}"))
