"""What keeps a LoRA file from being used on a base model, read from its header before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainkit.errors import Problem, UserError, shell_word
from trainkit.lora_file import CROSS, WIDTHS, Header, read_header
from trainkit.lora_file import parts as module_parts
from trainkit.lora_file.contents import group, stated_family, unread

TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
TEXT_SIDES = ("down", "hada_w1_b")  # factors as wide as a module's input
HALVES = {"lora_A": "lora_B", "lora_B": "lora_A", "down": "up", "up": "down"}  # what is left and right of a product
ANOTHER_BASE = "name the base model it was trained on with --base"


def problems(file: Path, unet: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps a file from being used as it was trained, on a base with this UNet's config."""
    where = f"--lora {file}"
    try:
        header = read_header(file, where)
    except UserError as error:
        yield from error.problems
        return
    if header.shapes and all(module_parts.is_embedding(name) for name in header.shapes):
        yield Problem("no LoRA in this file", where, "it holds embeddings of new tokens",
                      f"--embeddings {shell_word(file)}", "data")
        return
    placed, unknown = group({n: s for n, s in header.shapes.items() if not module_parts.is_embedding(n)}, unet)
    if not placed:
        kind = next(filter(None, map(module_parts.described, unknown)), "")
        first = next(iter(header.shapes), "no tensor at all")
        yield Problem("no LoRA in this file", where, f"none of its {len(header.shapes)} tensors is a known LoRA's"
                      f"{f' (it is {kind})' if kind else ''}: {first}", "name the LoRA file, or the folder of its run",
                      "data")
    elif unknown:
        yield from unread(file, where, unknown).problems
    elif why := other_base(header, placed, unet):
        yield Problem("the LoRA does not fit the base model", where, why, ANOTHER_BASE, "data")
    elif torn := missing_half(header):
        yield Problem("the LoRA file is damaged", where, f"each layer has two matrices, and {torn} is missing",
                      "copy or export it again", "data")


def missing_half(header: Header) -> str | None:
    """The tensor of the two of a LoRA layer that is not there, the first of them."""
    for name in header.shapes:
        found, start = module_parts.split(name), name.rfind("lora")
        if found and found[1] in ("down", "up"):
            other = name[:start] + re.sub("|".join(HALVES), lambda half: HALVES[half[0]], name[start:])
            if other not in header.shapes:
                return other
    return None


def other_base(header: Header, placed: Mapping[tuple[str, str], Mapping[str, tuple[int, ...]]], unet: Mapping[str, Any]
               ) -> str:
    """Why the LoRA cannot be one of this base's; "" where nothing speaks against it."""
    asked = unet.get("cross_attention_dim")
    asked = asked[0] if isinstance(asked, list) and asked else asked
    widths = {shape[1] for (_, path), parts in placed.items() if CROSS.search(path)
              for part, shape in parts.items() if part in TEXT_SIDES and len(shape) > 1}
    if isinstance(asked, int) and widths and widths != {asked}:
        return f"it is for text {described(min(widths))}, and the base model's text is {described(asked)}"
    is_xl = unet.get("addition_embed_type") == "text_time"
    family = stated_family(header.metadata, {network for network, _ in placed})
    said = header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version") or ""
    shown = f" ({said})" if said else ""
    if family == "sdxl" and not is_xl:
        return f"it was trained on SDXL{shown}, and the base model is SD 1.x or 2.x"
    if family in ("sd1", "sd2") and is_xl:
        return f"it was trained on SD 1.x or 2.x{shown}, and the base model is SDXL"
    return ""


def described(width: int) -> str:
    return f"{width} wide" + (f" ({TEXT_WIDTHS[width]})" if width in WIDTHS else "")
