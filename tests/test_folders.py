"""Where a run may write, what a table's cell may name, and what is said of captions that are cut off."""

from __future__ import annotations

import logging
import os
import subprocess
from io import BytesIO
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from pyarrow import parquet
from transformers import CLIPTokenizer

from tests.support import ROOT
from tests.support.images import data_options, marked, row_of
from trainkit.conditioning.caption_length import _maybe_longer, cut_off, warn_cut
from trainkit.data.batch import Row
from trainkit.data.rows import read_rows
from trainkit.errors import Problem, printable, shell_word
from trainkit.options import CaptionedDataOptions, PriorOptions, RunOptions
from trainkit.preflight import output_problems


def content(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Pillow.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- where a run writes


def run_options(out: Path, *, captioned: bool = False, **changes: object) -> SimpleNamespace:
    data = CaptionedDataOptions(train_data_dir=str(changes["data"])) if captioned else \
        data_options(**({"dataset_name": changes["dataset"]} if "dataset" in changes else
                        {"instance_data_dir": changes["data"]}))
    prior = PriorOptions(with_prior_preservation=True, class_data_dir=str(changes.get("classes", "no/where")),
                         class_prompt="x") if "classes" in changes else PriorOptions()
    return SimpleNamespace(data=data, run=RunOptions(output_dir=str(out)), prior=prior)


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("out", [".", "run", "runs/deep/er", "../d", "../link/run", "sub/../run"])
def test_output_in_the_data_folder_is_refused(tmp_path: Path, out: str, captioned: bool) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    problem, = output_problems(run_options(folder / out, captioned=captioned, data=folder))
    assert problem.what.startswith("--output_dir") and str(folder) in problem.where
    better = Path(problem.fix.removeprefix("--output_dir "))
    assert not output_problems(run_options(better, captioned=captioned, data=folder))


def test_output_among_class_images_or_in_a_local_data_set_is_refused(tmp_path: Path) -> None:
    for name in ("d", "classes"):
        (tmp_path / name).mkdir()
    classes = tmp_path / "classes"
    found = output_problems(run_options(classes / "run", data=tmp_path / "d", classes=classes))
    assert ["--class_data_dir" in p.where for p in found] == [True]
    for missing in (tmp_path / "run", tmp_path / "run" / "samples"):  # class images would be generated there
        found = output_problems(run_options(tmp_path / "run", data=tmp_path / "d", classes=missing))
        assert ["--class_data_dir" in p.where for p in found] == [True], missing
    assert len(output_problems(run_options(tmp_path / "d" / "run", dataset=tmp_path / "d"))) == 1
    assert not output_problems(run_options(tmp_path / "run", dataset="owner/name"))


@pytest.mark.parametrize("data, refused", [
    ("samples", True), ("samples/deeper", True), ("previous-1", True), ("checkpoint-20", True), ("images", False)])
def test_data_in_the_output_folder_is_refused_where_the_run_writes(tmp_path: Path, data: str, refused: bool) -> None:
    (tmp_path / "out" / data).mkdir(parents=True)
    assert bool(output_problems(run_options(tmp_path / "out", data=tmp_path / "out" / data))) == refused


def test_beside_and_alike_names_are_fine(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert not output_problems(run_options(tmp_path / "d2" / "run", data=tmp_path / "d"))
    assert not output_problems(run_options(tmp_path / "run", data=tmp_path / "not there"))


# ------------------------------------------------------------------------------------------------------------- tables

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(folder: Path, cells: list[dict[str, object] | None]) -> Path:
    folder.mkdir(exist_ok=True)
    columns = {"image": pa.array(cells, CELL), "text": [f"t{i}" for i in range(len(cells))]}
    parquet.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def read(name: Path, tmp_path: Path) -> tuple[list[Row], list[Problem]]:
    return read_rows(data_options(dataset_name=name, cache_dir=tmp_path / "hf", caption_column="text"))


@pytest.mark.parametrize("path", [
    "{secret}", "{set}/../private/secret.png", "{set}/link.png", "{set}/linked/secret.png", "../private/secret.png",
    "file://{secret}", "~/secret.png", "{set}/a\0.png"])
def test_a_cell_reads_no_file_outside_its_data_set(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, folder = tmp_path / "private" / "secret.png", tmp_path / "set"
    secret.parent.mkdir()
    secret.write_bytes(content())
    monkeypatch.setenv("HOME", str(secret.parent))
    named = path.format(secret=secret, set=folder)
    table(folder, [{"bytes": content("blue"), "path": named}, {"bytes": None, "path": named}])
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)
    monkeypatch.chdir(folder)
    rows, (problem,) = read(folder, tmp_path)
    assert [row.id for row in rows] == ["row 0"] and problem.what == "1 of 2 images cannot be read"


OTHER_FILES = {  # what somebody may give as --dataset_name -> a word of what to do instead
    "captions.csv": "metadata.jsonl, metadata.csv", "captions.jsonl": "metadata.jsonl", "icons.zip": "unzip",
    "a.png": "metadata.jsonl",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_data_set_is_not_said_to_be_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(content())
    _, (problem,) = read(tmp_path / name, tmp_path)
    assert OTHER_FILES[name] in problem.fix and "--instance_data_dir" in problem.fix
    assert "find" not in problem.why


def test_a_table_is_read_whatever_the_case_of_its_suffix(tmp_path: Path) -> None:
    file = table(tmp_path / "set", [{"bytes": content(), "path": None}]) / "train.parquet"
    rows, problems = read(file.rename(tmp_path / "TRAIN.PARQUET"), tmp_path)
    assert not problems and [row.caption for row in rows] == ["t0"]


def test_the_address_of_a_page_of_the_hub_is_answered_with_the_name(tmp_path: Path) -> None:
    _, (problem,) = read_rows(data_options(dataset_name="https://huggingface.co/datasets/linoyts/3d_icon/tree/main",
                                           cache_dir=tmp_path / "hf"))
    assert problem.fix == "--dataset_name linoyts/3d_icon"


def test_a_set_of_addresses_and_one_of_webdataset_say_what_is_missing(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"url": ["https://h/a.png"], "text": ["a"]}), tmp_path / "a.parquet")
    _, (problem,) = read(tmp_path / "a.parquet", tmp_path)
    assert problem.what == "there is no column 'image'" and "download" in problem.fix
    parquet.write_table(pa.table({"image": [content()], "__key__": ["000"]}), tmp_path / "b.parquet")
    _, (problem,) = read(tmp_path / "b.parquet", tmp_path)
    assert problem.what == "there is no column 'text'" and "__key__" not in problem.fix


def test_a_cell_may_name_a_file_of_its_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(content())
    table(folder, [{"bytes": None, "path": str(folder / "a.png")}])
    rows, problems = read(folder, tmp_path)
    assert len(rows) == 1 and not problems


@pytest.mark.parametrize("kind", ["parquet file", "saved", "saved with splits"])
def test_data_sets_in_other_forms_are_read(tmp_path: Path, kind: str) -> None:
    cells = [{"bytes": content(), "path": None}, {"bytes": content("blue"), "path": None}]
    features = Features({"image": Image(), "text": Value("string")})
    saved = Dataset.from_dict({"image": cells, "text": ["t0", "t1"]}, features=features)
    if kind == "parquet file":
        name = table(tmp_path / "set", cells) / "train.parquet"
    else:
        name = tmp_path / "saved"
        (DatasetDict({"train": saved, "test": saved}) if "splits" in kind else saved).save_to_disk(str(name))
    rows, problems = read(name, tmp_path)
    assert not problems and [row.caption for row in rows] == ["t0", "t1"]


def test_data_sets_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text("raise SystemExit\n")
    _, (problem,) = read(scripted, tmp_path)
    assert "runs none" in problem.why and "--instance_data_dir" in problem.fix
    one = Dataset.from_dict({"text": ["x"]})
    DatasetDict({"test": one}).save_to_disk(str(tmp_path / "saved"))
    _, (problem,) = read(tmp_path / "saved", tmp_path)
    assert "no train split" in problem.why


@pytest.mark.parametrize("captioned", [False, True])
def test_a_folder_with_caption_files_is_sent_to_the_flag_that_reads_it(tmp_path: Path, captioned: bool) -> None:
    folder = tmp_path / "it's mine"
    (folder / "cats").mkdir(parents=True)
    for name in ("a", "cats/b"):
        marked(1, 40, 40).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("x")
    options = CaptionedDataOptions(dataset_name=str(folder)) if captioned else data_options(dataset_name=folder)
    _, (problem,) = read_rows(options)
    flag = "--train_data_dir" if captioned else "--instance_data_dir"
    assert problem.fix == f"{flag} {shell_word(folder)}"


# ------------------------------------------------------------------------------------------------ captions that are cut


@pytest.fixture(scope="module")
def tokenizers() -> list[CLIPTokenizer]:
    folder = ROOT / "assets/tiny-sdxl-icons"
    return [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]


def test_what_is_cut_off_is_what_the_encoder_does_not_see(tokenizers: list[CLIPTokenizer]) -> None:
    prompts = ["a fox", "red apple " * 60 + "TOK", "x " * 75, "x " * 76, "a, " * 37 + "a", "ÄÖ 猫 " * 20 + "end"]
    lost = cut_off(prompts, tokenizers)
    assert lost[0] == lost[2] == lost[4] == "" and lost[3] == "x" and lost[1].endswith("apple TOK")
    for prompt, words in zip(prompts, lost, strict=True):
        kept = prompt[: len(prompt.rstrip()) - len(words)] if words else prompt
        for tokenizer in tokenizers:
            seen, alone = (tokenizer(text, truncation=True, max_length=77).input_ids[:-1] for text in (prompt, kept))
            within_a_letter = 2  # bytes of one that are still read
            assert seen[: len(alone)] == alone and len(seen) - len(alone) <= within_a_letter * bool(words), prompt


WORDS = ["a", "the", "fox's", "don't", "3d-icon,", "(red:1.2)", "!!!", "…", "ÄÖß", "İstanbul", "猫",
         "👨\u200d👩\u200d👧", "e\u0301", "\u0301x", "ﬁn", "<s0>", "<|endoftext|>", "x" * 40, "12345", "कि", "'s"]


def test_no_prompt_has_more_tokens_than_its_words(tokenizers: list[CLIPTokenizer]) -> None:
    """So those whose words have few need not be looked at as a whole."""
    random = Random(0)
    prompts = [random.choice((" ", " ", "  ")).join(random.choices(WORDS, k=random.randint(1, 50))) for _ in range(300)]
    prompts += ["red apple " * n for n in range(36, 40)]
    for tokenizer in tokenizers:
        tokens = [len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids) for prompt in prompts]
        free = tokenizer.model_max_length - 2
        longer = [i for i, count in enumerate(tokens) if count > free]
        assert 100 < len(longer) < 290 and {*longer} <= {*_maybe_longer(prompts, free, tokenizer)}
    assert [bool(words) for words in cut_off(prompts, tokenizers[:1])] == [
        len(tokenizers[0](prompt, add_special_tokens=False, verbose=False).input_ids) > 75 for prompt in prompts]


def test_images_whose_captions_are_cut_are_listed_once(
    tmp_path: Path, tokenizers: list[CLIPTokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png"):
        marked(1, 40, 40).save(tmp_path / name)
    rows = [row_of(tmp_path / "a.png", caption="red apple " * 60 + "TOK", repeat=i) for i in range(3)]
    rows += [row_of(tmp_path / "b.png", caption="a fox TOK")]
    family = SimpleNamespace(tokenizers=tokenizers, max_chunks=1)
    with caplog.at_level(logging.WARNING):
        warn_cut(rows, lambda prompt: prompt, family)
    record, = caplog.records
    assert "1 caption is longer than the 77 tokens" in record.getMessage()
    assert "a.png: 'apple red" in record.getMessage() and "apple TOK'" in record.getMessage()
    caplog.clear()
    warn_cut(rows[3:], lambda prompt: prompt.replace("TOK", "<s0> " * 40), family)
    assert "b.png" in caplog.text, "new tokens count as they are given to the encoder"


def test_the_words_of_a_preview_that_are_cut_are_told(
    tokenizers: list[CLIPTokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    family = SimpleNamespace(tokenizers=tokenizers, max_chunks=1)
    for prompt in (None, "a fox TOK"):
        warn_cut([], lambda prompt: prompt, family, preview=prompt)
    assert not caplog.records
    warn_cut([], lambda prompt: prompt, family, preview="red apple " * 60 + "TOK")
    assert "--validation_prompt is longer than the 77 tokens" in caplog.text and "apple TOK'" in caplog.text


# -------------------------------------------------------------------------------------------------- names in messages


@pytest.mark.parametrize("name", [
    b"plain.png", b"it's \"it\" $HOME.png", b"\x1b[2Jx.png", b"\xff\xfe.png", b"new\nline.png", "猫 🐈.png".encode(),
    "bidi\u202e.png".encode(), b"tab\t\\'x.png", b"-rf.png"])
def test_a_name_in_a_command_is_the_file_and_no_terminal_shows_its_control_characters(
    tmp_path: Path, name: bytes
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_text("")
    word = shell_word(path)
    assert word.isprintable() and word.encode()
    shown = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
    assert shown == os.fsencode(path)
    assert printable(path.name).isprintable()


def test_a_problem_prints_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    evil = os.fsdecode(b"\x1b[2J\xff.png")
    text = str(Problem(f"what {evil}", f"where {evil}", f"why {evil}\nsecond line", f"fix {evil}"))
    assert all(line.isprintable() for line in text.split("\n")) and text.encode() and text.count("\n") == 4
