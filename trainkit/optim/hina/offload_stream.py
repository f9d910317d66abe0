"""States that lie in pinned host memory, brought to the device a chunk ahead of the rules and taken back behind them.

    up      H2D of chunk c+1   runs while chunk c is computed
    main    the rules          waits for chunk c's arrival
    down    D2H of chunk c     waits for the rules on chunk c

Two slots of device memory take turns. H2D into a slot waits for the D2H out of it, and `close` has the main stream wait
for both others, so that whatever comes next on the main stream, the next step included, finds everything in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Span = tuple[int, int]


class OffloadStream:
    """The host states of one bucket.

    host       name -> a tensor for each parameter
    spans      the chunks: from which parameter to which
    read_only  names that are not taken back
    """

    def __init__(
        self, host: Mapping[str, Sequence[Tensor]], spans: Sequence[Span], device: torch.device, *,
        read_only: Collection[str],
    ):
        self.host, self.spans, self.device, self.read_only = host, spans, device, read_only
        self.module = torch.get_device_module(device)
        self.up, self.down = streams(device)
        self.main = self.module.current_stream(device)
        rows = max(hi - lo for lo, hi in spans)
        self.slots = [
            {name: torch.empty((rows, *column[0].shape), dtype=column[0].dtype, device=device)
             for name, column in host.items()} for _ in spans[:2]
        ]
        self.arrived: dict[int, torch.Event] = {}  # of each slot
        self.free: dict[int, torch.Event] = {}
        self.up.wait_stream(self.main)  # the slots' memory may still be in use there, and the last step's return
        self._load(0)

    def take(self, c: int) -> dict[str, Tensor]:
        """Chunk c on the device, name -> [n,*shape] in the dtype it is kept in; sends for the next one."""
        if c + 1 < len(self.spans):
            self._load(c + 1)
        self.main.wait_event(self.arrived[c % 2])
        return self._slot(c)

    def give(self, c: int) -> None:
        """Take chunk c back once the main stream is done with it."""
        lo, hi = self.spans[c]
        self.down.wait_event(self.main.record_event())
        with self.module.stream(self.down):
            for name, rows in self._slot(c).items():
                if name not in self.read_only:
                    scatter(self.host[name][lo:hi], rows)
            self.free[c % 2] = self.down.record_event()

    def close(self) -> None:
        """The main stream, which owns the slots' memory, goes on when nothing touches them any more."""
        self.main.wait_stream(self.up)
        self.main.wait_stream(self.down)

    def _slot(self, c: int) -> dict[str, Tensor]:
        lo, hi = self.spans[c]
        return {name: rows[:hi - lo] for name, rows in self.slots[c % 2].items()}

    def _load(self, c: int) -> None:
        lo, hi = self.spans[c]
        if c >= 2:
            self.up.wait_event(self.free[c % 2])
        with self.module.stream(self.up):
            for name, rows in self._slot(c).items():
                gather(self.host[name][lo:hi], rows)
            self.arrived[c % 2] = self.up.record_event()


@lru_cache
def streams(device: torch.device) -> tuple[torch.Stream, torch.Stream]:
    """One stream up and one down for each device."""
    module = torch.get_device_module(device)
    return module.Stream(device), module.Stream(device)


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape that lie one behind the other in one storage, as one tensor [n,*shape]; else None."""
    first = tensors[0]
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    if not size or any(t.data_ptr() != start + i * size for i, t in enumerate(tensors)):
        return None
    beyond = first.storage_offset() * first.element_size() + len(tensors) * size
    if beyond > first.untyped_storage().nbytes() or not all(t.is_contiguous() for t in tensors):
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def gather(tensors: Sequence[Tensor], rows: Tensor) -> None:
    """rows [n,*shape] <- tensors, across devices without waiting where the host's memory is pinned."""
    whole = adjacent(tensors)
    for to, of in [(rows, whole)] if whole is not None else zip(rows.unbind(), tensors, strict=True):
        to.copy_(of, non_blocking=True)


def scatter(tensors: Sequence[Tensor], rows: Tensor) -> None:
    """tensors <- rows [n,*shape], the way back."""
    whole = adjacent(tensors)
    for to, of in [(whole, rows)] if whole is not None else zip(tensors, rows.unbind(), strict=True):
        to.copy_(of, non_blocking=True)
