"""Tiny models in Diffusers folders, and the same models as one file in the layout of the original code.

The writer knows the layout for itself, from the original code, so that what reads its files is tested by it.
(Diffusers' own converter writes files that nobody loads, where Transformers has dropped "text_model".)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.support.tiny_models import LATENT_CHANNELS
from trainkit import rng
from trainkit.families.vocabulary import clip_tokenizer
from trainkit.files import save_tensors

WIDTHS = {"sd1": (64,), "sd2": (128,), "sdxl": (64, 128)}  # of the text encoders
RESNETS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
Name = Literal["sd1", "sd2", "sdxl"]


def build_folder(folder: Path, name: Name, *, prediction_type: str = "epsilon") -> Path:
    """Write a random model of the family in the Diffusers layout, with the vocabulary of CLIP -> its folder."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("single file", name))
        ends = ("<|endoftext|>",) if name == "sd1" else ("!",) if name == "sd2" else ("<|endoftext|>", "!")
        words = [clip_tokenizer(pad_token=end, model_max_length=77) for end in ends]
        texts = [text_encoder(name, place) for place in range(len(WIDTHS[name]))]
        parts: dict[str, Any] = {"vae": vae(name), "unet": unet(name), "tokenizer": words[0], "text_encoder": texts[0]}
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                 "prediction_type": prediction_type}
        if name == "sdxl":
            pipe = diffusers.StableDiffusionXLPipeline(
                **parts, tokenizer_2=words[1], text_encoder_2=texts[1], add_watermarker=False,
                scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **betas))
        else:
            pipe = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **betas))
    pipe.save_pretrained(folder)
    return folder


def unet(name: Name):
    from diffusers import UNet2DConditionModel

    width, latents = sum(WIDTHS[name]), {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    if name == "sdxl":
        return UNet2DConditionModel(
            **latents, sample_size=128, block_out_channels=(64, 64, 128), layers_per_block=1, cross_attention_dim=width,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 1, 2),
            transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + WIDTHS[name][1])
    return UNet2DConditionModel(
        **latents, sample_size=64, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8 if name == "sd1" else (1, 2), use_linear_projection=name == "sd2")


def vae(name: Name):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=32, sample_size=1024 if name == "sdxl" else 512,
        scaling_factor=0.13025 if name == "sdxl" else 0.18215)


def text_encoder(name: Name, place: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    open_clip, width = name == "sd2" or place == 1, WIDTHS[name][place]
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=width, bos_token_id=0,
        eos_token_id=2, pad_token_id=1, hidden_act="gelu" if open_clip else "quick_gelu")
    return (CLIPTextModelWithProjection if place == 1 else CLIPTextModel)(config)


# ----------------------------------------------------------------------------------------------------------------------
# The writer


def write_single_file(folder: Path, file: Path, *, dtype: torch.dtype = torch.float32, markers: tuple[str, ...] = (),
                      metadata: Mapping[str, str] | None = None, drop: str = "^$", text_model: bool = True) -> Path:
    """The model of a folder as one file -> the file.

    markers     names of tensors without values
    drop        names that match are left out
    text_model  whether the level of this name is in the names of CLIP's text encoder
    """
    tensors = {name: tensor.to(dtype) for name, tensor in original_tensors(folder, text_model=text_model)
               if not re.search(drop, name)}
    save_tensors(file, tensors | {name: torch.zeros(0) for name in markers}, metadata)
    return file


def original_tensors(folder: Path, *, text_model: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and values in the order of a checkpoint of the original code."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for name, tensor in network.state_dict().items():
        yield f"model.diffusion_model.{unet_name(name, network.config)}", tensor
    is_sdxl = (folder / "text_encoder_2").is_dir()
    first = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    if is_sdxl:
        yield from clip_tensors(first, "conditioner.embedders.0.transformer.", text_model)
        second = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2")
        yield from open_clip_tensors(second, "conditioner.embedders.1.model.")
    elif first.config.hidden_act == "gelu":
        yield from open_clip_tensors(first, "cond_stage_model.model.", unused_layer=True)
    else:
        yield from clip_tensors(first, "cond_stage_model.transformer.", text_model)
    yield from vae_tensors(AutoencoderKL.from_pretrained(folder, subfolder="vae"), "first_stage_model.")


def unet_name(name: str, config: Any) -> str:
    path, _, end = name.rpartition(".")
    row = config.layers_per_block + 1
    if path in ENDS:
        return f"{ENDS[path]}.{end}"
    found = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", path)
    assert found, name
    side, level, kind, place, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        inner = RESNETS[inner]
    if side == "mid":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{inner}.{end}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * row}.0.op.{end}"
    if kind == "upsamplers":
        behind = 2 if "CrossAttn" in config.up_block_types[level] else 1
        return f"output_blocks.{level * row + row - 1}.{behind}.conv.{end}"
    block = f"input_blocks.{1 + level * row + place}" if side == "down" else f"output_blocks.{level * row + place}"
    return f"{block}.{int(kind == 'attentions')}.{inner}.{end}"


def clip_tensors(encoder: Any, prefix: str, text_model: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in encoder.state_dict().items():
        yield f"{prefix}{'text_model.' if text_model else ''}{name.removeprefix('text_model.')}", tensor
    yield f"{prefix}{'text_model.' if text_model else ''}embeddings.position_ids", torch.arange(77)[None]


def open_clip_tensors(encoder: Any, prefix: str, *, unused_layer: bool = False) -> Iterator[tuple[str, Tensor]]:
    """unused_layer  whether a last layer follows that SD 2.x does not read"""
    values = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    yield f"{prefix}token_embedding.weight", values["embeddings.token_embedding.weight"]
    yield f"{prefix}positional_embedding", values["embeddings.position_embedding.weight"]
    yield f"{prefix}ln_final.weight", values["final_layer_norm.weight"]
    yield f"{prefix}ln_final.bias", values["final_layer_norm.bias"]
    yield f"{prefix}logit_scale", torch.tensor(4.6)
    width = encoder.config.hidden_size
    yield f"{prefix}text_projection", (values["text_projection.weight"].T if "text_projection.weight" in values
                                       else torch.eye(width))
    layers = encoder.config.num_hidden_layers
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
    for k in range(layers + unused_layer):
        layer, block = f"encoder.layers.{min(k, layers - 1)}", f"{prefix}transformer.resblocks.{k}"
        for end in ("weight", "bias"):
            for ours, theirs in names.items():
                yield f"{block}.{theirs}.{end}", values[f"{layer}.{ours}.{end}"].clone()
            yield f"{block}.attn.in_proj_{end}", torch.cat(
                [values[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"])


def vae_tensors(network: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    top = len(network.config.block_out_channels) - 1
    for name, tensor in network.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{top - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if ".attentions.0." in name:
            for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"
                                 }.items():
                name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        yield prefix + name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out"), tensor
