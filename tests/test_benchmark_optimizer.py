"""The optimizer benchmark measures what it says: SDXL's pairs, kinds that all run, bytes that are there."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.benchmark.frequency import Traffic
from experiments.benchmark.optimizer import KINDS, PAIRS, bytes_per_number, optimizers, sizes, updates


def pairs() -> list[torch.Tensor]:
    """Factors of rank 4 of layers 32 -> 32 and 48 -> 32: B's of one shape whose A's differ, as in cross-attention."""
    made = [x for wide in (32, 48, 32, 48) for x in (torch.randn(4, wide), torch.randn(32, 4))]
    params = [torch.nn.Parameter(x) for x in made]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_there_are_enough_layers_and_they_are_those_of_sdxl_attention() -> None:
    found = list(islice(sizes(), PAIRS))
    assert len(found) == PAIRS and {side for pair in found for side in pair} == {640, 1280, 2048}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_updates_all_weights_to_finite_numbers(kind: str) -> None:
    params = pairs()
    before = [p.detach().clone() for p in params]
    updates(optimizers(params, [kind])[kind])()
    assert all(p.isfinite().all() and not p.equal(old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("kind, bytes_of_elements", [
    ("AdamW(foreach=True)", 8), ("plain, reduce_precision", 4), ("use_lr_mask", 12),
])
def test_bytes_for_each_number_are_those_of_its_states_and_the_step_counts(kind: str, bytes_of_elements: int) -> None:
    params = pairs()
    optimizer = optimizers(params, [kind] if kind in KINDS else ["use_agr"])[kind]
    updates(optimizer)()
    steps = 4 * len(params) / sum(p.numel() for p in params)
    assert bytes_per_number(optimizer) == pytest.approx(bytes_of_elements + steps)


def test_traffic_counts_operations_that_compute_and_what_they_touch() -> None:
    x = torch.ones(10)
    with Traffic() as traffic:
        x.view(2, 5).add_(1)
    assert (traffic.operations, traffic.bytes) == (1, 80)
