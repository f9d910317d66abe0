"""What an update of HinaAdaptive costs against torch.optim.AdamW(foreach=True), on LoRA tensors as large as SDXL's.

    .venv/bin/python experiments/benchmark/optimizer.py [--rounds 20] [--clock wall|cpu] [--device cpu|cuda]
        [--only everything …]

100 pairs of rank 16 on the attention of SDXL's UNet (sides of 640, 1280 and 2048), random gradients, fp32, one thread.
One set of weights and gradients, and in turn an optimizer of each kind, in an order that rotates: 10 updates a pass,
so that what is due every tenth step counts a tenth. Medians in milliseconds an update, and the bytes of all states for
each number that trains. On CUDA the clock waits for the device before and after a pass.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from experiments.benchmark.frequency import CLOCKS, Pass, medians
from trainkit.optim.hina import HinaAdaptive
from trainkit.optim.hina.settings import RULE_FLAGS

RANK, PAIRS = 16, 100
UPDATES = 10  # of a pass
BLOCKS = (640, 640, *[1280] * 11)  # sides of transformer blocks, in SDXL's share, until there are enough pairs
TEXT = 2048  # what the keys and values of cross-attention read
LR = 1e-4
BASELINE = "AdamW(foreach=True)"

ALL_BUT_RANK = {flag: True for flag in RULE_FLAGS if flag != "lora_rank_penalty"}
EDGE = {"edge_suppression": True}
RECIPES = {  # of the guide to HinaAdaptive; their learning rates change no cost
    "LoRA": EDGE | {"edge_penalty": 0.08, "lora_rank_penalty": True, "rank_penalty_strength": 0.01,
                    "low_rank_emphasis": 1.2, "memory_efficient": True, "vram_budget_gb": 8.0},
    "fast": EDGE | {"edge_penalty": 0.1, "memory_efficient": True, "vram_budget_gb": 6.0},
    "large": EDGE | {"edge_penalty": 0.12, "spatial_awareness": True, "frequency_penalty": 0.06,
                     "background_regularization": True, "use_dynamic_adaptation": True, "memory_efficient": True,
                     "vram_budget_gb": 16.0, "reduce_precision": True, "cpu_offload_states": True},
}
KINDS: dict[str, Mapping[str, object]] = {
    "plain, foreach=True": {"foreach": True},
    "plain, fused=True": {"fused": True},
    "plain, reduce_precision": {"reduce_precision": True},
    **{flag: {flag: True} for flag in RULE_FLAGS},
    "use_spd, anchor init": {"use_spd": True, "spd_anchor": "init"},
    "use_dynamic_adaptation, due each step": {"use_dynamic_adaptation": True, "relationship_discovery_interval": 1},
    "lora_rank_penalty, of products": {"lora_rank_penalty": True, "rank_penalty_target": "product"},
    "everything but rank": ALL_BUT_RANK,
    "everything but rank and Grams": ALL_BUT_RANK | {"use_grams": False},  # beside Grams the cautious rule does nothing
    "everything but rank, reduce_precision": ALL_BUT_RANK | {"reduce_precision": True},
    "everything": dict.fromkeys(RULE_FLAGS, True),
    **{f"recipe {name}": recipe for name, recipe in RECIPES.items()},
    "recipe fast, reduce_precision": RECIPES["fast"] | {"reduce_precision": True},
    "preset fork": {"preset": "fork"},
}


def sizes() -> Iterator[tuple[int, int]]:
    """(in, out) of the attention layers, block by block: q, k, v and out on itself, then on the text."""
    for side in BLOCKS:
        yield from ((side, side),) * 4
        yield from ((side, side), (TEXT, side), (TEXT, side), (side, side))


def lora_tensors(device: torch.device) -> list[Tensor]:
    """A [r,in] and B [out,r] of each pair in turn, with gradients."""
    tensors = []
    for (wide, tall), _ in zip(sizes(), range(PAIRS), strict=False):
        tensors += [torch.randn(RANK, wide) / RANK, torch.randn(tall, RANK) / RANK]
    params = [torch.nn.Parameter(x.to(device)) for x in tensors]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def optimizers(params: Sequence[Tensor], only: Sequence[str]) -> dict[str, torch.optim.Optimizer]:
    chosen = [name for name in KINDS if not only or name in only]
    hina = {name: HinaAdaptive(params, lr=LR, **KINDS[name]) for name in chosen}
    return {
        BASELINE: torch.optim.AdamW(params, lr=LR, weight_decay=1e-2, foreach=True),
        "AdamW(fused=True)": torch.optim.AdamW(params, lr=LR, weight_decay=1e-2, fused=True), **hina}


def updates(optimizer: torch.optim.Optimizer) -> Pass:
    def several() -> None:
        for _ in range(UPDATES):
            optimizer.step()

    return several


def bytes_per_number(optimizer: torch.optim.Optimizer) -> float:
    """Of all tensors of the state, for each number that trains."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(t.numel() * t.element_size() for t in kept) / trained


def clock_of(device: torch.device, name: str) -> Callable[[], float]:
    """Seconds; on CUDA of all work that was queued so far."""
    if device.type != "cuda":
        return CLOCKS[name]

    def waited() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="counted passes of each kind (default: 20)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where the machine has other work too")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[], metavar="KIND", help="; ".join(KINDS))
    args = parser.parse_args()
    logging.getLogger("trainkit").setLevel(logging.ERROR)  # settings that say the same twice are meant so here
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = lora_tensors(args.device)
    kinds = optimizers(params, args.only)
    ways = {name: updates(optimizer) for name, optimizer in kinds.items()}
    found = medians(ways, args.rounds, clock_of(args.device, args.clock), warm_up=1)
    print(f"{len(params)} tensors, {sum(p.numel() for p in params) / 1e6:.2f} M numbers, {args.device}")
    for name, ms in found.items():
        ratio, kept = ms / found[BASELINE], bytes_per_number(kinds[name])
        print(f"  {name:40}{ms / UPDATES:8.2f} ms{ratio:8.2f} x{kept:8.2f} bytes")


if __name__ == "__main__":
    main()
