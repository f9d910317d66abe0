"""Digests see every byte of a base model, and remembering them never gives a wrong one or an error."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.files import edit_json
from trainkit import checkpoints, digests
from trainkit.errors import UserError
from trainkit.families import sdxl
from trainkit.families.pretrained import sampled_digest, weights_digest
from trainkit.options import ModelOptions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(digests, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    """As old as a file that is worth remembering."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100_000.0), "b": torch.ones(3, dtype=torch.float16)}, path)
    return path


@pytest.fixture
def old_enough(monkeypatch) -> None:
    monkeypatch.setattr(digests, "FRESH_SECONDS", -1.0)


def counted(path: Path) -> tuple[str, int]:
    """What is told of a file, and how often it was read for it."""
    calls = []
    return digests.remembered(path, "test", lambda p: calls.append(p) or p.read_bytes().hex()), len(calls)


# -- what is seen -----------------------------------------------------------------------------------------------------


def zero_most(tensor: torch.Tensor) -> torch.Tensor:
    """All values but those that a sample of evenly spaced ones looks at."""
    flat = torch.zeros_like(tensor).flatten()
    step = max(1, len(flat) // 256)
    flat[::step] = tensor.flatten()[::step]
    return flat.view(tensor.shape)


CHANGES = {
    "most values 0": lambda tensors: {name: zero_most(t) for name, t in tensors.items()},
    "one value": lambda tensors: {**tensors, "a": tensors["a"] + (torch.arange(100_000) == 99_999).float()},
    "one bit": lambda tensors: {**tensors, "a": torch.nextafter(tensors["a"], torch.tensor(torch.inf))},
    "the sign of 0": lambda tensors: {**tensors, "a": torch.where(tensors["a"] == 0, -0.0, tensors["a"])},
    "a name": lambda tensors: {"c": tensors["a"], "b": tensors["b"]},
    "a type": lambda tensors: {**tensors, "b": tensors["b"].bfloat16()},
    "a shape": lambda tensors: {**tensors, "a": tensors["a"].view(2, -1)},
    "swapped": lambda tensors: {**tensors, "a": tensors["a"].flip(0)},
    "one more": lambda tensors: {**tensors, "c": torch.zeros(1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weights_is_seen(tmp_path, file, change):
    before = weights_digest(tmp_path, None)
    save_file({k: v.contiguous() for k, v in CHANGES[change](load_file(file)).items()}, file)
    assert weights_digest(tmp_path, None) != before


def test_the_sample_of_before_did_not_see_most(tmp_path, file):
    before = sampled_digest(tmp_path, None)
    save_file(CHANGES["most values 0"](load_file(file)), file)
    assert sampled_digest(tmp_path, None) == before


def test_shards_order_and_header_do_not_count(tmp_path, file):
    before = weights_digest(tmp_path, None)
    tensors = load_file(file)
    save_file(dict(reversed(tensors.items())), file, {"format": "pt"})
    assert weights_digest(tmp_path, None) == before
    file.unlink()
    for i, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    assert weights_digest(tmp_path, None) == before


def loaded(path: Path) -> sdxl.SDXL:
    return sdxl.load(ModelOptions(pretrained_model_name_or_path=str(path)), device=torch.device("cpu"),
                     weight_dtype=torch.float32)


@pytest.mark.parametrize("part, change, seen", [
    ("text_encoder", dict(hidden_act="gelu"), "text"), ("text_encoder_2", dict(layer_norm_eps=1e-3), "text"),
    ("text_encoder", dict(num_attention_heads=1), "text"), ("vae", dict(scaling_factor=0.5), "vae"),
    ("unet", dict(norm_eps=1e-3), "unet")])
def test_a_config_counts_as_weights_do(tiny_sdxl, tmp_path, part, change, seen):
    model = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    edit_json(model / part / "config.json", **change)
    one, other = loaded(tiny_sdxl).identity, loaded(model).identity
    assert {name for name in one if one[name] != other[name]} == {seen}


@pytest.mark.parametrize("part, seen", [("unet", "unet"), ("vae", "vae"), ("text_encoder", "text"),
                                        ("text_encoder_2", "text")])
def test_text_embeddings_of_another_base_are_not_served(tiny_sdxl, tmp_path, part, seen):
    model = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    weights, = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = zero_most(tensors[name])
    save_file(tensors, weights, {"format": "pt"})
    one, other = loaded(tiny_sdxl), loaded(model)
    assert {name for name in one.identity if one.identity[name] != other.identity[name]} == {seen}
    assert (one.text_identity != other.text_identity) == (seen == "text")
    assert one.sampled_identity == other.sampled_identity, "which older checkpoints are compared by"


# -- what is remembered -----------------------------------------------------------------------------------------------


def test_an_untouched_file_is_read_once(file, old_enough):
    assert counted(file)[1] == 1 and counted(file) == (file.read_bytes().hex(), 0)


TOUCHES = {
    "other bytes": lambda f: f.write_bytes(b"other"),
    "other bytes, as many": lambda f: f.write_bytes(bytes(reversed(f.read_bytes()))),
    "other bytes with the old date": lambda f: (
        before := f.stat(), f.write_bytes(bytes(len(f.read_bytes()))),
        os.utime(f, ns=(before.st_atime_ns, before.st_mtime_ns))),
    "another file moved there": lambda f: (
        shutil.copy2(f, f.with_name("new")), f.with_name("new").write_bytes(bytes(f.stat().st_size)),
        f.with_name("new").replace(f)),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touched_file_is_read_again(file, old_enough, touch):
    counted(file)
    time.sleep(0.02)  # a tick of the file system's clock
    TOUCHES[touch](file)
    assert counted(file) == (file.read_bytes().hex(), 1)


def test_a_file_that_was_changed_just_now_is_not_remembered(file):
    assert counted(file)[1] == 1 and counted(file)[1] == 1


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file, old_enough):
    digests.remembered(file, "test", lambda p: p.write_bytes(b"new") and "old")
    assert counted(file)[0] == b"new".hex()


def test_two_computations_do_not_mix(file, old_enough):
    assert [digests.remembered(file, kind, lambda p, kind=kind: kind) for kind in ("one", "two")] == ["one", "two"]


def locked(cache: Path) -> None:
    blocker = sqlite3.connect(cache / digests.FILE, check_same_thread=False)
    blocker.execute("BEGIN EXCLUSIVE")
    LOCKS.append(blocker)


LOCKS: list[sqlite3.Connection] = []
BROKEN = {
    "no database": lambda cache: (cache / digests.FILE).write_bytes(b"garbage" * 1000),
    "empty": lambda cache: (cache / digests.FILE).write_bytes(b""),
    "cut": lambda cache: (cache / digests.FILE).write_bytes((cache / digests.FILE).read_bytes()[:5000]),
    "another table": lambda cache: other_table(cache),  # as of another version
    "a folder": lambda cache: ((cache / digests.FILE).unlink(), (cache / digests.FILE).mkdir()),
    "a file for a folder": lambda cache: (shutil.rmtree(cache), cache.write_text("x")),
    "locked": locked,
}


def other_table(cache: Path) -> None:
    with sqlite3.connect(cache / digests.FILE) as database:
        database.execute("DROP TABLE files")
        database.execute("CREATE TABLE files (x)")


@pytest.mark.parametrize("name", BROKEN)
def test_a_memory_that_is_broken_or_locked_means_to_read_again(file, cache, old_enough, monkeypatch, name):
    monkeypatch.setattr(digests, "WAIT_SECONDS", 0.05)
    counted(file)
    BROKEN[name](cache)
    try:
        assert counted(file)[0] == file.read_bytes().hex() == counted(file)[0]
    finally:
        while LOCKS:
            LOCKS.pop().close()


def wait_budget(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each connection may wait for others, noted as connections are made."""
    connect, waits = sqlite3.connect, []
    monkeypatch.setattr(digests, "_waited", 0.0)
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout=5.0: waits.append(timeout) or connect(path, timeout))
    return waits


def test_a_process_waits_once_for_a_locked_memory_and_says_so_once(file, cache, old_enough, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(digests, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(digests, "_logged", False)
    counted(file)
    locked(cache)
    waits = wait_budget(monkeypatch)
    try:
        assert [counted(file)[1] for _ in range(4)] == [1, 1, 1, 1]
    finally:
        LOCKS.pop().close()
    assert waits[0] == 0.2 and len(waits) == 8 and sum(waits[1:]) < 0.1
    assert [record.levelname for record in caplog.records] == ["INFO"] and "locked" in caplog.text
    assert counted(file)[1] == 0, "it is used again when it is free"


def test_nothing_is_said_where_nobody_listens_yet(file, cache, old_enough, monkeypatch, caplog):
    """The trainers check images before their log is open, and load weights after."""
    monkeypatch.setattr(digests, "_logged", False)
    cache.write_text("a file, no folder")
    caplog.set_level(logging.WARNING)
    counted(file)
    caplog.set_level(logging.INFO)
    counted(file)
    assert len(caplog.records) == 1


def test_a_memory_that_cannot_be_written_still_serves(file, cache, old_enough, monkeypatch):
    counted(file)
    other = file.with_name("other")
    other.write_bytes(b"other")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(f"file:{path}?mode=ro", timeout, uri=True))
    assert counted(file)[1] == 0 and counted(other) == counted(other) == (b"other".hex(), 1)


def test_no_home_is_no_error(file, monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(digests, "cache_folder", nobody)
    assert counted(file)[1] == 1


def test_no_file_of_a_write_ahead_log_is_left(file, cache, old_enough):
    counted(file)
    assert [path.name for path in cache.iterdir()] == [digests.FILE]
    assert (cache / digests.FILE).read_bytes()[18:20] == b"\1\1", "rollback journal"


# -- many files -------------------------------------------------------------------------------------------------------


def files_in(folder: Path, n: int) -> list[Path]:
    """In three folders."""
    paths = [folder / "many" / str(i % 3) / f"{i}.txt" for i in range(n)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return paths


def learn(paths: list[Path], version: str = "") -> int:
    """Remember each file's text; how many had to be read for it. Fails where what is remembered is wrong."""
    memory = digests.FileMemory("text", paths, version=version)
    assert all(memory.values[path] == path.read_text() for path in memory.values)
    new = {path: path.read_text() for path in paths if path not in memory.values}
    memory.keep(new)
    return len(new)


def entries(cache: Path) -> int:
    with sqlite3.connect(cache / digests.FILE) as database:
        return database.execute("SELECT count(*) FROM files").fetchone()[0]


def test_many_files_take_one_connection_to_look_up_and_one_to_keep(tmp_path, cache, old_enough, monkeypatch):
    paths, waits = files_in(tmp_path, 60), wait_budget(monkeypatch)
    assert learn(paths) == 60 and len(waits) == 2
    assert learn(paths) == 0 and len(waits) == 3
    paths[7].write_text("something longer than before")
    assert learn(paths) == 1 and entries(cache) == 60, "the entry of its earlier state is replaced"


def test_another_version_reads_all_again_and_replaces_the_entries(tmp_path, cache, old_enough):
    paths = files_in(tmp_path, 6)
    assert [learn(paths, version) for version in ("1", "1", "2", "1")] == [6, 0, 6, 6]
    assert entries(cache) == 6


def test_the_oldest_entries_go_when_there_are_too_many(tmp_path, cache, old_enough, monkeypatch):
    monkeypatch.setattr(digests, "MOST", 10)
    paths = files_in(tmp_path, 16)
    learn(paths[:8])
    learn(paths[8:])
    assert entries(cache) == 10 and learn(paths[8:]) == 0


def test_a_file_changed_shortly_before_a_long_reading_is_not_remembered(tmp_path, monkeypatch):
    """Its second change, within the same tick of the clock, would not show in its times."""
    monkeypatch.setattr(digests, "FRESH_SECONDS", 0.1)
    path, = files_in(tmp_path, 1)
    memory = digests.FileMemory("text", [path])
    time.sleep(0.2)
    memory.keep({path: "as it was in between"})
    assert learn([path]) == 1 and learn([path]) == 0


def test_a_link_that_leads_elsewhere_now_is_read_again(tmp_path, old_enough):
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "link"
    for path in (one, other):
        path.write_text(f"{path.name:>5}")
    for target in (one, other):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert learn([link]) == 1
    assert learn([link]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_remember_at_once(tmp_path, cache, old_enough):
    paths, children = files_in(tmp_path, 300), []
    for part in (paths[:200], paths[100:]):
        children.append(os.fork())
        if not children[-1]:
            try:
                status = 0 if all(learn(part[i : i + 10]) <= 10 for i in range(0, 200, 10)) else 1
            finally:
                os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert learn(paths) == 0 and entries(cache) == 300


# -- checkpoints from before ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, resumes", [
    ({"base model": {"unet": "s"}}, True),  # before: some values alone
    ({"base model": {"unet": "s"}, "base model contents": {"unet": "c"}}, True),
    ({"base model": {"unet": "s"}, "base model contents": {"unet": "other"}}, False),
    ({"base model": {"unet": "other"}}, False)])
def test_a_checkpoint_from_before_is_compared_by_what_it_knows(tmp_path, theirs, resumes):
    ours = {"base model": {"unet": "s"}, checkpoints.UNKNOWN_BEFORE: {"unet": "c"}}
    part = SimpleNamespace(pack=lambda: ({}, {}), unpack=lambda tensors, data: None)
    checkpoints.Checkpoints(tmp_path, fingerprint=theirs, part=part).save(3)
    run = checkpoints.Checkpoints(tmp_path, fingerprint=ours, part=part)
    if resumes:
        assert run.resume("latest") == 3
    else:
        with pytest.raises(UserError, match="other settings"):
            run.resume("latest")
