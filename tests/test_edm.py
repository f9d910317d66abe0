"""EDM: an EDM checkpoint is preconditioned as Diffusers' schedulers do, learns, and is drawn with its own scheduler;
`--compat diffusers` is the algebra of the Diffusers script, worked out here anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.made_up_pass import KEYS, batch_of
from tests.support.schedules import alphas, latents, schedules
from tests.support.tiny_models import build_tiny_edm, build_tiny_sdxl, latents_of
from tests.support.trainers import command, forked, make_images, metrics
from trainkit import preview, rng
from trainkit.condition import Condition
from trainkit.diffusion import PREDICTIONS, EDMSchedule, NoiseSchedule, ScheduleChange, make_levels, make_noise
from trainkit.families import sdxl
from trainkit.losses.objective import make_objective, per_sample
from trainkit.losses.passes import Passes, always
from trainkit.options import ModelOptions, ObjectiveOptions, ValidationOptions
from trainkit.preview import Previews
from trainkit.training.step import TrainStep

SCHEDULERS = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
T = torch.tensor([0, 20, 300, 650, 999])


def load(folder: Path, **flags: object) -> sdxl.SDXL:
    base = ModelOptions(pretrained_model_name_or_path=str(folder))
    return sdxl.load(base, device=torch.device("cpu"), weight_dtype=torch.float32, **flags)


@pytest.fixture(scope="module")
def tiny_edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_edm(tmp_path_factory.mktemp("tiny") / "edm", widths=(32, 32, 32))


def scheduler_of(name: str, **config: object):
    import diffusers

    return getattr(diffusers, name)(**config)


# The same numbers as Diffusers' schedulers ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_preconditioning_is_exactly_that_of_diffusers(name, prediction_type, sigma_data):
    theirs = scheduler_of(name, prediction_type=prediction_type, sigma_data=sigma_data)
    schedule = EDMSchedule(prediction_type=prediction_type, sigma_data=sigma_data)
    pred, (z, out) = schedule.prediction, latents(1)
    for sigma in theirs.sigmas[:-1:50]:
        level = schedule.nearest(sigma[None].double())
        assert torch.equal(pred.model_input(z, level), theirs.precondition_inputs(z, sigma))
        assert torch.equal(pred.to_x0(out, z, level), theirs.precondition_outputs(z, out, sigma))
        assert torch.equal(level.cond, theirs.precondition_noise(sigma[None]))


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_under_compat_the_first_1000_of_the_1001_grid_points_are_drawn_uniformly(spacing):
    from diffusers import EDMEulerScheduler

    grid = EDMEulerScheduler(sigma_schedule=spacing).sigmas[:1000]
    u = (torch.arange(2000) + 0.5) / 2000
    drawn = make_levels(ObjectiveOptions(), EDMSchedule(grid=spacing), "diffusers")(u).s
    torch.testing.assert_close(drawn, grid.repeat_interleave(2), rtol=1e-5, atol=0)


# `--compat diffusers` is the Diffusers script -------------------------------------------------------------------------


def upstream_edm_loss(x0: Tensor, n: Tensor, out: Tensor, alphas_cumprod: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What the script computes under --do_edm_style_training on an ε or v model: (UNet input, losses [B])."""
    sigma = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).view(-1, 1, 1, 1)
    noisy = x0 + sigma * n
    seen = noisy / (sigma**2 + 1) ** 0.5
    denoised = noisy - sigma * out
    if name == "v_prediction":
        denoised = out * (-sigma / (sigma**2 + 1) ** 0.5) + noisy / (sigma**2 + 1)
    return seen, (sigma**-2 * (denoised - x0) ** 2).flatten(1).mean(1)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_edm_flag_under_compat_is_upstreams_algebra_and_that_is_plain_training(name):
    schedule, (x0, n), out = NoiseSchedule(alphas().double(), name), latents(5), latents(5, seed=1)[0]
    o, level = ObjectiveOptions(do_edm_style_training=True), schedule.at(T)
    objective = make_objective(o, schedule, "diffusers")
    seen, wanted = upstream_edm_loss(x0.double(), n.double(), out.double(), alphas().double()[T], name)
    z = objective.pred.add_noise(x0, n, level)
    torch.testing.assert_close(objective.pred.model_input(z, level), seen.float(), rtol=1e-5, atol=1e-5)
    found = objective(out, x0=x0, z=z, n=n, level=level, batch=batch_of(KEYS[:5]))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-7)
    plain = per_sample((out - objective.pred.target(x0, n, level)) ** 2)
    factor = torch.ones(5) if name == "epsilon" else alphas()[T]
    torch.testing.assert_close(found, plain * factor, rtol=1e-4, atol=1e-7)
    u = torch.rand(200, generator=torch.Generator().manual_seed(0))
    uniform = make_levels(ObjectiveOptions(), schedule)(u).cond
    assert torch.equal(make_levels(o, schedule, "diffusers")(u).cond, uniform)
    assert not torch.equal(make_levels(o, schedule)(u).cond, uniform)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_an_edm_model_under_compat_has_the_unweighted_error_on_x0(prediction_type):
    theirs = scheduler_of("EDMEulerScheduler", prediction_type=prediction_type)
    schedule = EDMSchedule(prediction_type=prediction_type)
    sigma, (x0, n), out = torch.tensor([0.3, 1.0, 40.0]), latents(3), latents(3, seed=1)[0]
    objective = make_objective(ObjectiveOptions(), schedule, "diffusers")
    z = x0 + sigma.view(-1, 1, 1, 1) * n
    wanted = ((theirs.precondition_outputs(z, out, sigma.view(-1, 1, 1, 1)) - x0) ** 2).flatten(1).mean(1)
    level = schedule.nearest(sigma.double())
    is_class = torch.tensor([False, True, False])  # its prior loss is weighed alike
    found = objective(out, x0=x0, z=z, n=n, level=level, batch=batch_of(KEYS[:3], is_class=is_class))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("name", schedules())
def test_d5_instances_and_class_images_of_one_batch_keep_their_own_edm_weights(name, compat):
    schedule = schedules()[name]
    o = ObjectiveOptions(do_edm_style_training=True)
    level = make_levels(o, schedule, compat)(torch.tensor([0.2, 0.9, 0.5, 0.7]))
    (x0, n), out = latents(4), latents(4, seed=1)[0]
    objective, loss_weight = make_objective(o, schedule, compat), torch.tensor([1.0, 1.0, 0.3, 0.3])
    given = dict(x0=x0, z=objective.pred.add_noise(x0, n, level), n=n)
    batch = batch_of(KEYS[:4], loss_weight=loss_weight, is_class=loss_weight < 1)
    together = objective(out, level=level, batch=batch, **given)
    for k in range(4):
        part = slice(k, k + 1)
        one = type(level)(*(v[part] for v in (level.a, level.s, level.cond, level.time)), level.sigma_data)
        batch = batch_of(KEYS[part], loss_weight=loss_weight[part], is_class=loss_weight[part] < 1)
        alone = objective(out[part], level=one, batch=batch, **{name: v[part] for name, v in given.items()})
        torch.testing.assert_close(alone, together[k : k + 1])
    assert len(set(together.tolist())) == 4


# The whole of an EDM checkpoint ---------------------------------------------------------------------------------------


def test_an_edm_model_is_recognised_without_a_flag_and_said_once(tiny_edm, caplog):
    assert sdxl.problems(str(tiny_edm), resolution=32) == []
    with caplog.at_level(logging.INFO, logger="trainkit"):
        family = load(tiny_edm)
    assert family.schedule == EDMSchedule()
    assert caplog.text.count("EDMDPMSolverMultistepScheduler") == 1
    sample = torch.randn(2, 4, 8, 8)
    x0 = latents_of(family, sample)
    mean = torch.tensor(family.vae.config.latents_mean).view(1, 4, 1, 1)
    std = torch.tensor(family.vae.config.latents_std).view(1, 4, 1, 1)
    torch.testing.assert_close(x0, 0.5 * (sample - mean) / std)  # of σ_data, where the VAE's statistics hold


def edm_losses(family: sdxl.SDXL, x0: Tensor, keys: list[rng.Key], **flags: object) -> Tensor:
    """One training forward as the trainer makes it -> losses [B]."""
    o = ObjectiveOptions(**flags)
    objective = make_objective(o, family.schedule)
    step = TrainStep(family, told_nothing, make_noise(o), Passes(always(objective)), nullcontext)
    return step.losses(objective, batch_of(keys, time_ids=torch.full((len(x0), 6), 32.0)), x0)


def told_nothing(prompts: Sequence[str], step: int | None = None) -> Condition:
    return Condition(embeds=torch.zeros(len(prompts), 77, 56), pooled=torch.zeros(len(prompts), 32))


@pytest.mark.trains
@pytest.mark.parametrize("flags", [{}, {"snr_gamma": 5.0}, {"loss_weighting": "debiased"}], ids=str)
def test_an_edm_model_learns_under_every_weight(tiny_edm, flags):
    family = load(tiny_edm)
    family.denoiser.requires_grad_(True)
    image = 0.5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # std σ_data
    x0 = image.expand(8, -1, -1, -1)
    probe = [(0, "probe", k) for k in range(8)]
    optimizer = torch.optim.AdamW(family.denoiser.parameters(), lr=4e-3)
    with torch.no_grad():
        before = edm_losses(family, x0, probe, **flags).mean().item()
    for step in range(40):
        edm_losses(family, x0, [(1, step, k) for k in range(8)], **flags).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = edm_losses(family, x0, probe, **flags).mean().item()
    assert np.isfinite(before) and after < 0.65 * before


def previews(family: sdxl.SDXL, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Previews:
    monkeypatch.setattr(preview, "STEPS", 4)
    o = ValidationOptions(validation_prompt="a red dog", num_validation_images=1)
    return Previews(family, o, family.encode_prompts, folder, seed=1, resolution=32)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_previews_of_an_edm_model_come_from_its_own_scheduler(name, prediction_type, tmp_path, monkeypatch):
    folder = build_tiny_edm(tmp_path / "edm", prediction_type=prediction_type, widths=(32, 32, 32))
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text("utf-8"))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"_class_name": name}), "utf-8")
    family = load(folder)
    pipe = family.pipeline(preview.sampler(family))
    assert type(pipe.scheduler).__name__ == name and pipe.scheduler.config.prediction_type == prediction_type
    drawn = previews(family, tmp_path, monkeypatch)
    with torch.no_grad(), preview.evaluating(family.denoiser):
        latent = drawn._latents(pipe, drawn.shots[0], lambda: False)
    assert latent.isfinite().all() and 0.05 < latent.std() < 20
    assert np.asarray(next(iter(drawn.generate(1).values()))).std() > 0


def test_the_stock_pipeline_draws_what_the_preview_draws(tiny_edm, tmp_path, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    family = load(tiny_edm)
    drawn = previews(family, tmp_path, monkeypatch)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_edm)
    noise = torch.Generator().manual_seed(1)
    wanted = stock("a red dog", generator=noise, num_inference_steps=4, guidance_scale=family.guidance_scale, height=32,
                   width=32).images[0]
    found = next(iter(drawn.generate(1).values()))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def test_a_rescaled_schedule_is_trained_and_drawn_alike(tmp_path, monkeypatch):
    folder = build_tiny_sdxl(tmp_path / "e", widths=(32, 32, 32))
    family = load(folder, schedule=ScheduleChange("v_prediction", rescale_betas_zero_snr=True))
    assert family.schedule.ends_at_zero_snr
    scheduler = preview.sampler(family)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    torch.testing.assert_close(scheduler.alphas_cumprod, family.schedule.a**2, rtol=1e-4, atol=1e-7)
    assert np.asarray(next(iter(previews(family, tmp_path, monkeypatch).generate(1).values()))).std() > 0


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("flags", [
    {}, {"snr_gamma": 5, "edm_p_mean": -0.8, "multires_noise_iterations": 4, "input_perturbation": 0.1},
    {"loss_weighting": "debiased", "edm_sigmas": "karras", "loss_type": "huber", "compat": "diffusers"}], ids=str)
def test_a_run_on_an_edm_model_ends_well(tiny_edm, tmp_path, flags):
    data = make_images(tmp_path / "data", n=3)
    asked = command(tiny_edm, data, tmp_path / "out", validation_prompt="a TOK", num_validation_images=1, **flags)
    done = forked(asked, log=tmp_path / "log")
    assert done.code == 0, done.output
    losses = [m["loss"] for m in metrics(tmp_path / "out") if "loss" in m]
    assert len(losses) == 2 and all(0 < loss < 1e3 for loss in losses)
