"""Latents are encoded once, keyed by content, and no crash or rival can leave a wrong one behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

from tests.support.caches import DAMAGE, encode, folder_rows
from tests.support.images import marked, open_files, row_of
from trainkit.data import cache
from trainkit.data.batch import Row
from trainkit.data.cache import DiskStore, Latents, Store, StoredTensors, cache_latents, content_key
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import load_image
from trainkit.errors import UserError, shell_word

POLICY = CropPolicy(resolution=32, center_crop=True)


def fill(rows: list[Row], store: Store, policy: CropPolicy = POLICY, **changes: object) -> tuple[Latents, int]:
    """(the latents, how many had to be encoded)."""
    counts = [0]
    how = dict(seed=0, identity="vae", progress=lambda done, total: counts.append(done)) | changes
    return cache_latents(rows, policy, encode, store, **how), counts[-1]


@pytest.mark.parametrize("policy", [
    POLICY, replace(POLICY, random_flip=True),
    CropPolicy(resolution=32, random_flip=True, cached_crops=3, interpolation="bilinear"),
])
@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (4, 0), (3, 2)])
def test_a_cached_visit_is_the_live_one(tmp_path: Path, policy: CropPolicy, batch_size: int, num_workers: int) -> None:
    rows = folder_rows(tmp_path / "d")
    latents, _ = fill(rows, {}, policy, batch_size=batch_size, num_workers=num_workers)
    for row in rows:
        for epoch in range(6):
            sample = policy.sample(row, seed=0, epoch=epoch)
            live = encode(policy.views(load_image(row), [sample]))
            for kept, wanted in zip(latents(sample), live, strict=True):
                torch.testing.assert_close(kept, wanted[0], rtol=0, atol=1e-6)


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    rows, store = folder_rows(tmp_path / "d"), DiskStore(tmp_path / "cache")
    assert fill(rows, store)[1] == 5
    assert fill(rows, store)[1] == fill(rows, DiskStore(tmp_path / "cache"))[1] == 0
    repeats = [replace(row, repeat=i) for row in rows for i in range(3)]
    assert fill(repeats, store)[1] == 0, "repeats with the same crop share an entry"


def test_a_square_image_is_cached_once_however_many_crops(tmp_path: Path) -> None:
    marked(1, 40, 40).save(tmp_path / "a.png")
    assert fill([row_of(tmp_path / "a.png")], {}, CropPolicy(resolution=32, cached_crops=4))[1] == 1


def test_whatever_changes_is_rebuilt_and_nothing_else(tmp_path: Path) -> None:
    rows, store = folder_rows(tmp_path / "d"), DiskStore(tmp_path / "cache")
    fill(rows, store)
    marked(200, 50, 32).save(rows[2].source)  # new pixels under the old name
    changed = [row_of(row.source) for row in rows]
    assert fill(changed, store)[1] == 1, "pixels"
    assert fill([replace(row, caption="new", id="renamed", loss_weight=0.5) for row in changed], store)[1] == 0
    assert fill(changed, store, replace(POLICY, random_flip=True))[1] == 5, "only the mirrored ones are new"
    assert fill(changed, store, replace(POLICY, resolution=16))[1] == 5, "resolution"
    assert fill(changed, store, replace(POLICY, interpolation="box"))[1] == 5, "filter"
    assert fill(changed, store, identity={"vae": "other"})[1] == 5, "VAE"
    assert fill(changed, store, dtype=torch.float16)[1] == 5, "number format"
    assert fill(changed, store)[1] == 0, "the first entries are still there"


def test_a_code_change_that_matters_rebuilds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, store = folder_rows(tmp_path / "d"), {}
    fill(rows, store)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert fill(rows, store)[1] == 5


@pytest.mark.parametrize("parts", [(), ("a",), ("é\n", 1, None, [1, 2.5, {"b": 1, "a": 2}]), (("x", 1, ()), ("y",))])
def test_a_content_key_is_the_digest_of_all_its_parts_as_one_json_list(parts) -> None:
    whole = json.dumps(parts, sort_keys=True).encode()
    assert content_key(*parts) == hashlib.blake2b(whole, digest_size=16).hexdigest()


def test_content_keys_tell_parts_apart() -> None:
    keys = [content_key(*parts) for parts in [("a", "b"), ("ab",), ("a", ["b"]), (1,), ("1",), ({"x": 1, "y": 2},)]]
    assert len(set(keys)) == len(keys) and content_key({"y": 2, "x": 1}) == keys[-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_cached(tmp_path: Path, bad: float) -> None:
    rows, store = folder_rows(tmp_path / "d"), {}

    def overflow(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = encode(pixels)
        return mean, logvar * bad

    with pytest.raises(UserError, match=r"000\.png") as caught:
        cache_latents(rows, POLICY, overflow, store, seed=0, identity="vae")
    assert caught.value.problems[0].kind == "nonfinite" and not store


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, damage: str) -> None:
    rows, store = folder_rows(tmp_path / "d"), DiskStore(tmp_path / "cache")
    latents, _ = fill(rows, store)
    sample = POLICY.sample(rows[0], seed=0, epoch=0)
    path = store._path(latents.key(sample))
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match="damaged"):
        latents(sample)
    assert fill(rows, store)[1] == 1


def no_reading(path: Path) -> StoredTensors:
    raise AssertionError(f"{path} was read")


def test_a_start_reads_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = folder_rows(tmp_path / "d")
    fill(rows[:3], DiskStore(tmp_path / "cache"))
    monkeypatch.setattr(cache, "read_entry", no_reading)
    assert fill(rows, DiskStore(tmp_path / "cache"))[1] == 2, "those that are not there"


def test_keys_are_those_of_whole_entries(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    names = [content_key(i) for i in range(20)]
    for name in names:
        store[name] = {"x": torch.zeros(1)}
    (tmp_path / names[0][:2] / f".{names[1]}.safetensors.1-a.tmp").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "no").touch()
    assert store.keys() == {*names} and names[3] in store and content_key("other") not in store


def test_a_damaged_entry_that_cannot_be_deleted_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path / "it's a cache")
    store["aa00"] = {"x": torch.zeros(1)}
    store._path("aa00").write_bytes(b"")

    def forbidden(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(UserError, match="damaged") as caught:
        store["aa00"]
    assert caught.value.problems[0].fix.startswith(f"rm -- {shell_word(store._path('aa00'))}; start")


def test_an_entry_that_cannot_be_opened_now_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store["aa00"] = {"x": torch.zeros(1)}

    def too_many(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", too_many)
        with pytest.raises(UserError, match="Too many open files"):
            store["aa00"]
    assert store["aa00"]["x"].shape == (1,)


def be_rank(rank: int, monkeypatch: pytest.MonkeyPatch, at_barrier: Callable[[], object]) -> None:
    monkeypatch.setattr(cache.ranks, "world", lambda: 2)
    monkeypatch.setattr(cache.ranks, "rank", lambda: rank)
    monkeypatch.setattr(cache.ranks, "barrier", at_barrier)


def encoded_by_two_ranks(rows: list[Row], stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views each rank encodes; rank 1 runs while rank 0 waits."""
    counts = [0, 0]

    def run(rank: int, at_barrier: Callable[[], object]) -> None:
        def counting(pixels: Tensor) -> tuple[Tensor, Tensor]:
            counts[rank] += 1
            return encode(pixels)

        be_rank(rank, monkeypatch, at_barrier)
        cache_latents(rows, POLICY, counting, stores[rank], seed=0, identity="vae")

    run(0, at_barrier=lambda: run(1, at_barrier=lambda: None))
    return counts


def test_ranks_share_the_work_where_they_share_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shared = folder_rows(tmp_path / "d"), DiskStore(tmp_path / "cache")
    assert encoded_by_two_ranks(rows, (shared, shared), monkeypatch) == [3, 2]
    assert encoded_by_two_ranks(rows, (shared, shared), monkeypatch) == [0, 0]
    apart = DiskStore(tmp_path / "a"), DiskStore(tmp_path / "b")
    assert encoded_by_two_ranks(rows, apart, monkeypatch) == [5, 5], "each machine needs every entry"


def test_one_process_lists_the_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100,000 entries on a network disk, a listing takes its time."""
    listed, keys = [], DiskStore.keys
    monkeypatch.setattr(DiskStore, "keys", lambda store: listed.append(1) or keys(store))
    rows, store = folder_rows(tmp_path / "d"), DiskStore(tmp_path / "cache")
    assert [fill(rows, store)[1] for _ in range(2)] == [5, 0] and len(listed) == 2


def in_child(work: object, *args: object) -> int:
    """Fork a child that runs `work(*args)` -> its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*args)
            status = 0
        finally:
            os._exit(status)
    return pid


BIG = {"mean": torch.arange(100_000.0), "logvar": torch.arange(100_000.0) + 1}


def put_many(folder: Path, n: int) -> None:
    store = DiskStore(folder)
    for i in range(n):
        store[content_key(i)] = {name: t + i for name, t in BIG.items()}


def intact(folder: Path, n: int) -> int:
    """How many entries are there; fails when one of them is not what was put."""
    store, there = DiskStore(folder), 0
    for i in range(n):
        if content_key(i) in store:
            there += 1
            entry = store[content_key(i)]
            assert all(torch.equal(entry[name], t + i) for name, t in BIG.items())
    return there


@pytest.mark.trains
def test_kill_9_while_caching_leaves_only_whole_entries(tmp_path: Path) -> None:
    """Killed as soon as a number of entries is seen, wherever in the next one the writer then is."""
    many = 1000
    for attempt in range(10):
        folder, wanted = tmp_path / f"cache{attempt}", 1 + 3 * attempt
        child = in_child(put_many, folder, many)
        while len(list(folder.glob("??/*.safetensors"))) < wanted:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert wanted <= intact(folder, many) < many


def test_two_processes_may_cache_at_once(tmp_path: Path) -> None:
    children = [in_child(put_many, tmp_path / "cache", 30) for _ in range(2)]
    while os.waitpid(children[0], os.WNOHANG) == (0, 0):
        intact(tmp_path / "cache", 30)
    assert os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1]) == 0
    assert intact(tmp_path / "cache", 30) == 30
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_drafts_of_a_killed_run_are_swept_but_a_live_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, young = tmp_path / "ab" / ".x.safetensors.1-a.tmp", tmp_path / "ab" / ".y.safetensors.2-b.tmp"
    for draft in (old, young):
        draft.touch()
    os.utime(old, (0, 0))
    DiskStore(tmp_path)
    assert young.exists() and not old.exists()


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_tensors", no_space)
    with pytest.raises(UserError, match="No space left") as caught:
        store["aa00"] = BIG
    assert caught.value.exit_code == 74


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's memory counters")
def test_a_disk_store_costs_no_memory(tmp_path: Path) -> None:
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    put_many(tmp_path, 80)  # 61 MiB
    store, handles = DiskStore(tmp_path), open_files()
    assert store[content_key(0)]
    before = resident_mb()
    total = sum(float(store[content_key(i)]["mean"].sum()) for i in range(80))
    assert total and resident_mb() - before < 6
    assert open_files() == handles and len(pickle.dumps(store)) < 1000
