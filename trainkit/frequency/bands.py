"""Frequency bands of latents: low-passes as linear operators, and the bands that they split a tensor into.

    frequency_decomposition   low and high part of a tensor [...,h,w]; low + high = tensor
    LowPass                   the low-pass: DCT, wavelet or FFT
    Bands                     two or J + 1 bands of latents, lowest first

db3 needs no package; the taps of other wavelets come from PyWavelets. The last section is what the files of this
package share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

DB3 = (0.03522629188570953, -0.08544127388202666, -0.13501102001025458,
       0.45987750211849154, 0.8068915093110925, 0.33267055295008263)  # Daubechies 1992, table 6.1, reversed
METHODS = ("wavelet", "fft", "dct")
BOUNDARIES = ("zero", "periodization")
BACKENDS = ("matrix", "pytorch_wavelets")

# ----------------------------------------------------------------------------------------------------------------------
# Low and high part of a tensor


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

        low = S_h · (D_h · x · D_wᵀ) · S_wᵀ     D reduces the N values of a side to K coefficients, S makes N of K

        dct      the first K = round(N/2^J) of the N DCT-II vectors: orthogonal at every size
        wavelet  synthesis of the approximation after J levels alone, as PyWavelets does it with that boundary
                   zero           any size; low and high are not orthogonal
                   periodization  orthogonal for orthogonal wavelets; 2^J must divide h and w
        fft      frequencies up to 2^−(J+1) cycles per pixel in any direction: orthogonal, not separable

    It computes in fp32 (fp64 for fp64), whatever the dtype of the input and autocast are, and returns the input's
    dtype.
    backend  "pytorch_wavelets" lets that package compute the wavelets, where its result and its gradient are right
    Raises ValueError for settings that are unknown or do not go together, ImportError for a missing package.
    """

    method: str = "dct"
    wavelet: str = "db3"
    levels: int = 2
    boundary: str = "zero"
    backend: str = "matrix"

    def __post_init__(self) -> None:
        refuse_unknown("method", self.method, METHODS)
        refuse_unknown("backend", self.backend, BACKENDS)
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
            taps(self.wavelet)  # refuses a wrong name

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"a low-pass takes real numbers of shape [...,h,w], not {x.dtype} {tuple(x.shape)}")
        self.refuse_size(*x.shape[-2:])
        if not x.numel():  # a process without samples; fft and the library refuse it
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self._apply(widened(x)).to(x.dtype)

    def refuse_size(self, h: int, w: int) -> None:
        """Raises ValueError for a size at which this operator would be wrong."""
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
            return library_low_pass(self, x)
        if self.method == "fft":
            return torch.fft.irfft2(torch.fft.rfft2(x) * cached(disc, self.levels, h, w, like=x), s=(h, w))
        coarse = cached(analysis, self, h, like=x) @ (x @ cached(analysis, self, w, like=x).T)
        return cached(synthesis, self, h, like=x) @ coarse @ cached(synthesis, self, w, like=x).T


# ----------------------------------------------------------------------------------------------------------------------
# Filter taps of wavelets


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
    """One level on a side of `size`: analysis [K,size] and synthesis [size,K], fp64, in the phase of PyWavelets.

    Source: Mallat 1989, "A Theory for Multiresolution Signal Decomposition".
    """
    down_taps, up_taps = taps(wavelet)
    length, wraps = len(down_taps), boundary == "periodization"
    k = torch.arange(size // 2 if wraps else (size + length - 1) // 2)
    shift = length // 2 if wraps else 1
    down, up = torch.zeros(2, len(k), size, dtype=torch.float64)

    # Each tap stands in one place of every row k; places beyond the border wrap around, or see zeros.
    for j in range(length):
        for matrix, tap, place in ((down, down_taps[j], 2 * k + shift - j),
                                   (up, up_taps[j], 2 * k + shift + j - (length - 1))):
            place = place % size if wraps else place
            inside = (place >= 0) & (place < size)
            matrix[k[inside], place[inside]] += tap
    return down, up.T


# ----------------------------------------------------------------------------------------------------------------------
# Operators of one side (DCT, wavelet), and the disc of FFT


def wavelet_factors(low_pass: LowPass, size: int) -> tuple[Tensor, Tensor]:
    """J levels down, and from the approximation alone up again."""
    down = up = torch.eye(size, dtype=torch.float64)
    for _ in range(low_pass.levels):
        next_down, next_up = filter_bank(len(down), low_pass.wavelet, low_pass.boundary)
        down, up = next_down @ down, up @ next_up
    return down, up


def dct_factors(low_pass: LowPass, size: int) -> tuple[Tensor, Tensor]:
    """The lowest DCT-II vectors √(2/N)·cos(π(m + ½)k/N), of which the first is a constant."""
    k = torch.arange(max(1, round(size / 2**low_pass.levels)), dtype=torch.float64)
    m = torch.arange(size, dtype=torch.float64)
    vectors = (math.pi / size * (m + 0.5) * k[:, None]).cos() * math.sqrt(2 / size)  # [K,N]
    vectors[0] /= math.sqrt(2)
    return vectors, vectors.T


FACTORS: dict[str, Callable[[LowPass, int], tuple[Tensor, Tensor]]] = {"wavelet": wavelet_factors, "dct": dct_factors}


def analysis(low_pass: LowPass, size: int) -> Tensor:
    """D of one side -> [K,size] fp64."""
    return FACTORS[low_pass.method](low_pass, size)[0]


def synthesis(low_pass: LowPass, size: int) -> Tensor:
    """S of one side -> [size,K] fp64."""
    return FACTORS[low_pass.method](low_pass, size)[1]


def disc(levels: int, h: int, w: int, *, full: bool = False) -> Tensor:
    """Which frequencies of rfft2 (or `full`, of fft2) are low -> bool [h, w//2 + 1] (or [h,w])."""
    columns = (torch.fft.fftfreq if full else torch.fft.rfftfreq)(w, dtype=torch.float64)
    return torch.fft.fftfreq(h, dtype=torch.float64)[:, None] ** 2 + columns**2 <= 4.0 ** -(levels + 1)


@lru_cache(maxsize=256)
def trace(low_pass: LowPass, h: int, w: int) -> float:
    """Trace of the operator on [h,w]: the dimension of its range, where it is a projector."""
    if low_pass.method == "fft":
        return float(disc(low_pass.levels, h, w, full=True).sum())
    return math.prod(float((analysis(low_pass, side) * synthesis(low_pass, side).T).sum()) for side in (h, w))


# ----------------------------------------------------------------------------------------------------------------------
# The package pytorch_wavelets (Cotter 2019, https://github.com/fbcotter/pytorch_wavelets)


@lru_cache(maxsize=64)
def library_modules(low_pass: LowPass, device: torch.device, dtype: torch.dtype
                    ) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Its analysis and its synthesis."""
    try:
        from pytorch_wavelets import DWTForward, DWTInverse
    except ImportError as error:
        raise ImportError(f"the backend pytorch_wavelets cannot be imported ({error}): it needs the packages "
                          "pytorch_wavelets and setuptools<82, because it imports pkg_resources, which 82 removed. "
                          "pip install pytorch_wavelets 'setuptools<82', or leave the backend at matrix") from error
    with torch.inference_mode(False):
        forward = DWTForward(J=low_pass.levels, wave=low_pass.wavelet, mode=low_pass.boundary)
        inverse = DWTInverse(wave=low_pass.wavelet, mode=low_pass.boundary)
        return forward.to(device, dtype), inverse.to(device, dtype)


def library_low_pass(low_pass: LowPass, x: Tensor) -> Tensor:
    """The low-pass as the package computes it; sides may come out one too long and are cropped."""
    forward, inverse = library_modules(low_pass, x.device, x.dtype)
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
        parts = [*(low(x) for low in self.lows), x]  # each contains the one before it
        return torch.stack([parts[0], *(wider - low for low, wider in zip(parts, parts[1:], strict=False))])

    def degrees(self, shape: Sequence[int]) -> tuple[float, ...]:
        """Degrees of freedom D_b of the bands of one latent (C,h,w), whose sum is D.

        Raises ValueError where a band has none.
        """
        channels, h, w = shape
        traces = [0.0, *(trace(low, h, w) for low in self.lows), float(h * w)]
        degrees = tuple(channels * (wider - low) for low, wider in zip(traces, traces[1:], strict=False))
        if min(degrees) < 0.5:
            raise ValueError(f"latents of {h}x{w} are too small for {self.count} bands of {self.low.levels} levels: "
                             "lower the levels, or train at a higher resolution")
        return degrees

    @property
    def _nested(self) -> bool:
        """Whether the low-passes of 1 to J levels are projectors, each within the one before."""
        if self.low.method != "wavelet":
            return True
        down, up = taps(self.low.wavelet)
        orthogonal = all(abs(a - s) < 1e-6 for a, s in zip(down, up[::-1], strict=True))
        return orthogonal and self.low.boundary == "periodization"


# ----------------------------------------------------------------------------------------------------------------------
# Shared by the files of this package

TINY = 1e-30  # in place of 0 as a divisor


def refuse_unknown(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known: choose one of {', '.join(choices)}")


def widened(x: Tensor) -> Tensor:
    """fp64 stays; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def cached(make: Callable[..., Tensor], *args: object, like: Tensor) -> Tensor:
    """make(*args), computed once in fp64 and kept in the dtype and on the device of `like`."""
    return _cached(make, args, like.device, like.dtype)


@lru_cache(maxsize=512)  # 64 sizes with 3 scales, a mask and its rings for each, and what matching needs beside them
def _cached(make: Callable[..., Tensor], args: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # gradients may pass through it later
        return make(*args).to(device, dtype)
