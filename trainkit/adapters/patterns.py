"""Ranks, alphas, learning rates and strengths of single layers: what --lora_rank_pattern and its like say.

    mid_block=16 attn2=8 IN04=4        KEY=VALUE, apart by spaces or commas; the first key that fits a layer counts

A key is a regular expression for one or more whole parts of a module's path, as in PEFT's rank_pattern, or for blocks
as WebUIs number them: IN04, MID, OUT0[0-3]. Keys that begin with text_encoder. or text_encoder_2. speak of that
encoder, and all others of the UNet. text_encoder alone is the whole encoder.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from trainkit.errors import Problem

if TYPE_CHECKING:
    from trainkit.options import LoraOptions

Pattern = Mapping[str, float]  # key -> value
Blocks = Mapping[str, str]  # a block of the UNet, down_blocks.1.attentions.0 -> as WebUIs number it, IN04
FLAGS = ("lora_rank_pattern", "lora_alpha_pattern", "lora_lr_pattern")
STRENGTHS = "lora_block_weights"  # of generate
NETWORKS = ("text_encoder", "text_encoder_2")  # that keys can name


def read(text: str | None, prefix: str) -> Pattern:
    """The entries for one network, its name taken off their keys; `problems` has found no fault in them."""
    entries = (entry.rpartition("=") for entry in (text or "").replace(",", " ").split())
    return {".*" if key == prefix else key.removeprefix(f"{prefix}."): float(value) for key, _, value in entries
            if network_of(key) == prefix}


def network_of(key: str) -> str:
    head = key.partition(".")[0]
    return head if head in NETWORKS else "unet"


def key_for(path: str, pattern: Pattern, blocks: Blocks) -> str | None:
    """The first key that fits the module at `path`."""
    return next((key for key in pattern if fits(key, path, blocks)), None)


def fits(key: str, path: str, blocks: Blocks) -> bool:
    if re.fullmatch(rf"(.*\.)?(?:{key})(\..*)?", path):
        return True
    return any(re.fullmatch(key, name) and path.startswith(f"{block}.") for block, name in blocks.items())


def sizes(options: LoraOptions, paths: Iterable[str], prefix: str, blocks: Blocks) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the layers at `paths`. An alpha that nobody gives is the rank, so that the scale is 1."""
    ranks, alphas = read(options.lora_rank_pattern, prefix), read(options.lora_alpha_pattern, prefix)
    found = {}
    for path in paths:
        key, alpha_key = key_for(path, ranks, blocks), key_for(path, alphas, blocks)
        rank = options.rank if key is None else int(ranks[key])
        alpha = float(rank) if options.lora_alpha is None else options.lora_alpha
        found[path] = rank, alpha if alpha_key is None else alphas[alpha_key]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Before loading


def problems(options: LoraOptions, paths: Iterable[str], blocks: Blocks) -> Iterator[Problem]:
    """Entries that cannot be read, and keys that fit none of the UNet's adapted layers at `paths`."""
    paths = list(paths)
    for name in FLAGS:
        text = getattr(options, name)
        if text is None:
            continue
        if bad := first_fault(name, text):
            yield bad
            continue
        yield from (unknown(name, key, paths, blocks) for key in read(text, "unet")
                    if not any(fits(key, path, blocks) for path in paths))


def strength_problems(text: str, layers: Collection[tuple[str, str]], blocks: Blocks, lora: str) -> Iterator[Problem]:
    """What is wrong with the strengths of blocks of a LoRA.

    layers  of the LoRA: network and path
    lora    its name
    """
    if bad := first_fault(STRENGTHS, text):
        yield bad
        return
    for network in ("unet", *NETWORKS):
        paths = [path for place, path in layers if place == network]
        for key in read(text, network):
            if not any(fits(key, path, blocks if network == "unet" else {}) for path in paths):
                asked = key if network == "unet" else network if key == ".*" else f"{network}.{key}"
                yield Problem(f"no layer of {lora} fits {asked!r}", f"--{STRENGTHS} {text!r}",
                              "a key is a block such as IN04, MID or text_encoder, or parts of a module's path",
                              f"its blocks are {', '.join(blocks_of(layers, blocks))}")


def blocks_of(layers: Iterable[tuple[str, str]], blocks: Blocks) -> list[str]:
    """What the blocks are called that layers lie in, IN, MID, OUT and the text encoders."""
    found = {path if network == "unet" else network: None for network, path in sorted(layers)}
    named = [name for block, name in blocks.items() if any(path.startswith(f"{block}.") for path in found)]
    return [*sorted(set(named)), *(network for network in NETWORKS if network in found)]


def first_fault(name: str, text: str) -> Problem | None:
    """What is wrong with the first bad entry as it is written."""
    entries = text.replace(",", " ").split()
    return next((found for entry in entries if (found := fault(name, entry))), None) if entries else nothing(name)


def nothing(name: str) -> Problem:
    return Problem(f"--{name} names no layer", f"--{name} ''", "the value holds nothing but commas and spaces",
                   f"--{name} mid_block={EXAMPLES[name]}, for example")


def fault(name: str, entry: str) -> Problem | None:
    """What is wrong with one entry as it is written."""
    key, _, value = entry.rpartition("=")
    where, example = f"--{name} {entry}", f"--{name} mid_block={EXAMPLES[name]}, for example"
    if not key:
        return Problem(f"--{name} cannot read {entry!r}", where, "entries are KEY=VALUE, apart by spaces", example)
    try:
        re.compile(key)
    except re.error as error:
        return Problem(f"{key!r} is no regular expression", where, str(error), "a part of a path, such as attn2")
    kind, least, most, why = VALUES.get(name, ABOVE_0)
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    return None if least <= number <= most else Problem(f"--{name} cannot be {value!r}", where, why, example)


EXAMPLES = {"lora_rank_pattern": "16", "lora_alpha_pattern": "8", "lora_lr_pattern": "0.5", STRENGTHS: "0.5"}
ABOVE_0: tuple[type, float, float, str] = (float, math.ulp(0), 1e6, "the value is a number above 0")
VALUES: dict[str, tuple[type, float, float, str]] = {  # type, least, most
    "lora_rank_pattern": (int, 1, 4096, "a rank is a whole number from 1 to 4096"),
    STRENGTHS: (float, -1e6, 1e6, "the value is a number"),
}


def unknown(name: str, key: str, paths: list[str], blocks: Blocks) -> Problem:
    parts = {part for path in paths for part in (path, *path.split("."), *blocks.values()) if not part.isdecimal()}
    near = difflib.get_close_matches(key, parts, n=3, cutoff=0.0)
    return Problem(f"no adapted layer of the UNet fits {key!r}", f"--{name}",
                   "a key is a regular expression for whole parts of a module's path, or a block such as IN04",
                   f"the nearest are {', '.join(near)}")
