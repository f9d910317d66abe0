"""The road from a row of the data set to the loss stays as short as it is."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.trainers import forked_script

CLASSES, FUNCTIONS = 17, 53  # reached; before the road was rebuilt there were 26 and 70


@pytest.mark.trains
def test_no_class_and_no_function_joins_the_road_unseen(tmp_path):
    done = forked_script(["experiments/road.py", "--list"], cwd=ROOT, log=tmp_path / "log")
    assert done.code == 0, done.output
    classes, functions = (part.split() for part in done.output.partition(" functions")[::2])
    classes, count = classes[:-1], int(classes[-1])
    assert {"trainkit.data.batch.Row", "trainkit.condition.Condition"} <= set(classes), "the watch saw nothing"
    assert "trainkit.losses.objective.Objective.__call__" in functions and len(functions) == count
    assert int(classes[0]) <= CLASSES, done.output
    assert count <= FUNCTIONS, done.output
