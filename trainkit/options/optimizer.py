"""The concern that says how weights follow gradients: optimizer, rates, schedules."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from trainkit.options.base import Concern, always, opt
from trainkit.options.lora import ADAPTS_UNET
from trainkit.options.prerequisites import needs

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
ADAM_LIKE = (
    "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "prodigy", "schedule_free_adamw", "hina_adaptive")
READS_ADAM = needs(f"optimizer={'|'.join(ADAM_LIKE)}", f"--optimizer {', '.join(ADAM_LIKE)}")
EIGHT_BIT = {"adamw": "adamw8bit", "paged_adamw": "paged_adamw8bit"}


class OptimizerOptions(Concern):
    """Optimizer and learning rate"""

    optimizer: Literal[
        "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "prodigy", "adafactor", "lion", "came",
        "schedule_free_adamw", "hina_adaptive"] | str = opt(
        "adamw", "The optimizer. You can also name any optimizer class by its path, for example torch.optim.NAdam.",
        differs="an unknown name is an error and does not mean AdamW")
    optimizer_args: str | None = opt(
        None,
        "Arguments for the optimizer, for example d_coef=0.5 betas=(0.9,0.99). They are stronger than other flags.",
        unit="name=value", many=True, card="Optimizer arguments", min_length=1)
    use_8bit_adam: bool = opt(
        False, "Use the 8-bit form of adamw or paged_adamw.",
        differs="this flag is an error with other optimizers and is not ignored")
    learning_rate: float = opt(
        1e-4, "The learning rate of the UNet's adapters. For Prodigy, 1 is right.", unit="rate", resume="may change",
        ge=0)
    scale_lr: bool = opt(
        False, "Multiply the learning rate by the number of images in one optimizer step.", resume="may change")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "piecewise_constant"] = opt(
        "constant", "How the learning rate changes over the run.", card=always("Schedule"))
    lr_warmup_steps: int = opt(
        500,
        "The number of optimizer steps in which the learning rate rises from 0. The schedule constant has no warm-up.",
        unit="steps", resume="may change", card=always("Warm-up, steps"),
        read_with=needs("no lr_warmup_steps or lr_scheduler!=constant|piecewise_constant",
                        "an --lr_scheduler that warms up, such as constant_with_warmup"),
        ge=0, off=0)
    lr_num_cycles: int = opt(
        1, "The number of cycles of the schedule cosine_with_restarts.", unit="cycles", resume="may change",
        read_with="lr_scheduler=cosine_with_restarts", ge=1)
    lr_step_rules: str | None = opt(
        None,
        "The factors of the schedule piecewise_constant, and the steps at which they end. 1:100,0.1:200,0.01 means "
        "factor 1 up to step 100, then 0.1 up to step 200, then 0.01.", unit="rules", resume="may change",
        read_with="lr_scheduler=piecewise_constant")
    lr_power: float = opt(
        1.0, "The power of the schedule polynomial.", unit="power", resume="may change",
        read_with="lr_scheduler=polynomial", gt=0)
    adam_beta1: float = opt(
        0.9, "The decay rate of the first moment. Prodigy uses it too.", unit="0..1", read_with=READS_ADAM, ge=0, lt=1)
    adam_beta2: float = opt(
        0.999, "The decay rate of the second moment. Prodigy uses it too.", unit="0..1", read_with=READS_ADAM, ge=0,
        lt=1)
    adam_weight_decay: float = opt(
        1e-4, "The weight decay of the adapters. Prodigy uses it too.", unit="decay", resume="may change", ge=0,
        off=0.0)
    adam_epsilon: float = opt(
        1e-8, "A small number that is added to the denominator of the update. Prodigy uses it too.", unit="number",
        read_with=READS_ADAM, gt=0)
    prodigy_beta3: float | None = opt(
        None,
        "The decay rate of Prodigy's estimate of the step size. Without this flag, it is the square root of "
        "--adam_beta2.", unit="0..1", read_with="optimizer=prodigy", ge=0, lt=1)
    prodigy_decouple: bool = opt(
        True, "Use weight decay as in AdamW.", read_with="optimizer=prodigy", differs="the value False switches it off")
    prodigy_use_bias_correction: bool = opt(
        True, "Use Adam's bias correction in Prodigy.", read_with="optimizer=prodigy",
        differs="the value False switches it off")
    prodigy_safeguard_warmup: bool = opt(
        True, "Keep a warm-up of the learning rate from raising Prodigy's estimate of the step size.",
        read_with="optimizer=prodigy", differs="the value False switches it off")
    max_grad_norm: float | None = opt(
        1.0, "If the norm of the gradient is larger than this, the gradient is scaled down to it.", unit="norm",
        resume="may change", gt=0, off=None)
    use_ema: bool = opt(
        False, "Average the UNet's adapters over the steps. Previews and final files then contain the average.",
        read_with=ADAPTS_UNET)
    ema_decay: float = opt(
        0.999,
        "The decay of that average. Values nearer to 1 average over more steps. In the first steps, a smaller value "
        "is used.", unit="0..1", read_with="use_ema", card=always("EMA decay"), ge=0, lt=1)

    @field_validator("optimizer")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in cls.choices("optimizer") and not DOTTED.fullmatch(value):
            raise ValueError("it is no optimizer we know, nor the dotted path of a class")
        return value

    @property
    def algorithm(self) -> str:
        """The optimizer meant, with --use_8bit_adam read."""
        return EIGHT_BIT.get(self.optimizer, self.optimizer) if self.use_8bit_adam else self.optimizer

    @property
    def is_class(self) -> bool:
        """Whether the optimizer is named by the dotted path of its class."""
        return "." in self.optimizer

    @property
    def estimates_step(self) -> bool:
        """Whether the optimizer finds its own step size, which a learning rate then multiplies."""
        return estimates_step(self.optimizer)

    def base_lr(self, *, global_batch: int) -> float:
        """--learning_rate, with --scale_lr times the images in an optimizer step over all processes."""
        return self.learning_rate * (global_batch if self.scale_lr else 1)

    def text_lr(self, lr: float, *, given: bool, global_batch: int) -> float:
        """The rate of parameters beside the UNet whose flag says `lr`: because it was given, or by default.

        A default such as 5e-6 is meant for Adam. To an optimizer that estimates its own step it is a factor, which
        would leave those parameters where they are; so there the UNet's rate, near 1, stands in for it.
        """
        return self.base_lr(global_batch=global_batch) if self.estimates_step and not given else lr


def averages_weights(optimizer: str) -> bool:
    """Of a value of --optimizer: whether it is schedule-free, in whichever library."""
    return "schedulefree" in optimizer.lower().replace("_", "")


def estimates_step(optimizer: str) -> bool:
    """Of a value of --optimizer: whether it is Prodigy or D-Adaptation, in whichever library."""
    return optimizer.rpartition(".")[2].lower().startswith(("prodigy", "dadapt"))
