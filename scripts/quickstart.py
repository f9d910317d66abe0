#!/usr/bin/env python
"""Train the tiny SDXL model in this repository on 22 real 3-D icons. Then show what it learned, on other nouns.

    python scripts/quickstart.py [OUTPUT_DIR]          default: runs/quickstart, in the repository

You need a clone of the repository and its packages; scripts/quickstart.sh installs them first. A GPU is used if there
is one. It takes less than 10 minutes on 2 CPU cores. These variables of the environment make a shorter trial:

    STEPS=20 DENOISING_STEPS=2

Pivotal tuning: TOK stands for two new tokens, which are trained in the first half of the steps. TOKENS=0 leaves them
out. The output folder has evaluation/grid.png (each row is a noun; the columns are the base model, the LoRA at
strengths 0.5 and 1, and a real icon), evaluation/evaluation.json, the LoRA for Diffusers and for WebUIs, the embeddings
of the new tokens, README.md (the model card) and report.html. If you run the program again after a stop, it continues.
What is finished, it does not repeat: for another run, give another OUTPUT_DIR.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import Problem, exit_with_message, refuse
from trainkit.reading import parse_json, read_text
from trainkit.runtime.weight_files import DIFFUSERS_FILE

ROOT = Path(__file__).absolute().parents[1]  # where a link to this file lies, as bash would have it
TRAINER = "train_dreambooth_lora_sdxl_advanced.py"
BASE = "assets/tiny-sdxl-icons"
IMAGES = "evaluation"  # the folder for them
NEW_TOKENS = ("--train_text_encoder_ti", "--token_abstraction=TOK", "--train_text_encoder_ti_frac=0.5")


def main() -> None:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described)
    parser.add_argument("out", nargs="?", default="runs/quickstart", metavar="OUTPUT_DIR", help="where the results go")
    out: str = parser.parse_args().out
    if find_spec("accelerate") is None:
        refuse([Problem("the packages are not installed", sys.executable, "training needs those of requirements.txt",
                        f'"{sys.executable}" -m pip install -c constraints.txt -r requirements.txt')])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy CPU two threads are slower than one
    tokens = os.environ.get("TOKENS", "1") != "0"
    train = training(out, tokens=tokens, steps=os.environ.get("STEPS", "400"))
    if is_trained(out, train):
        say(f"\nThe run in {out} is finished already. For another one, give another folder, such as {out}-2.")
    else:
        say("\nTraining (about 2 minutes):\n")
        start(*train)
    denoising_steps = os.environ.get("DENOISING_STEPS", "20")
    if is_evaluated(out, denoising_steps):
        say("Its images are there already, too.")
    else:
        say("\nGenerating 120 nouns that are not in the training images, at three strengths (about 3 minutes):\n")
        start(*evaluation(out, tokens=tokens, denoising_steps=denoising_steps))
    say(f"\nLook at {Path(out, IMAGES, 'grid.png')} and open {Path(out, 'report.html')} in a browser.")


def is_trained(out: str, command: list[str]) -> bool:
    """Whether the same command has run to its end there, and its LoRA is still there."""
    record, lora = written(ROOT / out / "run.json"), ROOT / out / DIFFUSERS_FILE
    return record.get("status") == "done" and record.get("command") == command and lora.is_file()


def is_evaluated(out: str, denoising_steps: str) -> bool:
    """Whether the grid shows the LoRA that is there."""
    lora, images = ROOT / out / DIFFUSERS_FILE, ROOT / out / IMAGES
    return (written(images / "evaluation.json").get("steps") == int(denoising_steps) and (images / "grid.png").is_file()
            and (images / "grid.png").stat().st_mtime_ns > lora.stat().st_mtime_ns)


def written(path: Path) -> dict[str, Any]:
    """What a program of ours has written into a JSON file; nothing where there is none that can be read."""
    try:
        found: dict[str, Any] = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return found


def training(out: str, *, tokens: bool, steps: str) -> list[str]:
    """The command line of the trainer. Copy it, and write your own model, images and words."""
    return [
        TRAINER, f"--pretrained_model_name_or_path={BASE}",
        "--dataset_name=assets/icons-3d", "--caption_column=text", "--instance_prompt=3d icon in the style of TOK",
        f"--output_dir={out}", "--resolution=64", "--train_batch_size=3", "--cache_latents", "--random_flip",
        "--rank=8", "--lora_layers=all-linear",
        "--optimizer=prodigy", "--learning_rate=1.0", "--text_encoder_lr=1.0", "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--adam_beta1=0.9", "--adam_beta2=0.99", "--adam_weight_decay=0.01",
        "--prodigy_safeguard_warmup=True", "--prodigy_use_bias_correction=True",
        *(NEW_TOKENS if tokens else ()), "--snr_gamma=5.0", f"--max_train_steps={steps}", "--checkpointing_steps=100",
        "--resume_from_checkpoint=latest", "--validation_prompt=3d icon in the style of TOK, a ladybug",
        "--validation_steps=100", "--seed=0",
    ]


def evaluation(out: str, *, tokens: bool, denoising_steps: str) -> list[str]:
    name = written(ROOT / out / "run.json")["name"]
    return ["scripts/evaluate.py", "--base", BASE, "--lora", f"{out}/{DIFFUSERS_FILE}",
            *(["--embeddings", f"{out}/{name}_emb.safetensors"] if tokens else []),
            "--strengths", "0,0.5,1", "--steps", denoising_steps, "--out", f"{out}/{IMAGES}"]


def start(*words: str) -> None:
    """Run this Python with these words, from the top of the repository; its failure is ours."""
    python = Path(sys.executable)
    here = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    say(" ".join([quoted(str(here)), *map(quoted, words)]) + "\n")
    code = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def quoted(word: str) -> str:
    """`word` as bash and PowerShell take it: --flag="two words"."""
    flag, sign, value = word.rpartition("=")
    return f'{flag}{sign}"{value}"' if " " in value else word


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()  # before what the programs write


if __name__ == "__main__":
    exit_with_message(main)
