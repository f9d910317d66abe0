"""Generate images with a base model and the LoRAs trained on it, in the standard Diffusers pipeline.

    python scripts/generate.py --base assets/tiny-sd-icons --lora runs/mine --prompt "a fox, 3d icon" --seeds 0,1,2 \\
        --out runs/mine/images

A grid over the strength of the LoRA, with a weight on a word, in two passes, the second twice as large:

    python scripts/generate.py --base assets/tiny-sd-icons --lora runs/mine --prompt "a (red:1.3) fox, 3d icon" \\
        --grid strength=0,0.5,1 --scheduler dpmpp_2m --hires_scale 2 --out runs/mine/grid

If a LoRA was trained with --guidance_token, you can show it an image in addition to the prompt. The CLIP features of
the image take the place of the last padding token of the prompt, as in training:

    python scripts/generate.py --base assets/tiny-sd-icons --lora runs/mine --prompt "3d icon" \\
        --guidance_image assets/icons-3d/fox.png --out runs/mine/images

The program writes one image for each prompt and seed (p01_s0.png and so on). The settings are in the PNG text that
WebUIs read. It also writes sheet.png, where each row is a prompt and each column a seed. With guidance images, they
are the last column. A seed is that of torch.manual_seed. The same seed gives the same noise for every prompt.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, counted, refuse
from trainkit.inference import (
    DTYPES,
    PREDICTION_TYPES,
    add_embedding,
    add_new_tokens,
    after_denoising_step,
    base_problems,
    embeddings_of,
    encode_weighted,
    finite_images,
    fuse_loras,
    fused_loras,
    load_pipeline,
    lora_and_strength,
    lora_file,
    lora_hash,
    lora_name,
    lora_problems,
    missing_file,
    model_hash,
    sampled_by,
    scheduler_of,
    tokenizers,
    unreadable,
)
from trainkit.options.captions import LENGTHS, TOKENS
from trainkit.options.prompt_lines import SEEDS, SIDE_STEP, PromptLine, read_prompt_lines
from trainkit.options.prompt_weights import WeightedText, escaped, read_weights, unweighted, weight_problems
from trainkit.options.samplers import SAMPLERS, sampler_named, sampler_problems, webui_name
from trainkit.process import own_settings, say
from trainkit.tools import ASSETS
from trainkit.tools.checks import (
    base_of,
    make_out,
    names_of,
    number_problems,
    out_problems,
    shipped_problems,
    text_problems,
    writing_to,
)
from trainkit.tools.grids import axis, cells, grid_problems, loras_of
from trainkit.tools.memory import Drawing, Way, add_memory, way_for
from trainkit.tools.second_pass import (
    SecondPass,
    add_second_pass,
    enlarged,
    second_pass_of,
    second_pass_problems,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from trainkit.inference import Pipeline

log = logging.getLogger(__name__)

MOST_SKIPPED = 10  # layers: CLIP-L, the smallest released text encoder, has 12
ROWS = 25  # of a sheet: more would be more pixels than many programs open


@dataclass(frozen=True)
class Settings:
    """How an image is generated; None is the default of the model or of the pipeline.

    loras          each with its strength
    width, height  in pixels
    scheduler      a name of trainkit/options/samplers.py
    second_pass    over an enlarged image, if there is one
    """

    loras: tuple[tuple[Path, float], ...]
    width: int | None
    height: int | None
    steps: int
    guidance_scale: float | None
    scheduler: str | None
    second_pass: SecondPass | None


@dataclass(frozen=True)
class Shot:
    """One image to generate.

    line              what the user wrote
    prompt, negative  the same with weights, and with the names of learned tokens; no negative prompt is None
    features          [D] of its guidance image, scaled, if it has one
    """

    number: int  # of the prompt, from 1
    file_name: str
    line: PromptLine
    prompt: WeightedText
    negative: WeightedText | None
    seed: int
    settings: Settings
    image: Path | None = None
    features: Tensor | None = None


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    args.lines = prompt_lines(args)
    refuse(problems(args))
    refuse(make_out(args.out))
    say("loading PyTorch, Diffusers and the model")
    shots = plan(args)
    args.way = way_of(args, shots)
    pipe = load_pipeline(args.base, args.dtype, args.prediction_type, aside=args.way.aside)
    added = [add_embedding(pipe, file) for file in dict.fromkeys(args.embedding)]
    added += [add_new_tokens(pipe, args.embeddings)] if args.embeddings else []
    for renamed in added:
        shots = [replace(shot, prompt=shot.prompt.changed(renamed), negative=shot.negative and
                         shot.negative.changed(renamed))
                 for shot in shots]
    warn_of_full(pipe, shots, args.max_token_length // TOKENS)
    images = generate_images(pipe, args, shots)
    sheets = write_sheets(pipe, args, shots, images)
    print(f"{counted(len(images), 'image')} and {' and '.join(sheets)} in {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add_models(parser)
    add_prompts(parser)
    add_sampling(parser)
    add("--grid", type=axis, action="append", default=[], metavar="AXIS=A,B,..", help="Make one labelled grid. Its "
        "columns are strength=0,0.5,1 or step=500,1000 or seed=0,1 or scheduler=euler,ddim or prompt. Give it a second "
        "time for the rows, which else are the prompts.")
    add("--guidance_image", type=Path, action="append", default=[], metavar="FILE", help="An image to show to the "
        "model in addition to the prompt. Give one for all prompts, or repeat this flag for each prompt.")
    add("--clip", default=str(ASSETS / "tiny-clip-icons"), metavar="MODEL", help="The CLIP model whose "
        "features the LoRA was trained with. The default is the tiny CLIP in this repository.")
    add("--guidance_features", type=Path, metavar="FILE", help="A file of the tool extract-clip-features. The "
        "features of the guidance images are read from it and not computed.")
    add("--guidance_token_scale", type=float, default=1.0, metavar="X", help="The factor of the features. "
        "Use the value of the training.")
    add("--guidance_both_branches", action="store_true", help="Also show the guidance image with the negative prompt.")
    add("--batch_size", type=int, default=4, help="How many images are generated at once. The default is 4.")
    add("--dtype", choices=DTYPES, help="The precision. The default is bfloat16 on GPUs except Apple's.")
    add_memory(add)
    add("--out", required=True, type=Path, metavar="DIR", help="The folder for the images and sheet.png.")
    add("--no_metadata", action="store_true", help="Write no prompt and no settings into the PNG files.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompts_file:
        parser.error("there is no prompt: give --prompt TEXT or --prompts_file FILE")
    named = [lora_and_strength(text) for text in args.lora]
    args.runs = [path for path, _ in named]
    args.lora, args.named_strength = [lora_file(path) for path in args.runs], [strength for _, strength in named]
    args.embeddings = args.embeddings and embeddings_of(args.embeddings)
    if args.lora and len(args.lora_block_weights) < 2:
        args.lora_block_weights = (args.lora_block_weights or [""]) * len(args.lora)
    return args


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """The flags of what is asked for."""
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="The prompt. Repeat this flag for several "
        "prompts.")
    add("--prompts_file", type=Path, metavar="FILE", help="A text file with one prompt a line. Lines that begin with # "
        "are comments. Behind a prompt, options can stand as in kohya's trainer: --n NEGATIVE_PROMPT, --w WIDTH, "
        "--h HEIGHT, --d SEED, --l GUIDANCE_SCALE, --s STEPS, --ss SCHEDULER, --t HIRES_STRENGTH. They replace the "
        "flags for this line.")
    add("--negative_prompt", metavar="TEXT", help="A negative prompt for all prompts without one of their own.")
    add("--no_prompt_weights", action="store_true", help="Read (word:1.2), (word) and [word] as they stand there. "
        "Without this flag, they are weights, as in WebUIs, and \\( is a bracket.")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags of how the images are made."""
    add = parser.add_argument
    add("--max_token_length", type=int, choices=LENGTHS, default=TOKENS, help="As in training. The default is 75.")
    add("--seeds", type=whole_numbers, default=(0,), metavar="A,B,..", help="The seeds. Each "
        "prompt gets one image for each seed. The default is 0.")
    add("--clip_skip", type=int, metavar="N", help="How many of the last layers of the text encoders are left out, as "
        "in training. What WebUIs call clip skip 2 is 1 here.")
    add("--steps", type=int, default=25, help="The number of denoising steps. The default is 25.")
    add("--scheduler", type=scheduler, metavar="NAME", help=f"How to denoise: {', '.join(SAMPLERS)}. The names of "
        "WebUIs are read too, such as 'DPM++ 2M Karras'. Without this flag, it is the scheduler of the base model.")
    add("--guidance_scale", type=float, help="The strength of classifier-free guidance. Without this flag, it is "
        "the default of the pipeline.")
    add("--width", type=int, metavar="PIXELS", help="The width. The default is that of the model.")
    add("--height", type=int, metavar="PIXELS", help="The height. The default is that of the model.")
    add_second_pass(add)


def add_models(parser: argparse.ArgumentParser) -> None:
    """The flags of what is loaded."""
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="The base model: SDXL, SD 1.x or SD 2.x. It is a "
        ".safetensors file, a folder, or a name on the Hub.")
    add("--prediction_type", choices=PREDICTION_TYPES, help="What the base model predicts. Give this flag if you "
        "trained with it, or if a single file does not say it. Without this flag, the base model says it.")
    add("--lora", action="append", default=[], metavar="FILE[:X]", help="A LoRA file, or the folder of a run or of a "
        "checkpoint, or RUN@STEP, such as runs/dog@500. X is its strength, as in dog.safetensors:0.8. It may be "
        "negative. Repeat this flag for several LoRAs. Their updates add up, in any order.")
    add("--strength", type=float, action="append", default=[], metavar="X", help="The strength of the LoRAs that have "
        "no :X. Give one for all of them, or repeat this flag for each in their order. The default is 1.")
    add("--lora_block_weights", action="append", default=[], metavar="BLOCK=X,..", help="Factors on the strength in "
        "parts of the model, as in 'MID=0 IN04=0.5 OUT0[3-5]=0.2 text_encoder=0'. Blocks that are not named keep the "
        "strength. Give it once for all LoRAs, or once for each in their order; '' is for a LoRA without factors.")
    add("--embeddings", type=Path, metavar="FILE", help="The file NAME_emb.safetensors of a run with new tokens. "
        "It can also be a folder or RUN@STEP. The tokens then take the place of their words in the prompts.")
    add("--embedding", type=Path, action="append", default=[], metavar="FILE", help="An embedding of any program, in "
        "safetensors: A1111's, Diffusers' or ours. In prompts and negative prompts, write the file's name without its "
        "ending. Repeat this flag for several embeddings.")


def loras(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """Each file with its strength."""
    given = iter(args.strength * len(args.lora) if len(args.strength) == 1 else args.strength)
    return [(file, next(given, 1.0) if named is None else named)
            for file, named in zip(args.lora, args.named_strength, strict=True)]


def scheduler(text: str) -> str:
    try:
        return sampler_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}") from error


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong, and what to generate


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    sized = all((line.width or args.width) and (line.height or args.height) for line in args.lines)
    found = base_problems(args.base, args.embeddings, sized=not sized, prediction_type=args.prediction_type)
    yield from found or scheduler_problems(args)
    by_step = any(axis.name == "step" for axis in args.grid)  # then the first is the folder of a run
    named = [("--lora", file) for file in args.lora[by_step:]]
    named += [("--guidance_image", file) for file in args.guidance_image]
    named += [("--embeddings", args.embeddings)] if args.embeddings else []
    named += [("--embedding", file) for file in args.embedding]
    yield from (missing_file(flag, file, "it is read first") for flag, file in named if not file.is_file())
    by_header = [] if found else [*lora_problems(args.lora, args.base)]
    yield from by_header
    if not found and not by_header:
        yield from unreadable([file for file in args.lora if file.is_file()],
                              [file for file in args.embedding if file.is_file()], args.base)
    yield from block_problems(args)
    without = args.named_strength.count(None)
    if args.strength and (not without or len(args.strength) not in {1, without}):
        yield Problem(f"{counted(len(args.strength), 'strength')} for {without} LoRAs without one", "--strength",
                      "it is one for all, or one for each", "give --strength once, or once for each --lora without :X")
    if len(args.guidance_image) not in (0, 1, len(args.lines)):
        yield Problem(f"{len(args.guidance_image)} guidance images for {len(args.lines)} prompts", "--guidance_image",
                      "it is one for all, or one for each", "give --guidance_image once, or as often as --prompt")
    for flag in ("guidance_features", "guidance_both_branches"):
        if getattr(args, flag) and not args.guidance_image:
            yield Problem(f"--{flag} without --guidance_image", f"--{flag}", "there is no image to show to the model",
                          f"add --guidance_image FILE, or leave --{flag} out")
    yield from size_problems(args)
    yield from prompt_problems(args)
    yield from second_pass_problems(args)
    yield from grid_problems(args)
    yield from number_problems(args, counts=("steps", "batch_size"),
                               reals=("strength", "guidance_scale", "guidance_token_scale"))
    yield from (Problem(f"seed {seed}", "--seeds", "it is no number of 64 bits", f"{SEEDS[0]} to {SEEDS[-1]}")
                for seed in args.seeds if seed not in SEEDS)
    if args.guidance_image and not args.guidance_features:
        yield from shipped_problems(args, "clip")
    yield from out_problems(args.out)


def size_problems(args: argparse.Namespace) -> Iterator[Problem]:
    for flag in ("width", "height"):
        side = getattr(args, flag)
        if side is not None and (side < SIDE_STEP or side % SIDE_STEP):
            yield Problem(f"--{flag} {side}", f"--{flag}", f"sides are multiples of {SIDE_STEP} pixels",
                          f"--{flag} {max(SIDE_STEP, round(side / SIDE_STEP) * SIDE_STEP)}")
    if args.clip_skip is not None and not 0 <= args.clip_skip <= MOST_SKIPPED:
        yield Problem(f"--clip_skip {args.clip_skip}", "--clip_skip", "text encoders have no such layer",
                      f"--clip_skip 0 to {MOST_SKIPPED}")


def block_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Strengths of blocks that cannot be read, or that name none of a LoRA's. Without a mistake before, it is read."""
    from trainkit.adapters.patterns import strength_problems
    from trainkit.families import sgm
    from trainkit.lora_file import LoraFile

    given, flag = args.lora_block_weights, "--lora_block_weights"
    if given and len(given) != len(args.lora):
        yield Problem(f"{counted(len(given), 'list')} of block weights for {counted(len(args.lora), 'LoRA')}", flag,
                      "it is one for all, or one for each", f"give {flag} once, or once for each --lora")
        return
    if not any(given) or [*base_problems(args.base, None)] or not all(file.is_file() for file in args.lora):
        return
    base = base_of(args.base)
    names, blocks = names_of(base), sgm.numbered(base.glance("unet/config.json"))
    for file, text in zip(args.lora, given, strict=True):
        if text:
            layers = LoraFile.read(file, names=names, where=f"--lora {file}").layers
            yield from strength_problems(text, layers, blocks, lora_name(file))


def scheduler_problems(args: argparse.Namespace) -> list[Problem]:
    """Schedulers that cannot denoise with the base model; one problem for each."""
    from trainkit.families.single_file import model_at

    config = model_at(args.base, "--base").glance("scheduler/scheduler_config.json")
    asked = [(line.scheduler or args.scheduler, most_steps(args, line)) for line in args.lines]
    asked += [(name, most_steps(args, line)) for axis in args.grid if axis.name == "scheduler"
              for name in axis.values for line in args.lines]
    found = [problem for name, steps in dict.fromkeys(asked) if name
             for problem in sampler_problems(name, config, steps, "--scheduler")]
    return list({problem.where: problem for problem in found}.values())


def prompt_lines(args: argparse.Namespace) -> list[PromptLine]:
    """What --prompt and the lines of --prompts_file say. UserError: the file has no prompts, or unknown options."""
    lines = [PromptLine(prompt) for prompt in args.prompt]
    return lines + (read_prompt_lines(args.prompts_file, "--prompts_file") if args.prompts_file else [])


def most_steps(args: argparse.Namespace, line: PromptLine) -> int:
    """Of a pass over the images of a line."""
    steps = line.steps or args.steps
    second = None if [*second_pass_problems(args)] else second_pass_of(args, line, steps)
    return steps if second is None else max(steps, second.all_steps)


def negative_of(args: argparse.Namespace, line: PromptLine) -> str | None:
    return args.negative_prompt if line.negative_prompt is None else line.negative_prompt


def texts_of(args: argparse.Namespace, line: PromptLine) -> tuple[WeightedText, WeightedText | None]:
    """The prompt and the negative prompt of a line, with their weights."""
    read, negative = unweighted if args.no_prompt_weights else read_weights, negative_of(args, line)
    return read(line.prompt), None if negative is None else read(negative)


def prompt_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """What of the syntax of WebUIs is not read here; one problem for each text."""
    if args.no_prompt_weights:
        return
    texts = [("--prompts_file" if line.prompt not in args.prompt else "--prompt", line.prompt) for line in args.lines]
    texts += [("--negative_prompt" if line.negative_prompt is None else "--prompts_file", negative_of(args, line) or "")
              for line in args.lines]
    for where, text in dict.fromkeys(texts):
        yield from weight_problems(text, where)
    if any(read_weights(text).is_weighted for _, text in texts) and find_spec("compel") is None:
        yield Problem("prompts with weights need compel", "--prompt", "it is not installed",
                      "pip install compel, or --no_prompt_weights, which reads the brackets as text")


def plan(args: argparse.Namespace) -> list[Shot]:
    """Every prompt from every seed, each prompt's shots with the features of its own guidance image."""
    if args.grid:
        return grid_shots(args)
    images = args.guidance_image * (len(args.lines) if len(args.guidance_image) == 1 else 1)
    features = guidance_features(args) if images else {}
    digits = max(2, len(str(len(args.lines))))
    shots = []
    for number, (line, image) in enumerate(zip(args.lines, images or [None] * len(args.lines), strict=True), 1):
        for seed in args.seeds if line.seed is None else [line.seed]:
            name = f"p{number:0{digits}d}_s{seed}.png"
            shots.append(Shot(number, name, line, *texts_of(args, line), seed, settings_of(args, line), image,
                              features.get(image)))
    return shots


def grid_shots(args: argparse.Namespace) -> list[Shot]:
    """The images of a grid, row after row; a shot's number is that of its row."""
    shots = []
    for number, (_, row) in enumerate(cells(args)[1], 1):
        for column, cell in enumerate(row, 1):
            line = cell.line
            seed = next(seed for seed in (cell.seed, line.seed, args.seeds[0]) if seed is not None)
            plain = settings_of(args, line)
            settings = replace(plain, loras=loras_of(args, cell, plain.loras),
                               scheduler=cell.scheduler or plain.scheduler)
            name = f"r{number:02d}_c{column:02d}_s{seed}.png"
            shots.append(Shot(number, name, line, *texts_of(args, line), seed, settings))
    return shots


def settings_of(args: argparse.Namespace, line: PromptLine) -> Settings:
    """The flags, and what a line replaces of them."""
    guidance_scale = args.guidance_scale if line.guidance_scale is None else line.guidance_scale
    steps = line.steps or args.steps
    return Settings(tuple(loras(args)), line.width or args.width, line.height or args.height, steps,
                    guidance_scale, line.scheduler or args.scheduler, second_pass_of(args, line, steps))


def guidance_features(args: argparse.Namespace) -> dict[Path, Tensor]:
    """Guidance image -> features [D], scaled. UserError: unreadable, not in the file, not as wide as the text."""
    from trainkit.conditioning.clip_token import incompatible_features
    from trainkit.families.single_file import model_at

    known = from_file(args) if args.guidance_features else computed(args)
    where = f"--guidance_features {args.guidance_features}" if args.guidance_features else f"--clip {args.clip}"
    width = model_at(args.base, "--base").glance("unet/config.json").get("cross_attention_dim", 0)
    refuse(incompatible_features(len(next(iter(known.values()))), width, where))
    return {image: args.guidance_token_scale * row for image, row in known.items()}


def from_file(args: argparse.Namespace) -> dict[Path, Tensor]:
    from trainkit.data.clip_features import read_features
    from trainkit.data.images import content_digest

    features = read_features(args.guidance_features)
    digests = {image: content_digest(image.read_bytes()) for image in args.guidance_image}
    refuse(Problem(f"no features of {image}", f"--guidance_features {args.guidance_features}",
                   "images are found by the content of their files, and this one is not there",
                   "leave --guidance_features out and name the CLIP with --clip", "data")
           for image, digest in digests.items() if digest not in features)
    return {image: features[digest] for image, digest in digests.items()}


def computed(args: argparse.Namespace) -> dict[Path, Tensor]:
    from trainkit.data.clip_features import load_clip
    from trainkit.data.images import UnreadableImage, decode

    clip, known = load_clip(args.clip), {}
    for image in args.guidance_image:
        try:
            known[image] = clip(clip.pixels(decode(image.read_bytes()))[None])[0]
        except (OSError, UnreadableImage) as error:
            refuse([Problem(f"{image} cannot be read", "--guidance_image", f"{error}", "give another image", "data")])
    return known


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def by_loras(shots: Sequence[Shot]) -> dict[tuple[tuple[Path, float], ...], list[Shot]]:
    """The shots by the LoRAs that are in the weights."""
    found: dict[tuple[tuple[Path, float], ...], list[Shot]] = {}
    for shot in shots:
        found.setdefault(shot.settings.loras, []).append(shot)
    return found


def way_of(args: argparse.Namespace, shots: Sequence[Shot]) -> Way:
    """How the pipeline is on the card, by --memory and by what is generated at once."""
    groups = by_loras(shots)
    at_once = {(len(some), some[0].settings) for group in groups.values() for some in batches(group, args.batch_size)}
    return way_for(args, [Drawing(count, one.width, one.height, one.second_pass) for count, one in at_once],
                   copies=len(groups) > 1)


def batches(shots: Sequence[Shot], size: int) -> Iterator[Sequence[Shot]]:
    """Neighbours that the pipeline can generate at once, `size` of them at most."""
    for _, alike in groupby(shots, key=lambda shot: (shot.settings, shot.negative is None)):
        together = list(alike)
        yield from (together[start : start + size] for start in range(0, len(together), size))


def warn_of_full(pipe: Pipeline, shots: Sequence[Shot], max_chunks: int) -> None:
    """Say which prompts leave no place for the features."""
    from trainkit.families.tokenize import has_free_place

    prompts = list(dict.fromkeys(shot.prompt.text for shot in shots if shot.features is not None))
    free_places = has_free_place(tokenizers(pipe), prompts, max_chunks) if prompts else []
    for prompt in (prompt for prompt, free_place in zip(prompts, free_places, strict=True) if not free_place):
        log.warning("this prompt fills the text encoder's whole context; its image is generated without the guidance "
                    "image: %s", prompt)


def encode(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot]) -> dict[str, Tensor]:
    """The text of each shot as the stock pipeline takes it, with its guidance image where it has one."""
    import torch

    from trainkit.conditioning.clip_token import with_token
    from trainkit.families.tokenize import has_free_place, prompt_lengths

    negative = None if shots[0].negative is None else [shot.negative or unweighted("") for shot in shots]
    most = args.max_token_length // TOKENS
    text = encode_weighted(pipe, [shot.prompt for shot in shots], negative, max_chunks=most, clip_skip=args.clip_skip)
    if shots[0].features is None:
        return text
    tokens = torch.stack([shot.features for shot in shots if shot.features is not None])  # [B,D], row i for image i
    branches = {"prompt_embeds": [shot.prompt.text for shot in shots]}
    if args.guidance_both_branches:
        branches["negative_prompt_embeds"] = [text.text for text in negative or [unweighted("")] * len(shots)]
    known = tokenizers(pipe)
    guided = {name: with_token(text[name], tokens, torch.tensor(has_free_place(known, prompts, most)),
                               prompt_lengths(known, prompts, most)) for name, prompts in branches.items()}
    return text | guided


def generate_images(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot]) -> list[Image]:
    """Write every image as soon as it is done, with a line that tells how far it is -> them as small as on a sheet."""
    from trainkit.runtime.progress import watched

    images: dict[str, Image] = {}
    groups = by_loras(shots)
    with watched("generating images", len(shots)) as show:
        for loras, some in groups.items():
            with (fused_loras(pipe, loras, args.lora_block_weights) if len(groups) > 1 else
                  nullcontext(fuse_loras(pipe, loras, blocks=args.lora_block_weights))):
                generate_alike(pipe, args, some, images, show)
    return [images[shot.file_name] for shot in shots]


def generate_alike(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot], images: dict[str, Image],
                   show: Callable[[float], None]) -> None:
    """Write the images that have the same LoRAs, and put them into `images` under their file names."""
    for some in batches(shots, args.batch_size):
        passes = 2 if some[0].settings.second_pass else 1
        after = [after_denoising_step(show, len(images), len(some), passes=passes, before=k) for k in range(passes)]
        images |= written(pipe, args, some, after)
        show(len(images))


def written(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot], after_steps: Sequence[Callable[..., dict]]
            ) -> dict[str, Image]:
    """Generate and write some images -> name of the file -> the image, as small as on a sheet.

    after_steps  the pipeline's callback in each pass
    """
    from trainkit.sheets import TILE_PX, save_png

    images = run_pipeline(pipe, args, shots, after_steps)
    with writing_to(args.out):
        for shot, image in zip(shots, images, strict=True):
            save_png(args.out / shot.file_name, image, parameters(pipe, args, shot))
            image.thumbnail((TILE_PX[1], TILE_PX[1]))
    return {shot.file_name: image for shot, image in zip(shots, images, strict=True)}


def run_pipeline(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot],
                 after_steps: Sequence[Callable[..., dict]]) -> list[Image]:
    import torch

    settings = shots[0].settings
    with torch.no_grad(), args.way.reading(pipe):
        text = encode(pipe, args, shots)
    noise = [torch.Generator().manual_seed(shot.seed) for shot in shots]
    width, height = size(pipe, settings)
    guidance, second = scale(pipe, settings), settings.second_pass
    with sampled_by(pipe, settings.scheduler), args.way.drawing(pipe):
        images = finite_images(pipe, **text, height=height, width=width, num_inference_steps=settings.steps,
                               guidance_scale=guidance, generator=noise, callback_on_step_end=after_steps[0])
        return images if second is None else enlarged(
            pipe, images, second, text, [shot.seed for shot in shots], guidance_scale=guidance,
            callback_on_step_end=after_steps[1])


def size(pipe: Pipeline, settings: Settings) -> tuple[int, int]:
    """Width and height in pixels; the stock pipelines would overlook one that is asked for alone."""
    default = pipe.unet.config.sample_size
    high, wide = default if isinstance(default, (list, tuple)) else (default, default)
    return settings.width or wide * pipe.vae_scale_factor, settings.height or high * pipe.vae_scale_factor


def scale(pipe: Pipeline, settings: Settings) -> float:
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    return default if settings.guidance_scale is None else settings.guidance_scale


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_sheets(pipe: Pipeline, args: argparse.Namespace, shots: Sequence[Shot], images: Sequence[Image]
                 ) -> list[str]:
    """sheet.png, and more of them for many prompts -> their names."""
    from trainkit.sheets import save_png

    rows = [list(row) for _, row in groupby(zip(shots, images, strict=True), key=lambda pair: pair[0].number)]
    names = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        names.append(f"sheet_{start // ROWS + 1:02d}.png" if start else "sheet.png")
        with writing_to(args.out):
            first, _ = some[0][0]
            save_png(args.out / names[-1], contact_sheet(args, some), parameters(pipe, args, first))
    return names


def contact_sheet(args: argparse.Namespace, rows: Sequence[Sequence[tuple[Shot, Image]]]) -> Image:
    """Rows: prompts, columns: seeds, and the guidance image last where there is one."""
    from trainkit.data.images import decode
    from trainkit.sheets import sheet

    title = " + ".join([Path(args.base).name, *map(lora_name, args.lora)])
    if args.grid:
        columns, labelled_rows = cells(args)
        names = [labelled_rows[row[0][0].number - 1][0] for row in rows]
        return sheet([[image for _, image in row] for row in rows], columns=columns, names=names, title=title)
    across = max(len(row) for row in rows)
    seeds = {tuple(shot.seed for shot, _ in row) for row in rows}
    columns = [f"seed {seed}" for seed in next(iter(seeds))] if len(seeds) == 1 else [""] * across
    names, tiles = [], []
    for row in rows:
        shot = row[0][0]
        names.append(shot.line.prompt if len(seeds) == 1 else f"{shot.line.prompt} (seed {listing_of_seeds(row)})")
        tiles.append([image for _, image in row] + [None] * (across - len(row)))
        if shot.image:
            tiles[-1].append(decode(shot.image.read_bytes()))
    columns += ["guidance image"] if args.guidance_image else []
    return sheet(tiles, columns=columns, names=names, title=title)


def listing_of_seeds(row: Sequence[tuple[Shot, Image]]) -> str:
    return ", ".join(str(shot.seed) for shot, _ in row)


def parameters(pipe: Pipeline, args: argparse.Namespace, shot: Shot) -> str:
    """The text of the PNG file, as WebUIs read it."""
    from trainkit.sheets import png_parameters

    if args.no_metadata:
        return ""
    settings, (width, height) = shot.settings, size(pipe, shot.settings)
    used = scheduler_of(pipe, settings.scheduler)
    written, negative = escaped if args.no_prompt_weights else str, negative_of(args, shot.line)
    return png_parameters(written(shot.line.prompt), {
        "Steps": settings.steps, "Sampler": webui_name(type(used).__name__, used.config),
        "CFG scale": scale(pipe, settings), "Seed": shot.seed, "Size": f"{width}x{height}",
        **(settings.second_pass.facts() if settings.second_pass else {}),
        "Clip skip": "" if args.clip_skip is None else args.clip_skip + 1, "Model hash": model_hash(args.base),
        "Model": Path(args.base).name,
        "Lora hashes": ", ".join(f"{lora_name(file)}: {lora_hash(file)}" for file, _ in settings.loras),
        "LoRA": " ".join(f"{file.parent.name}/{file.name}:{strength:g}{blocks and f'({blocks})'}"
                         for (file, strength), blocks in zip(settings.loras, args.lora_block_weights, strict=True)),
        "Guidance image": shot.image.name if shot.image else "",
    }, negative=None if negative is None else written(negative))
