"""Strengths of a LoRA by block of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.loras import random_lora
from trainkit.errors import UserError
from trainkit.families import sgm
from trainkit.inference import fused_loras, load_pipeline, names_of
from trainkit.lora_file import LoraFile
from trainkit.tools import generate


@pytest.mark.trains
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_weights_are_the_sum_of_the_updates_times_their_blocks_factors(model, request, tmp_path):
    """Against the blocks' own names: a layer in a block of the list has its factor, and every other one 1."""
    base = request.getfixturevalue(model)
    a, b = (random_lora(base, tmp_path / f"{name}.safetensors", name) for name in "ab")
    pipe = load_pipeline(str(base), "float32")
    numbers = sgm.numbered(pipe.unet.config)
    used = [name for name in dict.fromkeys(numbers.values())
            if any(path.startswith(f"{block}.") for block, at in numbers.items() if at == name
                   for _, path in LoraFile.read(a, names=names_of(pipe)).layers)]
    first, last = used[0], used[-1]
    before = {name: weight.clone() for name, weight in pipe.unet.named_parameters()}
    with fused_loras(pipe, [(a, 0.5), (b, 2.0)], [f"{first}=0, {last}=-0.25 attn2=0.1", ""]):
        after = {name: weight.clone() for name, weight in pipe.unet.named_parameters()}
    deltas = {}
    for file in (a, b):
        for (_, path), layer in LoraFile.read(file, names=names_of(pipe)).layers.items():
            W = before[f"{path}.weight"]
            deltas[file, path] = layer.delta(W.flatten(1)).view_as(W)
    changed = 0
    for path in {path for _, path in deltas}:
        at = next((numbers[block] for block in numbers if path.startswith(f"{block}.")), "")
        factor = {first: 0.0, last: -0.25}.get(at, 0.1 if ".attn2." in path else 1.0)
        wanted = before[f"{path}.weight"] + 0.5 * factor * deltas[a, path] + 2 * deltas[b, path]
        torch.testing.assert_close(after[f"{path}.weight"], wanted)
        changed += factor != 1
    assert changed > 4 and first != last
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.named_parameters())


@pytest.mark.trains
def test_images_by_block(tiny_sd, tmp_path):
    """0 everywhere is the base, 1 nowhere changes anything; the PNG file says which."""
    lora = random_lora(tiny_sd, tmp_path / "a.safetensors")

    def drawn(name: str, *flags: str) -> np.ndarray:
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path / name}", "--steps=1", "--prompt=a dog", *flags])
        return np.asarray(Image.open(tmp_path / name / "p01_s0.png"))

    base, full, none, some = (drawn(f"{i}", *flags) for i, flags in enumerate((
        (), (f"--lora={lora}",), (f"--lora={lora}", "--lora_block_weights=unet=0 .*=0"),
        (f"--lora={lora}", "--lora_block_weights=attn1=0"))))
    assert np.array_equal(base, none) and not np.array_equal(full, some) and not np.array_equal(base, some)
    assert ":1(attn1=0)" in Image.open(tmp_path / "3" / "p01_s0.png").info["parameters"]


@pytest.mark.parametrize(("flags", "said"), [
    (["IN42=0.5"], "'IN42'"), (["attn1"], "cannot read 'attn1'"), (["MID=x"], "cannot be 'x'"), (["MID=nan"], "'nan'"),
    (["text_encoder=0"], "'text_encoder'"), (["(=1"], "no regular expression"), ([" ,"], "names no layer"),
    (["attn1=1", "attn1=1"], "2 lists of block weights for 1 LoRA")])
def test_blocks_that_are_not_there_are_refused_by_name(flags, said, tiny_sd, tmp_path):
    lora = random_lora(tiny_sd, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path}/out", "--prompt=a", f"--lora={lora}",
                       *(f"--lora_block_weights={text}" for text in flags)])
    problem, = caught.value.problems
    assert said in problem.what and "--lora_block_weights" in problem.where and not Path(tmp_path / "out").exists()
    with pytest.raises(UserError, match="1 list of block weights for 0 LoRAs"):
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path}/out", "--prompt=a", "--lora_block_weights=MID=1"])
    if "IN42" in said:
        assert "its blocks are IN01, " in problem.fix
