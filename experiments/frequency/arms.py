"""The arms of run.py: how each is trained, and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass

BASE, CONCEPT = "assets/tiny-sd-icons", "assets/icons-3d"
GAIN = 0.3
VANISHING = "1e-12"  # a term so small that what the arm shows is what it is compared with
GAINS = ("0.03", "0.1", "0.3", "1", "3")  # of the pilot

Flags = dict[str, str | int | float | bool]

COMMON: Flags = {
    "pretrained_model_name_or_path": BASE, "train_data_dir": CONCEPT, "resolution": 64, "rank": 4,
    "train_batch_size": 4, "cache_latents": True, "learning_rate": 1e-3, "adam_beta2": 0.99, "lr_warmup_steps": 0,
    "snr_gamma": 5, "report_to": "none", "checkpointing_steps": 100, "checkpoints_total_limit": 1,
    "resume_from_checkpoint": "latest",
}
SUM_FORM: Flags = {"dist_match_mode": "extra", "dist_match_method": "wavelet"}


@dataclass(frozen=True)
class Arm:
    """One way to train. `images` go through the network in a step; "{gain}" in a flag is --gain."""

    says: str
    images: int
    flags: Flags


ARMS: dict[str, Arm] = {
    "base": Arm("no term", 4, {}),
    "base8": Arm("no term, batch 8", 8, {"train_batch_size": 8}),
    "more-data": Arm("second pass as ordinary data", 8, {"dist_match_gain": VANISHING, "dist_match_mode": "combo"}),
    "per-sample": Arm("per-sample band loss, λ 0.03", 8,
                      SUM_FORM | {"dist_match": 0.03, "dist_match_statistic": "diagonal"}),
    "sum-0.003": Arm("sum form, λ 0.003", 8, SUM_FORM | {"dist_match": 0.003}),
    "sum-0.03": Arm("sum form, λ 0.03", 8, SUM_FORM | {"dist_match": 0.03}),
    "u": Arm("unbiased form alone", 8, {"dist_match_gain": "{gain}", "dist_match_mode": "extra"}),
    "combo": Arm("unbiased form, combo", 8, {"dist_match_gain": "{gain}", "dist_match_mode": "combo"}),
    "swap-control": Arm("swap without a term", 4, {"dist_match_gain": VANISHING, "dist_match_mode": "swap"}),
    "swap": Arm("unbiased form, swap", 4, {"dist_match_gain": "{gain}", "dist_match_mode": "swap"}),
    "bank": Arm("unbiased form, combo, bank 0.9", 8,
                {"dist_match_gain": "{gain}", "dist_match_mode": "combo", "dist_match_bank": 0.9}),
    "reuse": Arm("unbiased form, reuse", 4, {"dist_match_gain": "{gain}", "dist_match_mode": "reuse"}),
    "wavelet": Arm("unbiased form, combo, db3 with zeros", 8,
                   {"dist_match_gain": "{gain}", "dist_match_mode": "combo", "dist_match_method": "wavelet"}),
}
CONTRASTS = (  # question, arm, control
    ("sum form: is it the sum?", "sum-0.03", "per-sample"),
    ("unbiased form for sum form", "u", "sum-0.03"),
    ("combo for the same pass as data", "combo", "more-data"),
    ("combo for a doubled batch", "combo", "base8"),
    ("swap: is it the term?", "swap", "swap-control"),
    ("bank beside combo", "bank", "combo"),
    ("reuse for nothing", "reuse", "base"),
    ("wavelet for DCT", "wavelet", "combo"),
)
SHOWN = ("base", "more-data", "sum-0.03", "combo", "swap")  # in the figure and the table by timestep
STYLED = ("base", "more-data", "combo", "swap")  # arms of which images are drawn, too


def flags(case_flags: Flags, gain: float) -> Flags:
    """The trainer's flags of an arm."""
    return COMMON | {name: value.format(gain=f"{gain:g}") if isinstance(value, str) else value
                     for name, value in case_flags.items()}


def pilot_cases() -> dict[str, Flags]:
    """The control, then a case a gain."""
    combo = {f"gain-{gain}": flags(ARMS["combo"].flags, float(gain)) for gain in GAINS}
    return {"more-data": flags(ARMS["more-data"].flags, GAIN)} | combo
