"""How several changes of one weight become one: ΔW_1 … ΔW_n [out,in] and a strength for each -> ΔW [out,in].

    linear, concat, svd   Σ strength · ΔW                                   Ilharco et al. 2023, arXiv:2212.04089
    ties                  of each ΔW the largest entries are kept; where signs differ, the side with the larger sum
                          stays, and its entries are averaged               Yadav et al. 2023, arXiv:2306.01708
    dare_linear           a random part of the entries is kept, divided by that part; then the sum
                                                                            Yu et al. 2024, arXiv:2311.03099
    dare_ties             the same entries, then signs as in TIES
    magnitude_prune       of each ΔW the largest entries are kept; then the sum

The formulas are PEFT's (peft/utils/merge_utils.py). PEFT's own `add_weighted_adapter` has two forms of each: one that
takes A and B for two weights of their own, whose product has cross terms, and one named ..._svd for ΔW. These are for
ΔW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trainkit import rng

Method = Literal["linear", "concat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ziplora"]
METHODS: tuple[Method, ...] = get_args(Method)
STACKED = ("linear", "concat")  # whose result is a product of few columns without any error
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # that keep a part of the entries
RANDOM = ("dare_linear", "dare_ties")


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    rank     of what is written; None: the ranks' sum
    density  the part of the entries that a sparse method keeps
    sign     how TIES elects a sign: "total" by the sum of the entries, "frequency" by their number
    seed     of the entries that DARE keeps
    """

    method: Method = "concat"
    rank: int | None = None
    density: float = 0.5
    sign: Literal["total", "frequency"] = "total"
    seed: int = 0


def merged_delta(deltas: list[Tensor], strengths: list[float], settings: MergeSettings, key: str) -> Tensor:
    """deltas [out,in] in fp64 -> their merged change. `key` names the module: DARE draws for each one anew."""
    from peft.utils import merge_utils

    if settings.method not in SPARSE:
        return sum((delta * strength for delta, strength in zip(deltas, strengths, strict=True)),
                   torch.zeros_like(deltas[0]))
    chosen = getattr(merge_utils, settings.method)
    more = {"majority_sign_method": settings.sign} if settings.method.endswith("ties") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("merge", settings.seed, key))
        merged: Tensor = chosen(deltas, torch.tensor(strengths, dtype=deltas[0].dtype), settings.density, **more)
    return merged
