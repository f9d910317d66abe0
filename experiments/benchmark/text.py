"""What a step of pivotal tuning costs in SDXL's text encoders at their real widths, without the UNet.

    .venv/bin/python experiments/benchmark/text.py [ROUNDS] [adamw|prodigy]

Random weights, one prompt of 77 tokens, two new tokens, fp32, one thread. Three ways in turn, medians of CPU seconds
and the tensors each keeps for training, as one line of JSON:

    bare   forward and backward, the gradient ending at the looked-up embeddings: the least any way can cost
    ours   rows of their own beside frozen tables (trainkit.conditioning.new_tokens), update and pull of their std
    table  both tables train whole, their gradients are clipped, and after the update the vocabulary is written back
           from a copy in host memory, as the Diffusers script does; with PyTorch's default AdamW, as there
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.benchmark import sdxl
from experiments.benchmark.sdxl import VOCABULARY
from trainkit.conditioning.new_tokens import TokenRows

TOKENS, NEW = 77, 2
ROUNDS = 3
PULL, MAX_NORM = 0.1, 1.0


def encoders() -> list[PreTrainedModel]:
    return [encoder.requires_grad_(False) for encoder in sdxl.text_encoders(eos_token_id=VOCABULARY - 1)]


def prompt() -> Tensor:
    """BOS, twenty words, two new tokens, EOS and padding -> ids [1,T]"""
    words = torch.randint(0, VOCABULARY - 2, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [VOCABULARY - 2, *words, *range(VOCABULARY, VOCABULARY + NEW)]
    return torch.tensor([ids + [VOCABULARY - 1] * (TOKENS - len(ids))])


def passes(models: Sequence[PreTrainedModel], ids: Tensor) -> None:
    """Forward and backward through what SDXL conditions on."""
    outs = [model(ids, output_hidden_states=True) for model in models]
    embeds = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    (embeds.square().mean() + outs[-1].text_embeds.square().mean()).backward()


class Leaf(nn.Module):
    """A frozen table whose answers are where the gradient ends."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids.clamp(max=VOCABULARY - 1)).requires_grad_()


@dataclass(frozen=True)
class Way:
    """What stands for the token embeddings, what trains of it, and copies that are kept beside it."""

    embeddings: list[nn.Module]
    params: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    after: Callable[[], None] = lambda: None


def bare(tables: Sequence[nn.Embedding]) -> Way:
    return Way([Leaf(table) for table in tables])


def ours(tables: Sequence[nn.Embedding]) -> Way:
    parts = [TokenRows(table, table.weight[:NEW].clone(), first=VOCABULARY) for table in tables]
    rows, stds = [part.rows for part in parts], [float(table.weight.std()) for table in tables]

    def after() -> None:
        for row, std in zip(rows, stds, strict=True):
            row.mul_((std / row.std()) ** PULL)

    return Way(parts, rows, after=after)


def table(tables: Sequence[nn.Embedding]) -> Way:
    longer = [nn.Embedding.from_pretrained(torch.cat([t.weight, t.weight[:NEW]]), freeze=False) for t in tables]
    weights, copies = [t.weight for t in longer], [t.weight.detach().clone() for t in longer]
    stds = [float(copy.std()) for copy in copies]

    def after() -> None:
        for weight, copy, std in zip(weights, copies, stds, strict=True):
            known = torch.arange(len(weight)) < VOCABULARY
            weight[known] = copy[known]
            weight[~known] *= (std / weight[~known].std()) ** PULL

    return Way(longer, weights, copies, after)


def optimizer_of(way: Way, name: str) -> torch.optim.Optimizer | None:
    if not way.params:
        return None
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(way.params, lr=1.0, safeguard_warmup=True, use_bias_correction=True)
    return torch.optim.AdamW(way.params, lr=1e-3, fused=None if way.copies else True)


def measure(models: Sequence[PreTrainedModel], way: Way, ids: Tensor, name: str) -> tuple[float, int]:
    """-> CPU seconds of the second step, and bytes of what is trained, its gradients, optimizer state and copies."""
    for model, embedding in zip(models, way.embeddings, strict=True):
        model.set_input_embeddings(embedding)
    optimizer = optimizer_of(way, name)
    for _ in range(2):  # the first puts optimizer state and allocator in place
        start = time.process_time()
        passes(models, ids)
        if optimizer is not None:
            update(way, optimizer)
        seconds = time.process_time() - start
    state = [] if optimizer is None else [t for values in optimizer.state.values() for t in values.values()
                                        if isinstance(t, Tensor)]
    return seconds, sum(t.numel() * t.element_size() for t in [*way.params, *way.params, *state, *way.copies])


@torch.no_grad()
def update(way: Way, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(way.params, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    way.after()


def main() -> None:
    torch.set_num_threads(1)
    models, ids = encoders(), prompt()
    tables = [model.get_input_embeddings() for model in models]
    taken: dict[str, list[tuple[float, int]]] = {}
    rounds, name = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS, sys.argv[2] if len(sys.argv) > 2 else "adamw"
    for _ in range(rounds):
        for make in (bare, ours, table):
            taken.setdefault(make.__name__, []).append(measure(models, make(tables), ids, name))
    print(json.dumps({name: {"seconds": round(statistics.median(s for s, _ in some), 3),
                             "MiB": round(some[0][1] / 2**20, 2)} for name, some in taken.items()}))


if __name__ == "__main__":
    main()
