"""SDXL: load and freeze it, encode prompts and pixels, call the denoiser; its LoRA targets and its WebUI names.

B batch, T tokens, D width of both text encoders together, P width of the pooled text, C,h,w latent sizes.
Source: Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", §2.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from trainkit import diffusion, rng
from trainkit.diffusion import Level, Schedule
from trainkit.errors import Problem, UserError
from trainkit.families.pretrained import (
    Json,
    Repo,
    empty_device_cache,
    fingerprint,
    freeze,
    json_digest,
    load_part,
    quiet_loading,
    tokenizer_digest,
)
from trainkit.families.sgm import text_name, webui_name
from trainkit.families.text import token_ids

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from trainkit.data.batch import Batch
    from trainkit.options import ModelOptions

log = logging.getLogger(__name__)

MODEL_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"
CLIP_LAYERS = 12  # where a text encoder's config does not say
TIMESTEPS = 1000  # where a scheduler's does not
PENULTIMATE = 2  # SDXL conditions on the last-but-one hidden state of both encoders

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
LINEAR: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention+ff": (*ATTENTION, *FEED_FORWARD),
    "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out"),  # every linear layer of the transformer blocks
}
LORA_TARGETS = LINEAR | {  # --lora_layers -> ends of the module paths that get an adapter
    f"{name}+conv": (*ends, *CONVOLUTIONS) for name, ends in LINEAR.items()}
TEXT_LORA_TARGETS = dict.fromkeys(LORA_TARGETS, ("q_proj", "k_proj", "v_proj", "out_proj"))  # of both text encoders


# ----------------------------------------------------------------------------------------------------------------------
# Before loading: the JSON files tell what will not work


def problems(path: str, *, resolution: int, vae_path: str | None = None, revision: str | None = None,
             variant: str | None = None, clip_skip: int | None = None, prediction_type: str | None = None,
             rescale_betas_zero_snr: bool = False, timesteps: tuple[int, int | None] = (0, None)) -> list[Problem]:
    """Everything that stops training from this model folder or Hub id, read from its small JSON files.

    timesteps  --min_timestep and --max_timestep
    """
    model = Repo(str(path), MODEL_FLAG, revision)
    vae = Repo(str(vae_path), VAE_FLAG) if vae_path else model
    vae_folder = "" if vae_path else "vae"
    try:
        found = model.unreachable("model_index.json") + (vae.unreachable("config.json") if vae_path else [])
        if found:
            return found
        vae_config = vae.json(f"{vae_folder}/config.json".lstrip("/"))
        found = [*layout_problems(model), *([] if vae_config else [no_vae(vae)])]
        if found:
            return found
        unet_config = model.json("unet/config.json")
        found = [*fit_problems(model, unet_config, vae_config),
                 *schedule_problems(model, prediction_type=prediction_type, timesteps=timesteps,
                                    rescale_betas_zero_snr=rescale_betas_zero_snr),
                 *resolution_problems(resolution, unet_config, vae_config), *text_problems(model, clip_skip)]
    except UserError as damaged:  # a JSON file that is none
        return [*damaged.problems]
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
                            "name an SDXL base model, stabilityai/stable-diffusion-xl-base-1.0 for example")
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


def schedule_problems(model: Repo, *, prediction_type: str | None, rescale_betas_zero_snr: bool,
                      timesteps: tuple[int, int | None]) -> Iterator[Problem]:
    """Is there a noise schedule, one that its parametrisation can be trained on, with the timesteps asked for?"""
    scheduler = model.json("scheduler/scheduler_config.json")
    if scheduler is None:
        yield model.problem("the model folder has no scheduler", "scheduler/scheduler_config.json is missing",
                            "copy the scheduler folder of the model there", kind="data")
        return
    config = diffusion.effective_config(
        scheduler, prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr)
    yield from diffusion.config_problems(config)
    if diffusion.is_edm(config) and config["_class_name"] not in diffusion.EDM_SCHEDULERS:
        known = ", ".join(diffusion.EDM_SCHEDULERS)
        yield model.problem(f"an EDM scheduler we do not know: {config['_class_name']}",
                            f"scheduler/scheduler_config.json names it; known: {known}", "put one of these there")
    (first, end), steps = timesteps, int(config.get("num_train_timesteps", TIMESTEPS))
    if end is None or first < end:  # else the options' own problem (options/rules.py)
        yield from diffusion.range_problems(first, end or steps, steps)


def text_problems(model: Repo, clip_skip: int | None) -> Iterator[Problem]:
    """Are both tokenizers and encoders there, the encoders with layers enough for --clip_skip?"""
    for folder in ("tokenizer", "tokenizer_2"):
        words = any(model.has(f"{folder}/{name}") for name in ("vocab.json", "tokenizer.json"))
        if not words or model.json(f"{folder}/tokenizer_config.json") is None:
            yield model.problem(f"the model folder has no {folder}", f"{folder}/tokenizer_config.json or vocab.json is "
                                "missing", f"copy the {folder} folder of the model there", kind="data")
    for folder in ("text_encoder", "text_encoder_2"):
        config = model.json(f"{folder}/config.json")
        if config is None:
            yield model.problem(f"the model folder has no {folder}", f"{folder}/config.json is missing",
                                f"copy the {folder} folder of the model there", kind="data")
        elif (clip_skip or 0) >= (layers := config.get("num_hidden_layers", CLIP_LAYERS)):
            yield Problem(f"{folder} has no layer to take with --clip_skip {clip_skip}", f"--clip_skip {clip_skip}",
                          f"it has {layers} layers", f"--clip_skip {layers - 1} at most, or leave it out")


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
    """The frozen base model.

    unet in the weight dtype; VAE fp32 (it overflows in fp16); text encoders fp32, because they run once and their
    rounding would stay in every step; what they return is cast to the weight dtype. Each part moves to the device when
    it is first asked, the UNet in `settle`, so that no part waits there for its turn.

    sets_eos  whether the pooled vector is taken at the end token although the second text encoder's config says
              otherwise, so that other programs must be told (see `load`)
    """

    lora_targets, text_lora_targets = LORA_TARGETS, TEXT_LORA_TARGETS
    architecture, webui_base = "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"  # ModelSpec's and kohya's names for it

    def __init__(self, *, path: str, unet: UNet2DConditionModel, vae: AutoencoderKL,
                 tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
                 text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
                 schedule: Schedule, scheduler_config: Json, identity: Json, device: torch.device,
                 revision: str | None = None, sets_eos: bool = False):
        self.path, self.revision, self.sets_eos = path, revision, sets_eos
        self.schedule, self.scheduler_config = schedule, dict(scheduler_config)
        self.tokenizers, self.device, self.weight_dtype = tokenizers, device, unet.dtype
        self.identity = dict(identity)
        self.unet: UNet2DConditionModel = freeze(unet)
        self.vae: AutoencoderKL = freeze(vae)
        self.text_encoders = tuple(freeze(encoder) for encoder in text_encoders)

    @property
    def name(self) -> str:
        """The base model without the folders it lies in."""
        return Path(self.path).resolve().name if Repo(self.path, MODEL_FLAG).is_local else self.path

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
        for encoder in self.text_encoders:
            if encoder.device != self.device:  # `to` visits every parameter, and this may be a training step
                encoder.to(self.device)
        outs = [encoder(i, output_hidden_states=True) for encoder, i in zip(self.text_encoders, ids, strict=True)]
        embeds = torch.cat([out.hidden_states[layer] for out in outs], dim=-1)
        return embeds.to(self.weight_dtype), outs[-1].text_embeds.to(self.weight_dtype)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] in −1..1 -> mean, logvar [B,C,h,w] of the VAE posterior, fp32 and unscaled."""
        vae = self.vae.to(self.device)
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
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
        vae = self.vae.to(self.device)
        latents = latents.to(self.device, vae.dtype)
        mean, std = self._latent_statistics(latents)
        pixels = vae.decode(latents * std / vae.config.scaling_factor + mean).sample  # [B,3,H,W]
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
        return self.unet(z.to(self.weight_dtype), level.cond.to(z.device), encoder_hidden_states=embeds,
                             added_cond_kwargs=added, return_dict=False)[0]

    def webui_name(self, path: str, network: str = "unet") -> str:
        """What WebUIs call the module `path` of a network."""
        return webui_name(path, self.unet.config) if network == "unet" else text_name(path, network)

    def settle(self, *, keep_vae: bool, gradient_checkpointing: bool = False) -> None:
        """Make room on the device, then move the UNet there; text encoders that do not train are freed by then."""
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if not keep_vae:
            self.free_vae()
        self.unet.to(self.device)

    def free_text_encoders(self) -> None:
        """Give their memory back, but for one that somebody else holds; every prompt must be encoded by now."""
        self.text_encoders = ()
        gc.collect()
        empty_device_cache()

    def free_vae(self) -> None:
        """Move the VAE to host memory: the latents are cached, and only pictures to look at need it again."""
        self.vae.to("cpu")
        empty_device_cache()


def skeleton(path: str, *, revision: str | None = None) -> UNet2DConditionModel:
    """The UNet without its weights, to look up module paths in."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision))


def load(options: ModelOptions, *, device: torch.device, weight_dtype: torch.dtype,
         prediction_type: str | None = None, rescale_betas_zero_snr: bool = False,
         compat: Literal["diffusers"] | None = None) -> SDXL:
    """Load and freeze every part, from safetensors only. Revision and variant are the base model's, not another VAE's.

    prediction_type  overrides what the scheduler's config says; so does rescale_betas_zero_snr
    compat           "diffusers" takes the pooled vector where the text encoder's config says; by default it is taken
                     at the end token even where a config says `eos_token_id` 2, which Transformers reads as "the
                     largest id" (huggingface/transformers #24650)
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    model = Repo(str(options.pretrained_model_name_or_path), MODEL_FLAG, options.revision)
    other, variant = options.pretrained_vae_model_name_or_path, options.variant
    vae_repo, vae_folder, vae_variant = (Repo(str(other), VAE_FLAG), "", None) if other else (model, "vae", variant)
    files, full = {"variant": variant, "use_safetensors": True}, torch.float32
    with quiet_loading():
        unet = load_part(model, UNet2DConditionModel, "unet", torch_dtype=weight_dtype, **files)
        vae = load_part(vae_repo, AutoencoderKL, vae_folder, torch_dtype=full, variant=vae_variant,
                        use_safetensors=True)
        first = load_part(model, CLIPTextModel, "text_encoder", dtype=full, **files)
        second = load_part(model, CLIPTextModelWithProjection, "text_encoder_2", dtype=full, **files)
        tokenizers = tuple(load_part(model, CLIPTokenizer, folder) for folder in ("tokenizer", "tokenizer_2"))
    sets_eos = compat is None and second.text_model.eos_token_id != tokenizers[1].eos_token_id
    if sets_eos:
        second.text_model.eos_token_id = tokenizers[1].eos_token_id
    config = scheduler_config(model, prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr)
    weights = {name: fingerprint(model.folder(name), variant) for name in ("unet", "text_encoder", "text_encoder_2")}
    weights["vae"] = fingerprint(vae_repo.folder(vae_folder), vae_variant)
    parts = identity(weights, unet=unet, vae=vae, tokenizers=tokenizers, scheduler_config=config,
                     pooled_at=second.text_model.eos_token_id)
    return SDXL(path=model.path, unet=unet, vae=vae, tokenizers=tokenizers, text_encoders=(first, second),
                schedule=diffusion.make_schedule(config), scheduler_config=config, identity=parts,
                device=torch.device(device), revision=model.revision, sets_eos=sets_eos)


def scheduler_config(model: Repo, *, prediction_type: str | None, rescale_betas_zero_snr: bool) -> Json:
    """The model's scheduler config as the flags change it; says so when it makes the run an EDM one."""
    from diffusers import DDPMScheduler

    config = diffusion.effective_config(
        DDPMScheduler.load_config(model.path, subfolder="scheduler", revision=model.revision),
        prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr)
    if diffusion.is_edm(config):
        log.info("%s has an EDM scheduler (%s): it is preconditioned and trained as in Karras et al. 2022", model.path,
                 config["_class_name"])
    return config


def identity(weights: Mapping[str, str], *, unet: nn.Module, vae: nn.Module, tokenizers: Sequence[CLIPTokenizer],
             scheduler_config: Json, pooled_at: int) -> dict[str, str]:
    """Digests of the parts: cache keys name the part they depend on, checkpoints name them all.

    weights    fingerprints of the weight files by folder
    pooled_at  the token whose vector the second encoder returns as pooled
    """
    text = [weights["text_encoder"], weights["text_encoder_2"], *map(tokenizer_digest, tokenizers)]
    return {
        "unet": json_digest(weights["unet"], config_values(unet)),
        "vae": json_digest(weights["vae"], config_values(vae)),
        "text": json_digest(text, pooled_at),
        "schedule": json_digest(scheduler_config),
    }


def config_values(module: nn.Module) -> dict[str, object]:
    """A config without the entries that tell where and by which version it was saved."""
    return {k: v for k, v in module.config.items() if not k.startswith("_")}
