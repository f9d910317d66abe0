"""What an update of our Prodigy takes on a CPU against prodigyopt's, and against memory alone.

    .venv/bin/python experiments/benchmark/prodigy.py [ROUNDS]

320 LoRA tensors of rank 8 and sides of 320, 640 and 1280, in fp32, one thread. The ways take turns, with 3 updates a
round; printed are medians in CPU milliseconds. The floor reads and writes every number that an update needs once, in
five operations for each chunk: no update can be faster.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import prodigyopt
import torch
from torch import nn

from trainkit.optim import Prodigy

RANK, SIDES, PAIRS = 8, (320, 640, 1280), 160
ROUNDS, UPDATES = 5, 3
SETTINGS = dict(lr=1.0, weight_decay=0.01, safeguard_warmup=True, use_bias_correction=True)


def optimizer(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Over tensors that start as a LoRA's do, every second one at 0, with gradients."""
    generator, weights = torch.Generator().manual_seed(0), []
    for pair in range(PAIRS):
        side = SIDES[pair % len(SIDES)]
        weights += [nn.Parameter(torch.randn(RANK, side, generator=generator)), nn.Parameter(torch.zeros(side, RANK))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) * 1e-3
    with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt prints
        return kind(weights, **SETTINGS)


def floor(ours: Prodigy) -> Callable[[], None]:
    sizes = [(chunk.s.numel(), chunk.start.dim() > 0) for chunk in ours._chunks]
    chunks = [(torch.ones(6, size), moved) for size, moved in sizes]

    def update() -> None:
        for (gradient, weights, average, square, s, start), moved in chunks:
            average.add_(gradient, alpha=1e-9)
            square.add_(average, alpha=1e-9)
            s.add_(weights, alpha=1e-9)
            if moved:
                torch.dot(start, weights)
        for (_, weights, average, square, *_), _ in chunks:
            weights.addcdiv_(average, square, value=-1e-9)

    return update


def main() -> None:
    torch.set_num_threads(1)
    theirs, ours = optimizer(prodigyopt.Prodigy), optimizer(Prodigy)
    ours.step()  # lays its chunks out
    assert isinstance(ours, Prodigy)
    ways = {"prodigyopt": theirs.step, "ours": ours.step, "floor": floor(ours)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        for name, update in ways.items():
            begun = time.process_time()
            for _ in range(UPDATES):
                update()
            seconds[name].append((time.process_time() - begun) / UPDATES)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in middle.items():
        print(f"{name:12s}{found * 1e3:6.1f} ms   {found / middle['prodigyopt']:.2f} of prodigyopt's")


if __name__ == "__main__":
    main()
