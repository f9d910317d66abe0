"""Rows: every image of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from trainkit.data import buckets, caption_changes
from trainkit.data.batch import Listed, Row, Source
from trainkit.data.geometry import cut_away, enlargement
from trainkit.data.images import content_digest
from trainkit.data.masks import judge_masks, with_masks
from trainkit.data.sources.account import Account, LeftOut
from trainkit.data.sources.captions import METADATA
from trainkit.data.sources.folder import IMAGES, list_image_folder, report_left_out
from trainkit.data.sources.table import list_table
from trainkit.data.sources.text import one_line
from trainkit.data.verdicts import Verdict, judge
from trainkit.errors import SHOWN, Problem, counted, listing, printable, shell_word
from trainkit.options.captions import CaptionOptions
from trainkit.options.sizes import size_of
from trainkit.rng import permutation
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.options import Compat, ImageOptions

log = logging.getLogger(__name__)

Judged = TypeVar("Judged")
ENLARGED = 2.0  # an image enlarged by this factor or more is told: it teaches blur
CROPPED = 0.15  # an image that loses more of its area than this is told
NAMED = 3  # images that are named in a line


class Rows(list[Row]):
    """The rows of a data set, and the account of what they were read from."""

    account = Account()


def read_rows(data: ImageOptions, captions: CaptionOptions | None = None, *, seed: int = 0,
              compat: Compat | None = None) -> tuple[Rows, list[Problem]]:
    """(rows, problems) of the folder or --dataset_name; every image is decoded once to be sure it can be.

    Rows are in a fixed order (by name, or the data set's own), repeats of an image beside each other. With problems
    the rows may be incomplete.

    captions  what is made of the captions; by default nothing
    seed      decides which images --max_train_samples takes
    compat    the trainer whose choice of buckets and ending of caption files is asked for
    """
    captions = captions or CaptionOptions()
    wrong = _source_problem(data)
    if wrong:
        return Rows(), [wrong]
    source = list_table(data) if data.dataset_name else list_image_folder(data, captions.extension(compat))
    where, problems = printable(f"{data.dataset_name or data.folder}"), source.problems
    listed = _sample(source.listed, data.max_images, seed)
    rows, bad = _usable(listed)
    together = partial(_together, partial(judge_masks, alpha=data.alpha_mask))
    masked = with_masks(rows, mask_sources(listed, data), data, where, together)
    rows, skips = masked.rows, data.bad_images == "skip" and bool(masked.rows)
    skipped = (*(LeftOut(found.id, one_line(verdict.refused)) for found, verdict in bad),
               *(LeftOut(row.id, why) for row, why in masked.bad)) if skips else ()
    report_left_out(skipped)
    unreadable = [] if skips or not bad else [_unreadable(bad, len(listed), where)]
    if not data.prompt and not problems:
        problems = list(_caption_problems(rows, data, where, captions.extension(compat)))
    prompted = [row if row.caption else replace(row, caption=data.prompt) for row in rows]
    prompted, unclear = caption_changes.finished(prompted, captions)
    repeated = Rows(buckets.with_sizes(prompted, data, compat, repeats=data.repeats))
    small = list(buckets.problems(repeated, data, where))
    if not small:
        warn_enlarged(repeated, data.resolution)
        _warn_cropped(repeated, data)
        buckets.warn_small_buckets(repeated, data, compat)
    _warn_twins(rows)
    areas = [mask.area for mask in masked.masks]
    repeated.account = replace(source.account, images=len(rows), in_all=len(source.listed) - len(skipped),
                               left_out=(*source.account.left_out, *skipped), masks=len(areas),
                               mask_area=fmean(areas) if areas else 0.0)
    log.info("%s: %s", where, repeated.account)
    return repeated, [*problems, *unclear, *unreadable, *masked.problems, *small]


def mask_sources(listed: Sequence[Listed], data: ImageOptions) -> dict[str, Source]:
    """What holds the mask of each image, by the image's name: a file, or for its transparency the image itself."""
    sources = {found.id: found.source if data.alpha_mask else found.mask for found in listed}
    return {name: source for name, source in sources.items() if source is not None}


def _source_problem(data: ImageOptions) -> Problem | None:
    """That there is no source, or two where none goes first: with captions --dataset_name does."""
    flags = f"--{data.folder_flag}, --dataset_name"
    if not (data.folder or data.dataset_name):
        return Problem("no data source", flags, "there is nothing to train on", f"--{data.folder_flag} {IMAGES}")
    if data.folder and data.dataset_name and not data.captioned:
        return Problem("two data sources", flags, "a run trains on one of them", "drop one of the two flags")
    return None


def _sample(listed: list[Listed], most: int | None, seed: int) -> list[Listed]:
    """`most` of the images, drawn by the seed, in the order they had."""
    if most is None or most >= len(listed):
        return listed
    return [listed[i] for i in sorted(permutation(len(listed), "max_train_samples", seed)[:most].tolist())]


def _caption_problems(rows: Sequence[Row], data: ImageOptions, where: str, ending: str | None) -> Iterator[Problem]:
    """That no image has a caption; where only some lack one, they are told."""
    missing = [row.id for row in rows if not row.caption]
    if not missing:
        return
    if len(missing) < len(rows):
        log.warning("%d of %d images have no caption and are trained on with an empty one: %s", len(missing),
                    len(rows), listing(missing))
        return
    fix = "--caption_column COLUMN" if data.dataset_name else \
        f"--caption_extension .txt, or what the files end with: only {ending} files were read" if ending else \
        f"write {METADATA[0]} with file_name and text in every line, or a .txt file beside each image"
    yield Problem("no image has a caption", where, listing(missing), fix, kind="data")


def warn_enlarged(rows: Sequence[Row], resolution: int | str) -> None:
    """Tell which images are far smaller than what they are trained at."""
    factors = {row.id: enlargement(row.size, row.cut or size_of(resolution)) for row in rows}
    small = sorted((name for name in factors if factors[name] >= ENLARGED), key=lambda name: -factors[name])
    if small:
        log.warning("%s far smaller than --resolution %s; enlarging teaches blur: %s",
                    counted(len(small), "image is", "images are"), resolution,
                    listing(f"{name}, {factors[name]:.3g} times" for name in small))


def _warn_cropped(rows: Sequence[Row], data: ImageOptions) -> None:
    """Tell which images have another shape than what is cut out of them, of which the network sees only a part."""
    lost = {row.id: cut_away(row.size, row.cut or size_of(data.resolution)) for row in rows}
    odd = sorted((name for name in lost if lost[name] > CROPPED), key=lambda name: -lost[name])
    if odd:
        named = [f"{name} {100 * lost[name]:.0f} %" for name in odd[:NAMED]]
        more = [f"{len(odd) - NAMED} more"] if len(odd) > NAMED else []
        them = "it" if len(odd) == 1 else "them"
        advice = f"Crop {them} yourself" if data.enable_bucket else (
            f"--enable_bucket keeps the shape of images; to choose what stays, crop {them} yourself")
        log.warning("%s more than %.0f %% of the area in each %scrop: %s. %s",
                    counted(len(odd), "image loses", "images lose"), 100 * CROPPED,
                    "" if data.enable_bucket else "square ", ", ".join([*named, *more]), advice)


def _warn_twins(rows: Sequence[Row]) -> None:
    """Tell which files hold the very same image."""
    by_content: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_content[row.digest].append(row)
    twins = [same for same in by_content.values() if len(same) > 1]
    if twins:
        log.warning("%s there more than once, and seen so much more often: %s",
                    counted(len(twins), "image is", "images are"),
                    listing(" = ".join(row.id for row in same)
                            + (" (with different captions)" if len({row.all_captions for row in same}) > 1 else "")
                            for same in twins))


# ------------------------------------------------------------------------------------------------------------- check


def check(listed: Sequence[Listed], where: str) -> tuple[list[Row], list[Problem]]:
    """A row for every image that can be used, its captions in lines; all that cannot become one problem."""
    rows, bad = _usable(listed)
    return rows, [_unreadable(bad, len(listed), where)] if bad else []


def _usable(listed: Sequence[Listed]) -> tuple[list[Row], list[tuple[Listed, Verdict]]]:
    """(a row for every image that can be used, the others and why they cannot)."""
    judged = list(zip(listed, _judge_together(listed), strict=True))
    _warn_notes(judged)
    rows = [Row(found.id, found.source, found.caption, verdict.size, verdict.digest, others=found.others)
            for found, verdict in judged if not verdict.refused]
    return rows, [(found, verdict) for found, verdict in judged if verdict.refused]


def _judge_together(listed: Sequence[Listed]) -> list[Verdict]:
    return _together(judge, [found.id for found in listed], [found.source for found in listed])


def _together(judge: Callable[[Sequence[Source]], list[Judged]], names: Sequence[str], sources: Sequence[Source]
              ) -> list[Judged]:
    """Several processes judge a part each. If lists differ, they share no disk, and each judges all of its own."""
    digest = content_digest("\n".join(names).encode(errors="surrogateescape"))
    if len(set(ranks.gather(digest))) > 1:
        return judge(sources)
    parts = ranks.gather(judge(sources[ranks.rank() :: ranks.world()]))
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(sources))]


def _warn_notes(judged: Sequence[tuple[Listed, Verdict]]) -> None:
    """Tell what is remarkable about images, each remark once with all that it is about."""
    animated = [found.id for found, verdict in judged if verdict.animated]
    if animated:
        log.warning("%s several frames; the first is used: %s", counted(len(animated), "file holds", "files hold"),
                    listing(animated))
    notes: dict[str, set[str]] = defaultdict(set)
    for found, verdict in judged:
        for note in verdict.notes:
            notes[note].add(found.id)
    for note, names in notes.items():
        log.warning("%s: %s: %s", counted(len(names), "image"), note, listing(sorted(names)))


def _unreadable(bad: list[tuple[Listed, Verdict]], total: int, where: str) -> Problem:
    """Images that another program reads are never to be moved away: their fix says how they can be read."""
    broken = [shell_word(found.source) for found, verdict in bad if isinstance(found.source, Path) and not verdict.fix]
    fixes = dict.fromkeys(verdict.fix for _, verdict in bad if verdict.fix)
    if broken:
        fixes[f'for f in {" ".join(broken[:SHOWN])}; do mv -- "$f" "$f.unreadable"; done'] = None
    return Problem(f"{len(bad)} of {total} images cannot be read", where,
                   listing(f"{found.id}: {one_line(verdict.refused)}" for found, verdict in bad),
                   "; ".join(fixes) or "leave these rows out of the data set", kind="data")
