"""Few rows of choices in which every two features, or every choice, meet."""

from __future__ import annotations

import itertools


def pairwise(features: dict[str, list[dict]]) -> list[tuple[int, ...]]:
    """Rows of choice indices that cover every pair of choices of every two features, greedily few."""
    sizes = [len(v) for v in features.values()]
    columns = list(itertools.combinations(range(len(sizes)), 2))
    missing = {(i, a, j, b) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row: list[int | None] = [None] * len(sizes)
        row[i], row[j] = a, b
        for k in [k for k in range(len(sizes)) if row[k] is None]:
            row[k] = max(range(sizes[k]), key=lambda c, k=k, row=row: _gain(row, k, c, missing))
        missing -= {(i, row[i], j, row[j]) for i, j in columns}
        rows.append(tuple(row))
    return rows


def _gain(row: list[int | None], k: int, choice: int, missing: set) -> int:
    """How many missing pairs are met by giving feature k this choice, beside the choices already made."""
    others = [(o, c) for o, c in enumerate(row) if c is not None]
    return sum(((o, c, k, choice) if o < k else (k, choice, o, c)) in missing for o, c in others)


def every_value_first(rows: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """-> (few rows in which each value of each feature is met, the others)."""
    unmet = {(k, value) for row in rows for k, value in enumerate(row)}
    first = []
    while unmet:
        best = max(rows, key=lambda row: len(unmet.intersection(enumerate(row))))
        unmet -= set(enumerate(best))
        first.append(best)
    return first, [row for row in rows if row not in first]
