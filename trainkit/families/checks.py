"""What a model folder's JSON files say against training it, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from trainkit import diffusion
from trainkit.diffusion import AS_SAVED, ScheduleChange
from trainkit.errors import Problem, UserError, refuse, shell_word
from trainkit.families.base import ModelLayout, halvings
from trainkit.families.numbers import SCHEDULER, TEXT_ENCODER, TOKENIZER, UNET, VAE, Table, shown, wrong_values
from trainkit.families.pretrained import MODEL_FLAG, VAE_FLAG, Config, Repo, first_line
from trainkit.families.single_file import model_at, vae_place
from trainkit.options.sizes import sides_of, size_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import PreTrainedModel

NETWORK = "UNet2DConditionModel"  # what is trained
CLIP_LAYERS = 12  # where a text encoder's config does not say
CLIP_TOKENS = 77  # likewise
SCHEDULER_FILE = "scheduler/scheduler_config.json"
NO_SIDES: Mapping[str, int | str] = MappingProxyType({})
SIZES = 6  # that SDXL is given beside the pooled text: heights, widths, crops
TIMESTEPS = 1000  # where a scheduler's does not
UNET_NEEDS, VAE_NEEDS = ("in_channels", "block_out_channels"), ("latent_channels", "block_out_channels")  # of a config


def problems(layout: ModelLayout, path: str, *, resolution: int | str, vae_path: str | None = None,
             revision: str | None = None, variant: str | None = None, clip_skip: int | None = None,
             schedule: ScheduleChange = AS_SAVED, timesteps: tuple[int, int | None] = (0, None),
             sides: Mapping[str, int | str] = NO_SIDES) -> list[Problem]:
    """Everything that stops training from this model folder or Hub id, read from its small JSON files.

    timesteps  --min_timestep and --max_timestep
    sides      further sides of images, by the flag that gives them
    """
    sides = {"resolution": resolution, **sides}
    model = model_at(str(path), MODEL_FLAG, revision)
    vae, vae_folder = vae_place(model, vae_path)
    vae_file = f"{vae_folder}/config.json".lstrip("/")
    try:
        found = model.unreachable("model_index.json") + (vae.unreachable("config.json") if vae_path else [])
        if found:
            return found
        vae_config, unet_config = vae.json(vae_file), model.json("unet/config.json")
        found = [*folder_problems(layout, model), *no_vae(model, vae, vae_config)] or [
            *missing_values(model, "unet/config.json", unet_config, UNET_NEEDS),
            *missing_values(vae, vae_file, vae_config, VAE_NEEDS)] or [
            *value_problems(model, "unet/config.json", unet_config, UNET),
            *value_problems(vae, vae_file, vae_config, VAE), *text_values(layout, model),
            *quantised_parts(layout, model, vae, vae_file),
            *value_problems(model, SCHEDULER_FILE, model.json(SCHEDULER_FILE), SCHEDULER)]
        if found or unet_config is None or vae_config is None:
            return found
        found = [*fit_problems(model, unet_config, vae_config), *width_problems(layout, model, unet_config),
                 *latent_problems(vae, vae_file, vae_config),
                 *schedule_problems(model, schedule, timesteps),
                 *side_problems(sides, unet_config, vae_config), *text_problems(layout, model, clip_skip)]
    except UserError as damaged:  # a JSON file that is none
        return [*damaged.problems]
    found += model.weight_problems(("unet", *layout.text_encoders), variant)
    found += vae.weight_problems((vae_folder,), None if vae_path else variant)
    return found or [*unbuildable(layout, model, vae, vae_file)]


def folder_problems(layout: ModelLayout, model: Repo) -> Iterator[Problem]:
    """Is this a base model of the family in the Diffusers layout?"""
    index, unet = model.json("model_index.json"), model.json("unet/config.json")
    if index is None:
        files = sorted(Path(model.path).glob("*.safetensors")) if model.is_local else []
        yield model.problem("not a Diffusers model folder", "it has no model_index.json",
                            f"name the folder that holds model_index.json in {MODEL_FLAG}" + (
                                f", or a model of one file: {shell_word(files[0])}" if files else ""))
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
        yield vae.problem("no VAE there", f"it has no {missing}, and no first_stage_model if it is a single file",
                          f"name a folder or a file that holds a VAE in {VAE_FLAG}")


def quantised_parts(layout: ModelLayout, model: Repo, vae: Repo, vae_file: str) -> Iterator[Problem]:
    """Weights in packed bits, which nothing here reads: not DoRA's norms, PiSSA's decompositions or our layers."""
    files = [(model, f"{folder}/config.json") for folder in (layout.denoiser, *layout.text_encoders)]
    for repo, file in [*files, (vae, vae_file)]:
        if (repo.json(file) or {}).get("quantization_config"):
            yield repo.problem("a quantised model cannot be trained here", f"{file} has a quantization_config",
                               "name the same model in fp32, bf16 or fp16", kind="data")


def missing_values(repo: Repo, file: str, config: Config | None, names: Sequence[str]) -> Iterator[Problem]:
    """Values that a network's config must have and does not."""
    missing = ", ".join(name for name in names if (config or {}).get(name) is None)
    if missing:
        yield repo.problem(f"{file} lacks {missing}", "the sizes of the model are read from there",
                           f"copy {file} of the model there again", kind="data")


def value_problems(repo: Repo, file: str, config: Config | None, rules: Table) -> Iterator[Problem]:
    """Values of a config that cannot be right, all in one problem."""
    wrong = [*wrong_values(config or {}, rules)]
    if wrong:
        given = ", ".join(f"{key} is {value}" for key, value, _ in wrong)
        taken = ", ".join(f"{key} takes {words}" for key, _, words in wrong)
        yield repo.problem(f"{file} cannot be right: {given}", taken, f"copy {file} of the model there again",
                           kind="data")


def text_values(layout: ModelLayout, model: Repo) -> Iterator[Problem]:
    """The same of the configs of text encoders and tokenizers, those that are there."""
    for folders, name, rules in ((layout.text_encoders, "config.json", TEXT_ENCODER),
                                 (layout.tokenizers, "tokenizer_config.json", TOKENIZER)):
        for folder in folders:
            yield from value_problems(model, f"{folder}/{name}", model.json(f"{folder}/{name}"), rules)


def fit_problems(model: Repo, unet: Config, vae: Config) -> Iterator[Problem]:
    """Do the parts fit one another and the objectives we have?"""
    if unet["in_channels"] != vae["latent_channels"]:
        yield model.problem(
            "UNet and VAE do not fit", f"the UNet takes {unet['in_channels']} channels, the VAE makes "
            f"{vae['latent_channels']} (inpainting models take 9)", "name a text-to-image model and its VAE")
    elif unet.get("out_channels", unet["in_channels"]) != unet["in_channels"]:
        yield model.problem(
            "the UNet does not predict one value for each that it takes", f"unet/config.json: in_channels is "
            f"{unet['in_channels']}, out_channels is {unet['out_channels']}", "name a text-to-image model")


def width_problems(layout: ModelLayout, model: Repo, unet: Config) -> Iterator[Problem]:
    """Is the text as wide as what the UNet's cross-attention takes? Encoders that are missing are another problem."""
    encoders = [model.json(f"{folder}/config.json") or {} for folder in layout.text_encoders]
    widths, asked = [config.get("hidden_size") for config in encoders], unet.get("cross_attention_dim")
    given = sum(width for width in widths if width) if all(widths) else None
    asked = set(asked) if isinstance(asked, list) else {asked}
    if given and asked != {None} and asked != {given} and not unet.get("encoder_hid_dim_type"):
        yield model.problem("UNet and text encoders do not fit", f"unet/config.json: cross_attention_dim is "
                            f"{unet['cross_attention_dim']}, and the text is {given} wide (hidden_size of "
                            f"{' and '.join(layout.text_encoders)})", "name a complete model", kind="data")
    pooled, time = encoders[-1].get("projection_dim"), unet.get("addition_time_embed_dim")
    added = unet.get("projection_class_embeddings_input_dim")
    if unet.get("addition_embed_type") == "text_time" and pooled and time and added and added != pooled + SIZES * time:
        yield model.problem("UNet and text encoders do not fit", "unet/config.json: "
                            f"projection_class_embeddings_input_dim is {added}, and {pooled} (projection_dim of "
                            f"{layout.text_encoders[-1]}) + {SIZES} x {time} (addition_time_embed_dim) are given",
                            "name a complete model", kind="data")


def latent_problems(vae: Repo, file: str, config: Config) -> Iterator[Problem]:
    """One mean and one deviation for each channel of the latents, where there are any."""
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != config["latent_channels"]):
            yield vae.problem(f"{file} has no {name} for each of {config['latent_channels']} channels",
                              f"it is {shown(values)}", f"copy {file} of the model there again", kind="data")


def schedule_problems(model: Repo, change: ScheduleChange, timesteps: tuple[int, int | None]) -> Iterator[Problem]:
    """Is there a noise schedule, one that its parametrisation can be trained on, with the timesteps asked for?"""
    scheduler = model.json(SCHEDULER_FILE)
    if scheduler is None:
        yield model.problem("the model folder has no scheduler", f"{SCHEDULER_FILE} is missing",
                            "copy the scheduler folder of the model there", kind="data")
        return
    yield from model.unsaid(change.prediction_type)
    config = diffusion.effective_config(scheduler, change)
    found = [*diffusion.config_problems(config)]
    yield from found or unreadable_schedule(model, config)
    if "FlowMatch" in str(config.get("_class_name")):
        yield model.problem(f"a model of flow matching cannot be trained here ({config['_class_name']})",
                            f"{SCHEDULER_FILE} names its scheduler; noise is added here as in DDPM and EDM",
                            "name a Stable Diffusion 1.x, 2.x or SDXL model")
    if diffusion.is_edm(config) and config["_class_name"] not in diffusion.EDM_SCHEDULERS:
        known = ", ".join(diffusion.EDM_SCHEDULERS)
        yield model.problem(f"an EDM scheduler we do not know: {config['_class_name']}",
                            f"{SCHEDULER_FILE} names it; known: {known}", "put one of these there")
    (first, end), steps = timesteps, int(config.get("num_train_timesteps") or TIMESTEPS)
    if end is None or first < end:  # else the options' own problem (options/rules.py)
        yield from diffusion.range_problems(first, end or steps, steps)


def unreadable_schedule(model: Repo, config: Config) -> Iterator[Problem]:
    """Values that no noise levels can be made of, such as a beta_schedule that Diffusers does not know."""
    try:
        why = diffusion.schedule_fault(diffusion.make_schedule(config), config)
    except UserError:
        raise
    except Exception as error:  # whatever the values make Diffusers or PyTorch stumble over
        why = first_line(error)
    if why:
        yield model.problem("the noise schedule cannot be made", f"{SCHEDULER_FILE}: {why}",
                            f"copy {SCHEDULER_FILE} of the model there again", kind="data")


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
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= places:
        given = "is missing" if length is None else f"is {shown(length)}"
        yield model.problem(f"{file} does not say how long a prompt may be",
                            f"model_max_length {given}, and the {encoder} takes {places} tokens",
                            f'write "model_max_length": {places} into {file}', kind="data")


def side_problems(given: Mapping[str, int | str], unet: Config, vae: Config) -> Iterator[Problem]:
    """A side must survive the VAE's and then the UNet's halvings without a remainder."""
    vae_factor, unet_stride = halvings(vae), halvings(unet)
    step = vae_factor * unet_stride
    for flag, sides in given.items():
        near = [max(step, round(side / step) * step) for side in sides_of(sides)]
        if near != sides_of(sides):
            yield Problem(
                f"the model cannot take {sides} px", f"--{flag} {sides}",
                f"sides must be multiples of {step} (VAE factor {vae_factor} × UNet stride {unet_stride})",
                f"--{flag} {','.join(map(str, near))}")


def latents(path: str, resolution: int | str, *, vae_path: str | None = None, revision: str | None = None
            ) -> tuple[int, int, int]:
    """Shape (C,h,w) of the latents of such images, for a model that `problems` has nothing against."""
    vae, folder = vae_place(model_at(str(path), MODEL_FLAG, revision), vae_path)
    config = vae.json(f"{folder}/config.json".lstrip("/")) or {}
    height, width = size_of(resolution)
    return int(config["latent_channels"]), height // halvings(config), width // halvings(config)


def native_resolution(path: str, revision: str | None = None) -> int:
    """Pixels a side that the model was made for: the UNet's sample_size times the VAE's factor.

    Raises UserError for a model that cannot be read, or does not say.
    """
    model = model_at(str(path), MODEL_FLAG, revision)
    refuse(model.unreachable("unet/config.json"))
    unet, vae = model.json("unet/config.json") or {}, model.json("vae/config.json") or {}
    refuse([*missing_values(model, "unet/config.json", unet, ("sample_size",)),
            *missing_values(model, "vae/config.json", vae, ("block_out_channels",))])
    size = unet["sample_size"]  # [h,w] where a model is not of squares
    return halvings(vae) * (max(size) if isinstance(size, list) else size)


def skeleton(path: str, *, revision: str | None = None) -> UNet2DConditionModel:
    """The UNet without its weights, to look up module paths in. Raises UserError: its config makes no UNet."""
    return _built(model_at(str(path), MODEL_FLAG, revision), "unet/config.json", "UNet", _unet)


def unbuildable(layout: ModelLayout, model: Repo, vae: Repo, vae_file: str) -> Iterator[Problem]:
    """Configs that make no network, tried without weights."""
    texts = [(model, f"{folder}/config.json", folder, _text_encoder) for folder in layout.text_encoders]
    for repo, file, name, build in ((model, "unet/config.json", "UNet", _unet), (vae, vae_file, "VAE", _vae), *texts):
        try:
            _built(repo, file, name, build)
        except UserError as error:
            yield from error.problems


def _built(repo: Repo, file: str, name: str, build: Callable[[dict[str, Any]], Any]) -> Any:
    config = dict(repo.json(file) or {})
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # whatever the values make the libraries stumble over
        raise UserError(repo.problem(f"the {name} cannot be built", f"{file}: {first_line(error)}",
                                     f"copy {file} of the model there again", kind="data")) from error


def _unet(config: dict[str, Any]) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def _vae(config: dict[str, Any]) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def _text_encoder(config: dict[str, Any]) -> PreTrainedModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(config.get("text_config") or config))
