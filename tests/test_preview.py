"""Previews: bitwise repeatable, what the stock pipeline draws, and without a trace in the training."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit import preview, rng
from trainkit.adapters import add_adapters
from trainkit.condition import Condition
from trainkit.conditioning.cached_text import FrozenText
from trainkit.errors import UserError
from trainkit.export import write_diffusers
from trainkit.families import Family, sd, sdxl
from trainkit.families.pretrained import Repo
from trainkit.options import LoraOptions, ValidationOptions
from trainkit.preview import Previews, evaluating, preview_prompts
from trainkit.sheets import sheet, tile_px
from trainkit.tools import generate

PROMPT = "3d icon in the style of TOK, a red dog"
SIDE = 32  # pixels


def options(*, prompt: str | None = PROMPT, images: int = 2) -> SimpleNamespace:
    return SimpleNamespace(validation_prompt=prompt, num_validation_images=images)


def load(folder: Path, *, dtype: torch.dtype = torch.float32, module=sdxl) -> Family:
    model = SimpleNamespace(pretrained_model_name_or_path=str(folder), pretrained_vae_model_name_or_path=None,
                            revision=None, variant=None, vae_batch_size=1, base_precision=None)
    return module.load(model, device=torch.device("cpu"), weight_dtype=dtype)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "STEPS", 3)


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> sdxl.SDXL:
    """In training: adapters that do something, with dropout, the text encoders gone, the VAE put away."""
    loaded = load(tiny_sdxl)
    lora = LoraOptions(rank=2, lora_dropout=0.5)
    adapters = add_adapters(loaded.denoiser, lora, targets=loaded.lora_targets, seed=0)
    with torch.no_grad():
        for path in adapters.layers:
            B = adapters.factors(path)[1]
            B.copy_(torch.randn(B.shape, generator=rng.generator("test", path)) / 10)
    return loaded


@pytest.fixture(scope="module")
def encoded(family: sdxl.SDXL) -> FrozenText:
    text = FrozenText(family, [*preview_prompts(options()), "a cat"])
    family.free_text_encoders()
    return text


def make(family: sdxl.SDXL, encoded: FrozenText, folder: Path, **changes) -> Previews:
    return Previews(family, options(**changes), encoded, folder, seed=42, resolution=SIDE)


def first(drawn: dict[Path, Image.Image]) -> Path:
    return next(iter(drawn))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_same_step_twice_gives_the_same_bytes(family, encoded, tmp_path):
    previews = make(family, encoded, tmp_path)
    first = [path.read_bytes() for path in previews.generate(5)]
    torch.rand(3)  # whatever training draws in between
    assert [path.read_bytes() for path in previews.generate(5)] == first
    one, two, _ = (pixels(path) for path in previews.generate(5))
    assert (one != two).any(), "two seeds, two images"


def test_where_the_card_is_full_the_frozen_weights_wait_aside_while_images_are_decoded(
        family, encoded, tmp_path, monkeypatch):
    want = make(family, encoded, tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    there = pixels(first(want.generate(1)))
    events, decode, weights = [], family.decode, dict(family.denoiser.named_parameters())
    monkeypatch.setattr(family, "decode", lambda latents: (events.append("decode"), decode(latents))[1])
    monkeypatch.setattr(preview, "move", lambda some, device: events.append({id(p) for p in some}))
    monkeypatch.setattr(preview, "free_memory", lambda device: preview.DECODER - 1)
    aside = pixels(first(make(family, encoded, tmp_path / "b").generate(1)))
    frozen = {id(p) for name, p in weights.items() if "lora" not in name}
    assert events == [frozen, "decode", "decode", frozen] and (there == aside).all()


def test_a_image_depends_on_its_own_seed_only(family, encoded, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    alone = first(make(family, encoded, tmp_path / "a", images=1).generate(1))
    beside_another = first(make(family, encoded, tmp_path / "b", images=2).generate(1))
    assert (pixels(alone) == pixels(beside_another)).all()


def test_drawing_leaves_no_trace_in_training(family, encoded, tmp_path):
    """Modes, gradients' switches, random states and the next training forward are as if nothing had been drawn."""
    unet = family.denoiser
    unet.mid_block.eval()  # a part in another mode than the rest
    modes = [m.training for m in unet.modules()]
    trainable = [p.requires_grad for p in unet.parameters()]
    before = training_forward(family, encoded)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    make(family, encoded, tmp_path).generate(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [m.training for m in unet.modules()] == modes
    assert [p.requires_grad for p in unet.parameters()] == trainable
    assert torch.equal(training_forward(family, encoded), before)
    unet.train()


def training_forward(family: sdxl.SDXL, encoded: FrozenText) -> torch.Tensor:
    """With dropout on, from a pinned generator whose state is put back."""
    state = torch.get_rng_state()
    torch.manual_seed(1)
    level = SimpleNamespace(cond=torch.tensor([500]))
    z = torch.randn(1, family.latent_channels, 8, 8)
    condition = Condition(encoded([PROMPT]), time_ids=torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]))
    out = family.denoise(z, level, condition).detach()
    torch.set_rng_state(state)
    return out


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "encoded empty prompt"])
def test_previews_are_what_the_stock_pipeline_draws(tiny_sdxl, tmp_path, zeros):
    """Same prompt, same noise, the repository's own parts, whichever way it treats the empty negative prompt."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    stock = StableDiffusionXLPipeline.from_pretrained(folder, force_zeros_for_empty_prompt=zeros)
    stock.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock.save_config(folder)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    size = {"height": SIDE, "width": SIDE}
    expected = stock(PROMPT, generator=torch.Generator().manual_seed(42), num_inference_steps=3, guidance_scale=5.0,
                     **size).images[0]
    family = load(folder)
    drawn = first(make(family, FrozenText(family, preview_prompts(options())), tmp_path, images=1).generate(1))
    assert np.abs(pixels(drawn).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.trains
@pytest.mark.parametrize("module", [sd, sdxl], ids=["sd", "sdxl"])
def test_a_preview_generate_and_the_stock_pipeline_are_one_image(module, tiny_sd, tiny_sdxl, tmp_path):
    """Of one prompt, seed, size, number of steps, guidance, scheduler and LoRA."""
    from diffusers import AutoPipelineForText2Image, DPMSolverMultistepScheduler

    base = tiny_sdxl if module is sdxl else tiny_sd
    family = load(base, module=module)
    adapters = add_adapters(family.denoiser, LoraOptions(rank=2), targets=family.lora_targets, seed=0)
    with torch.no_grad():
        for path in adapters.layers:
            B = adapters.factors(path)[1]
            B.copy_(torch.randn(B.shape, generator=rng.generator("test", path)) / 10)
    write_diffusers([adapters], file := tmp_path / "a.safetensors", {})
    encoded = FrozenText(family, preview_prompts(options()))
    ours = [pixels(path) for path in make(family, encoded, tmp_path).generate(1)][:2]
    generate.main([f"--base={base}", f"--lora={file}", f"--prompt={PROMPT}", "--seeds=42,43", "--steps=3",
                   "--scheduler=dpmpp_2m", f"--width={SIDE}", f"--height={SIDE}", f"--out={tmp_path / 'out'}"])
    stock = AutoPipelineForText2Image.from_pretrained(base)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    plain, _ = (stock(PROMPT, generator=torch.Generator().manual_seed(seed), num_inference_steps=3, height=SIDE,
                      width=SIDE).images[0] for seed in (42, 43))
    stock.load_lora_weights(file.parent, weight_name=file.name)
    theirs = [stock(PROMPT, generator=torch.Generator().manual_seed(seed), num_inference_steps=3, height=SIDE,
                    width=SIDE).images[0] for seed in (42, 43)]
    for preview_of, seed, stocks in zip(ours, (42, 43), theirs, strict=True):
        generated = pixels(tmp_path / "out" / f"p01_s{seed}.png")
        for other in (generated, stocks):
            assert np.abs(preview_of.astype(int) - np.asarray(other).astype(int)).max() <= 1
    assert np.abs(ours[0].astype(int) - ours[1]).max() > 8 and np.abs(ours[0].astype(int) - np.asarray(plain)).max() > 8


def test_half_precision_bases_are_drawn_too(tiny_sdxl, tmp_path):
    family = load(tiny_sdxl, dtype=torch.bfloat16)
    drawn = first(make(family, FrozenText(family, preview_prompts(options())), tmp_path, images=1).generate(1))
    assert pixels(drawn).std() > 0


def test_images_carry_their_prompt_and_seed(family, encoded, tmp_path):
    paths = [*make(family, encoded, tmp_path).generate(500)]
    names = ["step_000500_p01_s42.png", "step_000500_p01_s43.png", "step_000500.png"]
    assert [p.relative_to(tmp_path / "samples").as_posix() for p in paths] == names
    first, *settings = Image.open(paths[1]).info["parameters"].splitlines()
    assert first == PROMPT
    assert "Seed: 43" in settings[0] and f"Size: {SIDE}x{SIDE}" in settings[0]


def test_without_a_prompt_nothing_is_drawn_or_encoded(family, encoded, tmp_path):
    assert make(family, encoded, tmp_path / "out", prompt=None).generate(1) == {}
    assert not (tmp_path / "out").exists()
    assert preview_prompts(options(prompt=None)) == []
    assert not make(family, encoded, tmp_path, prompt=None).due(1, last=True)


def test_modes_come_back_after_a_failure():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(RuntimeError), evaluating(module):
        assert not module[0].training
        raise RuntimeError
    assert module.training and module[0].training and not module[1].training


@pytest.mark.parametrize("side, tile", [(32, 192), (64, 192), (128, 256), (512, 512), (1024, 512)])
def test_small_images_are_enlarged_by_whole_factors_and_large_ones_reduced(side, tile):
    assert tile_px(side) == tile


def test_a_sheet_shows_every_image_at_its_place():
    colours = [["#ff0000", "#00ff00"], ["#0000ff", "#ffff00"]]
    rows = [[Image.new("RGB", (64, 64), c) for c in row] for row in colours]
    page = sheet(rows, columns=["base", "LoRA"], names=["cat", "a noun of many words that must be wrapped"], title="t")
    found = [page.getpixel((page.width - 40 - 202 * (1 - c), page.height - 60 - 202 * (1 - r)))
             for r in (0, 1) for c in (0, 1)]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def test_previews_are_due_every_so_many_steps_and_after_the_last(family, encoded, tmp_path):
    previews = Previews(family, options(), encoded, tmp_path, seed=42, resolution=SIDE, every=50)
    assert [s for s in range(1, 121) if previews.due(s, last=s == 120)] == [50, 100, 120]


@pytest.mark.parametrize("given, every, said", [
    ({"validation_epochs": 1}, 2, ["--validation_epochs 1 makes previews every 2 steps"]),
    ({"validation_epochs": 1}, 1, ["--validation_epochs 1 makes previews every step"]),
    ({"validation_epochs": 1}, 20, []), ({"validation_steps": 2}, 2, []), ({"validation_prompt": None}, 2, []),
])
def test_epochs_that_draw_previews_every_few_steps_are_told_at_the_start(tmp_path, caplog, given, every, said):
    asked = ValidationOptions(**{"validation_prompt": PROMPT} | given)
    with caplog.at_level(logging.WARNING, logger="trainkit.preview"):
        Previews(SimpleNamespace(), asked, {}, tmp_path, seed=0, resolution=SIDE, every=every)
    assert [message.partition(",")[0] for message in caplog.messages] == said
    assert all("--validation_steps" in message for message in caplog.messages)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_images(folder: Path, *steps: int) -> Path:
    (folder / "samples").mkdir(parents=True)
    for step in steps:
        for name in (f"step_{step:06d}.png", f"step_{step:06d}_p01_s42.png"):
            Image.new("RGB", (8, 8)).save(folder / "samples" / name)
    return folder


@pytest.mark.parametrize("prompt", [PROMPT, None], ids=["drawing", "without previews"])
@pytest.mark.parametrize("start, stay", [(10, [0, 10]), (0, []), (99, [0, 10, 20])])
def test_images_of_an_earlier_run_are_put_away_not_mixed_in(family, encoded, tmp_path, prompt, start, stay):
    """Those of steps a resumed run has not reached; all of them when a run starts afresh, drawing or not."""
    folder = with_images(tmp_path, 0, 10, 20)
    (folder / "samples" / "step_by_step.png").write_bytes(b"the user's")
    make(family, encoded, folder, prompt=prompt).begin(start)
    left = [f"step_{s:06d}{end}.png" for s in stay for end in ("", "_p01_s42")]
    assert names(folder / "samples") == sorted([*left, "step_by_step.png"])
    assert len([*folder.glob("earlier/samples-*/*.png")]) == 6 - len(left)


@pytest.mark.parametrize("looks", range(8))
def test_a_drawing_is_ended_after_any_denoising_step_or_image(family, encoded, tmp_path, looks):
    """Two images of three steps, then two to decode: eight looks. Nothing is written, and no mode is left changed."""
    answers = iter([False] * looks + [True])
    modes = [m.training for m in family.denoiser.modules()]
    assert make(family, encoded, tmp_path).generate(1, lambda done, total: next(answers)) == {}
    assert not (tmp_path / "samples").exists() and next(answers, None) is None, "it is asked that often"
    assert [m.training for m in family.denoiser.modules()] == modes


def test_looking_changes_no_image(family, encoded, tmp_path):
    plain = make(family, encoded, tmp_path).generate(1)
    looked = make(family, encoded, tmp_path).generate(1, lambda done, total: False)
    assert all((np.asarray(plain[path]) == np.asarray(image)).all() for path, image in looked.items())


@pytest.mark.parametrize("start, last, images_there, draws", [
    (0, False, False, True), (0, False, True, False), (50, False, False, True), (50, False, True, False),
    (30, False, False, False), (30, True, False, True), (30, True, True, False),
])
def test_a_session_draws_before_the_first_step_and_what_was_cut_off(
        family, encoded, tmp_path, monkeypatch, start, last, images_there, draws):
    """A resume at a step that has no previews draws none."""
    previews = Previews(family, options(), encoded, tmp_path, seed=42, resolution=SIDE, every=50)
    monkeypatch.setattr(previews, "there", lambda step: images_there)
    assert previews.missing(start, last=last) == draws


def test_a_folder_of_the_run_that_was_taken_away_is_not_made_again(family, encoded, tmp_path):
    with pytest.raises(UserError) as caught:
        make(family, encoded, tmp_path / "gone").generate(1)
    assert caught.value.exit_code == 74 and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("junk", [b"", b"damaged", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"P6 1 1 255"])
def test_samples_that_are_none_are_drawn_again(family, encoded, tmp_path, junk):
    previews = make(family, encoded, tmp_path)
    (tmp_path / "samples").mkdir()
    for name in ("step_000005_p01_s42.png", "step_000005_p01_s43.png", "step_000005.png"):
        (tmp_path / "samples" / name).write_bytes(junk)
    assert not previews.there(5)


def test_a_resumed_run_finds_the_images_of_its_first_step(family, encoded, tmp_path):
    """All of them, the grid included, and of the same prompt."""
    previews = make(family, encoded, tmp_path)
    assert not previews.there(5)
    previews.generate(5)
    assert previews.there(5) and not previews.there(6)
    assert not make(family, encoded, tmp_path, prompt="a cat").there(5)
    assert not make(family, encoded, tmp_path, images=3).there(5)
    (tmp_path / "samples" / "step_000005.png").write_bytes(b"damaged")
    assert not previews.there(5)
    (tmp_path / "samples" / "step_000005.png").unlink()
    assert not previews.there(5)


def test_what_was_drawn_comes_back_as_it_was_written(family, encoded, tmp_path):
    drawn = make(family, encoded, tmp_path).generate(1)
    assert all((np.asarray(image) == pixels(path)).all() for path, image in drawn.items())


def test_previews_read_the_pipeline_of_the_runs_own_revision(family, monkeypatch):
    asked = []
    monkeypatch.setattr(Repo, "json", lambda repo, name: asked.append((repo.revision, name)) or {})
    monkeypatch.setattr(family, "revision", "v1", raising=False)
    family.pipeline(preview.sampler(family))
    assert asked == [("v1", "model_index.json")]


def test_previews_of_a_size_that_is_no_square_have_it(family, encoded, tmp_path):
    previews = Previews(family, options(images=1), encoded, tmp_path, seed=42, resolution=f"{2 * SIDE},{SIDE}")
    assert Image.open(first(previews.generate(1))).size == (2 * SIDE, SIDE)
