"""experiments/frequency: runs resume arm by arm, tables pair arms by seed, what is measured is what it is called."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import charts, seeds
from experiments.frequency import arms, chart, exam, results, run
from experiments.frequency.exam import Exam
from tests.support import ROOT
from tests.support.trainers import launched
from trainkit.condition import Condition
from trainkit.errors import UserError

ARMS = ("base", "more-data", "combo")
U_LOW = {"base": (2.0, 1.0, 3.0), "more-data": (1.8, 0.8, 2.8), "combo": (1.4, 0.2, 2.6)}  # by seed; base's mean is 2


def made_up_bin(timestep: int, *, error: float = 0.1, u_low: float = 1.0) -> dict[str, float]:
    row = {f"{kind}_{band}": 1.0 for kind in results.KINDS for band in results.BANDS}
    return row | {"timestep": timestep, "error": error, "u_low": u_low}


def made_up(arm: str, seed: int = 0, **values: float) -> results.Result:
    case = arms.flags(arms.ARMS[arm].flags, arms.GAIN)
    plan = run.plan_of(case | {"seed": seed, "max_train_steps": run.STEPS}, pilot=False)
    return results.Result(plan, [made_up_bin(t, **values) for t in results.TIMESTEPS], seconds=0.25,
                            telemetry={} if arm == "base" else {"dist_match/u_low": 0.5})


def finish(out: Path, result: results.Result, name: str) -> None:
    folder = out / name
    folder.mkdir(parents=True)
    seeds.save(folder / "result.json", vars(result))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder in which three arms have their results of three seeds."""
    for arm in ARMS:
        for seed, u_low in enumerate(U_LOW[arm]):
            finish(tmp_path, made_up(arm, seed, u_low=u_low), f"{arm}-seed{seed}")
    seeds.save(tmp_path / "untrained.json", [made_up_bin(t, u_low=7.0) for t in results.TIMESTEPS])
    return tmp_path


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training and measuring write made-up numbers; the list tells which runs there were."""
    ran: list[str] = []

    def train(case: arms.Flags, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ran.append(folder.name)

    def result(_: Exam, folder: Path, plan: dict, *, styled: bool) -> results.Result:
        return results.Result(plan, [made_up_bin(t) for t in results.TIMESTEPS], 0.1, {})

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(Exam, "result", result)
    monkeypatch.setattr(Exam, "bins", lambda _, folder: [made_up_bin(t) for t in results.TIMESTEPS])
    return ran


def cells(text: str, arm: str) -> list[str]:
    """The first table row of an arm."""
    row = next(line for line in text.splitlines() if line.startswith((f"| {arm}:", f"| {arm} |")))
    return [cell.strip() for cell in row.strip("|").split("|")]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_arms_are_compared_with_the_base_of_their_own_seed(finished, no_runs, capsys):
    """more-data is 0.2 below the base in every seed, 10 % of its mean of 2: no spread, though seeds differ."""
    run.main(["--arms", *ARMS, f"--out={finished}"])
    text = capsys.readouterr().out
    low = list(results.METRICS).index("U low") + 3
    assert no_runs == []
    assert cells(text, "base")[low] == "2"
    assert cells(text, "more-data")[low] == "-10.00 ± 0.00 %"
    changes = [-30.0, -40.0, -20.0]
    assert cells(text, "combo")[low] == f"-30.00 ± {statistics.stdev(changes) / math.sqrt(3):.2f} %"
    assert (finished / "tables.md").read_text("utf-8").strip() in text
    assert len(json.loads((finished / "results.json").read_text("utf-8"))["arms"]["combo"]) == 3


def test_an_interval_that_holds_0_is_not_bold():
    """Student's t for two degrees of freedom has the 97.5 % quantile 0.95·√(2/(1 − 0.95²)), for one tan(0.475π)."""
    assert seeds.T_95[3] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=1e-3)
    assert seeds.T_95[2] == pytest.approx(math.tan(0.475 * math.pi), abs=1e-3)
    half = 4.303 * 10 / math.sqrt(3)
    assert results.interval([-20, -30, -40]) == f"**-30.00 % [{-30 - half:+.2f}, {-30 + half:+.2f}]**"
    assert results.interval([-14, -24, -34]) == f"-24.00 % [{-24 - half:+.2f}, {-24 + half:+.2f}]"
    assert results.interval([-5.0]) == "-5.00 %"


def test_contrasts_are_of_arms_that_were_run(finished, no_runs, capsys):
    run.main(["--arms", *ARMS, f"--out={finished}"])
    text = capsys.readouterr().out
    contrasts = text.partition("### Arm against control")[2].partition("###")[0]
    assert "| combo | more-data |" in contrasts and "swap" not in contrasts
    assert f"{100 * (1.4 + 0.2 + 2.6 - 5.4) / 5.4:+.2f} %" in contrasts


def test_a_column_is_a_mean_over_its_timesteps():
    result = results.Result({}, [made_up_bin(t, error=t, u_low=t) for t in results.TIMESTEPS], 0.1, {})
    assert result.mean(*results.METRICS["error"]) == statistics.mean(results.TIMESTEPS)
    assert result.mean(*results.METRICS["U low"]) == statistics.mean([250, 400, 550])


def test_one_seed_has_no_spread():
    assert results.spread([-3.0]) == "-3.00"
    assert chart.point([2.0]) == (2.0, 0.0)


def test_the_pilot_takes_the_gain_with_the_least_u_that_does_no_harm():
    def found(error: float, u_low: float) -> list[results.Result]:
        return [made_up("combo", error=error, u_low=u_low)]

    by_gain = {"more-data": found(0.1, 1.0), "gain-0.1": found(0.1, 0.8), "gain-0.3": found(0.09, 0.6),
               "gain-1": found(0.11, 0.3)}
    assert results.chosen(by_gain) == "gain-0.3"
    harmful = {"more-data": found(0.1, 1.0), "gain-0.1": found(0.11, 0.8), "gain-1": found(0.12, 0.3)}
    assert results.chosen(harmful) == "gain-0.1"


# -- runs --------------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_run_again(finished, no_runs):
    (finished / "combo-seed1" / "result.json").unlink()
    run.main(["--arms", *ARMS, f"--out={finished}"])
    assert no_runs == ["combo-seed1"]


def test_every_arm_of_a_seed_comes_before_the_next_seed(tmp_path, no_runs):
    run.main(["--arms", "base", "combo", "--seeds", "4", "7", f"--out={tmp_path}"])
    assert no_runs == ["base-seed4", "combo-seed4", "base-seed7", "combo-seed7"]


def test_the_pilot_has_a_seed_and_a_folder_of_its_own(tmp_path, no_runs, capsys):
    run.main(["--pilot", f"--out={tmp_path}"])
    assert no_runs == ["more-data-seed100", *(f"gain-{gain}-seed100" for gain in arms.GAINS)]
    asked = results.read(tmp_path / "pilot" / "gain-3-seed100").asked
    assert asked["flags"]["dist_match_gain"] == "3" and asked["images"] == "pilot"
    assert "chosen: gain-" in capsys.readouterr().out


def test_results_of_other_arguments_are_refused_by_name(finished, no_runs):
    line = ["--arms", *ARMS, f"--out={finished}"]
    with pytest.raises(UserError) as refused:
        run.main([*line, "--steps=50"])
    assert len(refused.value.problems) == 9 and "max_train_steps 300, now 50" in str(refused.value)
    with pytest.raises(UserError) as refused:
        run.main([*line, "--gain=7"])
    assert [p.what.split()[0] for p in refused.value.problems] == [f"combo-seed{seed}" for seed in range(3)]
    assert "now 7" in str(refused.value) and no_runs == []


def test_every_arm_is_a_command_that_the_trainer_takes():
    """Its rules find nothing wrong with any of them, and no flag that would not be read."""
    from train_text_to_image_lora import Options
    from trainkit.options import parse

    for arm, settings in arms.ARMS.items():
        case = arms.flags(settings.flags, 0.3)
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in case.items()]
        options = parse(Options, given, description="")
        assert not [*options.problems()], arm
        unread = [notice for notice in options.notices() if "dist_match" in notice]
        assert not unread, arm
        assert options.run.train_batch_size * (1 + (options.matching.active and options.matching.dist_match_mode in
                                                    ("extra", "combo"))) == settings.images


@pytest.mark.trains
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_arm_is_trained_and_measured_once(tmp_path):
    line = [sys.executable, "experiments/frequency/run.py", "--arms", "u", "reuse", "--seeds", "0", "--steps", "2",
            "--out", str(tmp_path)]
    done = launched(line, timeout=500)
    assert done.code == 0, done.output
    first = (tmp_path / "results.json").read_bytes()
    arms = json.loads(first)["arms"]
    assert arms["u"][0]["bins"] != arms["reuse"][0]["bins"]
    assert all(math.isfinite(value) for found in arms.values() for row in found[0]["bins"] for value in row.values())
    assert arms["u"][0]["telemetry"]["dist_match/error_low"] > 0
    for log in tmp_path.glob("*/training.log"):
        log.unlink()
    assert launched(line, timeout=500).code == 0
    assert (tmp_path / "results.json").read_bytes() == first and not [*tmp_path.glob("*/training.log")]


def test_seconds_a_step_are_a_median_of_steps():
    rows = [{"seconds": s} for s in (1.0, 1.1, 1.2, 9.2, 9.3)]  # a checkpoint took 8 seconds
    assert exam.seconds_a_step(rows) == pytest.approx(0.1)


def test_telemetry_is_a_mean_over_the_steps_that_have_it():
    name = "dist_match/u_low"
    rows = [{"loss": 1.0}, {"loss": 1.0, name: 1.0}, {"loss": 1.0, name: None}, {"loss": 1.0, name: 3.0}]
    assert exam.telemetry(rows) == {name: 2.0}


# -- measurement -------------------------------------------------------------------------------------------------------

SIDE, IMAGES = 16, 60


def exam_of(x0: torch.Tensor, x0_hat: torch.Tensor) -> Exam:
    """An exam whose network says x0_hat of the images x0, in ε."""
    from trainkit.diffusion import NoiseSchedule

    schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 1000), "epsilon")

    def denoise(z, level, condition):
        rows = condition["embeds"][:, 0, 0].long()  # which images these are
        a, s = (v.view(-1, 1, 1, 1) for v in (level.a, level.s))
        return (z - a * x0_hat[rows]) / s

    exam = Exam(pilot=False)
    exam.family = SimpleNamespace(schedule=schedule, denoise=denoise)
    exam.x0, exam.text = x0, Condition({"embeds": torch.arange(len(x0)).view(-1, 1, 1).float()})
    exam.reference = [SimpleNamespace(noun=f"noun {i}") for i in range(len(x0))]
    return exam


def test_a_shift_that_all_images_share_is_u_and_a_fading_is_the_slope():
    """x̂0 = x0/2 + m with m constant over places: U of the low band finds m, U of the high band finds nothing."""
    x0 = torch.randn(IMAGES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    row = exam_of(x0, x0 / 2).bin(400)
    assert row["slope_low"] == pytest.approx(2, rel=1e-4) and row["slope_high"] == pytest.approx(2, rel=1e-4)
    assert row["error_low"] == pytest.approx(0.25, rel=0.05) and row["error_high"] == pytest.approx(0.25, rel=0.05)
    assert abs(row["z_low"]) < 5 and abs(row["z_high"]) < 5
    shifted = exam_of(x0, x0 / 2 + 0.3).bin(400)
    assert shifted["error_low"] > 1.5 * row["error_low"]
    assert shifted["error_high"] == pytest.approx(row["error_high"], rel=1e-4)
    assert shifted["u_low"] - row["u_low"] == pytest.approx(shifted["error_low"] - row["error_low"], rel=0.1)
    assert shifted["z_low"] > 50 and abs(shifted["z_high"]) < 5
    assert shifted["error"] > row["error"] > 0


def test_pilot_and_exam_share_no_image():
    pilot, exam = (Exam(pilot=pilot).reference for pilot in (True, False))
    assert (len(pilot), len(exam)) == (30, 90)
    assert not {real.noun for real in pilot} & {real.noun for real in exam}
    taught = {json.loads(row)["file_name"]
              for row in (ROOT / arms.CONCEPT / "metadata.jsonl").read_text("utf-8").splitlines()}
    assert not taught & {real.path.name for real in (*pilot, *exam)}


# -- figure ------------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_line_in_its_colour_within_its_panel():
    lines = {"one": [(1.0, 0.5), (-2.0, 0.0)], "two": [(3.0, 0.2), (4.0, 1.0)]}
    panel = charts.Panel("a panel", lines, neutral=0)
    assert panel.ticks[0] <= -2 and panel.ticks[-1] >= 5
    page = charts.figure([[panel, panel]], places=["100", "250"], shaded=(1, 1), below="timestep",
                                  labels={"one": "first", "two": "second"}, title="a title")
    assert page.width == 2 * (charts.MARGIN + charts.WIDTH)
    axes = charts.Axes(charts.MARGIN, charts.HEAD, 2, panel.ticks[0], panel.ticks[-1])
    for i, points in enumerate(lines.values()):
        x, y = axes.at(0, points[0][0])
        shift = charts.DODGE * (i - 0.5)
        assert "#{:02x}{:02x}{:02x}".format(*page.getpixel((round(x + shift), round(y)))) == charts.COLOURS[i]


def test_a_figure_is_made_of_the_arms_at_hand(finished, no_runs):
    run.main(["--arms", *ARMS, f"--out={finished}"])
    from PIL import Image

    with Image.open(finished / "frequency.png") as page:
        assert page.width == 2 * charts.MARGIN + 3 * charts.WIDTH
