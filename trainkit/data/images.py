"""Decode an image file the way a viewer shows it."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

from trainkit.errors import Problem, UserError

if TYPE_CHECKING:
    from trainkit.data.batch import Row, Source

warnings.filterwarnings("ignore", module=r"PIL\.")  # `rows.check` tells them once, with the image's name

Decoded = TypeVar("Decoded")
Note = Callable[[str], object]  # takes a remark about an image that can be used all the same

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"]  # what photographs come in; 36 other openers stay shut


def heif_formats() -> list[str]:
    """The name of one more format where the package that reads iPhone photos is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return []
    register_heif_opener()
    return ["HEIF"]


FORMATS += heif_formats()
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb threshold: a quarter of a GiB at 3 bytes a pixel
MAX_ASPECT = 50  # a longer strip, resized by its short side, would need gigabytes


PNG = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 16 * 2**20  # bytes of a colour profile; those of presses reach a few MB
SAME = 2  # levels of 255: a profile that changes no colour by more says sRGB in other words
SRGB = ImageCms.createProfile("sRGB")

WIDE = "32 bits a channel have no agreed white level; convert it to 8 or 16 bits"
HEIC = "pip install pillow-heif, then start again; or convert it: heif-convert -q 95 IN.heic OUT.jpg"
CONVERT = "convert it to PNG or JPEG in the program that shows it"
OTHERS: dict[bytes, tuple[str, str]] = {  # first bytes -> (what the file is, what to do); "?" stands for any byte
    b"????ftyphe": ("HEIC, as iPhones save photos", HEIC), b"????ftypmif1": ("HEIC, as iPhones save photos", HEIC),
    b"????ftypmsf1": ("HEIC, as iPhones save photos", HEIC), b"????ftypavif": ("damaged AVIF", ""),
    b"????ftyp": ("a video", "take stills from it"),
    b"\xff\x0a": ("JPEG XL", CONVERT), b"\0\0\0\x0cJXL ": ("JPEG XL", CONVERT),
    b"\0\0\0\x0cjP  ": ("JPEG 2000", CONVERT),
    b"8BPS": ("a Photoshop file", CONVERT), b"%PDF": ("a PDF", CONVERT), b"<svg": ("an SVG drawing", CONVERT),
    b"version https://git-lfs": ("a pointer of Git LFS, not the image", "git lfs pull, in the folder of the data set"),
}


class UnreadableImage(Exception):
    """This file content is no usable image; the message says why, without naming the file.

    fix  what makes it usable, where the file itself is sound
    """

    def __init__(self, why: str, fix: str = ""):
        super().__init__(why)
        self.fix = fix


def content_digest(data: bytes) -> str:
    """128-bit BLAKE2b of a file's content, in hex: the image's identity in caches."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes, note: Note | None = None) -> Image.Image:
    """RGB image as a viewer shows it: first frame, upright by EXIF, in sRGB by its profile, on white, 8 bits a channel.

    Raises UnreadableImage, and nothing else, for content that cannot be used. Remarks about content that can be go to
    `note`.
    """
    return _decoded(data, _as_rgb, note)


def decode_mask(data: bytes, note: Note | None = None) -> Image.Image:
    """A mask's red channel (L) in the same place as `decode` has the image's pixels; what is transparent is black.

    The levels are those of the file: a mask has no colours that a profile would change. Raises as `decode` does.
    """
    return _decoded(data, _as_mask, note)


def decode_alpha(data: bytes, note: Note | None = None) -> Image.Image | None:
    """The opacity (L) of the image that `decode` gives; None where it has no transparency. Raises as `decode` does."""
    return _decoded(data, _opacity, note)


def _decoded(data: bytes, convert: Callable[[Image.Image, Note | None], Decoded], note: Note | None) -> Decoded:
    """What `convert` makes of a file's first frame, upright."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # refused from the header alone, before any pixel is decoded
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS / 1e6:.0f} megapixels; scale it down")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise UnreadableImage(
                    f"{width} x {height} is longer than {MAX_ASPECT} times its short side; crop it")
            image.load()
            return convert(ImageOps.exif_transpose(image), note)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # Pillow's plugins raise a dozen unrelated types on damaged or hostile content
        slim = without_large_text(data)
        if slim is not data:  # Pillow gives up on text and profiles beside the pixels that unpack to more than 1 MB
            if note:
                note("text or a colour profile of more than 1 MB beside the pixels is not read")
            return _decoded(slim, convert, note)
        raise UnreadableImage(f"{error}" or type(error).__name__) from error


def _unidentified(data: bytes) -> UnreadableImage:
    for start, (kind, fix) in OTHERS.items():
        known = fix != HEIC or "HEIF" not in FORMATS  # where HEIC is read, this one is damaged
        if known and len(data) >= len(start) and all(b in (c, ord("?")) for b, c in zip(start, data, strict=False)):
            return UnreadableImage(f"it is {kind}, which is not read", fix)
    return UnreadableImage(f"no image of a known format ({', '.join(FORMATS)})" if data else "the file is empty")


def without_large_text(data: bytes) -> bytes:
    """A PNG without the chunks of text and the profile that Pillow finds too large; else `data` itself."""
    if not data.startswith(PNG):
        return data
    kept, place, text, dropped = [PNG], len(PNG), 0, False
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        chunk = data[place:end]
        kind, content = chunk[4:8], chunk[8:-4]
        size = _unpacked(kind, content) if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") else 0
        text += size
        if size > MAX_TEXT_CHUNK or size and text > MAX_TEXT_MEMORY // 2:
            dropped = True
        else:
            kept.append(chunk)
        place = end
    return b"".join(kept) if dropped else data


def _unpacked(kind: bytes, content: bytes) -> int:
    """Bytes that a chunk of text or profile unpacks to, as far as that matters."""
    packed = content.partition(b"\0")[2]
    if kind == b"tEXt" or kind == b"iTXt" and packed[:1] != b"\1":
        return len(content)
    start = packed[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else packed[1:]
    try:
        return len(zlib.decompressobj().decompress(start, MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(content)


def is_animated(data: bytes) -> bool:
    """Whether a decodable file holds more frames than the one `decode` takes."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # phones add a depth map in MPO and HEIF
            return image.format not in ("MPO", "HEIF") and getattr(image, "is_animated", False)
    except Exception:  # as in `decode`; only looking for a second frame can fail here, so there is something behind
        slim = without_large_text(data)
        return slim is data or is_animated(slim)


def load_image(row: Row) -> Image.Image:
    """The row's image, RGB and upright, filled where its mask says so; UserError when it can no longer be read or is
    not what was listed.
    """
    image = _load(row.source, row.digest, f"image {row.id}", decode)
    return _filled(image, load_mask(row)) if row.mask and row.mask.fills else image


def load_mask(row: Row) -> Image.Image:
    """The row's mask, grey and upright; UserError as in `load_image`."""
    assert row.mask is not None, f"{row.id} has no mask"
    decoder = decode_alpha if row.mask.alpha else decode_mask
    mask = _load(row.mask.source, row.mask.digest, f"the mask of image {row.id}", decoder)
    assert mask is not None, f"{row.id} was listed with transparency"
    return mask


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the mean colour of what the mask keeps, weighed by its levels, in the places where it is black."""
    levels = np.asarray(mask.resize(image.size, Image.Resampling.BILINEAR))
    if not levels.any():
        return image
    pixels = np.array(image)
    pixels[levels == 0] = np.average(pixels.reshape(-1, 3), axis=0, weights=levels.reshape(-1)).round()
    return Image.fromarray(pixels)


def _load(source: Source, digest: str, what: str, decoder: Callable[[bytes], Decoded]) -> Decoded:
    try:
        data = source.read_bytes()
        if content_digest(data) != digest:
            raise UnreadableImage("the file has changed since this run listed it")
        return decoder(data)
    except (OSError, UnreadableImage) as error:
        problem = Problem(f"{what} can no longer be read", f"{source}", f"{error}",
                          "put the image back and start the same command again", kind="data")
        raise UserError(problem) from error


# ------------------------------------------------------------------------------------------------------------- colours


def _as_rgb(upright: Image.Image, note: Note | None) -> Image.Image:
    plain = upright.mode == "RGB" and not upright.has_transparency_data and not upright.info.get("icc_profile")
    return upright if plain else _to_rgb(upright, note)


def _as_mask(image: Image.Image, note: Note | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bit(image).getchannel("R")
    if image.mode in ("I", "F"):
        raise UnreadableImage(WIDE)
    levels = image.convert("RGB").getchannel("R")
    if not image.has_transparency_data:
        return levels
    return ImageChops.multiply(levels, image.convert("RGBA").getchannel("A"))


def _opacity(image: Image.Image, note: Note | None) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _to_rgb(image: Image.Image, note: Note | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise UnreadableImage(WIDE)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if profile:
            colours = _by_profile(image.convert("L" if image.mode == "LA" else "RGB"), profile, note)
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if not profile or image.mode not in ("RGB", "L", "P", "CMYK"):
        return image.convert("RGB")
    return _by_profile(image.convert("RGB") if image.mode == "P" else image, profile, note)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Levels 0..65535 -> 0..255. Pillow's own conversion saturates instead (Pillow#1108)."""
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def _by_profile(image: Image.Image, profile: bytes, note: Note | None) -> Image.Image:
    """Colours or inks to sRGB by the embedded profile; by Pillow's plain formula where the profile is unusable."""
    try:
        transform = _transform(profile, image.mode)
        converted = ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        if note:
            note("the colour profile is unusable, so the colours are approximate")
        return image.convert("RGB")
    assert converted is not None, "only a conversion in place returns nothing"
    converted.info.pop("icc_profile", None)
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None where they are sRGB, so that such images keep their very values."""
    if len(profile) > MAX_PROFILE:
        raise ValueError("too large")
    transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 of each channel
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(levels[None] if mode == "L" else colours)
    converted = ImageCms.applyTransform(probe, transform)
    change = np.abs(np.asarray(converted, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return transform if change > SAME else None
