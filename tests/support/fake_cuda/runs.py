"""Runs of a trainer's main() on the card, each in a forked child of one process that has paid for the imports.

    python -m tests.support.fake_cuda.runs ROWS.json RESULTS.jsonl

ROWS.json holds a list of {"name", "trainer", "argv"}. RESULTS.jsonl gets one {"name", "code", "output", "seconds",
"steps"} a line; "steps" are the copies and waits of each optimizer step, as [what for, lines of ours].
"""

from __future__ import annotations

from tests.support.fake_cuda import hooks

if __name__ == "__main__":
    hooks.load()

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import trainers

Row = dict[str, Any]
FOR_GOOD = ExitStack()  # a child keeps its card until it ends


def watch(file: Path) -> None:
    """In a child: the card is there from now on, and the waits of each optimizer step go to `file`."""
    from tests.support.fake_cuda.machine import machine
    from trainkit.optim import Optim
    from trainkit.run import Run

    card = FOR_GOOD.enter_context(machine())
    begin, log = Optim.begin, Run.log

    def at_begin(optimizer: Optim, step: int) -> None:
        card.waits.clear()
        begin(optimizer, step)

    def at_log(run: Run, step: int, values: dict) -> None:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(card.waits) + "\n")
        log(run, step, values)

    Optim.begin, Run.log = at_begin, at_log  # type: ignore[method-assign]


def run(row: Row, folder: Path) -> Row:
    steps, log = folder / f"{row['name']}.steps", folder / f"{row['name']}.log"
    done = trainers.started(row["argv"], trainer=row["trainer"], log=log, patch=partial(watch, steps)).wait()
    waits = [json.loads(line) for line in steps.read_text("utf-8").splitlines()] if steps.is_file() else []
    return {"name": row["name"], **asdict(done), "steps": waits}


def main() -> None:
    rows, results = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    for trainer in {row["trainer"] for row in rows}:
        trainers.preloaded(trainer)
    with results.open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(run(row, results.parent)), file=file, flush=True)


if __name__ == "__main__":
    main()
