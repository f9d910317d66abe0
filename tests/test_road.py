"""The road from a row of the data set to the loss stays as short as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLASSES, FUNCTIONS = 14, 40  # reached; before the road was rebuilt there were 26 and 70


@pytest.mark.trains
def test_no_class_and_no_function_joins_the_road_unseen():
    """In a process of its own: a trainer's main leaves accelerate's state behind."""
    command = [sys.executable, str(ROOT / "experiments/road.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    classes, functions = (part.split() for part in done.stdout.partition(" functions")[::2])
    classes, count = classes[:-1], int(classes[-1])
    assert {"trainkit.data.batch.Row", "trainkit.condition.Condition"} <= set(classes), "the watch saw nothing"
    assert "trainkit.losses.objective.Objective.__call__" in functions and len(functions) == count
    assert int(classes[0]) <= CLASSES, done.stdout
    assert count <= FUNCTIONS, done.stdout
