"""scripts/check_dataset.py names each planted problem with a command that fixes it, and nothing in a clean folder."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image, ImageFilter
from pyarrow import parquet

from tests.support import ROOT
from tests.support.bad_data_set import PLANTED, SIDE, as_metadata, bad_folder, save, scene, sound_folder
from tests.support.images import data_options
from trainkit.data import looks
from trainkit.data.images import decode
from trainkit.data.looks import BLURRED, hashes_available, sharpness
from trainkit.data.rows import read_rows
from trainkit.doctor.checks import CHECKS, Result, examine, style
from trainkit.doctor.look import read_data_set
from trainkit.options import CaptionOptions, ImageOptions
from trainkit.tools import caption_images, check_dataset
from trainkit.tools.check_dataset import CAPTION_FLAGS

pytestmark = pytest.mark.trains
EXPECTED = {name: image for name, image in PLANTED.items() if name != "near-duplicate" or hashes_available()}


def checked(*folders: Path, prompt: str = "", triggers: tuple[str, ...] = ("TOK",), **options: object
            ) -> dict[str, Result]:
    of_captions = {name: options.pop(name) for name in CAPTION_FLAGS if name in options}
    data = read_data_set(folders, ImageOptions(**{"resolution": SIDE, **options}), CaptionOptions(**of_captions),
                         prompt=prompt, triggers=triggers)
    return {result.check.name: result for result in examine(data)}


def named(results: dict[str, Result]) -> dict[str, set[str]]:
    return {name: {image.path.name for image in result.images} for name, result in results.items()}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_folder(tmp_path_factory.mktemp("data") / "my images")


# ------------------------------------------------------------------------------------------------------------ findings


def test_each_planted_problem_is_named_and_no_sound_image_is(bad):
    results = named(checked(bad))
    assert {name: image for name, image in EXPECTED.items() if image in results.get(name, ())} == EXPECTED
    partners = {"good0.png", "good1.png", "twin_a.png"}  # the other file of a pair
    found = {(name, image) for name, images in results.items() for image in images - partners}
    assert found == {*EXPECTED.items()}, "nothing else was planted"


def test_a_clean_folder_says_so(tmp_path, capsys):
    check_dataset.main([f"{sound_folder(tmp_path / 'clean')}", f"--resolution={SIDE}", "--trigger=TOK"])
    assert capsys.readouterr().out.splitlines()[-1] == "no problems found"


def test_every_row_of_the_table_says_what_it_does_to_training():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.consequence.endswith(".") and check.what for check in CHECKS)


def test_buckets_leave_nothing_to_say_about_a_wide_image(bad):
    assert "odd" not in checked(bad, enable_bucket=True, max_bucket_reso=2 * SIDE, min_bucket_reso=64)


def test_a_copy_without_a_caption_contradicts_nothing_and_is_the_one_that_goes(tmp_path):
    folder = sound_folder(tmp_path / "a")
    (folder / "again.png").write_bytes((folder / "good0.png").read_bytes())
    results = checked(folder)
    assert "contradictory" not in results and "again.png" in results["duplicate"].fix
    assert "good0.png" not in results["duplicate"].fix


def test_an_image_without_a_caption_has_the_prompt(bad):
    assert "untagged" not in checked(bad, prompt="a photo of TOK")


def test_captions_are_checked_as_they_are_trained_on(bad, tmp_path):
    folder = sound_folder(tmp_path / "a", 2)
    save(folder, "none.png", scene(9), "a garden in the snow of a cold morning")
    assert "trigger" in checked(folder) and "trigger" not in checked(folder, caption_prefix="TOK")
    assert named(checked(bad, max_token_length=225)).get("over-long", {"long.png"}) == {"long.png"}
    (folder / "none.txt").rename(folder / "none.caption")
    assert named(checked(folder, caption_extension=".caption"))["untagged"] == {"good0.png", "good1.png"}


def test_images_below_the_smallest_bucket_are_named(tmp_path):
    save(sound_folder(tmp_path / "a"), "dot.png", scene(9, 40, 40), "a photo of TOK")
    results = checked(tmp_path / "a", enable_bucket=True, bucket_no_upscale=True)
    assert named(results)["no bucket"] == {"dot.png"}


def test_a_caption_names_another_trigger_than_most_do(bad, tmp_path):
    """Without --trigger, the placeholder that most captions have counts."""
    assert named(checked(bad, triggers=()))["trigger"] == {"other.png"}
    save(sound_folder(tmp_path / "a"), "none.png", scene(9), "a photo of a garden")
    assert named(checked(tmp_path / "a"))["trigger"] == {"none.png"}
    assert "trigger" not in checked(tmp_path / "a", triggers=())


@pytest.mark.parametrize("text, kind", [
    ("1girl, solo, long hair, smile, outdoors", "tags"), ("a photo of a dog on the beach, at noon", "sentence"),
    ("TOK", ""), ("", ""),
])
def test_tags_and_sentences_are_told_apart(text, kind):
    assert style(text) == kind


def test_the_fewer_captions_of_two_styles_are_named(tmp_path):
    save(sound_folder(tmp_path / "a"), "tags.png", scene(9), "TOK, chair, red, kitchen, window")
    assert named(checked(tmp_path / "a"))["mixed style"] == {"tags.png"}


def test_kohya_folders_of_very_different_weight_are_named_and_their_rename_balances_them(tmp_path):
    save(sound_folder(tmp_path / "k" / "10_dog", 6), "x.png", scene(30), "a photo of TOK in the snow of a cold morning")
    cats = tmp_path / "k" / "2_cat"
    cats.mkdir()
    for i in range(5):
        save(cats, f"cat{i}.png", scene(40 + i), f"a photo of TOK, cat number {i}, in a tree of the garden")
    result = checked(tmp_path / "k")["balance"]
    assert len(result.findings) == 1 and "7 images × 10 = 70 of 80 visits, 88 %" in result.findings[0].detail
    subprocess.run(result.fix, shell=True, check=True)
    assert "balance" not in checked(tmp_path / "k"), "1_dog has 7 visits and 2_cat 10"


def test_what_would_stop_a_run_is_an_error(tmp_path):
    """Kohya's numbers beside a folder without one, which the trainers refuse; alone they are read."""
    sound_folder(tmp_path / "k" / "10_dog")
    assert "start" not in checked(tmp_path / "k")
    sound_folder(tmp_path / "k" / "rest")
    start = checked(tmp_path / "k")["start"]
    assert start.check.severity == "error" and "numbers of repeats" in start.findings[0].detail


@pytest.mark.skipif(not hashes_available(), reason="imagehash is not installed")
def test_resaved_and_scaled_copies_are_found_and_different_icons_are_not(tmp_path):
    icons = sorted((ROOT / "assets" / "icons-3d").glob("*.png"))
    copies = 0
    for i, icon in enumerate(icons):
        image = decode(icon.read_bytes())
        image.save(tmp_path / f"{i:02}-a.png")
        for quality, side in ((60, 96), (85, 64), (95, 160)):
            image.resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / f"{i:02}-{quality}.jpg",
                                                                     quality=quality)
            copies += 1
    groups = [finding.images for finding in checked(tmp_path)["near-duplicate"].findings]
    assert all(len({image.name[:2] for image in group}) == 1 for group in groups), "different icons look alike"
    assert sum(len(group) - 1 for group in groups) >= 0.95 * copies


def test_sharp_icons_are_not_blurred_and_blurred_ones_are():
    icons = [decode(path.read_bytes()) for path in sorted((ROOT / "assets" / "icons-3d").glob("*.png"))]
    soft = [icon.filter(ImageFilter.GaussianBlur(3)) for icon in icons]
    assert len(icons) > 20 and min(sharpness(icon, (icon.height, icon.width)) for icon in icons) > BLURRED
    assert max(sharpness(icon, (icon.height, icon.width)) for icon in soft) < BLURRED


NAMES = ["", " x", "é", "#%", "\U0001f600", "$(touch z)", "\n", '"q', "\u202e", "-"]


def test_of_a_thousand_hostile_files_each_is_named_and_the_commands_move_them(tmp_path, monkeypatch):
    """Cut, empty and random images and captions of random bytes, under names that a shell could misread."""
    monkeypatch.chdir(tmp_path)
    folder, chance = sound_folder(tmp_path / "h"), random.Random(1)
    whole = (folder / "good0.png").read_bytes()
    bad = {}
    for i in range(1000):
        contents = (whole[: chance.randrange(len(whole) // 2)], b"", chance.randbytes(99))
        bad[f"{i}{NAMES[i % len(NAMES)]}.png"] = contents[i % 3]
    for name, data in bad.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_bytes(b"a photo" if chance.random() < 0.9 else chance.randbytes(30))
    os.mkfifo(folder / "pipe.png")
    results = checked(Path("h"))
    assert named(results)["unreadable"] == {*bad}
    assert "start" in results, "captions that are no text"
    subprocess.run(["bash", "-euc", results["unreadable"].fix], check=True)
    left = {path.name for path in folder.iterdir()}
    assert len({*bad} - left) == 20 and {path.name for path in (tmp_path / "h-left-out").glob("*.png")} == {*bad} - left
    assert not (tmp_path / "z").exists()


# --------------------------------------------------------------------------------------------------------------- masks


def masked_folder(folder: Path) -> Path:
    """good0 and good1 have sound masks, three others bad ones, good5 none; one mask is nobody's."""
    sound_folder(folder)
    half = Image.new("L", (SIDE, SIDE), 0)
    half.paste(255, (0, 0, SIDE // 2, SIDE))
    for i, mask in enumerate([half, half.resize((32, 32)), half.resize((SIDE, 32)), half.point(lambda _: 0)]):
        mask.save(folder / f"good{i}-masklabel.png")
    (folder / "good4-masklabel.png").write_bytes(b"no image")
    half.save(folder / "nobody-masklabel.png")
    return folder


def test_masks_are_checked_as_a_run_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masked_folder(tmp_path / "d")
    found = checked(Path("d"), masked_loss=True)
    assert named(found) == {"bad mask": {"good2.png", "good4.png"}, "mask": {"good3.png"}, "no mask": {"good5.png"},
                            "orphan mask": set()}
    assert found["bad mask"].check.severity == "error"
    assert "nobody-masklabel.png" in found["orphan mask"].findings[0].detail
    without = checked(Path("d"))
    assert named(without) == {"mask": {"good2.png", "good3.png", "good4.png"}, "no mask": {"good5.png"},
                              "orphan mask": set()}
    assert not any(result.check.severity == "error" for result in without.values()), "a run would start"
    subprocess.run(["bash", "-euc", found["bad mask"].fix], check=True)
    assert "bad mask" not in checked(Path("d"), masked_loss=True)
    assert {"good2.txt", "good2-masklabel.png"} <= {path.name for path in (tmp_path / "d-left-out").iterdir()}


def test_masks_of_a_folder_and_transparency_are_checked(tmp_path):
    folder = sound_folder(tmp_path / "d", 2)
    (tmp_path / "m").mkdir()
    empty = checked(folder, conditioning_data_dir=f"{tmp_path / 'm'}")
    assert "no image has a mask" in empty["start"].findings[0].detail
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "m" / "good0.png")
    assert named(checked(folder, conditioning_data_dir=f"{tmp_path / 'm'}")) == {
        "mask": {"good0.png"}, "no mask": {"good1.png"}}
    image = scene(0).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "good0.png")
    assert named(checked(folder, alpha_mask=True)) == {"no mask": {"good1.png"}}


def test_the_page_shows_masks(tmp_path):
    folder = masked_folder(tmp_path / "d")
    with pytest.raises(SystemExit):
        check_dataset.main([f"{folder}", f"--resolution={SIDE}", "--masked_loss", f"--html={tmp_path / 'a.html'}",
                            f"--json={tmp_path / 'a.json'}"])
    page, found = (tmp_path / "a.html").read_text("utf-8"), json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert page.count('<img class="mask"') == 4 and page.count("mask: 50 % of the area counts") == 3
    assert {image["name"]: image["mask"] for image in found["images"] if "mask" in image} == {
        "good0.png": 0.5, "good1.png": 0.5, "good2.png": 0.5, "good3.png": 0.0}


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Where `python` captions what has no caption, and the editor keeps the first words of a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    cut = "import pathlib,sys; [p.write_text(p.read_text()[:40]) for p in map(pathlib.Path, sys.argv[1:])]"
    write = f"case $1 in *caption_images.py) echo 'a photo of TOK in a garden' > {tmp_path}/'my images'/bare.txt;; esac"
    for name, script in {"python": write, "editor": f'{sys.executable} -c "{cut}" "$@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "EDITOR": f"{folder}/editor"}


@pytest.mark.parametrize("captions", ["files", "metadata"])
def test_a_bad_folder_is_fixed_by_the_commands_alone(captions, tmp_path, shell, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = bad_folder(tmp_path / "my images")
    if captions == "metadata":
        (folder / "bare.txt").write_text("a photo of TOK in a tree")  # scripts/caption_images.py is tested elsewhere
        as_metadata(folder)
    squares = checked(Path("my images"))
    assert "--enable_bucket" in squares["odd"].fix
    done = []
    while fixable := [r for r in checked(Path("my images"), enable_bucket=True, min_bucket_reso=64,
                                         max_bucket_reso=400).values() if r.fix and r.check.severity != "note"]:
        result = fixable[0]
        assert done.count(result.check.name) < 3, f"{result.fix} does not fix {result.findings[0].detail}"
        done.append(result.check.name)
        editor = "sed -i -e 's/, with thing number 5.*number 39//'" if captions == "metadata" else shell["EDITOR"]
        subprocess.run(["bash", "-euc", result.fix.replace('"${EDITOR:-nano}"', editor)], env=shell, check=True)
    assert {*EXPECTED} - {"odd", "untagged"} <= {*done}
    left = {path.stem for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    assert {"good1", "good2", "twin_a", "bare", "long", "other", "wide"} <= left
    rows, problems = read_rows(data_options(instance_data_dir=folder))
    assert not problems and len(rows) == len(left), "what is left can be trained on"
    everything = {path.name for path in (tmp_path / "my images-left-out").rglob("*")} | {p.name for p in
                                                                                        folder.iterdir()}
    assert {*PLANTED.values()} <= everything, "no image is deleted"


def test_the_commands_for_our_programs_are_read_by_them(bad):
    results = checked(bad)
    for name, tool in (("untagged", caption_images), ("odd", check_dataset)):
        words = shlex.split(results[name].fix)
        assert (ROOT / words[1]).is_file()
        given = tool.parse(words[2:])
        assert bad in (given.DIR if isinstance(given.DIR, list) else [given.DIR])


# ------------------------------------------------------------------------------------------------------------- program


def test_the_program_writes_the_summary_json_and_one_offline_page(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        check_dataset.main([f"{bad}", f"--resolution={SIDE}", "--trigger=TOK", f"--json={tmp_path / 'a.json'}",
                            f"--html={tmp_path / 'a.html'}"])
    assert stopped.value.code == 3, "an image that cannot be read stops a run"
    lines = capsys.readouterr().out.splitlines()
    commands = {lines[i + 1] for i, line in enumerate(lines) if line.strip().startswith("fix")}
    with_paths = {line for line in lines if str(bad) in line or str(tmp_path) in line}
    assert max(len(line) for line in {*lines} - commands - with_paths) <= 80
    found = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert {one["check"] for one in found["findings"]} == {*EXPECTED}
    assert all(one["fix"] in "\n".join(commands) for one in found["findings"])
    wide = next(image for image in found["images"] if image["name"] == "wide.png")
    assert wide["cuts"] == [{"width": SIDE, "height": SIDE, "resized": [400, SIDE], "left": 136, "top": 0}]
    page = (tmp_path / "a.html").read_text("utf-8")
    assert page.count("<article") == len(found["images"]) and "default-src &#39;none&#39;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page), "the page needs no other file"
    assert 'M136.0 0.0v128.0h128.0v-128.0z' in page, "the crop of wide.png"


@pytest.mark.parametrize("place", ["a.json", "images/a.json"], ids=["beside the folder", "in it"])
def test_the_json_is_not_taken_for_captions_by_the_next_run(place, tmp_path):
    folder = sound_folder(tmp_path / "images", 3)
    save(folder, "bare.png", scene(22))
    check_dataset.main([f"{folder}", f"--resolution={SIDE}", f"--json={tmp_path / place}"])
    rows, problems = read_rows(data_options(instance_data_dir=folder))
    assert not problems and len(rows) == 4


def test_a_page_escapes_names_and_captions(tmp_path):
    folder = sound_folder(tmp_path / "a", 1)
    save(folder, "<b>x.png", scene(9), 'a "photo" of TOK <script>alert(1)</script> in the garden')
    check_dataset.main([f"{folder}", f"--resolution={SIDE}", f"--html={tmp_path / 'a.html'}"])
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script>alert" not in page and "<b>x" not in page and "&lt;b&gt;x.png" in page


def test_a_folder_may_follow_a_switch():
    args = check_dataset.parse(["--enable-bucket", "my_images", "--no_center_crop"])
    options, _ = check_dataset.read_options(args)
    folder, = args.DIR
    assert folder == Path("my_images") and options.enable_bucket and not options.center_crop


@pytest.mark.parametrize("words, said", [
    (["no/such"], "there is no such folder"), ([".", "--resolution=x"], "--resolution cannot be 'x'"),
    ([".", "--resolution"], "--resolution has no value"), ([".", "--min_bucket_reso=0"], "--min_bucket_reso"),
])
def test_a_bad_command_is_refused_with_what_to_write(words, said):
    with pytest.raises(Exception, match=re.escape(said)):
        check_dataset.main(words)


def test_a_missing_package_of_hashes_is_named_once(bad, monkeypatch, caplog):
    monkeypatch.setattr(looks, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        check_dataset.main([f"{bad}", f"--resolution={SIDE}"])
    assert [r.message for r in caplog.records if "imagehash" in r.message] == [looks.NO_HASHES]


def test_a_thousand_images_take_bounded_time_and_a_small_page(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(1000):
        save(folder, f"{i:04}.jpg", scene(i, 96, 96), f"a photo of TOK, number {i}")
    (folder / "0500.jpg").write_bytes(b"no image")
    before = time.process_time()
    with pytest.raises(SystemExit):
        check_dataset.main([f"{folder}", "--resolution=96", f"--html={tmp_path / 'a.html'}"])
    assert time.process_time() - before < 60
    assert (tmp_path / "a.html").stat().st_size < 20e6


# ---------------------------------------------------------------------------------------------------------- bad_images


def test_images_that_cannot_be_read_are_left_out_named_and_counted(tmp_path, caplog):
    folder = sound_folder(tmp_path / "a", 3)
    (folder / "broken.jpg").write_bytes(b"no image")
    _, (problem,) = read_rows(data_options(instance_data_dir=folder))
    assert "1 of 4 images cannot be read" in problem.what
    rows, problems = read_rows(data_options(instance_data_dir=folder, bad_images="skip"))
    assert not problems and [row.id for row in rows] == ["good0.png", "good1.png", "good2.png"]
    assert "broken.jpg" in str(rows.account) and rows.account.images == rows.account.in_all == 3
    assert any("1 file is left out: broken.jpg" in record.message for record in caplog.records)


def test_a_folder_of_bad_images_alone_is_refused_all_the_same(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    _, problems = read_rows(data_options(instance_data_dir=tmp_path, bad_images="skip"))
    assert any("cannot be read" in problem.what for problem in problems)


# ------------------------------------------------------------------------------------------------------ other sources


def test_the_command_for_images_in_a_parquet_metadata_file_takes_their_rows_out(tmp_path):
    folder = tmp_path / "it's mine"
    folder.mkdir()
    for name, colour in (("a", 1), ("b", 1), ("c", 3)):
        save(folder, f"{name}.png", scene(colour))
    table = pa.table({"file_name": ["a.png", "b.png", "c.png"], "text": ["a TOK", "a TOK", "b TOK"]})
    parquet.write_table(table, folder / "metadata.parquet")
    fix = checked(folder)["duplicate"].fix
    subprocess.run(["bash", "-c", fix.replace("python3", sys.executable)], check=True, cwd=tmp_path)
    assert parquet.read_table(folder / "metadata.parquet")["file_name"].to_pylist() == ["a.png", "c.png"]
    assert (folder / "metadata.parquet.bak").is_file() and "duplicate" not in checked(folder)


def test_data_sets_and_files_of_several_sources_are_checked_as_folders_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        save(tmp_path / "set", f"{name}.png", scene(5))
    cells = [{"bytes": (tmp_path / "set" / "a.png").read_bytes(), "path": None}] * 2
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "tables").mkdir()
    parquet.write_table(pa.table({"image": pa.array(cells, kind), "text": ["a TOK", "another TOK"]}),
                        tmp_path / "tables" / "x.parquet")
    result = checked(tmp_path / "tables")["contradictory"]
    assert [image.name for image in result.images] == ["row 0", "row 1"] and result.fix == ""
    (tmp_path / "d.toml").write_text("[[sources]]\nfolder = 'set'\nprompt = 'a TOK'\nrepeats = 3\n")
    data = read_data_set([tmp_path / "d.toml"], ImageOptions(resolution=SIDE), CaptionOptions())
    assert data.visits == 6 and [image.path.name for image in data.images] == ["a.png", "b.png"]
    assert "mv -n -- set/b.png" in {result.check.name: result for result in examine(data)}["duplicate"].fix
