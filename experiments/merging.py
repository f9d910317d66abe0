#!/usr/bin/env python
"""Which way of merging a subject LoRA and a style LoRA keeps both? Three seeds on the small SDXL model.

    .venv/bin/python experiments/merging.py --out runs/merging          resumes: what is finished is not made again

The subject is one Noto icon of a giraffe, trained as "icon of a sks" for 150 steps. The style is that of the 22 icons
of assets/icons-3d, trained for 300 steps. Each seed trains both anew; then every method merges them. Measured on
images from noise that is the same for all methods:

    subject   "icon of a sks": cosine to the training image in the small CLIP, 0 % the base, 100 % the subject LoRA
    style     ten nouns that were not taught: cosine to the style LoRA's alone image from the same noise, 0 % the base
    together  "3d icon in the style of TOK, a sks": cosine to the real 3-D icon of a giraffe, which neither LoRA saw

Prints the table of docs/merging.md, and writes it as tables.md; merging.png shows the images of seed 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import ROOT
from experiments.seeds import save
from trainkit.errors import exit_with_message

TRAINER = ROOT / "train_dreambooth_lora_sdxl_advanced.py"
BASE = ROOT / "assets/tiny-sdxl-icons"
STYLE, REFERENCE = ROOT / "assets/icons-3d", ROOT / "assets/icons-3d-reference"
SUBJECT, REAL = ROOT / "assets/icons-class/giraffe.png", REFERENCE / "giraffe.png"
SUBJECT_PROMPT, STYLE_PROMPT = "icon of a sks", "3d icon in the style of TOK"
BOTH_PROMPT = f"{STYLE_PROMPT}, a sks"
SEEDS, NOUNS, COPIES, DENOISING_STEPS, GUIDANCE = 3, 10, 8, 8, 4.0
COMMON = (f"--pretrained_model_name_or_path={BASE}", "--resolution=64", "--train_batch_size=3", "--cache_latents",
          "--random_flip", "--lr_warmup_steps=0", "--report_to=none", "--checkpointing_steps=1000", "--rank=8",
          "--lora_layers=all-linear", "--learning_rate=1e-3", "--adam_beta2=0.99")
ZIP = (f"--base={BASE}", f"--subject_prompt={SUBJECT_PROMPT}", f"--style_prompt={STYLE_PROMPT}")
METHODS: Mapping[str, tuple[str, ...]] = {  # name in the table -> strength of both, and flags of merge_loras
    "`concat`, strength 1": ("1", "--method=concat"),
    "`concat`, strength 0.5": ("0.5", "--method=concat"),
    "`svd`, rank 8": ("1", "--method=svd", "--rank=8"),
    "`ties`": ("1", "--method=ties"),
    "`dare_linear`": ("1", "--method=dare_linear"),
    "`ziplora`, with the images": ("1", "--method=ziplora", *ZIP, "--subject_images={subject}",
                                   f"--style_images={STYLE}"),
}
MEASURES = ("subject", "style", "together")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/merging", metavar="DIR", help="one folder a LoRA")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0, 1, …")
    parser.add_argument("--debug", action="store_true", help="show a traceback for user errors")
    args = parser.parse_args(argv)
    (args.out / "subject-images").mkdir(parents=True, exist_ok=True)
    shutil.copy(SUBJECT, args.out / "subject-images")
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name, lora in loras(args.out, seed).items():
            found = measured(args.out, seed, name, lora)
            results.setdefault(name, []).append(found)
            print(f"seed {seed}  {name:28} " + "  ".join(f"{key} {found[key]:.3f}" for key in MEASURES), flush=True)
    text = "\n".join(table(results))
    (args.out / "tables.md").write_text(f"{text}\n", "utf-8")
    print(text)
    page(args.out, list(results)).save(args.out / "merging.png")


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


# ----------------------------------------------------------------------------------------------------------------------
# LoRAs


def loras(out: Path, seed: int) -> dict[str, Path | None]:
    """What is measured, by its name in the table: the base, both LoRAs alone, and each merged one."""
    from trainkit.tools import merge_loras

    subject = trained(out / f"subject-seed{seed}", seed, 150, f"--instance_data_dir={out / 'subject-images'}",
                      f"--instance_prompt={SUBJECT_PROMPT}")
    style = trained(out / f"style-seed{seed}", seed, 300, f"--dataset_name={STYLE}", "--caption_column=text",
                    f"--instance_prompt={STYLE_PROMPT}")
    found: dict[str, Path | None] = {"the base model": None, "the subject LoRA alone": subject,
                                     "the style LoRA alone": style}
    for name, (strength, *flags) in METHODS.items():
        file = out / f"{slug(name)}-seed{seed}.safetensors"
        if not file.is_file():
            merge_loras.main([f"{subject}:{strength}", f"{style}:{strength}", f"--out={file}", f"--seed={seed}",
                              *(flag.format(subject=out / "subject-images") for flag in flags)])
        found[name] = file
    return found


def trained(folder: Path, seed: int, steps: int, *flags: str) -> Path:
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        with (folder / "training.log").open("wb") as log:
            subprocess.run([sys.executable, str(TRAINER), *COMMON, *flags, f"--max_train_steps={steps}",
                            f"--seed={seed}", f"--output_dir={folder.resolve()}"], cwd=ROOT, stdout=log, stderr=log,
                           check=True)
    return file


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def measured(out: Path, seed: int, name: str, lora: Path | None) -> dict[str, float]:
    """Mean cosines in the small CLIP, remembered; and the images that the figure shows."""
    from experiments.learning.exam import drift, row_of

    label = f"{slug(name)}-seed{seed}" if lora else "base"
    path = out / f"{label}-seed{seed}.json"
    if not path.is_file():
        images = images_of(lora)
        alone, both, style = images[:COPIES], images[COPIES : 2 * COPIES], images[2 * COPIES :]
        wanted = images_of(out / f"style-seed{seed}/pytorch_lora_weights.safetensors")[2 * COPIES :]
        row_of([*alone[:3], *both[:5], *style[:5]]).save(out / f"{label}.png")
        shown, real = (opened(file) for file in (SUBJECT, REAL))
        save(path, {"subject": 1 - drift(alone, [shown] * COPIES), "together": 1 - drift(both, [real] * COPIES),
                    "style": 1 - drift(style, wanted)})
    return json.loads(path.read_text("utf-8"))


@cache
def images_of(lora: Path | None):  # type: ignore[no-untyped-def]
    """The images of all prompts: the subject's, both together, the style's."""
    from trainkit.tools.evaluate import Wanted

    return generated(lora, [*(Wanted("sks", prompt, copy) for prompt in (SUBJECT_PROMPT, BOTH_PROMPT)
                              for copy in range(COPIES)),
                            *(Wanted(real.noun, real.caption, 0) for real in references())])


def opened(file: Path):  # type: ignore[no-untyped-def]
    from trainkit.tools import evaluate

    return evaluate.opened(file)


@cache
def references():  # type: ignore[no-untyped-def]
    """Every eleventh real icon of the style."""
    from trainkit.tools.evaluate import read_reference

    return [real for real in read_reference(REFERENCE) if real.noun != "giraffe"][::11][:NOUNS]


def generated(lora: Path | None, wanted):  # type: ignore[no-untyped-def]
    from trainkit.tools.evaluate import GenerationSettings, generate

    settings = GenerationSettings(str(BASE), lora=lora, strengths=(1.0,) if lora else (0.0,), steps=DENOISING_STEPS,
                                  guidance_scale=GUIDANCE)
    _, images = next(generate(settings, wanted))
    return images


# ----------------------------------------------------------------------------------------------------------------------
# Report


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A row a method: the mean, and each seed in brackets."""
    base, subject, style = (results[f"the {name}"] for name in ("base model", "subject LoRA alone",
                                                                "style LoRA alone"))
    lines = ["| | subject kept, % | style kept, % | together, cosine |", "|---|---|---|---|"]
    for name, found in results.items():
        kept = [100 * (one["subject"] - b["subject"]) / (s["subject"] - b["subject"])
                for one, b, s in zip(found, base, subject, strict=True)]
        styled = [100 * (one["style"] - b["style"]) / (s["style"] - b["style"])
                  for one, b, s in zip(found, base, style, strict=True)]
        cells = [entry(kept, 0), entry(styled, 0), entry([one["together"] for one in found], 3)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def entry(values: Sequence[float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"**{statistics.mean(values):.{digits}f}** ({each})"


def page(out: Path, names: Sequence[str]):  # type: ignore[no-untyped-def]
    """The images of seed 0, a row each."""
    from PIL import Image

    from trainkit.sheets import sheet

    rows = []
    for name in names:
        file = Image.open(out / ("base.png" if name == "the base model" else f"{slug(name)}-seed0.png"))
        rows.append([file.crop((x, 0, x + file.height, file.height)) for x in range(0, file.width, file.height)])
    nouns = [real.noun for real in references()[:5]]
    columns = [*["icon of a sks"] * 3, *["3d …, a sks"] * 5, *nouns]
    return sheet(rows, columns=columns, names=[name.replace("`", "") for name in names],
                 title="A subject LoRA (a Noto giraffe as sks) and a style LoRA (3-D icons), seed 0")


if __name__ == "__main__":
    exit_with_message(main)
