"""The order is a pure function: whole epochs, the same on any number of processes and after any restart."""

from __future__ import annotations

from collections import Counter

import pytest

from trainkit.data.batch import Slot
from trainkit.data.order import Order


def global_batch(order: Order, step: int, *, world: int, accumulation: int = 1) -> list[Slot]:
    parts = [order.slots(step, rank=r, world=world, accumulation=accumulation) for r in range(world)]
    return sorted((s for micros in parts for micro in micros for s in micro), key=lambda s: s.index)


@pytest.mark.parametrize("rows, batch", [(22, 3), (5, 8), (1, 4), (7, 7), (10, 4)])
def test_every_row_is_seen_exactly_once_an_epoch(rows: int, batch: int) -> None:
    order = Order(range(rows), batch, seed=0)
    steps = -(-rows * 6 // batch)
    seen = [(s.epoch, s.row) for step in range(steps) for s in global_batch(order, step, world=1)]
    whole = [pair for pair in seen if pair[0] < 6]
    assert Counter(whole) == Counter((e, r) for e in range(6) for r in range(rows))
    assert [e for e, _ in seen] == sorted(e for e, _ in seen), "an epoch starts before the last one ended"


@pytest.mark.parametrize("world, accumulation", [(1, 4), (2, 2), (4, 1), (2, 1), (8, 1)])
def test_any_number_of_processes_sees_the_same_global_batch(world: int, accumulation: int) -> None:
    order = Order(range(22), 8, seed=3)
    for step in range(12):
        assert global_batch(order, step, world=world, accumulation=accumulation) == global_batch(order, step, world=1)
        for rank in range(world):
            micros = order.slots(step, rank=rank, world=world, accumulation=accumulation)
            assert [len(micro) for micro in micros] == [8 // world // accumulation] * accumulation


def test_epochs_and_seeds_shuffle_differently() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [s.row for s in Order(range(50), 50, seed=seed).slots(number)[0]]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0) and epoch(0, 0) != list(range(50))


def test_a_batch_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="divide"):
        Order(range(5), 6, seed=0).slots(0, world=4)
