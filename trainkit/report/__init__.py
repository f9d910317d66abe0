"""report.html: one offline page that tells how a run went, from its run.json, metrics.jsonl and samples/.

`facts` reads and cleans what a run left behind, `charts` draws lines, `matched` tells of distribution matching, this
file puts the page together. The page makes no request: styles, script and images are inside, and its content
security policy allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from trainkit.files import atomic_write
from trainkit.report.charts import Chart, line_chart, memory, number, smoothed
from trainkit.report.facts import SAMPLE, RunFacts, sample_files
from trainkit.report.matched import MEASURES, band_charts, band_tables, loss_name, loss_note
from trainkit.report.usage import usage

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
MAX_SAMPLE_STEPS = 24  # steps on the slider: the first, the last and others spread between
EMBED_PX, EMBED_BYTES = 512, 96 * 1024  # larger images go in as thumbnails; the full ones stay beside the page


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class SampleImage:
    file: str  # relative to the page
    caption: str
    size: str
    data: str  # data URI


@dataclass(frozen=True)
class SampleStep:
    step: int
    images: tuple[SampleImage, ...]


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from what lies in the run directory -> its path. Can be repeated at any time."""
    folder = Path(folder)
    run = RunFacts(folder)
    css, js = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    page = environment(autoescape=True).get_template("report.html").render(
        run=run, tiles=tiles(run), samples=sample_steps(folder, last=run.step), charts=charts(run), usage=usage(run),
        bands=band_charts(run), measures=MEASURES, tables=band_tables(run), files=run.files, machine=machine(run),
        css=Markup(css), js=Markup(js), policy=policy(css, js),
    )
    path = folder / "report.html"
    atomic_write(path, page.encode("utf-8"))
    return path


def environment(*, autoescape: bool) -> Environment:
    """Templates of this project; a name that is not given is an error."""
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=autoescape, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    env.filters["inline_code"] = inline_code
    return env


def policy(css: str, js: str) -> str:
    """Content security policy: this style, this script, embedded images, nothing else."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    return (f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; "
            "base-uri 'none'; form-action 'none'")


def inline_code(text: str) -> Markup:
    """`word` -> <code>word</code>, everything escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def tiles(run: RunFacts) -> list[Tile]:
    return [tile for tile in (*progress_tiles(run), *resource_tiles(run)) if tile.value]


def progress_tiles(run: RunFacts) -> Iterator[Tile]:
    loss = smoothed(column(run, "loss"))
    if loss:
        yield Tile(f"{loss_name(run)}, smoothed", number(loss[-1][1]), first_loss(run))
    yield Tile("Steps", f"{run.step:,}", f"of {run.total_steps:,}" if run.total_steps else "")
    if run.seconds:
        pace = f"{run.step / run.seconds:.2g} steps a second with previews and saving"
        yield Tile("Time", duration(run.seconds), pace)


def first_loss(run: RunFacts) -> str:
    """Mean of the first steps, of as many as the smoothed loss averages: one step alone is mostly its noise level."""
    values = [loss for _, loss in column(run, "loss")]
    count = min(memory(len(values)), len(values) // 2)
    return f"{number(sum(values[:count]) / count)} over the first {count} steps" if count > 1 else ""


def resource_tiles(run: RunFacts) -> Iterator[Tile]:
    last = run.metrics[-1] if run.metrics else {}
    if "images" in last:
        yield Tile("Images seen", f"{last['images']:,.0f}", f"{last['images'] / max(1, run.step):.3g} a step")
    if masks := run.record.get("masks"):
        yield Tile("Images with a mask", f"{masks['images']:,}", f"{100 * masks['area']:.3g} % of their area counts")
    if last.get("skipped"):
        yield Tile("Skipped steps", f"{last['skipped']:.0f}", "loss or gradient not finite")


def charts(run: RunFacts) -> list[Chart]:
    """Loss, learning rate of each group (times Prodigy's d where there is one), gradient norm; what was logged."""
    loss, norm = column(run, "loss"), column(run, "grad_norm")
    found = []
    if loss:
        smooth = smoothed(loss)
        explanation = f"The faint line is the loss itself, the strong one its running mean. {loss_note(run)}".rstrip()
        found.append(line_chart(loss_name(run), smooth, raw=loss, wide=True, explanation=explanation,
                                summary=f"{number(smooth[-1][1])} at the end"))
    for name in run.rates:
        rate = effective_rate(run, name)
        scaled = any(f"d/{name}" in row for row in run.metrics)
        title = f"Learning rate × d, {name}" if scaled else f"Learning rate, {name}"
        found.append(line_chart(title, rate, summary=f"{number(rate[-1][1])} at the end"))
    if norm:
        smooth = smoothed(norm)
        found.append(line_chart("Gradient norm, before clipping", smooth, raw=norm,
                                summary=f"{number(smooth[-1][1])} at the end"))
    return found + fourier_charts(run)


def fourier_charts(run: RunFacts) -> list[Chart]:
    """What part of the loss the Fourier term was; none without one, or where it never counted."""
    percent = [(row["step"], 100 * row["fourier_component"] / row["loss"]) for row in run.metrics
             if row.get("fourier_component") is not None and row.get("loss")]
    if not any(value for _, value in percent):
        return []
    smooth = smoothed(percent)
    summary = f"{number(smooth[-1][1])} at the end"
    return [line_chart("Fourier term, % of the loss", smooth, raw=percent, summary=summary)]


def effective_rate(run: RunFacts, name: str) -> list[tuple[float, float]]:
    """lr · d: Prodigy's own factor d belongs to the step size, and its lr alone looks stuck at 1."""
    return [(row["step"], row[f"lr/{name}"] * row.get(f"d/{name}", 1.0)) for row in run.metrics if f"lr/{name}" in row]


def column(run: RunFacts, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in run.metrics if key in row]


def machine(run: RunFacts) -> dict[str, str]:
    found = {
        "device": run.record.get("device"), "processes": run.record.get("world"),
        "precision": run.record.get("precision"), "seed": run.record.get("seed"),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


# ----------------------------------------------------------------------------------------------------------------------
# Images


def sample_steps(folder: Path, *, last: int) -> list[SampleStep]:
    """The single images in samples/ up to step `last`, by step; at most MAX_SAMPLE_STEPS steps."""
    by_step: dict[int, list[Path]] = {}
    for path, step in sample_files(folder).items():
        named = SAMPLE.fullmatch(path.name)
        if step <= last and named and named[2]:  # no grids
            by_step.setdefault(step, []).append(path)
    return [SampleStep(step, tuple(sample_image(path) for path in by_step[step])) for step in spread(sorted(by_step))]


def spread(steps: list[int]) -> list[int]:
    if len(steps) <= MAX_SAMPLE_STEPS:
        return steps
    return [steps[round(k * (len(steps) - 1) / (MAX_SAMPLE_STEPS - 1))] for k in range(MAX_SAMPLE_STEPS)]


def sample_image(path: Path) -> SampleImage:
    named = SAMPLE.fullmatch(path.name)
    assert named, f"{path.name} is a sample"
    _, number_, seed = named.groups()
    with Image.open(path) as image:
        size = f"{image.width} × {image.height}"
        small = max(image.size) <= EMBED_PX and path.stat().st_size <= EMBED_BYTES
        data = data_uri("png", path.read_bytes()) if small else data_uri("webp", thumbnail(image))
    caption = f"seed {seed}" if int(number_) == 1 else f"prompt {int(number_)}, seed {seed}"
    return SampleImage(f"samples/{path.name}", caption, size, data)


def thumbnail(image: Image.Image, px: int = EMBED_PX, file_format: str = "WEBP") -> bytes:
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((px, px), Image.Resampling.LANCZOS)
    small.save(buffer, format=file_format, quality=85)
    return buffer.getvalue()


def newest_preview(folder: Path, *, last: int, px: int) -> str | None:
    """The first image of the last preview up to step `last`, as a data URI; None without previews."""
    found = [path for path, step in sorted(sample_files(folder).items(), key=lambda held: (-held[1], held[0].name))
             if step <= last and (named := SAMPLE.fullmatch(path.name)) and named[2]]
    if not found:
        return None
    with Image.open(found[0]) as image:
        return data_uri("jpeg", thumbnail(image, px, "JPEG"))


def data_uri(image_type: str, data: bytes) -> str:
    return f"data:image/{image_type};base64,{base64.b64encode(data).decode()}"
