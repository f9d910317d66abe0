"""Images are decoded as a viewer shows them, and a visit's crop is a pure function of what it depends on."""

from __future__ import annotations

import importlib
import io
import logging
import struct
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from tests.support.images import data_options, marked, row_of
from tests.support.profiles import ADOBE, P3, SRGB, profile
from trainkit.data import images
from trainkit.data.batch import Row, Sample, Slot, collate
from trainkit.data.geometry import INTERPOLATIONS, CropPolicy, resized_size
from trainkit.data.images import UnreadableImage, decode, is_animated, load_image
from trainkit.data.rows import read_rows
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


def first_pixel(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))[0, 0].astype(int)


def in_srgb(primaries: tuple, colour: tuple[int, ...], gamma: float = 2.2) -> np.ndarray:
    """The formula: gamma, the matrix to XYZ, the inverse of sRGB's, sRGB's curve."""
    linear = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("primaries", [P3, ADOBE], ids=["P3", "AdobeRGB"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_are_those_of_the_embedded_profile(primaries: tuple, kind: str) -> None:
    """(200, 90, 60) of a wide gamut is a stronger colour in sRGB, as every viewer shows it."""
    expected = in_srgb(primaries, (200, 90, 60))
    assert expected[0] > 215
    how = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    data = encoded(Image.new("RGB", (32, 32), (200, 90, 60)), kind, icc_profile=profile(primaries), **how)
    assert np.abs(first_pixel(data) - expected).max() <= 4, first_pixel(data)


def test_profiles_reach_alpha_palettes_and_grey() -> None:
    wide = profile(P3)
    rgba = encoded(Image.new("RGBA", (4, 4), (200, 90, 60, 255)), icc_profile=wide)
    assert np.abs(first_pixel(rgba) - (217, 80, 45)).max() <= 3
    clear = encoded(Image.new("RGBA", (4, 4), (200, 90, 60, 0)), icc_profile=wide)
    assert first_pixel(clear).tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 90, 60])
    assert np.abs(first_pixel(encoded(palette, icc_profile=wide)) - (217, 80, 45)).max() <= 3
    linear = profile(gamma=1.0, grey=True)
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)  # sRGB's curve
    for grey in (Image.new("L", (4, 4), 100), Image.new("LA", (4, 4), (100, 255))):
        assert np.abs(first_pixel(encoded(grey, icc_profile=linear)) - expected).max() <= 3


def test_a_profile_that_says_srgb_changes_no_value() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (np.asarray(decode(encoded(Image.fromarray(noise), icc_profile=srgb))) == noise).all()


@pytest.mark.parametrize("broken", [b"junk", profile(grey=True), b"\0" * 500], ids=["junk", "of grey", "zeros"])
def test_an_unusable_profile_is_remarked_and_the_image_read(broken: bytes) -> None:
    said: list[str] = []
    image = decode(encoded(Image.new("RGB", (4, 4), (200, 90, 60)), icc_profile=broken), said.append)
    assert image.getpixel((0, 0)) == (200, 90, 60) and len(said) == 1 and "profile" in said[0]


def large_png(kind: str) -> bytes:
    text, info = '{"workflow": "' + "node " * 300_000 + '"}', PngImagePlugin.PngInfo()
    if kind == "icc":
        return encoded(Image.new("RGB", (8, 8), "red"), icc_profile=b"\0" * 1_500_000)
    if kind == "itxt":
        info.add_itxt("workflow", text, zip=True)
    elif kind == "many":
        for i in range(70):
            info.add_text(f"t{i}", "x" * 1_000_000, zip=True)
    else:
        info.add_text("workflow", text, zip=kind == "ztxt")
    info.add_text("Title", "kept")
    return encoded(Image.new("RGB", (8, 8), "red"), pnginfo=info)


@pytest.mark.parametrize("kind", ["ztxt", "itxt", "text", "icc", "many"])
@pytest.mark.parametrize("after", [False, True])
def test_a_png_with_more_text_than_pillow_takes_is_read(kind: str, after: bool) -> None:
    data = large_png(kind)
    if after:  # text may stand behind the pixels, too
        chunks = images.without_large_text(data)
        pixels = data.index(b"IDAT") - 4
        end = data.index(b"IEND") - 4
        head = data[:33]
        data = head + data[pixels:end] + data[33:pixels] + data[end:]
        assert len(chunks) < len(data)
    assert decode(data).getpixel((0, 0)) == (255, 0, 0) and not is_animated(data)


@pytest.mark.parametrize("data, kind, fix", [
    (struct.pack(">I4s4sI4s", 24, b"ftyp", b"heic", 0, b"mif1") + bytes(99), "HEIC", "pillow-heif"),
    (struct.pack(">I4s4sI4s", 24, b"ftyp", b"mif1", 0, b"heic") + bytes(99), "HEIC", "pillow-heif"),
    (struct.pack(">I4s4sI4s", 24, b"ftyp", b"isom", 0, b"mp41") + bytes(99), "a video", "stills"),
    (b"\xff\x0a" + bytes(99), "JPEG XL", "convert"), (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL", "convert"),
    (b"8BPS\0\1" + bytes(99), "Photoshop", "convert"), (b"%PDF-1.7" + bytes(99), "PDF", "convert"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
])
def test_a_sound_file_of_another_kind_is_named_and_never_moved_away(
    tmp_path: Path, data: bytes, kind: str, fix: str
) -> None:
    marked(1, 40, 40).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(data)
    _, (problem,) = read_rows(data_options(instance_data_dir=tmp_path))
    assert kind in problem.why and fix in problem.fix and "mv" not in problem.fix
    (tmp_path / "c.jpg").write_bytes(b"junk")
    _, (problem,) = read_rows(data_options(instance_data_dir=tmp_path))
    assert fix in problem.fix and "c.jpg" in problem.fix and "b.jpg" not in problem.fix


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package registers a format of its own; here one that reads PNG under that name."""
    from PIL.PngImagePlugin import PngImageFile

    class Heif(PngImageFile):
        format = "HEIF"

    fake = type(sys)("pillow_heif")
    fake.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda prefix: prefix.startswith(b"\x89PNG"))
    fake.__spec__ = importlib.machinery.ModuleSpec("pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    monkeypatch.setattr(images, "FORMATS", [*images.heif_formats(), "JPEG"])
    (tmp_path / "IMG_1.HEIC").write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    rows, problems = read_rows(data_options(instance_data_dir=tmp_path))
    assert not problems and [row.id for row in rows] == ["IMG_1.HEIC"]


def test_remarks_of_pillow_carry_the_names_of_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for name in ("a.png", "b.png"):
        palette.save(tmp_path / name, transparency=b"\x00\x80")  # Pillow warns when such a palette is converted
    marked(1, 40, 40).save(tmp_path / "plain.png")
    for name in ("x.tif", "y.tif"):
        Image.new("CMYK", (8, 8)).save(tmp_path / name, icc_profile=b"junk")
    rows, problems = read_rows(data_options(instance_data_dir=tmp_path))
    assert not problems
    remark, = (r.getMessage() for r in caplog.records if "profile" in r.getMessage())
    assert "2 images" in remark and "x.tif" in remark and "y.tif" in remark and "plain.png" not in remark
    caplog.clear()
    with warnings.catch_warnings(record=True) as later, caplog.at_level(logging.WARNING):
        for row in rows:
            load_image(row)
    assert not caplog.records and not [w for w in later if "profile" in str(w.message)], "told once, not at each visit"


def test_small_images_and_twins_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, size in {"one.png": 1, "eight.png": 8, "fine.png": 20}.items():
        marked(size, size, size).save(tmp_path / name)
    for name, caption in {"copy.png": "a cat", "again.png": "a dog"}.items():
        marked(7, 40, 40).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    assert not read_rows(data_options(instance_data_dir=tmp_path))[1]
    bare, blurred, small, twins, shown = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "3 images have no caption file: --instance_prompt is used: eight.png" in bare
    assert "one.png 32 times" in small and "eight.png 4 times" in small and "fine.png" not in small
    assert "again.png = copy.png (with different captions)" in twins
    assert "look blurred" in blurred and "check_dataset" in shown


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
    assert resized_size(size, (resolution, resolution)) == expected


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
            sample = replace(policy.sample(row, seed=0, epoch=epoch), slot=Slot((0, 0, 0), 0, epoch, 1))
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


@pytest.mark.parametrize("repeats", [1, 3, 20])
def test_repeats_share_the_cached_crops_of_their_image(repeats: int) -> None:
    policy = CropPolicy(resolution=32, cached_crops=4, random_flip=True)
    views = {(v.top, v.left, v.flip) for i in range(repeats) for v in policy.variants(a_row(32, 90, repeat=i), 7)}
    assert len(views) == 8


def test_a_fresh_random_crop_cannot_be_cached() -> None:
    assert not CropPolicy(resolution=32).cacheable
    assert CropPolicy.from_options(data_options(cache_latents=True)).cacheable
    assert not CropPolicy.from_options(data_options(cache_latents=True, cached_crops=0)).cacheable
    assert not CropPolicy.from_options(data_options(cache_latents=False)).cacheable
