"""Where the tensors of Diffusers' networks lie in files of the original code: LDM (SD 1.x, 2.x) and SGM (SDXL).

A place is a name in the file and what is taken of the tensor there. Sources: CompVis/latent-diffusion,
ldm/modules/diffusionmodules/model.py (VAE); mlfoundations/open_clip, src/open_clip/transformer.py (text encoder);
sgm.py (UNet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.families.pretrained import Config
from trainkit.families.sgm import block_names, original_path

THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # of OpenCLIP's one projection for all three
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of Diffusers before 0.17
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
OPEN_CLIP_ENDS = {"embeddings.token_embedding.weight": "token_embedding.weight",
                  "embeddings.position_embedding.weight": "positional_embedding",
                  "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}


def whole(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def as_matrix(tensor: Tensor) -> Tensor:
    """A 1×1 convolution [O,I,1,1] -> [O,I]; a matrix stays one."""
    return tensor[..., 0, 0] if tensor.ndim == 4 else tensor


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file, and how it is taken from there."""

    name: str
    take: Callable[[Tensor], Tensor] = whole

    def shape(self, there: tuple[int, ...]) -> tuple[int, ...] | None:
        """What is taken of a tensor of the shape `there`; None if it cannot be taken."""
        try:
            return tuple(self.take(torch.empty(there, device="meta")).shape)
        except (IndexError, RuntimeError):
            return None


def third(k: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3)[k]


def unet_places(names: Iterable[str], config: Config, prefix: str) -> dict[str, TensorPlace]:
    blocks = block_names(config)
    return {name: TensorPlace(f"{prefix}{original_path(path, blocks)}.{end}") for name in names
            for path, _, end in (name.rpartition("."),)}


def vae_places(names: Iterable[str], config: Config, prefix: str) -> dict[str, TensorPlace]:
    levels = len(config["block_out_channels"])
    return {name: vae_place(name, levels, prefix) for name in names}


def vae_place(name: str, levels: int, prefix: str) -> TensorPlace:
    """The original code counts the decoder's levels from the innermost resolution's end, Diffusers from its start."""
    side, _, rest = name.partition(".")
    kind, _, inner = rest.partition(".")
    parts = inner.split(".")
    if kind in ("down_blocks", "up_blocks"):
        level = int(parts[0]) if kind == "down_blocks" else levels - 1 - int(parts[0])
        way, sampler = ("down", "downsample") if kind == "down_blocks" else ("up", "upsample")
        block = f"block.{parts[2]}" if parts[1] == "resnets" else sampler
        last = ".".join(parts[3:]).replace("conv_shortcut", "nin_shortcut")
        return TensorPlace(f"{prefix}{side}.{way}.{level}.{block}.{last}")
    if kind == "mid_block" and parts[0] == "resnets":
        return TensorPlace(f"{prefix}{side}.mid.block_{int(parts[1]) + 1}.{'.'.join(parts[2:])}")
    if kind == "mid_block":
        module, _, end = ".".join(parts[2:]).rpartition(".")
        return TensorPlace(f"{prefix}{side}.mid.attn_1.{VAE_ATTENTION[module]}.{end}", as_matrix)
    return TensorPlace(prefix + name.replace("conv_norm_out", "norm_out"))


def diffusers_vae_places(names: Iterable[str], there: Mapping[str, object], prefix: str) -> dict[str, TensorPlace]:
    """A VAE that Diffusers saved, under its names of today or those of the attention before version 0.17."""
    found = {}
    for name in names:
        old = name
        for now, before in OLD_ATTENTION.items():
            old = old.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
        found[name] = TensorPlace(prefix + (name if prefix + name in there else old),
                                  as_matrix if old != name else whole)
    return found


def clip_places(names: Iterable[str], there: Mapping[str, object], prefix: str) -> dict[str, TensorPlace]:
    """A text encoder under Transformers' names, with the level "text_model" or without."""
    inner = f"{prefix}text_model." if any(name.startswith(f"{prefix}text_model.") for name in there) else prefix
    return {name: TensorPlace(
        (prefix if name.startswith("text_projection") else inner) + name.removeprefix("text_model.")) for name in names}


def open_clip_places(names: Iterable[str], there: Mapping[str, object], prefix: str) -> dict[str, TensorPlace]:
    """OpenCLIP's text encoder: one projection for queries, keys and values; its last projection is transposed."""
    return {name: open_clip_place(name.removeprefix("text_model."), there, prefix) for name in names}


def open_clip_place(name: str, there: Mapping[str, object], prefix: str) -> TensorPlace:
    if name in OPEN_CLIP_ENDS:
        return TensorPlace(prefix + OPEN_CLIP_ENDS[name])
    if name == "text_projection.weight":  # ComfyUI saves it under this name, as Transformers has it
        if prefix + name in there:
            return TensorPlace(prefix + name)
        return TensorPlace(f"{prefix}text_projection", transposed)
    _, _, layer, *parts = name.split(".")
    block, module, end = f"{prefix}transformer.resblocks.{layer}", ".".join(parts[:-1]), parts[-1]
    if parts[1] in THIRDS:
        return TensorPlace(f"{block}.attn.in_proj_{end}", third(THIRDS[parts[1]]))
    return TensorPlace(f"{block}.{OPEN_CLIP[module]}.{end}")
