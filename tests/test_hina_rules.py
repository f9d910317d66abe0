"""Every rule of HinaAdaptive against its paper's formula, and what it promises of steps, weights and other tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainkit.optim.hina import HinaAdaptive, rank, regularize
from trainkit.optim.hina.rules import decay_rate


def weights(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator) * scale) for s in shapes]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def step(opt: torch.optim.Optimizer, *gradients: Tensor) -> list[Tensor]:
    """One step with these gradients -> how far each parameter went."""
    params = [p for group in opt.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    opt.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


def make(*params: Tensor, **settings) -> HinaAdaptive:
    return HinaAdaptive(params, **{"lr": 1e-3, "weight_decay": 0.0} | settings)


def update(*gradients: Tensor, start: Tensor | None = None, **settings) -> Tensor:
    """u of the last of several steps of one tensor: what lr is multiplied by. Weights at 0 have full precision."""
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    opt = make(p, lr=1.0, **settings)
    for g in gradients[:-1]:
        step(opt, g)
        with torch.no_grad():
            p.copy_(torch.zeros_like(p) if start is None else start)
    return -step(opt, gradients[-1])[0]


# --- direction: cautious, Grams -------------------------------------------------------------------------------------


def test_cautious_never_moves_along_the_gradient_and_scales_by_the_share_that_agrees():
    """H12"""
    g = [noise((6, 8), i) for i in range(4)]
    plain, careful = update(*g, spatial_awareness=True), update(*g, use_cautious=True)
    agrees = (plain * g[-1] > 0).float()
    assert ((careful * g[-1]) >= 0).all() and 0.2 < agrees.mean() < 0.95
    assert torch.allclose(careful, plain * agrees / agrees.mean(), rtol=1e-5)


def test_where_no_coordinate_agrees_cautious_stands_still():
    g = noise((4, 5), 0)
    assert not update(*[g] * 20, -1e-3 * g, use_cautious=True).any()


def test_grams_goes_where_the_gradient_points_as_far_as_adam():
    """H13"""
    g = [noise((6, 8), i) for i in range(4)]
    g[-1][0] = 0
    plain, grams = update(*g, spatial_awareness=True), update(*g, use_grams=True)
    assert torch.allclose(grams, plain.abs() * g[-1].sign(), rtol=1e-6)
    assert plain[0].all() and not grams[0].any()


def test_grams_and_cautious_are_grams():
    g = [noise((6, 8), i) for i in range(4)]
    assert torch.equal(update(*g, use_grams=True, use_cautious=True), update(*g, use_grams=True))


# --- moments: ADOPT, TAM --------------------------------------------------------------------------------------------


def adopt(w: Tensor, gradients: list[Tensor], lr: float, b1: float, b2: float, eps: float) -> Tensor:
    """The paper's recursion in fp64."""
    v, m = gradients[0].double() ** 2, torch.zeros_like(w, dtype=torch.float64)
    w = w.double()
    for t, g in enumerate(gradients[1:], start=1):
        normed = (g.double() / v.sqrt().clamp(min=eps)).clamp(-(t**0.25), t**0.25)
        m = b1 * m + (1 - b1) * normed
        w = w - lr * m
        v = b2 * v + (1 - b2) * g.double() ** 2
    return w


def test_adopt_is_the_papers_recursion():
    """H14"""
    gradients = [noise((6, 8), i) * (1 + 9 * (i % 7 == 3)) for i in range(100)]
    (p,) = weights((6, 8))
    expected = adopt(p.detach(), gradients, 1e-2, 0.9, 0.99, 1e-6)
    opt = make(p, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, use_adopt_stability=True)
    for g in gradients:
        step(opt, g)
    assert (p.detach() - expected).abs().max() < 2e-6


def test_adopts_first_step_moves_nothing_even_with_decay():
    (p,) = weights((6, 8))
    before = p.detach().clone()
    opt = make(p, use_adopt_stability=True, weight_decay=0.1, use_lr_mask=True, use_tam=True)
    step(opt, noise((6, 8), 0))
    assert torch.equal(p, before) and opt.state[p]["tam"] == 0


def test_adopt_bounds_a_gradient_after_zeros():
    """LoRA's A has no gradient while B is 0: the first one after it is clipped to t^(1/4)."""
    zero, g = torch.zeros(4, 5), noise((4, 5), 0)
    u = update(zero, zero, zero, g, use_adopt_stability=True, betas=(0.0, 0.99))
    assert torch.allclose(u, 3**0.25 * g.sign())


@pytest.mark.trains
def test_adopt_converges_on_reddis_example_where_adam_does_not():
    """After Reddi et al. 2018: gradient 5 in 22 % of the steps, else -1; the mean is 0.32, so the best of [-1,1] is -1.

    Adam divides the rare large gradients by themselves. ADOPT's clipping lets them through once t^(1/4) > 5.
    """
    def end(adopt_on: bool) -> float:
        p = torch.nn.Parameter(torch.zeros(500))  # as many runs
        opt = make(p, lr=0.005, betas=(0.0, 0.1), use_adopt_stability=adopt_on, spatial_awareness=True)
        for t in range(2500):
            hit = torch.rand(500, generator=torch.Generator().manual_seed(t)) < 0.22
            step(opt, torch.where(hit, 5.0, -1.0))
            p.data.clamp_(-1, 1)
        return p.mean().item()

    assert end(False) > 0.9 and end(True) < -0.7


def tam_factor(gradients: list[Tensor], **settings) -> float:
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    opt = make(p, use_tam=True, **settings)
    for g in gradients:
        step(opt, g)
    return 0.5 * (1 + opt.state[p]["tam"].item())


def test_tams_damping_tells_noise_from_agreement_from_alternation():
    """H15: the cosine is with the momentum before the step, else noise would show the gradient's share in its own."""
    g = noise((40, 50), 0)
    assert tam_factor([noise((40, 50), i) for i in range(60)]) == pytest.approx(0.5, abs=0.03)
    assert tam_factor([g] * 60) > 0.99
    assert tam_factor([g * (-1) ** i for i in range(60)]) < 0.15


def test_tam_damps_what_enters_the_momentum():
    """m <- b1 m + (1-b1)(eps + (1+s^)/2) g with s^ an average of the cosines."""
    g = [noise((6, 8), i) for i in range(5)]
    p = torch.nn.Parameter(torch.zeros(6, 8))
    opt, m, s = make(p, use_tam=True, tam_beta=0.8), torch.zeros(6, 8), 0.0
    for each in g:
        step(opt, each)
        cosine = float((m * each).sum() / (m.norm() * each.norm()).clamp(min=1e-30))
        s = 0.8 * s + 0.2 * cosine
        m = 0.9 * m + 0.1 * (1e-8 + (1 + s) / 2) * each
    assert torch.allclose(opt.state[p]["exp_avg"], m, atol=1e-6)
    assert opt.state[p]["tam"].item() == pytest.approx(s, abs=1e-5)


# --- the gradient: AGR, ⊥Grad ---------------------------------------------------------------------------------------


def gradient_after(g: Tensor, *, w: Tensor | None = None, **settings) -> Tensor:
    """What the moments see: with b1 = 0 the first moment is the gradient."""
    p = torch.nn.Parameter(torch.zeros_like(g) if w is None else w.clone())
    opt = make(p, betas=(0.0, 0.999), **settings)
    step(opt, g)
    return opt.state[p]["exp_avg"]


def test_agr_holds_back_what_stands_out_and_keeps_every_sign():
    """H16"""
    g = noise((6, 8), 0)
    out = gradient_after(g, use_agr=True)
    assert torch.allclose(out, g * (1 - g.abs() / g.abs().sum()), rtol=1e-6)
    assert out.norm() <= g.norm() and torch.equal(out.sign(), g.sign())
    assert torch.allclose(gradient_after(torch.full((4, 5), -0.3), use_agr=True), torch.tensor(-0.3 * 19 / 20))
    assert not gradient_after(torch.tensor(2.0), use_agr=True).any()
    assert not gradient_after(torch.zeros(3, 3), use_agr=True).any()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_the_orthogonal_gradient_is_orthogonal_and_as_long(share):
    """H17, for gradients that point more and less along W."""
    w, other = noise((16, 64), 1), noise((16, 64), 2)
    g = share * w / w.norm() + math.sqrt(1 - share**2) * other / other.norm()
    out = gradient_after(g, w=w, use_orthogonal_grad=True)
    assert (w * out).sum().abs() <= 1e-6 * w.norm() * out.norm()
    assert float(out.norm()) == pytest.approx(float(g.norm()), rel=1e-5)
    short = gradient_after(g, w=w, use_orthogonal_grad=True, orthogonal_restore_norm=False)
    assert torch.allclose(short, g - (w * g).sum() / w.square().sum() * w, atol=1e-6)
    again = gradient_after(out, w=w, use_orthogonal_grad=True)
    assert torch.allclose(again, out, atol=1e-6)


def test_the_orthogonal_gradient_leaves_zero_weights_vectors_and_noise_alone():
    g = noise((4, 6), 0)
    assert torch.equal(gradient_after(g, use_orthogonal_grad=True), g)
    assert torch.equal(gradient_after(g[0], w=noise((6,), 1), use_orthogonal_grad=True), g[0])
    w = noise((4, 6), 1)
    assert gradient_after(3 * w, w=w, use_orthogonal_grad=True).norm() < 1e-2 * w.norm()  # rounding, not blown up
    assert not gradient_after(torch.zeros(4, 6), w=w, use_orthogonal_grad=True).any()


# --- weights: SPD, decay --------------------------------------------------------------------------------------------


def test_spd_changes_no_bit_while_the_descent_leads_away():
    """H18"""
    w = noise((6, 8), 0)
    (a, b), g = (torch.nn.Parameter(w.clone()) for _ in range(2)), -w + 0.01 * noise((6, 8), 1)
    on, off = make(a, use_spd=True), make(b, spatial_awareness=True)
    for _ in range(5):
        step(on, g)
        step(off, g)
    assert torch.equal(a, b)


@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_spd_shortens_the_way_from_the_anchor_where_the_descent_leads_back(anchor, strength):
    """H18: the paper's formula, and at lambda = 1 the radius of the step before. A momentum carries on outwards."""
    start = noise((6, 8), 0)
    p = torch.nn.Parameter(start.clone())
    opt = make(p, lr=0.01, use_spd=True, spd_lambda=strength, spd_anchor=anchor)
    origin = start if anchor == "init" else torch.zeros_like(start)
    for _ in range(10):
        step(opt, -start)
    before = p.detach().clone()
    twin = torch.nn.Parameter(before.clone())
    other = make(twin, lr=0.01, spatial_awareness=True)
    other.load_state_dict(opt.state_dict())
    other.param_groups[0].update(use_spd=False, spatial_awareness=True)
    g = 0.01 * start
    step(opt, g)
    step(other, g)
    reach, radius = (twin.detach() - origin).norm(), (before - origin).norm()
    assert reach > radius
    assert torch.allclose(p, twin - strength * (1 - radius / reach) * (twin - origin), atol=1e-6)
    if strength == 1:
        assert float((p.detach() - origin).norm()) == pytest.approx(float(radius), rel=1e-6)


@pytest.mark.parametrize(("t", "ratio"), [(1000, 1.0), (1500, 0.7**0.5), (2000, 0.7), (5000, 0.7**4), (20000, 0.1)])
def test_the_dynamic_decay_follows_its_closed_form(t, ratio):
    """H19"""
    (p,) = weights((3, 4))
    opt = make(p, lr=0.1, weight_decay=0.5, dynamic_weight_decay=True)
    step(opt, torch.zeros(3, 4))
    opt.state[p]["step"].fill_(t - 1)
    before = p.detach().clone()
    step(opt, torch.zeros(3, 4))
    assert torch.allclose(p, before * (1 - 0.1 * 0.5 * ratio), rtol=1e-6)
    assert decay_rate(opt.param_groups[0], t) == pytest.approx(0.5 * ratio)


def test_decay_is_adamws_and_comes_before_the_update():
    w, g = noise((6, 8), 0), noise((6, 8), 1)
    p = torch.nn.Parameter(w.clone())
    step(make(p, lr=0.1, weight_decay=0.5, use_grams=True), g)
    assert torch.allclose(p, w * (1 - 0.05) - 0.1 * g.sign(), atol=1e-6)


# --- learning rates: lr_mask, dynamic adaptation --------------------------------------------------------------------


def mask_after(signs: list[float], **settings) -> float:
    p = torch.nn.Parameter(torch.zeros(2, 3))
    opt = make(p, use_lr_mask=True, betas=(0.0, 0.999), **{"lr": 1e-4} | settings)
    for s in signs:
        step(opt, torch.full((2, 3), s))
    return opt.state[p]["lr_mask"][0, 0].item()


def test_the_mask_grows_while_signs_last_and_falls_while_they_alternate():
    """H20: the first step moves nothing, a zero update neither moves nor forgets, the range holds."""
    assert mask_after([1.0]) == pytest.approx(1e-4)
    assert mask_after([1.0] * 11) == pytest.approx(1e-4 + 10 * 3e-6, rel=1e-5)
    assert mask_after([-1.0] * 11) == pytest.approx(-1e-4 - 10 * 3e-6, rel=1e-5)  # the sign bit is the last sign
    assert abs(mask_after([1.0] * 400)) == pytest.approx(1e-3)
    assert abs(mask_after([1.0, -1.0] * 100)) == pytest.approx(1e-7)
    assert mask_after([1.0, 0.0, 0.0, 1.0]) == pytest.approx(1e-4 + 3e-6, rel=1e-5)
    assert mask_after([-1.0, 0.0, 1.0]) == pytest.approx(1e-4 - 3e-6, rel=1e-5)


def test_the_mask_stands_still_after_its_warm_up_unless_always():
    assert mask_after([1.0] * 20, warmup_steps=6) == pytest.approx(1e-4 + 5 * 3e-6, rel=1e-5)
    assert mask_after([1.0] * 20, warmup_steps=6, lr_mask_always=True) == pytest.approx(1e-4 + 19 * 3e-6, rel=1e-5)


def test_the_mask_multiplies_the_scheduled_rate():
    p = torch.nn.Parameter(torch.zeros(2, 3))
    opt = make(p, lr=1e-4, use_lr_mask=True)
    for _ in range(6):
        step(opt, torch.ones(2, 3))
    opt.param_groups[0]["lr"] = 0.5e-4
    (way,) = step(opt, torch.ones(2, 3))
    assert torch.allclose(way, torch.tensor(-0.5e-4 * (1e-4 + 6 * 3e-6) / 1e-4), rtol=1e-4)


def test_a_mask_in_bf16_grows_as_it_should_on_average():
    """H20: one bump is less than half of bf16's spacing at 1e-3, so rounding to nearest would freeze it."""
    p = torch.nn.Parameter(torch.zeros(100, 200))
    opt = make(p, lr=5e-4, use_lr_mask=True, lr_bump=5e-7, reduce_precision=True)
    for _ in range(101):
        step(opt, torch.ones(100, 200))
    mask = opt.state[p]["lr_mask"]
    assert mask.dtype == torch.bfloat16
    assert mask.float().mean() == pytest.approx(5e-4 + 100 * 5e-7, rel=1e-3)


LORA = ((4, 12), (20, 4), (4, 16), (24, 4))


def steadiness(params: list, *, order: tuple[int, ...] = (0, 1, 2, 3), scale: float = 1.0, **settings) -> list[float]:
    """Shares of four tensors whose gradients are ever noisier, after 20 steps."""
    opt = HinaAdaptive([params[i] for i in order], **{
        "use_dynamic_adaptation": True, "relationship_discovery_interval": 5, "importance_decay": 0.0, **settings})
    for t in range(20):
        for i, p in enumerate(params):
            p.grad = scale * (1 + [0.0, 0.3, 1.0, 30.0][i] * noise(tuple(p.shape), 10 * t + i))
        opt.step()
    return [opt.state[p]["adapt_scale"].item() for p in params]


def test_the_shares_of_the_learning_rate_favour_steady_gradients_and_have_geometric_mean_one():
    """H21"""
    shares = steadiness(weights(*LORA), compatibility_threshold=1.0)
    assert shares[0] > shares[1] > shares[2] > shares[3]
    assert math.prod(shares) == pytest.approx(1.0, rel=1e-5)


def test_permuting_tensors_permutes_shares_and_the_gradients_scale_does_not_matter():
    """H21"""
    free = {"compatibility_threshold": 1.0}
    shares = steadiness(weights(*LORA), **free)
    assert steadiness(weights(*LORA), order=(2, 0, 3, 1), **free) == pytest.approx(shares, rel=1e-5)
    assert steadiness(weights(*LORA), scale=1e-3, **free) == pytest.approx(shares, rel=1e-3)
    assert steadiness(weights(*LORA), adaptation_strength=0.0) == [1.0] * 4


def test_partners_share_their_mean_where_they_are_alike_enough():
    """H21: the first pair is nearly as steady, the second is not."""
    apart, joint = steadiness(weights(*LORA), compatibility_threshold=1.0), steadiness(weights(*LORA))
    assert joint[0] == joint[1] != apart[0] and joint[2] != joint[3]
    assert math.prod(joint) == pytest.approx(1.0, rel=1e-5)


def test_pairs_are_found_by_name_or_by_neighbourhood():
    a1, b1, a2, b2 = weights(*LORA)
    assert rank.lora_pairs({"params": [a1, b1, a2, b2]}) == [(a1, b1), (a2, b2)]
    names = ["x.lora_A.weight", "y.lora_A.weight", "x.lora_B.weight", "y.lora_B.weight"]
    pairs = rank.lora_pairs({"params": [a1, a2, b1, b2], "param_names": names})
    assert [tuple(map(id, pair)) for pair in pairs] == [(id(a1), id(b1)), (id(a2), id(b2))]
    assert rank.lora_pairs({"params": weights((8, 8), (8, 8), (20, 12), (12, 20))}) == []  # full matrices


def test_a_tensor_that_has_had_no_gradient_but_zero_keeps_its_rate():
    params = weights(*LORA[:2])
    opt = make(*params, use_dynamic_adaptation=True, relationship_discovery_interval=1)
    for t in range(3):
        step(opt, torch.zeros(LORA[0]), noise(LORA[1], t))
    assert [opt.state[p]["adapt_scale"].item() for p in params] == [1.0, 1.0]


# --- edges, space, background ---------------------------------------------------------------------------------------


def outliers(shape=(8, 10)) -> list[Tensor]:
    """Gradients after whose first, even, step a few coordinates have large updates."""
    late = torch.full(shape, 1e-3)
    late[1, 2], late[3, 4] = 1.0, -2.0
    return [torch.full(shape, 0.1) * (1 + 0.1 * noise(shape, 0)), late]


def test_edge_suppression_shrinks_outliers_of_the_update_by_its_formula():
    """H22"""
    g, settings = outliers(), {"betas": (0.0, 0.9)}
    plain = update(*g, spatial_awareness=True, **settings)
    held = update(*g, edge_suppression=True, edge_penalty=0.7, **settings)
    e = plain.abs() / plain.square().mean().sqrt()
    assert (e > 2.5).sum() == 2
    assert torch.allclose(held, plain / (1 + 0.7 * (e - 2.5).clamp(min=0)), rtol=1e-5)
    assert torch.equal(held.sign(), plain.sign())


def test_edge_suppression_is_permutation_equivariant_and_idle_without_outliers():
    """H22: P u Q for matrices; the scale of the gradient does not matter."""
    g, rows, columns = outliers(), torch.randperm(8), torch.randperm(10)
    settings = {"edge_suppression": True, "betas": (0.0, 0.9)}
    held = update(*g, **settings)
    assert torch.allclose(update(*(x[rows][:, columns] for x in g), **settings), held[rows][:, columns], rtol=1e-6)
    assert torch.allclose(update(*(1e3 * x for x in g), **settings), held, rtol=1e-4)
    even = [noise((8, 10), 0).sign()]
    assert torch.equal(update(*even, edge_suppression=True), update(*even, spatial_awareness=True))


def test_edge_suppression_of_kernels_looks_at_the_plane_and_nowhere_else():
    """H22: a plane that is constant has no edge, however much it stands out among the others."""
    first, late = torch.ones(6, 5, 3, 3), torch.full((6, 5, 3, 3), 1e-2)
    late[0, 0] = 1.0
    late[1, 1, 1, 1] = 1.0
    settings = {"betas": (0.0, 0.9)}
    plain = update(first, late, use_grams=True, **settings)
    held = update(first, late, edge_suppression=True, edge_penalty=1.0, **settings)
    assert torch.allclose(held[0, 0], plain[0, 0])
    assert held[1, 1, 1, 1] < 0.5 * plain[1, 1, 1, 1]


def test_a_second_difference_is_that_of_the_padded_plane():
    x = noise((2, 3, 4, 5), 0)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, 1:-1] - 2 * x + padded[..., 2:, 1:-1]
    columns = padded[..., 1:-1, :-2] - 2 * x + padded[..., 1:-1, 2:]
    assert torch.allclose(regularize.second_difference(x, -2), rows, atol=1e-6)
    assert torch.allclose(regularize.second_difference(x, -1), columns, atol=1e-6)


def test_spatial_awareness_changes_no_bit_of_a_lora():
    """H23"""
    on, off = weights(*LORA), weights(*LORA)
    a, b = make(*on, spatial_awareness=True, use_tam=True), make(*off, use_tam=True)
    for t in range(5):
        g = [noise(s, 10 * t + i) for i, s in enumerate(LORA)]
        step(a, *g)
        step(b, *g)
    assert all(torch.equal(x, y) for x, y in zip(on, off, strict=True))


def test_spatial_awareness_smooths_checkerboards_and_leaves_even_planes():
    """H23: each plane is judged by itself, and no update grows."""
    board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    g = noise((4, 3, 3, 3), 0)
    g[0, 0], g[0, 1] = board, 1.0
    settings = {"betas": (0.0, 0.9)}
    plain = update(g, use_grams=True, **settings)
    smooth = update(g, spatial_awareness=True, frequency_penalty=0.5, **settings)
    assert smooth[0, 0].norm() < 0.8 * plain[0, 0].norm()
    assert torch.equal(smooth[0, 1], plain[0, 1])
    assert (smooth.norm(dim=(-2, -1)) <= plain.norm(dim=(-2, -1)) * (1 + 1e-6)).all()


def gains(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(background's gain, sqrt v relative to its rms) of the last step."""
    settings = {"eps": 0.0}
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    opt = make(p, background_regularization=True, **settings)
    for g in gradients:
        step(opt, g)
    q = opt.state[p]["exp_avg_sq"].sqrt()
    ratio = update(*gradients, background_regularization=True, **settings) / update(
        *gradients, use_agr=False, spatial_awareness=True, **settings)
    return ratio, q / q.square().mean().sqrt()


def test_the_background_gain_is_one_from_the_mean_activity_and_falls_below_it():
    """H24: monotone, in (0,1], scale-invariant; quiet coordinates make small steps."""
    activity = torch.logspace(-4, 1, 60).view(6, 10)
    gradients = [activity * noise((6, 10), t) for t in range(5)]
    gain, q = gains(gradients)
    assert torch.allclose(gain, (1.5 * q / (q + 0.5)).clamp(max=1), rtol=1e-3)
    assert (gain > 0).all() and (gain <= 1 + 1e-6).all() and gain[q >= 1].min() > 1 - 1e-5
    assert (gain.flatten()[q.flatten().argsort()].diff() >= -1e-5).all()
    assert gain.min() < 1e-3
    assert torch.allclose(gains([1e-3 * g for g in gradients])[0], gain, rtol=1e-3)


# --- the rank penalty -----------------------------------------------------------------------------------------------


def stable_rank(w: Tensor) -> float:
    sigma = torch.linalg.svdvals(w.double())
    return float(sigma.square().sum() / sigma[0] ** 2)


def shrunk(w: Tensor, steps: int = 1, **settings) -> list[Tensor]:
    """W after each of some steps without a data gradient."""
    p = torch.nn.Parameter(w.clone())
    opt = make(p, **{"lora_rank_penalty": True, "rank_penalty_interval": 1, "lr": 0.1, "rank_penalty_strength": 1.0}
               | settings)
    out = []
    for _ in range(steps):
        step(opt, torch.zeros_like(w))
        out.append(p.detach().clone())
    return out


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (6, 4, 3, 3)])
def test_the_rank_penalty_lowers_the_stable_rank_in_every_step(shape):
    """H25: where weight decay leaves it."""
    w = noise(shape, 0)
    ranks = [stable_rank(x.flatten(1)) for x in [w, *shrunk(w, 12)]]
    assert all(b < a for a, b in zip(ranks, ranks[1:], strict=False)) and ranks[-1] < 0.8 * ranks[0]
    decayed = shrunk(w, 12, lora_rank_penalty=False, spatial_awareness=True, weight_decay=1.0)[-1].flatten(1)
    assert stable_rank(decayed) == pytest.approx(ranks[0], rel=1e-5)


def test_the_rank_penalty_is_the_formula_on_singular_values_and_keeps_the_vectors():
    """H25: sigma' = max(0, sigma - eta s sigma_1 (sigma/sigma_1)^(1-emphasis))."""
    w = noise((8, 30), 0)
    (out,) = shrunk(w, lr=0.02)
    u, sigma, v = torch.linalg.svd(w.double(), full_matrices=False)
    expected = (sigma - 0.02 * sigma[0] * (sigma / sigma[0]) ** -0.2).clamp(min=0)
    assert torch.allclose(out.double(), (u * expected) @ v, atol=1e-5)


def test_the_rank_penalty_takes_equal_and_zero_singular_values():
    (out,) = shrunk(torch.eye(5), lr=0.01)
    assert torch.allclose(out, 0.99 * torch.eye(5), atol=1e-6)
    assert not shrunk(torch.zeros(4, 9))[0].any()
    assert shrunk(torch.outer(noise((4,), 0), noise((9,), 1)))[0].isfinite().all()
    w = noise((4, 9), 0)
    assert torch.allclose(shrunk(w, low_rank_emphasis=0.0, lr=0.01)[0], 0.99 * w, atol=1e-6)


def test_the_rank_penalty_moves_a_lora_a_by_its_strength_and_not_by_a_full_step():
    """H25: while B is 0, A has no gradient; through Adam any penalty would move it by lr."""
    w = noise((4, 30), 0)
    (out,) = shrunk(w, lr=1e-3, rank_penalty_strength=0.01)
    sigma = torch.linalg.svdvals(w)
    largest = 1e-5 * float((sigma / sigma[0]).min() ** -0.2)
    assert 0 < torch.linalg.matrix_norm(out - w, 2) <= 1.01 * largest * sigma[0]


def test_every_tenth_step_takes_the_learning_rates_of_all_ten():
    w = noise((6, 20), 0)
    each, rarely = shrunk(w, 10, lr=1e-3), shrunk(w, 10, lr=1e-3, rank_penalty_interval=10)
    assert torch.equal(rarely[8], w) and torch.allclose(rarely[9], each[9], atol=3e-4)
    assert (rarely[9] - w).norm() == pytest.approx(float((each[9] - w).norm()), rel=0.02)


def test_the_rank_penalty_is_the_same_with_orthogonal_gradients():
    w = noise((6, 20), 0)
    assert torch.equal(shrunk(w)[0], shrunk(w, use_orthogonal_grad=True)[0])


def test_on_the_product_only_b_changes_and_the_singular_values_of_ba_shrink_by_the_formula():
    """H25"""
    a, b = weights((4, 12), (20, 4))
    a0, product = a.detach().clone(), (b @ a).detach()
    opt = make(a, b, lora_rank_penalty=True, rank_penalty_target="product", rank_penalty_interval=1, lr=0.05,
               rank_penalty_strength=1.0)
    step(opt, torch.zeros(4, 12), torch.zeros(20, 4))
    assert torch.equal(a, a0)
    before, after = (torch.linalg.svdvals(x.double())[:4] for x in (product, (b @ a).detach()))
    expected = (before - 0.05 * before[0] * (before / before[0]) ** -0.2).clamp(min=0)
    assert torch.allclose(after, expected, atol=1e-4)
    with torch.no_grad():
        b.zero_()
    step(opt, torch.zeros(4, 12), torch.zeros(20, 4))
    assert not b.any()


@pytest.mark.parametrize("target", ["factors", "product"])
def test_a_planted_rank_is_found_better_with_the_rank_penalty(target):
    """H25: B A of rank 8 learns a matrix of rank 2 from noisy products."""
    def run(**settings) -> tuple[float, float]:
        truth = (noise((30, 2), 0) @ noise((2, 24), 1)) / 5
        x, errors = noise((40, 24), 2), 0.5 * noise((40, 30), 3)
        a, b = torch.nn.Parameter(noise((8, 24), 4) / 5), torch.nn.Parameter(torch.zeros(30, 8))
        opt = HinaAdaptive([a, b], lr=5e-3, weight_decay=0.0, **settings)
        for _ in range(600):
            loss = (x @ (b @ a).T - x @ truth.T - errors).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        learned = (b @ a).detach()
        return stable_rank(learned), float((learned - truth).norm() / truth.norm())

    plain = run(spatial_awareness=True)
    low = run(lora_rank_penalty=True, rank_penalty_strength=1.0, rank_penalty_target=target)
    assert low[1] < 0.9 * plain[1] and low[0] < plain[0], (plain, low)
