"""Captions by the visit: what is kept, moved, drawn and dropped, as a function of seed, epoch and row alone."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command_lines import read as read_flags
from tests.support.command_lines import read_captioned
from tests.support.images import data_options, marked, row_of
from trainkit.condition import UNCONDITIONAL
from trainkit.data.batch import Row
from trainkit.data.caption_changes import CaptionChanges, changed, finished, make_changes
from trainkit.data.geometry import CropPolicy
from trainkit.data.loader import Images, micro_batches
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Order, Shard
from trainkit.options import CaptionOptions
from trainkit.options.captions import VARIANTS

TAGS = st.lists(st.text("abcdef ", min_size=1, max_size=6).map(str.strip).filter(bool), max_size=12)
VISITS = 4000
FAR = 4.5  # standard deviations of a binomial: one count in 150,000 is further off


def tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def row(caption: str, *others: str, **changes: object) -> Row:
    return replace(Row("a.png", Path("a.png"), caption, (8, 8), "digest", others=others), **changes)


def near(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= FAR * (n * p * (1 - p)) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# One text


@given(TAGS, st.integers(0, 14), st.integers(0, 3))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(words: list[str], keep: int, epoch: int):
    options = CaptionOptions(shuffle_caption=True, keep_tokens=keep)
    result = tags(changed(", ".join(words), options, 0, epoch))
    assert Counter(result) == Counter(words) and result[:keep] == words[:keep]


@given(TAGS, st.integers(0, 5), st.floats(0, 1), st.booleans(), st.integers(0, 3))
def test_tag_dropout_leaves_out_but_adds_nothing_and_spares_kept_tags(
    words: list[str], keep: int, rate: float, shuffle: bool, epoch: int,
):
    options = CaptionOptions(caption_tag_dropout_rate=rate, keep_tokens=keep, shuffle_caption=shuffle)
    result = tags(changed(", ".join(words), options, 0, epoch))
    assert result[:keep] == words[:keep] and not Counter(result) - Counter(words)
    if not shuffle:
        rest = iter(words)
        assert all(tag in rest for tag in result), "the order stays"
    if rate in (0, 1):
        assert len(result) == (len(words) if rate == 0 else min(keep, len(words)))


@given(TAGS, TAGS, TAGS)
def test_marks_fix_the_first_and_the_last_tags(first: list[str], middle: list[str], last: list[str]):
    caption = " ||| ".join(", ".join(part) for part in (first, middle, last))
    options = CaptionOptions(keep_tokens_separator="|||", shuffle_caption=True, caption_tag_dropout_rate=0.5)
    result = tags(changed(caption, options, 3, 1))
    assert result[: len(first)] == first and result[len(result) - len(last) :] == last
    assert not Counter(result) - Counter(first + middle + last)
    steady = changed(caption, CaptionOptions(keep_tokens_separator="|||"))
    assert tags(steady) == first + middle + last, "the mark is no part of a caption"
    one_mark = changed(" ||| ".join(map(", ".join, (first, middle))), options, 3, 1)
    assert tags(one_mark)[: len(first)] == first


def test_tags_with_the_second_separator_between_them_move_and_go_together():
    options = CaptionOptions(shuffle_caption=True, caption_tag_dropout_rate=0.3, secondary_separator=";;;")
    seen = {changed("red ;;; blue, b, c, d", options, n) for n in range(200)}
    assert all(("red, blue" in text) == ("red" in text) == ("blue" in text) and ";;;" not in text for text in seen)
    assert {"red" in text for text in seen} == {True, False}
    assert changed("a;;;b, c", CaptionOptions(secondary_separator=";;;")) == "a, b, c"


def test_another_separator_separates_and_joins():
    options = CaptionOptions(shuffle_caption=True, caption_separator=";", keep_tokens=1)
    assert {changed("a, b; c; d", options, n) for n in range(40)} == {"a, b; c; d", "a, b; d; c"}


def test_each_part_of_a_wildcard_comes_equally_often_and_each_wildcard_for_itself():
    options = CaptionOptions(enable_wildcard=True)
    seen = Counter(changed("a {red|green|} {x|y} {{b}} {alone}", options, 0, n) for n in range(VISITS))
    assert set(seen) == {" ".join(f"a {c} {d} {{b}} alone".split()) for c in ("red", "green", "") for d in "xy"}
    assert all(near(count, VISITS, 1 / 6) for count in seen.values())
    assert changed("{a|b}", CaptionOptions(), 0) == "{a|b}"


def test_all_orders_of_tags_come_equally_often():
    seen = Counter(changed("a, b, c", CaptionOptions(shuffle_caption=True), 0, n) for n in range(VISITS))
    assert len(seen) == 6 and all(near(count, VISITS, 1 / 6) for count in seen.values())


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rates_are_as_often_as_they_say(rate: float):
    options = CaptionOptions(caption_dropout_rate=rate, caption_tag_dropout_rate=rate, keep_tokens=1)
    changes = CaptionChanges(options, seed=0)
    texts = [changes(row("kept, a, b, c"), epoch) for epoch in range(VISITS)]
    dropped = texts.count(UNCONDITIONAL)
    assert near(dropped, VISITS, rate)
    left = Counter(tag for text in texts if text != UNCONDITIONAL for tag in tags(text))
    assert left["kept"] == VISITS - dropped
    assert all(near(left[tag], VISITS - dropped, 1 - rate) for tag in "abc")


def test_whole_epochs_without_captions_are_those_that_kohya_counts_from_one():
    options = CaptionOptions(caption_dropout_every_n_epochs=3)
    changes, images = CaptionChanges(options, seed=0), [row("a cat"), replace(row("a dog"), id="y")]
    dropped = {epoch for epoch in range(9) if {changes(image, epoch) for image in images} == {UNCONDITIONAL}}
    assert dropped == {2, 5, 8} and changes(images[0], 1) == "a cat"
    assert set(changes.announced(images) or ()) == {UNCONDITIONAL, "a cat", "a dog"}
    both = CaptionChanges(CaptionOptions(caption_dropout_every_n_epochs=3, caption_dropout_rate=0.5), seed=0)
    assert all(both(images[0], epoch) == UNCONDITIONAL for epoch in (2, 5, 8))
    assert near(sum(both(images[0], epoch) == UNCONDITIONAL for epoch in range(0, 3 * VISITS, 3)), VISITS, 0.5)


def test_a_text_of_which_every_tag_was_dropped_is_empty_and_not_a_dropped_caption():
    assert changed("a, b", CaptionOptions(caption_tag_dropout_rate=1.0)) == ""


# ----------------------------------------------------------------------------------------------------------------------
# By seed, epoch and row


MANY = CaptionOptions(caption_dropout_rate=0.2, shuffle_caption=True, caption_tag_dropout_rate=0.2, keep_tokens=1)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_text_is_a_function_of_seed_epoch_row_and_repeat(limit: int | None):
    rows = [row("t, a, b, c, d, e", repeat=repeat, id=name) for name in ("a.png", "b.png") for repeat in (0, 1)]
    one, same, other = (CaptionChanges(MANY, seed, limit) for seed in (1, 1, 2))
    drawn = {(i, epoch): one(rows[i], epoch) for i in range(4) for epoch in range(100)}
    assert drawn == {(i, epoch): same(rows[i], epoch) for i, epoch in reversed(drawn)}, "in any order"
    for change in (lambda i, e: other(rows[i], e), lambda i, e: drawn[i ^ 1, e], lambda i, e: drawn[i ^ 2, e]):
        assert sum(change(i, e) == text for (i, e), text in drawn.items()) < 0.6 * len(drawn)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 3))
def test_in_k_epochs_each_of_k_variants_comes_once_and_all_of_them_are_announced(limit: int, seed: int):
    options = MANY.model_copy(update={"caption_dropout_rate": 0.0})
    changes, image = CaptionChanges(options, seed, limit), row("t, a, b, c, d, e, f, g")
    turns = [Counter(changes(image, epoch) for epoch in range(start, start + limit)) for start in (0, limit, 7 * limit)]
    assert turns[0] == turns[1] == turns[2]
    assert set(turns[0]) == set(changes.examples(image)) == set(changes.announced([image]))


def test_repeats_of_an_image_share_its_variants_and_are_at_others_of_them():
    changes = CaptionChanges(MANY.model_copy(update={"caption_dropout_rate": 0.0}), 0, 4)
    repeats = [row("t, a, b, c, d, e, f, g", repeat=i) for i in range(6)]
    announced = changes.announced(repeats)
    assert len(set(announced)) <= 4
    assert all({changes(one, epoch) for epoch in range(4)} == set(announced) for one in repeats)
    assert len({changes(one, 0) for one in repeats}) > 1


def test_what_may_be_asked_is_announced_with_several_captions_and_without_changes():
    image = row("a, b", "c, d", "e")
    for options in (CaptionOptions(), CaptionOptions(secondary_separator=","), MANY):
        changes = make_changes(options, [image], seed=0, live=False)
        assert {changes(image, epoch) for epoch in range(300)} == set(changes.announced([image]))
    assert CaptionChanges(CaptionOptions(), 0).announced([image]) == ["a, b", "c, d", "e"]


def test_text_encoders_that_train_to_the_end_read_a_new_text_at_every_visit():
    image = row(", ".join("abcdefgh"))
    free, limited = (make_changes(options, [image], seed=0, live=True) for options in (
        CaptionOptions(shuffle_caption=True), CaptionOptions(shuffle_caption=True, caption_variants=2)))
    assert free.announced([image]) is None and len({free(image, epoch) for epoch in range(100)}) > 90
    assert len({limited(image, epoch) for epoch in range(100)}) == 2
    assert make_changes(CaptionOptions(caption_dropout_rate=0.5), [image], seed=0, live=True).announced([image])


def test_the_default_number_of_variants_is_in_the_log(caplog: pytest.LogCaptureFixture):
    images = [row("a, b", id=name, repeat=repeat) for name in ("a", "b", "c") for repeat in (0, 1)]
    with caplog.at_level(logging.INFO):
        changes = make_changes(CaptionOptions(shuffle_caption=True), images, seed=0, live=False)
        make_changes(CaptionOptions(caption_dropout_rate=0.1, caption_variants=3), images, seed=0, live=False)
    assert changes.limit == VARIANTS
    message, = (record.getMessage() for record in caplog.records)
    assert f"--caption_variants {VARIANTS}" in message and f"{3 * VARIANTS} texts" in message


def test_captions_of_class_images_stay_as_they_are():
    changes = CaptionChanges(MANY.model_copy(update={"caption_dropout_rate": 1.0}), 0, 4)
    image = row("a dog, red, blue", is_class=True)
    assert {changes(image, epoch) for epoch in range(50)} == set(changes.examples(image)) == {"a dog, red, blue"}


def test_ranks_workers_and_a_resume_draw_the_same_texts(tmp_path: Path):
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        marked(1, 40, 40).save(tmp_path / name)
    rows = [row_of(tmp_path / name, caption=f"{name}, a, b, c, d, e") for name in names]
    images = Images(rows, CropPolicy(resolution=32), seed=3, captions=CaptionChanges(MANY, 3, 4))
    order = Order(rows, 4, seed=1)

    def prompts(rank: int = 0, world: int = 1, **how: int) -> list[tuple[str, ...]]:
        steps = micro_batches(images, order, Shard(rank, world), stop_step=8, **how)
        return [sum((batch.prompts for batch in batches), ()) for _, batches in steps]

    whole = prompts()
    assert any(UNCONDITIONAL in texts for texts in whole) and len({text for texts in whole for text in texts}) > 10
    assert whole == prompts(num_workers=2) and whole[5:] == prompts(start_step=5)
    assert whole == [a + b for a, b in zip(prompts(rank=0, world=2), prompts(rank=1, world=2), strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# As they are read


def folder(path: Path, **captions: str) -> Path:
    for number, (name, text) in enumerate(captions.items()):
        marked(number, 40, 40).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(text, "utf-8")
    return path


def read(path: Path, **flags: object) -> tuple[dict[str, tuple[str, ...]], list]:
    rows, problems = read_rows(data_options(instance_data_dir=path), CaptionOptions(**flags))
    return {row.id.removesuffix(".png"): row.all_captions for row in rows}, problems


def test_prefix_and_suffix_stand_around_every_caption(tmp_path: Path):
    folder(tmp_path, a="a fox", b="")
    captions, problems = read(tmp_path, caption_prefix="TOK, ", caption_suffix=", flat")
    assert captions == {"a": ("TOK, a fox , flat",), "b": ("TOK, a photo of TOK , flat",)} and not problems


def test_lines_are_one_caption_or_with_wildcards_several(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder(tmp_path, a="a fox\n\n  red  \n", b="one", c="x {1|2}")
    assert read(tmp_path)[0] == {"a": ("a fox red",), "b": ("one",), "c": ("x {1|2}",)}
    several, braces = (record.getMessage() for record in caplog.records if "--enable_wildcard" in record.getMessage())
    assert "1 image" in several and "several lines" in several and "a.png" in several
    assert "wildcards" in braces and "c.png" in braces
    caplog.clear()
    captions, problems = read(tmp_path, enable_wildcard=True, caption_prefix="TOK")
    assert captions["a"] == ("TOK a fox", "TOK red") and not problems and "enable_wildcard" not in caplog.text


def test_prompt_weights_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder(tmp_path, a="a (fox:1.2), b", b="a (red fox: .5)", c="a fox (12:30 pm), b: 3")
    read(tmp_path)
    record, = (record for record in caplog.records if "prompt weights" in record.getMessage())
    assert "2 images" in record.getMessage() and "plain text" in record.getMessage()


@pytest.mark.parametrize("caption", ["a {b|c", "a b}", "{a|{b|c} }", "{{a|b}"])
def test_braces_without_a_partner_are_refused_in_one_message(tmp_path: Path, caption: str):
    folder(tmp_path, a=caption, b="{c|d} {{e}}")
    problem, = read(tmp_path, enable_wildcard=True)[1]
    assert "1 caption has braces" in problem.what and "a.png" in problem.why and "b.png" not in problem.why
    assert "--enable_wildcard" in problem.where and not read(tmp_path)[1]


def test_captions_are_read_from_files_of_the_ending_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder(tmp_path, a="of txt", b="of txt", c="of txt")
    (tmp_path / "a.caption").write_text("of caption", "utf-8")
    (tmp_path / "b.words").write_text("of words", "utf-8")
    assert read(tmp_path)[0] == dict.fromkeys("abc", ("of txt",))
    captions, problems = read(tmp_path, caption_extension="caption")
    assert captions == {"a": ("of caption",), "b": ("a photo of TOK",), "c": ("a photo of TOK",)} and not problems
    captions, problems = read(tmp_path, caption_extension=".Words")
    assert captions["b"] == ("of words",) and captions["a"] == ("a photo of TOK",) and not problems
    assert "captions are in .words files" in caplog.text
    rows, _ = read_rows(data_options(instance_data_dir=tmp_path), compat="kohya")
    assert rows[0].caption == "of caption" and rows[1].caption == "a photo of TOK", "kohya's default"


def test_no_flag_no_change():
    rows = [row("a, b  {c|d} ||| ;;;", "x")]
    assert finished(rows, CaptionOptions()) == (rows, [])
    assert changed(rows[0].caption, CaptionOptions(), 0) == rows[0].caption


@pytest.mark.parametrize(("flag", "value"), [
    ("caption_dropout_rate", 1.2), ("caption_dropout_rate", -0.1), ("caption_dropout_every_n_epochs", -1),
    ("caption_tag_dropout_rate", 7), ("keep_tokens", -1),
    ("caption_variants", 0), ("max_token_length", 77), ("max_token_length", 300), ("caption_extension", "a/b"),
    ("caption_extension", ".a.txt")])
def test_values_out_of_range_are_refused(flag: str, value: object):
    with pytest.raises(ValueError, match=flag):
        CaptionOptions(**{flag: value})


def test_flags_that_others_make_idle_or_meaningless_are_told():
    assert any("--keep_tokens has no effect" in told and "--shuffle_caption" in told
               for told in read_flags("--keep_tokens=2").notices())
    assert any("--caption_variants" in told for told in read_flags("--caption_variants=2").notices())
    assert not read_flags("--keep_tokens=2", "--caption_tag_dropout_rate=0.1", "--caption_variants=2").notices()
    classes = ("--dist_match_gain=0.3", "--dist_match_kernel=class", "--max_train_steps=9")
    assert not [*read_captioned(*classes).problems()]
    for flag in ("--shuffle_caption", "--caption_dropout_rate=0.1", "--enable_wildcard"):
        problem, = read_captioned(*classes, flag).problems()
        assert flag.partition("=")[0] in problem.what and "same caption" in problem.why


def test_a_checkpoint_from_before_these_flags_can_be_resumed_from():
    assert CaptionOptions().decisive() == {} == CaptionOptions(caption_prefix="TOK").decisive()
    assert CaptionOptions(shuffle_caption=True, keep_tokens=1).decisive() == {
        "--shuffle_caption": True, "--keep_tokens": 1}
