"""`Optim`, what the training loop holds: every parameter group with an optimizer of its own, driven as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError, refuse
from trainkit.optim import table
from trainkit.optim.groups import Member, ParamGroup
from trainkit.optim.schedules import POLYNOMIAL_END_LR, SCHEDULES, SchedulePlan, parse_rules
from trainkit.optim.state import incompatible_state

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

    from trainkit.options import OptimizerOptions

log = logging.getLogger(__name__)

LARGEST_RATE = 1e6  # under any optimizer a step far beyond every weight


class Optim:
    """The groups of a run under one kind of optimizer. Part of a checkpoint through `pack` and `unpack`.

    name            the algorithm, which a checkpoint must share
    estimates_step  whether the optimizer finds its own step size d (Prodigy), which the log then shows
    """

    def __init__(self, name: str, members: Sequence[Member], *, estimates_step: bool = False):
        self.name, self.members, self.estimates_step = name, tuple(members), estimates_step

    def begin(self, step: int) -> None:
        """Before the first micro-batch of optimizer step `step` (from 0): who trains in it, and at which rate.

        A function of the step alone, so it holds on either side of a restart.
        """
        for member in self.members:
            member.begin(step)

    @property
    def active(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers that train in this step, one for each group that has not stopped."""
        return [m.inner for m in self.members if m.trains]

    @property
    def params(self) -> list[Tensor]:
        """Everything that is trained in the run."""
        return [p for m in self.members for p in m.params]

    def step(self) -> None:
        for member in self.members:
            if member.trains:
                member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.inner.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights to look at and to publish; afterwards, bit for bit those to train on.

        They differ with --use_ema and with a schedule-free optimizer.
        """
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.averaged())
            yield

    def describe(self) -> dict[str, float]:
        """For the log: "lr/<group>", and "d/<group>" where the optimizer estimates a step size; what trains only."""
        training = [m for m in self.members if m.trains]
        lrs = {f"lr/{m.name}": float(m.values["lr"]) for m in training}
        return lrs | {f"d/{m.name}": float(m.values["d"]) for m in training if self.estimates_step}

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        packed = {m.name: m.pack() for m in self.members}
        tensors = {f"{name}/{key}": t for name, (part, _) in packed.items() for key, t in part.items()}
        return tensors, {"optimizer": self.name, "groups": {name: data for name, (_, data) in packed.items()}}

    def unpack(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Raises UserError for the state of another optimizer, of other groups or of other parameters."""
        if data["optimizer"] != self.name:
            raise UserError(Problem(
                f"the checkpoint was trained with {data['optimizer']}, this run asks for {self.name}", "--optimizer",
                "one optimizer's state means nothing to another",
                f"resume with --optimizer {data['optimizer']}, or start afresh in a new --output_dir"))
        groups, ours = data["groups"], [m.name for m in self.members]
        if groups.keys() != set(ours):
            raise incompatible_state(f"it holds the groups {', '.join(groups)}, this run trains {', '.join(ours)}")
        for m in self.members:
            m.unpack({k.removeprefix(f"{m.name}/"): t for k, t in tensors.items() if k.startswith(f"{m.name}/")},
                     groups[m.name])


def problems(o: OptimizerOptions) -> Iterator[Problem]:
    """What no schedule can do with these options, and an optimizer that is not there or refuses its arguments."""
    yield from _rate_problems([_stand_in(o)])
    if o.lr_scheduler == "polynomial" and o.learning_rate <= POLYNOMIAL_END_LR:
        yield Problem(
            f"--learning_rate {o.learning_rate:g} leaves polynomial decay no way down", "--learning_rate",
            f"that schedule ends at {POLYNOMIAL_END_LR:g}", "raise --learning_rate, or use --lr_scheduler constant")
    if o.lr_scheduler == "piecewise_constant":
        yield from _rule_problems(o.lr_step_rules or "")
    try:
        if o.is_class or o.optimizer_args:
            with _silence():  # the run's own optimizer will say what there is to say
                table.make_inner(_stand_in(o), o)  # the first of a process takes a second, which known ones need not
        else:
            table.find_class(o)
    except UserError as error:
        yield from error.problems


def _rule_problems(rules: str) -> Iterator[Problem]:
    try:
        parse_rules(rules)
    except ValueError as error:
        yield Problem(
            f"--lr_step_rules {rules} gives piecewise_constant no steps to follow", "--lr_step_rules",
            f"it needs multipliers, the steps they end at, and a last multiplier; {error}",
            "--lr_step_rules 1:100,0.1:200,0.01, for example")


def make_optimizer(groups: Sequence[ParamGroup], o: OptimizerOptions, total_steps: int) -> Optim:
    """The optimizer the options ask for, over `groups`, its schedules `total_steps` optimizer steps long.

    Groups without parameters are left out. Raises UserError for what `problems` finds, and for a class that cannot be
    driven or saved.
    """
    refuse(problems(o))
    groups = [g for g in groups if g["params"]]
    refuse(_rate_problems(groups))
    assert len({g["name"] for g in groups}) == len(groups), "two groups share a name"
    if not any(g["lr"] for g in groups):
        raise UserError(Problem("nothing would be trained", "--learning_rate, --text_encoder_lr",
                                "every learning rate is 0", "give --learning_rate 1e-4, with Prodigy 1.0"))
    if o.is_class or o.optimizer_args:
        _try_out(o, groups[0]["params"][0].device)
    _warn(groups, o, total_steps)
    trained = next(g["lr"] for g in groups if g["lr"])
    members = [_member(g, o, total_steps, instead_of_0=trained) for g in groups]
    for member in members:
        _log_settings(member, o.algorithm)
    return Optim(o.algorithm, members, estimates_step=o.estimates_step)


def _rate_problems(groups: Sequence[ParamGroup]) -> Iterator[Problem]:
    for group in groups:
        if group["lr"] > LARGEST_RATE:
            yield Problem(
                f"a learning rate of {group['lr']:g} ({group['name']}) leaves no weight finite",
                table.RATE_FLAGS.get(group["name"], "--text_encoder_lr"), f"rates end at {LARGEST_RATE:g}",
                "1e-4 is usual, with Prodigy 1.0")


def _member(group: ParamGroup, o: OptimizerOptions, total_steps: int, *, instead_of_0: float) -> Member:
    """A group at rate 0 is out of every update, and made with another group's: Prodigy, for one, takes no rate of 0."""
    group = {**group, "stop": group.get("stop") if group["lr"] else 0}
    inner = table.make_inner({**group, "lr": group["lr"] or instead_of_0}, o)
    ema = _ema(group["params"], o) if o.use_ema and group["name"].partition(".")[0] == "unet" else None
    return Member(group, inner, _schedule(o, total_steps, base_lr=group["lr"]), ema)


def _log_settings(member: Member, name: str) -> None:
    """In the log, what is on in a group that trains and where it acts, if its optimizer knows."""
    describe = getattr(member.inner, "get_optimization_info", None)
    if describe is None or member.stop == 0:
        return
    acting = "; ".join(f"{rule} on {where}" for rule, where in describe()["active_on"].items())
    log.info("%s, %s: %s", name, member.name, acting or "no rule is on")


def _ema(params: Sequence[Tensor], o: OptimizerOptions) -> EMAModel:
    from diffusers.training_utils import EMAModel

    return EMAModel(params, decay=o.ema_decay, foreach=True)


def _schedule(o: OptimizerOptions, total_steps: int, *, base_lr: float) -> Callable[[int], float]:
    schedule = SCHEDULES[o.lr_scheduler]
    plan = SchedulePlan(o.lr_warmup_steps, total_steps, cycles=o.lr_num_cycles, power=o.lr_power, base_lr=base_lr,
                rules=o.lr_step_rules or "")
    return lambda step: schedule(step, plan)


def _stand_in(o: OptimizerOptions, device: torch.device | str = "cpu") -> ParamGroup:
    """A group like the UNet's, of one small matrix; at a rate of 0, at which it does not train, with the usual one."""
    matrix = torch.nn.Parameter(torch.ones(8, 8, device=device))
    rate = o.learning_rate or type(o).model_fields["learning_rate"].default
    return {"name": "unet", "params": [matrix], "lr": rate, "weight_decay": o.adam_weight_decay}


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings of a constructor inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _try_out(o: OptimizerOptions, device: torch.device) -> None:
    """One step of a class we do not know, and its state into a checkpoint: better refused now than at the first save.

    Raises UserError when either fails, as for classes whose step takes a closure.
    """
    group = _stand_in(o, device)
    with _silence():
        member = Member(group, table.make_inner(group, o), schedule=lambda step: 1.0)
    member.params[0].grad = torch.ones_like(member.params[0])
    try:
        with _silence():
            member.step()
            member.pack()
    except Exception as error:  # whatever a class of somebody else's raises
        raise UserError(Problem(
            f"--optimizer {o.optimizer} cannot be driven by this trainer", "--optimizer",
            f"a step on a matrix of ones and a save fail: {type(error).__name__}: {error}",
            f"choose {', '.join(table.OPTIMIZERS)}, or another class")) from error


def _warn(groups: Sequence[ParamGroup], o: OptimizerOptions, total_steps: int) -> None:
    if o.lr_scheduler != "constant" and o.lr_warmup_steps >= total_steps:
        log.warning("--lr_warmup_steps %d: the rate is still rising when the run ends at step %d",
                    o.lr_warmup_steps, total_steps)
    if o.algorithm.startswith("paged_") and groups[0]["params"][0].device.type == "cpu":
        log.warning("--optimizer %s: on a CPU nothing is paged, it works as %s", o.algorithm,
                    o.algorithm.removeprefix("paged_"))
    for group in groups:
        if o.estimates_step and group["lr"] <= 0.1:
            log.warning("a learning rate of %g (%s) with %s multiplies its own estimate: about 1.0 is usual",
                        group["lr"], group["name"], o.optimizer)
