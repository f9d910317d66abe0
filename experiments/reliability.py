#!/usr/bin/env python3
"""Try to make a run lose its work, count what came of it, and write docs/reliability.md.

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

HEAD = """# How we tried to make a run lose its work

[`experiments/reliability.py`](../experiments/reliability.py) writes this page, and you can run it yourself. The program
disturbs short runs in the ways that the table lists. Then it checks what is left. All of it ran on Linux and on CPUs,
with a small random SDXL. **Nothing on this page was tried on a GPU, on Windows or on macOS.**

An attempt ends in one of three ways:

- *went on*: the run ended as it should. If it was stopped and continued, its weights are those of a run without a stop,
  bit for bit;
- *refused*: the run stopped with a message that says what is wrong;
- *lost*: the attempt ended in another way. Every lost attempt is a defect, and is listed below the table.
"""

TABLE = """\
| trial | what we tried, and what must hold | attempts | went on | refused | lost |
|---|---|---:|---:|---:|---:|
"""


ELSEWHERE = """\
## What tests hold beside this

- The 81 flags of the Diffusers DreamBooth script and the 55 of its text-to-image scripts are read as there, and the
  published commands that we know are accepted: [`tests/test_options.py`](../tests/test_options.py).
- The LoRA files hold the trained weights by the rules of Diffusers, ComfyUI and kohya:
  [`tests/test_export.py`](../tests/test_export.py). Every run also reads its files back and prints the largest error.
- Mistakes of a user end in one message with what, where, why and the next command:
  [`tests/test_bad_input.py`](../tests/test_bad_input.py)."""


def page_of(results: dict[str, Result]) -> str:
    """The page in Markdown; trials without a result are named as not run."""
    missing = [f"`{name}`" for name in TRIALS if name not in results]
    rows = [f"| `{name}` | {about(name)} | {found.tried:,} | {found.went_on:,} | {found.refused:,} | {found.lost:,} |"
            for name, found in results.items()]
    parts = ("tried", "went_on", "refused", "lost")
    total = [sum(getattr(found, part) for found in results.values()) for part in parts]
    rows.append("| **all** | | " + " | ".join(f"**{number:,}**" for number in total) + " |")
    defects = [f"- `{name}`: {line}" for name, found in results.items() for line in found.defects]
    measured = [f"- `{name}`: {what}: {value:.3g}" for name, found in results.items()
                for what, value in found.measured.items()]
    page = [HEAD.rstrip(), *([f"**Not run:** {', '.join(missing)}."] if missing else []), TABLE + "\n".join(rows)]
    page.append("## Lost\n\n" + ("\n".join(defects) or "Nothing was lost."))
    page.append("## Largest values that were measured\n\nThe times are of a shared machine with two cores, on which "
                "other programs ran.\n\n" + "\n".join(measured))
    page.append(ELSEWHERE)
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
