#!/usr/bin/env python3
"""Try to lose a training in about 1,500 ways, count what came of it, and write docs/reliability.md.

    .venv/bin/python experiments/reliability.py                       # each trial without a result, then the page
    .venv/bin/python experiments/reliability.py --only kills secrets  # these, again
    .venv/bin/python experiments/reliability.py --page                # only the page, from the results there are

Each trial writes its result to a file of the work folder, so that the program goes on where it was stopped. It needs
Linux, as it forks and kills.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from experiments import ROOT
from experiments.trials import Bench, Result, attempt, inputs, interruptions, storage

TRIALS = {trial.__name__: trial for part in (interruptions, storage, inputs) for trial in part.TRIALS}
PAGE = ROOT / "docs" / "reliability.md"

HEAD = """# What was tried to lose a training

This page is written by [`experiments/reliability.py`](../experiments/reliability.py), which you can run yourself. The
program interrupts short trainings, damages their files, refuses their writes and gives them bad input. Then it looks
at what is left. All of it ran on Linux and on CPUs, with a small random SDXL. **Nothing on this page was tried on a
GPU, on Windows or on macOS.**

An attempt ends in one of three ways:

- *went on*: the run, or the same command with `--resume_from_checkpoint=latest`, ended with the weights of a run that
  nobody disturbed, bit for bit;
- *refused*: one message named what was wrong, and nothing that was saved before was touched;
- *lost*: neither of the two. Each is a defect, and stands below the table.

| What was tried | attempts | went on | refused | lost |
|---|---:|---:|---:|---:|
"""


def page_of(results: dict[str, Result]) -> str:
    """The page in Markdown; trials without a result are left out and named."""
    rows = [f"| {about(name)} | {found.tried:,} | {found.went_on:,} | {found.refused:,} | {found.lost:,} |"
            for name, found in results.items()]
    parts = ("tried", "went_on", "refused", "lost")
    total = [sum(getattr(found, part) for found in results.values()) for part in parts]
    rows.append("| **all** | " + " | ".join(f"**{number:,}**" for number in total) + " |")
    page = [HEAD + "\n".join(rows)]
    defects = [f"- `{name}`: {line}" for name, found in results.items() for line in found.defects]
    page.append("## Lost\n\n" + ("\n".join(defects) or "Nothing was lost."))
    measured = [f"- `{name}`: {what}: {value:.3g}" for name, found in results.items()
                for what, value in found.measured.items()]
    page.append("## Largest values that were measured\n\nThe times are of a shared machine with two cores, on which "
                 "other programs ran.\n\n" + "\n".join(measured))
    missing = [f"`{name}`" for name in TRIALS if name not in results]
    page += ["## Not run\n\n" + ", ".join(missing)] if missing else []
    page.append("## What each trial does\n\n" + "\n".join(
        f"- `{name}`: {about(name)}" for name in results))
    return "\n\n".join(page) + "\n"


def about(name: str) -> str:
    """The first paragraph of a trial's docstring, on one line."""
    return " ".join((TRIALS[name].__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRIALS, metavar="TRIAL", help=f"of: {', '.join(TRIALS)}")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are, try nothing")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "reliability", help="results and runs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    files = {name: args.work_dir / "results" / f"{name}.json" for name in TRIALS}
    if not args.page:
        for name in args.only or []:
            files[name].unlink(missing_ok=True)
        bench = Bench(args.work_dir)
        for name in args.only or TRIALS:
            result = attempt(TRIALS[name], bench, files[name])
            logging.info("%s: %d tried, %d went on, %d refused, %d lost", name, result.tried, result.went_on,
                         result.refused, result.lost)
    PAGE.write_text(page_of({name: Result.read(file) for name, file in files.items() if file.is_file()}), "utf-8")


if __name__ == "__main__":
    main()
