"""SDXL's text in training: prompts to conditions, optimizer steps, and what the stock pipeline makes of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainkit.condition import Condition
from trainkit.conditioning import new_tokens
from trainkit.conditioning.live_text import Text, make_text
from trainkit.data.cache import Store
from trainkit.families import sdxl
from trainkit.files import load_tensors
from trainkit.optim import make_optimizer
from trainkit.options import LoraOptions, ModelOptions, OptimizerOptions, PivotalOptions, TextOptions

PROMPTS = ["a TOK dog", "a TOK cat", "a photo of a dog", ""]
FAST = TextOptions(text_encoder_lr=1e-2)
GROUP = 4  # images in an optimizer step


def load_sdxl(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> sdxl.SDXL:
    model = ModelOptions(pretrained_model_name_or_path=str(folder))
    return sdxl.load(model, device=torch.device("cpu"), weight_dtype=dtype, **changes)


def stock_pipeline(folder: Path, file: Path):
    """The stock pipeline after the two documented calls."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    state, names = load_tensors(file), [n for ns in new_tokens.read_header(file).tokens.values() for n in ns]
    pipe.load_textual_inversion(
        state["clip_l"], token=names, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(
        state["clip_g"], token=names, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    return pipe


def text_of(family: sdxl.SDXL, prompts: Sequence[str] = PROMPTS, store: Store | None = None, *, total: int = 4,
            **changes: object) -> Text:
    concerns = {"text": FAST, "pivotal": PivotalOptions(), "lora": LoraOptions(rank=2)} | changes
    return make_text(family, prompts, store, total=total, seed=0, **concerns)


def loss_of(condition: Condition) -> torch.Tensor:
    """Of everything the network is told."""
    return sum(tensor.float().square().mean() for tensor in condition.values())


def train_text(words: Text, steps: Sequence[int], *, prompts: Sequence[str] = PROMPTS, state: tuple | None = None,
               **flags: object):
    """Optimizer steps with a loss on what the encoders say -> the optimizer's state."""
    options = OptimizerOptions(**{"lr_scheduler": "constant", "learning_rate": 1e-2} | flags)
    idle = torch.nn.Parameter(torch.ones(2, 2))  # the UNet's adapters, which train to the end
    unet = {"name": "unet", "params": [idle], "lr": 1e-2, "weight_decay": 0.0, "stop": None}
    optim = make_optimizer([unet, *words.groups(options, GROUP)], options, 4)
    if state:
        optim.unpack(*state)
    for step in steps:
        optim.begin(step)
        torch.manual_seed(step)
        (loss_of(words(prompts, step)) + idle.square().sum()).backward()
        for inner in optim.active:
            for p in inner.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optim.step()
        optim.zero_grad()
        words.after_update(step + 1)
    return optim.pack()
