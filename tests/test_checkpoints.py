"""Checkpoints under attack: killed at every stage and at random, damaged in a dozen ways, on a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickletools
import random
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from trainkit import checkpoints as room
from trainkit import files
from trainkit.checkpoints import Checkpoints, Stage
from trainkit.errors import Problem, UserError
from trainkit.runtime import manifest
from trainkit.runtime.checkpoint_folders import CheckpointFolders, is_whole, pointed
from trainkit.runtime.weight_files import DIFFUSERS_FILE, step_files, step_name, step_of

STAGES = get_args(Stage)


class Part:
    """State that is a function of the step, so that any mixture of two checkpoints shows."""

    def __init__(self, size: int = 300):
        self.size, self.step = size, 0

    def pack(self):
        tensors = {"w": torch.full((self.size,), float(self.step)), "k": torch.tensor(self.step),
                   "h": torch.full((3,), self.step, dtype=torch.bfloat16), "q": torch.zeros(4, dtype=torch.uint8)}
        return tensors, {"step": self.step, "lr": 0.1 + self.step, "none": None}

    def unpack(self, tensors, data):
        assert torch.equal(tensors["w"], torch.full((self.size,), float(data["step"])))
        assert tensors["k"] == data["step"] and tensors["h"].dtype == torch.bfloat16
        assert data["lr"] == 0.1 + data["step"] and data["none"] is None
        self.step = data["step"]


class Loras:
    """Files for other programs: one in the checkpoint, one beside it."""

    def __init__(self, out: Path, *, keep: bool = True):
        self.out, self.keep = out, keep

    def bytes_in(self) -> int:
        return 2_000

    def bytes_beside(self) -> int:
        return 1_000

    def write(self, folder: Path, step: int) -> None:
        for path in (folder / DIFFUSERS_FILE, self.out / f"{step_name('dog', step)}.safetensors"):
            files.atomic_write(path, b"weights of %d" % step)

    def beside(self) -> dict[Path, int]:
        return step_files(self.out, "dog")


def make(out: Path, *, keep=None, size=300, exports=None, every=None, after_last=True, **fingerprint
         ) -> tuple[Checkpoints, Part]:
    part = Part(size)
    pins = {"--rank": 4, "model": {"name": "tiny", "hash": "ab"}} | fingerprint
    return Checkpoints(out, keep=keep, every=every, after_last=after_last, fingerprint=pins, exports=exports,
                       adapters=part, optimizer=Part(5)), part


def save_steps(out: Path, *steps: int, keep=None) -> None:
    points, part = make(out, keep=keep)
    for step in steps:
        part.step = step
        points.save(step)


def resumed(out: Path, which: str | None = "latest", **kwargs) -> int:
    points, part = make(out, **kwargs)
    step = points.resume(which)
    assert part.step == step
    return step


def forked(child) -> int:
    """Run `child` in a fork of this process; -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
    finally:
        os._exit(1)


def hidden(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob(".*"))


def test_what_is_saved_comes_back_and_files_are_the_announced_ones(tmp_path):
    save_steps(tmp_path, 2, 4)
    assert resumed(tmp_path) == 4
    names = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert names == {"adapters.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "checkpoint-4", "step": 4}
    assert pointed(tmp_path) == "checkpoint-4" and hidden(tmp_path) == []


# -- files for other programs ------------------------------------------------------------------------------------------


def beside(out: Path) -> list[int]:
    return list(step_files(out, "dog").values())


def test_a_checkpoint_notes_the_files_for_other_programs_in_its_manifest(tmp_path):
    folder = make(tmp_path, exports=Loras(tmp_path))[0].save(1)
    facts = manifest.check(folder)
    assert facts["exports"].keys() == {DIFFUSERS_FILE} and DIFFUSERS_FILE not in facts["files"]
    assert (tmp_path / "dog-step00000001.safetensors").read_bytes() == b"weights of 1"


@pytest.mark.parametrize("harm", [Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"other weights")],
                         ids=["missing", "empty", "changed"])
def test_a_resume_does_not_need_the_files_for_other_programs(tmp_path, harm):
    points, part = make(tmp_path, exports=Loras(tmp_path), keep=1)
    part.step = 2
    harm(points.save(2) / DIFFUSERS_FILE)
    harm(tmp_path / "dog-step00000002.safetensors")
    assert is_whole(tmp_path / "checkpoint-2") and resumed(tmp_path) == resumed(tmp_path, "checkpoint-2") == 2


@pytest.mark.parametrize("stage", ["write", "flush", "manifest", "publish"])
def test_a_checkpoint_that_can_be_seen_has_all_its_files(tmp_path, stage):
    def child():
        room.reached = lambda at, step: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None
        make(tmp_path, exports=Loras(tmp_path))[0].save(2)

    os.waitpid(forked(child), 0)
    for folder in CheckpointFolders(tmp_path).all():
        assert (folder / DIFFUSERS_FILE).is_file() and beside(tmp_path) == [2]


@pytest.mark.parametrize("kept", [True, False])
def test_loras_beside_checkpoints_stay_or_go_with_them(tmp_path, kept):
    points, part = make(tmp_path, exports=Loras(tmp_path, keep=kept), keep=2)
    (tmp_path / "dog.safetensors").write_bytes(b"the final one")
    (tmp_path / "hotdog-step00000002.safetensors").write_bytes(b"another run's")
    for part.step in (2, 4, 6, 8):
        points.save(part.step)
    assert beside(tmp_path) == ([2, 4, 6, 8] if kept else [6, 8])
    assert {p.name for p in tmp_path.glob("*dog*")} >= {"dog.safetensors", "hotdog-step00000002.safetensors"}


def test_loras_of_steps_that_will_come_again_are_set_aside_with_their_checkpoints(tmp_path):
    points, part = make(tmp_path, exports=Loras(tmp_path))
    for part.step in (2, 4, 6):
        points.save(part.step)
    shutil.rmtree(tmp_path / "checkpoint-4")  # its LoRA stayed when it was pruned
    assert make(tmp_path, exports=Loras(tmp_path))[0].resume("checkpoint-2") == 2
    assert beside(tmp_path) == [2]
    assert [p.name for p in sorted(tmp_path.glob("earlier/*/*"))] == [
        "checkpoint-6", "dog-step00000004.safetensors", "dog-step00000006.safetensors"]


@pytest.mark.parametrize("keep, kept, said", [
    (None, True, "4 checkpoints of this run leave a LoRA for WebUIs in {}: 1 KiB each, 4 KiB together (--no_keep"),
    (1, True, "4 checkpoints of this run leave a LoRA for WebUIs in {}: 1 KiB each, 4 KiB together (--no_keep"),
    (2, False, "2 checkpoints of this run leave a LoRA for WebUIs in {}: 1 KiB each, 2 KiB together"),
])
def test_their_disk_is_told_at_the_start(tmp_path, caplog, keep, kept, said):
    points, _ = make(tmp_path, exports=Loras(tmp_path, keep=kept), keep=keep, every=2)
    with caplog.at_level(logging.INFO):
        points.announce(0, stop=7, total=7)
        make(tmp_path, every=2)[0].announce(0, stop=7, total=7)
        make(tmp_path, exports=Loras(tmp_path), every=2)[0].announce(7, stop=7, total=7)
    [told] = caplog.messages
    assert told.startswith(said.format(tmp_path)) and ("--no_keep_loras" in told) == kept


def test_their_disk_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    points, _ = make(tmp_path, exports=Loras(tmp_path))
    asked = []
    monkeypatch.setattr(files, "require_space", lambda folder, size: asked.append(size))
    points.save(2)
    points.exports = room.NoExports()
    points.save(3)
    assert asked[0] - asked[1] == 3_000


# -- which steps are saved, and which stay -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps, every, keep, left", [
    (7, 2, 2, [4, 6, 7]), (6, 2, 2, [4, 6]), (7, 2, None, [2, 4, 6, 7]), (7, 100, 1, [7]), (3, 1, 1, [3]),
    (5, 4, 1, [4, 5]),
])
@pytest.mark.parametrize("compat", [False, True])
def test_the_save_after_the_last_step_does_not_count(tmp_path, steps, every, keep, left, compat):
    """Under --compat diffusers it is not made, unless it is on the interval."""
    points, part = make(tmp_path, keep=keep, every=every, after_last=not compat)
    for part.step in range(1, steps + 1):
        if points.due(part.step, stop=steps, total=steps):
            points.save(part.step)
    expected = [step for step in left if not compat or step % every == 0]
    assert [step_of(p) for p in CheckpointFolders(tmp_path).all()] == expected


@pytest.mark.parametrize("after_last", [True, False])
def test_a_session_that_is_to_stop_early_saves_where_it_stops(tmp_path, after_last):
    points, _ = make(tmp_path, every=5, after_last=after_last)
    assert [step for step in range(1, 9) if points.due(step, stop=8, total=20)] == [5, 8]


def test_a_longer_run_lets_the_extra_one_go(tmp_path):
    points, part = make(tmp_path, keep=2, every=2)
    for part.step in (2, 4, 6, 7, 8, 10):
        points.save(part.step)
    assert [step_of(p) for p in CheckpointFolders(tmp_path).all()] == [8, 10]


def test_a_kill_before_the_pruning_is_made_good_by_a_session_with_no_step_left(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2, 3, 4)
    points, _ = make(tmp_path, keep=2)
    points.resume("latest")
    points.save(4)
    assert [step_of(p) for p in CheckpointFolders(tmp_path).all()] == [3, 4]


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("keep", [1, None])
def test_a_kill_at_any_stage_costs_at_most_the_checkpoint_being_written(tmp_path, stage, keep):
    save_steps(tmp_path, 2, 4, keep=keep)

    def child():
        room.reached = lambda at, step: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None
        save_steps(tmp_path, 6, keep=keep)

    _, status = os.waitpid(forked(child), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    for folder in CheckpointFolders(tmp_path).all():
        assert is_whole(folder), f"{folder.name} is visible but not whole"
    assert resumed(tmp_path, keep=keep) == (4 if stage in STAGES[:4] else 6)
    assert hidden(tmp_path) == []
    points, part = make(tmp_path, keep=keep)
    points.resume("latest")
    part.step = 8
    points.save(8)
    assert resumed(tmp_path) == 8


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_while_replacing_the_same_step_keeps_one_of_the_two(tmp_path, stage):
    save_steps(tmp_path, 4)

    def child():
        room.reached = lambda at, step: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None
        save_steps(tmp_path, 4, keep=1)

    os.waitpid(forked(child), 0)
    assert resumed(tmp_path) == 4 and hidden(tmp_path) == []


def test_a_kill_between_the_two_renames_of_a_replacement_is_finished_on_resume(tmp_path):
    save_steps(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / ".tmp-checkpoint-4.aaaa")
    (tmp_path / "checkpoint-4").rename(tmp_path / ".trash-checkpoint-4.bbbb")
    assert resumed(tmp_path) == 4 and hidden(tmp_path) == []


@pytest.mark.trains
def test_thirty_kills_at_random_moments_lose_no_finished_checkpoint(tmp_path):
    chance = random.Random(0)
    for _ in range(30):
        read, write = os.pipe()

        def child(write=write):
            points, part = make(tmp_path, keep=2, size=20_000)
            step = points.resume("latest")
            while True:
                part.step = step = step + 1
                points.save(step)
                os.write(write, step.to_bytes(4, "big"))

        pid = forked(child)
        os.close(write)
        with os.fdopen(read, "rb", buffering=0) as pipe:
            first = pipe.read(4)  # at least one checkpoint a child, however slow the machine is
            time.sleep(chance.uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            announced = int.from_bytes((first + (pipe.read() or b""))[-4:], "big")
        assert announced <= resumed(tmp_path, keep=2, size=20_000) <= announced + 1


def test_with_one_kept_there_is_a_whole_checkpoint_at_every_instant(tmp_path):
    save_steps(tmp_path, 1, keep=1)
    pid = forked(lambda: save_steps(tmp_path, *range(2, 10_000), keep=1))
    try:
        for _ in range(60):
            # the second look is for a folder that was pruned between being listed and being read
            assert any(any(map(is_whole, CheckpointFolders(tmp_path).all())) for _ in range(2))
            time.sleep(0.005)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert resumed(tmp_path) > 1, "the child saved while we looked"


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_not_whole(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    folder, = CheckpointFolders(tmp_path).all()
    assert is_whole(folder)

    def gone(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr("trainkit.runtime.manifest.sha256", gone)
    assert not is_whole(folder)


def truncate(p: Path): p.write_bytes(p.read_bytes()[:-7])
def empty(p: Path): p.write_bytes(b"")
def zero(p: Path): p.write_bytes(bytes(p.stat().st_size))
def grow(p: Path): p.write_bytes(p.read_bytes() + b"\0")


def flip(p: Path):
    data = bytearray(p.read_bytes())
    data[len(data) // 2] ^= 1
    p.write_bytes(bytes(data))


def swap(p: Path):
    """Take the file of the other checkpoint."""
    p.write_bytes((p.parent.parent / "checkpoint-2" / p.name).read_bytes())


DAMAGES = [(damage, name) for name in ("adapters.safetensors", "state.json", "manifest.json")
           for damage in (truncate, empty, zero, grow, flip, swap, Path.unlink)]


@pytest.mark.parametrize("damage, name", DAMAGES, ids=[f"{d.__name__}-{n}" for d, n in DAMAGES])
def test_damage_is_found_named_and_the_one_before_is_used(tmp_path, caplog, damage, name):
    save_steps(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 2
    blamed = "adapters.safetensors" if (damage, name) == (swap, "manifest.json") else name
    assert f"skipping checkpoint-4: {blamed}" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        save_steps(tmp_path / "b", 2, 4)
        damage(tmp_path / "b" / "checkpoint-4" / name)
        resumed(tmp_path / "b", "checkpoint-4")


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path):
    save_steps(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9")
    assert resumed(tmp_path) == 2


def test_when_every_checkpoint_is_damaged_nothing_starts_anew_by_itself(tmp_path):
    save_steps(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path / f"checkpoint-{step}" / "state.json")
    with pytest.raises(UserError, match="none of the 2 checkpoints is whole") as caught:
        resumed(tmp_path)
    assert caught.value.exit_code == 74 and "state.json" in str(caught.value)


def test_retention_of_one_keeps_the_verified_one_when_the_newest_is_spoiled(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, 2, keep=1)
    spoil = lambda at, step: flip(tmp_path / "checkpoint-4" / "state.json") if at == "point" else None  # noqa: E731
    monkeypatch.setattr(room, "reached", spoil)
    save_steps(tmp_path, 4, keep=1)
    assert "does not read back" in caplog.text
    assert resumed(tmp_path) == 2


def test_retention_counts_whole_checkpoints_only(tmp_path):
    save_steps(tmp_path, 2, 4, 6)
    flip(tmp_path / "checkpoint-6" / "state.json")
    save_steps(tmp_path, 8, keep=2)
    assert [p.name for p in CheckpointFolders(tmp_path).all()] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    save_steps(tmp_path, 10, keep=2)
    assert [p.name for p in CheckpointFolders(tmp_path).all()] == ["checkpoint-8", "checkpoint-10"]


def test_a_save_that_may_not_prune_leaves_older_checkpoints_to_the_next_one(tmp_path):
    points, part = make(tmp_path, keep=1)
    for step, prune, left in ((2, True, [2]), (4, False, [2, 4]), (6, True, [6])):
        part.step = step
        points.save(step, prune=prune)
        assert [step_of(p) for p in CheckpointFolders(tmp_path).all()] == left


def test_a_save_reads_its_own_files_back_once_and_those_of_older_checkpoints_never(tmp_path, monkeypatch):
    read, real = [], manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path) or real(path))
    save_steps(tmp_path, 2, 4, 6, 8, keep=3)
    assert len(read) == 4 * 3 * 2, "3 files, hashed when sealed and when read back"
    read.clear()
    assert resumed(tmp_path) == 8 and len(read) == 3


def test_pruning_deletes_only_folders_of_ours_and_follows_no_link(tmp_path):
    out, foreign = tmp_path / "out", tmp_path / "data"
    foreign.mkdir()
    (foreign / "image.png").write_bytes(b"precious")
    save_steps(out, 2)
    (out / "checkpoint-1").symlink_to(foreign)
    (out / "checkpoint-0").mkdir()
    (out / "checkpoint-0" / "notes.txt").write_text("mine")
    (out / "checkpoint-best").mkdir()
    save_steps(out, 4, keep=1)
    assert (foreign / "image.png").exists() and (out / "checkpoint-0" / "notes.txt").exists()
    assert (out / "checkpoint-best").exists() and not (out / "checkpoint-2").exists()


def test_a_failed_delete_is_a_warning_and_is_tried_again(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(PermissionError("busy")))
        save_steps(tmp_path, 4, keep=1)
    assert "tries again" in caplog.text and len(hidden(tmp_path)) == 1
    save_steps(tmp_path, 6, keep=1)
    assert hidden(tmp_path) == [] and resumed(tmp_path) == 6


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, code, nth):
    save_steps(tmp_path, 2)
    calls, real = [], files.atomic_write

    def failing(path, data):
        calls.append(path)
        if len(calls) == nth:
            path.with_name("half").write_bytes(data[:10])
            raise OSError(code, os.strerror(code), str(path))
        real(path, data)

    monkeypatch.setattr(files, "atomic_write", failing)
    monkeypatch.setattr(manifest, "write_json", files.write_json)
    with pytest.raises(UserError) as caught:
        save_steps(tmp_path, 4, keep=1)
    assert caught.value.exit_code == 74 and os.strerror(code) in str(caught.value)
    monkeypatch.undo()
    assert hidden(tmp_path) == [] and resumed(tmp_path) == 2


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    save_steps(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(UserError, match="no room"):
        save_steps(tmp_path, 4)
    assert hidden(tmp_path) == []


def test_a_real_full_disk_is_reported_by_name(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse the write itself (EFBIG)."""
    import resource

    save_steps(tmp_path, 2)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        points, part = make(tmp_path, size=100_000)
        part.step = 4
        try:
            points.save(4)
        except UserError as error:
            os._exit(error.exit_code)

    _, status = os.waitpid(forked(child), 0)
    assert os.waitstatus_to_exitcode(status) == 74
    assert hidden(tmp_path) == [] and resumed(tmp_path) == 2


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_steps(tmp_path / "out", 2)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_no_file_is_a_pickle(tmp_path):
    save_steps(tmp_path, 2)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        data = path.read_bytes()
        assert data[:2] != b"\x80\x02" and data[:2] != b"PK", path
        with pytest.raises((ValueError, UnicodeError)):
            list(pickletools.genops(data))


@pytest.mark.parametrize("change", [{"--rank": 8}, {"model": {"name": "tiny", "hash": "cd"}}, {"resolution": 512}])
def test_the_checkpoint_of_another_run_is_refused_field_by_field(tmp_path, change):
    save_steps(tmp_path, 2)
    with pytest.raises(UserError) as caught:
        resumed(tmp_path, **change)
    field = next(iter(change)) + (".hash" if "model" in change else "")
    assert caught.value.problems[0].why.startswith(f"{field}: checkpoint ") and caught.value.exit_code == 2
    assert (tmp_path / "checkpoint-2").exists(), "a refusal moves nothing"


def test_tuples_in_a_fingerprint_are_equal_after_json(tmp_path):
    points, _ = make(tmp_path, betas=(0.9, 0.99))
    points.save(1)
    assert make(tmp_path, betas=(0.9, 0.99))[0].resume("latest") == 1


def test_a_named_checkpoint_that_is_missing_is_an_error(tmp_path):
    save_steps(tmp_path, 2)
    for which in ("checkpoint-3", str(tmp_path / "elsewhere" / "checkpoint-3")):
        with pytest.raises(UserError, match="no such checkpoint") as caught:
            resumed(tmp_path, which)
        assert caught.value.exit_code == 2 and "checkpoint-2" in str(caught.value)


def test_a_path_that_leads_nowhere_is_not_taken_for_a_name(tmp_path, monkeypatch):
    save_steps(tmp_path, 2)
    monkeypatch.chdir(tmp_path.parent)
    for which in ("/no/such/place/checkpoint-2", "./checkpoint-2", "elsewhere/checkpoint-2"):
        with pytest.raises(UserError, match="no such checkpoint") as caught:
            resumed(tmp_path, which)
        assert caught.value.exit_code == 2 and caught.value.problems[0].where == str(Path(which))
    assert resumed(tmp_path, "checkpoint-2") == resumed(tmp_path, f"{tmp_path.name}/checkpoint-2") == 2


class Refusing(Part):
    """Finds out only when it is unpacked that the checkpoint is not for this run."""

    def unpack(self, tensors, data):
        raise UserError(Problem("trained with prodigy", "--optimizer", "", ""))


@pytest.mark.parametrize("which", ["checkpoint-2", "elsewhere"])
@pytest.mark.parametrize("parts", [{"optimizer": Refusing(), "adapters": Part()}, {"adapters": Part()}], ids=len)
def test_a_refused_resume_moves_nothing(tmp_path, which, parts):
    out = tmp_path / "out"
    save_steps(tmp_path, 9)
    save_steps(out, 2, 4, 6)
    points = Checkpoints(out, fingerprint=make(out)[0].fingerprint, **parts)
    with pytest.raises(UserError):
        points.resume(which if which != "elsewhere" else str(tmp_path / "checkpoint-9"))
    assert [p.name for p in CheckpointFolders(out).all()] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (out / "earlier").exists()


def test_latest_with_no_checkpoint_starts_at_zero_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert resumed(tmp_path) == 0
    assert caplog.text.count("no checkpoint in") == 1


def test_a_checkpoint_can_be_named_by_path_from_another_folder(tmp_path):
    save_steps(tmp_path / "a", 2)
    save_steps(tmp_path / "b", 7)
    assert resumed(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")) == 2
    assert CheckpointFolders(tmp_path / "b").all() == [], "steps of the other run are set aside"


def test_going_back_sets_the_newer_ones_aside_and_latest_follows(tmp_path, caplog):
    save_steps(tmp_path, 2, 4, 6)
    assert resumed(tmp_path, "checkpoint-2") == 2
    assert [p.name for p in CheckpointFolders(tmp_path).all()] == ["checkpoint-2"]
    assert sorted(p.name for p in tmp_path.glob("earlier/*/*")) == ["checkpoint-4", "checkpoint-6"]
    assert "checkpoint-4, checkpoint-6" in caplog.text


def test_a_fresh_start_does_not_mix_with_the_checkpoints_of_an_earlier_run(tmp_path):
    save_steps(tmp_path, 100)
    points, part = make(tmp_path, keep=1)
    assert points.resume(None) == 0
    part.step = 2
    points.save(2)
    assert resumed(tmp_path) == 2


def test_saving_one_step_twice_in_a_row_writes_once(tmp_path):
    points, _ = make(tmp_path)
    first = points.save(2)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert points.save(2) == first and (first / "manifest.json").stat().st_mtime_ns == before


def test_a_part_that_is_missing_from_a_checkpoint_is_refused(tmp_path):
    save_steps(tmp_path, 2)
    points = Checkpoints(tmp_path, fingerprint=make(tmp_path)[0].fingerprint, adapters=Part())
    with pytest.raises(UserError, match="other parts"):
        points.resume("latest")
