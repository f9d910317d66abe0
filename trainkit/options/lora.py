"""The concern that says what is trained: the adapters."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, always, opt, steps_of_fraction

ADAPTS = "train_unet_frac>0 or train_text_encoder"  # whether any network gets adapters
ADAPTS_UNET = "train_unet_frac>0"


class LoraOptions(Concern):
    """Low-rank adapters"""

    lora_type: Literal["lora", "loha", "lokr"] = opt(
        "lora", "what the update of a weight is made of: B A (LoRA), a product of two such by entries (LoHa) or a "
        "small matrix times blocks (LoKr)", read_with=ADAPTS, card="Kind")
    rank: int = opt(
        4, "r of the update (lora_alpha / r) B A", unit="rank", read_with=ADAPTS, card=always("Rank"), ge=1, le=4096)
    lora_alpha: float | None = opt(
        None, "scale of the update; without it r, which makes the scale 1", unit="scale", read_with=ADAPTS,
        card=always("Alpha"), gt=0, off=None)
    use_rslora: bool = opt(
        False, "scale by lora_alpha / √r, which suits high ranks (rsLoRA)", read_with=ADAPTS, card="rsLoRA")
    lokr_factor: int = opt(8, "side of LoKr's small matrix, the largest divisor up to it; -1 is near the square root",
                           unit="entries", read_with="lora_type=lokr", ge=-1)
    lora_dropout: float = opt(
        0.0, "share of the adapters' inputs dropped in training", unit="0..1", read_with=ADAPTS, ge=0, lt=1, off=0.0)
    lora_layers: Literal["attention", "attention+ff", "all-linear", "attention+conv", "attention+ff+conv",
                         "all-linear+conv"] = opt(
        "attention", "layers of the UNet that get adapters: the attention projections, these and the feed-forward "
        "layers, or all linear layers of the attention blocks; +conv adds the convolutions of the residual blocks and "
        "of the changes of size (LoCon)", read_with=ADAPTS_UNET, card=always("Layers"))
    lora_unet_blocks: str | None = opt(
        None, "only these blocks of the UNet, as module paths separated by commas: unet.up_blocks.0.attentions.0",
        unit="paths", read_with=ADAPTS_UNET, card=always("Blocks"), min_length=1,
        differs="exact paths; one that matches nothing is an error")
    use_blora: bool = opt(
        False, "adapt only SDXL's content and style blocks (B-LoRA)", read_with=ADAPTS_UNET, card="B-LoRA",
        differs="an error together with --lora_unet_blocks, which it would overrule")
    use_dora: bool = opt(
        False, "learn magnitude and direction of the weights apart (DoRA)", read_with=ADAPTS, card="DoRA")
    init_lora_weights: Literal["gaussian", "pissa", "olora"] = opt(
        "gaussian", "where A and B start: A at random and B at 0, or both at main directions of the weight (PiSSA, "
        "OLoRA); training starts at the base model with each", read_with=ADAPTS, card="Start")
    loraplus_lr_ratio: float = opt(
        1.0, "how many times A's learning rate B learns with (LoRA+)", unit="times", read_with=ADAPTS,
        card="LoRA+ ratio", gt=0, off=1.0)
    train_unet_frac: float = opt(1.0, "share of the steps in which the UNet's adapters are trained; 0 makes none",
                                 unit="0..1", card="Share of the steps, UNet", ge=0, le=1)

    def stop(self, total: int) -> int:
        """Finished steps of `total` after which the UNet's adapters no longer change."""
        return steps_of_fraction(self.train_unet_frac, total)
