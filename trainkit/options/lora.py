"""The concern that says what is trained: the adapters."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, opt


class LoraOptions(Concern):
    """Low-rank adapters"""

    rank: int = opt(4, "r of the update (lora_alpha / r) B A", unit="rank", ge=1, le=4096)
    lora_alpha: float | None = opt(
        None, "scale of the update; without it r, which makes the scale 1", unit="scale", gt=0)
    lora_dropout: float = opt(0.0, "share of the adapters' inputs dropped in training", unit="0..1", ge=0, lt=1)
    lora_layers: Literal["attention", "attention+ff", "all-linear"] = opt(
        "attention", "layers of the UNet that get adapters: the attention projections, these and the feed-forward "
        "layers, or all linear layers of the attention blocks")
    lora_unet_blocks: str | None = opt(
        None, "only these blocks of the UNet, as module paths separated by commas: unet.up_blocks.0.attentions.0",
        unit="paths", min_length=1, differs="exact paths; one that matches nothing is an error")
    use_dora: bool = opt(False, "learn magnitude and direction of the weights apart (DoRA)", not_yet="DoRA")
    use_blora: bool = opt(False, "adapt only SDXL's content and style blocks (B-LoRA)", not_yet="B-LoRA")
