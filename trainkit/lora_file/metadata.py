"""How much a header says: everything, what programs list a LoRA by, or what they need to load it.

Source: kohya-ss/sd-scripts, library/train_util.py (--no_metadata keeps six ss_* keys); Stability-AI/ModelSpec 1.0.1,
whose obligatory keys "minimal" keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from trainkit.lora_file.contents import ADAPTER_METADATA
from trainkit.lora_file.layouts import DORA_NORM

MetadataLevel = Literal["full", "minimal", "none"]
LEVELS: tuple[MetadataLevel, ...] = get_args(MetadataLevel)
NEEDED = {  # to load it: what it is of, and how its tensors are meant
    "format", ADAPTER_METADATA, DORA_NORM, "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "modelspec.architecture"}
LISTED = NEEDED | {  # to list it and to find it by its hash
    "modelspec.sai_model_spec", "modelspec.implementation", "modelspec.title", "modelspec.resolution",
    "modelspec.prediction_type", "modelspec.hash_sha256", "ss_output_name", "sshs_model_hash", "sshs_legacy_hash"}


def kept(metadata: Mapping[str, str], level: MetadataLevel) -> dict[str, str]:
    """What of a header stays; nothing of the images, the captions, the settings and the dates below "full"."""
    keys = {"full": metadata.keys(), "minimal": LISTED, "none": NEEDED}[level]
    return {key: value for key, value in metadata.items() if key in keys}
