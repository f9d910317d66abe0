"""What the frequency bands and the loss in them cost, on one thread.

    .venv/bin/python experiments/benchmark/frequency.py [--tables bands matching fourier] [--rounds 40]
        [--clock wall|cpu]

    bands     one low-pass of latents, forward and backward, by our matrices and by pytorch_wavelets, and their ratio
    matching  distribution matching alone, forward and backward on a batch, without the network that it trains
    fourier   the Fourier loss alone, forward and backward, of every preset; its share of a step of SDXL at 1024 px, if
              that step did nothing but the products of its UNet, at this machine's best rate of such products; and
              the operations it dispatches and the memory they touch, of which its cost on other machines follows

The ways take turns, a pass each a round, in an order that rotates. Medians of milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark import sdxl
from trainkit.frequency import PRESETS, DistributionMatchingLoss, FourierLoss, LowPass, get_fourier_loss_config

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
SPECTRA = {name: get_fourier_loss_config(name) for name in PRESETS} | {
    "balanced, complex": get_fourier_loss_config("balanced") | {"fourier_metric": "complex"},
    "balanced, wiener": get_fourier_loss_config("balanced") | {"fourier_timestep_gate": "wiener"},
}
SHAPES = ((4, 16), (1, 64), (4, 64), (1, 128), (4, 128))  # batch, latent side; the first is the shipped model's
PRODUCT = 2048  # side of the matrices whose product is timed

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


def fourier(settings: Mapping[str, object], batch: int, side: int) -> Pass:
    loss = FourierLoss.from_config(settings)
    target, noise = torch.randn(2, batch, CHANNELS, side, side)
    pred = (target + 0.3 * noise).requires_grad_()
    base, snr, step = torch.full((batch,), 0.09), torch.full((batch,), 0.7), loss.warmup_steps

    def once() -> None:
        pred.grad = None
        part = loss(pred, target, base=base, step=step, total_steps=4 * step, snr=snr, clean=target)
        part.added.mean().backward()

    return once


class Traffic(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Callable, types: Sequence[type], args=(), kwargs=None) -> object:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in touched)
        return out


def unet_flops(side: int = 128) -> int:
    """Of one forward of SDXL's UNet on one latent, on the meta device: convolutions, linear layers and attention."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        unet = sdxl.unet()
        unet(torch.empty(1, CHANNELS, side, side), torch.empty(1), torch.empty(1, 77, 2048), added_cond_kwargs=added)
    return counter.get_total_flops()


def product_rate(dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> float:
    """Operations a second of the fastest of `rounds` matrix products."""
    a, b = torch.randn(2, PRODUCT, PRODUCT).to(dtype)
    seconds = []
    for _ in range(rounds):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * PRODUCT**3 / min(seconds)


def medians(
    ways: Mapping[str, Pass], rounds: int, clock: Callable[[], float], *, warm_up: int = WARM_UP,
) -> dict[str, float]:
    """Milliseconds of each way."""
    names, taken = list(ways), {name: [] for name in ways}
    for i in range(warm_up + rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = clock()
            ways[name]()
            taken[name].append(clock() - start)
    return {name: 1e3 * statistics.median(seconds[warm_up:]) for name, seconds in taken.items()}


def print_operators(side: int, rounds: int, clock: Callable[[], float]) -> None:
    found = medians({name: low_pass(operator, side) for name, operator in OPERATORS.items()}, rounds, clock)
    for name, ms in found.items():
        reference_ms = found.get(name.removesuffix(", pytorch_wavelets"), ms)
        ratio = "" if reference_ms == ms else f"   {ms / reference_ms:5.1f} x ours"
        print(f"  {name:38}{ms:8.2f} ms{ratio}")


def print_matching(side: int, rounds: int, clock: Callable[[], float]) -> None:
    ways = {name: matching(settings, side) for name, settings in LOSSES.items()}
    for name, ms in medians(ways, rounds, clock).items():
        print(f"  {name:38}{ms:8.2f} ms")


def print_fourier(rounds: int, clock: Callable[[], float]) -> None:
    """Milliseconds by preset and shape, and for the step of one 1024-px image the share, operations and memory."""
    found = [medians({name: fourier(settings, *shape) for name, settings in SPECTRA.items()}, rounds, clock)
             for shape in SHAPES]
    flops, rates = 2 * unet_flops(), {str(d): product_rate(d, 5, clock) for d in (torch.float32, torch.bfloat16)}
    rate = max(rates.values())
    print(f"  floor of a step of SDXL, 1x{CHANNELS}x128x128: forward and as much for the backward through activations, "
          f"{flops / 1e12:.2f} TFLOP;\n  products on this machine: "
          f"{', '.join(f'{name} {r / 1e9:.0f} GFLOP/s' for name, r in rates.items())}; floor {flops / rate:.1f} s")
    print(f"  {'':20}" + "".join(f"{f'{b}x{CHANNELS}x{side}x{side}':>13}" for b, side in SHAPES)
          + "   share of the floor   operations   MiB touched")
    for name, settings in SPECTRA.items():
        once = fourier(settings, 1, 128)
        with Traffic() as traffic:
            once()
        times = "".join(f"{column[name]:10.2f} ms" for column in found)
        fraction = 1e-3 * found[SHAPES.index((1, 128))][name] * rate / flops
        print(f"  {name:20}{times}{fraction:20.4%}{traffic.operations:13}{traffic.bytes / 2**20:14.1f}")


TABLES = ("bands", "matching", "fourier")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=40, help="counted passes of each way (default: 40)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where the machine has other work too")
    args = parser.parse_args()
    rounds, clock = args.rounds, CLOCKS[args.clock]
    warnings.filterwarnings("ignore", message="pkg_resources")  # pytorch_wavelets imports it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for side in (64, 128) if "bands" in args.tables else ():
        print(f"low-pass, forward and backward, {BATCH}x{CHANNELS}x{side}x{side}")
        print_operators(side, rounds, clock)
    for side in (16, 64) if "matching" in args.tables else ():
        print(f"distribution matching alone, {BATCH}x{CHANNELS}x{side}x{side}")
        print_matching(side, rounds, clock)
    if "fourier" in args.tables:
        print("Fourier loss alone, forward and backward")
        print_fourier(rounds, clock)


if __name__ == "__main__":
    main()
