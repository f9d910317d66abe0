"""What the tools that write LoRA files have in common: the flags of the file, its header, and where embeddings go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, UserError
from trainkit.inference import DTYPES
from trainkit.tools.checks import no_parent

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.lora_file import LoraFile, Weights

LAYOUTS = ("diffusers", "webui", "lycoris", "onetrainer", "peft")
WITHOUT_EMBEDDINGS = ("diffusers", "peft")  # layouts whose LoRA files hold none


def add_out(add: Callable[..., object], *also: str, folder: str = "with --to peft") -> None:
    """The flag of the file that is written.

    also    other names of the flag
    folder  when it is a folder
    """
    add("--out", *also, required=True, type=Path, metavar="FILE", help=f"The file to write, or the folder {folder}.")


def rank_problems(args: argparse.Namespace, *flags: str) -> Iterator[Problem]:
    for flag in flags:
        if (rank := getattr(args, flag)) is not None and rank < 1:
            yield Problem(f"--{flag} {rank}", f"--{flag}", "a rank is 1 or more", f"--{flag} 16")


def add_output(add: Callable[..., object], *, layout: str) -> None:
    """The flags of the file that is written. layout: which one it has without --to, in words; "" where none is one."""
    if layout:
        add("--to", choices=LAYOUTS, help=f"The layout of the file, as in convert_lora. The default is {layout}.")
    add("--dtype", choices=DTYPES, default="float16", help="The precision of the factors. Diffusers' and PEFT's "
        "layouts are always in float32. The default is float16.")
    add("--metadata", choices=("full", "minimal", "none"), default="full", help="How much of the header to keep. "
        "minimal: the title and the base model's family. none: only what programs need. The default is full.")
    add("--dry_run", action="store_true", help="Say what would be written, and write nothing.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")


def output_problems(out: Path, layout: str, inputs: Mapping[str, Path]) -> Iterator[Problem]:
    """inputs: what the files that are read are called -> the files"""
    for flag, path in inputs.items():
        if out.exists() and path.exists() and out.resolve() == path.resolve():
            yield Problem("the file would replace itself", f"--out {out}", f"it is read as {flag}", "give another name "
                          "with --out")
    yield from no_parent(out, "out", "file")
    if layout == "peft" and out.is_file():
        yield Problem(f"{out} is a file", f"--out {out}", "a PEFT checkpoint is a folder", "name a folder")
    if layout != "peft" and out.is_dir():
        yield Problem(f"{out} is a folder", f"--out {out}", "a file is written", "name a file in it")


def family_problems(found: LoraFile, layout: str, named: str, *, has_base: bool) -> Iterator[Problem]:
    if found.family is None and not has_base and layout not in WITHOUT_EMBEDDINGS and found.layers:
        yield Problem("the base model's family is not known", named, "names in this layout differ for SD 1.x and SDXL, "
                      "and the file does not say which it is for", "--base MODEL")


def outputs(out: Path, layout: str, found: LoraFile) -> Iterator[tuple[Path, LoraFile]]:
    """The files to write: embeddings come with the LoRA where the layout has a place for them."""
    if not found.embeddings or not found.layers or layout not in WITHOUT_EMBEDDINGS:
        yield out, found
        return
    yield out, replace(found, embeddings={})
    for name, encoders in found.embeddings.items():
        yield (out.with_name(f"{out.stem}_{name or 'emb'}.safetensors"),
               replace(found, layers={}, embeddings={"": encoders}))


def write(args: argparse.Namespace, layout: str, found: LoraFile, weights: Weights | None) -> None:
    """Write all files, read them back, and say how exact they are."""
    import torch

    for path, part in outputs(args.out, layout, found):
        def metadata(tensors: Mapping[str, Tensor], part: LoraFile = part) -> Mapping[str, str]:
            return header_of(args, layout, part, tensors)

        try:
            error = part.write(path, layout, dtype=getattr(torch, args.dtype), weights=weights, metadata=metadata)  # type: ignore[arg-type]
        except UserError as problem:
            raise UserError(*map(without_run, problem.problems)) from problem
        print(f"{path}: every layer read back; the largest error is {error:.1e} of a layer's largest number"
              if part.layers else f"{path}: embeddings, read back")


def without_run(problem: Problem) -> Problem:
    """A problem of the disk, whose next step is no run's."""
    start, _, _ = problem.fix.partition("then --resume_from_checkpoint")
    return problem if start == problem.fix else replace(problem, fix=f"{start}then run the command again")


def header_of(args: argparse.Namespace, layout: str, part: LoraFile, tensors: Mapping[str, Tensor]
              ) -> Mapping[str, str]:
    """The file's header, with what is said of the network and of the base model made true."""
    from trainkit.lora_file import BASES, hash_metadata, kept, network_of

    header = dict(part.metadata)
    if part.layers and layout not in WITHOUT_EMBEDDINGS:
        base = BASES[part.family] if part.family else {}
        header = {**base, "modelspec.sai_model_spec": "1.0.1", "modelspec.title": args.out.stem, **header,
                  **network_of(part.layers)}
        header |= hash_metadata(tensors, {"format": "pt", **header})
    return kept(header, args.metadata)


def made_of(files: Sequence[tuple[Path, object]], key: str, **facts: object) -> dict[str, str]:
    """The header's record of what a file was made of: the names and SHA-256 of the files, and how.

    files  each with what it was used as, such as its strength
    key    of the record, a JSON object
    """
    from trainkit.files import sha256

    sources = [{"name": path.name, "sha256": sha256(path)} | ({} if used is None else {"strength": used})
               for path, used in files]
    return {key: json.dumps({**facts, "from": sources}), "modelspec.merged_from": ", ".join(
        path.name for path, _ in files)}
