"""The noise levels against Diffusers' scheduler, the laws against their densities, the parametrisations against the
identities that define them, the noise against its stated variance."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.schedules import alphas, latents, schedules
from trainkit.diffusion import (
    LEVEL_DISTRIBUTIONS,
    PREDICTIONS,
    EDMSchedule,
    Eps,
    NoiseSchedule,
    ScheduleChange,
    V,
    config_problems,
    draw_noise,
    effective_config,
    make_levels,
    make_noise,
    make_schedule,
)
from trainkit.errors import UserError
from trainkit.options import ObjectiveOptions

KEYS = [(7, 3, i) for i in range(5)]
MANY = [(0, 0, i) for i in range(400)]
U = (torch.arange(50_000) + 0.5) / 50_000  # every 1/50,000 of a law
ALMOST_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
ENDS = torch.stack([torch.tensor(0.0), ALMOST_ONE])


def options(**flags):
    return ObjectiveOptions(**flags)


def spread(schedule, points=9):
    """Levels from the least to the most noisy."""
    return schedule.at(torch.linspace(0, schedule.num_train_timesteps - 0.5, points, dtype=torch.float64))


def in_double(level):
    return replace(level, a=level.a.double(), s=level.s.double())


# Parametrisations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_target_decodes_to_x0(name):
    schedule = schedules()[name]
    pred, level, (x0, n) = schedule.prediction, spread(schedule), latents(9)
    z = pred.add_noise(x0, n, level)
    torch.testing.assert_close(pred.to_x0(pred.target(x0, n, level), z, level), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", schedules())
def test_output_error_is_x0_gain_times_x0_error(name):
    schedule = schedules()[name]
    pred, level, (x0, n) = schedule.prediction, in_double(spread(schedule)), latents(9).double()
    z, target = pred.add_noise(x0, n, level), pred.target(x0, n, level)
    out = target + 0.1 * latents(9, seed=1)[0].double()
    f_err = ((out - target) ** 2).flatten(1).sum(1)
    x0_err = ((pred.to_x0(out, z, level) - x0) ** 2).flatten(1).sum(1)
    # v's gain needs a² + s² = 1, which the schedule's fp32 numbers keep to about 1e-7
    torch.testing.assert_close(f_err, pred.x0_gain(level) * x0_err, rtol=1e-5, atol=0)


def test_v_decodes_to_x0_where_the_signal_is_gone():
    schedule, (x0, n) = schedules()["zero-SNR v"], latents(1)
    level = schedule.at(torch.tensor([999]))
    z = V().add_noise(x0, n, level)
    torch.testing.assert_close(z, n)
    torch.testing.assert_close(V().to_x0(V().target(x0, n, level), z, level), x0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_noising_and_targets_equal_diffusers(name):
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name)
    pred, t, (x0, n) = PREDICTIONS[name](), torch.tensor([0, 10, 500, 998, 999]), latents(5)
    level = NoiseSchedule(ddpm.alphas_cumprod, name).at(t)
    assert torch.equal(pred.add_noise(x0, n, level), ddpm.add_noise(x0, n, t))
    assert torch.equal(pred.target(x0, n, level), n if name == "epsilon" else ddpm.get_velocity(x0, n, t))


def test_parametrisations_without_settings_are_interchangeable():
    assert Eps() == Eps() and Eps() != V()


# Schedules ------------------------------------------------------------------------------------------------------------


def test_level_tells_the_network_its_timestep():
    t = torch.tensor([0, 42, 999])
    level = NoiseSchedule(alphas(), "epsilon").at(t)
    assert torch.equal(level.cond, t)
    torch.testing.assert_close(level.time, torch.tensor([0, 0.042, 0.999]))


def test_a_level_moves_as_one():
    level = EDMSchedule(sigma_data=0.7).nearest(torch.tensor([1.0])).to(torch.device("meta"))
    assert level.a.is_meta and level.s.is_meta and level.cond.is_meta and level.time.is_meta
    assert level.sigma_data == 0.7


@pytest.mark.parametrize("last", [0.0, 2.0**-24])
def test_epsilon_at_zero_terminal_snr_is_refused_with_the_way_out(last):
    ac = alphas(zero_terminal_snr=True)
    ac[-1] = last
    with pytest.raises(UserError, match="--prediction_type v_prediction"):
        NoiseSchedule(ac, "epsilon")
    assert NoiseSchedule(ac, "v_prediction").ends_at_zero_snr


def test_unknown_parametrisation_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'sample'(.|\n)*epsilon, v_prediction"):
        NoiseSchedule(alphas(), "sample")
    with pytest.raises(UserError, match="'sample'"):
        make_schedule({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"})


SDXL = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
        "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "timestep_spacing": "leading"}


def test_betas_are_rescaled_before_the_levels_are_made():
    config = effective_config(SDXL, ScheduleChange("v_prediction", rescale_betas_zero_snr=True))
    schedule = make_schedule(config)
    torch.testing.assert_close(schedule.a**2, alphas(zero_terminal_snr=True), rtol=1e-3, atol=1e-6)
    assert schedule.at(torch.tensor([999])).snr == 0
    assert config["timestep_spacing"] == "trailing"
    torch.testing.assert_close(make_schedule(SDXL).a ** 2, alphas(), rtol=1e-4, atol=0)


def test_rescaling_is_refused_where_it_cannot_be():
    rescaled = ScheduleChange(rescale_betas_zero_snr=True)
    (epsilon,) = config_problems(effective_config(SDXL, rescaled))
    (edm,) = config_problems(effective_config({"_class_name": "EDMEulerScheduler"}, rescaled))
    assert "--prediction_type v_prediction" in epsilon.fix and "EDM" in edm.what


def test_flags_change_a_config_only_where_they_are_given():
    assert effective_config(SDXL) == effective_config(SDXL, ScheduleChange.from_options(options())) == SDXL
    asked = options(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert ScheduleChange.from_options(asked) == ScheduleChange("v_prediction", rescale_betas_zero_snr=True)


def test_an_edm_config_gives_an_edm_schedule_with_its_numbers():
    config = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 120.0, "sigma_data": 1.0, "rho": 5.0,
              "num_train_timesteps": 500, "sigma_schedule": "exponential", "prediction_type": "v_prediction"}
    assert make_schedule(config) == EDMSchedule(0.01, 120.0, 1.0, 5.0, "v_prediction", 500, "exponential")
    assert make_schedule({"_class_name": "EDMDPMSolverMultistepScheduler"}) == EDMSchedule()


@pytest.mark.parametrize("name", ["epsilon", "zero-SNR v"])
def test_a_sigma_goes_to_the_nearest_timestep_in_ln_sigma(name):
    schedule = schedules()[name]
    table = schedule.s.double() / schedule.a.double()
    sigma = torch.logspace(-4, 5, 400, dtype=torch.float64)
    distance = (table.log()[None] - sigma.log()[:, None]).abs()
    found = schedule.nearest(sigma).cond
    torch.testing.assert_close(distance.gather(1, found[:, None])[:, 0], distance.min(1).values, rtol=0, atol=1e-12)
    assert torch.equal(schedule.nearest(table[:-1]).cond, torch.arange(999))


# Distributions of the levels ------------------------------------------------------------------------------------------


def levels_of(schedule, u=U, compat=None, **flags):
    return make_levels(options(**flags), schedule, compat)(u)


def distribution_flags(distribution):
    """The flags that ask for a distribution by its name in the table."""
    flag = "edm_sigmas" if distribution in ("lognormal", "karras") else "timestep_sampling"
    return {flag: distribution}


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("distribution", [name for name in LEVEL_DISTRIBUTIONS if name != "diffusers_grid"])
def test_every_distribution_is_finite_at_both_ends_and_stays_within_the_timesteps(distribution, name):
    level = levels_of(schedules()[name], ENDS, min_timestep=100, max_timestep=900, **distribution_flags(distribution))
    assert all(v.isfinite().all() for v in (level.a, level.s, level.cond, level.time, level.snr))
    # an EDM level is a σ in fp32: its place may lie a rounding error outside
    assert (level.time >= 0.1 - 1e-6).all() and (level.time <= 0.9 + 1e-6).all()


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode", "cosmap"])
def test_a_distribution_of_timesteps_is_a_level_per_u_alone(distribution):
    schedule = schedules()["epsilon"]
    whole, part = (levels_of(schedule, u, timestep_sampling=distribution).cond for u in (U[:100], U[50:53]))
    assert torch.equal(whole[50:53], part)


def test_extreme_settings_of_the_laws_stay_within_the_schedule():
    for flags in ({"timestep_sampling": "logit_normal", "logit_mean": 60.0},
                  {"timestep_sampling": "logit_normal", "logit_mean": -60.0, "logit_std": 0.1},
                  {"edm_sigmas": "lognormal", "edm_p_mean": 90.0}, {"edm_sigmas": "lognormal", "edm_p_mean": -90.0}):
        for schedule in schedules().values():
            level = levels_of(schedule, ENDS, **flags)
            assert level.s.isfinite().all() and (level.time >= 0).all() and (level.time <= 1).all(), flags


def test_draws_reach_the_first_and_the_last_timestep_and_no_further():
    assert levels_of(schedules()["epsilon"], ENDS).cond.tolist() == [0, 999]


def test_every_timestep_is_drawn_equally_often_unless_asked_otherwise():
    t = levels_of(schedules()["epsilon"]).cond
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 50))


def test_timesteps_are_drawn_from_the_first_named_to_before_the_last():
    t = levels_of(schedules()["epsilon"], min_timestep=29, max_timestep=529).cond
    counts = t.bincount(minlength=1000)
    assert (counts[29:529] == 100).all() and counts.sum() == counts[29:529].sum()


def test_timesteps_the_model_lacks_are_refused():
    with pytest.raises(UserError, match="below 1001"):
        levels_of(schedules()["epsilon"], max_timestep=1001)
    with pytest.raises(UserError, match="no finite σ"):
        levels_of(schedules()["zero-SNR v"], edm_sigmas="lognormal", min_timestep=999)


def quantiles_agree(drawn, density):
    """Whether `drawn`, a law at evenly spaced u, follows a density on 0..1 given as a function."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mass = density(grid)
    below = (mass.cumsum(0) / mass.sum())
    at = torch.searchsorted(grid, drawn.double().sort().values).clamp(max=len(grid) - 1)
    return (below[at] - U.double()).abs().max() < 2e-3


@pytest.mark.parametrize(("flags", "density"), [
    # Esser et al. 2024, §3.1: the densities, of which ours are the inverse distribution functions
    ({"timestep_sampling": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8},
     lambda t: torch.exp(-(torch.logit(t) - 0.3) ** 2 / (2 * 0.8**2)) / (t * (1 - t))),
    ({"timestep_sampling": "cosmap"}, lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
])
def test_a_law_follows_its_density(flags, density):
    position = levels_of(EDMSchedule(), **flags).time  # not rounded to timesteps
    assert quantiles_agree(position, density)


@pytest.mark.parametrize("flags", [
    {"timestep_sampling": "uniform"}, {"timestep_sampling": "mode", "mode_scale": 1.29},
    {"timestep_sampling": "mode", "mode_scale": -1.0}, {"timestep_sampling": "logit_normal"}])
def test_laws_draw_what_diffusers_draws(flags, monkeypatch):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    normal = torch.special.ndtri(U.double()).float()
    monkeypatch.setattr(torch, "rand", lambda *a, **k: U)
    monkeypatch.setattr(torch, "normal", lambda *a, **k: normal)
    theirs = compute_density_for_timestep_sampling(
        flags["timestep_sampling"], len(U), logit_mean=0.0, logit_std=1.0, mode_scale=flags.get("mode_scale"))
    ours = levels_of(EDMSchedule(), **flags).time
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_mode_scale_moves_weight_between_the_middle_and_the_ends():
    middle, ends = (levels_of(EDMSchedule(), timestep_sampling="mode", mode_scale=s).time for s in (1.29, -1.0))
    assert (middle - 0.5).abs().mean() < 0.25 - 0.02 and (ends - 0.5).abs().mean() > 0.25 + 0.02


def test_an_edm_model_and_the_edm_flag_draw_log_normal_sigmas():
    for schedule, flags in ((EDMSchedule(1e-9, 1e9), {}),
                            (schedules()["epsilon"], {"do_edm_style_training": True, "edm_p_mean": -0.4})):
        level = levels_of(schedule, **flags)
        ln = (level.s / level.a).log()
        wanted = flags.get("edm_p_mean", -1.2)
        assert ln.median().item() == pytest.approx(wanted, abs=0.01)
        if not flags:
            assert ln.std().item() == pytest.approx(1.2, rel=0.01)
            torch.testing.assert_close(level.cond, ln / 4)
        else:
            assert level.cond.dtype == torch.long and torch.equal(level.a, schedule.a[level.cond])


def test_a_law_that_is_asked_for_takes_the_place_of_the_default():
    uniform = levels_of(schedules()["epsilon"])
    for flags in ({"timestep_sampling": "uniform"}, {"edm_sigmas": "uniform"}):
        level = levels_of(schedules()["epsilon"], do_edm_style_training=True, **flags)
        assert torch.equal(level.cond, uniform.cond)
    ln = levels_of(EDMSchedule(), edm_sigmas="uniform").s.double().log()
    torch.testing.assert_close(ln, math.log(0.002) + U.double() * math.log(80 / 0.002), rtol=0, atol=1e-5)


def test_log_normal_flags_under_another_law_are_said_to_have_no_effect(caplog):
    for schedule, flags in ((schedules()["epsilon"], {}), (EDMSchedule(), {"edm_sigmas": "karras"})):
        caplog.clear()
        levels_of(schedule, edm_p_mean=0.0, **flags)
        assert caplog.text.count("--edm_p_mean has no effect") == 1 and "edm_p_std" not in caplog.text
    caplog.clear()
    levels_of(EDMSchedule(), edm_p_mean=0.0)
    levels_of(schedules()["epsilon"])
    assert not caplog.text


def test_karras_sigmas_are_evenly_spaced_in_their_seventh_root():
    root = levels_of(EDMSchedule(), edm_sigmas="karras").s.double() ** (1 / 7)
    step = (80 ** (1 / 7) - 0.002 ** (1 / 7)) / len(U)
    torch.testing.assert_close(root, 0.002 ** (1 / 7) + (U.double() * len(U)) * step, rtol=1e-6, atol=0)


# Noise ----------------------------------------------------------------------------------------------------------------

SETTINGS = [{}, {"offset": 0.1}, {"iterations": 6},
            {"offset": 0.1, "iterations": 8, "discount": 0.8, "perturbation": 0.1}]


def noise(shape, keys, **settings):
    """What targets know of the noise [B,C,h,w]."""
    return draw_noise(shape, keys, **settings)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_noise_depends_on_its_key_alone(settings):
    whole, added = draw_noise((4, 8, 8), KEYS, **settings)
    torch.manual_seed(0)
    part, added_to_part = draw_noise((4, 8, 8), KEYS[3:], **settings)
    assert torch.equal(part, whole[3:])
    assert torch.equal(added_to_part, added[3:])
    assert len({row.sum().item() for row in whole}) == len(KEYS)


def test_offset_moves_channel_means_and_leaves_the_rest_of_the_noise():
    plain, moved = noise((4, 8, 8), MANY), noise((4, 8, 8), MANY, offset=0.5)
    shift = moved - plain
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
    assert shift.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.05)
    assert moved.var().item() == pytest.approx(1 + 0.5**2, rel=0.05)
    assert plain.var().item() == pytest.approx(1, rel=0.01)


def power(n):
    """Mean power of the lowest spatial frequencies and of the highest ones."""
    spectrum = torch.fft.fft2(n, norm="ortho").abs() ** 2
    return spectrum[..., :2, :2].mean().item(), spectrum[..., 6:10, 6:10].mean().item()


@pytest.mark.parametrize("discount", [0.3, 0.9])
def test_multires_noise_has_variance_one_and_its_power_in_low_frequencies(discount):
    n = noise((4, 16, 24), MANY, iterations=6, discount=discount)
    assert n.var().item() == pytest.approx(1, rel=0.05)
    low, high = power(n)
    assert low > 1.2 and high < 0.99 and low / high > {0.3: 1.4, 0.9: 8}[discount]


def test_one_full_resolution_of_multires_noise_is_white_again():
    n = noise((4, 16, 16), MANY, iterations=1)
    low, high = power(n)
    assert low == pytest.approx(1, rel=0.1) and high == pytest.approx(1, rel=0.1)


def test_input_perturbation_adds_noise_that_the_target_does_not_know():
    n, added = draw_noise((4, 8, 8), MANY, perturbation=0.5)
    plain, same = draw_noise((4, 8, 8), MANY)
    assert torch.equal(n, plain) and same is plain
    extra = added - n
    assert extra.std().item() == pytest.approx(0.5, rel=0.02)
    assert (extra * n).mean().item() == pytest.approx(0, abs=0.01)


def test_the_options_make_the_noise():
    asked = options(noise_offset=0.1, multires_noise_iterations=3, multires_noise_discount=0.5, input_perturbation=0.2)
    settings = {"offset": 0.1, "iterations": 3, "discount": 0.5, "perturbation": 0.2}
    for o, wanted in ((options(), {}), (asked, settings)):
        made, direct = make_noise(o)((4, 8, 8), KEYS), draw_noise((4, 8, 8), KEYS, **wanted)
        assert all(torch.equal(*pair) for pair in zip(made, direct, strict=True))
    assert len({float(part.sum()) for part in direct}) == 2, "the input is perturbed"
