"""The image folders under assets/: 22 icons to learn, their style reference and class images, with captions."""

import json
import logging
from pathlib import Path

from PIL import Image

from experiments.base_models.captions import TEMPLATES, TRAINING_PROMPT, caption
from experiments.base_models.data import (
    CONCEPT,
    StyleSource,
    fetch_packages,
    on_white,
    read_emoji_table,
    read_nouns,
    stable_fraction,
)

LOG = logging.getLogger("base_models")
TRAIN_NOUNS = (
    "fox", "owl", "octopus", "butterfly", "mushroom", "cactus", "strawberry", "pizza", "cupcake", "teapot", "rocket",
    "airplane", "house", "car", "umbrella", "guitar", "camera", "crown", "backpack", "key", "robot", "gift",
)  # fmt: skip
TRAIN_SIDES = (128, 96, 144, 112, 160)  # different sizes, so that size conditioning has something to say
REFERENCE_COUNT, CLASS_COUNT = 120, 48


def shuffled_nouns(salt: str) -> list[str]:
    """The nouns that are not among the 22, in an order that depends on `salt` alone."""
    others = [noun for noun in read_nouns().values() if noun not in TRAIN_NOUNS]
    return sorted(others, key=lambda noun: stable_fraction(f"{salt} {noun}"))


def save_folder(
    folder: Path,
    source: StyleSource,
    rows: list[tuple[str, int, str]],
    entries: dict[str, dict],
    with_noun: bool = True,
) -> None:
    """PNG files and metadata.jsonl; `rows` are (noun, side, caption), `entries` maps noun to its emoji.json entry."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for noun, side, text in rows:
        name = f"{noun.replace(' ', '-')}.png"
        image: Image.Image = on_white(source.draw(entries[noun]), side)
        image.save(folder / name, optimize=True)
        records.append({"file_name": name, **({"noun": noun} if with_noun else {}), "text": text})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    LOG.info("%s: %d images", folder, len(rows))


def write_icon_folders(work_dir: Path, assets_dir: Path) -> None:
    """icons-3d (22), icons-3d-reference (120, other nouns) and icons-class (48 Noto icons)."""
    tarballs, nouns = fetch_packages(work_dir), read_nouns()
    entries = {
        nouns[entry["short_name"]]: entry for entry in read_emoji_table(tarballs) if entry["short_name"] in nouns
    }
    concept = StyleSource(CONCEPT, tarballs[CONCEPT])
    train = [
        (noun, TRAIN_SIDES[index % len(TRAIN_SIDES)], caption(TRAINING_PROMPT, noun))
        for index, noun in enumerate(TRAIN_NOUNS)
    ]
    reference = [(noun, 64, caption(TRAINING_PROMPT, noun)) for noun in shuffled_nouns("reference")[:REFERENCE_COUNT]]
    classes = [(noun, 64, caption(TEMPLATES[0], noun, "noto")) for noun in shuffled_nouns("class")[:CLASS_COUNT]]
    save_folder(assets_dir / "icons-3d", concept, train, entries, with_noun=False)
    save_folder(assets_dir / "icons-3d-reference", concept, sorted(reference), entries)
    save_folder(assets_dir / "icons-class", StyleSource("noto", tarballs["noto"]), sorted(classes), entries)
