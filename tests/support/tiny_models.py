"""Random model folders in the layouts of SDXL, SD 1.x and 2.x, small enough for every test: three levels, own words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import torch

from trainkit import rng

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin
    from torch import Tensor

    from trainkit.families import Family

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = """a an the of in on and with photo image icon style red green blue dog cat house sun moon star tree fish bird
apple flower car boat TOK 3d toy smooth shiny flat drawing white background""".lower().split()
MAX_LENGTH = 77
SD_TEXT_WIDTHS = {1: 24, 2: 32}  # by version; OpenCLIP's encoder is wider
TEXT_WIDTHS = (24, 32)  # CLIP-L's and CLIP-G's part; their sum is the UNet's cross-attention width
LATENT_CHANNELS = 4
CLIP_WIDTH = 24  # of the CLIP's projection, and of SD 1.x's text
FIRST_SEED = 20261121


def build_tiny_sdxl(folder: Path, *, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
                    widths: Sequence[int] = (32, 64, 64), eos_in_config: bool = True) -> Path:
    """Write a random model in the Diffusers layout of SDXL -> its folder. The same weights at every call.

    widths         channels of the UNet's three levels, multiples of 32
    eos_in_config  False writes `eos_token_id` 2 into the text encoders, as SDXL's released configs have it
    """
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    return build(folder, scheduler, tiny_vae, widths=widths, eos_in_config=eos_in_config)


def build_tiny_edm(folder: Path, *, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
                   widths: Sequence[int] = (32, 64, 64)) -> Path:
    """Write a random EDM model -> its folder; as Playground v2.5 with its scheduler and its latents' mean and std."""
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.5, prediction_type=prediction_type)
    latents = {"latents_mean": [-0.4, 0.3, 0.1, -0.2], "latents_std": [1.1, 0.7, 0.9, 0.8], "scaling_factor": 0.5}
    return build(folder, scheduler, partial(tiny_vae, **latents), widths=widths, eos_in_config=True)


def build_tiny_sd(folder: Path, *, version: Literal[1, 2] = 1,
                  prediction_type: Literal["epsilon", "v_prediction"] | None = None,
                  widths: Sequence[int] = (32, 64, 64)) -> Path:
    """Write a random model in the Diffusers layout of SD 1.x or of SD 2.x for 768 pixels -> its folder.

    prediction_type  by default ε for 1, v for 2
    """
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
             "set_alpha_to_one": False, "prediction_type": prediction_type or ("epsilon", "v_prediction")[version - 1]}
    scheduler = PNDMScheduler(skip_prk_steps=True, **betas) if version == 1 else DDIMScheduler(
        clip_sample=False, **betas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("tiny sd", FIRST_SEED, version))
        words = tiny_tokenizer(folder / ".words", EOS if version == 1 else "!")
        pipe = StableDiffusionPipeline(
            vae=tiny_vae(), unet=tiny_sd_unet(widths, version), scheduler=scheduler, tokenizer=words,
            text_encoder=tiny_text_encoder(len(words), SD_TEXT_WIDTHS[version], projected=False, eos=words.eos_token_id,
                                           pad=words.pad_token_id, open_clip=version == 2),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def build(folder: Path, scheduler: SchedulerMixin, make_vae: Callable[[], AutoencoderKL], *, widths: Sequence[int],
          eos_in_config: bool) -> Path:
    """Write the random model with this scheduler and VAE -> its folder."""
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of("tiny", FIRST_SEED))
        first, second = (tiny_tokenizer(folder / f".words_{k}", pad) for k, pad in enumerate((EOS, "!")))
        eos = first.eos_token_id if eos_in_config else 2
        pipe = StableDiffusionXLPipeline(
            vae=make_vae(), unet=tiny_unet(widths), scheduler=scheduler, tokenizer=first, tokenizer_2=second,
            text_encoder=tiny_text_encoder(len(first), TEXT_WIDTHS[0], projected=False, eos=eos, pad=eos),
            text_encoder_2=tiny_text_encoder(len(second), TEXT_WIDTHS[1], projected=True, eos=eos, pad=0),
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: Path, pad_token: str):
    """A CLIP byte-pair tokenizer that knows WORDS whole and spells everything else."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    merges = list(dict.fromkeys(merge for word in WORDS for merge in merges_of(word)))
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), BOS, EOS]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocabulary)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=MAX_LENGTH, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=pad_token)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return tokenizer


def merges_of(word: str) -> list[tuple[str, str]]:
    """Merges that build `word` from left to right."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    return [("".join(pieces[:k]), pieces[k]) for k in range(1, len(pieces))]


def tiny_text_encoder(vocabulary: int, width: int, *, projected: bool, eos: int, pad: int, open_clip: bool = False):
    """Three layers, so that the penultimate hidden state and one skipped layer exist."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=MAX_LENGTH, projection_dim=width, bos_token_id=vocabulary - 2,
        eos_token_id=eos, pad_token_id=pad, hidden_act="gelu" if projected or open_clip else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_vae(*, scaling_factor: float = 0.6, **latents: Sequence[float]):
    """Four pixels per latent, 64 px -> 16 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, sample_size=64, scaling_factor=scaling_factor, **latents,
    )


def tiny_unet(widths: Sequence[int]):
    """SDXL's block layout: no attention on the first level, more transformer layers on the last."""
    from diffusers import UNet2DConditionModel

    attending = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"), layers_per_block=1,
        transformer_layers_per_block=(*[1] * attending, 2), attention_head_dim=tuple(w // 32 for w in widths),
        cross_attention_dim=sum(TEXT_WIDTHS), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTHS[1],
    )


def tiny_sd_unet(widths: Sequence[int], version: int):
    """SD's block layout: no attention on the last level; in 2.x linear projections, and heads counted by level."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        attention_head_dim=2 if version == 1 else tuple(w // 16 for w in widths), use_linear_projection=version == 2,
        cross_attention_dim=SD_TEXT_WIDTHS[version],
    )


def latents_of(family: Family, mean: Tensor) -> Tensor:
    """The clean latents of posteriors without a spread: mean [B,C,h,w] as the network knows it -> x0 [B,C,h,w]."""
    batch = SimpleNamespace(keys=[(place,) for place in range(len(mean))], pixels=None, mean=mean,
                            logvar=torch.full_like(mean, -torch.inf))
    return family.sample_latents(batch)


def build_tiny_clip(folder: Path) -> Path:
    """A random vision tower, 32 px, without a config of its preprocessing -> its folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=CLIP_WIDTH)).save_pretrained(folder)
    return folder
