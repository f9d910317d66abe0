"""What can be set of HinaAdaptive: names, defaults, presets, and what no value may be.

Every setting that moves a number lives in the parameter groups, so each group can differ and a state dict carries it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

SettingValue = bool | int | float | str | tuple[float, float] | None
Group = dict[str, Any]  # as torch types it: the settings of a group by name, its parameters, and what moves


@dataclass(frozen=True)
class HinaSettings:
    """Defaults of the constructor. With every flag off the optimizer is torch's AdamW, bit for bit."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    foreach: bool | None = None  # the kernel of the plain path, as in torch
    fused: bool | None = None
    seed: int = 0  # of the stochastic rounding to 16 bits

    # memory: where states lie and in how many bits
    memory_efficient: bool = False  # bounds the scratch by max_buffer_memory_mb; never changes a bit of the result
    vram_budget_gb: float = 16.0
    reduce_precision: bool = False  # states in bfloat16, rounded stochastically
    cpu_offload_states: bool = False
    max_buffer_memory_mb: float = 500.0
    adaptive_features: bool = False  # watch the memory and make room in time
    emergency_simplify: bool = False  # the same, at the last moment
    master_weights: bool = False  # bfloat16 parameters keep their low 16 bits beside them

    # the gradient
    use_agr: bool = False
    use_orthogonal_grad: bool = False
    orthogonal_restore_norm: bool = True

    # the moments
    use_tam: bool = False
    tam_beta: float = 0.9
    use_adopt_stability: bool = False

    # the update
    background_regularization: bool = False
    spatial_awareness: bool = False
    frequency_penalty: float = 0.05
    detail_preservation: float = 0.8
    edge_suppression: bool = False
    edge_penalty: float = 0.1
    edge_threshold: float = 0.6
    use_grams: bool = False
    use_cautious: bool = False
    use_lr_mask: bool = False
    lr_bump: float = 3e-6
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    warmup_steps: int = 500  # of the mask, which then stands still unless lr_mask_always
    lr_mask_always: bool = False
    use_dynamic_adaptation: bool = False
    adaptation_strength: float = 1.0
    relationship_discovery_interval: int = 100
    importance_decay: float = 0.95
    compatibility_threshold: float = 0.3

    # the weights
    dynamic_weight_decay: bool = False
    wd_transition_steps: int = 1000
    wd_decay_factor: float = 0.7
    wd_min_ratio: float = 0.1
    use_spd: bool = False
    spd_lambda: float = 0.06
    spd_anchor: str = "auto"  # 0 for LoRA factors, the start for all others, see roles.py
    lora_rank_penalty: bool = False
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    rank_penalty_interval: int = 10
    rank_penalty_target: str = "factors"


DEFAULTS: dict[str, SettingValue] = asdict(HinaSettings())
SETTING_TYPES = {f.name: str(f.type) for f in fields(HinaSettings)}

# What hinablue/sd-scripts, where the guide comes from, has on without being asked (`HinaAdaptive.__init__` there).
# Its Grams did nothing, and stays off here because it would replace the cautious rule.
FORK: dict[str, SettingValue] = dict.fromkeys((
    "use_spd", "use_cautious", "use_adopt_stability", "use_agr", "use_tam", "use_dynamic_adaptation", "use_lr_mask",
    "dynamic_weight_decay", "memory_efficient", "cpu_offload_states", "reduce_precision", "adaptive_features",
    "emergency_simplify"), True)
PRESETS: dict[str, dict[str, SettingValue]] = {"adamw": {}, "fork": FORK}

RULE_FLAGS = (  # each leaves torch's AdamW when on; in the order in which they act
    "use_agr", "use_orthogonal_grad", "use_tam", "use_adopt_stability", "background_regularization",
    "spatial_awareness", "edge_suppression", "use_grams", "use_cautious", "use_lr_mask", "use_dynamic_adaptation",
    "dynamic_weight_decay", "use_spd", "lora_rank_penalty")
MEMORY_FLAGS = ("memory_efficient", "reduce_precision", "cpu_offload_states", "adaptive_features",
                "emergency_simplify", "master_weights")

KNOBS = {  # what is read under its switch alone
    "use_orthogonal_grad": ("orthogonal_restore_norm",),
    "use_tam": ("tam_beta",),
    "spatial_awareness": ("frequency_penalty", "detail_preservation"),
    "edge_suppression": ("edge_penalty", "edge_threshold"),
    "use_lr_mask": ("lr_bump", "min_lr", "max_lr", "warmup_steps", "lr_mask_always"),
    "use_dynamic_adaptation": ("adaptation_strength", "relationship_discovery_interval", "importance_decay",
                               "compatibility_threshold"),
    "dynamic_weight_decay": ("wd_transition_steps", "wd_decay_factor", "wd_min_ratio"),
    "use_spd": ("spd_lambda", "spd_anchor"),
    "lora_rank_penalty": ("rank_penalty_strength", "low_rank_emphasis", "rank_penalty_interval",
                          "rank_penalty_target"),
}
CHANGE_NO_BIT = ("memory_efficient", "vram_budget_gb", "cpu_offload_states", "max_buffer_memory_mb")  # of a result

LOSS = "an optimizer sees no image: use --loss_type fourier (freq_loss.FourierLoss)"
EIGHT_BITS = ("it belongs to bitsandbytes' optimizers: reduce_precision=True keeps the states in 16 bits, "
              "--optimizer adamw8bit in 8")
GONE = {
    "fourier_feature_loss": LOSS,
    "super_resolution_mode": LOSS,
    "amsgrad": "it never changed a step: use torch.optim.AdamW(amsgrad=True)",
    "args": "it was never read: leave it out",
    "background_regularization_mode": "there is one rule, background_regularization=True: leave it out",
} | dict.fromkeys(("optim_bits", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged"), EIGHT_BITS)


def resolve(given: Mapping[str, object], preset: str = "adamw") -> dict[str, SettingValue]:
    """All settings: the defaults, over them the preset, over both what is given.

    Raises TypeError for a name that is none, ValueError for a value or a preset that cannot be.
    """
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f"HinaAdaptive takes no {name}: {why_unknown(name) or 'leave it out'}")
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: use {' or '.join(map(repr, PRESETS))}")
    values: Group = DEFAULTS | PRESETS[preset] | {name: plain_value(value) for name, value in given.items()}
    check(values)
    return values


def spelled_out(given: Mapping[str, object]) -> dict[str, object]:
    """Arguments with what their preset stands for in its place."""
    return PRESETS.get(str(given.get("preset")), {}) | {k: v for k, v in given.items() if k != "preset"}


def plain_value(value: object) -> object:
    """Python's own number in place of numpy's or of a tensor without axes, which no file of plain values holds."""
    if isinstance(value, tuple | list):
        return tuple(map(plain_value, value))
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def why_unknown(name: str) -> str:
    """What to use in place of a setting that there is none of; "" where nothing comes near."""
    if name in GONE:
        return GONE[name]
    if name.startswith("fourier_"):
        return LOSS
    near = difflib.get_close_matches(name, [*DEFAULTS, "preset"], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""


def check(values: Group) -> None:
    """Raises ValueError for the first value that cannot be."""
    problem = next(_problems(values), None)
    if problem:
        raise ValueError(problem)


def _problems(v: Group) -> Iterator[str]:
    """Kinds first, because ranges compare numbers."""
    yield from (p for name in DEFAULTS for p in _type_problem(name, v[name]))
    if not (isinstance(v["betas"], tuple | list) and len(v["betas"]) == 2
            and all(is_number(b) and 0 <= b < 1 for b in v["betas"])):
        yield f"betas {v['betas']!r} are no two rates of decay: give two numbers in [0, 1)"
    for names, fits, range_ in RANGES:
        yield from (f"{n} {v[n]!r} is out of range: give a number {range_}" for n in names if not fits(v[n]))
    for name, choices in CHOICES.items():
        if v[name] not in choices:
            yield f"{name} {v[name]!r} is unknown: use {' or '.join(map(repr, choices))}"
    yield from _contradictions(v)


def _contradictions(v: Group) -> Iterator[str]:
    if v["foreach"] and v["fused"]:
        yield "foreach and fused are both asked for: use one of them"
    if v["min_lr"] > v["max_lr"]:
        yield f"min_lr {v['min_lr']:g} is above max_lr {v['max_lr']:g}: lower it"
    if v["eps"] < LEAST_EPS and is_adamw(v):
        yield f"eps {v['eps']:g} leaves AdamW 0/0 where a gradient is 0: give a number of at least {LEAST_EPS:g}"
    if v["lr"] * v["weight_decay"] > 1:
        yield f"weight_decay {v['weight_decay']:g} at lr {v['lr']:g} takes more than the weight itself: lower it"
    start = v.get("mask_lr", v["lr"])
    if v["use_lr_mask"] and not v["min_lr"] <= start <= v["max_lr"]:
        yield (f"use_lr_mask starts at lr {start:g}, outside min_lr {v['min_lr']:g} to max_lr {v['max_lr']:g}: "
               "widen them or change lr")


def is_adamw(v: Group) -> bool:
    """Whether a step is torch's kernel for fp32 weights, with no rule on and no state to round."""
    return not v["reduce_precision"] and not any(v[flag] for flag in RULE_FLAGS)


def _type_problem(name: str, value: object) -> Iterator[str]:
    type_name = SETTING_TYPES[name]
    fits = {"bool": isinstance(value, bool), "bool | None": value is None or isinstance(value, bool),
            "int": isinstance(value, int) and not isinstance(value, bool), "float": is_number(value),
            "str": isinstance(value, str)}.get(type_name, True)
    if not fits:
        expected = {"bool": "True or False", "bool | None": "True, False or None", "int": "a whole number",
                    "float": "a finite number", "str": "a text"}
        yield f"{name} {value!r} is of the wrong kind: give {expected[type_name]}"


def is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # type: ignore[operator]  # typeshed gives abs(Real) no order


LEAST_EPS = 1e-30  # above 0 in fp32, in which the rules have such a bound of their own
CHOICES = {"spd_anchor": ("auto", "zero", "init"), "rank_penalty_target": ("factors", "product")}
RANGES = (
    (("lr", "eps", "weight_decay", "edge_penalty", "lr_bump", "adaptation_strength", "rank_penalty_strength"),
     lambda x: 0 <= x <= 1e6, "in [0, 1e6]"),
    (("min_lr", "max_lr"), lambda x: 0 < x <= 1e6, "above 0 and at most 1e6"),
    (("vram_budget_gb", "max_buffer_memory_mb"), lambda x: 0 < x <= 1e9, "above 0 and at most 1e9"),
    (("warmup_steps",), lambda x: x >= 0, "of at least 0"),
    (("relationship_discovery_interval", "rank_penalty_interval", "wd_transition_steps"), lambda x: x >= 1,
     "of at least 1"),
    (("tam_beta", "importance_decay", "edge_threshold", "detail_preservation"), lambda x: 0 <= x < 1, "in [0, 1)"),
    (("spd_lambda", "frequency_penalty", "compatibility_threshold", "wd_min_ratio"), lambda x: 0 <= x <= 1,
     "in [0, 1]"),
    (("wd_decay_factor",), lambda x: 0 < x <= 1, "above 0 and at most 1"),
    (("low_rank_emphasis",), lambda x: 0 <= x <= 2, "in [0, 2]"),
    (("seed",), lambda x: 0 <= x < 2**31, "in [0, 2^31)"),
)
