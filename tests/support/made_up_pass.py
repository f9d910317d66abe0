"""Forward passes without a model: the trainers' step around a network of one line, and what objectives make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainkit import rng
from trainkit.condition import Condition
from trainkit.data.batch import Batch
from trainkit.diffusion import Level, Noise, draw_noise
from trainkit.losses.objective import Forward, Objective
from trainkit.losses.passes import Passes, always
from trainkit.training.step import TrainStep

KEYS = [(7, 3, slot) for slot in range(6)]
SHAPE = (4, 8, 8)


def batch_of(keys: Sequence[rng.Key] = KEYS, **changes: object) -> Batch:
    """Instances that count 1 each; some have the same caption, some are the same image."""
    count = len(keys)
    values = dict(
        step=0, keys=tuple(keys), rows=tuple(range(count)), prompts=repeated("abaabc", count),
        images=repeated("123156", count), time_ids=torch.zeros(count, 6), loss_weight=torch.ones(count),
        is_class=torch.zeros(count) > 0, num_instance=1)
    return Batch(**{**values, **changes})


def repeated(names: str, count: int) -> tuple[str, ...]:
    return tuple(names[i % len(names)] for i in range(count))


class Network(nn.Module):
    """Stands for a model family. What it is asked is kept; it answers 0 until its one layer is trained."""

    device, doubted = torch.device("cpu"), False

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)
        self.asked: list[tuple[Tensor, Level, Condition]] = []

    def sample_latents(self, batch: Batch) -> Tensor:
        return batch.mean

    def denoise(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        self.asked.append((z, level, condition))
        return self.layer(z)


def step_of(network: Network, *, passes: Passes | None = None, noise: Noise = draw_noise,
            text: Callable[..., Condition] | None = None) -> TrainStep:
    """The trainers' step around the network, with no autocast and nothing beside the text."""
    return TrainStep(network, text or told, noise, passes or Passes(always()), nullcontext)


def told(prompts: Sequence[str], step: int | None = None) -> Condition:
    """Made-up embeddings [B,5,3], the same for the same prompt."""
    return Condition(embeds=rng.normal((5, 3), [(prompt,) for prompt in prompts], "text"))


def forward_of(objective: Objective, keys: Sequence[rng.Key] = KEYS) -> Forward:
    """The pass of random latents and noise that a network answers with 0, at the objective's levels.

    As the terms of an objective are told of it; its own are not asked.
    """
    g = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(len(keys), *SHAPE, generator=g) for _ in range(2))
    step = step_of(Network(), noise=lambda shape, keys: (n, n))
    kept: list[Forward] = []
    with torch.no_grad():
        step.losses(replace(objective, terms=(keeping(kept),)), batch_of(keys), x0)
    return kept[0]


def keeping(kept: list[Forward]):
    """A term that adds 0, and keeps what it is told."""
    def term(forward: Forward, *, observe: bool) -> Tensor:
        kept.append(forward)
        return torch.zeros_like(forward.losses)

    return term


def losses_of(objective: Objective, forward: Forward) -> Tensor:
    """Losses [B] of that pass under the objective."""
    return objective(forward.out, x0=forward.x0, z=forward.z, n=forward.n, level=forward.level, batch=forward.batch,
                     condition=forward.condition)


def judged(objective: Objective, forward: Forward) -> Forward:
    """That pass as terms of the objective are told of it, which are not asked."""
    kept: list[Forward] = []
    losses_of(replace(objective, terms=(keeping(kept),)), forward)
    return kept[0]
