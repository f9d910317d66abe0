"""scripts/generate.py: the stock pipeline's own images, with LoRAs, learned words and the features of an image."""

from __future__ import annotations

import argparse
import errno
import hashlib
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import noise_image
from tests.support.loras import random_lora
from tests.support.tiny_models import build_tiny_clip
from trainkit.data.clip_features import load_clip
from trainkit.errors import Problem, UserError
from trainkit.families import sd
from trainkit.inference import (
    Pipeline,
    add_embedding,
    encode_prompts,
    fused_loras,
    load_pipeline,
    lora_and_strength,
    lora_file,
    lora_name,
    model_hash,
)
from trainkit.options.prompt_lines import PromptLine, parse_line, read_prompt_lines
from trainkit.runtime.weight_files import DIFFUSERS_FILE
from trainkit.tools import extract_clip_features, generate
from trainkit.tools.grids import axis, labelled

LONG = "a cat " * 60  # fills the context


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def lora(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose LoRA changes the images a lot."""
    return random_lora(tiny_sd, tmp_path_factory.mktemp("run") / DIFFUSERS_FILE).parent


def drawn(base: Path, out: Path, *more: str, prompts: Sequence[str] = ("a red dog",)) -> list[np.ndarray]:
    """The images of a run of the script, by prompt and then by seed."""
    asked = [f"--prompt={prompt}" for prompt in prompts]
    generate.main([f"--base={base}", f"--out={out}", "--steps=2", *asked, *more])
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("p*.png"))]


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """The same but for a rounding."""
    return bool(np.abs(one - other).max() <= 1)


def refused(base: Path, out: Path, *more: str, **settings: Sequence[str]) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        drawn(base, out, *more, **settings)
    assert not list(out.glob("*.png"))
    return list(caught.value.problems)


@pytest.mark.trains
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_the_images_are_the_stock_pipelines(model, request, tmp_path):
    from diffusers import AutoPipelineForText2Image

    base = request.getfixturevalue(model)
    images = drawn(base, tmp_path / "out", "--seeds=0,7", "--negative_prompt=blue", prompts=("a red dog", "the moon"))
    pipe = AutoPipelineForText2Image.from_pretrained(base)
    prompts, seeds = ["a red dog", "a red dog", "the moon", "the moon"], [0, 7, 0, 7]
    stock = pipe(prompts, negative_prompt=["blue"] * 4, num_inference_steps=2,
                 generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
    assert len(images) == 4 and images[0].shape == (64, 64, 3)
    assert all(near(ours, np.asarray(theirs)) for ours, theirs in zip(images, stock, strict=True))
    assert not near(images[0], images[1]) and not near(images[0], images[2])
    info = Image.open(tmp_path / "out" / "p02_s7.png").info["parameters"].splitlines()
    assert info[:2] == ["the moon", "Negative prompt: blue"] and "Seed: 7, Size: 64x64" in info[2]
    assert f"CFG scale: {5.0 if model == 'tiny_sdxl' else 7.5}" in info[2]
    assert Image.open(tmp_path / "out" / "sheet.png").width > 2 * 192


@pytest.mark.trains
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_of_a_long_prompt_as_much_is_read_as_in_training(model, request, tmp_path):
    """Short prompts beside long ones are what they are alone; of a long one the words behind the cut count too."""
    base, ends = request.getfixturevalue(model), [f"{'a cat ' * 50}{end}" for end in ("red dog", "blue tree moon")]
    cut = drawn(base, tmp_path / "cut", prompts=["a red dog", *ends])
    read = drawn(base, tmp_path / "read", "--max_token_length=150", prompts=["a red dog", *ends])
    assert near(cut[0], read[0]), "whatever the batch is filled up to"
    assert near(cut[1], cut[2]) and not near(read[1], read[2])


@pytest.mark.trains
def test_webuis_read_the_settings_of_an_image_or_none(tiny_sd, lora, tmp_path):
    """By A1111's own pattern for the last line (modules/infotext_utils.py); the hash is that of the tensors alone."""
    (file := tmp_path / "fox, red.safetensors").write_bytes(data := (lora / DIFFUSERS_FILE).read_bytes())
    drawn(tiny_sd, tmp_path / "out", f"--lora={file}:0.5", "--negative_prompt=blurry, bad: all", "--scheduler=Euler a")
    *prompts, line = Image.open(tmp_path / "out" / "p01_s0.png").info["parameters"].split("\n")
    assert prompts == ["a red dog", "Negative prompt: blurry, bad: all"]
    read = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert read == {
        "Steps": "2", "Sampler": "Euler a", "CFG scale": "7.5", "Seed": "0", "Size": "64x64", "Model": tiny_sd.name,
        "Lora hashes": f'"fox, red: {digest[:12]}"', "LoRA": f'"{tmp_path.name}/{file.name}:0.5"'}
    drawn(tiny_sd, tmp_path / "bare", "--no_metadata")
    assert not any(Image.open(path).info for path in (tmp_path / "bare").glob("*.png"))


def test_the_hash_of_a_base_of_one_file_is_that_of_webuis(tmp_path):
    (file := tmp_path / "base.safetensors").write_bytes(b"weights")
    assert model_hash(str(file)) == hashlib.sha256(b"weights").hexdigest()[:10] and model_hash(str(tmp_path)) == ""


# ----------------------------------------------------------------------------------------------------------------------
# A file of prompts, and schedulers


@pytest.mark.trains
def test_lines_of_a_file_are_generated_as_each_says(tiny_sd, tmp_path):
    """Each line alone is what it is with flags; a line without options has those of the command."""
    (file := tmp_path / "prömpts.txt").write_bytes(
        "# 狐\r\n\r\na red dog --n blue --d 7 --w 96 --h 32 --l 2.5 --s 3\r\nthe moon\r\n".encode("utf-8-sig"))
    generate.main([f"--base={tiny_sd}", f"--out={tmp_path}/all", "--steps=2", f"--prompts_file={file}", "--seeds=0,1",
                   "--negative_prompt=green"])
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["p01_s7.png", "p02_s0.png", "p02_s1.png",
                                                                    "sheet.png"]
    flags = ("--seeds=7", "--negative_prompt=blue", "--width=96", "--height=32", "--guidance_scale=2.5", "--steps=3")
    alone, = drawn(tiny_sd, tmp_path / "alone", *flags)
    image = Image.open(tmp_path / "all" / "p01_s7.png")
    assert near(np.asarray(image).astype(int), alone)
    said = image.info["parameters"].splitlines()
    assert said[:2] == ["a red dog", "Negative prompt: blue"]
    assert said[2].startswith("Steps: 3, ") and "CFG scale: 2.5, Seed: 7, Size: 96x32" in said[2]
    plain = Image.open(tmp_path / "all" / "p02_s1.png").info["parameters"].splitlines()
    assert plain[:2] == ["the moon", "Negative prompt: green"] and plain[2].startswith("Steps: 2, ")


def test_a_prompt_line_is_kohyas(tmp_path):
    line, faults = parse_line("a fox -- no, --W 64 --d 0 --n bad, --l -1.5 --SS Euler a")
    assert faults == ["-- is not known"] and line.width == 64
    line, faults = parse_line("a fox--w 64 --n  ugly, -- --d 3 --ss DPM++ 2M Karras --n")
    assert faults == ["-- is not known", "--n stands there twice"]
    assert (line.prompt, line.negative_prompt, line.seed, line.width) == ("a fox--w 64", "ugly,", 3, None)
    assert line.scheduler == "dpmpp_2m_karras"
    assert parse_line("--d 1") == (PromptLine("", seed=1), [])


@pytest.mark.parametrize(("data", "said"), [
    (b"", "no prompts"), ("\ufeff# only\n \n".encode(), "no prompts"), (b"caf\xe9", "it is not UTF-8"),
    (b"ok\na --w 50\n\nb --q 1 --s 0\nc --l nan --d x --ss fast", "line 2: --w 50: it must be a multiple of 8 pixels; "
     "line 4: --q is not known; line 4: --s 0: it must be 1 or more; line 5: --l nan: it must be finite; "
     "line 5: --d x: it is no whole number; line 5: --ss fast: there is no scheduler 'fast'"),
    (b"a\0b", "line 1: it holds a NUL"), (b"a --w", "line 1: --w has no value"),
    (b"a --x 1\n" * 40, "line 10: --x is not known; and 30 more")])
def test_what_is_wrong_in_a_file_of_prompts_is_said_in_one_message(data, said, tmp_path):
    (file := tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_prompt_lines(file, "--prompts_file")
    problem, = caught.value.problems
    assert said in f"{problem.what}: {problem.why}" and str(file) in problem.where and problem.kind == "data"
    for no_file in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompt_lines(no_file, "--prompts_file")


def test_lines_of_utf16_are_read(tmp_path):
    (file := tmp_path / "p.txt").write_text("一只狐狸 --d 3\n", "utf-16")
    assert read_prompt_lines(file, "--prompts_file") == [PromptLine("一只狐狸", seed=3)]


@pytest.mark.trains
def test_each_image_of_a_grid_is_what_its_flags_alone_make(tiny_sd, lora, tmp_path):
    """The base's weights come back between LoRAs, and the columns are the first axis."""
    for step in (1, 2):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        random_lora(tiny_sd, tmp_path / "run" / f"checkpoint-{step}" / DIFFUSERS_FILE, f"{step}")
    run = f"--lora={tmp_path}/run"
    generate.main([f"--base={tiny_sd}", f"--out={tmp_path}/grid", "--steps=2", "--prompt=a dog", run,
                   f"--lora={lora}:0.5", "--grid=step=1,2", "--grid=strength=0,0.5,-1"])
    names = sorted(path.name for path in (tmp_path / "grid").iterdir())
    assert names == [f"r{row:02d}_c{column:02d}_s0.png" for row in (1, 2, 3) for column in (1, 2)] + ["sheet.png"]
    for row, column, strength, step in ((1, 2, 0, 2), (2, 1, 0.5, 1), (3, 2, -1, 2)):
        alone, = drawn(tiny_sd, tmp_path / f"{row}{column}", f"{run}@{step}:{strength}", f"--lora={lora}:0.5",
                       prompts=["a dog"])
        image = Image.open(tmp_path / "grid" / f"r{row:02d}_c{column:02d}_s0.png")
        assert near(np.asarray(image).astype(int), alone)
        assert f"checkpoint-{step}/{DIFFUSERS_FILE}:{strength}" in image.info["parameters"]


def test_the_axes_of_a_grid_are_read_and_labelled():
    lines = [PromptLine("a fox"), PromptLine("")]
    assert labelled(axis("strength=0, .5,1,1"), lines) == [
        ("strength 0", {"strength": 0.0}), ("strength 0.5", {"strength": 0.5}), ("strength 1", {"strength": 1.0})]
    assert labelled(axis("scheduler=Euler a,dpm++ 2m karras"), lines) == [
        ("Euler a", {"scheduler": "euler_a"}), ("DPM++ 2M Karras", {"scheduler": "dpmpp_2m_karras"})]
    assert [label for label, _ in labelled(axis("prompt"), lines)] == ["a fox", "(no prompt)"]
    for text, words in (("size=1", "none of strength"), ("seed", "no values"), ("seed=", "no values"),
                        ("seed=x", "x is no"), ("prompt=a", "with --prompt"), ("strength=nan", "finite"),
                        ("strength=a", "a is no list of numbers"), ("step=x", "x is no whole number"),
                        ("step=0", "1 or more"), ("scheduler=fast", "no scheduler 'fast'")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            axis(text)


def test_what_does_not_go_with_a_grid_is_refused(tiny_sd, lora, tmp_path):
    for flags, words in (
            (("--grid=seed=1", "--grid=seed=2"), "two different axes"),
            (("--grid=strength=1",), "whose strength is open"),
            ((f"--lora={lora}:1", "--grid=strength=1"), "whose strength is open"),
            (("--grid=seed=1", "--grid=scheduler=euler", "--prompt=b"), "2 prompts in a grid"),
            (("--grid=scheduler=euler", "--seeds=1,2"), "2 seeds in a grid"), ((f"--grid=seed={2**64}",), "64 bits"),
            (("--grid=step=1",), "without the folder of a run"), ((f"--lora={lora}", "--grid=step=9"), "checkpoint-9"),
            (("--grid=scheduler=edm_euler",), "does not fit")):
        problem, = refused(tiny_sd, tmp_path / "out", *flags)
        assert words in f"{problem.what}: {problem.why}"


@pytest.mark.trains
def test_the_worked_examples_of_the_help_run(tiny_sd, lora, monkeypatch, tmp_path):
    """On a small model, in few steps."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(lora, tmp_path / "runs" / "mine")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tiny-sd-icons").symlink_to(tiny_sd)
    monkeypatch.chdir(tmp_path)
    text = str(generate.__doc__).replace("\\\n", " ")
    first, grid, _ = re.findall(r"^    python scripts/generate\.py (.+)$", text, re.MULTILINE)
    for command in (first, grid):
        generate.main([*shlex.split(command), "--steps=1"])
    assert len([*(tmp_path / "runs" / "mine" / "images").glob("p01_s*.png")]) == 3
    large = Image.open(tmp_path / "runs" / "mine" / "grid" / "r01_c03_s0.png")
    assert large.size == (128, 128) and "a (red:1.3) fox" in large.info["parameters"]


def test_sizes_are_asked_for_or_the_models(tiny_sd, tmp_path):
    assert drawn(tiny_sd, tmp_path, "--width=96", "--height=32")[0].shape == (32, 96, 3)
    assert drawn(tiny_sd, tmp_path / "wide", "--width=96")[0].shape == (64, 96, 3), "the other side is the model's"


@pytest.mark.trains
def test_loras_are_drawn_at_their_strengths(tiny_sd, lora, tmp_path):
    base, full, none, half, halves = (drawn(tiny_sd, tmp_path / f"{i}", *flags)[0] for i, flags in enumerate((
        (), (f"--lora={lora}",), (f"--lora={lora}", "--strength=0"),
        (f"--lora={lora / DIFFUSERS_FILE}", "--strength=0.5"),
        (f"--lora={lora}", f"--lora={lora}", "--strength=0.25", "--strength=0.25"))))
    assert near(base, none) and not near(base, half) and not near(half, full)
    assert np.abs(half - halves).max() < np.abs(half - full).max() / 10, "two of them add up, but for roundings"
    settings = Image.open(tmp_path / "3" / "p01_s0.png").info["parameters"]
    assert f"{lora.name}/{DIFFUSERS_FILE}:0.5" in settings and str(lora.parent) not in settings


@pytest.mark.trains
@pytest.mark.parametrize("use_dora", [False, True])
def test_two_loras_are_the_sum_of_their_updates(tiny_sd, use_dora, tmp_path):
    """In one forward pass: as the weights W + Σ s ΔW, in both orders, and as Diffusers with both adapters."""
    a = random_lora(tiny_sd, tmp_path / "a.safetensors", use_dora=use_dora)
    b = random_lora(tiny_sd, tmp_path / "b.safetensors", "b")
    strengths = {"a": 1.0, "b": -0.3}  # a DoRA is exact at 1
    x, text = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4, 24)

    def seen(pipe: Pipeline) -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(x, 500, text).sample

    pipe, outputs = load_pipeline(str(tiny_sd), "float32"), []
    for files in ((a, b), (b, a), (a,), ()):
        with fused_loras(pipe, [(file, strengths[file.stem]) for file in files]):
            outputs.append(seen(pipe))
    for file in (a, b):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
    pipe.set_adapters([*strengths], [*strengths.values()])
    for other in (outputs[1], seen(pipe)):
        assert (outputs[0] - other).abs().max() < 1e-3  # fp32, of values up to 3
    assert all((one - other).abs().max() > 0.1 for one, other in pairwise(outputs[1:]))


def test_a_lora_names_its_strength(tmp_path):
    """FILE:0.8, but a colon of a name that is there, or of a drive, is no strength."""
    (there := tmp_path / "v:1").write_bytes(b"")
    (run := tmp_path / "狐:2").mkdir()
    for text, file, strength in (
            (f"{tmp_path}/a.safetensors:0.8", tmp_path / "a.safetensors", 0.8), (f"{there}", there, None),
            (f"{there}:-.5", there, -0.5), (f"{run}:0", run / DIFFUSERS_FILE, 0.0),
            (f"{run}", run / DIFFUSERS_FILE, None),
            ("C:\\loras\\a.safetensors", Path("C:\\loras\\a.safetensors"), None),
            ("C:\\a.safetensors:1.", Path("C:\\a.safetensors"), 1.0), ("a:nan", Path("a:nan"), None),
            ("runs/dog@500:2", Path("runs/dog/checkpoint-500") / DIFFUSERS_FILE, 2.0)):
        path, named = lora_and_strength(text)
        assert (lora_file(path), named) == (file, strength), text


@pytest.mark.trains
def test_strengths_behind_loras_and_beside_them(tiny_sd, lora, tmp_path):
    """--strength is for the LoRAs that name none."""
    beside, behind, mixed = (drawn(tiny_sd, tmp_path / f"{i}", *flags)[0] for i, flags in enumerate((
        (f"--lora={lora}", f"--lora={lora}", "--strength=0.5", "--strength=-0.25"),
        (f"--lora={lora}:0.5", f"--lora={lora}:-0.25"), (f"--lora={lora}:-0.25", f"--lora={lora}", "--strength=0.5"))))
    assert near(beside, behind) and near(beside, mixed)
    problem, = refused(tiny_sd, tmp_path / "out", f"--lora={lora}:1", "--strength=1")
    assert "0 LoRAs without one" in problem.what


def test_a_lora_of_another_model_is_refused(tiny_sd, tiny_sdxl, tmp_path, capfd):
    other = random_lora(tiny_sdxl, tmp_path / "other.safetensors")
    problem, = refused(tiny_sd, tmp_path / "out", f"--lora={other}")
    assert "does not fit" in problem.what and "size mismatch" not in capfd.readouterr().err


def test_learned_words_are_drawn(tiny_sdxl, tiny_sd, tmp_path):
    from safetensors.torch import save_file

    rows, header = {"clip_l": torch.ones(2, 24), "clip_g": torch.ones(2, 32)}, {"tokens": '{"TOK": ["<s0>", "<s1>"]}'}
    save_file(rows, file := tmp_path / "run_emb.safetensors", header)
    plain, taught = (drawn(tiny_sdxl, tmp_path / f"{len(flags)}", *flags, prompts=["a TOK dog"])[0]
                     for flags in ((), (f"--embeddings={file}",)))
    assert not near(plain, taught)
    assert Image.open(tmp_path / "1" / "p01_s0.png").info["parameters"].startswith("a TOK dog\n")
    problem, = refused(tiny_sd, tmp_path / "out", f"--embeddings={file}")
    assert "--embeddings" in problem.where and "SDXL" in problem.why


@pytest.mark.trains
def test_an_embedding_of_another_program_counts_in_both_prompts(tiny_sd, lora, tmp_path):
    """Its word is the file's name; the token is the row, and the word elsewhere stays a word."""
    from safetensors.torch import save_file

    save_file({"emb_params": torch.ones(2, 24)}, file := tmp_path / "bad-hands.v1.safetensors")
    pipe = load_pipeline(str(tiny_sd), "float32")
    renamed = add_embedding(pipe, file)
    assert renamed("bad-hands.v1, bad-hands.v12") == "<bad-hands.v1-0><bad-hands.v1-1>, bad-hands.v12"
    ids = pipe.tokenizer(renamed("bad-hands.v1")).input_ids[1:3]
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], torch.ones(2, 24))
    flags = (f"--embedding={file}", "--negative_prompt=bad-hands.v1")
    plain, taught = (drawn(tiny_sd, tmp_path / f"{i}", *more)[0] for i, more in enumerate((flags[1:], flags)))
    assert not near(plain, taught)
    said = Image.open(tmp_path / "1" / "p01_s0.png").info["parameters"]
    assert "\nNegative prompt: bad-hands.v1\n" in said
    save_file({"emb_params": torch.ones(2, 32)}, other := tmp_path / "other.safetensors")
    (torn := tmp_path / "torn.pt").write_bytes(b"PK")
    (cut := tmp_path / "cut.safetensors").write_bytes(other.read_bytes()[:-4])
    for wrong, words in ((other, "32 wide"), (lora / DIFFUSERS_FILE, "it is a LoRA"), (torn, "torn.pt"),
                         (cut, "the embedding cut.safetensors cannot be read")):
        problem, = refused(tiny_sd, tmp_path / "out", f"--embedding={wrong}")
        assert words in f"{problem.what} {problem.why} {problem.where}"


@pytest.mark.trains
def test_clip_skip_is_that_of_the_training(tiny_sd):
    pipe, given = load_pipeline(str(tiny_sd), "float32"), {}
    with torch.no_grad():
        for skip in (None, 0, 1):
            given[skip] = encode_prompts(pipe, ["a dog"], None, clip_skip=skip)["prompt_embeds"]
        trained = sd.encode([pipe.tokenizer], pipe.text_encoder, ["a dog"], 1)
    torch.testing.assert_close(given[1], trained)
    torch.testing.assert_close(given[0], given[None])
    assert not torch.allclose(given[1], given[0])


# ----------------------------------------------------------------------------------------------------------------------
# The guidance token


@pytest.fixture
def shown(tmp_path: Path, clip: Path) -> list[Path]:
    return [noise_image(tmp_path / "shown" / name, seed) for seed, name in enumerate(("狐.png", "b.png", "c.png"))]


def test_the_token_changes_the_image_in_one_branch_or_both(tiny_sd, clip, shown, tmp_path):
    strong = (f"--clip={clip}", "--guidance_token_scale=10")  # the random model's features are small
    flags = (*strong, f"--guidance_image={shown[0]}")
    images = [drawn(tiny_sd, tmp_path / f"{i}", *more)[0] for i, more in enumerate((
        (), flags, (*flags, "--guidance_both_branches"), (*strong, f"--guidance_image={shown[1]}")))]
    assert not any(near(a, b) for i, a in enumerate(images) for b in images[:i])
    settings = Image.open(tmp_path / "1" / "p01_s0.png").info["parameters"]
    assert "Guidance image: 狐.png" in settings and str(tmp_path) not in settings


@pytest.mark.trains
def test_each_image_is_drawn_with_its_own_features(tiny_sd, clip, shown, tmp_path):
    prompts = ("a red dog", "a cat", "the moon")
    images = [f"--guidance_image={path}" for path in shown]
    together = drawn(tiny_sd, tmp_path / "all", f"--clip={clip}", *images, "--seeds=0,1", "--batch_size=4",
                     "--guidance_token_scale=10", prompts=prompts)
    for i, prompt in enumerate(prompts):
        alone = drawn(tiny_sd, tmp_path / f"{i}", f"--clip={clip}", images[i], "--seeds=0,1", "--batch_size=1",
                      "--guidance_token_scale=10", prompts=[prompt])
        assert all(near(a, b) for a, b in zip(together[2 * i : 2 * i + 2], alone, strict=True))


def test_only_the_positive_branch_is_fed_and_only_at_the_last_position(tiny_sd, clip, shown, monkeypatch, tmp_path):
    from diffusers import StableDiffusionPipeline

    seen: list[dict] = []
    call = StableDiffusionPipeline.__call__

    def noted(self, **given):
        seen.append(given)
        return call(self, **given)

    noted.__signature__ = inspect.signature(call)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", noted)
    flags = (f"--clip={clip}", f"--guidance_image={shown[0]}", "--guidance_token_scale=2")
    for i, more in enumerate(((), flags, (*flags, "--guidance_both_branches"))):
        drawn(tiny_sd, tmp_path / f"{i}", *more)
    plain, one, both = seen
    tower = load_clip(str(clip))
    features = 2 * tower(tower.pixels(Image.open(shown[0]))[None])[0]
    for name, given in (("prompt_embeds", one), ("prompt_embeds", both), ("negative_prompt_embeds", both)):
        torch.testing.assert_close(given[name][0, -1], features)
        assert torch.equal(given[name][:, :-1], plain[name][:, :-1])
    assert torch.equal(one["negative_prompt_embeds"], plain["negative_prompt_embeds"])


def test_a_full_prompt_is_drawn_without_the_image(tiny_sd, clip, shown, tmp_path, caplog):
    flags = (f"--clip={clip}", f"--guidance_image={shown[0]}")
    plain, fed = (drawn(tiny_sd, tmp_path / f"{len(more)}", *more, prompts=[LONG])[0] for more in ((), flags))
    assert near(plain, fed) and len(caplog.records) == 1 and "a cat a cat" in caplog.text


def test_extracted_features_serve_as_well(tiny_sd, clip, shown, tmp_path):
    file = tmp_path / "f.safetensors"
    extract_clip_features.main([f"--images={shown[0].parent}", f"--clip={clip}", f"--out={file}"])
    image = f"--guidance_image={shown[0]}"
    computed, read = (drawn(tiny_sd, tmp_path / flag[2:6], image, flag)[0]
                      for flag in (f"--clip={clip}", f"--guidance_features={file}"))
    assert near(computed, read)
    unknown = noise_image(tmp_path / "unknown.png", 99)
    problem, = refused(tiny_sd, tmp_path / "out", f"--guidance_image={unknown}", f"--guidance_features={file}")
    assert "unknown.png" in problem.what


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd2"])
def test_features_that_do_not_fit_are_refused(model, clip, shown, request, tmp_path):
    base = request.getfixturevalue(model)
    problem, = refused(base, tmp_path / "out", f"--clip={clip}", f"--guidance_image={shown[0]}")
    assert "24 wide" in problem.what and f"{56 if model == 'tiny_sdxl' else 32} wide" in problem.what


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_all_that_is_wrong_is_said_at_once(tiny_sd, tmp_path):
    wrong = ("--lora=no.safetensors", "--strength=1", "--strength=2", "--guidance_both_branches", "--width=50",
             "--steps=0", "--embeddings=no_emb.safetensors")
    found = refused(tiny_sd, tmp_path / "out", *wrong)
    assert [p.where for p in found] == ["--embeddings no_emb.safetensors", "--lora", "--embeddings", "--strength",
                                        "--guidance_both_branches", "--width", "--steps"]
    assert "--width 48" in [p.fix for p in found]
    problem, = refused(tiny_sd, tmp_path / "out", "--strength=0.5")
    assert "0 LoRAs" in problem.what
    problem, = refused(tiny_sd, tmp_path / "out", f"--guidance_image={__file__}", f"--guidance_image={__file__}",
                       prompts=("a", "b", "c"))
    assert "2 guidance images for 3 prompts" in problem.what


def test_what_is_no_model_or_no_image_is_refused(tiny_sd, clip, tmp_path):
    (tmp_path / "empty").mkdir()
    for base, said in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "not a Stable Diffusion")):
        problem, = refused(base, tmp_path / "out")
        assert said in problem.what and problem.where.startswith("--base")
    (torn := tmp_path / "torn.png").write_bytes(b"\x89PNG")
    problem, = refused(tiny_sd, tmp_path / "out", f"--clip={clip}", f"--guidance_image={torn}")
    assert "torn.png cannot be read" in problem.what
    (torn := tmp_path / "torn.safetensors").write_bytes(b"no")
    problem, = refused(tiny_sd, tmp_path / "out", f"--lora={torn}")
    assert "cannot be read" in problem.what and "torn.safetensors" in problem.where


def test_numbers_and_places_that_cannot_be_are_refused(tiny_sd, lora, tmp_path):
    (afile := tmp_path / "file").write_text("")
    found = refused(tiny_sd, afile, f"--lora={lora}", "--strength=nan", "--guidance_scale=inf",
                    "--guidance_token_scale=nan", f"--seeds=-1,{2**64}")
    assert [p.where for p in found] == ["--strength", "--guidance_scale", "--guidance_token_scale", "--seeds",
                                        f"--out {afile}"]
    assert all(p.kind == "usage" and "--resume_from_checkpoint" not in p.fix for p in found)


def test_a_folder_that_cannot_be_made_is_refused_before_drawing(tiny_sd, monkeypatch, tmp_path):
    def no_room(*_, **__):
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(Path, "mkdir", no_room)
    monkeypatch.setattr(generate, "load_pipeline", None)  # nothing is loaded
    problem, = refused(tiny_sd, tmp_path / "out")
    assert problem.where.startswith("--out") and problem.kind == "usage"


def test_images_of_nan_are_no_images(tiny_sd, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    for value, kind in ((torch.nan, "data"), (1e25, "nonfinite")):  # the second overflows when it is multiplied
        weights = {name: torch.full_like(w, value) for name, w in load_file(lora / DIFFUSERS_FILE).items()}
        save_file(weights, bad := tmp_path / "bad.safetensors")
        problem, = refused(tiny_sd, tmp_path / "out", f"--lora={bad}")
        assert problem.kind == kind


@pytest.mark.parametrize(("file", "key", "value", "said"), [
    ("unet/config.json", "in_channels", 9, "do not fit"),
    ("scheduler/scheduler_config.json", "prediction_type", "flow", "flow"),
    ("unet/config.json", "sample_size", None, "how large"),
    ("tokenizer/tokenizer_config.json", None, None, "no tokenizer"),
])
def test_models_that_cannot_be_drawn_with_are_refused_before_loading(file, key, value, said, tiny_sd, monkeypatch,
                                                                     tmp_path):
    shutil.copytree(tiny_sd, base := tmp_path / "base")
    if key:
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | {key: value}))
    else:
        (base / file).unlink()
    monkeypatch.setattr(generate, "load_pipeline", None)
    problem, = refused(base, tmp_path / "out")
    assert said in problem.what and problem.where == f"--base {base}" and "--pretrained" not in problem.fix


def test_what_is_no_file_of_embeddings_is_refused(tiny_sdxl, lora, tmp_path):
    problem, = refused(tiny_sdxl, tmp_path / "out", f"--embeddings={lora / DIFFUSERS_FILE}")
    assert "no file of embeddings" in problem.what and problem.kind == "data"


@pytest.mark.parametrize("file, name", [
    ("runs/dog/pytorch_lora_weights.safetensors", "dog"), ("runs/dog/dog-step00000500.safetensors", "dog-step00000500"),
    ("runs/dog/checkpoint-500/pytorch_lora_weights.safetensors", "dog@500"), ("style.safetensors", "style"),
])
def test_sheets_of_two_steps_can_be_told_apart(file, name):
    assert lora_name(Path(file)) == name
