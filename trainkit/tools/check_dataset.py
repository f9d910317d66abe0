"""Find what is wrong with training images and captions before you train, and how to fix it.

    python scripts/check_dataset.py my_images
    python scripts/check_dataset.py my_images --enable_bucket --html sheet.html

The first command prints what it found: for each problem the images, what it does to training, and a command that fixes
it. The second one also writes a page with all images, as they are cut and captioned in training. The page is one file
and needs no internet. Give the flags that you will train with.

The program changes nothing. The commands delete nothing: they move images into a folder beside yours.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import EXIT_CODES, Problem, printable, refuse
from trainkit.process import own_settings, say
from trainkit.tools.checks import text_problems

if TYPE_CHECKING:
    from trainkit.options import CaptionOptions, ImageOptions
    from trainkit.options.base import Flag

log = logging.getLogger(__name__)

CAPTION_FLAGS = ("caption_extension", "caption_prefix", "caption_suffix", "enable_wildcard", "max_token_length")


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    options, captions = read_options(args)
    refuse(folder_problems(args.DIR))

    say("reading the images")
    from trainkit.data.looks import NO_HASHES, hashes_available
    from trainkit.doctor.checks import examine
    from trainkit.doctor.look import read_data_set
    from trainkit.doctor.page import write_page
    from trainkit.doctor.text import as_json, counts, lines
    from trainkit.files import atomic_write
    from trainkit.runtime.trackers import quiet_libraries

    quiet_libraries()
    data = read_data_set(args.DIR, options, captions, prompt=args.instance_prompt, triggers=args.trigger)
    results = examine(data)
    for line in lines(data, results, sys.stdout):
        print(line)
    if not hashes_available():
        log.warning("%s", NO_HASHES)
    with writing():
        if args.json:
            text = json.dumps(as_json(data, results), ensure_ascii=False, indent=1)
            atomic_write(args.json, text.encode("utf-8", "backslashreplace"))
        if args.html:
            write_page(args.html, data, results)
            print(f"the page: {printable(str(args.html))}")
    if counts(results)["error"]:
        sys.exit(EXIT_CODES["data"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from trainkit.options.cli import add_group, underscored

    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("DIR", type=Path, nargs="+", help="A folder with images, subfolders included; a data set in Parquet files or "
        "shards; or a file for --dataset_config.")
    add("--html", type=Path, metavar="FILE", help="Write a page that shows every image with what was found.")
    add("--json", type=Path, metavar="FILE", help="Write everything that was found as JSON.")
    add("--trigger", action="append", default=[], metavar="WORD", help="The word that your LoRA shall learn. Captions "
        "without it are named. You can give the flag several times. Then one of the words is enough.")
    add("--instance_prompt", default="", metavar="TEXT", help="The caption of images that have none, as in training.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    add_group(parser, "how images and captions are trained on", data_flags().values())
    switches = {f"--{name}": f"--{name}=true" for name, flag in data_flags().items() if flag.is_switch}
    words = underscored(sys.argv[1:] if argv is None else argv)
    return parser.parse_args([switches.get(word, word) for word in words])  # a folder may follow a switch


def data_flags() -> dict[str, Flag]:
    from trainkit.options import CaptionOptions, ImageOptions
    from trainkit.options.inputs import CHECKED_FLAGS

    flags = {flag.name: flag for flag in [*ImageOptions.flags("data"), *CaptionOptions.flags("captions")]}
    return {name: flags[name] for name in (*CHECKED_FLAGS, *CAPTION_FLAGS)}


def read_options(args: argparse.Namespace) -> tuple[ImageOptions, CaptionOptions]:
    """The trainers' options of images and captions. UserError: a value is missing or cannot be used."""
    from pydantic import ValidationError

    from trainkit.options import CaptionOptions, ImageOptions
    from trainkit.options.cli import MISSING
    from trainkit.options.inputs import CHECKED_FLAGS

    given = {name: getattr(args, name) for name in data_flags() if getattr(args, name) is not None}
    refuse(Problem(f"--{name} has no value", "command line", data_flags()[name].help, f"--{name} VALUE")
           for name, value in given.items() if value is MISSING)
    try:
        return (ImageOptions(**{name: value for name, value in given.items() if name in CHECKED_FLAGS}),
                CaptionOptions(**{name: value for name, value in given.items() if name in CAPTION_FLAGS}))
    except ValidationError as error:
        names = {str(each["loc"][0]): each["msg"].removeprefix("Value error, ") for each in error.errors()}
        refuse(Problem(f"--{name} cannot be {given[name]!r}", f"--{name}", why, data_flags()[name].help)
               for name, why in names.items())
        raise


def folder_problems(folders: Sequence[Path]) -> Iterator[Problem]:
    from trainkit.doctor.look import is_data_set

    for folder in folders:
        if not folder.is_dir() and not (folder.exists() and is_data_set(folder)):
            why = "it is a file, not a folder" if folder.exists() else "there is no such folder"
            yield Problem("the image folder cannot be read", f"{folder}", why, "name a folder with images", "data")


@contextmanager
def writing() -> Iterator[None]:
    """A file that cannot be written ends in a problem of the kind "disk"."""
    try:
        yield
    except OSError as error:
        refuse([Problem(f"a file cannot be written: {error.strerror}", f"{error.filename}",
                        "the disk is full, or the folder does not exist or is read-only", "name another file",
                        "disk")])
