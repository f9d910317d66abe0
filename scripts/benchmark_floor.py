"""The floor under a training step: one forward and backward of the UNet with an adapter, and nothing else.

    python scripts/benchmark_floor.py MODEL BATCH LATENT_SIDE ROUNDS

Three UNets in turn (no adapter, PEFT's layers, ours), a few passes each, medians of wall seconds as one line of JSON.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from trainkit.adapters import add_lora
from trainkit.families.sdxl import LORA_TARGETS
from trainkit.options import LoraOptions

RANK = 4
PASSES = 5


def variants(model: str) -> dict[str, UNet2DConditionModel]:
    bare = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    bare.requires_grad_(False).train()
    peft, ours = copy.deepcopy(bare), copy.deepcopy(bare)
    targets = list(LORA_TARGETS["attention"])
    peft.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    add_lora(ours, LoraOptions(rank=RANK), targets=LORA_TARGETS, seed=0)
    return {"bare": bare, "peft": peft, "ours": ours}


def inputs(unet: UNet2DConditionModel, batch: int, side: int) -> dict[str, object]:
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, config.in_channels, side, side),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), 64.0)},
    }


def once(unet: UNet2DConditionModel, given: dict[str, object], *, learns: bool) -> float:
    """Seconds of forward and backward; without an adapter the input asks for its gradient, so that there is one."""
    given = given | {"sample": given["sample"].clone().requires_grad_(not learns)}
    start = time.perf_counter()
    unet(**given).sample.square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    model, batch, side, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    torch.manual_seed(0)
    unets = variants(model)
    given = inputs(unets["bare"], batch, side)
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    for name, unet in list(unets.items()) * rounds:
        passes = [once(unet, given, learns=name != "bare") for _ in range(PASSES)]
        seconds[name] += passes[1:]  # the first finds the caches full of another UNet
    print(json.dumps({name: statistics.median(taken) for name, taken in seconds.items()}))


if __name__ == "__main__":
    main()
