"""What a HinaAdaptive reports of itself: what is on, where it acts, what contradicts itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainkit.optim.hina import rules
from trainkit.optim.hina.memory import state_kinds
from trainkit.optim.hina.rank import lora_pairs
from trainkit.optim.hina.roles import anchored, is_factor, names_of, no_factor
from trainkit.optim.hina.settings import DEFAULTS, KNOBS, MEMORY_FLAGS, RULE_FLAGS, Group

NO_PAIR = "the group holds no LoRA pair (LoRA+ parts A from B)"

MEMORY = (*MEMORY_FLAGS, "vram_budget_gb", "max_buffer_memory_mb")
EDGE_CONTROL = ("edge_suppression", "spatial_awareness", "background_regularization", "lora_rank_penalty")


def describe(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Settings are those of the first group; features, active_on and warnings look at all of them.

    features                 {flag: whether it is on}
    active_on                {flag: "3 of 4 tensors, how: why not on the others"} for what is on
    memory_optimization, adaptation_config, edge_overfitting_control   settings, by subject
    training_stats           steps so far, tensors and numbers that train
    warnings                 sentences on settings that contradict each other
    """
    groups = optimizer.param_groups
    first, params = groups[0], [p for group in groups for p in group["params"]]
    return {
        "features": {flag: any(group[flag] for group in groups) for flag in RULE_FLAGS},
        "active_on": {flag: active_on(groups, flag) for flag in RULE_FLAGS if any(group[flag] for group in groups)},
        "memory_optimization": {name: first[name] for name in MEMORY} | {"states": state_kinds(optimizer)},
        "adaptation_config": with_knobs(first, "use_dynamic_adaptation"),
        "edge_overfitting_control": with_knobs(first, *EDGE_CONTROL),
        "training_stats": {"steps": first["clock"], "lr": [group["lr"] for group in groups],
                           "tensors": len(params), "parameters": sum(map(Tensor.numel, params))},
        "warnings": list(dict.fromkeys(w for group in groups for w in warnings_of(group))),
    }


def with_knobs(group: Group, *switches: str) -> dict[str, object]:
    """The switches, each followed by what is read under it."""
    return {name: group[name] for switch in switches for name in (switch, *KNOBS.get(switch, ()))}


def active_on(groups: Sequence[Group], flag: str) -> str:
    """On how many tensors a rule acts, and why not on the others."""
    reasons = [reason for group in groups for reason in reasons_against(group, flag)]
    against = Counter(filter(None, reasons))
    words = f"{len(reasons) - against.total()} of {len(reasons)} tensors"
    words += how([group for group in groups if group[flag]], flag) if against.total() < len(reasons) else ""
    return f"{words}: {', '.join(r for r, _ in against.most_common())}" if against else words


def reasons_against(group: Group, flag: str) -> Iterator[str]:
    """For each tensor of the group why a rule cannot act on it, or ""."""
    whole = "it is off in their group" if not group[flag] else no_use(group, flag)
    rule = next((rule for rule in rules.RULES if rule.flag == flag), None)
    products = flag == "lora_rank_penalty" and group["rank_penalty_target"] == "product"
    paired = {b for _, b in lora_pairs(group)} if products else set()
    alone = "only the B of a LoRA pair changes" if paired else NO_PAIR
    for p, name in zip(group["params"], names_of(group), strict=True):
        reason = rule.inapplicable(p.shape) if rule else ""
        reason = reason or (no_factor(name) if flag == "lora_rank_penalty" else "")
        yield whole or reason or (alone if products and p not in paired else "")


def how(groups: Sequence[Group], flag: str) -> str:
    """What a rule does not do to every tensor alike, after a comma, or ""."""
    if flag == "use_spd":
        total, kept = sum(len(group["params"]) for group in groups), sum(len(anchored(group)) for group in groups)
        some = f", {kept} drawn to their start and the others to 0"
        return {0: ", drawn to 0", total: ", drawn to their start"}.get(kept, some)
    if flag == "use_dynamic_adaptation" and any(is_factor(name) for group in groups for name in names_of(group)):
        return "" if any(map(lora_pairs, groups)) else f", partners left apart because {NO_PAIR}"
    return ""


def no_use(group: Group, flag: str) -> str:
    """Why a rule that is on changes nothing in the whole group, or ""."""
    if flag == "use_cautious" and group["use_grams"]:
        return "Grams already goes where the gradient points"
    if flag == "dynamic_weight_decay" and not group["weight_decay"]:
        return "weight_decay is 0"
    if flag == "use_dynamic_adaptation" and len(group["params"]) == 1:
        return "a single tensor has none to share with"
    return ""


def warnings_of(group: Group) -> Iterator[str]:
    """What the group's settings say twice, against each other, or for nobody."""
    for switch, knobs in KNOBS.items():
        idle = [name for name in knobs if group[name] != DEFAULTS[name]]
        if idle and not group[switch]:
            yield f"{', '.join(idle)}: read with {switch}=True only, which is off"
    if group["use_grams"] and group["use_cautious"]:
        yield "use_cautious changes nothing beside use_grams, which already takes the gradient's sign"
    if group["use_spd"] and group["weight_decay"] > 0:
        yield ("use_spd is meant to replace weight decay, and both are on: set weight_decay to 0 unless weights are to "
               "be drawn to 0 and to their anchor")
