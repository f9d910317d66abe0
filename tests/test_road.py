"""The road from a row of the data set to the loss stays as short as it is."""

import pytest

from experiments.road import walk

CLASSES, FUNCTIONS = 14, 40  # reached; before the road was rebuilt there were 26 and 70


@pytest.mark.trains
def test_no_class_and_no_function_joins_the_road_unseen():
    road = walk()
    assert {"trainkit.data.batch.Row", "trainkit.condition.Condition"} <= road.classes, "the watch saw nothing"
    assert "trainkit.losses.objective.Objective.__call__" in road.functions
    assert len(road.classes) <= CLASSES, sorted(road.classes)
    assert len(road.functions) <= FUNCTIONS, sorted(road.functions)
