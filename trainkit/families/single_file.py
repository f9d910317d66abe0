"""A base model or a VAE in one safetensors file of the original code, as WebUIs and Civitai have it.

The file holds weights alone. So its configs are made here: sizes are counted in its header, and the rest is what the
released models of the family have (trainkit/templates/base_*.json). Every tensor that the networks then ask for must be
there in its shape, and none may be left over; a file that is something else is refused by name. Weights are read by
memory map, one network at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit.digests import remembered
from trainkit.errors import Problem, UserError, refuse
from trainkit.families.file_kinds import Kind, base_kind, stranger, vae_kind
from trainkit.families.original import (
    TensorPlace,
    clip_places,
    diffusers_vae_places,
    open_clip_places,
    unet_places,
    vae_places,
)
from trainkit.families.pretrained import (
    MODEL_FLAG,
    VAE_FLAG,
    Config,
    Repo,
    first_line,
    tensors_digest,
    unloadable,
)
from trainkit.families.sizes import BAD_SHAPES, text_config, uncounted, unet_config, vae_config
from trainkit.families.vocabulary import clip_tokenizer
from trainkit.files import sha256
from trainkit.reading import TensorHeader, read_tensor_header

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUFFIX = ".safetensors"
TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SCHEDULER_FILE = "scheduler/scheduler_config.json"
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction",
               "epsilon": "epsilon", "eps": "epsilon"}  # as ModelSpec and programs have it -> as Diffusers does
STATED = ("modelspec.prediction_type", "modelspec.predict_key")  # ModelSpec's key, and ComfyUI's
ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
SD2_EPSILON_SIDE = 64  # latents; 96 where it predicts v
SHORT_HASH_AT, SHORT_HASH_BYTES = 0x100000, 0x10000
UNUSED = re.compile(  # of the networks' own names: what no program reads
    r"position_ids$|logit_scale$|\.loss\.|^cond_stage_model\..*text_projection|"
    r"^conditioner\.embedders\.0\..*text_projection")


def model_at(path: str, flag: str, revision: str | None = None) -> Repo:
    """The base model that a user names: a file, else a folder or a Hub id."""
    return SingleFile(path, flag) if Path(path).is_file() else Repo(path, flag, revision)


def vae_place(model: Repo, vae_path: str | None) -> tuple[Repo, str]:
    """Whose VAE it is, and the folder in there. A VAE of one file has its scale from the model that it is for."""
    if vae_path and Path(vae_path).is_file():
        return VaeFile(str(vae_path), VAE_FLAG, base=model), ""
    return (Repo(str(vae_path), VAE_FLAG), "") if vae_path else (model, "vae")


@lru_cache(maxsize=8)
def _header(path: str, state: tuple[int, int]) -> TensorHeader:
    return read_tensor_header(Path(path))


@dataclass(frozen=True)
class WeightFile(Repo):
    """What base models and VAEs of one file have in common."""

    @cached_property
    def header(self) -> TensorHeader:
        """Raises UserError: another kind of file, or one that is damaged."""
        path = Path(self.path)
        refuse(self._unreadable(path))
        try:
            stat = path.stat()
            return _header(self.path, (stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError) as error:
            raise UserError(self.problem(f"{path.name} cannot be read", f"{error}", "download or copy it again",
                                         kind="data")) from error

    def _unreadable(self, path: Path) -> Iterator[Problem]:
        suffix = path.suffix.lower()
        if suffix in PICKLED:
            yield self.problem(
                f"{path.name} is pickled and not read", "a pickled file can run any program when it is opened",
                "take the .safetensors of the same model; or, if there is none, convert it once: python -c \"import "
                f"torch, safetensors.torch as s; d = torch.load('{path.as_posix()}', map_location='cpu', "
                "weights_only=True); d = d.get('state_dict', d); s.save_file({k: v.clone() for k, v in d.items() if "
                f"hasattr(v, 'clone')}}, '{path.with_suffix(SUFFIX).as_posix()}')\"")
        elif suffix != SUFFIX:
            yield self.problem(f"{path.name} is no .safetensors file", f"its name ends in {suffix or 'no suffix'}",
                               "name a .safetensors file, or a folder in the Diffusers layout")

    @cached_property
    def kind(self) -> Kind:
        raise NotImplementedError

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The configs of this model, by their place in a Diffusers folder. Raises UserError."""
        raise NotImplementedError

    def unreachable(self, probe: str) -> list[Problem]:
        """What keeps the file from being read exactly."""
        try:
            return [*self._layer_problems()]
        except UserError as error:
            return [*error.problems]

    def json(self, name: str) -> Config | None:
        return self.configs.get(name)

    def has(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        return name in self.configs or (file == "vocab.json" and f"{folder}/tokenizer_config.json" in self.configs)

    def weight_problems(self, components: Sequence[str], variant: str | None) -> Iterator[Problem]:
        if variant and "unet" in components:
            yield self.problem(f"a single file has no variant {variant}", "variants are the files of a folder",
                               "leave --variant out")

    def digest(self, folder: str, variant: str | None) -> str:
        """Of the part's names, formats, shapes and bytes, as the file has them."""
        prefix = self.kind.prefixes[folder]
        return remembered(Path(self.path), f"tensors of {prefix}", partial(tensors_digest, prefix=prefix))

    def sampled(self, folder: str, variant: str | None) -> str:
        return self.digest(folder, variant)

    def weight(self, folder: str, name: str) -> Tensor | None:
        from safetensors import safe_open

        place = self._all_places.get(folder, {}).get(name)
        if place is None:
            return None
        with safe_open(self.path, framework="pt") as file:
            return place.take(file.get_tensor(place.name))

    def tensor_names(self, component: str) -> set[str]:
        return {*self._all_places.get(component, {})}

    def place_of(self, folder: str, name: str) -> TensorPlace:
        """Where a tensor of a network lies in the file."""
        return self._all_places[folder][name]

    def webui_hashes(self) -> tuple[str, str]:
        """WebUIs' short hash of old, and the SHA-256 whose first ten digits they show today.

        Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_models.py (model_hash) and modules/hashes.py;
        kohya-ss/sd-scripts, library/train_util.py writes both into LoRA files.
        """
        path = Path(self.path)
        with path.open("rb") as file:
            file.seek(SHORT_HASH_AT)
            short = hashlib.sha256(file.read(SHORT_HASH_BYTES)).hexdigest()[:8]
        return short, remembered(path, "sha256", sha256)

    # Networks

    def _layer_problems(self) -> Iterator[Problem]:
        """Tensors that the networks ask for and the file lacks, or has in another shape; and those left over."""
        shapes, used = self.header.shapes, set[str]()
        for folder, prefix in self.kind.prefixes.items():
            config = self._config(folder)
            try:
                wanted = skeleton(folder, config).state_dict()
            except Exception as error:  # whatever the sizes make the libraries stumble over
                yield self._unknown_layers(folder, first_line(error))
                return
            places = self._places(folder, wanted)
            used |= {place.name for place in places.values()}
            for name, place in places.items():
                if place.name not in shapes:
                    yield self._unknown_layers(folder, f"it lacks {place.name}")
                    return
                found, asked = shapes[place.name], tuple(wanted[name].shape)
                if place.shape(found) != asked:
                    yield self._unknown_layers(folder, f"{place.name} is {list(found)}, which makes no {list(asked)}")
                    return
            over = [name for name in shapes if name.startswith(prefix) and name not in used and self._matters(name)]
            if over:
                yield self._unknown_layers(folder, f"{len(over)} of its tensors belong to no layer, such as {over[0]}")
                return

    def _matters(self, name: str) -> bool:
        """Whether a tensor that no network asks for may say that this is another network."""
        return not UNUSED.search(name) and name not in self.kind.unused

    def _unknown_layers(self, folder: str, why: str) -> Problem:
        return self.problem(f"the {folder} in {Path(self.path).name} is not that of {self.kind.words}", why,
                            "name a base model of SD 1.x, SD 2.x or SDXL, or the folder of this model in the Diffusers "
                            "layout", kind="data")

    def _config(self, folder: str) -> dict[str, Any]:
        return self.configs[f"{folder}/config.json".lstrip("/")]

    def _places(self, folder: str, names: Mapping[str, object]) -> dict[str, TensorPlace]:
        prefix, config, there = self.kind.prefixes[folder], self._config(folder), self.header.shapes
        if folder == "unet":
            return unet_places(names, config, prefix)
        if folder.startswith("text_encoder"):
            places = open_clip_places if prefix.endswith(".model.") else clip_places
            return places(names, there, prefix)
        if self.kind.diffusers_names:
            return diffusers_vae_places(names, there, prefix)
        return vae_places(names, config, prefix)

    @cached_property
    def _all_places(self) -> dict[str, dict[str, TensorPlace]]:
        """Where every tensor of every network lies, by its folder."""
        return {folder: self._places(folder, skeleton(folder, self._config(folder)).state_dict())
                for folder in self.kind.prefixes}

    def part(self, part_class: Any, folder: str, settings: Mapping[str, Any]) -> Any:
        """What `part_class.from_pretrained` would make of a folder."""
        if folder.startswith("tokenizer"):
            config = self.configs[f"{folder}/tokenizer_config.json"]
            return clip_tokenizer(pad_token=config["pad_token"], model_max_length=config["model_max_length"])
        if not issubclass(part_class, nn.Module):
            return self.pipeline(settings)
        return self.network(folder, settings.get("torch_dtype") or settings.get("dtype") or torch.float32)

    def network(self, folder: str, dtype: torch.dtype) -> nn.Module:
        """A network with its weights in a number format; each tensor is cast as it is read."""
        from safetensors import SafetensorError, safe_open

        network = skeleton(folder, self._config(folder))
        places = self._places(folder, network.state_dict())
        try:
            with safe_open(self.path, framework="pt") as file:
                weights = {name: place.take(file.get_tensor(place.name)).to(dtype, copy=True).contiguous()
                           for name, place in places.items()}
        except (OSError, SafetensorError) as error:
            raise UserError(unloadable(self, folder or "the VAE", first_line(error))) from error
        network.load_state_dict(weights, assign=True)
        return network.eval()

    def pipeline(self, settings: Mapping[str, Any]) -> DiffusionPipeline:
        raise NotImplementedError


@dataclass(frozen=True)
class SingleFile(WeightFile):
    """A base model of one file: what `Repo` is for a folder."""

    @cached_property
    def kind(self) -> Kind:
        header = self.header
        refuse(stranger(self, header))
        return base_kind(self, header)

    @cached_property
    def stated_prediction(self) -> str | None:
        """What the file says that its UNet predicts: by a marker tensor, else by its metadata; None: nothing.

        Source of the markers: comfyanonymous/ComfyUI, comfy/supported_models.py.
        """
        metadata = self.header.metadata
        if "v_pred" in self.header.shapes:
            return "v_prediction"
        stated = (PREDICTIONS.get(metadata.get(key, "").lower()) for key in STATED)
        return next((found for found in stated if found), None) or ARCHITECTURES.get(
            metadata.get("modelspec.architecture", ""))

    @property
    def assumes(self) -> bool:
        return self.stated_prediction is None

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        kind, shapes = self.kind, self.header.shapes
        configs: dict[str, dict[str, Any]] = json.loads((TEMPLATES / f"base_{kind.name}.json").read_text("utf-8"))
        try:
            configs["unet/config.json"] |= unet_config(shapes, kind.prefixes["unet"], configs["unet/config.json"])
            if "vae" in kind.prefixes:
                configs["vae/config.json"] |= vae_config(shapes, kind.prefixes["vae"])
            else:
                del configs["vae/config.json"]
            for folder in (name for name in kind.prefixes if name.startswith("text_encoder")):
                configs[f"{folder}/config.json"] |= text_config(shapes, kind.prefixes[folder], kind.name)
        except BAD_SHAPES as error:
            raise UserError(self._unknown_layers("network", uncounted(error))) from error
        self._schedule(configs)
        return configs

    def _schedule(self, configs: dict[str, dict[str, Any]]) -> None:
        """Zero-terminal SNR needs the trailing spacing (diffusion/schedules.py)."""
        scheduler = configs[SCHEDULER_FILE]
        scheduler["prediction_type"] = self.stated_prediction or "epsilon"
        if "ztsnr" in self.header.shapes:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if self.kind.name == "sd2" and self.stated_prediction == "epsilon":
            configs["unet/config.json"]["sample_size"] = SD2_EPSILON_SIDE

    def unsaid(self, prediction_type: str | None) -> Iterator[Problem]:
        """SD 2.x was released for both, with the same layers."""
        if self.kind.name == "sd2" and self.assumes and not prediction_type:
            yield self.problem("the file does not say what its UNet predicts", "SD 2.x at 768 pixels predicts v, at "
                               "512 epsilon, and both have the same layers", "add --prediction_type v_prediction, or "
                               "--prediction_type epsilon for a model of 512 pixels")

    def file_metadata(self) -> dict[str, str]:
        short, full = self.webui_hashes()
        return {"ss_sd_model_name": Path(self.path).name, "ss_sd_model_hash": short, "ss_new_sd_model_hash": full}

    def pipeline(self, settings: Mapping[str, Any]) -> DiffusionPipeline:
        """The stock pipeline; `settings` may hold its VAE, and the number format of the other networks."""
        import diffusers
        from transformers import CLIPTokenizer

        dtype = settings.get("dtype") or torch.float32
        index, scheduler = self.configs["model_index.json"], self.configs[SCHEDULER_FILE]
        parts: dict[str, Any] = {
            folder: self.network(folder, dtype) for folder in self.kind.prefixes if folder != "vae"}
        parts |= {folder: self.part(CLIPTokenizer, folder, {}) for folder in index if folder.startswith("tokenizer")}
        parts["vae"] = settings.get("vae") or self.network("vae", dtype)
        parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
        if self.kind.name == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                **parts, add_watermarker=False, force_zeros_for_empty_prompt=index["force_zeros_for_empty_prompt"])
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@dataclass(frozen=True)
class VaeFile(WeightFile):
    """A VAE of one file, or that of a base model's file; `base` is the model that it is for."""

    base: Repo = Repo("", MODEL_FLAG)

    @cached_property
    def kind(self) -> Kind:
        return vae_kind(self, self.header)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        kind, of_base = self.kind, self.base.glance("vae/config.json")
        template = json.loads((TEMPLATES / f"base_{self._family()}.json").read_text("utf-8"))["vae/config.json"]
        kept = {name: of_base[name] for name in ("scaling_factor", "force_upcast", "sample_size", "norm_num_groups")
                if name in of_base}
        try:
            sizes = vae_config(self.header.shapes, kind.prefixes[""], diffusers_names=kind.diffusers_names)
        except BAD_SHAPES as error:
            raise UserError(self._unknown_layers("VAE", uncounted(error))) from error
        return {"config.json": template | kept | sizes}

    def _family(self) -> str:
        if isinstance(self.base, SingleFile):
            return self.base.kind.name
        return "sdxl" if self.base.glance("unet/config.json").get("addition_embed_type") else "sd1"

    def file_metadata(self) -> dict[str, str]:
        short, full = self.webui_hashes()
        return {"ss_vae_name": Path(self.path).name, "ss_vae_hash": short, "ss_new_vae_hash": full}


def skeleton(folder: str, config: dict[str, Any]) -> nn.Module:
    """A network without weights; what it computes for itself is there."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build(folder, config)


def build(folder: str, config: dict[str, Any]) -> nn.Module:
    """The network of a folder: "unet", "text_encoder", "text_encoder_2"; "vae", or "" of a VAE's own file."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if folder == "unet":
        return UNet2DConditionModel.from_config(config)
    if folder in ("vae", ""):
        return AutoencoderKL.from_config(config)
    text_class = CLIPTextModelWithProjection if folder == "text_encoder_2" else CLIPTextModel
    return text_class(CLIPTextConfig.from_dict(config))
