"""What the header of a LoRA file tells before it is loaded: which kind it is, and for which base models.

Diffusers passes over tensors that it does not know, so that an image would be generated with a part of the LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.errors import Problem, shell_word

A_NAME = re.compile(  # of a LoRA's matrix A, or down
    r"(.+?)\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down|[\w.]*_lora\.down)\.weight")
UNREAD = {  # ends of names that Diffusers drops or stumbles over -> what the file is
    r"\.dora_scale$": "a DoRA for WebUIs, whose magnitudes (dora_scale) Diffusers drops",
    r"\.hada_": "a LoHa in the layout of WebUIs, which Diffusers does not read",
    r"\.lokr_": "a LoKr in the layout of WebUIs, which Diffusers does not read",
    r"\.(oft|boft)_|\.oft_": "an OFT, which Diffusers does not read",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a LyCORIS file with whole weights (diff), which Diffusers drops",
    r"\.lora_mid\.weight$": "a LoCon of three factors (lora_mid), which Diffusers does not read",
    r"\.(a1|a2|b1|b2)\.weight$": "a GLoRA, which Diffusers does not read",
    r"^bundle_emb\.": "a LoRA with embeddings in it (bundle_emb), which Diffusers drops",
    r"^(lora_)?transformer[._]|double_blocks|joint_blocks": "for a transformer, such as Flux or SD 3",
}
TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
CROSS = re.compile(r"attn2[._](?:processor[._])?to_[kv]")  # layers as wide as the text
ANOTHER_BASE = "name the base model it was trained on with --base"


@dataclass(frozen=True)
class Header:
    """Names and shapes of a file's tensors, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def other_half(self, name: str) -> str | None:
        """The matrix B of the matrix A called `name` if it is missing; None for all other tensors."""
        other = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up").replace("lora.down", "lora.up")
        return other if A_NAME.fullmatch(name) and other != name and other not in self.shapes else None


def read(file: Path) -> Header:
    """Raises OSError or SafetensorError: the header cannot be read, or the end of the file is missing."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return Header({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()},  # noqa: SIM118
                      opened.metadata() or {})


def layers(file: Path) -> set[str]:
    """Names of the modules that the LoRA changes, as the file has them."""
    return {found[1] for name in read(file).shapes if (found := A_NAME.fullmatch(name))}


def problems(file: Path, unet: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps a file from being used as it was trained, on a base with this UNet's config."""
    from safetensors import SafetensorError

    where = f"--lora {file}"
    try:
        header = read(file)
    except (OSError, SafetensorError) as error:
        yield Problem("the LoRA file is damaged", where, f"{error}", "copy or export it again", "data")
        return
    for pattern, kind in UNREAD.items():
        name = next((name for name in header.shapes if re.search(pattern, name)), None)
        if name:
            yield Problem("the LoRA cannot be used as it was trained", where, f"it is {kind}: {name}",
                          beside(file), "data")
            return
    if "clip_l" in header.shapes or "clip_g" in header.shapes:
        yield Problem("no LoRA in this file", where, "it holds embeddings of new tokens",
                      f"--embeddings {shell_word(file)}", "data")
    elif not any(map(A_NAME.fullmatch, header.shapes)):
        first = next(iter(header.shapes), "no tensor at all")
        yield Problem("no LoRA in this file", where, f"none of its {len(header.shapes)} tensors is a LoRA's: {first}",
                      "name the LoRA file, or the folder of its run", "data")
    elif why := other_base(header, unet):
        yield Problem("the LoRA does not fit the base model", where, why, ANOTHER_BASE, "data")
    elif torn := next(filter(None, map(header.other_half, header.shapes)), None):
        yield Problem("the LoRA file is damaged", where, f"each layer has two matrices, and {torn} is missing",
                      "copy or export it again", "data")


def beside(file: Path) -> str:
    """The file to take instead: a run writes one for Diffusers beside the one for WebUIs."""
    from trainkit.runtime.weight_files import DIFFUSERS_FILE

    other = file.with_name(DIFFUSERS_FILE)
    if other != file and other.is_file():
        return f"--lora {shell_word(other)}, the same LoRA for Diffusers"
    return f"take the {DIFFUSERS_FILE} of the run that made it, or use ComfyUI or Forge"


def other_base(header: Header, unet: Mapping[str, Any]) -> str:
    """Why the LoRA cannot be one of this base's; "" where nothing speaks against it."""
    asked = unet.get("cross_attention_dim")
    asked = asked[0] if isinstance(asked, list) and asked else asked
    widths = {shape[1] for name, shape in header.shapes.items()
              if len(shape) > 1 and A_NAME.fullmatch(name) and CROSS.search(name)}
    if isinstance(asked, int) and widths and widths != {asked}:
        return f"it is for text {described(min(widths))}, and the base model's text is {described(asked)}"
    is_xl = unet.get("addition_embed_type") == "text_time"
    of_xl = any(name.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for name in header.shapes)
    stated = header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version") or ""
    of_xl = of_xl or "xl" in stated.lower()
    if of_xl and not is_xl:
        return f"it was trained on SDXL{f' ({stated})' if stated else ''}, and the base model is SD 1.x or 2.x"
    if is_xl and stated.lower().startswith(("stable-diffusion-v", "sd_v1", "sd_v2", "sd_1", "sd_2")):
        return f"it was trained on SD 1.x or 2.x ({stated}), and the base model is SDXL"
    return ""


def described(width: int) -> str:
    return f"{width} wide" + (f" ({TEXT_WIDTHS[width]})" if width in TEXT_WIDTHS else "")
