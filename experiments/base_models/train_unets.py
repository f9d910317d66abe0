"""Train one of the two UNets: from the weights of an earlier edition, from SDXL's for SD, or from nothing."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from experiments.base_models.inherit import inherit
from experiments.base_models.loop import Budget, Training
from experiments.base_models.unet import UNetTask, make_sd_unet, make_sdxl_unet


def train_unet(work_dir: Path, family: str, *, minutes: float, seed: int) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(seed)
    unet = make_sdxl_unet() if family == "sdxl" else make_sd_unet()
    task = UNetTask(work_dir, family, seed)
    start = work_dir / "start" / f"{family}.safetensors"
    if start.exists():  # weights of an earlier edition; a saved state of this training, if there is one, replaces them
        unet.load_state_dict(load_file(start))
    elif family == "sd" and not (work_dir / "training" / "sd.json").exists():
        inherit(work_dir, unet, seed)
    unet.set_attn_processor(AttnProcessor())  # bf16 fused attention is 6x slower backwards on a CPU than two matmuls
    state = {"level_errors": task.level_errors}
    training = Training(family, unet, work_dir, budget=Budget(minutes), lr=8e-4, ema=0.9995, half=True, state=state)
    training.run(lambda step: task.losses(training.worker, step))
