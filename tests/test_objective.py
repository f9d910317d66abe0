"""Loss weights in the currency of the x0 error, and losses that stay per sample, finite and composable."""

import itertools
import math

import pytest
import torch

from tests.support.made_up_pass import batch_of
from tests.support.schedules import alphas, latents, schedules
from trainkit.diffusion import PREDICTIONS, EDMSchedule, Eps, NoiseSchedule, V
from trainkit.losses.objective import ERRORS, HUBER_SCHEDULES, WEIGHTS, Objective, make_objective, on_output, per_sample
from trainkit.options import ObjectiveOptions

GAMMA = 5.0
ALL = torch.arange(1000)
SIGMAS = torch.logspace(math.log10(0.002), math.log10(80), 500, dtype=torch.float64)
ASKED = ["uniform", *(name for name in WEIGHTS if name != "min_snr_diffusers")]  # names --loss_weighting takes


def every_level(schedule):
    """All timesteps, or the whole range of σ."""
    return schedule.nearest(SIGMAS) if isinstance(schedule, EDMSchedule) else schedule.at(ALL)


def setup(name, *, gamma=None, compat=None, zero_terminal_snr=False, t=ALL, **flags):
    """(objective, its level at timesteps t)."""
    schedule = NoiseSchedule(alphas(zero_terminal_snr=zero_terminal_snr), name)
    return make_objective(ObjectiveOptions(snr_gamma=gamma, **flags), schedule, compat), schedule.at(t)


def weight_on_output(name, **kwargs):
    """(factor on |out − target|² at every timestep, snr), both [1000]."""
    objective, level = setup(name, **kwargs)
    return objective.weight(level), level.snr


def samples(count, **changes):
    """A micro-batch of `count` instances that count 1 each."""
    return batch_of([(0, 0, i) for i in range(count)], **changes)


def losses_of(objective, level, *, seed=0, **changes):
    """(losses [B], plain squared error per sample [B]) for a random output; `changes` are those of the batch."""
    x0, n = latents(len(level.a), seed=seed)
    z = objective.pred.add_noise(x0, n, level)
    out = latents(len(level.a), seed=seed + 1)[0]
    mse = per_sample((out - objective.pred.target(x0, n, level)) ** 2)
    return objective(out, x0=x0, z=z, n=n, level=level, batch=samples(len(level.a), **changes)), mse


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "compat", "formula"), [
    ("epsilon", None, lambda snr: snr.clamp(max=GAMMA) / snr),
    ("v_prediction", None, lambda snr: snr.clamp(max=GAMMA) / (snr + 1)),
    ("epsilon", "diffusers", lambda snr: snr.clamp(max=GAMMA) / snr),
    ("v_prediction", "diffusers", lambda snr: snr.clamp(max=GAMMA) / snr + 1),
])
def test_min_snr_weight_on_the_networks_output(name, compat, formula):
    weight, snr = weight_on_output(name, gamma=GAMMA, compat=compat)
    torch.testing.assert_close(weight, formula(snr))


OUTPUT_WEIGHTS = {  # weighting -> what it is on the output of an ε network and of a v or EDM one, from the snr alone
    "uniform": (lambda snr: torch.ones_like(snr), lambda snr: torch.ones_like(snr)),
    "min_snr": (lambda snr: snr.clamp(max=GAMMA) / snr, lambda snr: snr.clamp(max=GAMMA) / (snr + 1)),
    "soft_min_snr": (lambda snr: GAMMA / (snr + GAMMA), lambda snr: snr * GAMMA / (snr + GAMMA) / (snr + 1)),
    "debiased": (lambda snr: 1 / snr.sqrt(), lambda snr: snr.sqrt() / (snr + 1)),
    "p2": (lambda snr: 1 / (2 + snr) ** 0.5, lambda snr: snr / (2 + snr) ** 0.5 / (snr + 1)),
    "snr": (lambda snr: torch.ones_like(snr), lambda snr: snr / (snr + 1)),
    "edm": (lambda snr: (snr + 1) / snr, lambda snr: torch.ones_like(snr)),
}


@pytest.mark.parametrize("weighting", OUTPUT_WEIGHTS)
@pytest.mark.parametrize("name", schedules())
def test_a_weighting_on_the_networks_output_is_its_papers(weighting, name):
    schedule = schedules()[name]
    level = every_level(schedule)
    o = ObjectiveOptions(loss_weighting=weighting, snr_gamma=GAMMA, p2_k=2.0, p2_gamma=0.5)
    objective = make_objective(o, schedule)
    snr = ((level.a.double() * level.sigma_data) / level.s.double()) ** 2
    formula = OUTPUT_WEIGHTS[weighting][name != "epsilon"]
    torch.testing.assert_close(objective.weight(level).double(), formula(snr), rtol=1e-5, atol=1e-12)


def test_x0_weighting_is_the_plain_error_on_x0():
    for name, schedule in schedules().items():
        if name == "zero-SNR v":
            continue  # there the output says nothing of x0 at the last level
        level = schedule.at(torch.tensor([1.0, 300.0, 700.0, 998.0], dtype=torch.float64))
        objective = make_objective(ObjectiveOptions(loss_weighting="x0"), schedule)
        x0, n = latents(4)
        z, out = objective.pred.add_noise(x0, n, level), latents(4, seed=1)[0]
        losses = objective(out, x0=x0, z=z, n=n, level=level, batch=samples(4))
        torch.testing.assert_close(losses, per_sample((objective.pred.to_x0(out, z, level) - x0) ** 2),
                                   rtol=2e-3, atol=1e-7)


def test_the_edm_weight_is_lambda_of_sigma():
    level = EDMSchedule(sigma_data=0.5).nearest(SIGMAS)
    o = ObjectiveOptions()
    objective = make_objective(o, EDMSchedule())
    lambda_ = (SIGMAS**2 + 0.25) / (SIGMAS * 0.5) ** 2  # Karras et al. 2022, table 1, on |x̂0 − x0|²
    on_x0 = objective.weight(level) * objective.pred.x0_gain(level)
    for found in (WEIGHTS["edm"](level, objective.pred, o) / 0.25, on_x0):
        torch.testing.assert_close(found.double(), lambda_, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ASKED)
@pytest.mark.parametrize("name", schedules())
def test_every_weight_is_finite_at_every_level(weighting, name):
    schedule = schedules()[name]
    level = every_level(schedule)
    o = ObjectiveOptions(loss_weighting=weighting, snr_gamma=GAMMA)
    objective = make_objective(o, schedule)
    x0_weight = [of_x0(level, objective.pred, o) for name, of_x0 in WEIGHTS.items() if name == weighting]
    for weight in (objective.weight(level), objective.weight(level) * objective.pred.x0_gain(level), *x0_weight):
        assert weight.shape == level.s.shape and weight.isfinite().all() and (weight >= 0).all()
        assert (weight[level.snr > 0] > 0).all()


@pytest.mark.parametrize("weighting", ASKED)
def test_every_weight_is_finite_without_noise_to_speak_of(weighting):
    level = EDMSchedule(1e-9, 1e9).nearest(torch.tensor([1e-9, 1e9], dtype=torch.float64))
    objective = make_objective(ObjectiveOptions(loss_weighting=weighting, snr_gamma=GAMMA), EDMSchedule())
    assert objective.weight(level).isfinite().all()


@pytest.mark.parametrize("compat", [None, "diffusers"])
def test_without_gamma_every_timestep_weighs_exactly_one(compat):
    for name in PREDICTIONS:
        assert torch.equal(weight_on_output(name, compat=compat)[0], torch.ones(1000))


def test_an_edm_model_and_the_edm_flag_weigh_by_lambda_unless_gamma_or_a_weighting_is_given():
    objective = make_objective(ObjectiveOptions(), EDMSchedule())
    assert torch.equal(objective.weight(EDMSchedule().nearest(SIGMAS)).round(decimals=5), torch.ones(500))
    weight, snr = weight_on_output("epsilon", do_edm_style_training=True)
    torch.testing.assert_close(weight, (snr + 1) / snr)
    for flags in ({"gamma": GAMMA}, {"gamma": GAMMA, "loss_weighting": "min_snr"}):
        weight, snr = weight_on_output("epsilon", do_edm_style_training=True, **flags)
        torch.testing.assert_close(weight, snr.clamp(max=GAMMA) / snr)


def test_one_gamma_means_one_worth_of_x0_whatever_the_network_predicts():
    (eps, level), (v, _) = setup("epsilon", gamma=GAMMA), setup("v_prediction", gamma=GAMMA)
    o = ObjectiveOptions(snr_gamma=GAMMA)
    x0_weight = WEIGHTS["min_snr"](level, Eps(), o)
    assert torch.equal(x0_weight, WEIGHTS["min_snr"](level, V(), o))
    for objective in (eps, v):
        assert torch.equal(objective.weight(level), objective.pred.loss_weight(level, x0_weight))


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_no_loss_is_nan_on_a_zero_terminal_snr_schedule(gamma, compat):
    objective, level = setup("v_prediction", gamma=gamma, compat=compat, zero_terminal_snr=True)
    assert level.snr[-1] == 0
    losses, _ = losses_of(objective, level)
    assert losses.isfinite().all()
    if gamma and compat is None:
        assert losses[-1] == 0


# Errors ---------------------------------------------------------------------------------------------------------------


def loss_for(e, c, loss_type, schedule="constant"):
    """The loss when every number of an ε network is off by e, at t = 0, 300, 999 -> [3]."""
    objective, level = setup("epsilon", t=torch.tensor([0, 300, 999]), loss_type=loss_type, huber_c=c,
                             huber_schedule=schedule)
    x0, n = latents(3)
    out = n + e
    return objective(out, x0=x0, z=x0, n=n, level=level, batch=samples(3)).double(), level


@pytest.mark.parametrize(("loss_type", "formula"), [
    ("l2", lambda e, c: e**2), ("l1", lambda e, c: e), ("huber", lambda e, c: 2 * c * (math.sqrt(e**2 + c**2) - c)),
    ("smooth_l1", lambda e, c: 2 * (math.sqrt(e**2 + c**2) - c)),
])
@pytest.mark.parametrize("e", [0.001, 0.1, 3.0])
def test_an_error_is_its_formula(loss_type, formula, e):
    found, _ = loss_for(e, 0.1, loss_type)
    torch.testing.assert_close(found, torch.full((3,), formula(e, 0.1), dtype=torch.float64), rtol=2e-3, atol=0)


def test_huber_keeps_the_digits_and_the_gradient_of_small_errors():
    e = torch.tensor([0.0, 1e-5], requires_grad=True)
    _, level = setup("epsilon", t=torch.tensor([10, 500]))
    loss = ERRORS["huber"](ObjectiveOptions(huber_c=1.0))(e, level)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 1e-10]), rtol=1e-5, atol=0)
    torch.testing.assert_close(e.grad, torch.tensor([0.0, 2e-5]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("schedule", "formula"), [
    ("constant", lambda t, sigma: 0.2), ("exponential", lambda t, sigma: math.exp(t / 1000 * math.log(0.2))),
    ("snr", lambda t, sigma: 0.8 / (1 + sigma) ** 2 + 0.2),
])
def test_the_huber_schedules_are_those_of_the_paper(schedule, formula):
    _, level = loss_for(1.0, 0.2, "huber", schedule)
    sigmas = (level.s / level.a).tolist()
    wanted = [formula(t, sigma) for t, sigma in zip([0, 300, 999], sigmas, strict=True)]
    torch.testing.assert_close(HUBER_SCHEDULES[schedule](level, 0.2), torch.tensor(wanted))
    huber = [2 * c * (math.sqrt(1 + c**2) - c) for c in wanted]
    torch.testing.assert_close(loss_for(1.0, 0.2, "huber", schedule)[0], torch.tensor(huber, dtype=torch.float64),
                               rtol=1e-4, atol=0)


# Composition ----------------------------------------------------------------------------------------------------------

COMBINATIONS = list(itertools.product(ASKED, ERRORS, HUBER_SCHEDULES))


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("name", schedules())
def test_every_weight_error_and_huber_schedule_goes_with_every_parametrisation(name, compat):
    schedule = schedules()[name]
    u = torch.tensor([0.0, 0.3, 0.7, 1 - 2**-24])
    for number, (weighting, loss_type, huber) in enumerate(COMBINATIONS):
        distribution = [{}, {"edm_sigmas": "karras"}, {"timestep_sampling": "logit_normal"}][number % 3]
        o = ObjectiveOptions(loss_weighting=weighting, snr_gamma=GAMMA, loss_type=loss_type, huber_schedule=huber,
                             do_edm_style_training=bool(number % 2), **distribution)
        objective = make_objective(o, schedule, compat)
        losses, _ = losses_of(objective, objective.levels(u), is_class=torch.tensor([True, False, False, True]))
        assert losses.shape == (4,) and losses.isfinite().all(), (weighting, loss_type, huber)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_uniform_weight_is_plain_mse(name):
    losses, mse = losses_of(*setup(name))
    assert torch.equal(losses, mse)


@pytest.mark.parametrize("loss_type", ERRORS)
def test_losses_are_per_sample_and_blind_to_their_neighbours(loss_type):
    objective, level = setup("epsilon", gamma=GAMMA, t=torch.tensor([10, 500, 990]), loss_type=loss_type)
    losses, _ = losses_of(objective, level)
    assert losses.shape == (3,)
    x0, n = latents(3)
    z, out = objective.pred.add_noise(x0, n, level), latents(3, seed=1)[0]
    one = NoiseSchedule(alphas(), "epsilon").at(torch.tensor([500]))
    alone = objective(out[1:2], x0=x0[1:2], z=z[1:2], n=n[1:2], level=one, batch=samples(1))
    torch.testing.assert_close(alone, losses[1:2])


def test_share_scales_each_sample_under_every_weight():
    loss_weight = torch.tensor([1.0, 0.5, 0.0])
    for gamma in (None, GAMMA):
        objective, level = setup("epsilon", gamma=gamma, t=torch.tensor([10, 500, 990]))
        whole, shared = losses_of(objective, level)[0], losses_of(objective, level, loss_weight=loss_weight)[0]
        torch.testing.assert_close(shared, whole * loss_weight)


def test_class_images_are_weighed_like_others_but_not_by_snr_under_compat():
    t, is_class = torch.tensor([10, 500, 990]), torch.tensor([True, False, True])
    for name in PREDICTIONS:
        objective, level = setup(name, gamma=GAMMA, t=t)
        assert torch.equal(losses_of(objective, level)[0], losses_of(objective, level, is_class=is_class)[0])
        upstream, _ = setup(name, gamma=GAMMA, t=t, compat="diffusers")
        (mixed, mse), (instances, _) = losses_of(upstream, level, is_class=is_class), losses_of(upstream, level)
        torch.testing.assert_close(mixed, torch.where(is_class, mse, instances))
        assert not torch.allclose(instances, mse)


def test_half_precision_output_gives_an_fp32_loss_with_a_gradient():
    objective, level = setup("epsilon", gamma=GAMMA, t=torch.tensor([10, 500]))
    x0, n = latents(2)
    out = (n + 1e-3).bfloat16().requires_grad_()
    z = objective.pred.add_noise(x0, n, level)
    losses = objective(out, x0=x0, z=z, n=n, level=level, batch=samples(2))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert out.grad.isfinite().all() and out.grad.abs().sum() > 0


@pytest.mark.parametrize("name", PREDICTIONS)
def test_terms_see_the_x0_the_output_implies(name):
    schedule = NoiseSchedule(alphas(), name)
    pred, level = schedule.prediction, schedule.at(torch.tensor([10, 500]))
    terms = (lambda forward, observe: 3 * per_sample((forward.x0_hat - forward.x0) ** 2),)
    with_terms = Objective(schedule.at, pred, on_output("uniform", pred, ObjectiveOptions()), terms=terms)
    losses, mse = losses_of(with_terms, level)
    torch.testing.assert_close(losses, mse + 3 * mse / pred.x0_gain(level), rtol=1e-3, atol=1e-5)


# Masks ----------------------------------------------------------------------------------------------------------------


def masks(count):
    """Weights of places [B,1,8,8] in 0..1, about a third of them 0."""
    weights = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.where(weights < 0.33, 0, weights)


def test_without_a_mask_the_mean_is_the_plain_one_bit_for_bit():
    x = latents(3)[0]
    for values in (x, x.bfloat16(), x[:, 0]):
        assert torch.equal(per_sample(values), values.flatten(1).mean(1))
        assert torch.equal(per_sample(values, None), values.flatten(1).mean(1))


def test_a_mask_is_a_factor_on_each_place():
    x, mask = latents(3)[0], masks(3)
    for k in range(3):
        weighted = [float(x[k, c, i, j]) * float(mask[k, 0, i, j])
                    for c, i, j in itertools.product(range(4), range(8), range(8))]
        assert per_sample(x, mask)[k].item() == pytest.approx(sum(weighted) / (4 * 8 * 8), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(per_sample(x, 7 * mask), 7 * per_sample(x, mask))
    torch.testing.assert_close(per_sample(x, torch.full_like(mask, 0.3)), 0.3 * per_sample(x))
    half = (torch.arange(8) < 4).float().expand(3, 1, 8, 8)
    torch.testing.assert_close(per_sample(x, half), per_sample(x[..., :4]) / 2)


def test_no_gradient_comes_from_where_the_mask_is_0():
    x, mask = latents(3)[0].requires_grad_(), masks(3)
    (per_sample(x**2, mask) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    hidden = (mask == 0).expand_as(x)
    assert 0.2 < hidden.float().mean() < 0.5
    assert torch.equal(x.grad[hidden], torch.zeros(int(hidden.sum())))
    assert (x.grad[~hidden] != 0).all()


def test_a_sample_that_is_masked_everywhere_counts_nothing_and_its_neighbours_as_ever():
    x, mask = latents(3)[0].requires_grad_(), masks(3)
    mask[1] = 0
    means = per_sample(x, mask)
    means.sum().backward()
    assert means[1] == 0 and torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
    assert torch.equal(means[::2], per_sample(x[::2], mask[::2])) and x.grad[::2].isfinite().all()


@pytest.mark.parametrize("loss_type", ERRORS)
def test_the_mask_of_a_batch_weighs_every_error_before_the_samples_weight(loss_type):
    objective, level = setup("v_prediction", gamma=GAMMA, t=torch.tensor([10, 500, 990]), loss_type=loss_type)
    loss_weight, mask, (x0, n) = torch.tensor([1.0, 0.5, 2.0]), masks(3), latents(3)
    z, out = objective.pred.add_noise(x0, n, level), latents(3, seed=1)[0].requires_grad_()
    losses = objective(out, x0=x0, z=z, n=n, level=level, batch=samples(3, loss_weight=loss_weight, mask=mask))
    error = objective.error(out - objective.pred.target(x0, n, level), level)
    assert torch.equal(losses, per_sample(error, mask) * (objective.weight(level) * loss_weight))
    losses.sum().backward()
    assert torch.equal(out.grad[(mask == 0).expand_as(out)], torch.zeros(4 * int((mask == 0).sum())))
    assert (out.grad[(mask > 0).expand_as(out)] != 0).all()
