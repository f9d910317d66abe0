"""Text in training: gradients before the pivot, not one bit after it, each prompt encoded once, restarts exact."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.compare import same_bits
from tests.support.made_up_run import make_run
from tests.support.text import GROUP, PROMPTS, load_sdxl, loss_of, stock_pipeline, text_of, train_text
from tests.support.tiny_models import build_tiny_sdxl
from trainkit import rng
from trainkit.adapters import add_adapters
from trainkit.condition import Condition
from trainkit.conditioning.live_text import LiveText, Text
from trainkit.conditioning.new_tokens import EOS_LINE
from trainkit.data.cache import DiskStore
from trainkit.errors import UserError
from trainkit.export import write_diffusers
from trainkit.families import sdxl
from trainkit.optim import make_optimizer
from trainkit.options import LoraOptions, OptimizerOptions, PivotalOptions, TextOptions, ValidationOptions
from trainkit.preview import Previews, sampler
from trainkit.publish import write_card
from trainkit.report import write_report
from trainkit.report.facts import RunFacts
from trainkit.report.usage import usage
from trainkit.runtime.weight_files import DIFFUSERS_FILE

TI = {"pivotal": PivotalOptions(train_text_encoder_ti=True)}
LORA = {"text": TextOptions(train_text_encoder=True, train_text_encoder_frac=0.5, text_encoder_lr=1e-2)}
MODES = {"new tokens": TI, "LoRA": LORA}


def state(words: Text) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in words.pack()[0].items()}


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, bool]]:
    """(prompt, with gradient) for each prompt the encoders were asked."""
    seen, encode = [], sdxl.SDXL.encode_prompts

    def spy(family, prompts, clip_skip=None):
        seen.extend((prompt, torch.is_grad_enabled()) for prompt in prompts)
        return encode(family, prompts, clip_skip)

    monkeypatch.setattr(sdxl.SDXL, "encode_prompts", spy)
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# Before the pivot


def test_frozen_text_trains_nothing_and_lets_the_encoders_go(tiny_sdxl):
    family = load_sdxl(tiny_sdxl)
    words = text_of(family)
    assert family.text_encoders == () and not words.groups(OptimizerOptions(), GROUP)
    assert same_bits(words(PROMPTS, 0), words(PROMPTS))
    assert words.pack() == ({}, {}) and words.rewrite("a TOK") == "a TOK"
    assert not words.networks and not words.embeddings


def test_a_distinct_prompt_is_encoded_once_a_step_and_one_without_new_tokens_once_a_run(tiny_sdxl, asked):
    words = text_of(load_sdxl(tiny_sdxl), **TI)
    assert sorted(asked) == [("", False), ("a photo of a dog", False)]
    asked.clear()
    batch = ["a TOK dog", "a photo of a dog", "a TOK dog", "", "a TOK cat"]
    condition = words(batch, 0)
    assert asked == [("a <s0><s1> dog", True), ("a <s0><s1> cat", True)] and condition.keys() == {"embeds", "pooled"}
    assert all(torch.equal(tensor[0], tensor[2]) and len(tensor) == 5 for tensor in condition.values())
    family = words.family
    with torch.no_grad():
        alone = [family.encode_prompts([words.rewrite(p)]) for p in batch]
    for row, one in enumerate(alone):
        torch.testing.assert_close(condition["embeds"][row], one["embeds"][0])
        torch.testing.assert_close(condition["pooled"][row], one["pooled"][0])
    asked.clear()
    assert not words(["", "a photo of a dog"], 1)["embeds"].requires_grad and not asked


def test_a_prompt_repeated_in_a_batch_counts_as_often_in_the_gradient(tiny_sdxl):
    words, weights = text_of(load_sdxl(tiny_sdxl), **TI), torch.randn(3, 77, 56, generator=rng.generator("weights"))

    def gradient(embeds: torch.Tensor) -> torch.Tensor:
        (embeds * weights).sum().backward()
        grads = [rows.grad.clone() for rows in words.learner.rows]
        for rows in words.learner.rows:
            rows.grad = None
        return torch.cat([g.flatten() for g in grads])

    shared = gradient(words(["a TOK dog", "a TOK cat", "a TOK dog"], 0)["embeds"])
    prompts = [f"a <s0><s1> {noun}" for noun in ("dog", "cat", "dog")]
    apart = gradient(words.family.encode_prompts(prompts)["embeds"])
    torch.testing.assert_close(shared, apart, rtol=1e-3, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("mode", MODES)
def test_previews_see_the_weights_as_they_are_without_a_graph(tiny_sdxl, mode, asked):
    words = text_of(load_sdxl(tiny_sdxl), **MODES[mode])
    before = words(["a TOK dog"])
    train_text(words, [0])
    after = words(["a TOK dog"])
    assert not torch.equal(before["embeds"], after["embeds"]) and not after["embeds"].requires_grad
    assert asked[-1] == (words.rewrite("a TOK dog"), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_in_half_precision_what_trains_is_fp32(tiny_sdxl, mode, dtype):
    words = text_of(load_sdxl(tiny_sdxl, dtype), **MODES[mode])
    condition = words(PROMPTS, 0)
    assert {name: tensor.dtype for name, tensor in condition.items()} == {"embeds": dtype, "pooled": dtype}
    sum(tensor.float().mean() for tensor in condition.values()).backward()
    params = [p for group in words.groups(OptimizerOptions(), GROUP) for p in group["params"]]
    assert params and all(p.dtype == torch.float32 and p.requires_grad for p in params)
    assert any(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in params)
    frozen = [p for e in words.family.text_encoders for p in e.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {dtype}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_gives_the_same_gradient(tiny_sdxl, mode):
    def gradients(**changes: bool) -> list[torch.Tensor]:
        words = text_of(load_sdxl(tiny_sdxl), **MODES[mode], **changes)
        loss_of(words(PROMPTS, 0)).backward()
        checkpointed = [m for e in words.family.text_encoders for m in e.modules()
                        if getattr(m, "gradient_checkpointing", False)]
        assert bool(checkpointed) == bool(changes)
        return [p.grad for group in words.groups(OptimizerOptions(), GROUP) for p in group["params"]]

    for plain, saved in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(plain, saved)


def test_d23_text_encoder_lora_leaves_tables_without_gradients(tiny_sdxl):
    words = text_of(load_sdxl(tiny_sdxl), **LORA)
    loss_of(words(PROMPTS, 0)).backward()
    trained = {id(p) for group in words.groups(OptimizerOptions(), GROUP) for p in group["params"]}
    for encoder in words.family.text_encoders:
        assert all((id(p) in trained) == p.requires_grad for p in encoder.parameters())
        assert encoder.get_input_embeddings().weight.grad is None


def test_dropout_of_text_adapters_is_on_in_training_only(tiny_sdxl):
    words = text_of(load_sdxl(tiny_sdxl), lora=LoraOptions(rank=2, lora_dropout=0.5), **LORA)
    train_text(words, [0])
    draws = [words(["a TOK dog"], 1)["embeds"] for _ in range(2)]
    assert not torch.equal(*draws)
    looks = [words(["a TOK dog"])["embeds"] for _ in range(2)]
    assert torch.equal(*looks)


# ----------------------------------------------------------------------------------------------------------------------
# Rates


@pytest.mark.parametrize(("mode", "names"), [("new tokens", ["tokens"]), ("LoRA", ["text_encoder", "text_encoder_2"])])
def test_groups_have_their_own_rates_decay_and_end(tiny_sdxl, mode, names):
    text = TextOptions(train_text_encoder=mode == "LoRA", text_encoder_lr=3e-4, text_encoder_2_lr=0.0,
                       adam_weight_decay_text_encoder=0.0, train_text_encoder_frac=0.25)
    words = text_of(load_sdxl(tiny_sdxl), **(MODES[mode] | {"text": text}), total=8)
    groups = words.groups(OptimizerOptions(adam_weight_decay=0.5), GROUP)
    assert [g["name"] for g in groups] == names
    assert [g["lr"] for g in groups] == [3e-4, 0.0][: len(names)], "0 is 0"
    assert {g["weight_decay"] for g in groups} == {0.0}, "0 is 0, not --adam_weight_decay"
    assert {g["stop"] for g in groups} == {4 if mode == "new tokens" else 2}


def test_without_values_of_their_own_groups_take_the_unets_decay_and_prodigys_rate():
    text = TextOptions()
    assert text.decay(0.5) == 0.5 and text.lrs(OptimizerOptions(), global_batch=4) == (5e-6, 5e-6)
    prodigy = OptimizerOptions(optimizer="prodigy", learning_rate=1.0)
    assert text.lrs(prodigy, global_batch=4) == (1.0, 1.0)
    for rate in (0.5, 5e-6):
        assert TextOptions(text_encoder_lr=rate).lrs(prodigy, global_batch=4) == (rate, rate), "given is given"
        assert TextOptions(text_encoder_2_lr=rate).lrs(prodigy, global_batch=4) == (1.0, rate)


def test_what_trains_to_the_end_stops_there(tiny_sdxl):
    to_the_end = PivotalOptions(train_text_encoder_ti=True, train_text_encoder_ti_frac=1)
    words = text_of(load_sdxl(tiny_sdxl), pivotal=to_the_end)
    assert [g["stop"] for g in words.groups(OptimizerOptions(), GROUP)] == [4] and LoraOptions().stop(4) == 4


@pytest.mark.parametrize("schedule", [{"rate": 0.0}, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}])
def test_at_a_rate_of_0_embeddings_do_not_move_by_one_bit(tiny_sdxl, schedule):
    rate = schedule.pop("rate", 1e-2)
    words = text_of(load_sdxl(tiny_sdxl), text=TextOptions(text_encoder_lr=rate), **TI)
    before = state(words)
    train_text(words, [0], **schedule)
    assert same_bits(before, state(words))


# ----------------------------------------------------------------------------------------------------------------------
# The pivot: 2 of 4 steps


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("mode", MODES)
def test_d8_from_the_pivot_on_nothing_moves_by_one_bit(tiny_sdxl, mode, optimizer, asked):
    words = text_of(load_sdxl(tiny_sdxl), **MODES[mode])
    first = state(words)
    packed = train_text(words, [0, 1], optimizer=optimizer)
    trained = state(words)
    assert not same_bits(first, trained)
    asked.clear()
    train_text(words, [2], optimizer=optimizer, state=packed)
    assert all(not graph for _, graph in asked) and len(asked) == len(set(asked))
    asked.clear()
    train_text(words, [3], optimizer=optimizer, state=packed)
    assert not asked, "every prompt was encoded once, at the pivot"
    assert same_bits(trained, state(words))
    assert not any(tensor.requires_grad for tensor in words(PROMPTS, 3).values())
    assert same_bits(words(PROMPTS, 3), words(PROMPTS))


@pytest.mark.parametrize("mode", MODES)
def test_at_the_pivot_the_encoders_leave_the_device(tiny_sdxl, mode):
    family = load_sdxl(tiny_sdxl)
    words = text_of(family, **MODES[mode])
    train_text(words, [0, 1])
    assert len(family.text_encoders) == 2
    embedded = [weakref.ref(next(encoder.get_input_embeddings().parameters())) for encoder in family.text_encoders]
    words(PROMPTS, 2)
    assert family.text_encoders == ()
    assert [ref() is None for ref in embedded] == [mode == "new tokens"] * 2, "nothing holds the vocabularies"
    assert all(p.device.type == "cpu" for network in words.networks for p in network.network.parameters())


@pytest.mark.trains
@pytest.mark.parametrize(("cut", "store"), [(1, dict), (2, dict), (2, DiskStore), (3, dict)])
@pytest.mark.parametrize("mode", MODES)
def test_d6_a_run_resumed_on_either_side_of_the_pivot_is_the_uninterrupted_one(tiny_sdxl, tmp_path, mode, cut, store):
    kept = DiskStore(tmp_path) if store is DiskStore else None  # None: one in memory for each

    def fresh() -> Text:
        return text_of(load_sdxl(tiny_sdxl), [f"{p} {k}" for k in range(5) for p in PROMPTS], kept, **MODES[mode])

    prompts = [f"{p} {k}" for k in (0, 4) for p in PROMPTS]
    whole, first, second = fresh(), fresh(), fresh()
    train_text(whole, range(4), prompts=prompts)
    optimizer = train_text(first, range(cut), prompts=prompts)
    tensors, data = first.pack()
    saved = {k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(data))
    second.unpack(*saved)
    train_text(second, range(cut, 4), prompts=prompts, state=optimizer)
    assert same_bits(state(whole), state(second))
    assert same_bits(whole(prompts, 3), second(prompts, 3))


def test_the_pull_ends_with_the_training(tiny_sdxl):
    words = text_of(load_sdxl(tiny_sdxl), **TI)
    for done, pulled in ((2, True), (3, False)):
        for rows in words.learner.rows:
            rows.data.mul_(2)
        before = state(words)
        words.after_update(done)
        assert same_bits(before, state(words)) != pulled


def test_what_trained_weights_say_is_not_for_a_shared_store(tiny_sdxl, tmp_path):
    store = DiskStore(tmp_path)
    one, other = (text_of(load_sdxl(tiny_sdxl), store=store, **TI) for _ in range(2))
    train_text(one, [0, 1])
    kept = sorted(tmp_path.rglob("*"))
    one(PROMPTS, 2)
    assert sorted(tmp_path.rglob("*")) == kept and len([path for path in kept if path.is_file()]) == 2
    assert not torch.equal(one(["a TOK dog"], 2)["embeds"], other(["a TOK dog"], 2)["embeds"])
    assert same_bits(one(["a photo of a dog"], 2), other(["a photo of a dog"], 2))


@pytest.mark.parametrize("mode", [{}, *MODES.values()], ids=["frozen", *MODES])
def test_prompts_of_previews_change_no_bit_of_a_caption(tiny_sdxl, mode, monkeypatch):
    captions = [f"{prompt} {k}" for k in range(5) for prompt in PROMPTS]
    batches, encode = [], sdxl.SDXL.encode_prompts

    def spy(family, prompts, clip_skip=None):
        batches.append(tuple(prompts))
        return encode(family, prompts, clip_skip)

    def settled(also: Sequence[str]) -> tuple[Condition, set[tuple[str, ...]]]:
        batches.clear()
        words = text_of(load_sdxl(tiny_sdxl), captions, also=also, **mode)
        out = words(captions, 2)
        shown = words(also or captions[:1])
        assert len(shown["embeds"]) == len(also or captions[:1])
        return out, set(batches)

    monkeypatch.setattr(sdxl.SDXL, "encode_prompts", spy)
    (alone, own), (beside, all_) = settled([]), settled(["", "a TOK apple", "a cat", captions[0]])
    assert same_bits(alone, beside) and own < all_


def test_a_prompt_nobody_announced_is_a_bug(tiny_sdxl):
    with pytest.raises(AssertionError, match="not announced"):
        text_of(load_sdxl(tiny_sdxl), **TI)(["a TOK fish"], 0)


def test_live_text_writes_its_file_and_lora_text_none(tiny_sdxl, tmp_path):
    words = text_of(load_sdxl(tiny_sdxl), **TI)
    assert isinstance(words, LiveText) and words.export(tmp_path, "icons") == [tmp_path / "icons_emb.safetensors"]
    assert text_of(load_sdxl(tiny_sdxl), **LORA).export(tmp_path, "x") == []
    assert text_of(load_sdxl(tiny_sdxl)).export(Path(), "x") == []


# ----------------------------------------------------------------------------------------------------------------------
# Card, report and usage


def published(folder: Path, words: Text, **options: object) -> str:
    """The card of a run that has learned the tokens of `words`."""
    run = make_run(folder, train_text_encoder_ti=True, **options)
    words.export(run, run.name)
    write_report(run)
    return write_card(run).read_text("utf-8")


def test_the_card_says_how_to_write_the_new_tokens_everywhere(tiny_sdxl, tmp_path):
    card = published(tmp_path / "icons", text_of(load_sdxl(tiny_sdxl), **TI))
    assert "`<s0><s1>` are new tokens, `TOK` in the captions" in card
    assert "Write `3d icon in the style of <s0><s1>` in the prompt" in card
    assert "Write `3d icon in the style of embedding:icons_emb` in the positive prompt" in card
    assert "Prompt: `3d icon in the style of icons_emb <lora:icons:1>`" in card
    assert "trained on the UNet and the new tokens' embeddings" in card and "textual_inversion" in card
    assert "| `icons_emb.safetensors` | Diffusers, ComfyUI, A1111, Forge |" in card
    assert "icons_emb.safetensors" in (tmp_path / "icons" / "report.html").read_text("utf-8")
    assert "eos_token_id" not in card


def test_the_card_of_pure_textual_inversion_speaks_of_no_lora(tiny_sdxl, tmp_path):
    card = published(tmp_path / "icons", text_of(load_sdxl(tiny_sdxl), **TI), train_unet_frac=0.0)
    assert "New tokens for" in card and "load_lora_weights" not in card and "Load LoRA" not in card


def test_a_model_with_eos_2_gets_the_line_that_mends_it(tmp_path):
    old = build_tiny_sdxl(tmp_path / "old", eos_in_config=False)
    card = published(tmp_path / "icons", text_of(load_sdxl(old), **TI))
    assert f"\n{EOS_LINE}\n" in card


def test_d10_the_cards_snippet_draws_with_the_learned_tokens(tiny_sdxl, tmp_path, monkeypatch):
    """Without a LoRA, so that the embeddings alone make the difference."""
    words = text_of(load_sdxl(tiny_sdxl), **TI)
    published(folder := tmp_path / "icons", words, train_unet_frac=0.0, pretrained_model_name_or_path=str(tiny_sdxl),
              validation_prompt="a TOK dog")
    (folder / tiny_sdxl.name).symlink_to(tiny_sdxl)
    monkeypatch.chdir(folder)
    code = usage(RunFacts(folder)).diffusers.replace(").images[0]", ", num_inference_steps=1).images[0]")
    scope: dict = {}
    exec(code, scope)
    embeds, _, pooled, _ = scope["pipe"].encode_prompt("a <s0><s1> dog", do_classifier_free_guidance=False)
    assert same_bits({"embeds": embeds, "pooled": pooled}, words(["a TOK dog"])) and 'pipe("a <s0><s1> dog"' in code


# ----------------------------------------------------------------------------------------------------------------------
# The whole of it on the shipped model


def trained_icons(assets: Path, folder: Path) -> tuple[sdxl.SDXL, Text]:
    """Two steps of embeddings and LoRA on the shipped model, and what a run leaves: LoRA file and embeddings."""
    family = load_sdxl(assets / "tiny-sdxl-icons")
    words = text_of(family, ["3d icon in the style of TOK, a fox", ""], **TI)
    lora = add_adapters(family.denoiser, LoraOptions(rank=4), targets=family.lora_targets, seed=0)
    family.prepare_for_training(keep_vae=False)
    options = OptimizerOptions(lr_scheduler="constant")
    optim = make_optimizer([*lora.groups(lr=1e-2, weight_decay=0.0), *words.groups(options, GROUP)], options, 4)
    for step in (0, 1):
        optim.begin(step)
        z, n = (rng.normal((4, 16, 16), [(step,)], name=name) for name in ("z", "n"))
        text = words(["3d icon in the style of TOK, a fox"], step)
        condition = Condition(text, time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]]))
        out = family.denoise(z, family.schedule.at(torch.tensor([500])), condition)
        (out - n).square().mean().backward()
        optim.step()
        optim.zero_grad()
        words.after_update(step + 1)
    write_diffusers([lora], folder / DIFFUSERS_FILE, {})
    words.export(folder, "icons")
    return family, words


def test_d10_stock_diffusers_draws_our_preview_after_the_two_documented_calls(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.preview.STEPS", steps := 6)
    family, words = trained_icons(assets, tmp_path)
    prompt, seed = "3d icon in the style of TOK, a fox", 7
    previews = Previews(family, ValidationOptions(validation_prompt=prompt, num_validation_images=1), words, tmp_path,
                        seed=seed, resolution=64)
    before, _ = previews.generate(2).values()
    condition = words([prompt])
    settled = words([prompt], 2)
    after, _ = previews.generate(3).values()

    pipe = stock_pipeline(assets / "tiny-sdxl-icons", tmp_path / "icons_emb.safetensors")
    pipe.scheduler = sampler(family)

    def draw(text: str) -> np.ndarray:
        noise = torch.Generator().manual_seed(seed)
        return np.asarray(pipe(text, generator=noise, height=64, width=64, num_inference_steps=steps,
                               guidance_scale=family.guidance_scale).images[0]).astype(int)

    untrained = draw(words.rewrite(prompt))
    pipe.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE)
    theirs = pipe.encode_prompt(words.rewrite(prompt), do_classifier_free_guidance=False)
    assert same_bits({"embeds": theirs[0], "pooled": theirs[2]}, condition)
    torch.testing.assert_close(dict(settled), dict(condition), rtol=1e-5, atol=1e-5)
    image = draw(words.rewrite(prompt))
    for ours in (before, after):
        assert np.abs(np.asarray(ours).astype(int) - image).max() <= 1
    assert np.abs(untrained - image).max() > 8 < np.abs(draw(prompt) - image).max()


@pytest.mark.parametrize(("prompt", "tokens", "lost"), [("word " * 30 + "TOK", 2, "<s0>, <s1>"), ("TOK", 80, "<s75>")])
def test_new_tokens_that_every_caption_is_cut_before_are_refused(tiny_sdxl, prompt, tokens, lost):
    family = load_sdxl(tiny_sdxl)
    asked = PivotalOptions(train_text_encoder_ti=True, num_new_tokens_per_abstraction=tokens)
    with pytest.raises(UserError, match="cut off in every caption") as refused:
        text_of(family, [prompt, "a house"], pivotal=asked)
    assert lost in refused.value.problems[0].what and refused.value.exit_code == 3
    text_of(load_sdxl(tiny_sdxl), [prompt, "a TOK"], pivotal=PivotalOptions(train_text_encoder_ti=True))
