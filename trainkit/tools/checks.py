"""What the tools check of their command lines alike: numbers, the folder for the results; and how they read a LoRA."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import IN_UTF8, Problem, counted, refuse, unwritable
from trainkit.inference import lora_file
from trainkit.tools import ASSETS

if TYPE_CHECKING:
    from trainkit.families.file_names import FileNames
    from trainkit.families.pretrained import Repo
    from trainkit.lora_file import LoraFile, Weights

BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)(?:\.(attentions|resnets)\.\d+)?.*|(encoder\.layers)\..*")
KINDS = {"LowRank": "LoRA", "Hadamard": "LoHa", "Kronecker": "LoKr", "Whole": "full"}  # of an update -> its name


def number_problems(args: argparse.Namespace, *, counts: Sequence[str], reals: Sequence[str]) -> Iterator[Problem]:
    """Counts below 1, and numbers or lists of them that are not finite."""
    for flag in counts:
        if getattr(args, flag) < 1:
            yield Problem(f"--{flag} {getattr(args, flag)}", f"--{flag}", "it is a count", f"--{flag} 1 or more")
    for flag in reals:
        value = getattr(args, flag)
        several = value if isinstance(value, (list, tuple)) else [value]
        yield from (Problem(f"--{flag} {number}", f"--{flag}", "no image can be generated with it",
                            f"give --{flag} a finite number")
                    for number in several if number is not None and not math.isfinite(number))


def text_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Prompts and paths that hold bytes no tokenizer and no file can take."""
    for flag, value in vars(args).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, (str, Path)) and (why := unwritable(str(text))):
                name = flag if flag.isupper() else f"--{flag}"  # DIR has no name to type
                yield Problem(f"{name} cannot be {str(text)!r}", name, why, IN_UTF8)


def shipped_problems(args: argparse.Namespace, *flags: str) -> Iterator[Problem]:
    """Flags whose default is a folder of the repository's assets/, where there is none."""
    for flag in flags:
        default = Path(getattr(args, flag))
        if default.is_relative_to(ASSETS) and not default.is_dir():
            yield Problem(f"--{flag} is missing", "command line", f"its default is assets/{default.name} of the "
                          "repository, and the installed package does not hold that folder",
                          f"give --{flag}, or run the tool in a clone of the repository")


def out_problems(out: Path) -> Iterator[Problem]:
    """Is the folder for the results, or one that it shall lie in, a file?"""
    there = next((path for path in (out, *out.parents) if path.exists()), out)
    if there.exists() and not there.is_dir():
        yield Problem(f"{there} is a file", f"--out {out}", "the results go into a folder", "name another with --out")


def make_out(out: Path) -> Iterator[Problem]:
    """Make the folder for the results, before hours are spent on them -> why that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(out, os.W_OK | os.X_OK) else "nothing may be written there"
    except OSError as error:
        why = os.strerror(error.errno or 0)
    if why:
        yield Problem(f"{out} cannot be written to", f"--out {out}", why, "name another folder with --out")


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """A disk that is full or gone while the results are written ends in a problem of the kind "disk"."""
    try:
        yield
    except OSError as error:
        refuse([Problem("the results cannot be written", f"--out {out}", f"{error}",
                        "free some space, or name a folder on another disk with --out", "disk")])


def add_lora(add: Callable[..., object]) -> None:
    """The flag --lora of a program that reads one LoRA file of any program; `named_lora` gives the file."""
    add("--lora", required=True, type=Path, metavar="FILE", help="The LoRA file, or the folder of a run or of a "
        "checkpoint, or RUN@STEP, or the folder of a PEFT checkpoint (adapter_config.json).")


def named_lora(lora: Path) -> Path:
    """The file that --lora names, or the folder of a PEFT checkpoint."""
    return lora if (lora / "adapter_config.json").is_file() else lora_file(lora)


def no_parent(file: Path, flag: str, what: str) -> Iterator[Problem]:
    """Is there no folder for a file to write?"""
    if not file.parent.is_dir():
        yield Problem(f"no folder {file.parent}", f"--{flag} {file}", f"the {what} is written into it",
                      f"make it: mkdir -p {file.parent}")


def lora_and_base(args: argparse.Namespace) -> tuple[LoraFile, Weights | None]:
    """What --lora names, any program's, and the weights of --base where it is given."""
    from trainkit.lora_file import BaseWeights, LoraFile

    base = base_of(args.base) if args.base else None
    found = LoraFile.read(args.lora, names=names_of(base) if base else None, where=f"--lora {args.lora}")
    return found, BaseWeights(base) if base else None


def base_of(base: str, flag: str = "--base") -> Repo:
    from trainkit.families.single_file import model_at

    repo = model_at(base, flag)
    refuse(repo.unreachable("model_index.json"))
    return repo


def names_of(base: Repo) -> FileNames:
    """What the modules of a model are called in files."""
    from trainkit.families.file_names import SD_NAMES, xl_names

    unet = base.glance("unet/config.json")
    return xl_names(unet) if unet.get("addition_embed_type") == "text_time" else SD_NAMES


def block_name(network: str, path: str) -> str:
    """The block of the model that a module lies in."""
    match = BLOCK.fullmatch(path)
    if match is None:
        return f"{network} {path}"
    if match[3]:
        return network
    return f"{match[1]} {match[2]}" if match[2] else match[1]


def block_order(name: str) -> tuple[int, str]:
    """In the model's order, text encoders last."""
    starts = ("down", "mid", "up", "unet", "text_encoder")
    return next((k for k, start in enumerate(starts) if name.startswith(start)), len(starts)), name


def lora_line(found: LoraFile, path: Path) -> str:
    """One line: what the file is."""
    kinds = Counter(KINDS[type(layer.update).__name__] for layer in found.layers.values())
    listed = ", ".join(f"{counted(n, 'layer')} of {kind}" for kind, n in kinds.items())
    dora = " with DoRA's magnitudes" if found.needs_weights else ""
    embeddings = f"{counted(len(found.embeddings), 'embedding')}" if found.embeddings else ""
    what = ", ".join(filter(None, (listed + dora, embeddings))) or "nothing"
    family = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", None: "a base model of unknown family"}[found.family]
    return f"{path}: {what}, for {family}"
