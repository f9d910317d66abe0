"""Standard Diffusers and transformers folders in fp16, replaced by rename: a reader never sees half a model."""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.base_models.loop import load_average
from experiments.base_models.unet import NOISE, make_sd_unet, make_sdxl_unet
from experiments.base_models.vae import load_vae

LOG = logging.getLogger("base_models")
MODEL_FOLDERS = {"sdxl": "tiny-sdxl-icons", "sd": "tiny-sd-icons", "clip": "tiny-clip-icons"}


def first_text_encoder(work_dir: Path):
    """The CLIP's text tower as the CLIPTextModel of a pipeline."""
    from transformers import CLIPModel, CLIPTextModel

    clip = CLIPModel.from_pretrained(work_dir / "models" / "clip")
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


def trained_unet(work_dir: Path, family: str):
    unet = make_sdxl_unet() if family == "sdxl" else make_sd_unet()
    unet.load_state_dict(load_average(work_dir, family))
    return unet.eval()


def tokenizer(work_dir: Path, name: str):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work_dir / name)


def sdxl_pipeline(work_dir: Path):
    """The SDXL pipeline with the scheduler that SDXL ships."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    return StableDiffusionXLPipeline(
        vae=load_vae(work_dir),
        text_encoder=first_text_encoder(work_dir),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work_dir / "models" / "text_encoder_2"),
        tokenizer=tokenizer(work_dir, "tokenizer"),
        tokenizer_2=tokenizer(work_dir, "tokenizer_2"),
        unet=trained_unet(work_dir, "sdxl"),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd_pipeline(work_dir: Path):
    """The SD 1.x pipeline with the scheduler that SD 1.5 ships and no safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=load_vae(work_dir),
        text_encoder=first_text_encoder(work_dir),
        tokenizer=tokenizer(work_dir, "tokenizer"),
        unet=trained_unet(work_dir, "sd"),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_pipeline(work_dir: Path, family: str):
    return sdxl_pipeline(work_dir) if family == "sdxl" else sd_pipeline(work_dir)


def swap_folder(new: Path, target: Path, keep: tuple[str, ...] = ("README.md",)) -> None:
    """Put `new` where `target` is, keeping the model card that is already there."""
    for name in keep:
        if (target / name).exists() and not (new / name).exists():
            shutil.copy2(target / name, new / name)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.replace(old)
    new.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def finish_tokenizer(folder: Path, work_dir: Path, name: str) -> None:
    """Compact tokenizer.json; vocab.json and merges.txt beside it, as transformers 4 reads no other."""
    file = folder / "tokenizer.json"
    compact = json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
    file.write_text(compact, encoding="utf-8")
    for vocabulary in ("vocab.json", "merges.txt"):
        shutil.copy2(work_dir / name / vocabulary, folder / vocabulary)


def finish_text_encoder(folder: Path) -> None:
    """Two things that loaders of other versions than ours need.

    transformers 5 drops "text_model." from CLIPTextModel's keys, every other reader expects it. And it loads a model in
    the dtype its config names: with float16 there, a pipeline loaded without a dtype mixes fp16 text and fp32 UNet.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    named = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})
    load_in_fp32(folder / "config.json")


def forget_origin(config: Path) -> None:
    """Leave out where the part was loaded from: a folder of the machine that built it."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_in_fp32(config: Path) -> None:
    """Make fp32 the dtype that transformers chooses when the caller names none."""
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def export_pipeline(work_dir: Path, family: str, target: Path) -> None:
    """Write a pipeline folder in fp16 beside `target`, then swap."""
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make_pipeline(work_dir, family).to(torch.float16).save_pretrained(new)
    for name in ("tokenizer", "tokenizer_2"):
        if (new / name).exists():
            finish_tokenizer(new / name, work_dir, name)
    forget_origin(new / "vae" / "config.json")
    finish_text_encoder(new / "text_encoder")
    if (new / "text_encoder_2").exists():
        load_in_fp32(new / "text_encoder_2" / "config.json")
    swap_folder(new, target)
    LOG.info("exported %s: %.1f MB", target, folder_bytes(target) / 1e6)


def export_clip(work_dir: Path, target: Path) -> None:
    """Write the CLIPModel with its image processor and tokenizer in fp16."""
    from transformers import CLIPModel

    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    CLIPModel.from_pretrained(work_dir / "models" / "clip").half().save_pretrained(new)
    shutil.copy2(work_dir / "models" / "clip" / "preprocessor_config.json", new)
    tokenizer(work_dir, "tokenizer").save_pretrained(new)
    finish_tokenizer(new, work_dir, "tokenizer")
    load_in_fp32(new / "config.json")
    swap_folder(new, target)
    LOG.info("exported %s: %.1f MB", target, folder_bytes(target) / 1e6)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def export_all(work_dir: Path, assets_dir: Path) -> None:
    export_clip(work_dir, assets_dir / MODEL_FOLDERS["clip"])
    for family in ("sdxl", "sd"):
        export_pipeline(work_dir, family, assets_dir / MODEL_FOLDERS[family])
