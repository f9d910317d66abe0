"""Images of a `datasets` table: a Hub data set, or a folder in one of its layouts."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.batch import Listed
from trainkit.data.images import UnreadableImage
from trainkit.data.sources.account import Account, LeftOut, SourceListing
from trainkit.data.sources.captions import METADATA, BadEntry, read_captions
from trainkit.data.sources.records import CAPTION_COLUMNS
from trainkit.data.sources.shards import packed_problem
from trainkit.data.sources.text import one_line
from trainkit.data.sources.tree import is_mask, walk
from trainkit.data.sources.unread import find_unread
from trainkit.digests import Place, TablePlace
from trainkit.errors import Problem, counted, listing, printable, shell_word
from trainkit.families.pretrained import hub_id
from trainkit.process import quiet_imported

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets.features.features import FeatureType

    from trainkit.options import ImageOptions

FILES = {".parquet": "parquet", ".arrow": "arrow"}  # tables that are a data set by themselves
PACKED = {".zip": "unzip {} -d {}", ".gz": "tar xf {} -C {}", ".tgz": "tar xf {} -C {}"}
URLS = ("url", "image_url", "img_url", "urls")  # columns of sets that hold no images, only their addresses
READERS = ("parquet", "arrow", "imagefolder", "webdataset")  # of the datasets library, each for a kind of files
SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves


@dataclass(frozen=True)
class TableCell:
    """The image in one cell of a `datasets` table, fetched when read.

    homes  folders that hold the data set: a cell may name a file there, and nowhere else
    place  what is known of the image is remembered by this
    """

    table: Dataset
    index: int
    column: str
    homes: tuple[Path, ...]
    place: Place | None = None

    def read_bytes(self) -> bytes:
        cell = self.table[self.index][self.column]  # {"bytes": ..., "path": ...} or None
        if cell is None:
            raise UnreadableImage("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        path = Path(cell["path"] or "")
        if cell["path"] and not _is_below(path, self.homes):
            raise UnreadableImage(f"the cell names a file outside the data set, {printable(cell['path'])}")
        if not (cell["path"] and path.is_file()):
            raise UnreadableImage("the cell holds no image and names no file")
        return path.read_bytes()

    def __str__(self) -> str:
        return f"column {self.column}, row {self.index}"


def _is_below(path: Path, homes: Sequence[Path]) -> bool:
    try:
        whole = path.resolve()
    except ValueError:  # no path at all: it has a NUL in it
        return False
    return any(whole.is_relative_to(home) for home in homes)


def list_table(data: ImageOptions) -> SourceListing:
    """The images of the data set's train split."""
    from datasets import Image
    from datasets.exceptions import DatasetsError

    quiet_imported()
    if data.dataset_name in READERS and not Path(data.dataset_name).exists():
        return SourceListing([], [_a_reader(data)])
    if wrong := packed_problem(data.dataset_name or "") or _another_file(data) or _folder_of_images(data):
        return SourceListing([], [wrong])
    try:
        table = _load(data)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        return SourceListing([], [_no_table(data, error)])
    texts = [name for name, kind in table.features.items() if _holds_text(kind, several=data.captioned)
             and not name.startswith("__")]  # WebDataset's own, such as __key__
    column = _caption_column(data, texts)
    problems = list(_table_problems(data, table, texts, column))
    if problems:
        return SourceListing([], problems)
    images = table.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))
    homes = homes_of(data.dataset_name or "", data.cache_dir)
    places = _places(images, data, homes)
    found, bad, masks = [], [], []
    for i, cell in enumerate(table[column] if column else [None] * len(table)):
        place = places[i]
        if isinstance(place, Path) and is_mask(place):
            masks.append(LeftOut(printable(place.name), "a mask; masks beside images are read from a folder"))
            continue
        try:
            caption, *others = read_captions(cell, several=data.captioned) or ("",)
            image = TableCell(images, i, data.image_column, homes, place)
            found.append(Listed(f"row {i}", image, caption, tuple(others)))
        except BadEntry as error:
            bad.append(f"row {i}: {column} {error}")
    captions = {f"column {column}": sum(bool(one.caption) for one in found)} if column else {}
    return SourceListing(found, list(_row_problems(data, bad, empty=not len(table))),
                         Account(len(found), captions, tuple(masks)))


def _a_reader(data: ImageOptions) -> Problem:
    """That the name is of a reader of the datasets library, with which the Diffusers scripts read a folder."""
    return Problem(f"{data.dataset_name} is the name of a reader, not of a data set",
                   f"--dataset_name {data.dataset_name}", "no folder is named that it should read",
                   "--dataset_name FOLDER, a folder of such files" if not data.captioned else
                   f"--dataset_name {data.dataset_name} --train_data_dir FOLDER, or --dataset_name FOLDER", kind="data")


def _load(data: ImageOptions) -> Dataset:
    """The train split of a Hub data set, of a folder in one of its layouts, saved by save_to_disk, or of one file."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(data.dataset_name or "")
    if glob.has_magic(f"{path}") and path.suffix.lower() in FILES and glob.glob(f"{path}"):  # noqa: PTH207
        return load_dataset(FILES[path.suffix.lower()], data_files=f"{path}", cache_dir=data.cache_dir, split="train")
    if path.is_file() and path.suffix.lower() in FILES:
        return load_dataset(FILES[path.suffix.lower()], data_files=str(path), cache_dir=data.cache_dir, split="train")
    if any((path / name).is_file() for name in SAVED):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict) and "train" not in saved:
            raise ValueError(f"it holds the splits {', '.join(saved)}, and no train split")
        return saved["train"] if isinstance(saved, DatasetDict) else saved
    return load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir, split="train",
                        revision=data.dataset_revision)


def _places(images: Dataset, data: ImageOptions, homes: Sequence[Path]) -> list[Place | None]:
    """What is known of each image is remembered by the file that its cell names, or by its row in this very table."""
    from pyarrow import compute

    cells = images.with_format("arrow")[:][data.image_column]  # mapped into memory, not read
    embedded = compute.is_valid(compute.struct_field(cells, "bytes")).to_pylist()
    paths = [path and Path(path) for path in compute.struct_field(cells, "path").to_pylist()]
    files = [Path(file["filename"]).stat() for file in images.cache_files]
    state = " ".join([images._fingerprint, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in files)])
    name = f"{data.dataset_name} {data.dataset_config_name or ''} {data.image_column}"
    return [TablePlace(name, f"{i}", state) if inside else path if path and _is_below(path, homes) else None
            for i, (inside, path) in enumerate(zip(embedded, paths, strict=True))]


def homes_of(name: str, cache_dir: str | None) -> tuple[Path, ...]:
    """The folders below which a data set's files lie, links followed: its own where it is local, else its part of the
    caches.
    """
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(name)
    downloads = Path(cache_dir) / "downloads" if cache_dir else Path(config.DOWNLOADED_DATASETS_PATH)
    if path.exists():
        places = [path if path.is_dir() else path.parent, downloads / "extracted"]  # of archives in it
    else:
        places = [downloads, Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"]
    return tuple(place.resolve() for place in places)


def _another_file(data: ImageOptions) -> Problem | None:
    """That a local file is no table of images."""
    path = Path(data.dataset_name or "")
    if not path.is_file() or path.suffix.lower() in FILES:
        return None
    if unpack := PACKED.get(path.suffix.lower()):
        folder = shell_word(path.parent / path.name.partition(".")[0])
        command = f"mkdir {folder} && {unpack.format(shell_word(path), folder)}"
        return Problem("a packed file is no data set", f"--dataset_name {path}",
                       "of single files, those in Parquet and Arrow are read",
                       f"unpack it and name its folder: {command}; --{data.folder_flag} {folder}", kind="data")
    return Problem("this file is no data set", f"--dataset_name {path}",
                   "of single files, those in Parquet and Arrow are read; a table of captions belongs to its images",
                   f"call it {', '.join(METADATA[:-1])} by its kind, in that folder: --{data.folder_flag} "
                   f"{shell_word(path.parent)}", kind="data")


def _folder_of_images(data: ImageOptions) -> Problem | None:
    """That a local folder's captions are in files which the datasets library passes over."""
    folder = Path(data.dataset_name or "")
    if not folder.is_dir():
        return None
    try:
        tree = walk(folder, subfolders=True)
    except OSError:
        return None
    texts = [path for contents in tree.read.values() for path in contents.texts]
    others = [path for contents in tree.read.values() for path in contents.others]
    if not tree.images or any(path.suffix in FILES for path in others):
        return None
    stems = {path.with_suffix("") for path in tree.images}
    captions = {path: None for path in texts if path.with_suffix("") in stems}
    described = any(path.name in METADATA for path in others)  # what the library reads
    if described or not captions:
        strange = [path for path in texts if path not in captions]
        unread = find_unread(folder, tree, bare=[] if described else tree.images, strange=strange)
        return next(iter(unread.problems), None)
    why = f"{counted(len(captions), 'image has', 'images have')} captions in files that the datasets library does " \
          f"not read: {printable(next(iter(captions)).name)} is one"
    return Problem("a folder of images with caption files is no data set", f"--dataset_name {folder}", why,
                   f"--{data.folder_flag} {shell_word(folder)}", kind="data")


def _row_problems(data: ImageOptions, bad: Sequence[str], *, empty: bool) -> Iterator[Problem]:
    where = f"--dataset_name {data.dataset_name}"
    if empty:
        yield Problem("the data set is empty", where, "its train split has no rows", "--dataset_name ANOTHER",
                      kind="data")
    if bad:
        yield Problem(counted(len(bad), "unusable caption"), where, listing(bad), "fix these rows, or leave them out",
                      kind="data")


def _no_table(data: ImageOptions, error: Exception) -> Problem:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    why = one_line(f"{root}")[:500] or type(root).__name__
    fix = f"check the name (a local folder needs its path) and the network, or use --{data.folder_flag}"
    if name := hub_id(data.dataset_name or ""):
        why, fix = "that is the address of its page", f"--dataset_name {name}"
    if "script" in why.lower():
        why += "; a loading script is a program, and the datasets library runs none any more"
        local = Path(data.dataset_name or "").exists()
        fix = f"save its images and captions into a folder for --{data.folder_flag}" if local else (
            f"--dataset_name {shell_word(data.dataset_name or '')} --dataset_revision refs/convert/parquet, the branch "
            "in which the Hub keeps many data sets as Parquet; or save its images and captions into a folder for "
            f"--{data.folder_flag}")
    return Problem("the data set cannot be loaded", f"--dataset_name {data.dataset_name}", why, fix, kind="data")


def _caption_column(data: ImageOptions, texts: Sequence[str]) -> str | None:
    """The column that was asked for; where every image should have a caption, else one that is usually it."""
    usual = [name for name in CAPTION_COLUMNS if data.captioned and name in texts]
    return data.wanted_column or next(iter(usual), data.caption_column)


def _holds_text(feature_type: FeatureType, *, several: bool) -> bool:
    from datasets import LargeList, List, Value

    if several and isinstance(feature_type, (List, LargeList)):
        feature_type = feature_type.feature
    return isinstance(feature_type, Value) and "string" in feature_type.dtype


def _holds_images(feature_type: FeatureType) -> bool:
    """Images as the library knows them, or files' content that it was not told are images."""
    from datasets import Image, Value

    content = feature_type.get("bytes") if isinstance(feature_type, dict) else feature_type
    return isinstance(feature_type, Image) or isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _table_problems(
    data: ImageOptions, table: Dataset, texts: Sequence[str], column: str | None
) -> Iterator[Problem]:
    images = [name for name, kind in table.features.items() if _holds_images(kind)]
    wanted: list[tuple[str, str, Sequence[str], str]] = [
        ("--image_column", data.image_column, images, "images")]
    if column:
        wanted.append(("--caption_column", column, texts, "text"))
    for flag, name, usable, kind in wanted:
        if name in usable:
            continue
        what = f"column {name!r} does not hold {kind}" if name in table.features else f"there is no column {name!r}"
        fix = f"{flag} {usable[0]}" if usable else "--dataset_name ANOTHER"
        if kind == "images" and not usable and any(column.lower() in URLS for column in table.features):
            fix = f"download the images that it lists, and name their folder: --{data.folder_flag} FOLDER"
        yield Problem(what, f"{flag} {name}, --dataset_name {data.dataset_name}",
                      f"columns there: {', '.join(table.features)}; with {kind}: {', '.join(usable) or 'none'}", fix)

