"""What a process must know about its siblings. With one process every function here does nothing at no cost.

Tensors of a training step are summed and gathered by the backend of the device, with PyTorch's own timeout. Everything
else goes through a group of its own on the CPUs: waiting for a rank that works alone, and exchanging Python objects.
That group has the timeout WAIT, so no watchdog ends a run while rank 0 draws previews or uploads files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainkit.errors import Problem, UserError, refuse

T = TypeVar("T")
WAIT = timedelta(days=1)  # the longest that rank 0 may work alone; torch's own are 10 minutes on GPUs, 30 on CPUs
GO_ON = ("see the message of that process, if it left one; then the same command with --resume_from_checkpoint latest "
         "goes on from the newest checkpoint")
PAUSES = (0.001, 0.05)  # seconds between two looks at what is waited for: at first, at last

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


def join(environ: Mapping[str, str]) -> None:
    """Become one of several processes, where a launcher has started them. A second call does nothing.

    Raises UserError: the launcher wants DeepSpeed or the like, or each process takes itself for the only one.
    """
    refuse_wrappers(environ)
    started = int(environ.get("WORLD_SIZE", 1))
    if started == 1:
        return
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    torch.set_flush_denormal(True)  # as in `start_run`; the threads of the process group inherit it
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != started:  # torchrun without a GPU: each would train alone, all into one folder
        raise UserError(Problem(
            what=f"{started} processes were started, and each takes itself for the only one", where="WORLD_SIZE",
            why="accelerate runs several processes on CPUs only when it is told to",
            fix="ACCELERATE_USE_CPU=1 in front of the command, or one process",
        ))
    barrier()  # connect the CPUs while all ranks are here


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
            f"{error}".partition("\n")[0], GO_ON, kind="sibling")) from error


@cache
def _on_cpus(everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks again, on the CPUs and with a timeout that suits waiting."""
    return dist.new_group(backend="gloo", timeout=WAIT)


def barrier() -> None:
    """Wait until every rank is here. Signals are seen meanwhile: Python does not look at them in a wait of torch."""
    if world() == 1:
        return
    with together():
        arrival = dist.barrier(group=_on_cpus(dist.group.WORLD), async_op=True)
        pause, longest = PAUSES
        while not arrival.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, longest)
        arrival.wait()


def from_main(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 only; every rank gets its answer."""
    if world() == 1:
        return compute()
    box: list[Any] = [compute() if is_main() else None]
    barrier()
    with together():
        dist.broadcast_object_list(box, src=0, group=_on_cpus(dist.group.WORLD))
    return box[0]


def gather(mine: T) -> list[T]:
    """What every rank has, in rank order."""
    if world() == 1:
        return [mine]
    everyone: list[Any] = [None] * world()
    barrier()
    with together():
        dist.all_gather_object(everyone, mine, group=_on_cpus(dist.group.WORLD))
    return everyone


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
