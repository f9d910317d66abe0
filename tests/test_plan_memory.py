"""What `trainkit.plan` computes on shapes, held against what real steps on a CPU allocate, and published figures."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train_dreambooth_lora_sdxl_advanced as dreambooth
import train_text_to_image_lora as text_to_image
from tests.support import ROOT
from trainkit import adapters
from trainkit.conditioning import live_text
from trainkit.data.batch import Batch
from trainkit.diffusion import make_noise
from trainkit.families import sd, sdxl
from trainkit.losses.passes import Passes, always, plain_objective
from trainkit.options import parse
from trainkit.plan import models, phases
from trainkit.plan.as_on_cuda import cpu_attention
from trainkit.plan.live_bytes import GRADIENTS, GRAPH
from trainkit.training.step import TrainStep

CPU_BLOCK = 64  # bytes to which PyTorch's CPU allocator aligns
SHIPPED = {"sdxl": (dreambooth, sdxl, "tiny-sdxl-icons"), "sd": (text_to_image, sd, "tiny-sd-icons")}
CONFIGURATIONS = {  # model, flags beside precision fp32, how far the computed peak may be from the measured one
    "batch 2": ("sdxl", ["--train_batch_size=2"], 0.01),
    "128 px": ("sdxl", ["--train_batch_size=1", "--resolution=128"], 0.01),
    "all linear layers": ("sdxl", ["--train_batch_size=2", "--lora_layers=all-linear", "--rank=16"], 0.01),
    "DoRA": ("sdxl", ["--train_batch_size=2", "--use_dora"], 0.01),
    "convolutions": ("sdxl", ["--train_batch_size=2", "--lora_layers=attention+conv"], 0.01),
    "LoKr": ("sdxl", ["--train_batch_size=2", "--lora_type=lokr"], 0.01),
    "PiSSA": ("sdxl", ["--train_batch_size=2", "--init_lora_weights=pissa"], 0.01),
    "SD 1.x": ("sd", ["--train_batch_size=4"], 0.01),
    "the VAE encodes in the step": ("sdxl", ["--train_batch_size=2", "--no_cache_latents"], 0.01),
    "LoRA on the text encoders": ("sdxl", ["--train_batch_size=2", "--train_text_encoder"], 0.01),
    "225 tokens": ("sdxl", ["--train_batch_size=2", "--train_text_encoder", "--max_token_length=225"], 0.01),
    "checkpointing": ("sdxl", ["--train_batch_size=2", "--gradient_checkpointing"], 0.15),
    "checkpointing, batch 4": ("sdxl", ["--train_batch_size=4", "--gradient_checkpointing"], 0.15),
    "checkpointing, SD 1.x": ("sd", ["--train_batch_size=4", "--gradient_checkpointing"], 0.15),
}
OFTEN = ("batch 2", "DoRA", "SD 1.x", "the VAE encodes in the step", "LoRA on the text encoders", "checkpointing",
         "checkpointing, SD 1.x")


def options_of(module, *flags: str):
    given = ["--instance_prompt=a"] if module is dreambooth else []
    return parse(module.Options, [*given, "--resolution=64", "--cache_latents", "--center_crop", *flags],
                 description="")


def shipped(kind: str, *flags: str):
    module, family_module, folder = SHIPPED[kind]
    return options_of(module, f"--pretrained_model_name_or_path={ROOT / 'assets' / folder}", *flags), family_module


@pytest.mark.trains
@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CONFIGURATIONS])
def test_the_computed_peak_is_what_a_real_step_allocates(name):
    """Above the weights: they are there before the profiler looks."""
    kind, flags, tolerance = CONFIGURATIONS[name]
    opt, family_module = shipped(kind, *flags)
    with phases.as_on_cuda(cpu_attention):
        skeleton = phases.Skeleton(opt, models.read_configs(opt.model), block=CPU_BLOCK)
        skeleton.encode_text()
        skeleton.add_trainables()
        kinds = skeleton.step().kinds
    computed = kinds[GRAPH] + kinds.get(GRADIENTS, 0)
    assert computed == pytest.approx(allocated_in_a_step(opt, family_module), rel=tolerance)


@pytest.mark.parametrize("tokens, places", [(75, 77), (150, 154), (225, 231)])
def test_long_captions_are_planned_as_long_as_they_may_be(tokens, places):
    opt, _ = shipped("sdxl", f"--max_token_length={tokens}")
    with phases.as_on_cuda(cpu_attention):
        skeleton = phases.Skeleton(opt, models.read_configs(opt.model), block=CPU_BLOCK)
        skeleton.encode_text()
    assert skeleton.given["embeds"].shape[1] == places


def allocated_in_a_step(opt, family_module) -> int:
    """Bytes at the peak of forward and backward pass, above what was there before, from the allocator's events."""
    family = family_module.load(opt.model, device=torch.device("cpu"), weight_dtype=torch.float32,
                                max_chunks=opt.captions.max_chunks)
    longer = " cat" * 75 * (opt.captions.max_chunks - 1)
    prompts = [f"icon {place}{longer}" for place in range(opt.run.train_batch_size)]
    text = live_text.make_text(family, prompts, None, text=opt.text, pivotal=None, lora=opt.lora, total=10, seed=0)
    lora = adapters.add_adapters(family.denoiser, opt.lora, targets=family.lora_targets, seed=0)
    family.prepare_for_training(keep_vae=not opt.data.cache_latents,
                                gradient_checkpointing=opt.precision.gradient_checkpointing)
    plain, memories = plain_objective(opt.objective, opt.fourier_loss, family.schedule, total_steps=10,
                                      note=lambda **facts: None)
    train_step = TrainStep(family, text, make_noise(opt.objective), Passes(always(plain), memories),
                           lambda: torch.autocast("cpu", enabled=False))
    batch, trained = batch_of(opt, family, prompts), [*lora.parameters(),
                                                      *(p for n in text.networks for p in n.parameters())]
    step(train_step, batch, trained)  # the first one makes what later ones find
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(train_step, batch, trained)
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def step(train_step: TrainStep, batch: Batch, trained: list[torch.Tensor]) -> None:
    for loss in train_step([batch]):
        loss.backward()
        del loss
    for parameter in trained:
        parameter.grad = None


def batch_of(opt, family, prompts: list[str]) -> Batch:
    rows, side = len(prompts), opt.data.resolution
    latent = torch.zeros(rows, family.latent_channels, side // family.vae_factor, side // family.vae_factor)
    pixels = torch.zeros(rows, 3, side, side)
    content = {"mean": latent, "logvar": latent} if opt.data.cache_latents else {"pixels": pixels}
    return Batch(step=0, keys=tuple((0, 0, place) for place in range(rows)), rows=tuple(range(rows)),
                 prompts=tuple(prompts), time_ids=torch.full((rows, 6), float(side)), loss_weight=torch.ones(rows),
                 is_class=torch.zeros(rows, dtype=torch.bool), num_instance=rows, images=("",) * rows, **content)
