"""Measure how far a LoRA moves the base model towards a style, on nouns that are not in the training images.

    python scripts/evaluate.py --base assets/tiny-sdxl-icons --lora out/my-lora/pytorch_lora_weights.safetensors \\
        --out out/my-lora/evaluation

The program generates the same prompts from the same noise at every strength of the LoRA. At each strength, it measures
the style distance to real images of the same nouns. The style distance is the unbiased KID in a layer of a small CLIP.
The floor is the style distance of the training images themselves. The result is

    gap closed = (base - lora) / (base - floor)            0 = nothing learned, 1 = as near as the training images

It writes grid.png and evaluation.json. In grid.png, each row is a noun. The columns are the base model, the strengths
and a real image. The program needs no internet if the base model is a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, UserError, is_out_of_memory, refuse
from trainkit.inference import (
    DTYPES,
    PREDICTION_TYPES,
    add_new_tokens,
    base_problems,
    embeddings_of,
    fused_loras,
    generate_images,
    load_pipeline,
    lora_file,
    lora_problems,
    missing_file,
)
from trainkit.options.captions import LENGTHS, TOKENS
from trainkit.process import own_settings, say
from trainkit.reading import parse_json, read_text
from trainkit.tools import ASSETS
from trainkit.tools.checks import (
    make_out,
    number_problems,
    out_problems,
    shipped_problems,
    text_problems,
    writing_to,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainkit.inference import Pipeline

MIN_IMAGES = 100  # below this the distance is too noisy to compare two LoRAs
FEWEST = 2  # images a side of an unbiased distance
GRID_ROWS = 10
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Real:
    """A real image of the style."""

    noun: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Wanted:
    """An image to generate; `copy` tells images of one noun apart."""

    noun: str
    prompt: str
    copy: int


@dataclass(frozen=True)
class GenerationSettings:
    """What the images are generated with; the defaults are those of the command line."""

    base: str
    lora: Path | None = None
    embeddings: Path | None = None
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 4.0
    batch_size: int = 25
    dtype: str = "float32"
    prediction_type: str | None = None
    max_token_length: int = TOKENS


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))
    refuse(make_out(args.out))
    reference = of_nouns(read_reference(args.reference), args.nouns)
    wanted = enough(reference, args.prompt)
    started = time.monotonic()
    generated = dict(generate(settings(args), wanted))
    seconds = time.monotonic() - started
    result = measure(args, generated, reference) | {"pictures": len(wanted), "seconds": round(seconds, 1)}
    page = grid(generated, wanted, reference)
    with writing_to(args.out):
        (args.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        page.save(args.out / "grid.png")
    print(table(result, args.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="The base model that the LoRA was trained on: SDXL, SD 1.x "
        "or SD 2.x. It is a .safetensors file, a folder, or a name on the Hub.")
    add("--prediction_type", choices=PREDICTION_TYPES, help="What the base model predicts. Give this flag if you "
        "trained with it, or if a single file does not say it. Without this flag, the base model says it.")
    add("--lora", type=Path, metavar="FILE", help="The LoRA file, the folder of a run or of a checkpoint, or RUN@STEP, "
        "such as runs/dog@500. Without this flag, only --embeddings are measured.")
    add("--embeddings", type=Path, metavar="FILE", help="The file NAME_emb.safetensors of a run with new tokens, or "
        "RUN@STEP. The tokens take the place of their words in the prompts. The base model gets the words.")
    add("--reference", type=Path, default=ASSETS / "icons-3d-reference", metavar="DIR",
        help="The folder with real images of the style that were not trained on. Its metadata.jsonl has the columns "
        "file_name, noun and text. The default is the reference icons in this repository.")
    add("--training", type=Path, default=ASSETS / "icons-3d", metavar="DIR", help="The folder with the "
        "training images. The default is the icons in this repository.")
    add("--clip", type=Path, default=ASSETS / "tiny-clip-icons", metavar="DIR", help="The folder with the "
        "CLIP model that measures the style. The default is the tiny CLIP in this repository.")
    add("--prompt", help='The prompt, with {noun} in it: "3d icon in the style of TOK, a {noun}". Without this flag, '
        "it is the caption of each real image.")
    add("--max_token_length", type=int, choices=LENGTHS, default=TOKENS, help="As in training. The default is 75.")
    add("--strengths", type=numbers, default=GenerationSettings.strengths, metavar="A,B,..",
        help="The strengths of the LoRA. 0 is the base model. The default is 0,0.5,1.")
    add("--nouns", type=words, default=None, metavar="A,B,..", help="The nouns. Without this flag, "
        "all nouns of the reference are used.")
    add("--seed", type=int, default=GenerationSettings.seed,
        help="The seed. The same seed and noun give the same noise at every strength.")
    add("--steps", type=int, default=GenerationSettings.steps, help="Denoising steps. The default is 20.")
    add("--guidance_scale", type=float, default=GenerationSettings.guidance_scale, help="The strength of "
        "classifier-free guidance. The default is 4.")
    add("--batch_size", type=int, default=GenerationSettings.batch_size, help="Images at once. The default is 25.")
    add("--dtype", choices=DTYPES, default=GenerationSettings.dtype, help="The precision. The default is float32.")
    add("--out", required=True, type=Path, metavar="DIR", help="The folder for grid.png and evaluation.json.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    args = parser.parse_args(argv)
    args.lora, args.embeddings = args.lora and lora_file(args.lora), args.embeddings and embeddings_of(args.embeddings)
    strengths = args.strengths if args.lora else (1.0,)
    args.strengths = tuple(sorted({0.0, *strengths}, key=abs))  # the gap closed needs the base, untouched: first
    return args


def settings(args: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(**{field.name: getattr(args, field.name) for field in fields(GenerationSettings)})


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong, and what is real


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if not (args.lora or args.embeddings):
        yield Problem("nothing to evaluate", "--lora, --embeddings", "there is neither a LoRA nor embeddings",
                      "give the path of one or both files that a training run wrote")
    if args.lora and not args.lora.is_file():
        yield missing_file("--lora", args.lora, "the LoRA is what is evaluated")
    if args.embeddings and not args.embeddings.is_file():
        yield missing_file("--embeddings", args.embeddings, "the run's new tokens are in it")
    yield from base_problems(args.base, args.embeddings, prediction_type=args.prediction_type)
    yield from lora_problems([args.lora] if args.lora else [], args.base)
    folders = ("training", "clip", "reference")
    yield from shipped_problems(args, *folders)
    for flag in folders:
        if not (folder := getattr(args, flag)).is_dir() and not folder.is_relative_to(ASSETS):
            yield Problem(f"no folder {folder}", f"--{flag}", "the style distance needs it",
                          f"give an existing folder, or leave --{flag} out to use the shipped one", kind="data")
    if args.clip.is_dir():
        yield from clip_problems(args.clip)
    if args.prompt and "{noun}" not in args.prompt:
        yield Problem(f"no {{noun}} in {args.prompt!r}", "--prompt", "each image is generated for one noun",
                      'write for instance --prompt "icon of a {noun}"')
    yield from number_problems(args, counts=("steps", "batch_size"), reals=("strengths", "guidance_scale"))
    if args.training.is_dir():
        yield from training_problems(args.training)
    if args.reference.is_dir():
        yield from reference_problems(args)
    yield from out_problems(args.out)


def clip_problems(folder: Path) -> Iterator[Problem]:
    """What the files of the CLIP that judges lack; its weights are loaded once before hours are spent on images."""
    from trainkit.evaluation import STYLE_LAYER, load_clip
    from trainkit.families.pretrained import Repo

    repo = Repo(str(folder), "--clip")
    found = [*repo.weight_problems(("",), None)]
    if not found:
        try:
            model = load_clip(folder)[0]
            if STYLE_LAYER not in dict(model.named_modules()):
                raise ValueError(f"it has no layer {STYLE_LAYER}, which the distance is measured in")
        except Exception as error:  # whatever a damaged file makes the libraries raise
            if is_out_of_memory(error):
                raise
            found = [repo.problem("the CLIP that judges cannot be loaded", f"{error}".strip().partition("\n")[0],
                                  "name another folder with --clip, or leave it out to use the shipped one",
                                  kind="data")]
    yield from found


def training_problems(folder: Path) -> Iterator[Problem]:
    files = images_in(folder)
    if len(files) < FEWEST:
        yield Problem(f"{len(files)} images in {folder}" if files else f"no image in {folder}", "--training",
                      f"they give the floor of the style distance, and it takes {FEWEST}",
                      f"put {', '.join(sorted(IMAGE_SUFFIXES))} files there", kind="data")
    yield from unreadable("--training", files)


def reference_problems(args: argparse.Namespace) -> Iterator[Problem]:
    index = args.reference / "metadata.jsonl"
    if not index.is_file():
        yield Problem(f"no {index}", "--reference", "it says which noun each image shows",
                      'write one line an image: {"file_name": "cat.png", "noun": "cat", "text": "a cat"}', kind="data")
        return
    try:
        every = read_reference(args.reference)
    except UserError as damaged:
        yield from damaged.problems
        return
    known = {real.noun for real in every}
    missing = sorted(set(args.nouns or ()) - known)
    chosen = of_nouns(every, args.nouns)
    if missing:
        yield Problem(f"no real image of {', '.join(missing)}", "--nouns", "both sides must show the same nouns",
                      f"choose among the {len(known)} nouns in {index}")
    elif len(chosen) < FEWEST and args.nouns is not None:
        yield Problem(f"{len(chosen)} real images of the nouns", "--nouns", f"the style distance takes {FEWEST}",
                      f"give more of the {len(known)} nouns in {index}, or leave --nouns out")
    elif len(chosen) < FEWEST:
        yield Problem(f"{len(chosen)} images in {index}", "--reference", f"the style distance takes {FEWEST}",
                      "add a line for each real image", kind="data")
    yield from unreadable("--reference", [real.path for real in chosen])


def unreadable(flag: str, files: Sequence[Path]) -> Iterator[Problem]:
    """One problem for all the images that cannot be read."""
    from trainkit.data.images import UnreadableImage, decode

    faults = []
    for file in files:
        try:
            decode(file.read_bytes())
        except (OSError, UnreadableImage) as error:
            faults.append(f"{file.name}: {error}")
    if faults:
        yield Problem(f"{len(faults)} images cannot be read", flag, faults[0], "put whole images there", "data")


def read_reference(folder: Path) -> list[Real]:
    """The real images that metadata.jsonl lists. UserError: a line of it is damaged."""
    index = folder / "metadata.jsonl"
    try:
        lines = enumerate(read_text(index).splitlines(), 1)
        return [real_of(folder, number, line) for number, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"{index} is damaged", "--reference", f"{error}", "write one line an image: "
                                '{"file_name": "cat.png", "noun": "cat", "text": "a cat"}', kind="data")) from error


def real_of(folder: Path, number: int, line: str) -> Real:
    """A line of metadata.jsonl. ValueError: it is no JSON, lacks a text, or names a file outside of the folder."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    keys = ("noun", "file_name", "text")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in keys):
        raise ValueError(f"line {number} has no {', '.join(keys)} that are all text")
    name = Path(row["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"line {number}: file_name {row['file_name']!r} leaves the folder")
    return Real(row["noun"], folder / name, row["text"])


def of_nouns(reference: list[Real], nouns: Sequence[str] | None) -> list[Real]:
    return [real for real in reference if nouns is None or real.noun in nouns]


def enough(reference: list[Real], template: str | None) -> list[Wanted]:
    """Each noun as often as it takes to reach MIN_IMAGES."""
    prompts = {real.noun: template.replace("{noun}", real.noun) if template else real.caption for real in reference}
    copies = -(-MIN_IMAGES // len(prompts))
    return [Wanted(noun, prompt, copy) for copy in range(copies) for noun, prompt in prompts.items()]


def images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def opened(path: Path) -> Image:
    """The image on white: an alpha channel must not let hidden colours through."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def generate(settings: GenerationSettings, wanted: list[Wanted]) -> Iterator[tuple[float, list[Image]]]:
    """Every noun at every strength, from the same noise -> (strength, images)."""
    say("loading PyTorch, Diffusers and the model")
    pipe = load_pipeline(settings.base, settings.dtype, settings.prediction_type)
    if 0 in settings.strengths:  # before the pipeline learns new tokens
        yield 0.0, images_of(pipe, settings, wanted, 0.0)
    if settings.embeddings:
        renamed = add_new_tokens(pipe, settings.embeddings)
        wanted = [replace(w, prompt=renamed(w.prompt)) for w in wanted]
    for strength in filter(None, settings.strengths):
        with fused_loras(pipe, [(settings.lora, strength)]) if settings.lora else nullcontext():
            yield strength, images_of(pipe, settings, wanted, strength)


def images_of(pipe: Pipeline, settings: GenerationSettings, wanted: list[Wanted], strength: float) -> list[Image]:
    from trainkit import rng
    from trainkit.runtime.progress import watched

    noise = [rng.generator("evaluate", settings.seed, w.noun, w.copy) for w in wanted]
    with watched(f"strength {strength:g}: generating images", len(wanted)) as show:
        return generate_images(pipe, [w.prompt for w in wanted], noise, steps=settings.steps, show=show,
                               guidance_scale=settings.guidance_scale, batch_size=settings.batch_size,
                               max_chunks=settings.max_token_length // TOKENS)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring and showing


def measure(args: argparse.Namespace, generated: dict[float, list[Image]], reference: list[Real]) -> dict[str, object]:
    """Distances at each strength, the floor, and the fraction of the gap that each strength closes."""
    from trainkit.evaluation import style_distance

    real = [opened(r.path) for r in reference]
    training = [opened(path) for path in images_in(args.training)]
    floor = style_distance(training, real, args.clip)
    distance = {strength: style_distance(images, real, args.clip) for strength, images in generated.items()}
    gap = distance[0.0] - floor
    return {
        "base": Path(args.base).name if Path(args.base).is_dir() else args.base,
        **described("lora", args.lora), **described("embeddings", args.embeddings),
        "prompt": args.prompt or "captions of the reference", "seed": args.seed, "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "reference_pictures": len(real), "training_pictures": len(training), "floor": floor,
        "strengths": [{"strength": s, "style_distance": d,
                       "share_of_gap_closed": (distance[0.0] - d) / gap if gap > 0 else None}
                      for s, d in distance.items()],
    }


def described(role: str, file: Path | None) -> dict[str, str]:
    from trainkit.files import sha256

    return {role: file.name, f"{role}_sha256": sha256(file)} if file else {}


def grid(generated: dict[float, list[Image]], wanted: list[Wanted], reference: list[Real]) -> Image:
    """Ten nouns spread over the list; the last column is a real image of the noun, for comparison only."""
    from trainkit.sheets import sheet

    real = {r.noun: r.path for r in reference}
    first = [i for i, w in enumerate(wanted) if w.copy == 0]
    shown = first[:: max(1, len(first) // GRID_ROWS)][:GRID_ROWS]
    rows = [[*(images[i] for images in generated.values()), opened(real[wanted[i].noun])] for i in shown]
    columns = ["base" if s == 0 else f"LoRA {s:g}" for s in generated]
    shared = os.path.commonprefix([wanted[i].prompt for i in shown])
    return sheet(rows, columns=[*columns, "real"], names=[wanted[i].noun for i in shown], title=f"{shared.strip()} …")


def table(result: dict, out: Path) -> str:
    lines = [f"style distance to {result['reference_pictures']} real images, {result['pictures']} for each strength",
             f"{'':<14}{'distance':>10}{'gap closed':>12}"]
    for row in result["strengths"]:
        name = "base" if row["strength"] == 0 else f"LoRA {row['strength']:g}"
        gap_closed = row["share_of_gap_closed"]
        closed = "" if row["strength"] == 0 or gap_closed is None else f"{gap_closed:>11.0%}"
        lines.append(f"{name:<14}{row['style_distance']:>10.4f} {closed}")
    lines.append(f"{'floor':<14}{result['floor']:>10.4f}   the training images themselves")
    return "\n".join([*lines, f"generated in {result['seconds']:.0f} s; see {out / 'grid.png'}"])
