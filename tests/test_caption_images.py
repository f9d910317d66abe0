"""scripts/caption_images.py: what models of each class say lies where the trainers read it, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.images import data_options, noise_image
from tests.support.tiny_captioners import build_tiny_blip, build_tiny_florence, build_tiny_tagger
from tests.support.trainers import forked
from trainkit.data import captioners, written_captions
from trainkit.data.captioners import Tag, TagChoice, is_emoticon
from trainkit.data.rows import read_rows
from trainkit.data.sources.text import one_line
from trainkit.errors import EXIT_CODES, Problem, UserError
from trainkit.options import CaptionedDataOptions
from trainkit.tools import caption_images
from trainkit.tools.caption_images import with_words

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
OF_RED = "hero_(story), red_sky, ^_^"  # what the tiny tagger says of red.png


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tagger(tmp_path_factory.mktemp("tiny") / "tagger")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_blip(tmp_path_factory.mktemp("tiny") / "blip")


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_florence(tmp_path_factory.mktemp("tiny") / "florence")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """red.png, green.png and blue.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in COLOURS.items():
        coloured(folder / f"{name}.png", colour)
    return folder


def coloured(path: Path, colour: tuple[int, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if len(colour) == 3 else "RGBA", (40, 40), colour).save(path)
    return path


def caption(folder: Path, model: Path, *more: str) -> None:
    caption_images.main([f"{folder}", f"--model={model}", *more])


def refused(folder: Path, model: Path | str, *more: str) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        caption_images.main([f"{folder}", f"--model={model}", *more])
    return list(caught.value.problems)


def trained(folder: Path) -> dict[str, str]:
    """Image -> caption, as the trainer of captioned images reads the folder. No problem may be left."""
    rows, problems = read_rows(CaptionedDataOptions(train_data_dir=f"{folder}", resolution=32))
    assert not problems, "\n".join(map(str, problems))
    return {row.id: row.caption for row in rows}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


# -- what the models say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sidecar", "metadata"])
@pytest.mark.parametrize("model", ["tagger", "blip", "florence"])
def test_every_image_gets_a_caption_that_both_trainers_read(model, form, images, request, capsys):
    caption(images, request.getfixturevalue(model), f"--format={form}", "--trigger=TOK")
    captions = trained(images)
    assert captions.keys() == {"red.png", "green.png", "blue.png"}
    assert all(text.startswith("TOK, ") and len(text) > len("TOK, ") for text in captions.values())
    rows, problems = read_rows(data_options(instance_data_dir=images))
    assert problems == [] and {row.id: row.caption for row in rows} == captions
    assert "3 images got a caption, 0 had one already" in capsys.readouterr().out


def test_a_tagger_writes_its_tags_the_most_probable_first(images, tagger):
    caption(images, tagger)
    assert trained(images) == {"red.png": OF_RED, "green.png": "green_sky", "blue.png": "blue_sky"}


@pytest.mark.parametrize("flags, of_red", [
    (["--replace_underscores"], "hero (story), red sky, ^_^"),
    (["--undesired_tags=Red Sky, hero_(story)"], "^_^"),
    (["--general_threshold=0.9"], "hero_(story), red_sky"),
    (["--character_threshold=0.9"], "red_sky, ^_^"),
    (["--prefix=a 3d icon,", "--suffix=, white background", "--trigger=TOK"],
     f"TOK, a 3d icon, {OF_RED}, white background"),
])
def test_what_is_written_of_the_tags_can_be_chosen(flags, of_red, images, tagger):
    caption(images, tagger, *flags)
    assert trained(images)["red.png"] == of_red


def test_probabilities_decide_and_categories_part():
    tags = [Tag("low", "0"), Tag("high", "0"), Tag("rating", "9"), Tag("hero", "4"), Tag("maybe", "4")]
    choice = TagChoice(0.35, 0.85, frozenset(), False)
    assert choice.caption(tags, np.array([0.35, 0.8, 1, 0.85, 0.84], np.float32).astype(float).round(2)) == \
        "hero, high, low"
    assert choice.caption(tags, np.zeros(5)) == ""


@pytest.mark.parametrize("tag, emoticon", [
    ("^_^", True), ("o_o", True), ("(o)_(o)", True), ("0_0", True), ("|_|", True), (">_o", True),
    ("long_hair", False), ("2b_(nier:automata)", False), ("v-neck", False)])
def test_an_emoticon_keeps_its_mouth(tag, emoticon):
    assert is_emoticon(tag) is emoticon


def test_images_are_seen_upright_and_on_white(tmp_path, tagger):
    folder = tmp_path / "images"
    coloured(folder / "clear.png", (255, 0, 0, 0))
    lying = Image.new("RGB", (64, 64), COLOURS["green"])
    lying.paste(COLOURS["blue"], (32, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 8  # a viewer turns it to the left: the right half comes up
    lying.save(folder / "lying.png", exif=exif)
    caption(folder, tagger)
    assert trained(folder) == {"clear.png": "light", "lying.png": "blue_sky"}


def test_a_tagger_sees_the_whole_of_a_wide_image(tmp_path, tagger):
    """In the middle of a white square: squeezed or cropped, it would be as red as the others."""
    folder = coloured(tmp_path / "images" / "square.png", COLOURS["red"]).parent
    Image.new("RGB", (200, 100), COLOURS["red"]).save(folder / "wide.png")
    caption(folder, tagger)
    assert trained(folder) == {"square.png": OF_RED, "wide.png": "red_sky"}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_graph_for_a_fixed_number_of_images_takes_any(batch, images, tmp_path):
    caption(images, build_tiny_tagger(tmp_path / "fixed", batch=batch), "--batch_size=3")
    assert trained(images) == {"red.png": OF_RED, "green.png": "green_sky", "blue.png": "blue_sky"}


@pytest.mark.trains
def test_blip_says_what_transformers_own_processor_and_model_say(images, blip):
    from transformers import AutoProcessor, BlipForConditionalGeneration

    noise_image(images / "noise.png", 7)
    caption(images, blip, "--max_new_tokens=8", "--num_beams=2", "--batch_size=3", "--prompt=a photo of")
    processor, model = AutoProcessor.from_pretrained(blip), BlipForConditionalGeneration.from_pretrained(blip).eval()
    for name, text in trained(images).items():
        inputs = processor(images=Image.open(images / name), text="a photo of", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, num_beams=2)
        assert text == processor.decode(tokens[0], skip_special_tokens=True)
        assert text.startswith("a photo of ")


@pytest.mark.trains
def test_florence_says_what_transformers_own_processor_and_model_say(images, florence):
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    noise_image(images / "noise.png", 7)
    processor = AutoProcessor.from_pretrained(florence)
    model = Florence2ForConditionalGeneration.from_pretrained(florence).eval()
    for task in ("<CAPTION>", "<MORE_DETAILED_CAPTION>", "<MIXED>"):
        caption(images, florence, f"--task={task}", "--max_new_tokens=8", "--num_beams=2", "--batch_size=3",
                "--overwrite")
        for name, text in trained(images).items():
            inputs = processor(images=Image.open(images / name), text=task, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=8, num_beams=2, do_sample=False)
            assert text == one_line(processor.decode(tokens[0], skip_special_tokens=True))


@pytest.mark.parametrize("words, caption", [
    (dict(), "a fox."), (dict(trigger="TOK"), "TOK, a fox."), (dict(trigger="fox"), "a fox."),
    (dict(trigger="ox"), "ox, a fox."), (dict(prefix="an icon of"), "an icon of a fox."),
    (dict(suffix=", white background"), "a fox, white background"), (dict(suffix="in the snow"), "a fox. in the snow"),
    (dict(trigger="TOK", prefix="an icon of", suffix=", 3d\n"), "TOK, an icon of a fox, 3d"),
])
def test_words_of_every_caption(words, caption):
    assert with_words("a fox.", **words) == caption


# -- nothing is lost ---------------------------------------------------------------------------------------------------


def test_a_caption_that_is_there_is_kept(images, tagger, capsys):
    (images / "red.txt").write_bytes(b"my own words\r\n")
    (images / "green.caption").write_text("mine, too")
    caption(images, tagger)
    assert trained(images) == {"red.png": "my own words", "green.png": "mine, too", "blue.png": "blue_sky"}
    assert (images / "red.txt").read_bytes() == b"my own words\r\n"
    assert "1 image got a caption, 2 had one already" in capsys.readouterr().out


def test_overwrite_replaces_captions_in_the_files_that_are_read(images, tagger):
    (images / "red.caption").write_text("old")
    caption(images, tagger, "--overwrite")
    assert trained(images)["red.png"] == OF_RED
    assert (images / "red.caption").read_text() == f"{OF_RED}\n" and not (images / "red.txt").exists()


def test_a_blank_caption_is_none(images, tagger):
    (images / "red.TXT").write_text(" \n")
    caption(images, tagger, "--caption_extension=.caption")
    assert trained(images)["red.png"] == OF_RED, "the blank file would go before another one"
    assert (images / "green.caption").exists()


@pytest.mark.parametrize("form, file, words", [
    ("sidecar", "red.txt", "mine"), ("metadata", "metadata.jsonl", '{"file_name": "red.png", "text": "mine"}')])
def test_a_caption_that_someone_writes_meanwhile_is_kept(form, file, words, images, tagger, monkeypatch, capsys):
    said = captioners.Tagger.__call__

    def slowly(model, prepared):
        (images / file).write_text(words)
        return said(model, prepared)

    monkeypatch.setattr(captioners.Tagger, "__call__", slowly)
    caption(images, tagger, f"--format={form}")
    assert trained(images) == {"red.png": "mine", "green.png": "green_sky", "blue.png": "blue_sky"}
    assert "2 images got a caption, 1 had one already" in capsys.readouterr().out


def test_captions_under_a_name_that_is_not_read_stop_it_before_they_are_forgotten(images, tagger):
    (images / "red.png.txt").write_text("my own words")
    problem, = refused(images, tagger)
    assert "not named as the image" in problem.what and problem.fix.startswith("mv ")
    caption(images, tagger, "--overwrite")


def test_folders_of_kohya_are_captioned(tmp_path, tagger):
    """Whose numbers the trainers may refuse: that is no matter of captions."""
    coloured(tmp_path / "10_fox" / "red.png", COLOURS["red"])
    caption(tmp_path, tagger)
    assert (tmp_path / "10_fox" / "red.txt").read_text() == f"{OF_RED}\n"


def test_a_dry_run_writes_nothing(images, tagger, capsys):
    before = sorted(images.rglob("*"))
    caption(images, tagger, "--dry_run", "--trigger=TOK")
    out = capsys.readouterr().out
    assert f"red.png: TOK, {OF_RED}\n" in out and "3 images would get a caption" in out
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize("form", ["sidecar", "metadata"])
def test_a_run_that_is_interrupted_keeps_what_it_has_and_goes_on(form, images, tagger, monkeypatch, capsys):
    said, calls = captioners.Tagger.__call__, []

    def interrupted(model, prepared):
        calls.append(len(prepared))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return said(model, prepared)

    monkeypatch.setattr(captioners.Tagger, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caption(images, tagger, "--batch_size=1", f"--format={form}")
    monkeypatch.undo()
    assert sorted(filter(None, trained(images).values())) == ["blue_sky", "green_sky"]
    caption(images, tagger, f"--format={form}")
    assert "1 image got a caption, 2 had one already" in capsys.readouterr().out
    assert trained(images)["red.png"] == OF_RED


def kill_at_the_third_image() -> None:
    """In the child that captions: metadata.jsonl is rewritten for each image, and then it is killed."""
    written_captions.SAVE_SECONDS = written_captions.SAVE_FACTOR = 0
    said, calls = captioners.Tagger.__call__, []

    def killed(model, prepared):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return said(model, prepared)

    captioners.Tagger.__call__ = killed


@pytest.mark.trains
@pytest.mark.parametrize("form", ["sidecar", "metadata"])
def test_a_run_that_is_killed_leaves_whole_captions_and_goes_on(form, images, tagger, capsys):
    words = [f"{images}", f"--model={tagger}", "--batch_size=1", f"--format={form}"]
    done = forked(words, trainer="trainkit.tools.caption_images", log=images.parent / "log",
                  patch=kill_at_the_third_image)
    assert done.code == -signal.SIGKILL, done.output
    assert sorted(filter(None, trained(images).values())) == ["blue_sky", "green_sky"]
    caption_images.main(words)
    assert "1 image got a caption, 2 had one already" in capsys.readouterr().out
    assert trained(images) == {"red.png": OF_RED, "green.png": "green_sky", "blue.png": "blue_sky"}


def test_unreadable_images_are_named_and_left_out(images, tagger):
    (images / "bad.png").write_bytes(b"no image")
    (images / "cut.png").write_bytes((images / "red.png").read_bytes()[:60])
    with pytest.raises(UserError) as caught:
        caption(images, tagger)
    problem, = caught.value.problems
    assert problem.what == "2 of 5 images cannot be read" and "bad.png" in problem.why and "cut.png" in problem.why
    assert caught.value.exit_code == EXIT_CODES["data"]
    assert sorted(path.name for path in images.glob("*.txt")) == ["blue.txt", "green.txt", "red.txt"]


def test_images_that_the_model_says_nothing_about_are_named(images, tagger, caplog, capsys):
    caption(images, tagger, "--undesired_tags=blue_sky", "--trigger=TOK")
    assert not (images / "blue.txt").exists() and "blue.png" in caplog.text
    assert "2 images got a caption" in capsys.readouterr().out


def test_images_of_one_stem_have_one_caption_file(images, tagger, caplog):
    Image.new("RGB", (40, 40), COLOURS["green"]).save(images / "red.webp")
    caption(images, tagger)
    assert (images / "red.txt").read_text() == f"{OF_RED}\n", "the image that comes first by name"
    assert "red.webp = red.png" in caplog.text
    (images / "red.txt").unlink()
    caption(images, tagger, "--format=metadata")
    assert {line["file_name"]: line["text"] for line in lines(images)} == {"red.png": OF_RED, "red.webp": "green_sky"}


@pytest.mark.parametrize("form", ["sidecar", "metadata"])
@pytest.mark.parametrize("name", [
    "é 猫 🦊.png", "a'b \"c\" $d.png", "sub/ü/x.png", "n" * 251 + ".png", "猫" * 83 + ".png",
], ids=["unicode", "quotes", "below", "long", "long unicode"])
def test_any_name_and_place(name, form, tmp_path, tagger):
    path = tmp_path / "images" / name
    coloured(path, COLOURS["red"])
    caption(tmp_path / "images", tagger, f"--format={form}")
    assert trained(tmp_path / "images") == {name: OF_RED}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_gets_a_caption_file_and_no_line(images, tagger):
    odd = Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png"))
    (images / "red.png").rename(odd)
    problem, = refused(images, tagger, "--format=metadata")
    assert "caf\\xe9.png" in problem.why and not (images / "metadata.jsonl").exists()
    caption(images, tagger)
    assert odd.with_suffix(".txt").read_text() == f"{OF_RED}\n"


# -- metadata.jsonl ----------------------------------------------------------------------------------------------------


def test_other_columns_and_lines_of_metadata_stay(images, tagger):
    (images / "metadata.jsonl").write_text(
        '{"file_name": "red.png", "noun": "r\\u00e9d", "text": ""}\n'
        '\n'
        '{"file_name":"green.png","text":"mine","weight":1.50}\n', "utf-8")
    caption(images, tagger, "--format=metadata")
    written = (images / "metadata.jsonl").read_text("utf-8").splitlines()
    assert written == [f'{{"file_name": "red.png", "noun": "réd", "text": "{OF_RED}"}}', "",
                       '{"file_name":"green.png","text":"mine","weight":1.50}',
                       '{"file_name": "blue.png", "text": "blue_sky"}']
    assert trained(images)["green.png"] == "mine"


def test_lines_about_images_that_are_not_captioned_stay(images, tagger):
    """Of several splits only train is captioned, and hidden images are not."""
    for name in ("train/red.png", "test/red.png"):
        coloured(images / name, COLOURS["red"])
    (images / "metadata.jsonl").write_text('{"file_name": "test/red.png", "text": "held out"}\n')
    caption(images, tagger, "--format=metadata", "--overwrite")
    assert lines(images)[0] == {"file_name": "test/red.png", "text": "held out"}
    assert {line["file_name"] for line in lines(images)[1:]} == {"train/red.png", "red.png", "green.png", "blue.png"}


@pytest.mark.parametrize("column, told", [("caption", "caption"), ("Prompt ", "Prompt "), ("noun", "text")])
def test_captions_go_into_the_column_that_is_read(column, told, images, tagger):
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", column: ""}) + "\n")
    caption(images, tagger, "--format=metadata")
    assert lines(images)[0][told] == OF_RED and lines(images)[1][told] == "blue_sky"
    assert trained(images)["red.png"] == OF_RED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_metadata_of_another_encoding_is_written_in_utf_8(encoding, images, tagger):
    (images / "metadata.jsonl").write_bytes('{"file_name": "red.png", "text": "café"}\r\n'.encode(encoding))
    caption(images, tagger, "--format=metadata")
    assert [line["text"] for line in lines(images)] == ["café", "blue_sky", "green_sky"]


def test_a_caption_goes_into_the_nearest_metadata(images, tagger):
    """Else the trainers would read the nearer file, where the image has none."""
    coloured(images / "sub/red.png", COLOURS["red"])
    (images / "sub/metadata.jsonl").write_text('{"file_name": "red.png", "noun": "ball"}\n')
    caption(images, tagger, "--format=metadata")
    assert lines(images / "sub") == [{"file_name": "red.png", "noun": "ball", "text": OF_RED}]
    assert trained(images)["sub/red.png"] == OF_RED and len(lines(images)) == 3


def test_a_table_that_is_not_rewritten_is_named(images, tagger):
    (images / "metadata.csv").write_text("file_name,text\nred.png,mine\ngreen.png,\n")
    problem, = refused(images, tagger, "--format=metadata")
    assert "metadata.csv is not rewritten" in problem.what
    caption(images, tagger)
    assert trained(images) == {"red.png": "mine", "green.png": "green_sky", "blue.png": "blue_sky"}


def test_caption_files_that_would_not_be_read_are_not_written(images, tagger):
    (images / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "mine"}\n')
    problem, = refused(images, tagger, "--overwrite")
    assert "red.png" in problem.why and "--format metadata" in problem.fix and not list(images.glob("*.txt"))


def test_damaged_metadata_is_not_touched(images, tagger):
    (images / "metadata.jsonl").write_text(damaged := '{"file_name": "red.png", "text": "mine"\n')
    problem, = refused(images, tagger, "--format=metadata")
    assert "metadata.jsonl:1" in problem.why and (images / "metadata.jsonl").read_text() == damaged


def test_a_full_disk_is_one_message(images, tagger, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(written_captions, "atomic_write", full)
    problem, = refused(images, tagger)
    assert "No space left" in problem.what and problem.kind == "disk"


# -- what can be wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, flag", [
    ("tagger", "--task=<CAPTION>"), ("tagger", "--prompt=a"), ("tagger", "--num_beams=1"),
    ("blip", "--task=<CAPTION>"), ("blip", "--undesired_tags=a"), ("blip", "--general_threshold=0.5"),
    ("florence", "--prompt=a photo of"), ("florence", "--replace_underscores"),
])
def test_a_flag_without_effect_is_refused(model, flag, images, request):
    problem, = refused(images, request.getfixturevalue(model), flag)
    name = flag.partition("=")[0]
    assert name in problem.what and problem.fix == f"leave {name} out"


@pytest.mark.parametrize("flags, where", [
    (["--batch_size=0"], "--batch_size"), (["--num_beams=0"], "--num_beams"), (["--max_new_tokens=0"], "--max_new_"),
    (["--general_threshold=1.5"], "--general_threshold"), (["--character_threshold=nan"], "--character_threshold"),
    (["--format=metadata", "--caption_extension=.txt"], "--caption_extension"), (["--device=cuda:9"], "--device"),
])
def test_a_value_that_cannot_be_is_refused(flags, where, images, tagger):
    problem, = refused(images, tagger, *flags)
    assert where in problem.where and not list(images.glob("*.txt"))


def test_a_device_that_is_not_there_is_refused(images, blip):
    problem, = refused(images, blip, "--device=cuda:9")
    assert problem.where == "--device cuda:9" and problem.fix == "--device cpu"


def test_a_task_that_gives_no_words_is_refused(images, florence):
    problem, = refused(images, florence, "--task=<OD>")
    assert "<OD>" in problem.what and "<DETAILED_CAPTION>" in problem.fix


def test_a_folder_without_images_is_refused(tmp_path, tagger):
    problem, = refused(tmp_path, tagger)
    assert problem.what == "no images" and problem.fix == "caption_images FOLDER_OF_IMAGES"
    problem, = refused(tmp_path / "none", tagger)
    assert "no such folder" in problem.why


def test_without_the_package_that_runs_taggers_its_command_is_named(images, tagger, monkeypatch):
    monkeypatch.setattr(captioners, "find_spec", lambda name: None)
    problem, = refused(images, tagger)
    assert problem.fix.startswith("pip install onnxruntime")


def test_offline_a_name_on_the_hub_is_one_message(images):
    problem, = refused(images, "SmilingWolf/wd-vit-tagger-v3")
    assert "cannot read SmilingWolf/wd-vit-tagger-v3 from the Hub" in problem.what


def test_a_name_on_the_hub_is_read_from_the_cache(images, tagger, blip, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{tmp_path / 'hub'}")
    for name, model in (("tagger", tagger), ("blip", blip)):
        home = tmp_path / "hub" / f"models--tiny--{name}"
        shutil.copytree(model, home / "snapshots" / "abc")
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("abc")
    caption(images, Path("tiny/tagger"))
    assert trained(images)["red.png"] == OF_RED
    caption(images, Path("tiny/blip"), "--overwrite", "--max_new_tokens=4")
    assert trained(images)["red.png"] not in ("", OF_RED)


def broken(model: Path, folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy of a model with one file changed, or without it."""
    shutil.copytree(model, folder)
    content = change((folder / name).read_bytes())
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name, change, told", [
    ("model.onnx", lambda data: data[:100], "the tagger cannot be used"),
    ("model.onnx", lambda data: None, "the tagger has no model.onnx"),
    ("selected_tags.csv", lambda data: data[:-20], "numbers an image"),
    ("selected_tags.csv", lambda data: data.replace(b"category", b"kind"), "has no name or no category"),
    ("selected_tags.csv", lambda data: b"\xff" + data, "not UTF-8"),
    ("selected_tags.csv", lambda data: b"", "names no tags"),
])
def test_a_damaged_tagger_is_one_message(name, change, told, images, tagger, tmp_path):
    problem, = refused(images, broken(tagger, tmp_path / "broken", name, change))
    assert told in f"{problem}" and problem.kind == "data"


def test_outputs_that_are_no_probabilities_are_refused(images, tmp_path):
    problem, = refused(images, build_tiny_tagger(tmp_path / "logits", outputs="Identity"))
    assert "no probabilities" in problem.why and not list(images.glob("*.txt"))


@pytest.mark.parametrize("name, change, told", [
    ("config.json", lambda data: data.replace(b'"blip"', b'"llava"'), "model_type llava"),
    ("config.json", lambda data: data.replace(b"{", b'{"auto_map": {},', 1), "brings its own code"),
    ("config.json", lambda data: None, "it has no config.json"),
    ("preprocessor_config.json", lambda data: None, "the model has no preprocessor_config.json"),
    ("model.safetensors", lambda data: None, "no safetensors for the model"),
    ("model.safetensors", lambda data: data[:-10], "cannot be loaded"),
])
def test_a_model_that_cannot_be_used_is_one_message(name, change, told, images, blip, tmp_path):
    problem, = refused(images, broken(blip, tmp_path / "broken", name, change))
    assert told in f"{problem}"


def test_a_file_for_a_model_is_answered_with_its_folder(images, tagger):
    problem, = refused(images, tagger / "model.onnx")
    assert problem.fix == f"--model {tagger}"


def test_with_nothing_to_do_no_model_is_loaded(images, tagger, monkeypatch, capsys):
    caption(images, tagger)
    monkeypatch.setattr(captioners, "load_tagger", None)
    caption(images, tagger)
    assert "0 images got a caption, 3 had one already" in capsys.readouterr().out


# -- its help ----------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_help_run(images, florence, capsys):
    commands = re.findall(r"^    python scripts/caption_images\.py (.+)$", caption_images.__doc__, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("my_images", f"{images}"))
        words[words.index("--model") + 1] = f"{florence}"
        caption_images.main([*words, "--max_new_tokens=4"])
    assert "would get a caption" in capsys.readouterr().out
    assert all(text.startswith("TOK dog, ") for text in trained(images).values())
