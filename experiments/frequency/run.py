#!/usr/bin/env python
"""Does distribution matching by frequency help? Train with and without it on the shipped model and look at the errors.

    python scripts/frequency.py                         every arm; resumes: what is finished is not run again
    python scripts/frequency.py --pilot                 gains to choose --gain from, on a seed and pictures of their own
    python scripts/frequency.py --arms base combo --seeds 0 --steps 50 --out runs/quick

Each arm is the same short run on the 22 shipped 3-D icons but for the flags in ARMS; with one seed every arm sees the
same pictures in the same order with the same noise. What counts is measured on 3-D icons of 90 nouns that no run has
seen, at five timesteps, from noise that is the same for all arms (the pilot is measured on 30 others):

    error    mean of |out − n|², the network's own loss, over all timesteps and over those in the term's window
    U        what the errors of different pictures have in common, |P_b E[x̂0 − x0]|²/D_b without bias, by band
    z        U in units of its spread if pictures had nothing in common
    slope γ  <P_b x0, P_b x̂0> / |P_b x̂0|²; 1 is right, below 1 the band is overdrawn, above 1 it is too faint

Writes results.json, tables.md and frequency.png into --out, one folder a run beside them. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainkit.errors import Problem, exit_with_message, refuse  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from scripts.evaluate import Real
    from scripts.frequency_chart import Panel
    from trainkit.families import Family

TRAINER = ROOT / "train_text_to_image_lora.py"
BASE, CONCEPT, REFERENCE = "assets/tiny-sd-icons", "assets/icons-3d", "assets/icons-3d-reference"
CLIP = "assets/tiny-clip-icons"
LORA_FILE = "pytorch_lora_weights.safetensors"
STEPS, GAIN = 300, 0.3
VANISHING = "1e-12"  # a term so small that what the arm shows is what it is compared with
GAINS, PILOT_SEED, PILOT_EVERY = ("0.03", "0.1", "0.3", "1", "3"), 100, 4

Flags = dict[str, str | int | float | bool]

COMMON: Flags = {
    "pretrained_model_name_or_path": BASE, "train_data_dir": CONCEPT, "resolution": 64, "rank": 4,
    "train_batch_size": 4, "cache_latents": True, "learning_rate": 1e-3, "adam_beta2": 0.99, "lr_warmup_steps": 0,
    "snr_gamma": 5, "report_to": "none", "checkpointing_steps": 100, "checkpoints_total_limit": 1,
    "resume_from_checkpoint": "latest",
}
SUM_FORM: Flags = {"dist_match_mode": "extra", "dist_match_method": "wavelet"}


@dataclass(frozen=True)
class Arm:
    """One way to train. `pictures` go through the network in a step; "{gain}" in a flag is --gain."""

    says: str
    pictures: int
    flags: Flags


ARMS: dict[str, Arm] = {
    "base": Arm("no term", 4, {}),
    "base8": Arm("no term, batch 8", 8, {"train_batch_size": 8}),
    "more-data": Arm("second pass as ordinary data", 8, {"dist_match_gain": VANISHING, "dist_match_mode": "combo"}),
    "per-sample": Arm("per-sample band loss, λ 0.03", 8,
                      SUM_FORM | {"dist_match": 0.03, "dist_match_statistic": "diagonal"}),
    "sum-0.003": Arm("sum form, λ 0.003", 8, SUM_FORM | {"dist_match": 0.003}),
    "sum-0.03": Arm("sum form, λ 0.03", 8, SUM_FORM | {"dist_match": 0.03}),
    "u": Arm("unbiased form alone", 8, {"dist_match_gain": "{gain}", "dist_match_mode": "extra"}),
    "combo": Arm("unbiased form, combo", 8, {"dist_match_gain": "{gain}", "dist_match_mode": "combo"}),
    "swap-control": Arm("swap without a term", 4, {"dist_match_gain": VANISHING, "dist_match_mode": "swap"}),
    "swap": Arm("unbiased form, swap", 4, {"dist_match_gain": "{gain}", "dist_match_mode": "swap"}),
    "bank": Arm("unbiased form, combo, bank 0.9", 8,
                {"dist_match_gain": "{gain}", "dist_match_mode": "combo", "dist_match_bank": 0.9}),
    "reuse": Arm("unbiased form, reuse", 4, {"dist_match_gain": "{gain}", "dist_match_mode": "reuse"}),
    "wavelet": Arm("unbiased form, combo, db3 with zeros", 8,
                   {"dist_match_gain": "{gain}", "dist_match_mode": "combo", "dist_match_method": "wavelet"}),
}
CONTRASTS = (  # question, arm, control
    ("sum form: is it the sum?", "sum-0.03", "per-sample"),
    ("unbiased form for sum form", "u", "sum-0.03"),
    ("combo for the same pass as data", "combo", "more-data"),
    ("combo for a doubled batch", "combo", "base8"),
    ("swap: is it the term?", "swap", "swap-control"),
    ("bank beside combo", "bank", "combo"),
    ("reuse for nothing", "reuse", "base"),
    ("wavelet for DCT", "wavelet", "combo"),
)
SHOWN = ("base", "more-data", "sum-0.03", "combo", "swap")  # in the figure and the table by timestep
STYLED = ("base", "more-data", "combo", "swap")  # arms of which pictures are drawn, too

TIMESTEPS, DRAWS, AT_ONCE = (100, 250, 400, 550, 750), 2, 30
WINDOW = tuple(t for t in TIMESTEPS if 200 <= t < 600)
BANDS, KINDS = ("low", "high"), ("error", "u", "z", "slope")
DENOISING_STEPS = 10
METRICS = {  # heading -> column of a bin, timesteps it is averaged over
    "error": ("error", TIMESTEPS), "error, window": ("error", WINDOW),
    "U low": ("u_low", WINDOW), "U high": ("u_high", WINDOW),
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds

Bin = dict[str, float]  # timestep, error of the network's output and, for x0, each of KINDS in each of BANDS


@dataclass(frozen=True)
class Result:
    """What one run came to, and what it was asked for: tables never mix runs of other arguments."""

    asked: dict[str, object]
    bins: list[Bin]
    seconds: float  # a step, median
    telemetry: dict[str, float]  # means of what the term logged
    style_distance: float | None = None

    def mean(self, column: str, timesteps: Sequence[int]) -> float:
        return statistics.mean(row[column] for row in self.bins if row["timestep"] in timesteps)


Results = dict[str, list[Result]]  # by arm, one a seed


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cases = pilot_cases() if args.pilot else {name: flags(ARMS[name].flags, args.gain) for name in args.arms}
    plans = {(name, seed): asked(case | {"seed": seed, "max_train_steps": args.steps}, pilot=args.pilot)
             for seed in args.seeds for name, case in cases.items()}
    refuse(others(args.out, plans))
    exam = Exam(pilot=args.pilot)
    for (name, seed), plan in plans.items():
        folder = args.out / f"{name}-seed{seed}"
        if not (folder / "result.json").is_file():
            train(plan["flags"], folder)
            save(folder / "result.json", vars(exam.result(folder, plan, styled=name in STYLED)))
        print(f"{name:13} seed {seed}  {line(read(folder))}", flush=True)
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
        "measured on other pictures")
    add("--out", type=Path, default=ROOT / "runs/frequency", metavar="DIR", help="one folder a run")
    add("--debug", action="store_true", help="show a traceback for user errors")
    args = parser.parse_args(argv)
    if args.pilot:
        args.seeds, args.out = [PILOT_SEED], args.out / "pilot"
    return args


def flags(own: Flags, gain: float) -> Flags:
    """The trainer's flags of an arm."""
    return COMMON | {name: value.format(gain=f"{gain:g}") if isinstance(value, str) else value
                     for name, value in own.items()}


def pilot_cases() -> dict[str, Flags]:
    """The control, then a case a gain."""
    combo = {f"gain-{gain}": flags(ARMS["combo"].flags, float(gain)) for gain in GAINS}
    return {"more-data": flags(ARMS["more-data"].flags, GAIN)} | combo


def asked(case: Flags, *, pilot: bool) -> dict[str, object]:
    """All that decides a result."""
    return {"flags": case, "pictures": "pilot" if pilot else "held out", "timesteps": list(TIMESTEPS), "draws": DRAWS}


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


def save(path: Path, data: object) -> None:
    """Whole or not there: a run that is killed here is measured again."""
    from trainkit.files import write_json

    write_json(path, data)


def read(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text("utf-8")))


# ----------------------------------------------------------------------------------------------------------------------
# A run


def train(case: Flags, folder: Path) -> None:
    """Run the trainer, or go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in case.items()]
    with (folder / "training.log").open("ab") as log:
        code = subprocess.run([sys.executable, str(TRAINER), *given, f"--output_dir={folder.resolve()}"], cwd=ROOT,
                              stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"frequency: {folder.name} ended with exit code {code}; see {folder / 'training.log'}")


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def seconds_a_step(rows: Sequence[Mapping[str, float]]) -> float:
    """Median of the time from one step to the next."""
    times = [row["seconds"] for row in rows]
    return statistics.median(after - before for before, after in zip(times, times[1:], strict=False))


def telemetry(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what the term logged, over the steps that have it."""
    names = sorted({name for row in rows for name in row if name.startswith("dist_match/")})
    return {name: statistics.mean(row[name] for row in rows if row.get(name) is not None) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Measurement


class Exam:
    """The held-out pictures, and what a network has wrong on them."""

    def __init__(self, *, pilot: bool):
        self.pilot = pilot

    def result(self, folder: Path, plan: dict[str, object], *, styled: bool) -> Result:
        rows = rows_of(folder)
        return Result(asked=plan, bins=self.bins(folder), seconds=seconds_a_step(rows), telemetry=telemetry(rows),
                      style_distance=self.style_distance(folder) if styled and not self.pilot else None)

    def bins(self, folder: Path | None) -> list[Bin]:
        """Of the network with the LoRA in `folder`; None: of the base model alone."""
        import torch

        with torch.no_grad(), with_lora(self.family.unet, folder):
            return [self.bin(timestep) for timestep in TIMESTEPS]

    def bin(self, timestep: int) -> Bin:
        """Every held-out picture at one timestep, DRAWS times with other noise.

        U is of the pictures of one draw: two draws of a picture share what is the picture's own. Means over draws.
        """
        from freq_loss import DistributionMatchingLoss

        meter = DistributionMatchingLoss(gain=1.0, band_norm="dof")  # in units of x0
        errors = []
        for draw in range(DRAWS):
            error, x0_hat, snr = self.answer(timestep, draw)
            errors.append(error)
            meter(x0_hat, self.x0, snr=snr, weight=snr.new_ones(len(snr)))
        found = meter.describe()
        return {"timestep": timestep, "error": statistics.mean(errors)} | {
            f"{kind}_{band}": found[f"dist_match/{kind}_{band}"] for kind in KINDS for band in BANDS}

    def answer(self, timestep: int, draw: int) -> tuple[float, Tensor, Tensor]:
        """What the network says of every picture -> mean |out − n|², x̂0 [N,C,h,w], snr [N]."""
        import torch

        from trainkit import rng

        schedule, prediction = self.family.schedule, self.family.schedule.prediction
        level = schedule.level(torch.full((len(self.x0),), timestep))
        keys = [("frequency", real.noun, timestep, draw) for real in self.reference]
        n = rng.normal(self.x0.shape[1:], keys, "held out")
        z = prediction.add_noise(self.x0, n, level)
        out = self.network(z, timestep)
        error = (out - prediction.target(self.x0, n, level)).square().mean()
        return float(error), prediction.to_x0(out, z, level), level.snr

    def network(self, z: Tensor, timestep: int) -> Tensor:
        """The network's output for z [N,C,h,w], AT_ONCE pictures at a time."""
        import torch

        embeds, pooled = self.text
        outs = []
        for start in range(0, len(z), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            level = self.family.schedule.level(torch.full((len(z[some]),), timestep))
            outs.append(self.family.denoise(z[some], level, text=(embeds[some], pooled[some]),
                                            time_ids=torch.zeros(len(z[some]), 6)))
        return torch.cat(outs)

    @cached_property
    def evaluate(self):
        """The evaluation script, whose reading and drawing are used here."""
        from scripts import evaluate

        return evaluate

    @cached_property
    def reference(self) -> list[Real]:
        """Held-out pictures; every PILOT_EVERYth is the pilot's."""
        every = self.evaluate.read_reference(ROOT / REFERENCE)
        return [real for i, real in enumerate(every) if (i % PILOT_EVERY == 0) == self.pilot]

    @cached_property
    def family(self) -> Family:
        """The base model as the trainer loads it."""
        import torch

        from trainkit import families
        from trainkit.options import ModelOptions

        options = ModelOptions(pretrained_model_name_or_path=str(ROOT / BASE))
        return families.of(options).load(options, device=torch.device("cpu"), weight_dtype=torch.float32)

    @cached_property
    def x0(self) -> Tensor:
        """Clean latents, the means of the VAE's posteriors -> [N,C,h,w]."""
        from trainkit.evaluation import to_pixels

        pixels = to_pixels([self.evaluate.opened(real.path) for real in self.reference], COMMON["resolution"])
        mean, _ = self.family.encode_pixels(pixels)
        return self.family.to_latents(mean)

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            return self.family.encode_prompts([real.caption for real in self.reference])

    def style_distance(self, folder: Path) -> float:
        """Of pictures drawn with the LoRA to the real ones, as scripts/learning.py takes it."""
        from trainkit.evaluation import style_distance

        every = self.evaluate.read_reference(ROOT / REFERENCE)
        line = ["--base", str(ROOT / BASE), "--lora", str(folder / LORA_FILE), "--out", str(folder / "evaluation"),
                "--steps", str(DENOISING_STEPS)]
        args = self.evaluate.parse(line)
        args.strengths = (1.0,)
        _, pictures = next(self.evaluate.draw(args, self.evaluate.enough(every, None)))
        return style_distance(pictures, [self.evaluate.opened(real.path) for real in every], ROOT / CLIP)


@contextmanager
def with_lora(unet: nn.Module, folder: Path | None) -> Iterator[None]:
    """The run's Diffusers file in the network inside, by Diffusers' own loading."""
    if folder is None:
        yield
        return
    unet.load_lora_adapter(str(folder), weight_name=LORA_FILE, prefix="unet")
    try:
        yield
    finally:
        unet.unload_lora()


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def change(values: Sequence[float], control: Sequence[float]) -> list[float]:
    """Differences of each seed, in percent of the control's mean (a single U may be near 0, or below)."""
    whole = statistics.mean(control)
    return [100 * (v - c) / abs(whole) for v, c in zip(values, control, strict=True)]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def metric(results: Sequence[Result], heading: str) -> list[float]:
    """One number a seed."""
    return [result.mean(*METRICS[heading]) for result in results]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, in percent."""
    error = standard_error(values)
    return f"{statistics.mean(values):+.2f}" + ("" if error != error else f" ± {error:.2f}")


def main_table(results: Results, control: str) -> Iterator[str]:
    """The control in numbers, then what every arm changes of it, paired by seed."""
    base = results[control]
    yield f"| | pictures a step | seconds a step | {' | '.join(METRICS)} | style distance |"
    yield "|---|---|---|" + "---|" * (len(METRICS) + 1)
    for name, found in results.items():
        if name == control:
            cells = [f"{statistics.mean(metric(base, heading)):.4g}" for heading in METRICS]
        else:
            cells = [f"{spread(change(metric(found, h), metric(base, h)))} %" for h in METRICS]
        seconds = statistics.median(result.seconds for result in found)
        distances = [r.style_distance for r in found if r.style_distance is not None]
        style = f"{statistics.mean(distances):.4f}" if distances else ""
        arm = ARMS.get(name)
        yield (f"| {name}{f': {arm.says}' if arm else ''} | {arm.pictures if arm else ''} | {seconds:.3f} | "
               f"{' | '.join(cells)} | {style} |")


def contrast_table(results: Results) -> Iterator[str]:
    """Arm against control, paired by seed, with 95 % intervals (Student's t); bold where 0 is outside."""
    yield f"| question | arm | against | {' | '.join(METRICS)} |"
    yield "|---|---|---|" + "---|" * len(METRICS)
    for question, arm, control in CONTRASTS:
        if {arm, control} <= results.keys():
            cells = [interval(change(metric(results[arm], h), metric(results[control], h))) for h in METRICS]
            yield f"| {question} | {arm} | {control} | {' | '.join(cells)} |"


def interval(values: Sequence[float]) -> str:
    """Mean in percent and its 95 % interval over seeds."""
    mean, half = statistics.mean(values), half_width(values)
    if half is None:
        return f"{mean:+.2f} %"
    text = f"{mean:+.2f} % [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def half_width(values: Sequence[float]) -> float | None:
    quantile = T_95.get(len(values))
    return None if quantile is None else quantile * standard_error(values)


def bin_table(results: Results, untrained: Sequence[Bin]) -> Iterator[str]:
    """Slope and z of the bands by timestep, means over seeds."""
    shown = {name: results[name] for name in SHOWN if name in results}
    yield f"| timestep | band | untrained | {' | '.join(shown)} |"
    yield "|---|---|---|" + "---|" * len(shown)
    for row in untrained:
        for band in BANDS:
            columns = f"slope_{band}", f"z_{band}"
            cells = ["{:.3f}, {:.1f}".format(*(row[c] for c in columns))]
            cells += ["{:.3f}, {:.1f}".format(*(statistics.mean(r.mean(c, [row["timestep"]]) for r in found)
                                                for c in columns)) for found in shown.values()]
            yield f"| {row['timestep']:.0f} | {band} | {' | '.join(cells)} |"


def telemetry_table(results: Results) -> Iterator[str]:
    """What the term logged, means over steps and seeds."""
    names = sorted({name for found in results.values() for r in found for name in r.telemetry})
    yield f"| | {' | '.join(name.partition('/')[2] for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for arm, found in results.items():
        logged = [[r.telemetry[name] for r in found if name in r.telemetry] for name in names]
        if any(logged):
            cells = [f"{statistics.mean(values):.3g}" if values else "" for values in logged]
            yield f"| {arm} | {' | '.join(cells)} |"


def chosen(results: Results) -> str:
    """The gain of the pilot: of those whose error in the window is not above the control's, the one with the least U.

    U is the mean over bands of U over the control's; if every error is above, the smallest gain.
    """
    def left(name: str) -> float:
        ratios = [metric(results[name], h)[0] / metric(results["more-data"], h)[0] for h in ("U low", "U high")]
        return statistics.mean(ratios)

    allowed = metric(results["more-data"], "error, window")[0]
    gains = [name for name in results if name != "more-data"]
    harmless = [name for name in gains if metric(results[name], "error, window")[0] <= allowed]
    return min(harmless, key=left) if harmless else gains[0]


def report(args: argparse.Namespace, results: Results) -> None:
    """results.json, tables.md and the figure; tables are printed, too."""
    untrained = json.loads((args.out / "untrained.json").read_text("utf-8"))
    save(args.out / "results.json", {"untrained": untrained,
                                     "arms": {name: [vars(r) for r in found] for name, found in results.items()}})
    text = "\n".join(pages(results, untrained, pilot=args.pilot))
    (args.out / "tables.md").write_text(text + "\n", "utf-8")
    print(text)
    if not args.pilot and "base" in results:
        picture(results, args.steps).save(args.out / "frequency.png")
        print(f"\nfigure: {args.out / 'frequency.png'}")


def pages(results: Results, untrained: Sequence[Bin], *, pilot: bool) -> Iterator[str]:
    """All tables that the arms at hand allow."""
    control = "more-data" if pilot else "base"
    if control in results:
        yield f"\n### Change against {control}, same seed: mean ± standard error over seeds\n"
        yield from main_table(results, control)
    if pilot:
        yield f"\nchosen: {chosen(results)}"
        return
    yield "\n### Arm against control\n"
    yield from contrast_table(results)
    yield "\n### Slope γ and z by timestep\n"
    yield from bin_table(results, untrained)
    yield "\n### Logged in training\n"
    yield from telemetry_table(results)


# ----------------------------------------------------------------------------------------------------------------------
# Figure


def picture(results: Results, steps: int) -> Image.Image:
    """Changes of error and U, and the slopes, by timestep: low band above, high band below."""
    from scripts.frequency_chart import figure

    shown = {name: results[name] for name in SHOWN if name in results}
    labels = {name: ARMS[name].says.replace("λ", "lambda") for name in shown}  # the font has no Greek
    return figure([panels(shown, band) for band in BANDS], places=[str(t) for t in TIMESTEPS], labels=labels,
                  below="timestep, the term's window shaded",
                  shaded=(TIMESTEPS.index(WINDOW[0]), TIMESTEPS.index(WINDOW[-1])),
                  title=f"Held-out icons after {steps} steps, against no term; mean and standard error of "
                        f"{len(results['base'])} seeds")


def panels(shown: Results, band: str) -> list[Panel]:
    """One band's row of the figure."""
    from scripts.frequency_chart import Panel

    changed = {column: {name: [point(change(at(found, column, t), at(shown["base"], column, t))) for t in TIMESTEPS]
                        for name, found in shown.items() if name != "base"}
               for column in (f"error_{band}", f"u_{band}")}
    slopes = {name: [point(at(found, f"slope_{band}", t)) for t in TIMESTEPS] for name, found in shown.items()}
    return [Panel(f"{band} band: error of x0, change in %", changed[f"error_{band}"], 0),
            Panel(f"{band} band: U, change in %", changed[f"u_{band}"], 0),
            Panel(f"{band} band: slope", slopes, 1)]


def at(results: Sequence[Result], column: str, timestep: int) -> list[float]:
    return [result.mean(column, [timestep]) for result in results]


def point(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, 0 where there is none."""
    error = standard_error(values)
    return statistics.mean(values), 0.0 if error != error else error


def line(result: Result) -> str:
    """A finished run in a line."""
    return "  ".join([*(f"{heading} {result.mean(*where):.4g}" for heading, where in METRICS.items()),
                      f"{result.seconds:.3f} s a step"])


if __name__ == "__main__":
    exit_with_message(main)
