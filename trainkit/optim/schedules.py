"""Learning-rate schedules: pure functions (optimizer step, plan) -> multiplier on a group's base rate.

Nothing counts and nothing is saved, so a resumed run has the rate of an uninterrupted one by construction. A step is
one optimizer update, whatever the accumulation or the number of processes. The names and values are those of
diffusers.optimization.get_scheduler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

MULTIPLIER = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"  # not below 0
RULE = re.compile(MULTIPLIER + ":[0-9]+")
POLYNOMIAL_END_LR = 1e-7  # where polynomial decay stops, absolute: the default of diffusers.optimization


@dataclass(frozen=True)
class SchedulePlan:
    """What a schedule knows: its length in optimizer steps, its shape, and the base rate of the group it scales."""

    warmup: int  # steps of linear rise from 0
    total: int  # steps of the whole run, warmup included
    cycles: int = 1  # hard restarts (cosine_with_restarts)
    power: float = 1.0  # exponent (polynomial)
    base_lr: float = 1.0
    rules: str = ""  # "1:10,0.1:20,0.01": 1 before step 10, 0.1 before step 20, then 0.01 (piecewise_constant)

    def progress(self, step: int) -> float:
        """0 when the warmup ends, 1 when the run does; goes on growing after it."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def constant(step: int, plan: SchedulePlan) -> float:
    """1, always: this one ignores the warmup."""
    return 1.0


def after_warmup(decay: Callable[[float, SchedulePlan], float]) -> Callable[[int, SchedulePlan], float]:
    """A schedule that rises from 0 and then follows decay(progress, plan) -> multiplier."""

    def schedule(step: int, plan: SchedulePlan) -> float:
        return step / plan.warmup if step < plan.warmup else decay(plan.progress(step), plan)

    return schedule


def linear(progress: float, plan: SchedulePlan) -> float:
    return max(0.0, 1 - progress)


def cosine(progress: float, plan: SchedulePlan) -> float:
    """Half a cosine down to 0; Loshchilov & Hutter 2017, "SGDR", eq. 5."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_with_restarts(progress: float, plan: SchedulePlan) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (plan.cycles * progress % 1.0)))


def polynomial(progress: float, plan: SchedulePlan) -> float:
    floor = POLYNOMIAL_END_LR / max(plan.base_lr, POLYNOMIAL_END_LR)  # rates up to the end's own stay as they are
    return floor if progress > 1 else (1 - floor) * (1 - progress) ** plan.power + floor


def piecewise_constant(step: int, plan: SchedulePlan) -> float:
    """The value of the first rule whose step lies ahead; the last value has no step."""
    bounds, last = parse_rules(plan.rules)
    return next((value for until, value in bounds if step < until), last)


def parse_rules(text: str) -> tuple[list[tuple[int, float]], float]:
    """"1:100,0.1:200,0.01" -> ([(100, 1), (200, 0.1)], 0.01), by step. Raises ValueError saying what is amiss."""
    *rules, last = text.split(",")
    for rule in rules or [""]:
        if not RULE.fullmatch(rule):
            raise ValueError(f"{rule!r} is not MULTIPLIER:STEP")
    if not re.fullmatch(MULTIPLIER, last):
        raise ValueError(f"{last!r} is not a last multiplier")
    pairs = [rule.split(":") for rule in rules]
    return sorted((int(until), float(value)) for value, until in pairs), float(last)


SCHEDULES: dict[str, Callable[[int, SchedulePlan], float]] = {
    "linear": after_warmup(linear),
    "cosine": after_warmup(cosine),
    "cosine_with_restarts": after_warmup(cosine_with_restarts),
    "polynomial": after_warmup(polynomial),
    "constant": constant,
    "constant_with_warmup": after_warmup(lambda progress, plan: 1.0),
    "piecewise_constant": piecewise_constant,
}
