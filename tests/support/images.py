"""Small images whose pixels say where they come from, and the options and rows that go with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trainkit.data.batch import Row
from trainkit.data.images import content_digest, decode
from trainkit.options import DataOptions

DATA = dict(instance_prompt="a photo of TOK", resolution=32)


def data_options(**changes: object) -> DataOptions:
    return DataOptions(**{**DATA, **{k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}})


def marked(number: int, h: int, w: int) -> Image.Image:
    """Red = `number`, green = column, blue = line: every pixel knows its image and its place."""
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([np.full((h, w), number), x, y], axis=-1).astype(np.uint8))


def marked_folder(folder: Path, n: int) -> Path:
    """`n` marked images of different shapes with sidecar captions 'image <number>'."""
    folder.mkdir()
    for i in range(n):
        h, w = (32, 33 + i) if i % 2 else (33 + i, 32)
        marked(i, h, w).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"image {i}\n")
    return folder


def row_of(path: Path, *, caption: str = "", repeat: int = 0) -> Row:
    data = path.read_bytes()
    w, h = decode(data).size
    return Row(path.name, path, caption, (h, w), content_digest(data), repeat)


def open_files() -> int:
    """Open file handles of this process, where Linux tells; else 0."""
    handles = Path("/proc/self/fd")
    return len(list(handles.iterdir())) if handles.exists() else 0


def noise_image(path: Path, seed: int) -> Path:
    """A small image of its own, taller than wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 40, 3), np.uint8)).save(path)
    return path
