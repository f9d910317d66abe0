"""What kind of model a single file is, told by the names of its tensors; what cannot be trained is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainkit.errors import Problem, UserError, shell_word
from trainkit.families.pretrained import VAE_FLAG, Repo
from trainkit.families.sizes import KEPT_LAYERS, count
from trainkit.reading import TensorHeader

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # SD 1.x, SD 2.x
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."  # SDXL
REFINER = "conditioner.embedders.0.model."  # its one text encoder is OpenCLIP's
SD2_WIDTH = 1024  # of the text, where another program has given it Transformers' names
NUMBERS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")  # number formats that weights may have
INPUTS = {9: "an inpainting model", 8: "an instruct-pix2pix model"}  # by input channels of the UNet
WORDS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
# What a tensor's name tells of a file that is no base model -> what it is, and what to do
STRANGERS = {
    r"\.comfy_quant$|(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|scale_input|input_scale)$": (
        "quantised for ComfyUI (fp8 with scales)", "take the fp16, bf16 or fp32 file of the same model"),
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.bitsandbytes": (
        "quantised by bitsandbytes", "take the fp16, bf16 or fp32 file of the same model"),
    r"\.(lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)\.|\.hada_w1|\.lokr_w|\.oft_": (
        "a LoRA, not a base model", "name the base model that it was trained on"),
    r"^(clip_l|clip_g|emb_params|string_to_param)$": (
        "an embedding (textual inversion), not a base model", "name a base model"),
    r"(^|\.)double_blocks\.0\.|(^|\.)single_transformer_blocks\.0\.": (
        "a FLUX model, whose network is a transformer", "name a base model of SD 1.x, SD 2.x or SDXL"),
    r"(^|\.)joint_blocks\.0\.": (
        "an SD 3 model, whose network is a transformer", "name a base model of SD 1.x, SD 2.x or SDXL"),
    r"^(control_model|controlnet_cond_embedding|controlnet_mid_block|input_hint_block)\b": (
        "a ControlNet, not a base model", "name the base model that it was made for"),
    r"^edm_mean$|^edm_std$|^edm_vpred\.": (
        "a model of EDM (Playground v2.5, CosXL), whose noise levels a single file does not tell",
        "name its folder in the Diffusers layout, whose scheduler config tells them"),
    r"^(down_blocks|mid_block|up_blocks)\.\d": (
        "the UNet of a Diffusers folder alone", "name the folder that holds model_index.json"),
}


@dataclass(frozen=True)
class Kind:
    """A file that can be read.

    name      of the family: "sd1", "sd2", "sdxl"; "vae"
    prefixes  folder of each network -> where its names begin in the file
    unused    tensors that no program reads
    """

    name: str
    prefixes: Mapping[str, str]
    unused: frozenset[str] = frozenset()
    diffusers_names: bool = False

    @property
    def words(self) -> str:
        return WORDS.get(self.name, "a VAE")


def stranger(file: Repo, header: TensorHeader) -> Iterator[Problem]:
    """Another kind of file, by a name in it or by the UNet's inputs."""
    names = header.shapes
    for pattern, (what, fix) in STRANGERS.items():
        name = next((name for name in names if re.search(pattern, name)), None)
        if name:
            yield file.problem(f"the file is {what}", f"it holds {name}", fix)
            return
    conv = names.get(f"{UNET}input_blocks.0.0.weight")
    if conv is None and any(name.startswith(("encoder.", VAE)) for name in names):
        yield file.problem("the file is a VAE, not a base model", "it holds no UNet", "name a base model, and this "
                           f"file with {VAE_FLAG} {shell_word(file.path)}")
    elif conv is None:
        first = next(iter(names), "no tensor at all")
        yield file.problem("not a base model of SD 1.x, SD 2.x or SDXL", f"it holds no {UNET}input_blocks.0.0.weight; "
                           f"its first tensor is {first}", "name a base model of one of these")
    elif len(conv) == 4 and conv[1] in INPUTS:
        yield file.problem(f"{INPUTS[conv[1]]} cannot be trained here", f"its UNet takes {conv[1]} channels, and "
                           "images have 4", "name the text-to-image model that it was made from")
    elif any(name.startswith(REFINER) for name in names):
        yield file.problem("an SDXL refiner cannot be trained here", "it has one text encoder, SDXL base has two",
                           "name the base model, such as sd_xl_base_1.0.safetensors")
    else:
        yield from odd_numbers(file, header)


def odd_numbers(file: Repo, header: TensorHeader) -> Iterator[Problem]:
    """Weights in a number format that packs several values, or that holds none."""
    ours = (UNET, VAE, "cond_stage_model.", "conditioner.")
    odd = {name: number for name, number in header.formats.items()
           if number not in NUMBERS and name.startswith(ours) and not name.endswith("position_ids")}
    if odd:
        name, number = next(iter(odd.items()))
        yield file.problem("the file is quantised", f"{name} is stored as {number}",
                           "take the fp16, bf16 or fp32 file of the same model")


def base_kind(file: Repo, header: TensorHeader) -> Kind:
    """The family of a base model by its text encoders, and by the width of its cross-attention. Raises UserError."""
    shapes = header.shapes

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    vae = {"vae": VAE} if has(VAE) else {}
    if has(CLIP_L) and has(CLIP_G):
        return Kind("sdxl", {"unet": UNET, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, **vae})
    if has(OPEN_CLIP):
        layers = count(shapes, OPEN_CLIP + "transformer.resblocks.{}.ln_1.weight")
        last = f"{OPEN_CLIP}transformer.resblocks.{layers - 1}."
        unused = [name for name in shapes if name.startswith(last) and layers != KEPT_LAYERS]
        return Kind("sd2", {"unet": UNET, "text_encoder": OPEN_CLIP, **vae}, frozenset(unused))
    if has(CLIP):
        wide = shapes.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", ())[1:] == (SD2_WIDTH,)
        return Kind("sd2" if wide else "sd1", {"unet": UNET, "text_encoder": CLIP, **vae})
    missing = "text encoder 2" if has(CLIP_L) else "text encoder 1" if has(CLIP_G) else "a text encoder"
    raise UserError(file.problem(
        f"the file has a UNet and lacks {missing}", f"no tensor begins with {CLIP}, {OPEN_CLIP} or {CLIP_L}",
        "take the complete file of the model (its \"checkpoint\", with UNet, text encoders and VAE)", kind="data"))


def vae_kind(file: Repo, header: TensorHeader) -> Kind:
    """A VAE of one file in the original code's layout or in Diffusers', or that of a base model. Raises UserError."""
    shapes = header.shapes
    for prefix in (VAE, ""):
        if f"{prefix}encoder.down.0.block.0.conv2.weight" in shapes:
            return Kind("vae", {"": prefix})
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv2.weight" in shapes:
            return Kind("vae", {"": prefix}, diffusers_names=True)
    raise UserError(file.problem("the file is no VAE of Stable Diffusion", "it holds no encoder.down.0.block.0.conv2."
                                 "weight; its first tensor is " + next(iter(shapes), "none"), "name the VAE of SD 1.x, "
                                 "SD 2.x or SDXL"))
