"""Begin a longer training where the shipped models stand: frozen parts as they are, UNet weights as first weights."""

import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.base_models.export import MODEL_FOLDERS

LOG = logging.getLogger("base_models")


def start_from_assets(work_dir: Path, assets_dir: Path) -> None:
    """Write models/clip, models/text_encoder_2, models/vae and start/{sdxl,sd}.safetensors, all in fp32."""
    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTextModelWithProjection

    sdxl, models = assets_dir / MODEL_FOLDERS["sdxl"], work_dir / "models"
    clip = assets_dir / MODEL_FOLDERS["clip"]
    CLIPModel.from_pretrained(clip, dtype=torch.float32).save_pretrained(models / "clip")
    shutil.copy2(clip / "preprocessor_config.json", models / "clip")
    second = CLIPTextModelWithProjection.from_pretrained(sdxl / "text_encoder_2", dtype=torch.float32)
    second.save_pretrained(models / "text_encoder_2")
    AutoencoderKL.from_pretrained(sdxl / "vae", torch_dtype=torch.float32).save_pretrained(models / "vae")
    for family in ("sdxl", "sd"):
        weights = load_file(assets_dir / MODEL_FOLDERS[family] / "unet" / "diffusion_pytorch_model.safetensors")
        (work_dir / "start").mkdir(exist_ok=True)
        save_file({key: value.float() for key, value in weights.items()}, work_dir / "start" / f"{family}.safetensors")
    LOG.info("start: the shipped models' weights, in %s", work_dir)
