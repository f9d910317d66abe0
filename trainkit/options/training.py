"""The concerns that say how it is trained: adapters, objective, optimizer, precision."""

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


class ObjectiveOptions(Concern):
    """What is minimised"""

    do_edm_style_training: bool = opt(
        False, "noise levels and weights of Karras et al. 2022", not_yet="EDM-style training")
    snr_gamma: float | None = opt(
        None, "Min-SNR weighting (Hang et al. 2023), 5 in the paper; without it the plain error", unit="gamma", gt=0)
    noise_offset: float = opt(0.0, "noise added to each channel's mean, 0.05 to 0.1 are usual", unit="std", ge=0)
    prediction_type: Literal["epsilon", "v_prediction"] | None = opt(
        None, "what the UNet predicts; without it the model's own scheduler config says so")


class OptimizerOptions(Concern):
    """Optimizer and learning rate"""

    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = opt(
        "adamw", "what turns gradients into updates", differs="an unknown name is an error, not AdamW")
    use_8bit_adam: bool = opt(
        False, "the same as --optimizer adamw8bit", differs="refused with Prodigy, not ignored")
    learning_rate: float = opt(1e-4, "learning rate of the UNet's adapters; 1 is right for Prodigy", unit="rate", ge=0)
    scale_lr: bool = opt(False, "multiply the learning rate by the pictures in an optimizer step")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "piecewise_constant"] = opt("constant", "course of the learning rate")
    lr_warmup_steps: int = opt(
        500, "optimizer steps in which the rate rises from 0; not read by constant", unit="steps", ge=0)
    lr_num_cycles: int = opt(1, "restarts of cosine_with_restarts", unit="cycles", ge=1)
    lr_step_rules: str | None = opt(
        None, "multipliers of piecewise_constant and the steps they end at: 1:100,0.1:200,0.01", unit="rules")
    lr_power: float = opt(1.0, "power of polynomial", unit="power", gt=0)
    adam_beta1: float = opt(0.9, "decay of the first moment, of Prodigy too", unit="0..1", ge=0, lt=1)
    adam_beta2: float = opt(0.999, "decay of the second moment, of Prodigy too", unit="0..1", ge=0, lt=1)
    adam_weight_decay: float = opt(1e-4, "weight decay of the adapters, of Prodigy too", unit="decay", ge=0)
    adam_epsilon: float = opt(1e-8, "added to the denominator, of Prodigy too", unit="number", gt=0)
    prodigy_beta3: float | None = opt(
        None, "decay of Prodigy's step size estimate; without it the root of --adam_beta2", unit="0..1", ge=0, lt=1)
    prodigy_decouple: bool = opt(True, "weight decay as in AdamW", differs="False is False")
    prodigy_use_bias_correction: bool = opt(True, "Adam's bias correction in Prodigy", differs="False is False")
    prodigy_safeguard_warmup: bool = opt(
        True, "keep a warm-up from raising Prodigy's estimate", differs="False is False")
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm", unit="norm", gt=0)

    @property
    def algorithm(self) -> str:
        """The optimizer meant, with --use_8bit_adam read."""
        return "adamw8bit" if self.use_8bit_adam and self.optimizer == "adamw" else self.optimizer

    def base_lr(self, *, global_batch: int) -> float:
        """--learning_rate, with --scale_lr times the pictures in an optimizer step over all processes."""
        return self.learning_rate * (global_batch if self.scale_lr else 1)


class PrecisionOptions(Concern):
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = opt(
        None, "precision of the frozen weights and the forward pass; without it accelerate's configuration. Adapters "
        "and optimizer stay in fp32", differs="adapters are fp32 under bf16 too")
    allow_tf32: bool = opt(False, "TF32 matrix products on NVIDIA GPUs since Ampere")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, slower")
    enable_xformers_memory_efficient_attention: bool = opt(
        False, "accepted; PyTorch's own memory-efficient attention is always on",
        differs="a notice, since torch's scaled_dot_product_attention replaced xFormers")
