"""The trainer's own step and promises: what gets gradients, what the loss is, what may not change on resume."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.compare import same_tensors
from tests.support.tiny_models import build_tiny_sdxl
from tests.support.trainers import Done, command, forked, make_images
from tests.support.twice import THEN
from trainkit import rng
from trainkit.adapters import Adapters, add_adapters
from trainkit.conditioning.cached_text import FrozenText
from trainkit.data.batch import Batch
from trainkit.data.loader import Images, micro_batches, ready_images
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Order, Shard
from trainkit.diffusion import make_noise
from trainkit.families import sdxl
from trainkit.losses.objective import make_objective
from trainkit.losses.passes import Passes, always
from trainkit.optim import ParamGroup, make_optimizer
from trainkit.options import DataOptions, LoraOptions, ModelOptions, ObjectiveOptions, OptimizerOptions
from trainkit.training.gradients import Gradients
from trainkit.training.step import TrainStep

SEED, GLOBAL_BATCH, GAMMA = 3, 8, 5.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rig:
    """The trainer's objects, put together as its main does, without a run around them."""

    step: TrainStep
    lora: Adapters
    images: Images
    encoders: tuple[nn.Module, ...]  # the family itself has let go of them

    def batches(self, *, accumulation: int = 1, step: int = 1) -> list[Batch]:
        """The micro-batches of one optimizer step; five images and a batch of eight, so step 1 begins mid-epoch."""
        order = Order(self.images.rows, GLOBAL_BATCH, seed=SEED)
        shard = Shard(accumulation=accumulation)
        ((_, found),) = micro_batches(self.images, order, shard, start_step=step, stop_step=step + 1)
        return found

    def losses(self, batch: Batch) -> Tensor:
        """[B] of the one pass."""
        (objective,) = self.step.passes.of_step(batch.step)
        return self.step.losses(objective, batch, self.step.family.sample_latents(batch))

    def backward(self, **which: int) -> Gradients:
        """The gradients of one optimizer step, on the parameters."""
        gradients = Gradients(CPU)
        for loss in self.step(self.batches(**which)):
            gradients.backward(loss)
        return gradients


def rig(model: Path, data: Path, *, gamma: float | None = None, dtype: torch.dtype = torch.float32,
        cached: bool = False) -> Rig:
    options = DataOptions(instance_data_dir=str(data), instance_prompt="TOK", resolution=32, random_flip=True,
                          cache_latents=cached)
    rows, problems = read_rows(options)
    assert not problems
    base = ModelOptions(pretrained_model_name_or_path=str(model))
    family = sdxl.load(base, device=CPU, weight_dtype=dtype)
    encoders, prompts = family.text_encoders, FrozenText(family, [row.caption for row in rows])
    images = ready_images(rows, options, family, {}, seed=SEED)
    lora = add_adapters(family.denoiser, LoraOptions(rank=2), targets=family.lora_targets, seed=SEED)
    family.denoiser.to(dtype)  # the adapters too
    family.prepare_for_training(keep_vae=images.live)
    objective = ObjectiveOptions(snr_gamma=gamma)
    passes = Passes(always(make_objective(objective, family.schedule)))
    step = TrainStep(family, prompts, make_noise(objective), passes, nullcontext)
    return Rig(step, lora, images, encoders)


def train_a_little(lora: Adapters) -> None:
    """B away from zero: with B = 0, A gets no gradient."""
    with torch.no_grad():
        for path in lora.layers:
            lora.factors(path)[1].normal_(std=0.05, generator=rng.generator("nudge", path))


def unet_groups(lora: Adapters, options: OptimizerOptions) -> list[ParamGroup]:
    return lora.groups(lr=options.base_lr(global_batch=GLOBAL_BATCH), weight_decay=options.adam_weight_decay)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images", n=5)


@pytest.fixture(scope="module")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "v", prediction_type="v_prediction")


# -- the step ----------------------------------------------------------------------------------------------------------


def test_a_train_step_gives_gradients_to_every_adapter_and_to_nothing_else(tiny_sdxl, data):
    trained = rig(tiny_sdxl, data)
    train_a_little(trained.lora)
    own = {id(p) for p in trained.lora.parameters()}
    family = trained.step.family
    parts = (family.denoiser, family.vae, *trained.encoders)
    others = [p for part in parts for p in part.parameters() if id(p) not in own]
    before = [p.clone() for p in others]
    gradients = trained.backward()
    assert all(p.grad.abs().max() > 0 for p in trained.lora.parameters())
    assert all(p.grad is None and not p.requires_grad for p in others)
    options = OptimizerOptions(learning_rate=0.1)
    optimizer = make_optimizer(unet_groups(trained.lora, options), options, 1)
    gradients.update(optimizer, step=0, max_grad_norm=1.0)
    assert all(torch.equal(p, old) for p, old in zip(others, before, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str)
def test_one_global_batch_gives_one_gradient_however_it_is_cut(dtype, limit, tiny_sdxl, data):
    """8 micro-batches of 1, 2 of 4 and 1 of 8: the same sum. In fp32 kernels round differently at each batch size."""
    trained = rig(tiny_sdxl, data, gamma=GAMMA, dtype=dtype, cached=True)
    train_a_little(trained.lora)
    whole, halves, singles = (gradient(trained, accumulation) for accumulation in (1, 2, 8))
    assert (halves - whole).norm() < limit * whole.norm()
    assert (singles - whole).norm() < limit * whole.norm()


def gradient(trained: Rig, accumulation: int) -> Tensor:
    trained.lora.network.zero_grad(set_to_none=True)
    trained.backward(accumulation=accumulation)
    return torch.cat([p.grad.flatten() for p in trained.lora.parameters()])


@pytest.mark.parametrize("kind", ["epsilon, plain", "v, Min-SNR"])
def test_the_loss_is_the_formula_on_stock_parts(kind, tiny_sdxl, v_model, data):
    """A fresh adapter changes nothing, so the base model by itself must give the step's losses."""
    model, gamma = (tiny_sdxl, None) if kind == "epsilon, plain" else (v_model, GAMMA)
    fresh = rig(model, data, gamma=gamma)
    (batch,) = fresh.batches()
    with torch.no_grad():
        torch.testing.assert_close(fresh.losses(batch), losses_by_hand(model, batch, gamma))


def losses_by_hand(model: Path, batch: Batch, gamma: float | None) -> Tensor:
    """Stock pipeline, stock scheduler, and the draws that belong to (seed, step, slot) -> losses [B]."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    keys = [(SEED, 1, place) for place in range(GLOBAL_BATCH)]
    assert batch.keys == tuple(keys)
    t = (rng.uniform(keys, "timestep").double() * 1000).long()  # [B]
    posterior = pipe.vae.encode(batch.pixels).latent_dist
    drawn = rng.normal(posterior.mean.shape[1:], keys, name="posterior")
    x0 = (posterior.mean + posterior.std * drawn) * pipe.vae.config.scaling_factor  # [B,C,h,w]
    n = rng.normal(x0.shape[1:], keys, name="noise")
    embeds, _, pooled, _ = pipe.encode_prompt(list(batch.prompts), do_classifier_free_guidance=False)
    out = pipe.unet(schedule.add_noise(x0, n, t), t, encoder_hidden_states=embeds,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids}).sample
    is_v = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(x0, n, t) if is_v else n
    mse = F.mse_loss(out, target, reduction="none").mean((1, 2, 3))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    return mse if gamma is None else mse * snr.clamp(max=gamma) / (snr + is_v)


def test_a_v_prediction_model_learns_a_batch_with_finite_losses(v_model, data):
    trained = rig(v_model, data, gamma=GAMMA)
    options = OptimizerOptions(learning_rate=1e-2)
    optimizer = make_optimizer(unet_groups(trained.lora, options), options, 4)
    losses = []
    for step in range(4):
        gradients = trained.backward()  # the same batch and the same noise each time
        done = gradients.update(optimizer, step=step, max_grad_norm=1.0)
        losses.append(done.loss)
    assert torch.tensor(losses).isfinite().all() and losses == sorted(losses, reverse=True)


def test_polynomial_decay_ends_at_the_same_rate_in_every_group():
    """1e-7 whatever a group starts at; PyTorch's default rate of the optimizer, 1e-3, plays no part."""
    options = OptimizerOptions(lr_scheduler="polynomial", lr_warmup_steps=0)
    groups = [{"name": name, "params": [nn.Parameter(torch.zeros(1))], "lr": lr, "weight_decay": 0.0}
              for name, lr in (("unet", 1e-4), ("text", 5e-6))]
    optimizer = make_optimizer(groups, options, 10)
    optimizer.begin(10)
    assert optimizer.describe() == pytest.approx({"lr/unet": 1e-7, "lr/text": 1e-7})


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.trains
def test_what_would_change_the_training_is_refused_on_resume_by_name(tiny_sdxl, tmp_path):
    images = make_images(tmp_path / "data", n=3)

    def run(**changes: object) -> Done:
        argv = command(tiny_sdxl, images, tmp_path / "out", max_train_steps=1, **changes)
        return forked(argv, log=tmp_path / "log")

    assert run().code == 0
    for flag, value in {"rank": 4, "resolution": 64, "optimizer": "prodigy", "seed": 7}.items():
        refused(run(resume_from_checkpoint="latest", **{flag: value}), name=flag)
    shutil.copy(images / "p1.png", images / "p0.png")
    refused(run(resume_from_checkpoint="latest"), name="images")


def refused(done: Done, *, name: str) -> None:
    """The message names exactly what differs, and nothing else does."""
    assert done.code == 2 and "Traceback" not in done.output, done.output
    named = re.findall(r"([\w.]+): checkpoint |the (images), their captions", done.output)
    assert ["".join(parts) for parts in named] == [name], done.output


@pytest.fixture
def no_second_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Every UNet that is loaded leaves a line in the file; a pipeline that is loaded fails."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    loaded, load = tmp_path / "loaded", UNet2DConditionModel.from_pretrained

    def counted(*args: object, **kwargs: object):
        with loaded.open("a") as file:
            file.write("unet\n")
        return load(*args, **kwargs)

    def refused(*args: object, **kwargs: object):
        raise AssertionError("a second pipeline was loaded")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", counted)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refused)
    yield loaded


@pytest.mark.trains
def test_a_run_loads_the_model_once_and_previews_and_ends_with_it(tiny_sdxl, data, no_second_model, tmp_path):
    argv = command(tiny_sdxl, data, tmp_path / "out", max_train_steps=1, validation_prompt="a TOK cat",
                   num_validation_images=1)
    done = forked(argv, log=tmp_path / "log")
    assert done.code == 0, done.output
    assert no_second_model.read_text() == "unet\n"
    samples = {path.name for path in (tmp_path / "out" / "samples").iterdir()}
    assert {"step_000000.png", "step_000001.png"} <= samples, "drawn before the first step and after the last"


@pytest.mark.trains
def test_flags_without_effect_are_said_in_the_log(tiny_sdxl, data, tmp_path):
    argv = command(tiny_sdxl, data, tmp_path / "out", max_train_steps=1, class_prompt="a toy",
                   enable_xformers_memory_efficient_attention=True)
    done = forked(argv, log=tmp_path / "log")
    assert done.code == 0, done.output
    for notice in ("--class_prompt has no effect", "--enable_xformers_memory_efficient_attention"):
        assert notice in done.output, done.output


@pytest.mark.trains
def test_a_second_training_in_one_process_is_as_one_in_its_own(tiny_sdxl, tmp_path):
    """Another precision, TF32 off again, and a package that the first one had no use for."""
    images = make_images(tmp_path / "data", n=4)
    first = command(tiny_sdxl, images, tmp_path / "first", mixed_precision="bf16", allow_tf32=True)
    asked = dict(use_8bit_adam=True, rank=64, report_to="tensorboard")
    both = [*first, THEN, *command(tiny_sdxl, images, tmp_path / "second", **asked)]
    done = forked(both, trainer="tests.support.twice", log=tmp_path / "log")
    assert done.code == 0, done.output
    alone = forked(command(tiny_sdxl, images, tmp_path / "alone", **asked), log=tmp_path / "log2")
    assert alone.code == 0, alone.output
    name = "pytorch_lora_weights.safetensors"
    same_tensors(tmp_path / "second" / name, tmp_path / "alone" / name)
