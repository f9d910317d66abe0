"""The noise levels against Diffusers' scheduler, the parametrisations against the identities that define them."""

import pytest
import torch

from trainkit.diffusion import PREDICTIONS, Eps, Level, Noise, NoiseSchedule, UniformTimesteps, V, make_levels
from trainkit.errors import UserError
from trainkit.options import ObjectiveOptions

KEYS = [(7, 3, i) for i in range(5)]


def alphas(*, zero_terminal_snr=False):
    """SDXL's ᾱ (scaled_linear betas); rescaled as in Lin et al. 2024, algorithm 1, on request -> [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return (a**2).float()


def latents(batch, *, seed=0):
    """x0, n [B,4,8,8]."""
    return torch.randn(2, batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_decodes_to_x0(name):
    pred, t = PREDICTIONS[name](), torch.tensor([0, 1, 250, 600, 999])
    level, (x0, n) = NoiseSchedule(alphas(), name).level(t), latents(5)
    z = pred.add_noise(x0, n, level)
    torch.testing.assert_close(pred.to_x0(pred.target(x0, n, z, level), z, level), x0, rtol=1e-4, atol=1e-4)


def test_v_decodes_to_x0_where_the_signal_is_gone():
    schedule, (x0, n) = NoiseSchedule(alphas(zero_terminal_snr=True), "v_prediction"), latents(1)
    level = schedule.level(torch.tensor([999]))
    z = V().add_noise(x0, n, level)
    torch.testing.assert_close(z, n)
    torch.testing.assert_close(V().to_x0(V().target(x0, n, z, level), z, level), x0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_output_error_is_x0_gain_times_x0_error(name):
    pred, t = PREDICTIONS[name](), torch.tensor([0, 100, 400, 800, 999])
    level, (x0, n) = NoiseSchedule(alphas(), name).level(t), latents(5)
    level, x0, n = Level(level.a.double(), level.s.double(), t), x0.double(), n.double()
    z = pred.add_noise(x0, n, level)
    target = pred.target(x0, n, z, level)
    out = target + 0.1 * latents(5, seed=1)[0].double()
    f_err = ((out - target) ** 2).flatten(1).sum(1)
    x0_err = ((pred.to_x0(out, z, level) - x0) ** 2).flatten(1).sum(1)
    # v's gain needs a² + s² = 1, which the schedule's fp32 numbers keep to about 1e-7
    torch.testing.assert_close(f_err, pred.x0_gain(level) * x0_err, rtol=1e-3 if name == "epsilon" else 1e-5, atol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_noising_and_targets_equal_diffusers(name):
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name)
    pred, t, (x0, n) = PREDICTIONS[name](), torch.tensor([0, 10, 500, 998, 999]), latents(5)
    level = NoiseSchedule(ddpm.alphas_cumprod, name).level(t)
    z = pred.add_noise(x0, n, level)
    assert torch.equal(z, ddpm.add_noise(x0, n, t))
    assert torch.equal(pred.target(x0, n, z, level), n if name == "epsilon" else ddpm.get_velocity(x0, n, t))


def test_level_tells_the_network_its_timestep():
    t = torch.tensor([0, 42, 999])
    assert torch.equal(NoiseSchedule(alphas(), "epsilon").level(t).cond, t)


def test_draws_reach_the_first_and_the_last_timestep_and_no_further():
    almost_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    level = UniformTimesteps(NoiseSchedule(alphas(), "epsilon"))(torch.stack([torch.tensor(0.0), almost_one]))
    assert level.cond.tolist() == [0, 999]


def test_the_options_levels_are_uniform_timesteps_of_the_schedule():
    schedule, u = NoiseSchedule(alphas(), "epsilon"), torch.linspace(0, 0.999, 50)
    assert torch.equal(make_levels(ObjectiveOptions(), schedule)(u).cond, UniformTimesteps(schedule)(u).cond)


def test_every_timestep_is_drawn_equally_often():
    u = (torch.arange(50_000) + 0.5) / 50_000
    t = UniformTimesteps(NoiseSchedule(alphas(), "epsilon"))(u).cond
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 50))


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


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_noise_depends_on_its_key_alone(offset):
    whole = Noise(offset)((4, 8, 8), KEYS)
    torch.manual_seed(0)
    assert torch.equal(Noise(offset)((4, 8, 8), KEYS[3:]), whole[3:])
    assert len({row.sum().item() for row in whole}) == len(KEYS)


def test_offset_moves_channel_means_and_leaves_the_rest_of_the_noise():
    keys = [(0, 0, i) for i in range(400)]
    plain, moved = Noise()((4, 8, 8), keys), Noise(0.5)((4, 8, 8), keys)
    shift = moved - plain
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
    assert shift.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.05)
    assert moved.var().item() == pytest.approx(1 + 0.5**2, rel=0.05)
    assert plain.var().item() == pytest.approx(1, rel=0.01)


def test_parametrisations_without_settings_are_interchangeable():
    assert Eps() == Eps() and Eps() != V()
