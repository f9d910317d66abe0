"""The sizes of the original code's networks, counted in the shapes of a file's tensors: parts of Diffusers' configs.

`shapes` are those of the file, `prefix` is where the network's names begin. A KeyError names what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 64  # of the attention in SD 2.x, SDXL and all text encoders; SD 1.x has eight heads at any width
BAD_SHAPES = (KeyError, IndexError, ValueError, ZeroDivisionError)  # what counting raises in another kind of file
KEPT_LAYERS = 23  # SD 2.x reads OpenCLIP's last layer but one: folders, and files made from one, lack the 24th


def uncounted(error: Exception) -> str:
    """What counting stumbled over."""
    return f"it lacks {error.args[0]}" if isinstance(error, KeyError) else f"a tensor has another shape ({error})"


def count(shapes: Shapes, name: str) -> int:
    """How many of name.format(0), name.format(1), ... there are."""
    number = 0
    while name.format(number) in shapes:
        number += 1
    return number


def unet_config(shapes: Shapes, prefix: str, released: Mapping[str, Any]) -> dict[str, Any]:
    """released  the config of the family's released models

    The input blocks are one convolution, then for each level its layers and, but for the last level, a downsampler.
    """
    blocks = f"{prefix}input_blocks.{{}}.0"
    rows = next(row for row in range(len(shapes)) if not any(
        f"{blocks.format(row)}.{part}" in shapes for part in ("weight", "op.weight", "in_layers.0.weight")))
    samplers = [row for row in range(rows) if f"{blocks.format(row)}.op.weight" in shapes]
    layers = samplers[0] - 1 if samplers else rows - 1
    firsts = [1 + level * (layers + 1) for level in range(len(samplers) + 1)]
    widths = [shapes[f"{blocks.format(row)}.out_layers.3.weight"][0] for row in firsts]
    depth = [count(shapes, f"{prefix}input_blocks.{row}.1.transformer_blocks.{{}}.attn2.to_k.weight") for row in firsts]
    inner = count(shapes, f"{prefix}middle_block.1.transformer_blocks.{{}}.attn2.to_k.weight")
    kinds = ["CrossAttn" if number else "" for number in depth]
    return {
        "in_channels": shapes[f"{blocks.format(0)}.weight"][1], "out_channels": shapes[f"{prefix}out.2.weight"][0],
        "block_out_channels": widths, "layers_per_block": layers,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": [*(number or 1 for number in depth[:-1]), inner],
        "attention_head_dim": released.get("attention_head_dim") or [width // HEAD_WIDTH for width in widths],
        "cross_attention_dim": shapes[f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{prefix}middle_block.1.proj_in.weight"]) == 2,
        **({"projection_class_embeddings_input_dim": shapes[f"{prefix}label_emb.0.0.weight"][1]}
           if released.get("addition_embed_type") else {}),
    }


def vae_config(shapes: Shapes, prefix: str, *, diffusers_names: bool = False) -> dict[str, Any]:
    level, layer = ("down_blocks", "resnets") if diffusers_names else ("down", "block")
    block = f"{prefix}encoder.{level}.{{}}.{layer}"
    levels = count(shapes, f"{block}.0.conv2.weight")
    widths = [shapes[f"{block.format(number)}.0.conv2.weight"][0] for number in range(levels)]
    convolved = f"{prefix}post_quant_conv.weight" in shapes
    return {
        "block_out_channels": widths, "layers_per_block": count(shapes, f"{block.format(0)}.{{}}.conv2.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "use_quant_conv": convolved, "use_post_quant_conv": convolved,
    }


def text_config(shapes: Shapes, prefix: str, family: str) -> dict[str, Any]:
    """OpenCLIP's encoder stands under a prefix that ends in ".model.", CLIP's under Transformers' names."""
    if prefix.endswith(".model."):
        tokens, places, layers, between = (
            "token_embedding.weight", "positional_embedding", "transformer.resblocks.{}.ln_1.weight",
            "transformer.resblocks.0.mlp.c_fc.weight")
    else:
        inner = "text_model." if f"{prefix}text_model.final_layer_norm.weight" in shapes else ""
        tokens, places, layers, between = (
            f"{inner}embeddings.token_embedding.weight", f"{inner}embeddings.position_embedding.weight",
            f"{inner}encoder.layers.{{}}.layer_norm1.weight", f"{inner}encoder.layers.0.mlp.fc1.weight")
    vocabulary, width = shapes[prefix + tokens]
    there = count(shapes, prefix + layers)
    dropped = prefix.endswith(".model.") and family == "sd2" and there != KEPT_LAYERS
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": shapes[prefix + between][0],
        "num_hidden_layers": there - dropped, "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": shapes[prefix + places][0],
        "projection_dim": projection_width(shapes, prefix, width),
    }


def projection_width(shapes: Shapes, prefix: str, width: int) -> int:
    if f"{prefix}text_projection.weight" in shapes:
        return shapes[f"{prefix}text_projection.weight"][0]
    return shapes.get(f"{prefix}text_projection", (width, width))[1]  # OpenCLIP's is [width, projected]
