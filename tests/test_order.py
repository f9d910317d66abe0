"""The order is a pure function: whole epochs, the same on any number of processes and after any restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from trainkit.data.batch import Slot
from trainkit.data.sampler import Order, Shard


def rows_of(instances: int, classes: int = 0) -> list[SimpleNamespace]:
    """Rows as far as the order reads them."""
    return [SimpleNamespace(is_class=i >= instances) for i in range(instances + classes)]


def index_of(slot: Slot) -> int:
    """Its place in the global batch."""
    _, _, index = slot.key
    return index


def row_of(slot: Slot) -> int:
    return slot.row


def visits(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """(epoch, row) of each slot."""
    return [(slot.visit, slot.row) for slot in slots]


def global_batch(order: Order, step: int, *, world: int, accumulation: int = 1) -> list[Slot]:
    parts = [order.slots(step, Shard(rank, world, accumulation)) for rank in range(world)]
    return sorted((s for micros in parts for micro in micros for s in micro), key=index_of)


@pytest.mark.parametrize("rows, batch", [(22, 3), (5, 8), (1, 4), (7, 7), (10, 4)])
def test_every_row_is_seen_exactly_once_an_epoch(rows: int, batch: int) -> None:
    order = Order(rows_of(rows), batch, seed=0)
    steps = -(-rows * 6 // batch)
    seen = [visit for step in range(steps) for visit in visits(global_batch(order, step, world=1))]
    whole = [pair for pair in seen if pair[0] < 6]
    assert Counter(whole) == Counter((e, r) for e in range(6) for r in range(rows))
    assert [e for e, _ in seen] == sorted(e for e, _ in seen), "an epoch starts before the last one ended"


@pytest.mark.parametrize("world, accumulation", [(1, 4), (2, 2), (4, 1), (2, 1), (8, 1)])
def test_any_number_of_processes_sees_the_same_global_batch(world: int, accumulation: int) -> None:
    order = Order(rows_of(22), 8, seed=3)
    for step in range(12):
        assert global_batch(order, step, world=world, accumulation=accumulation) == global_batch(order, step, world=1)
        for rank in range(world):
            micros = order.slots(step, Shard(rank, world, accumulation))
            assert [len(micro) for micro in micros] == [8 // world // accumulation] * accumulation


def test_epochs_and_seeds_shuffle_differently() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [row_of(s) for s in Order(rows_of(50), 50, seed=seed).slots(number)[0]]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0) and epoch(0, 0) != list(range(50))


def test_a_batch_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="divide"):
        Order(rows_of(5), 6, seed=0).slots(0, Shard(world=4))


# ------------------------------------------------------------------------------------------------------- class images


def test_shuffles_of_instances_are_what_they_have_always_been() -> None:
    """A change here changes every run that can be resumed."""
    order = Order(rows_of(7), 3, seed=5)
    seen = [row_of(s) for step in range(5) for s in order.slots(step)[0]]
    assert seen == [1, 5, 2, 0, 3, 6, 4, 2, 1, 6, 5, 4, 0, 3, 0]


def test_class_images_leave_the_slots_of_the_instances_as_they_are() -> None:
    off, on = Order(rows_of(22), 4, seed=3), Order(rows_of(22, classes=10), 4, seed=3)
    for step in range(30):
        for one, other in zip(*(order.slots(step, Shard(accumulation=2)) for order in (off, on)), strict=True):
            assert other[:2] == one and [index_of(s) for s in other[2:]] == [index_of(s) + 4 for s in one]
            assert {slot.num_instance for slot in other} == {4}
    assert on.steps_per_epoch == off.steps_per_epoch == 6, "epochs are the instances'"


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("world, accumulation", [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)])
def test_every_slot_knows_how_many_instances_its_whole_step_has(classes: int, world: int, accumulation: int) -> None:
    """Over all ranks and micro-batches; class images do not count."""
    order = Order(rows_of(22, classes), 8, seed=3)
    for step in range(4):
        slots = global_batch(order, step, world=world, accumulation=accumulation)
        assert len(slots) == (16 if classes else 8)
        counted = sum(row_of(s) < 22 for s in slots)
        assert [slot.num_instance for slot in slots] == [counted] * len(slots) and counted == 8


def test_a_ranks_slots_draw_by_their_places_in_the_global_batch() -> None:
    order = Order(rows_of(22, classes=10), 4, seed=3)
    micros = order.slots(7, Shard(1, 2, 2))
    assert [[key for key, *_ in micro] for micro in micros] == [[(3, 7, 1), (3, 7, 5)], [(3, 7, 3), (3, 7, 7)]]
    assert order.slot(7, 5) == micros[0][1]


@pytest.mark.parametrize("classes, batch", [(10, 4), (3, 5), (40, 2)])
def test_every_class_image_is_seen_exactly_once_an_epoch_of_its_own(classes: int, batch: int) -> None:
    order = Order(rows_of(6, classes), batch, seed=1)
    seen = [visit for step in range(-(-classes * 4 // batch)) for visit in visits(order.slots(step)[0][batch:])]
    assert Counter(p for p in seen if p[0] < 4) == Counter((e, 6 + r) for e in range(4) for r in range(classes))


def test_class_images_are_shuffled_on_their_own() -> None:
    order = Order(rows_of(30, classes=30), 30, seed=0)
    slots = order.slots(0)[0]
    assert [row_of(s) for s in slots[:30]] != [row_of(s) - 30 for s in slots[30:]]


@pytest.mark.parametrize("world, accumulation", [(1, 4), (2, 2), (4, 1), (2, 1), (8, 1)])
def test_any_number_of_processes_sees_the_same_class_images(world: int, accumulation: int) -> None:
    order = Order(rows_of(22, classes=9), 8, seed=3)
    for step in range(12):
        whole = global_batch(order, step, world=1)
        assert [index_of(s) for s in whole] == list(range(16))
        assert global_batch(order, step, world=world, accumulation=accumulation) == whole
        for micro in order.slots(step, Shard(world - 1, world, accumulation)):
            half = 8 // world // accumulation
            assert [row_of(s) >= 22 for s in micro] == [False] * half + [True] * half


def test_class_images_alone_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="instances"):
        Order(rows_of(0, classes=3), 2, seed=0)


def test_a_slot_draws_by_seed_step_and_place() -> None:
    order = Order(rows_of(7, classes=2), 3, seed=5)
    assert [key for key, *_ in order.slots(4)[0]] == [(5, 4, index) for index in range(6)]
