"""What a HinaAdaptive's states take, measured, and making them take less while training.

Sizes are sums over storages, pressure is what the allocator says: nothing here is an estimate but the scratch, which is
planned from the sizes of its tensors. Nothing waits for the device, save moving states off it.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from trainkit.optim.hina.placing import REDUCED, can_offload, offloaded, place_state
from trainkit.optim.hina.storage import scratch_limit, scratch_of

log = logging.getLogger(__name__)

GB, MB = 2**30, 2**20
INTERVAL = 50  # steps between two looks at the pressure
HIGH, EMERGENCY = 0.9, 0.97  # pressures above which adaptive_features and emergency_simplify act
SMALL_SCRATCH_MB = 64


class StateTensor(NamedTuple):
    """One state of one parameter."""

    name: str
    tensor: Tensor
    param: Tensor

    @property
    def residency(self) -> str:
        """"device" is where the parameter is, be it the CPU."""
        if self.tensor.device == self.param.device:
            return "device"
        return "host_pinned" if self.tensor.is_pinned() else "host_pageable"


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[StateTensor]:
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield StateTensor(name, value, p)


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    return next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))


def allocated_bytes(device: torch.device) -> int:
    """What the process's tensors take of an accelerator, optimizer or not; 0 on the CPU, where nothing counts it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def pressure(optimizer: torch.optim.Optimizer) -> float:
    """allocated / budget, of the device of the first parameter."""
    return allocated_bytes(device_of(optimizer)) / (optimizer.param_groups[0]["vram_budget_gb"] * GB)


def get_memory_stats(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Pressure, scratch, exact bytes of states and the allocator's own numbers."""
    device, scratch, group = device_of(optimizer), scratch_of(optimizer), optimizer.param_groups[0]
    cuda = device.type == "cuda"
    return {
        "memory_pressure": pressure(optimizer),
        "pressure_source": "torch.cuda.memory_allocated" if cuda else "none",
        "vram_budget_gb": group["vram_budget_gb"],
        "device_used": _device_used(device) if cuda else 0.0,
        "buffer_pool_stats": {
            "current_memory_mb": scratch.now / MB,
            "peak_memory_mb": scratch.peak / MB,
            "max_memory_mb": None if scratch_limit(group) is None else group["max_buffer_memory_mb"],
            "total_buffer_types": len(scratch.shapes),
        },
        "state_bytes": state_bytes(optimizer),
        "states": state_kinds(optimizer),
        "cuda_memory": _cuda_memory(device) if cuda else {},
    }


def _device_used(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def _cuda_memory(device: torch.device) -> dict[str, float]:
    return {"allocated_gb": torch.cuda.memory_allocated(device) / GB,
            "reserved_gb": torch.cuda.memory_reserved(device) / GB,
            "max_allocated_gb": torch.cuda.max_memory_allocated(device) / GB}


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Bytes of every storage that a state lies in, each counted once; by_name counts the states' own elements.

    "device" is where the parameters are, be it the CPU. torch keeps "step" on the CPU, in pageable memory.
    """
    places, by_name, counted = Counter[str](), Counter[str](), set()
    for s in state_tensors(optimizer):
        by_name[s.name] += s.tensor.numel() * s.tensor.element_size()
        storage = s.tensor.untyped_storage()
        if storage.nbytes() and (storage.device, storage.data_ptr()) not in counted:
            counted.add((storage.device, storage.data_ptr()))
            places[s.residency] += storage.nbytes()
    numel = sum(p.numel() for p in optimizer.state)
    total = sum(places.values())
    return {"device": places["device"], "host_pinned": places["host_pinned"], "host_pageable": places["host_pageable"],
            "by_name": dict(by_name), "total": total, "bytes_per_param": total / numel if numel else 0.0}


def state_kinds(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, list[str]]]:
    """name -> the residencies and dtypes its tensors have."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: {"residency": set(), "dtype": set()})
    for s in state_tensors(optimizer):
        found[s.name]["residency"].add(s.residency)
        found[s.name]["dtype"].add(str(s.tensor.dtype).removeprefix("torch."))
    return {name: {k: sorted(v) for k, v in shapes.items()} for name, shapes in found.items()}


class Action(NamedTuple):
    """What has been done, and by how many bytes the device's memory has shrunk for it."""

    what: str
    freed_bytes: int


def optimize_for_vram(optimizer: torch.optim.Optimizer, target_vram_gb: float) -> dict[str, object]:
    """Set the budget, and free what the optimizer can until the device's allocated memory fits it.

    In this order: smaller scratch; anchor, lr_mask, exp_avg and exp_avg_sq to bf16, rounded once; the same to host
    memory, one after the other. What was done stands in the param groups, so that a resumed run goes on with it.
    Raising the budget takes nothing back: see `restore_states`.

    Returns {"before", "after", "target" in bytes, "actions": [{"what", "freed_bytes"}], "achieved",
    "shortfall_bytes"}. On the CPU there is nothing to free. Raises TypeError for a target that is no number, ValueError
    for one that is not above 0 or above 1e9.
    """
    if not isinstance(target_vram_gb, Real):
        raise TypeError(f"target_vram_gb is {target_vram_gb!r}: give the gigabytes as a number, 6.0 for example")
    if not 0 < target_vram_gb <= 1e9:
        raise ValueError(f"target_vram_gb is {target_vram_gb}: give the gigabytes training may take, 6.0 for example")
    for group in optimizer.param_groups:
        group["vram_budget_gb"] = float(target_vram_gb)
    return fit(optimizer, int(target_vram_gb * GB))


def fit(optimizer: torch.optim.Optimizer, target: int) -> dict[str, object]:
    """Free until the device's memory, the next step's scratch included, is `target` bytes; see `optimize_for_vram`."""
    device = device_of(optimizer)
    before = allocated_bytes(device)
    actions: list[Action] = []
    acts: list[Callable[[torch.optim.Optimizer], Iterator[Action]]] = [
        _shrink_scratch, _reduce, *(partial(_offload, name=name) for name in REDUCED)]
    for act in acts:
        if _need(optimizer) > target:
            actions += act(optimizer)
    if actions and device.type == "cuda":
        torch.cuda.empty_cache()
    for action in actions:
        log.info("optimizer memory: %s, %.1f MB less", action.what, action.freed_bytes / MB)
    shortfall = max(0, _need(optimizer) - target)
    if shortfall:
        scratch_of(optimizer).warn_once(
            f"{target / GB:.2f} GB are out of the optimizer's reach: {shortfall / GB:.2f} GB too many are weights, "
            "activations and whatever else is on the device")
    return {"before": before, "after": allocated_bytes(device), "target": target,
            "actions": [a._asdict() for a in actions], "achieved": not shortfall, "shortfall_bytes": shortfall}


def restore_states(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bring states that `optimize_for_vram` has sent to host memory back to the device; bf16 stays bf16.

    Returns what the device's allocator counts: {"before", "after"} in bytes.
    """
    before = allocated_bytes(device_of(optimizer))
    for group in optimizer.param_groups:
        group.pop("offloaded", None)
    place_state(optimizer)
    return {"before": before, "after": allocated_bytes(device_of(optimizer))}


def watch(optimizer: torch.optim.Optimizer, step: int) -> None:
    """After step `step`: every INTERVAL steps, make room where the pressure is above what the first group asks for.

    adaptive_features keeps it below HIGH, emergency_simplify below EMERGENCY. Both may change the precision, and with
    it the numbers, when memory runs short.
    """
    group = optimizer.param_groups[0]
    limits = [at for flag, at in (("adaptive_features", HIGH), ("emergency_simplify", EMERGENCY)) if group.get(flag)]
    if limits and step % INTERVAL == 0 and pressure(optimizer) > min(limits):
        fit(optimizer, int(min(limits) * group["vram_budget_gb"] * GB))


def _need(optimizer: torch.optim.Optimizer) -> int:
    """What is allocated, and what the next step's scratch will add to it; 0 on the CPU."""
    device = device_of(optimizer)
    return allocated_bytes(device) + _scratch_need(optimizer) if can_offload(device) else 0


def _scratch_need(optimizer: torch.optim.Optimizer) -> int:
    """The largest scratch so far, or the limit where one below that has been set since."""
    largest, scratch = 0, scratch_of(optimizer)
    for limit in map(scratch_limit, optimizer.param_groups):
        if limit is None:
            return scratch.peak
        largest = max(largest, limit)
    return min(scratch.peak, max(largest, scratch.floor))


def _shrink_scratch(optimizer: torch.optim.Optimizer) -> Iterator[Action]:
    """Scratch is not allocated between steps: what this frees is what the next step will not ask for."""
    before = _scratch_need(optimizer)
    for group in optimizer.param_groups:
        group["memory_efficient"] = True
        group["max_buffer_memory_mb"] = min(group["max_buffer_memory_mb"], SMALL_SCRATCH_MB)
    if _scratch_need(optimizer) < before:
        yield Action(f"scratch of {SMALL_SCRATCH_MB} MB", before - _scratch_need(optimizer))


def _reduce(optimizer: torch.optim.Optimizer) -> Iterator[Action]:
    for group in optimizer.param_groups:
        group["reduce_precision"] = True
    yield from _move(optimizer, "exp_avg, exp_avg_sq, lr_mask and anchor in bf16")


def _offload(optimizer: torch.optim.Optimizer, *, name: str) -> Iterator[Action]:
    for group in optimizer.param_groups:
        group["offloaded"] = ",".join(n for n in REDUCED if n == name or n in offloaded(group))
    yield from _move(optimizer, f"{name} in host memory")


def _move(optimizer: torch.optim.Optimizer, what: str) -> Iterator[Action]:
    device = device_of(optimizer)
    before = allocated_bytes(device)
    place_state(optimizer)
    if allocated_bytes(device) < before:
        yield Action(what, before - allocated_bytes(device))
