"""What a process must know about its siblings. With one process every function here does nothing at no cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainkit.errors import Problem, UserError, refuse

T = TypeVar("T")

WRAPPERS = {  # what `accelerate launch` sets for its children, and what it stands for
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


NOT_USED = {  # of accelerate's settings: what is on, and what happens here
    "ACCELERATE_DYNAMO_BACKEND": "networks are not compiled", "ACCELERATE_USE_IPEX": "Intel's extension is not loaded",
    "ACCELERATE_DOWNCAST_BF16": "precision is that of --mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps counts",
    "ACCELERATE_ALLOW_CP_STANDALONE": "sequences are not split over processes",
}
PRECISIONS = ("no", "fp16", "bf16")


def unused_settings(environ: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each of accelerate's settings that is on and has no effect here."""
    for name, instead in NOT_USED.items():
        value = environ.get(name, "").strip()
        if value.lower() not in ("", "no", "none", "false", "0", "1" if name.endswith("_STEPS") else ""):
            yield f"accelerate's setting {name.removeprefix('ACCELERATE_').lower()} ({value}) is not used: {instead}"


def precision_problems(environ: Mapping[str, str], wanted: str | None) -> Iterator[Problem]:
    """A precision in accelerate's configuration, where --mixed_precision leaves it open, that is none of ours."""
    given = environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    if wanted is None and given not in ("", *PRECISIONS):
        yield Problem(f"mixed precision {given}: not yet", "the accelerate config", f"known: {', '.join(PRECISIONS)}",
                      "--mixed_precision bf16 --gradient_checkpointing, which saves memory too")


def refuse_wrappers(environ: Mapping[str, str]) -> None:
    """Raises UserError when the launcher was told to use what we do not: models here are whole on every process."""
    wrappers = [name for flag, name in WRAPPERS.items() if environ.get(flag, "").lower() in ("1", "true", "yes", "on")]
    refuse([Problem(
        what=f"{' and '.join(wrappers)}: not yet", where="the accelerate config",
        why="it would be silently left unused",
        fix="accelerate launch --multi_gpu for several GPUs, or answer no to it in accelerate config",
    )] if wrappers else [])


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    return rank() == 0


@contextmanager
def together() -> Iterator[None]:
    """What ranks do at once. Raises UserError(kind="sibling") when one has ended, where torch names a socket."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(Problem(
            "another process of this run has ended", f"process {rank()} of {world()}, counted from 0",
            f"{error}".partition("\n")[0], "see the message of that process", kind="sibling")) from error


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        with together():
            dist.barrier()


def from_main(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 only; every rank gets its answer."""
    if world() == 1:
        return compute()
    box: list[Any] = [compute() if is_main() else None]
    with together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(flat: Tensor) -> Tensor:
    """Sum `flat` [N] over ranks, in place."""
    if world() > 1:
        with together():
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [B,...] of all ranks whose trailing shape is mine -> (rows [G,...] in rank order, index of my first).

    No gradient passes. Every rank enters the same collectives, whatever its shape or number of rows, 0 included; the
    dtype is the same on all. At most 8 dimensions.
    """
    if world() == 1:
        return rows, 0
    shape = torch.full((8,), -1, device=rows.device)  # int64
    shape[:rows.ndim] = torch.tensor(rows.shape)
    shapes = [torch.empty_like(shape) for _ in range(world())]
    with together():
        dist.all_gather(shapes, shape)
    sizes = [[side for side in other.tolist() if side >= 0] for other in shapes]
    flat = rows.new_zeros(max(math.prod(size) for size in sizes))
    flat[:rows.numel()] = rows.detach().flatten()
    flats = [torch.empty_like(flat) for _ in sizes]
    with together():
        dist.all_gather(flats, flat)
    alike = [i for i, size in enumerate(sizes) if size[1:] == list(rows.shape[1:])]
    found = [flats[i][:math.prod(sizes[i])].view(sizes[i]) for i in alike]
    return torch.cat(found), sum(sizes[i][0] for i in alike if i < rank())
