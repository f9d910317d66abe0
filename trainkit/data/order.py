"""Which row fills which place of which step: an endless stream of shuffled epochs, as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sized
from functools import lru_cache

from trainkit.data.batch import Slot
from trainkit.rng import permutation


class Order:
    """Epoch after epoch, each a fresh shuffle of all rows, cut into global batches without a ragged end.

        slot i of step s: place p = s · global_batch + i of the stream, epoch p // rows, row shuffle[epoch][p % rows]

    Nothing is remembered, so a resumed run and a run on more processes see the same rows in the same steps.
    """

    def __init__(self, rows: Sized, global_batch: int, *, seed: int):
        assert len(rows) > 0 and global_batch > 0, "an order needs rows and a batch"
        self.count, self.global_batch, self.seed = len(rows), global_batch, seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row has come at least once."""
        return math.ceil(self.count / self.global_batch)

    def num_instance(self, step: int) -> int:
        """Instance rows in the whole of `step`, the loss divisor: every row is one."""
        return self.global_batch

    def slot(self, step: int, index: int) -> Slot:
        epoch, place = divmod(step * self.global_batch + index, self.count)
        return Slot(step=step, index=index, row=_shuffle(self.count, self.seed, epoch)[place], epoch=epoch)

    def slots(self, step: int, *, rank: int = 0, world: int = 1, accumulation: int = 1) -> list[list[Slot]]:
        """The micro-batches of this rank in `step`; over all ranks they hold each slot of the global batch once."""
        share, rest = divmod(self.global_batch, world * accumulation)
        assert not rest, f"{self.global_batch} slots do not divide by {world} ranks x {accumulation} micro-batches"
        firsts = [(micro * world + rank) * share for micro in range(accumulation)]
        return [[self.slot(step, first + i) for i in range(share)] for first in firsts]


@lru_cache(maxsize=4)  # a step touches one epoch, at an epoch's edge two
def _shuffle(count: int, seed: int, epoch: int) -> list[int]:
    return permutation(count, "order", seed, epoch).tolist()
