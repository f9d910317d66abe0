"""A run directory as a finished training leaves it, without the training."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image

STEPS = 30
HOSTILE = """</script><script>alert(1)</script> "quoted" 'single' {{ 7*7 }} <img src=x onerror=alert(2)> \\ ` & \n---"""
DEFAULTS = {
    "rank": 4, "lora_alpha": None, "lora_layers": "attention", "lora_unet_blocks": None, "learning_rate": 1e-4,
    "optimizer": "adamw", "lr_scheduler": "constant", "lr_warmup_steps": 500, "train_batch_size": 4, "repeats": 1,
    "gradient_accumulation_steps": 1, "snr_gamma": None, "noise_offset": 0.0, "random_flip": False, "clip_skip": None,
    "mixed_precision": None, "seed": 0, "dataset_name": None, "push_to_hub": False, "hub_model_id": None,
    "hub_token": "***", "caption_column": None, "validation_prompt": None,
}


def make_run(folder: Path, *, metrics: bool = True, samples: tuple[int, ...] = (0, 15, 30), **given: object) -> Path:
    """run.json, metrics.jsonl and samples/ in `folder`; `given` are options from the command line.

    With dist_match or dist_match_gain the metrics are those of a matched run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "pretrained_model_name_or_path": "assets/tiny-sdxl-icons", "instance_data_dir": "/home/anna/private/icons",
        "instance_prompt": "3d icon in the style of TOK", "output_dir": str(folder), "resolution": 64,
        "validation_prompt": "3d icon in the style of TOK, a dog", **given,
    }
    options = {flag: {"value": value, "origin": "default"} for flag, value in DEFAULTS.items() if flag not in given}
    options |= {flag: {"value": value, "origin": "command line"} for flag, value in given.items()}
    record = {
        "run_id": "0123", "name": folder.name, "status": "running", "exit_code": None, "step": None, "ended": None,
        "started": "2026-11-21T22:05:11+0000", "seconds": None, "seed": 0, "world": 1, "device": "CPU x86_64, 2 cores",
        "precision": "no", "options": options, "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": ["/home/anna/suite/train_dreambooth_lora_sdxl_advanced.py", "--hub_token=***"],
        "total_steps": STEPS, "global_batch": 4, "start_step": 0,
    }
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    if metrics:
        matched = given.get("dist_match") or given.get("dist_match_gain")
        more = matched_row if matched else lambda step: {}
        lines = [json.dumps(row | more(row["step"])) + "\n" for row in rows()]
        (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    (folder / "samples").mkdir(exist_ok=True)
    for step in samples:
        for name in (f"step_{step:06d}_p01_s0.png", f"step_{step:06d}_p01_s1.png", f"step_{step:06d}.png"):
            Image.new("RGB", (64, 64), (8 * step, 100, 50)).save(folder / "samples" / name)
    return folder


def rows() -> list[dict[str, float | None]]:
    return [
        {"step": s, "loss": 0.1 + math.exp(-s / 9), "grad_norm": 1.0 / s, "skipped": 0.0, "lr/unet": 1.0,
         "d/unet": 1e-5 * s, "images": 4 * s, "seconds": 0.5 * s}
        for s in range(1, STEPS + 1)
    ]


def matched_row(step: int) -> dict[str, float]:
    """Noise levels take turns. In the last half both bands are better, and of the highest SNR there is no pair."""
    place, late = step % 3, step > STEPS / 2
    row = {"snr": (0.3, 0.9, 2.5)[place], "bin": (1.0, 4.0, 7.0)[place], "loss": 0.01}
    for band, size in (("low", 0.1), ("high", -0.02)):
        row |= {f"error_{band}": 0.3, f"slope_{band}": 0.99 if late else 0.9}
        if not (late and place == 2):
            row |= {f"u_{band}": size if late else 9 * size, f"z_{band}": 20 * size}
    return {f"dist_match/{name}": value for name, value in row.items()}
