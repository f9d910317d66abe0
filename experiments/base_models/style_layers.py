"""Which layer of the CLIP tells drawing styles apart and ignores nouns: the table behind trainkit's STYLE_LAYER."""

from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from experiments.base_models.data import (
    CONCEPT,
    STYLES,
    StyleSource,
    fetch_packages,
    load_icons,
    on_white,
    read_emoji_table,
    read_nouns,
)
from trainkit.evaluation import features, kid

LAYERS = (
    "vision_model.embeddings",
    "vision_model.pre_layrnorm",
    *(f"vision_model.encoder.layers.{index}{part}" for index in range(4) for part in ("", ".layer_norm1", ".mlp.fc1")),
    "vision_model.post_layernorm",
    "visual_projection",
)
HALVINGS = 8


def images_by_style(work_dir: Path) -> dict[str, list[Image.Image]]:
    """The same nouns in the same order, in every base style and in the style nobody trained on."""
    icons, pixels = load_icons(work_dir)
    nouns = read_nouns()
    place = {(icon.style, icon.key): index for index, icon in enumerate(icons) if icon.noun}
    found = {style: [Image.fromarray(pixels[place[style, key]]) for key in nouns] for style in STYLES}
    tarballs = fetch_packages(work_dir)
    source = StyleSource(CONCEPT, tarballs[CONCEPT])
    entries = {entry["short_name"]: entry for entry in read_emoji_table(tarballs)}
    return found | {CONCEPT: [on_white(source.draw(entries[key])) for key in nouns]}


def halves_apart(rows: Tensor, seed: int) -> float:
    """KID between two random halves of one style, whose nouns differ."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return kid(rows[order[: len(order) // 2]], rows[order[len(order) // 2 :]])


def measure_layer(model, layer: str, sets: dict[str, list[Image.Image]]) -> dict[str, float]:
    """KID between halves of one style (root mean square) and, in units of that, between every two styles."""
    rows = {style: features(images, model, layer) for style, images in sets.items()}
    halves = torch.tensor([halves_apart(rows[style], seed) for style in rows for seed in range(HALVINGS)])
    noise = halves.square().mean().sqrt().item()
    pairs = {f"{one}, {other}": kid(rows[one], rows[other]) / noise for one, other in combinations(rows, 2)}
    return {"halves": noise} | pairs


def measure_layers(model, work_dir: Path) -> dict[str, dict[str, float]]:
    sets = images_by_style(work_dir)
    return {layer: measure_layer(model, layer, sets) for layer in LAYERS}
