"""The figures of run.py: spectra against the real icons', and the same images generated with each run's LoRA."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from experiments.charts import DODGE, HEIGHT, MARGIN, WIDTH, Axes, Panel, Pen, Points, curve, frame
from experiments.learning.cases import PRESETS
from experiments.learning.exam import BASE_ROW, REAL_ROW, ROW, SIDE
from experiments.learning.results import Result, Results
from experiments.seeds import standard_error
from trainkit.sheets import sheet

LINES = {  # what is shown, and its colour: told apart by the colour-blind
    "base": "#9aa1ac", "real icons through the VAE": "#56b4e9", "lora": "#16181d",
    **dict(zip((f"fourier_{name}" for name in PRESETS), ("#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7"),
               strict=True)),
}
HEAD, LEGEND = 118, 4  # pixels above the panels; names in a row of the legend
TOGETHER = 4  # rings that a point on the right stands for, and between two labels on the left


def label(case: str) -> str:
    """What the figures of the Fourier loss call a case: its loss."""
    return "l2" if case == "lora" else case.removeprefix("fourier_").replace("_", " ")


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def spectra(results: Results, references: Mapping[str, Mapping], *, title: str) -> Image.Image:
    """Left: power against the real icons', ring by ring. Right: what the Fourier loss changes of l2's."""
    shown = {case: measured(results[case]) for case in LINES if case in results}
    shown = {case: found for case, found in shown.items() if found}
    fixed = {name: [(decibels(r), 0.0) for r in references[name]["ratios"]] for name in LINES if name in references}
    whole = Panel("power, dB: 0 is that of the real icons", fixed | {c: curve_of(f) for c, f in shown.items()}, 0)
    changed = {case: change_of(found, shown["lora"]) for case, found in shown.items() if case != "lora"}
    pen = Pen(2 * MARGIN + 2 * WIDTH, HEAD + MARGIN + HEIGHT)
    pen.text((MARGIN, 30), title, size=20)
    legend(pen, [*fixed, *shown])
    draw_rings(pen, whole, x=MARGIN)
    if changed:
        draw_changes(pen, Panel("change from l2 of the same seed, dB", changed, 0), x=MARGIN + WIDTH)
    return pen.page()


def measured(results: Sequence[Result]) -> list[list[float]]:
    return [result.ratios for result in results if result.ratios]


def curve_of(found: Sequence[Sequence[float]]) -> Points:
    """Mean over seeds, in decibels."""
    return [(statistics.mean(map(decibels, ring)), 0.0) for ring in zip(*found, strict=True)]


def change_of(found: Sequence[Sequence[float]], control: Sequence[Sequence[float]]) -> Points:
    """Mean over TOGETHER rings, then mean and standard error over seeds, in decibels."""
    pairs = zip(found, control, strict=False)
    seeds = [[decibels(one / other) for one, other in zip(*pair, strict=True)] for pair in pairs]
    coarse = [[statistics.mean(rings[k : k + TOGETHER]) for k in range(0, len(rings), TOGETHER)] for rings in seeds]
    return [(statistics.mean(values), standard_error(values) if len(values) > 1 else 0.0)
            for values in zip(*coarse, strict=True)]


def legend(pen: Pen, names: Sequence[str]) -> None:
    wide = 2 * WIDTH / LEGEND
    for i, name in enumerate(names):
        x, y = MARGIN + i % LEGEND * wide, 64 + i // LEGEND * 26
        pen.line([(x, y), (x + 26, y)], LINES[name], 3)
        pen.text((x + 34, y), label(name))


def draw_rings(pen: Pen, panel: Panel, *, x: float) -> None:
    """A line through every ring, the upper half shaded."""
    rings, ticks = len(next(iter(panel.lines.values()))), panel.ticks
    axes = Axes(x, HEAD, rings, ticks[0], ticks[-1])
    places = [str(ring) if ring % TOGETHER == 0 else "" for ring in range(1, rings + 1)]
    frame(pen, axes, panel, places=places, shaded=(rings // 2, rings - 1), below="cycles per image")
    for name, points in panel.lines.items():
        pen.line([axes.at(ring, mean) for ring, (mean, _) in enumerate(points)], LINES[name], 2)


def draw_changes(pen: Pen, panel: Panel, *, x: float) -> None:
    """A dot with a whisker for every TOGETHER rings, the upper half shaded."""
    count, ticks = len(next(iter(panel.lines.values()))), panel.ticks
    axes = Axes(x, HEAD, count, ticks[0], ticks[-1])
    places = [f"{TOGETHER * k + 1}-{TOGETHER * (k + 1)}" for k in range(count)]
    frame(pen, axes, panel, places=places, shaded=(count // 2, count - 1), below="cycles per image")
    for i, (name, points) in enumerate(panel.lines.items()):
        curve(pen, axes, points, LINES[name], shift=DODGE * (i - (len(panel.lines) - 1) / 2))


def kept_rows(out: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """The images that runs of seed 0 left of untaught nouns, by what their cases are called in `names`."""
    rows = {name: out / f"{case}-seed0" / ROW for case, name in names.items()}
    return {name: path for name, path in rows.items() if path.is_file()}


def images(out: Path, rows: Mapping[str, Path], *, nouns: Sequence[str], title: str) -> Image.Image:
    """The rows of `kept_rows`, between that of the base and that of real icons."""
    kept = {"base": out / BASE_ROW, **rows, "real": out / REAL_ROW}
    return sheet([cut(path) for path in kept.values()], columns=nouns, names=[*kept], title=title)


def cut(path: Path) -> list[Image.Image]:
    """A row of images as `exam.row_of` puts them together."""
    with Image.open(path) as page:
        row = page.convert("RGB")
    return [row.crop((left, 0, left + SIDE, SIDE)) for left in range(0, row.width, SIDE)]
