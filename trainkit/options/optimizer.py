"""The concern that says how weights follow gradients: optimizer, rates, schedules."""

from __future__ import annotations

from typing import Literal

from trainkit.options.base import Concern, opt


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
