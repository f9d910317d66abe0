"""Bytes of optimizer state: the optimizer itself makes a step on one small tensor of each shape that is trained.

So it holds for every optimizer, also for those of other packages.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.optim.groups import ParamGroup, averages
from trainkit.optim.hina.placing import offloaded
from trainkit.optim.table import make_inner
from trainkit.plan.live_bytes import BLOCK

if TYPE_CHECKING:
    from trainkit.options import OptimizerOptions


@dataclass(frozen=True)
class OptimizerState:
    """Bytes on the card and in host memory.

    averages  whether the weights to look at are copies: with --use_ema, and with a schedule-free optimizer
    """

    on_card: int
    on_host: int
    averages: bool


def measure(o: OptimizerOptions, trained: Sequence[Tensor]) -> OptimizerState:
    """The state that the optimizer keeps for these tensors, which may be on the meta device.

    Raises UserError: the optimizer is not there, or refuses its arguments.
    """
    shapes = Counter(tuple(tensor.shape) for tensor in trained)
    group: ParamGroup = {"name": "unet", "lr": o.learning_rate or 1e-4, "weight_decay": o.adam_weight_decay,
                         "params": [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the run's own optimizer will say what there is to say
    try:
        inner = make_inner(group, o)
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
        inner.step()
    finally:
        logging.disable(before)
    away = offloaded(inner.param_groups[0])
    on_card = on_host = 0
    for parameter, number in zip(group["params"], shapes.values(), strict=True):
        state = {name: value for name, value in inner.state[parameter].items() if isinstance(value, Tensor)}
        on_host += number * sizes(value for name, value in state.items() if name in away)
        on_card += number * sizes(value for name, value in state.items() if name not in away)
        on_card += number * sizes([parameter]) if o.use_ema else 0
    return OptimizerState(on_card, on_host, averages=o.use_ema or averages(inner))


def sizes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, rounded up as the allocator does; two of them may be parts of one storage."""
    return sum(-(-tensor.nbytes // BLOCK) * BLOCK for tensor in tensors)
