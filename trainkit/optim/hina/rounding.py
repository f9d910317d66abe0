"""Stochastic rounding to bfloat16, noise a function of (seed, step, name, parameter, element); halves of fp32.

bfloat16 is the high half of fp32. With r uniform in [0, 2^16) added below, cutting the low half off is unbiased:

    sr(x) = high16(bits(x) + r),    E[sr(x)] = x

r is a hash, not a draw from a generator: chunking, threads, device and residency change no bit of it, and a resumed run
rounds as the run it resumes. For element e of parameter i:

    r = high16(k T[e]),    T[e] = scramble(e) | 1,    k = hash(seed, step, name, i) | 1

A product of odd numbers takes every odd value once as k does, so r is uniform for each element whatever T[e] is.
Integers are int32 and wrap, the same on every device. Source of the rounding: Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision", arXiv:1502.02551, section 2.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ODD = (0x7FEB352D, 0x846CA68B - (1 << 32))  # odd multipliers, as signed 32-bit numbers
QUIET_NAN = 0x7FC00000


class Rounder:
    """The noise of one bucket in one step.

    indices  of the bucket's parameters in their group
    numel    elements of each
    names    of what is to be rounded
    """

    def __init__(self, indices: Sequence[int], numel: int, device: torch.device, *, names: Sequence[str], seed: int,
                 step: int):
        keys = make_keys(indices, [words(seed, step, name) for name in names])
        self.keys = dict(zip(names, _upload(keys, device).unbind(), strict=True))  # name -> k [N]
        self.table = scramble(torch.arange(numel, dtype=torch.int32, device=device)) | 1  # T [numel]
        self.buffers = self.table[:0, None]  # [n,numel] int32, the largest noise so far

    def round_(self, target: Tensor, x: Tensor, name: str, lo: int = 0) -> None:
        """target <- sr(x), for the parameters from the `lo`-th of the bucket on.

        x [n,...] fp32 or fp64 and target [n,...] bf16, both contiguous. Infinities stay infinite, NaN stays NaN, and a
        number above the largest of bf16 may become infinite.
        """
        x = x.float()
        bits = self.noise(name, lo, lo + len(x)).view(x.shape)
        bits += x.view(torch.int32)
        bits >>= 16
        target.view(torch.int16).copy_(bits)
        if x.device.type != "cpu" or not math.isfinite(x.sum().item()):  # the look would wait for a device
            target.masked_fill_(x.isnan(), torch.nan)  # the noise may carry a NaN over into 0

    def noise(self, name: str, lo: int, hi: int) -> Tensor:
        """Uniform in [0, 2^16): [hi - lo,numel] int32, on memory that the next call takes again."""
        if len(self.buffers) < hi - lo:
            self.buffers = self.table.new_empty(hi - lo, len(self.table))
        return high16(torch.mul(self.table, self.keys[name][lo:hi, None], out=self.buffers[:hi - lo]))


def make_keys(indices: Sequence[int], seeds: Sequence[tuple[int, int]]) -> Tensor:
    """A number for each seed and index, odd: [seeds,N] int32, on the CPU, where so few take no time."""
    first, second = torch.tensor(seeds, dtype=torch.int32).view(-1, 2, 1).unbind(1)
    return scramble(scramble(torch.tensor(indices, dtype=torch.int32) ^ first) ^ second) | 1


def words(*key: int | str) -> tuple[int, int]:
    """Two signed 32-bit numbers for a key; keys that differ anywhere give unrelated ones (BLAKE2b)."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def scramble(x: Tensor) -> Tensor:
    """A bijection of the 32-bit numbers in which every bit of the input sways every bit of the output, in place.

    x <- x ^ x>>16;  x <- a x;  x <- x ^ x>>15;  x <- b x;  x <- x ^ x>>16, with logical shifts and odd a, b.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= ODD[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= ODD[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def high16(x: Tensor) -> Tensor:
    """The upper halves of 32-bit numbers, in place: in [0, 2^16)."""
    x >>= 16
    x &= 0xFFFF
    return x


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pinned memory is queued."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 -> (bf16 nearest to it, int16 rest), of which `join` makes x again, bit for bit; NaN stays some NaN.

    high = (bits + 2^15) >> 16,  rest = bits - (high << 16) in [-2^15, 2^15)
    """
    bits = x.view(torch.int32).masked_fill(x.isnan(), QUIET_NAN)
    high = (bits + 0x8000) >> 16
    bits -= high << 16
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(high: Tensor, rest: Tensor) -> Tensor:
    """What `split` took apart: bf16 and int16 -> fp32."""
    bits = high.view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += rest
    return bits.view(torch.float32)
