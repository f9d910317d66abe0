"""Randomness is a function: every draw depends on (seed, a name, where it is used) and on nothing else.

No generator lives from one step to the next, so a resumed run, a run on more processes and an uninterrupted run draw
the same numbers. Draws are made on the CPU in fp32 and moved, so every device sees the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for `key`; keys that differ anywhere give unrelated seeds of 63 bits (BLAKE2b)."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_of(*key: int | str) -> int:
    """The seed of a key's generator."""
    return generator(*key).initial_seed()


def uniform(keys: Sequence[Key], name: str) -> Tensor:
    """One number in [0, 1) per key -> [B]."""
    return torch.stack([torch.rand((), generator=generator(name, *key)) for key in keys])


def normal(shape: Sequence[int], keys: Sequence[Key], name: str) -> Tensor:
    """A standard normal sample of `shape` per key -> [B, *shape]."""
    return torch.stack([torch.randn(*shape, generator=generator(name, *key)) for key in keys])


def integer(n: int, *key: int | str) -> int:
    """A number in 0..n-1 for `key`."""
    return int(torch.randint(n, (), generator=generator(*key)))


def permutation(n: int, *key: int | str) -> Tensor:
    """A permutation of 0..n-1 for `key` -> [n]."""
    return torch.randperm(n, generator=generator("permutation", *key))


def reseed_dropout(*key: int | str) -> None:
    """Pin the global generators before a forward pass: dropout is the one consumer we cannot hand a generator."""
    torch.manual_seed(generator("dropout", *key).initial_seed())
