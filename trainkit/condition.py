"""What a network is given besides the noised latents and their level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Condition(dict[str, Tensor]):
    """Named tensors [B,...] of one batch, such as encoded prompts and image sizes; never changed in place.

        embeds    [B,T,D]  encoded prompts, in the weight dtype
        pooled    [B,P]    one vector a prompt, where the network takes one (SDXL)
        time_ids  [B,6]    original height, width · crop top, left · target height, width, in pixels (SDXL)

    A network reads the names it knows and ignores the others. `Condition(other, name=tensor)` is another one with more.
    """

    def take(self, index: Tensor) -> Condition:
        """The entries that `index` [N] names, in its order. By indexing: its backward adds repeats in a fixed order."""
        return Condition({name: tensor[index] for name, tensor in self.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Conditions of the same names behind one another."""
        return Condition({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
