"""Two gloo processes, forked from the test: cheap, since they share what the test has imported."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(work: Callable[[], object], tmp_path: Path, *, step_timeout: timedelta | None = None) -> list:
    """What `work` returns in each of two gloo processes.

    step_timeout  of the group that sums gradients; None: torch's own
    """
    def child(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2,
                                timeout=step_timeout)
        torch.save(work(), tmp_path / f"{rank}.pt")
        dist.destroy_process_group()

    children = [mp.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=60)
    hung = [process for process in children if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a process hangs"
    assert [process.exitcode for process in children] == [0, 0]
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
