"""freq_loss: operators are what they say; the loss is its formula on any number of processes, and keeps the optimum.

The tolerances are of fp64 unless a test says otherwise.
"""

from __future__ import annotations

import builtins
import itertools
import json
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

import freq_loss
import trainkit.frequency
from freq_loss import DB3, KERNELS, STATISTICS, Bands, DistributionMatchingLoss, LowPass, frequency_decomposition, taps
from tests.support import ROOT
from tests.support.sources import module_imports
from tests.support.two_ranks import on_two_ranks
from trainkit.runtime import ranks

F64 = torch.float64
SQUARES = (16, 24, 52, 53, 64, 79, 128)
SIZES = [(n, n) for n in SQUARES] + [(96, 160), (52, 78), (53, 79), (5, 7), (1, 9)]
DCT, FFT, ZERO = LowPass("dct"), LowPass("fft"), LowPass("wavelet")
PERIODIC = LowPass("wavelet", boundary="periodization")
LIBRARY_ZERO = LowPass("wavelet", backend="pytorch_wavelets")
LIBRARY_PERIODIC = LowPass("wavelet", boundary="periodization", backend="pytorch_wavelets")
OPERATORS = {"dct": DCT, "fft": FFT, "zero": ZERO, "periodization": PERIODIC, "bior4.4": LowPass("wavelet", "bior4.4"),
             "dct J=3": LowPass("dct", levels=3), "library zero": LIBRARY_ZERO,
             "library periodization": LIBRARY_PERIODIC}
ORTHOGONAL = {"dct": DCT, "fft": FFT, "periodization": PERIODIC}
SNR = 0.193  # at timestep 599 of Stable Diffusion's schedule
pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources", "ignore:Level value")  # of the wavelet packages


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def possible(low: LowPass, h: int, w: int) -> bool:
    try:
        low.refuse_size(h, w)
    except ValueError:
        return False
    return True


def cases(operators: dict[str, LowPass], sizes: Iterable[tuple[int, int]]) -> list:
    """Every operator at every size that it takes."""
    return [pytest.param(low, size, id=f"{name}-{size[0]}x{size[1]}")
            for name, low in operators.items() for size in sizes if possible(low, *size)]


def latents(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dense(low: LowPass, h: int, w: int) -> Tensor:
    """The operator as a matrix [h·w, h·w], column by column."""
    return low(torch.eye(h * w, dtype=F64).view(h * w, h, w)).reshape(h * w, h * w).T


def make(**changes: object) -> DistributionMatchingLoss:
    """The seed's form unless changed: sum, x0, divided by the whole grid."""
    settings = dict(gain=0.003, statistic="sum", band_norm="grid")
    return DistributionMatchingLoss(**(settings | changes))


def unbiased(**changes: object) -> DistributionMatchingLoss:
    return make(**(dict(gain=1.0, statistic="u") | changes))


def losses_of(loss: DistributionMatchingLoss, x0_hat: Tensor, x0: Tensor, *, snr: object = SNR, weight: object = 1.0,
              alike: Tensor | None = None, image: Tensor | None = None) -> Tensor:
    snr, weight = (torch.as_tensor(v, dtype=x0.dtype).expand(len(x0)) for v in (snr, weight))
    return loss(x0_hat, x0, snr=snr, weight=weight, alike=alike, picture=image)


def term_of(*args: object, **kwargs: object) -> Tensor:
    return losses_of(*args, **kwargs).mean()


def value_and_grad(loss: DistributionMatchingLoss, error: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """(term, its gradient on the error [B,C,h,w])."""
    error = error.clone().requires_grad_()
    term = term_of(loss, error, torch.zeros_like(error), **kwargs)
    term.backward()
    return term.detach(), error.grad


# Decomposition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "size"), cases(OPERATORS, SIZES))
def test_low_and_high_add_up_and_keep_shape_and_dtype(low, size):
    for dtype, tolerance in ((F64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        x = latents(2, 3, *size).to(dtype)
        parts = frequency_decomposition(x, low.method, low.wavelet, low.levels, boundary=low.boundary,
                                        backend=low.backend)
        assert all(part.dtype == dtype and part.shape == x.shape for part in parts)
        torch.testing.assert_close(sum(part.double() for part in parts), x.double(), rtol=0, atol=4 * tolerance)


def test_any_number_of_leading_dimensions():
    x = latents(2, 3, 4, 16, 24)
    for low in (DCT, FFT, ZERO, LIBRARY_ZERO):
        assert low(x[:0]).shape == (0, 3, 4, 16, 24)
        torch.testing.assert_close(low(x)[1, 2, 3], low(x[1, 2, 3]), rtol=0, atol=1e-6)


def test_the_default_is_the_wavelet_of_the_seed():
    low, _ = frequency_decomposition(x := latents(1, 1, 20, 33))
    torch.testing.assert_close(low, by_pywavelets(x, "db3", 2, "zero"), rtol=0, atol=1e-12)


def test_operators_first_used_in_inference_mode_train_later():
    fresh = LowPass("dct", levels=3)
    with torch.inference_mode():
        fresh(torch.zeros(17, 19))
    x = torch.ones(17, 19, requires_grad=True)
    (fresh(x) * torch.randn(17, 19)).sum().backward()
    assert x.grad.abs().sum() > 0


# O1: orthogonality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "size"), cases(ORTHOGONAL, SIZES))
def test_orthogonal_methods_are_orthogonal_projectors(low, size):
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 2e-6)):
        x, y = latents(2, *size, dtype=dtype)
        px, py = low(x), low(y)
        assert relative(low(px), px) <= tolerance, "P² = P"
        scale = float(x.norm() * y.norm())
        assert abs(float((px * y).sum() - (x * py).sum())) <= tolerance * scale, "Pᵀ = P"
        energies = px.square().sum() + (x - px).square().sum()
        assert abs(float(energies / x.square().sum()) - 1) <= tolerance, "Parseval"


@pytest.mark.parametrize(("low", "size"), cases(ORTHOGONAL, [(12, 16), (13, 9), (8, 20)]))
def test_a_bands_degrees_of_freedom_are_its_rank(low, size):
    rank = int(torch.linalg.matrix_rank(dense(low, *size), atol=1e-6))
    assert Bands(low).degrees((4, *size)) == pytest.approx((4 * rank, 4 * (math.prod(size) - rank)), abs=1e-6)


@pytest.mark.parametrize(("n", "levels", "kept"), [(64, 2, 16), (53, 2, 13), (79, 2, 20), (79, 3, 10), (3, 4, 1)])
def test_the_dct_keeps_the_lowest_cosines_of_a_side(n, levels, kept):
    low, middles = LowPass("dct", levels=levels), torch.arange(n, dtype=F64) + 0.5
    for k, share in ((kept - 1, 1.0), (kept, 0.0)):
        wave = (math.pi * k / n * middles).cos().expand(1, n)
        torch.testing.assert_close(low(wave), share * wave, rtol=0, atol=1e-12)


def test_the_disc_is_round_in_cycles_per_pixel_on_oblong_latents():
    h, w = 96, 160
    y, x = torch.arange(h, dtype=F64)[:, None], torch.arange(w, dtype=F64)
    for k, n, wave in ((12, h, y.expand(h, w)), (20, w, x.expand(h, w))):  # 12/96 = 20/160 = 1/8 cycle per pixel
        inside, outside = ((2 * math.pi * j / n * wave).cos() for j in (k, k + 1))
        assert relative(FFT(inside), inside) < 1e-12
        assert float(FFT(outside).norm() / outside.norm()) < 1e-12


# O2: gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "size"), cases(OPERATORS, SIZES))
def test_the_gradient_is_the_adjoint(low, size):
    u, v = latents(2, 1, 1, *size, dtype=torch.float32)
    u.requires_grad_()
    image = low(u)
    image.backward(v)
    gap = float((image.detach().double() * v.double()).sum() - (u.detach().double() * u.grad.double()).sum())
    assert abs(gap) <= 1e-6 * float(u.detach().norm() * v.norm())


@pytest.mark.parametrize("mode", ["symmetric", "reflect"])
def test_the_modes_that_are_refused_fail_against_their_true_adjoint(mode):
    u, v = latents(2, 1, 1, 32, 32, dtype=torch.float32)
    u.requires_grad_()
    by_pytorch_wavelets(u, "db3", 2, mode).backward(v)
    with torch.no_grad():
        images = by_pytorch_wavelets(torch.eye(32 * 32).view(-1, 1, 32, 32), "db3", 2, mode)  # A, column by column
    assert relative(u.grad.flatten(), (images * v).sum((1, 2, 3))) > 0.1


# O3: against the libraries --------------------------------------------------------------------------------------------


def by_pywavelets(x: Tensor, wavelet: str, levels: int, mode: str) -> Tensor:
    h, w = x.shape[-2:]
    coarse, *details = pywt.wavedec2(x.detach().numpy(), wavelet, mode=mode, level=levels)
    kept = [coarse, *(tuple(np.zeros_like(d) for d in level) for level in details)]
    return torch.from_numpy(pywt.waverec2(kept, wavelet, mode=mode)[..., :h, :w])


def by_pytorch_wavelets(x: Tensor, wavelet: str, levels: int, mode: str) -> Tensor:
    from pytorch_wavelets import DWTForward, DWTInverse

    coarse, details = DWTForward(J=levels, wave=wavelet, mode=mode)(x)
    low = DWTInverse(wave=wavelet, mode=mode)((coarse, [torch.zeros_like(d) for d in details]))
    return low[..., :x.shape[-2], :x.shape[-1]]


def test_the_constants_are_db3():
    assert taps("db3")[0] == DB3
    assert pytest.approx(pywt.Wavelet("db3").dec_lo, abs=1e-15) == DB3


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", ["db3", "haar", "bior2.2", "bior4.4", "sym8"])
@pytest.mark.parametrize("size", [(16, 24), (53, 79), (64, 64), (5, 7), (8, 8)], ids=str)
def test_the_matrix_form_is_pywavelets(wavelet, levels, size):
    x = latents(1, 2, *size)
    for mode in ("zero", "periodization"):
        low = LowPass("wavelet", wavelet, levels, mode)
        if possible(low, *size):
            torch.testing.assert_close(low(x), by_pywavelets(x, wavelet, levels, mode), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("backend", "size"), cases(
    {"zero": LIBRARY_ZERO, "periodization": LIBRARY_PERIODIC},
    [(64, 64), (128, 128), (96, 160), (52, 76), (53, 79), (12, 12)]))
def test_the_matrix_form_and_its_gradient_are_pytorch_wavelets(backend, size):
    x, v = latents(2, 2, 4, *size, dtype=torch.float32)
    results = []
    for low in (backend, replace(backend, backend="matrix")):
        leaf = x.clone().requires_grad_()
        image = low(leaf)
        image.backward(v)
        results.append((image.detach(), leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        assert relative(ours, theirs) <= 1e-6


# O4: what is low ------------------------------------------------------------------------------------------------------


def energy_ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.square().sum() / whole.square().sum())


@pytest.mark.parametrize("n", [53, 64, 128])
def test_dct_bands_are_pure(n):
    m = torch.arange(n, dtype=F64)

    def rows(v: Tensor) -> Tensor:
        return v.expand(n, n)

    constant, ramp, nyquist = rows(torch.ones(n, dtype=F64)), rows(m), rows((-1.0) ** m)
    assert energy_ratio(constant - DCT(constant), constant) <= 1e-10
    assert energy_ratio(ramp - DCT(ramp), ramp) <= 1e-3
    assert energy_ratio(DCT(nyquist), nyquist) <= 1e-2
    kept = dense(LowPass("dct"), 1, n)  # of every unit impulse along one side: white noise
    above = (torch.fft.rfftfreq(n) > 0.25).double() * 2
    total = torch.full_like(above, 2.0)
    total[0] = 1
    spectrum = torch.fft.rfft(kept, dim=0).abs().square().sum(1)
    assert float((spectrum * above).sum() / (spectrum * total).sum()) <= 0.02


@pytest.mark.parametrize(("low", "size"), cases(
    {name: replace(low, levels=3) for name, low in ORTHOGONAL.items()}, [(64, 64), (53, 79), (96, 160)]))
def test_j_plus_one_bands_are_orthogonal_and_add_up(low, size):
    bands = Bands(low, 4)
    x, y = bands.split(latents(3, 2, *size)), bands.split(latents(3, 2, *size))
    gram = torch.einsum("abcde,fbcde->af", x, y) / (x[0].norm() * y[0].norm())
    assert float((gram - gram.diag().diag()).abs().max()) <= 1e-10
    again = bands.split(x[2])
    torch.testing.assert_close(again[2], x[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(x[:3].sum(0), replace(low, levels=1)(x.sum(0)), rtol=0, atol=1e-10)
    assert sum(bands.degrees((2, *size))) == pytest.approx(2 * math.prod(size))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "says"), [
    (dict(method="haar"), "choose one of wavelet, fft, dct"),
    (dict(boundary="symmetric"), "gradients wrong"),
    (dict(boundary="reflect"), "gradients wrong"),
    (dict(boundary="periodic"), "gradients wrong"),
    (dict(backend="ptwt"), "choose one of matrix, pytorch_wavelets"),
    (dict(backend="pytorch_wavelets", method="dct"), "computes wavelets only"),
    (dict(J=0), "J must be 1 or more"),
    (dict(wavelet="db99"), "not a discrete wavelet"),
    (dict(wavelet="morl"), "not a discrete wavelet"),
    (dict(boundary="periodization"), "2^J = 4 must divide both sides"),
    (dict(boundary="periodization", backend="pytorch_wavelets"), "2^J = 4 must divide both sides"),
], ids=str)
def test_a_decomposition_that_cannot_be_had_is_refused_with_the_reason(settings, says):
    with pytest.raises(ValueError) as refused:
        frequency_decomposition(torch.zeros(1, 1, 26, 28), **settings)
    assert says in str(refused.value)


def test_the_library_is_refused_where_it_wraps_wrongly():
    x = latents(1, 1, 8, 8)
    with pytest.raises(ValueError, match="sides below 12"):
        LIBRARY_PERIODIC(x)
    off = by_pytorch_wavelets(x.float(), "db3", 2, "periodization").double()
    assert relative(off, by_pywavelets(x, "db3", 2, "periodization")) > 0.1, "mended upstream: lift the refusal"


@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(4, 4).long(), torch.zeros(4, 4, dtype=torch.cfloat)],
                         ids=["1-D", "integer", "complex"])
def test_what_is_no_image_is_refused(x):
    with pytest.raises(ValueError, match="real numbers of shape"):
        DCT(x)


@pytest.mark.parametrize(("missing", "low", "says"), [
    ("pywt", LowPass("wavelet"), None),
    ("pywt", partial(LowPass, "wavelet", "db7"), "pip install PyWavelets, or use db3"),
    ("pytorch_wavelets", partial(LowPass, "wavelet", levels=5, backend="pytorch_wavelets"), "setuptools<82"),
], ids=["db3", "db7", "backend"])
def test_a_missing_package_is_named_and_db3_needs_none(monkeypatch, missing, low, says):
    real = builtins.__import__

    def absent(name: str, *args: object) -> object:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    if says is None:
        assert low(torch.ones(9, 9)).shape == (9, 9)
        return
    with pytest.raises(ImportError) as refused:
        low()(torch.zeros(1, 1, 64, 64))
    assert says in str(refused.value)


@pytest.mark.parametrize(("settings", "says"), [
    (dict(statistic="v"), "choose one of sum, diagonal, u"),
    (dict(band_norm="rms"), "choose one of grid, dof, whiten"),
    (dict(timestep_weight="v"), "choose one of x0, eps, whiten"),
    (dict(kernel="cosine"), "choose one of none, class, text, latent"),
    (dict(gain=-1.0), "not negative"),
    (dict(weights=(0.0, 0.0)), "one weight above 0"),
    (dict(weights=(0.7, -0.3)), "not negative"),
    (dict(weights=(1.0, 1.0, 1.0, 1.0)), "4 bands cannot be had of 2 levels"),
    (dict(weights=(1.0, 1.0, 1.0), method="wavelet"), "would overlap"),
    (dict(weights=(1.0, 1.0, 1.0), method="wavelet", wavelet="bior2.2", boundary="periodization"), "would overlap"),
    (dict(band_norm="whiten", timestep_weight="whiten"), "would do again"),
    (dict(statistic="diagonal", kernel="class"), "compares no two samples"),
    (dict(statistic="sum", bank=0.9), "needs the statistic u"),
    (dict(statistic="u", bank=0.9, kernel="text"), "the kernel none or class"),
    (dict(statistic="u", bank=1.0), "below 1"),
    (dict(window=(3.0, 0.2)), "lower end first"),
], ids=str)
def test_a_loss_that_makes_no_sense_is_refused_with_the_reason(settings, says):
    with pytest.raises(ValueError) as refused:
        make(**settings)
    assert says in str(refused.value)


def test_the_kernel_is_told_by_what_to_compare_and_only_then():
    x0 = latents(2, 1, 8, 8)
    for loss, alike, says in (
        (make(kernel="class"), None, "must be given"), (make(), torch.zeros(2, 3), "left out for none"),
        (make(kernel="class"), torch.zeros(2), "integer"), (make(kernel="text"), None, "must be given"),
    ):
        with pytest.raises(ValueError, match=says):
            losses_of(loss, x0, x0, alike=alike)


def test_latents_too_small_for_a_band_are_refused():
    with pytest.raises(ValueError, match="too small for 4 bands"):
        losses_of(make(levels=3, weights=(1, 1, 1, 1)), latents(2, 1, 2, 2), latents(2, 1, 2, 2))


# L1: the parametrisations ---------------------------------------------------------------------------------------------


def recovered(x0: Tensor, n: Tensor, miss: Tensor, name: str, a: float, s: float) -> Tensor:
    """x̂0 of a network in the given parametrisation whose noise estimate misses by `miss`."""
    z = a * x0 + s * n
    noise = n + miss
    clean = (z - s * noise) / a
    return {
        "epsilon": lambda: (z - s * noise) / a,
        "v_prediction": lambda: a * z - s * (a * noise - s * clean),
        "sample": lambda: clean,
        "flow": lambda: z / (a + s) - s / (a + s) * (noise - clean),  # a + s brings z to the straight path, same SNR
    }[name]()


PARAMETRISATIONS = ("epsilon", "v_prediction", "sample", "flow")


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_every_parametrisation_of_one_denoiser_has_the_same_term(dtype, tolerance):
    a, s = math.sqrt(0.1618), math.sqrt(1 - 0.1618)
    x0, n, miss = latents(3, 4, 4, 16, 16, dtype=dtype)
    terms = [float(term_of(make(), recovered(x0, n, 0.1 * miss, name, a, s), x0)) for name in PARAMETRISATIONS]
    assert terms == pytest.approx([terms[0]] * 4, rel=tolerance)
    assert terms[0] > 0


# L2: the target -------------------------------------------------------------------------------------------------------


def test_inverting_the_noise_gives_the_clean_latents_unless_the_input_was_perturbed():
    a, s = math.sqrt(0.4245), math.sqrt(1 - 0.4245)
    x0, n, miss, more = latents(4, 4, 4, 16, 16)
    for perturbation, same in ((0.0, True), (0.1, False)):
        z = a * x0 + s * (n + perturbation * more)
        x0_hat, inverted = (z - s * (n + 0.1 * miss)) / a, (z - s * n) / a
        clean, other = (float(term_of(make(), x0_hat, target)) for target in (x0, inverted))
        assert (abs(clean - other) <= 1e-12 * clean) == same


# L3: the fused form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dct", "wavelet", "fft"])
def test_one_split_of_the_errors_equals_four_decompositions_of_the_batch_sums(method):
    x0, miss, weight = latents(4, 4, 16, 24), latents(4, 4, 16, 24), torch.tensor([1.0, 0.3, 2.0, 0.0], dtype=F64)
    results = []
    for fused in (True, False):
        x0_hat = (x0 + miss).requires_grad_()
        if fused:
            term = term_of(make(method=method), x0_hat, x0, weight=weight)
        else:
            sums = [(weight.view(-1, 1, 1, 1) * v).sum(0) for v in (x0_hat, x0)]
            (low, high), (low0, high0) = (frequency_decomposition(v, method) for v in sums)
            term = 0.003 * (0.7 * (low - low0).square().mean() + 0.3 * (high - high0).square().mean())
        term.backward()
        results.append((term.detach(), x0_hat.grad))
    for ours, explicit in zip(*results, strict=True):
        torch.testing.assert_close(ours, explicit, rtol=1e-6, atol=1e-12)


# L4: noise and latent space -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(statistic="u"), dict(statistic="u", band_norm="dof"),
                                      dict(statistic="u", band_norm="whiten")], ids=str)
def test_at_one_timestep_the_latent_space_is_the_noise_space_over_the_snr(settings):
    x0, x0_hat = latents(2, 4, 4, 16, 16)
    in_x0, in_eps = (float(term_of(make(**settings, timestep_weight=w), x0_hat, x0)) for w in ("x0", "eps"))
    assert in_x0 * SNR == pytest.approx(in_eps, rel=1e-12)


# L5: the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [DCT, ZERO, LowPass("wavelet", "bior4.4")], ids=["dct", "zero", "bior4.4"])
def test_the_gradient_is_the_closed_form(low):
    error, weight = latents(3, 2, 9, 12), torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    loss = make(method=low.method, wavelet=low.wavelet, boundary=low.boundary)
    _, grad = value_and_grad(loss, error, weight=weight)
    p = dense(low, 9, 12)
    q = torch.eye(len(p), dtype=F64) - p
    k = 0.7 * p.T @ p + 0.3 * q.T @ q
    d = (weight.view(-1, 1, 1, 1) * error).sum(0).flatten(1)  # [C,h·w]
    expected = 2 * 0.003 / (2 * 9 * 12) * weight.view(-1, 1, 1) * (d @ k)
    torch.testing.assert_close(grad.flatten(2), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("band_norm", ["grid", "dof"])
@pytest.mark.parametrize(("statistic", "kernel"), [("diagonal", "none"), *itertools.product(
    ("sum", "u"), ("none", "latent", "class"))])
def test_the_gradient_is_the_central_difference(statistic, kernel, band_norm):
    error, direction = latents(2, 4, 2, 8, 8)
    alike = {"none": None, "latent": latents(4, 5), "class": torch.tensor([3, 3, 8, 8])}[kernel]
    given = dict(snr=torch.tensor([0.2, 0.5, 1.0, 3.0]), weight=torch.tensor([1.0, 0.5, 2.0, 1.0]), alike=alike)
    loss = make(gain=1.0, statistic=statistic, band_norm=band_norm, kernel=kernel, timestep_weight="eps")
    _, grad = value_and_grad(loss, error, **given)
    ends = [value_and_grad(loss, error + h * direction, **given)[0] for h in (1.0, -1.0)]  # exact: it is quadratic
    assert float((grad * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-10)


def test_samples_are_weighed_by_their_own_snr_where_a_batch_mixes_levels():
    error, snr = latents(4, 1, 8, 8), torch.tensor([0.2, 0.4, 1.0, 3.0], dtype=F64)
    mixed, _ = value_and_grad(unbiased(timestep_weight="eps"), error, snr=snr)
    whitened, _ = value_and_grad(unbiased(), error * snr.view(-1, 1, 1, 1).sqrt())
    torch.testing.assert_close(mixed, whitened)


# S1: U against the sum ------------------------------------------------------------------------------------------------


def test_the_mean_form_is_the_ordinary_error_over_the_batch_and_u():
    error = latents(4, 2, 8, 8)
    v = float(value_and_grad(make(gain=1.0 / 16), error)[0])  # |mean|²: the sum form over B²
    s = float(value_and_grad(make(gain=1 / 4, statistic="diagonal"), error)[0])
    u = float(value_and_grad(unbiased(), error)[0])
    assert v == pytest.approx(s / 4 + (1 - 1 / 4) * u, rel=1e-12)


def test_weighted_u_is_its_identity():
    error, w = latents(5, 2, 8, 8), torch.tensor([1.0, 0.3, 2.0, 0.0, 0.7], dtype=F64)
    u, _ = value_and_grad(unbiased(weights=(1.0, 0.0), band_norm="dof"), error, weight=w)
    low = DCT(error)
    cross = (w.view(-1, 1, 1, 1) * low).sum(0).square().sum() - (w**2 * low.flatten(1).square().sum(1)).sum()
    expected = cross / (w.sum() ** 2 - (w**2).sum()) / Bands(DCT).degrees((2, 8, 8))[0]
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=0)


# S2: duplicates -------------------------------------------------------------------------------------------------------


def test_copies_of_one_sample():
    error = latents(1, 2, 8, 8)
    single = float(value_and_grad(make(), error)[0])
    four = error.expand(4, -1, -1, -1)
    assert float(value_and_grad(make(), four)[0]) == pytest.approx(16 * single, rel=1e-13)
    assert float(value_and_grad(make(statistic="u"), four)[0]) == pytest.approx(single, rel=1e-13)


# S3: what is expected -------------------------------------------------------------------------------------------------


def near(samples: Tensor, expected: float, errors: float = 4.0) -> bool:
    return abs(float(samples.mean()) - expected) <= errors * float(samples.std()) / math.sqrt(len(samples))


@pytest.mark.parametrize("batch", [2, 4, 8, 16])
def test_u_is_unbiased_at_every_batch_size_and_the_sum_grows(batch):
    shared = torch.full((1, 4, 4), 0.3, dtype=F64)  # μ² = 0.09 · D
    weights = dict(gain=16.0, weights=(1.0, 1.0))  # D = 16: |·|² and not its mean
    draws = [shared + latents(batch, 1, 4, 4) for _ in range(200)]
    u, total = (torch.stack([value_and_grad(make(**weights, statistic=s), e)[0] for e in draws]) for s in ("u", "sum"))
    assert near(u, 16 * 0.09)
    assert near(total, batch * 16 + batch**2 * 16 * 0.09)


# S4: edges ------------------------------------------------------------------------------------------------------------


def test_u_of_one_sample_is_refused_and_the_sum_form_is_its_ordinary_error():
    error = latents(1, 2, 8, 8)
    with pytest.raises(ValueError, match="this batch has one"):
        value_and_grad(unbiased(), error)
    value, gradient = value_and_grad(unbiased(lone=True), error)
    assert value == 0 and not gradient.any(), "where batches differ in size it is known to compare nothing"
    value, _ = value_and_grad(make(gain=1.0, weights=(1.0, 1.0)), error)
    torch.testing.assert_close(value, error.square().mean())


EVERY_FORM = [dict(statistic=s, band_norm=n, timestep_weight=t) for s in STATISTICS for n in ("grid", "dof", "whiten")
              for t in ("x0", "eps", "whiten") if not n == t == "whiten"]


@pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: "-".join(form.values()))
def test_no_weight_or_no_error_is_exactly_nothing(form):
    error = latents(3, 2, 8, 8)
    for loss, e, weight in ((make(**form), error, 0.0), (make(**form), 0 * error, 1.0)):
        leaf = e.clone().requires_grad_()
        losses = losses_of(loss, leaf, torch.zeros_like(e), weight=weight)
        losses.sum().backward()
        assert losses.tolist() == [0.0] * 3 and not leaf.grad.any() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("form", [dict(statistic="sum"), dict(band_norm="whiten", bank=0.9, kernel="class"),
                                  dict(kernel="latent"), dict(method="fft"), dict(method="wavelet")], ids=str)
def test_a_batch_of_no_samples_has_no_losses(form):
    nothing = torch.zeros(0, 2, 8, 8, requires_grad=True)
    alike = {"class": torch.zeros(0).long(), "latent": nothing.flatten(1)}.get(form.get("kernel"))
    losses = losses_of(loss := unbiased(**form), nothing, nothing.detach(), alike=alike)
    losses.sum().backward()
    assert losses.shape == (0,) and nothing.grad.shape == nothing.shape and loss.describe() == {}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_sample_that_does_not_count_is_as_if_it_were_not_there_even_when_broken(statistic):
    x0, error = latents(2, 4, 2, 8, 8)
    error[2] = math.nan
    weight, snr = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=F64), torch.tensor([1.0, 1.0, math.inf, 1.0], dtype=F64)
    values, grads, reports = [], [], []
    for rows in ([0, 1, 2, 3], [0, 1, 3]):
        loss = make(gain=1.0, statistic=statistic, band_norm="whiten", timestep_weight="eps")
        x0_hat = (x0 + error)[rows].requires_grad_()
        losses = losses_of(loss, x0_hat, x0[rows], weight=weight[rows], snr=snr[rows])
        losses.mean().backward()
        values.append(losses.detach())
        grads.append(x0_hat.grad)
        reports.append(loss.describe())
    assert values[0][2] == 0 and not grads[0][2].any()
    torch.testing.assert_close(values[0].mean(), values[1].mean())
    torch.testing.assert_close(grads[0][[0, 1, 3]], grads[1])
    assert reports[0] == pytest.approx(reports[1])


def test_the_order_of_the_samples_does_not_matter():
    error, order = latents(5, 2, 8, 8), torch.tensor([3, 0, 4, 1, 2])
    weight, alike = torch.rand(5, dtype=F64), latents(5, 6)
    loss = unbiased(kernel="latent")
    value, grad = value_and_grad(loss, error, weight=weight, alike=alike)
    again, other = value_and_grad(loss, error[order], weight=weight[order], alike=alike[order])
    torch.testing.assert_close(again, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(other, grad[order], rtol=1e-12, atol=1e-16)


# S5: classes and kernels ----------------------------------------------------------------------------------------------


def test_labels_matter_between_classes_and_not_within():
    error = latents(4, 2, 8, 8)
    u = {labels: float(value_and_grad(unbiased(kernel="class"), error, alike=torch.tensor(labels))[0])
         for labels in ((1, 1, 2, 2), (2, 2, 1, 1), (1, 2, 1, 2))}
    assert u[1, 1, 2, 2] == pytest.approx(u[2, 2, 1, 1], rel=1e-13)
    assert abs(u[1, 1, 2, 2] - u[1, 2, 1, 2]) > 1e-6
    within, _ = value_and_grad(unbiased(kernel="class"), error[[1, 0, 3, 2]], alike=torch.tensor([1, 1, 2, 2]))
    assert float(within) == pytest.approx(u[1, 1, 2, 2], rel=1e-12)


def test_opposite_means_of_two_classes_are_seen_by_class_only():
    labels = torch.tensor([0] * 4 + [1] * 4)
    shared = 0.1 * (1 - 2 * labels).view(-1, 1, 1, 1) * torch.ones(8, 1, 4, 4, dtype=F64)  # ±μ, μ²/D = 0.01
    draws = [shared + latents(8, 1, 4, 4) for _ in range(300)]
    plain, by_class = unbiased(weights=(1.0, 1.0)), unbiased(weights=(1.0, 1.0), kernel="class")
    assert near(torch.stack([value_and_grad(by_class, e, alike=labels)[0] for e in draws]), 0.01)
    assert near(torch.stack([value_and_grad(plain, e)[0] for e in draws]), -0.01 / 7)


def test_classes_of_63_bits_that_fp32_would_confuse_stay_apart():
    labels = torch.tensor([2**62, 2**62 + 1, 2**62, 2**62 + 2**40])
    error = latents(4, 2, 8, 8)
    value, grad = value_and_grad(unbiased(kernel="class"), error, alike=labels)
    pair, _ = value_and_grad(unbiased(), error[[0, 2]])
    torch.testing.assert_close(value, pair)
    assert not grad[[1, 3]].any()


def test_a_class_without_a_second_sample_has_no_pairs_and_no_term():
    value, grad = value_and_grad(unbiased(kernel="class"), latents(3, 2, 8, 8), alike=torch.tensor([1, 2, 3]))
    assert float(value) == 0 and not grad.any()


@pytest.mark.parametrize("name", ["text", "latent"])
def test_soft_kernels_fall_with_distance_at_the_scale_of_the_median(name):
    features = torch.tensor([[0.0], [1.0], [3.0], [50.0], [90.0]], dtype=F64)
    counts = torch.tensor([True, True, True, False, False])  # distances that count: 1, 2, 3
    k = KERNELS[name](features, counts)
    widths = (0.5, 1.0, 2.0) if name == "latent" else (1.0,)
    for i, j, distance in ((0, 0, 0.0), (0, 1, 1.0), (1, 2, 2.0), (0, 2, 3.0)):
        expected = sum(math.exp(-((distance / (2 * width)) ** 2) / 2) for width in widths) / len(widths)
        assert float(k[i, j]) == pytest.approx(expected, rel=1e-12)
    assert KERNELS[name](torch.ones(3, 2), torch.ones(3, dtype=torch.bool)).tolist() == [[1.0] * 3] * 3
    assert torch.isfinite(KERNELS[name](torch.ones(1, 2), torch.ones(1, dtype=torch.bool))).all()


# D1, D2: Gaussian latents, where everything is known ------------------------------------------------------------------


def test_the_mean_discrepancy_of_a_linear_denoiser():
    a, s, m = math.sqrt(0.4245), math.sqrt(1 - 0.4245), 0.5
    gains = torch.tensor([0.3, 0.8], dtype=F64, requires_grad=True)  # k_b
    bands = Bands(DCT)
    degrees = torch.tensor(bands.degrees((1, 8, 8)), dtype=F64)
    values: list[list[Tensor]] = [[], []]
    slopes: list[list[Tensor]] = [[], []]
    for _ in range(200):
        shift = m * torch.ones(1, 1, 8, 8, dtype=F64)
        shift = shift + m * math.sqrt(64) * bands.split(torch.eye(64, dtype=F64)[-1].view(1, 1, 8, 8))[1]
        x0 = shift + latents(8, 1, 8, 8)
        z = bands.split(a * x0 + s * latents(8, 1, 8, 8))
        x0_hat = (gains.view(2, 1, 1, 1, 1) * z).sum(0)
        means = bands.split(shift).square().flatten(1).sum(1) / degrees  # m_b² per degree of freedom
        for b, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
            term = term_of(unbiased(weights=weights, band_norm="dof"), x0_hat, x0)
            values[b].append(term.detach())
            slopes[b].append(torch.autograd.grad(term, gains, retain_graph=True)[0][b])
    for b in range(2):
        k = float(gains[b].detach())
        assert near(torch.stack(values[b]), (1 - a * k) ** 2 * float(means[b]), 3)
        assert near(torch.stack(slopes[b]), -2 * a * (1 - a * k) * float(means[b]), 3)


def test_a_shared_bias_decays_at_the_rate_of_its_band():
    gain, batch, rate = 0.03, 4, 5.0
    bands, loss = Bands(DCT), make(gain=gain)
    start = bands.split(latents(1, 2, 8, 8))
    size = 2 * 8 * 8
    bias = start.sum(0).requires_grad_()
    for _ in range(3):
        error = bias.expand(batch, -1, -1, -1)
        total = error.square().mean() + term_of(loss, error, torch.zeros(batch, 2, 8, 8, dtype=F64))
        grad, = torch.autograd.grad(total, bias)
        bias = (bias - rate * grad).detach().requires_grad_()
    for c, first, last in zip((0.7, 0.3), start, bands.split(bias.detach()), strict=True):
        decay = 1 - 2 * rate / size * (1 + gain * batch**2 * c)
        torch.testing.assert_close(last, first * decay**3, rtol=1e-6, atol=0)


# D3: the optimum ------------------------------------------------------------------------------------------------------

A = math.sqrt(0.4245)  # also the gain of the best denoiser x̂0 = k·z of standard normal latents
STEP = 0.025  # of gains


def draws(batches: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """(x0, z) of standard normal latents [batch,1,4,4]."""
    pairs = [latents(2, batch, 1, 4, 4) for _ in range(batches)]
    return [(x0, A * x0 + math.sqrt(1 - A**2) * n) for x0, n in pairs]


SHIPPED = [dict(statistic="sum"), dict(statistic="diagonal"), dict(statistic="u"), dict(statistic="u", band_norm="dof"),
           dict(statistic="u", band_norm="whiten"), dict(statistic="u", kernel="class"),
           dict(statistic="u", kernel="text"), dict(statistic="u", kernel="latent"), dict(statistic="u", bank=0.9)]


@pytest.mark.parametrize("form", SHIPPED, ids=lambda form: "-".join(map(str, form.values())))
def test_the_right_denoiser_gets_no_push_from_any_shipped_statistic(form):
    loss = make(levels=1, **(dict(gain=1.0) | form))
    pushes = []
    for x0, z in draws(200, 16):
        k = torch.full((), A, dtype=F64, requires_grad=True)
        alike = {"class": (z[:, 0, 0, 0] > 0).long(), "text": z.flatten(1), "latent": loss.low(z).flatten(1)}
        term_of(loss, k * z, x0, alike=alike.get(form.get("kernel"))).backward()
        pushes.append(k.grad)
    assert near(torch.stack(pushes), 0.0)
    assert float(torch.stack(pushes).std()) > 0, "blind: it would pass anything"


@pytest.mark.parametrize("form", [dict(statistic="sum"), dict(statistic="diagonal"),
                                  dict(statistic="u", kernel="latent")], ids=lambda form: "-".join(form.values()))
def test_statistics_that_see_the_gain_have_their_optimum_at_the_right_denoiser(form):
    loss, gains = make(gain=1.0, levels=1, **form), np.array([0.25, 0.75, 1.25])
    scores = np.zeros(3)
    for x0, z in draws(200, 24):
        alike = z.flatten(1) if "kernel" in form else None
        scores += [float(term_of(loss, k * z, x0, alike=alike)) for k in gains]
    curvature, slope, _ = np.polyfit(gains, scores, 2)  # quadratic in the gain, as the kernel is in z alone
    assert curvature > 0 and -slope / (2 * curvature) == pytest.approx(A, abs=STEP)


def mmd(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """RBF-mixture MMD² of the two marginal laws."""
    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        d = torch.cdist(a.flatten(1), b.flatten(1)) ** 2
        return torch.stack([(-d / (2 * width**2)).exp().mean() for width in (2.0, 4.0, 8.0)]).sum()

    return mean_kernel(x0_hat, x0_hat) + mean_kernel(x0, x0) - 2 * mean_kernel(x0_hat, x0)


def spectrum(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """Squared difference of the power spectra."""
    powers = [torch.fft.fft2(x).abs().square().mean(0) for x in (x0_hat, x0)]
    return (powers[0] - powers[1]).square().mean()


@pytest.mark.parametrize("discrepancy", [mmd, spectrum])
def test_matching_the_laws_of_estimates_and_latents_would_move_the_optimum(discrepancy):
    x0, z = draws(1, 1024)[0]
    gains = torch.arange(0.25, 1.26, STEP, dtype=F64)
    best = float(gains[torch.stack([discrepancy(k * z, x0) for k in gains]).argmin()])
    assert best == pytest.approx(1.0, abs=3 * STEP), "where x̂0 has the variance of x0, not the least error"


# P1: precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)], ids=["bf16", "fp16"])
def test_a_half_precision_network_has_the_term_of_fp64(dtype, tolerance):
    a, s = math.sqrt(0.1618), math.sqrt(1 - 0.1618)
    gaps = []
    for _ in range(8):
        x0, n, miss = latents(3, 4, 4, 64, 64)
        out = n + 0.1 * miss
        exact = float(term_of(make(), (a * x0 + s * n - s * out) / a, x0))
        z, half = (a * x0 + s * n).float(), out.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = term_of(make(), (z - s * half.float()) / a, x0.float())
        assert found.dtype == torch.float32
        gaps.append(abs(float(found) / exact - 1))
    assert max(gaps) <= tolerance


@pytest.mark.parametrize("low", [DCT, FFT, ZERO, LIBRARY_ZERO], ids=["dct", "fft", "zero", "library"])
def test_operators_compute_in_fp32_inside_autocast(low):
    x = latents(2, 4, 64, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low(x)
    torch.testing.assert_close(inside, low(x), rtol=0, atol=0)


def test_half_precision_estimates_get_fp32_losses_and_a_gradient_in_their_own_dtype():
    x0 = latents(2, 4, 16, 16, dtype=torch.bfloat16)
    x0_hat = (x0 + 0.1).detach().requires_grad_()
    losses = losses_of(unbiased(), x0_hat, x0)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert x0_hat.grad.dtype == torch.bfloat16 and x0_hat.grad.abs().sum() > 0


# R1: processes --------------------------------------------------------------------------------------------------------


FORMS = [dict(statistic="sum"), dict(statistic="diagonal", band_norm="dof"), dict(statistic="u", kernel="latent"),
         dict(statistic="u", band_norm="whiten", kernel="class", timestep_weight="eps", bank=0.9)]


def trained(loss: DistributionMatchingLoss, share: slice, total: int) -> dict[str, object]:
    """Two steps of a one-layer denoiser on a share of a batch, gradients summed over ranks as the trainer does."""
    generator = torch.Generator().manual_seed(1)
    z, x0 = torch.randn(2, total, 2, 8, 8, generator=generator)
    weight, snr = torch.rand(2, total, generator=generator) + 0.2
    labels, theta = torch.arange(total) % 2 + 2**60, torch.ones(2, 1, 1, requires_grad=True)
    alike = {"none": None, "class": labels[share], "latent": z[share].flatten(1)}[loss.kernel]
    found = []
    for _ in range(2):
        x0_hat = theta * z[share]
        x0_hat.retain_grad()
        losses = loss(x0_hat, x0[share], snr=snr[share], weight=weight[share], alike=alike)
        theta.grad = None
        (losses.sum() / total).backward()
        found.append({"losses": losses.detach(), "sample": x0_hat.grad,
                      "theta": ranks.sum_over_ranks(theta.grad.flatten().clone())})
        with torch.no_grad():
            theta -= theta.grad.flatten().new_tensor([0.1, 0.2]).view(2, 1, 1)
    return {"steps": found, "state": loss.pack(), "report": loss.describe()}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_two_processes_have_the_gradients_and_the_state_of_one(form, tmp_path):
    shares = [slice(0, 2), slice(2, 5)]

    def work() -> object:
        return trained(make(**form, gather=ranks.gather_rows), shares[ranks.rank()], 5)

    both = on_two_ranks(work, tmp_path)
    one = trained(make(**form), slice(0, 5), 5)
    for step in range(2):
        for name in ("losses", "sample"):
            joined = torch.cat([rank["steps"][step][name] for rank in both])
            torch.testing.assert_close(joined, one["steps"][step][name], rtol=1e-5, atol=1e-8)
        for rank in both:
            torch.testing.assert_close(rank["steps"][step]["theta"], one["steps"][step]["theta"], rtol=1e-5, atol=1e-7)
    assert one["steps"][0]["sample"].abs().max() > 1e-6
    for rank in both:
        assert rank["report"] == pytest.approx(one["report"], rel=1e-4, abs=1e-7)
        assert rank["state"][1] == both[0]["state"][1]
        for name, tensor in one["state"][0].items():
            torch.testing.assert_close(rank["state"][0][name], tensor, rtol=1e-5, atol=1e-7)
            assert torch.equal(rank["state"][0][name], both[0]["state"][0][name]), "bit for bit on all ranks"


def test_unequal_shapes_and_an_empty_rank_do_not_hang_and_keep_one_state(tmp_path):
    shapes = [[(2, 4, 8, 16), (3, 4, 8, 8), (2, 4, 8, 8)], [(3, 4, 16, 8), (0, 4, 8, 8), (2, 4, 8, 8)]]
    errors = [[latents(*shape) for shape in of_rank] for of_rank in shapes]
    weights = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]

    def work() -> object:
        plain, stateful = (unbiased(**form, gather=ranks.gather_rows)
                           for form in ({}, dict(band_norm="whiten", bank=0.9)))
        grads = []
        for error, weight in zip(errors[ranks.rank()], weights[ranks.rank()], strict=True):
            leaf = error.clone().requires_grad_()
            losses_of(plain, leaf, torch.zeros_like(error), weight=weight).sum().backward()
            losses_of(stateful, error, torch.zeros_like(error), weight=weight)
            grads.append(leaf.grad)
        return {"grads": grads, "state": stateful.pack()}

    first, second = on_two_ranks(work, tmp_path)
    for grad, error, size in ((first["grads"][0], errors[0][0], 2), (second["grads"][0], errors[1][0], 3),
                              (first["grads"][1], errors[0][1], 3), (first["grads"][2], errors[0][2], 4)):
        torch.testing.assert_close(grad, size * value_and_grad(unbiased(), error)[1])
    assert second["grads"][1].shape == (0, 4, 8, 8) and not second["grads"][2].any()
    assert first["state"][1] == second["state"][1]
    assert [key[1:] for key, _ in first["state"][1]["bank"]] == [[4, 8, 8]], "unequal shapes are not remembered"
    assert all(torch.equal(tensor, second["state"][0][name]) for name, tensor in first["state"][0].items())


def test_gathered_rows_are_those_of_my_shape_in_rank_order(tmp_path):
    def work() -> object:
        rank = ranks.rank()
        shapes = [[(2, 3), (2, 5, 4), (0, 3), (0, 2), (1,)], [(1, 3), (3, 4, 5), (2, 3), (0, 2), (4,)]]
        return [ranks.gather_rows(torch.full(shape, rank + 1.0)) for shape in shapes[rank]]

    first, second = on_two_ranks(work, tmp_path)
    for mine, (rows, index) in ((first, (3, 0)), (second, (3, 2))):
        assert mine[0][0].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] and (len(mine[0][0]), mine[0][1]) == (rows, index)
    assert first[1][0].shape == (2, 5, 4) and second[1][0].shape == (3, 4, 5) and second[1][1] == 0
    assert first[2][0].tolist() == second[2][0].tolist() == [[2.0] * 3] * 2
    assert first[3][0].shape == (0, 2)
    assert second[4][0].tolist() == [1.0] + [2.0] * 4 and second[4][1] == 1


def test_one_process_gathers_nothing():
    rows = torch.zeros(2, 3, requires_grad=True)
    assert ranks.gather_rows(rows) == (rows, 0)


# R2: accumulation -----------------------------------------------------------------------------------------------------


def test_the_mean_over_micro_batches_has_the_expectation_of_the_whole():
    shared = torch.full((1, 4, 4), 0.3, dtype=F64)
    loss = unbiased(weights=(1.0, 1.0))
    whole, parts = [], []
    for _ in range(200):
        error = shared + latents(8, 1, 4, 4)
        whole.append(value_and_grad(loss, error)[0])
        parts.append(torch.stack([value_and_grad(loss, part)[0] for part in error.split(2)]).mean())
    assert near(torch.stack(whole), 0.09) and near(torch.stack(parts), 0.09)
    assert float(torch.stack(parts).std()) > float(torch.stack(whole).std()), "only noisier"


class TwoPasses:
    """A gather over micro-batches: the first pass notes the rows, the second has those of all."""

    def __init__(self) -> None:
        self.noted: dict[torch.Size, list[Tensor]] = {}
        self.second = False

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        parts = self.noted.setdefault(rows.shape[1:], [])
        if not self.second:
            parts.append(rows)
            return rows, 0
        first = next(sum(map(len, parts[:i])) for i, part in enumerate(parts) if torch.equal(part, rows))
        return torch.cat(parts), first


@pytest.mark.parametrize("statistic", STATISTICS)
def test_two_passes_over_the_micro_batches_are_the_whole_batch_exactly(statistic):
    error, weight = latents(6, 2, 8, 8), torch.rand(6, dtype=F64)
    gather = TwoPasses()
    whole, in_parts = make(statistic=statistic), make(statistic=statistic, gather=gather)
    _, expected = value_and_grad(whole, error, weight=weight)
    leaf = error.clone().requires_grad_()
    for gather.second in (False, True):
        leaf.grad = None
        for part, w in zip(leaf.split(2), weight.split(2), strict=True):
            losses = losses_of(in_parts, part, torch.zeros(2, 2, 8, 8, dtype=F64), weight=w)
            (losses.sum() / 6).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-18)


# The usual size of the error ------------------------------------------------------------------------------------------


def test_whitened_u_is_the_share_of_a_bands_error_that_is_common():
    error = latents(4, 2, 16, 16)
    _, grad = value_and_grad(unbiased(band_norm="whiten"), error)
    for scale in (1e-6, 1e6):
        value, scaled = value_and_grad(unbiased(band_norm="whiten"), scale * error)
        torch.testing.assert_close(scaled * scale, grad)
    bands = Bands(DCT)
    split = bands.split(error).flatten(2)  # [n,B,C·h·w]
    own = split.square().sum(2)
    shares = ((split.sum(1).square().sum(1) - own.sum(1)) / (4 * 3)) / own.mean(1)
    torch.testing.assert_close(value, (torch.tensor([0.7, 0.3], dtype=F64) * shares).sum())


def test_the_usual_size_is_a_running_mean_of_its_noise_level_without_a_start():
    loss = unbiased(band_norm="whiten")
    for size, snr in ((1.0, 0.2), (9.0, 3.0), (2.0, 0.2), (0.0, 1e-9), (5.0, 1e9)):  # beyond the window: its end bins
        losses_of(loss, torch.full((2, 1, 4, 4), size, dtype=F64), torch.zeros(2, 1, 4, 4, dtype=F64), snr=snr)
    degrees = Bands(DCT).degrees((1, 4, 4))
    d = 0.99
    low_snr, high_snr = (d * d * 1 + d * 4 + 0) / (d * d + d + 1), (d * 81 + 25) / (d + 1)
    at, expected = loss.usual_errors.at(torch.tensor([0, 7])), torch.tensor([low_snr, high_snr], dtype=F64)
    torch.testing.assert_close(at[:, 0], expected * 16 / degrees[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(at[:, 2], expected, rtol=1e-6, atol=0)


def test_a_window_from_no_signal_at_all_has_bins_too():
    loss = unbiased(window=(0.0, 3.0))
    assert loss.usual_errors.bins(torch.tensor([0.0, 1e-9, 0.0035, 2.9, 5.0])).tolist() == [0, 0, 4, 7, 7]


@pytest.mark.parametrize("bank", [0.0, 0.9])
def test_what_is_not_finite_is_seen_in_the_loss_and_leaves_no_trace(bank):
    broken, clean = (unbiased(band_norm="whiten", bank=bank) for _ in range(2))
    first, bad, last = latents(3, 4, 2, 8, 8)
    bad[1] = math.nan
    for loss in (broken, clean):
        value_and_grad(loss, first)
    assert value_and_grad(broken, bad)[0].isnan()
    bad_free = bad[[0, 2, 3]]
    value_and_grad(clean, bad_free)
    results = [value_and_grad(loss, last) for loss in (broken, clean)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)
    assert all(math.isfinite(v) for v in broken.describe().values())


# The bank -------------------------------------------------------------------------------------------------------------


def test_the_bank_joins_the_others_of_a_sample():
    past, now = latents(4, 2, 8, 8), latents(3, 2, 8, 8)
    loss = unbiased(bank=0.9, weights=(1.0, 1.0))
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    value_and_grad(loss, past)
    value, grad = value_and_grad(loss, now, weight=weight)
    remembered, n = 0.9 * past.sum(0), 0.9 * 4
    column = weight.view(-1, 1, 1, 1)
    others = [(remembered + (column * now).sum(0) - w * e) for w, e in zip(weight, now, strict=True)]  # · their count
    total = sum(w * (n + weight.sum() - w) for w in weight)
    products = sum(w * (e * o).sum() for w, e, o in zip(weight, now, others, strict=True))
    torch.testing.assert_close(value, products / total / now[0].numel())
    expected = torch.stack([2 * w * o for w, o in zip(weight, others, strict=True)]) / total / now[0].numel()
    torch.testing.assert_close(grad, expected)


def test_an_empty_bank_is_no_bank_and_one_sample_learns_from_the_second_visit_on():
    error = latents(3, 2, 8, 8)
    with_bank, without = (value_and_grad(unbiased(bank=b), error) for b in (0.9, 0.0))
    torch.testing.assert_close(with_bank, without)
    loss = unbiased(bank=0.9, weights=(1.0, 1.0))
    values = [float(value_and_grad(loss, e[None])[0]) for e in error[:2]]
    assert values == [0.0, pytest.approx(float((error[0] * error[1]).mean()), rel=1e-12)]


def test_the_bank_keeps_noise_levels_classes_and_shapes_apart():
    loss, error = unbiased(bank=0.9, kernel="class"), latents(1, 2, 8, 8)

    def visit(snr: float, label: int, e: Tensor = error) -> float:
        return float(value_and_grad(loss, e, snr=snr, alike=torch.tensor([label]))[0])

    assert visit(0.2, 1) == 0
    assert [visit(3.0, 1), visit(0.2, 2), visit(0.2, 1, latents(1, 2, 8, 16))] == [0, 0, 0]
    assert visit(0.2, 1) != 0


def test_a_image_is_no_pair_with_itself():
    """Two noised copies of an image share what is unknowable of it: the right denoiser is not wrong about that."""
    own = latents(3, 2, 8, 8)[[0, 1, 1, 2]]  # of each image
    error, image = own + 0.5 * latents(4, 2, 8, 8), torch.tensor([5, 2**62, 2**62, 7])
    told, untold = (value_and_grad(unbiased(band_norm="dof"), error, image=p)[0] for p in (image, None))
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    bands = unbiased().bands
    split, degrees = bands.split(error), bands.degrees((2, 8, 8))
    by_hand = sum(c / d * torch.stack([(split[b, i] * split[b, j]).sum() for i, j in pairs]).mean()
                  for b, (c, d) in enumerate(zip((0.7, 0.3), degrees, strict=True)))
    assert float(told) == pytest.approx(float(by_hand), rel=1e-6)
    assert float(untold) > float(told) + 0.01


def test_a_bank_stands_for_hundreds_of_samples_and_stays_unbiased():
    shared = torch.full((1, 4, 4), 0.3, dtype=F64)
    loss, plain = (unbiased(bank=b, weights=(1.0, 1.0)) for b in (0.99, 0.0))
    values = torch.stack([torch.stack([value_and_grad(each, e)[0] for each in (loss, plain)])
                          for e in (shared + latents(4, 1, 4, 4) for _ in range(600))])[200:]
    assert loss.bank.counts.popitem()[1] == pytest.approx(0.99 * 4 * (1 - 0.99**600) / 0.01, rel=1e-6)
    assert abs(float(values[:, 0].mean()) - 0.09) < 0.01
    assert float(values[:, 0].std()) < 0.7 * float(values[:, 1].std())


# State and telemetry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [dict(band_norm="whiten"), dict(band_norm="whiten", bank=0.9, kernel="class")],
                         ids=str)
def test_state_that_is_packed_and_unpacked_goes_on_bit_for_bit(form):
    whole, resumed = unbiased(**form), unbiased(**form)
    batches = [latents(4, 2, 8, 8 + 8 * (i % 2), dtype=torch.float32) for i in range(6)]
    alike = torch.tensor([1, 1, 2**62, 2**62]) if "kernel" in form else None

    def run(loss: DistributionMatchingLoss, part: list[Tensor]) -> list[Tensor]:
        return [value_and_grad(loss, e, snr=0.2 + i % 3, alike=alike)[1] for i, e in enumerate(part)]

    run(whole, batches[:3])
    tensors, data = whole.pack()
    resumed.unpack({k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(data)))
    for a, b in zip(run(whole, batches[3:]), run(resumed, batches[3:]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, resumed.pack()[0][k]) for k, t in whole.pack()[0].items())


def test_state_of_another_loss_is_refused():
    for saved, here in ((make(), make(weights=(1, 1, 1))), (unbiased(bank=0.5), unbiased())):
        value_and_grad(saved, latents(2, 1, 8, 8))
        with pytest.raises(ValueError, match="another number of bands, or a bank"):
            here.unpack(*saved.pack())


def test_the_report_is_the_formulas_over_the_calls_since_last_asked():
    loss, bands = unbiased(band_norm="dof", weights=(0.7, 0.2, 0.1)), Bands(DCT, 3)
    assert loss.describe() == {}
    degrees = torch.tensor(bands.degrees((2, 16, 16)), dtype=F64)
    u, z, error, products, squares, terms = [], [], [], 0, 0, []
    for _ in range(3):
        x0, e = latents(2, 4, 2, 16, 16)
        terms.append(float(term_of(loss, x0 + e, x0, snr=0.738)))
        split, clean = bands.split(e).flatten(2), bands.split(x0).flatten(2)
        s = split.square().sum(2).mean(1)
        u.append((split.sum(1).square().sum(1) - 4 * s) / 12)
        z.append(u[-1] / (s * (2 / 12 / degrees).sqrt()))
        error.append(s / degrees)
        products = products + (clean * (clean + split)).sum((1, 2))
        squares = squares + (clean + split).square().sum((1, 2))
    report = loss.describe()
    for b, name in enumerate(("band0", "band1", "band2")):
        for key, values in (("u", [v / degrees for v in u]), ("z", z), ("error", error)):
            assert report[f"dist_match/{key}_{name}"] == pytest.approx(float(sum(values)[b] / 3), rel=1e-9)
        assert report[f"dist_match/slope_{name}"] == pytest.approx(float(products[b] / squares[b]), rel=1e-9)
    assert report["dist_match/snr"] == pytest.approx(0.738) and report["dist_match/bin"] == 3
    assert report["dist_match/loss"] == pytest.approx(sum(terms) / 3, rel=1e-9)
    assert loss.describe() == {}, "asked once"


def test_the_slope_says_too_much_and_too_little():
    loss, x0 = make(), latents(4, 4, 16, 16)
    low = DCT(x0)
    losses_of(loss, 2 * low + (x0 - low) / 2, x0)
    report = loss.describe()
    assert report["dist_match/slope_low"] == pytest.approx(0.5) and report["dist_match/slope_high"] == pytest.approx(2)


def test_independent_errors_have_a_standard_z_also_with_weights_and_kernels():
    loss = unbiased(kernel="class")
    weight, labels = torch.tensor([1, 2, 0.5, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = []
    for _ in range(300):
        value_and_grad(loss, latents(6, 4, 8, 8, dtype=torch.float32), weight=weight, alike=labels)
        found.append(loss.describe()["dist_match/z_high"])
    z = torch.tensor(found)
    assert near(z, 0.0) and float(z.std()) == pytest.approx(1, abs=0.2)


def test_a_report_without_pairs_or_samples_says_only_what_it_knows():
    loss = make()
    losses_of(loss, latents(2, 1, 8, 8), latents(2, 1, 8, 8), weight=0.0)
    assert loss.describe() == {}
    losses_of(loss, latents(1, 1, 8, 8), latents(1, 1, 8, 8))
    names = {name.removeprefix("dist_match/") for name in loss.describe()}
    assert names == {"snr", "bin", "loss", "error_low", "error_high", "slope_low", "slope_high"}


def test_the_package_imports_torch_alone():
    """The packages of wavelets are imported where they are asked for."""
    files = sorted((ROOT / "trainkit" / "frequency").glob("*.py"))
    at_the_top = {name for path in files for name in module_imports(path, everywhere=False)}
    anywhere = {name for path in files for name in module_imports(path, everywhere=True)}
    others = {name.split(".")[0] for name in anywhere if not name.startswith("trainkit.frequency")}
    assert others - set(sys.stdlib_module_names) == {"torch", "pywt", "pytorch_wavelets"}
    assert not [name for name in at_the_top if name.startswith(("pywt", "pytorch_wavelets"))]


@pytest.mark.trains
def test_the_file_and_the_package_can_be_copied_into_another_project(tmp_path):
    shutil.copy(ROOT / "freq_loss.py", tmp_path)
    shutil.copytree(ROOT / "trainkit" / "frequency", tmp_path / "trainkit" / "frequency")
    code = "from freq_loss import *; import freq_loss, trainkit.frequency as f; print(freq_loss.__file__, f.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(tmp_path)) for file in done.stdout.split())


def test_the_face_shows_what_the_package_exports():
    assert freq_loss.__all__ == trainkit.frequency.__all__
    assert all(getattr(freq_loss, name) is getattr(trainkit.frequency, name) for name in freq_loss.__all__)


def test_the_example_of_the_face_runs():
    example = textwrap.dedent(freq_loss.__doc__.partition("For example:\n")[2])
    names: dict[str, object] = {}
    exec(example, names)
    assert names["pred"].grad.isfinite().all()
