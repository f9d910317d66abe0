"""The model families that can be trained.

Each is a module with `problems`, `latents`, `native_resolution`, `skeleton`, `load`, `names_of` and `LORA_TARGETS`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from trainkit.families.base import Family
from trainkit.families.pretrained import MODEL_FLAG
from trainkit.families.single_file import model_at

if TYPE_CHECKING:
    from trainkit.options import ModelOptions

__all__ = ["Family", "of"]


def of(options: ModelOptions) -> ModuleType:
    """The family of a file, folder or Hub id: `sdxl` where sizes or a second text encoder are asked for, else `sd`.

    A model that cannot be read is left to `sd.problems`, which says why.
    """
    from trainkit.families import sd, sdxl

    model = model_at(str(options.pretrained_model_name_or_path), MODEL_FLAG, options.revision)
    index, unet = (model.glance(name) for name in ("model_index.json", "unet/config.json"))
    is_sdxl = unet.get("addition_embed_type") == "text_time" or index.get("text_encoder_2") not in (None, [None, None])
    return sdxl if is_sdxl else sd
