"""A run that starts anew where an earlier run was: its files move to previous-N/, and no one else's do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainkit.checkpoints import Checkpoints
from trainkit.errors import UserError
from trainkit.runtime import checkpoint_folders
from trainkit.runtime.previous import make_way
from trainkit.runtime.weight_files import DIFFUSERS_FILE, KOHYA_FILE

RUN = ["run.json", "metrics.jsonl", "latest.json", "README.md", "report.html", DIFFUSERS_FILE, KOHYA_FILE,
       "dog.safetensors", "dog_emb.safetensors", "dog-step00000500.safetensors", "dog-step00000500_emb.safetensors",
       "checkpoint-500/manifest.json", "samples/step_000500.png", "earlier/20260101-1/checkpoint-7/manifest.json",
       "logs/dreambooth/events.out.tfevents.1"]
USERS = ["notes.txt", "features.safetensors", "images/p01_s0.png", "hotdog.safetensors", "wandb/run-1/a.wandb",
         "checkpoint-best/a.bin", "previous-x/a", ".run.lock", "dog.toml"]


class Part:
    def pack(self):
        return {}, {}

    def unpack(self, tensors, data):
        pass


def fill(out: Path, *names: str, status: str = "done") -> Path:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"status": status, "name": "dog", "step": 500})
        (out / name).write_text(record if name == "run.json" else name)
    return out


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_a_runs_own_files_move_and_no_others(tmp_path, caplog):
    out = fill(tmp_path / "dog", *RUN, *USERS)
    assert make_way(out) == out / "previous-1"
    assert tree(out / "previous-1") == set(RUN)
    assert tree(out) - {f"previous-1/{name}" for name in RUN} == set(USERS)
    assert (out / "previous-1" / "dog.safetensors").read_text() == "dog.safetensors"
    assert str(out / "previous-1") in caplog.text and "step 500: done" in caplog.text


def test_a_third_run_leaves_the_first_where_it_is(tmp_path):
    out = tmp_path / "dog"
    for number in (1, 2, 3):
        fill(out, "run.json", "dog.safetensors")
        assert make_way(out) == out / f"previous-{number}"
    (out / "previous-1" / "dog.safetensors").unlink()
    fill(out, "dog.safetensors")
    assert make_way(out) == out / "previous-4"


@pytest.mark.parametrize("names", [[], ["run.json"], ["run.json", "README.md"], ["README.md", *USERS], ["latest.json"]])
def test_without_a_result_of_an_earlier_run_nothing_moves(tmp_path, names):
    out = fill(tmp_path / "dog", *names)
    out.mkdir(exist_ok=True)
    assert make_way(out) is None and tree(out) == set(names)


@pytest.mark.parametrize("result", [name for name in RUN if name not in ("run.json", "latest.json", "README.md")
                                    and not name.startswith("logs")])
def test_each_result_alone_is_worth_keeping(tmp_path, result):
    """A LoRA that was downloaded into the folder, with its card, too."""
    out = fill(tmp_path / "dog", result, "README.md")
    assert make_way(out) and tree(out / "previous-1") == {result, "README.md"}


def test_what_this_run_has_written_already_stays(tmp_path):
    """Its run.json, where the earlier run left none, and its trackers' logs: those that are younger than its lock."""
    out = fill(tmp_path / "dog", "dog.safetensors", "logs/a/events.1", ".run.owner.json")
    fill(out, "run.json", "logs/a/events.2", status="running")
    os.utime(out / "logs/a/events.1", ns=(0, 0))
    make_way(out)
    assert tree(out / "previous-1") == {"dog.safetensors", "logs/a/events.1"}
    assert tree(out) >= {"run.json", "logs/a/events.2", ".run.owner.json"}


def test_a_folder_that_was_renamed_still_gives_up_its_files(tmp_path):
    there = fill(tmp_path / "dog", "run.json", "dog.safetensors", "dog-step00000500.safetensors")
    out = there.rename(tmp_path / "wolf")
    make_way(out)
    assert tree(out / "previous-1") == {"run.json", "dog.safetensors", "dog-step00000500.safetensors"}


def test_links_move_as_links(tmp_path):
    out = fill(tmp_path / "dog", "run.json")
    target = fill(tmp_path / "webui", "lora.safetensors") / "lora.safetensors"
    (out / "dog.safetensors").symlink_to(target)
    (out / DIFFUSERS_FILE).symlink_to(tmp_path / "nowhere")
    make_way(out)
    assert (out / "previous-1" / "dog.safetensors").is_symlink() and target.exists()
    assert (out / "previous-1" / DIFFUSERS_FILE).is_symlink()


@pytest.mark.parametrize("junk", ["", "[]", "{", '{"name": 7, "step": "x", "status": []}', '{"options": 3}'])
def test_a_record_that_cannot_be_read_hinders_nothing(tmp_path, junk):
    out = fill(tmp_path / "dog", "dog.safetensors")
    (out / "run.json").write_text(junk)
    make_way(out)
    assert tree(out / "previous-1") == {"run.json", "dog.safetensors"}


def checkpoints(out: Path) -> Checkpoints:
    return Checkpoints(out, fingerprint={}, part=Part())


def test_going_on_moves_nothing_and_starting_anew_does(tmp_path):
    out = fill(tmp_path / "dog", "run.json", "dog.safetensors")
    checkpoints(out).save(3)
    assert checkpoints(out).resume("latest") == 3 and not (out / "previous-1").exists()
    assert checkpoints(out).resume(None) == 0
    assert tree(out / "previous-1") >= {"run.json", "dog.safetensors", "checkpoint-3/manifest.json", "latest.json"}
    assert tree(out) == {f"previous-1/{name}" for name in tree(out / "previous-1")}


def test_going_on_from_another_folder_is_a_new_run_here(tmp_path):
    out = fill(tmp_path / "dog", "run.json", "dog.safetensors")
    checkpoints(tmp_path / "other").save(3)
    assert checkpoints(out).resume(str(tmp_path / "other" / "checkpoint-3")) == 3
    assert tree(out / "previous-1") == {"run.json", "dog.safetensors"}
    assert (tmp_path / "other" / "checkpoint-3").is_dir()


# ----------------------------------------------------------------------------------------------------------------------
# What is given to --resume_from_checkpoint


def asked(out: Path, which: str | Path) -> str:
    """The whole message."""
    [problem] = checkpoint_folders.problems(out, str(which))
    assert problem.kind == "usage"
    with pytest.raises(UserError) as caught:
        checkpoints(out).resume(str(which))
    assert str(caught.value) == str(problem), "told before a weight is loaded as well"
    return str(problem)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    out = tmp_path / "dog"
    for step in (2, 10):
        checkpoints(out).save(step)
    return fill(out, DIFFUSERS_FILE, "dog.safetensors", "checkpoint-2/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", [DIFFUSERS_FILE, "dog.safetensors", "run.json", "model.ckpt", "lora.PT"])
def test_a_file_is_no_checkpoint_and_the_newest_beside_it_is_named(run, name):
    fill(run, name)
    message = asked(run.parent / "elsewhere", run / name)
    assert "checkpoint folder" in message and f"--resume_from_checkpoint {run / 'checkpoint-10'}" in message
    assert ("file of weights" in message) == (name != "run.json")


def test_a_lora_in_a_checkpoint_names_that_checkpoint(run):
    message = asked(run.parent / "elsewhere", run / "checkpoint-2" / DIFFUSERS_FILE)
    assert f"next:  --resume_from_checkpoint {run / 'checkpoint-2'}" in message


def test_a_lora_from_elsewhere_leaves_starting_anew(run, tmp_path, monkeypatch):
    message = asked(tmp_path / "new", fill(tmp_path / "downloads", "style.safetensors") / "style.safetensors")
    assert "weights only" in message and "starts anew" in message
    monkeypatch.chdir(tmp_path / "downloads")
    assert "weights only" in asked(run, "style.safetensors"), "a bare name that is a file here"
    assert "weights only" in asked(run, DIFFUSERS_FILE), "or in the run's folder"


def test_a_runs_folder_is_no_checkpoint(run, tmp_path):
    assert f"--resume_from_checkpoint {run / 'checkpoint-10'}" in asked(tmp_path / "new", run)


def test_a_checkpoint_of_another_trainer_is_told_as_one(run, tmp_path):
    fill(tmp_path / "theirs" / "checkpoint-500", "optimizer.bin", "random_states_0.pkl", DIFFUSERS_FILE)
    assert "another trainer" in asked(tmp_path / "new", tmp_path / "theirs" / "checkpoint-500")


def test_where_there_is_no_checkpoint_none_is_to_be_named(tmp_path):
    message = asked(tmp_path / "new", "checkpoint-5")
    assert "checkpoints in" in message and ": none" in message and "starts anew" in message


def test_a_run_and_its_step_name_a_checkpoint(run, tmp_path):
    assert checkpoints(tmp_path / "new").resume(f"{run}@2") == 2
    assert "no such checkpoint" in asked(tmp_path / "new", f"{run}@3")
