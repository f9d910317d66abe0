"""The contact sheet: one offline page with every image as it is cut, captioned and weighted, and what was found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from trainkit.data.batch import Sample
from trainkit.data.geometry import cut_away, enlargement
from trainkit.doctor.checks import SEVERITIES, Finding, Result
from trainkit.doctor.look import DataImage, DataSet, mask_thumbnail
from trainkit.doctor.text import counts, how_trained, verdict
from trainkit.errors import SHOWN, printable
from trainkit.files import atomic_write
from trainkit.report import TEMPLATES, Tile, data_uri, environment, policy


@dataclass(frozen=True)
class CardFinding:
    """A finding on the card of an image."""

    check: str
    severity: str
    detail: str
    consequence: str
    fix: str


@dataclass(frozen=True)
class ImageCard:
    """One image. Places of the crop are in pixels of the image."""

    name: str
    thumbnail: str
    size: str
    width: int
    height: int
    crop: tuple[float, float, float, float] | None  # left, top, width, height; None where nothing is cut off
    cut: str
    mask: str  # laid over the thumbnail; "" where the image has none
    mask_text: str
    caption: str
    weight: str
    severity: str  # of the worst finding, "" without one
    checks: str
    notes: tuple[CardFinding, ...]


@dataclass(frozen=True)
class CheckRow:
    """A check in the table at the top."""

    name: str
    slug: str
    severity: str
    what: str
    count: int
    consequence: str
    fix: str
    some: bool  # the command is for the first findings alone
    has_images: bool
    details: tuple[str, ...]  # of the first findings


def write_page(path: Path, data: DataSet, results: Sequence[Result]) -> None:
    css = "\n".join((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "dataset.css"))
    js = (TEMPLATES / "dataset.js").read_text("utf-8")
    page = environment(autoescape=True).get_template("dataset.html").render(
        title=", ".join(printable(folder.absolute().name) for folder in data.folders), trained=how_trained(data),
        verdict=verdict(results), bad=bool(counts(results)["error"]), tiles=tiles(data, results),
        rows=[row_of(result) for result in results], cards=[*cards(data, results)], shown=SHOWN,
        random_place=not data.options.center_crop, css=Markup(css), js=Markup(js), policy=policy(css, js))
    atomic_write(path, page.encode("utf-8", "backslashreplace"))


def tiles(data: DataSet, results: Sequence[Result]) -> list[Tile]:
    bad = {image.path for result in results for image in result.images}
    return [
        Tile("Images", f"{len(data.images):,}", f"{len(data.sound):,} can be read"),
        Tile("With a caption", f"{sum(bool(image.captions) for image in data.sound):,}", f"of {len(data.sound):,}"),
        Tile("Visits in an epoch", f"{data.visits:,}", how_trained(data)),
        Tile("Without a finding", f"{len(data.images) - len(bad):,}", f"of {len(data.images):,}"),
    ]


def slug(name: str) -> str:
    return name.replace(" ", "-")


def row_of(result: Result) -> CheckRow:
    check = result.check
    details = tuple(named(finding) for finding in result.findings)
    return CheckRow(check.name, slug(check.name), check.severity, check.what, len(result.findings), check.consequence,
               result.fix, result.fixes_some, bool(result.images), details[:SHOWN])


def named(finding: Finding) -> str:
    """A finding in words, with the image that it is about."""
    name = f"{finding.images[0].name}: " if len(finding.images) == 1 else ""
    return name + "\n".join(printable(line.strip()) for line in finding.detail.split("\n"))


def cards(data: DataSet, results: Sequence[Result]) -> Iterator[ImageCard]:
    """All images, those with the worst findings first."""
    notes: dict[Path, list[CardFinding]] = defaultdict(list)
    for result in results:
        for finding in result.findings:
            note = CardFinding(result.check.name, result.check.severity, printable(finding.detail),
                               result.check.consequence, finding.fix)
            for image in finding.images:
                notes[image.path].append(note)
    unsorted = [card(image, data, notes[image.path]) for image in data.images]
    yield from sorted(unsorted, key=lambda one: SEVERITIES.index(one.severity) if one.severity else len(SEVERITIES))


def card(image: DataImage, data: DataSet, notes: Sequence[CardFinding]) -> ImageCard:
    height, width = image.verdict.size
    severities = [severity for severity in SEVERITIES if any(note.severity == severity for note in notes)]
    fraction = image.visits / data.visits if data.visits else 0
    even = 1 / max(1, len(data.sound))
    times = f", {fraction / even:.2g} × the mean" if abs(fraction / even - 1) > 0.05 else ""
    visits = "1 visit" if image.visits == 1 else f"{image.visits:,} visits"
    return ImageCard(
        image.name, data_uri("webp", image.thumbnail) if image.look else "", by(width, height), width, height,
        crop(image, image.samples[0]) if image.samples else None,
        "; ".join(cut_text(image, sample, bucket=data.options.enable_bucket) for sample in image.samples),
        *masked(image, data), printable(" ‖ ".join(image.captions)),
        f"{visits} of {data.visits:,}, {100 * fraction:.2g} %{times}",
        severities[0] if severities else "", " ".join(dict.fromkeys(slug(note.check) for note in notes)), tuple(notes))


def masked(image: DataImage, data: DataSet) -> tuple[str, str]:
    """The mask as a small image, and the part of the area that it leaves; ("", "") without one."""
    verdict = image.mask_verdict
    if not (image.look and image.mask and verdict) or verdict.refused:
        return "", ""
    small = mask_thumbnail(image.mask, alpha=data.options.alpha_mask)
    return data_uri("webp", small) if small else "", f"mask: {100 * verdict.area:.3g} % of the area counts"


def crop(image: DataImage, sample: Sample) -> tuple[float, float, float, float] | None:
    """Where a sample lies in the image, in its pixels; None where it is all of it."""
    height, width = image.verdict.size
    x, y = width / sample.resized[1], height / sample.resized[0]
    if cut_away(image.verdict.size, sample.shape) < 0.002:
        return None
    return (round(sample.left * x, 1), round(sample.top * y, 1), round(sample.shape[1] * x, 1),
            round(sample.shape[0] * y, 1))


def cut_text(image: DataImage, sample: Sample, *, bucket: bool) -> str:
    lost, factor = cut_away(image.verdict.size, sample.shape), enlargement(image.verdict.size, sample.shape)
    parts = [f"{'bucket ' if bucket else ''}{by(*sample.shape[::-1])}",
             f"{100 * lost:.0f} % cut off" if lost >= 0.005 else "nothing cut off"]
    return ", ".join([*parts, *([f"enlarged {factor:.2g} ×"] if factor > 1.05 else [])])


def by(width: int, height: int) -> str:
    """A size that no line break parts."""
    return f"{width}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{height}"
