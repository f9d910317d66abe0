#!/usr/bin/env python
"""Does a method help? Train with and without it on the shipped model, several seeds each, and measure both.

    .venv/bin/python experiments/learning/run.py                  every case; resumes: what is finished is not run again
    .venv/bin/python experiments/learning/run.py --cases lora fourier_balanced --seeds 1 --steps 50 --out runs/quick
    for g in 1 2 4 8; do .venv/bin/python experiments/learning/run.py --cases lora dropout --guidance_scale $g \\
      --out runs/dropout-$g; done

Each case is the same short run on the 22 shipped 3-D icons but for its flags in cases.py; most have three seeds.
Measured on images generated at strength 1 from noise that is the same for all runs:

    gap closed   fraction of the style distance between the base and real icons that is gone, on nouns it was not taught
    prior drift  mean of 1 − cos(image with the LoRA, the base's own) in the shipped CLIP, over prompts for one of the
                 base's own styles, which the LoRA should leave alone (nouns that no class image shows)
    high         power of the untaught nouns' images above half of Nyquist's frequency, against the real icons'
    spectrum     how far that power is from theirs over all frequencies: root mean square of ln(ratio); 0 is the same;
                 both also beside the real icons as the VAE passes them, which is all that a LoRA could come to

and of the run itself the bytes of optimizer state a trained number, and the median time of a step.

Prints the tables of docs/learning.md and writes tables.md into --out. There learning.png shows the same images of each
method; fourier.png and fourier-images.png show what the Fourier loss changes. Results lie there too, one folder a run.
Needs no network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import ROOT
from experiments.learning.cases import CASES, COMMON, METHODS, PRESETS, SPECTRA
from experiments.learning.results import DENOISING_STEPS, GUIDANCE, STEPS, Results, at_hand, read, summary, tables
from experiments.seeds import save
from trainkit.errors import Problem, exit_with_message, refuse

if TYPE_CHECKING:
    from experiments.learning.exam import Exam

TRAINER = ROOT / "train_dreambooth_lora_sdxl_advanced.py"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(others(args))

    from experiments.learning.exam import Exam

    exam = Exam(args.steps, args.denoising_steps, args.guidance_scale)
    for case, seed in runs(args):
        folder = args.out / f"{case}-seed{seed}"
        if not (folder / "result.json").is_file():
            seconds = train(case, seed, args.steps, folder)
            save(folder / "result.json", vars(exam.result(folder, seconds, flags(case, args.steps))))
        print(f"{case:24} seed {seed}  {summary(read(folder))}", flush=True)
    report(args, exam)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"default: all of {', '.join(CASES)}")
    add("--seeds", type=int, default=3, help="seeds 0, 1, … of every case at most; some have one")
    add("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    add("--denoising_steps", type=int, default=DENOISING_STEPS, help="of every generated image")
    add("--guidance_scale", type=float, default=GUIDANCE, help="of every generated image")
    add("--out", type=Path, default=ROOT / "runs/learning", metavar="DIR", help="one folder a run")
    add("--debug", action="store_true", help="show a traceback for user errors")
    return parser.parse_args(argv)


def runs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Every case of a seed before the next seed."""
    return [(case, seed) for seed in range(args.seeds) for case in args.cases if seed < CASES[case].seeds]


def flags(case: str, steps: int) -> str:
    """What a case adds to the common flags, wherever this repository lies."""
    return " ".join(CASES[case].line(steps)).replace(f"{ROOT}/", "")


def others(args: argparse.Namespace) -> Iterator[Problem]:
    """Results in --out of runs with other arguments, which no table may mix."""
    for case, seed in runs(args):
        folder = args.out / f"{case}-seed{seed}"
        found = read(folder) if (folder / "result.json").is_file() else None
        if found and (found.steps, found.denoising_steps, found.guidance_scale) != (
                args.steps, args.denoising_steps, args.guidance_scale):
            yield Problem(f"{folder.name} is finished, with other arguments", f"--out {args.out}",
                          f"it had --steps {found.steps} --denoising_steps {found.denoising_steps} "
                          f"--guidance_scale {found.guidance_scale:g}",
                          "name another --out, or give these arguments")
        elif found and found.flags not in (None, flags(case, args.steps)):
            yield Problem(f"{folder.name} is finished, with other flags", f"--out {args.out}",
                          f"it was trained with {found.flags}", "name another --out, or remove that folder")


def train(case: str, seed: int, steps: int, folder: Path) -> float:
    """Run the trainer, or go on with it -> seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(TRAINER), *COMMON, *CASES[case].line(steps), f"--max_train_steps={steps}",
            f"--seed={seed}", f"--output_dir={folder.resolve()}"]
    started = time.monotonic()
    with (folder / "training.log").open("ab") as log:
        code = subprocess.run(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"learning: {case}, seed {seed} ended with exit code {code}; see {folder / 'training.log'}")
    return time.monotonic() - started


def report(args: argparse.Namespace, exam: Exam) -> None:
    """The tables, printed and in tables.md, and the figures."""
    results: Results = {case: [read(args.out / f"{case}-seed{seed}") for one, seed in runs(args) if one == case]
                        for case in args.cases}
    references = references_of(args, exam) if at_hand(SPECTRA, results) else None
    text = "\n".join(tables(results, references))
    (args.out / "tables.md").write_text(f"{text}\n", "utf-8")
    print(text)
    methods = {case: name for case, name in METHODS.items() if case in results}
    save_sheet(args, exam, methods, "learning.png", f"nouns that were not taught, seed 0, {args.steps} steps")
    if references:
        fourier_figures(args, exam, results, references)


def references_of(args: argparse.Namespace, exam: Exam) -> dict[str, dict]:
    """Base, training images and real ones through the VAE, measured once a folder and number of steps."""
    path = args.out / f"references-{args.denoising_steps}-{args.guidance_scale:g}.json"
    if not path.is_file():
        save(path, exam.references())
    return json.loads(path.read_text("utf-8"))


def save_sheet(args: argparse.Namespace, exam: Exam, names: dict[str, str], file: str, title: str) -> None:
    from experiments.learning import chart

    if rows := chart.kept_rows(args.out, names):
        exam.rows(args.out)
        nouns = [exam.style_prompts[i].noun for i in exam.shown]
        chart.images(args.out, rows, nouns=nouns, title=title).save(args.out / file)
        print(f"\nfigure: {args.out / file}")


def fourier_figures(args: argparse.Namespace, exam: Exam, results: Results, references: dict[str, dict]) -> None:
    from experiments.learning import chart

    seeds = f"{len(results['lora'])} seeds" if len(results["lora"]) > 1 else "one seed"
    page = chart.spectra(results, references, title=f"Images of untaught nouns after {args.steps} steps: power by "
                         f"frequency, mean and standard error of {seeds}")
    page.save(args.out / "fourier.png")
    print(f"\nfigure: {args.out / 'fourier.png'}")
    shown = {case: chart.label(case) for case in ("lora", *(f"fourier_{name}" for name in PRESETS)) if case in results}
    save_sheet(args, exam, shown, "fourier-images.png", "nouns that were not taught, seed 0, the same noise")


if __name__ == "__main__":
    exit_with_message(main)
