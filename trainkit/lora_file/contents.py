"""What the tensors of a file are: which module each belongs to, which are embeddings, and what the header adds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from trainkit.errors import Problem, UserError, listing
from trainkit.families.file_names import RELEASED_XL, ModulePlace, place_of, stripped
from trainkit.files import Json
from trainkit.lora_file import parts as module_parts
from trainkit.lora_file.header import damaged
from trainkit.lora_file.layer import LayerUpdate
from trainkit.lora_file.layouts import Layout, Tensors
from trainkit.lora_file.parts import ModuleParts, Scaling
from trainkit.reading import parse_json, read_text

Held = TypeVar("Held")
Configs = Mapping[str, Mapping[str, Any]]  # network -> PEFT's config
FamilyName = Literal["sd1", "sd2", "sdxl"]

PEFT_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"  # Diffusers' key for what PEFT must know, as JSON
TOKEN = re.compile(r"[^.]+")  # a file of one embedding names it, as Diffusers saves them
WEBUI_STARTS = ("lora_", "lycoris_", "clip_", "bundle_emb.", "unet.input_", "unet.middle_", "unet.output_",
                "unet.time_embed.", "unet.label_", "unet.out.")  # of names, in the grammar of WebUIs


def group(tensors: Mapping[str, Held], unet: Mapping[str, Any] | None
          ) -> tuple[dict[ModulePlace, dict[str, Held]], list[str]]:
    """The parts of each module, and the names that belong to none.

    tensors  or their shapes
    unet     the UNet's config, where its blocks are not numbered as the released ones
    """
    grouped: dict[ModulePlace, dict[str, Held]] = {}
    strange, config = [], {**RELEASED_XL, **(unet or {})}
    for name, tensor in tensors.items():
        found = module_parts.split(name)
        place = place_of(found[0], config) if found else None
        if found is None or place is None or found[1] in grouped.get(place, {}):
            strange.append(name)
        else:
            grouped.setdefault(place, {})[found[1]] = tensor
    return grouped, strange


def unread(file: Path, where: str, names: list[str]) -> UserError:
    """Tensors that would be lost."""
    kind = next(filter(None, map(module_parts.described, names)), "")
    count = f"{len(names)} of its tensors are" if len(names) > 1 else "one of its tensors is"
    return UserError(Problem(
        f"the LoRA file {file.name} cannot be read as a whole", where or str(file),
        f"{count} not known{f' ({kind})' if kind else ''}: {listing(names[:3])}",
        "name another file; nothing was left out and nothing was written", "data"))


def layer_at(place: ModulePlace, given: ModuleParts, configs: Configs, over_base: bool, file: Path, where: str
             ) -> LayerUpdate:
    config = configs.get(place[0], configs.get("", {}))
    try:
        return module_parts.layer_of(given, scaling_of(place[1], config), over_base=over_base,
                                     whole_rank=rank_in(config) if "" in configs else 0)
    except ValueError as error:
        raise damaged(file, where, ValueError(f"{place[1]} of {place[0]}: {error}")) from error


def scaling_of(path: str, config: Mapping[str, Any]) -> Scaling:
    """What a rank's scale is for a module without an alpha of its own: from PEFT's config, else 1.

    Source: huggingface/peft, tuners/lora/layer.py (scaling), utils/other.py (a pattern is the end of a path).
    """
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise ValueError("alpha_pattern in its config is no object")
    alphas = {stripped(key): value for key, value in pattern.items()}
    near = alphas.get(path) or next((value for key, value in alphas.items() if path.endswith(f".{key}")), None)
    alpha = near or config.get("lora_alpha", config.get("alpha"))
    if alpha is None:
        return lambda rank: 1.0
    if not isinstance(alpha, (int, float)):
        raise ValueError(f"alpha in its config is {alpha!r}")
    power = 0.5 if config.get("use_rslora") else 1.0
    return lambda rank: float(alpha) / rank**power


def rank_in(config: Mapping[str, Any]) -> int:
    rank = config.get("r", 0)
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"r in its config is {rank!r}")
    return rank


def network_configs(metadata: Mapping[str, str], config: Mapping[str, Any] | None, file: Path, where: str) -> Configs:
    """Of a PEFT checkpoint under "", or of each network, from Diffusers' header (`unet.lora_alpha`)."""
    if config is not None:
        return {"": config}
    try:
        whole = parse_json(metadata.get(ADAPTER_METADATA, "{}"))
        found: dict[str, dict[str, Json]] = {}
        for key, value in whole.items():
            network, _, name = key.partition(".")
            found.setdefault(network, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise damaged(file, where, ValueError(f"{ADAPTER_METADATA} in its header: {error}")) from error
    return found


def peft_config(folder: Path, where: str) -> Mapping[str, Json]:
    try:
        config = parse_json(read_text(folder / PEFT_CONFIG))
        if not isinstance(config, dict):
            raise ValueError(f"{PEFT_CONFIG} holds no object")
    except (OSError, ValueError) as error:
        raise damaged(folder, where, error) from error
    return config


def layout_of(tensors: Tensors) -> Layout | Literal[""]:
    first = next(iter(tensors), "")
    if first.startswith("base_model."):
        return "peft"
    if first.startswith(WEBUI_STARTS):
        return "webui"
    return "diffusers" if first else ""


def take_embeddings(tensors: Tensors, file: Path) -> dict[str, dict[str, Tensor]]:
    """Textual inversions, which are taken out of `tensors`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in [*tensors]:
        bundle = module_parts.BUNDLED.fullmatch(name)
        if bundle:
            found.setdefault(bundle[1], {})[module_parts.EMBEDDINGS[bundle[2]]] = rows(tensors.pop(name))
        elif name in module_parts.EMBEDDINGS:
            found.setdefault("", {})[module_parts.EMBEDDINGS[name]] = rows(tensors.pop(name))
    if len(tensors) == 1 and not found:  # Diffusers' and Transformers' learned_embeds.safetensors
        name, tensor = next(iter(tensors.items()))
        if TOKEN.fullmatch(name) and tensor.ndim in (1, 2) and tensor.shape[-1] in (768, 1024, 1280):
            found[name] = {"clip_g" if tensor.shape[-1] == 1280 else "clip_l": rows(tensors.pop(name))}
    return found


def rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)


def stated_family(metadata: Mapping[str, str], networks: set[str]) -> FamilyName | None:
    """By what a header says (kohya's and ModelSpec's keys), and by the second text encoder."""
    said = " ".join(metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")).lower()
    if "text_encoder_2" in networks or "xl" in said:
        return "sdxl"
    if re.search(r"sd_?v?2|stable-diffusion-v2", said) or metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if re.search(r"sd_?v?1|stable-diffusion-v1", said) else None
