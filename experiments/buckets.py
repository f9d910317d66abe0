"""What squares and what aspect buckets leave of images of several shapes: the picture in docs/data.md.

    .venv/bin/python experiments/buckets.py [PICTURE]

Makes photographs of four common shapes out of the shipped icons, and cuts each of them as a run at --resolution 1024
with --center_crop does: without buckets, and with --enable_bucket. Then counts how many forward
passes a step has with images of random shapes: --train_batch_size 4 --gradient_accumulation_steps 4, which without
buckets are 4. Ten seconds.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {"3:2, a camera": (1500, 1000), "2:3, a portrait": (1000, 1500), "9:16, a phone": (1080, 1920),
          "5:2, a panorama": (2500, 1000)}  # width, height
COLOURS = ("#dbe7f3", "#f3e4d3", "#dcecd8", "#eadcf0")
SHOWN = 240  # pixels of the longest side in the picture
FLAGS = dict(instance_prompt="a photo", resolution=1024, enable_bucket=True)
STEPS, SIDES = 200, (600, 3000)


def photograph(size: tuple[int, int], first: int) -> Image.Image:
    """Icons from edge to edge, so that one sees what is cut off."""
    icons = sorted((ROOT / "assets" / "icons-3d").glob("*.png"))
    width, height = size
    side = min(size) // 2
    columns, lines = round(width / side), round(height / side)
    image = Image.new("RGB", size, COLOURS[first % len(COLOURS)])
    for i in range(columns * lines):
        icon = Image.open(icons[(7 * first + i) % len(icons)]).convert("RGB").resize((side * 4 // 5,) * 2)
        x, y = (i % columns + 0.5) * width / columns, (i // columns + 0.5) * height / lines
        image.paste(icon, (int(x - icon.width / 2), int(y - icon.height / 2)))
    return image


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What the network sees of it, (h, w) from the middle."""
    from trainkit.data.geometry import resized_size

    h, w = resized_size((image.height, image.width), size)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return image.resize((w, h)).crop((left, top, left + size[1], top + size[0]))


def small(image: Image.Image) -> Image.Image:
    """On a white square, so that all have one scale."""
    image = image.copy()
    image.thumbnail((SHOWN, SHOWN))
    page = Image.new("RGB", (SHOWN, SHOWN), "white")
    page.paste(image, ((SHOWN - image.width) // 2, (SHOWN - image.height) // 2))
    return page


def passes(images: int) -> str:
    """How many forward passes a step has, with images whose sides are random."""
    from trainkit.data.batch import Row
    from trainkit.data.buckets import with_sizes
    from trainkit.data.sampler import BucketOrder, Shard
    from trainkit.options import DataOptions

    draw = random.Random(0)
    sizes = [(draw.randint(*SIDES), draw.randint(*SIDES)) for _ in range(images)]
    rows = [*with_sizes([Row(f"{i}", Path("a"), "", size, "") for i, size in enumerate(sizes)], DataOptions(**FLAGS))]
    order = BucketOrder(rows, 16, batch_size=4, seed=0)
    mean = sum(order.micro_batches(step, Shard(accumulation=4)) for step in range(STEPS)) / STEPS
    return f"{images} images in {len({row.cut for row in rows})} buckets: {mean:.1f} forward passes a step"


def main() -> None:
    from trainkit.data.batch import Row
    from trainkit.data.buckets import with_sizes
    from trainkit.data.geometry import cut_away
    from trainkit.options import DataOptions
    from trainkit.sheets import save_png, sheet

    options = DataOptions(**FLAGS)
    pages, names = [], []
    for i, (name, (width, height)) in enumerate(SHAPES.items()):
        image, square = photograph((width, height), i), (1024, 1024)
        row, = with_sizes([Row(name, Path(name), "", (height, width), "")], options)
        assert row.cut
        pages.append([small(image), small(cut(image, square)), small(cut(image, row.cut))])
        lost = [f"{100 * cut_away(row.size, size):.0f} %" for size in (square, row.cut)]
        names.append(f"{name}. Lost: {lost[0]}, in bucket {row.cut[1]}x{row.cut[0]}: {lost[1]}")
        print(names[-1])
    page = sheet(pages, columns=["the image", "without buckets", "with buckets"], names=names,
                 title="What the model sees of an image at --resolution 1024")
    save_png(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "images" / "buckets.png"), page, "")
    print(passes(100), passes(1000), passes(10_000), sep="\n")


if __name__ == "__main__":
    main()
