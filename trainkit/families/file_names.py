"""What LoRA files call the modules of a base model.

    Diffusers   down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    SD 1.x, 2.x lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
    SDXL        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q         the numbers of SGM, see sgm.py

Writing joins the parts of a path with "_". Reading finds the parts again in a list of all words that a path is made of,
so it needs no model. The two share only this list's language, so that a file read back is evidence.
Source: kohya-ss/sd-scripts, networks/lora.py and library/sdxl_original_unet.py; Nerogar/OneTrainer,
modules/util/convert (dotted SGM names, clip_l and clip_g); bghira/SimpleTuner (lycoris_).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainkit.families import sgm
from trainkit.families.pretrained import Config

ModulePlace = tuple[str, str]  # network, and the path of a module in it, without "text_model"
TEXT_MODEL = "text_model."  # Transformers 5 dropped this level from CLIPTextModel; files keep it, loaders know both
UNET_WORDS = (
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "norm", "norm1", "norm2", "norm3", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out",
    "conv_norm_out", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2")
TEXT_WORDS = (
    "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2", "layer_norm1",
    "layer_norm2", "embeddings", "token_embedding", "position_embedding", "final_layer_norm", "text_projection")
WORD = re.compile("|".join(sorted((*UNET_WORDS, *TEXT_WORDS), key=len, reverse=True)) + r"|\d+")
NUMBERED = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed_[02]|label_emb|out_[02])(_|$)")  # SGM's
PEFT = "base_model.model."  # what its checkpoints put before a path; the network, they do not say
HEADS = {  # of a name -> the network
    "lora_unet_": "unet", "lycoris_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder", "unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
    "clip_l.": "text_encoder", "clip_g.": "text_encoder_2",
}
KERNELS = {"conv1": (3, 3), "conv2": (3, 3), "conv": (3, 3), "conv_in": (3, 3), "conv_out": (3, 3),
           "conv_shortcut": (1, 1)}  # of the convolutions of a UNet, by the last word of their paths
PROJECTIONS = ("proj_in", "proj_out")  # 1 × 1 convolutions in SD 1.x


@dataclass(frozen=True)
class FileNames:
    """The names of one base model.

    text             network -> what its names begin with in WebUI files
    unet             the UNet's config where its blocks are numbered in one row there, else None
    """

    text: Mapping[str, str]
    unet: Config | None = None

    def webui(self, path: str, network: str = "unet") -> str:
        """What WebUIs call the module `path` of a network."""
        if network != "unet":
            return "_".join([self.text[network], "text_model", *stripped(path).split(".")])
        return sgm.webui_name(path, self.unet) if self.unet else joined(path)

    def read(self, name: str) -> ModulePlace | None:
        """The module that a name in any layout means; None for one that means none."""
        return place_of(name, self.unet or RELEASED_XL)


RELEASED_XL: Config = {  # what of the released SDXL's config decides the numbers; those of SD 1.x have as many layers
    "layers_per_block": 2, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
SD_NAMES = FileNames({"text_encoder": "lora_te"})


def xl_names(unet: Config = RELEASED_XL) -> FileNames:
    return FileNames(sgm.TEXT_ENCODERS, unet)


def stripped(path: str) -> str:
    return path.removeprefix(TEXT_MODEL)


def joined(path: str) -> str:
    """The name of a UNet's module with Diffusers' words: SD's in WebUI files, and OneTrainer's for SDXL, too."""
    return "_".join([sgm.PREFIX, *path.split(".")])


def place_of(name: str, unet: Config) -> ModulePlace | None:
    name = name.removeprefix(PEFT)
    head = next((head for head in HEADS if name.startswith(head)), "")
    rest = name.removeprefix(head)
    flat = rest.replace(".", "_")
    numbered = bool(NUMBERED.match(flat))
    if numbered:
        flat = sgm.module_name(f"{sgm.PREFIX}_{flat}", unet)
    path = with_dots(flat.removeprefix("text_model_"))
    if path is None or ("." in rest and not numbered and path != stripped(rest)):
        return None
    in_text = path.startswith(("encoder.", "embeddings.", "final_layer_norm", "text_projection"))
    network = HEADS[head] if head else "text_encoder" if in_text else "unet"
    return (network, path) if in_text == (network != "unet") else None


def with_dots(flat: str) -> str | None:
    """The path whose parts were joined with "_"; None where another word than those of a path is in it."""
    words, at = [], 0
    while at < len(flat):
        found = WORD.match(flat, at)
        if found is None or flat[found.end() : found.end() + 1] not in ("", "_"):
            return None
        words.append(found[0])
        at = found.end() + 1
    return ".".join(words) if words and not flat.endswith("_") else None


def kernel_of(place: ModulePlace, *, linear_projections: bool) -> tuple[int, ...]:
    """A convolution's kernel, () of a linear map: for files that do not say it.

    linear_projections  whether proj_in and proj_out are linear maps, as in SDXL and SD 2.x
    """
    network, path = place
    last = path.rpartition(".")[2]
    if network != "unet":
        return ()
    if last in PROJECTIONS and not linear_projections:
        return 1, 1
    return KERNELS.get(last, ())
