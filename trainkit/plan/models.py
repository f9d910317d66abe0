"""A model's configs, which are all that a plan needs of it: those of a folder or Hub id, or sizes that are built in.

The sizes are those of config.json in the published repositories; tests/test_plan.py holds the numbers of parameters
against the published ones. Sources: stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1,
stabilityai/stable-diffusion-xl-base-1.0 on huggingface.co; Rombach et al. 2022, Podell et al. 2023, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainkit.errors import Problem, UserError, refuse
from trainkit.families.pretrained import MODEL_FLAG, Config
from trainkit.families.single_file import SCHEDULER_FILE, model_at, vae_place

if TYPE_CHECKING:
    from trainkit.options import ModelOptions

VAE_FILE = "vae/config.json"


def clip_text(width: int, layers: int, heads: int, projection: int, act: str = "gelu") -> Config:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "projection_dim": projection, "hidden_act": act, "vocab_size": 49408,
            "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}


def autoencoder(side: int, scaling_factor: float) -> Config:
    return {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
            "norm_num_groups": 32, "sample_size": side, "scaling_factor": scaling_factor}


def scheduler(prediction_type: str) -> Config:
    return {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "prediction_type": prediction_type, "steps_offset": 1}


CLIP_L = clip_text(768, 12, 12, 768, "quick_gelu")
SD_UNET: Config = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
SDXL_UNET: Config = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "sample_size": 128,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SIZES: dict[str, dict[str, Config]] = {
    "sd15": {"unet/config.json": {**SD_UNET, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
             VAE_FILE: autoencoder(512, 0.18215), "text_encoder/config.json": CLIP_L,
             SCHEDULER_FILE: scheduler("epsilon")},
    "sd21": {"unet/config.json": {**SD_UNET, "sample_size": 96, "attention_head_dim": [5, 10, 20, 20],
                                  "cross_attention_dim": 1024, "use_linear_projection": True},
             VAE_FILE: autoencoder(768, 0.18215), "text_encoder/config.json": clip_text(1024, 23, 16, 512),
             SCHEDULER_FILE: scheduler("v_prediction")},
    "sdxl": {"unet/config.json": SDXL_UNET, VAE_FILE: autoencoder(1024, 0.13025), "text_encoder/config.json": CLIP_L,
             "text_encoder_2/config.json": clip_text(1280, 32, 20, 1280), SCHEDULER_FILE: scheduler("epsilon")},
}
PUBLISHED = {  # what is downloaded under these ids has those sizes, so that a plan need not wait for it
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15", "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


class Files(Protocol):
    """The JSON files of a model folder."""

    def json(self, name: str) -> Config | None: ...


@dataclass(frozen=True)
class ModelConfigs:
    """What is known of a model before its weights are: its name, and its JSON files by name."""

    name: str
    files: Files
    vae: Config

    def of(self, name: str) -> Config:
        """Raises UserError: there is none."""
        found = self.files.json(name)
        if found is None:
            raise UserError(Problem(f"{self.name} has no {name}", f"{MODEL_FLAG} {self.name}",
                                    "a plan reads the sizes of the networks there",
                                    f"name a complete model, or one of {', '.join(SIZES)}"))
        return found

    @property
    def is_sdxl(self) -> bool:
        return self.of("unet/config.json").get("addition_embed_type") == "text_time"


@dataclass(frozen=True)
class BuiltIn:
    configs: Mapping[str, Config]

    def json(self, name: str) -> Config | None:
        return self.configs.get(name)


def read_configs(options: ModelOptions) -> ModelConfigs:
    """The configs of the base model, with those of another VAE where one is named. Loads no weight.

    Raises UserError: there is no such model.
    """
    name, vae_path = str(options.pretrained_model_name_or_path), options.pretrained_vae_model_name_or_path
    repo = model_at(name, MODEL_FLAG, options.revision)
    known = PUBLISHED.get(name, name)
    built_in = known in SIZES and not Path(name).exists()
    files: Files = BuiltIn(SIZES[known]) if built_in else repo
    if not built_in:
        refuse(repo.unreachable("unet/config.json"))
    if vae_path is None:
        return ModelConfigs(name, files, files.json(VAE_FILE) or {})
    (vae_repo, folder) = vae_place(repo, vae_path)
    refuse(vae_repo.unreachable(f"{folder}/config.json".lstrip("/")))
    return ModelConfigs(name, files, vae_repo.json(f"{folder}/config.json".lstrip("/")) or {})

