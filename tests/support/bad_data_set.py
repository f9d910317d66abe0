"""A folder with ten planted problems, one of each kind, among sound images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SIDE = 128
PLANTED = {  # the check: the image that it is to name
    "unreadable": "broken.jpg", "contradictory": "twin_b.png", "duplicate": "copy.png", "near-duplicate": "resaved.jpg",
    "untagged": "bare.png", "over-long": "long.png", "trigger": "other.png", "tiny": "tiny.png", "odd": "wide.png",
    "blurred": "soft.png",
}


def scene(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Coloured blocks of many sizes with fine grain: sharp, and like no other seed's."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    grain = rng.normal(0, 14, (height, width, 3))
    large = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST), np.float32)
    return Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8))


def save(folder: Path, name: str, image: Image.Image, caption: str = "", **how: object) -> Path:
    path = folder / name
    image.save(path, **how)
    if caption:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def sound_folder(folder: Path, n: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        save(folder, f"good{i}.png", scene(i), f"a photo of TOK, number {i}, in the garden on a bright day")
    return folder


def bad_folder(folder: Path) -> Path:
    sound_folder(folder)
    (folder / "broken.jpg").write_bytes(save(folder, "broken.jpg", scene(20), "a photo of TOK").read_bytes()[:600])
    save(folder, "twin_a.png", scene(21), "a photo of TOK on a red chair in the kitchen of a house")
    shutil.copy(folder / "twin_a.png", folder / "twin_b.png")
    (folder / "twin_b.txt").write_text("a photo of TOK at the sea in the light of the evening sun")
    shutil.copy(folder / "good0.png", folder / "copy.png")
    shutil.copy(folder / "good0.txt", folder / "copy.txt")
    save(folder, "resaved.jpg", scene(1), "a photo of TOK, once more", quality=80)
    save(folder, "bare.png", scene(22))
    save(folder, "long.png", scene(23), "a photo of TOK " + ", ".join(f"with thing number {i}" for i in range(40)))
    save(folder, "other.png", scene(24), "a photo of sks in the garden on a bright and sunny day")
    save(folder, "tiny.png", scene(25, 48, 48), "a photo of TOK, small")
    save(folder, "wide.png", scene(26, 400, SIDE), "a photo of TOK, wide")
    soft = scene(27).filter(ImageFilter.GaussianBlur(6))
    save(folder, "soft.png", soft, "a photo of TOK, soft")
    return folder


def as_metadata(folder: Path) -> Path:
    """The captions of the folder's images in metadata.jsonl instead of files of their own."""
    lines = []
    for text in sorted(folder.glob("*.txt")):
        image = next(path for path in folder.glob(f"{text.stem}.*") if path != text)
        lines.append(json.dumps({"file_name": image.name, "text": text.read_text("utf-8")}))
        text.unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
