"""Images to look at: PNG files that carry their prompt and settings, and labelled sheets of several images."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from trainkit.files import atomic_write
from trainkit.redact import redact

TILE_PX = (192, 512)  # a sheet shows no image smaller or larger than this


# ----------------------------------------------------------------------------------------------------------------------
# PNG files


def save_png(path: Path, image: Image.Image, parameters: str) -> None:
    """A PNG with its prompt and seed in the text chunk `parameters`, or "" for none; readers never see half a file."""
    info, buffer = PngInfo(), io.BytesIO()
    if parameters:
        info.add_text("parameters", redact(parameters))
    image.save(buffer, format="PNG", pnginfo=info)
    atomic_write(path, buffer.getvalue())


def png_parameters(prompt: str, settings: Mapping[str, str | int | float], *, negative: str | None = None) -> str:
    """The text that a WebUI's PNG-info tab reads: the prompt, the negative prompt, and the settings in the last line.

    Empty settings are left out. Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py (quote).
    """
    line = ", ".join(f"{name}: {quoted(value)}" for name, value in settings.items() if value != "")
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def quoted(value: str | int | float) -> str:
    """A value as JSON where a reader would take a part of it for the next setting."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def is_of(path: Path, prompt: str) -> bool:
    """Whether `path` is an image that `save_png` has written for this prompt."""
    try:
        with Image.open(path) as image:
            return str(image.info.get("parameters", "")).startswith(f"{redact(prompt)}\nSteps: ")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # not there, damaged, or another's
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Labelled sheets

PAPER, INK, FAINT, EDGE = "#f4f5f7", "#16181d", "#5d6470", "#d5d9e0"
GAP, MARGIN, NAME_CHARS, LINE = 10, 24, 24, 20  # pixels, pixels, characters a line, pixels a line
CHAR, HEAD_LINES = 8, 4  # pixels of a character, lines above a column


def sheet(rows: Sequence[Sequence[Image.Image | None]], *, columns: Sequence[str], names: Sequence[str],
          title: str) -> Image.Image:
    """A labelled contact sheet: `names` on the left of `rows`, `columns` above, `title` on top.

    rows     images, one list per row, each as long as `columns`; None leaves a place empty
    Small images are enlarged and large ones reduced until a tile is within TILE_PX.
    """
    assert len(names) == len(rows) and all(len(row) == len(columns) for row in rows), "a label per row and column"
    tile = tile_px(max(max(image.size) for row in rows for image in row if image))
    labels = [textwrap.wrap(name, NAME_CHARS, max_lines=tile // LINE, placeholder=" …") for name in names]
    heads = [textwrap.wrap(name, tile // CHAR, max_lines=HEAD_LINES, placeholder=" …") for name in columns]
    left = MARGIN + (max(width_px(line) for label in labels for line in label) + 2 * GAP if any(labels) else 0)
    top = MARGIN + (2 + max(1, *map(len, heads))) * LINE + GAP
    wide = max(left + len(columns) * (tile + GAP) - GAP, MARGIN + round(font(20).getlength(title)))
    size = (wide + MARGIN, top + len(rows) * (tile + GAP) - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font(20))
    for c, head in enumerate(heads):
        x = left + c * (tile + GAP) + tile // 2
        for above, line in enumerate(reversed(head)):
            draw.text((x, top - GAP - above * LINE), line, fill=FAINT, font=font(), anchor="ms")
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + r * (tile + GAP)
        draw.multiline_text((MARGIN, y + tile // 2), "\n".join(label), fill=INK, font=font(), anchor="lm")
        for c, image in enumerate(row):
            if image is not None:
                paste(page, image, (left + c * (tile + GAP), y), tile)
    return page


def tile_px(side: int) -> int:
    """Side of a tile for images of `side` pixels: a whole multiple of a small side, a large side cut down."""
    smallest, largest = TILE_PX
    return min(largest, side * -(-smallest // side))


def paste(page: Image.Image, image: Image.Image, corner: tuple[int, int], tile: int) -> None:
    """The image, scaled to fit and centred in its tile, with a hairline edge (images on white need one)."""
    x, y = corner
    scale = tile / max(image.size)
    fitted = image.convert("RGB").resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
    page.paste(fitted, (x + (tile - fitted.width) // 2, y + (tile - fitted.height) // 2))
    ImageDraw.Draw(page).rectangle((x - 1, y - 1, x + tile, y + tile), outline=EDGE)


def font(size: int = 14) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def width_px(text: str) -> int:
    return round(font().getlength(text))
