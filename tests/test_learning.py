"""It learns: on the shipped model, a short run moves nouns it was not taught towards the style it was taught.

experiments/learning: what it runs, how it counts seeds, what it measures and what its tables and figures say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import seeds
from experiments.learning import cases, chart, exam, results, run
from experiments.learning.exam import Exam
from tests.support.trainers import command, forked, metrics
from trainkit.errors import UserError

STEPS = 75  # the quick start takes 400
DENOISING_STEPS = 3  # the quick start takes 20


def test_a_result_of_other_arguments_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file without arguments is one of the default's; nothing is trained here, every run has its result."""
    old = {"gap_closed": 0.5, "prior_drift": 0.1, "seconds": 60.0}
    for name, said in {"lora-seed0": old, "ti-seed0": old | {"steps": 300, "denoising_steps": 10}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(said), "utf-8")
    asked = ["--cases", "lora", "ti", "--seeds=1", f"--out={tmp_path}"]
    run.main(asked)
    assert "| ti | **50** (50) | **0.100** (0.100) | 60 |" in capsys.readouterr().out
    for other in ("--steps=50", "--denoising_steps=20", "--guidance_scale=8"):
        with pytest.raises(UserError, match="lora-seed0") as refused:
            run.main([*asked, other])
        assert len(refused.value.problems) == 2 and "--out" in refused.value.problems[0].where


def test_results_of_other_flags_are_refused_by_name(tmp_path: Path):
    """A file that does not say its flags is one from before there were others."""
    finish(tmp_path, "fourier_balanced", 0)
    finish(tmp_path, "lora", 0, flags=None)
    asked = ["--cases", "lora", "fourier_balanced", "--seeds=1", f"--out={tmp_path}"]
    assert not [*run.others(run.parse(asked))]
    finish(tmp_path, "fourier_balanced", 0, flags="--rank=8")
    with pytest.raises(UserError, match="fourier_balanced-seed0") as refused:
        run.main(asked)
    assert "--rank=8" in str(refused.value)


# -- cases -------------------------------------------------------------------------------------------------------------


def test_every_case_is_a_command_that_the_trainer_takes():
    """Its rules find nothing wrong with any of them."""
    from train_dreambooth_lora_sdxl_advanced import Options
    from trainkit.options import parse

    for name, case in cases.CASES.items():
        line = [*cases.COMMON, *case.line(300), "--max_train_steps=300", "--seed=0", "--output_dir=there"]
        assert not [*parse(Options, line, description="").problems()], name


def test_a_preset_warms_up_for_the_share_of_the_run_that_it_names():
    """The presets' own numbers are for runs of 2,000 steps."""
    from freq_loss import get_fourier_loss_config

    found = {name: cases.CASES[f"fourier_{name}"] for name in cases.PRESETS | cases.UNIFIED}
    for name, case in found.items():
        preset = get_fourier_loss_config(name)["fourier_warmup_steps"]
        assert case.line(2000)[-1] == f"--fourier_warmup_steps={preset}", name
    assert found["conservative"].line(300)[-1] == "--fourier_warmup_steps=75"
    assert found["unified_custom"].line(300)[-1] == "--fourier_warmup_steps=38"


def test_a_case_differs_from_the_first_of_its_comparison_in_its_method_alone():
    plain = set(cases.CASES["lora"].line(300))
    for name in (*cases.FOURIER, *cases.HINA):
        own = set(cases.CASES[name].line(300))
        assert plain < own, name
        assert all(flag.startswith(("--loss_type", "--fourier_", "--optimizer")) for flag in own - plain), name


def test_every_case_of_a_seed_comes_before_the_next_and_seeds_caps_them():
    def planned(*more: str) -> list[tuple[str, int]]:
        return run.runs(run.parse(["--cases", "lora", "fourier_unified_basic", *more]))

    assert planned() == [("lora", 0), ("fourier_unified_basic", 0), ("lora", 1), ("lora", 2)]
    assert planned("--seeds=1") == [("lora", 0), ("fourier_unified_basic", 0)]
    assert max(seed for _, seed in run.runs(run.parse(["--seeds=9"]))) == 5
    assert max(seed for _, seed in run.runs(run.parse([]))) == 2, "six seeds on request"


def test_what_is_finished_is_not_run_again(tmp_path: Path, no_runs: list[str]):
    finish(tmp_path, "lora", 0)
    asked = ["--cases", "lora", "hina_fast", "--seeds=2", f"--out={tmp_path}"]
    run.main(asked)
    assert no_runs == ["hina_fast-seed0", "lora-seed1", "hina_fast-seed1"]
    run.main(asked)
    assert len(no_runs) == 3


# -- tables and figures ------------------------------------------------------------------------------------------------

RINGS = 32


def made_up(case: str, **values: object) -> dict[str, object]:
    known = {"gap_closed": 0.5, "prior_drift": 0.1, "seconds": 60.0, "style_distance": 0.02, "high": 0.25,
             "high_vae": 1.5, "spectrum": 1.4, "spectrum_vae": 0.5, "ratios": [0.5] * RINGS, "step_seconds": 0.2,
             "state_bytes": 8.0, "flags": run.flags(case, 300)}
    return known | values


def finish(out: Path, case: str, seed: int, **values: object) -> None:
    folder = out / f"{case}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    seeds.save(folder / "result.json", made_up(case, **values))


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training and measuring write made-up numbers; the list tells which runs there were."""
    ran: list[str] = []

    def train(case: str, seed: int, steps: int, folder: Path) -> float:
        folder.mkdir(parents=True)
        ran.append(folder.name)
        return 1.0

    def result(_: Exam, folder: Path, seconds: float, flags: str) -> results.Result:
        return results.Result(**made_up(folder.name.partition("-seed")[0]))

    def rows(_: Exam, out: Path) -> None:
        row = exam.row_of([Image.new("RGB", (64, 64))] * exam.SHOWN)
        for name in (exam.BASE_ROW, exam.REAL_ROW):
            row.save(out / name)

    def references(_: Exam) -> dict[str, dict]:
        return {name: made_up("lora") for name in ("base", "real icons through the VAE")}

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(Exam, "result", result)
    monkeypatch.setattr(Exam, "references", references)
    monkeypatch.setattr(Exam, "rows", rows)
    return ran


def test_a_preset_is_compared_with_l2_of_its_own_seed(tmp_path: Path, no_runs: list[str],
                                                      capsys: pytest.CaptureFixture[str]):
    """10 points in every seed: no spread, though seeds differ. One seed has no interval."""
    for seed, closed in enumerate((0.4, 0.6, 0.5)):
        finish(tmp_path, "lora", seed, gap_closed=closed)
        finish(tmp_path, "fourier_balanced", seed, gap_closed=closed + 0.1)
    finish(tmp_path, "fourier_unified_basic", 0, gap_closed=0.3)
    run.main(["--cases", "lora", "fourier_balanced", "fourier_unified_basic", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    whole, changed = text.partition("### Fourier")[2].split("Change from the first row")
    assert "| fourier_balanced | **0.0200** (0.0200, 0.0200, 0.0200) | **60** (50, 70, 60) | **25.0**" in whole
    assert "| fourier_unified_basic | **0.0200** (0.0200) | **30** (30) |" in whole
    assert "| fourier_balanced | +0.0000 [+0.0000, +0.0000] | **+10 [+10, +10]** |" in changed
    assert "| fourier_unified_basic | +0.0000 | -10 |" in changed
    assert "| base | 0.0200 | 25.0 | 150 | 1.400 | 0.500 |" in text and no_runs == []
    assert (tmp_path / "tables.md").read_text("utf-8").strip() in text


def test_bytes_and_seconds_of_an_optimizer_stand_in_its_table(tmp_path: Path, no_runs: list[str],
                                                              capsys: pytest.CaptureFixture[str]):
    finish(tmp_path, "lora", 0)
    finish(tmp_path, "hina_large", 0, state_bytes=4.01, step_seconds=0.3)
    run.main(["--cases", "lora", "hina_large", "--seeds=1", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    assert "| **0.100** (0.100) | 8.00 | 0.200 |" in text and "| **0.100** (0.100) | 4.01 | 0.300 |" in text
    assert "Fourier" not in text and not (tmp_path / "fourier.png").exists()


def test_old_results_leave_what_they_do_not_say_empty():
    old = results.Result(gap_closed=0.5, prior_drift=0.1, seconds=60)
    new = results.Result(**made_up("fourier_balanced"))
    text = "\n".join(results.tables({"lora": [old], "fourier_balanced": [new]}))
    assert "| lora |  | **50** (50) |  |" in text and "| fourier_balanced |  | +0 |  |" in text
    assert "style distance" not in results.summary(old)


def test_the_figure_shows_every_curve_in_its_colour(tmp_path: Path, no_runs: list[str]):
    """2 dB more than l2 in the upper half, l2 at half of the real icons' power."""
    shown = ["lora", *(f"fourier_{name}" for name in cases.PRESETS)]
    for k, case in enumerate(shown):
        finish(tmp_path, case, 0, ratios=[0.5] * 16 + [0.5 * 10 ** (0.1 * k)] * 16)
        exam.row_of([Image.new("RGB", (64, 64), (20 * k, 0, 0))] * 10).save(tmp_path / f"{case}-seed0" / exam.ROW)
    run.main(["--cases", *shown, "--seeds=1", f"--out={tmp_path}"])
    with Image.open(tmp_path / "fourier.png") as page:
        colours = {"#{:02x}{:02x}{:02x}".format(*pixel[:3]) for _, pixel in page.getcolors(2**24)}
        below = page.crop((chart.MARGIN + chart.WIDTH, chart.HEAD, *page.size))
    dots = {"#{:02x}{:02x}{:02x}".format(*pixel[:3]) for _, pixel in below.getcolors(2**24)}
    assert {chart.LINES[case] for case in shown} <= colours
    assert {chart.LINES[case] for case in shown[1:]} <= dots and chart.LINES["base"] not in dots
    with Image.open(tmp_path / "fourier-images.png") as page:
        assert {(20 * k, 0, 0) for k in range(len(shown))} <= {pixel for _, pixel in page.getcolors(2**24)}


def test_the_sheet_of_the_methods_shows_the_images_of_each(tmp_path: Path, no_runs: list[str]):
    for k, case in enumerate(cases.METHODS):
        finish(tmp_path, case, 0)
        exam.row_of([Image.new("RGB", (64, 64), (20 * k, 0, 0))] * 10).save(tmp_path / f"{case}-seed0" / exam.ROW)
    run.main(["--cases", *cases.METHODS, "--seeds=1", f"--out={tmp_path}"])
    with Image.open(tmp_path / "learning.png") as page:
        assert {(20 * k, 0, 0) for k in range(len(cases.METHODS))} <= {pixel for _, pixel in page.getcolors(2**24)}


def test_changes_are_means_over_rings_then_over_seeds():
    control = [[1.0] * RINGS, [2.0] * RINGS]
    louder = [[10 ** 0.1] * RINGS, [2 * 10 ** 0.3] * RINGS]  # 1 dB and 3 dB
    points = chart.change_of(louder, control)
    assert len(points) == RINGS // chart.TOGETHER
    assert points[0] == pytest.approx((2, math.sqrt(2) / math.sqrt(2)))
    assert chart.change_of(louder[:1], control)[0] == pytest.approx((1, 0))


# -- measurement -------------------------------------------------------------------------------------------------------


def test_too_much_and_too_little_power_both_count():
    real = torch.arange(1, 9, dtype=torch.float64)
    same = exam.against(real, real)
    assert (same["high"], same["spectrum"], same["ratios"]) == (1, 0, [1.0] * 8)
    for factor in (0.5, 2):
        found = exam.against(factor * real, real)
        assert found["high"] == pytest.approx(factor) and found["spectrum"] == pytest.approx(math.log(2))
    tilted = exam.against(real * torch.tensor([3.0] * 4 + [0.25] * 4), real)
    assert tilted["high"] == pytest.approx(0.25)


def test_a_step_is_timed_after_the_first_of_the_run(tmp_path: Path):
    """The first sixth is slow, and a checkpoint takes 9 seconds."""
    times = [0.0, 5.0, 10.0, 10.2, 10.4, 10.6, 19.6, 19.8, 20.0, 20.2, 20.4, 20.6]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({"seconds": t}) for t in times), "utf-8")
    assert exam.step_seconds(tmp_path) == pytest.approx(0.2)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"seconds": 1.0}), "utf-8")
    assert exam.step_seconds(tmp_path) is None


@pytest.mark.parametrize(("kind", "expected"), [
    (torch.optim.AdamW, 8 + 4 / 96), (torch.optim.SGD, 0.0)])
def test_state_bytes_are_those_of_the_checkpoint(tmp_path: Path, kind: type, expected: float):
    """Two matrices of 96 numbers: 8 bytes a number, and a counter of 4 bytes a matrix."""
    checkpoint(tmp_path, kind, lambda state: None)
    assert exam.state_bytes(tmp_path) == pytest.approx(expected)
    assert exam.state_bytes(tmp_path / "not there") is None


def test_a_state_in_half_precision_is_half_as_large(tmp_path: Path):
    checkpoint(tmp_path, torch.optim.AdamW, lambda state: state.update(exp_avg=state["exp_avg"].bfloat16()))
    assert exam.state_bytes(tmp_path) == pytest.approx(6 + 4 / 96)


def checkpoint(folder: Path, kind: type[torch.optim.Optimizer], change: Callable[[dict], None]) -> None:
    """A step of an optimizer, its state as `trainkit.checkpoints` writes it beside an averaged copy of the weights."""
    from trainkit.files import save_tensors, write_json
    from trainkit.optim.state import group_values, pack_state

    params = [torch.nn.Parameter(torch.ones(8, 12)), torch.nn.Parameter(torch.ones(12, 8))]
    inner = kind(params, lr=1e-3)
    made = group_values(inner)
    for p in params:
        p.grad = torch.ones_like(p)
    inner.step()
    for p in params:
        change(inner.state[p])
    tensors, data = pack_state(inner, made)
    tensors = {f"unet/{name}": t for name, t in tensors.items()} | {"unet/ema.0": torch.ones(8, 12)}
    save_tensors(folder / "optimizer.safetensors", tensors)
    write_json(folder / "state.json", {"optimizer": {"optimizer": "any", "groups": {"unet": data}}})


def test_rows_of_images_come_back_as_they_were(tmp_path: Path):
    tiles = [Image.new("RGB", (64, 64), (k, 2 * k, 255 - k)) for k in range(10)]
    exam.row_of(tiles).save(tmp_path / "row.png")
    assert [t.tobytes() for t in chart.cut(tmp_path / "row.png")] == [t.tobytes() for t in tiles]


# -- training ----------------------------------------------------------------------------------------------------------


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
    line = ["--base", str(assets / "tiny-sdxl-icons"), "--strengths", "0,1", "--steps", str(DENOISING_STEPS),
            "--lora", str(out / "pytorch_lora_weights.safetensors"), "--out", str(out / "evaluation"), *more]
    drawn = forked(line, trainer="trainkit.tools.evaluate", log=out / "evaluation.log")
    assert drawn.code == 0, drawn.output
    report = json.loads((out / "evaluation" / "evaluation.json").read_text("utf-8"))
    base, lora = report["strengths"]
    assert lora["style_distance"] < base["style_distance"], drawn.output
    return lora


@pytest.mark.trains
def test_a_short_run_closes_part_of_the_style_gap_on_untaught_nouns(assets: Path, tmp_path: Path):
    assert evaluated(assets, trained(assets, tmp_path / "icons"))["share_of_gap_closed"] >= 0.10


@pytest.mark.slow
@pytest.mark.trains
def test_new_tokens_hold_part_of_the_style(assets: Path, tmp_path: Path):
    """The LoRA alone, asked for by the word, closes less of the gap than with the tokens it was trained with."""
    out = trained(assets, tmp_path / "icons", train_text_encoder_ti=True, text_encoder_lr=1e-3)
    alone = evaluated(assets, out)["share_of_gap_closed"]
    together = evaluated(assets, out, "--embeddings", str(out / "icons_emb.safetensors"))["share_of_gap_closed"]
    assert together >= 0.2 and together > alone + 0.1
