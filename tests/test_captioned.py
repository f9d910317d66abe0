"""Captioned data sets: every layout that imagefolder has, lists of captions, a part of the images."""

from __future__ import annotations

import json
import subprocess
import unicodedata
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from pyarrow import parquet

from tests.support.images import data_options, marked, marked_folder
from trainkit.data.batch import Row, Slot
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import load_image
from trainkit.data.loader import Images, micro_batches
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Order, Shard
from trainkit.data.sources.folder import Folder, list_folder
from trainkit.errors import Problem
from trainkit.options import CaptionedDataOptions


def options(**changes: object) -> CaptionedDataOptions:
    return CaptionedDataOptions(
        resolution=32, **{k: str(v) if isinstance(v, Path) else v for k, v in changes.items()})


def rows_of(folder: Path, *, seed: int = 0, **changes: object) -> list[Row]:
    rows, problems = read_rows(options(train_data_dir=folder, **changes), seed=seed)
    assert not problems, "\n".join(map(str, problems))
    return rows


def problem_of(folder: Path | None = None, **changes: object) -> Problem:
    problem, = read_rows(options(train_data_dir=folder, **changes))[1]
    return problem


def captions_of(folder: Path, **changes: object) -> dict[str, tuple[str, ...]]:
    return {row.id: row.all_captions for row in rows_of(folder, **changes)}


def write(folder: Path, images: list[str], metadata: object = None, name: str = "metadata.jsonl") -> Path:
    """`images` by their paths under the folder, and lines of metadata, as text or as objects."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(images):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        marked(number, 40, 33 + number).save(folder / path)
    lines = metadata or []
    if lines and name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(lines), folder / name)
    elif lines:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / name).write_text(text + "\n", "utf-8")
    return folder


# ----------------------------------------------------------------------------------------------------------- layouts


LINES = [{"file_name": "a.png", "text": "an a"}, {"file_name": "b.png", "text": "a b"}]


@pytest.mark.parametrize(("name", "lines"), [
    ("metadata.jsonl", LINES), ("metadata.parquet", LINES),
    ("metadata.csv", ["file_name,text", "a.png,an a", "b.png,a b"]),
])
@pytest.mark.parametrize("below", ["", "train", "deep/er"])
def test_metadata_of_any_kind_counts_where_it_lies(tmp_path: Path, name: str, lines: list, below: str) -> None:
    write(tmp_path / below, ["a.png", "b.png"], lines, name)
    prefix = f"{below}/" if below else ""
    assert captions_of(tmp_path) == {f"{prefix}a.png": ("an a",), f"{prefix}b.png": ("a b",)}


def test_class_folders_with_metadata_above_them_or_in_each(tmp_path: Path) -> None:
    write(tmp_path, ["cat/0.png", "dog/0.png"], [{"file_name": "cat/0.png", "text": "a cat"}])
    write(tmp_path / "dog", [], [{"file_name": "0.png", "caption": "a dog"}])
    assert captions_of(tmp_path) == {"cat/0.png": ("a cat",), "dog/0.png": ("a dog",)}


def test_the_nearer_of_two_metadata_files_counts_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, ["cat/0.png", "cat/1.png"], [{"file_name": f"cat/{i}.png", "text": "far"} for i in range(2)])
    write(tmp_path / "cat", [], [{"file_name": "0.png", "text": "near"}, {"file_name": "1.png", "text": "far"}])
    assert captions_of(tmp_path) == {"cat/0.png": ("near",), "cat/1.png": ("far",)}
    assert "1 image is named by the metadata of two folders" in caplog.text


def test_sidecars_beside_images_in_any_folder(tmp_path: Path) -> None:
    write(tmp_path, ["x.png", "cat/x.png", "dog/ü 猫.png"])
    for name in ("x", "cat/x", "dog/ü 猫"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}\n", "utf-8")
    assert captions_of(tmp_path) == {
        "x.png": ("this is x",), "cat/x.png": ("this is cat/x",), "dog/ü 猫.png": ("this is dog/ü 猫",)}


def test_images_of_one_name_in_two_folders_do_not_share_a_caption_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, ["a/x.png", "b/x.png"])
    for name in "ab":
        (tmp_path / name / "x.txt").write_text(name)
    assert captions_of(tmp_path) == {"a/x.png": ("a",), "b/x.png": ("b",)} and "share" not in caplog.text
    write(tmp_path, ["a/x.jpg"])
    rows_of(tmp_path)
    assert "2 images share a caption file" in caplog.text


def test_names_in_any_script_and_form_are_found(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    names = ["кот 🐈.png", f"{decomposed}.png", "a 'b\".png"]
    lines = [{"file_name": name.replace(decomposed, composed), "text": "x"} for name in names]
    write(tmp_path / "train", names, lines)
    assert set(captions_of(tmp_path)) == {f"train/{name}" for name in names}


def test_of_several_splits_only_train_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["train/a.png", "test/b.png", "validation/c.png", "more/d.png"]
    write(tmp_path, names, [{"file_name": name, "text": name} for name in names])
    assert set(captions_of(tmp_path)) == {"train/a.png", "more/d.png"}
    assert "left out: test" in caplog.text and "validation" in caplog.text


def test_a_class_that_is_named_as_a_split_is_read_where_there_is_no_train(tmp_path: Path) -> None:
    names = ["test/b.png", "eval/c.png"]
    write(tmp_path, names, [{"file_name": name, "text": name} for name in names])
    assert set(captions_of(tmp_path)) == set(names)


def test_hidden_and_linked_folders_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", ["secret.png"])
    folder = write(tmp_path / "data", ["a.png", ".cache/b.png"], [{"file_name": "a.png", "text": "a"}])
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert captions_of(folder) == {"a.png": ("a",)}


def test_metadata_names_no_file_outside_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path, ["x.png", "cat/y.png"])
    write(tmp_path / "cat", [], [{"file_name": "../x.png", "text": "x"}, {"file_name": "y.png", "text": "y"}])
    problem = problem_of(tmp_path)
    assert "leads out of the folder" in problem.why and "metadata.jsonl:1" in problem.why


@pytest.mark.parametrize(("column", "found"), [("image", "left.png"), ("photo", "right.png")])
def test_the_image_column_picks_one_of_several_columns_of_names(tmp_path: Path, column: str, found: str) -> None:
    line = {"image_file_name": "left.png", "photo_file_name": "right.png", "text": "t"}
    write(tmp_path, ["left.png", "right.png"], [line])
    assert captions_of(tmp_path, image_column=column)[found] == ("t",)


def test_the_only_column_of_names_is_taken_and_of_two_none(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"], [{"photo_file_name": "a.png", "text": "t"}])
    assert captions_of(tmp_path) == {"a.png": ("t",)}
    write(tmp_path, [], [{"photo_file_name": "a.png", "mask_file_name": "a.png", "text": "t"}])
    assert "no column 'file_name'" in problem_of(tmp_path).what


def test_two_metadata_files_of_one_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"], LINES)
    write(tmp_path, [], LINES, "metadata.parquet")
    problem = problem_of(tmp_path)
    assert problem.what == "two metadata files" and problem.fix.endswith("metadata.parquet")


def test_damaged_parquet_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not really")
    assert "not Parquet" in problem_of(tmp_path).why


def test_empty_missing_and_unreadable_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    problem = problem_of(tmp_path / "empty")
    assert problem.what == "no images" and problem.kind == "data" and "--train_data_dir" in problem.fix
    assert problem_of(tmp_path / "nope").why == "there is no such folder"
    assert problem_of(write(tmp_path, ["a.png"]) / "a.png").why == "it is a file, not a folder"


def test_a_image_that_cannot_be_read_is_renamed_by_the_fix_wherever_it_lies(tmp_path: Path) -> None:
    folder = write(tmp_path / "my data", ["a/x.png", "b/x.png", "b/y.png"])
    (folder / "b" / "y.txt").write_text("fine")
    for name in "ab":
        (folder / name / "x.png").write_text("<html>")
    problem = problem_of(folder)
    assert problem.what == "2 of 3 images cannot be read"
    subprocess.run(problem.fix, shell=True, check=True)
    assert captions_of(folder) == {"b/y.png": ("fine",)}


# ---------------------------------------------------------------------------------------------------------- captions


def test_no_caption_at_all_is_a_problem_that_lists_the_images(tmp_path: Path) -> None:
    write(tmp_path, ["cat/0.png", "dog/0.png"])
    problem = problem_of(tmp_path)
    assert problem.what == "no image has a caption" and problem.kind == "data"
    assert "cat/0.png" in problem.why and "dog/0.png" in problem.why and "metadata.jsonl" in problem.fix


def test_some_without_caption_are_told_and_get_an_empty_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ["a.png", "b.png", "c.png"], [*LINES[:1], {"file_name": "b.png", "text": "  "}])
    assert captions_of(tmp_path) == {"a.png": ("an a",), "b.png": ("",), "c.png": ("",)}
    assert "2 of 3 images have no caption" in caplog.text and "b.png" in caplog.text and "c.png" in caplog.text


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_usual_columns_are_found_and_a_column_by_name_is_that_one(tmp_path: Path, column: str) -> None:
    write(tmp_path, ["a.png"], [{"file_name": "a.png", column: "usual", "mood": "other"}])
    assert captions_of(tmp_path) == {"a.png": ("usual",)}
    assert captions_of(tmp_path, caption_column="mood") == {"a.png": ("other",)}
    if column != "text":
        assert problem_of(tmp_path, caption_column="text").what == "there is no column 'text'"


def test_a_column_without_metadata_to_hold_it_is_told_once(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "cat/b.png"])
    (tmp_path / "a.txt").write_text("a")
    problem = problem_of(tmp_path, caption_column="mood")
    assert problem.what == "there is no column 'mood'" and "--instance_prompt" not in str(problem)


def test_a_usual_column_is_advised_before_another(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"], [{"file_name": "a.png", "noun": "cat", "text": "a cat"}])
    assert problem_of(tmp_path, caption_column="mood").fix == "--caption_column text"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet"])
def test_lists_of_captions_are_kept_in_order_without_blank_ones(tmp_path: Path, name: str) -> None:
    lines = [{"file_name": "a.png", "text": ["one", " ", "two\nlines", None]}, {"file_name": "b.png", "text": []},
             {"file_name": "c.png", "text": ["alone"]}]
    write(tmp_path, ["a.png", "b.png", "c.png"], lines, name)
    assert captions_of(tmp_path) == {"a.png": ("one", "two lines"), "b.png": ("",), "c.png": ("alone",)}
    assert {row.caption for row in rows_of(tmp_path)} == {"one", "", "alone"}


def test_a_list_with_something_else_in_it_is_a_bad_line(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"], [{"file_name": "a.png", "text": ["fine", 7]}])
    assert "metadata.jsonl:1: text holds a int" in problem_of(tmp_path).why


def test_a_trainer_of_one_caption_a_image_refuses_lists_and_subfolders(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "below/b.png"], [{"file_name": "a.png", "text": ["one", "two"]}])
    rows, problems = read_rows(data_options(instance_data_dir=tmp_path))
    assert "text is a list, not text" in problems[0].why and [row.id for row in rows] == ["a.png"]
    assert problems[1].what == "1 image in subfolders is not read" and "below/: 1 image" in problems[1].why
    listed, _ = list_folder(Folder(tmp_path, "--class_data_dir", "--class_prompt"))
    assert [image.id for image in listed] == ["a.png"]


def several(folder: Path, n: int = 4, repeats: int = 1) -> list[Row]:
    lines = [{"file_name": f"{i}.png", "text": [f"{i} {word}" for word in "abc"]} for i in range(n)]
    return rows_of(write(folder, [f"{i}.png" for i in range(n)], lines), repeats=repeats)


def test_a_visit_draws_one_caption_as_a_function_of_seed_epoch_image_and_repeat(tmp_path: Path) -> None:
    rows = several(tmp_path, repeats=2)
    one, other = (Images(rows, CropPolicy(resolution=32), seed=seed) for seed in (1, 2))
    drawn = {(i, epoch): one.caption(row, epoch) for i, row in enumerate(rows) for epoch in range(200)}
    assert all(caption in rows[i].all_captions for (i, _), caption in drawn.items())
    assert drawn == {(i, epoch): one.caption(rows[i], epoch) for i, epoch in reversed(drawn)}, "in any order"
    assert all(40 <= count <= 95 for count in Counter(
        (rows[i].id, rows[i].repeat, caption) for (i, _), caption in drawn.items()).values()), "each third of the time"
    for differing in (lambda i, e: other.caption(rows[i], e), lambda i, e: drawn[i ^ 1, e],
                      lambda i, e: drawn[i, (e + 1) % 200]):
        same = sum(differing(i, e) == caption for (i, e), caption in drawn.items())
        assert 0.25 < same / len(drawn) < 0.42, "another seed, repeat or epoch draws anew"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_workers_ranks_and_a_resume_draw_the_same_captions(tmp_path: Path, accumulation: int) -> None:
    rows = several(tmp_path)
    images, order = Images(rows, CropPolicy(resolution=32), seed=3), Order(rows, 4, seed=1)

    def prompts(rank: int = 0, world: int = 1, **how: int) -> list[tuple[str, ...]]:
        steps = micro_batches(images, order, Shard(rank, world, accumulation), stop_step=6, **how)
        return [sum((batch.prompts for batch in batches), ()) for _, batches in steps]

    whole = prompts()
    assert whole == prompts(num_workers=2) and whole[4:] == prompts(start_step=4)
    assert any(len(set(words)) > 1 for words in zip(*map(sorted, whole), strict=True)), "they differ between epochs"
    if accumulation == 1:
        assert whole == [a + b for a, b in zip(prompts(rank=0, world=2), prompts(rank=1, world=2), strict=True)]
    for _, batches in micro_batches(images, order, stop_step=6):
        for batch in batches:
            for (_, step, index), place, prompt in zip(batch.keys, batch.rows, batch.prompts, strict=True):
                _, row, epoch, *_ = order.slot(step, index)
                assert row == place, "the slot says whose caption it is"
                assert prompt == images.caption(rows[row], epoch)


def test_a_row_with_one_caption_has_that_one(tmp_path: Path) -> None:
    row, = rows_of(write(tmp_path, ["a.png"], LINES[:1]))
    images = Images([row], CropPolicy(resolution=32), seed=0)
    assert {images.caption(row, epoch) for epoch in range(20)} == {"an a"}
    assert {images[Slot((0, epoch, 0), 0, epoch, 1)].prompt for epoch in range(20)} == {"an a"}
    assert replace(row, caption="b").all_captions == ("b",)


# ---------------------------------------------------------------------------------------------------------- a part


def test_max_train_samples_takes_so_many_by_the_seed_in_their_order(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 20)
    ids = [row.id for row in rows_of(folder)]
    taken = {seed: [row.id for row in rows_of(folder, max_train_samples=5, seed=seed)] for seed in range(4)}
    assert taken[1] == [row.id for row in rows_of(folder, max_train_samples=5, seed=1)]
    assert all(len(some) == 5 and some == [i for i in ids if i in some] for some in taken.values())
    assert len({tuple(some) for some in taken.values()}) == 4
    assert set(taken[1]) < {row.id for row in rows_of(folder, max_train_samples=6, seed=1)}, "the first of one shuffle"
    repeated = rows_of(folder, max_train_samples=5, seed=1, repeats=2)
    assert [row.id for row in repeated[::2]] == taken[1] and len(repeated) == 10


@pytest.mark.parametrize("n", [4, 5, 100])
def test_as_many_as_there_are_or_more_is_all(tmp_path: Path, n: int) -> None:
    folder = marked_folder(tmp_path / "d", 4)
    assert rows_of(folder, max_train_samples=n) == rows_of(folder)


def test_images_that_are_not_taken_are_not_opened(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 4)
    taken, = rows_of(folder, max_train_samples=1, seed=3)
    for path in folder.glob("*.png"):
        if path.name != taken.id:
            path.write_text("broken")
    assert rows_of(folder, max_train_samples=1, seed=3) == [taken]
    assert "3 of 4 images cannot be read" in problem_of(folder).what


# ----------------------------------------------------------------------------------------------------------- tables


def content(mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Pillow.new(mode, (20, 30)).save(buffer, kind)
    return buffer.getvalue()


def table(folder: Path, features: dict[str, object], rows: list[dict]) -> Path:
    """A data set of one parquet file, as the Hub has them."""
    (folder / "data").mkdir(parents=True)
    columns = {name: [row[name] for row in rows] for name in features}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def table_rows(folder: Path, **changes: object) -> tuple[list[Row], list[Problem]]:
    return read_rows(options(dataset_name=folder, cache_dir=folder.parent / "hf", **changes))


@pytest.mark.parametrize("kind", [Image(), Value("binary"), {"bytes": Value("binary"), "path": Value("string")}],
                         ids=["image", "bytes", "dict"])
def test_images_in_a_table_are_images_bytes_or_dicts_of_any_mode(tmp_path: Path, kind: object) -> None:
    files = [content(), content("L"), content("CMYK", "JPEG"), content("RGBA"), content("P", "GIF")]
    cells = [data if kind == Value("binary") else {"bytes": data, "path": None} for data in files]
    rows, problems = table_rows(table(tmp_path / "d", {"image": kind, "text": Value("string")}, [
        {"image": cell, "text": f"t{i}"} for i, cell in enumerate(cells)]))
    assert not problems and [row.caption for row in rows] == [f"t{i}" for i in range(5)]
    assert {(load_image(row).mode, load_image(row).size) for row in rows} == {("RGB", (20, 30))}


def test_cells_without_a_image_and_with_a_path_to_none_are_told(tmp_path: Path) -> None:
    kind = {"bytes": Value("binary"), "path": Value("string")}
    cells = [{"bytes": content(), "path": None}, {"bytes": None, "path": None}, {"bytes": None, "path": "/dev/zero"}]
    rows, (problem,) = table_rows(table(tmp_path / "d", {"image": kind, "text": Value("string")}, [
        {"image": cell, "text": "t"} for cell in cells]))
    assert len(rows) == 1 and problem.what == "2 of 3 images cannot be read"
    assert "row 1" in problem.why and "row 2" in problem.why


def test_lists_of_captions_in_a_table(tmp_path: Path) -> None:
    features = {"image": Image(), "caption": List(Value("string"))}
    folder = table(tmp_path / "d", features, [
        {"image": {"bytes": content(), "path": None}, "caption": captions} for captions in (["a", "b"], None, ["c"])])
    rows, problems = table_rows(folder)
    assert not problems and [row.all_captions for row in rows] == [("a", "b"), ("",), ("c",)]
    one = data_options(dataset_name=folder, cache_dir=tmp_path / "hf", caption_column="caption")
    _, (problem,) = read_rows(one)
    assert problem.what == "column 'caption' does not hold text"


def test_a_table_without_a_usual_column_of_text_is_refused_with_those_there(tmp_path: Path) -> None:
    features = {"image": Image(), "label": Value("int64"), "mood": Value("string")}
    folder = table(tmp_path / "d", features, [
        {"image": {"bytes": content(), "path": None}, "label": 1, "mood": "calm"}])
    _, (problem,) = table_rows(folder)
    assert problem.what == "there is no column 'text'" and problem.fix == "--caption_column mood"
    assert table_rows(folder, caption_column="mood")[0][0].caption == "calm"
    _, (problem,) = table_rows(folder, caption_column="label")
    assert problem.what == "column 'label' does not hold text"


def test_a_caption_of_a_table_that_is_no_caption_is_told_with_its_row(tmp_path: Path) -> None:
    features = {"image": Image(), "text": Value("string")}
    folder = table(tmp_path / "d", features, [
        {"image": {"bytes": content(), "path": None}, "text": text} for text in ("fine", "x" * 70_000)])
    _, (problem,) = table_rows(folder)
    assert problem.what == "1 unusable caption" and "row 1: text is longer than" in problem.why


def test_a_table_where_no_row_has_a_caption_is_refused(tmp_path: Path) -> None:
    features = {"image": Image(), "text": Value("string")}
    folder = table(tmp_path / "d", features, [{"image": {"bytes": content(), "path": None}, "text": " "}])
    _, (problem,) = table_rows(folder)
    assert problem.what == "no image has a caption" and "row 0" in problem.why


# ----------------------------------------------------------------------------------------------------------- sources


def test_a_source_is_needed_and_the_data_set_goes_before_the_folder(tmp_path: Path) -> None:
    assert problem_of().fix == "--train_data_dir FOLDER_OF_IMAGES"
    write(tmp_path / "folder", ["a.png"], LINES[:1])
    dataset = write(tmp_path / "set", ["b.png"], LINES[1:])
    rows, problems = read_rows(options(
        train_data_dir=tmp_path / "folder", dataset_name=dataset, cache_dir=tmp_path / "hf"))
    assert not problems and [(row.id, row.caption) for row in rows] == [("row 0", "a b")]


def test_a_data_set_that_is_not_there_advises_the_flags_of_this_trainer(tmp_path: Path) -> None:
    problem = problem_of(dataset_name=tmp_path / "nope", cache_dir=tmp_path / "hf")
    assert "--train_data_dir" in problem.fix and "--instance" not in str(problem)


def test_upright_images_keep_their_sizes(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Pillow.new("RGB", (20, 30)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("turned")
    row, = rows_of(tmp_path)
    assert row.size == (20, 30) and load_image(row).size == (30, 20)
