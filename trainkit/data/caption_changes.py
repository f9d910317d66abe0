"""What becomes of a caption from its file to the text encoder: one line, prefix and suffix, then changes by the visit.

The order and the meaning of the flags are those of kohya's sd-scripts (`process_caption` in library/train_util.py at
48d368f). What is drawn is a pure function of (seed, epoch, row), as crops are: see trainkit/rng.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trainkit import rng
from trainkit.condition import UNCONDITIONAL
from trainkit.errors import Problem, counted, listing
from trainkit.options.captions import VARIANTS

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.options import CaptionOptions

log = logging.getLogger(__name__)

CHOICE = re.compile(r"\{([^{}]*)\}")  # of a wildcard, when braces meant as such are gone
SEVERAL = re.compile(r"\{[^{}]*\|[^{}]*\}")
WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")  # (word:1.2), as WebUIs read it in prompts
OPEN, CLOSE = "\1", "\2"  # stand for {{ and }}; captions have no such characters
SHOWN = 60  # characters of a caption in a message


# ----------------------------------------------------------------------------------------------------------------------
# Once, when the rows are read


def finished(rows: Iterable[Row], options: CaptionOptions) -> tuple[list[Row], list[Problem]]:
    """The rows with their captions as the flags want them for every visit, and what is wrong with those.

    A caption of several lines becomes one line; with --enable_wildcard each line is a caption of its own.
    """
    rows = list(rows)
    _warn_plain_text(rows, options)
    changed = [replace(row, caption=first, others=tuple(others)) for row in rows
               for first, *others in [_captions(row, options)]]
    return changed, list(_unbalanced(changed)) if options.enable_wildcard else []


def in_one_line(row: Row) -> Row:
    return replace(row, caption=_joined(row.caption), others=tuple(map(_joined, row.others)))


def _joined(caption: str) -> str:
    return " ".join(caption.split("\n"))


def _captions(row: Row, options: CaptionOptions) -> list[str]:
    lines = [line for caption in row.all_captions
             for line in (caption.split("\n") if options.enable_wildcard else [_joined(caption)])]
    around = [(text or "").strip() for text in (options.caption_prefix, options.caption_suffix)]
    return [" ".join(filter(None, [around[0], line, around[1]])) for line in lines]


def _warn_plain_text(rows: Sequence[Row], options: CaptionOptions) -> None:
    """What captions have that is taken as plain words; each remark once, with the images."""
    marks = {} if options.enable_wildcard else {
        "captions of several lines: they are read as one line (--enable_wildcard chooses one of them at each visit)":
            re.compile("\n"),
        "wildcards such as {red|green} in captions: they are read as plain text (--enable_wildcard chooses)": SEVERAL}
    marks["prompt weights such as (word:1.2) in captions: brackets and number are read as plain text"] = WEIGHT
    for what, mark in marks.items():
        found = [row.id for row in rows if any(map(mark.search, row.all_captions))]
        if found:
            log.warning("%s with %s: %s", counted(len(found), "image"), what, listing(found))


def _unbalanced(rows: Iterable[Row]) -> Iterator[Problem]:
    """Captions in which a brace is left when all wildcards are taken out."""
    bad = {row.id: caption for row in rows for caption in row.all_captions
           if set("{}") & set(CHOICE.sub("", _without_literal_braces(caption)))}
    if bad:
        yield Problem(f"{counted(len(bad), 'caption has', 'captions have')} braces without a partner, or in each other",
                      "--enable_wildcard", listing(f"{name}: {caption[:SHOWN]!r}" for name, caption in bad.items()),
                      "write {red|green}, and {{ }} for braces that are meant as such; or leave out --enable_wildcard",
                      kind="data")


# ----------------------------------------------------------------------------------------------------------------------
# At each visit


@dataclass(frozen=True)
class CaptionChanges:
    """(row, epoch) -> the text that this visit is trained with, or UNCONDITIONAL; class images keep their captions.

    limit       how many variants a caption has; None: each visit has its own
    of_sources  the options of sources that have their own
    """

    options: CaptionOptions
    seed: int
    limit: int | None = None
    of_sources: tuple[CaptionOptions, ...] = ()

    def __call__(self, row: Row, epoch: int) -> str:
        options = self.options_of(row)
        if not (row.others or changes_something(options)):
            return row.caption
        visit = self.seed, epoch, row.id, row.repeat
        place = int(rng.permutation(len(row.all_captions), "caption", *visit)[0]) if row.others else 0
        caption = row.all_captions[place]
        if self.keeps_captions(row):
            return caption
        every = options.caption_dropout_every_n_epochs  # epochs count from 1, as in kohya's trainers
        if every and (epoch + 1) % every == 0 or options.caption_dropout_rate and \
                rng.uniform([visit], "caption dropout").item() < options.caption_dropout_rate:
            return UNCONDITIONAL
        if self.limit is None:
            return changed(caption, options, *visit)
        return self._variant(row, place, self._number(row, epoch))

    def options_of(self, row: Row) -> CaptionOptions:
        return row.handling.captions if row.handling else self.options

    def keeps_captions(self, row: Row) -> bool:
        """Class images are captioned as they are, unless their source has settings of its own."""
        return row.is_class and row.handling is None

    @cached_property
    def all_options(self) -> tuple[CaptionOptions, ...]:
        return self.options, *self.of_sources

    @property
    def varies(self) -> bool:
        """Whether the text of a caption differs from visit to visit."""
        return any(options.varies for options in self.all_options)

    def announced(self, rows: Iterable[Row]) -> list[str] | None:
        """Every text that visits of the rows may be given; None where they cannot be listed before the run."""
        if self.endless:
            return None
        dropped = [UNCONDITIONAL] if any(options.drops for options in self.all_options) else []
        return dropped + [text for row in rows if row.repeat == 0 for text in self.examples(row)]

    @property
    def endless(self) -> bool:
        """Whether each visit has a text of its own."""
        return self.varies and self.limit is None

    def examples(self, row: Row) -> list[str]:
        """The texts of a row, without its dropped caption: all of them, or where they are endless one a caption.

        Repeats of an image share its variants.
        """
        captions, options = range(len(row.all_captions)), self.options_of(row)
        if self.keeps_captions(row) or not changes_something(options):
            return [*row.all_captions]
        if self.limit is None:
            return [changed(row.all_captions[place], options, self.seed, 0, row.id, 0) for place in captions]
        return list(dict.fromkeys(self._variant(row, place, number) for place in captions
                                  for number in range(self.limit)))

    def _variant(self, row: Row, place: int, number: int) -> str:
        return changed(row.all_captions[place], self.options_of(row), self.seed, row.id, place, "variant", number)

    def _number(self, row: Row, epoch: int) -> int:
        """Of the variant in this epoch: in `limit` epochs a row has each of them once."""
        assert self.limit is not None
        turn, place = divmod(epoch, self.limit)
        return int(rng.permutation(self.limit, "caption variant", self.seed, turn, row.id, row.repeat)[place])


def changes_something(options: CaptionOptions) -> bool:
    """Whether there is anything to be done at a visit."""
    return options.varies or options.drops or bool(options.keep_tokens_separator
                                                            or options.secondary_separator)


def make_changes(options: CaptionOptions, rows: Sequence[Row], *, seed: int, live: bool) -> CaptionChanges:
    """The changes of a run; says in the log into how many texts the captions turn.

    live  whether text encoders read each text when it is asked for, to the end of the run
    """
    limit = options.caption_variants or (None if live else VARIANTS)
    of_sources = tuple(dict.fromkeys(row.handling.captions for row in rows if row.handling))
    varies = any(one.varies for one in (options, *of_sources))
    changes = CaptionChanges(options, seed, limit if varies else None, of_sources)
    _log_variants(changes, rows)
    return changes


def _log_variants(changes: CaptionChanges, rows: Sequence[Row]) -> None:
    if not changes.varies:
        return
    if changes.endless:
        log.info("captions differ at every visit: the text encoders in training read each of them anew")
        return
    limit = changes.limit or 0
    captions = sum(len(row.all_captions) for row in rows if not (row.is_class or row.repeat))
    chosen = "" if changes.options.caption_variants else ", the default"
    log.info("captions: %s of each (--caption_variants %d%s), which makes up to %s to encode",
             counted(limit, "variant"), limit, chosen, counted(captions * limit, "text"))


def changed(caption: str, options: CaptionOptions, *key: int | str) -> str:
    """A caption with its wildcards drawn, its tags shuffled and dropped: a function of its words, the flags and `key`.
    """
    text = _drawn(caption, *key) if options.enable_wildcard else caption
    text = _with_tags(text, options, *key)
    if options.secondary_separator and options.secondary_separator in text:
        together = map(str.strip, text.split(options.secondary_separator))
        text = f"{options.caption_separator} ".join(together)
    return text


def _without_literal_braces(caption: str) -> str:
    return caption.replace("{{", OPEN).replace("}}", CLOSE)


def _drawn(caption: str, *key: int | str) -> str:
    """One of the parts of each {…|…}; a part may be empty."""
    numbers = iter(range(len(caption)))

    def choose(found: re.Match[str]) -> str:
        parts = found[1].split("|")
        return parts[rng.integer(len(parts), "wildcard", *key, next(numbers))]

    text = CHOICE.sub(choose, _without_literal_braces(caption))
    return " ".join(text.replace(OPEN, "{").replace(CLOSE, "}").split())


def _with_tags(text: str, options: CaptionOptions, *key: int | str) -> str:
    """Tags in a new order, some left out, but for those at the start and end that are kept."""
    mark = options.keep_tokens_separator
    marked = bool(mark) and str(mark) in text
    moves = options.shuffle_caption or options.caption_tag_dropout_rate > 0
    if not (moves or marked):
        return text
    if marked:
        first, middle, last = ([*(_tags(part, options) for part in text.split(mark, 2)), [], []])[:3]
    else:
        tags, last = _tags(text, options), []
        first, middle = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if options.shuffle_caption:
        middle = [middle[i] for i in rng.permutation(len(middle), "tags", *key).tolist()]
    if options.caption_tag_dropout_rate:
        draws = torch.rand(len(middle), generator=rng.generator("tag dropout", *key)).tolist()
        middle = [tag for tag, draw in zip(middle, draws, strict=True) if draw >= options.caption_tag_dropout_rate]
    return f"{options.caption_separator} ".join([*first, *middle, *last])


def _tags(text: str, options: CaptionOptions) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]
