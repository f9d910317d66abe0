"""Write captions of training images with a model: BLIP and Florence-2 write sentences, WD taggers write tags.

    python scripts/caption_images.py my_images --model florence-community/Florence-2-base --dry_run
    python scripts/caption_images.py my_images --model florence-community/Florence-2-base --trigger "TOK dog"

The first command shows the captions and writes nothing. The second one writes a file fox.txt beside each fox.png. The
trainers read these files. With --format metadata, the captions are written into the file metadata.jsonl instead.

A caption that is there already is kept, unless you add --overwrite. So you can stop the program at any time. If you run
it again, it goes on with the images that have no caption. Images in subfolders get captions, too.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import Problem, counted, listing, printable, refuse
from trainkit.process import own_settings, say
from trainkit.tools.checks import number_problems, text_problems

if TYPE_CHECKING:
    from trainkit.data.captioners import Captioner
    from trainkit.data.written_captions import CaptionedFolder, CaptionWriter
    from trainkit.families.pretrained import Repo

log = logging.getLogger(__name__)

DECODERS = 4  # threads; Pillow decodes without the interpreter lock
PUNCTUATION = (",", ".", ";", ":", "!", "?")
SENTENCES, TAGGER = ("BLIP", "Florence-2"), ("tagger",)
MODELS_OF = {  # flag -> the models that it has an effect on
    "task": ("Florence-2",), "prompt": ("BLIP",), "max_new_tokens": SENTENCES, "num_beams": SENTENCES,
    "general_threshold": TAGGER, "character_threshold": TAGGER, "undesired_tags": TAGGER, "replace_underscores": TAGGER,
}
DEFAULTS = {"task": "<DETAILED_CAPTION>", "max_new_tokens": 128, "num_beams": 3, "general_threshold": 0.35,
            "character_threshold": 0.85}


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("loading PyTorch and the images")
    from trainkit.data.captioners import kind_of
    from trainkit.data.sources.folder import report_left_out
    from trainkit.data.written_captions import read_captioned_folder
    from trainkit.families.pretrained import Repo
    from trainkit.runtime.trackers import quiet_libraries

    quiet_libraries()
    repo = Repo(args.model, "--model")
    kind = kind_of(repo)
    refuse(flags_without_effect(args, kind))
    folder = read_captioned_folder(args.DIR, "caption_images", overwrite=args.overwrite)
    refuse(folder.problems)
    report_left_out(tuple(folder.left_out))
    writer = writer_of(args, folder)
    todo = images_to_caption(args, folder, writer)
    outcome = Outcome(kept=sum(map(folder.has_caption, folder.images.values())) if not args.overwrite else 0)
    if todo:
        caption_all(args, load(args, repo, kind), todo, writer, outcome)
    report(args, writer, outcome, len(folder.images))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("DIR", type=Path, help="The folder with the images.")
    add("--model", required=True, metavar="MODEL", help="The model. It is a folder or a name on the Hub, such as "
        "Salesforce/blip-image-captioning-large, florence-community/Florence-2-base or SmilingWolf/wd-vit-tagger-v3. "
        "A tagger is a folder with model.onnx and selected_tags.csv.")
    add_words(parser.add_argument_group("words that every caption gets"))
    add_model_flags(parser.add_argument_group("what the model writes"))
    add_writing(parser.add_argument_group("where captions are written"))
    add("--batch_size", type=int, default=8, metavar="N", help="How many images the model reads at once. The default "
        "is 8.")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps. The default is a GPU if there is one.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    return parser.parse_args(argv)


def add_words(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--trigger", default="", metavar="WORDS", help="The words that your LoRA shall learn. They come first, with a "
        "comma behind them. A caption that has them already stays as it is.")
    add("--prefix", default="", metavar="TEXT", help="A text before what the model writes, such as \"a 3d icon of\".")
    add("--suffix", default="", metavar="TEXT", help="A text behind it, such as \", white background\".")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--task", metavar="TASK", help="Florence-2: <CAPTION>, <DETAILED_CAPTION> or <MORE_DETAILED_CAPTION>, in "
        "quotes. The default is <DETAILED_CAPTION>. A model that was trained further may have other tasks.")
    add("--prompt", metavar="TEXT", help="BLIP: the words that each caption begins with, such as \"a photo of\".")
    add("--max_new_tokens", type=int, metavar="N", help="BLIP and Florence-2: the length of a caption in tokens. The "
        "default is 128.")
    add("--num_beams", type=int, metavar="N", help="BLIP and Florence-2: how many captions are compared while one is "
        "written. 1 is the fastest. The default is 3.")
    add("--general_threshold", type=float, metavar="P", help="Tagger: a tag is written if the model gives it at least "
        "this probability. The default is 0.35.")
    add("--character_threshold", type=float, metavar="P", help="Tagger: the same for the names of characters. The "
        "default is 0.85.")
    add("--undesired_tags", type=words, metavar="A,B,..", help="Tagger: tags that are never written.")
    add("--replace_underscores", action="store_true", default=None, help="Tagger: write long hair instead of "
        "long_hair.")


def add_writing(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--format", choices=("sidecar", "metadata"), default="sidecar", help="sidecar: one text file for each image. "
        "metadata: the column text in the file metadata.jsonl of the folder. Other columns and lines are kept. The "
        "default is sidecar.")
    add("--caption_extension", choices=(".txt", ".caption"), metavar="EXT", help="The ending of the text files: .txt "
        "or .caption. The default is .txt.")
    add("--overwrite", action="store_true", help="Replace captions that are there.")
    add("--dry_run", action="store_true", help="Print the captions and write nothing.")


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    given = [flag for flag in ("max_new_tokens", "num_beams") if getattr(args, flag) is not None]
    yield from number_problems(args, counts=("batch_size", *given), reals=())
    for flag in ("general_threshold", "character_threshold"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value <= 1:
            yield Problem(f"--{flag} {value}", f"--{flag}", "it is a probability", f"--{flag} from 0 to 1")
    if args.caption_extension and args.format == "metadata":
        yield Problem("--caption_extension with --format metadata", "--caption_extension",
                      "captions go into metadata.jsonl", "leave one of the two out")
    if args.DIR.is_dir() and not args.dry_run and not os.access(args.DIR, os.W_OK | os.X_OK):
        yield Problem(f"{args.DIR} cannot be written to", "DIR", "captions are written beside the images",
                      f"chmod u+w {args.DIR}, or copy the images elsewhere", "disk")


def flags_without_effect(args: argparse.Namespace, kind: str) -> Iterator[Problem]:
    for flag, kinds in MODELS_OF.items():
        if getattr(args, flag) is not None and kind not in kinds:
            yield Problem(f"--{flag} has no effect", f"--{flag}, --model {args.model}",
                          f"the model is a {kind}, and the flag is for {' and '.join(kinds)}", f"leave --{flag} out")


# ----------------------------------------------------------------------------------------------------------------------
# The images, the model and where captions go


def writer_of(args: argparse.Namespace, folder: CaptionedFolder) -> CaptionWriter:
    from trainkit.data.written_captions import MetadataWriter, SidecarWriter

    if args.format == "metadata":
        return MetadataWriter(folder, args.overwrite)
    return SidecarWriter(folder, args.caption_extension or ".txt", args.overwrite)


def images_to_caption(args: argparse.Namespace, folder: CaptionedFolder, writer: CaptionWriter) -> dict[str, Path]:
    """The images that get a caption, by their names. UserError: it could not be written, or would not be read."""
    todo = {name: image for name, image in folder.images.items() if args.overwrite or not folder.has_caption(image)}
    refuse(writer.problems([*todo.values()]))
    shared = writer.shared([*todo.values()])
    if shared:
        log.warning("%s the caption file of another one, so the other one is captioned: %s",
                    counted(len(shared), "image shares", "images share"),
                    listing(f"{printable(image.name)} = {printable(other.name)}" for image, other in shared.items()))
    return {name: image for name, image in todo.items() if image not in shared}


def load(args: argparse.Namespace, repo: Repo, kind: str) -> Captioner:
    from trainkit.data.captioners import (
        Generation,
        TagChoice,
        comparable,
        load_blip,
        load_florence,
        load_tagger,
        torch_device,
    )

    for flag, value in DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    say("loading the model")
    if kind == "tagger":
        undesired = frozenset(map(comparable, args.undesired_tags or ()))
        choice = TagChoice(args.general_threshold, args.character_threshold, undesired, bool(args.replace_underscores))
        return load_tagger(repo, choice, args.device)
    generation, device = Generation(args.max_new_tokens, args.num_beams), torch_device(args.device)
    if kind == "BLIP":
        return load_blip(repo, args.prompt, generation, device)
    return load_florence(repo, args.task, generation, device)


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@dataclass
class Outcome:
    """What became of the images."""

    kept: int
    captioned: int = 0
    unreadable: list[str] = field(default_factory=list)
    wordless: list[str] = field(default_factory=list)  # the model said nothing about these


def caption_all(
    args: argparse.Namespace, captioner: Captioner, todo: Mapping[str, Path], writer: CaptionWriter, outcome: Outcome
) -> None:
    names = list(todo)
    with ThreadPoolExecutor(DECODERS) as pool, progress(args, len(todo)) as show, saved(args, writer):
        for start in range(0, len(names), args.batch_size):
            some = names[start : start + args.batch_size]
            looked = dict(zip(some, pool.map(lambda name: look(todo[name], captioner), some), strict=True))
            outcome.unreadable += [f"{printable(name)}: {why}" for name, why in looked.items() if isinstance(why, str)]
            prepared = {name: image for name, image in looked.items() if not isinstance(image, str)}
            texts = captioner([*prepared.values()]) if prepared else []
            for name, text in zip(prepared, texts, strict=True):
                keep(args, writer, name, todo[name], text, outcome)
            show(start + len(some))


def look(image: Path, captioner: Captioner) -> Any:
    """What the captioner takes, or why the image cannot be read."""
    from trainkit.data.images import UnreadableImage, decode

    try:
        return captioner.prepare(decode(image.read_bytes()))
    except (OSError, UnreadableImage) as error:
        return f"{error}"


def keep(
    args: argparse.Namespace, writer: CaptionWriter, name: str, image: Path, text: str, outcome: Outcome
) -> None:
    """Print or write one caption."""
    if not text:
        outcome.wordless.append(printable(name))
        return
    caption = with_words(text, trigger=args.trigger, prefix=args.prefix, suffix=args.suffix)
    outcome.captioned += 1
    if args.dry_run:
        print(f"{printable(name)}: {caption}", flush=True)
    else:
        with writing_beside(args.DIR):
            writer.add(image, caption)


def with_words(text: str, *, trigger: str = "", prefix: str = "", suffix: str = "") -> str:
    """`TOK, a 3d icon of a fox, white background`, as one line."""
    from trainkit.data.sources.text import one_line

    more = suffix.lstrip().startswith(PUNCTUATION)
    caption = f"{prefix} {text.rstrip('.,; ') if more else text}{'' if more else ' '}{suffix.lstrip()}"
    known = not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE)
    return one_line(caption if known else f"{trigger}, {caption.lstrip()}")


@contextmanager
def progress(args: argparse.Namespace, total: int) -> Iterator[Callable[[float], None]]:
    """How far it is; in a dry run, the captions show that."""
    from trainkit.runtime.progress import watched

    if args.dry_run:
        yield lambda done: None
    else:
        with watched("captions", total) as show:
            yield show


@contextmanager
def saved(args: argparse.Namespace, writer: CaptionWriter) -> Iterator[None]:
    """What was captioned inside is written, whatever ends it."""
    try:
        yield
    finally:
        with writing_beside(args.DIR):
            writer.save()


@contextmanager
def writing_beside(folder: Path) -> Iterator[None]:
    """A disk that is full or gone ends in a problem of the kind "disk"."""
    try:
        yield
    except OSError as error:
        refuse([Problem(f"a caption cannot be written: {error.strerror}", f"{error.filename or folder}",
                        "captions that were written before are whole",
                        "free some space or fix the permissions, then run the same command again", "disk")])


def report(args: argparse.Namespace, writer: CaptionWriter, outcome: Outcome, total: int) -> None:
    """What became of the images. UserError, after that: some cannot be read."""
    if outcome.wordless:
        log.warning("the model says nothing about %s, so no caption is written; a lower threshold or another model "
                    "may help: %s", counted(len(outcome.wordless), "image"), listing(outcome.wordless))
    captioned = outcome.captioned - len(writer.skipped)
    done = "would get a caption" if args.dry_run else "got a caption"
    kept = outcome.kept + len(writer.skipped)
    print(f"{counted(captioned, 'image')} {done}, {kept:,} had one already: {printable(str(args.DIR))}")
    if outcome.unreadable:
        refuse([Problem(f"{len(outcome.unreadable)} of {counted(total, 'image')} cannot be read", f"{args.DIR}",
                        listing(outcome.unreadable), "convert these images, or take them out; the others are captioned",
                        "data")])
