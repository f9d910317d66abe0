"""Make a LoRA smaller: the best LoRA of a smaller rank. The message says how much of the change is lost, by block.

    python scripts/resize_lora.py --lora big.safetensors --new_rank 16 --out small.safetensors

With --dynamic_method, each layer gets its own rank, and --new_rank is the largest one:

    --dynamic_method sv_ratio --dynamic_param 10       singular values larger than a tenth of the largest
    --dynamic_method sv_cumulative --dynamic_param 0.9  as many as make 90 % of the sum of the singular values
    --dynamic_method sv_fro --dynamic_param 0.9         as many as make 90 % of the size of the change (its norm)
    --dynamic_method energy --dynamic_param 0.9         the same with the norm's square

The names are those of kohya's resize_lora.py. A DoRA stays one, and needs --base. A LoHa, a LoKr or a full change
becomes a LoRA.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trainkit.errors import Problem, counted, refuse
from trainkit.inference import missing_file
from trainkit.process import own_settings, say
from trainkit.tools.checks import add_lora, block_name, block_order, lora_and_base, lora_line, named_lora, text_problems
from trainkit.tools.lora_output import (
    add_out,
    add_output,
    family_problems,
    made_of,
    output_problems,
    rank_problems,
    write,
)

if TYPE_CHECKING:
    from trainkit.lora_file import LoraFile
    from trainkit.merging.resize import Resized

DYNAMIC = ("sv_ratio", "sv_cumulative", "sv_fro", "energy")
RECORD = "ss_resized"  # in a header: of what file, and how


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("reading the LoRA")
    found, weights = lora_and_base(args)
    print(lora_line(found, args.lora))
    layout = args.to or found.layout or "webui"
    refuse([*output_problems(args.out, layout, {"--lora": args.lora}), *resize_problems(args, found, layout)])
    from trainkit.merging.resize import RankRule, resize
    from trainkit.runtime.progress import watched

    rule = RankRule(args.new_rank, args.new_conv_rank or args.new_rank, args.dynamic_method, args.dynamic_param or 1.0)
    with watched("layers", len(found.layers)) as show:
        smaller, report = resize(found, rule, weights, show)
    for line in report_lines(report):
        print(line)
    if args.dry_run:
        print(f"it would be written to {args.out}; --dry_run writes nothing")
        return
    how = {name: value for name in ("new_rank", "new_conv_rank", "dynamic_method", "dynamic_param")
           if (value := getattr(args, name)) is not None}
    record = made_of([(args.lora, None)], RECORD, **how) if args.lora.is_file() else {}
    write(args, layout, replace(smaller, metadata={**found.metadata, **record}), weights)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add_lora(add)
    add_out(add)
    add("--new_rank", required=True, type=int, metavar="R", help="The rank; with --dynamic_method, the largest one.")
    add("--new_conv_rank", type=int, metavar="R", help="The same for convolutions larger than 1 × 1. The default is "
        "--new_rank.")
    add("--dynamic_method", choices=DYNAMIC, help="How each layer gets its own rank.")
    add("--dynamic_param", type=float, metavar="Q", help="The number that --dynamic_method takes.")
    add("--base", metavar="MODEL", help="The base model's folder, its .safetensors file or its name on the Hub. It is "
        "needed for a DoRA, and for a model that is not as large as the released ones.")
    add_output(add, layout="that of the LoRA")
    args = parser.parse_args(argv)
    args.lora = named_lora(args.lora)
    return args


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if not args.lora.exists():
        yield missing_file("--lora", args.lora, "it is read first")
    yield from rank_problems(args, "new_rank", "new_conv_rank")
    q = args.dynamic_param
    if (args.dynamic_method is None) != (q is None):
        yield Problem("half of a rule", "--dynamic_method, --dynamic_param", "the two belong together",
                      "--dynamic_method sv_fro --dynamic_param 0.9")
    elif args.dynamic_method == "sv_ratio" and not (math.isfinite(q) and q > 1):
        yield Problem(f"--dynamic_param {q}", "--dynamic_method sv_ratio", "it is how many times smaller than the "
                      "largest a singular value may be", "--dynamic_param 10")
    elif args.dynamic_method not in (None, "sv_ratio") and not 0 < q <= 1:
        yield Problem(f"--dynamic_param {q}", f"--dynamic_method {args.dynamic_method}", "it is the part that is kept",
                      "--dynamic_param 0.9")


def resize_problems(args: argparse.Namespace, found: LoraFile, layout: str) -> Iterator[Problem]:
    if not found.layers:
        yield Problem("there is no LoRA in this file", f"--lora {args.lora}", "it holds embeddings alone",
                      "name a LoRA file", "data")
    if found.needs_weights and not args.base:
        yield Problem("a DoRA's change depends on the base model", f"--lora {args.lora}", "its weights are needed to "
                      "say what is lost", "--base MODEL")
    yield from family_problems(found, layout, f"--lora {args.lora}", has_base=bool(args.base))


def report_lines(report: Sequence[Resized]) -> Iterator[str]:
    """A line for each block of the model, and one for all."""
    from trainkit.merging.resize import lost_of

    blocks: dict[str, list[Resized]] = {}
    for each in report:
        blocks.setdefault(block_name(*each.place), []).append(each)
    width = max(len(name) for name in blocks)
    for name, held in sorted(blocks.items(), key=lambda pair: block_order(pair[0])):
        yield (f"  {name:<{width}}  {counted(len(held), 'layer'):>11}  rank {span([each.before for each in held])} -> "
               f"{span([each.after for each in held])}, lost {100 * lost_of(held):.2g} %")
    yield f"{100 * lost_of([*report]):.2g} % of the change is lost in all (relative to its norm)"


def span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
