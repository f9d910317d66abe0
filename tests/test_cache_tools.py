"""`lora-tools cache`: it shows what is there, finds every damaged entry, and deletes nothing that a run may need."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.support.caches import DAMAGE, encode, folder_rows
from trainkit.data import cache_uses
from trainkit.data.cache import DIGEST, DiskStore, cache_latents, content_key, refer, tensors_digest
from trainkit.data.cache_folders import collect, fault, find_caches
from trainkit.data.cache_uses import Use, alone, known_uses
from trainkit.data.geometry import CropPolicy
from trainkit.errors import UserError
from trainkit.files import write_json
from trainkit.tools import cache as tool

DAY = 86_400


def entry(i: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((4, 8, 12), float(i)), "logvar": torch.zeros(4, 8, 12)}


def keys_of(*numbers: int) -> list[str]:
    return [content_key(i) for i in numbers]


def run_folder(path: Path, **options: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "run.json", {"options": {name: {"value": value} for name, value in options.items()}})
    return path


def ended_run(cache: Path, run: Path, *numbers: int, days: float = 2) -> None:
    """A run that used entries of these numbers, the last time so many days ago."""
    store = DiskStore(cache, run)
    for i in numbers:
        store[keys_of(i)[0]] = entry(i)
        os.utime(store._path(keys_of(i)[0]), (time.time() - days * DAY,) * 2)
    refer(store, bytes.fromhex("".join(keys_of(*numbers))))
    assert store.use
    os.utime(store.use.path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """0 and 1 are of a run whose folder is there, 1 and 2 of one whose folder is gone."""
    ended_run(tmp_path / "cache", run_folder(tmp_path / "runs/dog", resolution=512, enable_bucket=True), 0, 1)
    ended_run(tmp_path / "cache", tmp_path / "runs/gone", 1, 2)
    return tmp_path / "cache"


def there(cache: Path) -> set[int]:
    return {i for i in range(9) if keys_of(i)[0] in DiskStore(cache)}


# ----------------------------------------------------------------------------------------------------------------------
# list


def test_the_list_says_what_is_there_and_who_uses_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiskStore(cache)[keys_of(3)[0]] = {"embeds": torch.zeros(77, 16), "pooled": torch.zeros(16)}
    living = Use(cache, run_folder(cache.parent / "runs/cat"))
    living.refer(bytes.fromhex(keys_of(2)[0]))
    tool.main(["list", str(cache)])
    shown = capsys.readouterr().out
    assert "4 entries" in shown and "latents      3, " in shown and "3 12x8 f32" in shown and "1 77 tokens f32" in shown
    assert re.search(r"runs/dog: last started .*, 512 px in buckets, 2 entries", shown)
    assert re.search(r"runs/gone: last started .*, its folder is gone, 2 entries", shown)
    assert f"runs/cat: in use by process {os.getpid()} on" in shown and "no run that is known here: 1 entry" in shown
    tool.main(["list", "--json", str(cache)])
    told = json.loads(capsys.readouterr().out)[0]
    assert told["entries"] == 4 and told["unused_entries"] == 1 and {run["entries"] for run in told["runs"]} == {1, 2}


def test_caches_are_found_below_a_folder_and_through_runs(cache: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "elsewhere/ünï cödé", latent_cache_dir=str(cache))
    assert find_caches(run) == find_caches(tmp_path) == find_caches(cache) == [cache]
    old = tmp_path / "elsewhere/old"
    DiskStore(old)[keys_of(1)[0]] = entry(1)  # of a version that recorded no uses
    assert find_caches(tmp_path / "elsewhere") == [cache, old] or find_caches(tmp_path / "elsewhere") == [old, cache]


@pytest.mark.parametrize("damage", ["", "[", '{"options": 3}', '{"options": {"latent_cache_dir": {"value": 4}}}'])
def test_a_damaged_record_of_a_run_is_passed_over(cache: Path, damage: str) -> None:
    (cache.parent / "runs/dog/run.json").write_text(damage)
    (next((cache / cache_uses.FOLDER).glob("*.json"))).write_text(damage)
    assert find_caches(cache.parent) == [cache]
    tool.main(["list", str(cache.parent)])


@pytest.mark.parametrize("words, says", [
    (["list", "nowhere"], "there is no such folder"), (["gc", "."], "no cache folder"),
])
def test_a_folder_without_a_cache_is_refused(words: list[str], says: str, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        tool.main(words)


# ----------------------------------------------------------------------------------------------------------------------
# verify


def with_digest(**tensors: torch.Tensor) -> bytes:
    return save(tensors, {DIGEST: tensors_digest(tensors)})


FAULTS = {**DAMAGE, "empty": lambda data: b"",
          "NaN": lambda data: with_digest(**(load(data) | {"mean": torch.full((4, 8, 12), float("nan"))})),
          "another shape": lambda data: with_digest(mean=torch.zeros(4, 8, 12), logvar=torch.zeros(4, 8, 13)),
          "half of it": lambda data: with_digest(mean=torch.zeros(4, 8, 12)),
          "something else": lambda data: with_digest(weight=torch.zeros(3))}


@pytest.mark.parametrize("damage", FAULTS)
def test_every_damaged_entry_is_named_and_deleted_on_request(cache: Path, damage: str,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["verify", str(cache)])
    bad = DiskStore(cache)._path(keys_of(1)[0])
    bad.write_bytes(FAULTS[damage](bad.read_bytes()))
    with pytest.raises(UserError, match=f"1 entry is damaged(.|\n)*{bad.name}(.|\n)*--repair"):
        tool.main(["verify", str(cache)])
    assert there(cache) == {0, 1, 2}, "nobody asked to delete it"
    tool.main(["verify", str(cache), "--repair"])
    assert bad.name in capsys.readouterr().out and there(cache) == {0, 2}
    tool.main(["verify", str(cache)])


def test_an_entry_that_is_deleted_meanwhile_is_not_damaged(cache: Path) -> None:
    assert fault(cache / "00" / "gone.safetensors") == ""


# ----------------------------------------------------------------------------------------------------------------------
# gc


def test_nothing_is_deleted_without_being_asked(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--dry_run", "--delete"], ["--older_than=1h"]):
        tool.main(["gc", str(cache), *words])
        assert "would delete" in capsys.readouterr().out and there(cache) == {0, 1, 2}


def test_what_no_run_needs_is_deleted(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["gc", str(cache), "--delete"])
    assert there(cache) == {0, 1} and len(known_uses(cache)) == 1, "0 and 1 are of a run whose folder is there"
    tool.main(["gc", str(cache), "--delete"])
    assert "all 2 entries are needed" in capsys.readouterr().out


@pytest.mark.parametrize("age, left", [("1d", set()), ("47h", set()), ("3d", {0, 1}), ("1w", {0, 1})])
def test_old_runs_need_nothing_on_request(cache: Path, age: str, left: set[int]) -> None:
    tool.main(["gc", str(cache), "--delete", "--older_than", age])
    assert there(cache) == left


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1 month", "nand"])
def test_an_age_without_meaning_is_refused(cache: Path, age: str) -> None:
    with pytest.raises(SystemExit):
        tool.main(["gc", str(cache), "--delete", "--older_than", age])


def test_what_is_new_stays_though_nobody_says_that_he_needs_it(cache: Path) -> None:
    DiskStore(cache)[keys_of(5)[0]] = entry(5)
    collect(cache, older_than=0, delete=True)
    assert there(cache) == {5}, "the run that has just written it may not have been able to say so"


def test_a_living_process_keeps_its_entries_though_its_folder_is_gone(cache: Path) -> None:
    use = Use(cache, cache.parent / "runs/gone")  # goes on with the list of the run before
    collect(cache, older_than=1, delete=True)
    assert there(cache) == {1, 2}
    del use
    collect(cache, older_than=1, delete=True)
    assert there(cache) == set()


def test_a_run_of_another_machine_keeps_its_entries_until_it_is_old(cache: Path) -> None:
    for use in known_uses(cache):
        last = use.path.stat().st_mtime
        write_json(use.path, {"run": "/mnt/not/here", "host": "another", "pid": 1})
        os.utime(use.path, (last, last))
    collect(cache, older_than=None, delete=True)
    assert there(cache) == {0, 1, 2}
    collect(cache, older_than=DAY, delete=True)
    assert there(cache) == set()


def _hold(cache: Path, ready: multiprocessing.synchronize.Event) -> None:
    use = Use(cache, cache.parent / "runs/gone")
    ready.set()
    time.sleep(60)
    del use


def test_a_killed_process_uses_nothing_any_more(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(cache, ready))
    process.start()
    assert ready.wait(30) and [use.pid for use in known_uses(cache) if use.alive] == [process.pid]
    collect(cache, older_than=None, delete=True)
    assert there(cache) == {0, 1, 2}
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not any(use.alive for use in known_uses(cache))
    collect(cache, older_than=None, delete=True)
    assert there(cache) == {0, 1}


def test_a_start_waits_for_a_deletion_and_makes_again_what_it_took(cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  ) -> None:
    """The entries were there when the run looked, and another process deletes them before the run says it needs them.
    """
    rows, policy = folder_rows(cache.parent / "d"), CropPolicy(resolution=32, center_crop=True)
    fill = dict(seed=0, identity="vae")
    cache_latents(rows, policy, encode, DiskStore(cache), **fill)
    store, counts, before = DiskStore(cache, run_folder(cache.parent / "runs/new")), [0], Use.refer

    def late(self: Use, keys: bytes) -> None:
        if not counts[1:]:
            counts.append(0)
            for path in cache.glob("??/*.safetensors"):
                path.unlink()
        before(self, keys)

    monkeypatch.setattr(Use, "refer", late)
    latents = cache_latents(rows, policy, encode, store, progress=lambda done, total: counts.append(done), **fill)
    assert counts[-1] == len(rows)
    for row in rows:
        latents(policy.sample(row, seed=0, epoch=0))


def test_the_record_of_a_run_grows_by_what_is_new(cache: Path) -> None:
    run = run_folder(cache.parent / "runs/dog")
    for i in (1, 5, 5):
        refer(DiskStore(cache, run), bytes.fromhex("".join(keys_of(i, i))))
    use = next(use for use in known_uses(cache) if use.run == run)
    assert use.keys == set(keys_of(0, 1, 5)) and use.path.with_suffix(".keys").stat().st_size == 3 * 16
    use.path.with_suffix(".keys").write_bytes(use.path.with_suffix(".keys").read_bytes() + b"torn")
    assert use.keys == set(keys_of(0, 1, 5))


def test_a_run_goes_on_where_its_use_cannot_be_recorded(cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_uses, "write_json", full)
    monkeypatch.setattr(cache_uses, "atomic_write", full)
    store = DiskStore(cache, cache.parent / "runs/dog")
    refer(store, bytes.fromhex(keys_of(7)[0]))
    assert caplog.text.count("cannot be recorded") == 1 and "No space left" in caplog.text


def test_one_deletes_at_a_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_uses, "WAIT_SECONDS", 0)
    with alone(cache), pytest.raises(UserError, match="another process is deleting"):
        tool.main(["gc", str(cache), "--delete"])
    assert there(cache) == {0, 1, 2}


def test_a_store_in_use_can_be_sent_to_a_worker_process(cache: Path) -> None:
    store = DiskStore(cache, cache.parent / "runs/dog")
    assert pickle.loads(pickle.dumps(store))[keys_of(0)[0]]["mean"].shape == (4, 8, 12)
