"""Write a LoRA in the layout of another program. Every kind of LoRA is read, whichever program wrote it.

    python scripts/convert_lora.py --lora runs/dog --to webui --out dog.safetensors

This reads the LoRA of a run and writes it for ComfyUI and WebUIs. Every layer is read back and compared. If a layer or
a tensor is not known, nothing is written, and the message names it.

    --to diffusers    pipe.load_lora_weights() of Diffusers
    --to webui        ComfyUI, Forge, A1111, InvokeAI, SD.Next and kohya's scripts
    --to lycoris      LyCORIS; it differs from webui in the magnitudes of a DoRA
    --to onetrainer   OneTrainer, whose names have Diffusers' words
    --to peft         PEFT: --out is a folder with a folder for each network
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, refuse
from trainkit.inference import DTYPES, missing_file
from trainkit.process import own_settings, say
from trainkit.tools.checks import add_lora, lora_and_base, lora_line, named_lora, no_parent, text_problems

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.lora_file import LoraFile, Weights

LAYOUTS = ("diffusers", "webui", "lycoris", "onetrainer", "peft")
WITHOUT_EMBEDDINGS = ("diffusers", "peft")  # layouts whose LoRA files hold none


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("reading the LoRA")
    found, weights = lora_and_base(args)
    refuse(conversion_problems(args, found, has_base=weights is not None))
    print(lora_line(found, args.lora))
    if args.svd_rank:
        found, lost = found.low_rank(args.svd_rank, weights)
        print(f"the nearest LoRA of rank {args.svd_rank} lacks {100 * lost:.2g} % of the change of the weights")
    if args.dry_run:
        print(f"it would be written to {args.out} for {args.to}; --dry_run writes nothing")
        return
    for path, part in outputs(args, found):
        error = write(args, path, part, weights)
        print(f"{path}: every layer read back; the largest error is {error:.1e} of a layer's largest number"
              if part.layers else f"{path}: embeddings, read back")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add_lora(add)
    add("--to", required=True, choices=LAYOUTS, help="The layout.")
    add("--out", required=True, type=Path, metavar="FILE", help="The file to write, or the folder with --to peft.")
    add("--base", metavar="MODEL", help="The base model's folder or its name on the Hub. It is needed for a DoRA whose "
        "magnitudes must change, and for a model that is not as large as the released ones. Weights are read one by "
        "one.")
    add("--dtype", choices=DTYPES, default="float16", help="The precision of the factors. Diffusers' and PEFT's "
        "layouts are always in float32. The default is float16.")
    add("--svd_rank", type=int, metavar="R", help="Write the nearest plain LoRA of this rank, for a program that knows "
        "no other kind.")
    add("--metadata", choices=("full", "minimal", "none"), default="full", help="How much of the header to keep. "
        "minimal: the title and the base model's family. none: only what programs need. The default is full.")
    add("--dry_run", action="store_true", help="Say what the file is and what would be written, and write nothing.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    args = parser.parse_args(argv)
    args.lora = named_lora(args.lora)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if not args.lora.exists():
        yield missing_file("--lora", args.lora, "it is read first")
    if args.out.exists() and args.out.resolve() == args.lora.resolve():
        yield Problem("the file would replace itself", f"--out {args.out}", "it is the file that is read",
                      "give another name with --out")
    yield from no_parent(args.out, "out", "file")
    if args.to == "peft" and args.out.is_file():
        yield Problem(f"{args.out} is a file", f"--out {args.out}", "a PEFT checkpoint is a folder", "name a folder")
    if args.to != "peft" and args.out.is_dir():
        yield Problem(f"{args.out} is a folder", f"--out {args.out}", "a file is written", "name a file in it")
    if args.svd_rank is not None and args.svd_rank < 1:
        yield Problem(f"--svd_rank {args.svd_rank}", "--svd_rank", "a rank is 1 or more", "--svd_rank 32")


def conversion_problems(args: argparse.Namespace, found: LoraFile, *, has_base: bool) -> Iterator[Problem]:
    if found.family is None and not has_base and args.to not in WITHOUT_EMBEDDINGS and found.layers:
        yield Problem("the base model's family is not known", f"--lora {args.lora}", "names in this layout differ for "
                      "SD 1.x and SDXL, and the file does not say which it is for", "--base MODEL")
    if args.svd_rank and found.needs_weights and not has_base:
        yield Problem("a DoRA's update depends on the base model", f"--svd_rank {args.svd_rank}", "its weights are "
                      "needed to compute the update", "--base MODEL")


# ----------------------------------------------------------------------------------------------------------------------
# Conversion


def outputs(args: argparse.Namespace, found: LoraFile) -> Iterator[tuple[Path, LoraFile]]:
    """The files to write: embeddings come with the LoRA where the layout has a place for them."""
    if not found.embeddings or not found.layers or args.to not in WITHOUT_EMBEDDINGS:
        yield args.out, found
        return
    yield args.out, replace(found, embeddings={})
    for name, encoders in found.embeddings.items():
        yield (args.out.with_name(f"{args.out.stem}_{name or 'emb'}.safetensors"),
               replace(found, layers={}, embeddings={"": encoders}))


def write(args: argparse.Namespace, path: Path, part: LoraFile, weights: Weights | None) -> float:
    import torch

    def metadata(tensors: Mapping[str, Tensor]) -> Mapping[str, str]:
        return header_of(args, part, tensors)

    return part.write(path, args.to, dtype=getattr(torch, args.dtype), weights=weights, metadata=metadata)


def header_of(args: argparse.Namespace, part: LoraFile, tensors: Mapping[str, Tensor]) -> Mapping[str, str]:
    """The source's header, with what is said of the network and of the base model made true."""
    from trainkit.lora_file import BASES, hash_metadata, kept, network_of

    header = dict(part.metadata)
    if part.layers and args.to not in WITHOUT_EMBEDDINGS:
        base = BASES[part.family] if part.family else {}
        header = {**base, "modelspec.sai_model_spec": "1.0.1", "modelspec.title": args.out.stem, **header,
                  **network_of(part.layers)}
        header |= hash_metadata(tensors, {"format": "pt", **header})
    return kept(header, args.metadata)
