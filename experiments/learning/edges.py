#!/usr/bin/env python
"""Do buckets help where the concept is at the edges of wide images? Train with buckets and with squares, then look.

    .venv/bin/python experiments/learning/edges.py          three seeds of both; goes on where it stopped

Makes wide images, 128x64 pixels: one of the 22 shipped icons in the middle, a red stripe at the left edge and a blue
one at the right edge. Trains the same short LoRA on them with --enable_bucket, which keeps their shape, and without,
which cuts squares at random places. Both have the same steps and about the same number of pixels in each. Then
generates images of 128x64 pixels of nouns that were not taught, and counts how often each stripe is where it belongs.
The same count of the base model's own images is beside them. Prints a table; edges.png shows the first images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import ROOT
from experiments.learning.cases import ADAMW, BASE, COMMON, RANK_8
from experiments.learning.results import spread
from experiments.seeds import save

WIDTH, HEIGHT, STRIPE, ICON = 128, 64, 16, 56  # pixels
LEFT, RIGHT, GROUND = (200, 30, 40), (30, 60, 200), (240, 240, 240)
NEAR = 80  # of the mean colour from the stripe's, in RGB; white is more than 250 from both
SIDE = 96  # --resolution of both: 96² pixels hold the bucket 128x64
ARMS = {"squares": (), "buckets": ("--enable_bucket", "--min_bucket_reso=32", "--bucket_reso_steps=16")}
STEPS, SEEDS, IMAGES, SHOWN = 300, 3, 32, 6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/edges", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    make_images(args.out / "images")
    found: dict[str, list[dict[str, float]]] = {"the base model": [measured(args.out / "base", None)]}
    for seed in range(args.seeds):
        for arm in ARMS:
            folder = args.out / f"{arm}-seed{seed}"
            if not (folder / "result.json").is_file():
                train(arm, seed, args.steps, args.out / "images", folder)
            found.setdefault(arm, []).append(measured(folder, folder))
            print(f"{arm:8} seed {seed}  {found[arm][-1]}", flush=True)
    for line in table(found):
        print(line)
    show(args.out)


def make_images(folder: Path) -> None:
    """The wide images, each with the caption of its icon."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in (ROOT / "assets/icons-3d/metadata.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        icon = Image.open(ROOT / "assets/icons-3d" / row["file_name"]).convert("RGB").resize((ICON, ICON))
        page = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
        page.paste(icon, ((WIDTH - ICON) // 2, (HEIGHT - ICON) // 2))
        page.paste(LEFT, (0, 0, STRIPE, HEIGHT))
        page.paste(RIGHT, (WIDTH - STRIPE, 0, WIDTH, HEIGHT))
        page.save(folder / row["file_name"])
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def train(arm: str, seed: int, steps: int, images: Path, folder: Path) -> None:
    """Run the trainer, or go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in COMMON if not flag.startswith(("--dataset_name", "--caption_column", "--resolution"))]
    flags.remove("--random_flip")  # it would change left for right
    line = [sys.executable, "train_dreambooth_lora_sdxl_advanced.py", *flags, *RANK_8, *ADAMW, *ARMS[arm],
            f"--instance_data_dir={images.resolve()}", f"--resolution={SIDE}", f"--max_train_steps={steps}",
            "--cached_crops=16", f"--seed={seed}", f"--output_dir={folder.resolve()}"]
    with (folder / "training.log").open("ab") as log:
        subprocess.run(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def measured(folder: Path, run: Path | None) -> dict[str, float]:
    """Fractions of the generated images that have the left stripe, the right one, and both; remembered in the folder.
    """
    path = folder / "result.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = generated(run)
        for i, image in enumerate(images[:SHOWN]):
            image.save(folder / f"image-{i}.png")
        left, right = (torch.tensor([stripe(image, *which) for image in images]) for which in (
            (0, LEFT), (WIDTH - STRIPE, RIGHT)))
        save(path, {"left": left.float().mean().item(), "right": right.float().mean().item(),
                    "both": (left & right).float().mean().item()})
    return json.loads(path.read_text("utf-8"))


def generated(run: Path | None) -> list[Image.Image]:
    """Wide images of nouns that were not taught, from the same noise for every run."""
    from trainkit import rng
    from trainkit.inference import encode_prompts, finite_images, fuse_loras, load_pipeline, lora_file

    pipe = load_pipeline(str(BASE), "float32")
    if run:
        fuse_loras(pipe, [(lora_file(run), 1.0)])
    lines = (ROOT / "assets/icons-3d-reference/metadata.jsonl").read_text("utf-8").splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    images: list[Image.Image] = []
    for i, caption in enumerate(captions[:: len(captions) // IMAGES][:IMAGES]):
        with torch.no_grad():
            text = encode_prompts(pipe, [caption], None)
        images += finite_images(pipe, **text, width=WIDTH, height=HEIGHT, num_inference_steps=10, guidance_scale=4.0,
                                generator=[rng.generator("edges", i)])
    return images


def stripe(image: Image.Image, left: int, colour: tuple[int, int, int]) -> bool:
    """Whether the mean colour of the place of a stripe is near to that of the stripe."""
    part = np.asarray(image.convert("RGB").crop((left, 0, left + STRIPE, HEIGHT)), dtype=np.float32)  # [H,W,3]
    return bool(np.linalg.norm(part.mean((0, 1)) - np.array(colour)) < NEAR)


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    names = ("left", "right", "both")
    rows = [f"| {arm} | " + " | ".join(
        spread([100 * result[name] for result in results], ".0f") for name in names) + " |"
        for arm, results in found.items()]
    return ["| trained with | left stripe, % of images | right stripe | both |", "|---|---|---|---|", *rows]


def show(out: Path) -> None:
    """The first generated images of seed 0, one row for each way to train; the last row is of the training images."""
    from trainkit.sheets import font

    rows = [(name, [Image.open(out / folder / f"image-{i}.png") for i in range(SHOWN)]) for name, folder in (
        ("base", "base"), *((arm, f"{arm}-seed0") for arm in ARMS))]
    rows.append(("training", [Image.open(path) for path in sorted((out / "images").glob("*.png"))[:SHOWN]]))
    page = Image.new("RGB", (80 + SHOWN * (WIDTH + 8), len(rows) * (HEIGHT + 8) + 8), "white")
    draw = ImageDraw.Draw(page)
    for k, (name, images) in enumerate(rows):
        draw.text((6, 8 + k * (HEIGHT + 8) + HEIGHT // 2 - 8), name, fill="black", font=font())
        for i, image in enumerate(images):
            page.paste(image, (80 + i * (WIDTH + 8), 8 + k * (HEIGHT + 8)))
    page.save(out / "edges.png")


if __name__ == "__main__":
    main()
