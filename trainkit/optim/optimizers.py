"""The table of optimizers and `Optim`, what the training loop holds: one optimizer and the rate of each of its groups.

A new optimizer is a function (groups, options) -> torch optimizer and a row in OPTIMIZERS.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError, refuse
from trainkit.optim.schedules import POLYNOMIAL_END_LR, SCHEDULES, Plan, parse_rules
from trainkit.optim.state import group_values, pack_state, unpack_state

if TYPE_CHECKING:
    from trainkit.options import OptimizerOptions

log = logging.getLogger(__name__)

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # what an optimizer needs besides PyTorch


class ParamGroup(TypedDict):
    """Parameters that share a base learning rate and a decay; `name` is what logs call them."""

    name: str
    params: list[Tensor]
    lr: float
    weight_decay: float


def adamw(groups: Sequence[ParamGroup], o: OptimizerOptions) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; one fused kernel where there is one.

    LoRA has hundreds of small tensors, so a step is mostly launches: fused is about 8 times faster than the default.
    """
    params = [p for g in groups for p in g["params"]]
    fused = all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in params)
    return torch.optim.AdamW(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon, fused=fused)


def adamw_8bit(groups: Sequence[ParamGroup], o: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, tensors under 4,096 elements in 32: Dettmers et al. 2022, arXiv:2110.02861."""
    bnb = _require("adamw8bit")
    return bnb.optim.AdamW8bit(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon)


def prodigy(groups: Sequence[ParamGroup], o: OptimizerOptions) -> torch.optim.Optimizer:
    """Adam that estimates its own step size d; --learning_rate multiplies d, so it stays near 1.

    One d serves everything in here, hence one group. d starts at 1e-6: the first dozens of steps hardly move anything.
    Source: Mishchenko & Defazio 2024, "Prodigy", arXiv:2306.06101, algorithm 4; reference konstmish/prodigy.
    """
    assert len(groups) == 1, "one Prodigy per group: its groups would share d and may not differ in rate"
    if groups[0]["lr"] <= 0.1:
        log.warning("--learning_rate %g with Prodigy multiplies its own estimate: about 1.0 is usual", groups[0]["lr"])
    make = _require("prodigy").Prodigy
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints, into our progress line
        return make(
            groups, betas=(o.adam_beta1, o.adam_beta2), beta3=o.prodigy_beta3, eps=o.adam_epsilon,
            decouple=o.prodigy_decouple, use_bias_correction=o.prodigy_use_bias_correction,
            safeguard_warmup=o.prodigy_safeguard_warmup)


OPTIMIZERS: dict[str, Callable[[Sequence[ParamGroup], OptimizerOptions], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw_8bit,
    "prodigy": prodigy,
}


class Optim:
    """One optimizer whose groups each follow their own schedule. Part of a checkpoint through `pack` and `unpack`.

    inner        the torch optimizer; every group has a `name`
    schedules    one per group: optimizer step -> multiplier on the rate the group was made with
    """

    def __init__(self, name: str, inner: torch.optim.Optimizer, *, schedules: Sequence[Callable[[int], float]]):
        self.name, self.inner, self.schedules = name, inner, tuple(schedules)
        self.base_lrs = [g["lr"] for g in inner.param_groups]
        self.made = group_values(inner)  # to tell state from hyper-parameters, see state.py
        assert len(self.schedules) == len(self.base_lrs), "one schedule per group"

    def set_lr(self, step: int) -> None:
        """The rates of optimizer step `step`, counted from 0: call before `step()`."""
        for group, base_lr, schedule in zip(self.inner.param_groups, self.base_lrs, self.schedules, strict=True):
            group["lr"] = base_lr * schedule(step)

    def step(self) -> None:
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def describe(self) -> dict[str, float]:
        """For the log: "lr/<group>", and "d/<group>" where the optimizer estimates a step size."""
        groups = self.inner.param_groups
        lrs = {f"lr/{g['name']}": float(g["lr"]) for g in groups}
        return lrs | {f"d/{g['name']}": float(g["d"]) for g in groups if "d" in g}

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        tensors, data = pack_state(self.inner, self.made)
        return tensors, {"optimizer": self.name} | data

    def unpack(self, tensors: dict[str, Tensor], data: dict) -> None:
        if data["optimizer"] != self.name:
            raise UserError(Problem(
                f"the checkpoint was trained with {data['optimizer']}, this run asks for {self.name}", "--optimizer",
                "one optimizer's state means nothing to another",
                f"resume with --optimizer {data['optimizer']}, or start afresh in a new --output_dir"))
        unpack_state(self.inner, tensors, data)


def problems(o: OptimizerOptions) -> Iterator[Problem]:
    """What no schedule can do with these options, and an optimizer's package that is not there."""
    if o.lr_scheduler == "polynomial" and o.learning_rate <= POLYNOMIAL_END_LR:
        yield Problem(
            f"--learning_rate {o.learning_rate:g} leaves polynomial decay no way down", "--learning_rate",
            f"that schedule ends at {POLYNOMIAL_END_LR:g}", "raise --learning_rate, or use --lr_scheduler constant")
    if o.lr_scheduler == "piecewise_constant":
        yield from _rule_problems(o.lr_step_rules or "")
    package = PACKAGES.get(o.algorithm)
    if package and not _is_installed(package):
        yield _missing(package, flag=f"--optimizer {o.algorithm}", why="it is not installed")


def _rule_problems(rules: str) -> Iterator[Problem]:
    try:
        parse_rules(rules)
    except ValueError as error:
        yield Problem(
            f"--lr_step_rules {rules} gives piecewise_constant no steps to follow", "--lr_step_rules",
            f"it needs multipliers, the steps they end at, and a last multiplier; {error}",
            "--lr_step_rules 1:100,0.1:200,0.01, for example")


def _is_installed(package: str) -> bool:
    """Whether importing it would find it; None in sys.modules, see runtime/startup.py, counts as not there."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def make_optimizer(groups: Sequence[ParamGroup], o: OptimizerOptions, total_steps: int) -> Optim:
    """The optimizer the options ask for, over `groups`, its schedules `total_steps` optimizer steps long.

    Raises UserError for what `problems` finds and for a package that is not installed.
    """
    refuse(problems(o))
    if o.lr_scheduler != "constant" and o.lr_warmup_steps >= total_steps:
        log.warning("--lr_warmup_steps %d: the rate is still rising when the run ends at step %d",
                    o.lr_warmup_steps, total_steps)
    schedules = [_schedule(o, total_steps, base_lr=g["lr"]) for g in groups]
    return Optim(o.algorithm, OPTIMIZERS[o.algorithm]([dict(g) for g in groups], o), schedules=schedules)


def _schedule(o: OptimizerOptions, total_steps: int, *, base_lr: float) -> Callable[[int], float]:
    plan = Plan(o.lr_warmup_steps, total_steps, cycles=o.lr_num_cycles, power=o.lr_power, base_lr=base_lr,
                rules=o.lr_step_rules or "")
    return partial(SCHEDULES[o.lr_scheduler], plan=plan)


def _require(algorithm: str) -> ModuleType:
    package, flag = PACKAGES[algorithm], f"--optimizer {algorithm}"
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(_missing(package, flag=flag, why=f"it cannot be imported here ({error})")) from error


def _missing(package: str, *, flag: str, why: str) -> Problem:
    return Problem(f"{flag} needs the package {package}", flag, why, f"pip install {package}")
