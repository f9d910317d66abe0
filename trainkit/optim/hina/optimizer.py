"""The optimizer itself: torch's AdamW while no rule is on, else the rules over chunks of parameters of one shape."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import StateDict

from trainkit.optim.hina import info, memory, rules
from trainkit.optim.hina.chunk_state import Buffers, ChunkState, GroupContext
from trainkit.optim.hina.placing import MASTER, REDUCED, arrived, is_offloaded, restore
from trainkit.optim.hina.rank import lora_pairs
from trainkit.optim.hina.regularize import distribute_learning_rate, is_kernel
from trainkit.optim.hina.roles import Role, roles
from trainkit.optim.hina.settings import (
    CHANGE_NO_BIT,
    DEFAULTS,
    Group,
    SettingValue,
    check,
    is_adamw,
    plain_value,
    resolve,
    spelled_out,
    why_unknown,
)
from trainkit.optim.hina.storage import Chunk, gradients, scratch_limit, scratch_of, states_on_device, stream

log = logging.getLogger(__name__)

SCHEMA = 1  # of the groups and states in a state dict
TEMPORARIES = 3  # tensors of a chunk's size that the rules keep, see chunk_state.py
KERNEL_TEMPORARIES = 4  # more of them for spatial and edge on kernels
RANK_TEMPORARIES = 6  # more for the rank penalty, two for each tensor in fp64


class HinaAdaptive(torch.optim.Optimizer):
    """AdamW with rules of many papers, each behind a switch, and states that take little memory.

    params      tensors, or parameter groups, or named tensors; any setting may be given for each group
    preset      "adamw": every rule off, which is torch.optim.AdamW bit for bit; "fork": what hinablue/sd-scripts has on
    settings    see `settings.HinaSettings` for all of them and their defaults

    rules.py has the order and the sources of the rules. Everything that moves a number is in `state` and the groups.
    A step waits for the device only where the rank penalty is due. Raises TypeError for a setting that is none, and
    ValueError for a value that cannot be.
    """

    CHANGE_NO_BIT = CHANGE_NO_BIT
    WANTS_NAMES = True  # a tensor's name tells what it is for, see roles.py
    GROUP_STATE = ("mask_lr",)  # where lr_mask started: what a saved mask is measured against
    why_unknown = staticmethod(why_unknown)
    spelled_out = staticmethod(spelled_out)
    __signature__: ClassVar[inspect.Signature]  # see `signature`

    def __init__(
        self, params: Iterable[Tensor] | Iterable[Group] | Iterable[tuple[str, Tensor]], lr: float = 1e-3, *,
        preset: str = "adamw", **settings: SettingValue,
    ):
        super().__init__(params, resolve({"lr": lr, **settings}, preset))

    def add_param_group(self, param_group: Group) -> None:
        """Checks the group's own settings. A learning rate of its own is also where its lr_mask starts."""
        unknown = param_group.keys() - DEFAULTS.keys() - OF_GROUPS
        resolve({name: param_group[name] for name in sorted(unknown)})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        complete(group)
        check(group)
        for p in group["params"]:
            refuse_dtype(p)
        self._warn_of(group)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Also the way of load_state_dict: groups of torch's AdamW get the settings they lack from `defaults`."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in DEFAULTS:
                group.setdefault(name, self.defaults[name])
            complete(group)

    def __getstate__(self) -> dict[str, object]:
        arrived(self)
        return super().__getstate__()

    def state_dict(self) -> StateDict:
        """As torch's; states in host memory are all there, whatever was still on its way."""
        arrived(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Hyper-parameters and states as saved, in the precision they were saved in; torch AdamW's are welcome too."""
        schemas = {group.get("schema", SCHEMA) for group in state_dict["param_groups"]}
        if schemas - {SCHEMA}:
            raise ValueError(f"the state dict has schema {schemas}, this is {SCHEMA}: use the version that wrote it")
        if any(group.get("amsgrad") or group.get("maximize") for group in state_dict["param_groups"]):
            raise ValueError("the state dict is of an optimizer with amsgrad or maximize: HinaAdaptive has neither")
        refuse_shapes(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        restore(self, state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if p.grad is not None])
        memory.watch(self, self.param_groups[0]["clock"])
        return loss

    def _step_group(self, group: Group, params: Sequence[Tensor]) -> None:
        group["clock"] += 1
        for grad in gradients(params):
            refuse_gradient(grad)
        if is_adamw(group):
            plain_step(self, group, [p for p in params if p.dtype != torch.bfloat16])
            params = [p for p in params if p.dtype == torch.bfloat16]  # to be rounded, which the rules' path does
        rule_step(self, group, params)

    def get_optimization_info(self) -> dict[str, object]:
        """What is on, on how many tensors it acts and why not on others, and what the settings come to."""
        return info.describe(self)

    def get_memory_stats(self) -> dict[str, object]:
        """What the states take and how full the device is; see memory.py."""
        return memory.get_memory_stats(self)

    def optimize_for_vram(self, target_vram_gb: float) -> dict[str, object]:
        """Make room on the device by what the optimizer holds; returns what was done and what is still lacking."""
        return memory.optimize_for_vram(self, target_vram_gb)

    def restore_states(self) -> dict[str, int]:
        """Take back the moves of `optimize_for_vram`; precision that was given up does not come back."""
        return memory.restore_states(self)

    def _warn_of(self, group: Group) -> None:
        for sentence in info.warnings_of(group):
            scratch_of(self).warn_once(sentence)


def signature() -> inspect.Signature:
    """The constructor's, with every setting by its name."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    lr = inspect.Parameter("lr", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=DEFAULTS["lr"])
    rest = {name: value for name, value in DEFAULTS.items() if name != "lr"} | {"preset": "adamw"}
    return inspect.Signature([params, lr, *(inspect.Parameter(n, keyword, default=v) for n, v in rest.items())])


HinaAdaptive.__signature__ = signature()

# What a group may hold beside settings: torch's own, ours that move, and the trainer's name of it
OF_GROUPS = {"params", "param_names", "name", "initial_lr", "clock", "rank_debt", "mask_lr", "schema", "offloaded",
             "maximize", "capturable", "differentiable", "decoupled_weight_decay"}


def complete(group: Group) -> None:
    """Plain numbers for all settings, and what moves: steps so far, learning rates since the last proximal step."""
    for name in DEFAULTS.keys() & group.keys():
        group[name] = plain_value(group[name])
    group.setdefault("schema", SCHEMA)
    group.setdefault("clock", 0)
    group.setdefault("rank_debt", 0.0)
    group.setdefault("mask_lr", group["lr"])


def refuse_dtype(p: Tensor) -> None:
    if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"HinaAdaptive cannot train parameters of {p.dtype}: convert them to float32 or bfloat16")


def refuse_gradient(grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError("HinaAdaptive cannot use sparse gradients: use torch.optim.SparseAdam for these parameters")


def refuse_shapes(groups: Sequence[Group], state_dict: StateDict) -> None:
    """Raises ValueError where a saved state is of another shape than its parameter."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    for i, p in zip(saved, params, strict=False):  # torch says it where their numbers differ
        for name, value in state_dict["state"].get(i, {}).items():
            if name in (*REDUCED, MASTER) and value.shape != p.shape:
                raise ValueError(f"the state dict's {name} of tensor {i} is {tuple(value.shape)}, the tensor here "
                                 f"{tuple(p.shape)}: load the state of the same model")


def steps_of(opt: HinaAdaptive, params: Sequence[Tensor], *, on_device: bool) -> list[Tensor]:
    """The step counts, which lie on the CPU unless a fused kernel reads them; made where there are none."""
    for p in params:
        home = p.device if on_device else torch.device("cpu")
        count = opt.state[p].get("step")
        if not isinstance(count, Tensor):
            count = torch.tensor(float(count or 0.0))
        opt.state[p]["step"] = count.to(home, torch.float32)
    return [opt.state[p]["step"] for p in params]


def plain_step(opt: HinaAdaptive, group: Group, params: Sequence[Tensor]) -> None:
    """torch's AdamW, by the kernel that `foreach` and `fused` ask for."""
    names = ("exp_avg", "exp_avg_sq")
    counts = dict(zip(params, steps_of(opt, params, on_device=bool(group["fused"])), strict=True))
    away = [p for p in params if is_offloaded(group, p.device)]
    here = [p for p in params if not is_offloaded(group, p.device)]
    for p in here:
        for name in names:
            if name not in opt.state[p]:
                opt.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    kernel(group, here, counts, {name: [opt.state[p][name] for p in here] for name in names})
    for bucket in like(away, lambda p: (p.shape, p.dtype, p.device)):
        for some, states in states_on_device(opt.state, group, bucket, names=names, step=group["clock"],
                                             scratch_bytes=scratch_limit(group), scratch=scratch_of(opt)):
            kernel(group, some, counts, states)


def kernel(group: Group, params: list[Tensor], counts: Mapping[Tensor, Tensor], states: Mapping[str, list[Tensor]]
           ) -> None:
    b1, b2 = group["betas"]
    adamw(params, gradients(params), states["exp_avg"], states["exp_avg_sq"], [], [counts[p] for p in params],
          foreach=group["foreach"], fused=group["fused"], amsgrad=False, beta1=b1, beta2=b2, lr=group["lr"],
          weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)


def rule_step(opt: HinaAdaptive, group: Group, params: Sequence[Tensor]) -> None:
    """All buckets through the rules, then what takes all tensors together."""
    params = [p for p in params if p.numel()]
    if not params:
        return
    pairs = lora_pairs(group) if group["use_dynamic_adaptation"] or group["lora_rank_penalty"] else []
    context = GroupContext({b: a for a, b in pairs}, shrink=shrink_due(group), refresh=refresh_due(group))
    counts = steps_of(opt, params, on_device=False)
    torch._foreach_add_(counts, torch.tensor(1.0))  # a number would be made a tensor for each
    at = dict(zip(params, map(int, torch.stack(counts).tolist()), strict=True))
    buffers, role = Buffers(), roles(group)
    for bucket in like(params, lambda p: (p.shape, p.dtype, p.device, at[p], role[p])):
        acting = rules.active(group, bucket[0].shape, role[bucket[0]])
        for chunk in chunks_of(opt, group, bucket, at[bucket[0]], role[bucket[0]]):
            rules.run(ChunkState(chunk, context, buffers), acting)
    if context.refresh:
        distribute_learning_rate(params, opt.state, group, pairs)


def chunks_of(opt: HinaAdaptive, group: Group, bucket: Sequence[Tensor], step: int, role: Role) -> Iterator[Chunk]:
    names, scalars = rules.states(group, role)
    temporaries = TEMPORARIES + KERNEL_TEMPORARIES * is_kernel(bucket[0].shape) + (
        RANK_TEMPORARIES * group["lora_rank_penalty"])
    return stream(opt.state, group, bucket, names=names, scalars=scalars, step=step, initial=rules.initial(group),
                  temporaries=temporaries, scratch_bytes=scratch_limit(group), scratch=scratch_of(opt),
                  read_only=("anchor",))


def like(params: Iterable[Tensor], key: Callable[[Tensor], tuple]) -> Iterable[list[Tensor]]:
    """Parameters of one key together, in the order in which keys first appear."""
    found: dict[tuple, list[Tensor]] = defaultdict(list)
    for p in params:
        found[key(p)].append(p)
    return found.values()


def shrink_due(group: Group) -> float | None:
    """Every `rank_penalty_interval` steps the learning rates of all of them; else None."""
    if not group["lora_rank_penalty"]:
        return None
    group["rank_debt"] += group["lr"]
    if group["clock"] % group["rank_penalty_interval"]:
        return None
    debt, group["rank_debt"] = group["rank_debt"], 0.0
    return debt


def refresh_due(group: Group) -> bool:
    return group["use_dynamic_adaptation"] and not group["clock"] % group["relationship_discovery_interval"]
