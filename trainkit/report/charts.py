"""Line charts as inline SVG: no library, no request, readable in light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = list[tuple[float, float]]  # (step, value), steps rising

MAX_POINTS = 400  # a chart's lines are thinned to this many
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24  # pixels around the plot


@dataclass(frozen=True)
class Chart:
    title: str
    summary: str  # shown beside the title while nothing is pointed at
    explanation: str
    svg: Markup
    points_json: str  # [[x, y, text], ...] in the svg's units, for the value under the pointer


@dataclass(frozen=True)
class Frame:
    """Maps data to pixels."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.x_range
        return LEFT + (step - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        inside = (min(max(value, low), high) - low) / (high - low)
        return self.height - BOTTOM - inside * (self.height - TOP - BOTTOM)

    def line(self, points: Points, name: str) -> str:
        where = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{name}" points="{where}"/>'


def line_chart(title: str, points: Points, *, raw: Points | None = None, neutral: float | None = None,
               summary: str = "", explanation: str = "", wide: bool = False) -> Chart:
    """`points` as a strong line, `raw` as a faint one behind it; raw spikes above the 98th percentile are cut off.

    neutral  a value to tell the line from: always in sight, 2 % around it too, with a line of its own
    """
    points, raw = thinned(points), thinned(raw or [])
    level = [] if neutral is None else [neutral]
    high = max([y for _, y in points] + [percentile([y for _, y in raw], 0.98)] + [1.02 * value for value in level])
    low = min([y for _, y in points] + [percentile([y for _, y in raw], 0.02)] + [0.98 * value for value in level])
    ticks = nice_ticks(*((low, high) if high - low > 0.02 * abs(high) else sorted((0, high * 1.25 or 1))))
    x_range = (points[0][0], max(points[-1][0], points[0][0] + 1))
    frame = Frame(1040 if wide else 500, 270 if wide else 210, x_range, (ticks[0], ticks[-1]))
    rules = [frame.line([(x, value) for x in x_range], "neutral") for value in level]
    parts = [*grid(frame, ticks), *rules, frame.line(raw, "raw"), frame.line(points, "main"), marker(frame)]
    near = [[round(frame.x(x), 1), round(frame.y(y), 1), f"step {x:.0f}: {number(y)}"] for x, y in points]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        frame.width, frame.height, title, Markup("".join(parts)))
    return Chart(title, summary, explanation, svg, json.dumps(near))


def grid(frame: Frame, ticks: Sequence[float]) -> list[str]:
    """Horizontal lines with their values; first, middle and last step below."""
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for k, (tick, label) in enumerate(zip(ticks, labels(ticks), strict=True)):
        y = frame.y(tick)
        parts.append(f'<line class="{"grid" if k else "axis"}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    first, last = frame.x_range
    for step, anchor in ((first, "start"), ((first + last) / 2, "middle"), (last, "end")):
        x = frame.x(step)
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="{anchor}">{step:,.0f}</text>')
    return parts


def marker(frame: Frame) -> str:
    floor = frame.height - BOTTOM
    return f'<line class="hair" x1="0" x2="0" y1="{TOP}" y2="{floor}"/><circle class="dot" r="4.5" cx="0" cy="0"/>'


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    assert high > low, (low, high)
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points: means of equal stretches, the first and the last as they are."""
    if len(points) <= MAX_POINTS:
        return points
    inner, buckets = points[1:-1], MAX_POINTS - 2
    cuts = [round(k * len(inner) / buckets) for k in range(buckets + 1)]
    groups = [inner[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


def memory(points: int) -> int:
    """Over how many points `smoothed` averages."""
    return max(10, points // 20)


def smoothed(points: Points) -> Points:
    """Exponential mean over about a twentieth of the run, corrected for its start (Kingma & Ba 2015, algorithm 1)."""
    decay = 1 - 1 / memory(len(points))
    mean, weight, out = 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        out.append((x, mean / weight))
    return out


def percentile(values: list[float], fraction: float) -> float:
    """nan-free and empty-safe; for no values a number that never wins min or max."""
    if not values:
        return -math.inf if fraction > 0.5 else math.inf
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def labels(ticks: Sequence[float]) -> list[str]:
    """The numbers of one axis, all with exponents or all without: the largest decides."""
    largest = max(abs(tick) for tick in ticks)
    return [number(tick, beside=largest) for tick in ticks]


def number(value: float, *, beside: float | None = None) -> str:
    """Three significant digits: 0.0412, 1,640, 1e-4; with an exponent where `beside` has one, if that is given."""
    size = abs(value if beside is None else beside)
    if value and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
