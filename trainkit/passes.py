"""What a micro-batch is put through in one optimizer step: the forward passes, each with its noise levels and loss."""

from __future__ import annotations

from collections.abc import Sequence
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


class Passes(Protocol):
    """The passes of a step, a function of the step alone, and what they remember from step to step."""

    def __call__(self, step: int) -> Sequence[Pass]: ...

    def describe(self) -> dict[str, float]: ...

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


@dataclass(frozen=True)
class Plain:
    """One pass a step, nothing to remember."""

    one: Pass

    def __call__(self, step: int) -> Sequence[Pass]:
        return (self.one,)

    def describe(self) -> dict[str, float]:
        """Nothing beyond what every run logs."""
        return {}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return {}, {}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        """There is no state."""
