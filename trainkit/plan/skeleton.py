"""The trainer's own objects with a body of shapes: the family on the meta device, its tokenizers without words."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trainkit import diffusion
from trainkit.diffusion import ScheduleChange
from trainkit.families import Family
from trainkit.families.single_file import SCHEDULER_FILE
from trainkit.families.tokenize import text_tokens
from trainkit.frozen_weights import AS_LOADED, Storage
from trainkit.plan.live_bytes import META
from trainkit.plan.models import ModelConfigs

TOKENS = 77  # of every chunk of a prompt, to which CLIP's tokenizers pad


class NoWords:
    """Stands for CLIP's tokenizer: every prompt is as many of the same token, and fills all chunks that are read."""

    model_max_length = TOKENS
    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, max_chunks: int):
        self.max_chunks = max_chunks

    def __call__(self, prompts: Sequence[str], **settings: object) -> Any:
        if settings.get("add_special_tokens") is False:  # of a prompt that is to be cut into chunks
            return SimpleNamespace(input_ids=[[0] * (self.max_chunks * text_tokens(self)) for _ in prompts])
        ids = torch.zeros(len(prompts), TOKENS, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def get_vocab(self) -> dict[str, int]:
        return {}


def family_on_meta(configs: ModelConfigs, weight_dtype: torch.dtype, schedule: ScheduleChange, *,
                   storage: Storage = AS_LOADED, max_chunks: int = 1) -> Family:
    """The base model as `families.sdxl.load` and `families.sd.load` assemble it, without its numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from trainkit.families.sd import SD
    from trainkit.families.sdxl import SDXL

    family_class = SDXL if configs.is_sdxl else SD
    encoders = (CLIPTextModel, CLIPTextModelWithProjection)[: len(family_class.layout.text_encoders)]
    with torch.device(META):
        denoiser = UNet2DConditionModel.from_config(dict(configs.of("unet/config.json")))
        vae = AutoencoderKL.from_config(dict(configs.vae))
        texts = tuple(_text_encoder(encoder_class, configs.of(f"{folder}/config.json"))
                      for encoder_class, folder in zip(encoders, family_class.layout.text_encoders, strict=True))
    scheduler = diffusion.effective_config(configs.of(SCHEDULER_FILE), schedule)
    nn.Module.to(denoiser, weight_dtype)  # Diffusers' own `to` warns of what has no meaning without numbers
    storage.store(denoiser)
    parts: dict[str, Any] = {
        "denoiser": denoiser, "vae": vae, "text_encoders": texts, "scheduler_config": scheduler,
        "schedule": diffusion.make_schedule(scheduler), "tokenizers": (NoWords(max_chunks),) * len(texts),
        "max_chunks": max_chunks, "storage": storage,
        "path": configs.name, "revision": None, "identity": {}, "sampled_identity": {}, "device": META}
    return family_class(**parts)


def _text_encoder(encoder_class: Any, config: Any) -> Any:
    from transformers import CLIPTextConfig

    return encoder_class(CLIPTextConfig.from_dict(dict(config.get("text_config") or config)))
