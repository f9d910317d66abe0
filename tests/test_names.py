"""Names are the field's own, each type name means one thing, and every flag that was there is still read."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import train_dreambooth_lora_sdxl_advanced as dreambooth
import train_text_to_image_lora as text_to_image
from tests.support import ROOT
from trainkit.options import parse

SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in ("trainkit", "experiments", "scripts")
                                        for path in ROOT.glob(f"{folder}/**/*.py"))])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

# Words that names were made of before, and what names say now. A word is a part of a name: split at "_" and capitals.
RETIRED = {
    "share": "loss_weight, fraction or a rank's slice", "shares": "loss_weights, fractions or slices",
    "worth": "x0 loss weight", "told": "a noun for what is given", "tell": "a verb for what is done",
    "settle": "prepare_for_training, freeze_tokens or place_state", "settled": "frozen or placed",
    "shelf": "checkpoint folders", "ferry": "offload stream", "ferried": "offloaded", "lend": "states_on_device",
    "lent": "stored states", "desk": "bucket layout", "misfit": "incompatible_…", "misfits": "incompatible_…",
    "lacks": "missing_…", "lacking": "missing_…", "unfit": "invalid or inapplicable",
    "stray": "unknown or unassigned", "strays": "unknown or unassigned", "room": "free …, module or package",
    "rooms": "free …, modules or packages", "mend": "fix", "mends": "fixes", "mended": "fixed", "law": "distribution",
    "laws": "distributions", "job": "run", "jobs": "runs", "picture": "image", "pictures": "images",
}
RETIRED_ALONE = dict.fromkeys(("asked", "made", "own", "seen"), "a noun for the thing")  # as a whole name only
ALLOWED = {  # names that keep a retired word, and why
    "fourier_target_share": "the flag, the config key and the option that both are read into",
    "picture": "an argument of DistributionMatchingLoss, which is public",
    "asked": "a key of result.json, which runs of experiments/frequency have on disk",
}


def words_of(name: str) -> list[str]:
    """SDXL_tokenPairs2 -> sdxl, token, pairs, 2"""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a module names or uses by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(name=path, asname=name):
                yield from ((node.lineno, part) for part in [*path.split("."), *([name] if name else [])])


def headings(page: Path) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("#") and not fenced:
            yield number, line.lstrip("# ")


def retired(name: str) -> str:
    """What to write instead of a name, "" where it may stay."""
    if name in ALLOWED:
        return ""
    return next(filter(None, (RETIRED.get(word) for word in words_of(name))), "") or RETIRED_ALONE.get(name, "")


def test_a_name_is_split_at_underscores_and_capitals():
    assert words_of("_SDXL_tokenPairs2") == ["sdxl", "token", "pairs", "2"]
    assert words_of("CheckpointShelf") == ["checkpoint", "shelf"] and words_of("TIME_LAWS") == ["time", "laws"]


@pytest.mark.parametrize("name", ["rank_share", "Shelf", "_settle", "TIME_LAWS", "told", "own"])
def test_a_retired_word_is_found_in_a_name(name):
    assert retired(name)


@pytest.mark.parametrize("name", ["shared", "lawful", "made_by", "own_parameters", *ALLOWED])
def test_other_words_and_exceptions_are_left_alone(name):
    assert not retired(name)


def test_no_name_in_the_code_is_made_of_a_retired_word():
    found = [f"{path.relative_to(ROOT)}:{line}: {name} (say {instead})" for path in SOURCES
             for line, name in names_in(path) if (instead := retired(name))]
    assert not found, "a reader would meet a word that the glossary has replaced\n" + "\n".join(found)


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything a file names, and of the folders and the file itself."""
    yield from identifiers(ast.parse(path.read_text("utf-8")))
    yield from ((0, part) for part in path.relative_to(ROOT).parts)


def test_every_exception_is_still_needed():
    used = {name for path in SOURCES for _, name in identifiers(ast.parse(path.read_text("utf-8")))}
    assert used >= ALLOWED.keys()


def test_no_heading_has_a_retired_word():
    found = [f"{page.relative_to(ROOT)}:{line}: {heading!r} (say {RETIRED[word]})" for page in PAGES
             for line, heading in headings(page) for word in re.findall(r"[a-z]+", heading.lower()) if word in RETIRED]
    assert not found, "a reader would meet a word that the glossary has replaced\n" + "\n".join(found)


def type_names(tree: ast.Module) -> Iterator[str]:
    """Classes, wherever they stand, and the module's aliases and type variables, which are written like classes."""
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign) else []
        yield from (target.id for target in targets
                    if isinstance(target, ast.Name) and target.id[0].isupper() and not target.id.isupper())


def test_no_type_name_of_the_package_stands_for_two_things():
    places = defaultdict(list)
    for path in ROOT.glob("trainkit/**/*.py"):
        for name in type_names(ast.parse(path.read_text("utf-8"))):
            places[name].append(str(path.relative_to(ROOT)))
    doubles = {name: found for name, found in places.items() if len(found) > 1}
    assert not doubles, doubles


# Flags of docs/flags.md as it was when the names changed: flag, trainers that have it, a value as typed
KNOWN = [line.split("\t") for line in (ROOT / "tests/known_flags.tsv").read_text("utf-8").splitlines()]
TRAINERS = {
    "train_dreambooth_lora_sdxl_advanced": (dreambooth.Options, ["--instance_prompt=a photo of TOK"]),
    "train_text_to_image_lora": (text_to_image.Options, []),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_flag_that_was_documented_is_still_read(trainer, tmp_path):
    options, required = TRAINERS[trainer]
    (tmp_path / "empty.toml").write_text("")
    flags = [(flag, value.format(config=tmp_path / "empty.toml")) for flag, trainers, value in KNOWN
             if trainer in trainers.split()]
    assert len(flags) > 150
    for flag, value in flags:  # one by one: together they contradict each other
        argv = ["--pretrained_model_name_or_path=base", *required, f"--{flag}={value}"]
        assert parse(options, argv, description="").origins[flag] == "command line", flag
