"""What the latent diffusion families share: a frozen UNet, VAE and text, and what keeps a folder from being trained.

B batch, T tokens, D width of the text, P width of the pooled text, C,h,w latent sizes.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", §3.
"""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from trainkit import diffusion, rng
from trainkit.condition import Condition
from trainkit.devices import empty_cache, upload, uses_tf32
from trainkit.diffusion import Level, Schedule, ScheduleChange
from trainkit.errors import Problem, UserError
from trainkit.families import sgm
from trainkit.families.file_names import FileNames
from trainkit.families.pretrained import (
    ANOTHER_VAE,
    MODEL_FLAG,
    Config,
    Repo,
    freeze,
    json_digest,
    load_part,
    quiet_loading,
    refuse_unknown_ids,
    tokenizer_digest,
)
from trainkit.families.single_file import model_at, vae_place
from trainkit.families.tokenize import chunk_counts
from trainkit.families.unet_targets import LORA_TARGETS, TEXT_LORA_TARGETS
from trainkit.frozen_weights import AS_LOADED, Storage, make_storage

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTokenizer, PreTrainedModel

    from trainkit.adapters import Prefix
    from trainkit.options import ModelOptions

log = logging.getLogger(__name__)


TILE = 512  # pixels a side of what is decoded at once
TEXT_CONFIG = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
               "num_attention_heads", "num_hidden_layers", "projection_dim", "vocab_size")
NOTHING: Mapping[str, str] = {}
EncodePrompts = Callable[[Sequence[str]], Condition]  # prompts to what the network is given for them


@dataclass(frozen=True)
class ModelLayout:
    """What a family's model folder holds besides VAE and scheduler."""

    denoiser: Prefix  # folder of the network that is trained, and its name in LoRA files
    tokenizers: tuple[str, ...]  # folders
    text_encoders: tuple[Prefix, ...]  # folders, and the networks' names in LoRA files
    incompatible_parts: Callable[[Repo, Config, Config], Iterator[Problem]]  # repo, model_index, denoiser config


class Encodable(Protocol):
    """Images, or what the VAE said of them: one of `pixels` and the two others is set."""

    @property
    def keys(self) -> Sequence[rng.Key]: ...

    @property
    def pixels(self) -> Tensor | None: ...

    @property
    def mean(self) -> Tensor | None: ...

    @property
    def logvar(self) -> Tensor | None: ...


def latent_statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and std of the latents where a VAE's config has them, else 0 and 1 -> [1,C,1,1] each."""
    channels = config["latent_channels"]
    mean, std = config.get("latents_mean") or [0.0] * channels, config.get("latents_std") or [1.0] * channels
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)


@contextmanager
def in_tiles(vae: AutoencoderKL, factor: int) -> Iterator[None]:
    """Inside, images larger than TILE are decoded in tiles whose seams are blended: for images to look at.

    A whole image of 1024 px takes 3.0 GiB beside the UNet, and tiles 0.8 (computed).
    """
    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, TILE, TILE // factor
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before


def nonfinite_vae(what: str, where: str, then: str = "") -> Problem:
    return Problem(f"the VAE turns {what} into NaN or infinity", where,
                   f"its weights are damaged, or their numbers overflow also in fp32, in which it runs{then}",
                   ANOTHER_VAE, "nonfinite")


def halvings(config: Config) -> int:
    """Pixels (or latents) a side per innermost cell: every level but the last halves the sides."""
    return 2 ** (len(config["block_out_channels"]) - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Family(ABC):
    """The frozen base model.

    file_metadata  what LoRA files say of the files of models that are one file, and of zero-terminal SNR
    doubted        whether what the denoiser predicts is not said anywhere and taken to be ε

    The denoiser, a UNet here, is in the weight dtype, or kept by `storage`.
    The VAE is in fp32, because it overflows in fp16. Text encoders
    are in fp32, because they run once and their rounding would stay in every step; what they return is cast to the
    weight dtype. Each part moves to the device when it is first asked, the denoiser in `prepare_for_training`, so that
    no part waits there for its turn.
    """

    layout: ClassVar[ModelLayout]
    guidance_scale: ClassVar[float]  # the stock pipeline's default
    lora_targets, text_lora_targets = LORA_TARGETS, TEXT_LORA_TARGETS

    def __init__(self, *, path: str, revision: str | None, denoiser: UNet2DConditionModel, vae: AutoencoderKL,
                 tokenizers: tuple[CLIPTokenizer, ...], text_encoders: tuple[PreTrainedModel, ...],
                 schedule: Schedule, scheduler_config: Config, identity: Mapping[str, str],
                 sampled_identity: Mapping[str, str], device: torch.device, vae_batch_size: int = 1,
                 file_metadata: Mapping[str, str] = NOTHING, doubted: bool = False, max_chunks: int = 1,
                 storage: Storage = AS_LOADED):
        self.path, self.revision, self.file_metadata, self.doubted = path, revision, dict(file_metadata), doubted
        self.schedule, self.scheduler_config = schedule, dict(scheduler_config)
        self.tokenizers, self.device, self.weight_dtype = tokenizers, device, denoiser.dtype
        self.storage = storage  # of the denoiser's weights, and of text encoders in which something trains
        self.max_chunks = max_chunks  # that a long prompt is read in
        self.identity, self.sampled_identity = dict(identity), dict(sampled_identity)
        self.denoiser: UNet2DConditionModel = freeze(denoiser)
        self.vae: AutoencoderKL = freeze(vae)
        self.vae_batch_size = vae_batch_size  # at 1024 px each image takes 2.5 GiB (computed)
        self.vae_checked = False
        self.latent_mean, self.latent_std = upload(latent_statistics(vae.config), device)
        self.text_encoders = tuple(freeze(encoder) for encoder in text_encoders)

    # What differs from family to family

    @property
    def numbered_blocks(self) -> Mapping[str, str]:
        """The UNet's blocks, as WebUIs number them."""
        return sgm.numbered(self.denoiser.config)

    @property
    @abstractmethod
    def architecture(self) -> str:
        """ModelSpec's name of the base model."""

    @property
    @abstractmethod
    def base_metadata(self) -> dict[str, str]:
        """What the header of a LoRA file says about the base model, besides its architecture."""

    @property
    @abstractmethod
    def released_side(self) -> int:
        """Pixels a side of the images that the released models of this architecture were made for."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Condition:
        """Conditioning as the stock pipeline makes it -> embeds [B,T,D] and what else there is, in the weight dtype."""

    @abstractmethod
    def denoise(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """The network's output for noised latents z [B,C,h,w] -> [B,C,h,w]."""

    @abstractmethod
    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """The stock pipeline around the denoiser in training: no text encoders, no VAE."""

    @abstractmethod
    def pipeline_text(self, pipe: DiffusionPipeline, prompts: list[str], encode: EncodePrompts) -> dict[str, Tensor]:
        """Encoded prompts, and the unconditional text as the base was trained, as arguments of `pipe`."""

    @property
    @abstractmethod
    def names(self) -> FileNames:
        """What LoRA files call the modules."""

    # What does not

    @property
    def name(self) -> str:
        """The base model without the folders it lies in."""
        path = Path(self.path)
        if path.is_file():  # which may be a link to one with a hash for a name
            return path.name
        return path.resolve().name if self.model.is_local else self.path

    @property
    def model(self) -> Repo:
        """The base model's files."""
        return model_at(self.path, MODEL_FLAG, self.revision)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def vae_factor(self) -> int:
        """Pixels a side per latent."""
        return halvings(self.vae.config)

    @property
    def native_size(self) -> tuple[int, int]:
        """(h, w) in pixels that the base model was made for; as released where its UNet's config does not say."""
        size = self.denoiser.config.sample_size  # of latents: a number, or [h,w]
        if size is None:
            return self.released_side, self.released_side
        h, w = size if isinstance(size, (list, tuple)) else (size, size)
        return h * self.vae_factor, w * self.vae_factor

    @property
    def text_identity(self) -> str:
        """Digest of everything that decides what `encode_prompts` returns."""
        longer = [self.max_chunks] if self.max_chunks > 1 else []
        return json_digest(self.identity["text"], str(self.weight_dtype), *longer)

    def chunk_counts(self, prompts: Sequence[str]) -> list[int]:
        """In how many chunks `encode_prompts` reads each prompt."""
        return chunk_counts(self.tokenizers, prompts, self.max_chunks)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] in −1..1 -> mean, logvar [B,C,h,w] of the VAE posterior, fp32 and unscaled."""
        vae = self.vae.to(self.device)
        posteriors = [vae.encode(some).latent_dist
                      for some in pixels.to(self.device, vae.dtype).split(self.vae_batch_size)]
        return torch.cat([p.mean for p in posteriors]).float(), torch.cat([p.logvar for p in posteriors]).float()

    def sample_latents(self, batch: Encodable) -> Tensor:
        """Clean latents of a batch, drawn from the VAE's posterior, one key a sample -> x0 [B,C,h,w] fp32.

            x0 = (sample − latent_mean) · scaling_factor / latent_std
        """
        mean, logvar, keys = batch.mean, batch.logvar, batch.keys
        if mean is None or logvar is None:
            assert batch.pixels is not None, "a batch has pixels or a cached posterior"
            mean, logvar = self.encode_pixels(batch.pixels)
            if not self.vae_checked:
                self._check_vae(mean, logvar)
        noise, = upload([rng.normal(mean.shape[1:], keys, name="posterior")], mean.device)
        sample = mean + (0.5 * logvar).exp() * noise
        return (sample - self.latent_mean) * self.vae.config.scaling_factor / self.latent_std

    def _check_vae(self, mean: Tensor, logvar: Tensor) -> None:
        """Of the first batch only, since it waits for the device; what is cached is checked image by image.

        Raises UserError where the VAE gives NaN or infinity.
        """
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise UserError(nonfinite_vae("images", "the first batch"))
        self.vae_checked = True

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """x0 [B,C,h,w] -> images. Raises UserError where the VAE turns finite latents into NaN or infinity."""
        pixels = self.decode_pixels(latents)
        if latents.isfinite().all() and not pixels.isfinite().all():
            raise UserError(nonfinite_vae("latents", "images to look at"))
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # [B,H,W,3]
        return [Image.fromarray(image) for image in levels.cpu().numpy()]

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """x0 [B,C,h,w] -> [B,3,H,W] in −1..1, on the device."""
        vae = self.vae.to(self.device)
        latents = latents.to(self.device, vae.dtype)
        scaled = latents * self.latent_std.to(vae.dtype) / vae.config.scaling_factor + self.latent_mean.to(vae.dtype)
        with in_tiles(vae, self.vae_factor):
            return torch.cat([vae.decode(latent).sample for latent in scaled.split(1)])

    @property
    def latents_identity(self) -> str:
        """Digest of everything that decides what `encode_pixels` returns."""
        details = [name for name, there in {
            "tf32": uses_tf32(self.device), f"{self.vae_batch_size} at once": self.vae_batch_size > 1}.items() if there]
        return json_digest(self.identity["vae"], *details) if details else self.identity["vae"]

    def _ready_encoders(self) -> tuple[PreTrainedModel, ...]:
        """The text encoders, on the device."""
        assert self.text_encoders, "the text encoders were freed"
        for encoder in self.text_encoders:
            if encoder.device != self.device:  # `to` visits every parameter, and this may be a training step
                encoder.to(self.device)
        return self.text_encoders

    def _silent(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """A pipeline without a VAE, told what it would ask the VAE."""
        pipe.vae_scale_factor = self.vae_factor  # otherwise guessed as 8
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prepare_for_training(self, *, keep_vae: bool, gradient_checkpointing: bool = False) -> None:
        """Make room on the device, then move the denoiser there; text encoders that do not train are freed by then."""
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        if not keep_vae:
            self.free_vae()
        self.denoiser.to(self.device)

    def free_text_encoders(self) -> None:
        """Give their memory back, but for one that somebody else holds; every prompt must be encoded by now."""
        self.text_encoders = ()
        gc.collect()
        empty_cache(self.device)

    def free_vae(self) -> None:
        """Move the VAE to host memory: the latents are cached, and only images to look at need it again."""
        self.vae.to("cpu")
        empty_cache(self.device)


AnyFamily = TypeVar("AnyFamily", bound=Family)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class Parts:
    """The parts of a model as they lie in its files, and digests of their weights by folder: of all, and of some.

    file_metadata  what LoRA files say of the files of models that are one file
    """

    model: Repo
    denoiser: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, ...]
    text_encoders: tuple[PreTrainedModel, ...]
    weights: dict[str, str]
    sampled: dict[str, str]
    file_metadata: dict[str, str]
    storage: Storage


def load_parts(options: ModelOptions, layout: ModelLayout, encoders: Sequence[type[PreTrainedModel]], *,
               weight_dtype: torch.dtype, device: torch.device) -> Parts:
    """Every part, from safetensors only. Revision and variant are the base model's, not another VAE's.

    encoders  the classes of the layout's text encoders
    device    that the run is on
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    model = model_at(str(options.pretrained_model_name_or_path), MODEL_FLAG, options.revision)
    other, variant = options.pretrained_vae_model_name_or_path, options.variant
    (vae_repo, vae_folder), vae_variant = vae_place(model, other), None if other else variant
    storage = make_storage(options.base_precision, weight_dtype, torch.device(device))
    files, full = {"variant": variant, "use_safetensors": True}, torch.float32
    with quiet_loading():
        denoiser = load_part(model, UNet2DConditionModel, layout.denoiser, torch_dtype=weight_dtype, **files)
        storage.store(denoiser)
        vae = load_part(vae_repo, AutoencoderKL, vae_folder, torch_dtype=full, variant=vae_variant,
                        use_safetensors=True)
        texts = tuple(load_part(model, encoder_class, folder, dtype=full, **files)
                      for encoder_class, folder in zip(encoders, layout.text_encoders, strict=True))
        tokenizers = tuple(load_part(model, CLIPTokenizer, folder) for folder in layout.tokenizers)
    for folder, tokenizer, encoder in zip(layout.tokenizers, tokenizers, texts, strict=True):
        refuse_unknown_ids(model, folder, tokenizer, encoder)
    places: dict[str, tuple[Repo, str, str | None]] = {
        name: (model, name, variant) for name in (layout.denoiser, *layout.text_encoders)}
    places["vae"] = vae_repo, vae_folder, vae_variant
    return Parts(model, denoiser, vae, tokenizers, texts,
                 weights={name: repo.digest(folder, files) for name, (repo, folder, files) in places.items()},
                 sampled={name: repo.sampled(folder, files) for name, (repo, folder, files) in places.items()},
                 file_metadata={**model.file_metadata(), **vae_repo.file_metadata()}, storage=storage)


def assemble(family: type[AnyFamily], parts: Parts, *, device: torch.device, schedule: ScheduleChange,
             text_detail: object, **more: Any) -> AnyFamily:
    """The family of loaded parts, frozen.

    schedule     what the flags change of the scheduler's config
    text_detail  what decides the text besides weights and tokenizers
    more         what this family takes besides
    """
    config = scheduler_config(parts.model, schedule)
    zero_snr = {"ss_zero_terminal_snr": "True"} if config.get("rescale_betas_zero_snr") else {}
    return family(path=parts.model.path, revision=parts.model.revision, denoiser=parts.denoiser, vae=parts.vae,
                tokenizers=parts.tokenizers, text_encoders=parts.text_encoders,
                schedule=diffusion.make_schedule(config), scheduler_config=config,
                identity=identity(parts, family.layout, scheduler_config=config, text_detail=text_detail),
                sampled_identity=identity(parts, family.layout, scheduler_config=config, text_detail=text_detail,
                                          sampled=True),
                device=torch.device(device), storage=parts.storage, file_metadata={**parts.file_metadata, **zero_snr},
                doubted=parts.model.assumes and not schedule.prediction_type, **more)


def scheduler_config(model: Repo, schedule: ScheduleChange) -> dict[str, Any]:
    """The model's scheduler config as the flags change it; says what it assumes, and when the run is an EDM one."""
    config = diffusion.effective_config(model.json("scheduler/scheduler_config.json") or {}, schedule)
    if model.assumes and not schedule.prediction_type:
        log.info("%s does not say what it predicts: epsilon is assumed. If it predicts v, add --prediction_type "
                 "v_prediction", Path(model.path).name)
    if diffusion.is_edm(config):
        log.info("%s has an EDM scheduler (%s): it is preconditioned and trained as in Karras et al. 2022", model.path,
                 config["_class_name"])
    return config


def identity(parts: Parts, layout: ModelLayout, *, scheduler_config: Config, text_detail: object, sampled: bool = False
             ) -> dict[str, str]:
    """Digests of the parts: cache keys name the part they depend on, checkpoints name them all.

    sampled  as checkpoints from before had them: some values of the weights, and no config of the text encoders
    """
    weights = parts.sampled if sampled else parts.weights
    text = [*(weights[name] for name in layout.text_encoders), *map(tokenizer_digest, parts.tokenizers)]
    configs = [] if sampled else [[text_config_values(encoder) for encoder in parts.text_encoders]]
    return {
        layout.denoiser: json_digest(weights[layout.denoiser], config_values(parts.denoiser)),
        "vae": json_digest(weights["vae"], config_values(parts.vae)),
        "text": json_digest(text, text_detail, *configs),
        "schedule": json_digest(scheduler_config),
    }


def text_config_values(encoder: PreTrainedModel) -> dict[str, object]:
    """What of a text encoder's config decides its output besides weights; where its end token is, the family knows."""
    return {name: getattr(encoder.config, name, None) for name in TEXT_CONFIG}


def config_values(module: Any) -> dict[str, object]:
    """A config without the entries that tell where and by which version it was saved."""
    return {k: v for k, v in module.config.items() if not k.startswith("_")}
