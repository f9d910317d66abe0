"""Prompts longer than a text encoder reads: cut into chunks as WebUIs do, alike in training, previews and generate.

The references here are written for the tests alone: the chunks token by token, the encoding chunk by chunk.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.compare import same_bits
from tests.support.text import loss_of, text_of
from trainkit import rng
from trainkit.condition import UNCONDITIONAL, Condition, equally_long
from trainkit.conditioning.cached_text import FrozenText
from trainkit.conditioning.caption_length import cut_off, warn_cut
from trainkit.conditioning.clip_token import with_token
from trainkit.data.batch import Row
from trainkit.families import Family, sd, sdxl
from trainkit.families.tokenize import chunk_counts, chunk_spans, chunked, has_free_place, prompt_lengths, tokens
from trainkit.inference import encode_prompts
from trainkit.options import ModelOptions, PivotalOptions, TextOptions, ValidationOptions
from trainkit.preview import Previews, preview_prompts

SIDE = 32
SHORT, LONG = "a red dog", "red dog, " * 30 + "a cat"  # 3 and 92 tokens
LONGEST = "a red dog, " * 60  # 240
FAMILIES = {"sdxl": sdxl, "sd": sd, "sd2": sd}


def load(kind: str, folder: Path, *, max_chunks: int = 3, dtype: torch.dtype = torch.float32) -> Family:
    return FAMILIES[kind].load(ModelOptions(pretrained_model_name_or_path=str(folder)), device=torch.device("cpu"),
                               weight_dtype=dtype, max_chunks=max_chunks)


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"sdxl": "tiny_sdxl", "sd": "tiny_sd", "sd2": "tiny_sd2"}[kind])


# ----------------------------------------------------------------------------------------------------------------------
# Where a prompt is cut


def token_by_token(ids: list[int], comma: int, most: int) -> list[list[int]]:
    """AUTOMATIC1111's rule as its code goes: a chunk is filled, and when it is full and no comma follows, what it has
    behind its last comma moves on, if that comma is among its last 20 tokens.
    """
    done: list[list[int]] = []
    chunk: list[int] = []
    for token in ids:
        if len(chunk) == 75:
            if len(done) + 1 == most:
                break
            last = max((i for i, one in enumerate(chunk) if one == comma), default=-1)
            kept = last + 1 if token != comma and last != -1 and 75 - last <= 20 else 75
            done.append(chunk[:kept])
            chunk = chunk[kept:]
        chunk.append(token)
    return [*done, chunk]


@given(st.lists(st.sampled_from([7, 7, 7, 7, 7, 7, 7, 9]), max_size=320) | st.lists(st.just(7), max_size=320),
       st.integers(1, 3))
def test_chunks_are_those_of_a_reference_that_goes_token_by_token(ids: list[int], most: int):
    assert [ids[start:end] for start, end in chunk_spans(ids, 75, 9, most)] == token_by_token(ids, 9, most)


def test_one_chunk_is_what_the_stock_tokenizer_gives_whatever_may_follow(kind: str, folder: Path):
    family = load(kind, folder)
    for most in (1, 3):
        chunks = chunked(family.tokenizers, [SHORT, "", UNCONDITIONAL, "dog " * 75], most)
        assert chunks.counts == [1] * 4
        for tokenizer, ids, attended in zip(family.tokenizers, chunks.ids, chunks.attended, strict=True):
            stock = tokens(tokenizer, [SHORT, "", "", "dog " * 75])
            assert torch.equal(ids, stock.input_ids) and torch.equal(attended, stock.attention_mask)
    assert chunk_counts(family.tokenizers, [LONG, LONGEST], 3) == [2, 3] and chunked(
        family.tokenizers, [LONG, LONGEST], 1).counts == [1, 1]


def test_what_is_cut_off_is_what_no_chunk_holds(tiny_sdxl: Path):
    family = load("sdxl", tiny_sdxl)
    prompts = [SHORT, LONG, LONGEST, "dog " * 150 + "cat", "dog " * 226]
    for most in (1, 2, 3):
        lost = cut_off(prompts, family.tokenizers, most)
        for prompt, words in zip(prompts, lost, strict=True):
            kept = prompt[: len(prompt.rstrip()) - len(words)] if words else prompt
            whole, alone = (chunked(family.tokenizers, [text], most).ids[0] for text in (prompt, kept))
            assert torch.equal(whole, alone), "the encoder sees the same without them"
    assert [bool(words) for words in cut_off(prompts, family.tokenizers, 3)] == [False, False, True, False, True]
    assert cut_off(prompts, family.tokenizers, 2)[3] == "cat"


# ----------------------------------------------------------------------------------------------------------------------
# What is encoded


def chunk_by_chunk(family: Family, prompt: str, clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each chunk through the encoders by itself, states behind one another, pooled text of the first."""
    states, pooled = [], None
    for number in range(chunk_counts(family.tokenizers, [prompt], 3)[0]):
        parts = []
        for tokenizer, encoder in zip(family.tokenizers, family.text_encoders, strict=True):
            text = tokenizer(prompt, add_special_tokens=False).input_ids
            chunk = token_by_token(text, tokenizer.get_vocab()[",</w>"], 3)[number]
            ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
            ids = torch.tensor([[*ids, *[tokenizer.pad_token_id] * (77 - len(ids))]])
            out = encoder(ids, output_hidden_states=True)
            if isinstance(family, sdxl.SDXL):
                parts.append(out.hidden_states[-2 - (clip_skip or 0)])
                pooled = out.text_embeds if number == 0 and encoder is family.text_encoders[1] else pooled
            else:
                body = getattr(encoder, "text_model", encoder)
                parts.append(body.final_layer_norm(out.hidden_states[-1 - (clip_skip or 0)]))
        states.append(torch.cat(parts, dim=-1))
    return torch.cat(states, dim=1), pooled


@pytest.mark.parametrize("clip_skip", [None, 1])
@torch.no_grad()
def test_long_prompts_are_encoded_as_a_reference_does_chunk_by_chunk(kind: str, folder: Path, clip_skip: int | None):
    family = load(kind, folder)
    for prompt, chunks in {SHORT: 1, LONG: 2, LONGEST: 3}.items():
        condition, (embeds, pooled) = family.encode_prompts([prompt], clip_skip), chunk_by_chunk(
            family, prompt, clip_skip)
        assert condition["embeds"].shape[1] == 77 * chunks
        torch.testing.assert_close(condition["embeds"], embeds)
        if pooled is not None:
            torch.testing.assert_close(condition["pooled"], pooled)


@torch.no_grad()
def test_prompts_of_several_lengths_stand_beside_each_other_repeated(kind: str, folder: Path):
    family = load(kind, folder)
    prompts = [LONGEST, SHORT, LONG, UNCONDITIONAL]
    alone = [family.encode_prompts([prompt]) for prompt in prompts]
    text = FrozenText(family, prompts)
    for together in (family.encode_prompts(prompts), text(prompts), Condition.cat(alone)):
        assert together["embeds"].shape[:2] == (4, 6 * 77)
        for place, one in enumerate(alone):
            times = 6 * 77 // one["embeds"].shape[1]
            torch.testing.assert_close(together["embeds"][place], one["embeds"][0].repeat(times, 1))
            if "pooled" in one:
                torch.testing.assert_close(together["pooled"][place], one["pooled"][0])
    assert text([SHORT])["embeds"].shape[1] == 77, "each is kept as long as it is"


@torch.no_grad()
def test_a_repeated_prompt_tells_the_network_the_same(kind: str, folder: Path):
    family = load(kind, folder)
    z, level = torch.randn(1, 4, 8, 8, generator=rng.generator("z")), SimpleNamespace(cond=torch.tensor([500]))
    once = Condition(family.encode_prompts([LONG]), time_ids=torch.tensor([[32.0, 32, 0, 0, 32, 32]]))
    thrice = Condition(once, embeds=equally_long([once["embeds"], torch.zeros(1, 6 * 77, 1)])[0])
    assert thrice["embeds"].shape[1] == 3 * once["embeds"].shape[1]
    torch.testing.assert_close(family.denoise(z, level, once), family.denoise(z, level, thrice), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# A dropped caption


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_a_dropped_caption_is_what_the_stock_pipeline_takes_for_a_missing_one(tiny_sdxl: Path, tmp_path: Path,
                                                                             zeros: bool):
    from diffusers import StableDiffusionXLPipeline

    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock.save_config(folder)
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    _, negative, _, negative_pooled = stock.encode_prompt(SHORT, do_classifier_free_guidance=True)
    family = load("sdxl", folder, max_chunks=1)
    text = FrozenText(family, [f"{number} dog" for number in range(20)] + [UNCONDITIONAL, "", SHORT])
    for condition in (family.encode_prompts([UNCONDITIONAL]), text([UNCONDITIONAL])):
        assert same_bits(condition, {"embeds": negative, "pooled": negative_pooled})
    beside = text([SHORT, UNCONDITIONAL, ""])
    assert torch.equal(beside["embeds"][1], negative[0]) and beside["embeds"][0].abs().sum() > 0
    assert bool(beside["embeds"][1].abs().sum() == 0) == zeros and beside["embeds"][2].abs().sum() > 0


@pytest.mark.parametrize("version", ["tiny_sd", "tiny_sd2"])
@torch.no_grad()
def test_a_dropped_caption_of_sd_is_its_pipelines_empty_prompt(version: str, request: pytest.FixtureRequest):
    from diffusers import StableDiffusionPipeline

    folder = request.getfixturevalue(version)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    _, negative = stock.encode_prompt(SHORT, torch.device("cpu"), 1, True)
    text = FrozenText(load("sd", folder), [SHORT, UNCONDITIONAL])
    torch.testing.assert_close(text([UNCONDITIONAL])["embeds"], negative)


@pytest.mark.parametrize("mode", ["LoRA", "new tokens"])
def test_encoders_in_training_take_a_dropped_caption_too(tiny_sdxl: Path, mode: str):
    options = {"pivotal": PivotalOptions(train_text_encoder_ti=True)} if mode == "new tokens" else {
        "text": TextOptions(train_text_encoder=True)}
    words = text_of(load("sdxl", tiny_sdxl), ["a TOK dog", UNCONDITIONAL], **options)
    condition = words(["a TOK dog", UNCONDITIONAL], 0)
    assert condition["embeds"][1].abs().sum() == 0 and condition["pooled"][1].abs().sum() == 0
    loss_of(condition).backward()
    params = [p for group in words.learner.groups(lrs=(1.0, 1.0), weight_decay=0.0, stop=None) for p in group["params"]]
    assert all(p.grad is None or p.grad.isfinite().all() for p in params) and any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in params)


# ----------------------------------------------------------------------------------------------------------------------
# Together with what else there is


def test_new_tokens_beyond_the_first_chunk_learn(tiny_sdxl: Path):
    prompt = "red dog, " * 30 + "TOK"
    pivotal = {"pivotal": PivotalOptions(train_text_encoder_ti=True)}
    with pytest.raises(Exception, match="cut off in every caption"):
        text_of(load("sdxl", tiny_sdxl, max_chunks=1), [prompt], **pivotal)
    words = text_of(load("sdxl", tiny_sdxl), [prompt, SHORT], **pivotal)
    condition = words([prompt, SHORT], 0)
    assert condition["embeds"].shape[1] == 2 * 77
    condition["embeds"][0, 77:].sum().backward()
    assert all(rows.grad.abs().sum() > 0 for rows in words.learner.rows)


def test_texts_that_nobody_announced_are_read_by_encoders_that_train_to_the_end(tiny_sdxl: Path):
    words = text_of(load("sdxl", tiny_sdxl), None, text=TextOptions(train_text_encoder=True))
    assert words([SHORT, LONG], 3)["embeds"].requires_grad
    announced = text_of(load("sdxl", tiny_sdxl), [SHORT], text=TextOptions(train_text_encoder=True))
    with pytest.raises(AssertionError, match="not announced"):
        announced([LONG], 0)


def test_the_guidance_token_stands_at_the_end_of_each_copy_of_a_prompt(tiny_sd: Path):
    tokenizers = load("sd", tiny_sd).tokenizers
    full = "dog " * 150
    assert has_free_place(tokenizers, [SHORT, LONG, full, "dog " * 75], 3) == [True, True, False, False]
    lengths = prompt_lengths(tokenizers, [SHORT, LONG, full], 3)
    assert lengths == [77, 154, 154]
    embeds, token = torch.zeros(3, 154, 4), torch.ones(3, 4)
    placed = with_token(embeds, token, torch.tensor([True, True, False]), lengths)
    assert [row.sum(-1).nonzero().flatten().tolist() for row in placed] == [[76, 153], [153], []]
    assert embeds.sum() == 0


@pytest.mark.trains
@pytest.mark.parametrize("negative", [None, "a cat"])
def test_a_preview_generate_and_the_stock_pipeline_draw_one_image_of_a_long_prompt(
    kind: str, folder: Path, tmp_path: Path, negative: str | None,
):
    """The pipeline is given the reference's encoding; generate and the preview encode by themselves."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    options = {} if kind == "sdxl" else {"safety_checker": None}
    pipe = pipeline.from_pretrained(folder, **options)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    family = load(kind, folder)
    with torch.no_grad():
        embeds, pooled = chunk_by_chunk(family, LONG, None)
        without = family.encode_prompts([negative or UNCONDITIONAL])
        generated = encode_prompts(pipe, [LONG], negative and [negative], max_chunks=3)
    reference = {"prompt_embeds": embeds, "negative_prompt_embeds": without["embeds"].repeat(1, 2, 1)}
    if pooled is not None:
        reference |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": without["pooled"]}
    drawn = [pipe(**text, generator=torch.Generator().manual_seed(42), num_inference_steps=3,
                  guidance_scale=family.guidance_scale, height=SIDE, width=SIDE).images[0]
             for text in (reference, generated)]
    if negative is None:
        validation = ValidationOptions(validation_prompt=LONG, num_validation_images=1)
        previews = Previews(family, validation, FrozenText(family, preview_prompts(validation)), tmp_path, seed=42,
                            resolution=SIDE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainkit.preview.STEPS", 3)
            drawn.append(next(iter(previews.generate(1).values())))
    first, *others = (np.asarray(image.convert("RGB")).astype(int) for image in drawn)
    assert all(np.abs(first - other).max() <= 1 for other in others) and first.std() > 0


def test_a_cut_prompt_is_told_with_the_flag_that_reads_more(tiny_sdxl: Path, caplog: pytest.LogCaptureFixture):
    row = Row("a.png", Path("a.png"), LONGEST, (8, 8), "digest")
    tokenizers = load("sdxl", tiny_sdxl).tokenizers
    for chunks, limit in ((1, "77 tokens"), (2, "150 tokens"), (3, "225 tokens")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_cut([row], lambda prompt: prompt, SimpleNamespace(tokenizers=tokenizers, max_chunks=chunks))
        message = caplog.records[0].getMessage()
        assert limit in message and ("--max_token_length 225" in message) == (chunks < 3)


def test_a_run_with_many_captions_tells_how_many_are_encoded(tiny_sd: Path):
    told: list[tuple[str, int, int]] = []
    FrozenText(load("sd", tiny_sd), [f"{number} dog" for number in range(40)], also=["a preview"],
               progress=lambda *now: told.append(now))
    assert told == [("encoding captions", done, 40) for done in (16, 32, 40)]
