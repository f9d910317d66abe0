"""Captions and images that lie in or around a data folder and are not read are refused, or told with their names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.support.images import data_options, marked
from trainkit.data.batch import Row
from trainkit.data.rows import Rows, read_rows
from trainkit.data.sources.folder import Folder, list_folder
from trainkit.errors import Problem
from trainkit.options import CaptionedDataOptions, ImageOptions

NAMES = ("fox.png", "Owl One.jpg", "key.webp")
CAPTIONS = {name: f"a {Path(name).stem.lower()}, 3d icon" for name in NAMES}


def images(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        marked(number, 40, 40 + number).save(folder / name)
    return folder


def options(folder: Path, *, captioned: bool) -> ImageOptions:
    if captioned:
        return CaptionedDataOptions(resolution=32, train_data_dir=str(folder))
    return data_options(instance_data_dir=folder)


def read(folder: Path, *, captioned: bool = False) -> tuple[Rows, list[Problem]]:
    return read_rows(options(folder, captioned=captioned))


def captions(rows: list[Row]) -> dict[str, str]:
    return {Path(row.id).name: row.caption for row in rows}


both = pytest.mark.parametrize("captioned", [False, True], ids=["dreambooth", "captioned"])

# ------------------------------------------------------------------------------------------------------------- tables

RECORDS = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]


def csv(delimiter: str, header: tuple[str, str] = ("file_name", "text")) -> bytes:
    lines = [delimiter.join(header), *(delimiter.join((name, f'"{text}"')) for name, text in CAPTIONS.items())]
    return ("\n".join(lines) + "\n").encode()


def spreadsheet(path: Path) -> None:
    cells = "".join(f"<si><t>{cell}</t></si>" for pair in [("name", "words"), *CAPTIONS.items()] for cell in pair)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst>{cells}</sst>")


JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TABLES: dict[str, bytes] = {
    "captions.jsonl": JSONL, "Metadata.jsonl": JSONL, "METADATA.JSONL": JSONL, "metadata.ndjson": JSONL,
    "metadata.json1": JSONL, "metadata.jsonl.txt": JSONL, "metadata": JSONL,
    "captions.csv": csv(","), "Captions.CSV": csv(";"), "captions.tsv": csv("\t"), "list.csv": csv("|"),
    "captions.tab": csv("\t", ("image", "caption")), "data.csv": csv(",", ("image", "caption")),
    "metadata.json": json.dumps(RECORDS).encode(), "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "map.json": json.dumps(CAPTIONS).encode(), "captions.txt": csv("|", ("name", "words")),
    "meta_cap.json": json.dumps({f"/home/me/{Path(name).stem}": {"caption": text, "tags": "x"}
                                 for name, text in CAPTIONS.items()}).encode(),
    "nested.json": json.dumps({"images": [{"name": n, "about": [text]} for n, text in CAPTIONS.items()]}).encode(),
    "captions.yaml": "".join(f"{name}: {text}\n" for name, text in CAPTIONS.items()).encode(),
    "prose.txt": "".join(f"{name} - {text}\n" for name, text in CAPTIONS.items()).encode(),
    "stems.csv": ("id,words\n" + "".join(f'{Path(n).stem},"{t}"\n' for n, t in CAPTIONS.items())).encode(),
    "captions.md": "".join(f"| {name} | {text} |\n" for name, text in [("image", "words"), *CAPTIONS.items()]).encode(),
    "windows.csv": ("path;words\n" + "".join(f"C:\\pics\\{n};{t}\n" for n, t in CAPTIONS.items())).encode("utf-16"),
}


@both
@pytest.mark.parametrize("name", [*TABLES, "captions.parquet", "captions.xlsx"])
def test_a_table_of_captions_under_another_name_is_refused_by_name(tmp_path: Path, name: str, captioned: bool) -> None:
    folder = images(tmp_path / "my data")
    put(folder, name)
    problem = read(folder, captioned=captioned)[1][0]
    assert problem.what == f"{name} holds captions and is not read" and problem.kind == "data"
    assert "3 images" in problem.why and "metadata." in problem.fix
    runs = problem.fix.startswith(("mv ", "sed "))
    if runs:
        subprocess.run(problem.fix, shell=True, check=True)
    else:
        assert "file_name" in problem.fix and "a fox, 3d icon" in problem.fix.lower()
        return
    (folder / name).unlink(missing_ok=True)
    rows, problems = read(folder, captioned=captioned)
    assert not problems and captions(rows) == CAPTIONS


def put(folder: Path, name: str) -> None:
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(RECORDS), folder / name)
    elif name.endswith(".xlsx"):
        spreadsheet(folder / name)
    else:
        (folder / name).write_bytes(TABLES[name])


def test_most_tables_are_mended_by_a_command(tmp_path: Path) -> None:
    commands = []
    for name in [*TABLES, "captions.parquet"]:
        folder = images(tmp_path / name)
        put(folder, name)
        commands += [read(folder)[1][0].fix.startswith(("mv ", "sed "))]
    assert sum(commands) >= 13


@both
@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "metadata.csv", "captions.json", "meta.parquet"])
@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_table_one_folder_up_is_refused(tmp_path: Path, name: str, prefix: str, captioned: bool) -> None:
    folder = images(tmp_path / "images")
    records = [{**record, "file_name": prefix + record["file_name"]} for record in RECORDS]
    text = {"jsonl": "".join(json.dumps(r) + "\n" for r in records), "json": json.dumps(records),
            "csv": "file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in records)}
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(records), tmp_path / name)
    else:
        (tmp_path / name).write_text(text[name.rpartition(".")[2]])
    problem = read(folder, captioned=captioned)[1][0]
    assert name in problem.what and str(folder) in problem.fix, problem


@pytest.mark.parametrize("below", ["meta", "annotations", "captions"])
def test_a_table_one_folder_down_is_refused(tmp_path: Path, below: str) -> None:
    folder = images(tmp_path / "d")
    (folder / below).mkdir()
    (folder / below / "metadata.jsonl").write_bytes(JSONL)
    problem, = read(folder)[1]
    assert f"{below}/metadata.jsonl" in problem.what and problem.fix.startswith("mv")
    subprocess.run(problem.fix, shell=True, check=True)
    assert captions(read(folder)[0]) == CAPTIONS
    (folder / below / "metadata.jsonl").write_bytes(JSONL)
    assert "names count from the folder" in (text := str(read(folder, captioned=True)[1][0])) or below in text


@both
def test_what_names_images_without_words_is_told_and_not_refused(
    tmp_path: Path, captioned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "d")
    (folder / "train.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "scores.csv").write_text("image,score\n" + "".join(f"{name},0.5\n" for name in NAMES))
    (folder / "notes.txt").write_text("the light was good")
    (folder / "README.md").write_text("![fox](fox.png) is a nice fox")
    (folder / "clip.mov").write_bytes(b"\0\0\0\x14ftypqt  fox.png is in it")
    rows, problems = read(folder, captioned=captioned)
    assert [p for p in problems if p.what != "no image has a caption"] == [] and len(rows) == 3
    for name in ("train.txt", "scores.csv", "notes.txt", "clip.mov"):
        assert name in caplog.text
    assert "README.md" not in caplog.text
    assert {one.name for one in rows.account.left_out} == {"train.txt", "scores.csv", "notes.txt", "clip.mov"}


@both
def test_a_leftover_table_beside_read_captions_is_told(
    tmp_path: Path, captioned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "d")
    (folder / "metadata.jsonl").write_bytes(JSONL)
    (folder / "old.csv").write_bytes(csv(","))
    rows, problems = read(folder, captioned=captioned)
    assert not problems and captions(rows) == CAPTIONS and "old.csv" in caplog.text
    assert f"{rows.account}".startswith("3 images, 3 captions from metadata.jsonl, 1 file not read: old.csv")


def test_another_data_set_beside_this_one_is_left_alone(tmp_path: Path) -> None:
    """Images of the same names lie beside the table above, or in the folder that it names."""
    folder = images(tmp_path / "mine")
    images(tmp_path / "other")
    lines = [{**record, "file_name": f"other/{record['file_name']}"} for record in RECORDS]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(folder)[1] == []
    images(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(JSONL)
    assert read(folder)[1] == []


# ----------------------------------------------------------------------------------------------------------- sidecars

SIDECARS = [
    "fox.blip", "fox.png.txt", "FOX.txt", "fox.cap", "fox.tags", "fox.captions", "fox.prompt", "fox.caption.txt",
    "fox_caption.txt", "fox.txt.txt", "fox (1).txt", "fox(2).txt", "fox - Copy.txt", "fox.wd14", "Fox.TXT",
    "fox .txt", "captions/fox.txt", "labels/fox.txt", "../captions/fox.txt", "../txt/fox.txt",
]


@both
@pytest.mark.parametrize("name", SIDECARS)
def test_a_caption_file_of_another_name_or_place_is_refused_and_the_command_mends_it(
    tmp_path: Path, name: str, captioned: bool
) -> None:
    folder = images(tmp_path / "it's mine", ("fox.png", "owl.png"))
    (folder / "owl.txt").write_text("an owl")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("a fox")
    problem, = read(folder, captioned=captioned)[1]
    assert "1 caption file is" in problem.what and f"{name} should be called fox.txt" in problem.why
    subprocess.run(problem.fix, shell=True, check=True)
    rows, problems = read(folder, captioned=captioned)
    assert not problems and captions(rows) == {"fox.png": "a fox", "owl.png": "an owl"}


DOCUMENTS = {"fox.rtf": b"{\\rtf1 a fox}", "fox.docx": b"PK\x03\x04 a fox", "fox.pdf": b"%PDF-1.7 a fox"}


@both
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_no_caption_under_any_name(tmp_path: Path, name: str, captioned: bool) -> None:
    """As text it would be trained on with all its codes."""
    folder = images(tmp_path / "d", ("fox.png", "owl.png"))
    (folder / "owl.txt").write_text("an owl")
    (folder / name).write_bytes(DOCUMENTS[name])
    problem, = read(folder, captioned=captioned)[1]
    assert name in problem.why and "plain text" in problem.fix and "mv " not in problem.fix
    (folder / name).rename(folder / "fox.txt")
    problem, = read(folder, captioned=captioned)[1]
    assert "fox.txt" in problem.why and "plain text" in problem.why


def test_the_card_of_a_data_set_may_show_some_of_its_images(tmp_path: Path) -> None:
    folder = images(tmp_path / "d", ("fox.png", "owl.png", "key.png", "car.png", "hat.png"))
    (folder / "README.md").write_text("# Icons\n![a red fox](fox.png)\n![an owl](owl.png)\n")
    rows, problems = read(folder)
    assert not problems and not rows.account.left_out


@pytest.mark.parametrize("ending", [".png.txt", ".tags", ".cap"])
def test_one_command_renames_hundreds(tmp_path: Path, ending: str) -> None:
    folder = images(tmp_path / "d", tuple(f"{i:03}.png" for i in range(30)))
    for i in range(30):
        (folder / f"{i:03}{ending}").write_text(f"image {i}")
    problem, = read(folder)[1]
    subprocess.run(["bash", "-c", problem.fix], check=True)
    assert captions(read(folder)[0]) == {f"{i:03}.png": f"image {i}" for i in range(30)}


def test_a_spare_caption_file_and_a_stray_one_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    for name in ("fox.txt", "fox.caption", "fox.tags", "zebra.txt"):
        (folder / name).write_text(name)
    rows, problems = read(folder)
    assert not problems and captions(rows) == {"fox.png": "fox.txt"}
    assert {one.name for one in rows.account.left_out} == {"fox.caption", "fox.tags", "zebra.txt"}
    assert all(name in caplog.text for name in ("fox.caption", "fox.tags", "zebra.txt"))


@pytest.mark.parametrize("names", [("fox.json",), ("fox.png.json",), tuple(f"{i:02}.json" for i in range(30))])
def test_json_captions_of_one_image_each_are_refused_and_the_command_writes_them_anew(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    stems = [name.removesuffix(".json").removesuffix(".png") for name in names]
    folder = images(tmp_path / "it's mine", tuple(f"{stem}.png" for stem in stems))
    for name in names:
        (folder / name).write_text(json.dumps({"score": 1, "caption": f"says {name[:2]}"}))
    problem, = read(folder)[1]
    assert "with captions that" in problem.what
    subprocess.run(problem.fix, shell=True, check=True)
    rows, problems = read(folder)
    assert not problems and [row.caption for row in rows] == [f"says {name[:2]}" for name in names]


@both
def test_boxes_of_a_detector_are_no_captions(
    tmp_path: Path, captioned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "images", ("fox.png", "owl.png"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "fox.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (folder / "fox.cap").write_text("0 0.5 0.5 0.1 0.1\n")
    (folder / "owl.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert not read(folder, captioned=captioned)[1]
    assert "1 caption has no word, only numbers and signs: owl.txt" in caplog.text.replace(".png", ".txt")


def test_images_under_names_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    content = (folder / "fox.png").read_bytes()
    for name in ("no suffix", "large.jpg_large", "half.png.part", "photo.HEIC"):
        (folder / name).write_bytes(content)
    rows, problems = read(folder)
    assert not problems and len(rows) == 1
    told = {one.name: one.why for one in rows.account.left_out}
    assert "by its content" in told["no suffix"] and "by its content" in told["large.jpg_large"]
    assert "pillow-heif" in told["photo.HEIC"] and len(told) == 4


def test_a_folder_of_iphone_photos_or_of_an_archive_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    assert "pillow-heif" in read(tmp_path)[1][0].fix
    (tmp_path / "IMG_1.HEIC").rename(tmp_path / "images.zip")
    assert "images.zip" in read(tmp_path)[1][0].why


def test_a_name_in_the_metadata_that_is_nearly_right_is_told(tmp_path: Path) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    for name in ("Fox.PNG", "fox.jpg"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert "but fox.png is" in read(folder)[1][0].why


@pytest.mark.parametrize("name", ["captions.csv", "Metadata.jsonl", "captions/fox.txt", "fox.png.txt"])
def test_a_local_data_set_is_looked_through_too(tmp_path: Path, name: str) -> None:
    folder = images(tmp_path / "d", ("fox.png", "owl.png"))
    (folder / name).parent.mkdir(exist_ok=True)
    line = json.dumps({"file_name": "fox.png", "text": "a fox"})
    text = line if name.endswith("jsonl") else "file_name,text\nfox.png,a fox\n"
    (folder / name).write_text(text)
    problem, = read_rows(data_options(dataset_name=folder, cache_dir=tmp_path / "hf"))[1]
    assert name in f"{problem.what} {problem.why}"


def test_json_of_one_image_is_told_and_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    (folder / "fox.png.json").write_text(json.dumps({"title": "fox.png", "description": "taken in the zoo"}))
    assert read(folder)[1] == [] and "fox.png.json" in caplog.text


@both
def test_blank_captions_are_counted_and_told(
    tmp_path: Path, captioned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "d", ("fox.png", "owl.png", "key.png", "car.png"))
    lines = [{"file_name": "fox.png", "text": None}, {"file_name": "owl.png", "text": " "},
             {"file_name": "car.png", "text": "a car"}]
    for name in ("nan", "None", "NULL", "<NA>"):
        images(folder, (f"{name}.png",))
        (folder / f"{name}.txt").write_text(f"{name}\n")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "key.txt").write_text(" \n")
    rows, problems = read(folder, captioned=captioned)
    assert not problems and "7 images have a blank caption" in caplog.text
    assert rows.account.captions == {"metadata.jsonl": 1}


# ------------------------------------------------------------------------------------------------------------- images


def test_images_in_subfolders_are_refused_with_their_numbers(tmp_path: Path) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    images(folder / "more" / "deeper", ("owl.png", "key.png"))
    images(tmp_path / "store", ("car.png",))
    (folder / "linked").symlink_to("../store")
    (folder / "self").symlink_to(".")
    (folder / "empty").mkdir()
    images(folder / ".hidden", ("x.png",))
    problem, = read(folder)[1]
    assert problem.what == "3 images in subfolders are not read"
    assert "more/deeper/: 2 images" in problem.why and "linked/: 1 image" in problem.why
    assert "self" not in str(problem) and "hidden" not in str(problem) and "empty" not in str(problem)
    listed, problems = list_folder(Folder(folder, "--class_data_dir", "--class_prompt"), verbose=False)
    assert [p.what for p in problems] == [problem.what] and len(listed) == 1


def test_a_linked_folder_of_captioned_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    (folder / "fox.txt").write_text("a fox")
    images(tmp_path / "store", ("car.png", "owl.png"))
    (folder / "linked").symlink_to(tmp_path / "store")
    (folder / "loop").symlink_to(folder)
    assert not read(folder, captioned=True)[1]
    assert "linked/: a link to a folder with 2 images" in caplog.text and "loop" not in caplog.text


@both
def test_names_of_images_that_are_no_files_are_told(
    tmp_path: Path, captioned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    (folder / "fox.txt").write_text("a fox")
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "loop.JPG").symlink_to("loop.JPG")
    os.mkfifo(folder / "pipe.png")
    for name in ("._fox.png", ".hidden.png"):  # macOS's companion of fox.png; somebody's image
        (folder / name).write_bytes((folder / "fox.png").read_bytes())
    (folder / "folder.webp").mkdir()
    monkeypatch.chdir(folder)  # the name of a socket is short
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.png")
    rows, problems = read(folder, captioned=captioned)
    listening.close()
    assert not problems and [row.id for row in rows] == ["fox.png"]
    told = {one.name: one.why for one in rows.account.left_out}
    assert set(told) == {"gone.png", "loop.JPG", "pipe.png", "folder.webp", "socket.png", ".hidden.png"}
    assert "/nowhere/gone.png" in told["gone.png"] and told["pipe.png"] == "it is a pipe"
    assert all(name in caplog.text for name in told)


@pytest.mark.parametrize("name", ["fox.txt", "metadata.jsonl"])
def test_captions_behind_a_dangling_link_are_told(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "d", ("fox.png",))
    (folder / name).symlink_to("/nowhere/else")
    rows, _ = read(folder)
    assert f"{name}: it is a link to /nowhere/else" in caplog.text and rows.account.left_out


def test_a_folder_of_dangling_links_says_so(tmp_path: Path) -> None:
    (tmp_path / "fox.png").symlink_to("/nowhere/fox.png")
    problem, = read(tmp_path)[1]
    assert problem.what == "no images" and "fox.png is a link to /nowhere/fox.png" in problem.why


def test_a_folder_of_tables_names_the_flag_that_reads_them(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "train-00000-of-00001.parquet")
    assert read(tmp_path)[1][0].fix == f"--dataset_name {tmp_path}"
    file = tmp_path / "train-00000-of-00001.parquet"
    assert read(file)[1][0].fix == f"--dataset_name {file}"


# ------------------------------------------------------------------------------------------------------------- kohya


def kohya(folder: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        images(folder / name, (f"{place}a.png", f"{place}b.png"))
        for stem in "ab":
            (folder / name / f"{place}{stem}.txt").write_text("words")
    return folder


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("names", [("10_TOK man", "1_reg"), ("40_x", "rest")])
def test_a_layout_of_kohya_that_may_mean_something_else_is_refused(
        tmp_path: Path, names: tuple[str, ...], captioned: bool) -> None:
    folder = kohya(tmp_path / "img", *names)
    problem, = read(folder, captioned=captioned)[1]
    assert "--compat kohya" in problem.fix and ("--class_data_dir" in problem.fix) == ("1_reg" in names)


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("names", [("10_TOK man",), ("1_icons",), ("5_a", "10_b"), ("1_reg",)])
def test_the_numbers_of_a_layout_of_kohya_are_repeats(tmp_path: Path, names: tuple[str, ...], captioned: bool) -> None:
    rows, problems = read(kohya(tmp_path / "img", *names), captioned=captioned)
    assert not problems and "kohya" in rows.note
    assert Counter(row.id.partition("/")[0] for row in rows) == {
        name: 2 * int(name.partition("_")[0]) for name in names}


@pytest.mark.parametrize("names", [
    ("2024_summer",), ("01_intro", "02_street"), ("1_cats", "2_dogs", "3_birds"), ("cats", "dogs"), ("10cats",),
    ("10",)])
def test_other_numbers_in_names_are_somebodys_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert read(kohya(tmp_path / "img", *names), captioned=True)[1] == []


def test_metadata_says_that_a_numbered_folder_is_a_folder(tmp_path: Path) -> None:
    folder = kohya(tmp_path / "img", "10_cats")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "10_cats/0a.png", "text": "a cat"}))
    assert read(folder, captioned=True)[1] == []


def test_a_numbered_folder_given_itself_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = kohya(tmp_path, "10_TOK man")
    assert read(folder / "10_TOK man")[1] == [] and "--repeats 10" in caplog.text
    caplog.clear()
    assert read_rows(data_options(instance_data_dir=folder / "10_TOK man", repeats=10))[1] == []
    told = [record.getMessage() for record in caplog.records if "check_dataset" not in record.getMessage()]
    assert not any("--repeats" in line for line in told)
