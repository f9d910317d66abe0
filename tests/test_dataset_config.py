"""Files that name several sources: kohya's own examples, every key of its schema, and what is said about the rest."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_lines import Options, read_captioned
from tests.support.command_lines import read as read_flags
from tests.support.images import data_options, marked
from tests.support.trainers import command, forked
from trainkit.condition import UNCONDITIONAL
from trainkit.data import caption_changes, sampler
from trainkit.data.geometry import CropPolicy
from trainkit.data.rows import Rows, read_rows
from trainkit.data.sources.parts import sources_of
from trainkit.errors import Problem, UserError
from trainkit.options import CaptionedDataOptions, CaptionOptions, PriorOptions, parse
from trainkit.options.dataset_config import KNOWN, RENAMED, WITHOUT
from trainkit.run_fingerprint import contents

# Source: the examples of kohya-ss/sd-scripts, docs/config_README-en.md at 48d368f; only the paths are ours.
FIRST = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  # This subset uses keep_tokens = 2 (the value of the parent datasets)

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
  # This subset uses keep_tokens = 1 (the value of [general])
"""
TWICE = """
[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = 'hoge'

[[datasets]]
resolution = 768

  [[datasets.subsets]]
  image_dir = 'hoge'
"""
MARKS = """
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;" # subset 側に書くこともできます / can be written in the subset side
enable_wildcard = true # 同上 / same as above

  [[datasets.subsets]]
  image_dir = "hoge"
  num_repeats = 1

  # ||| の前後はカンマは不要です（自動的に追加されます） / No comma is required before and after |||
  caption_prefix = "1girl, hatsune miku, vocaloid |||"
  caption_suffix = ", anime screencap ||| masterpiece, rating: general"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the examples, two images each, and the current folder."""
    for number, name in enumerate(("hoge", "fuga", "reg", "piyo")):
        (tmp_path / name).mkdir()
        for i in range(2):
            marked(10 * number + i, 40, 40).save(tmp_path / name / f"{i}.png")
    (tmp_path / "hoge" / "0.txt").write_text("hoge girl, smile, sky\n")
    entries = {"0.png": {"caption": "a frog", "tags": "green, sitting"}, "1": {"tags": "animal"}}
    (tmp_path / "piyo" / "piyo_md.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str | bytes, name: str = "data.toml") -> Path:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Path(name)


def rows_of(text: str | bytes, name: str = "data.toml", **options: object) -> tuple[Rows, list[Problem]]:
    return read_rows(CaptionedDataOptions(dataset_config=str(written(text, name)), **options))


def problems_of(text: str | bytes, name: str = "data.toml") -> list[Problem]:
    return rows_of(text, name)[1]


# ------------------------------------------------------------------------------------------------------- the examples


def test_the_first_example_of_kohyas_page_is_read_as_it_says(project: Path) -> None:
    rows, problems = rows_of(FIRST)
    assert not problems
    assert [(row.id, row.caption, row.is_class, row.cut) for row in rows] == [
        ("hoge/0.png", "hoge girl, smile, sky", False, (512, 512)), ("hoge/1.png", "hoge girl", False, (512, 512)),
        ("fuga/0.png", "fuga boy", False, (512, 512)), ("fuga/1.png", "fuga boy", False, (512, 512)),
        ("piyo/0.png", "a frog, green, sitting", False, (768, 768)), ("piyo/1.png", "animal", False, (768, 768)),
        ("reg (class)/0.png", "human", True, (512, 512)), ("reg (class)/1.png", "human", True, (512, 512))]
    assert [row.handling.captions.keep_tokens for row in rows if row.handling] == [2, 2, 3, 3, 1, 1, 1, 1]
    assert all(row.handling.captions.shuffle_caption for row in rows if row.handling)
    assert [row.handling.batch_size for row in rows if row.handling] == [4, 4, 4, 4, 2, 2, 4, 4]
    assert rows.per_epoch == 6 and rows.account.images == 6


def test_one_folder_in_two_data_sets_is_trained_on_at_both_sizes(project: Path, caplog) -> None:
    rows, problems = rows_of(TWICE)
    assert not problems and "more than once" not in caplog.text
    assert Counter(row.cut for row in rows) == {(512, 512): 2, (768, 768): 2} and len({row.id for row in rows}) == 4


def test_the_example_with_marks_gives_each_value_to_its_flag(project: Path) -> None:
    data = data_options(dataset_config=written(MARKS), instance_prompt=None)
    part, = sources_of(data, CaptionOptions()).parts
    assert part.data.random_flip and part.data.enable_bucket and part.data.bucket_no_upscale
    assert part.data.resolution == 1024 and part.data.repeats == 1 and part.settings and part.settings.batch_size == 6
    expected = CaptionOptions(
        caption_extension=".txt", keep_tokens_separator="|||", shuffle_caption=True, caption_tag_dropout_rate=0.1,
        secondary_separator=";;;", enable_wildcard=True, caption_prefix="1girl, hatsune miku, vocaloid |||",
        caption_suffix=", anime screencap ||| masterpiece, rating: general")
    assert part.captions == expected


def test_json_says_the_same(project: Path) -> None:
    config = {"general": {"num_repeats": 3}, "datasets": [{"resolution": [64, 32], "subsets": [{"image_dir": "hoge"}]}]}
    rows, problems = rows_of(json.dumps(config), "data.json")
    assert not problems and len(rows) == 6 and {row.cut for row in rows} == {(32, 64)}


def test_the_flags_of_the_run_are_what_all_sources_say_and_the_largest_size_and_batch(project: Path) -> None:
    flags = ["--pretrained_model_name_or_path=m", f"--dataset_config={written(FIRST)}", "--train_batch_size=1"]
    for opt in (read_flags(*flags), read_captioned(*flags)):
        assert opt.data.resolution == 768 and opt.run.train_batch_size == 4
        assert opt.captions.shuffle_caption and opt.captions.keep_tokens == 0, "it differs between sources"
        assert any("--train_batch_size 1 is not used: data.toml says 4" in notice for notice in opt.notices())


# -------------------------------------------------------------------------------------------------------------- keys

# Of every schema in library/config_util.py at 48d368f.
SCHEMA = re.findall(r"\w+", """
    color_aug face_crop_aug_range flip_aug num_repeats random_crop shuffle_caption keep_tokens keep_tokens_separator
    secondary_separator caption_separator enable_wildcard token_warmup_min token_warmup_step caption_prefix
    caption_suffix custom_attributes resize_interpolation caption_dropout_every_n_epochs caption_dropout_rate
    caption_tag_dropout_rate caption_extension class_tokens cache_info image_dir is_reg alpha_mask metadata_file
    conditioning_data_dir batch_size bucket_no_upscale bucket_reso_steps enable_bucket max_bucket_reso min_bucket_reso
    validation_seed validation_split resolution network_multiplier""")


@pytest.mark.parametrize("key", SCHEMA)
def test_every_key_of_kohyas_schema_is_read_or_answered(key: str) -> None:
    assert key in KNOWN or key in RENAMED or key in WITHOUT


@pytest.mark.parametrize("line, word", [
    ("color_aug = true", "colours"), ("face_crop_aug_range = [1.0, 3.0]", "faces"),
    ("token_warmup_step = 100", "caption_tag_dropout_rate"), ("validation_split = 0.1", "validation_prompt"),
    ("network_multiplier = 0.5", "loss_weight"), ("shufle_caption = true", "did you mean shuffle_caption"),
    ("num_repeat = 2", "did you mean num_repeats"), ("max_token_length = 225", "remove it"),
    ("image_dir = 'x'", "[[datasets.subsets]]"), ("is_reg = true", "[[datasets.subsets]]"),
    ("flip_aug = 'yes'", "true or false"), ("batch_size = 0", "from 1"), ("num_repeats = 1.5", "whole number"),
    ("resolution = 'big'", "1024"), ("resize_interpolation = 'magic'", "lanczos"), ("caption_prefix = 3", "quotes"),
    ("keep_tokens = -1", "greater than or equal to 0"), ("caption_dropout_rate = 2", "less than or equal to 1")])
def test_a_value_that_cannot_be_honoured_is_refused_by_name(project: Path, line: str, word: str) -> None:
    problem, = problems_of(f"[[datasets]]\n{line}\n[[datasets.subsets]]\nimage_dir = 'hoge'\n")
    assert line.partition(" ")[0] in problem.what and word in f"{problem.why} {problem.fix}"
    assert "data.toml" in problem.where and "1" in problem.where


def test_keys_that_ask_for_nothing_are_accepted(project: Path) -> None:
    keys = "color_aug = false\ntoken_warmup_min = 1\ntoken_warmup_step = 0\ncache_info = true\nvalidation_seed = 3\n" \
           "validation_split = 0.0\nnetwork_multiplier = 1.0\nalpha_mask = false\n"
    assert problems_of(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'hoge'\nclass_tokens = 'x'\n{keys}") == []


@pytest.mark.parametrize("text, word", [
    ("[genera]\nx = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='hoge'", "did you mean general"),
    ("resolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='hoge'", "move it below [general]"),
    ("[datasets]\nresolution = 512", "[[datasets]]"), ("[[datasets]]\nresolution = 512", "[[datasets.subsets]]"),
    ("", "[[sources]]"), ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = \"C:\\hoge\"", "single quotes"),
    ("[[datasets]]\nresolution = 512\nresolution = 768", "twice"), ("[[datasets]\n", "correct"),
    ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", "image_dir"),
    ("[[sources]]\nimage_dir = 'hoge'\ndataset_name = 'x'", "remove image_dir"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='hoge'\n[[datasets.subsets]]\nmetadata_file='x.json'",
     "[[datasets]] of their own"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='hoge'\nis_reg=true\nclass_tokens='x'", "without is_reg"),
    ("[[sources]]\nimage_dir='nowhere'", "FOLDER")])
def test_what_is_wrong_with_a_file_is_told_with_its_fix(project: Path, text: str, word: str) -> None:
    assert word in " ".join(f"{problem.why} {problem.fix}" for problem in problems_of(text))


def test_a_file_that_is_not_there_and_one_of_another_kind_are_told(project: Path) -> None:
    for name, word in (("no.toml", "put the file there"), ("data.yaml", ".toml, .json")):
        Path("data.yaml").write_text("x: 1")
        problem, = read_rows(CaptionedDataOptions(dataset_config=name))[1]
        assert word in f"{problem.why} {problem.fix}"
    with pytest.raises(UserError, match="put the file there"):
        read_flags("--pretrained_model_name_or_path=m", "--dataset_config=no.toml")


def test_every_problem_comes_at_once(project: Path) -> None:
    found = problems_of("[general]\ncolour = 1\n[[datasets]]\ncolor_aug = true\n[[datasets.subsets]]\nrepeat = 2\n")
    assert len(found) == 4, "two keys, a value, and no image_dir"


# ------------------------------------------------------------------------------------------------------- hostile cases


def test_a_mark_crlf_and_other_alphabets_change_nothing(project: Path) -> None:
    (project / "犬 の画像").mkdir()
    marked(1, 40, 40).save(project / "犬 の画像" / "é.png")
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '犬 の画像'\nclass_tokens = '柴犬'\n"
    plain, problems = rows_of(text)
    assert not problems and plain[0].caption == "柴犬" and plain[0].id == "犬 の画像/é.png"
    for data in (b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        assert rows_of(data)[0] == plain


def test_a_relative_folder_counts_from_the_current_one_and_else_from_the_file(project: Path, monkeypatch, caplog
                                                                           ) -> None:
    text = "[[sources]]\nimage_dir = 'hoge'\nprompt = 'x'\n"
    written(text)
    rows, _ = read_rows(CaptionedDataOptions(dataset_config=str(project / "data.toml")))
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    again, problems = read_rows(CaptionedDataOptions(dataset_config="../data.toml"))
    assert not problems and [row.id for row in again] == [row.id for row in rows] and "beside data.toml" in caplog.text
    (project / "elsewhere" / "hoge").mkdir()
    marked(99, 50, 50).save(project / "elsewhere" / "hoge" / "mine.png")
    assert [row.id for row in read_rows(CaptionedDataOptions(dataset_config="../data.toml"))[0]] == ["hoge/mine.png"]


def test_an_empty_folder_is_refused_and_zero_repeats_switch_a_source_off(project: Path) -> None:
    (project / "empty").mkdir()
    problem, = problems_of("[[sources]]\nimage_dir='hoge'\nprompt='x'\n[[sources]]\nimage_dir='empty'\nprompt='y'\n")
    assert problem.what == "no images" and "[[sources]] 2" in problem.where
    rows, problems = rows_of("[[sources]]\nimage_dir='hoge'\nprompt='x'\n[[sources]]\nimage_dir='empty'\nrepeats=0\n")
    assert not problems and len(rows) == 2


def test_one_folder_twice_in_a_data_set_is_used_once(project: Path, caplog) -> None:
    subset = "[[datasets.subsets]]\nimage_dir = 'hoge'\nclass_tokens = 'x'\n"
    rows, problems = rows_of(f"[[datasets]]\n{subset}{subset}")
    assert not problems and len(rows) == 2 and "earlier subset" in caplog.text


def test_equal_images_in_two_subsets_are_told(project: Path, caplog) -> None:
    marked(0, 40, 40).save(project / "fuga" / "0.png")  # as hoge's
    subset = "[[datasets.subsets]]\nclass_tokens = 'x'\nimage_dir = '{}'\n"
    rows_of(f"[[datasets]]\n{subset.format('hoge')}{subset.format('fuga')}")
    assert "hoge/0.png = fuga/0.png" in caplog.text


def test_images_below_a_subset_are_left_out_as_kohya_does(project: Path) -> None:
    (project / "hoge" / "more").mkdir()
    marked(5, 40, 40).save(project / "hoge" / "more" / "x.png")
    rows, problems = rows_of("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'hoge'\nclass_tokens = 'x'\n")
    assert not problems and len(rows) == 2
    assert [one.name for one in rows.account.left_out] == ["hoge/more/"]


@pytest.mark.parametrize("content, word", [
    ("[]", "no table"), ("{", "Expecting"), ('{"0.png": "words"}', "caption"), ("{}", "empty"),
    ('{"../../etc/passwd": {"caption": "x"}}', "image_dir"), ('{"9.png": {"caption": "x"}}', "not there"),
    ('{"0.png": {"caption": 3}}', "no text")])
def test_a_metadata_file_that_cannot_be_used_is_told(project: Path, content: str, word: str) -> None:
    (project / "piyo" / "piyo_md.json").write_text(content)
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'piyo'\nmetadata_file = 'piyo/piyo_md.json'\n"
    problem, = problems_of(text)
    assert word in f"{problem.why} {problem.fix}"


def test_lines_of_json_and_whole_paths_are_read(project: Path) -> None:
    lines = [{"image_path": str(project / "piyo" / "0.png"), "caption": "one\ntwo", "tags": "t, u"}]
    (project / "md.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, problems = rows_of("[[datasets]]\nenable_wildcard = true\n[[datasets.subsets]]\nmetadata_file = 'md.jsonl'\n")
    assert not problems and rows[0].all_captions == ("one, t, u", "two, t, u")


# ------------------------------------------------------------------------------------- what becomes of a source's rows

OURS = """
[general]
resolution = 32

[[sources]]
image_dir = "hoge"
repeats = 3
prompt = "TOK girl"
random_flip = true
center_crop = true
loss_weight = 0.5
train_batch_size = 1

[[sources]]
image_dir = "fuga"
prompt = "TOK boy, b, c, d"
shuffle_caption = true
caption_dropout_every_n_epochs = 3

[[sources]]
image_dir = "reg"
prompt = "human"
is_class = true
"""


@pytest.fixture
def ours(project: Path) -> Rows:
    data = CaptionedDataOptions(dataset_config=str(written(OURS)))
    rows, problems = read_rows(data, prior=PriorOptions(prior_loss_weight=0.25))
    assert not problems
    return rows


def test_sources_of_our_own_have_weights_flags_prompts_and_sizes(ours: Rows) -> None:
    assert [(one.name, one.images, one.rows, one.is_class, one.loss_weight) for one in ours.sources] == [
        ("hoge", 2, 6, False, 0.5), ("fuga", 2, 2, False, 1.0), ("reg (class)", 2, 2, True, 0.25)]
    policy = CropPolicy(resolution=32)
    flips = {row.id.partition("/")[0]: {policy.sample(row, seed=0, epoch=e).flip for e in range(20)} for row in ours}
    assert flips["hoge"] == {True, False} and flips["fuga"] == {False}
    assert len(policy.variants(ours[0], 0)) == 2, "cut out of the middle, and mirrored"


def test_captions_change_as_their_source_says(ours: Rows) -> None:
    changes = caption_changes.make_changes(CaptionOptions(), ours, seed=0, live=False)
    by_name = {row.id: row for row in ours if not row.repeat}
    assert {changes(by_name["hoge/1.png"], epoch) for epoch in range(9)} == {"TOK girl"}
    said = [changes(by_name["fuga/0.png"], epoch) for epoch in range(9)]
    assert [text is UNCONDITIONAL for text in said] == [epoch % 3 == 2 for epoch in range(9)]
    assert len({text for text in said if text is not UNCONDITIONAL}) > 1
    announced = changes.announced(ours)
    assert announced is not None and {*said} <= {*announced}


def test_a_forward_pass_has_no_more_images_than_its_source_allows(ours: Rows) -> None:
    order = sampler.make_order(ours, 4, batch_size=4, seed=0)
    visits: Counter[int] = Counter()
    for step in range(2):
        for micro in order.slots(step):
            sizes = {ours[slot.row].handling.batch_size for slot in micro if ours[slot.row].handling}
            instances = [slot.row for slot in micro if not ours[slot.row].is_class]
            assert not sizes - {None} or len(micro) <= 2, "one, and as many class images"
            visits.update(instances)
    assert visits == dict.fromkeys(range(8), 1), "every row once an epoch"


def test_a_resumed_run_must_have_the_same_sources(ours: Rows, project: Path) -> None:
    before = contents(ours)
    for old, new in (("0.5", "0.6"), ("random_flip = true", "random_flip = false"), ("repeats = 3", "repeats = 2"),
                     ("shuffle_caption = true", "keep_tokens = 1\nshuffle_caption = true"), ("boy", "man")):
        rows, _ = rows_of(OURS.replace(old, new))
        assert contents(rows) != before, old
    assert contents(rows_of(OURS)[0]) == contents(rows_of(OURS)[0])


def test_one_source_of_default_settings_is_trained_as_its_folder_is(project: Path) -> None:
    rows, _ = rows_of("[[sources]]\nimage_dir='hoge'\nprompt='x'\n", resolution=32)
    assert all(row.handling is None and row.loss_weight == 1 for row in rows)


# ------------------------------------------------------------------------------------------------------ kohya's folders


def kohyas_folders(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            marked(20 * number + i, 40, 40).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("captioned", [False, True])
def test_numbers_are_repeats_and_words_are_captions(tmp_path: Path, captioned: bool) -> None:
    folder = kohyas_folders(tmp_path / "img", "3_sks dog", "1_dog_2")
    (folder / "3_sks dog" / "1.txt").write_text("sks dog, running")
    data = CaptionedDataOptions(train_data_dir=str(folder)) if captioned else \
        data_options(instance_data_dir=folder, instance_prompt=None)
    rows, problems = read_rows(data)
    assert not problems
    assert Counter((row.id, row.caption) for row in rows) == {
        ("1_dog_2/0.png", "dog_2"): 1, ("1_dog_2/1.png", "dog_2"): 1,
        ("3_sks dog/0.png", "sks dog"): 3, ("3_sks dog/1.png", "sks dog, running"): 3}


def test_class_folders_are_read_with_their_numbers_and_the_weight_of_the_prior(tmp_path: Path) -> None:
    folder, classes = kohyas_folders(tmp_path / "img", "3_sks dog"), kohyas_folders(tmp_path / "reg", "2_dog")
    prior = PriorOptions(with_prior_preservation=True, class_data_dir=str(classes), class_prompt="a dog",
                         prior_loss_weight=0.5)
    rows, problems = read_rows(data_options(instance_data_dir=folder, instance_prompt=None), prior=prior)
    assert not problems and rows.per_epoch == 6
    assert [(row.id, row.caption, row.loss_weight) for row in rows if row.is_class] == 2 * [
        ("2_dog (class)/0.png", "dog", 0.5)] + 2 * [("2_dog (class)/1.png", "dog", 0.5)]


def test_compat_kohya_reads_numbered_folders_alone(tmp_path: Path) -> None:
    folder = kohyas_folders(tmp_path / "img", "1_a", "2_b", "3_c", "other")
    marked(7, 40, 40).save(folder / "loose.png")
    rows, problems = read_rows(CaptionedDataOptions(train_data_dir=str(folder)), compat="kohya")
    assert not problems and Counter(row.id.partition("/")[0] for row in rows) == {"1_a": 2, "2_b": 4, "3_c": 6}
    assert {one.name for one in rows.account.left_out} == {"other/", "loose.png"}


def test_repeats_of_the_command_line_go_before_the_numbers(tmp_path: Path) -> None:
    folder = kohyas_folders(tmp_path / "img", "3_a", "20_b")
    assert len(read_rows(CaptionedDataOptions(train_data_dir=str(folder), repeats=2))[0]) == 8


def test_the_prompt_may_be_left_out_where_folders_say_it(tmp_path: Path) -> None:
    folder = kohyas_folders(tmp_path / "img", "3_a b")
    flags = ["--pretrained_model_name_or_path=m", f"--instance_data_dir={folder}"]
    assert parse(Options, flags, description="").data.instance_prompt is None
    with pytest.raises(UserError, match="--instance_prompt is missing"):
        parse(Options, [flags[0], f"--instance_data_dir={folder / '3_a b'}"], description="")


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.trains
def test_a_project_of_kohyas_trains_unchanged(project: Path, tiny_sd, tmp_path: Path) -> None:
    written(FIRST.replace("512", "32").replace("768", "64"))
    argv = command(tiny_sd, None, tmp_path / "out", instance_data_dir=None, instance_prompt=None, resolution=None,
                   dataset_config="data.toml", train_batch_size=None, max_train_steps=3, cache_latents=True)
    done = forked(argv, trainer="train_text_to_image_lora", log=tmp_path / "log")
    assert done.code == 0, done.output
    assert "fuga: 2 images × 1 = 2 an epoch" in done.output and "reg (class): 2 images" in done.output


def test_a_subset_has_masks_of_its_own(project: Path) -> None:
    """kohya's conditioning_data_dir: the masks of one subset; images of the others are trained on as a whole."""
    masks = project / "masks"
    masks.mkdir()
    images = sorted(path for path in (project / "hoge").iterdir() if path.suffix == ".png")
    for path in images:
        Image.new("L", Image.open(path).size, 128).save(masks / path.name)
    (project / "data.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'hoge'\nclass_tokens = 'x'\nconditioning_data_dir = 'masks'\n"
        "[[datasets.subsets]]\nimage_dir = 'fuga'\nclass_tokens = 'y'\n", "utf-8")
    rows, problems = read_rows(data_options(dataset_config="data.toml"))
    assert not problems
    assert {row.id.partition("/")[0]: row.mask is not None for row in rows} == {"hoge": True, "fuga": False}
    assert (rows.account.masks, round(rows.account.mask_area, 1)) == (len(images), 0.5)
