"""Rows: every image of the data set with its caption and size, all checked before the first step. No pixels stay."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from trainkit.commands import tool
from trainkit.data import buckets, caption_changes
from trainkit.data.batch import Listed, Row, Source
from trainkit.data.geometry import cut_away, enlargement
from trainkit.data.images import content_digest
from trainkit.data.looks import (
    NO_HASHES,
    Look,
    fitting_resolution,
    hashes_available,
    judge_with_looks,
    look_alikes,
    sheet_command,
)
from trainkit.data.masks import MaskedRows, judge_masks, with_masks
from trainkit.data.sources.account import Account, LeftOut, SourceListing
from trainkit.data.sources.captions import METADATA
from trainkit.data.sources.folder import IMAGES, report_left_out
from trainkit.data.sources.parts import Part, SourcePlan, sources_of
from trainkit.data.sources.text import one_line
from trainkit.data.verdicts import Verdict, judge
from trainkit.errors import SHOWN, Problem, counted, listing, printable, shell_word
from trainkit.options.captions import CaptionOptions
from trainkit.options.sizes import size_of
from trainkit.rng import permutation
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.options import Compat, ImageOptions, PriorOptions

log = logging.getLogger(__name__)

Judgement = TypeVar("Judgement")
ENLARGED = 2.0  # an image enlarged by this factor or more is told: it teaches blur
CROPPED = 0.15  # an image that loses more of its area than this is told
NAMED = 3  # images that are named in a line
MOST_LOOKED = 10_000  # images; of more, none is looked at for blur and copies at a start
Warn = Callable[..., object]  # takes what logging.warning takes


class Remarks:
    """Tells what is remarkable about images, and in the end which command shows it all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, text: str, *values: object) -> None:
        self.count += 1
        log.warning(text, *values)

    def show_all(self, data: ImageOptions) -> None:
        command = sheet_command(data)
        if self.count and command:
            log.warning("to see all these images, with what each does to training: %s", command)


@dataclass(frozen=True)
class SourceCount:
    """What one of several sources gives to an epoch."""

    name: str
    images: int
    rows: int  # uses of images
    is_class: bool = False
    loss_weight: float = 1.0


class Rows(list[Row]):
    """The rows of a data set, class images of its sources last, and the account of what they were read from.

    sources  what each gives, where there are several
    note     how these were found
    """

    account = Account()
    sources: Sequence[SourceCount] = ()
    note = ""

    @property
    def per_epoch(self) -> int:
        """Uses of images in an epoch, class images aside."""
        return sum(not row.is_class for row in self)


def read_rows(data: ImageOptions, captions: CaptionOptions | None = None, *, seed: int = 0,
              compat: Compat | None = None, prior: PriorOptions | None = None) -> tuple[Rows, list[Problem]]:
    """(rows, problems) of everything that the flags name; every image is decoded once to be sure it can be.

    Rows are in a fixed order (of the sources, in each by name or the data set's own), repeats of an image beside each
    other. With problems the rows may be incomplete.

    captions  what is made of the captions; by default nothing
    seed      decides which images --max_train_samples takes
    compat    the trainer whose choice of buckets and ending of caption files is asked for
    prior     the weight of class images, and their folder where it is in kohya's layout
    """
    captions = captions or CaptionOptions()
    wrong = _source_problem(data)
    if wrong:
        return Rows(), [wrong]
    plan = sources_of(data, captions, compat, prior)
    listings = [part.read(compat) for part in plan.parts]
    problems = [*plan.problems, *(problem for one in listings for problem in one.problems)]
    listed = [replace(found, id=part.name + found.id) if part.name else found
              for part, one in zip(plan.parts, listings, strict=True) for found in one.listed]
    home = [place for place, one in enumerate(listings) for _ in one.listed]
    chosen = _sample([i for i, place in enumerate(home) if not plan.parts[place].is_class], data.max_images, seed)
    chosen += [i for i, place in enumerate(home) if plan.parts[place].is_class]
    warn = Remarks()
    by_part = _judged_parts(plan.parts, [(home[i], listed[i]) for i in chosen], warn)
    judged = [found for of_part in by_part for found in of_part]
    bad = [found for found in judged if found.refused]
    masked = [_masked(part, of_part) for part, of_part in zip(plan.parts, by_part, strict=True)]
    skips = data.bad_images == "skip" and any(one.rows for one in masked)
    skipped = (*(LeftOut(found.listed.id, one_line(found.refused)) for found in bad),
               *(LeftOut(row.id, why) for one in masked for row, why in one.bad)) if skips else ()
    report_left_out(skipped)
    problems += [] if skips or not bad else [_unreadable(bad, len(judged), printable(data.source))]
    rows = Rows()
    for part, one, of_part in zip(plan.parts, listings, masked, strict=True):
        more, found = _rows_of(part, of_part.rows, compat, warn, known=not one.problems)
        problems += [*of_part.problems, *found]
        rows += more
    _warn_twins(rows, warn)
    warn.show_all(data)
    rows.sort(key=lambda row: row.is_class)  # stable
    rows.sources = _counts(plan.parts, rows) if plan.parts and plan.parts[0].name else ()
    rows.note = plan.note
    report_left_out(plan.left_out)
    rows.account = _account(plan, listings, rows, skipped)
    log.info("%s: %s", printable(data.source), rows.account)
    return rows, problems


def _masked(part: Part, judged: Sequence[Judged]) -> MaskedRows:
    """The rows of one source that can be used, with their masks."""
    sources = {found.listed.id: found.listed.source if part.data.alpha_mask else found.listed.mask for found in judged}
    there = {name: source for name, source in sources.items() if source is not None}
    together = partial(_together, partial(judge_masks, alpha=part.data.alpha_mask))
    return with_masks([found.row for found in judged if not found.refused], there, part.data, part.place, together)


def _rows_of(part: Part, rows: list[Row], compat: Compat | None, warn: Remarks, *, known: bool
             ) -> tuple[list[Row], list[Problem]]:
    """The rows of one source in all their uses, and what is wrong with them.

    known  whether nothing is wrong with the source itself
    """
    problems: list[Problem] = []
    if not part.prompt and known:
        problems += _caption_problems(rows, part, part.captions.extension(compat))
    _warn_wordless(rows)
    prompted = [row if row.caption else replace(row, caption=part.prompt) for row in rows]
    prompted, unclear = caption_changes.finished(prompted, part.captions)
    sized = buckets.with_sizes(prompted, part.data, compat, repeats=part.data.repeats)
    if part.name:  # beside sources of other sizes
        sized = (row if row.cut else replace(row, cut=size_of(part.data.resolution)) for row in sized)
    found = [*sized]
    small = list(buckets.problems(found, part.data, part.place))
    if not small:
        warn_enlarged(found, part.data.resolution, warn)
        _warn_cropped(found, part.data, warn)
        buckets.warn_small_buckets(found, part.data, compat)
    if part.settings or part.is_class or part.loss_weight != 1:
        found = [replace(row, handling=part.settings, is_class=part.is_class, loss_weight=part.loss_weight)
                 for row in found]
    return found, [*problems, *unclear, *small]


def _counts(parts: Sequence[Part], rows: Sequence[Row]) -> list[SourceCount]:
    """Of each source, in the order of the plan."""
    def name_of(row: Row) -> str:
        return next(part.name for part in parts if row.id.startswith(part.name))

    named = [name_of(row) for row in rows]
    uses, images = Counter(named), Counter(name for name, row in zip(named, rows, strict=True) if not row.repeat)
    return [SourceCount(part.name.rstrip("/"), images[part.name], uses[part.name], part.is_class, part.loss_weight)
            for part in parts]


def _account(plan: SourcePlan, listings: Sequence[SourceListing], rows: Rows, skipped: tuple[LeftOut, ...]) -> Account:
    """Of all sources together; class images are counted among the sources alone."""
    captions: Counter[str] = Counter()
    parts = plan.parts
    instances = [one for part, one in zip(parts, listings, strict=True) if not part.is_class]
    for one in instances:
        captions.update(one.account.captions)
    left_out = tuple(LeftOut(part.name + file.name, file.why) for part, one in zip(parts, listings, strict=True)
                     for file in one.account.left_out)
    images = [row for row in rows if not (row.is_class or row.repeat)]
    in_all = sum(len(one.listed) for one in instances)
    areas = [row.mask.area for row in images if row.mask]
    return Account(len(images), dict(captions), (*left_out, *plan.left_out, *skipped), in_all - len(skipped),
                   masks=len(areas), mask_area=fmean(areas) if areas else 0.0)


def _source_problem(data: ImageOptions) -> Problem | None:
    """That there is no source, or two where none goes first: with captions --dataset_name does."""
    flags = f"--{data.folder_flag}, --dataset_name"
    if not data.source:
        return Problem("no data source", flags, "there is nothing to train on", f"--{data.folder_flag} {IMAGES}")
    if data.folder and data.dataset_name and not (data.captioned or data.dataset_config):
        return Problem("two data sources", flags, "a run trains on one of them", "drop one of the two flags")
    return None


def _sample(listed: list[int], most: int | None, seed: int) -> list[int]:
    """`most` of the images, drawn by the seed, in the order they had."""
    if most is None or most >= len(listed):
        return listed
    return [listed[i] for i in sorted(permutation(len(listed), "max_train_samples", seed)[:most].tolist())]


def _caption_problems(rows: Sequence[Row], part: Part, ending: str | None) -> Iterator[Problem]:
    """That no image has a caption; where only some lack one, they are told."""
    missing = [row.id for row in rows if not row.caption]
    if not missing:
        return
    if len(missing) < len(rows):
        log.warning("%d of %d images have no caption and are trained on with an empty one: %s", len(missing),
                    len(rows), listing(missing))
        return
    fix = "--caption_column COLUMN" if part.data.dataset_name else \
        "class_tokens = 'sks dog' for this source, or a .txt file beside each image" if part.where else \
        f"--caption_extension .txt, or what the files end with: only {ending} files were read" if ending else \
        f"write {METADATA[0]} with file_name and text in every line, or a .txt file beside each image"
    yield Problem("no image has a caption", part.place, listing(missing), fix, kind="data")


def _warn_wordless(rows: Sequence[Row]) -> None:
    """Tell which captions of tables, shards and metadata have no word; caption files are told with their names."""
    odd = [row.id for row in rows if not isinstance(row.source, Path)
           and any(text and not any(map(str.isalpha, text)) for text in row.all_captions)]
    if odd:
        log.warning("%s no word, only numbers and signs: %s", counted(len(odd), "caption has", "captions have"),
                    listing(odd))


def warn_enlarged(rows: Sequence[Row], resolution: int | str, warn: Warn = log.warning) -> None:
    """Tell which images are far smaller than what they are trained at, and the resolution that fits if most are."""
    factors = {row.id: enlargement(row.size, row.cut or size_of(resolution)) for row in rows}
    small = sorted((name for name in factors if factors[name] >= ENLARGED), key=lambda name: -factors[name])
    fits = fitting_resolution([*factors.values()], resolution)
    advice = f". {fits}" if fits else ""
    if small:
        warn("%s far smaller than --resolution %s; enlarging teaches blur%s: %s",
             counted(len(small), "image is", "images are"), resolution, advice,
             _first([f"{name} {factors[name]:.3g} times" for name in small]))
    elif fits:
        warn("most images are smaller than --resolution %s; enlarging teaches blur%s", resolution, advice)


def _warn_cropped(rows: Sequence[Row], data: ImageOptions, warn: Warn) -> None:
    """Tell which images have another shape than what is cut out of them, of which the network sees only a part."""
    lost = {row.id: cut_away(row.size, row.cut or size_of(data.resolution)) for row in rows}
    odd = sorted((name for name in lost if lost[name] > CROPPED), key=lambda name: -lost[name])
    if odd:
        named = _first([f"{name} {100 * lost[name]:.0f} %" for name in odd])
        them = "it" if len(odd) == 1 else "them"
        keeps = buckets.keeps_more((row.cut for row in rows if row.id in odd), data)
        advice = (f"{keeps}; to choose what stays, crop {them} yourself" if keeps else f"Crop {them} yourself")
        warn("%s more than %.0f %% of the area in each %scrop: %s. %s",
             counted(len(odd), "image loses", "images lose"), 100 * CROPPED,
             "" if data.enable_bucket else "square ", named, advice)


def _warn_twins(rows: Sequence[Row], warn: Warn) -> None:
    """Tell which files hold the very same image; one file in two sources is meant, such as at two sizes."""
    by_content: dict[str, dict[object, Row]] = defaultdict(dict)
    for row in rows:
        by_content[row.digest].setdefault(row.source if isinstance(row.source, Path) else row.id, row)
    twins = [[*same.values()] for same in by_content.values() if len(same) > 1]
    if twins:
        warn("%s there more than once, and seen so much more often: %s",
             counted(len(twins), "image is", "images are"),
             _first([" = ".join(row.id for row in same)
                     + (" (with different captions)" if len({row.all_captions for row in same}) > 1 else "")
                     for same in twins]))


def _warn_looks(judged: Sequence[Judged], warn: Warn) -> None:
    """Tell which images look blurred, and which look alike without being the same file."""
    looks = [*{one.verdict.digest: (one.listed.id, one.look) for one in judged if one.look}.values()]
    blurred = [name for name, look in looks if look.is_blurred]
    if blurred:
        warn("%s blurred, and teaches blur: %s" if len(blurred) == 1 else "%s blurred, and teach blur: %s",
             counted(len(blurred), "image looks", "images look"), _first(blurred))
    alike = [[looks[i][0] for i in cluster] for cluster in look_alikes([look for _, look in looks])]
    if alike:
        groups = [" = ".join([*names[:NAMED], *([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])])
                  for names in alike]
        warn("%s learned by heart: %s",
             counted(len(alike), "group of images looks alike, and is", "groups of images look alike, and are"),
             _first(groups))


def _first(names: Sequence[str]) -> str:
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


# ------------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True, slots=True)
class Judged:
    """A listed image and what reading it said."""

    listed: Listed
    verdict: Verdict
    look: Look | None = None  # of class images and very large data sets, none is taken

    @property
    def refused(self) -> str:
        return self.verdict.refused

    @property
    def row(self) -> Row:
        found, verdict = self.listed, self.verdict
        return Row(found.id, found.source, found.caption, verdict.size, verdict.digest, others=found.others)


def check(listed: Sequence[Listed], where: str) -> tuple[list[Row], list[Problem]]:
    """A row for every image that can be used, its captions in lines; all that cannot become one problem."""
    judged = _judged(listed)
    bad = [found for found in judged if found.refused]
    rows = [found.row for found in judged if not found.refused]
    return rows, [_unreadable(bad, len(listed), where)] if bad else []


def _judged_parts(parts: Sequence[Part], chosen: Sequence[tuple[int, Listed]], warn: Remarks) -> list[list[Judged]]:
    """For each part, every image with what reading it said; what is remarkable is told.

    chosen  the place of its part and the image
    """
    by_part: list[list[Listed]] = [[] for _ in parts]
    for place, found in chosen:
        by_part[place].append(found)
    total = sum(len(listed) for part, listed in zip(parts, by_part, strict=True) if not part.is_class)
    looks = total <= MOST_LOOKED
    judged = [_judged(listed, part.data if looks and not part.is_class else None)
              for part, listed in zip(parts, by_part, strict=True)]
    _warn_looks([one for of_part in judged for one in of_part], warn)
    if looks and total > 1 and not hashes_available():
        log.info("%s", NO_HASHES)
    if not looks:
        log.info("blurred images and near-duplicates are not looked for among more than %s images: %s does that",
                 f"{MOST_LOOKED:,}", tool("check_dataset"))
    return judged


def _judged(listed: Sequence[Listed], looked_at: ImageOptions | None = None) -> list[Judged]:
    """Every image with what reading it said; what is remarkable is told.

    looked_at  also take a look of each, at the sizes that these options ask for
    """
    names, sources = [found.id for found in listed], [found.source for found in listed]
    found: Sequence[tuple[Verdict, Look | None]]
    if looked_at is None:
        found = [(verdict, None) for verdict in _together(judge, names, sources)]
    else:
        found = _together(partial(judge_with_looks, options=looked_at), names, sources)
    judged = [Judged(one, verdict, look) for one, (verdict, look) in zip(listed, found, strict=True)]
    _warn_notes([(one.listed, one.verdict) for one in judged])
    return judged


def _together(judge: Callable[[Sequence[Source]], list[Judgement]], names: Sequence[str], sources: Sequence[Source]
              ) -> list[Judgement]:
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


def _unreadable(bad: Sequence[Judged], total: int, where: str) -> Problem:
    """Images that another program reads are never to be moved away: their fix says how they can be read."""
    paths = [(one.listed.source, one.verdict.fix) for one in bad]
    broken = [shell_word(source) for source, fix in paths if isinstance(source, Path) and not fix]
    fixes = dict.fromkeys(fix for _, fix in paths if fix)
    if broken:
        fixes[f'for f in {" ".join(broken[:SHOWN])}; do mv -- "$f" "$f.unreadable"; done'] = None
    return Problem(f"{len(bad)} of {total} images cannot be read", where,
                   listing(f"{one.listed.id}: {one_line(one.refused)}" for one in bad),
                   "; ".join(fixes) or "leave these rows out of the data set", kind="data")
