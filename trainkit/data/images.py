"""Decode an image file the way a viewer shows it."""

from __future__ import annotations

import hashlib
import io
import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from trainkit.errors import Problem, UserError

if TYPE_CHECKING:
    from trainkit.data.batch import Row

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # what photographs come in; 36 other openers stay shut
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold: a quarter of a GiB at 3 bytes a pixel
MAX_ASPECT = 50  # a longer strip, resized by its short side, would need gigabytes


class UnreadableImage(Exception):
    """This file content is no usable image; the message says why, without naming the file."""


def content_digest(data: bytes) -> str:
    """128-bit BLAKE2b of a file's content, in hex: the image's identity in caches."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes) -> Image.Image:
    """RGB image as a viewer shows it: first frame, upright by EXIF, on white, 8 bits a channel.

    Raises UnreadableImage, and nothing else, for content that cannot be used.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # refused from the header alone, before any pixel is decoded
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS / 1e6:.0f} megapixels; scale it down")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise UnreadableImage(
                    f"{width} x {height} is longer than {MAX_ASPECT} times its short side; crop it")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright if upright.mode == "RGB" and not upright.has_transparency_data else _to_rgb(upright)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        why = f"no image of a known format ({', '.join(FORMATS)})" if data else "the file is empty"
        raise UnreadableImage(why) from None
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged or hostile content
        raise UnreadableImage(f"{error}" or type(error).__name__) from error


def is_animated(data: bytes) -> bool:
    """Whether a decodable file holds more frames than the one `decode` takes."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.format != "MPO" and getattr(image, "is_animated", False)  # phones add a depth map in MPO
    except Exception:  # as in `decode`; only looking for a second frame can fail here, so there is something behind
        return True


def load_image(row: Row) -> Image.Image:
    """The row's image, RGB and upright; UserError when it can no longer be read or is not what was listed."""
    try:
        data = row.source.read_bytes()
        if content_digest(data) != row.digest:
            raise UnreadableImage("the file has changed since this run listed it")
        return decode(data)
    except (OSError, UnreadableImage) as error:
        problem = Problem(f"image {row.id} can no longer be read", f"{row.source}", f"{error}",
                          "put the image back and start the same command again", kind="data")
        raise UserError(problem) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise UnreadableImage("32 bits a channel have no agreed white level; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return _from_cmyk(image) if image.mode == "CMYK" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Levels 0..65535 -> 0..255. Pillow's own conversion saturates instead (Pillow#1108)."""
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Inks to sRGB by the embedded profile; by Pillow's plain formula when there is none."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None, "only a conversion in place returns nothing"
        return converted
    except (OSError, ImageCms.PyCMSError) as error:
        log.warning("a CMYK image's colour profile is unusable (%s); its colours are approximate", error)
        return image.convert("RGB")
