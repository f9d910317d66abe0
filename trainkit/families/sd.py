"""Stable Diffusion 1.x and 2.x: one text encoder read to its end, no pooled text, no sizes; Diffusers names in files.

1.x has CLIP's text encoder; 2.x has OpenCLIP's, saved without the last layer that it does not use, linear projections
where 1.x has 1×1 convolutions, and for 768 pixels v-prediction. Their folders say all of it.
B batch, T tokens, D width of the text encoder, C,h,w latent sizes.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", §3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.condition import Condition, equally_long
from trainkit.devices import upload
from trainkit.diffusion import AS_SAVED, Level, ScheduleChange
from trainkit.errors import Problem
from trainkit.families import base, checks
from trainkit.families.base import EncodePrompts, Family, ModelLayout
from trainkit.families.checks import latents, native_resolution, skeleton
from trainkit.families.file_names import SD_NAMES, FileNames
from trainkit.families.pretrained import CLASS_INPUTS, Config, Repo, part_class
from trainkit.families.tokenize import chunk_counts, chunked
from trainkit.families.unet_targets import LORA_TARGETS, TEXT_LORA_TARGETS
from trainkit.families.weighted_text import Chunking, weighted_states

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer, PreTrainedModel

    from trainkit.options import Compat, ModelOptions
    from trainkit.options.prompt_weights import WeightedText

__all__ = ["LAYOUT", "LORA_TARGETS", "SD", "TEXT_LORA_TARGETS", "latents", "load", "native_resolution", "problems",
           "names_of", "skeleton"]

TEXT_ENCODER = "CLIPTextModel"
OTHER_INPUTS = ("addition_embed_type", *CLASS_INPUTS)  # of a UNet, besides text


def incompatible_parts(model: Repo, index: Config, unet: Config) -> Iterator[Problem]:
    """What makes it another model than Stable Diffusion's base."""
    fix = "name a Stable Diffusion 1.x or 2.x base model, stable-diffusion-v1-5/stable-diffusion-v1-5 for example"
    inputs = [f"{name} is {unet[name]!r}" for name in OTHER_INPUTS if unet.get(name)]
    encoder_class = part_class(index, "text_encoder")
    if inputs:
        yield model.problem("a UNet that asks for more than text cannot be trained here",
                            f"unet/config.json: {', '.join(inputs)} ({index.get('_class_name')})", fix)
    elif encoder_class not in (None, TEXT_ENCODER):
        yield model.problem("not a Stable Diffusion model",
                            f"its text encoder is a {encoder_class}, not a {TEXT_ENCODER}", fix)


LAYOUT = ModelLayout("unet", ("tokenizer",), ("text_encoder",), incompatible_parts)
problems = partial(checks.problems, LAYOUT)


def names_of(unet: UNet2DConditionModel) -> FileNames:
    """What LoRA files call its modules."""
    return SD_NAMES


class SD(Family):
    """The frozen base model. Nothing is pooled, so where a config puts the end token does not matter."""

    layout, guidance_scale, names = LAYOUT, 7.5, SD_NAMES

    @property
    def is_v2(self) -> bool:
        return bool(self.denoiser.config.use_linear_projection)

    @property
    def architecture(self) -> str:
        """ModelSpec has one name for 1.x, and two for 2.x by what the network predicts."""
        if not self.is_v2:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if self._predicts_v else "stable-diffusion-v2-512"

    @property
    def released_side(self) -> int:
        return 768 if self.is_v2 and self._predicts_v else 512

    @property
    def base_metadata(self) -> dict[str, str]:
        """See Family; names of kohya-ss/sd-scripts, library/model_util.py and library/sai_model_spec.py."""
        version = f"sd_v{1 + self.is_v2}" + ("_v" if self._predicts_v else "")
        return {"ss_v2": str(self.is_v2), "ss_base_model_version": version, "modelspec.implementation": "diffusers"}

    @property
    def _predicts_v(self) -> bool:
        return self.schedule.prediction_type == "v_prediction"

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Condition:
        """Conditioning as the stock pipeline makes it -> embeds [B,T,D], in the weight dtype."""
        (encoder,) = self._ready_encoders()
        embeds = encode(self.tokenizers, encoder, prompts, clip_skip, self.max_chunks)
        return Condition({"embeds": embeds.to(self.weight_dtype)})

    def denoise(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """The network's output for noised latents z [B,C,h,w] -> [B,C,h,w]; it is given the prompts alone."""
        return self.denoiser(z.to(self.weight_dtype), level.cond.to(z.device),
                             encoder_hidden_states=condition["embeds"], return_dict=False)[0]

    def pipeline(self, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
        """The stock pipeline around the denoiser in training: no text encoder, no VAE, no safety checker."""
        from diffusers import StableDiffusionPipeline

        return self._silent(StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=self.denoiser, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False))

    def pipeline_text(
        self, pipe: StableDiffusionPipeline, prompts: list[str], encode: EncodePrompts,
    ) -> dict[str, Tensor]:
        """Encoded prompts as arguments of `pipe`; unconditional is the encoded empty prompt."""
        empty = encode([""] * len(prompts))
        given, unconditional = equally_long([encode(prompts)["embeds"], empty["embeds"]])
        return {"prompt_embeds": given, "negative_prompt_embeds": unconditional}


def encode(tokenizers: Sequence[CLIPTokenizer], encoder: PreTrainedModel, prompts: Sequence[str],
           clip_skip: int | None = None, max_chunks: int = 1) -> Tensor:
    """What the text encoder says of prompts -> embeds [B,T,D]; long ones are read in chunks.

    The last hidden state behind the final layer norm; clip_skip k takes the layer k before it through that norm.
    """
    chunks = chunked(tokenizers, prompts, max_chunks)
    ids, attended = upload([chunks.ids[0], chunks.attended[0]], encoder.device)  # [N,T] each
    mask = attended if masks_padding(encoder.config) else None
    return chunks.joined(hidden_states(encoder, ids, mask, clip_skip))


def hidden_states(encoder: PreTrainedModel, ids: Tensor, attended: Tensor | None, clip_skip: int | None) -> Tensor:
    """Of chunks of tokens, ids [N,T] -> [N,T,D]."""
    out = encoder(ids, attention_mask=attended, output_hidden_states=clip_skip is not None)
    if clip_skip is None:
        return out.last_hidden_state
    body = getattr(encoder, "text_model", encoder)  # a level that Transformers 5 has dropped
    return body.final_layer_norm(out.hidden_states[-(clip_skip + 1)])


def encode_weighted(tokenizers: Sequence[CLIPTokenizer], encoder: PreTrainedModel, prompt: WeightedText,
                    clip_skip: int | None = None, max_chunks: int = 1) -> Tensor:
    """What the text encoder says of a prompt with weights -> embeds [1,T,D]."""
    (chunks,) = chunk_counts(tokenizers, [prompt.text], max_chunks)
    cut = Chunking(tokenizers[0], chunks, max_chunks, masks_padding(encoder.config))
    return weighted_states(cut, encoder, partial(hidden_states, encoder, clip_skip=clip_skip), prompt)


def masks_padding(config: object) -> bool:
    """Whether the text encoder must not look at the padding: not in the released models."""
    return bool(getattr(config, "use_attention_mask", False))


def load(options: ModelOptions, *, device: torch.device, weight_dtype: torch.dtype,
         schedule: ScheduleChange = AS_SAVED,
         compat: Compat | None = None, max_chunks: int = 1) -> SD:
    """Load and freeze every part, from safetensors only. Revision and variant are the base model's, not another VAE's.

    schedule  what the flags change of the scheduler's config
    compat    changes nothing here: it tells where pooled text is taken, and there is none
    max_chunks  of tokens that a long text is read in
    """
    from transformers import CLIPTextModel

    parts = base.load_parts(options, LAYOUT, (CLIPTextModel,), weight_dtype=weight_dtype,
                            device=device)
    return base.assemble(SD, parts, device=device, schedule=schedule, vae_batch_size=options.vae_batch_size,
                         max_chunks=max_chunks,
                         text_detail=masks_padding(parts.text_encoders[0].config))
