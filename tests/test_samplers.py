"""Samplers by name: each spelling, on the model's own schedule, for any number of steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainkit.diffusion.samplers import sampler_on
from trainkit.options.samplers import SAMPLERS, sampler_named, sampler_problems, webui_name

SD = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "num_train_timesteps": 1000, "prediction_type": "epsilon", "skip_prk_steps": True, "steps_offset": 1,
      "set_alpha_to_one": False, "clip_sample": False, "variance_type": "learned_range", "solver_order": 3,
      "use_karras_sigmas": True, "trained_betas": None}
ZERO_SNR = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
       "prediction_type": "epsilon", "sigma_schedule": "karras"}


@pytest.mark.parametrize(("spelling", "name"), [
    ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("dpm++ 2m", "dpmpp_2m"), ("Euler a", "euler_a"), ("EULER", "euler"),
    ("DPM++ SDE", "dpmpp_sde"), ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"), ("UniPC", "unipc"),
    ("k_euler_a", "euler_a"),
    ("edm_dpmpp_2m", "edm_dpmpp_2m"), ("EDMEulerScheduler", "edm_euler"), ("EulerDiscreteScheduler", "euler"),
    ("LCM", "lcm"), ("dpm++-2m-karras", "dpmpp_2m_karras"), ("dpmsolver++", "dpmpp_2m")])
def test_a_sampler_is_found_by_what_programs_call_it(spelling, name):
    assert sampler_named(spelling) == name
    with pytest.raises(ValueError, match="known: euler, euler_a"):
        sampler_named(f"{spelling} 3000")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_on_the_models_schedule(name):
    """Its betas, what it predicts and its end at SNR 0 stay; nothing else of the model's own sampler does."""
    sampler = SAMPLERS[name]
    config = EDM if sampler.of_edm else {**SD, "prediction_type": "v_prediction"}
    made = sampler_on(config, name)
    assert type(made).__name__ == sampler.scheduler and webui_name(type(made).__name__, made.config) == sampler.label
    assert made.config.prediction_type == config["prediction_type"]
    assert bool(made.config.get("use_karras_sigmas")) == sampler.karras
    if not sampler.of_edm:
        assert made.config.beta_end == 0.012 and made.config.beta_schedule == "scaled_linear"
        assert made.config.get("solver_order", 2) == 2 or name == "unipc"
    if sampler.knows_zero_snr and not sampler.of_edm:
        ends = sampler_on(ZERO_SNR, name)
        assert ends.config.timestep_spacing == "trailing" and ends.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("steps", [2, 7, 8])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_finds_the_image_of_a_network_that_knows_it(name, steps):
    """A network that predicts the noise of one image exactly leads each sampler to that image."""
    sampler, image = SAMPLERS[name], torch.full((1, 4, 2, 2), 0.7)
    made = sampler_on(EDM if sampler.of_edm else {**SD, "prediction_type": "epsilon"}, name)
    made.set_timesteps(steps)
    x = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * made.init_noise_sigma
    generator = torch.Generator().manual_seed(1)
    for index, t in enumerate(made.timesteps):
        made.scale_model_input(x, t)
        noise = noise_in(x, image, made, index, t, edm=sampler.of_edm)
        more = {} if sampler.scheduler in ("UniPCMultistepScheduler",) else {"generator": generator}
        x = made.step(noise, t, x, **more).prev_sample
    assert (x - image).abs().max() < 0.15, "the last step ends at σ 0, or at the first timestep's 0.03"


def noise_in(x: torch.Tensor, image: torch.Tensor, made: object, index: int, t: torch.Tensor, *, edm: bool
             ) -> torch.Tensor:
    """ε of x as the scheduler has it; for EDM, what the network must say so that the preconditioned one gives it."""
    if edm:
        sigma, data = made.sigmas[index], made.config.sigma_data
        skip = data**2 / (sigma**2 + data**2)
        return (image - skip * x) / (sigma * data / (sigma**2 + data**2) ** 0.5)
    alpha = made.alphas_cumprod[int(t.round())]
    if made.init_noise_sigma != 1:  # Euler's x is image + σ ε
        return (x - image) / made.sigmas[index]
    return (x - alpha**0.5 * image) / (1 - alpha) ** 0.5


def test_samplers_that_do_not_fit_are_told():
    def told(name: str, config: dict, steps: int = 20) -> str:
        return " ".join(f"{p.what} {p.why} {p.fix}" for p in sampler_problems(name, config, steps, "--scheduler"))

    assert "no EDM model" in told("edm_euler", SD) and "--scheduler euler or" in told("edm_euler", SD)
    assert "is an EDM model" in told("euler", EDM) and "edm_euler or edm_dpmpp_2m" in told("euler", EDM)
    assert "SNR 0" in told("dpmpp_sde", ZERO_SNR) and "50 at most" in told("lcm", SD, 51)
    assert not any(told(name, SD) for name, one in SAMPLERS.items() if not one.of_edm) and not told("edm_euler", EDM)
    assert not told("tcd", SD, 50) and not told("euler_a", ZERO_SNR)


@pytest.mark.trains
def test_the_images_of_a_sampler_are_the_stock_pipelines(tiny_sd: Path, tmp_path: Path):
    import numpy as np
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from PIL import Image

    from trainkit.tools import generate

    named = "--scheduler=DPM++ 2M Karras"
    generate.main([f"--base={tiny_sd}", "--prompt=a dog", f"--out={tmp_path}", "--steps=4", named])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    stock = pipe("a dog", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    ours = Image.open(tmp_path / "p01_s0.png")
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(stock)).max() <= 1
    assert "Steps: 4, Sampler: DPM++ 2M Karras, " in ours.info["parameters"]
