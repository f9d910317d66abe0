"""What can be known about a run before a weight is loaded: the checks that every trainer makes of its model."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from trainkit import adapters, optim
from trainkit.diffusion import ScheduleChange
from trainkit.errors import UserError
from trainkit.losses import fourier_term
from trainkit.runtime.startup import bring_back, leave_out

if TYPE_CHECKING:
    from trainkit.errors import Problem
    from trainkit.options import (
        FourierOptions,
        ImageOptions,
        LoraOptions,
        ModelOptions,
        ObjectiveOptions,
        OptimizerOptions,
        TextOptions,
    )


class ModelCheckOptions(Protocol):
    """What of a trainer's options is about the model."""

    @property
    def model(self) -> ModelOptions: ...

    @property
    def data(self) -> ImageOptions: ...

    @property
    def text(self) -> TextOptions: ...

    @property
    def lora(self) -> LoraOptions: ...

    @property
    def objective(self) -> ObjectiveOptions: ...

    @property
    def fourier_loss(self) -> FourierOptions: ...


@dataclass(frozen=True)
class ModelCheck:
    """What a model folder's JSON files say.

    latents     shape (C,h,w) of the latents of one image; None where there are problems, for these are told first
    text_width  of what the network's cross-attention takes
    """

    problems: list[Problem]
    latents: tuple[int, int, int] | None = None
    text_width: int = 0


def check_model(opt: ModelCheckOptions, family: ModuleType) -> ModelCheck:
    """Everything that keeps the model, a module of trainkit.families, from being trained as the options ask.

    Where the model can be read, the checks of adapters and losses follow, which need its modules and sizes.
    """
    o, schedule = opt.model, ScheduleChange.from_options(opt.objective)
    path, vae_path = o.pretrained_model_name_or_path, o.pretrained_vae_model_name_or_path
    found = family.problems(path, resolution=opt.data.resolution, vae_path=vae_path, revision=o.revision,
                            variant=o.variant, clip_skip=opt.text.clip_skip, schedule=schedule,
                            timesteps=(opt.objective.min_timestep, opt.objective.max_timestep))
    if found:
        return ModelCheck(found)
    try:
        network = family.skeleton(path, revision=o.revision)
    except UserError as error:
        return ModelCheck([*error.problems])
    latents = family.latents(path, opt.data.resolution, vae_path=vae_path, revision=o.revision)
    found = [*adapters.problems(network, opt.lora, targets=family.LORA_TARGETS),
             *fourier_term.problems(opt.fourier_loss, opt.objective.loss_type, latents)]
    return ModelCheck(found, latents, network.config.cross_attention_dim)


def leave_out_unused(o: OptimizerOptions) -> None:
    """Keep libraries from importing bitsandbytes where nothing of it is asked for, as an earlier run may have done."""
    bring_back()
    if optim.library(o) != "bitsandbytes":
        leave_out("bitsandbytes")
