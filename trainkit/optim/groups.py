"""One parameter group: the torch optimizer that moves it and nothing else, its rate, its end, its averaged weights.

An optimizer for each group, because several of them (Prodigy, D-Adaptation) estimate one step size for all they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, TypeGuard

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.optim.state import group_values, pack_state, unpack_state

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class ParamGroup(TypedDict):
    """Parameters that share a base learning rate, a decay and an end."""

    name: str  # what logs call them: "unet", "text_encoder", "text_encoder_2", "tokens", "unet.B"
    params: list[Tensor]
    names: NotRequired[list[str]]  # of `params`, as their modules call them
    lr: float
    weight_decay: float
    first_step: NotRequired[float]  # a step that is surely not too long; where Prodigy's estimate starts
    stop: NotRequired[int | None]  # optimizer steps after which no update has it; None: never, 0: not one has it


class Member:
    """One group in training.

    inner     its torch optimizer
    schedule  optimizer step -> multiplier on the group's rate
    ema       an exponential moving average of the weights, or None
    """

    def __init__(
        self, group: ParamGroup, inner: torch.optim.Optimizer, schedule: Callable[[int], float],
        ema: EMAModel | None = None,
    ):
        self.name, self.base_lr, self.stop = group["name"], group["lr"], group.get("stop")
        self.inner, self.schedule, self.ema = inner, schedule, ema
        self.initial_values = group_values(inner)  # to tell state from hyper-parameters, see state.py
        self.trains = True

    @property
    def values(self) -> dict:
        """The optimizer's own record of the group: parameters, rate, hyper-parameters."""
        return self.inner.param_groups[0]

    @property
    def params(self) -> list[Tensor]:
        return self.values["params"]

    def begin(self, step: int) -> None:
        """Take the rate of optimizer step `step`; at `stop`, leave training for good."""
        self.values["lr"] = self.base_lr * self.schedule(step)
        trains = self.stop is None or step < self.stop
        if trains != self.trains:
            self._switch(trains)

    def _switch(self, trains: bool) -> None:
        """In or out. Out means no gradient and no update: at a rate of 0 Prodigy, for one, would still move it."""
        self.trains = trains
        if averages(self.inner):
            self.inner.train() if trains else self.inner.eval()
        for p in self.params:
            p.requires_grad_(trains)
            p.grad = p.grad if trains else None

    def step(self) -> None:
        self.inner.step()
        if self.ema is not None:
            self.ema.step(self.params)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the averaged weights where the group has any; afterwards every bit as it was."""
        if self.ema is None and not averages(self.inner):
            yield
            return
        weights, mode = [p.detach().clone() for p in self.params], self.values.get("train_mode")
        try:
            self._show_average()
            yield
        finally:
            torch._foreach_copy_([p.data for p in self.params], weights)
            if mode is not None:
                self.values["train_mode"] = mode

    def _show_average(self) -> None:
        if self.ema is not None:
            self.ema.copy_to(self.params)
        elif averages(self.inner):
            self.inner.eval()

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        tensors, data = pack_state(self.inner, self.initial_values)
        if self.ema is not None:
            tensors |= {f"ema.{i}": t.to("cpu", copy=True) for i, t in enumerate(self.ema.shadow_params)}
        return tensors, data | {"ema_steps": None if self.ema is None else self.ema.optimization_step}

    def unpack(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Raises UserError where the state was packed from other parameters, or --use_ema has changed."""
        if (self.ema is None) != (data["ema_steps"] is None):
            here, there = ("with", "without") if self.ema is not None else ("without", "with")
            raise UserError(Problem(
                f"the checkpoint's run was {there} an average of the weights, this one is {here}", "--use_ema",
                "an average starts with the run", f"resume {there} --use_ema, or start afresh in a new --output_dir"))
        unpack_state(self.inner, {k: t for k, t in tensors.items() if not k.startswith("ema.")}, data)
        if self.ema is not None:
            self.ema.optimization_step = data["ema_steps"]
            for i, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(tensors[f"ema.{i}"])


class Averaging(Protocol):
    """An optimizer whose averaged weights take the place of those it trains between eval() and train()."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def averages(inner: torch.optim.Optimizer) -> TypeGuard[Averaging]:
    """Whether this optimizer keeps averaged weights behind train() and eval(), as schedule-free ones do."""
    return "train_mode" in inner.param_groups[0]
