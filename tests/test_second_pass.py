"""Two passes for large images: the second is the stock pipeline for images on the enlarged first one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit.errors import UserError
from trainkit.inference import load_pipeline, sampled_by
from trainkit.options.prompt_lines import parse_line
from trainkit.options.samplers import SAMPLERS
from trainkit.tools import generate
from trainkit.tools.second_pass import SecondPass, enlarged


def drawn(base: Path, out: Path, *flags: str) -> Image.Image:
    generate.main([f"--base={base}", f"--out={out}", "--steps=2", "--prompt=a (red:1.3) dog", *flags])
    return Image.open(out / "p01_s3.png")


@pytest.mark.trains
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_the_second_pass_is_the_stock_pipelines(model, request, tmp_path):
    from diffusers import AutoPipelineForImage2Image

    base = request.getfixturevalue(model)
    first = drawn(base, tmp_path / "first", "--seeds=3", "--no_prompt_weights")
    both = drawn(base, tmp_path / "both", "--seeds=3", "--hires_scale=1.6", "--hires_strength=0.4", "--hires_steps=3",
                 "--no_prompt_weights")
    large = first.convert("RGB").resize((104, 104), Image.Resampling.LANCZOS)
    stock = AutoPipelineForImage2Image.from_pretrained(base, safety_checker=None)(
        "a (red:1.3) dog", image=large, strength=0.4, num_inference_steps=8, guidance_scale=7.5 if model == "tiny_sd"
        else 5.0, generator=torch.Generator().manual_seed(3)).images[0]
    assert both.size == (104, 104)
    assert np.abs(np.asarray(both).astype(int) - np.asarray(stock)).max() <= 1
    said = both.info["parameters"].splitlines()[-1]
    assert "Size: 64x64, Denoising strength: 0.4, Hires upscale: 1.6, Hires steps: 3, Hires upscaler: Lanczos" in said


@pytest.mark.trains
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.of_edm])
def test_every_scheduler_has_a_second_pass(name, tiny_sd):
    """Of exactly as many steps as asked for."""
    pipe, steps = load_pipeline(str(tiny_sd), "float32"), []
    with torch.no_grad():
        text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(
            ["a dog"], pipe.device, 1, True), strict=False))
    image, second = Image.new("RGB", (64, 64), "red"), SecondPass(1.25, 0.3, 4)
    with sampled_by(pipe, name):
        large, = enlarged(pipe, [image], second, text, [0], guidance_scale=2.0,
                          callback_on_step_end=lambda pipe, step, *_: steps.append(step) or {})
    assert large.size == (80, 80) and steps == [0, 1, 2, 3]


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (20, 0.7), (7, 0.29), (25, 0.1), (1, 0.001), (13, 0.99)])
def test_as_many_steps_are_made_as_asked_for(steps, strength):
    assert int(SecondPass(2, strength, steps).all_steps * strength) == steps


def test_sides_are_what_pipelines_take():
    assert SecondPass(1.5, 0.5, 1).size(512, 344) == (768, 512) and SecondPass(1.01, 0.5, 1).size(8, 64) == (8, 64)


def test_a_line_has_its_own_strength():
    line, faults = parse_line("a fox --t 0.3")
    assert line.strength == 0.3 and not faults
    for wrong, said in (("--t 0", "above 0"), ("--t x", "no number"), ("--t nan", "above 0")):
        assert said in parse_line(f"a {wrong}")[1][0]


def test_what_cannot_be_is_refused(tiny_sd, tmp_path):
    (file := tmp_path / "p.txt").write_text("a dog --t 0.5")
    for flags, said in (
            (("--hires_scale=1",), "--hires_scale 1"), (("--hires_scale=nan",), "--hires_scale nan"),
            (("--hires_scale=2", "--hires_strength=0"), "--hires_strength 0"),
            (("--hires_scale=2", "--hires_steps=0"), "--hires_steps 0"), (("--hires_steps=3",), "without"),
            ((f"--prompts_file={file}",), "--t in a line"),
            (("--hires_scale=2", "--scheduler=lcm", "--hires_steps=30"), "60 steps of the scheduler lcm")):
        with pytest.raises(UserError) as caught:
            drawn(tiny_sd, tmp_path / "out", *flags)
        problem, = caught.value.problems
        assert said in problem.what
    assert not (tmp_path / "out").exists()
