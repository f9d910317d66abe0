"""Runs of a trainer's main() on the card, each in a forked child of one process that has paid for the imports.

    python -m tests.support.fake_cuda.runs ROWS.json RESULTS.jsonl cuda|mps|xpu

ROWS.json holds a list of {"name", "trainer", "argv"}; "trainer" is any module with a main(), and "full_size" puts SDXL
at its released sizes in the model's place. RESULTS.jsonl gets one {"name", "code", "output", "seconds", "steps",
"previews", "peak_rss"} a line; "steps" and "previews" are the copies and waits of each optimizer step and preview, as
[what for, lines of ours], and "peak_rss" is in bytes.
"""

from __future__ import annotations

import sys

from tests.support.fake_cuda import hooks

if __name__ == "__main__":
    hooks.load(sys.argv[3])

import json
import resource
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import trainers

Row = dict[str, Any]
DENOISING_STEPS = 3  # of a preview instead of 25: the steps are alike, and slow where each operation is watched
FOR_GOOD = ExitStack()  # a child keeps its card until it ends


def watch(file: Path, device: str, full_size: bool) -> None:
    """In a child: the card is there from now on, and the waits of each optimizer step and preview go to `file`."""
    from tests.support.fake_cuda.machine import machine
    from trainkit import preview
    from trainkit.optim import Optim
    from trainkit.preview import Previews
    from trainkit.run import Run

    card = FOR_GOOD.enter_context(machine(device=device))
    begin, log, generate = Optim.begin, Run.log, Previews.generate
    if full_size:
        from tests.support.fake_cuda import full_size as sizes

        sizes.put_in_place()

    def write(what: str) -> None:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps([what, card.waits, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]) + "\n")

    def at_begin(optimizer: Optim, step: int) -> None:
        card.waits.clear()
        begin(optimizer, step)

    def at_log(run: Run, step: int, values: dict) -> None:
        write("steps")
        log(run, step, values)

    def at_preview(previews: Previews, *args: Any) -> dict:
        card.waits.clear()
        images = generate(previews, *args)
        write("previews")
        return images

    preview.STEPS = DENOISING_STEPS
    Run._agree = lambda run, votes: None  # type: ignore[method-assign]  # made-up votes would be a signal to stop
    Optim.begin, Run.log, Previews.generate = at_begin, at_log, at_preview  # type: ignore[method-assign]


def run(row: Row, folder: Path, device: str) -> Row:
    notes, log = folder / f"{row['name']}.notes", folder / f"{row['name']}.log"
    patch = partial(watch, notes, device, row.get("full_size", False))
    done = trainers.started(row["argv"], trainer=row["trainer"], log=log, patch=patch).wait()
    found = [json.loads(line) for line in notes.read_text("utf-8").splitlines()] if notes.is_file() else []
    waits = {kind: [some for what, some, _ in found if what == kind] for kind in ("steps", "previews")}
    return {"name": row["name"], **asdict(done), **waits, "peak_rss": max((kib for *_, kib in found), default=0) * 1024}


def main() -> None:
    rows, results, device = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]), sys.argv[3]
    for trainer in {row["trainer"] for row in rows}:
        trainers.preloaded(trainer)
    with results.open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(run(row, results.parent, device)), file=file, flush=True)


if __name__ == "__main__":
    main()
