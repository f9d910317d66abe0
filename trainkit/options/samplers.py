"""Samplers by name: what WebUIs call them, and the scheduler of Diffusers that each is.

Source: huggingface/diffusers, docs/source/en/api/schedulers/overview.md (the table of k-diffusion's and A1111's names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainkit.errors import Problem

DPM, DPM_SDE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


@dataclass(frozen=True)
class Sampler:
    """One way to denoise.

    label     what WebUIs write into PNG files
    scheduler the class of Diffusers
    settings  of it, apart from the model's own
    most_steps  that it can take; 0: any number
    """

    label: str
    scheduler: str
    settings: Mapping[str, object] = field(default_factory=dict)
    most_steps: int = 0

    @property
    def of_edm(self) -> bool:
        return self.scheduler.startswith("EDM")

    @property
    def karras(self) -> bool:
        return self.label.endswith(" Karras")

    @property
    def knows_zero_snr(self) -> bool:
        return self.scheduler != DPM_SDE


SECOND_ORDER = {"solver_order": 2, "algorithm_type": "dpmsolver++"}
SECOND_ORDER_SDE = {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "euler": Sampler("Euler", "EulerDiscreteScheduler"),
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler("DPM++ 2M", DPM, SECOND_ORDER),
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", DPM, SECOND_ORDER),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", DPM, SECOND_ORDER_SDE),
    "dpmpp_2m_sde_karras": Sampler("DPM++ 2M SDE Karras", DPM, SECOND_ORDER_SDE),
    "dpmpp_sde": Sampler("DPM++ SDE", DPM_SDE, SECOND_ORDER_SDE),
    "dpmpp_sde_karras": Sampler("DPM++ SDE Karras", DPM_SDE, SECOND_ORDER_SDE),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler"),
    "ddim": Sampler("DDIM", "DDIMScheduler"),
    "lcm": Sampler("LCM", "LCMScheduler", {"original_inference_steps": 50}, most_steps=50),
    "tcd": Sampler("TCD", "TCDScheduler", {"original_inference_steps": 50}, most_steps=50),
    "edm_euler": Sampler("Euler", "EDMEulerScheduler"),
    "edm_dpmpp_2m": Sampler("DPM++ 2M", "EDMDPMSolverMultistepScheduler", SECOND_ORDER),
}
ALIASES = {"euler_ancestral": "euler_a", "k_euler": "euler", "k_euler_a": "euler_a", "dpmsolver++": "dpmpp_2m",
           "edmeulerscheduler": "edm_euler", "edmdpmsolvermultistepscheduler": "edm_dpmpp_2m"}  # kohya's and others'


def plain(name: str) -> str:
    """What the spellings of a name have in common: DPM++ 2M Karras, dpmpp_2m_karras, dpm++-2m-karras."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


SPELLINGS = ({plain(sampler.label): name for name, sampler in reversed(SAMPLERS.items())}
             | {plain(sampler.scheduler): name for name, sampler in reversed(SAMPLERS.items())}
             | {plain(name): name for name in SAMPLERS} | {plain(other): name for other, name in ALIASES.items()})


def sampler_named(name: str) -> str:
    """The key of SAMPLERS for a name in any spelling. Raises ValueError."""
    found = SPELLINGS.get(plain(name))
    if found is None:
        raise ValueError(f"there is no scheduler {name!r}; known: {', '.join(SAMPLERS)}")
    return found


def sampler_problems(name: str, config: Mapping[str, Any], steps: int, flag: str) -> list[Problem]:
    """Why a model cannot be sampled so.

    config  of its scheduler
    flag    that named the sampler
    """
    sampler, of_edm = SAMPLERS[name], str(config.get("_class_name")).startswith("EDM")
    where = f"{flag} {name}"
    if sampler.of_edm != of_edm:
        fits = " or ".join(other for other, one in SAMPLERS.items() if one.of_edm == of_edm and not one.most_steps)
        kind = "an EDM model with a range of σ" if of_edm else "no EDM model: it has a schedule of β"
        return [Problem(f"the scheduler {name} does not fit the base model", where, f"the model is {kind}",
                        f"{flag} {fits}, or leave {flag} out")]
    if config.get("rescale_betas_zero_snr") and not sampler.knows_zero_snr:
        return [Problem(f"the scheduler {name} does not fit the base model", where, "the model's schedule ends at SNR "
                        f"0, which {sampler.scheduler} of Diffusers does not know", f"{flag} dpmpp_2m_sde")]
    if sampler.most_steps and steps > sampler.most_steps:
        return [Problem(f"{steps} steps of the scheduler {name}", where, f"it takes {sampler.most_steps} at most",
                        "--steps 4 to 8 is usual with it")]
    return []


def webui_name(scheduler: str, config: Mapping[str, Any]) -> str:
    """What WebUIs call a scheduler of Diffusers with this config; its class name where they have none."""
    for sampler in SAMPLERS.values():
        same = all(config.get(name, value) == value for name, value in sampler.settings.items())
        if sampler.scheduler == scheduler and same and sampler.karras == bool(config.get("use_karras_sigmas")):
            return sampler.label
    return scheduler
