"""What a network is given besides the noised latents and their level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNCONDITIONAL = "\0"  # instead of a prompt: what the base model is given without one; no caption has this character


def equally_long(embeds: Sequence[Tensor]) -> list[Tensor]:
    """Encoded prompts [...,T,D] of different T, each repeated until all are as long as their least common multiple.

    What attention reads of a text is the same when all of it is there twice: every weight is halved, and there are two
    of each. ComfyUI repeats prompts for the same reason (comfy/conds.py).
    """
    length = math.lcm(*(one.shape[-2] for one in embeds))
    return [one if one.shape[-2] == length else torch.cat([one] * (length // one.shape[-2]), dim=-2) for one in embeds]


class Condition(dict[str, Tensor]):
    """Named tensors [B,...] of one batch, such as encoded prompts and image sizes; never changed in place.

        embeds    [B,T,D]  encoded prompts, in the weight dtype; T is 77, or a multiple of it with long prompts
        pooled    [B,P]    one vector a prompt, where the network takes one (SDXL)
        time_ids  [B,6]    original height, width · crop top, left · target height, width, in pixels (SDXL)

    A network reads the names it knows and ignores the others. `Condition(other, name=tensor)` is another one with more.
    """

    def take(self, index: Tensor) -> Condition:
        """The entries that `index` [N] names, in its order. By indexing: its backward adds repeats in a fixed order."""
        return Condition({name: tensor[index] for name, tensor in self.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Conditions of the same names behind one another, their prompts made equally long."""
        tensors = {name: [part[name] for part in parts] for name in parts[0]}
        return Condition({name: torch.cat(equally_long(some) if name == "embeds" else some)
                          for name, some in tensors.items()})
