"""Weights in prompts as WebUIs write them, with long prompts, both branches, and embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from trainkit.errors import UserError
from trainkit.inference import encode_prompts, encode_weighted, load_pipeline
from trainkit.options.prompt_weights import WeightedText, escaped, read_weights, unweighted, weight_problems
from trainkit.tools import generate


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("a red dog", [("a red dog", 1)]), ("", [("", 1)]), ("a (red:1.2) dog", [("a ", 1), ("red", 1.2), (" dog", 1)]),
    ("((a)) [b] [[c]]", [("a ", 1.21), ("b ", 0.909091), ("c", 0.826446)]), ("(a (b:1.5))", [("a ", 1.1), ("b", 1.65)]),
    (r"a \(b\) \[c\] \\", [(r"a (b) [c] " "\\", 1)]), (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
    ("a (b", [("a ", 1), ("b", 1.1)]), ("a) b] :) x:2", [("a) b] :) x:2", 1)]), ("(a [b) c]", [("a ", 1.1), ("b", 1.0)]
     + [(" c", 0.909091)]), ("(a:1.0)", [("a", 1)]), ("( a : .5 )", [(" a ", 0.5)]), ("()[]", [("", 1)]),
    ("(狐:1.4),(e\u0301)", [("狐", 1.4), (",", 1), ("e\u0301", 1.1)]), ("(a:1.2.3)", [("a:1.2.3", 1.1)])])
def test_brackets_are_read_as_webuis_read_them(prompt, pieces):
    assert read_weights(prompt).pieces == tuple(pieces)


@given(st.text(alphabet="ab ()[]\\:.12,"))
def test_every_text_is_read_and_an_escaped_one_is_itself(prompt):
    read_weights(prompt)
    assert read_weights(escaped(prompt)) == unweighted(prompt)
    if not any(mark in prompt for mark in "()[]\\"):
        assert read_weights(prompt).text == prompt


def test_what_webuis_have_and_we_do_not_is_refused():
    for prompt, said in (("a <lora:dog:0.8>", "--lora FILE"), ("a [cat:dog:0.5]", "between steps"),
                         ("a [cat|dog]", "between steps"), ("(a:-1)", "weight -1"), (f"(a:{'9' * 400})", "inf")):
        problem, = weight_problems(prompt, "--prompt")
        assert said in f"{problem.what} {problem.why} {problem.fix}" and problem.where == "--prompt"
    assert not [*weight_problems(r"a \[cat:dog\], (b:1.2), [c], x:y, <3", "--prompt")]


@pytest.mark.trains
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_a_weight_moves_the_words_states_away_from_the_empty_prompts(model, clip_skip, request):
    """By this factor, in whichever chunk they are; other tokens and the pooled text stay what they are."""
    pipe, most = load_pipeline(str(request.getfixturevalue(model)), "float32"), 3
    long = "a cat, " * 40
    with torch.no_grad():
        def encoded(*prompts: str) -> dict[str, torch.Tensor]:
            return encode_weighted(pipe, [*map(read_weights, prompts)], [read_weights("(blue:1.3)")] * len(prompts),
                                   max_chunks=most, clip_skip=clip_skip)

        plain = encode_prompts(pipe, ["a red dog", f"{long}blue tree"], ["blue"] * 2, max_chunks=most,
                               clip_skip=clip_skip)
        empty = encode_prompts(pipe, [""], None, max_chunks=most, clip_skip=clip_skip)["prompt_embeds"][0]  # [77,D]
        same, weighted = (encoded(f"a ({word}) dog", f"{long}(blue{of}) tree")
                          for word, of in (("red:1.0", ":1"), ("red:1.5", ":1.5")))
        less = encoded("a (red:0.01) dog")["prompt_embeds"][0]
    assert torch.equal(same["prompt_embeds"], plain["prompt_embeds"]), "without a weight, bit for bit"
    for name in set(plain) - {"prompt_embeds", "negative_prompt_embeds"}:
        assert torch.equal(weighted[name], plain[name])
    moved = (weighted["prompt_embeds"] - plain["prompt_embeds"]).abs().amax(-1) > 1e-4  # [2,T]
    ids = pipe.tokenizer(f"{long}blue tree", add_special_tokens=False).input_ids
    one = len(pipe.tokenizer("red", add_special_tokens=False).input_ids)
    first = 1 + len(pipe.tokenizer("a", add_special_tokens=False).input_ids)
    assert moved[0].nonzero().flatten().tolist()[:one] == [*range(first, first + one)]
    assert moved[1].any() and not moved[1][:77].any() and len(ids) > 75
    at = slice(first, first + one)
    torch.testing.assert_close(weighted["prompt_embeds"][0, at],
                               (empty + 1.5 * (plain["prompt_embeds"][0, :77] - empty))[at], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(weighted["negative_prompt_embeds"], plain["negative_prompt_embeds"])
    assert (less - plain["prompt_embeds"][0, : len(less)]).abs().max() > 1e-2


@pytest.mark.trains
def test_images_with_weights_and_embeddings_in_both_prompts(tiny_sd, tmp_path):
    """A weight counts; --no_prompt_weights takes brackets as text, and so do escaped ones."""
    save_file({"emb_params": torch.ones(2, 24)}, file := tmp_path / "bad (v2).safetensors")

    def drawn(name: str, *flags: str) -> np.ndarray:
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path / name}", "--steps=1", f"--embedding={file}", *flags])
        return np.asarray(Image.open(tmp_path / name / "p01_s0.png")).astype(int)

    word = r"bad \(v2\)"
    plain = drawn("plain", f"--prompt=a dog, {word}", f"--negative_prompt={word}")
    one = drawn("one", f"--prompt=a dog, ({word}:1.0)", f"--negative_prompt=[{word}:1.0)]")
    both = [drawn(f"{i}", f"--prompt=a dog, {a}", f"--negative_prompt={b}") for i, (a, b) in enumerate((
        (f"({word}:1.6)", word), (word, f"({word}:1.6)")))]
    assert Image.open(tmp_path / "0" / "p01_s0.png").info["parameters"].startswith(rf"a dog, ({word}:1.6)")
    assert not np.array_equal(plain, one), "a bracket that is not closed"
    assert not any(np.array_equal(plain, image) for image in both) and not np.array_equal(*both)
    off = drawn("off", "--prompt=a (dog:1.5)", "--no_prompt_weights")
    written = drawn("escaped", r"--prompt=a \(dog:1.5\)")
    assert np.array_equal(off, written)
    assert Image.open(tmp_path / "off" / "p01_s0.png").info["parameters"].startswith(r"a \(dog:1.5\)")
    with pytest.raises(UserError, match="--lora FILE"):
        drawn("tag", "--prompt=a dog <lora:x:1>")


def test_weighted_pieces_that_are_not_read(tiny_sd):
    pipe = load_pipeline(str(tiny_sd), "float32")
    with torch.no_grad():
        for prompt in ("(\u200b:1.5)", "(  :0.3)", "a " * 80 + "(b:0.5)", "(!:0.5) (a:0)" + " a" * 90 + " (!:0.1)"):
            for most in (1, 2):
                embeds = encode_weighted(pipe, [read_weights(prompt)], None, max_chunks=most)["prompt_embeds"]
                assert embeds.isfinite().all() and embeds.shape[1] in (77, 154)


def test_without_compel_the_next_command_is_said(tiny_sd, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path}/out", "--prompt=a (dog)"])
    problem, = caught.value.problems
    assert "pip install compel" in problem.fix and "--no_prompt_weights" in problem.fix


def test_pieces_without_words_have_no_weight():
    text = WeightedText(((" ", 1.5), ("a dog", 1.0)))
    assert not text.is_weighted and text.text == "a dog" and text.changed(str.upper).text == "A DOG"
