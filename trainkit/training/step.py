"""One optimizer step, the same for every trainer: forward passes to losses, and what is due after the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from trainkit import rng
from trainkit.condition import Condition
from trainkit.devices import upload
from trainkit.training.doubt import Doubt

if TYPE_CHECKING:
    from trainkit.data.batch import Batch
    from trainkit.diffusion import Noise
    from trainkit.families import Family
    from trainkit.losses.objective import Objective
    from trainkit.losses.passes import Passes


class PromptConditioner(Protocol):
    """Prompts to what the network is given for them: cached, or from encoders in training (trainkit.conditioning)."""

    def __call__(self, prompts: Sequence[str], step: int | None = None) -> Condition: ...


@dataclass(frozen=True)
class TrainStep:
    """The forward passes of one optimizer step: noise to a drawn level, ask the network, weigh the error.

    autocast  the context that the network runs in
    adds      what images add to the condition of their prompts, each (condition, batch) -> condition
    """

    family: Family
    text: PromptConditioner
    noise: Noise
    passes: Passes
    autocast: Callable[[], AbstractContextManager[object]]
    adds: tuple[Callable[[Condition, Batch], Condition], ...] = ()

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """-> the part of the step's loss that each pass of each micro-batch has; its graph may go before the next."""
        for batch in batches:
            batch = batch.to(self.family.device)
            x0 = self.family.sample_latents(batch)  # [B,C,h,w]
            for objective in self.passes.of_step(batch.step):
                yield self.losses(objective, batch, x0).sum() / batch.num_instance

    @cached_property
    def watches(self) -> tuple[Doubt, ...]:
        """What looks at the network's predictions: only where the base model does not say what it predicts."""
        return (Doubt(self.family),) if self.family.doubted else ()

    def losses(self, objective: Objective, batch: Batch, x0: Tensor, *, observe: bool = True) -> Tensor:
        """-> losses [B] of one pass. Every draw is a function of (seed, step, slot in the global batch).

        observe  whether terms may remember of the pass what they keep from step to step; not in validation
        """
        pred, device = objective.pred, x0.device
        keys = [(*key, objective.name) for key in batch.keys] if objective.name else batch.keys
        rng.reseed_dropout(*keys[0])

        # Noised latents at a level for each sample, or at one for all. Draws are made on the CPU and moved.
        if objective.shared:
            u = rng.uniform([keys[0][:2]], "shared timestep").expand(len(keys))
        else:
            u = rng.uniform(keys, "timestep")
        level = objective.levels(u, (x0.shape[-2], x0.shape[-1])).to(device)
        n, added = upload(self.noise(x0.shape[1:], keys), device)  # [B,C,h,w] each
        z = pred.add_noise(x0, added, level)

        # What the network is given: the prompts, the sizes, and what images add.
        condition = Condition(self.text(batch.prompts, batch.step), time_ids=batch.time_ids)
        for add in self.adds:
            condition = add(condition, batch)

        with self.autocast():
            out = self.family.denoise(pred.model_input(z, level), level, condition)
        for watch in self.watches:
            watch(batch.step, out, x0=x0, n=n, level=level)
        return objective(out, x0=x0, z=z, n=n, level=level, batch=batch, condition=condition, observe=observe)
