#!/usr/bin/env python
"""Does a mask keep out what it covers? The left half of every training image is magenta, and a mask covers it.

    .venv/bin/python experiments/masks.py                  twelve runs; resumes: what is finished is not run again
    .venv/bin/python experiments/masks.py --report         only table and image of what is there

Four ways to train on 48 shipped 3-D icons, with three seeds each, from the same start and with the same noise:

    clean    the icons as they are
    painted  the left half of each is magenta
    filled   the same images, masks that are black on that half, and --fill_masked_area
    masked   the same images and masks

Then images of 50 other nouns are generated, 100 for each run, all runs with the same prompts and the same noise. The
magenta of an image is the mean over its pixels of max(0, min(red, blue) - green), of 1: 1 for pure magenta, 0 for greys
and for pure colours but purple and pink. The small VAE cannot show magenta: an image that is half magenta has 0.50, and
0.14 when it was encoded and decoded. What counts is the excess over the run on clean images with the same seed.

Only the noisier half of the timesteps is trained on, at a high rate: there colours are decided, so a short run learns
them. Images are generated without guidance, as they were learned.

Writes tables.md, trained.png, examples.png and one folder a run into --out. Needs no network. Twelve runs of a
minute on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import ROOT
from experiments.learning.cases import BASE
from experiments.seeds import half_width, save

if TYPE_CHECKING:
    from PIL import Image

    from trainkit.tools.evaluate import Real, Wanted

TRAINER = ROOT / "train_dreambooth_lora_sdxl_advanced.py"
ICONS, OTHERS = ROOT / "assets/icons-3d", ROOT / "assets/icons-3d-reference"
ARMS = {"clean": (), "painted": (), "filled": ("--masked_loss", "--fill_masked_area"), "masked": ("--masked_loss",)}
MASKED = ("filled", "masked")
SEEDS = (0, 1, 2)
TAUGHT, NOUNS, COPIES, SHOWN = 48, 50, 2, 8  # training images; nouns that are generated, how often, and in examples.png
STEPS, DENOISING_STEPS, GUIDANCE = 160, 5, 1.0
MAGENTA, PALE, SIDE = (255, 0, 255), (232, 234, 238), 128
FLAGS = (
    f"--pretrained_model_name_or_path={BASE}", "--instance_prompt=3d icon in the style of TOK", "--resolution=64",
    "--train_batch_size=2", "--cache_latents", "--lr_warmup_steps=0", "--report_to=none",
    f"--max_train_steps={STEPS}", "--checkpointing_steps=60", "--checkpoints_total_limit=1",
    "--resume_from_checkpoint=latest", "--rank=16", "--lora_layers=all-linear", "--learning_rate=4e-3",
    "--adam_beta2=0.99", "--min_timestep=500",
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    make_data(args.out / "data")
    training_images(args.out)
    for arm in ARMS:
        for seed in SEEDS:
            folder = args.out / f"{arm}-seed{seed}"
            if not args.report and not (folder / "result.json").is_file():
                train(args.out / "data", arm, seed, folder)
                save(folder / "result.json", {"magenta": measured(folder)})
            if (folder / "result.json").is_file():
                print(f"{arm:8} seed {seed}  magenta {result(folder):.4f}", flush=True)
    report(args.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "masks", help="where the runs and results go")
    parser.add_argument("--report", action="store_true", help="train nothing")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained on


def split() -> tuple[list[tuple[Path, str]], list[Real]]:
    """(image and caption of those that are trained on, those whose nouns are generated)."""
    from trainkit.tools.evaluate import read_reference

    rows = [json.loads(line) for line in (ICONS / "metadata.jsonl").read_text("utf-8").splitlines()]
    taught = [(ICONS / row["file_name"], row["text"]) for row in rows]
    others = read_reference(OTHERS)
    more = TAUGHT - len(taught)
    return [*taught, *((real.path, real.caption) for real in others[:more])], others[more : more + NOUNS]


def make_data(folder: Path) -> None:
    """A folder for each arm, with captions in text files."""
    from PIL import Image

    for path, caption in split()[0]:
        icon = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        mask = Image.new("L", icon.size, 255)
        mask.paste(0, (0, 0, SIDE // 2, SIDE))
        painted = Image.composite(icon, Image.new("RGB", icon.size, MAGENTA), mask)
        for arm in ARMS:
            (folder / arm).mkdir(parents=True, exist_ok=True)
            (icon if arm == "clean" else painted).save(folder / arm / f"{path.stem}.png")
            (folder / arm / f"{path.stem}.txt").write_text(caption, "utf-8")
        for arm in MASKED:
            mask.save(folder / arm / f"{path.stem}-masklabel.png")


def train(data: Path, arm: str, seed: int, folder: Path) -> None:
    """Run the trainer, or go on with it, in a forked process: a new one would import PyTorch and Diffusers again."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*FLAGS, *ARMS[arm], f"--latent_cache_dir={(data.parent / 'cache').resolve()}",
             f"--instance_data_dir={(data / arm).resolve()}", f"--seed={seed}",
             f"--output_dir={folder.resolve()}"]
    run = multiprocessing.get_context("fork").Process(target=trained, args=(words, folder / "training.log"))
    run.start()
    run.join()
    if run.exitcode:
        raise SystemExit(f"masks: {arm}, seed {seed} ended with exit code {run.exitcode}; see {folder}/training.log")


def trained(words: list[str], log: Path) -> None:
    """The trainer itself, all its output in a file."""
    import train_dreambooth_lora_sdxl_advanced as trainer

    with log.open("ab") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
        sys.argv = [str(TRAINER), *words]
        trainer.main(words)


# ----------------------------------------------------------------------------------------------------------------------
# What comes of it


def wanted() -> list[Wanted]:
    from trainkit.tools.evaluate import Wanted

    return [Wanted(real.noun, real.caption, copy) for copy in range(COPIES) for real in split()[1]]


def measured(folder: Path) -> float:
    """The mean magenta of the images that a run's LoRA generates; some of them are kept."""
    from trainkit.inference import lora_file
    from trainkit.tools.evaluate import GenerationSettings, generate

    settings = GenerationSettings(str(BASE), lora=lora_file(folder), strengths=(1.0,), steps=DENOISING_STEPS,
                                  guidance_scale=GUIDANCE)
    _, images = next(generate(settings, wanted()))
    for place in range(SHOWN):
        images[place].save(folder / f"example-{place}.png")
    return statistics.fmean(map(magenta, images))


def magenta(image: Image.Image) -> float:
    """Mean of max(0, min(red, blue) - green), of 1."""
    import numpy as np

    red, green, blue = np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) / 255
    return float(np.clip(np.minimum(red, blue) - green, 0, None).mean())


def what_counts(image: Path) -> Image.Image:
    """The image on a pale ground, as far as the trainers' masks let it count: place by place of the latent."""
    from PIL import Image

    from trainkit.data.batch import Mask, Row
    from trainkit.data.geometry import CropPolicy
    from trainkit.data.images import content_digest
    from trainkit.data.masks import Masks

    file = image.with_name(f"{image.stem}-masklabel.png")
    row = Row(image.name, image, "", (SIDE, SIDE), "", mask=Mask(file, content_digest(file.read_bytes())))
    policy = CropPolicy(resolution=64, center_crop=True)
    weights = Masks(policy, factor=vae_factor())(policy.sample(row, seed=0, epoch=0))[0]
    shown = Image.fromarray((255 * weights).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return Image.composite(Image.open(image), Image.new("RGB", (SIDE, SIDE), PALE), shown)


def vae_factor() -> int:
    from trainkit.families.base import halvings

    return halvings(json.loads((BASE / "vae" / "config.json").read_text("utf-8")))


def result(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text("utf-8"))["magenta"]


def report(out: Path) -> None:
    """The table, printed and in tables.md, and what was generated."""
    folders = {arm: [out / f"{arm}-seed{seed}" for seed in SEEDS] for arm in ARMS}
    found = {arm: [result(folder) for folder in some if (folder / "result.json").is_file()]
             for arm, some in folders.items()}
    if len({len(values) for values in found.values()}) > 1 or not found["clean"]:
        return
    lines = ["| trained on | magenta | excess over the clean run | of the painted run's excess |",
             "|---|---:|---:|---:|"]
    excess = {arm: [a - b for a, b in zip(values, found["clean"], strict=True)] for arm, values in found.items()}
    for arm, values in found.items():
        width = half_width(excess[arm])
        more = "–" if arm == "clean" else f"{statistics.fmean(excess[arm]):.4f} ± {width or float('nan'):.4f}"
        parts = [a / b for a, b in zip(excess[arm], excess["painted"], strict=True)] if arm in MASKED else []
        part = ", ".join(f"{100 * part:.1f} %" for part in parts) or "–"
        lines.append(f"| {arm} | {statistics.fmean(values):.4f} | {more} | {part} |")
    text = "\n".join(lines)
    (out / "tables.md").write_text(f"{text}\n", "utf-8")
    print(text)
    examples(out)


def training_images(out: Path) -> None:
    """trained.png: images, masks, and what the masks leave of the images."""
    from PIL import Image

    from trainkit.sheets import save_png, sheet

    stems = [path.stem for path, _ in split()[0][:SHOWN]]
    folder = out / "data" / "masked"
    rows = [[Image.open(folder / f"{stem}{ending}.png") for stem in stems] for ending in ("", "-masklabel")]
    page = sheet([*rows, [what_counts(folder / f"{stem}.png") for stem in stems]], columns=stems,
                 names=["image", "mask: NAME-masklabel.png", "what is trained on"],
                 title="The left half of each training image is painted, and its mask is black there")
    save_png(out / "trained.png", page, "")


def examples(out: Path) -> None:
    """examples.png: what the runs of the first seed generate."""
    from PIL import Image

    from trainkit.sheets import save_png, sheet

    names = {"painted": "trained on painted images", "masked": "the same, with masks",
             "filled": "and with the masked area filled", "clean": "trained on clean images"}
    rows = [[Image.open(out / f"{arm}-seed{SEEDS[0]}" / f"example-{place}.png") for place in range(SHOWN)]
            for arm in names]
    page = sheet(rows, columns=[one.noun for one in wanted()[:SHOWN]], names=[*names.values()],
                 title=f"Nouns that were not taught, seed {SEEDS[0]}, {STEPS} steps, the same noise")
    save_png(out / "examples.png", page, "")


if __name__ == "__main__":
    main()
