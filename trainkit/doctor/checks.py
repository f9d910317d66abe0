"""What a data set is checked for: one table, each row with what it finds, what that does to training and how to fix it.

A fix is a command for the shell. Nothing is deleted by it: images that should not be trained on are moved into a folder
beside the data folder.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainkit.commands import tool
from trainkit.conditioning.caption_length import cut_off
from trainkit.data import looks
from trainkit.data.geometry import cut_away, enlargement
from trainkit.data.masks import refusal
from trainkit.data.rows import CROPPED, ENLARGED
from trainkit.data.sources.text import one_line
from trainkit.doctor.look import DataImage, DataSet
from trainkit.errors import SHOWN, printable, shell_word
from trainkit.families.vocabulary import END, clip_tokenizer
from trainkit.options.numbered import NUMBERED

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CONTEXT = 77  # tokens of CLIP, start and end included
UNBALANCED = 2.0  # times as many visits as the folder with the fewest
MIXED = 0.1  # of the captions are written in the other way, at least
PLACEHOLDERS = ("TOK", "sks", "ohwx", "zwx")  # words without a meaning that guides use as triggers


@dataclass(frozen=True)
class Finding:
    """One thing that was found: about one image, about several that belong together, or about the data set."""

    images: tuple[DataImage, ...]
    detail: str
    fix: str


Finder = Callable[[DataSet], Iterator[Finding]]
Fixer = Callable[[Sequence[DataImage]], str]


@dataclass(frozen=True)
class Check:
    """A row of the table.

    fix_all  the command for several images at once; None: each finding has its own
    """

    name: str
    severity: Severity
    what: str
    consequence: str
    find: Finder
    fix_all: Fixer | None = None


@dataclass(frozen=True)
class Result:
    """What one check found."""

    check: Check
    findings: list[Finding]

    @property
    def images(self) -> list[DataImage]:
        return list({image.path: image for finding in self.findings for image in finding.images}.values())

    @property
    def fix(self) -> str:
        """One command for the first SHOWN findings, or for all where they share one."""
        some = self.findings[:SHOWN]
        if self.check.fix_all is None:
            return "; ".join(dict.fromkeys(filter(None, (finding.fix for finding in some))))
        return self.check.fix_all([image for finding in some for image in finding.images])

    @property
    def fixes_some(self) -> bool:
        """Whether `fix` is for the first findings alone."""
        fix = self.fix
        return any(finding.fix not in fix for finding in self.findings[SHOWN:])


def examine(data: DataSet) -> list[Result]:
    """What the checks of the table found, the worst first; those that found nothing are left out."""
    results = [Result(check, list(check.find(data))) for check in CHECKS]
    found = [result for result in results if result.findings]
    return sorted(found, key=lambda result: SEVERITIES.index(result.check.severity))


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def set_aside(images: Sequence[DataImage]) -> str:
    """Move images and their caption files into a folder beside the data folder; their lines of metadata are deleted.

    "" for an image that is no file: a row of a table, or a member of a shard.
    """
    images = [image for image in images if image.is_file]
    by_folder: dict[tuple[Path, Path], list[DataImage]] = defaultdict(list)
    for image in images:
        by_folder[image.folder, image.path.parent].append(image)
    commands = []
    for (folder, parent), members in by_folder.items():
        target = folder.with_name(f"{folder.absolute().name}-left-out") / parent.relative_to(folder)
        files = [path for image in members for path in (image.path, *image.sidecars, *_mask_beside(image))]
        commands += [f"mkdir -p -- {shell_word(target)}",
                     f"mv -n -- {' '.join(map(shell_word, files))} {shell_word(target)}/"]
    return " && ".join([*commands, *_without_lines(images)])


def _mask_beside(image: DataImage) -> list[Path]:
    beside = image.mask and image.mask != image.path and image.mask.parent == image.path.parent
    return [image.mask] if image.mask and beside else []


def _without_lines(images: Sequence[DataImage]) -> Iterator[str]:
    """For each metadata file of the images, the command that deletes their lines; .bak is the old file."""
    patterns: dict[Path, list[str]] = defaultdict(list)
    rows: dict[Path, list[str]] = defaultdict(list)
    for image in images:
        if image.metadata is not None and image.metadata.suffix == ".parquet":
            rows[image.metadata].append(image.path.relative_to(image.metadata.parent).as_posix())
        elif image.metadata is not None:
            patterns[image.metadata] += _line_patterns(image.metadata, image.path)
    for file, names in rows.items():
        yield _without_rows(file, list(dict.fromkeys(names)))
    for file, some in patterns.items():
        yield " ".join(["sed -E -i.bak", *(f"-e {shell_word(f'/{one}/d')}" for one in dict.fromkeys(some)),
                        shell_word(file)])


def _without_rows(file: Path, names: Sequence[str]) -> str:
    """The command that writes a Parquet file without the rows of these images; .bak is the old file."""
    program = (f"import os, pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq; f = {str(file)!r}; "
               f"t = pq.read_table(f); c = next(n for n in t.column_names if n.endswith('file_name')); "
               f"t = t.filter(pc.invert(pc.is_in(t[c], pa.array({list(names)!r})))); "
               "os.replace(f, f + '.bak'); pq.write_table(t, f)")
    return f"python3 -c {shell_word(program)}"


def _line_patterns(metadata: Path, image: Path) -> list[str]:
    """What only the line of an image has."""
    name = image.relative_to(metadata.parent).as_posix()
    if metadata.suffix == ".jsonl":  # JSON may spell letters beyond ASCII as \\u00e9
        return [for_sed(json.dumps(name, ensure_ascii=ascii_only)) for ascii_only in (False, True)]
    return [f'(^|[,;\t])"?{for_sed(name)}"?([,;\t]|$)']


def for_sed(text: str) -> str:
    """A text as an extended regular expression between slashes."""
    return re.sub(r"([/.*+?()|{}\[\]^$\\])", r"\\\1", text)


def text_files(images: Iterable[DataImage]) -> list[Path]:
    """The files that hold these captions as text, each once."""
    files = dict.fromkeys(image.caption_file for image in images)
    return [file for file in files if file and file.suffix != ".parquet"]


def edit(images: Iterable[DataImage]) -> str:
    """Open the files that hold these captions in the user's editor."""
    files = text_files(images)
    return f'"${{EDITOR:-nano}}" {" ".join(map(shell_word, files))}' if files else ""


def caption(images: Iterable[DataImage]) -> str:
    folders = dict.fromkeys(image.folder for image in images)
    return "; ".join(f"{tool('caption_images')} {shell_word(folder)} --model florence-community/Florence-2-base"
                     for folder in folders)


def keep_first(images: Sequence[DataImage]) -> str:
    """Set aside all but the first image of each group of equal ones."""
    digests: set[str] = set()
    again = []
    for image in images:
        again += [image] if image.verdict.digest in digests else []
        digests.add(image.verdict.digest)
    return set_aside(again)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def at_the_start(data: DataSet) -> Iterator[Finding]:
    for problem in data.problems:
        yield Finding((), f"{problem.what} ({problem.where}): {problem.why}", problem.fix)


def unreadable(data: DataSet) -> Iterator[Finding]:
    for image in data.images:
        if image.verdict.refused:
            yield Finding((image,), one_line(image.verdict.refused), image.verdict.fix or set_aside([image]))


def left_out(data: DataSet) -> Iterator[Finding]:
    for file in data.left_out:
        yield Finding((), f"{file.name}: {file.why}", "")


def equal_images(data: DataSet) -> list[list[DataImage]]:
    """Groups of files with the very same content; first in each group is one with a caption."""
    by_content: dict[str, list[DataImage]] = defaultdict(list)
    for image in data.sound:
        by_content[image.verdict.digest].append(image)
    return [sorted(same, key=lambda image: not image.captions) for same in by_content.values() if len(same) > 1]


def different_captions(images: Iterable[DataImage]) -> set[tuple[str, ...]]:
    return {image.captions for image in images if image.captions}


def duplicates(data: DataSet) -> Iterator[Finding]:
    for same in equal_images(data):
        if len(different_captions(same)) < 2:
            yield Finding(tuple(same), f"the same file {len(same)} times: {names(same)}", set_aside(same[1:]))


def contradictory(data: DataSet) -> Iterator[Finding]:
    for same in equal_images(data):
        if len(different_captions(same)) > 1:
            said = "; ".join(f"{image.name}: {short(image.captions)}" for image in same)
            yield Finding(tuple(same), f"the same image with different captions: {said}", set_aside(same[1:]))


def near_duplicates(data: DataSet) -> Iterator[Finding]:
    for group in look_alikes(data):
        best = max(group, key=lambda image: image.verdict.size[0] * image.verdict.size[1])
        others = [image for image in group if image is not best]
        yield Finding((best, *others), f"they look alike: {names([best, *others])}", set_aside(others))


def look_alikes(data: DataSet) -> list[list[DataImage]]:
    """Clusters of images that look alike, each file content once."""
    images = list({image.verdict.digest: image for image in data.sound}.values())
    clusters = looks.look_alikes([image.look for image in images if image.look])
    return [[images[i] for i in cluster] for cluster in clusters]


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and pixels


def too_small_for_a_bucket(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        if not image.samples:
            h, w = image.verdict.size
            yield Finding((image,), f"{w}x{h} is smaller than the smallest bucket", set_aside([image]))


def too_small(data: DataSet) -> Iterator[Finding]:
    """That most images are smaller than --resolution, with one that fits."""
    factors = [max(enlargement(image.verdict.size, sample.shape) for sample in image.samples)
               for image in data.sound if image.samples]
    advice = looks.fitting_resolution(factors, data.options.resolution)
    if advice and not data.options.resolutions:
        flag = advice.partition(" ")[0]
        folders = " ".join(map(shell_word, data.folders))
        yield Finding((), advice, f"{tool('check_dataset')} {folders} {flag}" if flag.startswith("--") else "")


def tiny(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        factor = max((enlargement(image.verdict.size, sample.shape) for sample in image.samples), default=0)
        if factor >= ENLARGED:
            h, w = image.verdict.size
            yield Finding((image,), f"{w}x{h} is enlarged {factor:.3g} times", set_aside([image]))


def odd(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        lost = max((cut_away(image.verdict.size, sample.shape) for sample in image.samples), default=0)
        if lost > CROPPED:
            h, w = image.verdict.size
            yield Finding((image,), f"{w}x{h} loses {100 * lost:.0f} % of its area", fix_of_odd(data, image))


def fix_of_odd(data: DataSet, image: DataImage) -> str:
    """Buckets where they are off: the command shows what they leave. Where they do not help, the image is set aside."""
    if data.options.enable_bucket:
        return set_aside([image])
    folders = " ".join(map(shell_word, data.folders))
    return (f"{tool('check_dataset')} {folders} --resolution {data.options.resolution} "
            "--enable_bucket")


def blurred(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        if image.look and image.look.is_blurred:
            detail = f"sharpness {image.look.sharpness:.1f}, below {looks.BLURRED:.0f}"
            yield Finding((image,), detail, set_aside([image]))


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def bad_masks(data: DataSet) -> Iterator[Finding]:
    """Where masks are asked for, those that a run refuses."""
    return unusable_masks(data) if data.options.masked else iter(())


def unusable_masks(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        why = refusal(image.mask_verdict, image.verdict.size) if image.mask_verdict else ""
        if why:
            yield Finding((image,), why, set_aside([image]))


def idle_masks(data: DataSet) -> Iterator[Finding]:
    """Masks that do not do what masks are for; where none are asked for, those too that a run would refuse."""
    if not data.options.masked:
        yield from unusable_masks(data)
    for image in data.sound:
        if image.mask_verdict and not image.mask_verdict.refused and (words := image.mask_verdict.remark):
            yield Finding((image,), f"its mask is {words}", "")


def orphan_masks(data: DataSet) -> Iterator[Finding]:
    for mask in data.spare_masks:
        yield Finding((), f"{mask.name}: {mask.why}", "")


def without_mask(data: DataSet) -> Iterator[Finding]:
    """Images without a mask among others that have one."""
    if any(image.mask_verdict for image in data.sound):
        for image in data.sound:
            if not image.mask_verdict:
                yield Finding((image,), "it has no mask", "")


# ----------------------------------------------------------------------------------------------------------------------
# Captions


def untagged(data: DataSet) -> Iterator[Finding]:
    for image in data.sound:
        if not image.captions:
            yield Finding((image,), "it has no caption", caption([image]))


def over_long(data: DataSet) -> Iterator[Finding]:
    pairs = [(image, text) for image in data.sound for text in image.captions]
    tokenizer = clip_tokenizer(pad_token=END, model_max_length=CONTEXT)
    lost = cut_off([text for _, text in pairs], [tokenizer], data.captions.max_chunks)
    for (image, _), words in zip(pairs, lost, strict=True):
        if words:
            yield Finding((image,), f"not learned: {short([words], 120)}", edit([image]))


def other_trigger(data: DataSet) -> Iterator[Finding]:
    """Captions with another trigger than those of --trigger, or than most captions have where it is not given."""
    used = {image.path: words_in(image, PLACEHOLDERS) for image in data.sound}
    common = Counter(word for words in used.values() for word in words).most_common(1)
    triggers = data.triggers or tuple(word for word, _ in common)
    for image in data.sound:
        others = sorted(used[image.path] - {*triggers})
        if triggers and others:
            yield Finding((image,), f"it says {others[0]}, not {triggers[0]}: {short(image.captions)}",
                          replaced([image], others[0], triggers[0]))
        elif data.triggers and image.captions and not words_in(image, data.triggers):
            yield Finding((image,), f"it does not say {triggers[0]}: {short(image.captions)}", edit([image]))


def words_in(image: DataImage, words: Iterable[str]) -> set[str]:
    text = " ".join(image.captions)
    return {word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)}


def replaced(images: Iterable[DataImage], old: str, new: str) -> str:
    files = text_files(images)
    written = re.sub(r"([$@/\\])", r"\\\1", new)
    command = rf"s/(?<!\w)\Q{old}\E(?!\w)/{written}/g"
    return f"perl -pi -e {shell_word(command)} {' '.join(map(shell_word, files))}" if files else ""


def mixed_styles(data: DataSet) -> Iterator[Finding]:
    """Captions of the kind that fewer images have, where some are lists of tags and some are sentences."""
    kinds: dict[str, list[DataImage]] = defaultdict(list)
    for image in data.sound:
        kinds[style(image.captions[0]) if image.captions else ""].append(image)
    tags, sentences = kinds["tags"], kinds["sentence"]
    few, kind = (tags, "tags") if len(tags) < len(sentences) else (sentences, "a sentence")
    if few and len(few) >= MIXED * (len(tags) + len(sentences)):
        for image in few:
            others = max(len(tags), len(sentences))
            yield Finding((image,), f"it is {kind}, and {others} captions are not: {short(image.captions)}",
                          edit([image]))


def style(text: str) -> str:
    """Whether a caption is a list of tags or a sentence; "" for one that is too short to say."""
    parts = [part.split() for part in text.split(",") if part.strip()]
    words = sum(map(len, parts))
    if words < 4:
        return ""
    if len(parts) >= 4 and words <= 2.5 * len(parts):
        return "tags"
    return "sentence" if words >= 3.5 * len(parts) else ""


# ----------------------------------------------------------------------------------------------------------------------
# Balance


def unbalanced(data: DataSet) -> Iterator[Finding]:
    """Kohya folders whose images are used much more often, all together, than those of another folder."""
    by_folder: dict[Path, list[DataImage]] = defaultdict(list)
    for image in data.sound:
        home = image.folder / image.top
        if NUMBERED.fullmatch(home.absolute().name):
            by_folder[home].append(image)
    visits = {home: sum(image.visits for image in images) for home, images in by_folder.items()}
    least = min(visits.values(), default=0)
    for home, count in visits.items():
        if least and count >= UNBALANCED * least:
            repeats, name = NUMBERED.fullmatch(home.absolute().name).groups()  # type: ignore[union-attr]
            better = max(1, round(int(repeats) * least / count))
            target = home.with_name(f"{better}_{name}")
            yield Finding(
                (), f"{printable(home.name)}: {len(by_folder[home])} images × {repeats} = {count} of "
                f"{data.visits} visits, {100 * count / data.visits:.0f} %; another folder has {least}",
                f"mv -n -- {shell_word(home)} {shell_word(target)}" if better != int(repeats) else "")


# ----------------------------------------------------------------------------------------------------------------------
# Words


def names(images: Sequence[DataImage]) -> str:
    more = [f"and {len(images) - SHOWN} more"] if len(images) > SHOWN else []
    return ", ".join([*(image.name for image in images[:SHOWN]), *more])


def short(captions: Sequence[str], most: int = 60) -> str:
    text = printable(captions[0]) if captions else ""
    return f"“{text if len(text) <= most else text[: most - 1] + '…'}”" if text else "no caption"


CHECKS = (
    Check("start", "error", "stops every run", "A run does not start before this is fixed.", at_the_start),
    Check("unreadable", "error", "cannot be read",
          "A run does not start. With --bad_images skip it starts without these images.", unreadable),
    Check("no bucket", "error", "too small for --bucket_no_upscale", "A run does not start.", too_small_for_a_bucket,
          set_aside),
    Check("bad mask", "error", "masks that cannot be used",
          "A run does not start. With --bad_images skip it starts without these images.", bad_masks, set_aside),
    Check("mask", "warning", "masks that do not do what masks are for",
          "With --masked_loss, all of the image is trained on, or nothing of it, or the run does not start.",
          idle_masks),
    Check("orphan mask", "warning", "masks that belong to no image",
          "They are not used. If the name of a mask is wrong, its image is trained on as a whole.", orphan_masks),
    Check("no mask", "note", "images without a mask, beside others with one", "They are trained on as a whole.",
          without_mask),
    Check("contradictory", "warning", "one image with different captions",
          "What one caption teaches about the image, the other one unteaches.", contradictory, keep_first),
    Check("duplicate", "warning", "the same file more than once",
          "The image is used so many times as often, and overfits before the others are learned.", duplicates,
          keep_first),
    Check("near-duplicate", "warning", "images that look alike",
          "Their common content is used more often than the rest, and is learned by heart.", near_duplicates),
    Check("untagged", "warning", "no caption",
          "It is trained on with an empty caption: what it shows appears without being asked for.", untagged, caption),
    Check("over-long", "warning", "more tokens than are read (75, or --max_token_length)",
          "The words behind the limit are not learned.", over_long, edit),
    Check("trigger", "warning", "another trigger, or none", "The trigger does not learn from this image.",
          other_trigger),
    Check("mixed style", "note", "tags and sentences",
          "A prompt in one style does not reach what was learned in the other.", mixed_styles, edit),
    Check("too small", "warning", "most images are smaller than --resolution",
          "The adapter learns the blur of enlarging. Train with the smaller --resolution, too.", too_small),
    Check("tiny", "warning", f"enlarged {ENLARGED:g} times or more", "The adapter learns the blur of enlarging.", tiny,
          set_aside),
    Check("odd", "warning", f"more than {100 * CROPPED:.0f} % of the area is cut off",
          "What is cut off is not learned, though the caption may name it.", odd),
    Check("blurred", "warning", "looks blurred", "The adapter learns the blur.", blurred, set_aside),
    Check("balance", "warning", "folders with very different weight",
          "The folder with more visits dominates; the other one is hardly learned.", unbalanced),
    Check("left out", "note", "files that are not read", "Nothing, if they are not meant for training.", left_out),
)
