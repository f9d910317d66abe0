"""SDXL LoRAs of a few modules in three layouts, and the ΔW that a file means, both without trainkit's reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.loaders import product, scale_of

STEMS = {  # module -> kohya's name, Diffusers' name
    "to_k": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
             "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
    "conv": ("lora_unet_output_blocks_1_0_in_layers_2", "unet.up_blocks.0.resnets.1.conv1"),
    "text": ("lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
             "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj"),
}
SHAPES = {"to_k": (24, 2048), "conv": (12, 8, 3, 3), "text": (16, 16)}
LAYOUTS = ("kohya", "diffusers", "lycoris")


def write_lora(path: Path, layout: str, *, seed: int = 0, rank: int = 3, alpha: float = 1.5,
               modules: tuple[str, ...] = ("to_k", "conv", "text"), kind: str = "lora") -> Path:
    """kind: lora, loha or lokr, where the layout is lycoris."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        out, width, *kernel = SHAPES[module]
        kohya, diffusers = STEMS[module]
        inner, ones = width * (9 if kernel else 1), [1] * len(kernel)
        A, B = torch.randn(rank, inner, generator=g) / 8, torch.randn(out, rank, generator=g)
        if layout == "diffusers":  # the scale is alpha / rank in no tensor: it is in B
            tensors[f"{diffusers}.lora_A.weight"] = A.view(rank, width, *kernel)
            tensors[f"{diffusers}.lora_B.weight"] = (B * alpha / rank).view(out, rank, *ones)
            continue
        if kind == "lora":
            tensors[f"{kohya}.lora_down.weight"] = A.view(rank, width, *kernel)
            tensors[f"{kohya}.lora_up.weight"] = B.view(out, rank, *ones)
        elif kind == "loha":
            tensors |= {f"{kohya}.hada_w1_a": B, f"{kohya}.hada_w1_b": A,
                        f"{kohya}.hada_w2_a": torch.randn(out, rank, generator=g),
                        f"{kohya}.hada_w2_b": torch.randn(rank, inner, generator=g)}
        else:
            block = torch.randn(out // 2, width // 4, *kernel, generator=g)
            tensors |= {f"{kohya}.lokr_w1": torch.randn(2, 4, generator=g), f"{kohya}.lokr_w2": block}
        tensors[f"{kohya}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """Module -> ΔW [out,in] fp64 of a file in any of the three layouts."""
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    found = {}
    for module, names in STEMS.items():
        for stem in names:
            parts = {name.removeprefix(f"{stem}."): t for name, t in tensors.items() if name.startswith(f"{stem}.")}
            if parts:
                found[module] = delta_of(parts)
    return found


def delta_of(parts: Mapping[str, Tensor]) -> Tensor:
    if "lora_B.weight" in parts:
        return parts["lora_B.weight"].flatten(1) @ parts["lora_A.weight"].flatten(1)
    delta, rank = product(parts)
    return delta * scale_of(parts, rank)


def close(found: Tensor, wanted: Tensor, relative: float) -> bool:
    """To a part of the largest entry."""
    return bool((found - wanted).abs().max() <= relative * wanted.abs().max())
