"""Pivotal tuning: words are whole, only new rows train, stock pipelines read the file and see what training saw."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tests.support.text import load_sdxl, stock_pipeline
from tests.support.tiny_models import build_tiny_sdxl
from trainkit.condition import Condition
from trainkit.conditioning import new_tokens
from trainkit.conditioning.new_tokens import NewTokens, TokenRows
from trainkit.errors import UserError
from trainkit.families import sdxl
from trainkit.families.tokenize import chunked
from trainkit.files import load_tensors
from trainkit.optim import HinaAdaptive
from trainkit.options import PivotalOptions

PROMPTS = ["a photo of a TOK dog", "TOK", "in the style of TOK, TOK's house"]


def options(**changes: object) -> PivotalOptions:
    return PivotalOptions(train_text_encoder_ti=True, **changes)


def encode(family: sdxl.SDXL, tokens: NewTokens, prompts: list[str]) -> Condition:
    return family.encode_prompts([tokens.rewrite(p) for p in prompts])


# ----------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(("words", "prompt", "rewritten"), [
    ("TOK", "a TOK, TOK's and (TOK)", "a <s0><s1>, <s0><s1>'s and (<s0><s1>)"),
    ("TOK", "TOK2 aTOK TOK_x TOKé Tok", "TOK2 aTOK TOK_x TOKé Tok"),
    ("TOK,TOK2,TOK3", "TOK TOK2 TOK3", "<s0><s1> <s2><s3> <s4><s5>"),
    ("TOK2,TOK", "TOK2 TOK", "<s0><s1> <s2><s3>"),
    ("my dog , дом", "my dog by дом, my doggy", "<s0><s1> by <s2><s3>, my doggy"),
    ("a.b", "a.b axb", "<s0><s1> axb"),
    ("s0,s1", "s0 s1", "<s0><s1> <s2><s3>"),
])
def test_d16_words_are_replaced_as_wholes_and_in_one_pass(words, prompt, rewritten):
    assert options(token_abstraction=words).rewrite(prompt) == rewritten


def test_without_pivotal_tuning_a_word_is_a_word():
    assert PivotalOptions().rewrite("a TOK") == "a TOK"


@pytest.mark.parametrize(("share", "total", "steps"), [
    (0.5, 3, 2), (0.5, 1, 1), (0.07, 100, 7), (0.7, 10, 7), (1e-5, 1000, 1), (1, 7, 7)])
def test_d15_the_pivot_is_a_share_of_the_steps_rounded_up(share, total, steps):
    assert options(train_text_encoder_ti_frac=share).stop(total) == steps


@pytest.mark.parametrize(("changes", "captions", "what"), [
    (dict(), ["a dog", "TOK2"], "no caption contains TOK"),
    (dict(token_abstraction="TOK,ZED"), ["a TOK", "a TOK too"], "no caption contains ZED"),
    (dict(token_abstraction="A,B"), ["a"], "no caption contains A or B"),
    (dict(token_abstraction="TOK,TOK"), ["TOK"], "listed twice"),
    (dict(token_abstraction=" , "), ["TOK"], "no word is listed"),
    (dict(initializer_concept="dog,cat"), ["TOK"], "2 concepts for 1 words"),
])
def test_what_would_learn_nothing_is_refused(changes, captions, what):
    problem, = new_tokens.problems(options(**changes), captions)
    assert what in problem.what and "--token_abstraction" in problem.where and problem.fix


@pytest.mark.parametrize(("changes", "captions"), [
    (dict(), ["a dog", "TOK"]), (dict(token_abstraction="A,B", initializer_concept="dog,"), ["A by B"]),
    (dict(), ["written out: <s0><s1>"])])
def test_one_caption_with_the_word_is_enough(changes, captions):
    assert not list(new_tokens.problems(options(**changes), captions))
    assert not list(new_tokens.problems(PivotalOptions(), ["no word"]))


def rows_of(*captions: str, classes: Sequence[str] = (), repeats: int = 1) -> list[SimpleNamespace]:
    """Rows as far as the warnings read them: images of the concept, and of its class."""
    instances = [SimpleNamespace(caption=caption, is_class=False, repeat=k)
                 for caption in captions for k in range(repeats)]
    return instances + [SimpleNamespace(caption=caption, is_class=True, repeat=0) for caption in classes]


def test_captions_without_a_word_are_counted_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        new_tokens.warn(options(), rows_of("a TOK", "written out: <s0><s1>"))
        assert not caplog.text
        new_tokens.warn(options(), rows_of("a TOK", "a dog", "a cat", classes=["a dog"] * 5, repeats=3))
    message, = caplog.messages
    assert "2 of 3 captions" in message and "'a dog'" in message, "repeats and class images do not count"


def test_a_word_in_captions_of_class_images_is_said_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        new_tokens.warn(options(), rows_of("a TOK", classes=["a dog"]))
        assert not caplog.text
        new_tokens.warn(options(), rows_of("a TOK", classes=["a dog", "a TOK dog"]))
    message, = caplog.messages
    assert "1 caption of class images" in message and "'a TOK dog'" in message


def test_both_are_said_of_one_run_and_neither_without_new_tokens(caplog):
    rows = rows_of("a dog", classes=["a TOK dog"])
    with caplog.at_level(logging.WARNING):
        new_tokens.warn(PivotalOptions(), rows)
        assert not caplog.text
        new_tokens.warn(options(), rows)
    assert ["class images" in message for message in caplog.messages] == [False, True]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_random_rows_have_the_vocabularys_std_and_follow_from_seed_and_name(tiny_sdxl):
    def rows(seed: int, n: int) -> dict[str, torch.Tensor]:
        return NewTokens(load_sdxl(tiny_sdxl), options(num_new_tokens_per_abstraction=n), seed=seed).embeddings

    many, few, other = rows(0, 60), rows(0, 2), rows(1, 2)
    family = load_sdxl(tiny_sdxl)
    for name, encoder in zip(new_tokens.ENCODERS, family.text_encoders, strict=True):
        table = encoder.get_input_embeddings().weight
        assert many[name].std().item() == pytest.approx(float(table.std()), rel=0.1)
        assert few[name].shape == (2, table.shape[1]) and few[name].dtype == torch.float32
        assert torch.equal(many[name][:2], few[name]) and not torch.equal(few[name], other[name])
    assert not torch.equal(few["clip_l"][0], few["clip_l"][1])


def test_a_concept_gives_the_first_rows(tiny_sdxl):
    family = load_sdxl(tiny_sdxl)
    tokenizer, table = family.tokenizers[0], family.text_encoders[0].get_input_embeddings().weight
    dog, cat, toy = (table[tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("dog", "cat", "toy"))
    rows = lambda concept, n: torch.stack(new_tokens.rows_of(concept, tokenizer, table, n=n))  # noqa: E731
    assert torch.equal(rows("dog", 2), torch.stack([dog, dog]))
    assert torch.equal(rows("dog cat", 3), torch.stack([dog, cat, dog]))
    torch.testing.assert_close(rows("dog cat toy", 2), torch.stack([(dog + cat) / 2, toy]))
    mixed = NewTokens(family, options(token_abstraction="A,B", initializer_concept="dog,"), seed=0).embeddings["clip_l"]
    assert torch.equal(mixed[:2], torch.stack([dog, dog])) and not torch.equal(mixed[2], mixed[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_look_up_and_learn_as_those_of_a_longer_table(dtype):
    torch.manual_seed(0)
    table, rows = torch.nn.Embedding(10, 4, dtype=dtype).requires_grad_(False), torch.randn(3, 4)
    part = TokenRows(table, rows, first=10)
    longer = torch.nn.Embedding.from_pretrained(torch.cat([table.weight, rows.to(dtype)]), freeze=False)
    ids, weights = torch.tensor([[1, 10, 11, 9], [12, 12, 0, 10]]), torch.randn(2, 4, 4, dtype=dtype)
    assert part(ids).dtype == dtype and part.rows.dtype == torch.float32
    assert torch.equal(part(ids), longer(ids))
    for layer in (part, longer):
        (layer(ids) * weights).sum().backward()
    torch.testing.assert_close(part.rows.grad.to(dtype), longer.weight.grad[10:])
    assert table.weight.grad is None


def test_encoders_with_new_rows_agree_with_pefts_trainable_tokens(tiny_sdxl):
    from peft import TrainableTokensConfig, get_peft_model

    family = load_sdxl(tiny_sdxl)
    tokens = NewTokens(family, options(), seed=0)
    for k, name in enumerate(new_tokens.ENCODERS):
        tokenizer, overlay = family.tokenizers[k], family.text_encoders[k].get_input_embeddings()
        other = copy.deepcopy(load_sdxl(tiny_sdxl).text_encoders[k])
        other.resize_token_embeddings(len(tokenizer))
        other.get_input_embeddings().weight.data[overlay.first :] = tokens.embeddings[name]
        new = tokenizer.convert_tokens_to_ids(tokens.names)
        oracle = get_peft_model(other, TrainableTokensConfig(token_indices=new, target_modules=["token_embedding"]))
        ids = chunked([tokenizer], [tokens.rewrite(p) for p in PROMPTS]).ids[0]
        outs = [model(ids).last_hidden_state for model in (family.text_encoders[k], oracle)]
        assert torch.equal(*outs)
        weights = torch.randn_like(outs[0])
        for out in outs:
            (out * weights).sum().backward()
        delta, = (p for p in oracle.parameters() if p.requires_grad)
        torch.testing.assert_close(overlay.rows.grad, delta.grad)


def test_d12_the_vocabulary_has_no_gradient_and_keeps_every_bit(tiny_sdxl):
    family = load_sdxl(tiny_sdxl)
    before = [encoder.get_input_embeddings().weight.clone() for encoder in family.text_encoders]
    tokens = NewTokens(family, options(), seed=0)
    rows = tokens.rows
    trained = [p for encoder in family.text_encoders for p in encoder.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(r) for r in rows}, "nothing else has a gradient or optimizer state"
    optimizer = torch.optim.AdamW(rows, lr=0.1, weight_decay=0.5)
    first = [r.detach().clone() for r in rows]
    for _ in range(3):
        condition = encode(family, tokens, PROMPTS)
        (condition["embeds"].square().mean() + condition["pooled"].square().mean()).backward()
        optimizer.step()
        tokens.after_update()
        optimizer.zero_grad()
    tables = [encoder.get_input_embeddings().table.weight for encoder in family.text_encoders]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, tables, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, rows, strict=True))


def test_an_optimizer_that_asks_for_names_knows_new_tokens_by_them(tiny_sdxl):
    tokens = NewTokens(load_sdxl(tiny_sdxl), options(), seed=0)
    group, = tokens.groups(lrs=(1e-4, 1e-4), weight_decay=0.0, stop=None)
    named = list(zip(group["names"], group["params"], strict=True))
    active = HinaAdaptive(named, use_spd=True, lora_rank_penalty=True).get_optimization_info()["active_on"]
    assert active["use_spd"] == "2 of 2 tensors, drawn to their start"
    assert active["lora_rank_penalty"] == "0 of 2 tensors: its rows are tokens"


@pytest.mark.parametrize("power", [0.1, 0.0, 1.0])
def test_the_pull_is_upstreams_power_of_the_ratio_of_stds(tiny_sdxl, power):
    tokens = NewTokens(load_sdxl(tiny_sdxl), options(token_std_pull=power), seed=0)
    for rows in tokens.rows:
        rows.data.mul_(3)
    before = {name: rows.clone() for name, rows in tokens.embeddings.items()}
    tokens.after_update()
    for (name, rows), std in zip(tokens.embeddings.items(), tokens.stds, strict=True):
        torch.testing.assert_close(rows, before[name] * (std / before[name].std()) ** power)
    if power == 1:
        assert tokens.embeddings["clip_g"].std().item() == pytest.approx(tokens.stds[1], rel=1e-5)
    pulled = {name: rows.clone() for name, rows in tokens.embeddings.items()}
    tokens.after_update()
    assert all(torch.equal(rows, pulled[name]) for name, rows in tokens.embeddings.items()), "nothing moved them"


def test_a_model_that_has_such_tokens_already_is_refused(tiny_sdxl):
    family = load_sdxl(tiny_sdxl)
    family.tokenizers[1].add_tokens(["<s1>"])
    with pytest.raises(UserError, match="has the tokens <s1> already"):
        NewTokens(family, options(), seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_d7_the_file_goes_into_any_folder_and_says_what_its_rows_are(tiny_sdxl, tmp_path):
    tokens = NewTokens(load_sdxl(tiny_sdxl), options(token_abstraction="TOK,ZED"), seed=0)
    folder = tmp_path / "deep" / "run"
    folder.mkdir(parents=True)
    path, = tokens.export(folder, "icons")
    assert path == folder / "icons_emb.safetensors"
    read = load_tensors(path)
    assert list(read) == ["clip_g", "clip_l"] or list(read) == ["clip_l", "clip_g"]
    assert all(torch.equal(read[k], v) and v.dtype == torch.float32 for k, v in tokens.embeddings.items())
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["tokens"]) == {"TOK": ["<s0>", "<s1>"], "ZED": ["<s2>", "<s3>"]}
    assert header["base_model"] == tiny_sdxl.name and "/" not in header["base_model"]
    assert new_tokens.read_header(path) == new_tokens.EmbeddingsHeader(tokens.options.tokens, sets_eos=False)


def test_a_file_that_differs_from_the_rows_is_found_out(tiny_sdxl, tmp_path, monkeypatch):
    tokens = NewTokens(load_sdxl(tiny_sdxl), options(), seed=0)
    monkeypatch.setattr(new_tokens, "load_tensors", lambda path: {k: v + 1e-6 for k, v in tokens.embeddings.items()})
    with pytest.raises(UserError, match="does not hold the trained embeddings") as caught:
        tokens.export(tmp_path, "icons")
    assert caught.value.exit_code == 74


def test_another_programs_file_has_tokens_by_their_number(tmp_path):
    from safetensors.torch import save_file

    save_file({"clip_l": torch.zeros(3, 4), "clip_g": torch.zeros(3, 6)}, tmp_path / "e.safetensors")
    assert new_tokens.read_header(tmp_path / "e.safetensors").tokens == {"": ["<s0>", "<s1>", "<s2>"]}


def test_d6_rows_outlive_a_restart_and_other_tokens_are_refused(tiny_sdxl):
    tokens = NewTokens(load_sdxl(tiny_sdxl), options(), seed=0)
    tensors, data = tokens.pack()
    again = NewTokens(load_sdxl(tiny_sdxl), options(), seed=1)
    again.unpack(tensors, json.loads(json.dumps(data)))
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), again.embeddings.values(), strict=True))
    with pytest.raises(UserError, match="other new tokens"):
        NewTokens(load_sdxl(tiny_sdxl), options(num_new_tokens_per_abstraction=3), seed=0).unpack(tensors, data)


# ----------------------------------------------------------------------------------------------------------------------
# The stock pipeline


@pytest.mark.parametrize("words", ["TOK", "TOK,style"])
def test_the_stock_pipeline_encodes_prompts_bit_for_bit_after_two_calls(tiny_sdxl, tmp_path, words):
    family = load_sdxl(tiny_sdxl)
    tokens = NewTokens(family, options(token_abstraction=words), seed=0)
    path, = tokens.export(tmp_path, "icons")
    assert not new_tokens.read_header(path).sets_eos
    with torch.no_grad():
        ours = encode(family, tokens, PROMPTS)
        pipe = stock_pipeline(tiny_sdxl, path)
        theirs = pipe.encode_prompt([tokens.rewrite(p) for p in PROMPTS], do_classifier_free_guidance=False)
    assert torch.equal(ours["embeds"], theirs[0]) and torch.equal(ours["pooled"], theirs[2])


def test_d11_with_eos_2_in_the_config_the_cards_line_makes_the_stock_pipeline_agree(tmp_path):
    folder = build_tiny_sdxl(tmp_path / "old", eos_in_config=False)
    family = load_sdxl(folder)
    tokens = NewTokens(family, options(), seed=0)
    path, = tokens.export(tmp_path, "icons")
    assert new_tokens.read_header(path).sets_eos
    pipe, prompts = stock_pipeline(folder, path), [tokens.rewrite(p) for p in PROMPTS]
    with torch.no_grad():
        ours = encode(family, tokens, PROMPTS)
        before = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        exec(new_tokens.EOS_LINE, {"pipe": pipe})
        after = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(ours["embeds"], after[0]) and torch.equal(ours["pooled"], after[2])
    assert not torch.equal(ours["pooled"], before[2]), "the pooled vector was that of a new token"
    compat = load_sdxl(folder, compat="diffusers")
    assert not compat.sets_eos
    other = NewTokens(compat, options(), seed=0)
    with torch.no_grad():
        assert torch.equal(encode(compat, other, PROMPTS)["pooled"], before[2])
