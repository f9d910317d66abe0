"""What a run came to, and the tables of several."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.frequency.arms import ARMS, CONTRASTS, SHOWN
from experiments.seeds import half_width, standard_error

TIMESTEPS, DRAWS = (100, 250, 400, 550, 750), 2
WINDOW = tuple(t for t in TIMESTEPS if 200 <= t < 600)
BANDS, KINDS = ("low", "high"), ("error", "u", "z", "slope")
METRICS = {  # heading -> column of a bin, timesteps it is averaged over
    "error": ("error", TIMESTEPS), "error, window": ("error", WINDOW),
    "U low": ("u_low", WINDOW), "U high": ("u_high", WINDOW),
}

Bin = dict[str, float]  # timestep, error of the network's output and, for x0, each of KINDS in each of BANDS


@dataclass(frozen=True)
class Result:
    """What one run came to, and what it was asked for: tables never mix runs of other arguments."""

    asked: dict[str, object]
    bins: list[Bin]
    seconds: float  # a step, median
    telemetry: dict[str, float]  # means of what the term logged
    style_distance: float | None = None

    def mean(self, column: str, timesteps: Sequence[int]) -> float:
        return statistics.mean(row[column] for row in self.bins if row["timestep"] in timesteps)


Results = dict[str, list[Result]]  # by arm, one a seed


def read(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text("utf-8")))


def summary(result: Result) -> str:
    """A finished run in a line."""
    return "  ".join([*(f"{heading} {result.mean(*where):.4g}" for heading, where in METRICS.items()),
                      f"{result.seconds:.3f} s a step"])


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def change(values: Sequence[float], control: Sequence[float]) -> list[float]:
    """Differences of each seed, in percent of the control's mean (a single U may be near 0, or below)."""
    whole = statistics.mean(control)
    return [100 * (v - c) / abs(whole) for v, c in zip(values, control, strict=True)]


def metric(results: Sequence[Result], heading: str) -> list[float]:
    """One number a seed."""
    return [result.mean(*METRICS[heading]) for result in results]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, in percent."""
    error = standard_error(values)
    return f"{statistics.mean(values):+.2f}" + ("" if error != error else f" ± {error:.2f}")


def main_table(results: Results, control: str) -> Iterator[str]:
    """The control in numbers, then what every arm changes of it, paired by seed."""
    base = results[control]
    yield f"| | images per step | seconds per step | {' | '.join(METRICS)} | style distance |"
    yield "|---|---|---|" + "---|" * (len(METRICS) + 1)
    for name, found in results.items():
        if name == control:
            cells = [f"{statistics.mean(metric(base, heading)):.4g}" for heading in METRICS]
        else:
            cells = [f"{spread(change(metric(found, h), metric(base, h)))} %" for h in METRICS]
        seconds = statistics.median(result.seconds for result in found)
        distances = [r.style_distance for r in found if r.style_distance is not None]
        style = f"{statistics.mean(distances):.4f}" if distances else ""
        arm = ARMS.get(name)
        yield (f"| {name}{f': {arm.says}' if arm else ''} | {arm.images if arm else ''} | {seconds:.3f} | "
               f"{' | '.join(cells)} | {style} |")


def contrast_table(results: Results) -> Iterator[str]:
    """Arm against control, paired by seed, with 95 % intervals (Student's t); bold where 0 is outside."""
    yield f"| question | arm | against | {' | '.join(METRICS)} |"
    yield "|---|---|---|" + "---|" * len(METRICS)
    for question, arm, control in CONTRASTS:
        if {arm, control} <= results.keys():
            cells = [interval(change(metric(results[arm], h), metric(results[control], h))) for h in METRICS]
            yield f"| {question} | {arm} | {control} | {' | '.join(cells)} |"


def interval(values: Sequence[float]) -> str:
    """Mean in percent and its 95 % interval over seeds."""
    mean, half = statistics.mean(values), half_width(values)
    if half is None:
        return f"{mean:+.2f} %"
    text = f"{mean:+.2f} % [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def bin_table(results: Results, untrained: Sequence[Bin]) -> Iterator[str]:
    """Slope and z of the bands by timestep, means over seeds."""
    shown = {name: results[name] for name in SHOWN if name in results}
    yield f"| timestep | band | untrained | {' | '.join(shown)} |"
    yield "|---|---|---|" + "---|" * len(shown)
    for row in untrained:
        for band in BANDS:
            columns = f"slope_{band}", f"z_{band}"
            cells = ["{:.3f}, {:.1f}".format(*(row[c] for c in columns))]
            cells += ["{:.3f}, {:.1f}".format(*(statistics.mean(r.mean(c, [row["timestep"]]) for r in found)
                                                for c in columns)) for found in shown.values()]
            yield f"| {row['timestep']:.0f} | {band} | {' | '.join(cells)} |"


def telemetry_table(results: Results) -> Iterator[str]:
    """What the term logged, means over steps and seeds."""
    names = sorted({name for found in results.values() for r in found for name in r.telemetry})
    yield f"| | {' | '.join(name.partition('/')[2] for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for arm, found in results.items():
        logged = [[r.telemetry[name] for r in found if name in r.telemetry] for name in names]
        if any(logged):
            cells = [f"{statistics.mean(values):.3g}" if values else "" for values in logged]
            yield f"| {arm} | {' | '.join(cells)} |"


def chosen(results: Results) -> str:
    """The gain of the pilot: of those whose error in the window is not above the control's, the one with the least U.

    U is the mean over bands of U over the control's; if every error is above, the smallest gain.
    """
    def left(name: str) -> float:
        ratios = [metric(results[name], h)[0] / metric(results["more-data"], h)[0] for h in ("U low", "U high")]
        return statistics.mean(ratios)

    allowed = metric(results["more-data"], "error, window")[0]
    gains = [name for name in results if name != "more-data"]
    harmless = [name for name in gains if metric(results[name], "error, window")[0] <= allowed]
    return min(harmless, key=left) if harmless else gains[0]


def pages(results: Results, untrained: Sequence[Bin], *, pilot: bool) -> Iterator[str]:
    """All tables that the arms at hand allow."""
    control = "more-data" if pilot else "base"
    if control in results:
        yield f"\n### Change against {control}, same seed: mean ± standard error over seeds\n"
        yield from main_table(results, control)
    if pilot:
        yield f"\nchosen: {chosen(results)}"
        return
    yield "\n### Arm against control\n"
    yield from contrast_table(results)
    yield "\n### Slope γ and z by timestep\n"
    yield from bin_table(results, untrained)
    yield "\n### Logged in training\n"
    yield from telemetry_table(results)
