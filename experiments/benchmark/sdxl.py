"""SDXL at its released sizes with random weights: nothing is downloaded, and nothing that it makes means anything.

Sizes are those of stabilityai/stable-diffusion-xl-base-1.0. Modules are built on torch's current default device.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments import ROOT
from trainkit.plan.models import SIZES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer, PreTrainedModel

SDXL = SIZES["sdxl"]  # config files by their place in a model folder
VOCABULARY: int = SDXL["text_encoder/config.json"]["vocab_size"]
WORDS = ROOT / "assets" / "tiny-sdxl-icons"  # whose tokenizers know fewer words; their numbers are below VOCABULARY


def unet(**sizes: object) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**SDXL["unet/config.json"], **sizes})


def vae(**sizes: object) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{**SDXL["vae/config.json"], "force_upcast": True, **sizes})


def text_encoders(**ids: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    one, two = (CLIPTextConfig(**{**SDXL[f"{name}/config.json"], **ids}) for name in ("text_encoder", "text_encoder_2"))
    return CLIPTextModel(one), CLIPTextModelWithProjection(two)


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    from transformers import CLIPTokenizer

    one, two = (CLIPTokenizer.from_pretrained(WORDS, subfolder=name) for name in ("tokenizer", "tokenizer_2"))
    return one, two


def write(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A model folder in the Diffusers layout; one that is complete is left alone.

    In half precision it takes 7 GB of disk, and writing it 12 GB of main memory (computed).
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    if (folder / "model_index.json").is_file():
        return folder
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    one, two = tokenizers()
    ids = {"eos_token_id": one.eos_token_id, "bos_token_id": one.bos_token_id, "pad_token_id": one.pad_token_id}
    network = unet().to(dtype)
    first, second = (encoder.to(dtype) for encoder in text_encoders(**ids))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(
        vae=vae().to(dtype), unet=network, text_encoder=first, text_encoder_2=second, tokenizer=one, tokenizer_2=two,
        scheduler=scheduler, add_watermarker=False)
    pipe.save_pretrained(draft, safe_serialization=True)
    draft.rename(folder)
    return folder
