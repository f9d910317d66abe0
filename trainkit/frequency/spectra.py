"""Frequencies of latents: distribution matching in bands of them, and the Fourier loss of their spectra.

    frequency_decomposition   low and high of a picture-like tensor, low + high = tensor
    Bands                     two or J + 1 bands of latents, lowest first
    DistributionMatchingLoss  the loss of the errors that the samples of a batch share
    FourierLoss               the loss of a prediction's spectrum; get_fourier_loss_config has its presets

It imports torch alone; wavelets other than db3 have their taps from PyWavelets. B samples of this process, G of all
processes, n bands, C channels, h,w latent height and width, D = C·h·w, D_b the rank of a band in it.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------------------------
# Operators: the low-pass of a tensor

DB3 = (0.03522629188570953, -0.08544127388202666, -0.13501102001025458,
       0.45987750211849154, 0.8068915093110925, 0.33267055295008263)  # Daubechies 1992, table 6.1, reversed
BOUNDARIES = ("zero", "periodization")
BACKENDS = ("matrix", "pytorch_wavelets")


def frequency_decomposition(
    tensor: Tensor, method: str = "wavelet", wavelet: str = "db3", J: int = 2, *, boundary: str = "zero",
    backend: str = "matrix",
) -> tuple[Tensor, Tensor]:
    """Split a real tensor [...,h,w] of any size into what is left of it at 1/2^J of its size, and the rest.

    -> (low, high), both of the tensor's shape and dtype; high = tensor − low. See `LowPass` for the choices and errors.
    """
    low = LowPass(method, wavelet, J, boundary, backend)(tensor)
    return low, tensor - low


@dataclass(frozen=True)
class LowPass:
    """A linear low-pass [...,h,w] -> [...,h,w], exact and differentiable at every size.

        low = S_h · (D_h · x · D_wᵀ) · S_wᵀ,   of each side D takes K coefficients and S makes N values of them again

        dct      the first K = round(N/2^J) of the N DCT-II vectors: orthogonal at every size
        wavelet  the approximation of J levels, and it alone synthesised, as PyWavelets does with that boundary
                   zero           any size; low and high are not orthogonal
                   periodization  orthogonal for orthogonal wavelets; 2^J must divide h and w
        fft      frequencies up to 2^−(J+1) cycles per pixel in any direction: orthogonal, not separable

    It computes in fp32 (fp64 for fp64) whatever the input or autocast says, and returns the input's dtype.
    backend  "pytorch_wavelets" has that package compute the wavelets, where its result and gradient are right
    Raises ValueError for what cannot be had, ImportError for a package that is missing.
    """

    method: str = "dct"
    wavelet: str = "db3"
    levels: int = 2
    boundary: str = "zero"
    backend: str = "matrix"

    def __post_init__(self) -> None:
        known("method", self.method, ("wavelet", "fft", "dct"))
        known("backend", self.backend, BACKENDS)
        if self.boundary not in BOUNDARIES:
            raise ValueError(
                f"boundary {self.boundary!r} is not offered: symmetric, reflect and periodic are not orthogonal, and "
                "pytorch_wavelets has their gradients wrong. Use zero or periodization, or the method dct")
        if self.levels < 1:
            raise ValueError(f"{self.levels} levels split nothing: J must be 1 or more")
        if self.backend != "matrix" and self.method != "wavelet":
            raise ValueError(f"the backend {self.backend} computes wavelets only, not the method {self.method}: "
                             "leave the backend at matrix, or use the method wavelet")
        if self.method == "wavelet":
            taps(self.wavelet)  # a wrong name is refused here

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"a low-pass takes real numbers of shape [...,h,w], not {x.dtype} {tuple(x.shape)}")
        self.refuse_size(*x.shape[-2:])
        if not x.numel():  # a process without samples; fft and the library refuse it
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self._apply(widened(x)).to(x.dtype)

    def refuse_size(self, h: int, w: int) -> None:
        """Raises ValueError for latents that this operator is not right on."""
        if self.method != "wavelet" or self.boundary == "zero":
            return
        if h % 2**self.levels or w % 2**self.levels:
            raise ValueError(f"periodization of {h}x{w} with J={self.levels} is not orthogonal: 2^J = {2**self.levels} "
                             "must divide both sides. Use the boundary zero, the method dct, or fewer levels")
        shortest = 2 ** (self.levels - 1) * len(taps(self.wavelet)[0])
        if self.backend == "pytorch_wavelets" and min(h, w) < shortest:
            raise ValueError(f"pytorch_wavelets wraps {self.wavelet} wrongly around sides below {shortest} "
                             f"(here {h}x{w}, J={self.levels}): leave the backend at matrix")

    def _apply(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if self.backend == "pytorch_wavelets":
            return by_library(self, x)
        if self.method == "fft":
            return torch.fft.irfft2(torch.fft.rfft2(x) * kept(disc, self.levels, h, w, like=x), s=(h, w))
        coarse = kept(analysis, self, h, like=x) @ (x @ kept(analysis, self, w, like=x).T)
        return kept(synthesis, self, h, like=x) @ coarse @ kept(synthesis, self, w, like=x).T


def known(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(choices)}")


def widened(x: Tensor) -> Tensor:
    """fp64 stays; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def kept(make: Callable[..., Tensor], *args: object, like: Tensor) -> Tensor:
    """make(*args), made once in fp64 and kept in the dtype and on the device of `like`."""
    return _kept(make, args, like.device, like.dtype)


@lru_cache(maxsize=512)  # 64 sizes with 3 scales, of each a mask and its rings, and what matching keeps beside them
def _kept(make: Callable[..., Tensor], args: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # gradients may pass through it later
        return make(*args).to(device, dtype)


@lru_cache
def taps(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass filters of analysis and of synthesis, as convolutions."""
    if wavelet == "db3":
        return DB3, DB3[::-1]
    try:
        import pywt
    except ImportError as error:
        raise ImportError(f"the taps of the wavelet {wavelet!r} come from PyWavelets, which is not installed: "
                          "pip install PyWavelets, or use db3, which needs no package") from error
    try:
        found = pywt.Wavelet(wavelet)
    except ValueError as error:
        raise ValueError(f"wavelet {wavelet!r} is not a discrete wavelet of PyWavelets: use db3, or one of "
                         "pywt.wavelist(kind='discrete')") from error
    return tuple(found.dec_lo), tuple(found.rec_lo)


def filter_bank(size: int, wavelet: str, boundary: str) -> tuple[Tensor, Tensor]:
    """One level on a side of `size`: analysis [K,size] and synthesis [size,K], fp64, in the phase of PyWavelets."""
    down_taps, up_taps = taps(wavelet)  # Mallat 1989, "A Theory for Multiresolution Signal Decomposition"
    length, wraps = len(down_taps), boundary == "periodization"
    k = torch.arange(size // 2 if wraps else (size + length - 1) // 2)
    shift = length // 2 if wraps else 1
    down, up = torch.zeros(2, len(k), size, dtype=torch.float64)
    for j in range(length):
        for rows, tap, place in ((down, down_taps[j], 2 * k + shift - j),
                                 (up, up_taps[j], 2 * k + shift + j - (length - 1))):
            place = place % size if wraps else place
            inside = (place >= 0) & (place < size)
            rows[k[inside], place[inside]] += tap
    return down, up.T


def wavelet_factors(low: LowPass, size: int) -> tuple[Tensor, Tensor]:
    """J levels down, and from the approximation alone up again."""
    down = up = torch.eye(size, dtype=torch.float64)
    for _ in range(low.levels):
        next_down, next_up = filter_bank(len(down), low.wavelet, low.boundary)
        down, up = next_down @ down, up @ next_up
    return down, up


def dct_factors(low: LowPass, size: int) -> tuple[Tensor, Tensor]:
    """The lowest DCT-II vectors √(2/N)·cos(π(m + ½)k/N), of which the first is a constant."""
    k = torch.arange(max(1, round(size / 2**low.levels)), dtype=torch.float64)
    m = torch.arange(size, dtype=torch.float64)
    vectors = (math.pi / size * (m + 0.5) * k[:, None]).cos() * math.sqrt(2 / size)  # [K,N]
    vectors[0] /= math.sqrt(2)
    return vectors, vectors.T


FACTORS: dict[str, Callable[[LowPass, int], tuple[Tensor, Tensor]]] = {"wavelet": wavelet_factors, "dct": dct_factors}


def analysis(low: LowPass, size: int) -> Tensor:
    """D of one side -> [K,size] fp64."""
    return FACTORS[low.method](low, size)[0]


def synthesis(low: LowPass, size: int) -> Tensor:
    """S of one side -> [size,K] fp64."""
    return FACTORS[low.method](low, size)[1]


def disc(levels: int, h: int, w: int, *, full: bool = False) -> Tensor:
    """Which frequencies of rfft2 (or `full`, of fft2) are low -> bool [h, w//2 + 1] (or [h,w])."""
    columns = (torch.fft.fftfreq if full else torch.fft.rfftfreq)(w, dtype=torch.float64)
    return torch.fft.fftfreq(h, dtype=torch.float64)[:, None] ** 2 + columns**2 <= 4.0 ** -(levels + 1)


@lru_cache(maxsize=256)
def rank(low: LowPass, h: int, w: int) -> float:
    """Trace of the operator on [h,w]: the dimension of low, where it is a projector."""
    if low.method == "fft":
        return float(disc(low.levels, h, w, full=True).sum())
    return math.prod(float((analysis(low, side) * synthesis(low, side).T).sum()) for side in (h, w))


@lru_cache(maxsize=64)
def library(low: LowPass, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Analysis and synthesis of pytorch_wavelets (Cotter 2019, https://github.com/fbcotter/pytorch_wavelets)."""
    try:
        from pytorch_wavelets import DWTForward, DWTInverse
    except ImportError as error:
        raise ImportError(f"the backend pytorch_wavelets cannot be imported ({error}): it needs the packages "
                          "pytorch_wavelets and setuptools<82, because it imports pkg_resources, which 82 removed. "
                          "pip install pytorch_wavelets 'setuptools<82', or leave the backend at matrix") from error
    with torch.inference_mode(False):
        forward = DWTForward(J=low.levels, wave=low.wavelet, mode=low.boundary)
        return forward.to(device, dtype), DWTInverse(wave=low.wavelet, mode=low.boundary).to(device, dtype)


def by_library(low: LowPass, x: Tensor) -> Tensor:
    """The low-pass as pytorch_wavelets computes it; sides may come out one too long and are cropped."""
    forward, inverse = library(low, x.device, x.dtype)
    h, w = x.shape[-2:]
    coarse, details = forward(x.reshape(1, -1, h, w))  # all as channels: its fastest layout
    return inverse((coarse, [torch.zeros_like(d) for d in details]))[..., :h, :w].reshape(x.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Bands


@dataclass(frozen=True)
class Bands:
    """How latents are split into `count` bands that add up to them, lowest first.

        2      P_J x, x − P_J x
        J + 1  P_J x, (P_{J−1} − P_J) x, ..., x − P_1 x     mutually orthogonal, because the projectors are nested

    Raises ValueError for another count, and for J + 1 bands of operators that are not nested projectors.
    """

    low: LowPass
    count: int = 2

    def __post_init__(self) -> None:
        J = self.low.levels
        if self.count not in (2, J + 1):
            raise ValueError(f"{self.count} bands cannot be had of {J} levels: there are 2 (low and high) or J + 1 = "
                             f"{J + 1}. Give as many weights, or change the levels")
        if self.count > 2 and not self._nested:
            raise ValueError(f"{self.count} bands would overlap: {self.low.wavelet} with the boundary "
                             f"{self.low.boundary} is no orthogonal projector. Use the method dct or fft, an "
                             "orthogonal wavelet with periodization, or two bands")

    @cached_property
    def lows(self) -> list[LowPass]:
        """The low-passes between the bands, coarsest first."""
        first = self.low.levels if self.count == 2 else 1
        return [replace(self.low, levels=j) for j in range(self.low.levels, first - 1, -1)]

    @property
    def names(self) -> list[str]:
        return ["low", "high"] if self.count == 2 else [f"band{b}" for b in range(self.count)]

    def split(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [n,B,C,h,w]."""
        whole = [*(low(x) for low in self.lows), x]
        return torch.stack([whole[0], *(wider - low for low, wider in zip(whole, whole[1:], strict=False))])

    def degrees(self, shape: Sequence[int]) -> tuple[float, ...]:
        """Degrees of freedom D_b of the bands of one latent (C,h,w); together D. ValueError where a band has none."""
        channels, h, w = shape
        ranks = [0.0, *(rank(low, h, w) for low in self.lows), float(h * w)]
        degrees = tuple(channels * (wider - low) for low, wider in zip(ranks, ranks[1:], strict=False))
        if min(degrees) < 0.5:
            raise ValueError(f"latents of {h}x{w} are too small for {self.count} bands of {self.low.levels} levels: "
                             "lower the levels, or train at a higher resolution")
        return degrees

    @property
    def _nested(self) -> bool:
        if self.low.method != "wavelet":
            return True
        down, up = taps(self.low.wavelet)
        orthogonal = all(abs(a - s) < 1e-6 for a, s in zip(down, up[::-1], strict=True))
        return orthogonal and self.low.boundary == "periodization"


# ----------------------------------------------------------------------------------------------------------------------
# The statistic: which samples are compared with which


def same_class(features: Tensor, counts: Tensor) -> Tensor:
    """1 where two samples have the same features."""
    return (features[:, None] == features[None]).all(-1).to(features)


def rbf(features: Tensor, counts: Tensor, widths: Sequence[float] = (1.0,)) -> Tensor:
    """Mean over widths of exp(−|f_i − f_j|²/2σ²), σ = width · the median distance of two samples that count."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # [G,G]
    pairs = counts[:, None] & counts & ~torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    median = distances.masked_fill(~pairs, math.nan).nanmedian().nan_to_num(1.0).clamp(min=TINY)
    return torch.stack([(-0.5 * (distances / (width * median)) ** 2).exp() for width in widths]).mean(0)


# Features [G,F], who counts [G] -> k [G,G], k_ii = 1. Any of them keeps the optimum (Muandet et al. 2020, "Kernel
# Conditional Moment Test via Maximum Moment Restriction"): the right denoiser has E[h(z, c)·error] = 0 for every h.
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda features, counts: features.new_ones(len(features), len(features)),
    "class": same_class, "text": rbf, "latent": partial(rbf, widths=(0.5, 1.0, 2.0)),
}
# w_i w_j k_ij [G,G], which pairs are one picture twice (the diagonal too) bool [G,G] -> what each pair counts
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda pairs, same: pairs,
    "diagonal": lambda pairs, same: pairs.diagonal().diag(),
    "u": lambda pairs, same: pairs.masked_fill(same, 0),
}
BAND_NORMS = ("grid", "dof", "whiten")
# snr [G], usual |e|²/D at its level [G] -> factor of the error [G]
TIMESTEP_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x0": lambda snr, usual: torch.ones_like(snr),
    "eps": lambda snr, usual: snr.sqrt(),
    "whiten": lambda snr, usual: usual.rsqrt(),
}
BINS = 8  # of log SNR, over the window
DECAY = 0.99  # of the running means: the last hundred visits of a bin
TINY = 1e-30  # in place of 0 as a divisor

Gather = Callable[[Tensor], tuple[Tensor, int]]  # my rows -> the rows of all processes, index of my first


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return rows, 0


def digits(labels: Tensor) -> Tensor:
    """Integers [B] as four numbers below 2^16 that fp32 holds exactly -> [B,4] fp32."""
    return torch.stack([(labels >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], 1).float()


@dataclass(frozen=True, eq=False)
class Rows:
    """What the statistic needs of samples, without a graph. A sample of weight 0 has error 0 and SNR 1."""

    error: Tensor  # [G,n,C,h,w]  P_b (x̂0 − x0)
    weight: Tensor  # [G]
    snr: Tensor  # [G]
    energy: Tensor  # [G,n+1]  |P_b e|²/D_b of each band, then |e|²/D
    slope: Tensor  # [G,2,n]  <P_b x0, P_b x̂0> and |P_b x̂0|²
    alike: Tensor  # [G,F]  by what the kernel compares
    picture: Tensor  # [G,4]  which picture it is, or [G,0]: each another

    @property
    def same(self) -> Tensor:
        """Which pairs are one picture, whose errors are not independent of each other -> bool [G,G]."""
        itself = torch.eye(len(self.weight), dtype=torch.bool, device=self.weight.device)
        return itself | same_class(self.picture, self.weight > 0).bool() if self.picture.shape[1] else itself

    def of_all(self, gather: Gather) -> tuple[Rows, int]:
        """-> the rows of all processes with latents of this shape, index of my first. One call of `gather`.

        Everything travels as channels of h·w numbers, so that only rows of the same h and w have the same shape.
        """
        h, w = self.error.shape[-2:]
        parts = [getattr(self, field.name) for field in fields(self)]
        sizes = [math.prod(part.shape[1:]) for part in parts]
        flat = torch.cat([part.reshape(len(part), size) for part, size in zip(parts, sizes, strict=True)], 1)
        channels = -(-flat.shape[1] // (h * w))
        spare = channels * h * w - flat.shape[1]
        rows, first = gather(F.pad(flat, (0, spare)).view(len(flat), channels, h, w))
        *pieces, _ = rows.flatten(1).split([*sizes, spare], 1)
        shapes = [(len(rows), *part.shape[1:]) for part in parts]
        return Rows(*(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))), first


class Scales:
    """The usual size of the error at each noise level: running means per bin of log SNR, free of their start."""

    def __init__(self, window: tuple[float, float], bands: int):
        low, high = window
        if not 0 <= low < high < math.inf:
            raise ValueError(f"the window of SNR {low:g} to {high:g} is empty: give the lower end first")
        self.ends = math.log(max(low, high * 1e-6)), math.log(high)
        self.total, self.count = torch.zeros(BINS, bands + 1), torch.zeros(BINS, 1)

    def bins(self, snr: Tensor) -> Tensor:
        """[G] -> long [G]; levels outside of the window fall into the bins at its ends."""
        low, high = self.ends
        return ((snr.log() - low) / (high - low) * BINS).clamp(0, BINS - 1).long()

    def update(self, rows: Tensor) -> None:
        """Rows [N,3+n] of all processes: weight, snr, energy. What does not count or is not finite leaves no trace."""
        weight, snr, energy = rows[:, 0], rows[:, 1], rows[:, 2:]
        valid = (weight > 0) & energy.isfinite().all(1)
        inside = F.one_hot(self.bins(snr), BINS).to(energy) * valid[:, None]  # [N,BINS]
        seen = inside.sum(0)[:, None]  # [BINS,1]
        mean = inside.T @ torch.where(valid[:, None], energy, 0) / seen.clamp(min=1)
        keep = torch.where(seen > 0, DECAY, 1.0)
        self.total = self.total.to(rows.device) * keep + mean
        self.count = self.count.to(rows.device) * keep + (seen > 0)

    def at(self, bins: Tensor) -> Tensor:
        """-> [G,n+1]."""
        return (self.total / self.count.clamp(min=TINY)).clamp(min=TINY)[bins]


class Bank:
    """Sums of past errors, scaled as the term scales them; they stand for B · decay / (1 − decay) samples at batch B.

    Kept for each (bin of log SNR, class, latent shape), decayed at every visit: n·C·h·w numbers each, so as many as
    there are captions for the kernel class. Reading the keys waits for the device once a call.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.sums: dict[tuple[int, ...], Tensor] = {}  # each [n,C,h,w]
        self.counts: dict[tuple[int, ...], float] = {}

    def keys(self, bins: Tensor, rows: Rows) -> list[tuple[int, ...]]:
        label = torch.cat([bins[:, None].to(rows.alike), rows.alike], 1).long()
        return [(*key, *rows.error.shape[2:]) for key in label.tolist()]

    def recall(self, keys: Sequence[tuple[int, ...]], like: Tensor) -> tuple[Tensor, Tensor]:
        """What is remembered for each of the samples `like` [G,n,C,h,w] -> sums of that shape, counts [G]."""
        sums = torch.zeros_like(like)
        for i, key in enumerate(keys):
            if key in self.sums:
                sums[i] = self.sums[key]
        return sums, like.new_tensor([self.counts.get(key, 0.0) for key in keys])

    def update(self, keys: Sequence[tuple[int, ...]], weight: Tensor, scaled: Tensor) -> None:
        """Add weight [G] · scaled [G,n,C,h,w]; samples that do not count, or are not finite, leave no trace."""
        finite = weight * scaled.flatten(1).isfinite().all(1)
        added = [(key, w, errors) for key, w, errors in zip(keys, finite.tolist(), scaled, strict=True) if w > 0]
        for key, w, errors in added:
            self.sums[key] = w * errors + (self.sums[key].to(errors) if key in self.sums else 0)
            self.counts[key] = w + self.counts.get(key, 0.0)
        for key in dict.fromkeys(key for key, _, _ in added):
            self.sums[key] *= self.decay
            self.counts[key] *= self.decay


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class DistributionMatchingLoss:
    """What the errors of a batch have in common, band by band, as losses [B] whose mean over all G samples is the term.

        r_bi = τ_bi · P_b (x̂0_i − x0_i)        M_ij by `statistic`, from w_i w_j k_ij
        term = Σ_b κ_b (1/G) Σ_ij M_ij <r_bi, r_bj>

        statistic  sum       M = G · w_i w_j k_ij: Σ_b κ_b |Σ_i w_i r_bi|², which grows with the batch (Real-Fake)
                   diagonal  M = G · w_i² δ_ij: what sum has of each sample alone, a control
                   u         M = G · w_i w_j k_ij / Σ_{i≠j} w_i w_j k_ij, 0 for i = j: the unbiased |mean error|², in
                             expectation the same for every batch, number of processes and accumulation (kernel none,
                             every sample counting); may be negative. Samples of one `picture` are no pair: the right
                             denoiser's errors of it are not independent
        κ_b        gain · c_b / D (band_norm grid) or gain · c_b / D_b (dof, whiten), c = weights, lowest band first
        τ_bi       by timestep_weight 1 (x0), √snr_i (eps) or 1/√s (whiten), times 1/√s_b for band_norm whiten; s and
                   s_b are the usual |e|²/D and |P_b e|²/D_b at that noise level, running means over the run
        kernel     k: 1 (none), 1 for equal integers `alike` [B] (class), by the distance of `alike` [B,F] (the others)
        bank       decay of a memory of past errors that joins the others of a sample (u only); 0: none
        window     lowest and highest SNR, between which s is told apart in 8 bins

    r_j of the others are constants, so no graph crosses samples or processes, and the gradient of a sample is the exact
    one of the term, 2 Σ_b κ_b m_bi with m_bi = Σ_j M_ij r_bj. Over processes gradients are to be summed, not averaged.
    `gather` gives the rows of all processes; it is called twice a call, also for 0 rows or weights.

    Sources: Yuan et al. 2024, "Real-Fake: Effective Training Data Synthesis Through Distribution Matching" (the sum);
    Hoeffding 1948, "A Class of Statistics with Asymptotically Normal Distribution" (U). Raises ValueError for values
    that do not go together.
    """

    def __init__(
        self, *, gain: float, statistic: str = "u", method: str = "dct", wavelet: str = "db3", levels: int = 2,
        boundary: str = "zero", backend: str = "matrix", weights: Sequence[float] = (0.7, 0.3),
        band_norm: str = "whiten", timestep_weight: str = "x0", kernel: str = "none", bank: float = 0.0,
        window: tuple[float, float] = (0.1925, 3.07), gather: Gather = alone,
    ):
        for name, value, choices in (
            ("statistic", statistic, STATISTICS), ("band_norm", band_norm, BAND_NORMS), ("kernel", kernel, KERNELS),
            ("timestep_weight", timestep_weight, TIMESTEP_WEIGHTS),
        ):
            known(name, value, choices)
        if not 0 <= gain < math.inf or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"gain {gain} and weights {tuple(weights)} must be finite and not negative, and one "
                             "weight above 0")
        if band_norm == timestep_weight == "whiten":
            raise ValueError("band_norm whiten already divides by the usual error at each noise level, which "
                             "timestep_weight whiten would do again: use x0 or eps there, or another band_norm")
        if statistic == "diagonal" and kernel != "none":
            raise ValueError(f"the statistic diagonal compares no two samples, so the kernel {kernel} has no effect: "
                             "leave it at none, or use the statistic u or sum")
        if not 0 <= bank < 1 or bank and (statistic != "u" or kernel not in ("none", "class")):
            raise ValueError(f"a bank of decay {bank} needs the statistic u, the kernel none or class, and a decay "
                             f"from 0 to below 1 (here {statistic}, {kernel})")
        self.bands = Bands(LowPass(method, wavelet, levels, boundary, backend), len(weights))
        self.gain, self.weights, self.statistic, self.kernel = gain, tuple(weights), statistic, kernel
        self.band_norm, self.timestep_weight, self.gather = band_norm, timestep_weight, gather
        self.scales = Scales(window, len(weights))
        self.bank = Bank(bank) if bank else None
        self.seen: Tensor | None = None  # sums for `describe`, on the device

    def __call__(
        self, x0_hat: Tensor, x0: Tensor, *, snr: Tensor, weight: Tensor, alike: Tensor | None = None,
        picture: Tensor | None = None,
    ) -> Tensor:
        """x0_hat, x0 [B,C,h,w], snr and weight [B] -> losses [B], fp32; weight 0: the sample does not count.

        picture  [B] of integers, the same for samples of the same picture; None: no two are

        Raises ValueError for the statistic u of one sample without a bank, and without what the kernel compares by.
        """
        with torch.autocast(x0.device.type, enabled=False):
            x0_hat = widened(x0_hat)
            x0 = x0.detach().to(x0_hat)
            error = self.bands.split(x0_hat - x0).transpose(0, 1)  # [B,n,C,h,w]
            with torch.no_grad():
                mine = self._rows(error.detach(), x0, snr, weight, self._features(alike, error), picture)
                rows, first = mine.of_all(self.gather)
                sizes, _ = self.gather(torch.cat([mine.weight[:, None], mine.snr[:, None], mine.energy], 1))
                self.scales.update(sizes)
                factor, common = self._compare(rows, one_shape=len(rows.weight) == len(sizes))
            here = slice(first, first + len(x0))
            scaled = torch.where(column(mine.weight > 0), factor[here] * error, 0)
            values = self._inner(scaled, common[here])
            return 2 * values - values.detach()

    def low(self, x: Tensor) -> Tensor:
        """The lowest band of x [B,C,h,w], by which the kernel latent compares noised latents."""
        return self.bands.low(x)

    def require(self, latents: Sequence[int]) -> None:
        """Raises ValueError for latents of a shape (C,h,w) that these bands cannot split."""
        self.bands.low.refuse_size(*latents[1:])
        self.bands.degrees(latents)

    def describe(self) -> dict[str, float]:
        """Means over the calls since last asked, per band (names low, high or band0, band1, ...):

            u      U_b/D_b of r, the part that samples share; in units of a band's usual error where it is whitened
            z      U_b over its standard deviation for independent errors of equal size
            error  |P_b e|²/D_b, in units of x0
            slope  <P_b x0, P_b x̂0>/|P_b x̂0|²: below 1 where x̂0 has too much of the band, above 1 where too little

        and snr, bin, loss. Empty when no sample counted. Waits for the device.
        """
        if self.seen is None:
            return {}
        values, self.seen, n = self.seen.tolist(), None, self.bands.count
        u, z, error, product, square = (values[k * n:(k + 1) * n] for k in range(5))
        snr, place, loss, compared, calls = values[5 * n:]
        if not calls:
            return {}
        found = {"snr": snr / calls, "bin": place / calls, "loss": loss / calls}
        for b, name in enumerate(self.bands.names):
            found[f"error_{name}"] = error[b] / calls
            if compared:
                found |= {f"u_{name}": u[b] / compared, f"z_{name}": z[b] / compared}
            if square[b]:
                found[f"slope_{name}"] = product[b] / square[b]
        return {f"dist_match/{name}": value for name, value in found.items()}

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        """All that lasts from call to call -> (tensors, JSON)."""
        bank = self.bank or Bank(0)
        tensors = {"scales.total": self.scales.total, "scales.count": self.scales.count}
        tensors |= {f"bank.{i}": errors for i, errors in enumerate(bank.sums.values())}
        packed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return packed, {"bank": [[list(key), count] for key, count in bank.counts.items()]}

    def unpack(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Undo `pack`. Raises ValueError for the state of a loss with other bands, or with a bank that is not here."""
        if tensors["scales.total"].shape != self.scales.total.shape or data["bank"] and not self.bank:
            raise ValueError("the saved state of distribution matching has another number of bands, or a bank that is "
                             "not asked for here: go on with the settings of that run, or start anew")
        self.scales.total, self.scales.count = tensors["scales.total"].clone(), tensors["scales.count"].clone()
        if self.bank:
            self.bank.counts = {tuple(key): count for key, count in data["bank"]}
            self.bank.sums = {key: tensors[f"bank.{i}"].clone() for i, key in enumerate(self.bank.counts)}

    def _rows(self, error: Tensor, x0: Tensor, snr: Tensor, weight: Tensor, alike: Tensor, picture: Tensor | None
              ) -> Rows:
        """What the others need to know of my samples; error [B,n,C,h,w]."""
        weight, snr = weight.detach().to(error), snr.detach().to(error)
        counts = weight > 0
        error = torch.where(column(counts), error, 0)
        clean = self.bands.split(x0).transpose(0, 1)
        recovered = clean + error
        degrees = kept(numbers, *self.bands.degrees(x0.shape[1:]), like=error)
        whole = error.sum(1).flatten(1).square().mean(1, keepdim=True)  # bands add up, but may not be orthogonal
        energy = torch.cat([inner(error, error) / degrees, whole], 1)
        slope = torch.stack([inner(clean, recovered), inner(recovered, recovered)], 1)
        names = error.new_zeros(len(error), 0) if picture is None else digits(picture).to(error)
        return Rows(error, weight, torch.where(counts, snr, 1), energy, slope, alike, names)

    def _features(self, alike: Tensor | None, like: Tensor) -> Tensor:
        """What the kernel compares by -> [B,F]."""
        if (alike is None) != (self.kernel == "none"):
            raise ValueError(f"the kernel is {self.kernel}: `alike`, by which it compares samples, must be given for "
                             "every kernel but none, and left out for none")
        if alike is None:
            return like.new_zeros(len(like), 0)
        if self.kernel == "class":
            if alike.is_floating_point() or alike.ndim != 1:
                raise ValueError("the kernel class compares by one integer a sample: give `alike` as [B] of integers")
            return digits(alike).to(like)
        return alike.detach().to(like).flatten(1)

    def _compare(self, rows: Rows, *, one_shape: bool) -> tuple[Tensor, Tensor]:
        """What each sample is scaled by, τ [G,n,1,1,1], and has in common with the others, m [G,n,C,h,w]."""
        size, weight = len(rows.weight), rows.weight
        if size == 1 and self.statistic == "u" and not self.bank:
            raise ValueError("the statistic u compares samples with one another, and this batch has one: use a batch "
                             "of 2 or more over all processes, or a bank")
        bins = self.scales.bins(rows.snr)
        usual = self.scales.at(bins).to(rows.error)  # [G,n+1]
        factor = TIMESTEP_WEIGHTS[self.timestep_weight](rows.snr, usual[:, -1])[:, None].expand(size, self.bands.count)
        if self.band_norm == "whiten":
            factor = factor * usual[:, :-1].rsqrt()
        factor = factor[..., None, None, None]
        scaled = factor * rows.error  # [G,n,C,h,w]
        pairs = KERNELS[self.kernel](rows.alike, weight > 0) * weight[:, None] * weight
        counted = STATISTICS[self.statistic](pairs, rows.same)
        common, total = (counted @ scaled.flatten(1)).view_as(scaled), counted.sum()
        if self.bank:
            keys = self.bank.keys(bins, rows)
            sums, counts = self.bank.recall(keys, scaled)
            common, total = common + column(weight) * sums, total + (weight * counts).sum()
            if one_shape:  # else a process would remember what others have not seen
                self.bank.update(keys, weight, scaled)
        common = common * (torch.where(total > 0, size / total, 0) if self.statistic == "u" else size)
        self._note(rows, scaled, pairs, bins, self._inner(scaled, common))
        return factor, common

    def _inner(self, r: Tensor, m: Tensor) -> Tensor:
        """Σ_b κ_b <r_b, m_b> of [B,n,C,h,w] -> [B]."""
        degrees = self.bands.degrees(r.shape[2:])
        divisors = [sum(degrees)] * len(degrees) if self.band_norm == "grid" else degrees
        kappa = [self.gain * c / d for c, d in zip(self.weights, divisors, strict=True)]
        return inner(r, m) @ kept(numbers, *kappa, like=r)

    def _note(self, rows: Rows, scaled: Tensor, pairs: Tensor, bins: Tensor, values: Tensor) -> None:
        """Add to the sums that `describe` reports; a call of which nothing counts or not all is finite adds none."""
        degrees = kept(numbers, *self.bands.degrees(scaled.shape[2:]), like=scaled)
        counts = (rows.weight > 0).to(scaled)
        number = counts.sum().clamp(min=1)
        share = STATISTICS["u"](pairs, rows.same)
        compared = share.sum() > 0
        share = share / share.sum().clamp(min=TINY)
        gram = torch.einsum("gnd,hnd->ngh", scaled.flatten(2), scaled.flatten(2))
        u = (share * gram).sum((1, 2)) / degrees
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / number / degrees
        z = u / (size * (2 * share.square().sum() / degrees).sqrt()).clamp(min=TINY)
        means = counts @ torch.cat([rows.energy[:, :-1], rows.snr[:, None], bins[:, None]], 1) / number
        row = torch.cat([u, z, means[:-2], (counts @ rows.slope.flatten(1)), means[-2:],
                         torch.stack([values.mean(), compared.to(u), torch.ones_like(number)])])
        row = torch.where((counts.sum() > 0) & row.isfinite().all(), row, 0)
        self.seen = row if self.seen is None else self.seen + row


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def column(v: Tensor) -> Tensor:
    """[G] -> [G,1,1,1,1]."""
    return v.view(-1, 1, 1, 1, 1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a_b, b_b> of [G,n,C,h,w] -> [G,n]."""
    return (a * b).flatten(2).sum(2)


# ----------------------------------------------------------------------------------------------------------------------
# The Fourier loss: modes and presets

HIGH_FREQ_BOUNDS = (1.0, 3.0)  # between which a high-frequency weight is clipped
LEAST_SIDE = 2  # of pooled latents; a side of 1 has its mean alone
LEAST_SPREAD = 1e-3  # latents and noise have a variance of about 1: what is flatter counts as being this flat
# Factor of the high-frequency weight: its highest and lowest value, progress in [0,1] -> value
CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda high, low, progress: high - (high - low) * progress,
    "cosine": lambda high, low, progress: low + (high - low) * (1 + math.cos(math.pi * progress)) / 2,
    "exponential": lambda high, low, progress: low + (high - low) * math.exp(-5 * progress),
}
Term = tuple[float, int, float]  # what a term counts, its scale, its high-frequency weight before it is clipped


def even(loss: FourierLoss, progress: float, terms: Sequence[Term]) -> list[Term]:
    return [(share, scale, 1.0) for share, scale, _ in terms]


def weighted(loss: FourierLoss, progress: float, terms: Sequence[Term]) -> list[Term]:
    return [(share, scale, loss.high_freq_weight) for share, scale, _ in terms]


def adaptive(loss: FourierLoss, progress: float, terms: Sequence[Term]) -> list[Term]:
    return [(share, scale, loss.curve(progress)) for share, scale, _ in terms]


def unified(loss: FourierLoss, progress: float, terms: Sequence[Term]) -> list[Term]:
    """α of all scales and β of the full size; adaptive_scaling moves weight from the first to the second."""
    alpha, beta = loss.mix
    if loss.adaptive_scaling:
        alpha, beta = alpha * (1.5 - 0.5 * progress), beta * (1 + 0.5 * progress)
        alpha, beta = alpha / (alpha + beta), beta / (alpha + beta)
    a = loss.curve(progress)
    return [*((alpha * share, scale, a * high) for share, scale, high in terms), (beta, 1, a * loss.high_freq_weight)]


def clip(high: float) -> float:
    """A high-frequency weight as it counts."""
    return min(max(high, HIGH_FREQ_BOUNDS[0]), HIGH_FREQ_BOUNDS[1])


class Mode(NamedTuple):
    """The terms of a mode, made of those that its valid scales give, and the fields it reads with their defaults."""

    terms: Callable[[FourierLoss, float, Sequence[Term]], list[Term]]
    fields: dict[str, object]
    decay: float = 0.5  # the weight of a scale is scale^−decay


UNIFIED = {"high_freq_weight": 2.0, "scales": (1, 2, 4), "adaptive_max_weight": 2.5, "adaptive_min_weight": 0.8,
           "adaptive_mode": "linear", "mix": (0.6, 0.4), "adaptive_scaling": True}
MODES: dict[str, Mode] = {
    "basic": Mode(even, {}),
    "weighted": Mode(weighted, {"high_freq_weight": 2.0}),
    "multiscale": Mode(even, {"scales": (1, 2)}, decay=1),
    "adaptive": Mode(adaptive, {"adaptive_max_weight": 2.0, "adaptive_min_weight": 0.5, "adaptive_mode": "linear"}),
    "unified": Mode(unified, UNIFIED),
    "unified_basic": Mode(unified, UNIFIED | {
        "scales": (1,), "high_freq_weight": 1.5, "adaptive_max_weight": 2.0, "adaptive_min_weight": 1.0}),
    "unified_balanced": Mode(unified, UNIFIED | {"scales": (1, 2)}),
    "unified_detail": Mode(unified, UNIFIED | {
        "high_freq_weight": 2.5, "scale_high_freq_weights": (2.0, 2.5, 3.0), "adaptive_max_weight": 3.0,
        "adaptive_min_weight": 1.0, "adaptive_mode": "cosine", "mix": (0.7, 0.3)}),
    "unified_adaptive": Mode(unified, UNIFIED | {
        "scales": (1, 2), "adaptive_max_weight": 2.8, "adaptive_min_weight": 0.5, "adaptive_mode": "exponential"}),
}
PRESETS: dict[str, dict[str, object]] = {
    "conservative": dict(weight=0.01, mode="basic", norm="l2", high_freq_weight=1.5, warmup_steps=500),
    "balanced": dict(weight=0.05, mode="weighted", norm="l2", high_freq_weight=2.0, warmup_steps=300),
    "aggressive": dict(weight=0.10, mode="multiscale", norm="l1", scales="1,2,4", warmup_steps=200),
    "super_resolution": dict(weight=0.08, mode="adaptive", norm="l2", adaptive_max_weight=3.0, adaptive_min_weight=1.0,
                             warmup_steps=400),
    "fine_detail": dict(weight=0.12, mode="weighted", norm="l1", high_freq_weight=2.5, warmup_steps=100),
    "unified_basic": dict(weight=0.03, mode="unified_basic", norm="l2", warmup_steps=250),
    "unified_balanced": dict(weight=0.06, mode="unified_balanced", norm="l2", warmup_steps=250),
    "unified_detail": dict(weight=0.08, mode="unified_detail", norm="l2", warmup_steps=200),
    "unified_adaptive": dict(weight=0.07, mode="unified_adaptive", norm="l2", warmup_steps=300),
    "unified_custom": dict(weight=0.05, mode="unified", norm="l2", high_freq_weight=2.0, scales="1,2,4",
                           adaptive_max_weight=2.5, adaptive_min_weight=0.8, warmup_steps=250),
}


def get_fourier_loss_config(name: str = "balanced") -> dict[str, object]:
    """The settings of a preset, by the names of their flags, to be edited and given to `FourierLoss.from_config`.

    Raises ValueError for a name that is no preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"fourier_config {name!r} is no preset{nearest(str(name), PRESETS)}: choose one of "
                         f"{', '.join(PRESETS)}")
    return {f"fourier_{field}": value for field, value in PRESETS[name].items()}


def nearest(name: str, choices: Iterable[str]) -> str:
    """", did you mean …?" where a choice is like the name, else nothing."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f", did you mean {found[0]}?" if found else ""


# ----------------------------------------------------------------------------------------------------------------------
# The Fourier loss: spectra of [B,C,h,w], orthonormal, half of each, since that of real numbers is symmetric


def power(x: Tensor) -> Tensor:
    """|X|² -> [B,C,h,w//2 + 1]."""
    X = torch.fft.rfft2(x, norm="ortho")
    return X.real.square() + X.imag.square()


def complex_error(p: Tensor, t: Tensor, norm: str, eps: float) -> Tensor:
    """|X_p − X_t|^q; for l1 √(|X_p − X_t|² + ε²) − ε, which has a gradient everywhere."""
    squares = power(p - t)
    return squares if norm == "l2" else (squares + eps**2).sqrt() - eps


def magnitude_error(p: Tensor, t: Tensor, norm: str, eps: float) -> Tensor:
    """| |X_p| − |X_t| |^q with |X| = √(re² + im² + ε²): what has another sign or is shifted is no error."""
    difference = (power(p) + eps**2).sqrt() - (power(t) + eps**2).sqrt()
    return difference.square() if norm == "l2" else difference.abs()


METRICS: dict[str, Callable[[Tensor, Tensor, str, float], Tensor]] = {
    "magnitude": magnitude_error, "complex": complex_error,
}
# By what pred and target are divided, of their own sizes [B,1,1,1]
NORMALIZERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda size, p, t: (p, t),
    "target": lambda size, p, t: (p / (spread := size(t)), t / spread),
    "separate": lambda size, p, t: (p / size(p), t / size(t)),
}


def multiplicities(h: int, w: int) -> Tensor:
    """How often a coefficient of rfft2 stands in fft2 -> [h, w//2 + 1] of 1 and 2."""
    columns = torch.full((w // 2 + 1,), 2.0, dtype=torch.float64)
    columns[[0] if w % 2 else [0, -1]] = 1
    return columns.expand(h, -1)


def radius(h: int, w: int) -> Tensor:
    """ρ̂ = √2·√(f_y² + f_x²) of rfft2's frequencies, 1 in the corner -> [h, w//2 + 1]."""
    rows, columns = torch.fft.fftfreq(h, dtype=torch.float64), torch.fft.rfftfreq(w, dtype=torch.float64)
    return torch.hypot(rows[:, None], columns) * math.sqrt(2)


def coefficients(h: int, w: int, scale: int, bands: str, dc: bool) -> Tensor:
    """What |error|^q of a coefficient counts in Q0 and in Q1 -> [2,h,w//2 + 1]; means over h·w are folded in."""
    rho = radius(h, w)
    flat = multiplicities(h, w) / (h * w)
    for low, high, value in parsed_bands(bands):  # of the latents' own frequencies, which pooling stretches
        inside = (rho / scale >= low) & (rho / scale < (high if high < 1 else math.inf))
        flat = torch.where(inside, flat * value, flat)
    flat[0, 0] *= dc
    return torch.stack([flat, flat * (4 * (rho - 0.5)).sigmoid()])


def rings(h: int, w: int) -> Tensor:
    """Of which ring of |k| below max(h,w) a coefficient is, and what it counts in its mean -> [2,h,w//2 + 1]."""
    ring, counts = (radius(h, w) / math.sqrt(2) * max(h, w)).round().long(), multiplicities(h, w)
    return torch.stack([ring, counts / torch.bincount(ring.flatten(), counts.flatten())[ring]])


@torch.no_grad()
def wiener(clean: Tensor, snr: Tensor) -> Tensor:
    """S·snr/(S·snr + 1), the share of signal in each frequency, S of clean latents [B,C,h,w] -> [B,h,w//2 + 1].

    S is the mean of |X|² over channels and rings; noise has 1 in every frequency.
    """
    h, w = clean.shape[-2:]
    ring, counts = kept(rings, h, w, like=clean)
    ring, shares = ring.long().flatten(), (power(clean).mean(1) * counts).flatten(1)
    spectrum = shares.new_zeros(len(shares), max(h, w)).index_add(1, ring, shares)[:, ring]
    return (spectrum / (spectrum + 1 / snr.to(clean)[:, None]).clamp(min=TINY)).view(-1, h, w // 2 + 1)


class Gate(NamedTuple):
    """What counts at a signal-to-noise ratio: how much of a sample, and how much of each of its frequencies.

    fields: the settings it reads.
    """

    sample: Callable[[Tensor, float, float], Tensor] | None = None  # snr [B], gate_min_snr, gate_max_snr -> [B]
    frequency: Callable[[Tensor, Tensor], Tensor] | None = None  # clean latents, snr [B] -> [B,h,w//2 + 1]
    fields: tuple[str, ...] = ()


GATES: dict[str, Gate] = {
    "none": Gate(),
    "snr": Gate(sample=lambda snr, low, high: (snr >= low).to(snr), fields=("gate_min_snr",)),
    "linear": Gate(sample=lambda snr, low, high: ((snr / low).log() / math.log(high / low)).clamp(0, 1),
                   fields=("gate_min_snr", "gate_max_snr")),
    "wiener": Gate(frequency=wiener),
}


def pooled(x: Tensor, scale: int) -> Tensor:
    """Means of scale x scale; what is left over at the ends is left out."""
    return F.avg_pool2d(x, scale) if scale > 1 else x


# ----------------------------------------------------------------------------------------------------------------------
# The Fourier loss: settings

FOURIER_CHOICES: dict[str, Iterable[str]] = {
    "mode": MODES, "norm": ("l1", "l2"), "metric": METRICS, "space": ("prediction", "x0"), "normalize": NORMALIZERS,
    "balance": ("cap", "none"), "timestep_gate": GATES, "adaptive_mode": CURVES,
}
FOURIER_LISTS = {"scales": int, "scale_weights": float, "scale_high_freq_weights": float, "mix": float}
NOT_NEGATIVE, POSITIVE = (lambda v: v >= 0, "0 or more"), (lambda v: v > 0, "above 0")
FOURIER_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("weight", "warmup_steps", "ramp_steps", "mix"), NOT_NEGATIVE),
    **dict.fromkeys(("high_freq_weight", "scales", "scale_weights", "scale_high_freq_weights", "adaptive_max_weight",
                     "adaptive_min_weight", "gate_min_snr", "gate_max_snr"), POSITIVE),
    "eps": (lambda v: 1e-15 <= v < 1, "from 1e-15, below which its square is 0, to below 1"),
}
NAMED_BANDS = {"low": (0.0, 1 / 3), "mid": (1 / 3, 2 / 3), "high": (2 / 3, 1.0)}
FOURIER_TYPES: dict[str, tuple[type, Callable[[object], object], str]] = {  # by a field's annotation
    "float": (Real, float, "a number"), "int": (Integral, int, "a whole number"), "str": (str, str, "text"),
    "bool": (bool, bool, "True or False"),
}


def parsed_bands(text: str) -> list[tuple[float, float, float]]:
    """"0.7-1:2,low:0.5" -> [(0, 1/3, 0.5), (0.7, 1, 2)], in order.

    Raises ValueError for what is no range and weight, and for ranges that overlap.
    """
    found, bare = [], text.replace(" ", "").lower()
    for part in bare.split(",") if bare else ():
        name, _, value = part.partition(":")
        try:
            low, high = NAMED_BANDS[name] if name in NAMED_BANDS else map(float, re.split("(?<!e)-", name))
            weight = float(value)
        except ValueError:
            low, high, weight = 0.0, 0.0, -1.0
        if not (0 <= low < high <= 1 and 0 <= weight < math.inf):
            raise ValueError(f"fourier_bands {part or text!r} is no range and weight: write high:2, low:0.5 or "
                             "0.25-0.5:3, with low, mid, high or a range within 0-1, and a weight of 0 or more")
        found.append((low, high, weight))
    found.sort()
    if any(end > start for (_, end, _), (start, _, _) in zip(found, found[1:], strict=False)):
        raise ValueError(f"fourier_bands {text!r} overlap, but a frequency has one weight: let each range begin where "
                         "the one below it ends, or later")
    return found


def written_bands(bands: Iterable[tuple[float, float, float]]) -> str:
    """The one spelling of ranges and weights."""
    names = {ends: name for name, ends in NAMED_BANDS.items()}
    return ",".join(f"{names.get((low, high), f'{plain(low)}-{plain(high)}')}:{plain(weight)}"
                    for low, high, weight in bands)


def plain(number: float) -> str:
    """2.0 -> "2"."""
    return repr(float(number)).removesuffix(".0")


def typed(field: Field, value: object) -> object:
    """A setting that is no list, as its field's type; bands may be a list. Raises ValueError for another type."""
    kind, optional, _ = str(field.type).partition(" | None")
    if kind not in FOURIER_TYPES or optional and value is None:
        return value
    if field.name == "bands" and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    wanted, make, what = FOURIER_TYPES[kind]
    if not isinstance(value, wanted) or isinstance(value, bool) and kind != "bool":
        example = "None, for what the mode says" if optional else f"the default {field.default!r}"
        raise ValueError(f"fourier_{field.name} {value!r} is not {what}: give {what}, or {example}")
    try:
        return make(value)
    except OverflowError:  # of a whole number that no float holds
        return math.inf


def listed(name: str, value: object, kind: type) -> tuple | None:
    """"1,2,4" or a sequence -> a tuple of that kind. Raises ValueError for what is no such number."""
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        found = tuple(kind(part) for part in parts)
        if found and all(isinstance(part, str) or part == number for number, part in zip(found, parts, strict=True)):
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"fourier_{name} {value!r} is no list of {'whole ' * (kind is int)}numbers: write it as 1,2,4")


def shown(value: object) -> str:
    """(1, 2, 4) -> "1,2,4"."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unread(loss: FourierLoss) -> set[str]:
    """The settings that neither the mode nor the gate reads."""
    read = {"normalize", *MODES[loss.mode].fields, *GATES[loss.timestep_gate].fields}
    read |= {"scale_weights"} if "scales" in read else set()
    read |= {"scale_high_freq_weights"} if "mix" in read else set()
    optional = {field.name for field in fields(loss) if field.default is None}
    return (optional | {"gate_min_snr", "gate_max_snr"}) - read


def refuse_values(loss: FourierLoss) -> None:
    """Raises ValueError for a setting that means nothing."""
    for name, choices in FOURIER_CHOICES.items():
        if getattr(loss, name) is not None:
            known(f"fourier_{name}", getattr(loss, name), choices)
    for name, (right, what) in FOURIER_NUMBERS.items():
        value = getattr(loss, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(right(number) and number < math.inf for number in values):
            raise ValueError(f"fourier_{name} {shown(value)} means nothing: give a finite number {what}")


def refuse_pairs(loss: FourierLoss) -> None:
    """Raises ValueError for settings that are read and do not go together."""
    read = {field.name: getattr(loss, field.name) for field in fields(loss) if field.name not in unread(loss)}
    if "gate_max_snr" in read and loss.gate_min_snr >= loss.gate_max_snr:
        raise ValueError(f"fourier_gate_min_snr {loss.gate_min_snr} is not below fourier_gate_max_snr "
                         f"{loss.gate_max_snr}: lower the first, or raise the second")
    high, low = read.get("adaptive_max_weight"), read.get("adaptive_min_weight")
    if high is not None and low is not None and low > high:
        raise ValueError(f"fourier_adaptive_min_weight {low} is above fourier_adaptive_max_weight {high}: give the "
                         "higher one as maximum")
    if "mix" in read and (len(loss.mix) != 2 or not sum(loss.mix)):
        raise ValueError(f"fourier_mix {shown(loss.mix)} is not two numbers, what all scales count and what the "
                         "full size does, with one above 0: write it as 0.6,0.4")
    for name in ("scale_weights", "scale_high_freq_weights"):
        if (value := read.get(name)) and len(value) != len(loss.scales):
            raise ValueError(f"fourier_{name} {shown(value)} has {len(value)} numbers for the {len(loss.scales)} of "
                             f"fourier_scales {shown(loss.scales)}: give one for each")


def defaults(loss: FourierLoss) -> dict[str, object]:
    """What stands for None in the settings that the mode reads."""
    _, found, decay = MODES[loss.mode]
    found = found | {"normalize": "target" if loss.metric == "magnitude" else "none"}
    if "scales" in found:
        scales = loss.scales or found["scales"]
        found["scale_weights"] = tuple(scale**-decay for scale in scales)
    if "mix" in found and (loss.scales or loss.high_freq_weight or "scale_high_freq_weights" not in found):
        found["scale_high_freq_weights"] = (loss.high_freq_weight or found["high_freq_weight"],) * len(scales)
    return {name: value for name, value in found.items() if getattr(loss, name) is None}


# ----------------------------------------------------------------------------------------------------------------------
# The Fourier loss

CAP_RATIO = 10.0  # how many times its base a sample's Fourier loss may be before it counts less
CAP_FLOOR = 0.1  # ... and how little it may count then


@lru_cache
def warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def refuse_tensors(
    pred: Tensor, target: Tensor, *, mask: Tensor | None, clean: Tensor | None, **samples: Tensor | None,
) -> None:
    """Raises ValueError for tensors that do not fit: one number of each sample in `samples`, the others by pred."""
    shape = tuple(pred.shape)
    if pred.is_complex() or target.is_complex():
        raise ValueError(f"pred and target of the Fourier loss are {pred.dtype} and {target.dtype}, but it compares "
                         "real tensors: give those, not their spectra")
    for name, like in {"target": target, "clean": clean}.items():
        if like is not None and like.shape != pred.shape:
            raise ValueError(f"pred {shape} and {name} {tuple(like.shape)} of the Fourier loss do not have one shape: "
                             f"give {name} the shape of pred")
    if not shape:
        raise ValueError("pred and target of the Fourier loss are single numbers: give [B,...,h,w]")
    for name, each in samples.items():
        if each is not None and each.shape != shape[:1]:
            raise ValueError(f"{name} {tuple(each.shape)} of the Fourier loss does not fit pred {shape}: give one "
                             f"number of each sample, [{shape[0]}]")
    if mask is not None and not spreads(mask.shape, shape):
        raise ValueError(f"mask {tuple(mask.shape)} of the Fourier loss does not fit pred {shape}: give a shape that "
                         "broadcasts to it, such as [B,1,h,w]")


def spreads(small: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(small), reversed(shape), strict=False)
    return len(small) <= len(shape) and all(a in (1, b) for a, b in pairs)


class FourierPart(NamedTuple):
    """What the Fourier loss adds to each sample's loss, all [B]."""

    added: Tensor  # factor · weight · raw
    raw: Tensor  # L_F, detached; 0 where the sample does not count
    weight: Tensor  # weight · gain · ramp · g · b, detached


@dataclass(frozen=True)
class FourierLoss:
    """The spectrum of a prediction against that of its target, as losses [B].

        L_F = Σ_s A_s Q0_s + B_s Q1_s         Q0 = <Δ>, Q1 = <S·Δ>, S = sigmoid(4(ρ̂ − ½)), of latents pooled by s
        Δ   = | |X_p| − |X_t| |^q (magnitude) or |X_p − X_t|^q (complex), q = 1 or 2 by norm, X the orthonormal DFT
        <Δ> = mean over channels and all h·w frequencies; ρ̂ = √2·cycles per pixel, 1 in the corner

    A term that counts c with the high-frequency weight w is c·(Q0 + (w − 1)·Q1), w clipped to [1,3]; π = progress:

        basic       w = 1                                     weighted    w = high_freq_weight
        adaptive    w = a(π), from adaptive_max_weight to adaptive_min_weight by adaptive_mode
        multiscale  w = 1, c = ω_s/Σω of each scale; scales that leave less than 2x2 are left out
        unified…    α(π)·ω_s/Σω with w = h_s·a(π) of each scale, and β(π) with w = high_freq_weight·a(π) of scale 1

    None stands for what the mode says (`MODES`), and is filled in where the mode reads it.
    mix         α, β; adaptive_scaling: α(1 + ½(1−π)) and β(1 + ½π), divided by their sum
    normalize   p and t are divided by the target's standard deviation (target: magnitude's default), by their own
                (separate), or not (none: complex's default); of one sample, one scale, inside its mask, and
                0.001 at least (`LEAST_SPREAD`)
    space       what pred and target are: prediction, or x0 (no mean of a channel counts)
    bands       weights of ranges of ρ̂ of the latents, as "low:0.5,high:2" or "0.25-0.5:3", which may not overlap; the
                others keep 1
    balance     cap: b = clamp(10·base/L_F, 0.1, 1), without a gradient; none: b = 1
    timestep_gate  none; snr: g = 1 from gate_min_snr; linear: g from 0 to 1 in log SNR up to gate_max_snr; wiener:
                Δ times the share of signal in its frequency at that noise level, by the sample's own clean latents

    (complex, l2) is a quadratic form, whose optimum is the conditional mean, as that of MSE, for any weights. magnitude
    sees neither sign nor shift, and its optimum has larger amplitudes than the mean: those of (μ + λR)/(1 + λ), where
    R = E|X_t|, the Rician mean (Rice 1945, "Mathematical Analysis of Random Noise"). Sources: Jiang et al. 2021, "Focal
    Frequency Loss for Image Reconstruction and Synthesis" (complex distance); Wiener 1949, "Extrapolation,
    Interpolation, and Smoothing of Stationary Time Series". Raises ValueError for values that do not go together.
    """

    weight: float = 0.05
    mode: str = "weighted"
    norm: str = "l2"
    high_freq_weight: float | None = None
    scales: tuple[int, ...] | None = None
    scale_weights: tuple[float, ...] | None = None
    scale_high_freq_weights: tuple[float, ...] | None = None
    adaptive_max_weight: float | None = None
    adaptive_min_weight: float | None = None
    adaptive_mode: str | None = None
    mix: tuple[float, float] | None = None
    adaptive_scaling: bool | None = None
    warmup_steps: int = 300
    ramp_steps: int = 0
    eps: float = 1e-8
    metric: str = "magnitude"
    space: str = "prediction"
    normalize: str | None = None
    balance: str = "cap"
    timestep_gate: str = "none"
    gate_min_snr: float = 0.1
    gate_max_snr: float = 10.0
    bands: str = ""

    def __post_init__(self) -> None:
        fill = vars(self).update  # frozen for everybody else
        fill({field.name: typed(field, getattr(self, field.name)) for field in fields(self)})
        fill({name: listed(name, getattr(self, name), kind) for name, kind in FOURIER_LISTS.items()})
        refuse_values(self)
        fill({"bands": written_bands(parsed_bands(self.bands))})
        fill(defaults(self))
        refuse_pairs(self)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> FourierLoss:
        """Of settings by the names of their flags. Raises ValueError for a name that is none of them."""
        names = {f"fourier_{field.name}": field.name for field in fields(cls)}
        for key in config:
            if key not in names:
                raise ValueError(f"{key!r} is no setting of the Fourier loss{nearest(str(key), names)}: choose one "
                                 f"of {', '.join(names)}")
        return cls(**{names[key]: value for key, value in config.items()})

    def config(self) -> dict[str, object]:
        """The resolved settings by the names of their flags, for JSON; without what mode and gate do not read."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unread(self)}
        return {f"fourier_{name}": shown(value) if isinstance(value, tuple) else value
                for name, value in values.items()}

    def __call__(
        self, pred: Tensor, target: Tensor, *, base: Tensor, factor: Tensor | None = None, step: int, total_steps: int,
        mask: Tensor | None = None, snr: Tensor | None = None, clean: Tensor | None = None, gain: float = 1.0,
    ) -> FourierPart:
        """What is added to the losses `base` [B] of pred and target [B,...,h,w] at an optimizer step, from 0.

            added = factor · weight · gain · ramp(step) · g · b · L_F       b by base and factor · L_F

        factor  [B] what one unit of L_F counts, as base has it already; None: 1
        mask    what of pred and target counts, broadcast to their shape
        snr     [B], for any gate; clean: latents of pred's shape, for wiener

        Raises ValueError for tensors that do not fit, or that a gate lacks.
        """
        refuse_tensors(pred, target, mask=mask, clean=clean, base=base, factor=factor, snr=snr)
        zeros = widened(base.detach()).new_zeros(len(base))
        nothing = FourierPart(zeros, zeros, zeros)
        rate = self.weight * self.ramp(step) * gain
        if not self._spatial(pred) or not rate:
            return nothing
        factor = torch.ones_like(zeros) if factor is None else factor.detach().to(zeros)
        weight = rate * self._gate(snr, clean, zeros)
        counts = factor * weight != 0
        if counts.device.type == "cpu" and not counts.any():  # elsewhere to know it would be to wait
            return nothing
        raw = self._compare(pred, target, counts, min(step / max(total_steps, 1), 1.0), mask, snr, clean)
        if self.balance == "cap":
            size = factor * raw.detach()
            share = (CAP_RATIO * base.detach().to(size) / size).clamp(CAP_FLOOR, 1)
            weight = weight * share.nan_to_num(1)  # 0/0
        return FourierPart(factor * weight * raw, raw.detach(), weight)

    def distance(
        self, pred: Tensor, target: Tensor, *, progress: float = 0.0, mask: Tensor | None = None,
        snr: Tensor | None = None, clean: Tensor | None = None,
    ) -> Tensor:
        """g · L_F of pred and target [B,...,h,w] -> [B], fp32 (fp64 of fp64). Raises ValueError as a call does."""
        refuse_tensors(pred, target, mask=mask, clean=clean, snr=snr)
        zeros = widened(pred.detach()).new_zeros(len(pred))
        if not self._spatial(pred):
            return zeros
        gate = self._gate(snr, clean, zeros)
        return gate * self._compare(pred, target, gate > 0, progress, mask, snr, clean)

    def ramp(self, step: int) -> float:
        """0 in the warm-up; then 1, or over ramp_steps from 0 to 1."""
        since = step - self.warmup_steps
        return 0.0 if since < 0 else min(1.0, since / self.ramp_steps) if self.ramp_steps else 1.0

    def idle(self, step: int) -> bool:
        """Whether nothing is added at this step, whatever the tensors."""
        return not self.weight * self.ramp(step)

    def curve(self, progress: float) -> float:
        """a(π)."""
        return CURVES[self.adaptive_mode](self.adaptive_max_weight, self.adaptive_min_weight, progress)

    def require(self, latents: Sequence[int]) -> None:
        """Raises ValueError for latents of a shape (C,h,w) that have no frequencies to compare."""
        h, w = latents[-2:]
        if not any(coefficients(h // s, w // s, s, self.bands, self.space != "x0")[0].any()
                   for s in self._plan(h, w, 0.0)):
            raise ValueError(f"fourier_bands {self.bands} leaves nothing of latents of {h}x{w}: give a weight above 0 "
                             "to a range that they have")

    def pinned(self, total_steps: int) -> float:
        """In which share of the steps a high-frequency weight is clipped to [1,3]."""
        steps = min(max(total_steps, 1), 1000)
        terms = self._terms(math.inf)
        return sum(any(w != clip(w) for _, _, w in MODES[self.mode].terms(self, k / steps, terms))
                   for k in range(steps)) / steps

    @property
    def only_rescales(self) -> bool:
        """Whether L_F is the mean squared error, of which adding a share changes nothing but the learning rate."""
        kind = (self.norm, self.metric, self.normalize, self.timestep_gate, self.space)
        plans = [self._plan(math.inf, math.inf, end) for end in (0.0, 1.0)]  # the curves are monotonic
        return (kind == ("l2", "complex", "none", "none", "prediction")
                and all(scale == 1 and tilted == 0 for plan in plans for scale, (_, tilted) in plan.items())
                and all(value == 1 for _, _, value in parsed_bands(self.bands)))

    def _terms(self, side: float) -> list[Term]:
        """(ω_s/Σω, s, h_s) of the scales that leave latents with this shorter side 2 or more of it.

        Raises ValueError where none does. A mode without scales has the scale 1.
        """
        scales, shares, high = (1,), (1.0,), (1.0,)
        if "scales" in MODES[self.mode].fields:
            scales, shares = self.scales, self.scale_weights
            high = self.scale_high_freq_weights if "mix" in MODES[self.mode].fields else (1.0,) * len(scales)
        valid = [term for term in zip(shares, scales, high, strict=True) if term[1] * LEAST_SIDE <= side]
        if side < LEAST_SIDE:
            raise ValueError(f"latents with a side of {side} have no frequencies for the Fourier loss, which needs 2x2 "
                             "or more: train at a higher resolution")
        if not valid:
            raise ValueError(f"fourier_scales {shown(scales)} leave less than 2x2 of latents with a side of {side}: "
                             "add the scale 1, or train at a higher resolution")
        total = sum(share for share, _, _ in valid)
        return [(share / total, scale, h) for share, scale, h in valid]

    def _plan(self, h: float, w: float, progress: float) -> dict[int, tuple[float, float]]:
        """scale -> A_s, B_s. Raises ValueError for latents too small."""
        plan: dict[int, tuple[float, float]] = {}
        for share, scale, high in MODES[self.mode].terms(self, progress, self._terms(min(h, w))):
            flat, tilted = plan.get(scale, (0.0, 0.0))
            plan[scale] = flat + share, tilted + share * (clip(high) - 1)
        return plan

    def _spatial(self, pred: Tensor) -> bool:
        """Whether there are spectra; of too few axes it warns once."""
        if pred.ndim < 3:
            warn_once(f"the Fourier loss needs tensors of at least 3 axes, [B,...,h,w], not {tuple(pred.shape)}: "
                      "it adds nothing for such batches")
        return pred.ndim >= 3 and pred.numel() > 0

    def _gate(self, snr: Tensor | None, clean: Tensor | None, like: Tensor) -> Tensor:
        """g -> [B]. Raises ValueError without what the gate goes by."""
        sample, frequency, _ = GATES[self.timestep_gate]
        if (sample or frequency) and snr is None or frequency and clean is None:
            raise ValueError(f"fourier_timestep_gate {self.timestep_gate} goes by the signal-to-noise ratio snr [B]"
                             f"{' and the clean latents' if frequency else ''}, which are missing: give them, or use "
                             "the gate none")
        return sample(snr.detach().to(like), self.gate_min_snr, self.gate_max_snr) if sample else torch.ones_like(like)

    def _compare(
        self, pred: Tensor, target: Tensor, counts: Tensor, progress: float, mask: Tensor | None, snr: Tensor | None,
        clean: Tensor | None,
    ) -> Tensor:
        """L_F -> [B], 0 where a sample does not count, whatever its pred."""
        with torch.autocast(pred.device.type, enabled=False):
            pred, clean = widened(pred), clean if GATES[self.timestep_gate].frequency else None
            target, mask, clean = (x if x is None else x.detach().to(pred).expand_as(pred)
                                   for x in (target, mask, clean))
            pred = torch.where(counts.view(-1, *[1] * (pred.ndim - 1)), pred, target)
            if mask is not None:
                pred, target = mask * pred, mask * target
            planes = [x if x is None else x.unsqueeze(1).flatten(1, -3) for x in (pred, target, mask, clean)]
            plan = self._plan(*pred.shape[-2:], progress)
            return sum(self._term(scale, shares, planes, snr) for scale, shares in plan.items())

    def _term(self, scale: int, shares: Sequence[float], planes: Sequence[Tensor | None], snr: Tensor | None) -> Tensor:
        """A·Q0 + B·Q1 of masked pred and target, their mask and clean latents, each [B,C,h,w] -> [B]."""
        p, t, mask, clean = (x if x is None else pooled(x, scale) for x in planes)
        p, t = NORMALIZERS[self.normalize](partial(self._size, mask=mask), p, t)
        error = METRICS[self.metric](p, t, self.norm, self.eps).mean(1)  # [B,h,w//2 + 1]
        if clean is not None:  # pooling leaves noise 1/s² of its power
            error = error * GATES[self.timestep_gate].frequency(scale * clean, snr)
        flat, tilted = kept(coefficients, *p.shape[-2:], scale, self.bands, self.space != "x0", like=error)
        return (error * (shares[0] * flat + shares[1] * tilted)).sum((-2, -1))

    def _size(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standard deviation inside the mask, of x that it multiplied already, LEAST_SPREAD or more -> [B,1,1,1]."""
        axes = (2, 3) if self.space == "x0" else (1, 2, 3)
        middle, share = x.mean(axes, True), 1.0
        if mask is not None:
            middle = mask * (middle / mask.mean(axes, True).clamp(min=TINY))
            share = mask.square().mean((1, 2, 3), True).clamp(min=TINY)
        return ((x - middle).square().mean((1, 2, 3), True) / share + self.eps**2).sqrt().clamp(min=LEAST_SPREAD)
