"""What distribution matching has logged, for the report: curves of each band, and means by band and noise level.

The keys are those of freq_loss.DistributionMatchingLoss.describe; docs/frequency.md says how to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from trainkit.report.charts import Chart, line_chart, number, smoothed
from trainkit.report.facts import RunFacts

PREFIX = "dist_match/"
MEASURES = {  # of each band: how a table heads and writes them
    "u": ("U", ".4f"), "z": ("z", ".2f"), "error": ("Error", ".4f"), "slope": ("Slope", ".3f"),
}
CURVES = {"u": 0.0, "slope": 1.0}  # drawn over the run, and the value where nothing is wrong
TWO_PASSES = ("extra", "combo")  # modes whose step has a second forward pass, with a loss of its own
NONE = "–"  # in place of a mean of no value

MetricsRow = dict[str, float]


@dataclass(frozen=True)
class BandTable:
    """A line a noise level, the noisiest first: mean SNR, number of steps, means of MEASURES."""

    name: str
    lines: tuple[tuple[str, ...], ...]


def loss_name(run: RunFacts) -> str:
    """What the logged loss of a step is of."""
    return "Loss of both passes" if run.matching_mode in TWO_PASSES else "Loss"


def loss_note(run: RunFacts) -> str:
    """What the logged loss holds that a plain run's does not."""
    if run.matching_mode in TWO_PASSES:
        return "The loss is the sum of a step's two forward passes, the matching term included."
    return "The matching term is part of it." if band_names(run) else ""


def band_names(run: RunFacts) -> list[str]:
    """The bands of a run, lowest first; none where nothing was matched."""
    start = f"{PREFIX}error_"
    return list(dict.fromkeys(key.removeprefix(start) for row in run.metrics for key in row if key.startswith(start)))


def shown(name: str) -> str:
    """low and high need a word more, band0 does not."""
    return name if name.startswith("band") else f"{name} band"


def band_charts(run: RunFacts) -> list[Chart]:
    """U and slope of each band over the run, each with the line it should come to."""
    return [chart for key in CURVES for name in band_names(run) for chart in band_chart(run, key, name)]


def band_chart(run: RunFacts, key: str, name: str) -> list[Chart]:
    """The chart of a measure of one band; none where it was never had, as U without a pair of images."""
    column = f"{PREFIX}{key}_{name}"
    points = [(row["step"], row[column]) for row in run.metrics if column in row]
    if not points:
        return []
    smooth = smoothed(points)
    return [line_chart(f"{MEASURES[key][0]}, {shown(name)}", smooth, raw=points, neutral=CURVES[key],
                       summary=f"{number(smooth[-1][1])} at the end")]


def band_tables(run: RunFacts) -> list[BandTable]:
    """Means of each band by noise level, a bin of log SNR, over the last half of the run."""
    late = [row for row in run.metrics if f"{PREFIX}bin" in row and row["step"] > run.step / 2]
    by_bin: dict[int, list[MetricsRow]] = {}
    for row in late:  # of samples at several levels the bin is a mean
        by_bin.setdefault(round(row[f"{PREFIX}bin"]), []).append(row)
    levels = [by_bin[place] for place in sorted(by_bin)]
    return [BandTable(shown(name), band_lines(levels, name)) for name in band_names(run) if levels]


def band_lines(levels: Sequence[Sequence[MetricsRow]], name: str) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (number(fmean(row[f"{PREFIX}snr"] for row in rows)), str(len(rows)),
         *(mean(rows, f"{PREFIX}{key}_{name}", form) for key, (_, form) in MEASURES.items())) for rows in levels)


def mean(rows: Sequence[MetricsRow], column: str, form: str) -> str:
    """The mean of a column, as written; NONE where no row has it."""
    values = [row[column] for row in rows if column in row]
    return format(fmean(values), form) if values else NONE
