"""At every start, images are looked at for blur and near-duplicates, and a second start looks at none again."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

import pytest
from PIL import ImageFilter

from tests.support import ROOT
from tests.support.bad_data_set import scene
from tests.support.images import data_options
from trainkit.data import looks, rows, verdicts
from trainkit.data.looks import fitting_resolution, hashes_available
from trainkit.data.rows import read_rows
from trainkit.tools import check_dataset

SIDE = 128
needs_hashes = pytest.mark.skipif(not hashes_available(), reason="imagehash is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three scenes, one of them blurred and one of them saved again; old enough to be remembered."""
    made = tmp_path / "my images"
    made.mkdir()
    for seed in range(3):
        scene(seed, SIDE).save(made / f"{seed}.png")
    scene(1, SIDE).filter(ImageFilter.GaussianBlur(6)).save(made / "soft.png")
    scene(2, SIDE).save(made / "again.jpg", quality=80)
    for path in made.iterdir():
        os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("trainkit.digests.FRESH_SECONDS", -60)  # these files are not changed again
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of images in the order in which they are decoded."""
    names: list[str] = []
    examine = verdicts._examine

    def counted(source, look):
        names.append(Path(source).name)
        return examine(source, look)

    monkeypatch.setattr(verdicts, "_examine", counted)
    return names


def start(folder: Path, **options: object) -> None:
    _, problems = read_rows(data_options(instance_data_dir=folder, **{"resolution": SIDE, **options}))
    assert not problems


@needs_hashes
def test_a_start_names_blurred_and_like_images_and_the_command_that_shows_them(folder, caplog):
    start(folder, enable_bucket=True)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in lines if "teaches blur" in line] == ["1 image looks blurred, and teaches blur: soft.png"]
    assert [line for line in lines if "look alike" in line] == [
        "2 groups of images look alike, and are learned by heart: 1.png = soft.png, 2.png = again.jpg"]
    _, _, command = lines[-1].partition("training: ")
    args = check_dataset.parse(shlex.split(command)[2:])
    assert [folder] == args.DIR and args.enable_bucket and args.resolution in (SIDE, f"{SIDE}")
    assert args.html == Path("sheet.html") and (ROOT / shlex.split(command)[1]).is_file()


def test_class_images_are_not_looked_at(folder, tmp_path, caplog):
    config = tmp_path / "data.toml"
    config.write_text(f"[[sources]]\nfolder = '{folder}'\nis_class = true\nprompt = 'a scene'\n"
                      f"[[sources]]\nfolder = '{folder}'\nprompt = 'a TOK scene'\n", "utf-8")
    _, problems = read_rows(data_options(dataset_config=str(config), instance_data_dir=None, resolution=SIDE))
    assert not problems and "(class)" not in "".join(
        record.getMessage() for record in caplog.records if "teaches blur" in record.getMessage())
    assert "teaches blur: my images/soft.png" in caplog.text


def test_a_second_start_decodes_nothing_and_says_the_same(folder, read, caplog):
    start(folder)
    first = caplog.text
    assert len(read) == 5
    caplog.clear()
    start(folder)
    assert len(read) == 5 and caplog.text == first
    os.utime(folder / "0.png", (2e9, 2e9))
    start(folder)
    assert read[5:] == ["0.png"]


def test_each_size_is_looked_at_once(folder, read):
    for side in (SIDE, 64, SIDE, 64):
        start(folder, resolution=side)
    assert len(read) == 10


def test_very_many_images_are_left_to_the_tool_in_one_line(folder, caplog, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LOOKED", 4)
    with caplog.at_level(logging.INFO):
        start(folder)
    assert "looks blurred" not in caplog.text and "look alike" not in caplog.text
    assert "among more than 4 images" in caplog.text and "check_dataset" in caplog.text


def test_without_the_package_of_hashes_blur_is_named_all_the_same(folder, caplog, monkeypatch):
    monkeypatch.setattr(looks, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        start(folder)
    assert "soft.png" in caplog.text and looks.NO_HASHES in caplog.text and "again.jpg" not in caplog.text


def test_a_small_folder_gets_the_resolution_that_fits(folder, caplog):
    start(folder, resolution=512)
    assert "5 images are far smaller than --resolution 512" in caplog.text
    assert "--resolution=128 fits: it enlarges 0 of 5 images" in caplog.text


@pytest.mark.parametrize(("factors", "resolution", "said"), [
    ([1.0, 1.0, 1.0, 4.0], 1024, ""),
    ([1.0, 2.0, 2.0, 4.0], 1024, "--resolution=384 fits: it enlarges 1 of 4 images"),
    ([1.5], 768, "--resolution=512 fits: it enlarges 0 of 1 images"),
    ([40.0, 40.0], 1024, "2 of 2 images are too small for any --resolution: use larger images"),
    ([2.0, 2.0], "1024,512", ""), ([2.0], 64, ""), ([], 1024, ""),
])
def test_the_advice_enlarges_a_quarter_at_most(factors, resolution, said):
    assert fitting_resolution(factors, resolution) == said
