"""Which row fills which place of which step: endless streams of shuffled epochs, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from trainkit.data.batch import Slot
from trainkit.options.sizes import Size
from trainkit.rng import permutation

if TYPE_CHECKING:
    from trainkit.data.batch import Row

T = TypeVar("T")
N = TypeVar("N")
STREAMS = ("order", "class order")  # names of the shuffles: of instances, of class images


class SmallBatch(NamedTuple):
    """Rows of a size (h, w), whose source lets fewer of them than the run's batch into a forward pass."""

    cut: Size | None
    most: int


SizeName = Size | SmallBatch | None


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
        row = rows[self.shuffle(stream, epoch)[place]]
        return Slot((self.seed, step, index), row, epoch, self.global_batch)

    def shuffle(self, stream: int, epoch: int) -> list[int]:
        """The order in which an epoch visits a stream, as positions in it."""
        return _shuffle(len(self.streams[stream]), STREAMS[stream], self.seed, epoch)

    def slots(self, step: int, shard: Shard = WHOLE) -> list[list[Slot]]:
        """The micro-batches of one rank in `step`; over all ranks they hold each slot of the global batch once.

        A micro-batch is its instances and then the class images of the same offsets.
        """
        size, rest = divmod(self.global_batch, shard.world * shard.accumulation)
        assert not rest, f"{self.global_batch} slots do not divide over {shard}"
        firsts = [(micro * shard.world + shard.rank) * size for micro in range(shard.accumulation)]
        bases = [stream * self.global_batch for stream in range(len(self.streams))]
        return [[self.slot(step, base + first + i) for base in bases for i in range(size)] for first in firsts]

    def micro_batches(self, step: int, shard: Shard = WHOLE) -> int:
        """How many micro-batches a rank has in `step`: as many as every other rank."""
        return len(self.slots(step, shard))


class BucketOrder(Order):
    """The order of rows that are cut to several sizes: as `Order`, but a micro-batch has rows of one size.

    Every epoch visits every row once, and every step has `global_batch` instances, as in `Order`. What differs is the
    shuffle, which keeps rows of one size together, `batch_size` of them from a multiple of `batch_size` in the stream
    on, as far as there are enough; and that a step is cut into micro-batches by size, `batch_size` rows or fewer each
    (with class images twice as many). These are dealt out to the ranks in turn. A rank that gets one fewer repeats a
    row with the weight 0, so that all ranks have equally many.
    """

    def __init__(self, rows: Sequence[Row], global_batch: int, *, batch_size: int, seed: int):
        super().__init__(rows, global_batch, seed=seed)
        self.batch_size, self.cuts = batch_size, [name_of_size(row, batch_size) for row in rows]
        self.cached_shuffle = lru_cache(maxsize=4)(self.shuffle_by_size)

    def shuffle(self, stream: int, epoch: int) -> list[int]:
        return self.cached_shuffle(stream, epoch)

    def slots(self, step: int, shard: Shard = WHOLE) -> list[list[Slot]]:
        slots = [self.slot(step, index) for index in range(len(self.streams) * self.global_batch)]
        micros = [some for name, alike in named_groups(slots, [self.cuts[slot.row] for slot in slots])
                  for some in pieces(alike, self.most(name) * len(self.streams))]
        missing = -len(micros) % shard.world
        micros += [[micros[-1][0]._replace(counts=False)]] * missing
        return micros[shard.rank :: shard.world]

    def most(self, name: SizeName) -> int:
        """Rows of this size in a forward pass, class images aside."""
        return name[1] if isinstance(name, SmallBatch) else self.batch_size

    def shuffle_by_size(self, stream: int, epoch: int) -> list[int]:
        rows, size = self.streams[stream], self.batch_size
        first = min(-epoch * len(rows) % size, len(rows))  # places before the first multiple of `size` in the stream
        places = (len(rows) - first) // size  # for whole pieces

        def shuffled(items: list[T], *key: int | str) -> list[T]:
            return [items[i] for i in permutation(len(items), STREAMS[stream], self.seed, epoch, *key).tolist()]

        # Rows of one size in whole pieces; what is left of each size, and pieces that find no place, one after another.
        alike = [shuffled(some, f"{self.cuts[rows[some[0]]]}")
                 for some in grouped(range(len(rows)), [self.cuts[row] for row in rows])]
        cut = [pieces(some, size) for some in alike]
        whole = shuffled([piece for some in cut for piece in some if len(piece) == size], "whole")
        rest = [piece for some in cut for piece in some if len(piece) < size]
        loose = [place for piece in shuffled(rest + whole[places:], "rest") for place in piece]
        mixed = pieces(loose[first:], size)
        end = mixed.pop() if mixed and len(mixed[-1]) < size else []
        middle = shuffled(whole[:places] + mixed, "pieces")
        return [*loose[:first], *(place for piece in middle for place in piece), *end]


def make_order(rows: Sequence[Row], global_batch: int, *, batch_size: int, seed: int) -> Order:
    """The order of rows of one size, or of several."""
    if len({name_of_size(row, batch_size) for row in rows}) == 1:
        return Order(rows, global_batch, seed=seed)
    return BucketOrder(rows, global_batch, batch_size=batch_size, seed=seed)


def name_of_size(row: Row, batch_size: int) -> SizeName:
    """What rows have in common that are trained on together."""
    most = row.handling.batch_size if row.handling else None
    return row.cut if most is None or most >= batch_size else SmallBatch(row.cut, most)


def named_groups(items: Iterable[T], names: Iterable[N]) -> Iterable[tuple[N, list[T]]]:
    """The items of one name together, names in the order in which they come first."""
    groups: dict[N, list[T]] = {}
    for item, name in zip(items, names, strict=True):
        groups.setdefault(name, []).append(item)
    return groups.items()


def grouped(items: Iterable[T], names: Iterable[object]) -> list[list[T]]:
    """As `named_groups`, without the names."""
    return [group for _, group in named_groups(items, names)]


def pieces(items: Sequence[T], size: int) -> list[list[T]]:
    """Of `size` items each; the last may have fewer."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


@lru_cache(maxsize=4)  # of each stream a step touches one epoch, at an epoch's edge two
def _shuffle(count: int, name: str, seed: int, epoch: int) -> list[int]:
    return permutation(count, name, seed, epoch).tolist()
