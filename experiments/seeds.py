"""Results of several seeds: files that are whole or not there, standard errors, 95 % intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds


def save(path: Path, data: object) -> None:
    """Whole or not there: a run that is killed here is measured again."""
    from trainkit.files import write_json

    write_json(path, data)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def half_width(values: Sequence[float]) -> float | None:
    quantile = T_95.get(len(values))
    return None if quantile is None else quantile * standard_error(values)
