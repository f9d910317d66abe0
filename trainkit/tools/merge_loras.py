"""Merge LoRAs into one LoRA, or into a base model. Files of all programs are read, and nothing is trained again.

    python scripts/merge_loras.py runs/dog:0.8 style.safetensors:0.5 --method concat --out merged.safetensors

The number after the colon is the strength; without it, it is 1. Every layer is read back and compared.

    --method concat           the sum of both, exactly; the ranks add up
    --method linear           the same sum, with a smaller rank where that loses nothing
    --method svd              the same sum, cut to --rank; the message says what is lost
    --method ties             the largest entries of each LoRA, without those whose sign is outvoted
    --method dare_linear      a random part of the entries of each LoRA, scaled up
    --method dare_ties        both
    --method magnitude_prune  the largest entries of each LoRA
    --method ziplora          learns how much of each column of both LoRAs to take; it needs --base and two prompts

    python scripts/merge_loras.py runs/dog style.safetensors --method ziplora --base MODEL --out zip.safetensors \\
        --subject_prompt "a TOK dog" --style_prompt "in the style of SZN"

With --into_base MODEL, --out is a new base model: a folder if MODEL is one, else a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, counted, refuse
from trainkit.inference import PREDICTION_TYPES, missing_file
from trainkit.process import own_settings, say
from trainkit.tools.checks import base_of, lora_line, named_lora, names_of, number_problems, text_problems
from trainkit.tools.lora_output import (
    LAYOUTS,
    add_out,
    add_output,
    family_problems,
    made_of,
    output_problems,
    rank_problems,
    write,
)

if TYPE_CHECKING:
    from trainkit.families.pretrained import Repo
    from trainkit.lora_file import LoraFile
    from trainkit.merging.merge import Merge, WeightedLora

METHODS = ("concat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ziplora")
ROUNDING = 1e-9  # what fp64 arithmetic loses
RECORD = "ss_merged"  # in a header: what was merged, and how


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("reading the LoRAs")
    merge = merge_of(args)
    for part, file in zip(merge.parts, args.files, strict=True):
        print(f"{lora_line(part.lora, file)}; strength {part.strength:g}")
    embeddings = embeddings_in(args, merge.parts)
    layout = args.to or merge.parts[0].lora.layout or "webui"
    refuse(merge.problems(into_base=bool(args.into_base)))
    inputs = {f"LoRA {k + 1}": file for k, file in enumerate(args.files)}
    refuse(output_problems(args.out, "" if args.into_base else layout, inputs))
    if not args.into_base:
        refuse(family_problems(merge.parts[0].lora, layout, str(args.files[0]), has_base=bool(args.base)))
    if args.dry_run:
        print(f"{counted(len(merge.places), 'layer')} would be written to {args.out}; --dry_run writes nothing")
        return
    found = zipped(args, merge.parts) if args.method == "ziplora" else None
    if args.into_base:
        into_base(args, merge, found, embeddings)
    else:
        write_lora(args, merge, found, embeddings, layout)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("loras", nargs="+", metavar="FILE:STRENGTH", help="A LoRA file, or the folder of a run or of a checkpoint, or "
        "RUN@STEP, or the folder of a PEFT checkpoint, and its strength, which may be negative.")
    add("--method", choices=METHODS, default="concat", help="How the changes are merged. The default is concat.")
    add_out(add, folder="with --to peft, or with a base model that is a folder")
    add("--base", metavar="MODEL", help="The base model's folder, its .safetensors file or its name on the Hub. It is "
        "needed for ZipLoRA, for a DoRA, and for a model that is not as large as the released ones.")
    add("--into_base", metavar="MODEL", help="Write this base model with the merged change in its weights.")
    add("--rank", type=int, metavar="R", help="The rank of the merged LoRA with all methods but concat, linear and "
        "ziplora. The default is the sum of the ranks.")
    add("--density", type=float, default=0.5, metavar="D", help="The part of the entries that ties, dare_linear, "
        "dare_ties and magnitude_prune keep. The default is 0.5.")
    add("--majority_sign_method", choices=("total", "frequency"), default="total", help="How ties elects a sign: by "
        "the sum of the entries, or by their number. The default is total.")
    add("--seed", type=int, default=0, help="The seed of dare_linear, dare_ties and ziplora. The default is 0.")
    add("--embeddings_of", type=int, metavar="N", help="Which LoRA's embedding to keep if two have different ones of "
        "one name: 1 is the first LoRA. 0 keeps no embeddings at all.")
    zip_flags(add)
    add_output(add, layout="that of the first LoRA")
    args = parser.parse_intermixed_args(argv)  # a LoRA may stand behind a flag
    pairs = [with_strength(text) for text in args.loras]
    args.files, args.strengths = [named_lora(path) for path, _ in pairs], [strength for _, strength in pairs]
    return args


def zip_flags(add) -> None:  # type: ignore[no-untyped-def]
    """Of ZipLoRA; the first LoRA is the subject, the second the style."""
    add("--subject_prompt", metavar="TEXT", help="ZipLoRA: the prompt that the first LoRA was trained with.")
    add("--style_prompt", metavar="TEXT", help="ZipLoRA: the prompt that the second LoRA was trained with.")
    add("--subject_images", type=Path, metavar="DIR", help="ZipLoRA: the training images of the first LoRA. Without "
        "this flag, it generates images to learn from.")
    add("--style_images", type=Path, metavar="DIR", help="ZipLoRA: the same of the second LoRA.")
    add("--zip_steps", type=int, default=100, metavar="N", help="ZipLoRA: updates at most. The default is 100.")
    add("--zip_rate", type=float, default=0.01, metavar="X", help="ZipLoRA: the learning rate. The default is 0.01.")
    add("--zip_penalty", type=float, default=0.01, metavar="X", help="ZipLoRA: the weight of the penalty on similar "
        "columns. The default is 0.01.")
    add("--prediction_type", choices=PREDICTION_TYPES, help="ZipLoRA: what the base model predicts, if it does not say "
        "it itself.")


def with_strength(text: str) -> tuple[Path, float]:
    """FILE:0.8 -> the file and the number; a file whose name ends so is a file."""
    start, colon, end = text.rpartition(":")
    if colon and start and not Path(text).exists():
        try:
            return Path(start), float(end)
        except ValueError:
            pass
    return Path(text), 1.0


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    for file in args.files:
        if not file.exists():
            yield missing_file(str(file), file, "it is one of the LoRAs to merge")
    if len(args.files) < 2 and not args.into_base:
        yield Problem("there is one LoRA", "the command line", "merging takes two or more", "name another LoRA, or "
                      "give --into_base MODEL")
    yield from number_problems(args, counts=("zip_steps",), reals=("zip_rate", "zip_penalty"))
    for text, strength in zip(args.loras, args.strengths, strict=True):
        if not abs(strength) < float("inf"):
            yield Problem(f"the strength of {text}", "the command line", "it is no finite number", "write FILE:0.8")
    if not 0 < args.density <= 1:
        yield Problem(f"--density {args.density}", "--density", "it is a part of the entries", "--density 0.5")
    yield from rank_problems(args, "rank")
    if args.rank and (args.into_base or args.method in ("concat", "linear", "ziplora")):
        yield Problem(f"--rank {args.rank} has no effect", "--rank", "a base model has no rank" if args.into_base else
                      f"--method {args.method} loses nothing", "leave --rank out, or take --method svd")
    if args.embeddings_of is not None and not 0 <= args.embeddings_of <= len(args.files):
        yield Problem(f"--embeddings_of {args.embeddings_of}", "--embeddings_of", "it is 0 or the number of a LoRA",
                      "--embeddings_of 1")
    if args.into_base and args.to:
        yield Problem(f"--to {args.to} has no effect", "--to", "a base model keeps its own layout", "leave --to out")
    if args.into_base and args.out.exists():
        yield Problem(f"{args.out} exists", f"--out {args.out}", "a base model is never overwritten",
                      "name another with --out", "data")
    if args.method == "ziplora":
        yield from zip_problems(args)


def zip_problems(args: argparse.Namespace) -> Iterator[Problem]:
    if len(args.files) != 2:
        yield Problem(f"{len(args.files)} LoRAs for ZipLoRA", "--method ziplora", "it takes a subject and a style",
                      "name two LoRAs")
    if not (args.base or args.into_base):
        yield Problem("ZipLoRA needs the base model", "--method ziplora", "it compares what the model does with each "
                      "LoRA", "--base MODEL")
    for flag in ("subject", "style"):
        folder = getattr(args, f"{flag}_images")
        if not getattr(args, f"{flag}_prompt"):
            yield Problem(f"--{flag}_prompt is missing", "--method ziplora", "it is the prompt that the LoRA was "
                          "trained with", f'--{flag}_prompt "..."')
        if folder and not folder.is_dir():
            yield Problem(f"no folder {folder}", f"--{flag}_images", "it holds the training images", "name a folder, "
                          f"or leave --{flag}_images out", "data")


# ----------------------------------------------------------------------------------------------------------------------
# Merging


def merge_of(args: argparse.Namespace) -> Merge:
    from trainkit.lora_file import BaseWeights, LoraFile
    from trainkit.merging.merge import Merge, WeightedLora
    from trainkit.merging.methods import MergeSettings

    named = args.into_base or args.base
    base = base_of(named) if named else None
    names = names_of(base) if base else None
    parts = [WeightedLora(LoraFile.read(file, names=names, where=str(file)), strength, str(file))
             for file, strength in zip(args.files, args.strengths, strict=True)]
    settings = MergeSettings(args.method, args.rank, args.density, args.majority_sign_method, args.seed)
    return Merge(parts, settings, BaseWeights(base) if base else None, names)


def embeddings_in(args: argparse.Namespace, parts: Sequence[WeightedLora]):  # type: ignore[no-untyped-def]
    from trainkit.inference import own_embeddings
    from trainkit.merging.merge import embeddings_of
    from trainkit.runtime.weight_files import run_name

    found, clashes = embeddings_of(parts, first=args.embeddings_of)
    refuse(clashes)
    for file in args.files:
        beside = own_embeddings(file.parent, run_name(file.parent))
        if beside.is_file():
            print(f"{beside} holds new tokens of {file}: they stay there, and prompts with them need that file too")
    return found


def record(args: argparse.Namespace) -> dict[str, str]:
    from trainkit.merging.methods import RANDOM, SPARSE

    facts: dict[str, object] = {"method": args.method}
    facts |= {"density": args.density} if args.method in SPARSE else {}
    facts |= {"seed": args.seed} if args.method in (*RANDOM, "ziplora") else {}
    if args.method == "ziplora":
        facts |= {"steps": args.zip_steps, "rate": args.zip_rate, "penalty": args.zip_penalty,
                  "images": ["given" if folder else "generated" for folder in (args.subject_images, args.style_images)]}
    return made_of([(file, strength) for file, strength in zip(args.files, args.strengths, strict=True)
                    if file.is_file()], RECORD, **facts)


def zipped(args: argparse.Namespace, parts: Sequence[WeightedLora]) -> LoraFile:
    from trainkit.merging.zip_lora import ZipSettings, zip_loras
    from trainkit.runtime.progress import watched

    say("ZipLoRA: loading the base model")
    for flag in ("subject", "style"):
        if not getattr(args, f"{flag}_images"):
            say(f"without --{flag}_images, it learns from images that it generates with the {flag}'s LoRA")
    settings = ZipSettings((args.subject_prompt, args.style_prompt), (args.subject_images, args.style_images),
                           args.zip_steps, args.zip_rate, args.zip_penalty, args.seed)
    with watched("ZipLoRA: steps", args.zip_steps) as show:
        found, report = zip_loras(parts, args.into_base or args.base, settings, show, args.prediction_type)
    for name, before, after in zip(("subject", "style"), report.summed, report.learned, strict=True):
        print(f"mean squared distance from the {name}'s LoRA alone: {before:.3g} as a sum, {after:.3g} as learned")
    print(f"{counted(report.steps, 'step')}; the factors' mean |cos| is {report.similarity:.3f}")
    return found


def write_lora(args: argparse.Namespace, merge: Merge, found: LoraFile | None, embeddings, layout: str) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from trainkit.runtime.progress import watched

    if found is None:
        with watched("layers", len(merge.places)) as show:
            found, lost = merge.run(show)
        loss = f"the rank loses {100 * lost:.2g} %" if lost > ROUNDING else "nothing is lost"
        print(f"{counted(len(found.layers), 'layer')}; of the merged change (its norm), {loss}")
    assert layout in LAYOUTS, "a LoRA's layout is one of them"
    write(args, layout, replace(found, embeddings=embeddings, metadata={**found.metadata, **record(args)}),
          merge.weights)


def into_base(args: argparse.Namespace, merge: Merge, found: LoraFile | None, embeddings) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from trainkit.lora_file.parts import shape_of
    from trainkit.merging.base_model import base_problems, write_base
    from trainkit.merging.merge import WeightedLora
    from trainkit.merging.methods import MergeSettings
    from trainkit.runtime.progress import watched

    base = base_of(args.into_base)
    if found is not None:
        merge = replace(merge, parts=[WeightedLora(found, 1.0, "ZipLoRA")], settings=MergeSettings("linear"))
    refuse(base_problems(base, {place: shape_of(merge.held(place)[0][1].update) for place in merge.places}))
    if embeddings:
        print(f"the embeddings {', '.join(embeddings)} are no part of a base model and are left out: convert_lora "
              "writes them into files of their own")
    with watched("layers", len(merge.places)) as show:
        write_base(base, args.out, merge.places, merge.delta, show, metadata_of(base, args))
    print(f"{args.out}: {base.path} with {counted(len(merge.places), 'changed layer')}")


def metadata_of(base: Repo, args: argparse.Namespace) -> dict[str, str]:
    """Of a base model of one file: its own, without the hash that is no longer true."""
    header = getattr(base, "header", None)
    kept = {key: value for key, value in (header.metadata if header else {}).items() if "hash" not in key}
    return {**kept, **record(args)}
