"""Which row fills which place of which step: endless streams of shuffled epochs, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from trainkit.rng import permutation

if TYPE_CHECKING:
    from trainkit.data.batch import Row, Slot

STREAMS = ("order", "class order")  # names of the shuffles: of instances, of class images


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch a process trains on, and in how many micro-batches."""

    rank: int = 0
    world: int = 1
    accumulation: int = 1


WHOLE = Shard()


class Order:
    """Epoch after epoch, each a fresh shuffle of all instances, cut into global batches without a ragged end.

        slot i of step s: place p = s · global_batch + i of the stream, epoch p // rows, row shuffle[epoch][p % rows]

    Class images, where there are any, are a second stream of the same pace: slot global_batch + i of a step holds
    place p of theirs, so a step has as many of them as instances, whose slots stay what they are without.
    Nothing is remembered, so a resumed run and a run on more processes see the same rows in the same steps.
    """

    def __init__(self, rows: Sequence[Row], global_batch: int, *, seed: int):
        instances = [i for i, row in enumerate(rows) if not row.is_class]
        classes = [i for i, row in enumerate(rows) if row.is_class]
        assert instances and global_batch > 0, "an order needs instances and a batch"
        self.global_batch, self.seed = global_batch, seed
        self.streams = [instances, classes] if classes else [instances]  # positions in `rows`

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every instance has come at least once."""
        return math.ceil(len(self.streams[0]) / self.global_batch)

    def slot(self, step: int, index: int) -> Slot:
        stream, offset = divmod(index, self.global_batch)
        rows = self.streams[stream]
        epoch, place = divmod(step * self.global_batch + offset, len(rows))
        row = rows[_shuffle(len(rows), STREAMS[stream], self.seed, epoch)[place]]
        return (self.seed, step, index), row, epoch, self.global_batch

    def slots(self, step: int, shard: Shard = WHOLE) -> list[list[Slot]]:
        """The micro-batches of one rank in `step`; over all ranks they hold each slot of the global batch once.

        A micro-batch is its instances and then the class images of the same offsets.
        """
        size, rest = divmod(self.global_batch, shard.world * shard.accumulation)
        assert not rest, f"{self.global_batch} slots do not divide over {shard}"
        firsts = [(micro * shard.world + shard.rank) * size for micro in range(shard.accumulation)]
        bases = [stream * self.global_batch for stream in range(len(self.streams))]
        return [[self.slot(step, base + first + i) for base in bases for i in range(size)] for first in firsts]


@lru_cache(maxsize=4)  # of each stream a step touches one epoch, at an epoch's edge two
def _shuffle(count: int, name: str, seed: int, epoch: int) -> list[int]:
    return permutation(count, name, seed, epoch).tolist()
