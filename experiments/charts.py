"""Small line charts in rows and columns on one page, with whiskers and a legend: the figures of the experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from trainkit.report.charts import nice_ticks, number
from trainkit.sheets import EDGE, FAINT, INK, PAPER, font

WIDTH, HEIGHT = 500, 320  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 40, 46  # around its plot
MARGIN, HEAD = 20, 86  # around all panels; for title and legend above them
SMOOTH = 3  # drawn this many times as large, then reduced: Pillow's own lines have hard edges
DODGE = 5  # pixels between lines at one place, so that no whisker hides another
PLOT, SHADE = "#ffffff", "#e9edf2"
COLOURS = ("#5d6470", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind

Points = Sequence[tuple[float, float]]  # (mean, half a whisker) at each place; 0: one value, no whisker


@dataclass(frozen=True)
class Panel:
    """One chart: a line a name, and the value at which nothing is changed, or all is right."""

    title: str
    lines: Mapping[str, Points]
    neutral: float

    @property
    def ticks(self) -> list[float]:
        ends = [mean + sign * half for points in self.lines.values() for mean, half in points for sign in (-1, 1)]
        low, high = min(*ends, self.neutral), max(*ends, self.neutral)
        return nice_ticks(low, high if high > low else low + 1)


@dataclass(frozen=True)
class Axes:
    """Where a panel's plot lies on the page, and the range of its values."""

    x: float
    y: float
    places: int
    low: float
    high: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.x + LEFT, self.y + TOP, self.x + WIDTH - RIGHT, self.y + HEIGHT - BOTTOM

    @property
    def pitch(self) -> float:
        """Pixels from one place to the next."""
        return (WIDTH - LEFT - RIGHT) / self.places

    def at(self, place: float, value: float) -> tuple[float, float]:
        """Pixels of a value at a place, counted from 0."""
        _, top, _, floor = self.box
        return self.x + LEFT + (place + 0.5) * self.pitch, floor - (value - self.low) / (self.high - self.low) * (
            floor - top)


class Pen:
    """Draws in the page's pixels on a larger canvas."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.canvas = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
        self.on = ImageDraw.Draw(self.canvas)

    def page(self) -> Image.Image:
        return self.canvas.resize(self.size, Image.Resampling.LANCZOS)

    def box(self, corners: Sequence[float], colour: str) -> None:
        self.on.rectangle([SMOOTH * c for c in corners], fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        self.on.line([(SMOOTH * x, SMOOTH * y) for x, y in points], colour, round(SMOOTH * width), joint="curve")

    def dot(self, at: tuple[float, float], colour: str, radius: float = 4) -> None:
        self.on.circle([SMOOTH * c for c in at], SMOOTH * radius, fill=colour)

    def text(self, at: tuple[float, float], text: str, anchor: str = "lm", colour: str = INK, size: int = 16) -> float:
        """-> its width."""
        large = font(size * SMOOTH)
        self.on.text([SMOOTH * c for c in at], text, fill=colour, font=large, anchor=anchor)
        return large.getlength(text) / SMOOTH


def figure(rows: Sequence[Sequence[Panel]], *, places: Sequence[str], shaded: tuple[int, int], below: str,
           labels: Mapping[str, str], title: str) -> Image.Image:
    """A page of panels.

    places  what the points stand for, from left to right; `shaded` are the first and the last of a part set apart
    below   what the places are
    labels  what the legend calls each line, in the order of the colours
    """
    pen = Pen(2 * MARGIN + WIDTH * max(map(len, rows)), HEAD + MARGIN + HEIGHT * len(rows))
    colours = dict(zip(labels, COLOURS, strict=False))
    pen.text((MARGIN, 30), title, size=20)
    x = float(MARGIN)
    for name, label in labels.items():
        pen.line([(x, 64), (x + 26, 64)], colours[name], 3)
        x += 34 + pen.text((x + 34, 64), label) + 26
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            ticks = panel.ticks
            axes = Axes(MARGIN + c * WIDTH, HEAD + r * HEIGHT, len(places), ticks[0], ticks[-1])
            frame(pen, axes, panel, places=places, shaded=shaded, below=below if r + 1 == len(rows) else "")
            for i, (name, points) in enumerate(panel.lines.items()):
                curve(pen, axes, points, colours[name], shift=DODGE * (i - (len(panel.lines) - 1) / 2))
    return pen.page()


def frame(pen: Pen, axes: Axes, panel: Panel, *, places: Sequence[str], shaded: tuple[int, int], below: str) -> None:
    """Title, grid and labels of a panel."""
    left, top, right, floor = axes.box
    pen.box(axes.box, PLOT)
    pen.box((left + shaded[0] * axes.pitch, top, left + (shaded[1] + 1) * axes.pitch, floor), SHADE)
    pen.text((left, axes.y + 20), panel.title)
    for tick in panel.ticks:
        _, y = axes.at(0, tick)
        pen.line([(left, y), (right, y)], EDGE)
        pen.text((left - 8, y), number(round(tick, 10)), "rm", FAINT, 14)
    pen.line([(left, axes.at(0, panel.neutral)[1]), (right, axes.at(0, panel.neutral)[1])], FAINT, 1.5)
    for i, place in enumerate(places):
        pen.text((axes.at(i, axes.low)[0], floor + 14), place, "mm", FAINT, 14)
    pen.text(((left + right) / 2, floor + 34), below, "mm", FAINT, 14)


def curve(pen: Pen, axes: Axes, points: Points, colour: str, *, shift: float) -> None:
    """A line through the means, moved aside by `shift` pixels, with dots and whiskers."""
    spots = [axes.at(i + shift / axes.pitch, mean) for i, (mean, _) in enumerate(points)]
    pen.line(spots, colour, 2)
    for i, (mean, half) in enumerate(points):
        ends = [axes.at(i + shift / axes.pitch, mean + sign * half) for sign in (-1, 1)]
        pen.line(ends, colour, 1.5)
        pen.dot(spots[i], colour)
