"""Everything that learns: adapters on the network, what trains in the text encoders, and the optimizer of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trainkit import summary
from trainkit.adapters import Adapters, add_adapters
from trainkit.lora_file import start
from trainkit.optim import Optim, make_optimizer

if TYPE_CHECKING:
    from trainkit.conditioning.live_text import Text
    from trainkit.families import Family
    from trainkit.options import LoraOptions, OptimizerOptions, PrecisionOptions


class TrainableOptions(Protocol):
    """What of a trainer's options is about the weights that train."""

    @property
    def lora(self) -> LoraOptions: ...

    @property
    def optimizer(self) -> OptimizerOptions: ...

    @property
    def precision(self) -> PrecisionOptions: ...


class TrainingRun(Protocol):
    """What of a run its weights depend on."""

    seed: int

    @property
    def global_batch(self) -> int: ...  # images in an optimizer step


def make_trainables(
    opt: TrainableOptions, family: Family, text: Text, run: TrainingRun, *, keep_vae: bool, total_steps: int,
) -> tuple[Adapters, Optim]:
    """The adapters on the family's network, which is on the device from now on, and the optimizer.

    keep_vae     whether the VAE encodes at every visit; else it makes room on the device
    total_steps  optimizer steps of the run: groups have rates, decays and last steps of their own
    """
    file = start.read(opt.lora, family.names)
    lora = add_adapters(family.denoiser, start.sized(opt.lora, file), targets=family.lora_targets, seed=run.seed,
                        blocks=family.numbered_blocks)
    start.begin(lora, file, opt.lora)
    start.say_unused(file, {network.prefix for network in (lora, *text.networks) if network.layers},
                     tokens=bool(text.embeddings))
    family.prepare_for_training(keep_vae=keep_vae, gradient_checkpointing=opt.precision.gradient_checkpointing)
    network = lora.groups(lr=opt.optimizer.base_lr(global_batch=run.global_batch),
                          weight_decay=opt.optimizer.adam_weight_decay, stop=opt.lora.stop(total_steps))
    groups = [*network, *text.groups(opt.optimizer, run.global_batch)]
    optimizer = make_optimizer(groups, opt.optimizer, total_steps)
    summary.log_trainables([lora, *text.networks], optimizer)
    return lora, optimizer
