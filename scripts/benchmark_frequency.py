"""What the frequency bands and the loss in them cost, on one thread.

    python scripts/benchmark_frequency.py [--rounds 40] [--clock wall|cpu]

Two tables. First one low-pass of latents, forward and backward, by our matrices and by pytorch_wavelets, with the ratio
of the two; then distribution matching alone, forward and backward on a batch, without the network that it trains.
The ways take turns, a pass each a round, in an order that rotates. Medians of milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from freq_loss import DistributionMatchingLoss, LowPass

BATCH, CHANNELS = 4, 4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 3  # rounds that fill the caches and are not counted
OPERATORS = {
    "dct": LowPass("dct"),
    "fft": LowPass("fft"),
    "db3, zero": LowPass("wavelet"),
    "db3, zero, pytorch_wavelets": LowPass("wavelet", backend="pytorch_wavelets"),
    "db3, periodization": LowPass("wavelet", boundary="periodization"),
    "db3, periodization, pytorch_wavelets": LowPass("wavelet", boundary="periodization", backend="pytorch_wavelets"),
}
LOSSES = {
    "sum, 2 bands": dict(statistic="sum", band_norm="grid"),
    "u, whitened, 2 bands": dict(),
    "u, whitened, 3 bands": dict(weights=(0.4, 0.3, 0.3)),
    "u, whitened, bank": dict(bank=0.95),
    "u, kernel on latents": dict(kernel="latent"),
}

Pass = Callable[[], None]  # one forward and backward


def low_pass(operator: LowPass, side: int) -> Pass:
    x, ahead = torch.randn(2, BATCH, CHANNELS, side, side)
    x.requires_grad_()

    def once() -> None:
        x.grad = None
        operator(x).backward(ahead)

    return once


def matching(settings: Mapping[str, object], side: int) -> Pass:
    loss = DistributionMatchingLoss(gain=0.1, **settings)
    x0, z = torch.randn(2, BATCH, CHANNELS, side, side)
    x0_hat = (x0 + 0.1 * z).requires_grad_()
    snr, weight = torch.full((BATCH,), 0.7), torch.ones(BATCH)

    def once() -> None:
        x0_hat.grad = None
        alike = loss.low(z).flatten(1) if loss.kernel == "latent" else None
        loss(x0_hat, x0, snr=snr, weight=weight, alike=alike).mean().backward()

    return once


def medians(ways: Mapping[str, Pass], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each way."""
    names, taken = list(ways), {name: [] for name in ways}
    for i in range(WARM_UP + rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = clock()
            ways[name]()
            taken[name].append(clock() - start)
    return {name: 1e3 * statistics.median(seconds[WARM_UP:]) for name, seconds in taken.items()}


def print_operators(side: int, rounds: int, clock: Callable[[], float]) -> None:
    found = medians({name: low_pass(operator, side) for name, operator in OPERATORS.items()}, rounds, clock)
    for name, ms in found.items():
        own = found.get(name.removesuffix(", pytorch_wavelets"), ms)
        ratio = "" if own == ms else f"   {ms / own:5.1f} x ours"
        print(f"  {name:38}{ms:8.2f} ms{ratio}")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=40, help="counted passes of each way (default: 40)")
    args.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where the machine has other work too")
    asked = args.parse_args()
    rounds, clock = asked.rounds, CLOCKS[asked.clock]
    warnings.filterwarnings("ignore", message="pkg_resources")  # pytorch_wavelets imports it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for side in (64, 128):
        print(f"low-pass, forward and backward, {BATCH}x{CHANNELS}x{side}x{side}")
        print_operators(side, rounds, clock)
    for side in (16, 64):
        print(f"distribution matching alone, {BATCH}x{CHANNELS}x{side}x{side}")
        ways = {name: matching(settings, side) for name, settings in LOSSES.items()}
        for name, ms in medians(ways, rounds, clock).items():
            print(f"  {name:38}{ms:8.2f} ms")


if __name__ == "__main__":
    main()
