#!/usr/bin/env python
"""Does a method help? Train with and without it on the shipped model, three seeds each, and measure both.

    python scripts/learning.py                          every case; resumes: what is finished is not run again
    python scripts/learning.py --cases lora4 dora4 --steps 50 --out runs/quick

Each case is the same short run on the 22 shipped 3-D icons but for the flags in CASES. Two numbers a run, both on
pictures drawn at strength 1 from noise that is the same for all runs:

    gap closed   share of the style distance between the base and real icons that is gone, on nouns it was not taught
    prior drift  mean of 1 − cos(picture with the LoRA, the base's own) in the shipped CLIP, over prompts for one of the
                 base's own styles, which the LoRA should leave alone (nouns that no class picture shows)

Prints the tables of docs/learning.md; results lie in --out, one folder a run. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainkit.errors import Problem, exit_with_message, refuse  # noqa: E402

if TYPE_CHECKING:
    from PIL.Image import Image

TRAINER = ROOT / "train_dreambooth_lora_sdxl_advanced.py"
BASE = ROOT / "assets/tiny-sdxl-icons"
CLASS = ROOT / "assets/icons-class"
CLIP = ROOT / "assets/tiny-clip-icons"
DRIFT_PROMPTS = 50
STEPS, DENOISING_STEPS = 300, 10  # defaults of the arguments

COMMON = (
    f"--pretrained_model_name_or_path={BASE}", f"--dataset_name={ROOT / 'assets/icons-3d'}", "--caption_column=text",
    "--instance_prompt=3d icon in the style of TOK", "--resolution=64", "--train_batch_size=3", "--cache_latents",
    "--random_flip", "--lr_warmup_steps=0", "--report_to=none", "--checkpointing_steps=100",
    "--checkpoints_total_limit=1", "--resume_from_checkpoint=latest",
)
ADAMW = ("--learning_rate=1e-3", "--adam_beta2=0.99")
PRODIGY = ("--optimizer=prodigy", "--learning_rate=1", "--adam_beta2=0.99", "--adam_weight_decay=0.01")
RANK_8 = ("--rank=8", "--lora_layers=all-linear")
TOKENS = ("--train_text_encoder_ti", "--text_encoder_lr=1e-3")
PRIOR = ("--with_prior_preservation", f"--class_data_dir={CLASS}", "--class_prompt=icon", "--num_class_images=48")

CASES: dict[str, tuple[str, ...]] = {
    "lora": (*RANK_8, *ADAMW),
    "ti": (*RANK_8, *ADAMW, *TOKENS),
    "prior": (*RANK_8, *ADAMW, *PRIOR),
    "prodigy": (*RANK_8, *PRODIGY),
    "edm": (*RANK_8, *ADAMW, "--do_edm_style_training"),
    "snr": (*RANK_8, *ADAMW, "--snr_gamma=5"),
    "lora4": ("--rank=4", *ADAMW),
    "dora4": ("--rank=4", *ADAMW, "--use_dora"),
}
COMPARISONS = (  # title, without, with
    ("Pivotal tuning: two new tokens beside the LoRA, in the first half of the steps", "lora", "ti"),
    ("DoRA at rank 4, attention layers", "lora4", "dora4"),
    ("Prior preservation with 48 real class pictures", "lora", "prior"),
    ("Prodigy for AdamW", "lora", "prodigy"),
    ("EDM noise levels and weights on this ε model", "lora", "edm"),
    ("Min-SNR, γ 5", "lora", "snr"),
)


@dataclass(frozen=True)
class Result:
    """What one run came to, and what it was asked for: files of the first runs, all at the defaults, do not say."""

    gap_closed: float
    prior_drift: float
    seconds: float  # of training, start-up included
    steps: int = STEPS
    denoising_steps: int = DENOISING_STEPS


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(others(args))
    exam = Exam(args)
    for seed in range(args.seeds):
        for case in args.cases:
            folder = args.out / f"{case}-seed{seed}"
            if not (folder / "result.json").is_file():
                seconds = train(case, seed, args.steps, folder)
                result = exam.result(folder, seconds)
                (folder / "result.json").write_text(json.dumps(vars(result)) + "\n", "utf-8")
            print(f"{case:14} seed {seed}  {read(folder)}", flush=True)
    print("\n".join(tables(args)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--seeds", type=int, default=3, help="seeds 0, 1, … of every case")
    add("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    add("--denoising_steps", type=int, default=DENOISING_STEPS, help="of every picture drawn")
    add("--out", type=Path, default=ROOT / "runs/learning", metavar="DIR", help="one folder a run")
    add("--debug", action="store_true", help="show a traceback for user errors")
    return parser.parse_args(argv)


def others(args: argparse.Namespace) -> Iterator[Problem]:
    """Results in --out of runs with other arguments, which no table may mix."""
    folders = [args.out / f"{case}-seed{seed}" for seed in range(args.seeds) for case in args.cases]
    for folder in folders:
        found = read(folder) if (folder / "result.json").is_file() else None
        if found and (found.steps, found.denoising_steps) != (args.steps, args.denoising_steps):
            yield Problem(f"{folder.name} is finished, with other arguments", f"--out {args.out}",
                          f"it had --steps {found.steps} --denoising_steps {found.denoising_steps}",
                          "name another --out, or give these arguments")


def train(case: str, seed: int, steps: int, folder: Path) -> float:
    """Run the trainer, or go on with it -> seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, str(TRAINER), *COMMON, *CASES[case], f"--max_train_steps={steps}", f"--seed={seed}",
            f"--output_dir={folder}"]
    started = time.monotonic()
    with (folder / "training.log").open("ab") as log:
        code = subprocess.run(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"learning: {case}, seed {seed} ended with exit code {code}; see {folder / 'training.log'}")
    return time.monotonic() - started


class Exam:
    """The pictures every run is judged by; those of the base are drawn once."""

    def __init__(self, args: argparse.Namespace):
        self.steps, self.denoising_steps = args.steps, args.denoising_steps

    def result(self, folder: Path, seconds: float) -> Result:
        style = self.pictures(folder, self.style_prompts)
        distance = self.distance(style)
        self.sheet(folder, style)
        return Result(gap_closed=(self.base_distance - distance) / (self.base_distance - self.floor),
                      prior_drift=drift(self.pictures(folder, self.prior_prompts), self.base_prior), seconds=seconds,
                      steps=self.steps, denoising_steps=self.denoising_steps)

    def distance(self, pictures: Sequence[Image]) -> float:
        """Style distance to the real icons."""
        from trainkit.evaluation import style_distance

        return style_distance(pictures, self.real, CLIP)

    @cached_property
    def evaluate(self):
        """The evaluation script, whose drawing is used here."""
        from scripts import evaluate

        return evaluate

    @cached_property
    def reference(self) -> list:
        return self.evaluate.read_reference(self.evaluate.ASSETS / "icons-3d-reference")

    @cached_property
    def real(self) -> list[Image]:
        return [self.evaluate.opened(real.path) for real in self.reference]

    @cached_property
    def floor(self) -> float:
        return self.distance([self.evaluate.opened(p) for p in self.evaluate.pictures_in(ROOT / "assets/icons-3d")])

    @cached_property
    def base_distance(self) -> float:
        return self.distance(self.pictures(None, self.style_prompts))

    @cached_property
    def base_prior(self) -> list[Image]:
        return self.pictures(None, self.prior_prompts)

    @property
    def style_prompts(self) -> list:
        return self.evaluate.enough(self.reference, None)

    @property
    def prior_prompts(self) -> list:
        taught = {json.loads(line)["noun"] for line in (CLASS / "metadata.jsonl").read_text("utf-8").splitlines()}
        others = [real for real in self.reference if real.noun not in taught][:DRIFT_PROMPTS]
        named = {real.noun: real.caption.partition(", ")[2] for real in others}  # "a cat"
        return [self.evaluate.Wanted(noun, f"icon of {name} in the style of noto", 0) for noun, name in named.items()]

    def pictures(self, folder: Path | None, wanted: list) -> list[Image]:
        """Drawn with the LoRA (and embeddings) in `folder`; None: by the base alone."""
        lora = (folder or ROOT) / "pytorch_lora_weights.safetensors"
        line = ["--base", str(BASE), "--lora", str(lora), "--out", str(lora.parent / "evaluation"),
                "--steps", str(self.denoising_steps)]
        embeddings = lora.parent / f"{lora.parent.name}_emb.safetensors"
        args = self.evaluate.parse([*line, *(["--embeddings", str(embeddings)] if embeddings.is_file() else [])])
        args.strengths = (1.0,) if folder else (0.0,)
        return next(pictures for _, pictures in self.evaluate.draw(args, wanted))

    def sheet(self, folder: Path, style: list[Image]) -> None:
        """Ten untaught nouns, to be looked at."""
        from trainkit.preview import sheet

        step = len(self.style_prompts) // 10
        shown = range(0, 10 * step, step)
        page = sheet([[style[i] for i in shown]], columns=[self.style_prompts[i].noun for i in shown],
                     names=[folder.name], title="untaught nouns")
        page.save(folder / "untaught.png")


def drift(pictures: list[Image], base: list[Image]) -> float:
    """Mean over pairs of 1 − cosine of their vectors in the shipped CLIP."""
    import torch

    from trainkit.evaluation import load_clip, to_pixels

    model, mean, std = load_clip(CLIP)
    side = model.config.vision_config.image_size
    with torch.no_grad():
        a, b = (model.get_image_features(to_pixels(some, side, mean, std)) for some in (pictures, base))
    a, b = (getattr(x, "pooler_output", x) for x in (a, b))
    return float((1 - torch.nn.functional.cosine_similarity(a, b)).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def read(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text("utf-8")))


def tables(args: argparse.Namespace) -> Iterator[str]:
    """The tables of docs/learning.md, a row a case, for the comparisons both of whose cases were run."""
    for title, without, with_it in COMPARISONS:
        if {without, with_it} <= set(args.cases):
            yield f"\n### {title}\n"
            yield "| case | gap closed, % | prior drift | seconds a run |\n|---|---|---|---|"
            for case in (without, with_it):
                results = [read(args.out / f"{case}-seed{seed}") for seed in range(args.seeds)]
                yield row(case, results)


def row(case: str, results: Sequence[Result]) -> str:
    closed, drifts = ([getattr(r, name) for r in results] for name in ("gap_closed", "prior_drift"))
    seconds = statistics.median(r.seconds for r in results)
    return (f"| {case} | {spread([100 * c for c in closed], '.0f')} | {spread(drifts, '.3f')} | {seconds:.0f} |")


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and every seed's value."""
    return f"**{statistics.mean(values):{form}}** ({', '.join(format(v, form) for v in values)})"


if __name__ == "__main__":
    exit_with_message(main)
