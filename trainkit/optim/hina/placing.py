"""In which dtype and where each state of a parameter is kept, and getting it there.

States of one name and bucket are rows of one tensor (an arena), so that a bucket's states are one view. What a state is
kept as follows from its group's plain values alone:

    reduce_precision      the states in REDUCED are bf16, rounded stochastically
    cpu_offload_states    the states in REDUCED lie in pinned host memory (CUDA only)
    offloaded             "anchor,lr_mask": these alone do; what `optimize_for_vram` writes
    master_weights        bf16 parameters have the other half of an fp32 number in "master_low"; else they are rounded
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from trainkit.devices import synchronize
from trainkit.optim.hina.offload_stream import adjacent
from trainkit.optim.hina.rounding import Rounder
from trainkit.optim.hina.settings import Group

log = logging.getLogger(__name__)

State = MutableMapping[Tensor, dict[str, Tensor]]
Initial = Mapping[str, float | Callable[[Tensor], Tensor]]

REDUCED = ("anchor", "lr_mask", "exp_avg", "exp_avg_sq")  # in the order in which they leave the device
MASTER = "master_low"


def offloaded(group: Group) -> tuple[str, ...]:
    """Names of the states that the group wants in host memory."""
    if "offloaded" in group:
        return tuple(filter(None, group["offloaded"].split(",")))
    return REDUCED if group.get("cpu_offload_states") else ()


def can_offload(device: torch.device) -> bool:
    return device.type == "cuda"


def is_offloaded(group: Group, device: torch.device) -> bool:
    """Whether some state of the group's parameters on `device` is kept elsewhere."""
    return can_offload(device) and bool(offloaded(group))


def compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def kept_as(group: Group, p: Tensor, name: str) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of state `name` of `p`."""
    host = is_offloaded(group, p.device) and name in offloaded(group)
    reduced = bool(group.get("reduce_precision")) and name in REDUCED
    dtype = torch.int16 if name == MASTER else torch.bfloat16 if reduced else compute_dtype(p)
    return dtype, torch.device("cpu") if host else p.device


def new_arena(n: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, pinned: bool) -> Tensor:
    """Zeros [n,*shape]; pinned host memory where that can be had, else pageable, which is said once."""
    arena = torch.zeros((n, *shape), dtype=dtype, device=device)
    if not pinned:
        return arena
    try:
        return arena.pin_memory()
    except RuntimeError as error:
        say_unpinned(str(error).partition("\n")[0])
        return arena


@lru_cache
def say_unpinned(why: str) -> None:
    log.warning("optimizer states lie in pageable host memory, and a step waits for their copies: %s", why)


def place(state: State, group: Group, params: Sequence[Tensor], *, names: Sequence[str], scalars: Sequence[str] = (),
          step: int = 0, initial: Initial | None = None) -> None:
    """See that every parameter has every state, in the dtype and on the device that its group says.

    New states are rows of one arena for each name; so are those that had to change.
    """
    for name in (*names, *scalars):
        missing = [p for p in params if name not in state[p]]
        if missing:
            start = (initial or {}).get(name, 0.0)
            _create(state, group, missing, name, scalar=name in scalars, step=step, start=start)
        dtype, device = kept_as(group, params[0], name)
        wrong = [p for p in params if state[p][name].dtype != dtype or state[p][name].device != device]
        if wrong:
            rehome(state, group, wrong, name, step=step)


def _create(state: State, group: Group, params: Sequence[Tensor], name: str, *, scalar: bool, step: int,
            start: float | Callable[[Tensor], Tensor]) -> None:
    shape = () if scalar else params[0].shape
    dtype, device = kept_as(group, params[0], name)
    arena = new_arena(len(params), shape, dtype, device, pinned=device != params[0].device)
    for p, row in zip(params, arena.unbind(), strict=True):
        state[p][name] = row
        if callable(start):
            _write(row, start(p.detach().to(compute_dtype(p))[None])[0], group, p, name=name, step=step)
        elif start:
            _write(row, torch.full_like(row, start, dtype=compute_dtype(p)), group, p, name=name, step=step)


def rehome(state: State, group: Group, params: Sequence[Tensor], name: str, *, step: int) -> None:
    """Move state `name` of parameters of one bucket into a new arena of the group's dtype and device."""
    old = [state[p][name] for p in params]
    if any(t.device != params[0].device for t in old):
        synchronize(params[0].device)
    dtype, device = kept_as(group, params[0], name)
    arena = new_arena(len(old), old[0].shape, dtype, device, pinned=device != params[0].device)
    for p, of, row in zip(params, old, arena.unbind(), strict=True):
        state[p][name] = row
        _write(row, of, group, p, name=name, step=step)


def _write(row: Tensor, value: Tensor, group: Group, p: Tensor, *, name: str, step: int) -> None:
    """row <- value, rounded stochastically where that loses bits."""
    if row.dtype == torch.bfloat16 and value.dtype != torch.bfloat16:
        narrow = torch.empty((1, *row.shape), dtype=row.dtype, device=value.device)
        name = f"{name}/placed"
        rounder = rounder_of(group, [p], names=[name], device=value.device, step=step)
        rounder.round_(narrow, value.float().contiguous()[None], name)
        value = narrow[0]
    row.copy_(value)


def rounder_of(group: Group, params: Sequence[Tensor], *, names: Sequence[str], device: torch.device,
               step: int) -> Rounder:
    """The noise of some of the group's parameters, which share a size."""
    index = {id(p): i for i, p in enumerate(group["params"])}
    return Rounder([index[id(p)] for p in params], params[0].numel(), device, names=names,
                   seed=int(group.get("seed", 0)), step=step)


def arrived(optimizer: torch.optim.Optimizer) -> None:
    """Wait for every state that is on its way into host memory; before the CPU reads any."""
    for group in optimizer.param_groups:
        for device in {p.device for p in group["params"] if is_offloaded(group, p.device)}:
            synchronize(device)


def place_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring every state into arenas of the dtype, device and memory that its group says; no-op where it is so."""
    for group in optimizer.param_groups:
        for (name, *_), params in buckets(optimizer.state, group).items():
            if not _is_placed(group, params[0], name, [optimizer.state[p][name] for p in params]):
                step = int(optimizer.state[params[0]].get("step", 0))
                rehome(optimizer.state, group, params, name, step=step)


def _is_placed(group: Group, p: Tensor, name: str, rows: Sequence[Tensor]) -> bool:
    dtype, device = kept_as(group, p, name)
    if any(t.dtype != dtype or t.device != device for t in rows) or (p.numel() and adjacent(rows) is None):
        return False
    return device == p.device or rows[0].is_pinned()


def buckets(state: State, group: Group) -> dict[tuple, list[Tensor]]:
    """(name, the state's shape, the parameter's shape, dtype, device) -> the parameters with such a state, in order."""
    found = defaultdict(list)
    for p in group["params"]:
        for name, value in state.get(p, {}).items():
            if isinstance(value, Tensor) and name != "step":
                found[name, value.shape, p.shape, p.dtype, p.device].append(p)
    return found


def restore(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> None:
    """After Optimizer.load_state_dict, which casts states to their parameter's dtype: the saved bits again, in place.

    Takes copies, so that the dict and the optimizer share no memory. "step" stays where the base class has put it.
    """
    arrived(optimizer)  # the dict may be of states that are still under way
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                value = optimizer.state[p]["step"] if name == "step" else value
                optimizer.state[p][name] = value.detach().clone()
    place_state(optimizer)
