"""Compute the CLIP features of training images, for --guidance_token of train_text_to_image_lora.py.

    python scripts/extract_clip_features.py --images assets/icons-3d --clip assets/tiny-clip-icons \\
        --out features.safetensors

The output file has one row for each image, in fp32, with the features after CLIP's projection. A row is found by the
content of the image file, so you may rename and move images and change captions later. You can stop the program at any
time. If you run it again, it computes only the images that are missing in the file. Several processes can write into
one file.

    --legacy FOLDER   reads features that another program saved with torch.save, one .pt file for each image. The file's
                      name is in the column `img_features` of metadata.jsonl. Without that column, it is cat.pt or
                      cat.png.pt for cat.png. Only tensors are read (weights_only), and only from inside FOLDER.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, UserError, counted, refuse
from trainkit.process import own_settings, quiet_imported, say
from trainkit.reading import parse_json, read_text
from trainkit.tools import ASSETS
from trainkit.tools.checks import shipped_problems, text_problems

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.data.batch import Source
    from trainkit.data.clip_features import Clip, Features

SAVE_SECONDS = 30  # between two rewrites of the file: what a killed process may lose
SAVE_FACTOR = 20  # times what the last rewrite took, at least: rewriting a large file stays below 5 % of the time
DECODERS = 4  # threads; Pillow decodes without the interpreter lock
LEGACY = "legacy .pt files"
METADATA, COLUMN = "metadata.jsonl", "img_features"


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    refuse(text_problems(args))
    refuse(problems(args))

    say("loading PyTorch and the images")
    from trainkit.runtime.trackers import quiet_libraries

    quiet_libraries()
    images = list_folder(args.images) if args.images else list_table(args)
    features = convert(args, images) if args.legacy else extract(args, images)
    print(f"{counted(len(features.digests), 'image')}, features {features.width} wide, of {features.clip}: {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=described, allow_abbrev=False)
    add = parser.add_argument
    add("--images", type=Path, metavar="FOLDER", help="The folder with the images, the same as "
        "--train_data_dir of the trainer. Images in subfolders are also used.")
    add("--dataset_name", metavar="NAME", help="A data set instead of a folder. It is a name on the "
        "Hub or a local folder. Only its train split is used.")
    add("--dataset_config_name", metavar="NAME", help="The subset of the data set, if it has several.")
    add("--image_column", default="image", metavar="NAME", help="The column of the data set that holds the "
        "images. The default is image.")
    add("--clip", default=str(ASSETS / "tiny-clip-icons"), metavar="MODEL", help="The CLIP model. It is a "
        "folder or a name on the Hub of a CLIPModel or CLIPVisionModelWithProjection. Its projection must be as wide "
        "as the text of the model to train. For SD 1.x, that is openai/clip-vit-large-patch14. The default is the "
        "tiny CLIP in this repository.")
    add("--legacy", type=Path, metavar="FOLDER", help="A folder with .pt files. The features are read "
        "from them and not computed.")
    add("--out", type=Path, required=True, metavar="FILE", help="The safetensors file for the features. If it "
        "exists, missing images are added to it.")
    add("--batch_size", type=int, default=32, help="How many images CLIP reads at once. The default is 32.")
    add("--debug", action="store_true", help="Show a traceback with every error message.")
    return parser.parse_args(argv)


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    if bool(args.images) == bool(args.dataset_name):
        yield Problem("two sources of images" if args.images else "no images", "--images, --dataset_name",
                      "features are extracted from one of the two", "--images FOLDER_OF_IMAGES")
    for flag, what in (("images", "images"), ("legacy", ".pt files")):
        if (folder := getattr(args, flag)) and not folder.is_dir():
            yield Problem(f"no folder {folder}", f"--{flag}", f"the {what} are read from it", "give an existing folder",
                          "data")
    if not args.legacy:
        yield from shipped_problems(args, "clip")
    if args.legacy and args.dataset_name:
        yield Problem("--legacy with --dataset_name", "--legacy", ".pt files are found by the names of images",
                      "name the folder of the images with --images")
    if args.out.suffix != ".safetensors":
        yield Problem(f"{args.out} is no name of a safetensors file", "--out", "its kind is told by its name",
                      f"--out {args.out.with_suffix('.safetensors')}")
    if args.batch_size < 1:
        yield Problem(f"--batch_size {args.batch_size}", "--batch_size", "it counts images", "--batch_size 1 or more")


# ----------------------------------------------------------------------------------------------------------------------
# Images


def list_folder(folder: Path) -> dict[str, Source]:
    """Every image that --train_data_dir would read there, by its name; captions may be wrong or missing still."""
    from trainkit.data.sources.folder import Folder
    from trainkit.data.sources.folder import list_folder as as_in_training

    listed, wrong = as_in_training(Folder(folder, "--images", None, captioned=True), verbose=False)
    if not listed:
        refuse(wrong or [Problem("no images", f"--images {folder}", "there are none in it, nor in folders below",
                                 "--images FOLDER_OF_IMAGES", "data")])
    return {found.id: found.source for found in listed}


def list_table(args: argparse.Namespace) -> dict[str, Source]:
    """Every image of a `datasets` table."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    from trainkit.data.sources.table import TableCell, homes_of

    quiet_imported()
    where, column = f"--dataset_name {args.dataset_name}", args.image_column
    try:
        table = load_dataset(args.dataset_name, args.dataset_config_name, split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        refuse([Problem("the data set cannot be loaded", where, f"{error}", "check the name (a local folder needs its "
                        "path) and the network, or use --images", "data")])
    try:
        cells = table.select_columns([column]).cast_column(column, Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # no such column, or one of something else
        refuse([Problem(f"no column {column!r} with images", f"--image_column {column}, {where}",
                        f"columns there: {', '.join(table.features)} ({error})", "--image_column ANOTHER")])
    homes = homes_of(args.dataset_name, None)
    return {f"row {i}": TableCell(cells, i, column, homes) for i in range(len(cells))}


# ----------------------------------------------------------------------------------------------------------------------
# The file, shared by processes and completed from run to run


class Growing:
    """A file of features that processes add to: under a lock, what is there and what is new are written as one."""

    def __init__(self, path: Path, *, clip: str, made_by: str, width: int):
        import torch
        from filelock import FileLock

        from trainkit.data.clip_features import Features

        self.path, self.made_by = path, made_by
        self.new: dict[str, Tensor] = {}
        self.empty = Features(torch.zeros(0, width), [], clip, made_by)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(path.with_name(f".{path.name}.lock"))  # freed by the system when a process dies
            with self.lock:
                self.held = self._read()
        self.due = time.monotonic() + SAVE_SECONDS

    def __contains__(self, digest: str) -> bool:
        return digest in self.held or digest in self.new

    def add(self, digest: str, row: Tensor) -> None:
        """One image's features [D]; written to the disk now and then."""
        self.new[digest] = row
        if time.monotonic() >= self.due:
            self.save()

    def save(self) -> Features:
        """Write what is new -> all that is in the file."""
        from trainkit.data.clip_features import write_features

        begun = time.monotonic()
        with writing(self.path), self.lock:
            self.held = self._read()  # another process may have added to it
            if any(digest not in self.held for digest in self.new):
                self.held = self.held.with_rows(self.new)
                write_features(self.path, self.held)
        self.new.clear()
        now = time.monotonic()
        self.due = now + max(SAVE_SECONDS, SAVE_FACTOR * (now - begun))
        return self.held

    def _read(self) -> Features:
        """What the file holds; a draft of a process that was killed while writing is swept."""
        from trainkit.data.clip_features import read_features

        for draft in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            draft.unlink()
        if not self.path.exists():
            return self.empty
        held = read_features(self.path, "--out")
        if held.made_by != self.made_by:
            raise UserError(Problem(f"{self.path} holds features of another CLIP ({held.clip})", f"--out {self.path}",
                                    f"features of {self.empty.clip} cannot stand beside them",
                                    "give another --out, or the --clip that the file was made with", "data"))
        return held


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk can do to us into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(Problem(f"cannot write {path.name}: {error.strerror}", f"--out {path}",
                                "what was in the file before is untouched",
                                "free some space or fix the permissions, then run the same command again",
                                "disk")) from error


# ----------------------------------------------------------------------------------------------------------------------
# From images


def extract(args: argparse.Namespace, images: dict[str, Source]) -> Features:
    """Compute what the file lacks; images that cannot be read are named at the end."""
    from trainkit.data.clip_features import load_clip
    from trainkit.devices import present
    from trainkit.runtime.progress import watched

    clip = load_clip(args.clip, device=present())
    growing = Growing(args.out, clip=clip.name, made_by=clip.made_by, width=clip.width)
    todo, bad = list(images), []
    with ThreadPoolExecutor(DECODERS) as pool, watched("CLIP features", len(todo)) as show:
        for start in range(0, len(todo), args.batch_size):
            names = todo[start : start + args.batch_size]
            outcomes = list(pool.map(lambda name: look(images[name], clip, growing), names))
            bad += [f"{name}: {one}" for name, one in zip(names, outcomes, strict=True) if isinstance(one, str)]
            embed(dict(one for one in outcomes if isinstance(one, tuple)), clip, growing)
            show(start + len(names))
    features = growing.save()
    refuse_unreadable(bad, len(images), features, args)
    return features


def look(source: Source, clip: Clip, growing: Growing) -> tuple[str, Tensor] | str | None:
    """(digest, pixels [3,H,W]) of an image; None where the file has it; else why it cannot be read."""
    from trainkit.data.images import UnreadableImage, content_digest, decode

    try:
        data = source.read_bytes()
        digest = content_digest(data)
        return None if digest in growing else (digest, clip.pixels(decode(data)))
    except (OSError, UnreadableImage) as error:
        return f"{error}"


def embed(pixels: dict[str, Tensor], clip: Clip, growing: Growing) -> None:
    """Digest -> pixels [3,H,W] of some images: their features into the file."""
    import torch

    if not pixels:
        return
    rows = clip(torch.stack(list(pixels.values())))  # [B,D]
    if not rows.isfinite().all():
        refuse([Problem("CLIP's features are NaN or infinite", f"--clip {clip.name}", "its weights are damaged",
                        "copy the model there again, or name another", "nonfinite")])
    for digest, row in zip(pixels, rows, strict=True):
        growing.add(digest, row)


def refuse_unreadable(bad: list[str], total: int, features: Features, args: argparse.Namespace) -> None:
    from trainkit.errors import listing

    if bad:
        refuse([Problem(f"{len(bad)} of {total} images cannot be read", f"{args.images or args.dataset_name}",
                        listing(bad), f"the features of {len(features.digests)} others are in "
                        f"{args.out}; fix these or take them out, then run the same command again", "data")])


# ----------------------------------------------------------------------------------------------------------------------
# From .pt files


def convert(args: argparse.Namespace, images: dict[str, Source]) -> Features:
    """Features saved one file an image -> our file; all that is wrong in one message, and then nothing is written."""
    from trainkit.data.images import content_digest
    from trainkit.errors import listing

    named, bad, rows = in_metadata(args.images), [], {}
    for name, path in images.items():
        assert isinstance(path, Path), "--legacy reads a folder"
        found = legacy_row(args.legacy, legacy_names(path.relative_to(args.images), named))
        if isinstance(found, str):
            bad.append(f"{name}: {found}")
        else:
            rows[content_digest(path.read_bytes())] = found
    widths = sorted({len(row) for row in rows.values()})
    if len(widths) > 1:
        bad.append(f"tensors of several widths: {', '.join(map(str, widths))}")
    if bad:
        refuse([Problem(f"{args.legacy} does not give every image its features", f"--legacy {args.legacy}",
                        listing(bad), "fix these files, or leave --legacy out to compute the features",
                        "data")])
    growing = Growing(args.out, clip=LEGACY, made_by=LEGACY, width=widths[0])
    for digest, row in rows.items():
        growing.add(digest, row)
    return growing.save()


def in_metadata(images: Path) -> dict[str, str]:
    """file_name -> img_features of the images' metadata.jsonl, where both are there."""
    file = images / METADATA
    try:
        lines = read_text(file).removeprefix("\ufeff").splitlines() if file.is_file() else []
        entries = [parse_json(line) for line in lines if line.strip()]
        return {entry["file_name"]: str(entry[COLUMN]) for entry in entries if "file_name" in entry and COLUMN in entry}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(Problem(f"{file} is damaged", f"--images {images}", f"{error}",
                                "write one JSON object a line, in UTF-8", "data")) from error


def legacy_names(image: Path, named: dict[str, str]) -> list[str]:
    """Where an image's features may lie below the legacy folder."""
    listed_source = named.get(image.as_posix())
    return [listed_source] if listed_source else [f"{image.with_suffix('.pt')}", f"{image}.pt"]


def legacy_row(folder: Path, names: Sequence[str]) -> Tensor | str:
    """The first of the files that is there -> features [D], or why there are none. No pickled object is ever made."""
    import torch

    root = folder.resolve()
    paths = [(root / name).resolve() for name in names]
    if any(not path.is_relative_to(root) for path in paths):
        return f"{names[0]} lies outside of {folder}"
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return f"there is no {' or '.join(names)}"
    try:
        row = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever hostile or cut bytes make it stumble over
        return f"{path.name} is refused: it holds more than a tensor, or is damaged ({type(error).__name__})"
    if not isinstance(row, torch.Tensor) or row.dim() == 0 or row.numel() != row.shape[-1]:
        return f"{path.name} does not hold one vector"
    if not row.isfinite().all():
        return f"{path.name} holds NaN or infinity"
    return row.flatten().float().clone()  # the file may hold the whole batch that this is a view of
