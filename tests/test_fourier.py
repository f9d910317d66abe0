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
from tests.support.command_lines import read, read_captioned
from tests.support.compare import same_checkpoint
from tests.support.made_up_pass import KEYS, forward_of, judged, losses_of
from tests.support.matching import SD_BETAS, passes, plain, sd
from tests.support.trainers import command, forked, launched, make_images, metrics, torchrun
from trainkit.diffusion import EDMSchedule, NoiseSchedule
from trainkit.errors import UserError
from trainkit.losses.fourier_term import FourierTerm, Gain, make_fourier, problems
from trainkit.losses.objective import Forward, Objective, make_objective
from trainkit.losses.passes import plain_objective
from trainkit.options import FourierOptions, ObjectiveOptions

FOURIER = {"loss_type": "fourier", "fourier_warmup_steps": 1}
TRAINERS = ("train_dreambooth_lora_sdxl_advanced", "train_text_to_image_lora")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("fourier") / "images", n=5)


def line(trainer: str, model: Path, images: Path, out: Path, **changes: object) -> list[str]:
    """A short command of either trainer."""
    if trainer == TRAINERS[1]:
        changes = {"instance_prompt": None, "train_data_dir": images, **changes}
        return command(model, None, out, **{"max_train_steps": 4, **changes})
    return command(model, images, out, **{"max_train_steps": 4, **changes})


def term(**settings: object) -> FourierTerm:
    return FourierTerm(FourierLoss(**{"warmup_steps": 0, **settings}), total_steps=10)


def with_term(fourier: FourierTerm, *, weighting: str = "uniform", gamma: float | None = None, base: str = "l2",
              ) -> Objective:
    o = ObjectiveOptions(loss_type="fourier", loss_weighting=weighting, snr_gamma=gamma)
    return make_objective(o, sd(), base_loss=base).plus(fourier)


def added(objective: Objective, forward: Forward) -> torch.Tensor:
    """What the objective's one term adds to the losses of that pass under the objective."""
    return objective.terms[0](judged(objective, forward), observe=True)


def without_terms(objective: Objective) -> Objective:
    return replace(objective, terms=())


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
    config.write_text('[fourier_loss]\nweight = 0.05\nmode = "weighted"\nhigh_freq_weight = 2.0\nwarmup_steps = 300\n')
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
    assert "scales 16" in problem.why and "add the scale 1" in problem.fix and problem.where == "--fourier_scales"


def test_all_settings_that_the_loss_refuses_are_told_at_once_each_with_its_flag_and_a_next_step():
    o = read("--loss_type=fourier", "--fourier_mode=unified", "--fourier_scales=1,2", "--fourier_scale_weights=1",
             "--fourier_mix=1", "--fourier_bands=tall:2", "--fourier_timestep_gate=linear",
             "--fourier_gate_min_snr=20").fourier_loss
    found = list(problems(o, "fourier", (4, 8, 8)))
    assert {problem.where for problem in found} == {"--fourier_scale_weights", "--fourier_mix", "--fourier_bands",
                                                    "--fourier_gate_min_snr"}
    assert len(found) == 4 and all(problem.fix and "--fourier_" in problem.why for problem in found)
    too_low = FourierOptions(fourier_timestep_gate="linear", fourier_gate_max_snr=0.05)
    assert len(list(problems(too_low, "fourier", (4, 8, 8)))) == 1, "the default refused, and no second time"
    (problem,) = problems(FourierOptions(), "fourier", (4, 1, 1))
    assert problem.where == "--resolution" and problem.fix == "train at a higher resolution"


@pytest.mark.parametrize("argv", [
    ["--fourier_scales=a"], ["--fourier_scales=1.5"], ["--fourier_eps=2"], ["--fourier_mix=0,0"],
    ["--fourier_adaptive_max_weight=1", "--fourier_adaptive_min_weight=2"], ["--fourier_scales=0"],
    ["--fourier_bands=low:2,low:3"], ["--fourier_scale_weights=1"], ["--fourier_bands= , "],
    ["--fourier_scales=a", "--fourier_scale_weights=1,1"],
    ["--fourier_timestep_gate=linear", "--fourier_gate_min_snr=5", "--fourier_gate_max_snr=2"]])
def test_each_refusal_names_the_flag_that_was_given_and_what_to_give(argv):
    o = read("--loss_type=fourier", "--fourier_mode=unified", *argv).fourier_loss
    (problem,) = problems(o, "fourier", (4, 8, 8))
    assert any(word.startswith(problem.where + "=") for word in argv)
    assert problem.why.startswith(problem.where) and problem.fix


def test_lists_and_numbers_in_a_config_file_read_as_on_the_command_line(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('[fourier_loss]\nscales = 2\nscale_weights = [1.0, 2, 0.5]\nmix = [0.5, 0.25]\n'
                      'bands = ["low:0.5", "high:2"]\n', "utf-8")
    fourier = read("--config", str(config)).fourier_loss
    assert (fourier.fourier_scales, fourier.fourier_scale_weights, fourier.fourier_mix, fourier.fourier_bands) == (
        "2", "1,2,0.5", "0.5,0.25", "low:0.5,high:2")
    with pytest.raises(UserError, match="--fourier_scales cannot be True"):
        config.write_text("fourier_scales = true\n")
        read("--config", str(config))


def test_settings_without_effect_are_not_part_of_what_a_run_is():
    plain_run = read("--loss_type=fourier").fourier_loss.decisive()
    for idle in ("--fourier_adaptive_max_weight=3", "--fourier_gate_max_snr=50", "--fourier_scales=1,2"):
        opt = read("--loss_type=fourier", idle)
        assert any("has no effect" in notice for notice in opt.notices())
        assert opt.fourier_loss.decisive() == plain_run
    spellings = [read("--loss_type=fourier", f"--fourier_bands={bands}") for bands in (" low:0.50", "low:0.5")]
    assert spellings[0].fourier_loss.decisive() == spellings[1].fourier_loss.decisive() != plain_run


def test_several_words_after_optimizer_args_are_one_value():
    assert read("--optimizer_args", "d_coef=0.5", "betas=(0.9,0.99)", "--rank=3").optimizer.optimizer_args == (
        "d_coef=0.5 betas=(0.9,0.99)")
    with pytest.raises(UserError, match="--optimizer_args has no value"):
        read("--optimizer_args", "--rank=3")


# -- the term in the objective ----------------------------------------------------------------------------------------


SCHEDULES = {
    "epsilon": sd, "v": lambda: NoiseSchedule((1 - SD_BETAS).cumprod(0), "v_prediction"),
    "edm": lambda: EDMSchedule(sigma_data=0.5),
}


def without_means(x: torch.Tensor) -> torch.Tensor:
    """Latents whose channels have a mean of 0: the space x0 leaves it out."""
    return x - x.mean((2, 3), keepdim=True)


def asked(schedule: str, weighting: str = "uniform", gamma: float | None = None, **settings: object):
    """An objective that has the term, and a pass of latents without means under it."""
    o = ObjectiveOptions(loss_type="fourier", loss_weighting=weighting, snr_gamma=gamma)
    objective = make_objective(o, SCHEDULES[schedule]()).plus(term(**settings))
    found = forward_of(objective)
    x0, n = without_means(found.x0) * found.level.sigma_data, without_means(found.n)
    z = objective.pred.add_noise(x0, n, found.level)
    out = without_means(torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))
    return objective, judged(objective, replace(found, x0=x0, n=n, z=z, out=out))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("space", ["prediction", "x0"])
@pytest.mark.parametrize(("weighting", "gamma"), [("uniform", None), ("min_snr", 5.0), ("x0", None)])
def test_a_constant_complex_term_is_the_loss_itself_in_either_space(schedule, space, weighting, gamma):
    """Parseval: with every frequency counting alike, an error of x0 at its worth is the error of the output."""
    objective, forward = asked(schedule, weighting, gamma, mode="basic", metric="complex", weight=1.0, space=space,
                               balance="none")
    torch.testing.assert_close(added(objective, forward), forward.losses, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("settings", [{"norm": "l1"}, {"mode": "multiscale"}, {"mode": "unified"}], ids=str)
def test_a_complex_distance_counts_the_same_in_both_spaces(schedule, settings):
    found = []
    for space in ("prediction", "x0"):
        found.append(added(*asked(schedule, metric="complex", space=space, balance="none", **settings)))
    torch.testing.assert_close(*found, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wieners_gate_is_by_what_of_a_frequency_is_signal_whatever_the_data_s_spread(schedule):
    objective, forward = asked(schedule, metric="complex", timestep_gate="wiener")
    calls = []

    class Spy(FourierLoss):
        def __call__(self, *args, **kwargs):
            calls.append(kwargs)
            return super().__call__(*args, **kwargs)

    objective.terms[0].loss = Spy(metric="complex", timestep_gate="wiener", warmup_steps=0)
    losses_of(objective, forward)
    signal = calls[0]["clean"].square().mean((1, 2, 3)) * calls[0]["snr"]  # over the noise, of the whole image
    kept = forward.x0.square().mean((1, 2, 3)) * forward.level.a**2 / forward.level.s**2
    torch.testing.assert_close(signal.float(), kept.float(), rtol=1e-3, atol=1e-9)


def test_weights_and_shares_reach_the_term_as_they_reach_the_error():
    objective = with_term(term(metric="complex"), weighting="min_snr", gamma=5.0)
    forward = forward_of(objective)
    batch = forward.batch
    is_class = torch.ones_like(batch.is_class)
    halved = replace(batch, loss_weight=batch.loss_weight * 0.5, is_class=is_class)
    torch.testing.assert_close(added(objective, replace(forward, batch=halved)), added(objective, forward) / 2)


def test_swap_weighs_the_term_as_it_weighs_the_loss():
    """The ratio of the two laws of noise levels reaches both."""
    base = plain().plus(term())
    chosen = passes("swap", base=base, dist_match_swap=0.5).of_step
    (ordinary,) = next(chosen(step) for step in range(50) if not chosen(step)[0].shared)
    forward = forward_of(ordinary)
    ratio = judged(ordinary, forward).losses / judged(base, forward).losses
    assert ratio.unique().numel() > 1
    torch.testing.assert_close(added(ordinary, forward) / added(base, forward), ratio)


def test_the_base_loss_stays_what_it_is_and_the_term_only_adds():
    with_huber = with_term(term(), base="huber")
    forward = forward_of(with_huber)
    alone = losses_of(without_terms(with_huber), forward)
    huber = losses_of(make_objective(ObjectiveOptions(loss_type="huber"), sd()), forward)
    assert torch.equal(alone, huber)
    assert (losses_of(with_huber, forward) > alone).all()


def test_warm_up_and_no_weight_cost_no_fft_and_leave_the_loss_bit_for_bit(monkeypatch):
    def unwanted(*args, **kwargs):
        raise AssertionError("an FFT")

    monkeypatch.setattr(torch.fft, "rfft2", unwanted)
    for settings in ({"warmup_steps": 5}, {"weight": 0.0}, {"timestep_gate": "snr", "gate_min_snr": 1e7,
                                                           "gate_max_snr": 1e8}):
        objective = with_term(term(**settings))
        forward = forward_of(objective)
        assert torch.equal(losses_of(objective, forward), losses_of(without_terms(objective), forward))
        assert objective.terms[0].describe()["fourier_component"] == 0.0


def test_the_component_is_the_loss_less_the_ordinary_loss_over_all_passes_of_a_step():
    fourier = term()
    objective = with_term(fourier)
    whole = base = 0.0
    for keys in (KEYS, KEYS[:4]):  # two micro-batches
        forward = forward_of(objective, keys)
        forward = replace(forward, batch=replace(forward.batch, num_instance=10))
        whole += float(losses_of(objective, forward).sum() / 10)
        base += float(losses_of(without_terms(objective), forward).sum() / 10)
    found = fourier.describe()
    assert found["fourier_component"] == pytest.approx(whole - base, abs=1e-7) and found["fourier_component"] > 0
    assert found["fourier_weight_eff"] == pytest.approx(0.05) and found["fourier_raw"] > 0
    assert fourier.describe() == {"fourier_component": 0.0}, "asked once a step"


def test_a_pass_of_the_matching_term_alone_has_no_fourier_term():
    fourier = term()
    base = plain().plus(fourier)
    _, second = passes("extra", base=base).of_step(0)
    losses_of(second, forward_of(second))
    assert fourier.describe() == {"fourier_component": 0.0}
    _, second = passes("combo", base=base).of_step(0)
    losses_of(second, forward_of(second))
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
    before = gain.value, gain.base, gain.unit
    gain.update(math.nan, 1.0)
    assert (gain.value, gain.base, gain.unit) == before, "a skipped step leaves no trace"
    gain.update(1.0, 1e-12)
    assert gain.value == 1e3
    without = Gain(None)
    without.update(1.0, 1e-3)
    assert without.value == 1.0


def test_a_share_that_cannot_be_held_is_told_once(caplog):
    for unit, words in ((1e-9, ("1000", "smaller fraction; raise --fourier_weight 0.05")),
                        (1e9, ("0.001", "larger fraction; lower --fourier_weight"))):
        caplog.clear()
        fourier = FourierTerm(FourierLoss(warmup_steps=0), total_steps=10, target_fraction=0.2)
        for _ in range(3):
            fourier.sums, fourier.rate = torch.tensor([unit, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), 1.0
            fourier.describe()
        assert len(caplog.records) == 1 and all(word in caplog.text for word in words)
    caplog.clear()
    objective = with_term(term())
    losses_of(objective, forward_of(objective))
    objective.terms[0].describe()
    assert not caplog.records


@pytest.mark.parametrize(("warmup", "ramp", "total", "said"), [
    (10, 0, 10, "counts in none of the 10"), (9, 5, 10, "counts in none of the 10"), (0, 0, 10, None),
    (5, 10, 10, "40 % of it in the last of the 10 steps"), (5, 4, 10, None), (5, 5, 10, "80 % of it")])
def test_a_weight_that_is_never_reached_in_full_is_warned_of(caplog, warmup, ramp, total, said):
    o = FourierOptions(fourier_warmup_steps=warmup, fourier_ramp_steps=ramp)
    make_fourier(o, "fourier", total_steps=total, note=lambda **facts: None)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (said is not None) and all(said in warning for warning in warnings)


@pytest.mark.parametrize("weight", ["0", "1e-60"])
def test_a_weight_of_nothing_is_said_to_be_no_term(weight):
    (notice,) = read("--loss_type=fourier", f"--fourier_weight={weight}").notices()
    assert "no term at all" in notice and "--fourier_base_loss l2 alone" in notice
    assert not read("--loss_type=fourier", "--fourier_weight=1e-6").notices()


def test_a_term_without_the_flag_is_none():
    assert make_fourier(FourierOptions(), "l2", total_steps=3, note=lambda **facts: None) == {}


@pytest.mark.parametrize("compat", [None, "diffusers"])
def test_the_term_of_a_runs_objective_is_the_one_that_is_remembered(compat):
    noted, forward = {}, forward_of(make_objective(ObjectiveOptions(snr_gamma=5.0), sd()))
    for loss_type, base, names in (("fourier", "huber", ["fourier"]), ("l2", "l2", [])):
        o, fourier = ObjectiveOptions(loss_type=loss_type, snr_gamma=5.0), FourierOptions(fourier_base_loss=base)
        objective, memories = plain_objective(o, fourier, sd(), total_steps=3, note=noted.update, compat=compat)
        assert list(memories) == names and objective.terms == tuple(memories.values())
        alone = make_objective(ObjectiveOptions(loss_type=base, snr_gamma=5.0), sd(), compat)
        assert torch.equal(losses_of(without_terms(objective), forward), losses_of(alone, forward))
    assert noted["fourier_loss"]["fourier_base_loss"] == "huber"


# -- in the trainers --------------------------------------------------------------------------------------------------


def test_compat_diffusers_weighs_the_term_as_it_weighs_the_loss():
    o = ObjectiveOptions(loss_type="fourier", snr_gamma=5.0)
    ours, theirs = (make_objective(o, sd(), compat).plus(term(metric="complex")) for compat in (None, "diffusers"))
    forward = forward_of(ours)
    forward = replace(forward, batch=replace(forward.batch, is_class=torch.ones(len(KEYS)) > 0))
    ratio = judged(theirs, forward).losses / judged(ours, forward).losses
    assert (ratio > 1).any()
    torch.testing.assert_close(added(theirs, forward) / added(ours, forward), ratio)


def test_a_share_without_a_weight_is_refused():
    opt = read("--loss_type=fourier", "--fourier_target_share=0.1", "--fourier_weight=0")
    assert any("--fourier_target_share" in problem.what for problem in opt.problems())


def test_the_warning_of_a_term_that_only_rescales_is_for_the_squared_error_alone(caplog):
    for base, told in (("l2", True), ("huber", False)):
        caplog.clear()
        o = FourierOptions(fourier_mode="basic", fourier_metric="complex", fourier_base_loss=base)
        make_fourier(o, "fourier", total_steps=1000, note=lambda **facts: None)
        assert ("only rescales" in caplog.text) == told


@pytest.mark.trains
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_logs_the_term_records_its_settings_and_resumes_to_the_bit(trainer, tiny_sdxl, images, tmp_path):
    outs = [tmp_path / name / "lora" for name in ("whole", "resumed")]
    chosen = {**FOURIER, "fourier_config": "unified_detail", "fourier_target_share": 0.2, "checkpointing_steps": 1}
    for out, resumed in zip(outs, (None, outs[0] / "checkpoint-2"), strict=True):
        done = forked(line(trainer, tiny_sdxl, images, out, resume_from_checkpoint=resumed, **chosen),
                      trainer=trainer, log=tmp_path / "log")
        assert done.code == 0, done.output
    whole, resumed = map(metrics, outs)
    assert [row["fourier_component"] > 0 for row in whole] == [False, True, True, True]
    assert f"fourier_component {whole[-1]['fourier_component']:.4f}" in done.output
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


@pytest.mark.trains
def test_the_term_begins_at_the_same_optimizer_step_whatever_the_accumulation(tiny_sd, images, tmp_path):
    """Five images: an epoch ends within the run, and a micro-batch is not a step."""
    begins = []
    for accumulation in (1, 2):
        out = tmp_path / f"by{accumulation}"
        argv = line(TRAINERS[1], tiny_sd, images, out, gradient_accumulation_steps=accumulation, max_train_steps=5,
                    loss_type="fourier", fourier_warmup_steps=3)
        assert forked(argv, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
        begins.append([row["step"] for row in metrics(out) if row["fourier_component"] > 0])
    assert begins == [[4, 5], [4, 5]]


@pytest.mark.trains
def test_another_mode_is_another_run_and_a_preset_written_out_is_the_same(tiny_sd, images, tmp_path):
    out = tmp_path / "lora"
    first = line(TRAINERS[1], tiny_sd, images, out, **FOURIER, checkpointing_steps=2)
    assert forked(first, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
    same = line(TRAINERS[1], tiny_sd, images, tmp_path / "same", **FOURIER, fourier_config="balanced",
                resume_from_checkpoint=out / "checkpoint-2")
    assert forked(same, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
    other = line(TRAINERS[1], tiny_sd, images, tmp_path / "other", **FOURIER, fourier_mode="basic",
                 resume_from_checkpoint=out / "checkpoint-4")
    done = forked(other, trainer=TRAINERS[1], log=tmp_path / "log")
    assert done.code == 2 and "--fourier_mode" in done.output


@pytest.mark.trains
@pytest.mark.slow
def test_two_processes_log_the_component_of_one(tiny_sd, images, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    common = {**FOURIER, "fourier_target_share": 0.3, "fourier_metric": "complex"}
    one = line(TRAINERS[1], tiny_sd, images, outs[0], train_batch_size=4, **common)
    two = line(TRAINERS[1], tiny_sd, images, outs[1], train_batch_size=2, **common)
    assert forked(one, trainer=TRAINERS[1], log=tmp_path / "log").code == 0
    done = launched([*torchrun(2), f"{TRAINERS[1]}.py", *two], env={"ACCELERATE_USE_CPU": "1"})
    assert done.code == 0, done.output
    for a, b in zip(*map(metrics, outs), strict=True):
        for name in ("loss", "fourier_component"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
