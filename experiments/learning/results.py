"""What a run came to, and the tables of several."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.learning.cases import COMPARISONS, Comparison
from experiments.seeds import half_width

STEPS, DENOISING_STEPS, GUIDANCE = 300, 10, 4.0  # defaults of the arguments


@dataclass(frozen=True)
class Result:
    """What one run came to, and what it was asked for. A file may lack any with a default: it was not measured then.

    ratios  power of the generated images over that of the real icons, ring by ring of evaluation.power_spectrum
    high    the same for all that lies above half of Nyquist's frequency
    spectrum  root of the mean over rings of ln²(ratio): too little and too much both count
    …_vae   the same beside the real icons as the VAE passes them: all that a LoRA could come to
    state_bytes  of the optimizer's state in the last checkpoint, a trained number
    """

    gap_closed: float
    prior_drift: float
    seconds: float  # of training, start-up included
    steps: int = STEPS
    denoising_steps: int = DENOISING_STEPS
    guidance_scale: float = GUIDANCE
    flags: str | None = None  # of the case
    style_distance: float | None = None
    high: float | None = None
    spectrum: float | None = None
    high_vae: float | None = None
    spectrum_vae: float | None = None
    ratios: list[float] | None = None
    step_seconds: float | None = None  # median
    state_bytes: float | None = None


Results = Mapping[str, Sequence[Result]]  # by case, one a seed


def read(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text("utf-8")))


def summary(result: Result) -> str:
    """A finished run in a line."""
    found = ((column.heading, column.of(result), column.form) for column in COLUMNS.values())
    return "  ".join(f"{heading} {value:{form}}" for heading, value, form in found if value is not None)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Column:
    heading: str
    form: str
    of: Callable[[Result], float | None]
    every_seed: bool = True  # shown behind the mean; else the median alone


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


COLUMNS = {
    "style": Column("style distance", ".4f", lambda r: r.style_distance),
    "closed": Column("gap closed, %", ".0f", lambda r: 100 * r.gap_closed),
    "high": Column("high, % of real", ".1f", lambda r: percent(r.high)),
    "high_vae": Column("high, % of real through the VAE", ".0f", lambda r: percent(r.high_vae)),
    "spectrum": Column("spectrum", ".3f", lambda r: r.spectrum),
    "spectrum_vae": Column("spectrum, real through the VAE", ".3f", lambda r: r.spectrum_vae),
    "drift": Column("prior drift", ".3f", lambda r: r.prior_drift),
    "bytes": Column("state, bytes per number", ".2f", lambda r: r.state_bytes, every_seed=False),
    "step": Column("seconds per step", ".3f", lambda r: r.step_seconds, every_seed=False),
    "seconds": Column("seconds per run", ".0f", lambda r: r.seconds, every_seed=False),
}


def tables(results: Results, references: Mapping[str, Mapping] | None = None) -> Iterator[str]:
    """The tables of docs/learning.md, for the comparisons of which the first case and another were run.

    references  of `Exam.references`, for the spectra
    """
    for comparison in COMPARISONS:
        if at_hand(comparison, results):
            yield f"\n### {comparison.title}\n"
            yield from table(comparison, results)
            if comparison.changes:
                yield "\nChange from the first row, same seed: mean, [95 % interval over seeds]\n"
                yield from changes(comparison, results)
    if references:
        yield "\n### Spectra of other images\n"
        yield ("| images | style distance | high, % of real | high, % of real through the VAE | spectrum | "
               "spectrum, real through the VAE |\n|---|---|---|---|---|---|")
        for name, r in references.items():
            yield (f"| {name} | {r['style_distance']:.4f} | {100 * r['high']:.1f} | {100 * r['high_vae']:.0f} | "
                   f"{r['spectrum']:.3f} | {r['spectrum_vae']:.3f} |")


def at_hand(comparison: Comparison, results: Results) -> bool:
    first, *others = comparison.cases
    return first in results and any(case in results for case in others)


def table(comparison: Comparison, results: Results) -> Iterator[str]:
    columns = [COLUMNS[name] for name in comparison.columns]
    yield f"| case | {' | '.join(column.heading for column in columns)} |\n|---|" + "---|" * len(columns)
    for case in (case for case in comparison.cases if case in results):
        yield f"| {case} | {' | '.join(cell(column, results[case]) for column in columns)} |"


def cell(column: Column, results: Sequence[Result]) -> str:
    """Mean and every seed's value, or the median; empty where a file does not say."""
    values = [value for value in map(column.of, results) if value is not None]
    if not values:
        return ""
    return spread(values, column.form) if column.every_seed else format(statistics.median(values), column.form)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and every seed's value."""
    return f"**{statistics.mean(values):{form}}** ({', '.join(format(v, form) for v in values)})"


def changes(comparison: Comparison, results: Results) -> Iterator[str]:
    columns = [COLUMNS[name] for name in comparison.changes]
    first, *others = comparison.cases
    yield f"| case | {' | '.join(column.heading for column in columns)} |\n|---|" + "---|" * len(columns)
    for case in (case for case in others if case in results):
        pairs = list(zip(results[case], results[first], strict=False))  # a case may have fewer seeds
        found = [differences(column, pairs) for column in columns]
        yield f"| {case} | {' | '.join(interval(v, c.form) for c, v in zip(columns, found, strict=True))} |"


def differences(column: Column, pairs: Sequence[tuple[Result, Result]]) -> list[float]:
    values = [(column.of(one), column.of(other)) for one, other in pairs]
    return [one - other for one, other in values if one is not None and other is not None]


def interval(values: Sequence[float], form: str) -> str:
    """Mean and its 95 % interval over seeds (Student's t), bold where 0 is outside; one value as it is."""
    if not values:
        return ""
    mean, half, signed = statistics.mean(values), half_width(values), f"+{form}"
    if half is None:
        return f"{mean:{signed}}"
    text = f"{mean:{signed}} [{mean - half:{signed}}, {mean + half:{signed}}]"
    return f"**{text}**" if abs(mean) > half else text
