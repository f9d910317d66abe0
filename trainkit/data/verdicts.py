"""What reading an image says about it: its size, its digest, or why it cannot be used. A good one is remembered.

A refused image is read again at every start: it may have been refused for want of memory, and no run starts with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TextIO, TypeVar

import PIL
from PIL import Image

from trainkit import digests
from trainkit.data import images
from trainkit.data.batch import Source, place_of
from trainkit.data.images import UnreadableImage, content_digest, decode, is_animated
from trainkit.data.sources.text import one_line

DECODERS = 4  # threads that check images at the start; Pillow decodes without the interpreter lock
AT_ONCE = 20_000  # images whose verdicts are looked up together, where they lie in shards
KIND = "image"  # of what is remembered of a file
Seen = TypeVar("Seen")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading one image says."""

    size: tuple[int, int] = (0, 0)  # h, w, upright
    digest: str = ""  # of the file's content
    animated: bool = False
    notes: tuple[str, ...] = ()  # what Pillow and our decoder remark
    refused: str = ""  # why it cannot be used
    fix: str = ""  # what makes it usable, where the file itself is sound

    def pack(self) -> str:
        return json.dumps([self.size, self.digest, self.animated, self.notes])

    @classmethod
    def unpack(cls, text: str) -> Verdict:
        (h, w), digest, animated, notes = json.loads(text)
        return cls((h, w), digest, animated, tuple(notes))


class Remembered(Protocol):
    """What reading one file says."""

    @property
    def refused(self) -> str:
        """Why the file cannot be used; then nothing is remembered."""

    def pack(self) -> str: ...


Said = TypeVar("Said", bound=Remembered)


def judge(sources: Sequence[Source]) -> list[Verdict]:
    """A verdict on each image. Those that earlier runs found good, and that were not touched since, are not read.

    What is looked up of them takes more memory than what is kept, so shards are judged a few at a time.
    """
    found: list[Verdict] = []
    start = 0
    for end in _ends(sources):
        found += recalled(sources[start:end], KIND, _version(), Verdict.unpack,
                          lambda unknown: [verdict for verdict, _ in _examine_all(unknown, _nothing)])
        start = end
    return found


def _ends(sources: Sequence[Source]) -> Iterator[int]:
    """Where parts of AT_ONCE images or more end, each with whole shards."""
    def home(source: Source) -> object:
        place = place_of(source)
        return place.table if isinstance(place, digests.TablePlace) else None

    start = 0
    for i in range(AT_ONCE, len(sources)):
        if i - start >= AT_ONCE and home(sources[i]) is not None and home(sources[i]) != home(sources[i - 1]):
            yield i
            start = i
    yield len(sources)


def recalled(sources: Sequence[Source], kind: str, version: str, unpack: Callable[[str], Said],
             read: Callable[[Sequence[Source]], Sequence[Said]]) -> list[Said]:
    """What `read` says of each source, or what it said of the same untouched file before.

    kind, version  see `trainkit.digests.FileMemory`
    """
    places = [place_of(source) for source in sources]
    memory = digests.FileMemory(kind, filter(None, places), version=version)
    known = {place: unpack(text) for place, text in memory.values.items()}
    unknown = [(place, source) for place, source in zip(places, sources, strict=True) if place not in known]
    found = read([source for _, source in unknown])
    _keep(memory, [place for place, _ in unknown], found)
    new = iter(found)
    return [known[place] if place in known else next(new) for place in places]


def judge_and_look(sources: Sequence[Source], look: Callable[[Image.Image], Seen],
                   progress: Callable[[int], object] = lambda done: None) -> list[tuple[Verdict, Seen | None]]:
    """A verdict on each image, read anew, and what `look` makes of its pixels; None of an image that is refused.

    progress  takes how many images were read
    """
    places = [place_of(source) for source in sources]
    memory = digests.FileMemory(KIND, filter(None, places), version=_version())
    found = _examine_all(sources, look, progress)
    _keep(memory, places, [verdict for verdict, _ in found])
    return found


def judge_and_remember(sources: Sequence[Source], look: Callable[[Image.Image], Said], kind: str, version: str,
                       unpack: Callable[[str], Said]) -> list[tuple[Verdict, Said | None]]:
    """A verdict on each image, and what `look` says of its pixels; only images that lack one of the two are read.

    kind, version  of what `look` says, see `trainkit.digests.FileMemory`
    """
    places = [place_of(source) for source in sources]
    there = [place for place in places if place is not None]
    verdicts = digests.FileMemory(KIND, there, version=_version())
    looks = digests.FileMemory(kind, there, version=f"{_version()} {version}")
    known = {place: (Verdict.unpack(verdicts.values[place]), unpack(text)) for place, text in looks.values.items()
             if place in verdicts.values}
    unknown = [(place, source) for place, source in zip(places, sources, strict=True) if place not in known]
    found = _examine_all([source for _, source in unknown], look)
    read = [place for place, _ in unknown]
    _keep(verdicts, read, [verdict for verdict, _ in found])
    measured = [(place, said) for place, (_, said) in zip(read, found, strict=True) if said is not None]
    _keep(looks, [place for place, _ in measured], [said for _, said in measured])
    new = iter(found)
    return [known[place] if place in known else next(new) for place in places]


def _keep(memory: digests.FileMemory, places: Sequence[digests.Place | None], verdicts: Sequence[Remembered]) -> None:
    memory.keep({place: verdict.pack() for place, verdict in zip(places, verdicts, strict=True)
                 if place and not verdict.refused})


def _version() -> str:
    """Of all that a verdict depends on besides the file."""
    code = digests.code_version(images, sys.modules[__name__])
    return f"{code} {PIL.__version__} {' '.join(images.FORMATS)}"


# ------------------------------------------------------------------------------------------------------------ reading


def _nothing(image: Image.Image) -> None:
    """A look that sees nothing."""


def _examine_all(sources: Sequence[Source], look: Callable[[Image.Image], Seen],
                 progress: Callable[[int], object] = lambda done: None) -> list[tuple[Verdict, Seen | None]]:
    found: list[tuple[Verdict, Seen | None]] = []
    if not sources:
        return found
    with _notes_kept(), ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        for result in pool.map(partial(_examine, look=look), sources):
            found.append(result)
            progress(len(found))
    return found


_now = threading.local()  # .notes: what is remarked of the image that this thread is looking at


@contextmanager
def _notes_kept() -> Iterator[None]:
    """Inside, warnings of Pillow and of our decoder are kept as notes on the image they are about."""

    def keep(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
             line: str | None = None) -> None:
        if hasattr(_now, "notes"):
            _now.notes.append(one_line(f"{message}")[:200])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        yield


def _examine(source: Source, look: Callable[[Image.Image], Seen]) -> tuple[Verdict, Seen | None]:
    """Read and decode an image once."""
    _now.notes = []
    try:
        data = source.read_bytes()
        image = decode(data, note=warnings.warn)
        verdict = Verdict((image.height, image.width), content_digest(data), is_animated(data), _notes())
        return verdict, look(image)
    except UnreadableImage as error:
        return Verdict(refused=f"{error}", fix=error.fix, notes=_notes()), None
    except OSError as error:
        return Verdict(refused=f"{error}", notes=_notes()), None


def _notes() -> tuple[str, ...]:
    return tuple(dict.fromkeys(_now.notes))
