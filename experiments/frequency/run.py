#!/usr/bin/env python
"""Does distribution matching by frequency help? Train with and without it on the shipped model and look at the errors.

    .venv/bin/python experiments/frequency/run.py              every arm; resumes: what is finished is not run again
    .venv/bin/python experiments/frequency/run.py --pilot      gains to choose --gain from, on their own seed and images
    .venv/bin/python experiments/frequency/run.py --arms base combo --seeds 0 --steps 50 --out runs/quick

Each arm is the same short run on the 22 shipped 3-D icons but for its flags in arms.py; with one seed every arm sees
the same images in the same order with the same noise. What counts is measured on 3-D icons of 90 nouns that no run
has seen, at five timesteps, from noise that is the same for all arms (the pilot is measured on 30 others):

    error    mean of |out − n|², the network's own loss, over all timesteps and over those in the term's window
    U        what the errors of different images have in common, |P_b E[x̂0 − x0]|²/D_b without bias, by band
    z        U in units of its spread if images had nothing in common
    slope γ  <P_b x0, P_b x̂0> / |P_b x̂0|²; 1 is right, below 1 the band is overdrawn, above 1 it is too faint

Writes results.json, tables.md and frequency.png into --out, one folder a run beside them. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import ROOT
from experiments.frequency.arms import ARMS, GAIN, GAINS, STYLED, Flags, flags, pilot_cases
from experiments.frequency.results import DRAWS, TIMESTEPS, Results, pages, read, summary
from experiments.seeds import save
from trainkit.errors import Problem, exit_with_message, refuse

TRAINER = ROOT / "train_text_to_image_lora.py"
STEPS, PILOT_SEED = 300, 100


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cases = pilot_cases() if args.pilot else {name: flags(ARMS[name].flags, args.gain) for name in args.arms}
    plans = {(name, seed): plan_of(case | {"seed": seed, "max_train_steps": args.steps}, pilot=args.pilot)
             for seed in args.seeds for name, case in cases.items()}
    refuse(others(args.out, plans))

    from experiments.frequency.exam import Exam

    exam = Exam(pilot=args.pilot)
    for (name, seed), plan in plans.items():
        folder = args.out / f"{name}-seed{seed}"
        if not (folder / "result.json").is_file():
            train(plan["flags"], folder)
            save(folder / "result.json", vars(exam.result(folder, plan, styled=name in STYLED)))
        print(f"{name:13} seed {seed}  {summary(read(folder))}", flush=True)
    if not (args.out / "untrained.json").is_file():
        save(args.out / "untrained.json", exam.bins(None))
    results = {name: [read(args.out / f"{name}-seed{seed}") for seed in args.seeds] for name in cases}
    report(args, results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of every arm")
    add("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    add("--gain", type=float, default=GAIN, help=f"of the unbiased form (default: {GAIN}, chosen by --pilot)")
    add("--pilot", action="store_true", help=f"gains {', '.join(GAINS)} in mode combo on seed {PILOT_SEED} instead, "
        "measured on other images")
    add("--out", type=Path, default=ROOT / "runs/frequency", metavar="DIR", help="one folder a run")
    add("--debug", action="store_true", help="show a traceback for user errors")
    args = parser.parse_args(argv)
    if args.pilot:
        args.seeds, args.out = [PILOT_SEED], args.out / "pilot"
    return args


def plan_of(case: Flags, *, pilot: bool) -> dict[str, object]:
    """All that decides a result."""
    return {"flags": case, "images": "pilot" if pilot else "held out", "timesteps": list(TIMESTEPS), "draws": DRAWS}


def others(out: Path, plans: Mapping[tuple[str, int], dict[str, object]]) -> Iterator[Problem]:
    """Results in --out of runs with other arguments, which no table may mix."""
    for (name, seed), plan in plans.items():
        folder = out / f"{name}-seed{seed}"
        found = read(folder).asked if (folder / "result.json").is_file() else plan
        if found != plan:
            old, new = (flat(what) for what in (found, plan))
            differ = [f"{key} {old.get(key)}, now {new.get(key)}" for key in {**old, **new}
                      if old.get(key) != new.get(key)]
            yield Problem(f"{folder.name} is finished, with other arguments", f"--out {out}", "; ".join(differ),
                          "name another --out, or give these arguments")


def flat(what: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in what.items() if key != "flags"} | what["flags"]


def train(case: Flags, folder: Path) -> None:
    """Run the trainer, or go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in case.items()]
    with (folder / "training.log").open("ab") as log:
        code = subprocess.run([sys.executable, str(TRAINER), *given, f"--output_dir={folder.resolve()}"], cwd=ROOT,
                              stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"frequency: {folder.name} ended with exit code {code}; see {folder / 'training.log'}")


def report(args: argparse.Namespace, results: Results) -> None:
    """results.json, tables.md and the figure; tables are printed, too."""
    untrained = json.loads((args.out / "untrained.json").read_text("utf-8"))
    save(args.out / "results.json", {"untrained": untrained,
                                     "arms": {name: [vars(r) for r in found] for name, found in results.items()}})
    text = "\n".join(pages(results, untrained, pilot=args.pilot))
    (args.out / "tables.md").write_text(text + "\n", "utf-8")
    print(text)
    if not args.pilot and "base" in results:
        from experiments.frequency.chart import image

        image(results, args.steps).save(args.out / "frequency.png")
        print(f"\nfigure: {args.out / 'frequency.png'}")


if __name__ == "__main__":
    exit_with_message(main)
