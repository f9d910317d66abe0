"""What train_freq_aware.sh makes of its variables: the trainer's command line, without training."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.files import edit_json
from tests.support.trainers import Done, launched

LADYBUG = "3d icon in the style of TOK, a ladybug"
FAKES = {
    "scripts/install.sh": "",
    ".venv/bin/python": f'case "$1" in -c) PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@" ;; '
                        'train_*) printf "%s\\n" "$@" > command ;; esac',
}
Recipe = Callable[..., tuple[Done, dict[str, str]]]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Runs the script in a folder where nothing is installed or trained -> how it ended, flags of the trainer."""
    shutil.copy(ROOT / "train_freq_aware.sh", tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for name, body in FAKES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", "utf-8")
        (tmp_path / name).chmod(0o755)

    def run(*more: str, **variables: str) -> tuple[Done, dict[str, str]]:
        done = launched(["bash", str(tmp_path / "train_freq_aware.sh"), *more], env=variables)
        file = tmp_path / "command"
        words = file.read_text("utf-8").splitlines() if file.exists() else []
        return done, dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)

    return run


@pytest.mark.parametrize("variables, prompt", [
    ({}, LADYBUG), ({"DATA": "mine"}, None), ({"PROMPT": "a fox"}, "a fox"),
    ({"DATA": "mine", "PROMPT": "a fox's $5, \"red\"  *"}, "a fox's $5, \"red\"  *"),
])
def test_previews_are_of_the_shipped_icons_or_of_the_users_prompt(recipe, variables, prompt):
    done, flags = recipe(RESOLUTION="48", **variables)
    assert done.code == 0, done.output
    assert flags.get("validation_prompt") == prompt and flags["resolution"] == "48"
    assert flags["train_data_dir"] == variables.get("DATA", "assets/icons-3d")


@pytest.mark.trains  # imports torch
def test_the_resolution_is_the_models_own_unless_given(recipe, tiny_sdxl, tmp_path):
    other = Path(shutil.copytree(tiny_sdxl, tmp_path / "another model"))
    edit_json(other / "unet/config.json", sample_size=24)
    assert recipe(MODEL=str(other))[1]["resolution"] == "96"


@pytest.mark.trains  # imports torch
def test_a_model_that_is_not_there_is_one_clear_message(recipe):
    done, flags = recipe(MODEL="/nowhere")
    assert done.code == 2 and "the model folder does not exist" in done.output and not flags
    assert "Traceback" not in done.output


def test_flags_after_it_come_last(recipe):
    assert recipe("--dist_match_mode=swap", RESOLUTION="48")[1]["dist_match_mode"] == "swap"
