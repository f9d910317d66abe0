"""A LoRA of a smaller rank: the best one, in the sense of the sum of squares, module by module.

How many directions stay, by the singular values S_1 ≥ S_2 ≥ … of ΔW:

    (none)         as many as the rank
    sv_ratio q     those with S_k > S_1 / q
    sv_cumulative  the fewest with Σ S_k ≥ q Σ S
    sv_fro         the fewest with ‖ΔW of them‖ ≥ q ‖ΔW‖
    energy         the fewest with ‖ΔW of them‖² ≥ q ‖ΔW‖²

With a method, the rank is the most that a module may have. Source of the first three names and rules:
kohya-ss/sd-scripts, networks/resize_lora.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from trainkit.adapters.updates import LowRank
from trainkit.families.file_names import ModulePlace
from trainkit.lora_file import LayerUpdate, LoraFile, Weights
from trainkit.lora_file.spectrum import cut, svd

DynamicMethod = Literal["sv_ratio", "sv_cumulative", "sv_fro", "energy"]
DYNAMIC: tuple[DynamicMethod, ...] = get_args(DynamicMethod)
SLACK = 1e-12  # relative, of sums of singular values: q = 1 means all, whatever the order of the summands


@dataclass(frozen=True)
class RankRule:
    """How many directions of a module stay.

    most, most_conv  ranks; those of convolutions whose kernel is larger than 1 × 1
    """

    most: int
    most_conv: int
    method: DynamicMethod | None = None
    param: float = 1.0

    def rank(self, S: Tensor, kernel: tuple[int, ...]) -> int:
        """S [k], the largest first -> 1 … k"""
        most = self.most_conv if any(side > 1 for side in kernel) else self.most
        if self.method is None or not float(S[0]):
            wanted = most if float(S[0]) else 1
        elif self.method == "sv_ratio":
            wanted = int((S[0] / self.param < S).sum())
        else:
            parts = S if self.method == "sv_cumulative" else S.square()
            fraction = self.param**2 if self.method == "sv_fro" else self.param
            wanted = int((parts.cumsum(0) < fraction * parts.sum() * (1 - SLACK)).sum()) + 1
        return max(1, min(wanted, most, len(S)))


@dataclass(frozen=True)
class Resized:
    """What became of a module: its ranks before and after, ‖ΔW‖² and ‖what is lost‖²."""

    place: ModulePlace
    before: int
    after: int
    size: float
    lost: float


def resize(found: LoraFile, rule: RankRule, weights: Weights | None, show: Callable[[float], None]
           ) -> tuple[LoraFile, list[Resized]]:
    """-> the smaller LoRA, and what was lost in each module. LoHa, LoKr and full changes become LoRA.

    weights  of the base: a DoRA keeps its magnitudes, and the loss is that of its whole change
    show     is told how many modules are done
    """
    layers, report = {}, []
    for k, (place, layer) in enumerate(found.layers.items()):
        W = weights(place) if weights and layer.magnitude is not None else None
        layers[place], each = resized(place, replace(layer, kernel=found.kernel(place)), rule, W)
        report.append(each)
        show(k + 1)
    return replace(found, layers=layers), report


def resized(place: ModulePlace, layer: LayerUpdate, rule: RankRule, W: Tensor | None) -> tuple[LayerUpdate, Resized]:
    """One module. The scale stays, so that alpha goes down as the rank does."""
    plain = layer if W is None else layer.of_paper(W)
    factors = svd(replace(plain, magnitude=None))
    rank = rule.rank(factors[1], layer.kernel or ())
    before = rank_of(layer)
    if isinstance(layer.update, LowRank) and before <= rank:  # as small already: nothing is rounded again
        return layer, Resized(place, before, before, 1.0, 0.0)
    product, lost = cut(factors, rank)
    scale = layer.update.scale or 1.0
    sign = 1.0 if scale > 0 else -1.0
    root = abs(scale) ** 0.5
    smaller = replace(plain, update=LowRank(product.A / root, product.B * (sign / root), scale))
    size = float(factors[1].square().sum())
    if W is not None:
        whole = plain.like(W).delta(W)
        size, lost = float(whole.square().sum()), float((smaller.like(W).delta(W) - whole).square().sum())
    return smaller, Resized(place, before, rank, size, lost)


def rank_of(layer: LayerUpdate) -> int:
    """Of the factors; of a change that has none, the largest that it can have."""
    return len(layer.update.map(lambda factor: factor.to("meta")).low_rank().A)


def lost_of(report: list[Resized]) -> float:
    """‖what is lost‖ / ‖ΔW‖ of several modules together."""
    whole = sum(each.size for each in report)
    return (sum(each.lost for each in report) / whole) ** 0.5 if whole else 0.0
