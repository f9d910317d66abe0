"""How much slower steps are with cached images and captions from disk than with tensors that are in memory already.

    OMP_NUM_THREADS=1 .venv/bin/python experiments/benchmark/data.py [ROUNDS] [STEPS] [SIDE]

The text-to-image trainer runs on the shipped SDXL model and its 22 icons at SIDE pixels, batch 1, with latents and
captions in --latent_cache_dir and no worker processes: every millisecond of reading counts. In turn, STEPS steps read
their data as always, and STEPS steps get one ready batch and captions from memory. Prints for each clock the median
seconds of a step of both kinds, and the median over ROUNDS of their quotient: 1 is as fast as without any reading.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROUNDS, STEPS, SIDE = 8, 6, 64
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FLAGS = (f"--pretrained_model_name_or_path={ROOT / 'assets/tiny-sdxl-icons'}",
         f"--train_data_dir={ROOT / 'assets/icons-3d'}", "--cache_latents", "--train_batch_size=1", "--report_to=none",
         "--seed=0")

Seconds = dict[str, float]  # by clock


class Turns:
    """Stands for the trainer's `micro_batches`, whose data it passes on or replaces, and times what lies between."""

    def __init__(self, steps: int, total: int):
        self.steps, self.total, self.from_memory = steps, total, False
        self.memory: dict[str, Any] = {}
        self.taken: dict[bool, list[Seconds]] = {False: [], True: []}

    def batches(self, real: Iterator[tuple[int, list]]) -> Iterator[tuple[int, list]]:
        ready = None
        for step in range(self.total):
            self.from_memory = ready is not None and step // self.steps % 2 == 1
            before = {name: clock() for name, clock in CLOCKS.items()}
            if self.from_memory:
                batch = replace(ready, step=step, keys=tuple((seed, step, slot) for seed, _, slot in ready.keys))
            else:
                batch = replace(next(real)[1][0], step=step)
                ready = ready or batch
            yield step, [batch]
            self.taken[self.from_memory].append({name: clock() - before[name] for name, clock in CLOCKS.items()})

    def read(self, read: Any, store: Any, key: str) -> Any:
        """An entry of the cache; while data come from memory, it was read before."""
        if not (self.from_memory and key in self.memory):
            self.memory[key] = read(store, key)
        return self.memory[key]


def main() -> None:
    given = [int(word) for word in sys.argv[1:]]
    rounds, steps, side = (given[i] if len(given) > i else default for i, default in enumerate((ROUNDS, STEPS, SIDE)))
    import train_text_to_image_lora as trainer
    from trainkit.data import cache, loader

    total = 2 * rounds * steps + steps
    turns, micro_batches, read = Turns(steps, total), loader.micro_batches, cache.DiskStore.__getitem__
    loader.micro_batches = lambda *a, **more: turns.batches(micro_batches(*a, **more))  # type: ignore[assignment]
    cache.DiskStore.__getitem__ = lambda store, key: turns.read(read, store, key)  # type: ignore[method-assign]
    folder = tempfile.mkdtemp()
    trainer.main([*FLAGS, f"--resolution={side}", f"--latent_cache_dir={folder}/cache", f"--output_dir={folder}/run",
                  f"--max_train_steps={total}"])
    for clock in CLOCKS:
        real, ready = (blocks([taken[clock] for taken in turns.taken[kind]], steps) for kind in (False, True))
        pairs = list(zip(real[1:], ready, strict=False))  # the first block warms up
        print(json.dumps({"clock": clock, "rounds": len(pairs), "from disk": round(statistics.median(real[1:]), 4),
                          "from memory": round(statistics.median(ready), 4),
                          "speed": round(statistics.median(b / a for a, b in pairs), 4)}))


def blocks(seconds: list[float], size: int) -> list[float]:
    """The median of every `size` of them."""
    return [statistics.median(seconds[i : i + size]) for i in range(0, len(seconds) - size + 1, size)]


if __name__ == "__main__":
    main()
