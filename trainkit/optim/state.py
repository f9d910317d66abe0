"""Optimizer state as named tensors and plain JSON: no pickle, exact to the last bit.

    tensors   "state.<i>.<key>"   tensor `key` of the i-th parameter, in the order of the groups
    data      {"params": [{"shape", "tensors", "values"}, ...],  "groups": [{key: value}, ...]}

Of a group's values only those that have moved since the optimizer was made are state (Prodigy's d, k, ...). Those that
stand still are hyper-parameters: they come from the options again, so a resumed run obeys its command line. The
learning rate is neither: it is a function of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError

Plain = bool | int | float | str | None
NOT_STATE = {"params", "lr"}


def parameters(inner: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter, in the order that gives it its number."""
    return [p for group in inner.param_groups for p in group["params"]]


def group_values(inner: torch.optim.Optimizer) -> list[dict[str, object]]:
    """What each group holds besides its parameters and its rate."""
    return [{k: v for k, v in group.items() if k not in NOT_STATE} for group in inner.param_groups]


def pack_state(inner: torch.optim.Optimizer, made: Sequence[dict[str, object]]) -> tuple[dict[str, Tensor], dict]:
    """Copy the state out of an optimizer whose `group_values` were `made` at construction -> (tensors, data)."""
    tensors: dict[str, Tensor] = {}
    params = []
    for i, p in enumerate(parameters(inner)):
        state = inner.state.get(p, {})
        own = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        tensors |= {f"state.{i}.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in own.items()}
        values = {k: _plain(v) for k, v in state.items() if k not in own}
        params.append({"shape": list(p.shape), "tensors": sorted(own), "values": values})
    groups = [
        {k: _plain(v) for k, v in now.items() if k not in then or v != then[k]}
        for now, then in zip(group_values(inner), made, strict=True)
    ]
    return tensors, {"params": params, "groups": groups}


def unpack_state(inner: torch.optim.Optimizer, tensors: dict[str, Tensor], data: dict) -> None:
    """Put packed state into a freshly made optimizer; UserError when it was packed from other parameters."""
    _refuse_misfit(inner, tensors, data)
    whole = inner.state_dict()
    whole["param_groups"] = [g | moved for g, moved in zip(whole["param_groups"], data["groups"], strict=True)]
    whole["state"] = {
        i: {k: tensors[f"state.{i}.{k}"].clone() for k in packed["tensors"]} | packed["values"]
        for i, packed in enumerate(data["params"]) if packed["tensors"] or packed["values"]
    }
    inner.load_state_dict(whole)  # moves each tensor to where its optimizer wants it


def _plain(value: object) -> Plain:
    assert isinstance(value, Plain), f"optimizer state of type {type(value).__name__} has no exact JSON form"
    return value


def _refuse_misfit(inner: torch.optim.Optimizer, tensors: dict[str, Tensor], data: dict) -> None:
    saved, present = [tuple(p["shape"]) for p in data["params"]], [tuple(p.shape) for p in parameters(inner)]
    expected = {f"state.{i}.{k}" for i, p in enumerate(data["params"]) for k in p["tensors"]}
    if saved != present or len(data["groups"]) != len(inner.param_groups):
        why = _difference(saved, present)
    elif expected != tensors.keys():
        why = f"tensors missing or unknown: {', '.join(sorted(expected ^ tensors.keys())[:3])}"
    else:
        return
    raise UserError(Problem(
        "the checkpoint's optimizer state does not fit this run", "--resume_from_checkpoint", why,
        "resume with the model, --rank and LoRA targets of that run, or start afresh in a new --output_dir"))


def _difference(saved: list[tuple[int, ...]], present: list[tuple[int, ...]]) -> str:
    if len(saved) != len(present):
        return f"it holds {len(saved)} tensors, this run trains {len(present)}"
    odd = [f"{s} there, {p} here" for s, p in zip(saved, present, strict=True) if s != p]
    return f"{len(odd)} tensors differ in shape, first {odd[0]}" if odd else "the parameter groups differ"
