"""A folder or a data set becomes rows; whatever is wrong with it is told in one go, before anything is trained."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from tests.support.images import data_options, marked, marked_folder, open_files
from trainkit.data.batch import Row
from trainkit.data.images import load_image
from trainkit.data.rows import read_rows
from trainkit.errors import Problem


def rows_of(folder: Path, **changes: object) -> list[Row]:
    rows, problems = read_rows(data_options(instance_data_dir=folder, **changes))
    assert not problems, "\n".join(map(str, problems))
    return rows


def problems_of(folder: Path | None = None, **changes: object) -> list[Problem]:
    return read_rows(data_options(instance_data_dir=folder, **changes))[1]


def with_metadata(folder: Path, lines: list[object], name: str = "metadata.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(2):
        marked(i, 20, 30).save(folder / f"{i}.png")
    (folder / name).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", "utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------------- images


def test_rows_are_sorted_sized_and_junk_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["b.png", "a 'quoted\".PNG", "ü#%.jpg", "кот 🐈.webp", "-rf.bmp"]
    for i, name in enumerate(names):
        marked(i, 20 + i, 30).save(tmp_path / name)
    for junk in (".DS_Store", "._b.png", "notes.txt", "Thumbs.db", "list.csv"):
        (tmp_path / junk).write_bytes(b"\0junk")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "phone.heic").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    rows = rows_of(tmp_path)
    assert [row.id for row in rows] == sorted(names)
    assert {row.id: row.size for row in rows} == {name: (20 + i, 30) for i, name in enumerate(names)}
    assert "phone.heic" in caplog.text and "DS_Store" not in caplog.text


def test_a_name_that_is_no_text_still_makes_a_row(tmp_path: Path) -> None:
    raw = os.fsdecode(b"caf\xe9\n.png")
    marked(1, 20, 20).save(tmp_path / raw)
    row, = rows_of(tmp_path)
    assert row.id == "caf\\xe9\\n.png" and load_image(row).size == (20, 20)


def test_repeats_are_rows_of_their_own_on_one_image(tmp_path: Path) -> None:
    rows = rows_of(marked_folder(tmp_path / "d", 3), repeats=2)
    assert [(row.id, row.repeat) for row in rows] == [(f"{i:03}.png", r) for i in range(3) for r in range(2)]
    assert all(row.loss_weight == 1.0 for row in rows)


def test_all_unreadable_images_are_one_problem_and_its_command_mends_it(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "my data", 4)
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "it's.jpg").write_text("<html>")
    (folder / "empty.webp").touch()
    rows, problems = read_rows(data_options(instance_data_dir=folder))
    problem, = problems
    assert len(rows) == 3 and problem.kind == "data" and problem.what.startswith("3 of 6")
    assert all(name in problem.why for name in ("000.png", "it's.jpg", "empty.webp"))
    subprocess.run(problem.fix, shell=True, check=True)
    assert len(rows_of(folder)) == 3


def test_a_long_list_of_bad_images_is_cut(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.png").touch()
    problem, = problems_of(tmp_path)
    assert "19.png" in problem.why and "20.png" not in problem.why and "30 more" in problem.why


def test_no_file_stays_open_and_no_pixels_stay(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 12)
    before = open_files()
    rows = rows_of(folder)
    assert open_files() == before and len(pickle.dumps(rows)) < 12 * 500


def test_animated_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    rows_of(tmp_path)
    assert "a.gif" in caplog.text and "first" in caplog.text


# ---------------------------------------------------------------------------------------------------------- captions


def test_sidecars_in_any_encoding_become_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {"a": "a café".encode(), "b": "a café".encode("utf-8-sig"), "c": "a café".encode("utf-16"),
             "d": "a café".encode("cp1252"), "e": b" \r\n ", "f": "two\r\nlines\0 🐈\x1b".encode()}
    for number, (stem, data) in enumerate(texts.items()):
        marked(number, 20, 20).save(tmp_path / f"{stem}.v1.png")
        (tmp_path / f"{stem}.v1.txt").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        captions = [row.caption for row in rows_of(tmp_path)]
    assert captions == ["a café"] * 4 + ["a photo of TOK", "two lines 🐈"]
    assert "c.v1.txt (utf-16)" in caplog.text and "d.v1.txt (cp1252)" in caplog.text and "a.v1.txt" not in caplog.text


@pytest.mark.parametrize("line", ['a.png,"an a\n', 'a.png,"an "a" here"\n'])
def test_a_quote_that_is_not_closed_does_not_swallow_the_other_rows(tmp_path: Path, line: str) -> None:
    for number, name in enumerate("ab"):
        marked(number, 20, 20).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{line}b.png,a b\n")
    problem = problems_of(tmp_path)[0]
    assert "metadata.csv" in problem.why and "quote" in problem.why


def test_half_a_surrogate_pair_in_metadata_never_reaches_a_tokenizer(tmp_path: Path) -> None:
    marked(1, 20, 20).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a \\ud800cat \\ud83d\\udc08"}\n')
    row, = rows_of(tmp_path)
    assert row.caption == "a cat 🐈" and row.caption.encode()


def test_a_caption_shared_by_two_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "a.jpg"):
        marked(1, 20, 20).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("which?")
    assert len(rows_of(tmp_path)) == 2 and "a.jpg" in caplog.text and "share" in caplog.text


def test_a_sidecar_may_not_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 1)
    (tmp_path / "secret").write_text("token")
    (folder / "000.txt").unlink()
    (folder / "000.txt").symlink_to(tmp_path / "secret")
    problem, = problems_of(folder)
    assert "000.txt" in problem.why and "token" not in str(problem)


def test_a_hub_snapshot_folder_of_links_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    marked(1, 20, 20).save(blobs / "1", "PNG")
    (blobs / "2").write_text("linked")
    (snapshot / "a.png").symlink_to("../../blobs/1")
    (snapshot / "a.txt").symlink_to("../../blobs/2")
    assert rows_of(snapshot)[0].caption == "linked"


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_jsonl_metadata_names_captions(tmp_path: Path, column: str) -> None:
    lines = [{"file_name": "1.png", column: "one"}, "", {"file_name": "./0.png", column: "line\u2028break"}]
    assert [row.caption for row in rows_of(with_metadata(tmp_path, lines))] == ["line break", "one"]
    assert [row.caption for row in rows_of(tmp_path, caption_column=column)] == ["line break", "one"]


def test_csv_metadata_names_captions(tmp_path: Path) -> None:
    lines = ["\ufefffile_name,mood,text", '0.png,,"a, ""b""', 'second line"', "1.png,sad,"]
    assert [row.caption for row in rows_of(with_metadata(tmp_path, lines, "metadata.csv"))] == \
        ['a, "b" second line', "a photo of TOK"]
    assert [row.caption for row in rows_of(tmp_path, caption_column="mood")] == ["a photo of TOK", "sad"]


def test_an_index_column_without_a_name_is_no_caption(tmp_path: Path) -> None:
    """Tables saved with their index have one; it is not read where no column holds captions."""
    folder = with_metadata(tmp_path, [",file_name,mood", "0,0.png,sad", "1,1.png,glad"], "metadata.csv")
    assert [row.caption for row in rows_of(folder)] == ["a photo of TOK"] * 2


def test_images_in_subfolders_and_unlisted_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "more").mkdir()
    marked(2, 20, 30).save(tmp_path / "more" / "x.png")
    rows = rows_of(with_metadata(tmp_path, [{"file_name": "more/x.png", "text": "x"}, {"file_name": "0.png"}]))
    assert [row.id for row in rows] == ["0.png", "1.png", "more/x.png"]
    assert [row.caption for row in rows] == ["a photo of TOK", "a photo of TOK", "x"]
    assert "1.png" in caplog.text and "not in the metadata" in caplog.text


def test_composed_and_decomposed_accents_name_the_same_file(tmp_path: Path) -> None:
    marked(1, 20, 20).save(tmp_path / unicodedata.normalize("NFD", "é.png"))
    line = {"file_name": unicodedata.normalize("NFC", "é.png"), "text": "e"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert [row.caption for row in rows_of(tmp_path)] == ["e"]


def test_every_bad_metadata_line_is_named_with_its_number(tmp_path: Path) -> None:
    lines = [{"file_name": "0.png", "text": "fine"}, "{broken", {"file_name": "gone.png", "text": "x"}, "[1]",
             {"file_name": "1.png", "text": float("nan")}, {"file_name": 7, "text": "x"}, {"text": "x"},
             {"file_name": "0.png", "text": "again"}, {"file_name": "1.png", "text": "x" * 70_000}, "[" * 100_000]
    problem, = problems_of(with_metadata(tmp_path, lines))
    assert problem.what.startswith("9 unusable lines") and problem.kind == "data"
    words = {2: "JSON", 3: "gone.png", 4: "object", 5: "float", 6: "int", 7: "missing", 8: "metadata.jsonl:1",
             9: "longer", 10: "JSON"}
    for number, word in words.items():
        line = next(x for x in problem.why.splitlines() if f"metadata.jsonl:{number}:" in x.split("'")[0])
        assert word in line, line


@pytest.mark.parametrize("name", [
    "../secret.png", "/etc/passwd", "a/../../secret.png", "C:\\x.png", "\\\\host\\x.png", "http://x/y.png", "file:///x",
    "hf://x", "", ".", "..", "0.png\0", "link/secret.png", "pipe", "sub", "0.png/..", "c:0.png", "x" * 5000,
])
def test_a_hostile_file_name_reads_nothing(tmp_path: Path, name: str) -> None:
    folder = with_metadata(tmp_path / "d", [{"file_name": name, "text": "x"}])
    marked(9, 20, 20).save(tmp_path / "secret.png")
    (folder / "link").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    rows, problems = read_rows(data_options(instance_data_dir=folder))
    assert len(problems) == 1 and "metadata.jsonl:1" in problems[0].why
    assert {row.id for row in rows} == {"0.png", "1.png"}


def test_a_missing_caption_column_lists_those_there(tmp_path: Path) -> None:
    folder = with_metadata(tmp_path, [{"file_name": "0.png", "text": "x", "mood": "y"}])
    problem, = problems_of(folder, caption_column="txt")
    assert problem.kind == "usage" and "file_name, text, mood" in problem.why and "--caption_column text" in problem.fix
    (folder / "metadata.jsonl").unlink()
    problem, = problems_of(folder, caption_column="text")
    assert "no metadata" in problem.why


def test_metadata_without_captions_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(rows_of(with_metadata(tmp_path, [{"file_name": "0.png", "noun": "x"}]))) == 2
    assert "none is named text" in caplog.text


# ----------------------------------------------------------------------------------------------------------- sources


def test_exactly_one_source_must_be_given(tmp_path: Path) -> None:
    assert [p.kind for p in problems_of()] == ["usage"]
    assert [p.kind for p in problems_of(tmp_path, dataset_name="x")] == ["usage"]


def test_a_folder_without_images_says_what_is_there_instead(tmp_path: Path) -> None:
    empty, nested, file = tmp_path / "empty", tmp_path / "nested", tmp_path / "a.png"
    empty.mkdir()
    for name, count in {"aaa": 0, "icons": 2, "test": 3}.items():
        (nested / name).mkdir(parents=True)
        for i in range(count):
            marked(i, 20, 20).save(nested / name / f"{i}.png")
    marked(1, 20, 20).save(file)
    for folder, why in {tmp_path / "nope": "no such folder", file: "a file", empty: "no file named"}.items():
        problem, = problems_of(folder)
        assert why in problem.why and problem.kind == "data", problem
    problem, = problems_of(nested)
    assert problem.fix == f"--instance_data_dir {shlex.quote(str(nested / 'icons'))}"


def test_a_local_imagefolder_loads_through_datasets(tmp_path: Path) -> None:
    folder = with_metadata(tmp_path / "d", [{"file_name": f"{i}.png", "text": t} for i, t in enumerate(["zero", ""])])
    how = dict(dataset_name=folder, cache_dir=tmp_path / "hf")
    rows, problems = read_rows(data_options(**how, caption_column="text", repeats=2))
    assert not problems and [row.caption for row in rows] == ["zero"] * 2 + ["a photo of TOK"] * 2
    assert [row.size for row in rows] == [(20, 30)] * 4
    again = pickle.loads(pickle.dumps(rows))
    assert load_image(again[2]).getpixel((3, 4)) == (1, 3, 4), "rows of a table must reach worker processes"
    assert {row.caption for row in read_rows(data_options(**how))[0]} == {"a photo of TOK"}
    wrong = read_rows(data_options(**how, caption_column="txt", image_column="img"))[1]
    assert [p.fix for p in wrong] == ["--image_column image", "--caption_column text"]
    assert all("image, text" in p.why for p in wrong)


def test_a_data_set_that_is_not_there_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    problem, = problems_of(None, dataset_name=tmp_path / "nope", cache_dir=tmp_path / "hf")
    assert problem.kind == "data" and str(tmp_path / "nope") in problem.where
