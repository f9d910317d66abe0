"""Schedulers of Diffusers that denoise on a model's own noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainkit.options.samplers import SAMPLERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # of the noise levels


def scheduler_on(config: Mapping[str, Any], class_name: str, **settings: object) -> SchedulerMixin:
    """A scheduler on the schedule of a model's scheduler config: its betas, prediction type, and end at SNR 0.

    What a config says as null is not given, and a learned variance is no matter of these schedulers.
    """
    import diffusers

    given = {name: value for name, value in config.items() if value is not None and name != "variance_type"}
    return getattr(diffusers, class_name).from_config(given, **settings)


def sampler_on(config: Mapping[str, Any], name: str) -> SchedulerMixin:
    """The sampler of a name of SAMPLERS on a model's schedule.

    What only the model's own scheduler has, such as another order, is left out. Names with _ are Diffusers' notes.
    """
    import diffusers

    sampler = SAMPLERS[name]
    known = inspect.signature(getattr(diffusers, sampler.scheduler).__init__).parameters
    spacing: dict[str, object] = {key: sampler.karras and key == SPACINGS[0] for key in SPACINGS if key in known}
    shared = {name: value for name, value in config.items() if name in known or name.startswith("_")}
    return scheduler_on(shared, sampler.scheduler, **spacing, **sampler.settings)
