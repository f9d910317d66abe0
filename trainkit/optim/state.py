"""Optimizer state as named tensors and plain JSON: no pickle, exact to the last bit. For optimizers of one group.

    tensors   "state.<i>.<key>"   tensor `key` of the i-th parameter;   "group.<key>"   of the group
    data      {"params": [{"shape", "tensors", "values"}, ...],  "group": {key: value}}

Of the group's values only those that have moved since the optimizer was made are state (Prodigy's d, k, ...), and those
that its class names in GROUP_STATE. Others that stand still are hyper-parameters: they come from the options again, so
a resumed run obeys its command line. The learning rate is neither: it is a function of the step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainkit.devices import synchronize
from trainkit.errors import Problem, UserError

Plain = bool | int | float | str | None
NOT_STATE = {"params", "lr"}


def group_values(inner: torch.optim.Optimizer) -> dict[str, object]:
    """What the group holds besides its parameters and its rate."""
    values = {k: v for k, v in inner.param_groups[0].items() if k not in NOT_STATE}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}


def pack_state(inner: torch.optim.Optimizer, initial_values: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    """Copy the state out of an optimizer whose `group_values` were `initial_values` at construction -> (tensors, data).

    Raises TypeError for state that has no exact form in tensors and JSON.
    """
    synchronize(inner.param_groups[0]["params"][0].device)  # state that is kept in host memory may be on its way there
    tensors: dict[str, Tensor] = {}
    params = []
    for i, p in enumerate(inner.param_groups[0]["params"]):
        state_tensors, values = _split(inner.state.get(p, {}))
        tensors |= {f"state.{i}.{k}": t for k, t in state_tensors.items()}
        params.append({"shape": list(p.shape), "tensors": sorted(state_tensors), "values": values})
    always = getattr(inner, "GROUP_STATE", ())
    state_tensors, values = _split({
        k: v for k, v in group_values(inner).items()
        if k in always or k not in initial_values or _differs(v, initial_values[k])})
    tensors |= {f"group.{k}": t for k, t in state_tensors.items()}
    return tensors, {"params": params, "group": values}


def unpack_state(inner: torch.optim.Optimizer, tensors: Mapping[str, Tensor], data: dict) -> None:
    """Put packed state into a freshly made optimizer; UserError when it was packed from other parameters."""
    _refuse_incompatible_state(inner, tensors, data)
    whole = inner.state_dict()
    device = inner.param_groups[0]["params"][0].device
    moved = {k.removeprefix("group."): t.to(device, copy=True) for k, t in tensors.items() if k.startswith("group.")}
    whole["param_groups"] = [whole["param_groups"][0] | data["group"] | moved]
    whole["state"] = {
        i: {k: tensors[f"state.{i}.{k}"].clone() for k in packed["tensors"]} | packed["values"]
        for i, packed in enumerate(data["params"]) if packed["tensors"] or packed["values"]
    }
    inner.load_state_dict(whole)  # moves each tensor to where its optimizer wants it


def _split(values: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, Plain]]:
    """Tensors, copied to the CPU, and the rest, which must be plain."""
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in values.items() if isinstance(v, Tensor)}
    return tensors, {k: _plain(k, v) for k, v in values.items() if k not in tensors}


def _plain(key: str, value: object) -> Plain:
    if not isinstance(value, Plain):
        raise TypeError(f"its state {key!r} is a {type(value).__name__}, which no file keeps exactly")
    return value


def _differs(now: object, then: object) -> bool:
    return not torch.equal(now, then) if isinstance(now, Tensor) and isinstance(then, Tensor) else now != then


def _refuse_incompatible_state(inner: torch.optim.Optimizer, tensors: Mapping[str, Tensor], data: dict) -> None:
    saved, present = ([tuple(p["shape"]) for p in data["params"]],
                      [tuple(p.shape) for p in inner.param_groups[0]["params"]])
    expected = {f"state.{i}.{k}" for i, p in enumerate(data["params"]) for k in p["tensors"]}
    found = {k for k in tensors if not k.startswith("group.")}
    if saved != present:
        raise incompatible_state(_difference(saved, present))
    if expected != found:
        raise incompatible_state(f"tensors missing or unknown: {', '.join(sorted(expected ^ found)[:3])}")


def incompatible_state(why: str) -> UserError:
    """A checkpoint of other parameters."""
    return UserError(Problem(
        "the checkpoint's optimizer state does not fit this run", "--resume_from_checkpoint", why,
        "resume with the model, --rank and LoRA targets of that run, or start afresh in a new --output_dir"))


def _difference(saved: list[tuple[int, ...]], present: list[tuple[int, ...]]) -> str:
    if len(saved) != len(present):
        return f"it holds {len(saved)} tensors, this run trains {len(present)}"
    odd = [f"{s} there, {p} here" for s, p in zip(saved, present, strict=True) if s != p]
    return f"{len(odd)} tensors differ in shape, first {odd[0]}"
