"""What a process must know about its siblings. With one process every function here does nothing at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()


def from_main(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 only; every rank gets its answer."""
    if world() == 1:
        return compute()
    box = [compute() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(flat: Tensor) -> Tensor:
    """Sum `flat` [N] over ranks, in place."""
    if world() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat
