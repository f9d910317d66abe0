"""What lies in or around a data folder, looks meant for training and is not read: refused, or listed with the reason.

A caption that would be lost is refused: an image without one that a file names under another name, in another place or
in another form than is read. Everything else that is left out is listed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainkit.data.sources.account import LeftOut
from trainkit.data.sources.captions import MAX_CAPTION, METADATA
from trainkit.data.sources.glimpse import HEIC, MAX_BYTES, KnownImages, Mentions, key, mentions
from trainkit.data.sources.records import CAPTION_COLUMNS, DELIMITERS, NAME_COLUMN, header_of
from trainkit.data.sources.text import MARKS, UnclearText, decode_text
from trainkit.data.sources.tree import TEXTS, Contents, Tree, is_image, scan
from trainkit.errors import SHOWN, Problem, counted, listing, printable, shell_word
from trainkit.reading import parse_json

TABLES = {
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods",
}
NOT_WORDS = {".xmp", ".xml", ".yaml", ".yml", ".aae", ".thm", ".toml"}  # of one image, and no caption of it
QUIET = {".html", ".npz", ".safetensors", ".ini", ".db", ".py", ".sh", ".lock", ".log", ".url", ".lnk"}
CAPTION_FOLDERS = {"captions", "caption", "txt", "text", "texts", "labels", "label", "tags", "prompts", "annotations"}
ENDINGS = re.compile(r"[ _.-](?:captions?|caps?|tags?|te?xt|prompts?|desc(?:ription)?|labels?)$"
                     r"| ?\(\d+\)$| - copy$", re.IGNORECASE)  # the last two are of what is downloaded or copied twice
DOCUMENTS = {".rtf", ".docx", ".doc", ".odt", ".pdf", ".pages"}  # of word processors
NOTES = {".md"}  # a data set's card may show a few of its images; one that has words about most holds the captions
REPORT_KEY = "data_set_report"  # first in the JSON of check_dataset, which names images and describes none
MOST_TABLES = 50  # files looked into for names of images
MOST_BESIDE = 2000  # entries of the folder above that are looked at


@dataclass
class Unread:
    """What was found beside the images and captions that are read."""

    problems: list[Problem]
    left_out: list[LeftOut]


def find_unread(folder: Path, tree: Tree, *, bare: Sequence[Path], strange: Sequence[Path]) -> Unread:
    """Everything of the folder that is not read.

    bare     images for which no caption was found
    strange  files that hold captions by their suffix and are not named as an image beside them is
    """
    images = KnownImages(bare)
    tables = [path for contents in _all(tree) for path in contents.others if not _is_companion(path, tree)]
    documents = [path for path in tables if path.suffix.lower() in DOCUMENTS and meant_by(path, images)]
    odd = [path for path in tables if _is_odd_text(path, images)]
    lost, idle = _lost_texts(folder, tree, images, [*strange, *odd])
    json_files = _json_captions(path for path in tables if path.suffix.lower() == ".json" and meant_by(path, images))
    problems = [_misnamed(folder, lost)] if lost else []
    problems += [_json_files(folder, json_files)] if json_files else []
    problems += [_documents(folder, documents)] if documents else []
    saved = {*lost.values(), *(image for path in [*json_files, *documents] if (image := meant_by(path, images)))}
    looked_at = {*odd, *json_files, *documents}
    tables = [path for path in tables if path not in looked_at]
    remaining = KnownImages(path for path in bare if path not in saved)
    left = []
    for number, path in enumerate([*tables, *idle]):
        problem, why = _table(folder, path, remaining if number < MOST_TABLES else KnownImages(()))
        problems += [problem] if problem else []
        left += [] if problem or not why else [LeftOut(_name(path, folder), why)]
    if remaining.paths and not problems:
        problems += _around(folder, remaining)
    left += [LeftOut(_name(path, folder), f"it is {why}") for contents in _all(tree)
             for path, why in contents.special.items()]
    return Unread(problems, left)


def _all(tree: Tree) -> Iterator[Contents]:
    yield from tree.read.values()
    yield from tree.below.values()


def _name(path: Path, folder: Path) -> str:
    return printable(os.path.relpath(path, folder))


# ----------------------------------------------------------------------------------------------------------- sidecars


def _lost_texts(
    folder: Path, tree: Tree, images: KnownImages, strange: Sequence[Path]
) -> tuple[dict[Path, Path], list[Path]]:
    """({caption file: image that has no caption and is meant by it}, caption files that mean none)."""
    texts = [*strange, *(path for contents in tree.below.values() for path in contents.texts)]
    lost: dict[Path, Path] = {}
    found: set[Path] = set()  # images whose captions these are
    idle = []
    for path in texts:
        meant = meant_by(path, images)
        if meant and meant not in found and has_words(path):
            lost[path] = meant
            found.add(meant)
        else:
            idle.append(path)
    below = {image for contents in tree.below.values() for image in contents.images}
    images_below = {(path.parent, path.stem) for path in below}
    return lost, [path for path in idle if (path.parent, path.stem) not in images_below]


def meant_by(path: Path, images: KnownImages) -> Path | None:
    """The image that a caption file is probably about: one beside it goes before the only one elsewhere."""
    for stem in _stems(path):
        found = images.by_name.get(stem) or images.by_stem.get(stem) or []
        beside = [image for image in found if image.parent == path.parent]
        if beside or len(found) == 1:
            return (beside or found)[0]
    return None


def _stems(path: Path) -> Iterator[str]:
    """fox.png.txt and fox.tags.txt may be about fox, as may fox_caption.txt."""
    stem = path.stem
    while stem:
        yield key(stem)
        if ENDINGS.search(stem):
            yield key(ENDINGS.sub("", stem))
        stem = stem.rpartition(".")[0]


def has_words(path: Path) -> bool:
    """Whether a file says anything: boxes of a detector's training are numbers alone."""
    try:
        with path.open("rb") as opened:
            return any(byte >= 128 or chr(byte).isalpha() for byte in opened.read(4096))
    except OSError:
        return False


def _is_odd_text(path: Path, images: KnownImages) -> bool:
    """Whether a small text has the name of an image beside it and a suffix that nobody reads: fox.blip."""
    beside = any(image.parent == path.parent for image in images.by_stem.get(key(path.stem), ()))
    if not beside or path.suffix.lower() in (*TABLES, *NOT_WORDS, *DOCUMENTS, *HEIC):
        return False
    try:
        return path.stat().st_size <= MAX_CAPTION and not _is_binary(path)
    except OSError:
        return False


def _json_captions(paths: Iterable[Path]) -> list[Path]:
    """The files of one image each that hold a caption."""
    return [path for path in paths if any(map(str.isalpha, _json_caption(path)))]


def _json_caption(path: Path) -> str:
    try:
        item = parse_json(decode_text(path.read_bytes()[:MAX_CAPTION])[0])
    except (OSError, ValueError, UnclearText):
        return ""
    texts = [item.get(name) for name in CAPTION_COLUMNS] if isinstance(item, dict) else []
    return next((text for text in texts if isinstance(text, str)), "")


def _json_files(folder: Path, files: Sequence[Path]) -> Problem:
    paths = f"map(pathlib.Path, {[str(path) for path in files]})" if len(files) <= SHOWN else \
        f'pathlib.Path({str(folder)!r}).rglob("*.json")'
    text = f'next(filter(None, map(json.loads(p.read_text("utf-8")).get, {CAPTION_COLUMNS})))'
    loop = f'[p.with_name(p.name[:-5]).with_suffix(".txt").write_text({text}, "utf-8") for p in {paths}]'
    return Problem(f"{counted(len(files), 'JSON file')} with captions that are not read", f"{folder}",
                   listing(_name(path, folder) for path in files),
                   f"python3 -c {shell_word(f'import json, pathlib; {loop}')}", kind="data")


def _documents(folder: Path, files: Sequence[Path]) -> Problem:
    what = counted(len(files), "document is", "documents are")
    return Problem(f"{what} named as an image is, and not read", f"{folder}",
                   listing(_name(path, folder) for path in files), "save the caption as plain text (UTF-8) in a .txt "
                   "file with the image's name, or move these files elsewhere", kind="data")


def _misnamed(folder: Path, lost: Mapping[Path, Path]) -> Problem:
    moves = {path: image.with_suffix(".txt") for path, image in lost.items()}
    why = listing(f"{_name(path, folder)} should be called {_name(target, folder)}" for path, target in moves.items())
    what = f"{counted(len(lost), 'caption file is', 'caption files are')} not named as the image is, or elsewhere"
    return Problem(what, f"{folder}", why,
                   _move(moves), kind="data")


def _move(moves: Mapping[Path, Path]) -> str:
    """The command that moves each file to its target; one pattern for all where there is one."""
    same_name = {(path.parent, path.suffix, target.parent) for path, target in moves.items()
                 if path.name == target.name}
    endings = {(path.parent, path.name.removeprefix(target.stem)) for path, target in moves.items()
               if path.parent == target.parent and path.name.startswith(target.stem)}
    if len(same_name) == 1 and all(path.name == target.name for path, target in moves.items()):
        (source, suffix, target), = same_name
        return f"mv -n -- {shell_word(source)}/*{suffix} {shell_word(target)}/"
    if len(moves) > 3 and len(endings) == 1 and all(p.name.startswith(t.stem) for p, t in moves.items()):
        (source, ending), = endings
        loop = f'mv -n -- "$f" "${{f%{shell_word(ending)}}}.txt"'
        return f"for f in {shell_word(source)}/*{shell_word(ending)}; do {loop}; done"
    return "; ".join(f"mv -n -- {shell_word(a)} {shell_word(b)}" for a, b in islice(moves.items(), SHOWN))


# ------------------------------------------------------------------------------------------------------------- tables


def _is_companion(path: Path, tree: Tree) -> bool:
    """Whether nobody expects a file to be read: it is metadata that is, or of a kind that holds no captions."""
    read = path.name in METADATA and path.parent in tree.read
    return read or path.suffix.lower() in QUIET or path.name in ("LICENSE", "dataset_info.json", "dataset_infos.json")


def _table(folder: Path, path: Path, images: KnownImages) -> tuple[Problem | None, str]:
    """(the problem that a file's captions would be lost, else why it is left out; "": nobody expects it to be read)."""
    if path.suffix.lower() in HEIC:
        return None, "an iPhone photo; it is read after: pip install pillow-heif"
    if _is_an_image(path):
        return None, "an image by its content; give it the suffix of its kind, such as .jpg or .png"
    if path.suffix.lower() == ".json" and (key(path.stem) in images.by_stem or key(path.stem) in images.by_name):
        return None, "JSON of one image is not read; write its caption into a .txt file"
    about = _look(path, images) if images.paths else Mentions()
    if path.suffix.lower() in NOTES and (len(about.captions) < 2 or 2 * len(about.captions) <= len(images.paths)):
        return None, ""
    if about.captions:
        return misplaced(folder, path, images, about), ""
    if about.images:
        return None, "it names images without words about them"
    if path.suffix.lower() in TEXTS:
        return None, "no image has its name"
    return None, "it names no image without a caption" if path.suffix.lower() in TABLES else "of no kind that is read"


def _look(path: Path, images: KnownImages) -> Mentions:
    """What a file says about images; nothing where it is no text and no table of a known kind."""
    try:
        if path.suffix.lower() not in TABLES and _is_binary(path) or _is_report(path):
            return Mentions()
        return mentions(path, images)
    except OSError:
        return Mentions()


def _is_report(path: Path) -> bool:
    with path.open("rb") as opened:
        return REPORT_KEY.encode() in opened.read(40)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as opened:
        head = opened.read(4096)
    return b"\0" in head and not head.startswith((b"PK", *(mark for mark, _ in MARKS)))


def _is_an_image(path: Path) -> bool:
    """By the first bytes, whatever the file is called."""
    try:
        with path.open("rb") as opened:
            head = opened.read(12)
    except OSError:
        return False
    return head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or head[:4] == b"RIFF" and head[8:] == b"WEBP"


def misplaced(folder: Path, path: Path, images: KnownImages, about: Mentions) -> Problem:
    """A table of captions under another name or in another place than is read."""
    homes = Counter(image.parent for image in about.captions)
    home = homes.most_common(1)[0][0]
    what = f"{_name(path, folder)} holds captions and is not read"
    why = (f"it names {counted(len(about.captions), 'image')} without a caption; captions are read from "
           f"{', '.join(METADATA[:-1])} or {METADATA[-1]} beside the images, or from .txt files named as they are. "
           "If it is about other images, move it elsewhere")
    fix = _as_metadata(path, home, about) or _by_example(home, about)
    return Problem(what, f"{path}", why, fix, kind="data")


def _as_metadata(path: Path, home: Path, about: Mentions) -> str | None:
    """The command that makes it the metadata of its images, where that takes a name, or the names of two columns."""
    inside = all(cell == image.relative_to(home).as_posix() if image.is_relative_to(home) else False
                 for image, cell in about.cells.items())
    suffix = {".jsonl": ".jsonl", ".ndjson": ".jsonl", ".parquet": ".parquet"}.get(path.suffix.lower(), "")
    if not inside or any((home / name).exists() for name in METADATA):
        return None
    try:
        text = "" if suffix == ".parquet" else decode_text(path.read_bytes()[:MAX_BYTES])[0]
    except (OSError, UnclearText):
        return None
    first = text.lstrip().partition("\n")[0].rstrip()
    if suffix == ".parquet" or first.startswith("{") and first.endswith("}") and not text.lstrip().startswith("{}"):
        return _jsonl_move(path, home, first, suffix or ".jsonl")
    if first.startswith(("[", "{")) or path.suffix.lower() not in (".csv", ".tsv", ".tab"):
        return None
    return _csv_move(path, home, text, about)


def _jsonl_move(path: Path, home: Path, first: str, suffix: str) -> str | None:
    if suffix == ".jsonl":
        try:
            columns = parse_json(first)
        except ValueError:
            return None
        if NAME_COLUMN not in columns or not columns.keys() & {*CAPTION_COLUMNS}:
            return None
    return f"mv -n -- {shell_word(path)} {shell_word(home / f'metadata{suffix}')}"


def _csv_move(path: Path, home: Path, text: str, about: Mentions) -> str | None:
    """By `mv` where the columns have their names, else by `sed`, which writes another first line."""
    delimiter = max(DELIMITERS, key=lambda one: len(header_of(text, one)))
    header = header_of(text, delimiter)
    target, lower = shell_word(home / "metadata.csv"), [name.casefold() for name in header]
    if NAME_COLUMN in lower and any(name in lower for name in CAPTION_COLUMNS):
        return f"mv -n -- {shell_word(path)} {target}"
    cells = [header_of(line, delimiter) for line in text.splitlines()[1:2]]
    pairs = {image: (about.cells[image], caption) for image, caption in about.captions.items()}
    for name, caption in pairs.values():
        if cells and len(cells[0]) == len(header) and name in cells[0] and caption in cells[0] and name != caption:
            header[cells[0].index(name)], header[cells[0].index(caption)] = NAME_COLUMN, CAPTION_COLUMNS[0]
            line = delimiter.join(header).replace("/", r"\/").replace("&", r"\&").replace("\t", r"\t")
            return f"sed {shell_word(f'1s/.*/{line}/')} {shell_word(path)} > {target}"
    return None


def _by_example(home: Path, about: Mentions) -> str:
    image, caption = next(iter(about.captions.items()))
    name = image.relative_to(home).as_posix() if image.is_relative_to(home) else image.name
    line = json.dumps({NAME_COLUMN: printable(name), CAPTION_COLUMNS[0]: caption[:200]}, ensure_ascii=False)
    return f"write {printable(str(home / METADATA[0]))} with one line an image, such as {line}"


# ------------------------------------------------------------------------------------------------------ one folder up


def _around(folder: Path, images: KnownImages) -> list[Problem]:
    """Captions that lie in the folder above, or in a folder of captions beside this one."""
    above = folder.absolute().parent
    if above == folder.absolute():
        return []
    try:
        with os.scandir(above) as entries:
            near = sorted((e for e in islice(entries, MOST_BESIDE) if not e.name.startswith(".")), key=lambda e: e.name)
            files = [above / e.name for e in near if _may_be_table(e)]
            beside = [above / e.name for e in near if e.name.lower() in CAPTION_FOLDERS and e.is_dir()]
    except OSError:
        return []
    lost: dict[Path, Path] = {}
    for path in (path for other in beside if other != folder.absolute() for path in _texts(other)):
        found = images.by_stem.get(key(path.stem), [])
        lost |= {path: found[0]} if len(found) == 1 and has_words(path) else {}
    problems = [_misnamed(folder, lost)] if lost else []
    for path in files[:MOST_TABLES]:
        about = _about_below(_look(path, images), folder, above)
        if len(about.captions) * 2 >= len(images.paths):
            problems.append(misplaced(folder, path, images, about))
    return problems


def _texts(folder: Path) -> list[Path]:
    try:
        return scan(folder).texts
    except OSError:
        return []


def _may_be_table(entry: os.DirEntry[str]) -> bool:
    path = Path(entry.name)
    known = path.suffix.lower() in TABLES or entry.name.lower().startswith(("metadata", "caption"))
    return known and not is_image(path) and entry.is_file() and entry.stat().st_size <= MAX_BYTES


def _about_below(about: Mentions, folder: Path, above: Path) -> Mentions:
    """What a table above the folder says about images in it: not about those of their name beside the table."""
    beside = {image for image, cell in about.cells.items() if _is_about(cell.replace("\\", "/"), image, folder, above)}
    return Mentions(beside, {image: text for image, text in about.captions.items() if image in beside},
                    {image: cell for image, cell in about.cells.items() if image in beside})


def _is_about(cell: str, image: Path, folder: Path, above: Path) -> bool:
    where, _, name = cell.rpartition("/")
    if where:
        return key(where.rpartition("/")[2]) == key(image.absolute().parent.name)
    return not any((above / form).exists() for form in (name, image.name))


# -------------------------------------------------------------------------------------------------- images not read


def not_followed(folder: Path, tree: Tree) -> list[LeftOut]:
    """Linked folders and other splits than train."""
    links = {path: len(contents.images) for path, contents in tree.below.items() if contents.images}
    why = "a link to a folder with {} images; links to folders are not followed"
    return [*(LeftOut(f"{_name(path, folder)}/", why.format(count)) for path, count in links.items()),
            *(LeftOut(f"{name}/", "of several splits only train is read") for name in sorted(tree.held_out))]
