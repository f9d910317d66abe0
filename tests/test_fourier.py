"""The Fourier loss in the trainers: its flags, its place in the objective, its log, its gain, and its resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import freq_loss
from freq_loss import FourierLoss, get_fourier_loss_config
from tests.harness import command, forked, launched, make_pictures, metrics, torchrun
from tests.test_matching import KEYS, outcome, passes, plain, sd
from tests.test_options import read, read_captioned
from tests.test_resume import same_checkpoint
from trainkit.diffusion import make_levels
from trainkit.errors import UserError
from trainkit.fourier import FourierTerm, Gain, make_fourier, problems
from trainkit.objective import make_objective
from trainkit.options import FourierOptions, ObjectiveOptions
from trainkit.passes import Pass

FOURIER = {"loss_type": "fourier", "fourier_warmup_steps": 1}
TRAINERS = ("train_dreambooth_lora_sdxl_advanced", "train_text_to_image_lora")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("fourier") / "pictures", n=5)


def line(trainer: str, model: Path, pictures: Path, out: Path, **changes: object) -> list[str]:
    """A short command of either trainer."""
    if trainer == TRAINERS[1]:
        changes = {"instance_prompt": None, "train_data_dir": pictures, **changes}
        return command(model, None, out, **{"max_train_steps": 4, **changes})
    return command(model, pictures, out, **{"max_train_steps": 4, **changes})


def term(**settings: object) -> FourierTerm:
    return FourierTerm(FourierLoss(**{"warmup_steps": 0, **settings}), total_steps=10)


def with_term(one: FourierTerm, *, weighting: str = "uniform", gamma: float | None = None, base: str = "l2") -> Pass:
    schedule = sd()
    o = ObjectiveOptions(loss_type="fourier", loss_weighting=weighting, snr_gamma=gamma)
    return Pass(make_levels(o, schedule), make_objective(o, schedule.prediction, base_loss=base).plus(one))


# -- where values come from -------------------------------------------------------------------------------------------


def test_the_command_line_beats_the_config_beats_the_preset_beats_the_default(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[fourier_loss]\nconfig = 'super_resolution'\nweight = 0.07\nmode = 'multiscale'\n"
                      "scales = [1, 2, 4]\n", "utf-8")
    opt = read("--config", str(config), "--loss_type=fourier", "--fourier_weight=0.2")
    fourier = opt.fourier_loss
    assert fourier.fourier_weight == 0.2 and opt.origins["fourier_weight"] == "command line"
    assert (fourier.fourier_mode, fourier.fourier_scales) == ("multiscale", "1,2,4")
    assert fourier.fourier_warmup_steps == 400 and opt.origins["fourier_warmup_steps"].endswith("super_resolution")
    assert fourier.fourier_norm == "l2" and opt.origins["fourier_base_loss"] == "default"
    assert FourierLoss(**fourier.loss).scales == (1, 2, 4)


def test_the_guides_table_of_the_config_file_is_read(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("[fourier_loss]\nweight = 0.05\nmode = \"weighted\"\nhigh_freq_weight = 2.0\nwarmup_steps = 300\n")
    fourier = read("--config", str(config)).fourier_loss
    assert (fourier.fourier_weight, fourier.fourier_mode, fourier.fourier_high_freq_weight,
            fourier.fourier_warmup_steps) == (0.05, "weighted", 2.0, 300)


@pytest.mark.parametrize(("key", "meant"), [("wieght", "weight"), ("high_freq", "high_freq_weight"), ("mod", "mode")])
def test_a_slip_in_the_table_is_refused_with_the_key_that_was_meant(tmp_path, key, meant):
    config = tmp_path / "config.toml"
    config.write_text(f"[fourier_loss]\n{key} = 1\n")
    with pytest.raises(UserError, match=rf"unknown key {key}\n[\s\S]*did you mean {meant}\?"):
        read("--config", str(config))


@pytest.mark.parametrize("name", FourierOptions.choices("fourier_config"))
def test_every_preset_of_the_loss_is_a_choice_and_arrives(name):
    fourier = read_captioned("--loss_type=fourier", f"--fourier_config={name}").fourier_loss
    values = dict(fourier)
    assert {flag: values[flag] for flag in get_fourier_loss_config(name)} == get_fourier_loss_config(name)
    assert FourierLoss(**fourier.loss) == FourierLoss.from_config(get_fourier_loss_config(name))


def test_presets_modes_and_choices_are_those_of_the_loss():
    assert set(FourierOptions.choices("fourier_config")) == set(freq_loss.PRESETS)
    assert set(FourierOptions.choices("fourier_mode")) == set(freq_loss.MODES)
    for name, choices in freq_loss.FOURIER_CHOICES.items():
        assert set(FourierOptions.choices(f"fourier_{name}")) == set(choices)
    defaults = FourierLoss(**FourierOptions().loss)
    assert defaults == FourierLoss()


def test_a_wrong_preset_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean --fourier_config balanced"):
        read("--fourier_config=balancd")


def test_flags_without_the_loss_and_flags_that_the_mode_does_not_read_are_told():
    assert any("--fourier_weight has no effect" in notice for notice in read("--fourier_weight=0.1").notices())
    notices = read("--loss_type=fourier", "--fourier_mode=basic", "--fourier_scales=1,2").notices()
    assert any("--fourier_scales has no effect" in notice for notice in notices)
    assert not read("--loss_type=fourier", "--fourier_config=conservative").notices()


def test_what_the_loss_cannot_compute_is_one_problem():
    o = read("--loss_type=fourier", "--fourier_mode=multiscale", "--fourier_scales=16").fourier_loss
    assert not list(problems(o, "l2", (4, 8, 8)))
    (problem,) = problems(o, "fourier", (4, 8, 8))
    assert "scales 16" in problem.why and "add the scale 1" in problem.fix


def test_several_words_after_optimizer_args_are_one_value():
    assert read("--optimizer_args", "d_coef=0.5", "betas=(0.9,0.99)", "--rank=3").optimizer.optimizer_args == (
        "d_coef=0.5 betas=(0.9,0.99)")
    with pytest.raises(UserError, match="--optimizer_args has no value"):
        read("--optimizer_args", "--rank=3")


# -- the term in the objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["prediction", "x0"])
@pytest.mark.parametrize(("weighting", "gamma"), [("uniform", None), ("min_snr", 5.0), ("x0", None)])
def test_a_constant_complex_term_is_the_loss_itself_in_either_space(space, weighting, gamma):
    """Parseval: with every frequency counting alike, an error of x0 at its worth is the error of the output."""
    one = with_term(term(mode="basic", metric="complex", weight=1.0, space=space), weighting=weighting, gamma=gamma)
    o = outcome(one)
    dc = o.x0.mean((2, 3), keepdim=True) * 0
    judged = one.loss.judge(o)
    added = one.loss.terms[0](judged)
    if space == "x0":  # the mean of a channel is left out there
        error = judged.x0_hat - o.x0
        dc = error.mean((2, 3)).square().mean(1) * judged.worth
        added = added + dc
    torch.testing.assert_close(added, judged.losses, rtol=2e-4, atol=1e-6)


def test_weights_shares_and_other_samples_reach_the_term_as_they_reach_the_error():
    one = with_term(term(metric="complex"), weighting="min_snr", gamma=5.0)
    o = outcome(one)
    whole = one.loss.terms[0](one.loss.judge(o))
    halved = replace(o, share=o.share * 0.5)
    torch.testing.assert_close(one.loss.terms[0](one.loss.judge(halved)), whole / 2)


def test_the_base_loss_stays_what_it_is_and_the_term_only_adds():
    with_huber = with_term(term(), base="huber")
    o = outcome(with_huber)
    alone = replace(with_huber.loss, terms=())(o)
    huber = make_objective(ObjectiveOptions(loss_type="huber"), sd().prediction)(o)
    assert torch.equal(alone, huber)
    assert (with_huber.loss(o) > alone).all()


def test_warm_up_and_no_weight_cost_no_fft_and_leave_the_loss_bit_for_bit(monkeypatch):
    def unwanted(*args, **kwargs):
        raise AssertionError("an FFT")

    monkeypatch.setattr(torch.fft, "rfft2", unwanted)
    for settings in ({"warmup_steps": 5}, {"weight": 0.0}, {"timestep_gate": "snr", "gate_min_snr": 1e7,
                                                           "gate_max_snr": 1e8}):
        one = with_term(term(**settings))
        o = outcome(one)
        assert torch.equal(one.loss(o), replace(one.loss, terms=())(o))
        assert one.loss.terms[0].describe()["fourier_component"] == 0.0


def test_the_component_is_the_loss_less_the_ordinary_loss_over_all_passes_of_a_step():
    one = with_term(term())
    fourier = one.loss.terms[0]
    whole = base = 0.0
    for keys in (KEYS, KEYS[:4]):  # two micro-batches
        o = replace(outcome(one, keys), num_instance=10)
        whole += float(one.loss(o).sum() / 10)
        base += float(replace(one.loss, terms=())(o).sum() / 10)
    found = fourier.describe()
    assert found["fourier_component"] == pytest.approx(whole - base, abs=1e-7) and found["fourier_component"] > 0
    assert found["fourier_weight_eff"] == pytest.approx(0.05) and found["fourier_raw"] > 0
    assert fourier.describe() == {"fourier_component": 0.0}, "asked once a step"


def test_a_pass_of_the_matching_term_alone_has_no_fourier_term():
    fourier = term()
    base = Pass(plain().levels, plain().loss.plus(fourier))
    _, second = passes("extra", base=base)(0)
    o = outcome(second)
    second.loss(o)
    assert fourier.describe() == {"fourier_component": 0.0}
    _, second = passes("combo", base=base)(0)
    second.loss(outcome(second))
    assert fourier.describe()["fourier_component"] > 0


# -- the gain ---------------------------------------------------------------------------------------------------------


def test_the_gain_holds_the_share_that_is_asked_for():
    gain, generator = Gain(0.2), torch.Generator().manual_seed(0)
    terms = losses = 0.0
    for _ in range(300):
        base, unit = (float(torch.rand((), generator=generator)) + 0.5 for _ in range(2))
        unit *= 0.003
        terms, losses = terms + gain.value * unit, losses + base + gain.value * unit
        gain.update(base, unit)
    assert terms / losses == pytest.approx(0.2, abs=0.01)
    assert gain.value == pytest.approx(0.25 / 0.003, rel=0.2)


def test_the_gain_ignores_warm_up_and_broken_steps_and_stays_in_bounds():
    gain = Gain(0.5)
    for base, unit in ((1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        gain.update(base, unit)
    assert gain.value == 1.0
    gain.update(1.0, 1e-12)
    assert gain.value == 1e3
    without = Gain(None)
    without.update(1.0, 1e-3)
    assert without.value == 1.0


def test_a_term_without_the_flag_is_none():
    assert make_fourier(FourierOptions(), "l2", total_steps=3, note=lambda **facts: None) == {}


# -- in the trainers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_logs_the_term_records_its_settings_and_resumes_to_the_bit(trainer, tiny_sdxl, pictures, tmp_path):
    outs = [tmp_path / name / "lora" for name in ("whole", "resumed")]
    chosen = {**FOURIER, "fourier_config": "unified_detail", "fourier_target_share": 0.2, "checkpointing_steps": 1}
    for out, resumed in zip(outs, (None, outs[0] / "checkpoint-2"), strict=True):
        done = forked(line(trainer, tiny_sdxl, pictures, out, resume_from_checkpoint=resumed, **chosen),
                      trainer=trainer, log=tmp_path / "log")
        assert done.code == 0, done.output
    whole, resumed = map(metrics, outs)
    assert [row["fourier_component"] > 0 for row in whole] == [False, True, True, True]
    assert "fourier_component 0." in done.output
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole[2:]]
    assert resumed[-1]["fourier_gain"] == whole[-1]["fourier_gain"] != 1.0
    same_checkpoint(*(out / "checkpoint-4" for out in outs))
    record = json.loads((outs[0] / "run.json").read_text("utf-8"))
    settings = record["fourier_loss"]
    assert settings["fourier_mode"] == "unified_detail" and settings["fourier_scales"] == "1,2,4"
    assert settings["fourier_target_share"] == 0.2 and record["options"]["fourier_weight"]["value"] == 0.08
    for name in ("pytorch_lora_weights.safetensors", "lora.safetensors"):
        with safe_open(outs[0] / name, "pt") as file:
            assert json.loads(file.metadata()["ss_fourier_loss"]) == settings
            assert file.metadata()["ss_loss_type"] == "fourier"


def test_the_term_begins_at_the_same_optimizer_step_whatever_the_accumulation(tiny_sd, pictures, tmp_path):
    """Five pictures: an epoch ends within the run, and a micro-batch is not a step."""
    begins = []
    for accumulation in (1, 2):
        out = tmp_path / f"by{accumulation}"
        argv = line(TRAINERS[1], tiny_sd, pictures, out, gradient_accumulation_steps=accumulation, max_train_steps=5,
                    loss_type="fourier", fourier_warmup_steps=3)
        assert forked(argv, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
        begins.append([row["step"] for row in metrics(out) if row["fourier_component"] > 0])
    assert begins == [[4, 5], [4, 5]]


def test_another_share_or_mode_is_another_run(tiny_sd, pictures, tmp_path):
    out = tmp_path / "lora"
    first = line(TRAINERS[1], tiny_sd, pictures, out, **FOURIER)
    assert forked(first, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
    other = line(TRAINERS[1], tiny_sd, pictures, tmp_path / "other", **FOURIER, fourier_mode="basic",
                 resume_from_checkpoint=out / "checkpoint-4")
    done = forked(other, trainer=TRAINERS[1], log=tmp_path / "log")
    assert done.code == 2 and "--fourier_mode" in done.output


@pytest.mark.slow
def test_two_processes_log_the_component_of_one(tiny_sd, pictures, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    common = {**FOURIER, "fourier_target_share": 0.3, "fourier_metric": "complex"}
    one = line(TRAINERS[1], tiny_sd, pictures, outs[0], train_batch_size=4, **common)
    two = line(TRAINERS[1], tiny_sd, pictures, outs[1], train_batch_size=2, **common)
    assert forked(one, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
    done = launched([*torchrun(2), f"{TRAINERS[1]}.py", *two], env={"ACCELERATE_USE_CPU": "1"})
    assert done.code == 0, done.output
    for a, b in zip(*map(metrics, outs), strict=True):
        for name in ("loss", "fourier_component"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
