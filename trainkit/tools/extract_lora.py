"""Write the difference of two models as a LoRA: a base model, and a model that was trained from it.

    python scripts/extract_lora.py --base sdxl --tuned my-model.safetensors --rank 32 --out mine.safetensors

Both are folders in the Diffusers layout, .safetensors files, or names on the Hub. The weights are read one tensor at a
time, so it needs little memory. The LoRA is for the attention layers and the text encoders; with --conv_dim also for
the convolutions. The message says how much of the difference these layers hold, and how much of that the rank loses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, counted, refuse
from trainkit.process import own_settings, say
from trainkit.tools.checks import base_of, names_of, text_problems
from trainkit.tools.lora_output import add_out, add_output, output_problems, rank_problems, write

if TYPE_CHECKING:
    from trainkit.families.pretrained import Repo

RECORD = "ss_extracted"  # in a header: from which models, and how


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))
    say("reading the headers of both models")
    base, tuned = base_of(args.base, "--base"), base_of(args.tuned, "--tuned")
    from trainkit.merging.extract import ExtractSettings, extract, names_of_both
    from trainkit.runtime.progress import watched

    names = names_of_both(base, tuned)
    if args.dry_run:
        print(f"{counted(len(names), 'tensor')} would be compared, and the LoRA written to {args.out}; --dry_run "
              "writes nothing")
        return
    settings = ExtractSettings(args.rank, args.conv_dim, args.clamp_quantile, args.min_diff)
    with watched("tensors", len(names)) as show:
        found, account = extract(base, tuned, settings, names_of(base), show)
    print(f"{counted(len(found.layers), 'layer')} differ and are in the LoRA: {100 * account.covered:.3g} % of the "
          f"squared difference of all weights lies there, and {100 * account.error:.2g} % of their change is lost")
    write(args, args.to or "webui", replace(found, metadata=record(args, base, tuned)), None)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--base", "--model_org", required=True, metavar="MODEL", help="The base model.")
    add("--tuned", "--model_tuned", required=True, metavar="MODEL", help="The model that was trained from it.")
    add_out(add, "--save_to")
    add("--rank", "--dim", required=True, type=int, metavar="R", help="The rank.")
    add("--conv_dim", type=int, metavar="R", help="The rank of convolutions, resnets and samplers. Without this flag, "
        "they are left out.")
    add("--clamp_quantile", type=float, default=1.0, metavar="Q", help="Cut off the entries of the factors beyond this "
        "quantile, as kohya's program does at 0.99. The default is 1: nothing is cut off.")
    add("--min_diff", type=float, default=0.0, metavar="D", help="Leave out layers whose weights differ by no more. "
        "The default is 0. Give 1e-3 if the two models have different precisions.")
    add_output(add, layout="webui")
    return parser.parse_args(argv)


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    yield from rank_problems(args, "rank", "conv_dim")
    if not 0 < args.clamp_quantile <= 1:
        yield Problem(f"--clamp_quantile {args.clamp_quantile}", "--clamp_quantile", "it is a part of the entries",
                      "--clamp_quantile 0.99, or leave it out")
    if not 0 <= args.min_diff < float("inf"):
        yield Problem(f"--min_diff {args.min_diff}", "--min_diff", "it is a size", "--min_diff 1e-4")
    yield from output_problems(args.out, args.to or "webui",
                               {flag: Path(getattr(args, flag)) for flag in ("base", "tuned")})


def record(args: argparse.Namespace, base: Repo, tuned: Repo) -> dict[str, str]:
    """The names of both models, without the folders that they lie in."""
    import json

    facts = {"base": Path(base.path).name, "tuned": Path(tuned.path).name, "rank": args.rank,
             "conv_rank": args.conv_dim, "clamp_quantile": args.clamp_quantile}
    return {RECORD: json.dumps(facts), "ss_sd_model_name": Path(base.path).name}
