"""Masks: what is black is not trained on, wherever the mask comes from and however its image is turned and cut."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tests.support.images import data_options
from tests.support.schedules import alphas
from trainkit.data.batch import Batch, Row, collate
from trainkit.data.cache import DiskStore, entry_paths
from trainkit.data.cache_folders import CacheEntry, fault, kinds
from trainkit.data.cache_uses import packed_keys
from trainkit.data.images import decode, decode_alpha, decode_mask, load_image
from trainkit.data.loader import Images, micro_batches, ready_images
from trainkit.data.masks import Masks, has_another_shape
from trainkit.data.rows import Rows, read_rows
from trainkit.data.sampler import Shard, make_order
from trainkit.diffusion import NoiseSchedule
from trainkit.errors import Problem
from trainkit.losses.passes import plain_objective
from trainkit.options import FourierOptions, ObjectiveOptions, rules
from trainkit.run_fingerprint import contents, masks

FACTOR = 8
TURNED = 6  # EXIF: shown after a turn of 90° to the right
SIZES = [(40, 64), (64, 40), (33, 47), (100, 60)]  # h, w
GEOMETRIES = {
    "centre": dict(center_crop=True), "random": {}, "flipped": dict(center_crop=True, random_flip=True),
    "buckets": dict(enable_bucket=True, bucket_reso_steps=8, min_bucket_reso=16, max_bucket_reso=64, random_flip=True),
    "two sizes": dict(resolutions="32,48", random_flip=True),
}


def grey(h: int, w: int, seed: int) -> Image.Image:
    """Rough black and white areas, a few pixels wide, and some greys."""
    coarse = np.random.default_rng(seed).choice([0, 0, 128, 255, 255], ((h + 9) // 10, (w + 9) // 10))
    return Image.fromarray(np.kron(coarse, np.ones((10, 10)))[:h, :w].astype(np.uint8))


def masked_folder(folder: Path, *, exif: bool = False) -> Path:
    """Images that are their own masks: the red channel is the mask, so that both can be compared place by place."""
    folder.mkdir()
    for i, (h, w) in enumerate(SIZES):
        mask = grey(h, w, i)
        image = Image.merge("RGB", [mask, mask.point(lambda level: level // 2), Image.new("L", mask.size, 90)])
        meta = Image.Exif()
        meta[0x0112] = TURNED if exif and i % 2 else 1
        image.save(folder / f"{i}.png", exif=meta)
        mask.save(folder / f"{i}-masklabel.png", exif=meta)
        (folder / f"{i}.txt").write_text(f"image {i}")
    return folder


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for a VAE: the means of blocks [B,3,h,w]."""
    mean = avg_pool2d(pixels, FACTOR)
    return mean, mean - 5


FAMILY = SimpleNamespace(encode_pixels=encode, latents_identity="means", vae_batch_size=2, vae_factor=FACTOR)


def read(folder: Path, **flags: object) -> tuple[Rows, list[Problem]]:
    flags = dict(masked_loss=True, image_interpolation_mode="box", bad_images="error") | flags
    return read_rows(data_options(instance_data_dir=folder, **flags))


def rows_of(folder: Path, **flags: object) -> Rows:
    rows, problems = read(folder, **flags)
    assert not problems, "\n".join(map(str, problems))
    return rows


def images_of(folder: Path, store: object = None, **flags: object) -> Images:
    flags = dict(masked_loss=True, image_interpolation_mode="box") | flags
    opt = data_options(instance_data_dir=folder, **flags)
    return ready_images(rows_of(folder, **flags), opt, FAMILY, {} if store is None else store, seed=3)


def batches(images: Images, steps: int = 6, start: int = 0, shard: Shard | None = None) -> Iterator[Batch]:
    order = make_order(images.rows, 2, batch_size=2, seed=1)
    for _, some in micro_batches(images, order, shard or Shard(), start_step=start, stop_step=steps):
        yield from some


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", ["live", "memory", "disk"])
@pytest.mark.parametrize("exif", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_mask_is_cut_as_its_image_is(tmp_path, geometry, exif, cached):
    store = DiskStore(tmp_path / "cache") if cached == "disk" else {}
    images = images_of(masked_folder(tmp_path / "d", exif=exif), store, cache_latents=cached != "live",
                       **GEOMETRIES[geometry])
    assert images.live == (cached == "live")
    seen = set()
    for batch in batches(images):
        red = (encode(batch.pixels)[0] if images.live else batch.mean)[:, :1]
        torch.testing.assert_close(batch.mask, (red + 1) / 2, rtol=0, atol=1e-5)
        seen |= {tuple(batch.mask.shape[2:])}
    assert len(seen) > 1 or exif or geometry not in ("buckets", "two sizes")


OBJECTIVES = {
    "plain": {}, "min-snr": dict(snr_gamma=5.0), "edm": dict(do_edm_style_training=True),
    "huber": dict(loss_type="huber"), "fourier": dict(loss_type="fourier"), "v": dict(prediction_type="v_prediction"),
}


def gradient(batch: Batch, objective: str, space: str = "prediction") -> Tensor:
    """Of the loss at the network's output [B,C,h,w]."""
    o = ObjectiveOptions(**OBJECTIVES[objective])
    fourier = FourierOptions(fourier_warmup_steps=0, fourier_space=space)
    schedule = NoiseSchedule(alphas(), o.prediction_type or "epsilon")
    plain, _ = plain_objective(o, fourier, schedule, total_steps=9, note=lambda **facts: None)
    g = torch.Generator().manual_seed(batch.step)
    x0, n, out = (torch.randn(*batch.mean.shape, generator=g) for _ in range(3))
    level = plain.levels(torch.rand(len(x0), generator=g), (x0.shape[-2], x0.shape[-1]))
    out.requires_grad_()
    plain(out, x0=x0, z=plain.pred.add_noise(x0, n, level), n=n, level=level, batch=batch).sum().backward()
    return out.grad


@pytest.mark.parametrize(("geometry", "objective"), [
    *((geometry, "plain") for geometry in GEOMETRIES), *(("buckets", name) for name in OBJECTIVES if name != "plain")])
@pytest.mark.parametrize("normalized", [False, True])
def test_where_a_mask_is_black_the_gradient_is_exactly_0(tmp_path, geometry, objective, normalized):
    images = images_of(masked_folder(tmp_path / "d"), cache_latents=True, normalize_masked_area_loss=normalized,
                       **GEOMETRIES[geometry])
    black = 0
    for batch in batches(images):
        found = [gradient(batch, objective)] + [gradient(batch, objective, "x0")] * (objective == "fourier")
        off = (batch.mask == 0).expand_as(batch.mean)
        black += int(off.sum())
        for each in found:
            assert torch.equal(each[off], torch.zeros(int(off.sum()))) and each.isfinite().all()
            assert (each[~off] != 0).all()
    assert black


def test_the_fourier_term_of_a_mask_is_by_parseval_the_masked_squared_error():
    """Soft and normalized masks, too: the term's share of the loss is that of a whole image."""
    o = ObjectiveOptions(loss_type="fourier")
    fourier = FourierOptions(fourier_warmup_steps=0, fourier_metric="complex", fourier_mode="basic",
                             fourier_weight=0.5, fourier_balance="none")
    plain, _ = plain_objective(o, fourier, NoiseSchedule(alphas(), "epsilon"), total_steps=9, note=lambda **facts: None)
    g = torch.Generator().manual_seed(0)
    x0, n, out = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    mask = 3 * torch.rand(2, 1, 8, 8, generator=g)
    level = plain.levels(torch.tensor([0.2, 0.7]), (8, 8))
    batch = SimpleNamespace(step=1, mask=mask, loss_weight=torch.ones(2), is_class=torch.zeros(2) > 0, counts=True,
                            num_instance=2)
    losses = plain(out, x0=x0, z=plain.pred.add_noise(x0, n, level), n=n, level=level, batch=batch)
    torch.testing.assert_close(losses, 1.5 * ((out - n) ** 2 * mask).mean((1, 2, 3)))


# -- weights -----------------------------------------------------------------------------------------------------------


def sample_of(folder: Path, name: str, **flags: object) -> Tensor:
    images = images_of(folder, center_crop=True, **flags)
    place = next(i for i, row in enumerate(images.rows) if row.id == name)
    return images.masks(images.policy.sample(images.rows[place], seed=0, epoch=0))


def half_masked(folder: Path) -> Path:
    """An image whose left half is masked out, with a grey band; another without a mask; and one that is black."""
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    mask.paste(51, (16, 0, 24, 32))
    mask.save(folder / "a-masklabel.png")
    Image.new("L", (32, 32), 0).save(folder / "c-masklabel.png")
    return folder


def test_weights_of_places_are_the_mean_levels_of_their_pixels(tmp_path):
    folder = half_masked(tmp_path / "d")
    row = torch.tensor([0, 0, 0.2, 1])
    torch.testing.assert_close(sample_of(folder, "a.png")[0], row.expand(4, 4))
    torch.testing.assert_close(sample_of(folder, "a.png", unmasked_weight=0.5)[0], row.clamp(min=0.5).expand(4, 4))
    normalized = sample_of(folder, "a.png", normalize_masked_area_loss=True)[0]
    torch.testing.assert_close(normalized, (row / row.mean()).expand(4, 4))
    both = sample_of(folder, "a.png", normalize_masked_area_loss=True, unmasked_weight=0.5)[0]
    torch.testing.assert_close(both, (row.clamp(min=0.5) / row.clamp(min=0.5).mean()).expand(4, 4))
    for normalize in (False, True):
        flags = dict(normalize_masked_area_loss=normalize)
        assert torch.equal(sample_of(folder, "b.png", **flags), torch.ones(1, 4, 4)), "an image without a mask"
        assert torch.equal(sample_of(folder, "c.png", **flags), torch.zeros(1, 4, 4)), "a black mask: no 0/0"


def test_without_the_flags_batches_have_no_mask_and_masks_are_no_images(tmp_path, caplog):
    folder = half_masked(tmp_path / "d")
    images = images_of(folder, masked_loss=False)
    assert [row.id for row in images.rows] == ["a.png", "b.png", "c.png"] and images.masks is None
    assert all(batch.mask is None for batch in batches(images))
    assert "a-masklabel.png: a mask; --masked_loss trains with it" in caplog.text


def test_a_class_image_counts_everywhere(tmp_path):
    images = images_of(half_masked(tmp_path / "d"))
    row = images.rows[2]
    images.rows = [row, replace(row, is_class=True, mask=None)]
    batch = collate([images[slot] for slot in make_order(images.rows, 1, batch_size=1, seed=0).slots(0)[0]])
    assert batch.is_class.tolist() == [False, True] and batch.mask.flatten(1).sum(1).tolist() == [0, 16]


# -- cache and resume --------------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    means = Masks.means
    monkeypatch.setattr(Masks, "means", lambda self, samples: made.append(len(samples)) or means(self, samples))
    return made


def test_masks_are_read_once_and_a_new_mask_makes_no_latent_anew(tmp_path, monkeypatch):
    folder, store, made, encoded = masked_folder(tmp_path / "d"), {}, counting(monkeypatch), []
    family = SimpleNamespace(**vars(FAMILY) | dict(encode_pixels=lambda p: encoded.append(len(p)) or encode(p)))

    def ready(**flags: object) -> tuple[int, int]:
        before = len(made), len(encoded)
        opt = data_options(instance_data_dir=folder, cache_latents=True, center_crop=True, **flags)
        ready_images(read_rows(opt)[0], opt, family, store, seed=3)
        return sum(made[before[0]:]), sum(encoded[before[1]:])

    assert ready() == (0, 4), "without the flag no mask is read"
    assert ready(masked_loss=True) == (4, 0) and ready(masked_loss=True) == (0, 0)
    assert ready(masked_loss=True, unmasked_weight=0.3, normalize_masked_area_loss=True) == (0, 0)
    grey(*SIZES[1], seed=77).save(folder / "1-masklabel.png")
    assert ready(masked_loss=True) == (1, 0)
    assert ready(masked_loss=True, random_flip=True) == (4, 4)


def test_the_tools_for_caches_know_masks_and_keep_those_of_a_run(tmp_path):
    folder, cache, run = masked_folder(tmp_path / "d"), tmp_path / "cache", tmp_path / "run"
    store = DiskStore(cache, run)
    images = images_of(folder, store, cache_latents=True, center_crop=True)
    entries = [CacheEntry(path, path.stat().st_size, 0) for path in entry_paths(cache)]
    assert {name: group.entries for name, group in kinds(entries, lambda done: None).items()} == {
        "latents": 4, "masks": 4}
    assert not any(fault(entry.path) for entry in entries)
    used = packed_keys(store.use.path.with_suffix(".keys"))
    keys = {bytes(used[i : i + 16]).hex() for i in range(0, len(used), 16)}
    assert {images.masks.key(images.policy.sample(row, seed=3, epoch=0)) for row in images.rows} <= keys


def test_a_resumed_run_sees_the_masks_of_an_uninterrupted_one(tmp_path):
    images = images_of(masked_folder(tmp_path / "d"), cache_latents=True, **GEOMETRIES["buckets"])
    whole = list(batches(images, steps=8))
    resumed = list(batches(images, steps=8, start=5))
    later = [batch for batch in whole if batch.step >= 5]
    assert len(later) == len(resumed)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(later, resumed, strict=True))


def test_ranks_see_the_masks_of_one_process(tmp_path):
    images = images_of(masked_folder(tmp_path / "d"), **GEOMETRIES["centre"])
    whole = {key: mask for batch in batches(images) for key, mask in zip(batch.keys, batch.mask, strict=True)}
    for rank in (0, 1):
        for batch in batches(images, shard=Shard(rank, 2)):
            assert all(torch.equal(whole[key], mask) for key, mask in zip(batch.keys, batch.mask, strict=True))


def test_a_checkpoint_knows_the_masks_and_without_them_is_the_one_of_before(tmp_path):
    folder = masked_folder(tmp_path / "d")
    opt = data_options(instance_data_dir=folder, masked_loss=True)
    rows, plain = rows_of(folder), rows_of(folder, masked_loss=False)
    assert contents(rows) == contents(plain) and masks(plain, opt) is None
    known = {masks(rows, opt), masks(rows, opt.model_copy(update={"unmasked_weight": 0.1})),
             masks(rows, opt.model_copy(update={"normalize_masked_area_loss": True}))}
    grey(*SIZES[0], seed=5).save(folder / "0-masklabel.png")
    assert len(known | {masks(rows_of(folder), opt)}) == 4 and None not in known


# -- which mask is whose -----------------------------------------------------------------------------------------------


def pairs(rows: list[Row]) -> dict[str, str | None]:
    return {row.id: row.mask and Path(str(row.mask.source)).name for row in rows}


def put(folder: Path, *names: str, image: Image.Image | None = None) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = image or Image.new("RGB", (32, 32), (number, 255, 255))
        (whole if path.suffix.lower() not in (".jpg", ".jpeg") else whole.convert("RGB")).save(path)
    return folder


def test_masks_beside_images_belong_to_the_stem(tmp_path, caplog):
    composed, split = unicodedata.normalize("NFC", "é 猫"), unicodedata.normalize("NFD", "é 猫")
    folder = put(tmp_path / "d", "cat.jpg", "dog.png", f"{composed}.png", "lone.png", "cat-masklabel.png",
                 "Dog-MaskLabel.JPG", f"{split}-masklabel.webp", "gone-masklabel.png", "dog-masklabel.bmp")
    rows = rows_of(folder)
    assert pairs(rows) == {"cat.jpg": "cat-masklabel.png", "dog.png": "dog-masklabel.bmp",
                           f"{composed}.png": f"{split}-masklabel.webp", "lone.png": None}
    assert "gone-masklabel.png: a mask, and no image has its name" in caplog.text
    assert "Dog-MaskLabel.JPG: its image has another mask" in caplog.text
    assert rows.account.masks == 3 and "3 masks" in str(rows.account)


@pytest.mark.parametrize("captioned", [False, True])
def test_masks_of_a_folder_have_the_names_of_images(tmp_path, captioned):
    folder = put(tmp_path / "d", "cat.jpg", "dog.png")
    masks = put(tmp_path / "d" / "masks", "cat.png", "dog-masklabel.webp", "sub/lone.png", "other.png")
    rows, problems = read(folder, conditioning_data_dir=masks, masked_loss=False)
    assert not problems and pairs(rows) == {"cat.jpg": "cat.png", "dog.png": "dog-masklabel.webp"}


def test_images_of_subfolders_find_their_masks(tmp_path):
    from trainkit.data.sources.folder import Folder, read_folder
    from trainkit.data.sources.masks import MaskPlace

    folder = put(tmp_path / "d", "a/x.png", "b/x.png", "b/y.png", "b/y-masklabel.png")
    place = put(tmp_path / "d" / "masks", "a/x.png", "y.png", "x.png")
    found = read_folder(Folder(folder, "--train_data_dir", None, captioned=True, masks=MaskPlace(place)))
    assert {one.id: one.mask and one.mask.relative_to(place).as_posix() for one in found.listed} == {
        "a/x.png": "a/x.png", "b/x.png": None, "b/y.png": "y.png"}, "x.png could be of either"
    beside = read_folder(Folder(folder, "--train_data_dir", None, captioned=True, masks=MaskPlace()))
    assert {one.id: one.mask and one.mask.name for one in beside.listed} == {
        "a/x.png": None, "b/x.png": None, "b/y.png": "y-masklabel.png", "masks/a/x.png": None, "masks/x.png": None,
        "masks/y.png": None}


def test_transparency_is_a_mask(tmp_path, caplog):
    folder = put(tmp_path / "d", "opaque.png", "jpeg.jpg")
    image = Image.new("RGBA", (32, 32), "red")
    image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    image.save(folder / "see.png")
    rows = rows_of(folder, alpha_mask=True, masked_loss=False)
    assert {row.id: bool(row.mask) for row in rows} == {"jpeg.jpg": False, "opaque.png": False, "see.png": True}
    assert "2 images without a mask are trained on as a whole" in caplog.text
    weights = sample_of(folder, "see.png", alpha_mask=True)
    assert (weights[0].diff(dim=0) > 0).all() and weights.mean() == pytest.approx(0.5, abs=0.01)


# -- hostile masks -----------------------------------------------------------------------------------------------------


def test_levels_are_read_whatever_the_mode(tmp_path):
    ramp = np.linspace(0, 255, 64).reshape(8, 8).round().astype(np.uint8)
    grey_mask = Image.fromarray(ramp)
    modes = {
        "L": grey_mask, "RGB": grey_mask.convert("RGB"), "P": grey_mask.convert("P"),
        "red": Image.merge("RGB", [grey_mask, Image.new("L", (8, 8), 255), Image.new("L", (8, 8))]),
        "16 bits": Image.fromarray(ramp.astype(np.uint16) * 257),
        "alpha": Image.merge("RGBA", [Image.new("L", (8, 8), 255)] * 3 + [grey_mask]),
        "LA": Image.merge("LA", [Image.new("L", (8, 8), 255), grey_mask]),
    }
    for name, mask in modes.items():
        mask.save(tmp_path / f"{name}.png")
        assert np.array_equal(np.asarray(decode_mask((tmp_path / f"{name}.png").read_bytes())), ramp), name
    grey_mask.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(decode_mask((tmp_path / "bits.png").read_bytes()))) == {0, 255}


def test_a_mask_and_transparency_lie_where_the_image_does(tmp_path):
    image = Image.new("RGBA", (10, 4), (0, 0, 0, 255))
    image.paste((255, 255, 255, 0), (0, 0, 3, 2))
    meta = Image.Exif()
    meta[0x0112] = TURNED
    image.save(tmp_path / "a.png", exif=meta)
    data = (tmp_path / "a.png").read_bytes()
    seen, opacity = np.asarray(decode(data).convert("L")), np.asarray(decode_alpha(data))
    assert seen.shape == opacity.shape == (10, 4) and np.array_equal(seen == 255, opacity == 0)
    assert decode_alpha((put(tmp_path, "b.jpg") / "b.jpg").read_bytes()) is None


@pytest.mark.parametrize(("mask", "image", "other"), [
    ((1, 1), (40, 60), False), ((50, 75), (1000, 1500), False), ((341, 512), (683, 1024), False),
    ((60, 40), (40, 60), True), ((64, 64), (40, 60), True), ((30, 30), (30, 31), False),
    ((512, 512), (512, 540), True)])
def test_a_mask_has_the_shape_of_its_image_within_rounding(mask, image, other):
    assert has_another_shape(mask, image) == other


def refused(folder: Path, said: str, **flags: object) -> Problem:
    rows, problems = read(folder, **flags)
    assert len(problems) == 1 and said in f"{problems[0]}", "\n".join(map(str, problems))
    return problems[0]


def test_masks_that_cannot_be_used_are_one_message_with_all_names(tmp_path):
    folder = put(tmp_path / "d", "a.png", "b.png", "c.png", "c-masklabel.png", image=Image.new("RGB", (32, 48), "red"))
    (folder / "a-masklabel.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("L", (48, 32), 255).save(folder / "b-masklabel.png")
    problem = refused(folder, "2 masks of 3 images cannot be used")
    assert "a.png: its mask cannot be read" in problem.why and "b.png: its mask is 48x32" in problem.why
    assert "turned by 90°" in problem.why
    rows = rows_of(folder, bad_images="skip")
    assert [row.id for row in rows] == ["c.png"]
    assert {one.name for one in rows.account.left_out} == {"a.png", "b.png"}


def test_masks_that_do_nothing_are_named(tmp_path, caplog):
    folder = put(tmp_path / "d", "white.png", "black.png", "one.png", "some.png", image=Image.new("RGB", (32, 32)))
    for name, level in (("white", 255), ("black", 0), ("one", 1), ("some", 100)):
        Image.new("L", (32, 32), level).save(folder / f"{name}-masklabel.png")
    rows_of(folder)
    for name, words in (("white", "white everywhere"), ("black", "black everywhere"), ("one", "almost black")):
        line = next(record.getMessage() for record in caplog.records if words in record.getMessage())
        assert line.endswith(f": {name}.png") and "some" not in line
    only = put(tmp_path / "all", "a.png", "a-masklabel.png", image=Image.new("RGB", (32, 32)))
    refused(only, "all masks are black")
    assert len(rows_of(only, unmasked_weight=0.1)) == 1


def test_a_place_without_any_mask_is_refused(tmp_path):
    folder = put(tmp_path / "d", "cat.jpg")
    assert "cat-masklabel.png" in refused(folder, "no image has a mask").why
    put(folder, "dog-masklabel.png")
    assert "there is dog-masklabel.png, and no image has its name" in refused(folder, "no image has a mask").why
    refused(folder, "there is no such folder", conditioning_data_dir=tmp_path / "nowhere")
    refused(folder, "it holds dog.png, and an image is called cat.jpg",
            conditioning_data_dir=put(tmp_path / "m", "dog.png"))
    refused(folder, "each image would be its own mask", conditioning_data_dir=folder)
    refused(folder, "the images lie in it", conditioning_data_dir=tmp_path)
    refused(folder, "no image has transparency", alpha_mask=True)
    masks_alone = put(tmp_path / "alone", "cat-masklabel.png")
    assert "it holds no other file" in refused(masks_alone, "cat-masklabel.png is a mask", masked_loss=False).why


def test_lines_of_metadata_about_masks_make_no_images_of_them(tmp_path):
    folder = put(tmp_path / "d", "cat.png", "cat-masklabel.png")
    lines = [{"file_name": name, "text": name} for name in ("cat.png", "cat-masklabel.png")]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = rows_of(folder)
    assert [row.caption for row in rows] == ["cat.png"] and rows[0].mask


def test_a_mask_that_changes_after_the_start_is_named(tmp_path):
    images = images_of(masked_folder(tmp_path / "d"))
    grey(*SIZES[0], seed=9).save(tmp_path / "d" / "0-masklabel.png")
    slot = make_order(images.rows, 1, batch_size=1, seed=0).slot(0, 0)
    found = images[slot._replace(row=0)]
    assert "the mask of image 0.png can no longer be read" in f"{found}" and "has changed" in f"{found}"


# -- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "said"), [
    (dict(alpha_mask=True, conditioning_data_dir="m"), ["--alpha_mask with --conditioning_data_dir"]),
    (dict(masked_loss=True, dataset_name="x"), ["--masked_loss with --dataset_name"]),
    (dict(alpha_mask=True, dataset_name="x"), []),
    (dict(masked_loss=True, dist_match=0.1, dist_match_bank=0), ["--dist_match with --masked_loss"]),
    (dict(alpha_mask=True, dist_match_gain=0.1), ["--dist_match_gain with --alpha_mask"]),
    (dict(masked_loss=True, loss_type="fourier"), []),
])
def test_flags_that_contradict_each_other_are_one_message_each(values, said):
    assert [problem.what for problem in rules._unclear_masks(values)] == said


def test_a_weight_outside_of_masks_without_masks_is_told():
    from trainkit.options.inputs import DataOptions

    flags = {flag.name: flag for flag in DataOptions.flags("data")}
    unread = dict(rules.unread({"unmasked_weight": 0.5}, flags))
    assert "--masked_loss" in unread["unmasked_weight"] and "normalize_masked_area_loss" in unread
    assert "unmasked_weight" not in dict(rules.unread({"alpha_mask": True}, flags))


def test_the_log_of_a_run_names_images_without_a_mask_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows_of(half_masked(tmp_path / "d"), repeats=3)
    lines = [record.getMessage() for record in caplog.records if "without a mask" in record.getMessage()]
    assert lines == ["1 image without a mask is trained on as a whole: b.png"]


def test_a_folder_that_is_read_as_a_table_has_no_masks_among_its_images(tmp_path):
    folder = put(tmp_path / "d", "cat.png", "dog.png", "cat-masklabel.png")
    rows, problems = read_rows(data_options(dataset_name=folder, cache_dir=tmp_path / "cache"))
    assert not problems and len(rows) == 2
    assert [one.name for one in rows.account.left_out] == ["cat-masklabel.png"]


def test_a_filled_area_has_the_mean_colour_of_the_rest_and_latents_of_its_own(tmp_path):
    """What the mask leaves out cannot reach the VAE."""
    image = np.full((64, 64, 3), (200, 100, 0), np.uint8)
    image[:, :32] = (255, 0, 255)
    image[:16, 32:] = (100, 100, 200)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0)).save(tmp_path / "a-masklabel.png")
    (tmp_path / "a.txt").write_text("a")
    plain, filled = (rows_of(tmp_path, masked_loss=True, fill_masked_area=fill)[0] for fill in (False, True))
    assert np.array_equal(np.asarray(load_image(plain)), image)
    pixels = np.asarray(load_image(filled))
    assert np.array_equal(pixels[:, 32:], image[:, 32:])
    assert (pixels[:, :32] == (175, 100, 50)).all()  # a quarter of the kept half is blue
    assert filled.pixels_digest != plain.pixels_digest == plain.digest
