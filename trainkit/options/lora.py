"""The concern that says what is trained: the adapters."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, always, opt, steps_of_fraction

ADAPTS = "train_unet_frac>0 or train_text_encoder"  # whether any network gets adapters
ADAPTS_UNET = "train_unet_frac>0"


class LoraOptions(Concern):
    """Low-rank adapters"""

    lora_type: Literal["lora", "loha", "lokr"] = opt(
        "lora",
        "The adapter type. lora adds a product of two small matrices to a weight. loha multiplies two such products "
        "number by number. lokr is a Kronecker product of a small matrix and a larger one.", read_with=ADAPTS,
        card="Kind")
    rank: int = opt(
        4, "The rank r, which is the size of the adapter. A higher rank can learn more and needs more memory.",
        unit="rank", read_with=ADAPTS, card=always("Rank"), ge=1, le=4096)
    lora_alpha: float | None = opt(
        None,
        "The scale of the LoRA. Its update is multiplied by lora_alpha / rank. Without this flag, lora_alpha is the "
        "rank, so the factor is 1.", unit="scale", read_with=ADAPTS, card=always("Alpha"), gt=0, off=None)
    use_rslora: bool = opt(
        False,
        "Multiply the update by lora_alpha / √rank instead of lora_alpha / rank. This suits high ranks (rsLoRA).",
        read_with=ADAPTS, card="rsLoRA")
    lora_rank_pattern: str | None = opt(
        None,
        "Other ranks for some layers, as KEY=RANK, for example mid_block=16 attn2=8. A key is a part of a module's "
        "path, or a regular expression for one. It can also be a block as WebUIs number it: IN04, MID, OUT03. The "
        "first key that fits a layer counts. Keys that begin with text_encoder. or text_encoder_2. are for that text "
        "encoder.",
        unit="key=rank", many=True, read_with=ADAPTS, card="Ranks of layers", min_length=1)
    lora_alpha_pattern: str | None = opt(
        None,
        "Another lora_alpha for some layers, as KEY=ALPHA, with keys as in --lora_rank_pattern. Without it and without "
        "--lora_alpha, the alpha of every layer is its rank.", unit="key=alpha", many=True, read_with=ADAPTS,
        card="Alphas of layers", min_length=1)
    lora_lr_pattern: str | None = opt(
        None,
        "Another learning rate for some layers, as KEY=FACTOR, with keys as in --lora_rank_pattern. The learning rate "
        "is multiplied by the factor.", unit="key=factor", many=True, read_with=ADAPTS, card="Rates of layers",
        min_length=1)
    lokr_factor: int = opt(
        8,
        "The side of the small matrix of LoKr. If a layer's side is not divisible by it, the next smaller divisor is "
        "used. -1 chooses a divisor near the square root.", unit="entries", read_with="lora_type=lokr", ge=-1)
    lora_dropout: float = opt(
        0.0, "The fraction of the adapters' inputs that are set to 0 in training.", unit="0..1", read_with=ADAPTS, ge=0,
        lt=1, off=0.0)
    lora_layers: Literal["attention", "attention+ff", "all-linear", "attention+conv", "attention+ff+conv",
                         "all-linear+conv"] = opt(
        "attention",
        "The layers of the UNet that get adapters. attention: the attention projections. attention+ff: these and the "
        "feed-forward layers. all-linear: these and the layers proj_in and proj_out of the attention blocks. With "
        "+conv, also the convolutions of the residual blocks, the downsamplers and the upsamplers (LoCon).",
        read_with=ADAPTS_UNET, card=always("Layers"))
    lora_unet_blocks: str | None = opt(
        None,
        "Train only these blocks of the UNet. Give module paths, separated by commas, for example "
        "unet.up_blocks.0.attentions.0.", unit="paths", read_with=ADAPTS_UNET, card=always("Blocks"), min_length=1,
        differs="the paths must be exact, and a path that matches nothing is an error")
    use_blora: bool = opt(
        False, "Train only SDXL's two blocks of content and style (B-LoRA).", read_with=ADAPTS_UNET, card="B-LoRA",
        differs="this flag is an error together with --lora_unet_blocks")
    use_dora: bool = opt(
        False, "Learn the magnitude and the direction of each weight separately (DoRA).", read_with=ADAPTS, card="DoRA")
    init_lora_weights: Literal["gaussian", "pissa", "olora"] = opt(
        "gaussian",
        "How the matrices A and B of the LoRA start. gaussian: A is random and B is 0. pissa and olora: both start "
        "from the main directions of the weight. With all three, training starts exactly at the base model.",
        read_with=ADAPTS, card="Start")
    network_weights: str | None = opt(
        None,
        "Start from this LoRA file instead of from the base model alone. The file can come from any trainer whose "
        "files we read. For new tokens, the embeddings in the file are used, or those in NAME_emb.safetensors in the "
        "same folder.",
        path=True, read_with=ADAPTS, card="Started from", min_length=1)
    dim_from_weights: bool = opt(
        False,
        "Take the rank and the alpha of each layer from the file of --network_weights, instead of from --rank and "
        "--lora_alpha.", read_with="network_weights", card="Rank from the file")
    loraplus_lr_ratio: float = opt(
        1.0, "The learning rate of B divided by the learning rate of A (LoRA+).", unit="times", read_with=ADAPTS,
        card="LoRA+ ratio", gt=0, off=1.0)
    train_unet_frac: float = opt(
        1.0,
        "The fraction of the steps in which the UNet's adapters are trained. With 0, the UNet gets no adapters. Then "
        "new tokens or text encoders must be trained.", unit="0..1", card="Share of the steps, UNet", ge=0, le=1)

    def stop(self, total: int) -> int:
        """Finished steps of `total` after which the UNet's adapters no longer change."""
        return steps_of_fraction(self.train_unet_frac, total)
