"""The forward passes of one optimizer step, each with an objective of its own, and what their terms remember."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from trainkit.diffusion import Schedule
from trainkit.errors import Problem, UserError
from trainkit.losses.fourier_term import make_fourier
from trainkit.losses.objective import Objective, make_objective

if TYPE_CHECKING:
    from trainkit.files import Json
    from trainkit.options import Compat, FourierOptions, ObjectiveOptions


class Memory(Protocol):
    """What a term remembers from step to step, and has to say of each."""

    def describe(self) -> dict[str, float]:
        """For the log, of the step whose passes are done; every rank asks, once a step, before the update."""

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


@dataclass(frozen=True)
class Passes:
    """The objectives of every step, one for each forward pass; and what terms of them remember, by name.

    of_step  a function of the step alone, so that a resumed run makes the same passes
    """

    of_step: Callable[[int], Sequence[Objective]]
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def describe(self) -> dict[str, float]:
        return {name: value for memory in self.memories.values() for name, value in memory.describe().items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        packed = {name: memory.pack() for name, memory in self.memories.items()}
        tensors = {f"{name}/{key}": tensor for name, (part, _) in packed.items() for key, tensor in part.items()}
        return tensors, {name: data for name, (_, data) in packed.items()}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        if data.keys() != self.memories.keys():
            raise UserError(Problem(
                "the checkpoint remembers other terms of the loss", "--resume_from_checkpoint",
                f"checkpoint: {', '.join(data) or 'none'}; now: {', '.join(self.memories) or 'none'}",
                "repeat the settings of the checkpoint, or give a new --output_dir"))
        for name, memory in self.memories.items():
            part = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
            memory.unpack(part, data[name])


def always(*objectives: Objective) -> Callable[[int], Sequence[Objective]]:
    """The same passes in every step."""
    return lambda step: objectives


def plain_objective(
    o: ObjectiveOptions, fourier: FourierOptions, schedule: Schedule, *, total_steps: int, note: Callable[..., None],
    compat: Compat | None = None,
) -> tuple[Objective, Mapping[str, Memory]]:
    """The ordinary objective that the options ask for, and what terms of it remember, by name.

    total_steps  optimizer steps of the run
    note         puts facts into the run's record
    """
    terms = make_fourier(fourier, o.loss_type, total_steps=total_steps, note=note)
    plain = make_objective(o, schedule, compat, base_loss=fourier.fourier_base_loss)
    return plain.plus(*terms.values()), terms
