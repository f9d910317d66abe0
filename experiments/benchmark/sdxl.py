"""SDXL at its released sizes with random weights: nothing is downloaded, and nothing that it makes means anything.

Sizes are those of stabilityai/stable-diffusion-xl-base-1.0. Modules are built on torch's current default device.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments import ROOT

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer, PreTrainedModel

UNET = dict(  # unet/config.json
    sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
VAE = dict(  # vae/config.json
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=1024,
    scaling_factor=0.13025, force_upcast=True)
VOCABULARY = 49_408
CLIP_L = dict(  # text_encoder/config.json
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
    projection_dim=768)
CLIP_G = dict(  # text_encoder_2/config.json
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280)
WORDS = ROOT / "assets" / "tiny-sdxl-icons"  # whose tokenizers know fewer words; their numbers are below VOCABULARY


def unet(**sizes: object) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET | sizes)


def vae(**sizes: object) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE | sizes)


def text_encoders(vocabulary: int = VOCABULARY, **ids: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    one, two = (CLIPTextConfig(vocab_size=vocabulary, **ids, **sizes) for sizes in (CLIP_L, CLIP_G))
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
