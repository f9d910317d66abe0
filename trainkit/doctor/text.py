"""The findings as lines for a terminal, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from trainkit import terminal
from trainkit.data.sources.unread import REPORT_KEY
from trainkit.doctor.checks import SEVERITIES, Result
from trainkit.doctor.look import DataImage, DataSet
from trainkit.errors import SHOWN, counted, printable

LISTED = 5  # findings of a check that the terminal shows
COLOURS = {"error": terminal.RED, "warning": terminal.YELLOW, "note": terminal.BOLD}
INDENT = " " * 9


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many findings there are of each severity."""
    return {severity: sum(len(result.findings) for result in results if result.check.severity == severity)
            for severity in SEVERITIES}


def verdict(results: Sequence[Result]) -> str:
    found = [counted(number, severity) for severity, number in counts(results).items() if number]
    return ", ".join(found) if found else "no problems found"


def how_trained(data: DataSet) -> str:
    """`1024 px, squares` or `1024 px, 3 buckets`."""
    sizes = {sample.shape for image in data.sound for sample in image.samples}
    shape = counted(len(sizes), "bucket") if data.options.enable_bucket else "one size, no buckets"
    return f"{data.options.resolutions or data.options.resolution} px, {shape}"


def lines(data: DataSet, results: Sequence[Result], stream: TextIO) -> Iterator[str]:
    width = min(100, terminal.columns(stream)) if terminal.is_terminal(stream) else terminal.COLUMNS
    captioned = sum(bool(image.captions) for image in data.sound)
    masks = sum(bool(image.mask_verdict) for image in data.sound)
    masked = f", {masks:,} with a mask" if masks else ""
    yield from wrapped(f"{', '.join(printable(str(folder)) for folder in data.folders)}: "
                       f"{counted(len(data.images), 'image')}, {captioned:,} with a caption{masked}; "
                       f"{how_trained(data)}; an epoch is {counted(data.visits, 'visit')}", width, "")
    for result in results:
        yield ""
        yield from of_check(result, width, stream)
    yield ""
    clean = len(data.images) - len({image.path for result in results for image in result.images})
    rest = f"; {clean:,} of {counted(len(data.images), 'image')} without a finding" if results else ""
    yield f"{verdict(results)}{rest}"


def of_check(result: Result, width: int, stream: TextIO) -> Iterator[str]:
    """A heading, what it does to training, the first findings, and the command."""
    check, found = result.check, result.findings
    label = terminal.styled(f"{check.severity.upper():<9}", COLOURS[check.severity], stream=stream)
    yield f"{label}{check.name}: {check.what} ({len(found):,})"
    yield from wrapped(check.consequence, width, INDENT)
    for finding in found[:LISTED]:
        name = f"{finding.images[0].name}: " if len(finding.images) == 1 else ""
        first, *others = [printable(line.strip()) for line in finding.detail.split("\n")]
        yield from wrapped(f"- {name}{first}", width, INDENT, "  ")
        for line in others[:LISTED]:
            yield from wrapped(line, width, INDENT + "  ", "  ")
        if len(others) > LISTED:
            yield f"{INDENT}  ..."
    if len(found) > LISTED:
        yield f"{INDENT}- and {len(found) - LISTED:,} more: see --html or --json"
    if result.fix:
        some = f" (the first {SHOWN}; then check again)" if result.fixes_some else ""
        yield f"{INDENT}fix{some}:"
        yield result.fix


def wrapped(text: str, width: int, indent: str, hanging: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + hanging,
                         break_on_hyphens=False)


# ----------------------------------------------------------------------------------------------------------------------


def as_json(data: DataSet, results: Sequence[Result]) -> dict[str, Any]:
    return {
        REPORT_KEY: 1,
        "folders": [str(folder) for folder in data.folders], "counts": counts(results), "visits": data.visits,
        "findings": [
            {"check": result.check.name, "severity": result.check.severity, "images": [i.name for i in finding.images],
             "detail": finding.detail, "consequence": result.check.consequence, "fix": finding.fix}
            for result in results for finding in result.findings],
        "images": [json_of(image, data) for image in data.images],
    }


def json_of(image: DataImage, data: DataSet) -> dict[str, Any]:
    height, width = image.verdict.size
    look = {"sharpness": round(image.look.sharpness, 2)} if image.look else {}
    mask = {"mask": image.mask_verdict.area} if image.mask_verdict and not image.mask_verdict.refused else {}
    cuts = [{"width": s.shape[1], "height": s.shape[0], "resized": list(s.resized[::-1]), "left": s.left, "top": s.top}
            for s in image.samples]
    weight = image.visits / data.visits if data.visits else 0.0
    return {"name": image.name, "width": width, "height": height, "captions": list(image.captions), "cuts": cuts,
            "visits": image.visits, "weight": weight, **look, **mask}
