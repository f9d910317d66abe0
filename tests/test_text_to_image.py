"""The text-to-image trainer: every model layout, matching in every mode, the guidance token; each cut and resumed."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.compare import same_checkpoint, same_tensors
from tests.support.pairs import every_value_first, pairwise
from tests.support.trainers import Done, command, forked, forked_ranks, launched, make_images, metrics
from trainkit.data.clip_features import Features, write_features
from trainkit.data.images import content_digest

pytestmark = pytest.mark.trains

TRAINER = "train_text_to_image_lora"
STEPS = 4
SEED_FORM = {"dist_match": 0.003}
LONG = ", red dog" * 40
FEATURES = {
    "model": ["tiny_sd", "tiny_sd2", "tiny_sdxl"],
    "matching": [{}, SEED_FORM, {"dist_match_gain": 0.3}, {"dist_match_gain": 0.3, "dist_match_mode": "swap"},
                 {"dist_match_gain": 0.3, "dist_match_mode": "reuse", "dist_match_weights": "0.5,0.3,0.2"},
                 {"dist_match_gain": 0.3, "dist_match_kernel": "latent"},
                 {"dist_match_gain": 0.3, "dist_match_bank": 0.9, "dist_match_kernel": "class"}],
    "token": [{}, {"guidance_token": 8.0}],
    "adapter": [{}, {"use_dora": True}, {"lora_layers": "all-linear+conv"}, {"lora_dropout": 0.1}],
    "text": [{}, {"train_text_encoder": True}],
    "optimizer": [{"snr_gamma": 5.0}, {"optimizer": "prodigy", "learning_rate": 1.0},
                  {"gradient_accumulation_steps": 2, "use_ema": True}],
    "caching": [{}, {"cache_latents": True}],
    "precision": [{}, {"mixed_precision": "bf16"}],
    "captions": [{}, {"shuffle_caption": True, "caption_dropout_rate": 0.5, "caption_tag_dropout_rate": 0.3},
                 {"caption_suffix": LONG, "max_token_length": 225, "shuffle_caption": True}],
}
FIRST, OTHERS = every_value_first([
    row for row in pairwise(FEATURES)  # no CLIP's features are as wide as SDXL's, and varying captions have no class
    if not (row[0] == 2 and row[2] == 1 or row[1] == 6 and row[-1])])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned images; two share a caption."""
    folder = make_images(tmp_path_factory.mktemp("captioned") / "images", n=5)
    listing = (folder / "metadata.jsonl").read_text("utf-8")
    (folder / "metadata.jsonl").write_text(listing.replace("thing 4", "thing 3"), "utf-8")
    return folder


def features_of(images: Path, width: int, file: Path) -> Path:
    """Random features, a row an image."""
    digests = sorted(content_digest(path.read_bytes()) for path in images.glob("*.png"))
    rows = torch.randn(len(digests), width, generator=torch.Generator().manual_seed(0))
    write_features(file, Features(rows, digests, "random", "nobody"))
    return file


def captioned(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    """A short complete command line of this trainer."""
    return command(model, None, out, **{"instance_prompt": None, "train_data_dir": data, "max_train_steps": STEPS,
                                        **changes})


def run(argv: list[str], log: Path) -> Done:
    done = forked(argv, trainer=TRAINER, log=log)
    assert done.code == 0, f"{' '.join(argv)}\n{done.output}"
    return done


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(out)}


def named(row: tuple[int, ...]) -> str:
    return "".join(map(str, row))


@pytest.mark.parametrize("row", FIRST, ids=named)
def test_everything_composes_and_resumes_to_the_bit(row, images, tmp_path, request):
    check(row, images, tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize("row", OTHERS, ids=named)
def test_every_pair_composes_and_resumes_to_the_bit(row, images, tmp_path, request):
    check(row, images, tmp_path, request)


def check(row: tuple[int, ...], images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The run at once, and its steps after the first, second or third from that checkpoint on: one and the same."""
    model, *parts = (choices[index] for choices, index in zip(FEATURES.values(), row, strict=True))
    chosen: dict[str, object] = {flag: value for part in parts for flag, value in part.items()}
    if chosen.get("guidance_token"):
        width = {"tiny_sd": 24, "tiny_sd2": 32}[model]
        chosen["guidance_features"] = features_of(images, width, tmp_path / "features.safetensors")
    cut = 1 + sum(row) % (STEPS - 1)
    outs = [tmp_path / name / "lora" for name in ("whole", "resumed")]
    for out, resumed in zip(outs, (None, outs[0] / f"checkpoint-{cut}"), strict=True):
        argv = captioned(request.getfixturevalue(model), images, out, checkpointing_steps=cut,
                         resume_from_checkpoint=resumed, **chosen)
        assert run(argv, tmp_path / "log").output.count("holds the trained weights") == 2
    whole, resumed = map(losses, outs)
    assert resumed == {step: loss for step, loss in whole.items() if step > cut}
    assert len(whole) == STEPS and all(0 < loss < 1e4 for loss in whole.values())
    same_checkpoint(outs[0] / f"checkpoint-{STEPS}", outs[1] / f"checkpoint-{STEPS}")
    for name in ("pytorch_lora_weights.safetensors", "lora.safetensors"):
        same_tensors(*(out / name for out in outs))
    if any(flag.startswith("dist_match") for flag in chosen) and "reuse" not in chosen.values():
        rows = metrics(outs[0])
        assert any("dist_match/loss" in found and math.isfinite(found["dist_match/loss"]) for found in rows), rows


# -- the term and the plain run ---------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path) -> Path:
    """A file that gets a line a forward pass of the UNet, in children too."""
    from trainkit.families.sd import SD

    file, denoise = tmp_path / "passes", SD.denoise

    def watched(self, *given, **named):
        with file.open("a") as lines:
            lines.write("pass\n")
        return denoise(self, *given, **named)

    monkeypatch.setattr(SD, "denoise", watched)
    return file


def passes(counted: Path) -> int:
    count = len(counted.read_text().splitlines())
    counted.unlink()
    return count


def test_with_lambda_0_the_run_is_the_plain_one_to_the_bit(tiny_sd, images, counted, tmp_path):
    plain, off = tmp_path / "plain" / "lora", tmp_path / "off" / "lora"
    run(captioned(tiny_sd, images, plain), tmp_path / "log")
    assert passes(counted) == STEPS
    run(captioned(tiny_sd, images, off, dist_match=0, dist_match_gain=0, dist_match_mode="extra"), tmp_path / "log")
    assert passes(counted) == STEPS, "no extra forward"
    assert losses(plain) == losses(off)
    same_tensors(plain / "pytorch_lora_weights.safetensors", off / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(("mode", "per_step"), [("extra", 2), ("combo", 2), ("swap", 1), ("reuse", 1)])
def test_each_mode_has_its_number_of_passes(mode, per_step, tiny_sd, images, counted, tmp_path):
    argv = captioned(tiny_sd, images, tmp_path / "out", dist_match_gain=0.3, dist_match_mode=mode,
                     gradient_accumulation_steps=2)
    run(argv, tmp_path / "log")
    assert passes(counted) == per_step * 2 * STEPS


def test_a_second_pass_takes_no_randomness_from_the_first(tiny_sd, images, tmp_path):
    """With a weight too small for fp32 the second pass changes nothing: not a bit of the plain run moves."""
    outs = [tmp_path / name / "lora" for name in ("plain", "extra")]
    for out, changes in zip(outs, ({}, {"dist_match": 1e-40, "dist_match_mode": "extra"}), strict=True):
        run(captioned(tiny_sd, images, out, lora_dropout=0.1, noise_offset=0.1, **changes), tmp_path / "log")
    same_tensors(*(out / "pytorch_lora_weights.safetensors" for out in outs))


@pytest.mark.parametrize("changes", [SEED_FORM, {"dist_match_gain": 0.3, "dist_match_bank": 0.8}], ids=["sum", "u"])
def test_the_statistic_is_over_all_processes(changes, tiny_sd, images, tmp_path):
    one = captioned(tiny_sd, images, tmp_path / "one", train_batch_size=4, **changes)
    two = captioned(tiny_sd, images, tmp_path / "two", train_batch_size=2, **changes)
    run(one, tmp_path / "log")
    for done in forked_ranks(two, trainer=TRAINER, log=tmp_path / "log"):
        assert done.code == 0, done.output
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        matched = [key for key in a if key == "loss" or key.startswith("dist_match/")]
        assert len(matched) > 3
        assert {k: a[k] for k in matched} == pytest.approx({k: b[k] for k in matched}, rel=2e-3, abs=1e-6)
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two")]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-3, atol=2e-5)


def test_a_single_image_a_step_is_refused_for_pairs(tiny_sd, images, tmp_path):
    argv = captioned(tiny_sd, images, tmp_path / "out", dist_match_gain=1, train_batch_size=1)
    done = forked(argv, trainer=TRAINER, log=tmp_path / "log")
    assert done.code == 2 and "--train_batch_size 2 or more" in done.output


# -- what the Diffusers scripts get wrong -----------------------------------------------------------------------------


def test_gradient_clipping_works(tiny_sd, images, tmp_path):
    """Upstream hands its optimizer an iterator that is empty by the time of clipping: --max_grad_norm did nothing."""
    out, limit = tmp_path / "out", 1e-5
    argv = captioned(tiny_sd, images, out, optimizer="torch.optim.SGD", learning_rate=1.0, max_grad_norm=limit,
                     max_train_steps=1)
    run(argv, tmp_path / "log")
    moved = [t for key, t in load_file(out / "pytorch_lora_weights.safetensors").items() if ".lora_B." in key]
    assert metrics(out)[0]["grad_norm"] > 10 * limit
    length = float(torch.stack([t.norm() for t in moved]).norm())  # B starts at 0, and A gets no gradient while it is
    assert length == pytest.approx(limit, rel=1e-2)


def test_compat_keeps_min_snr_of_v_as_the_diffusers_scripts_have_it(tiny_sd2, images, tmp_path):
    """min(snr,γ)/(snr + 1) in both of them; the slip of the DreamBooth script is not theirs."""
    for name, changes in {"ours": {}, "compat": {"compat": "diffusers"}}.items():
        argv = captioned(tiny_sd2, images, tmp_path / name, snr_gamma=5.0, max_train_steps=1, **changes)
        run(argv, tmp_path / "log")
    assert losses(tmp_path / "ours") == losses(tmp_path / "compat")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_learning_rate_follows_optimizer_steps_under_accumulation(accumulation, tiny_sd, images, tmp_path):
    """Upstream's SDXL script stretches warm-up and decay by the accumulation (huggingface/diffusers #4387, #9633)."""
    out = tmp_path / "out"
    run(captioned(tiny_sd, images, out, gradient_accumulation_steps=accumulation, lr_scheduler="linear",
                  lr_warmup_steps=2, learning_rate=1e-3), tmp_path / "log")
    rates = [next(value for key, value in row.items() if "lr" in key) for row in metrics(out)]
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 0.5e-3], abs=1e-9) or rates == pytest.approx(
        [0.5e-3, 1e-3, 0.5e-3, 0.0], abs=1e-9)


# -- both trainers ----------------------------------------------------------------------------------------------------


def test_the_two_trainers_differ_in_story_only():
    """Line by line. What both do is in modules that both use, and what is left of it reads alike."""
    texts = [(ROOT / f"{name}.py").read_text("utf-8") for name in (TRAINER, "train_dreambooth_lora_sdxl_advanced")]
    ours, other = (text.splitlines() for text in texts)
    own = [line for line in ours if line.strip() and line not in other]
    assert len(own) < 60, own
    for text in texts:
        nodes = [*ast.walk(ast.parse(text))]
        assert [node.name for node in nodes if isinstance(node, ast.ClassDef)] == ["Options"], "no step of its own"
        assert not any(isinstance(node, (ast.For, ast.While)) for node in nodes), "no loop of its own"


def test_the_recipe_runs_as_it_is(tmp_path):
    few = ("--max_train_steps=2", "--num_validation_images=1")
    done = launched(["bash", "train_freq_aware.sh", *few], env={"OUTPUT": str(tmp_path / "out")})
    assert done.code == 0, done.output
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"clip_features-tiny-clip-icons.safetensors", "pytorch_lora_weights.safetensors", "out.safetensors",
            "report.html"} <= found
    rows = metrics(tmp_path / "out")
    assert len(rows) == 2 and all(row["dist_match/loss"] > 0 for row in rows)
