"""Between the rules, which see fp32 tensors of whole buckets, and the states as they are kept.

A bucket is the parameters of one group that share shape, dtype, device and step count. `stream` hands them out in
chunks, stacked in fp32, and writes back what the rules made of them:

    for chunk in stream(optimizer.state, group, params, names=("exp_avg",), step=t):
        chunk.state["exp_avg"].lerp_(chunk.g, 0.1)      # in place
        chunk.w.sub_(chunk.state["exp_avg"], alpha=lr)  # in place

Dtypes and devices are handled here and nowhere else: placing.py says what a state is kept as, offload_stream.py brings
states from host memory, rounding.py writes bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trainkit.optim.hina.offload_stream import OffloadStream, Span, adjacent
from trainkit.optim.hina.placing import (
    MASTER,
    Initial,
    State,
    can_offload,
    compute_dtype,
    offloaded,
    place,
    rounder_of,
)
from trainkit.optim.hina.rounding import Rounder, join, split
from trainkit.optim.hina.settings import Group

log = logging.getLogger(__name__)

OFFLOADED_CHUNKS = 4  # chunks of a bucket whose states come from host memory, at least
PARAM = "param"  # what the noise of the weights themselves is called
CACHE_ELEMENTS = 1 << 17  # of a chunk on the CPU: smaller ones are mostly calls, larger ones leave the cache


@dataclass
class Chunk:
    """Some tensors of a bucket, stacked. Its tensors are used again for the next chunk: keep none.

    w      [n,*shape] fp32, the weights, a copy: update in place
    g      [n,*shape] fp32, the gradient, a copy: may be overwritten
    state  name -> fp32 [n,*shape], for a scalar per tensor [n]: update in place
    step   t of this update, from 1
    """

    params: list[Tensor]
    group: Group
    step: int
    w: Tensor
    g: Tensor
    state: dict[str, Tensor]


@dataclass
class Scratch:
    """What the chunks of an optimizer take besides its states, in bytes, as planned from their sizes."""

    now: int = 0
    peak: int = 0
    floor: int = 0  # what the largest single tensor takes, below which no limit brings it
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # shapes of chunks so far
    said: set[str] = field(default_factory=set)  # warnings given

    @contextmanager
    def taking(self, row: int, shape: tuple[int, ...], *, fixed: int = 0) -> Iterator[None]:
        """While chunks of that shape are laid out: `row` bytes for each of its tensors, and `fixed` ones."""
        self.now, self.floor = shape[0] * row + fixed, max(self.floor, row + fixed)
        self.peak = max(self.peak, self.now)
        self.shapes.add(shape)
        try:
            yield
        finally:
            self.now = 0

    def warn_once(self, sentence: str) -> None:
        if sentence not in self.said:
            self.said.add(sentence)
            log.warning(sentence)


class StoredStates(NamedTuple):
    """Rows lo..hi of a bucket and their states on the device, in the dtype they are kept in: name -> [n,*shape]."""

    span: Span
    rows: dict[str, Tensor]


def scratch_of(optimizer: torch.optim.Optimizer) -> Scratch:
    """The optimizer's own record; a copy of the optimizer starts a new one."""
    return optimizer.__dict__.setdefault("scratch", Scratch())


def scratch_limit(group: Group) -> int | None:
    """Bytes; None: no limit, where the group is not memory_efficient and all its states are where they are used."""
    limited = group.get("memory_efficient") or offloaded(group)
    return int(group["max_buffer_memory_mb"] * 2**20) if limited else None


def states_on_device(
    optimizer_state: State, group: Group, params: Sequence[Tensor], *, names: Sequence[str], step: int,
    scratch_bytes: int | None = None, scratch: Scratch | None = None,
) -> Iterator[tuple[list[Tensor], dict[str, list[Tensor]]]]:
    """A bucket's states on its device as they are kept, for a kernel that takes lists of tensors: (parameters, states).

    What lies in host memory comes and goes chunk by chunk; what lies on the device is handed out itself.
    """
    place(optimizer_state, group, params, names=names, step=step)
    layout = BucketLayout(optimizer_state, group, params, names=tuple(names), step=step)
    rows = layout.rows(scratch_bytes, layout.slot_bytes()) if layout.slot_bytes() else len(params)
    with (scratch or Scratch()).taking(layout.slot_bytes(), (rows, *layout.shape)):
        for stored in stored_states(optimizer_state, params, names=names, spans=cut(len(params), rows)):
            lo, hi = stored.span
            yield list(params[lo:hi]), {name: list(t.unbind()) for name, t in stored.rows.items()}


def stream(
    optimizer_state: State, group: Group, params: Sequence[Tensor], *, names: Sequence[str],
    scalars: Sequence[str] = (), step: int, scratch_bytes: int | None = None, temporaries: int = 4,
    initial: Initial | None = None, read_only: Collection[str] = (), scratch: Scratch | None = None,
) -> Iterator[Chunk]:
    """Chunks of a bucket, in order; inside torch.no_grad().

    params         have gradients and share shape, dtype, device and step
    names          states of the parameter's shape; scalars: one fp32 number for each tensor
    scratch_bytes  what a chunk and the rules' temporaries may take, if a single tensor does; None: no limit
    temporaries    how many tensors of the chunk's size the rules keep alive at once
    initial        a new state's value, or what makes it of the stacked weights; 0 where it is not named
    read_only      states that are not written back
    scratch        where to note what is taken
    """
    scratch = scratch or Scratch()
    if group.get("cpu_offload_states") and not can_offload(params[0].device):
        scratch.warn_once("cpu_offload_states has nothing to do: parameters and optimizer states are in main memory")
    names = (*names, MASTER) if has_master(group, params[0]) else tuple(names)
    place(optimizer_state, group, params, names=names, scalars=scalars, step=step, initial=initial)
    layout = BucketLayout(optimizer_state, group, params, names=(*names, *scalars), step=step)
    row_bytes = layout.row_bytes(temporaries)
    rows = layout.rows(scratch_bytes, row_bytes)
    with scratch.taking(row_bytes, (rows, *layout.shape), fixed=layout.table_bytes()):
        spans = cut(len(params), rows)
        for stored in stored_states(optimizer_state, params, names=layout.kept, spans=spans, read_only=read_only):
            chunk = layout.lay_out(stored)
            given = dict(chunk.state)
            yield chunk
            assert all(chunk.state[n] is t for n, t in given.items()), "a rule replaced a state: update it in place"
            layout.write_back(stored, chunk, read_only)


def stored_states(state: State, params: Sequence[Tensor], *, names: Collection[str], spans: Sequence[Span],
                  read_only: Collection[str] = ()) -> Iterator[StoredStates]:
    """States chunk by chunk, to be changed in place: views where that can be, else copies, which are taken back."""
    device = params[0].device
    columns = {name: [state[p][name] for p in params] for name in names}
    here = {name: column for name, column in columns.items() if column[0].device == device}
    away = {name: column for name, column in columns.items() if name not in here}
    offload = OffloadStream(away, spans, device, read_only=read_only) if away else None
    arenas = {name: adjacent(column) for name, column in here.items()}
    try:
        for c, (lo, hi) in enumerate(spans):
            views = {n: adjacent(here[n][lo:hi]) if arena is None else arena[lo:hi] for n, arena in arenas.items()}
            rows = {name: torch.stack(here[name][lo:hi]) if v is None else v for name, v in views.items()}
            yield StoredStates((lo, hi), rows | (offload.take(c) if offload else {}))
            for name in (n for n, v in views.items() if v is None and n not in read_only):
                torch._foreach_copy_(here[name][lo:hi], list(rows[name].unbind()))
            if offload:
                offload.give(c)
    finally:
        if offload:
            offload.close()


def cut(count: int, rows: int) -> list[Span]:
    return [(lo, min(lo + rows, count)) for lo in range(0, count, rows)]


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Of parameters that all have one."""
    return [grad for p in params if (grad := p.grad) is not None]


def has_master(group: Group, p: Tensor) -> bool:
    return p.dtype == torch.bfloat16 and bool(group.get("master_weights"))


class BucketLayout:
    """Where the chunks of one bucket are laid out in fp32, on memory that all of them share."""

    def __init__(self, state: State, group: Group, params: Sequence[Tensor], *, names: Sequence[str], step: int):
        first = params[0]
        self.group, self.params, self.step, self.master = group, params, step, has_master(group, first)
        self.dtype, self.device, self.shape = compute_dtype(first), first.device, first.shape
        self.kept = {name: state[first][name] for name in names}  # one of each, for its dtype and place
        rounded = self.kept if self.master else self.kept | {PARAM: first}
        self.rounds = [name for name, t in rounded.items() if t.dtype == torch.bfloat16]
        self.rounder: Rounder | None = None
        if self.rounds:
            self.rounder = rounder_of(group, params, names=self.rounds, device=self.device, step=step)
        self.buffers: dict[str, Tensor] = {}

    def slot_bytes(self) -> int:
        """What the offload stream's two slots take for one tensor of the bucket."""
        return sum(2 * t.numel() * t.element_size() for t in self.kept.values() if t.device != self.device)

    def row_bytes(self, temporaries: int) -> int:
        """What one tensor of the bucket takes, at most: w, g, copies of states, slots, and what is in work.

        In work are the rules' temporaries or, after them, those of the rounding (5 at most, in rounding.split).
        """
        numel = self.params[0].numel()
        copies = sum(t.numel() for t in self.kept.values() if t.dtype != self.dtype)
        temporary = max(temporaries, 5 if self.rounds or self.master else 0)
        noise = 4 * numel if self.rounds else 0
        return self.dtype.itemsize * ((2 + temporary) * numel + copies) + noise + self.slot_bytes()

    def rows(self, scratch_bytes: int | None, row_bytes: int) -> int:
        """As many tensors at once as the limit allows, on the CPU no more than its cache likes; one at least.

        A bucket with states to fetch is cut in OFFLOADED_CHUNKS, so that copies can run beside the rules.
        """
        count = rows = len(self.params)
        if scratch_bytes is not None:
            rows = min(rows, (scratch_bytes - self.table_bytes()) // max(1, row_bytes))
        if self.device.type == "cpu":
            rows = min(rows, CACHE_ELEMENTS // max(1, self.params[0].numel()))
        if self.slot_bytes():
            rows = min(rows, -(-count // OFFLOADED_CHUNKS))
        return max(1, rows)

    def table_bytes(self) -> int:
        """What the rounding keeps for the whole bucket."""
        return 4 * self.params[0].numel() if self.rounds else 0

    def lay_out(self, stored: StoredStates) -> Chunk:
        lo, hi = stored.span
        part = list(self.params[lo:hi])
        state = {n: t if t.dtype == self.dtype else self._copy(n, t) for n, t in stored.rows.items() if n != MASTER}
        w = join(torch.stack(part), stored.rows[MASTER]) if self.master else self._stack("w", part)
        return Chunk(part, self.group, self.step, w, self._stack("g", gradients(part)), state)

    def write_back(self, stored: StoredStates, chunk: Chunk, read_only: Collection[str]) -> None:
        """Write the chunk back into the stored states and into the parameters."""
        lo, _ = stored.span
        for name, rows in chunk.state.items():
            if rows is not stored.rows[name] and name not in read_only:
                self._round(stored.rows[name], rows, name, lo)
        w = chunk.w
        if self.master:
            w, rest = split(w)
            stored.rows[MASTER].copy_(rest)
        elif self.params[0].dtype == torch.bfloat16:
            w = torch.empty_like(w, dtype=torch.bfloat16)
            self._round(w, chunk.w, PARAM, lo)
        torch._foreach_copy_(chunk.params, list(w.unbind()))

    def _round(self, target: Tensor, x: Tensor, name: str, lo: int) -> None:
        assert self.rounder is not None, f"{name} is none of those to be rounded"
        self.rounder.round_(target, x, name, lo)

    def _stack(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].dtype != self.dtype:
            return self._copy(name, torch.stack(tensors))
        return torch.stack(tensors, out=self._buffer(name, (len(tensors), *self.shape)))

    def _copy(self, name: str, rows: Tensor) -> Tensor:
        return self._buffer(name, rows.shape).copy_(rows)

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory of that shape: the first chunk's, which is the largest, serves all that follow."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.buffers[name][:shape[0]]
