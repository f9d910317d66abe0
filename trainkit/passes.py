"""What a micro-batch is put through in one optimizer step: the forward passes, each with its noise levels and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from trainkit import rng
from trainkit.diffusion import Level, LevelSampler
from trainkit.objective import Objective

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
    """What a loss remembers from step to step, and has found since it was last asked."""

    def describe(self) -> dict[str, float]: ...

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


@dataclass(frozen=True)
class Passes:
    """The passes of every step, a function of the step alone; and the memory of a loss that has one."""

    of_step: Callable[[int], Sequence[Pass]]
    memory: Memory | None = None

    def __call__(self, step: int) -> Sequence[Pass]:
        return self.of_step(step)

    def describe(self) -> dict[str, float]:
        return self.memory.describe() if self.memory else {}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return self.memory.pack() if self.memory else ({}, {})

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        if self.memory:
            self.memory.unpack(tensors, data)


def always(*passes: Pass) -> Callable[[int], Sequence[Pass]]:
    """The same passes in every step."""
    return lambda step: passes
