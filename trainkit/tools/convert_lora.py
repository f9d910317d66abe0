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
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainkit.errors import Problem, refuse
from trainkit.inference import missing_file
from trainkit.process import own_settings, say
from trainkit.tools.checks import add_lora, lora_and_base, lora_line, named_lora, text_problems
from trainkit.tools.lora_output import LAYOUTS, add_out, add_output, family_problems, output_problems, write

if TYPE_CHECKING:
    from trainkit.lora_file import LoraFile


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
    write(args, args.to, found, weights)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add_lora(add)
    add("--to", required=True, choices=LAYOUTS, help="The layout.")
    add_out(add)
    add("--base", metavar="MODEL", help="The base model's folder or its name on the Hub. It is needed for a DoRA whose "
        "magnitudes must change, and for a model that is not as large as the released ones. Weights are read one by "
        "one.")
    add("--svd_rank", type=int, metavar="R", help="Write the nearest plain LoRA of this rank, for a program that knows "
        "no other kind.")
    add_output(add, layout="")
    args = parser.parse_args(argv)
    args.lora = named_lora(args.lora)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if not args.lora.exists():
        yield missing_file("--lora", args.lora, "it is read first")
    yield from output_problems(args.out, args.to, {"--lora": args.lora})
    if args.svd_rank is not None and args.svd_rank < 1:
        yield Problem(f"--svd_rank {args.svd_rank}", "--svd_rank", "a rank is 1 or more", "--svd_rank 32")


def conversion_problems(args: argparse.Namespace, found: LoraFile, *, has_base: bool) -> Iterator[Problem]:
    yield from family_problems(found, args.to, f"--lora {args.lora}", has_base=has_base)
    if args.svd_rank and found.needs_weights and not has_base:
        yield Problem("a DoRA's update depends on the base model", f"--svd_rank {args.svd_rank}", "its weights are "
                      "needed to compute the update", "--base MODEL")
