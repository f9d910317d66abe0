"""Which layers of a network get an adapter: the right kind, in one of the chosen blocks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from trainkit.adapters import patterns
from trainkit.adapters.patterns import Blocks
from trainkit.errors import Problem
from trainkit.frozen_weights import frozen_weight

if TYPE_CHECKING:
    from trainkit.options import LoraOptions

Targets = Mapping[str, Sequence[str]]  # --lora_layers -> ends of module paths

# Content and style in SDXL. Frenkel et al. 2024, "Implicit Style-Content Separation using B-LoRA", §3.
BLORA_BLOCKS = ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1")


def problems(network: nn.Module, options: LoraOptions, *, targets: Targets, in_blocks: bool = True,
             blocks: Blocks | None = None) -> list[Problem]:
    """What this network has not got: blocks that were named, layers as wide as --rank asks; it may be on meta.

    in_blocks  whether --lora_unet_blocks and --use_blora speak of this network
    blocks     how WebUIs number its blocks, for patterns
    """
    paths = list(layer_paths(network, targets[options.lora_layers]))
    assert paths, f"no layer of this network ends in {targets[options.lora_layers]}"
    chosen = chosen_blocks(options) if in_blocks else []
    if in_blocks and options.lora_unet_blocks is not None and not chosen:
        return [Problem("no block is named", f"--lora_unet_blocks {options.lora_unet_blocks!r}",
                        "the value holds nothing but commas and spaces",
                        "name blocks, such as unet.up_blocks.0, or leave the flag out to adapt all of them")]
    missing = [block for block in chosen if not any(inside(path, block) for path in paths)]
    if missing and options.use_blora:
        return [Problem("B-LoRA needs SDXL's content and style blocks", "--use_blora",
                        f"this UNet has no layer to adapt in {', '.join(missing)}",
                        "name an SDXL model, or choose blocks with --lora_unet_blocks")]
    found = [unknown_block(block, network) for block in missing]
    paths = target_modules(network, options, targets=targets, in_blocks=in_blocks)
    if in_blocks and not found:
        found = [*patterns.problems(options, paths, blocks or {})]
    if options.init_lora_weights == "gaussian" or found:
        return found
    return convolutions(network, options, paths) or narrow_layers(network, options, paths, blocks or {})


def convolutions(network: nn.Module, options: LoraOptions, paths: Iterable[str]) -> list[Problem]:
    """PiSSA and OLoRA decompose a matrix; SD 1.x has 1×1 convolutions where other UNets have linear layers."""
    found = [path for path in paths if isinstance(network.get_submodule(path), nn.Conv2d)]
    return [Problem(f"--init_lora_weights {options.init_lora_weights} with convolutions",
                    f"--lora_layers {options.lora_layers}",
                    f"PiSSA and OLoRA decompose a matrix, and {found[0]} is a convolution in this UNet",
                    "--lora_layers attention+ff")] if found else []


def narrow_layers(network: nn.Module, options: LoraOptions, paths: Iterable[str], blocks: Blocks) -> list[Problem]:
    """PiSSA and OLoRA start from r directions of each weight, which has no more of them than its smaller side."""
    sides = {path: min(frozen_weight(network.get_submodule(path)).shape) for path in paths}
    ranks = {path: rank for path, (rank, _) in patterns.sizes(options, sides, "unet", blocks).items()}
    narrowest = min(sides, key=lambda path: sides[path] - ranks[path], default="")
    if not sides or sides[narrowest] >= ranks[narrowest]:
        return []
    rank = ranks[narrowest]
    flag = "--rank" if rank == options.rank else "--lora_rank_pattern with"
    return [Problem(f"{flag} {rank} is more than {narrowest} has directions", f"{flag}, --init_lora_weights",
                    f"{options.init_lora_weights} starts from the {rank} main directions of every weight",
                    f"{flag} {sides[narrowest]} at most, or --init_lora_weights gaussian")]


def target_modules(network: nn.Module, options: LoraOptions, *, targets: Targets, in_blocks: bool = True) -> list[str]:
    """Full paths of the layers that get adapters."""
    chosen = chosen_blocks(options) if in_blocks else []
    return [path for path in layer_paths(network, targets[options.lora_layers])
            if not chosen or any(inside(path, block) for block in chosen)]


def layer_paths(network: nn.Module, ends: Iterable[str]) -> Iterator[str]:
    dotted = tuple(f".{end}" for end in ends)
    return (path for path, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and path.endswith(dotted))


def chosen_blocks(options: LoraOptions) -> list[str]:
    """B-LoRA's two, or --lora_unet_blocks as module paths; a leading "unet." is allowed, as in published commands."""
    if options.use_blora:
        return list(BLORA_BLOCKS)
    listed = (options.lora_unet_blocks or "").split(",")
    return [block.strip().removeprefix("unet.") for block in listed if block.strip()]


def inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def unknown_block(block: str, unet: nn.Module) -> Problem:
    known = [path for path, m in unet.named_modules() if path.count(".") in (1, 3) and "attentions" in path]
    near = difflib.get_close_matches(block, known, n=3, cutoff=0.0)
    return Problem(
        f"no layer to adapt in the block {block!r}", "--lora_unet_blocks",
        "entries are exact module paths of the UNet, cut at any dot; --lora_layers picks within them",
        f"the nearest blocks are {', '.join('unet.' + path for path in near)}")
