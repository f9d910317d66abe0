"""What a tensor of a group is for, as far as its name tells or, without names, its neighbours' shapes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from trainkit.optim.hina.rank import lora_pairs
from trainkit.optim.hina.settings import Group

FACTOR = re.compile(r"(^|\.)(lora_(embedding_)?[AB]|lora_(down|up)|hada_\w+|lokr_\w+)(\.|$)")  # of LoRA, LoHa, LoKr
NO_FACTOR = ((re.compile("token_embedding|embed_tokens"), "its rows are tokens"),
             (re.compile("magnitude"), "it is a magnitude"))


class Role(NamedTuple):
    """anchored: SPD keeps where it started, else it is drawn to 0; spared: the rank penalty leaves it alone."""

    anchored: bool = False
    spared: bool = False


def roles(group: Group) -> dict[Tensor, Role]:
    """Every tensor of the group with its role under the group's settings."""
    if not group["use_spd"] and not group["lora_rank_penalty"]:
        return dict.fromkeys(group["params"], Role())
    kept = anchored(group)
    return {p: Role(p in kept, bool(no_factor(name)))
            for p, name in zip(group["params"], names_of(group), strict=True)}


def anchored(group: Group) -> set[Tensor]:
    """The tensors that SPD draws to where they started, so that it must keep a copy of that.

    With "auto" all but the factors of an adapter, whose product is 0 where they are; by names, else members of a pair.
    Source: Tian et al. 2024, arXiv:2411.01713, which draws the weights of LoRA to 0 and full weights to the start.
    """
    params, how = group["params"], group["spd_anchor"]
    if not group["use_spd"] or how == "zero":
        return set()
    if how == "init":
        return set(params)
    if "param_names" in group:
        return {p for p, name in zip(params, names_of(group), strict=True) if not is_factor(name)}
    return set(params) - {p for pair in lora_pairs(group) for p in pair}


def names_of(group: Group) -> list[str]:
    """A name for each tensor, "" where the group has none."""
    return group.get("param_names") or [""] * len(group["params"])


@lru_cache(maxsize=1 << 14)
def is_factor(name: str) -> bool:
    """Whether a tensor of that name is a factor of a low-rank or Kronecker product."""
    return bool(FACTOR.search(name))


@lru_cache(maxsize=1 << 14)
def no_factor(name: str) -> str:
    """Why the singular values of a tensor of that name say nothing of a rank, or ""."""
    found = [why for pattern, why in NO_FACTOR if pattern.search(name)]
    return found[0] if found and not is_factor(name) else ""
