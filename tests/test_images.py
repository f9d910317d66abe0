"""Images are decoded as a viewer shows them, and a visit's crop is a pure function of what it depends on."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.support.images import data_options, marked, row_of
from trainkit.data.batch import Row, Sample, collate
from trainkit.data.geometry import INTERPOLATIONS, CropPolicy, resized_size
from trainkit.data.images import UnreadableImage, decode, is_animated, load_image
from trainkit.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def a_row(h: int, w: int, name: str = "a.png", repeat: int = 0) -> Row:
    return Row(name, Path(name), "", (h, w), "digest", repeat)


# ------------------------------------------------------------------------------------------------------------ decode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_pixels_and_size(orientation: int, kind: str) -> None:
    """The upright image has a red top-left quarter, a green top-right one; the file stores it turned."""
    upright = Image.new("RGB", (48, 32), "blue")
    upright.paste("red", (0, 0, 24, 16))
    upright.paste("lime", (24, 0, 48, 16))
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = decode(encoded(stored, kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {})))
    assert seen.size == (48, 32)
    for place, colour in {(8, 6): (255, 0, 0), (40, 6): (0, 255, 0), (8, 26): (0, 0, 255)}.items():
        assert np.abs(np.array(seen.getpixel(place)) - colour).max() <= 12, f"{place} is {seen.getpixel(place)}"


def test_grey_and_transparent_modes_become_rgb_on_white() -> None:
    def pixel(image: Image.Image, **how: object) -> tuple[int, ...]:
        return decode(encoded(image, **how)).getpixel((0, 0))

    assert pixel(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert pixel(Image.new("LA", (4, 4), (77, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == (255, 255, 255), "hidden colour under alpha 0 shows"
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 128))) == (255, 127, 127)
    lab = decode(encoded(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"))
    assert np.abs(np.array(lab)[0, 0].astype(int) - 255).max() <= 3
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0] * 9 + [10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    assert pixel(palette, transparency=3) == (255, 255, 255), "a palette's transparent index must become white"


def test_16_bit_grey_keeps_its_levels() -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.uint16)[None].repeat(2, 0)
    seen = np.array(decode(encoded(Image.fromarray(ramp))))[0, :, 0]
    assert seen.tolist() == [17 * i for i in range(16)]


def test_cmyk_uses_its_profile_and_otherwise_the_plain_formula() -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(np.array(decode(encoded(inks, "TIFF")))[0, 0] - [255, 0, 0]).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    broken = decode(encoded(inks, "TIFF", icc_profile=srgb))  # a profile for another colour space cannot be applied
    assert np.abs(np.array(broken)[0, 0] - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("name, data", {
    "empty": b"", "text": b"<html>not an image</html>", "cut png": encoded(marked(1, 64, 64))[:100],
    "cut jpeg": encoded(marked(1, 64, 64), "JPEG")[:500], "float": encoded(Image.new("F", (4, 4)), "TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "strip": encoded(Image.new("L", (1, 51))), "noise": bytes(range(256)) * 40,
}.items())
def test_unusable_content_gives_one_kind_of_error_with_a_reason(name: str, data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"\w+"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_content_never_raises_anything_else(kind: str) -> None:
    whole, random = encoded(marked(1, 24, 24), kind), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for place in random.integers(0, len(data), random.integers(1, 8)):
            data[place] = random.integers(0, 256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except UnreadableImage as error:
            assert str(error)
        assert is_animated(bytes(data)) in (True, False)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_from_its_header_alone() -> None:
    data, header = encoded(Image.new("RGB", (4, 4))), b"IHDR" + struct.pack(">II5B", 9_500, 9_500, 8, 2, 0, 0, 0)
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(UnreadableImage, match="9500 x 9500 is over 89 megapixels"):
        decode(bomb)


def test_the_first_frame_is_used_and_animation_is_noticed() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert is_animated(data) and decode(data).getpixel((4, 4))[0] > 240, kind
    assert not is_animated(encoded(frames[0], "JPEG")) and not is_animated(encoded(frames[0], "GIF"))


def test_a_image_that_changed_during_the_run_is_refused(tmp_path: Path) -> None:
    marked(1, 40, 40).save(tmp_path / "a.png")
    row = row_of(tmp_path / "a.png")
    assert load_image(row).size == (40, 40)
    marked(2, 40, 40).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="changed"):
        load_image(row)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png") as caught:
        load_image(row)
    assert caught.value.exit_code == 3


# -------------------------------------------------------------------------------------------------------------- crop


@pytest.mark.parametrize("size, resolution, expected", [
    ((300, 451), 128, (128, 192)),  # 192.43 is truncated, not rounded
    ((451, 300), 128, (192, 128)),
    ((333, 1000), 512, (512, 1537)),  # 1537.54
    ((1411, 1411), 1024, (1024, 1024)),
    ((10, 15), 64, (64, 96)),  # small images grow
])
def test_the_long_side_is_truncated_like_torchvisions(size, resolution, expected) -> None:
    assert resized_size(size, resolution) == expected


@pytest.mark.parametrize("filter_name", INTERPOLATIONS)
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_resize_flip_crop_to_tensor_normalize(filter_name: str, flip: bool) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    policy = CropPolicy(resolution=32, interpolation=filter_name)
    sample = Sample(a_row(50, 71), (32, 45), top=0, left=5, flip=flip, shape=(32, 32))
    [seen] = policy.views(noise, [sample])
    resized = np.array(noise.resize((45, 32), Image.Resampling[filter_name.upper()]))
    mirrored = resized[:, ::-1] if flip else resized
    expected = (torch.from_numpy(mirrored[0:32, 5:37].copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    assert torch.equal(seen, expected) and seen.shape == (3, 32, 32)


def test_the_recorded_corner_is_the_one_that_was_cut() -> None:
    """Without scaling, the first pixel's green and blue are its column and line in the (mirrored) image."""
    policy = CropPolicy(resolution=32, random_flip=True, interpolation="nearest")
    for h, w in [(32, 60), (70, 32), (32, 32)]:
        row, image = a_row(h, w), marked(9, h, w)
        for epoch in range(20):
            sample = replace(policy.sample(row, seed=0, epoch=epoch), slot=((0, 0, 0), 0, epoch, 1))
            _, column, line = ((policy.views(image, [sample])[0, :, 0, 0] + 1) * 127.5).round().tolist()
            assert column == (w - 1 - sample.left if sample.flip else sample.left) and line == sample.top
            assert collate([sample]).time_ids.tolist() == [[h, w, sample.top, sample.left, 32, 32]]


def test_a_visit_depends_on_seed_epoch_row_and_repeat_only() -> None:
    policy, row = CropPolicy(resolution=32, random_flip=True), a_row(32, 2000)

    def lefts(**change: object) -> list[int]:
        key = dict(row=row, seed=1, epoch=0) | change
        return [policy.sample(key["row"], seed=key["seed"], epoch=key["epoch"] + i).left for i in range(8)]

    assert lefts() == lefts() == lefts(row=replace(row, caption="else", source=Path("/moved/a.png")))
    other_name, other_repeat = a_row(32, 2000, "b.png"), a_row(32, 2000, repeat=1)
    for change in (dict(seed=2), dict(epoch=100), dict(row=other_name), dict(row=other_repeat)):
        assert lefts(**change) != lefts(), change
    assert len(set(lefts())) == 8, "every visit draws a fresh crop"
    torch.manual_seed(5)
    assert lefts() == lefts(), "the global generator has no say"


def test_random_crops_reach_both_ends_evenly() -> None:
    policy, row = CropPolicy(resolution=32, random_flip=True), a_row(32, 35)
    visits = [policy.sample(row, seed=0, epoch=e) for e in range(400)]
    counts = [sum(v.left == left and v.flip == flip for v in visits) for left in range(4) for flip in (False, True)]
    assert min(counts) > 25 and max(counts) < 80, counts  # 50 expected each


def test_centre_crop_rounds_as_torchvision() -> None:
    row = a_row(32, 37)
    sample = CropPolicy(resolution=32, center_crop=True).sample(row, seed=0, epoch=0)
    assert sample == Sample(row, (32, 37), top=0, left=2, flip=False, shape=(32, 32))  # round(2.5) = 2


@pytest.mark.parametrize("changes, size, expected", [
    (dict(center_crop=True), (32, 50), 1), (dict(center_crop=True, random_flip=True), (32, 50), 2),
    (dict(cached_crops=4), (32, 50), 4), (dict(cached_crops=4, random_flip=True), (32, 50), 8),
    (dict(cached_crops=4), (50, 50), 1), (dict(cached_crops=4), (32, 34), 3),
])
def test_variants_are_distinct_and_are_what_visits_see(changes: dict, size: tuple[int, int], expected: int) -> None:
    policy, row = CropPolicy(resolution=32, **changes), a_row(*size)
    variants = policy.variants(row, 7)
    assert len(variants) == len(set(variants)) == expected
    assert {policy.sample(row, seed=7, epoch=e) for e in range(200)} == set(variants)


def test_a_fresh_random_crop_cannot_be_cached() -> None:
    assert not CropPolicy(resolution=32).cacheable
    assert CropPolicy.from_options(data_options(cache_latents=True)).cacheable
    assert not CropPolicy.from_options(data_options(cache_latents=True, cached_crops=0)).cacheable
    assert not CropPolicy.from_options(data_options(cache_latents=False)).cacheable
