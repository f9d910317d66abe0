"""Prompts into conditioning: frozen text encoders are asked once per distinct prompt, then they may go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.condition import UNCONDITIONAL, Condition, equally_long
from trainkit.data.cache import Store, content_key, fill_together, refer
from trainkit.devices import upload
from trainkit.runtime import ranks

if TYPE_CHECKING:

    from trainkit.adapters import Adapters
    from trainkit.families import Family
    from trainkit.files import Json
    from trainkit.optim import ParamGroup
    from trainkit.options import OptimizerOptions

OnProgress = Callable[[str, int, int], None]  # (what, done, total)
PROMPTS_AT_ONCE = 16
ENTRIES = "condition"  # part of the keys; another word when entries would hold other tensors


class FrozenText:
    """Encodes each distinct prompt once; afterwards `text(prompts)` only looks up. Nothing in it trains.

    family    anything with `encode_prompts`, `text_identity` and `device`
    prompts   those to train on
    store     where embeddings are kept (a disk store keeps memory flat); host memory by default
    also      other prompts, those of previews: they must not change a bit of what is trained
    state     what the encoders' answers depend on besides the family: trained weights, their precision
    progress  is told what is being done, for how many prompts it is done, and of how many, where they are many

    Prompts are sorted and encoded in groups that depend on the set of prompts alone, `also` in groups of its own, and a
    group is encoded whole or not at all: matrix products may round differently in batches of other sizes, and a
    restarted run must see the same bits as an uninterrupted one. For the same reason several processes share out whole
    groups. An entry that is there stays as it is, since another run may be reading it. A group has prompts of equally
    many chunks, and UNCONDITIONAL is alone in its group, as it is in the stock pipelines.
    """

    networks: Sequence[Adapters] = ()
    embeddings: Mapping[str, Tensor] = {}

    def __init__(self, family: Family, prompts: Iterable[str], store: Store | None = None, clip_skip: int | None = None,
                 *, also: Iterable[str] = (), state: str = "", progress: OnProgress | None = None):
        self.device, self.clip_skip = family.device, clip_skip
        self.store: Store = {} if store is None else store
        self.keys: dict[str, str] = {}
        self._add(family, prompts, state, progress)
        self._add(family, also, state)

    @torch.no_grad()
    def _add(self, family: Family, prompts: Iterable[str], state: str, progress: OnProgress | None = None) -> None:
        distinct = sorted(set(prompts) - self.keys.keys())
        parts = (family.text_identity, self.clip_skip, *([state] if state else []))
        self.keys |= {prompt: content_key(ENTRIES, *parts, prompt) for prompt in distinct}
        refer(self.store, bytes.fromhex("".join(self.keys[prompt] for prompt in distinct)))
        groups = _groups(distinct, family.chunk_counts(distinct))
        mine = groups[ranks.rank() :: ranks.world()]
        fill_together(self.store, groups, mine, partial(self._encode, family, progress))

    def _encode(self, family: Family, progress: OnProgress | None, groups: Sequence[Sequence[str]]) -> None:
        there = self.store.keys()
        missing = [prompts for prompts in groups if any(self.keys[prompt] not in there for prompt in prompts)]
        done, total = 0, sum(map(len, missing))
        for prompts in missing:
            self._encode_group(family, prompts)
            done += len(prompts)
            if progress and len(missing) > 1:
                progress("encoding captions", done, total)

    def _encode_group(self, family: Family, prompts: Sequence[str]) -> None:
        condition = family.encode_prompts(prompts, self.clip_skip)
        tensors = {name: tensor.cpu() for name, tensor in condition.items()}  # [B,...] each
        for place, prompt in enumerate(prompts):
            if self.keys[prompt] not in self.store:
                self.store[self.keys[prompt]] = {name: tensor[place].clone() for name, tensor in tensors.items()}

    def __call__(self, prompts: Sequence[str], step: int | None = None) -> Condition:
        """What the network is given for each prompt, on the device; the same at every step."""
        unknown = set(prompts) - self.keys.keys()
        assert not unknown, f"not encoded before training: {sorted(unknown)}"
        entries = [self.store[self.keys[prompt]] for prompt in prompts]
        parts = {name: [entry[name] for entry in entries] for name in entries[0]}
        parts["embeds"] = equally_long(parts["embeds"])
        stacked = [torch.stack(tensors) for tensors in parts.values()]
        return Condition(zip(parts, upload(stacked, self.device), strict=True))

    # What a text in training has, see LiveText: here there is none of it.

    def rewrite(self, prompt: str) -> str:
        return prompt

    def groups(self, optimizer: OptimizerOptions, global_batch: int) -> list[ParamGroup]:
        return []

    def after_update(self, done: int) -> None:
        """Nothing follows an update."""

    def export(self, folder: Path, name: str) -> list[Path]:
        return []

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return {}, {}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        """There is no state."""


def _groups(prompts: Sequence[str], chunks: Sequence[int]) -> list[list[str]]:
    """Sorted prompts in groups that are encoded at once, those of fewest chunks first."""
    alike: dict[int, list[str]] = defaultdict(list)
    for prompt, count in zip(prompts, chunks, strict=True):
        alike[0 if prompt == UNCONDITIONAL else count].append(prompt)
    return [part[i : i + PROMPTS_AT_ONCE] for _, part in sorted(alike.items())
            for i in range(0, len(part), PROMPTS_AT_ONCE)]
