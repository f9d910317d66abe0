"""Names in WebUI LoRA files: the original SDXL code (SGM) numbers the UNet's blocks in one row.

    Diffusers  down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    WebUI      lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q

The text encoders, lora_te1 and lora_te2, keep Transformers' names, as they were before it
dropped "text_model" from one.

Writing enumerates the blocks of the UNet's config; reading divides the block number. Neither uses the other, so that a
file read back is evidence.
Source: Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py; kohya-ss/sd-scripts,
library/sdxl_original_unet.py, trains on that layout and joins the parts of a path with "_".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainkit.families.pretrained import Config

PREFIX = "lora_unet"
TEXT_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
RESNET_NAMES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
OUTER_NAMES = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def block_names(config: Config) -> dict[str, str]:
    """Diffusers block -> SGM block, counted from the UNet's config: down_blocks.1.attentions.0 -> input_blocks.4.1.

    Input blocks: conv_in, then per level its layers and a downsampler; output blocks: per level one layer more, whose
    last block also holds the upsampler, behind the attention where there is one.
    """
    names = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    layers = config["layers_per_block"]
    for level in range(len(config["down_block_types"])):
        first = 1 + level * (layers + 1)
        for j in range(layers):
            names[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{first + j}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{first + j}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for level, block_type in enumerate(config["up_block_types"]):
        first = level * (layers + 1)
        for j in range(layers + 1):
            names[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{first + j}.0"
            names[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{first + j}.1"
        upsampler = 2 if "CrossAttn" in block_type else 1
        names[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{first + layers}.{upsampler}"
    return names


def numbered(config: Config) -> dict[str, str]:
    """Diffusers block -> as WebUIs number it where they weigh blocks: down_blocks.1.attentions.0 -> IN04."""
    words = {"input_blocks": "IN", "output_blocks": "OUT"}
    parts = {block: name.split(".") for block, name in block_names(config).items()}
    return {block: f"{words[side]}{int(number):02d}" if side in words else "MID"
            for block, (side, number, *_) in parts.items()}


def webui_name(path: str, config: Config) -> str:
    """The name of a UNet module in a WebUI LoRA file."""
    return "_".join([PREFIX, *original_path(path, block_names(config)).split(".")])


def original_path(path: str, blocks: Mapping[str, str]) -> str:
    """What the original code calls a UNet module; `blocks` are `block_names` of the UNet's config."""
    names = {**blocks, **OUTER_NAMES}
    block = next((b for b in names if path == b or path.startswith(b + ".")), None)
    assert block, f"{path} has no name in the original code"
    rest = path[len(block) + 1 :]
    if ".resnets." in block:
        rest = RESNET_NAMES[rest]
    return f"{names[block]}.{rest}".strip(".")


def module_name(webui: str, config: Config) -> str:
    """The Diffusers path, joined with "_", of a name read from a WebUI LoRA file: the reader's own arithmetic."""
    name = webui.removeprefix(f"{PREFIX}_")
    row = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d+)_?(.*)", name)
    middle = re.fullmatch(r"middle_block_([012])_(.*)", name)
    outer = {sgm.replace(".", "_"): path for path, sgm in OUTER_NAMES.items()}
    if name in outer:
        found = outer[name]
    elif middle:
        found = ("resnets_0", "attentions_0", "resnets_1")[int(middle[1])]
        found = f"mid_block_{found}_{inner_name(middle[2])}"
    elif row:
        found = row_name(row[1], int(row[2]), int(row[3]), row[4], config["layers_per_block"] + 1)
    else:
        found = name
    return found.replace(".", "_")


def row_name(side: str, index: int, part: int, rest: str, per_level: int) -> str:
    """Undo the numbering: block `index` of the input or output row, its part (0 resnet, 1 attention, ...)."""
    level, j = divmod(index - 1 if side == "input" else index, per_level)
    block = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
    if rest == "op":
        return f"{block}_downsamplers_0_conv"
    if rest == "conv":
        return f"{block}_upsamplers_0_conv"
    if part > 1:
        return f"{block}_part{part}_{rest}"  # no module's name
    return f"{block}_{('resnets', 'attentions')[part]}_{j}_{inner_name(rest)}"


def inner_name(rest: str) -> str:
    inner = {sgm.replace(".", "_"): name for name, sgm in RESNET_NAMES.items()}
    return inner.get(rest, rest)
