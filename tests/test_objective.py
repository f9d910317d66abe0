"""Loss weights in the currency of the x0 error, and losses that stay per sample."""

import pytest
import torch

from tests.test_diffusion import alphas, latents
from trainkit.diffusion import PREDICTIONS, Eps, NoiseSchedule, V
from trainkit.objective import WEIGHTS, Objective, make_objective, per_sample
from trainkit.options import ObjectiveOptions

GAMMA = 5.0
ALL = torch.arange(1000)


def setup(name, *, gamma=None, compat=None, zero_terminal_snr=False, t=ALL):
    """(objective, its level at timesteps t)."""
    level = NoiseSchedule(alphas(zero_terminal_snr=zero_terminal_snr), name).level(t)
    return make_objective(ObjectiveOptions(snr_gamma=gamma), PREDICTIONS[name](), compat), level


def weight_on_output(name, **kwargs):
    """(factor on |out − target|² at every timestep, snr), both [1000]."""
    objective, level = setup(name, **kwargs)
    return objective.pred.loss_weight(level, objective.weight(level)), level.snr


def losses_of(objective, level, *, share=1.0, seed=0):
    """(losses [B], plain squared error per sample [B]) for a random output."""
    x0, n = latents(len(level.a), seed=seed)
    z = objective.pred.add_noise(x0, n, level)
    out = latents(len(level.a), seed=seed + 1)[0]
    mse = per_sample((out - objective.pred.target(x0, n, z, level)) ** 2)
    share = torch.as_tensor(share).expand(len(level.a))
    return objective(out, x0=x0, z=z, n=n, level=level, share=share), mse


@pytest.mark.parametrize(("name", "compat", "formula"), [
    ("epsilon", None, lambda snr: snr.clamp(max=GAMMA) / snr),
    ("v_prediction", None, lambda snr: snr.clamp(max=GAMMA) / (snr + 1)),
    ("epsilon", "diffusers", lambda snr: snr.clamp(max=GAMMA) / snr),
    ("v_prediction", "diffusers", lambda snr: snr.clamp(max=GAMMA) / snr + 1),
])
def test_min_snr_weight_on_the_networks_output(name, compat, formula):
    weight, snr = weight_on_output(name, gamma=GAMMA, compat=compat)
    torch.testing.assert_close(weight, formula(snr))


@pytest.mark.parametrize("compat", [None, "diffusers"])
def test_without_gamma_every_timestep_weighs_exactly_one(compat):
    for name in PREDICTIONS:
        assert torch.equal(weight_on_output(name, compat=compat)[0], torch.ones(1000))


def test_one_gamma_means_one_worth_of_x0_whatever_the_network_predicts():
    (eps, level), (v, _) = setup("epsilon", gamma=GAMMA), setup("v_prediction", gamma=GAMMA)
    assert torch.equal(eps.weight(level), v.weight(level))


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_no_loss_is_nan_on_a_zero_terminal_snr_schedule(gamma, compat):
    objective, level = setup("v_prediction", gamma=gamma, compat=compat, zero_terminal_snr=True)
    assert level.snr[-1] == 0
    losses, _ = losses_of(objective, level)
    assert losses.isfinite().all()
    if gamma and compat is None:
        assert losses[-1] == 0


def test_every_weight_is_finite_and_positive_on_an_ordinary_schedule():
    for name, weight in WEIGHTS.items():
        for pred in (Eps(), V()):
            level = NoiseSchedule(alphas(), "epsilon").level(ALL)
            w = weight(level, pred, ObjectiveOptions(snr_gamma=GAMMA))
            assert w.shape == (1000,) and w.isfinite().all() and (w > 0).all(), name


@pytest.mark.parametrize("name", PREDICTIONS)
def test_uniform_weight_is_plain_mse(name):
    losses, mse = losses_of(*setup(name))
    assert torch.equal(losses, mse)


def test_losses_are_per_sample_and_blind_to_their_neighbours():
    objective, level = setup("epsilon", gamma=GAMMA, t=torch.tensor([10, 500, 990]))
    losses, _ = losses_of(objective, level)
    assert losses.shape == (3,)
    x0, n = latents(3)
    z, out = objective.pred.add_noise(x0, n, level), latents(3, seed=1)[0]
    one = NoiseSchedule(alphas(), "epsilon").level(torch.tensor([500]))
    alone = objective(out[1:2], x0=x0[1:2], z=z[1:2], n=n[1:2], level=one, share=torch.ones(1))
    torch.testing.assert_close(alone, losses[1:2])


def test_share_scales_each_sample_under_every_weight():
    share = torch.tensor([1.0, 0.5, 0.0])
    for gamma in (None, GAMMA):
        objective, level = setup("epsilon", gamma=gamma, t=torch.tensor([10, 500, 990]))
        whole, shared = losses_of(objective, level)[0], losses_of(objective, level, share=share)[0]
        torch.testing.assert_close(shared, whole * share)


def test_half_precision_output_gives_an_fp32_loss_with_a_gradient():
    objective, level = setup("epsilon", gamma=GAMMA, t=torch.tensor([10, 500]))
    x0, n = latents(2)
    out = (n + 1e-3).bfloat16().requires_grad_()
    losses = objective(out, x0=x0, z=objective.pred.add_noise(x0, n, level), n=n, level=level, share=torch.ones(2))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert out.grad.isfinite().all() and out.grad.abs().sum() > 0


@pytest.mark.parametrize("name", PREDICTIONS)
def test_terms_see_the_x0_the_output_implies(name):
    pred, level = PREDICTIONS[name](), NoiseSchedule(alphas(), name).level(torch.tensor([10, 500]))
    terms = ((3.0, lambda x0_hat, x0: per_sample((x0_hat - x0) ** 2)),)
    with_terms = Objective(pred, pred.x0_gain, terms=terms)
    losses, mse = losses_of(with_terms, level)
    torch.testing.assert_close(losses, mse + 3 * mse / pred.x0_gain(level), rtol=1e-3, atol=1e-5)
