"""What a model folder's JSON files say against training it, before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from trainkit import diffusion
from trainkit.diffusion import AS_SAVED, ScheduleChange
from trainkit.errors import Problem, UserError, refuse
from trainkit.families.base import ModelLayout, halvings
from trainkit.families.pretrained import BAD_CONFIG, MODEL_FLAG, VAE_FLAG, Config, Repo, first_line, vae_place

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

NETWORK = "UNet2DConditionModel"  # what is trained
CLIP_LAYERS = 12  # where a text encoder's config does not say
CLIP_TOKENS = 77  # likewise
TIMESTEPS = 1000  # where a scheduler's does not
UNET_NEEDS, VAE_NEEDS = ("in_channels", "block_out_channels"), ("latent_channels", "block_out_channels")  # of a config


def problems(layout: ModelLayout, path: str, *, resolution: int, vae_path: str | None = None,
             revision: str | None = None, variant: str | None = None, clip_skip: int | None = None,
             schedule: ScheduleChange = AS_SAVED, timesteps: tuple[int, int | None] = (0, None)) -> list[Problem]:
    """Everything that stops training from this model folder or Hub id, read from its small JSON files.

    timesteps  --min_timestep and --max_timestep
    """
    model = Repo(str(path), MODEL_FLAG, revision)
    vae, vae_folder = vae_place(model, vae_path)
    vae_file = f"{vae_folder}/config.json".lstrip("/")
    try:
        found = model.unreachable("model_index.json") + (vae.unreachable("config.json") if vae_path else [])
        if found:
            return found
        vae_config, unet_config = vae.json(vae_file), model.json("unet/config.json")
        found = [*folder_problems(layout, model), *no_vae(model, vae, vae_config)] or [
            *missing_values(model, "unet/config.json", unet_config, UNET_NEEDS),
            *missing_values(vae, vae_file, vae_config, VAE_NEEDS), *scale_problems(vae, vae_file, vae_config)]
        if found or unet_config is None or vae_config is None:
            return found
        found = [*fit_problems(model, unet_config, vae_config),
                 *schedule_problems(model, schedule, timesteps),
                 *resolution_problems(resolution, unet_config, vae_config), *text_problems(layout, model, clip_skip)]
    except UserError as damaged:  # a JSON file that is none
        return [*damaged.problems]
    found += model.weight_problems(("unet", *layout.text_encoders), variant)
    return found + [*vae.weight_problems((vae_folder,), None if vae_path else variant)]


def folder_problems(layout: ModelLayout, model: Repo) -> Iterator[Problem]:
    """Is this a base model of the family in the Diffusers layout?"""
    index, unet = model.json("model_index.json"), model.json("unet/config.json")
    if index is None:
        yield model.problem("not a Diffusers model folder", "it has no model_index.json",
                            f"name the folder that holds model_index.json in {MODEL_FLAG}")
    elif unet is None and index.get("transformer"):
        yield model.problem("a model without a UNet cannot be trained here",
                            f"its network is a transformer ({index.get('_class_name')})",
                            "name a Stable Diffusion 1.x, 2.x or SDXL model")
    elif unet is None:
        yield model.problem("the model folder has no UNet", "unet/config.json is missing",
                            "copy the unet folder of the model there, or name a complete model", kind="data")
    elif unet.get("_class_name", NETWORK) != NETWORK:
        yield model.problem(f"a {unet['_class_name']} cannot be trained here", f"only a {NETWORK} can",
                            "name a Stable Diffusion 1.x, 2.x or SDXL model")
    else:
        yield from layout.incompatible_parts(model, index, unet)


def no_vae(model: Repo, vae: Repo, config: Config | None) -> Iterator[Problem]:
    """Is there a VAE? Asked of a model folder only: what is none lacks more than that."""
    if config is None and model.has("model_index.json"):
        missing = "config.json" if vae.flag == VAE_FLAG else "vae/config.json"
        yield vae.problem("no VAE there", f"{missing} is missing", f"name a folder that holds a VAE in {VAE_FLAG}")


def missing_values(repo: Repo, file: str, config: Config | None, names: Sequence[str]) -> Iterator[Problem]:
    """Values that a network's config must have and does not."""
    missing = ", ".join(name for name in names if (config or {}).get(name) is None)
    if missing:
        yield repo.problem(f"{file} lacks {missing}", "the sizes of the model are read from there",
                           f"copy {file} of the model there again", kind="data")


def scale_problems(vae: Repo, file: str, config: Config | None) -> Iterator[Problem]:
    """A scaling_factor that is no number; a VAE without one has the default of Diffusers."""
    factor = (config or {}).get("scaling_factor", 1.0)
    if not isinstance(factor, (int, float)):
        yield vae.problem(f"{file} has no number as scaling_factor", f"it is {json.dumps(factor)}, and latents are "
                          "multiplied by it", f"copy {file} of the model there again", kind="data")


def fit_problems(model: Repo, unet: Config, vae: Config) -> Iterator[Problem]:
    """Do the parts fit one another and the objectives we have?"""
    if unet["in_channels"] != vae["latent_channels"]:
        yield model.problem(
            "UNet and VAE do not fit", f"the UNet takes {unet['in_channels']} channels, the VAE makes "
            f"{vae['latent_channels']} (inpainting models take 9)", "name a text-to-image model and its VAE")


def schedule_problems(model: Repo, change: ScheduleChange, timesteps: tuple[int, int | None]) -> Iterator[Problem]:
    """Is there a noise schedule, one that its parametrisation can be trained on, with the timesteps asked for?"""
    scheduler = model.json("scheduler/scheduler_config.json")
    if scheduler is None:
        yield model.problem("the model folder has no scheduler", "scheduler/scheduler_config.json is missing",
                            "copy the scheduler folder of the model there", kind="data")
        return
    config = diffusion.effective_config(scheduler, change)
    found = [*diffusion.config_problems(config)]
    yield from found or unreadable_schedule(model, config)
    if diffusion.is_edm(config) and config["_class_name"] not in diffusion.EDM_SCHEDULERS:
        known = ", ".join(diffusion.EDM_SCHEDULERS)
        yield model.problem(f"an EDM scheduler we do not know: {config['_class_name']}",
                            f"scheduler/scheduler_config.json names it; known: {known}", "put one of these there")
    (first, end), steps = timesteps, int(config.get("num_train_timesteps") or TIMESTEPS)
    if end is None or first < end:  # else the options' own problem (options/rules.py)
        yield from diffusion.range_problems(first, end or steps, steps)


def unreadable_schedule(model: Repo, config: Config) -> Iterator[Problem]:
    """Values that no noise levels can be made of, such as null or a beta_schedule that Diffusers does not know."""
    try:
        diffusion.make_schedule(config)
    except BAD_CONFIG as error:
        file = "scheduler/scheduler_config.json"
        yield model.problem("the noise schedule cannot be made", f"{file}: {first_line(error)}",
                            f"copy {file} of the model there again", kind="data")


def text_problems(layout: ModelLayout, model: Repo, clip_skip: int | None) -> Iterator[Problem]:
    """Are tokenizers and encoders there, the encoders with layers enough for --clip_skip?"""
    for folder, encoder in zip(layout.tokenizers, layout.text_encoders, strict=True):
        words = any(model.has(f"{folder}/{name}") for name in ("vocab.json", "tokenizer.json"))
        config = model.json(f"{folder}/tokenizer_config.json")
        if not words or config is None:
            yield model.problem(f"the model folder has no {folder}", f"{folder}/tokenizer_config.json or vocab.json is "
                                "missing", f"copy the {folder} folder of the model there", kind="data")
        else:
            yield from length_problems(model, f"{folder}/tokenizer_config.json", config, encoder)
    for folder in layout.text_encoders:
        config = model.json(f"{folder}/config.json")
        if config is None:
            yield model.problem(f"the model folder has no {folder}", f"{folder}/config.json is missing",
                                f"copy the {folder} folder of the model there", kind="data")
        elif (clip_skip or 0) >= (layers := config.get("num_hidden_layers") or CLIP_LAYERS):
            yield Problem(f"{folder} has no layer to take with --clip_skip {clip_skip}", f"--clip_skip {clip_skip}",
                          f"it has {layers} layers", f"--clip_skip {layers - 1} at most, or leave it out")


def length_problems(model: Repo, file: str, tokenizer: Config, encoder: str) -> Iterator[Problem]:
    """Does the tokenizer say to how many tokens prompts are padded, no more than its encoder has places for?"""
    length = tokenizer.get("model_max_length")
    places = (model.json(f"{encoder}/config.json") or {}).get("max_position_embeddings") or CLIP_TOKENS
    if not isinstance(length, int) or not 0 < length <= places:
        given = "is missing" if length is None else f"is {length}"
        yield model.problem(f"{file} does not say how long a prompt may be",
                            f"model_max_length {given}, and the {encoder} takes {places} tokens",
                            f'write "model_max_length": {places} into {file}', kind="data")


def resolution_problems(resolution: int, unet: Config, vae: Config) -> Iterator[Problem]:
    """A side must survive the VAE's and then the UNet's halvings without a remainder."""
    vae_factor, unet_stride = halvings(vae), halvings(unet)
    step = vae_factor * unet_stride
    if resolution <= 0 or resolution % step:
        near = max(step, round(resolution / step) * step)
        yield Problem(
            f"the model cannot take {resolution} px", f"--resolution {resolution}",
            f"sides must be multiples of {step} (VAE factor {vae_factor} × UNet stride {unet_stride})",
            f"--resolution {near}")


def latents(path: str, resolution: int, *, vae_path: str | None = None, revision: str | None = None
            ) -> tuple[int, int, int]:
    """Shape (C,h,w) of the latents of square images, for a model that `problems` has nothing against."""
    vae, folder = vae_place(Repo(str(path), MODEL_FLAG, revision), vae_path)
    config = vae.json(f"{folder}/config.json".lstrip("/")) or {}
    side = resolution // halvings(config)
    return int(config["latent_channels"]), side, side


def native_resolution(path: str, revision: str | None = None) -> int:
    """Pixels a side that the model was made for: the UNet's sample_size times the VAE's factor.

    Raises UserError for a model that cannot be read, or does not say.
    """
    model = Repo(str(path), MODEL_FLAG, revision)
    refuse(model.unreachable("unet/config.json"))
    unet, vae = model.json("unet/config.json") or {}, model.json("vae/config.json") or {}
    refuse([*missing_values(model, "unet/config.json", unet, ("sample_size",)),
            *missing_values(model, "vae/config.json", vae, ("block_out_channels",))])
    size = unet["sample_size"]  # [h,w] where a model is not of squares
    return halvings(vae) * (max(size) if isinstance(size, list) else size)


def skeleton(path: str, *, revision: str | None = None) -> UNet2DConditionModel:
    """The UNet without its weights, to look up module paths in. Raises UserError: its config makes no UNet."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except BAD_CONFIG as error:
        raise UserError(Repo(str(path), MODEL_FLAG, revision).problem(
            "the UNet cannot be built", f"unet/config.json: {first_line(error)}",
            "copy unet/config.json of the model there again", kind="data")) from error
