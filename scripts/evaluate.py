#!/usr/bin/env python
"""How far does a LoRA move the base model towards the style it was taught, on nouns it was never shown?

    python scripts/evaluate.py --base assets/tiny-sdxl-icons --lora out/my-lora/pytorch_lora_weights.safetensors \\
        --out out/my-lora/evaluation

The same prompts are drawn from the same noise at every LoRA strength. The style distance (unbiased KID in a layer of a
small CLIP) to real pictures of the same nouns is taken at each; its floor is the distance of the training pictures
themselves, so

    share of the gap closed = (base - lora) / (base - floor)            0 = nothing learned, 1 = as good as real

Writes grid.png (rows: nouns; columns: base, strengths, a real picture) and evaluation.json. Needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainkit.errors import Problem, UserError, exit_with_message, refuse  # noqa: E402

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from PIL.Image import Image

    from trainkit.families.pretrained import Repo

    Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

ASSETS = ROOT / "assets"
MIN_PICTURES = 100  # below this the distance is too noisy to compare two LoRAs
FEWEST = 2  # pictures a side of an unbiased distance
GRID_ROWS = 10
NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # of a pipeline, where a LoRA may train
ANY_SIDE = 2**20  # pixels: any model halves it; the pipelines check the sides that are drawn
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Real:
    """A real picture of the style."""

    noun: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Wanted:
    """A picture to draw; `copy` tells pictures of one noun apart."""

    noun: str
    prompt: str
    copy: int


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(problems(args))
    refuse(made(args.out))
    reference = of_nouns(read_reference(args.reference), args.nouns)
    wanted = enough(reference, args.prompt)
    started = time.monotonic()
    drawn = dict(draw(args, wanted))
    seconds = time.monotonic() - started
    result = measure(args, drawn, reference) | {"pictures": len(wanted), "seconds": round(seconds, 1)}
    page = grid(drawn, wanted, reference)
    with writing(args.out):
        (args.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        page.save(args.out / "grid.png")
    print(table(result, args.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="SDXL, SD 1.x or 2.x folder or Hub id the LoRA was trained on")
    add("--lora", type=Path, metavar="FILE", help="LoRA file, Diffusers or WebUI layout; without it --embeddings alone")
    add("--embeddings", type=Path, metavar="FILE", help="the run's NAME_emb.safetensors, if it learned new tokens, "
        "which then stand for their words in prompts; the base is given the words")
    add("--reference", type=Path, default=ASSETS / "icons-3d-reference", metavar="DIR",
        help="real pictures of the style that were not trained on, with metadata.jsonl (file_name, noun, text)")
    add("--training", type=Path, default=ASSETS / "icons-3d", metavar="DIR", help="the pictures trained on")
    add("--clip", type=Path, default=ASSETS / "tiny-clip-icons", metavar="DIR", help="CLIP model that judges")
    add("--prompt", help='such as "3d icon in the style of TOK, a {noun}"; default: the caption of each real picture')
    add("--strengths", type=numbers, default=(0.0, 0.5, 1.0), metavar="A,B,..", help="LoRA strengths (0: the base)")
    add("--nouns", type=words, default=None, metavar="A,B,..", help="default: every noun of the reference")
    add("--seed", type=int, default=0, help="starting noise depends on this, the noun and nothing else")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--guidance_scale", type=float, default=4.0, help="classifier-free guidance")
    add("--batch_size", type=int, default=25, help="prompts drawn at once")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="precision of the pipeline")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for grid.png and evaluation.json")
    add("--debug", action="store_true", help="show a traceback for user errors")
    args = parser.parse_args(argv)
    asked = args.strengths if args.lora else (1.0,)
    args.strengths = tuple(sorted({0.0, *asked}, key=abs))  # the share needs the base, untouched: first
    return args


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
        yield Problem(f"no LoRA file {args.lora}", "--lora", "the LoRA is what is evaluated",
                      "give the path of a .safetensors file that a training run wrote")
    if args.embeddings and not args.embeddings.is_file():
        yield Problem(f"no file of embeddings {args.embeddings}", "--embeddings", "the run's new tokens are in it",
                      "give the path of the NAME_emb.safetensors that the run wrote, or leave the flag out")
    yield from base_problems(args.base, args.embeddings)
    yield from damaged_loras([args.lora] if args.lora else [])
    for flag in ("training", "clip", "reference"):
        if not getattr(args, flag).is_dir():
            yield Problem(f"no folder {getattr(args, flag)}", f"--{flag}", "the style distance needs it",
                          f"give an existing folder, or leave --{flag} out to use the shipped one", kind="data")
    if args.prompt and "{noun}" not in args.prompt:
        yield Problem(f"no {{noun}} in {args.prompt!r}", "--prompt", "each picture is drawn for one noun",
                      'write for instance --prompt "icon of a {noun}"')
    yield from number_problems(args, counts=("steps", "batch_size"), reals=("strengths", "guidance_scale"))
    if args.training.is_dir():
        yield from training_problems(args.training)
    if args.reference.is_dir():
        yield from reference_problems(args)
    yield from in_the_way(args.out)


def number_problems(args: argparse.Namespace, *, counts: Sequence[str], reals: Sequence[str]) -> Iterator[Problem]:
    """Counts below 1, and numbers or lists of them that are not finite."""
    for flag in counts:
        if getattr(args, flag) < 1:
            yield Problem(f"--{flag} {getattr(args, flag)}", f"--{flag}", "it is a count", f"--{flag} 1 or more")
    for flag in reals:
        value = getattr(args, flag)
        several = value if isinstance(value, (list, tuple)) else [value]
        yield from (Problem(f"--{flag} {number}", f"--{flag}", "nothing can be drawn with it",
                            f"give --{flag} a finite number")
                    for number in several if number is not None and not math.isfinite(number))


def damaged_loras(files: Sequence[Path]) -> Iterator[Problem]:
    """Files, of those that are there, whose header cannot be read or whose end is missing."""
    from safetensors import SafetensorError, safe_open

    for file in (file for file in files if file.is_file() and file.suffix == ".safetensors"):
        try:
            safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            yield Problem("the LoRA file is damaged", f"--lora {file}", f"{error}", "copy or export it again", "data")


def in_the_way(out: Path) -> Iterator[Problem]:
    """Is the folder for the results, or one that it shall lie in, a file?"""
    there = next((path for path in (out, *out.parents) if path.exists()), out)
    if there.exists() and not there.is_dir():
        yield Problem(f"{there} is a file", f"--out {out}", "the results go into a folder", "name another with --out")


def made(out: Path) -> Iterator[Problem]:
    """Make the folder for the results, before hours are spent on them -> why that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(out, os.W_OK | os.X_OK) else "nothing may be written there"
    except OSError as error:
        why = os.strerror(error.errno)
    if why:
        yield Problem(f"{out} cannot be written to", f"--out {out}", why, "name another folder with --out")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A disk that is full or gone while the results are written ends in a problem of the kind "disk"."""
    try:
        yield
    except OSError as error:
        refuse([Problem("the results cannot be written", f"--out {out}", f"{error}",
                        "free some space, or name a folder on another disk with --out", "disk")])


def base_problems(base: str, embeddings: Path | None, *, sized: bool = True) -> list[Problem]:
    """What the small files of the base model say against drawing with it.

    sized  whether the model must say how large its pictures are
    """
    from trainkit.families.pretrained import Repo

    repo = Repo(base, "--base")
    if found := repo.unreachable("model_index.json"):
        return found
    if repo.json("model_index.json") is None or repo.json("unet/config.json") is None:
        return [repo.problem("not a Stable Diffusion model folder", "model_index.json or unet/config.json is missing",
                             "--base FOLDER_OF_A_DIFFUSERS_MODEL (SDXL, SD 1.x or 2.x)", kind="data")]
    if found := family_problems(repo):
        return found
    if sized and repo.json("unet/config.json").get("sample_size") is None:
        return [repo.problem("the model does not say how large its pictures are", "unet/config.json has no sample_size",
                             "add sample_size, pixels divided by 8, to unet/config.json", kind="data")]
    if embeddings and repo.json("text_encoder_2/config.json") is None:
        return [Problem("embeddings of two text encoders for a model with one", f"--embeddings {embeddings}",
                        f"{base} has no text_encoder_2: new tokens are trained on SDXL", "leave --embeddings out, or "
                        "name the SDXL model they were trained on with --base")]
    return embeddings_problems(repo, embeddings) if embeddings and embeddings.is_file() else []


def family_problems(repo: Repo) -> list[Problem]:
    """What keeps the model from being trained keeps it from being drawn with; flags of the trainers are not named."""
    from trainkit import families
    from trainkit.options import ModelOptions

    family = families.of(ModelOptions(pretrained_model_name_or_path=repo.path))
    return [replace(repo.problem(found.what.replace("trained", "drawn with"), found.why, "name a complete SDXL, SD 1.x "
                                 "or 2.x base model, its weights in safetensors, with --base"), kind=found.kind)
            for found in family.problems(repo.path, resolution=ANY_SIDE)]


def embeddings_problems(repo: Repo, file: Path) -> list[Problem]:
    """Is it a file of a run's new tokens, as wide as the text encoders?"""
    from safetensors import SafetensorError

    from trainkit.files import load_tensors
    from trainkit.pivotal import ENCODERS, read_header

    try:
        names, tensors = read_header(file).names, load_tensors(file)
        shapes = [tuple(tensors[name].shape) for name in ENCODERS]
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return [Problem("no file of embeddings", f"--embeddings {file}", f"{error}".partition("\n")[0],
                        "give the path of the NAME_emb.safetensors that the run wrote", "data")]
    configs = [repo.json(f"{folder}/config.json") for folder in ("text_encoder", "text_encoder_2")]
    wanted = [(len(names), config.get("hidden_size")) for config in configs]
    return [] if shapes == wanted else [
        Problem("the embeddings do not fit the base model", f"--embeddings {file}", f"their shapes are {shapes}, and "
                f"{wanted} are asked for", "name the base model they were trained on with --base", "data")]


def training_problems(folder: Path) -> Iterator[Problem]:
    files = pictures_in(folder)
    if len(files) < FEWEST:
        yield Problem(f"{len(files)} pictures in {folder}" if files else f"no picture in {folder}", "--training",
                      f"they give the floor of the style distance, and it takes {FEWEST}",
                      f"put {', '.join(sorted(PICTURE_SUFFIXES))} files there", kind="data")
    yield from unreadable("--training", files)


def reference_problems(args: argparse.Namespace) -> Iterator[Problem]:
    index = args.reference / "metadata.jsonl"
    if not index.is_file():
        yield Problem(f"no {index}", "--reference", "it says which noun each picture shows",
                      'write one line a picture: {"file_name": "cat.png", "noun": "cat", "text": "a cat"}', kind="data")
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
        yield Problem(f"no real picture of {', '.join(missing)}", "--nouns", "both sides must show the same nouns",
                      f"choose among the {len(known)} nouns in {index}")
    elif len(chosen) < FEWEST and args.nouns is not None:
        yield Problem(f"{len(chosen)} real pictures of the nouns", "--nouns", f"the style distance takes {FEWEST}",
                      f"give more of the {len(known)} nouns in {index}, or leave --nouns out")
    elif len(chosen) < FEWEST:
        yield Problem(f"{len(chosen)} pictures in {index}", "--reference", f"the style distance takes {FEWEST}",
                      "add a line for each real picture", kind="data")
    yield from unreadable("--reference", [real.path for real in chosen])


def unreadable(flag: str, files: Sequence[Path]) -> Iterator[Problem]:
    """One problem for all the pictures that cannot be read."""
    from trainkit.data.images import UnreadablePicture, decode

    faults = []
    for file in files:
        try:
            decode(file.read_bytes())
        except (OSError, UnreadablePicture) as error:
            faults.append(f"{file.name}: {error}")
    if faults:
        yield Problem(f"{len(faults)} pictures cannot be read", flag, faults[0], "put whole pictures there", "data")


def read_reference(folder: Path) -> list[Real]:
    """The real pictures that metadata.jsonl lists. UserError: a line of it is damaged."""
    index = folder / "metadata.jsonl"
    try:
        lines = enumerate(index.read_text("utf-8").splitlines(), 1)
        return [real_of(folder, number, line) for number, line in lines if line.strip()]
    except ValueError as error:  # of UTF-8, of JSON, or of a row
        raise UserError(Problem(f"{index} is damaged", "--reference", f"{error}", "write one line a picture: "
                                '{"file_name": "cat.png", "noun": "cat", "text": "a cat"}', kind="data")) from error


def real_of(folder: Path, number: int, line: str) -> Real:
    """A line of metadata.jsonl. ValueError: it is no JSON, lacks a text, or names a file outside of the folder."""
    try:
        row = json.loads(line)
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
    """Each noun as often as it takes to reach MIN_PICTURES."""
    prompts = {real.noun: template.replace("{noun}", real.noun) if template else real.caption for real in reference}
    copies = -(-MIN_PICTURES // len(prompts))
    return [Wanted(noun, prompt, copy) for copy in range(copies) for noun, prompt in prompts.items()]


def pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)


def opened(path: Path) -> Image:
    """The picture on white: an alpha channel must not let hidden colours through."""
    from PIL import Image

    picture = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(args: argparse.Namespace, wanted: list[Wanted]) -> Iterator[tuple[float, list[Image]]]:
    """Every noun at every strength, from the same noise -> (strength, pictures)."""
    pipe = load(args)
    if 0 in args.strengths:  # before the pipeline learns new tokens
        yield 0.0, pictures_of(pipe, args, wanted)
    if args.embeddings:
        renamed = learned_words(pipe, args.embeddings)
        wanted = [replace(w, prompt=renamed(w.prompt)) for w in wanted]
    for strength in filter(None, args.strengths):
        with with_lora(pipe, args.lora, strength) if args.lora else nullcontext():
            yield strength, pictures_of(pipe, args, wanted)


@contextmanager
def with_lora(pipe: Pipeline, file: Path, strength: float) -> Iterator[None]:
    """The LoRA is part of the weights inside: as fast as the base while drawing."""
    fuse_lora(pipe, file, strength)
    yield
    pipe.unfuse_lora(components=networks(pipe))
    pipe.unload_lora_weights()


def networks(pipe: Pipeline) -> list[str]:
    return [name for name in NETWORKS if getattr(pipe, name, None) is not None]


def fuse_lora(pipe: Pipeline, file: Path, strength: float) -> None:
    """Make a LoRA part of the weights. UserError: the file is damaged, or of another kind of model."""
    from safetensors import SafetensorError

    logging.disable(logging.ERROR)  # Diffusers logs every shape that does not fit, and then raises
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        why = "" if pipe.get_list_adapters() else "it has no layer of this model"
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        why = f"{error}".strip().partition("\n")[0]
    finally:
        logging.disable(logging.NOTSET)
    if why:
        refuse([Problem("the LoRA does not fit the base model", f"--lora {file}", why,
                        "name the base model it was trained on with --base", "data")])
    pipe.fuse_lora(components=networks(pipe), lora_scale=strength)


def learned_words(pipe: Pipeline, file: Path) -> Callable[[str], str]:
    """Give the pipeline a run's new tokens -> how to ask for them: puts their names for their words in a prompt."""
    from trainkit.files import load_tensors
    from trainkit.options.text_encoders import replace_words
    from trainkit.pivotal import ENCODERS, read_header

    header, rows = read_header(file), load_tensors(file)
    pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for name, (tokenizer, encoder) in zip(ENCODERS, pairs, strict=True):
        pipe.load_textual_inversion(rows[name], token=header.names, tokenizer=tokenizer, text_encoder=encoder)
    if header.sets_eos:
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    table = {word: "".join(names) for word, names in header.tokens.items()}
    return lambda prompt: replace_words(prompt, table)


def load(args: argparse.Namespace) -> Pipeline:
    """The stock pipeline of --base, without what would paint over its pictures: watermark and safety checker."""
    from trainkit.runtime.trackers import quiet_libraries

    quiet_libraries()
    import torch
    from diffusers import AutoPipelineForText2Image

    from trainkit.families.pretrained import Repo, load_part

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_part(Repo(args.base, "--base"), AutoPipelineForText2Image, "", use_safetensors=True,
                     add_watermarker=False, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, getattr(torch, args.dtype))


def pictures_of(pipe: Pipeline, args: argparse.Namespace, wanted: list[Wanted]) -> list[Image]:
    from trainkit import rng

    pictures: list[Image] = []
    for start in range(0, len(wanted), args.batch_size):
        some = wanted[start : start + args.batch_size]
        pictures += finite_pictures(
            pipe, prompt=[w.prompt for w in some], num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
            generator=[rng.generator("evaluate", args.seed, w.noun, w.copy) for w in some])
    return pictures


def finite_pictures(pipe: Pipeline, **asked: object) -> list[Image]:
    """What the pipeline draws. UserError: values that are not finite, which a PNG would show as black."""
    pixels = pipe(**asked, output_type="pt").images  # [B,3,H,W] in 0..1
    if not pixels.isfinite().all():
        refuse([Problem("pictures of NaN or infinity were drawn", f"--dtype {pipe.unet.dtype}".replace("torch.", ""),
                        "activations overflow the number format, or the weights of the model or the LoRA are damaged; "
                        "nothing was saved", "--dtype float32, a smaller strength, or another file", "nonfinite")])
    return pipe.numpy_to_pil(pipe.image_processor.pt_to_numpy(pixels))


# ----------------------------------------------------------------------------------------------------------------------
# Measuring and showing


def measure(args: argparse.Namespace, drawn: dict[float, list[Image]], reference: list[Real]) -> dict[str, object]:
    """Distances at each strength, the floor, and the share of the gap between them that each strength closes."""
    from trainkit.evaluation import style_distance

    real = [opened(r.path) for r in reference]
    training = [opened(path) for path in pictures_in(args.training)]
    floor = style_distance(training, real, args.clip)
    distance = {strength: style_distance(pictures, real, args.clip) for strength, pictures in drawn.items()}
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


def described(kind: str, file: Path | None) -> dict[str, str]:
    return {kind: file.name, f"{kind}_sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file else {}


def grid(drawn: dict[float, list[Image]], wanted: list[Wanted], reference: list[Real]) -> Image:
    """Ten nouns spread over the list; the last column is a real picture of the noun, for comparison only."""
    from trainkit.preview import sheet

    real = {r.noun: r.path for r in reference}
    first = [i for i, w in enumerate(wanted) if w.copy == 0]
    shown = first[:: max(1, len(first) // GRID_ROWS)][:GRID_ROWS]
    rows = [[*(pictures[i] for pictures in drawn.values()), opened(real[wanted[i].noun])] for i in shown]
    columns = ["base" if s == 0 else f"LoRA {s:g}" for s in drawn]
    shared = os.path.commonprefix([wanted[i].prompt for i in shown])
    return sheet(rows, columns=[*columns, "real"], names=[wanted[i].noun for i in shown], title=f"{shared.strip()} …")


def table(result: dict, out: Path) -> str:
    lines = [f"style distance to {result['reference_pictures']} real pictures, {result['pictures']} drawn a strength",
             f"{'':<14}{'distance':>10}{'gap closed':>12}"]
    for row in result["strengths"]:
        name = "base" if row["strength"] == 0 else f"LoRA {row['strength']:g}"
        share = row["share_of_gap_closed"]
        closed = "" if row["strength"] == 0 or share is None else f"{share:>11.0%}"
        lines.append(f"{name:<14}{row['style_distance']:>10.4f} {closed}")
    lines.append(f"{'floor':<14}{result['floor']:>10.4f}   the training pictures themselves")
    return "\n".join([*lines, f"drawn in {result['seconds']:.0f} s; see {out / 'grid.png'}"])


if __name__ == "__main__":
    exit_with_message(main)
