"""The figure of run.py: changes of error and U, and slopes, by timestep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from PIL import Image

from experiments.charts import Panel, figure
from experiments.frequency.arms import ARMS, SHOWN
from experiments.frequency.results import BANDS, TIMESTEPS, WINDOW, Result, Results, change
from experiments.seeds import standard_error


def image(results: Results, steps: int) -> Image.Image:
    """Changes of error and U, and the slopes, by timestep: low band above, high band below."""
    shown = {name: results[name] for name in SHOWN if name in results}
    labels = {name: ARMS[name].says.replace("λ", "lambda") for name in shown}  # the font has no Greek
    return figure([panels(shown, band) for band in BANDS], places=[str(t) for t in TIMESTEPS], labels=labels,
                  below="timestep, the term's window shaded",
                  shaded=(TIMESTEPS.index(WINDOW[0]), TIMESTEPS.index(WINDOW[-1])),
                  title=f"Held-out icons after {steps} steps, against no term; mean and standard error of "
                        f"{len(results['base'])} seeds")


def panels(shown: Results, band: str) -> list[Panel]:
    """One band's row of the figure."""
    changed = {column: {name: [point(change(at(found, column, t), at(shown["base"], column, t))) for t in TIMESTEPS]
                        for name, found in shown.items() if name != "base"}
               for column in (f"error_{band}", f"u_{band}")}
    slopes = {name: [point(at(found, f"slope_{band}", t)) for t in TIMESTEPS] for name, found in shown.items()}
    return [Panel(f"{band} band: error of x0, change in %", changed[f"error_{band}"], 0),
            Panel(f"{band} band: U, change in %", changed[f"u_{band}"], 0),
            Panel(f"{band} band: slope", slopes, 1)]


def at(results: Sequence[Result], column: str, timestep: int) -> list[float]:
    return [result.mean(column, [timestep]) for result in results]


def point(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, 0 where there is none."""
    error = standard_error(values)
    return statistics.mean(values), 0.0 if error != error else error
