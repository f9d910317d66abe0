"""What a micro-batch is put through in one optimizer step: the forward passes, each with its noise levels and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from trainkit import rng
from trainkit.diffusion import Level, LevelSampler
from trainkit.errors import Problem, UserError
from trainkit.losses.objective import Objective

if TYPE_CHECKING:
    from trainkit.files import Json


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass.

    name    sets its noise apart from another pass of the same step; "" is the ordinary one
    shared  whether every sample of the step, on every rank, has the same noise level
    """

    levels: LevelSampler
    loss: Objective
    name: str = ""
    shared: bool = False

    def keys(self, keys: Sequence[rng.Key]) -> list[rng.Key]:
        """What this pass draws by, a key a sample: (seed, step, slot), and its name where it has one."""
        return [(*key, self.name) for key in keys] if self.name else list(keys)

    def level(self, keys: Sequence[rng.Key]) -> Level:
        """The noise level of each sample, on the CPU; `keys` are those of `keys()`."""
        if not self.shared:
            return self.levels(rng.uniform(keys, "timestep"))
        seed, step, *_ = keys[0]
        return self.levels(rng.uniform([(seed, step)], "shared timestep").expand(len(keys)))


class Memory(Protocol):
    """What a term remembers from step to step, and has to say of each."""

    def describe(self) -> dict[str, float]:
        """For the log, of the step whose passes are done; every rank asks, once a step, before the update."""

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


@dataclass(frozen=True)
class Passes:
    """The passes of every step, a function of the step alone; and what terms of their losses remember, by name."""

    of_step: Callable[[int], Sequence[Pass]]
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def __call__(self, step: int) -> Sequence[Pass]:
        return self.of_step(step)

    def describe(self) -> dict[str, float]:
        return {name: value for memory in self.memories.values() for name, value in memory.describe().items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        packed = {name: memory.pack() for name, memory in self.memories.items()}
        tensors = {f"{name}/{key}": tensor for name, (own, _) in packed.items() for key, tensor in own.items()}
        return tensors, {name: data for name, (_, data) in packed.items()}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        if data.keys() != self.memories.keys():
            raise UserError(Problem(
                "the checkpoint remembers other terms of the loss", "--resume_from_checkpoint",
                f"checkpoint: {', '.join(data) or 'none'}; now: {', '.join(self.memories) or 'none'}",
                "repeat the settings of the checkpoint, or give a new --output_dir"))
        for name, memory in self.memories.items():
            own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
            memory.unpack(own, data[name])


def always(*passes: Pass) -> Callable[[int], Sequence[Pass]]:
    """The same passes in every step."""
    return lambda step: passes
