"""FourierLoss: the loss is its formula, sample by sample; it has a gradient, and costs nothing while it is off.

The tolerances are of fp64 unless a test says otherwise.
"""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

import freq_loss
from freq_loss import MODES, PRESETS, FourierLoss, get_fourier_loss_config
from trainkit.frequency.bands import _cached
from trainkit.options import FourierOptions
from trainkit.options.rules import unread

F64 = torch.float64
SIZES = [(64, 64), (65, 63), (96, 160), (104, 152), (2, 2)]
METRICS, NORMS = ("magnitude", "complex"), ("l2", "l1")
ON = dict(step=1000, total_steps=2000)  # after every warm-up


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ffts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes that were transformed."""
    seen: list[tuple[int, ...]] = []
    real = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda x, **kw: (seen.append(tuple(x.shape)), real(x, **kw))[1])
    yield seen


def pair(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)


def mse(p: Tensor, t: Tensor) -> Tensor:
    return (p - t).square().flatten(1).mean(1)


def gradient(of: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    p = p.detach().clone().requires_grad_()
    return torch.autograd.grad(of(p).sum(), p)[0]


def mask_value(w: float, rho: float) -> float:
    return 1 + (w - 1) / (1 + math.exp(-4 * (rho - 0.5)))


# The formulas once more, by full transforms and one frequency at a time


def slow_term(p: Tensor, t: Tensor, w: float, *, metric: str, norm: str, normalize: str, eps: float = 1e-8) -> float:
    """One sample [C,h,w], one scale."""
    size = {"none": lambda x: 1.0, "target": lambda x: float(t.std(correction=0)),
            "separate": lambda x: float(x.std(correction=0))}[normalize]
    P, T = (torch.fft.fft2(x / size(x), norm="ortho") for x in (p, t))
    errors = (P - T).abs() if metric == "complex" else P.abs() - T.abs()
    errors = errors.abs() ** (2 if norm == "l2" else 1)
    h, w_ = p.shape[-2:]
    total = 0.0
    for i, fy in enumerate(torch.fft.fftfreq(h).tolist()):
        for j, fx in enumerate(torch.fft.fftfreq(w_).tolist()):
            total += mask_value(min(max(w, 1), 3), math.sqrt(2) * math.hypot(fy, fx)) * float(errors[:, i, j].sum())
    return total / p.numel()


def slow(mode: str, p: Tensor, t: Tensor, progress: float, **how: str) -> float:
    """A sample [C,h,w] by the tables, with every default written out."""
    def at(scale: int, w: float) -> float:
        pool = torch.nn.functional.avg_pool2d
        return slow_term(pool(p[None], scale)[0], pool(t[None], scale)[0], w, **how)

    def linear(high: float, low: float) -> float:
        return high - (high - low) * progress

    def mixed(weights: dict[int, float], own: float, a: float, alpha: float, beta: float) -> float:
        omega = {s: s**-0.5 for s in weights}
        many = sum(omega[s] * at(s, weights[s] * a) for s in weights) / sum(omega.values())
        A, B = alpha * (1 + 0.5 * (1 - progress)), beta * (1 + 0.5 * progress)
        return (A * many + B * at(1, own * a)) / (A + B)

    fast_fall = 0.5 + 2.3 * math.exp(-5 * progress)
    cosine = 1 + (1 + math.cos(math.pi * progress))
    return {
        "basic": lambda: at(1, 1.0), "weighted": lambda: at(1, 2.0),
        "multiscale": lambda: (at(1, 1.0) + 0.5 * at(2, 1.0)) / 1.5,
        "adaptive": lambda: at(1, linear(2.0, 0.5)),
        "unified": lambda: mixed({1: 2.0, 2: 2.0, 4: 2.0}, 2.0, linear(2.5, 0.8), 0.6, 0.4),
        "unified_basic": lambda: at(1, 1.5 * linear(2.0, 1.0)),
        "unified_balanced": lambda: mixed({1: 2.0, 2: 2.0}, 2.0, linear(2.5, 0.8), 0.6, 0.4),
        "unified_detail": lambda: mixed({1: 2.0, 2: 2.5, 4: 3.0}, 2.5, cosine, 0.7, 0.3),
        "unified_adaptive": lambda: mixed({1: 2.0, 2: 2.0}, 2.0, fast_fall, 0.6, 0.4),
    }[mode]()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_mode_is_its_formula_by_full_transforms(mode: str, metric: str) -> None:
    """F2, F5: Hermitian halves, odd sizes, curves, mixing and scales, all at once."""
    p, t = pair(2, 2, 8, 11)
    cases = [("l2", "target", 0.0), ("l1", "none", 0.3), ("l2", "separate", 0.9), ("l2", "none", 1.0)]
    for norm, normalize, progress in cases:
        found = FourierLoss(mode=mode, metric=metric, norm=norm, normalize=normalize).distance(p, t, progress=progress)
        wanted = [slow(mode, p[i], t[i], progress, metric=metric, norm=norm, normalize=normalize) for i in range(2)]
        assert found.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_basic_complex_l2_is_the_squared_error_of_each_sample(size: tuple[int, int]) -> None:
    """F1 (Parseval)."""
    p, t = pair(3, 4, *size, dtype=torch.float32)
    loss = FourierLoss(mode="basic", metric="complex")
    torch.testing.assert_close(loss.distance(p, t), mse(p, t), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("w", "values"), [(1.5, (1.060, 1.134, 1.25, 1.366, 1.440)),
                                           (2.0, (1.119, 1.269, 1.5, 1.731, 1.881)),
                                           (3.0, (1.238, 1.538, 2.0, 2.462, 2.762))])
def test_one_wave_counts_what_the_mask_has_at_its_frequency(w: float, values: tuple[float, ...]) -> None:
    """F3: a wave on the diagonal at ρ̂ = 0, ¼, ½, ¾, 1, in fp32 and fp64; the mask rises with ρ̂."""
    y = torch.arange(8, dtype=F64)
    for dtype in (torch.float32, F64):
        found = []
        for k in (0, 1, 2, 3, 4):  # k/8 cycles both ways
            wave = (2 * math.pi * k / 8 * (y[:, None] + y)).cos()[None, None].to(dtype)
            heavy, even = (FourierLoss(metric="complex", mode=mode, high_freq_weight=w).distance(wave, 0 * wave)
                           for mode in ("weighted", "basic"))
            found.append(float(heavy / even))
        assert found == pytest.approx(values, abs=1e-3)
        assert found == sorted(found)


def test_mask_means_over_a_grid() -> None:
    """F3: what the whole term grows by for white errors."""
    means = [float(freq_loss.coefficients(64, 64, 1, "", True)[1].sum()) * (w - 1) + 1 for w in (1.5, 2.0, 2.5, 3.0)]
    assert means == pytest.approx([1.269, 1.538, 1.807, 2.076], abs=1e-3)


# Presets and resolved settings

TABLE = {  # weight, mode, norm, high_freq_weight, scales, max, min, warm-up
    "conservative": (0.01, "basic", "l2", 1.5, None, None, None, 500),
    "balanced": (0.05, "weighted", "l2", 2.0, None, None, None, 300),
    "aggressive": (0.10, "multiscale", "l1", None, (1, 2, 4), None, None, 200),
    "super_resolution": (0.08, "adaptive", "l2", None, None, 3.0, 1.0, 400),
    "fine_detail": (0.12, "weighted", "l1", 2.5, None, None, None, 100),
    "unified_basic": (0.03, "unified_basic", "l2", 1.5, (1,), 2.0, 1.0, 250),
    "unified_balanced": (0.06, "unified_balanced", "l2", 2.0, (1, 2), 2.5, 0.8, 250),
    "unified_detail": (0.08, "unified_detail", "l2", 2.5, (1, 2, 4), 3.0, 1.0, 200),
    "unified_adaptive": (0.07, "unified_adaptive", "l2", 2.0, (1, 2), 2.8, 0.5, 300),
    "unified_custom": (0.05, "unified", "l2", 2.0, (1, 2, 4), 2.5, 0.8, 250),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_table_once_resolved(name: str) -> None:
    """F4."""
    loss = FourierLoss.from_config(get_fourier_loss_config(name))
    found = (loss.weight, loss.mode, loss.norm, loss.high_freq_weight, loss.scales, loss.adaptive_max_weight,
             loss.adaptive_min_weight, loss.warmup_steps)
    if loss.mode == "adaptive":
        assert loss.adaptive_mode == "linear"
    assert found == TABLE[name]
    assert set(TABLE) == set(PRESETS)


def test_unified_tables_beside_the_presets() -> None:
    """F4: weights of scales, their own masks, curve and mixing."""
    detail = FourierLoss(mode="unified_detail")
    assert (detail.scale_high_freq_weights, detail.adaptive_mode, detail.mix) == ((2, 2.5, 3), "cosine", (0.7, 0.3))
    assert FourierLoss(mode="unified_adaptive").adaptive_mode == "exponential"
    assert FourierLoss(mode="unified").scale_weights == pytest.approx((1, 0.70711, 0.5), abs=1e-5)
    assert FourierLoss(mode="multiscale", scales="1,2,4").scale_weights == (1, 0.5, 0.25)


def test_a_preset_is_a_copy_and_a_wrong_name_is_told_the_nearest() -> None:
    get_fourier_loss_config("balanced")["fourier_weight"] = 9
    assert get_fourier_loss_config("balanced")["fourier_weight"] == 0.05
    assert get_fourier_loss_config() == get_fourier_loss_config("balanced")
    with pytest.raises(ValueError, match="did you mean balanced"):
        get_fourier_loss_config("balancd")


def test_the_guides_snippet_runs() -> None:
    """F22: verbatim but for the import line."""
    args = Namespace()
    # 基□置
    config = get_fourier_loss_config("balanced")

    # 修改特定□數
    config["fourier_weight"] = 0.08
    config["fourier_high_freq_weight"] = 2.5

    # 應用□置
    for key, value in config.items():
        setattr(args, key, value)
    loss = FourierLoss.from_config(vars(args))
    assert (loss.weight, loss.high_freq_weight, loss.mode, loss.warmup_steps) == (0.08, 2.5, "weighted", 300)


def test_lists_are_read_from_text_and_sequences() -> None:
    """F22."""
    for scales in ("1,2,4", " 1, 2,4", [1, 2, 4], (1.0, 2, 4)):
        assert FourierLoss(mode="multiscale", scales=scales).scales == (1, 2, 4)
    assert FourierLoss(mode="unified", mix="0.5,0.25").mix == (0.5, 0.25)


@pytest.mark.parametrize("mode", MODES)
def test_config_is_resolved_json_that_makes_the_loss_again(mode: str) -> None:
    loss = FourierLoss(mode=mode, metric="complex", norm="l1", bands="high:2", weight=0.07)
    assert FourierLoss.from_config(json.loads(json.dumps(loss.config()))) == loss
    assert loss.config()["fourier_normalize"] == "none"


def test_what_is_given_wins_over_the_mode() -> None:
    loss = FourierLoss(mode="unified_detail", scales="1,2", scale_weights="1,1", adaptive_max_weight=2,
                       normalize="none")
    assert (loss.scales, loss.adaptive_max_weight, loss.normalize, loss.scale_weights) == ((1, 2), 2, "none", (1, 1))
    assert loss.scale_high_freq_weights == (2.5, 2.5), "the table's three are for its own three scales"
    assert FourierLoss(mode="unified_detail", high_freq_weight=1.2).scale_high_freq_weights == (1.2, 1.2, 1.2)
    assert FourierLoss(mode="unified_detail", scale_high_freq_weights="1,2,3").scale_high_freq_weights == (1, 2, 3)
    assert FourierLoss(mode="basic", adaptive_mode="cosine").high_freq_weight is None


@pytest.mark.parametrize("mode", MODES)
def test_the_trainers_know_which_flags_a_mode_reads_and_which_modes_move(mode: str) -> None:
    """The options may not import torch, so they have lists of their own, which MODES judges here."""
    loss = FourierLoss(mode=mode)
    optional = {field.name for field in fields(loss) if field.default is None}
    flags = {flag.name: flag for flag in FourierOptions.flags()}
    told = {name.removeprefix("fourier_") for name, _ in unread({"loss_type": "fourier", "fourier_mode": mode}, flags)}
    assert told & optional == {name for name in optional if getattr(loss, name) is None}, "None: not filled in"
    p, t = pair(1, 2, 16, 16)
    start, end = (loss.distance(p, t, progress=progress) for progress in (0.0, 1.0))
    assert FourierOptions(fourier_mode=mode).moves == (not torch.equal(start, end))


@pytest.mark.parametrize("wrong", [
    dict(mode="wieghted"), dict(norm="l3"), dict(metric="phase"), dict(space="v"), dict(normalize="batch"),
    dict(balance="on"), dict(timestep_gate="hard"), dict(mode="unified", adaptive_mode="step"), dict(weight=-1),
    dict(weight=math.nan), dict(weight=math.inf), dict(eps=0), dict(eps=1e-30), dict(mode="multiscale", scales="1;2"),
    dict(mode="multiscale", scales="1.5"), dict(mode="multiscale", scales=[1.5]), dict(mode="multiscale", scales=""),
    dict(mode="multiscale", scales="0"), dict(mode="multiscale", scales="1,2", scale_weights="1"),
    dict(mode="multiscale", scale_weights="1,-1"), dict(high_freq_weight=0), dict(high_freq_weight=math.nan),
    dict(mode="adaptive", adaptive_max_weight=1, adaptive_min_weight=2), dict(mode="unified", mix="1"),
    dict(mode="unified", mix="0,0"), dict(gate_min_snr=0), dict(timestep_gate="linear", gate_min_snr=2, gate_max_snr=1),
    dict(warmup_steps=-1), dict(bands=" , "), dict(bands="low:1,"), dict(bands="low:2,0.3-0.5:3"),
    dict(bands="low:1,low:1"),
    dict(bands="tall:2"), dict(bands="high"), dict(bands="0.5-0.2:1"), dict(bands="high:-1"), dict(bands="0-2:1"),
    dict(bands="high:nan"),
])
def test_what_means_nothing_is_refused_at_once(wrong: dict) -> None:
    """F16; the message names the setting as it is written."""
    with pytest.raises(ValueError, match=f"fourier_{list(wrong)[-1]}|fourier_{list(wrong)[0]}"):
        FourierLoss(**wrong)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    """F16."""
    with pytest.raises(ValueError, match="did you mean fourier_weight"):
        FourierLoss.from_config({"fourier_wieght": 1})


@pytest.mark.parametrize("wrong", [
    dict(weight=None), dict(weight="0.1"), dict(weight=True), dict(warmup_steps=1.5), dict(ramp_steps="3"),
    dict(adaptive_scaling="no"), dict(adaptive_scaling=1), dict(mode=None), dict(mode=["basic"]), dict(bands=None),
    dict(bands=2), dict(high_freq_weight="2"), dict(normalize=0), dict(gate_min_snr=None), dict(scales=[None]),
    dict(scales=[math.inf]), dict(eps=1j), dict(weight=10**400),
])
def test_a_value_of_another_type_is_a_value_error_that_names_the_field_and_what_to_give(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"^fourier_{list(wrong)[0]} .*: (give|write|choose) "):
        FourierLoss(**wrong)


def test_a_preset_that_is_no_name_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="fourier_config None is no preset.*choose one of conservative"):
        get_fourier_loss_config(None)


def test_scales_of_any_length_are_whole_numbers() -> None:
    huge = 10**25 + 1
    assert FourierLoss(mode="multiscale", scales=f"1,{huge}").scales == (1, huge)


@pytest.mark.parametrize("settings", [
    dict(timestep_gate="snr", gate_min_snr=20), dict(gate_min_snr=20), dict(scales="1,2", scale_weights="1"),
    dict(mode="multiscale", scale_high_freq_weights="1"), dict(mix="1"), dict(adaptive_max_weight=1),
    dict(adaptive_max_weight=1, adaptive_min_weight=2),
])
def test_settings_that_mode_and_gate_do_not_read_are_not_held_against_each_other(settings: dict) -> None:
    p, t = pair(2, 2, 8, 8)
    snr = torch.tensor([5.0, 30.0])
    bare = FourierLoss(mode=settings.get("mode", "weighted"))
    found = FourierLoss(**settings).distance(p, t, snr=snr)
    gate = (snr >= 20) if "timestep_gate" in settings else torch.ones(2)
    torch.testing.assert_close(found, gate * bare.distance(p, t))


@pytest.mark.parametrize("idle", [
    dict(adaptive_max_weight=3), dict(gate_max_snr=50), dict(gate_min_snr=0.5), dict(scales="1,2", mix="0.5,0.5"),
    dict(adaptive_scaling=False), dict(scale_weights="1"), dict(scale_high_freq_weights="1,2,3")])
def test_the_config_has_nothing_that_mode_and_gate_do_not_read(idle: dict) -> None:
    assert FourierLoss(**idle).config() == FourierLoss().config()
    read = FourierLoss(timestep_gate="snr", gate_min_snr=0.5, gate_max_snr=50).config()
    assert read["fourier_gate_min_snr"] == 0.5 and "fourier_gate_max_snr" not in read
    assert FourierLoss(timestep_gate="linear", gate_max_snr=50).config()["fourier_gate_max_snr"] == 50


def test_bands_have_one_spelling_in_the_config() -> None:
    for bands, wanted in {" low:0.50": "low:0.5", "HIGH:2.0, low:.5": "low:0.5,high:2", "0.250-0.5:3": "0.25-0.5:3",
                          "0.00001-0.5:1e-7": "1e-05-0.5:1e-07", " ": ""}.items():
        loss = FourierLoss(bands=bands)
        assert loss.config()["fourier_bands"] == wanted
        assert FourierLoss.from_config(loss.config()) == loss
    assert FourierLoss(bands=["low:0.5", "high:2"]) == FourierLoss(bands="low:0.5,high:2")
    FourierLoss(bands="low:1,mid:2,high:3"), FourierLoss(bands="0-0.5:2,0.5-1:3")  # one ends where the next begins


# Curves


def test_curves_at_their_ends_and_in_the_middle() -> None:
    """F5."""
    for curve, middle in {"linear": 2.0, "cosine": 2.0, "exponential": 1 + 2 * math.exp(-2.5)}.items():
        a = FourierLoss(mode="adaptive", adaptive_max_weight=3, adaptive_min_weight=1, adaptive_mode=curve).curve
        assert (a(0), a(0.5)) == (3, pytest.approx(middle))
        assert a(1) == pytest.approx(1 + 2 * math.exp(-5) * (curve == "exponential"))


def test_high_frequency_weights_are_clipped_to_1_and_3() -> None:
    """F5."""
    p, t = pair(1, 2, 8, 8)
    for given, counted in ((9.0, 3.0), (0.2, 1.0)):
        assert torch.equal(FourierLoss(high_freq_weight=given).distance(p, t),
                           FourierLoss(high_freq_weight=counted).distance(p, t))


@pytest.mark.parametrize(("mode", "share"), [("weighted", 0), ("basic", 0), ("multiscale", 0), ("unified_basic", 0.001),
                                             ("unified_balanced", 0.588), ("unified_adaptive", 0.167),
                                             ("unified_detail", 1.0), ("unified", 0.588), ("adaptive", 1 / 3)])
def test_pinned_is_the_share_of_the_run_at_a_bound(mode: str, share: float) -> None:
    assert FourierLoss(mode=mode).pinned(2000) == pytest.approx(share, abs=0.003)


def test_the_call_moves_with_the_optimizer_step() -> None:
    """A step of 500 of 2000 is a quarter of the way; past the end the curve stays."""
    p, t = pair(2, 2, 8, 8)
    loss = FourierLoss(mode="adaptive", adaptive_max_weight=3, adaptive_min_weight=1, balance="none")
    for step, progress in ((500, 0.25), (2000, 1.0), (9000, 1.0)):
        part = loss(p, t, base=mse(p, t), step=step, total_steps=2000)
        torch.testing.assert_close(part.raw, loss.distance(p, t, progress=progress))


# What the fork's loss is, measured


@pytest.mark.parametrize(("change", "wanted"), [
    ("noise", (0.4308, 0.5201, 0.6628, 0.4320, 0.8949)), ("half", (0, 0, 0, 0, 0)), ("minus", (0, 0, 0, 0, 0)),
    ("shift", (0, 0, 0, 0.134, 0.205)), ("small", (0.00489, 0.0557, 0.00753, 0.00491, 0.01015)),
    ("blur", (0.621, 0.609, 0.913, 0.448, 1.023)),
])
def test_each_spectrum_by_its_own_spread_has_the_values_measured_of_sd_scripts(change: str, wanted: tuple) -> None:
    """F6: t ~ N(0,1), 4x4x64x64; columns basic l2, basic l1, weighted, multiscale 1,2,4, unified_balanced."""
    t, noise = pair(1, 16, 64, 64, dtype=torch.float32)
    blur = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(t, (1, 1, 1, 1)), 3, 1)
    p = {"noise": noise, "half": t / 2, "minus": -t, "shift": t.roll((7, 11), (2, 3)), "small": t + 0.1 * noise,
         "blur": blur}[change]
    settings = (dict(mode="basic"), dict(mode="basic", norm="l1"), dict(), dict(mode="multiscale", scales="1,2,4"),
                dict(mode="unified_balanced"))
    found = [float(FourierLoss(normalize="separate", **each).distance(p, t)) for each in settings]
    assert found == pytest.approx(wanted, rel=0.04, abs=2e-6)


def test_a_small_error_counts_half_by_magnitude() -> None:
    """F6: only the part in phase is seen, σ²/2."""
    t, noise = pair(1, 16, 64, 64, dtype=torch.float32)
    found = FourierLoss(mode="basic", normalize="separate").distance(t + 0.05 * noise, t)
    assert float(found) == pytest.approx(0.05**2 / 2, rel=0.02)


# Gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_finite_differences(mode: str, metric: str, norm: str) -> None:
    """F7."""
    p, t = pair(2, 1, 8, 9)
    for normalize in freq_loss.NORMALIZERS:
        loss = FourierLoss(mode=mode, metric=metric, norm=norm, normalize=normalize)
        assert torch.autograd.gradcheck(partial(loss.distance, progress=0.4), (p.requires_grad_(), t), fast_mode=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_with_mask_gate_and_x0_are_those_of_finite_differences(metric: str, norm: str) -> None:
    """F7, element by element."""
    p, t = pair(2, 2, 5, 6)
    mask, clean, snr = torch.rand(2, 1, 5, 6, dtype=F64), torch.randn(2, 2, 5, 6, dtype=F64), torch.tensor([0.3, 4.0])
    loss = FourierLoss(metric=metric, norm=norm, normalize="separate", timestep_gate="wiener", bands="high:2",
                       space="x0", mode="unified_balanced")
    assert torch.autograd.gradcheck(lambda x: loss.distance(x, t, mask=mask, snr=snr, clean=clean), p.requires_grad_())


def test_the_target_and_what_balances_get_no_gradient() -> None:
    """F20."""
    p, t = pair(2, 2, 8, 8)
    t.requires_grad_()
    base, factor = torch.full((2,), 1e-4, dtype=F64).requires_grad_(), torch.ones(2, dtype=F64).requires_grad_()
    part = FourierLoss()(p.requires_grad_(), t, base=base, factor=factor, **ON)
    found = torch.autograd.grad(part.added.sum(), [p, t, base, factor], allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1:] == (None, None, None)
    assert not part.raw.requires_grad and not part.weight.requires_grad
    fixed = part.weight[:, None, None, None] * gradient(lambda x: FourierLoss().distance(x, t, progress=0.5), p)
    torch.testing.assert_close(found[0], fixed)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", NORMS)
def test_far_off_predictions_still_have_a_gradient(metric: str, norm: str) -> None:
    """F10."""
    p, t = pair(1, 2, 8, 8)
    loss = FourierLoss(metric=metric, norm=norm)
    assert float(loss.distance(1000 * p, t)) > 10
    assert gradient(lambda x: loss.distance(x, t), 1000 * p).norm() > 0.1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", freq_loss.NORMALIZERS)
def test_no_gradient_is_infinite_where_a_spectrum_or_a_spread_is_0(metric: str, norm: str, normalize: str) -> None:
    """F7 at |X| = 0, where a modulus without ε has none; fp32, as in training."""
    t = torch.randn(1, 2, 8, 8)
    for p, target in ((0 * t, t), (t, 0 * t), (0 * t, 0 * t), (t, t)):
        loss = FourierLoss(metric=metric, norm=norm, normalize=normalize, mode="unified_balanced")
        assert gradient(lambda x, loss=loss, target=target: loss.distance(x, target), p).isfinite().all()


# Samples and their weights


@pytest.mark.parametrize("mode", ["weighted", "unified_detail"])
@pytest.mark.parametrize("normalize", freq_loss.NORMALIZERS)
def test_no_sample_sees_another(mode: str, normalize: str) -> None:
    """F8."""
    p, t = pair(4, 2, 8, 10)
    p, t = p * torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=F64).view(-1, 1, 1, 1), t
    loss = FourierLoss(mode=mode, normalize=normalize)
    together = loss.distance(p, t)
    torch.testing.assert_close(together, torch.cat([loss.distance(p[i:i + 1], t[i:i + 1]) for i in range(4)]))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss.distance(p[order], t[order]), together[order])
    assert not gradient(lambda x: loss.distance(x, t)[1], p)[[0, 2, 3]].any()


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_of_weighted_losses_is_each_samples_own_times_its_weight(metric: str) -> None:
    """F9: factor multiplies, and nothing of one sample's enters another's."""
    p, t = pair(3, 2, 8, 8)
    factor = torch.tensor([0.2, 1.0, 5.0], dtype=F64)
    loss = FourierLoss(metric=metric)
    found = gradient(lambda x: loss(x, t, base=factor * mse(x.detach(), t), factor=factor, **ON).added, p)
    for i in range(3):
        alone = gradient(lambda x, i=i: loss(x, t[i:i + 1], base=mse(x.detach(), t[i:i + 1]), **ON).added, p[i:i + 1])
        torch.testing.assert_close(found[i:i + 1], factor[i] * alone)


def test_a_sample_of_factor_0_adds_exactly_0_and_no_gradient_even_if_infinite() -> None:
    p, t = pair(2, 2, 8, 8)
    p[0] = math.inf
    p.requires_grad_()
    part = FourierLoss()(p, t, base=torch.tensor([0.0, 1.0], dtype=F64), factor=torch.tensor([0.0, 1.0]), **ON)
    assert part.added[0] == 0 and part.added[1] > 0
    found = torch.autograd.grad(part.added.sum(), p)[0]
    assert not found[0].any() and found[1].isfinite().all()


def test_nan_is_not_hidden() -> None:
    """The trainer's policy for it shall see it, in the sample that has it alone."""
    p, t = pair(2, 2, 8, 8)
    p[0, 0, 0, 0] = math.nan
    assert FourierLoss()(p, t, base=mse(p, t), **ON).added.isnan().tolist() == [True, False]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize", freq_loss.NORMALIZERS)
def test_outside_of_the_mask_there_is_no_gradient(metric: str, normalize: str) -> None:
    """F24, also through the pooled scales and the spreads."""
    p, t = pair(2, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=F64)
    mask[..., 2:5, 3:7] = 1
    loss = FourierLoss(mode="unified_balanced", metric=metric, normalize=normalize)
    found = gradient(lambda x: loss.distance(x, t, mask=mask), p)
    assert not (found * (1 - mask)).any() and (found * mask).any()
    assert torch.equal(loss.distance(p, t, mask=mask), loss.distance(p + 7 * (1 - mask), t - 9 * (1 - mask), mask=mask))


def test_a_mask_scales_the_term_like_its_area() -> None:
    """As it scales a masked base: half the image, half the loss; the spread is of what is inside."""
    p, t = pair(1, 4, 32, 32)
    t = t + 3
    p = p + 3
    mask = torch.zeros(32, 32, dtype=F64)
    mask[:16] = 1
    for normalize in ("none", "target"):
        loss = FourierLoss(mode="basic", metric="complex", normalize=normalize)
        halves = [float(loss.distance(p, t, mask=m)) for m in (mask, 1 - mask)]
        assert sum(halves) == pytest.approx(float(loss.distance(p, t)), rel=0.02)


def test_an_empty_mask_and_an_empty_batch_give_finite_zeros() -> None:
    p, t = pair(2, 2, 8, 8)
    p.requires_grad_()
    for normalize in freq_loss.NORMALIZERS:
        found = FourierLoss(normalize=normalize).distance(p, t, mask=torch.zeros(8, 8))
        assert not found.any() and torch.autograd.grad(found.sum(), p)[0].isfinite().all()
    for shape in ((0, 2, 8, 8), (0, 8, 8), (0, 2, 3, 8, 8)):
        empty = torch.zeros(shape, dtype=F64)
        assert FourierLoss()(empty, empty, base=t.new_zeros(0), **ON).added.shape == (0,)
        assert FourierLoss(mode="unified").distance(empty, empty).shape == (0,)


# What it sees and what it does not


def test_complex_sees_sign_scale_and_shift_and_magnitude_only_scale() -> None:
    """F11."""
    t = torch.randn(1, 4, 16, 16, dtype=F64)
    shift = t.roll((3, 5), (2, 3))
    for mode in ("basic", "weighted"):
        seen = FourierLoss(mode=mode, metric="complex")
        assert all(float(seen.distance(p, t)) > 0.1 for p in (-t, 2 * t, shift))
        blind = FourierLoss(mode=mode)
        assert float(blind.distance(2 * t, t)) > 0.1
        assert all(float(blind.distance(p, t)) < 1e-20 for p in (-t, shift))


def test_a_blur_counts_more_than_an_equal_error_of_low_frequency() -> None:
    """F27: the point of the feature. Both errors have the same squared error; w = 2."""
    t = torch.randn(1, 4, 32, 32, dtype=F64)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(t, (1, 1, 1, 1), "circular"), 3, 1)
    y = torch.arange(32, dtype=F64)
    wave = (2 * math.pi / 32 * y).cos().expand(1, 4, 32, 32)
    smooth = t + wave * (mse(blurred, t) / wave.square().mean()).sqrt()
    assert float(mse(smooth, t)) == pytest.approx(float(mse(blurred, t)))
    for metric, times in {"magnitude": 1.05, "complex": 1.3}.items():
        loss = FourierLoss(metric=metric)
        assert float(loss.distance(blurred, t)) > times * float(loss.distance(smooth, t))


@pytest.mark.parametrize("metric", METRICS)
def test_where_the_target_is_noise_magnitude_wants_amplitude_and_complex_none(metric: str) -> None:
    """F25: one p for targets ±t with mean 0; optimum |P| = λR/(1 + λ), R = √π/2 for unit variance, or 0."""
    lam, half = 0.094, torch.randn(4000, 1, 8, 8, dtype=F64)
    targets = torch.cat([half, -half])
    loss = FourierLoss(mode="basic", metric=metric, normalize="none")
    p = 0.1 * torch.randn(1, 1, 8, 8, dtype=F64)
    for _ in range(8):  # Newton's steps: the objective has 2(1 + λ)/64 of curvature
        def both(x: Tensor) -> Tensor:
            x = x.expand_as(targets)
            return (mse(x, targets) + lam * loss.distance(x, targets)).mean()
        p = p - 64 / (2 * (1 + lam)) * gradient(both, p)
    sizes = torch.fft.fft2(p, norm="ortho").abs()[0, 0, 1:, 1:4].mean()  # none of them real
    wanted = lam * math.sqrt(math.pi) / 2 / (1 + lam) if metric == "magnitude" else 0.0
    assert float(sizes) == pytest.approx(wanted, rel=0.02, abs=1e-12)


def test_only_rescales_is_true_where_the_loss_is_the_squared_error() -> None:
    p, t = pair(2, 3, 9, 8)
    same = [dict(mode="basic"), dict(mode="weighted", high_freq_weight=1), dict(mode="multiscale", scales="1"),
            dict(mode="adaptive", adaptive_max_weight=1, adaptive_min_weight=0.5), dict(mode="basic", bands="high:1")]
    other = [dict(), dict(mode="multiscale"), dict(mode="adaptive"), dict(mode="unified_basic"),
             dict(mode="basic", norm="l1"), dict(mode="basic", normalize="target"), dict(mode="basic", bands="high:2"),
             dict(mode="basic", space="x0")]
    for settings in same:
        loss = FourierLoss(metric="complex", **settings)
        assert loss.only_rescales
        for progress in (0, 0.5, 1):
            torch.testing.assert_close(loss.distance(p, t, progress=progress), mse(p, t))
    for settings in other:
        assert not FourierLoss(metric="complex", **settings).only_rescales
        assert (FourierLoss(metric="complex", **settings).distance(p, t) / mse(p, t) - 1).abs().min() > 1e-3
    assert not FourierLoss(mode="basic").only_rescales
    assert not FourierLoss(mode="basic", metric="complex", timestep_gate="snr").only_rescales


# Shapes and precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_at_any_size(dtype: torch.dtype) -> None:
    """F12, under autocast too."""
    p, t = pair(2, 4, 13, 24, dtype=torch.float32)
    for mode in MODES:
        loss = FourierLoss(mode=mode)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss.distance(p.to(dtype), t.to(dtype))
        assert found.dtype == torch.float32 and found.isfinite().all()
        torch.testing.assert_close(found, loss.distance(p, t), rtol=1e-2, atol=0)


def test_frames_are_channels() -> None:
    """F17: [B,C,T,h,w] is the mean over its frames; [B,h,w] is one channel."""
    p, t = pair(2, 3, 4, 8, 8)
    for mode in ("multiscale", "unified"):
        loss = FourierLoss(mode=mode, normalize="none")
        frames = torch.stack([loss.distance(p[:, :, k], t[:, :, k]) for k in range(4)]).mean(0)
        torch.testing.assert_close(loss.distance(p, t), frames)
        torch.testing.assert_close(loss.distance(p[:, 0, 0], t[:, 0, 0]), loss.distance(p[:, :1, 0], t[:, :1, 0]))


def test_scales_that_leave_less_than_2x2_are_left_out_and_the_others_share_their_weight() -> None:
    """F18."""
    p, t = pair(2, 3, 7, 12)  # 7 // 2 = 3 is enough, 7 // 4 is not
    for mode in ("multiscale", "unified"):
        torch.testing.assert_close(FourierLoss(mode=mode, scales="1,2,4").distance(p, t),
                                   FourierLoss(mode=mode, scales="1,2").distance(p, t))
        none = FourierLoss(mode=mode, scales="4,8")
        for use in (lambda loss=none: loss.distance(p, t), lambda loss=none: loss.require((3, 7, 12))):
            with pytest.raises(ValueError, match="fourier_scales 4,8 .* side of 7: add the scale 1"):
                use()
    with pytest.raises(ValueError, match="leaves nothing"):
        FourierLoss(bands="low:0,mid:0,high:0").require((4, 8, 8))
    FourierLoss(mode="multiscale", scales="1,8").require((3, 7, 12))


def test_latents_of_one_pixel_are_told_of_the_resolution_and_not_of_the_scale_that_they_have() -> None:
    for settings in (dict(), dict(mode="multiscale", scales="1,2")):
        with pytest.raises(ValueError, match="train at a higher resolution") as error:
            FourierLoss(**settings).require((4, 1, 8))
        assert "scale" not in str(error.value)


def test_a_target_flatter_than_a_thousandth_counts_as_that_flat_and_others_as_ever() -> None:
    """A flat target divided by its own spread would make any error infinite."""
    p, t = pair(2, 4, 16, 16)
    flat, error = torch.full_like(t, 3.0), 0.01 * p
    whole = FourierLoss(mode="basic", metric="complex", normalize="target")
    torch.testing.assert_close(whole.distance(flat + error, flat), mse(error, 0 * t) * 1e6)
    torch.testing.assert_close(whole.distance(flat + error, flat + 1e-5 * t), mse(error, 1e-5 * t) * 1e6)
    for spread in (0.01, 1.0, 50.0):
        size = (spread * t).std((1, 2, 3), correction=0)
        torch.testing.assert_close(whole.distance(p, spread * t), mse(p, spread * t) / size**2)
    for normalize in ("target", "separate"):
        assert FourierLoss(normalize=normalize).distance(flat + error, flat).max() < 1e7


def test_what_has_no_two_spatial_axes_adds_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """F16."""
    p, t = pair(3, 5)
    freq_loss.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for step in (0, 1000, 1001):
            assert FourierLoss()(p, t, base=mse(p, t), step=step, total_steps=2000).added.tolist() == [0, 0, 0]
            assert len(caplog.records) == 1, "in the warm-up already"
    assert "at least 3 axes" in caplog.text


def test_different_shapes_are_refused() -> None:
    """F16: broadcast they would be compared wrongly. In the warm-up already, not after hours."""
    p, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        FourierLoss().distance(p, t)
    with pytest.raises(ValueError, match="one shape"):
        FourierLoss()(p, t, base=torch.ones(2), step=0, total_steps=2000)


@pytest.mark.parametrize(("name", "shape"), [
    ("base", ()), ("base", (3,)), ("base", (2, 1)), ("factor", (3,)), ("factor", (2, 4)), ("snr", ()), ("snr", (1, 2)),
    ("mask", (3, 1, 8, 8)), ("mask", (4, 7, 8)), ("mask", (1, 2, 4, 8, 8)), ("clean", (2, 1, 8, 8))])
def test_tensors_of_a_wrong_shape_are_refused_by_name_in_the_warm_up_already(name: str, shape: tuple) -> None:
    p, t = pair(2, 4, 8, 8)
    given = dict(base=torch.ones(2), snr=torch.ones(2), clean=t) | {name: torch.ones(shape)}
    for step in (0, 1000):
        with pytest.raises(ValueError, match=rf"{name} \(.*: give "):
            FourierLoss(timestep_gate="wiener")(p, t, step=step, total_steps=2000, **given)


def test_masks_of_every_shape_that_broadcasts_are_taken() -> None:
    p, t = pair(2, 4, 8, 6)
    whole = FourierLoss().distance(p, t)
    for shape in ((), (6,), (8, 6), (1, 8, 6), (4, 1, 1), (2, 1, 8, 6), (2, 4, 8, 6)):
        torch.testing.assert_close(FourierLoss().distance(p, t, mask=torch.ones(shape)), whole)


def test_spectra_and_single_numbers_are_refused() -> None:
    p, t = pair(2, 4, 8, 8)
    for pred, target in ((torch.fft.fft2(p), t), (p, torch.fft.fft2(t))):
        with pytest.raises(ValueError, match="compares real tensors: give those"):
            FourierLoss().distance(pred, target)
    with pytest.raises(ValueError, match="give \\[B"):
        FourierLoss().distance(torch.ones(()), torch.ones(()))


# Off, ramp, balance


def test_while_off_no_spectrum_is_computed_and_the_base_is_the_same_to_the_bit(ffts: list) -> None:
    """F15: weight 0, warm-up, all gates closed, all factors 0."""
    p, t = pair(2, 4, 8, 8, dtype=torch.float32)
    base, snr = mse(p, t), torch.tensor([0.01, 0.02])
    off = [(FourierLoss(weight=0), dict(step=5000)), (FourierLoss(), dict(step=299)),
           (FourierLoss(timestep_gate="snr"), dict(step=300, snr=snr)),
           (FourierLoss(timestep_gate="linear"), dict(step=300, snr=snr)),
           (FourierLoss(), dict(step=300, factor=torch.zeros(2))), (FourierLoss(), dict(step=300, gain=0.0))]
    for loss, at in off:
        part = loss(p, t, base=base, total_steps=2000, **at)
        assert torch.equal(base + part.added, base) and not part.raw.any() and not part.weight.any()
    assert not ffts
    FourierLoss()(p, t, base=base, step=300, total_steps=2000)
    assert len(ffts) == 2


def test_warm_up_and_ramp_count_optimizer_steps() -> None:
    hard, soft = FourierLoss(), FourierLoss(ramp_steps=100)
    assert [hard.ramp(step) for step in (0, 299, 300, 301)] == [0, 0, 1, 1]
    assert [soft.ramp(step) for step in (299, 300, 350, 400, 500)] == [0, 0, 0.5, 1, 1]
    assert [hard.idle(299), hard.idle(300), FourierLoss(weight=0).idle(300)] == [True, False, True]


@pytest.mark.parametrize(("ratio", "share"), [(1, 1), (10, 1), (20, 0.5), (1000, 0.1)])
def test_the_cap_lowers_the_weight_of_a_sample_whose_term_outgrows_its_base(ratio: float, share: float) -> None:
    """F20; b is of factor · L_F, in the units of the base."""
    p, t = pair(2, 4, 8, 8)
    factor = torch.tensor([1.0, 0.25], dtype=F64)
    raw = FourierLoss().distance(p, t, progress=0.5)
    part = FourierLoss()(p, t, base=factor * raw / ratio, factor=factor, **ON)
    assert part.weight.tolist() == pytest.approx([0.05 * share] * 2)
    torch.testing.assert_close(part.added, factor * part.weight * raw)
    assert FourierLoss(balance="none")(p, t, base=factor * raw / ratio, factor=factor, **ON).weight.tolist() == [
        0.05, 0.05]


def test_added_is_the_product_of_what_it_says() -> None:
    """F21's part of the loss: added = factor · weight · raw, weight = weight · gain · ramp · g."""
    p, t = pair(2, 4, 8, 8)
    factor, snr = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([1.0, 100.0], dtype=F64)
    loss = FourierLoss(ramp_steps=100, timestep_gate="linear")
    part = loss(p, t, base=mse(p, t), factor=factor, snr=snr, gain=3.0, step=350, total_steps=700)
    torch.testing.assert_close(part.weight, 0.05 * 3 * 0.5 * torch.tensor([0.5, 1.0], dtype=F64))
    torch.testing.assert_close(part.added, factor * part.weight * part.raw)
    torch.testing.assert_close(part.raw, FourierLoss().distance(p, t))


# Gates, x0, bands


def test_gates_by_signal_to_noise_ratio() -> None:
    p, t = pair(5, 2, 8, 8)
    snr = torch.tensor([0.0, 0.1, 1.0, 10.0, math.inf], dtype=F64)
    whole = FourierLoss().distance(p, t)
    for gate, shares in {"snr": [0, 1, 1, 1, 1], "linear": [0, 0, 0.5, 1, 1]}.items():
        found = FourierLoss(timestep_gate=gate).distance(p, t, snr=snr)
        torch.testing.assert_close(found, whole * torch.tensor(shares, dtype=F64), rtol=1e-6, atol=1e-9)


def test_wiener_is_the_share_of_signal_in_every_frequency_and_scale() -> None:
    """White clean latents of power S: S·snr/(S·snr + 1) everywhere; pooling by s weakens both alike."""
    clean = 2 * torch.randn(1, 256, 32, 32, dtype=F64)
    p, t = (torch.randn(1, 256, 32, 32, dtype=F64) for _ in range(2))
    for settings in (dict(), dict(mode="multiscale", scales="1,2,4")):
        gated, whole = (FourierLoss(timestep_gate=gate, metric="complex", **settings).distance(
            p, t, snr=torch.tensor([0.5]), clean=clean) for gate in ("wiener", "none"))
        assert float(gated / whole) == pytest.approx(2 / 3, rel=0.02)


def test_wiener_knows_the_rings_of_the_clean_spectrum() -> None:
    """A clean wave opens its own ring alone; SNR 0 closes and infinite SNR opens what has signal."""
    y, x = torch.arange(16, dtype=F64)[:, None], torch.arange(20, dtype=F64)
    clean = ((2 * math.pi * 3 / 20 * x).cos() + 0 * y).expand(1, 2, 16, 20)
    gate = freq_loss.wiener(clean, torch.tensor([1.0], dtype=F64))[0]
    radius = torch.hypot(torch.fft.fftfreq(16, dtype=F64)[:, None], torch.fft.rfftfreq(20, dtype=F64)) * 20
    on_ring = (radius - 3).abs() < 0.5
    assert gate[on_ring].min() > 0.5 and gate[~on_ring].max() < 1e-12
    spectrum = torch.fft.fft2(clean, norm="ortho").abs().square().mean(1)[0]
    full = torch.hypot(torch.fft.fftfreq(16, dtype=F64)[:, None], torch.fft.fftfreq(20, dtype=F64)) * 20
    S = spectrum[(full - 3).abs() < 0.5].mean()
    assert float(gate[0, 3]) == pytest.approx(float(S / (S + 1)))
    ends = freq_loss.wiener(torch.randn(2, 2, 16, 20), torch.tensor([0.0, math.inf]))
    assert not ends[0].any() and torch.allclose(ends[1], torch.ones(()))


def test_gates_ask_for_what_they_go_by() -> None:
    p, t = pair(1, 2, 8, 8)
    for gate in ("snr", "linear", "wiener"):
        with pytest.raises(ValueError, match=f"fourier_timestep_gate {gate} goes by .*snr"):
            FourierLoss(timestep_gate=gate).distance(p, t)
    with pytest.raises(ValueError, match="and the clean latents"):
        FourierLoss(timestep_gate="wiener")(p, t, base=mse(p, t), snr=torch.ones(1), **ON)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_in_x0_space_an_exact_prediction_is_0_and_the_error_has_its_factor(kind: str) -> None:
    """F19: x̂0 − x0 is −(s/a) of ε's error, −s of v's, −s of a flow's; the mean of a channel does not count."""
    x0, e = pair(2, 4, 8, 8)
    a, s = (0.8, 0.6) if kind != "flow" else (0.7, 0.3)
    noisy = a * x0 + s * e
    target = {"eps": e, "v": a * e - s * x0, "flow": e - x0}[kind]
    to_x0 = {"eps": lambda out: (noisy - s * out) / a, "v": lambda out: a * noisy - s * out,
             "flow": lambda out: noisy - s * out}[kind]
    ratio = s / a if kind == "eps" else s
    guess = target + 0.1 * torch.randn_like(target)
    for metric in METRICS:
        for norm in NORMS:
            loss = FourierLoss(space="x0", metric=metric, norm=norm, mode="unified")
            assert loss.distance(to_x0(target), x0).abs().max() < 1e-12
    complex_ = FourierLoss(space="x0", metric="complex")
    torch.testing.assert_close(complex_.distance(to_x0(guess), x0), ratio**2 * complex_.distance(guess, target))
    for loss in (complex_, FourierLoss(space="x0")):
        torch.testing.assert_close(loss.distance(to_x0(guess) + 5, x0), loss.distance(to_x0(guess), x0))
    tilted = x0 + torch.arange(4, dtype=F64).view(-1, 1, 1)
    torch.testing.assert_close(FourierLoss(space="x0").distance(to_x0(guess) + (tilted - x0), tilted),
                               FourierLoss(space="x0").distance(to_x0(guess), x0))


def test_bands_weigh_ranges_of_frequency_and_leave_the_others() -> None:
    """low, mid, high are thirds of ρ̂; ranges are half-open, 1 is inside; at a scale they are the latents' own."""
    y = torch.arange(16, dtype=F64)

    def counts(k: int, bands: str, **settings: object) -> float:
        wave = (2 * math.pi * k / 16 * (y[:, None] + y)).cos()[None, None]
        return float(FourierLoss(metric="complex", mode="basic", bands=bands, **settings).distance(wave, 0 * wave)
                     / FourierLoss(metric="complex", mode="basic", **settings).distance(wave, 0 * wave))

    assert [counts(k, "low:0.5,high:2") for k in (0, 2, 3, 5, 6, 8)] == pytest.approx([0.5, 0.5, 1, 1, 2, 2])
    assert [counts(k, "0.25-0.5:3") for k in (1, 2, 3, 4)] == pytest.approx([1, 3, 3, 1])
    p, t = pair(1, 2, 16, 16)
    pooled = FourierLoss(mode="multiscale", scales="2", metric="complex")
    high = FourierLoss(mode="multiscale", scales="2", metric="complex", bands="high:7")
    torch.testing.assert_close(pooled.distance(p, t), high.distance(p, t), msg="pooled by 2 there are none above ½")


def test_bands_multiply_the_mask_and_leave_magnitude_its_spread() -> None:
    p, t = pair(2, 2, 8, 8)
    parts = [FourierLoss(bands=b).distance(p, t) for b in ("mid:0,high:0", "low:0,high:0", "low:0,mid:0")]
    torch.testing.assert_close(sum(parts), FourierLoss().distance(p, t))
    torch.testing.assert_close(parts[0] + parts[1] + 3 * parts[2], FourierLoss(bands="high:3").distance(p, t))


# Cost


@pytest.mark.parametrize(("mode", "scales"), [("basic", 1), ("weighted", 1), ("adaptive", 1), ("multiscale", 2),
                                              ("unified", 3), ("unified_basic", 1), ("unified_balanced", 2),
                                              ("unified_detail", 3), ("unified_adaptive", 2)])
def test_a_scale_costs_two_transforms_by_magnitude_and_one_by_complex(ffts: list, mode: str, scales: int) -> None:
    """Full size and first scale are one computation in unified modes."""
    p, t = pair(1, 4, 16, 16)
    for metric, each in (("magnitude", 2), ("complex", 1)):
        ffts.clear()
        FourierLoss(mode=mode, metric=metric).distance(p, t)
        assert len(ffts) == each * scales


def test_a_second_epoch_of_64_bucket_sizes_makes_no_mask() -> None:
    """F13: also at another progress."""
    loss = FourierLoss(mode="unified", timestep_gate="wiener")

    def epoch(progress: float) -> int:
        before = _cached.cache_info().misses
        for k in range(64):
            p, t = pair(1, 1, 8 + k, 72 - k)
            loss.distance(p, t, snr=torch.ones(1), clean=t, progress=progress)
        return _cached.cache_info().misses - before

    assert epoch(0.0) >= 64
    assert epoch(0.7) == 0


def test_the_spread_of_the_target_is_computed_once_a_scale() -> None:
    seen: list[Tensor] = []
    p, t = pair(2, 1, 8, 8)
    freq_loss.NORMALIZERS["target"](lambda x: (seen.append(x), x.std())[1], p, t)
    assert len(seen) == 1 and seen[0] is t


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator whose waits torch can watch")
@pytest.mark.parametrize("mode", MODES)
def test_the_device_is_never_waited_for(mode: str) -> None:
    """F13."""
    p, t = (torch.randn(2, 4, 16, 16, device="cuda") for _ in range(2))
    p.requires_grad_()
    snr, base = torch.ones(2, device="cuda"), mse(p.detach(), t)
    for gate in freq_loss.GATES:
        loss = FourierLoss(mode=mode, timestep_gate=gate)
        go = dict(base=base, snr=snr, clean=t, factor=torch.ones_like(base), **ON)
        loss(p, t, **go).added.sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(p, t, **go).added.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
