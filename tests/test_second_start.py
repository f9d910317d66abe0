"""A second start opens no file that was not touched, says the same as the first, and notices every touch."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sqlite3
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.images import data_options, marked, marked_folder
from trainkit import digests
from trainkit.data import verdicts
from trainkit.data.images import load_image
from trainkit.data.rows import Rows, read_rows
from trainkit.errors import Problem


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database; files count as old enough to be remembered."""
    monkeypatch.setattr(digests, "cache_folder", lambda: tmp_path / "memory")
    monkeypatch.setattr(digests, "FRESH_SECONDS", -1.0)
    return tmp_path / "memory" / digests.FILE


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in order."""
    names: list[str] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
    return names


def start(folder: Path, opened: list[str], **changes: object) -> tuple[Rows, list[Problem], list[str]]:
    """(rows, problems, the data files that were read for them)."""
    opened.clear()
    rows, problems = read_rows(data_options(instance_data_dir=folder, **changes))
    return rows, problems, sorted(name for name in opened if not name.endswith(".py"))


def with_captions(folder: Path, n: int = 6) -> Path:
    for path in marked_folder(folder, n).glob("*.png"):
        path.with_suffix(".txt").write_text(f"thing {path.stem}\n", "utf-8")
    return folder


def test_a_second_start_opens_no_image_and_no_caption(tmp_path: Path, opened: list[str]) -> None:
    folder = with_captions(tmp_path / "d")
    first, problems, read = start(folder, opened)
    assert not problems and len(read) == 12
    second, problems, read = start(folder, opened)
    assert not problems and read == [] and second == first and second.account == first.account
    assert start(folder, opened, repeats=2)[2] == [], "whatever the run makes of the images"


def test_a_second_start_says_what_the_first_one_said(
    tmp_path: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_captions(tmp_path / "d")
    Image.new("CMYK", (40, 40)).save(folder / "x.tif", icc_profile=b"junk")
    marked(1, 40, 40).save(folder / "moves.gif", save_all=True, append_images=[marked(2, 40, 40)])
    (folder / "x.txt").write_bytes("un café".encode("cp1252"))
    said = []
    for _ in range(2):
        caplog.clear()
        start(folder, opened)
        said.append([record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING])
    assert said[0] == said[1] and all(any(what in line for line in said[0]) for what in ("profile", "frames", "cp1252"))
    assert start(folder, opened)[0][-1].caption == "un café"


def from_table(where: Path, tmp_path: Path, decoded: list[bytes]) -> tuple[Rows, int]:
    """(rows, how many images were decoded for them)."""
    decoded.clear()
    rows, problems = read_rows(data_options(dataset_name=where, cache_dir=tmp_path / "hf", caption_column="text"))
    assert not problems
    return rows, len(decoded)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    images, decode = [], verdicts.decode
    monkeypatch.setattr(verdicts, "decode", lambda data, note: images.append(data) or decode(data, note=note))
    return images


def save_table(path: Path, numbers: list[int]) -> Path:
    from datasets import Dataset

    cells = [{"bytes": png(number), "path": None} for number in numbers]
    Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]}).to_parquet(path)
    return path


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    marked(number, 20, 20).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_in_a_table_are_decoded_at_the_first_start_only(tmp_path: Path, decoded: list[bytes]) -> None:
    table = save_table(tmp_path / "table.parquet", [1, 2, 3])
    first, count = from_table(table, tmp_path, decoded)
    assert count == 3
    second, count = from_table(table, tmp_path, decoded)
    assert count == 0 and [row.digest for row in second] == [row.digest for row in first]
    save_table(table, [1, 2, 4])
    third, count = from_table(table, tmp_path, decoded)
    assert count == 3 and third[2].digest != first[2].digest and load_image(third[2]).size == (20, 20)


def test_images_that_a_table_names_are_decoded_again_when_touched(tmp_path: Path, decoded: list[bytes]) -> None:
    folder = marked_folder(tmp_path / "d", 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    lines = (f'{{"file_name": "{path.name}", "text": "a"}}' for path in sorted(folder.glob("*.png")))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    first, count = from_table(folder, tmp_path, decoded)
    assert count == 3 and from_table(folder, tmp_path, decoded)[1] == 0
    marked(9, 30, 30).save(folder / "001.png")
    rows, count = from_table(folder, tmp_path, decoded)
    assert count == 1 and rows[1].digest != first[1].digest


def edited(path: Path) -> None:
    """In place, with as many bytes and the old date."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """By a file moved there, with as many bytes and the old date."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    edited(other)
    other.replace(path)


@pytest.mark.parametrize("touch", [edited, replaced])
@pytest.mark.parametrize("name", ["003.png", "003.txt"])
def test_a_touched_file_alone_is_read_again(
    tmp_path: Path, opened: list[str], touch: Callable[[Path], None], name: str
) -> None:
    folder = with_captions(tmp_path / "d")
    for path in folder.iterdir():
        with path.open("ab") as file:
            file.write(b".")  # behind the image's end, and a part of the caption
    before = start(folder, opened)[0]
    time.sleep(0.02)  # a tick of the file system's clock
    touch(folder / name)
    after, problems, read = start(folder, opened)
    assert not problems and read == [name]
    assert [old.id for old, new in zip(before, after, strict=True) if old != new] == ["003.png"]


def test_new_and_vanished_files_are_noticed(tmp_path: Path, opened: list[str]) -> None:
    folder = with_captions(tmp_path / "d")
    start(folder, opened)
    (folder / "002.png").unlink()
    marked(9, 40, 40).save(folder / "new.png")
    rows, _, read = start(folder, opened)
    assert read == ["new.png"] and [row.id for row in rows if row.id in ("002.png", "new.png")] == ["new.png"]


def test_a_refused_image_is_read_at_every_start(tmp_path: Path, opened: list[str]) -> None:
    """It may have been refused for want of memory; without it no run starts."""
    folder = with_captions(tmp_path / "d")
    (folder / "001.png").write_bytes(b"no image")
    for _ in range(2):
        _, (problem,), read = start(folder, opened)
        assert "001.png" in problem.why and "001.png" in read
    marked(1, 40, 40).save(folder / "001.png")
    assert not start(folder, opened)[1]


def test_an_edit_of_the_code_reads_all_again(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_captions(tmp_path / "d")
    start(folder, opened)
    monkeypatch.setattr(digests, "code_version", lambda *modules: "another")
    assert len(start(folder, opened)[2]) == 12
    monkeypatch.setattr(verdicts.PIL, "__version__", "another")
    assert start(folder, opened)[2] == [f"{i:03}.png" for i in range(6)]


def test_the_version_is_that_of_the_modules_source(tmp_path: Path) -> None:
    versions = [digests.code_version(verdicts), digests.code_version(digests), digests.code_version(verdicts, digests)]
    assert len(set(versions)) == 3


@pytest.mark.parametrize("trouble", ["locked", "broken"])
def test_where_the_memory_is_of_no_use_all_is_read_and_right(
    tmp_path: Path, memory: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(digests, "WAIT_SECONDS", 0.05)
    folder = with_captions(tmp_path / "d")
    first = start(folder, opened)[0]
    blocker = sqlite3.connect(memory)
    if trouble == "locked":
        blocker.execute("BEGIN EXCLUSIVE")
    else:
        memory.write_bytes(b"garbage" * 1000)
    rows, problems, read = start(folder, opened)
    blocker.close()
    assert not problems and rows == first and len(read) == 12


def test_a_start_takes_no_more_memory_than_what_it_knows_of_each_image(tmp_path: Path, opened: list[str]) -> None:
    """Its pixels would take 80 KiB."""
    folder, n = tmp_path / "d", 300
    folder.mkdir()
    marked(1, 170, 160).save(folder / "0.png")
    for i in range(1, n):
        shutil.copy(folder / "0.png", folder / f"{i}.png")
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        assert len(start(folder, opened, instance_prompt="a thing")[0]) == n
        peaks.append(tracemalloc.get_traced_memory()[1] / n)
        tracemalloc.stop()
    assert max(peaks) < 8 * 1024, peaks
