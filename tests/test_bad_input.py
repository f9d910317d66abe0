"""Bad input ends in one message that lists every problem, each with what, where, why and next; never a traceback."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from tests.support.trainers import Done, command, forked, make_images

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


def refused(done: Done, code: int, *words: str, problems: int = 1) -> None:
    """The run ended with `code`, named `words`, gave four parts for each problem, and wrote no traceback."""
    assert done.code == code, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output, f"{word!r} is not in:\n{done.output}"
    for part in ("where:", "why:", "next:"):
        assert done.output.count(part) == problems, f"{part} should appear {problems} times in:\n{done.output}"


CASES = {
    "missing folder": (dict(instance_data_dir="no/such/folder"), 3, ["no/such/folder"]),
    "no source": (dict(instance_data_dir=None), 2, ["--instance_data_dir", "--dataset_name"]),
    "both sources": (dict(dataset_name="x/y"), 2, ["--instance_data_dir", "--dataset_name"]),
    "missing model": (dict(pretrained_model_name_or_path="./no/model"), 2, ["no/model"]),
    "resolution": (dict(resolution=33), 2, ["--resolution", "33", "32"]),
    "caption column": (dict(caption_column="txet"), 2, ["txet", "text"]),
    "block": (dict(lora_unet_blocks="unet.up_blocks.9"), 2, ["up_blocks.9"]),
    "two ways with text": (dict(train_text_encoder_ti=True, train_text_encoder=True), 2, ["--train_text_encoder_ti"]),
    "no such word": (dict(train_text_encoder_ti=True, token_abstraction="TOKK"), 3, ["TOKK", "--instance_prompt"]),
    "unknown flag": (dict(learning_rat=1), 2, ["--learning_rate"]),
    "unknown optimizer": (dict(optimizer="prodgy"), 2, ["prodigy"]),
    "explicit checkpoint missing": (dict(resume_from_checkpoint="checkpoint-9"), 2, ["checkpoint-9"]),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_bad_thing_is_refused_by_name(case, tiny_sdxl, images, tmp_path):
    changes, code, words = CASES[case]
    done = forked(command(tiny_sdxl, images, tmp_path / "out", **changes), log=tmp_path / "log")
    refused(done, code, *words)


def test_an_empty_folder_is_refused(tiny_sdxl, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(forked(command(tiny_sdxl, tmp_path / "empty", tmp_path / "out"), log=tmp_path / "log"), 3, "empty")


def test_unreadable_images_are_all_named(tiny_sdxl, tmp_path):
    data = make_images(tmp_path / "data", captions=False)
    whole = (data / "p0.png").read_bytes()
    (data / "p1.png").write_bytes(whole[: len(whole) // 2])
    (data / "p3.png").write_bytes(b"<html>not an image</html>")
    done = forked(command(tiny_sdxl, data, tmp_path / "out"), log=tmp_path / "log")
    refused(done, 3, "p1.png", "p3.png", problems=done.output.count("next:"))


def test_a_run_can_skip_unreadable_images(tiny_sdxl, tmp_path):
    data = make_images(tmp_path / "data", captions=False)
    (data / "p3.png").write_bytes(b"<html>not an image</html>")
    done = forked(command(tiny_sdxl, data, tmp_path / "out", bad_images="skip"), log=tmp_path / "log")
    assert done.code == 0, done.output
    assert "p3.png" in done.output and "1 file not read" in done.output


def test_a_model_without_a_unet_is_refused(tiny_sdxl, images, tmp_path):
    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    shutil.rmtree(model / "unet")
    refused(forked(command(model, images, tmp_path / "out"), log=tmp_path / "log"), 3, "unet")


def test_all_problems_come_in_one_message_and_usage_decides_the_exit_code(tiny_sdxl, tmp_path):
    argv = command(tiny_sdxl, tmp_path / "nothing", tmp_path / "out", resolution=30, use_dora=True,
                   lora_type="loha", lora_dropout=2)
    done = forked(argv, log=tmp_path / "log")
    assert done.code == 2
    for word in ("--use_dora", "--lora_dropout"):
        assert word in done.output
    assert "Traceback" not in done.output


def test_debug_shows_the_traceback(tiny_sdxl, tmp_path):
    done = forked([*command(tiny_sdxl, tmp_path / "nothing", tmp_path / "out"), "--debug"], log=tmp_path / "log")
    assert done.code != 0 and "Traceback" in done.output


def test_a_second_run_in_the_same_folder_is_refused(tiny_sdxl, images, tmp_path):
    """The first run is this process holding the lock: the second must name it and leave its files alone."""
    from trainkit.runtime.lock import OutputLock

    (tmp_path / "out").mkdir()
    first = OutputLock(tmp_path / "out")
    first.acquire()
    command_line = command(tiny_sdxl, images, tmp_path / "out")
    done = forked(command_line, log=tmp_path / "log")
    first.release()
    refused(done, 2, str(os.getpid()))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_mistyped_model_folder_names_the_folders_that_are_there(tiny_sdxl, images, tmp_path):
    wrong = tiny_sdxl.with_name(f"{tiny_sdxl.name}s")
    relative = Path(wrong.parent.name) / wrong.name
    with contextlib.chdir(wrong.parent.parent):
        done = forked(command(relative, images, tmp_path / "out"), log=tmp_path / "log")
    refused(done, 2, f"there is no folder {relative}", tiny_sdxl.name)
