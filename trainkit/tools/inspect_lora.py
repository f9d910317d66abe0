"""Say what a LoRA file is: its type, its base model, how it was trained, where it changes the model, what loads it.

    python scripts/inspect_lora.py --lora runs/dog

It reads files of all programs and needs no base model. With --base, the change of a DoRA is computed too. For each
block of the model, it shows the size of the change (‖ΔW‖), and in how many directions 90 % of it lies. If these are far
fewer than the rank, a smaller rank would have been enough.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, refuse
from trainkit.inference import missing_file
from trainkit.process import own_settings, say
from trainkit.tools.checks import (
    add_lora,
    block_name,
    block_order,
    lora_and_base,
    lora_line,
    named_lora,
    no_parent,
    text_problems,
)

if TYPE_CHECKING:
    from trainkit.lora_file import LoraFile, Weights

TRAINED = {  # keys of a header -> what to call them
    "modelspec.title": "title", "ss_sd_model_name": "base model", "modelspec.trigger_phrase": "trigger words",
    "ss_steps": "steps", "ss_num_epochs": "epochs", "ss_num_train_images": "images", "ss_resolution": "resolution",
    "ss_optimizer": "optimizer", "ss_learning_rate": "learning rate", "ss_seed": "seed", "modelspec.date": "date",
    "ss_network_module": "network", "ss_network_dim": "rank", "ss_network_alpha": "alpha",
    "sshs_model_hash": "hash",
}
BAR = 24  # characters
LONGEST = 60  # characters of a value


@dataclass(frozen=True)
class Block:
    """The layers of a file that lie in one block of the model."""

    name: str
    layers: int
    norm: float
    rank: int  # the largest of its factors
    directions: float  # the mean of how many hold 90 % of a layer's change


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("reading the LoRA")
    found, weights = lora_and_base(args)
    blocks, facts = blocks_of(found, weights), facts_of(found)
    if args.plot:
        plot(blocks, args.plot)
    if args.json:
        print(json.dumps({"file": str(args.lora), **facts, "blocks": [asdict(block) for block in blocks]}, indent=1))
        return
    print(lora_line(found, args.lora))
    for line in (*table(facts["trained"]), "", *block_lines(blocks), "", *program_lines(facts["programs"])):
        print(line)
    if found.needs_weights and weights is None:
        print("the sizes are those of the factors alone: a DoRA's change needs --base MODEL")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add_lora(add)
    add("--base", metavar="MODEL", help="The base model's folder or its name on the Hub. Only a DoRA needs it, and a "
        "model that is not as large as the released ones.")
    add("--json", action="store_true", help="Print everything as JSON.")
    add("--plot", type=Path, metavar="FILE", help="Also draw the sizes of the blocks into this PNG file.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    args = parser.parse_args(argv)
    args.lora = named_lora(args.lora)
    return args


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if not args.lora.exists():
        yield missing_file("--lora", args.lora, "it is read first")
    if args.plot:
        yield from no_parent(args.plot, "plot", "image")


# ----------------------------------------------------------------------------------------------------------------------
# What the file says


def facts_of(found: LoraFile) -> dict[str, dict[str, str]]:
    """How it was trained, as far as its header says, and why a program does not load it, "" where it does."""
    from trainkit.lora_file import loaded_by

    trained = {words: found.metadata[key] for key, words in TRAINED.items() if found.metadata.get(key)}
    return {"trained": trained, "programs": loaded_by(found) if found.layers else {}}


def blocks_of(found: LoraFile, weights: Weights | None) -> list[Block]:
    """Blocks in the model's order, text encoders last."""
    from trainkit.lora_file.spectrum import effective_rank, norm, singular_values

    gathered: dict[str, list[tuple[float, int, int]]] = {}
    for place, layer in found.layers.items():
        values = singular_values(layer, weights(place) if weights and layer.magnitude is not None else None)
        rank = int((values > values[0] * 1e-6).sum()) if float(values[0]) else 0
        gathered.setdefault(block_name(*place), []).append((norm(values), rank, effective_rank(values)))
    return [Block(name, len(held), sum(size**2 for size, _, _ in held) ** 0.5, max(rank for _, rank, _ in held),
                  sum(directions for _, _, directions in held) / len(held))
            for name, held in sorted(gathered.items(), key=lambda pair: block_order(pair[0]))]


# ----------------------------------------------------------------------------------------------------------------------
# How it is shown


def table(rows: Mapping[str, str]) -> Iterator[str]:
    for name, value in rows.items():
        line = " ".join(value.split())
        yield f"  {name:<14} {line[:LONGEST] + '…' if len(line) > LONGEST else line}"


def block_lines(blocks: Sequence[Block]) -> Iterator[str]:
    largest = max((block.norm for block in blocks), default=0.0)
    width = max((len(block.name) for block in blocks), default=0)
    for block in blocks:
        bar = "#" * round(BAR * block.norm / largest) if largest else ""
        yield (f"  {block.name:<{width}}  {block.layers:>4} layers  size {block.norm:8.3g}  {bar:<{BAR}}  "
               f"rank {block.rank}, 90 % in {block.directions:.1f}")


def program_lines(programs: Mapping[str, str]) -> Iterator[str]:
    for name, why in programs.items():
        yield f"  {name:<15} {f'no: {why}' if why else 'yes'}"


def plot(blocks: Sequence[Block], path: Path) -> None:
    """A bar for each block, as long as its change is large."""
    from PIL import Image, ImageDraw

    from trainkit.files import disk_errors
    from trainkit.sheets import font

    row, left, width = 22, 200, 640
    page = Image.new("RGB", (width, row * len(blocks) + 8), "white")
    draw = ImageDraw.Draw(page)
    largest = max((block.norm for block in blocks), default=0.0) or 1.0
    for k, block in enumerate(blocks):
        y, length = 4 + row * k, (width - left - 70) * block.norm / largest
        draw.text((6, y + 2), block.name, fill="black", font=font())
        draw.rectangle((left, y + 3, left + length, y + row - 4), fill=(70, 110, 190))
        draw.text((left + length + 6, y + 2), f"{block.norm:.3g}", fill="black", font=font())
    with disk_errors(path):
        page.save(path)
