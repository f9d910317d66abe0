"""How much a header says: everything, what programs list a LoRA by, or what they need to load it.

Source: kohya-ss/sd-scripts, library/train_util.py (--no_metadata keeps six ss_* keys); Stability-AI/ModelSpec 1.0.1,
whose obligatory keys "minimal" keeps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from trainkit.adapters.updates import Hadamard, Kronecker, LowRank
from trainkit.lora_file.contents import ADAPTER_METADATA, FamilyName
from trainkit.lora_file.layer import LayerUpdate
from trainkit.lora_file.layouts import DORA_NORM

MetadataLevel = Literal["full", "minimal", "none"]
LEVELS: tuple[MetadataLevel, ...] = get_args(MetadataLevel)
NEEDED = {  # to load it: what it is of, and how its tensors are meant
    "format", ADAPTER_METADATA, DORA_NORM, "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "modelspec.architecture"}
LISTED = NEEDED | {  # to list it and to find it by its hash
    "modelspec.sai_model_spec", "modelspec.implementation", "modelspec.title", "modelspec.resolution",
    "modelspec.prediction_type", "modelspec.hash_sha256", "ss_output_name", "sshs_model_hash", "sshs_legacy_hash"}


BASES: dict[FamilyName, dict[str, str]] = {  # what kohya's trainer and ModelSpec say of the released models
    "sd1": {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.implementation": "diffusers",
            "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.resolution": "512x512"},
    "sd2": {"ss_v2": "True", "ss_base_model_version": "sd_v2", "modelspec.implementation": "diffusers",
            "modelspec.architecture": "stable-diffusion-v2-512/lora", "modelspec.resolution": "512x512"},
    "sdxl": {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0",
             "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
             "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.resolution": "1024x1024"},
}


def network_of(layers: Mapping[tuple[str, str], LayerUpdate]) -> dict[str, str]:
    """kohya's keys for the network that a converted file has: the most common rank, with alpha = rank but for LoRA."""
    updates = [layer.update for layer in layers.values()]
    algo = "loha" if any(isinstance(u, Hadamard) for u in updates) else (
        "lokr" if any(isinstance(u, Kronecker) for u in updates) else
        "lora" if all(isinstance(u, LowRank) for u in updates) else "full")
    sizes = [(len(u.A), u.scale) for u in updates if isinstance(u, LowRank)]
    sizes += [(len(u.A1), 1.0) for u in updates if isinstance(u, Hadamard)]
    sizes += [(len(u.A), 1.0) for u in updates if isinstance(u, Kronecker) and u.A is not None]
    rank, scale = max(sizes, key=sizes.count, default=(1, 1.0))
    decomposed = any(layer.magnitude is not None for layer in layers.values())
    plain = algo == "lora" and not decomposed
    args = {} if plain else {"algo": algo} | ({"dora_wd": "True", "wd_on_output": "True"} if decomposed else {})
    return {"ss_network_module": "networks.lora" if plain else "lycoris.kohya", "ss_network_dim": str(rank),
            "ss_network_alpha": str(float(rank * scale)), "ss_network_args": json.dumps(args)}


def hash_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes model browsers look LoRAs up by: SHA-256 of the tensor bytes, and an older 8-digit one.

    Both are taken of the file with the ss_* metadata alone, so that editing a title later does not change them
    (kohya-ss/sd-scripts, library/train_util.py, precalculate_safetensors_hashes).
    """
    from safetensors.torch import save

    data = save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[body:]).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}


def kept(metadata: Mapping[str, str], level: MetadataLevel) -> dict[str, str]:
    """What of a header stays; nothing of the images, the captions, the settings and the dates below "full"."""
    keys = {"full": metadata.keys(), "minimal": LISTED, "none": NEEDED}[level]
    return {key: value for key, value in metadata.items() if key in keys}
