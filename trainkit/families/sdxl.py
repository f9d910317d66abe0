"""SDXL: load and freeze it, encode prompts and pixels, call the denoiser; its LoRA targets and its WebUI names.

B batch, T tokens, D width of both text encoders together, P width of the pooled text, C,h,w latent sizes.
Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", §2.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from trainkit import rng
from trainkit.diffusion import Level, NoiseSchedule
from trainkit.errors import Problem
from trainkit.families.pretrained import (
    Json,
    Repo,
    empty_device_cache,
    fingerprint,
    freeze,
    json_digest,
    quiet_loading,
    tokenizer_digest,
)
from trainkit.families.sgm import webui_name
from trainkit.families.text import token_ids

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from trainkit.data.batch import Batch
    from trainkit.options import ModelOptions

MODEL_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"
PENULTIMATE = 2  # SDXL conditions on the last-but-one hidden state of both encoders

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
LORA_TARGETS: dict[str, tuple[str, ...]] = {  # --lora_layers -> ends of the module paths that get an adapter
    "attention": ATTENTION,
    "attention+ff": (*ATTENTION, *FEED_FORWARD),
    "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out"),  # every linear layer of the transformer blocks
}


# ----------------------------------------------------------------------------------------------------------------------
# Before loading: the JSON files tell what will not work


def problems(path: str, *, resolution: int, vae_path: str | None = None, revision: str | None = None,
             variant: str | None = None) -> list[Problem]:
    """Everything that stops training from this model folder or Hub id, read from its small JSON files."""
    model = Repo(str(path), MODEL_FLAG, revision)
    vae = Repo(str(vae_path), VAE_FLAG) if vae_path else model
    found = model.unreachable("model_index.json") + (vae.unreachable("config.json") if vae_path else [])
    if found:
        return found
    vae_folder = "" if vae_path else "vae"
    vae_config = vae.json(f"{vae_folder}/config.json".lstrip("/"))
    found = [*layout_problems(model), *([] if vae_config else [no_vae(vae)])]
    if found:
        return found
    unet_config = model.json("unet/config.json")
    found = [*fit_problems(model, unet_config, vae_config), *resolution_problems(resolution, unet_config, vae_config)]
    found += model.weight_problems(("unet", "text_encoder", "text_encoder_2"), variant)
    return found + [*vae.weight_problems((vae_folder,), None if vae_path else variant)]


def layout_problems(model: Repo) -> Iterator[Problem]:
    """Is this an SDXL base model in the Diffusers layout?"""
    index, unet = model.json("model_index.json"), model.json("unet/config.json")
    if index is None:
        yield model.problem("not a Diffusers model folder", "it has no model_index.json",
                            f"name the folder that holds model_index.json in {MODEL_FLAG}")
    if unet is None:
        yield model.problem("the model folder has no UNet", "unet/config.json is missing",
                            "copy the unet folder of the model there, or name a complete model", kind="data")
    if index is None or unet is None:
        return
    if unet.get("addition_embed_type") != "text_time":
        yield model.problem("not an SDXL model", f"its UNet has no size conditioning ({index.get('_class_name')})",
                            "train SD 1.x and 2.x models with train_text_to_image_lora.py")
    elif index.get("text_encoder") in (None, [None, None]):
        yield model.problem("an SDXL refiner cannot be trained here", "it has one text encoder, SDXL base has two",
                            "name the base model, stabilityai/stable-diffusion-xl-base-1.0 for example")


def no_vae(vae: Repo) -> Problem:
    missing = "config.json" if vae.flag == VAE_FLAG else "vae/config.json"
    return vae.problem("no VAE there", f"{missing} is missing", f"name a folder that holds a VAE in {VAE_FLAG}")


def fit_problems(model: Repo, unet: Json, vae: Json) -> Iterator[Problem]:
    """Do the parts fit one another and the objectives we have?"""
    if unet["in_channels"] != vae["latent_channels"]:
        yield model.problem(
            "UNet and VAE do not fit", f"the UNet takes {unet['in_channels']} channels, the VAE makes "
            f"{vae['latent_channels']} (inpainting models take 9)", "name a text-to-image model and its VAE")
    scheduler = model.json("scheduler/scheduler_config.json")
    if scheduler is None:
        yield model.problem("the model folder has no scheduler", "scheduler/scheduler_config.json is missing",
                            "copy the scheduler folder of the model there", kind="data")
    elif "EDM" in str(scheduler.get("_class_name")):
        yield model.problem("not yet: EDM checkpoints", f"its scheduler is {scheduler['_class_name']}",
                            "name an epsilon or v-prediction SDXL model")


def resolution_problems(resolution: int, unet: Json, vae: Json) -> Iterator[Problem]:
    """A side must survive the VAE's and then the UNet's halvings without a remainder."""
    vae_factor, unet_stride = halvings(vae), halvings(unet)
    step = vae_factor * unet_stride
    if resolution <= 0 or resolution % step:
        near = max(step, round(resolution / step) * step)
        yield Problem(
            f"the model cannot take {resolution} px", f"--resolution {resolution}",
            f"sides must be multiples of {step} (VAE factor {vae_factor} × UNet stride {unet_stride})",
            f"--resolution {near}")


def halvings(config: Json) -> int:
    """Pixels (or latents) a side per innermost cell: every level but the last halves the sides."""
    return 2 ** (len(config["block_out_channels"]) - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class SDXL:
    """The frozen base model. `denoiser` is what training calls: the UNet, or a wrapper a distributed run puts there.

    unet in the weight dtype; VAE fp32 (it overflows in fp16); text encoders fp32, because they run once and their
    rounding would stay in every step; what they return is cast to the weight dtype.
    """

    lora_targets = LORA_TARGETS
    architecture, webui_base = "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"  # ModelSpec's and kohya's names for it

    def __init__(self, *, path: str, unet: UNet2DConditionModel, vae: AutoencoderKL,
                 tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
                 text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
                 schedule: NoiseSchedule, scheduler_config: Json, device: torch.device):
        self.path, self.schedule, self.scheduler_config = path, schedule, dict(scheduler_config)
        self.tokenizers, self.device, self.weight_dtype = tokenizers, device, unet.dtype
        self.identity = identity(unet, vae, tokenizers, text_encoders, scheduler_config)
        self.unet: UNet2DConditionModel = freeze(unet)  # on the device from `settle` on
        self.vae: AutoencoderKL = freeze(vae).to(device)
        self.text_encoders = tuple(freeze(encoder).to(device) for encoder in text_encoders)
        self.denoiser: nn.Module = self.unet

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def vae_factor(self) -> int:
        """Pixels a side per latent."""
        return halvings(self.vae.config)

    @property
    def text_identity(self) -> str:
        """Digest of everything that decides what `encode_prompts` returns."""
        return json_digest(self.identity["text"], str(self.weight_dtype))

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
        """Conditioning as the stock pipeline makes it -> embeds [B,T,D], pooled [B,P], in the weight dtype.

        clip_skip k takes layer −(k+2). The pooled vector is the second encoder's, projected, at the true end token.
        """
        assert self.text_encoders, "the text encoders were freed"
        layer = -(PENULTIMATE + (clip_skip or 0))
        ids = [token_ids(tokenizer, prompts).to(self.device) for tokenizer in self.tokenizers]  # 2 × [B,T]
        outs = [enc(i, output_hidden_states=True) for enc, i in zip(self.text_encoders, ids, strict=True)]
        embeds = torch.cat([out.hidden_states[layer] for out in outs], dim=-1)
        return embeds.to(self.weight_dtype), outs[-1].text_embeds.to(self.weight_dtype)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] in −1..1 -> mean, logvar [B,C,h,w] of the VAE posterior, fp32 and unscaled."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def sample_latents(self, batch: Batch, keys: Sequence[rng.Key]) -> Tensor:
        """Clean latents of a batch, drawn from the VAE's posterior, one key a row -> x0 [B,C,h,w] fp32."""
        mean, logvar = (batch.mean, batch.logvar) if batch.pixels is None else self.encode_pixels(batch.pixels)
        noise = rng.normal(mean.shape[1:], keys, name="posterior").to(mean.device)
        return self.to_latents(mean + (0.5 * logvar).exp() * noise)

    def to_latents(self, sample: Tensor) -> Tensor:
        """A sample of the VAE posterior -> x0 as the UNet knows it [B,C,h,w]: (sample − mean) · scaling / std."""
        mean, std = self._latent_statistics(sample)
        return (sample - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """x0 [B,C,h,w] -> pictures."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        mean, std = self._latent_statistics(latents)
        pixels = self.vae.decode(latents * std / self.vae.config.scaling_factor + mean).sample  # [B,3,H,W]
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # [B,H,W,3]
        return [Image.fromarray(picture) for picture in levels.cpu().numpy()]

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Per-channel mean and std of the latents where the VAE's config has them, else 0 and 1 -> [1,C,1,1] each."""
        mean = self.vae.config.get("latents_mean") or [0.0] * self.latent_channels
        std = self.vae.config.get("latents_std") or [1.0] * self.latent_channels
        return tuple(torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for v in (mean, std))

    def denoise(self, z: Tensor, level: Level, *, text: tuple[Tensor, Tensor], time_ids: Tensor) -> Tensor:
        """The network's output for noised latents z [B,C,h,w] -> [B,C,h,w].

        text      embeds [B,T,D], pooled [B,P]
        time_ids  [B,6], kept fp32: bf16 has 8 significant bits and would round sizes above 256 px
        """
        embeds, pooled = text
        added = {"text_embeds": pooled, "time_ids": time_ids.float()}
        return self.denoiser(z.to(self.weight_dtype), level.cond.to(z.device), encoder_hidden_states=embeds,
                             added_cond_kwargs=added, return_dict=False)[0]

    def webui_name(self, path: str) -> str:
        """What WebUIs call the UNet module `path`."""
        return webui_name(path, self.unet.config)

    def settle(self, *, keep_vae: bool, gradient_checkpointing: bool = False) -> None:
        """Make room on the device, then move the UNet there: it never shares it with the text encoders."""
        self.free_text_encoders()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if not keep_vae:
            self.free_vae()
        self.unet.to(self.device)

    def free_text_encoders(self) -> None:
        """Give their memory back; every prompt must be encoded by now."""
        self.text_encoders = ()
        gc.collect()
        empty_device_cache()

    def free_vae(self) -> None:
        """Move the VAE to host memory: the latents are cached, and only previews need it again."""
        self.vae.to("cpu")
        empty_device_cache()


def skeleton(path: str, *, revision: str | None = None) -> UNet2DConditionModel:
    """The UNet without its weights, to look up module paths in."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision))


def load(options: ModelOptions, *, device: torch.device, weight_dtype: torch.dtype,
         prediction_type: str | None = None, compat: Literal["diffusers"] | None = None) -> SDXL:
    """Load and freeze every part, from safetensors only. Revision and variant are the base model's, not another VAE's.

    prediction_type  overrides what the scheduler's config says
    compat           "diffusers" takes the pooled vector where the text encoder's config says; by default it is taken
                     at the end token even where a config says `eos_token_id` 2, which Transformers reads as "the
                     largest id" (huggingface/transformers #24650)
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    path, revision = str(options.pretrained_model_name_or_path), options.revision
    part = {"revision": revision, "variant": options.variant, "use_safetensors": True}
    other_vae = options.pretrained_vae_model_name_or_path
    vae_from = {"subfolder": "vae", **part} if other_vae is None else {"use_safetensors": True}
    with quiet_loading():
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=weight_dtype, **part)
        vae = AutoencoderKL.from_pretrained(other_vae or path, torch_dtype=torch.float32, **vae_from)
        first = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=torch.float32, **part)
        second = CLIPTextModelWithProjection.from_pretrained(
            path, subfolder="text_encoder_2", dtype=torch.float32, **part)
        tokenizers = tuple(CLIPTokenizer.from_pretrained(path, subfolder=folder, revision=revision)
                           for folder in ("tokenizer", "tokenizer_2"))
    if compat is None:
        second.text_model.eos_token_id = tokenizers[1].eos_token_id
    config = DDPMScheduler.load_config(path, subfolder="scheduler", revision=revision)
    schedule = NoiseSchedule(DDPMScheduler.from_config(config).alphas_cumprod,
                             prediction_type or config.get("prediction_type", "epsilon"))
    return SDXL(path=path, unet=unet, vae=vae, tokenizers=tokenizers, text_encoders=(first, second),
                schedule=schedule, scheduler_config=config, device=torch.device(device))


def identity(unet: nn.Module, vae: nn.Module, tokenizers: Sequence[CLIPTokenizer], text_encoders: Sequence[nn.Module],
             scheduler_config: Json) -> dict[str, str]:
    """Digests of the parts: cache keys name the part they depend on, checkpoints name them all."""
    pooled_at = text_encoders[-1].text_model.eos_token_id
    text = [fingerprint(encoder) for encoder in text_encoders] + [tokenizer_digest(t) for t in tokenizers]
    return {
        "unet": json_digest(fingerprint(unet), config_values(unet)),
        "vae": json_digest(fingerprint(vae), config_values(vae)),
        "text": json_digest(text, pooled_at),
        "schedule": json_digest(scheduler_config),
    }


def config_values(module: nn.Module) -> dict[str, object]:
    """A config without the entries that tell where and by which version it was saved."""
    return {k: v for k, v in module.config.items() if not k.startswith("_")}
