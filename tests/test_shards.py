"""WebDataset shards: what is read of them, and what happens to damaged, changed and hostile ones."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.images import data_options, marked
from tests.support.trainers import command, forked
from trainkit.data import sampler, verdicts
from trainkit.data.images import load_image
from trainkit.data.rows import Rows, read_rows
from trainkit.data.sources.shard_index import FILE, ShardIndex
from trainkit.errors import Problem, UserError
from trainkit.options import CaptionedDataOptions


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    marked(number, 40, 40).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes], **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def shards(folder: Path, n: int = 2, each: int = 3) -> Path:
    for s in range(n):
        tar(folder / f"{s:03}.tar", {name: content for i in range(each) for name, content in (
            (f"{s}{i}.png", png(10 * s + i)), (f"{s}{i}.txt", f"image {s}{i}".encode()))})
    return folder


def read(name: Path | str, **options: object) -> tuple[Rows, list[Problem]]:
    return read_rows(CaptionedDataOptions(dataset_name=str(name), **options))


def test_images_and_captions_of_all_shards_come_in_order(tmp_path: Path) -> None:
    rows, problems = read(shards(tmp_path / "set"))
    assert not problems
    assert [(row.id, row.caption) for row in rows] == [
        (f"{s:03}.tar/{s}{i}.png", f"image {s}{i}") for s in range(2) for i in range(3)]
    assert str(rows.account) == "6 images, 6 captions from .txt members"
    assert load_image(rows[4]).getpixel((0, 0))[0] == 11


@pytest.mark.parametrize("name", ["set/001.tar", "set/00{0..1}.tar", "set/{000..001}.tar", "set/*.tar"])
def test_a_shard_numbers_in_braces_and_a_pattern_name_shards(tmp_path: Path, name: str) -> None:
    shards(tmp_path / "set")
    rows, problems = read(tmp_path / name)
    assert not problems and len(rows) == (3 if name == "set/001.tar" else 6)


def test_json_captions_and_what_is_left_out(tmp_path: Path) -> None:
    members = {
        "a/1.png": png(1), "a/1.json": json.dumps({"caption": "one", "mood": "calm"}).encode(), "a/1.cls": b"3",
        "2.jpg.png": png(2), "2.txt": b"two", "3.PNG": png(3), "3.jpg": png(4), "3.caption": "drei ä".encode()}
    tar(tmp_path / "x.tar", members)
    rows, problems = read(tmp_path / "x.tar")
    assert not problems and [row.caption for row in rows] == ["one", "drei ä"]
    left = {one.name: one.why for one in rows.account.left_out}
    assert set(left) == {"x.tar/*.cls", "x.tar/*.jpg.png", "x.tar/3.jpg"}
    rows, _ = read(tmp_path / "x.tar", caption_column="mood")
    assert [row.caption for row in rows] == ["calm", "drei ä"]


def test_shards_of_test_images_are_left_out(tmp_path: Path) -> None:
    for name in ("train-000.tar", "test-000.tar", "val_0.tar"):
        tar(tmp_path / name, {"1.png": png(1), "1.txt": b"x"})
    assert [row.id for row in read(tmp_path)[0]] == ["train-000.tar/1.png"]


def test_the_dreambooth_trainer_reads_them_too(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"1.png": png(1), "1.txt": b"a TOK", "2.png": png(2)})
    rows, problems = read_rows(data_options(dataset_name=tmp_path / "x.tar", repeats=2))
    assert not problems and [row.caption for row in rows] == ["a TOK", "a TOK", "a photo of TOK", "a photo of TOK"]


# ---------------------------------------------------------------------------------------------------------- the index


def test_the_index_lies_in_the_cache_and_shards_are_scanned_once(tmp_path: Path, monkeypatch) -> None:
    shards(tmp_path / "set")
    first, _ = read(tmp_path / "set", latent_cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "cache" / FILE).exists()
    monkeypatch.setattr(ShardIndex, "_scan", lambda self, path: pytest.fail("scanned again"))
    again, _ = read(tmp_path / "set", latent_cache_dir=str(tmp_path / "cache"))
    assert again == first


def test_a_changed_shard_is_scanned_again(tmp_path: Path) -> None:
    shards(tmp_path / "set")
    read(tmp_path / "set", latent_cache_dir=str(tmp_path / "cache"))
    tar(tmp_path / "set" / "000.tar", {"new.png": png(77), "new.txt": b"new"})
    rows, problems = read(tmp_path / "set", latent_cache_dir=str(tmp_path / "cache"))
    assert not problems and [row.caption for row in rows] == ["new", "image 10", "image 11", "image 12"]


def test_a_shard_that_changes_in_the_run_is_told(tmp_path: Path) -> None:
    rows, _ = read(shards(tmp_path / "set", n=1))
    tar(tmp_path / "set" / "000.tar", {"other.png": png(99)})
    with pytest.raises(UserError, match=r"changed since|shorter"):
        load_image(rows[1])


def test_a_damaged_index_is_made_anew_and_one_that_cannot_be_kept_is_told(tmp_path: Path, caplog) -> None:
    shards(tmp_path / "set")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / FILE).write_bytes(b"no database at all, though long enough for a header" * 100)
    assert len(read(tmp_path / "set", latent_cache_dir=str(cache))[0]) == 6 and "made anew" in caplog.text
    (tmp_path / "file").write_text("")
    rows, problems = read(tmp_path / "set", latent_cache_dir=str(tmp_path / "file" / "x"))
    assert not problems and len(rows) == 6 and "cannot be kept" in caplog.text


SCAN = """
import sys
from pathlib import Path
from trainkit.data.sources.shard_index import ShardIndex
index = ShardIndex(Path(sys.argv[1]))
print("ready", flush=True)
print(len(list(index.images(index.add(Path(sys.argv[2]))))))
"""


def scanner(cache: Path, shard: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCAN, str(cache), str(shard)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_that_scan_at_once_and_a_killed_one_leave_a_whole_index(tmp_path: Path) -> None:
    many = tar(tmp_path / "many.tar", {f"{i:06}.png": b"x" for i in range(20_000)})
    cache = tmp_path / "cache"
    for delay in (0.1, 0.5, 1.0):
        one = scanner(cache, many)
        assert one.stdout and one.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.kill(one.pid, signal.SIGKILL)
        one.communicate()
        with sqlite3.connect(cache / FILE) as database:
            known, = database.execute("SELECT count(*) FROM shards").fetchone()
            members, = database.execute("SELECT count(*) FROM members").fetchone()
            assert (known, members) in ((0, 0), (1, 20_000)), delay
            database.execute("DELETE FROM shards")
            database.execute("DELETE FROM members")
        database.close()
    both = [scanner(cache, many) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["ready\n20000\n"] * 2
    with sqlite3.connect(cache / FILE) as database:
        assert database.execute("SELECT count(*) FROM shards").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM members").fetchone() == (20_000,)
    database.close()


# ------------------------------------------------------------------------------------------------------ hostile shards


def test_truncated_shards_and_files_that_are_none_are_named_at_once(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", n=3)
    for name, keep in (("000.tar", 700), ("001.tar", 1700)):
        os.truncate(folder / name, keep)
    (folder / "003.tar").write_bytes(b"not a tar file" * 100)
    (folder / "004.tar").write_bytes(b"")
    _, (problem,) = read(folder)
    assert problem.what == "4 shards cannot be read" and ".damaged" in problem.fix
    assert all(f"00{i}.tar" in problem.why for i in (0, 1, 3, 4)) and "002.tar" not in problem.why


def test_a_shard_without_its_end_is_used_and_told(tmp_path: Path, caplog) -> None:
    path = tar(tmp_path / "x.tar", {"1.png": png(1), "1.txt": b"one"})
    with tarfile.open(path) as file:
        last = file.getmembers()[-1]
    os.truncate(path, last.offset_data + 512)
    rows, problems = read(path)
    assert not problems and len(rows) == 1 and "no mark at the end" in caplog.text


def test_names_in_a_shard_are_no_places_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        for name, content in (("/etc/1.png", png(1)), ("../../2.png", png(2)), ("ünï/犬.png", png(3))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    before = sorted(tmp_path.parent.glob("*"))
    rows, problems = read_rows(data_options(dataset_name=path))
    assert not problems and [row.id for row in rows] == ["x.tar//etc/1.png", "x.tar/../../2.png", "x.tar/ünï/犬.png"]
    assert sorted(tmp_path.parent.glob("*")) == before and not Path("/etc/1.png").exists()
    assert [one.name for one in rows.account.left_out] == ["x.tar/*links and devices"]


def test_broken_images_and_captions_in_shards_are_named(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"1.png": b"no image", "1.txt": b"x", "2.png": png(2), "2.json": b"{", "3.png": png(3),
                             "3.txt": b"x" * 70_000})
    _, problems = read(tmp_path / "x.tar")
    assert [one.what for one in problems] == ["2 unusable captions", "1 of 3 images cannot be read"]
    rows, problems = read_rows(data_options(dataset_name=tar(tmp_path / "y.tar", {"1.png": b"no", "2.png": png(2)}),
                                            bad_images="skip"))
    assert not problems and [row.id for row in rows] == ["y.tar/2.png"]


def test_compressed_shards_are_answered_with_the_command(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar.gz", {"1.png": png(1)})
    for name in (tmp_path, tmp_path / "a.tar.gz"):
        _, (problem,) = read(name)
        assert problem.fix == f"gunzip -k -- {tmp_path / 'a.tar.gz'}"


# -------------------------------------------------------------------------------------------------------------- a run


def test_ranks_and_a_resume_see_the_same_images_in_the_same_steps(tmp_path: Path) -> None:
    rows, _ = read(shards(tmp_path / "set", each=4), resolution=32)
    order = sampler.make_order(rows, 4, batch_size=2, seed=0)
    whole = [sorted(slot.row for micro in order.slots(step) for slot in micro) for step in range(4)]
    for step in range(4):
        parts = [order.slots(step, sampler.Shard(rank, 2)) for rank in range(2)]
        assert sorted(slot.row for part in parts for micro in part for slot in micro) == whole[step]


@pytest.mark.slow
@pytest.mark.trains
def test_a_run_on_shards_resumes_to_the_bit(tiny_sd, tmp_path: Path) -> None:
    data = dict(instance_data_dir=None, instance_prompt=None, dataset_name=shards(tmp_path / "set"),
                latent_cache_dir=tmp_path / "cache", cache_latents=True)
    for name, steps in (("whole", ({"max_train_steps": 4},)),
                        ("parts", ({"max_train_steps": 4, "stop_after_steps": 2},
                                   {"max_train_steps": 4, "resume_from_checkpoint": "latest"}))):
        for changes in steps:
            argv = command(tiny_sd, None, tmp_path / name, **data, **changes)
            done = forked(argv, trainer="train_text_to_image_lora", log=tmp_path / "log")
            assert done.code == 0, done.output
    whole, parts = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert whole and all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_many_images_are_judged_a_few_shards_at_a_time(tmp_path: Path, monkeypatch) -> None:
    parts: list[int] = []
    plain = verdicts.recalled
    monkeypatch.setattr(verdicts, "AT_ONCE", 4)
    monkeypatch.setattr("trainkit.data.rows.MOST_LOOKED", 14)  # fewer are looked at, too, which is done at once
    counting = lambda sources, *rest: parts.append(len(sources)) or plain(sources, *rest)  # noqa: E731
    monkeypatch.setattr(verdicts, "recalled", counting)
    rows, problems = read(shards(tmp_path / "set", n=5))
    assert not problems and len(rows) == 15 and parts == [6, 6, 3]
