"""SDXL: two text encoders side by side, a pooled text vector and sizes beside them; names of the SGM code in files.

B batch, T tokens, D width of both text encoders together, P width of the pooled text, C,h,w latent sizes.
Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", §2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.condition import UNCONDITIONAL, Condition, equally_long
from trainkit.devices import upload
from trainkit.diffusion import AS_SAVED, Level, ScheduleChange
from trainkit.errors import Problem
from trainkit.families import base, checks
from trainkit.families.base import EncodePrompts, Family, ModelLayout
from trainkit.families.checks import latents, native_resolution, skeleton
from trainkit.families.file_names import FileNames, xl_names
from trainkit.families.pretrained import CLASS_INPUTS, Config, Repo
from trainkit.families.tokenize import chunk_counts, chunked
from trainkit.families.unet_targets import LORA_TARGETS, TEXT_LORA_TARGETS
from trainkit.families.weighted_text import Chunking, weighted_states

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer, PreTrainedModel

    from trainkit.options import Compat, ModelOptions
    from trainkit.options.prompt_weights import WeightedText

__all__ = ["LAYOUT", "LORA_TARGETS", "SDXL", "TEXT_LORA_TARGETS", "latents", "load", "native_resolution", "problems",
           "names_of", "skeleton"]

PENULTIMATE = 2  # SDXL conditions on the last-but-one hidden state of both encoders


def incompatible_parts(model: Repo, index: Config, unet: Config) -> Iterator[Problem]:
    """What makes it another model than SDXL's base."""
    if unet.get("addition_embed_type") != "text_time":
        yield model.problem("not an SDXL model", f"its UNet has no size conditioning ({index.get('_class_name')})",
                            "name an SDXL base model, stabilityai/stable-diffusion-xl-base-1.0 for example")
    elif inputs := [f"{name} is {unet[name]!r}" for name in CLASS_INPUTS if unet.get(name)]:
        yield model.problem("a UNet that asks for more than text and sizes cannot be trained here",
                            f"unet/config.json: {', '.join(inputs)}",
                            "name an SDXL base model, stabilityai/stable-diffusion-xl-base-1.0 for example")
    elif index.get("text_encoder") in (None, [None, None]):
        yield model.problem("an SDXL refiner cannot be trained here", "it has one text encoder, SDXL base has two",
                            "name the base model, stabilityai/stable-diffusion-xl-base-1.0 for example")


LAYOUT = ModelLayout("unet", ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2"), incompatible_parts)
problems = partial(checks.problems, LAYOUT)


class SDXL(Family):
    """The frozen base model.

    sets_eos  whether the pooled vector is taken at the end token although the second text encoder's config says
              otherwise, so that other programs must be told (see `load`)
    """

    layout, guidance_scale = LAYOUT, 5.0
    released_side = 1024
    architecture = "stable-diffusion-xl-v1-base"
    base_metadata = {
        "ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }

    def __init__(self, *, sets_eos: bool = False, **parts: Any) -> None:
        super().__init__(**parts)
        self.sets_eos = sets_eos

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Condition:
        """Conditioning as the stock pipeline makes it -> embeds [B,T,D], pooled [B,P], in the weight dtype.

        UNCONDITIONAL is zeros or the encoded empty prompt, as the base model's pipeline is configured.
        """
        embeds, pooled = encode(self.tokenizers, self._ready_encoders(), prompts, clip_skip, self.max_chunks)
        condition = Condition({"embeds": embeds.to(self.weight_dtype), "pooled": pooled.to(self.weight_dtype)})
        if UNCONDITIONAL in prompts and self.zeros_without_prompt:
            absent, = upload([torch.tensor([prompt == UNCONDITIONAL for prompt in prompts])], embeds.device)  # [B]
            condition = Condition({"embeds": condition["embeds"].masked_fill(absent[:, None, None], 0),
                                   "pooled": condition["pooled"].masked_fill(absent[:, None], 0)})
        return condition

    @cached_property
    def zeros_without_prompt(self) -> bool:
        """Whether the base model was trained with zeros in place of an absent prompt, as its pipeline's config says."""
        return self._forces_zeros()

    def _forces_zeros(self) -> bool:
        index = self.model.json("model_index.json") or {}
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def denoise(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """The network's output for noised latents z [B,C,h,w] -> [B,C,h,w].

        Sizes stay in fp32: bf16 has 8 significant bits and would round those above 256 px.
        """
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"].float()}
        return self.denoiser(z.to(self.weight_dtype), level.cond.to(z.device), added_cond_kwargs=added,
                             encoder_hidden_states=condition["embeds"], return_dict=False)[0]

    def pipeline(self, scheduler: SchedulerMixin) -> StableDiffusionXLPipeline:
        """The stock pipeline around the denoiser in training: no text encoders, no VAE."""
        from diffusers import StableDiffusionXLPipeline

        return self._silent(StableDiffusionXLPipeline(
            vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=self.denoiser,
            scheduler=scheduler, force_zeros_for_empty_prompt=self._forces_zeros(), add_watermarker=False,
        ))

    def pipeline_text(self, pipe: StableDiffusionXLPipeline, prompts: list[str], encode: EncodePrompts
                      ) -> dict[str, Tensor]:
        """Encoded prompts as arguments of `pipe`; unconditional are zeros or encoded empty prompts, as configured."""
        given = encode(prompts)
        if pipe.config.force_zeros_for_empty_prompt:
            empty = Condition({name: torch.zeros_like(tensor) for name, tensor in given.items()})
        else:
            empty = encode([""] * len(prompts))
        embeds, unconditional = equally_long([given["embeds"], empty["embeds"]])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": given["pooled"],
                "negative_prompt_embeds": unconditional, "negative_pooled_prompt_embeds": empty["pooled"]}

    @property
    def names(self) -> FileNames:
        """See Family."""
        return names_of(self.denoiser)


def names_of(unet: UNet2DConditionModel) -> FileNames:
    """What LoRA files call its modules."""
    return xl_names(unet.config)


def encode(tokenizers: Sequence[CLIPTokenizer], encoders: Sequence[PreTrainedModel], prompts: Sequence[str],
           clip_skip: int | None = None, max_chunks: int = 1) -> tuple[Tensor, Tensor]:
    """What both text encoders say of prompts -> embeds [B,T,D], pooled [B,P]; long ones are read in chunks.

    clip_skip k takes layer −(k+2). The pooled vector is the second encoder's, projected, at the true end token, and
    of a long prompt that of its first chunk.
    """
    chunks = chunked(tokenizers, prompts, max_chunks)
    ids = upload(chunks.ids, encoders[0].device)  # 2 × [N,T]
    outs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
    embeds = torch.cat([out.hidden_states[layer(clip_skip)] for out in outs], dim=-1)
    return chunks.joined(embeds), chunks.first(outs[-1].text_embeds)


def layer(clip_skip: int | None) -> int:
    """Which of an encoder's hidden states is read."""
    return -(PENULTIMATE + (clip_skip or 0))


def encode_weighted(tokenizers: Sequence[CLIPTokenizer], encoders: Sequence[PreTrainedModel], prompt: WeightedText,
                    clip_skip: int | None = None, max_chunks: int = 1) -> Tensor:
    """What both text encoders say of a prompt with weights -> embeds [1,T,D]; weights do not count for pooled text."""
    (chunks,) = chunk_counts(tokenizers, [prompt.text], max_chunks)

    def of(tokenizer: CLIPTokenizer, encoder: PreTrainedModel) -> Tensor:
        def hidden(ids: Tensor, attended: Tensor | None) -> Tensor:
            return encoder(ids, attention_mask=attended, output_hidden_states=True).hidden_states[layer(clip_skip)]

        return weighted_states(Chunking(tokenizer, chunks, max_chunks), encoder, hidden, prompt)

    return torch.cat([of(*pair) for pair in zip(tokenizers, encoders, strict=True)], dim=-1)


def load(options: ModelOptions, *, device: torch.device, weight_dtype: torch.dtype,
         schedule: ScheduleChange = AS_SAVED,
         compat: Compat | None = None, max_chunks: int = 1) -> SDXL:
    """Load and freeze every part, from safetensors only. Revision and variant are the base model's, not another VAE's.

    schedule  what the flags change of the scheduler's config
    compat    "diffusers" takes the pooled vector where the text encoder's config says; by default it is taken
                     at the end token even where a config says `eos_token_id` 2, which Transformers reads as "the
                     largest id" (huggingface/transformers #24650)
    max_chunks  of tokens that a long text is read in
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = base.load_parts(options, LAYOUT, (CLIPTextModel, CLIPTextModelWithProjection), weight_dtype=weight_dtype,
                            device=device)
    second, end = parts.text_encoders[1].text_model, parts.tokenizers[1].eos_token_id
    sets_eos = compat != "diffusers" and second.eos_token_id != end
    if sets_eos:
        second.eos_token_id = end
    return base.assemble(SDXL, parts, device=device, schedule=schedule, vae_batch_size=options.vae_batch_size,
                         sets_eos=sets_eos, max_chunks=max_chunks, text_detail=second.eos_token_id)
