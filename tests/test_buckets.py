"""Aspect buckets: which one an image gets, and that a step over several sizes is the mean over its images."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.images import data_options, marked, row_of
from trainkit.data import buckets
from trainkit.data.batch import Row, Slot
from trainkit.data.buckets import bucket_sizes, by_log_ratio, by_ratio, nearest, not_enlarged, not_enlarged_by_kohya
from trainkit.data.cache import cache_latents, content_key
from trainkit.data.geometry import CropPolicy, cut_away, resized_size
from trainkit.data.loader import Images, micro_batches, ready_images
from trainkit.data.rows import read_rows
from trainkit.data.sampler import BucketOrder, Order, Shard, make_order
from trainkit.families import sdxl
from trainkit.options import DataOptions, rules
from trainkit.plan.phases import largest
from trainkit.run_fingerprint import contents, several_sizes

ALIKE = dict(deadline=None, database=None, derandomize=True, print_blob=False,
             suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
some, many = settings(max_examples=25, **ALIKE), settings(max_examples=100, **ALIKE)
SIDES = st.integers(1, 9000)
MEGAPIXEL = 1024 * 1024


# -- the buckets, and the one of an image -----------------------------------------------------------------------------


def for_1024(longest: int) -> list[tuple[int, int]]:
    return bucket_sizes(MEGAPIXEL, shortest=256, longest=longest, step=64)


@pytest.mark.parametrize("longest, count", [(1024, 25), (1536, 29), (2048, 41)])
def test_the_list_is_that_of_kohyas_trainers(longest, count):
    """Counted by running theirs at 1024x1024, min_bucket_reso 256, bucket_reso_steps 64."""
    found = for_1024(longest)
    assert len(found) == len(set(found)) == count and (1024, 1024) in found
    assert all(h % 64 == w % 64 == 0 and h * w <= MEGAPIXEL and min(h, w) >= 256 and max(h, w) <= longest
               for h, w in found)
    assert {(w, h) for h, w in found} == set(found), "wide and tall"


@pytest.mark.parametrize("size, longest, expected", [  # h, w
    ((1000, 1500), 2048, (832, 1216)), ((1500, 1000), 2048, (1216, 832)), ((1080, 1920), 2048, (768, 1344)),
    ((1000, 1500), 1024, (704, 1024)), ((700, 701), 2048, (1024, 1024)), ((896, 1152), 2048, (896, 1152)),
])
def test_an_image_gets_the_bucket_of_its_shape(size, longest, expected):
    for distance in (by_log_ratio, by_ratio):
        assert nearest(size, buckets=for_1024(longest), distance=distance) == expected


def test_kohya_chooses_by_the_difference_of_the_ratios_and_treats_wide_and_tall_differently():
    found = for_1024(2048)

    def by(distance: buckets.Distance, h: int, w: int) -> tuple[int, int]:
        return nearest((h, w), buckets=found, distance=distance)

    assert (by(by_log_ratio, 1000, 1560), by(by_log_ratio, 1560, 1000)) == ((832, 1216), (1216, 832))
    assert (by(by_ratio, 1000, 1560), by(by_ratio, 1560, 1000)) == ((832, 1216), (1280, 768))
    differ = [(h, 1000) for h in range(200, 5000, 7) if by(by_ratio, h, 1000) != by(by_ratio, 1000, h)[::-1]]
    assert differ and not [1 for h in range(200, 5000, 7)
                           if by(by_log_ratio, h, 1000) != by(by_log_ratio, 1000, h)[::-1]]


@many
@given(h=SIDES, w=SIDES)
def test_an_image_that_is_never_enlarged_gets_no_more_than_it_has(h, w):
    for shrink in (not_enlarged, not_enlarged_by_kohya):
        height, width = shrink((h, w), pixels=MEGAPIXEL, step=64)
        assert height % 64 == width % 64 == 0
        if max(h, w) <= 50 * min(h, w) and min(height, width):  # else no such image is read, or it is refused
            assert height <= h and width <= w and height * width <= 1.05 * MEGAPIXEL
            assert cut_away((h, w), (height, width)) < 64 / min(height, width)


@pytest.mark.parametrize("size, ours, kohyas", [
    ((2000, 3000), (832, 1216), (832, 1216)), ((1536, 1536), (1024, 1024), (1024, 1024)),
    ((500, 700), (448, 640), (448, 640)), ((63, 500), (0, 448), (0, 448)),
])
def test_sizes_of_images_that_are_not_enlarged(size, ours, kohyas):
    assert not_enlarged(size, pixels=MEGAPIXEL, step=64) == ours
    assert not_enlarged_by_kohya(size, pixels=MEGAPIXEL, step=64) == kohyas


@many
@given(h=SIDES, w=SIDES, height=st.integers(1, 2048), width=st.integers(1, 2048))
def test_a_resized_image_just_covers_what_is_cut_out_of_it(h, w, height, width):
    resized = resized_size((h, w), (height, width))
    assert resized[0] >= height and resized[1] >= width and (resized[0] == height or resized[1] == width)
    seen = height * width / (resized[0] * resized[1])
    assert cut_away((h, w), (height, width)) == pytest.approx(1 - seen, abs=1.5 / min(resized))


# -- from options to rows ---------------------------------------------------------------------------------------------


def options(**flags: object) -> DataOptions:
    defaults = dict(resolution=64, enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
    return data_options(**{**defaults, **flags})


def folder_of(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, (h, w) in enumerate(sizes):
        marked(i, h, w).save(folder / f"{i:02}.png")
    return folder


def cuts(folder: Path, **flags: object) -> list[tuple[int, int] | None]:
    rows, problems = read_rows(options(instance_data_dir=folder, **flags))
    assert not problems
    return [row.cut for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "d", [(64, 64), (60, 120), (120, 60), (50, 200)])


def test_every_image_is_cut_to_its_bucket_for_each_of_its_uses(folder):
    assert cuts(folder, enable_bucket=False) == [None] * 4
    found = cuts(folder)
    assert found == [(64, 64), (48, 80), (80, 48), (32, 128)]
    assert cuts(folder, repeats=2) == [size for size in found for _ in range(2)]


def test_with_several_resolutions_an_image_is_seen_at_each_in_every_epoch(folder):
    rows, _ = read_rows(options(instance_data_dir=folder, resolutions="32,64", enable_bucket=False, repeats=2))
    assert [(row.repeat, row.cut) for row in rows[:4]] == [(0, (32, 32)), (1, (32, 32)), (2, (64, 64)), (3, (64, 64))]
    assert len(rows) == 16 and rows.account.images == 4
    rows, _ = read_rows(options(instance_data_dir=folder, resolutions="32,64", min_bucket_reso=16))
    assert len(rows) == 8 and len({row.cut for row in rows}) > 4


def test_compat_kohya_chooses_as_kohya_does(tmp_path):
    folder = folder_of(tmp_path / "d", [(156, 100)])
    large = dict(instance_data_dir=folder, resolution=1024, min_bucket_reso=256, max_bucket_reso=2048,
                 bucket_reso_steps=64)
    for compat, expected in ((None, (1216, 832)), ("diffusers", (1216, 832)), ("kohya", (1280, 768))):
        rows, _ = read_rows(options(**large), compat=compat)
        assert [row.cut for row in rows] == [expected]


@pytest.mark.parametrize("given, compat, limit", [
    (dict(resolution=1024), None, 2048), (dict(resolution=512), None, 1024), (dict(resolution=1024), "diffusers", 2048),
    (dict(resolution="640,1024"), None, 2048), (dict(resolutions="768,512"), None, 1536),
    (dict(resolution=1024), "kohya", 1024), (dict(resolution=512), "kohya", 1024),
    (dict(resolution=1024, max_bucket_reso=1536), "kohya", 1536),
])
def test_the_longest_side_of_a_bucket_goes_with_the_resolution(given, compat, limit):
    opt = options(**{"max_bucket_reso": None, "min_bucket_reso": 256, "bucket_reso_steps": 64, **given})
    assert opt.longest_side(compat) == limit
    sizes = {size for h, w in opt.sizes for size in buckets.buckets_of(opt, h * w, compat)}
    assert max(map(max, sizes)) <= limit and max(map(math.prod, sizes)) <= math.prod(largest(opt)), (
        "what is planned has room for every bucket")


def test_a_photo_of_three_to_two_keeps_its_pixels_unless_kohyas_buckets_are_asked_for(tmp_path, caplog):
    folder = folder_of(tmp_path / "d", [(100, 150)])
    large = options(instance_data_dir=folder, resolution=1024, min_bucket_reso=256, max_bucket_reso=None,
                    bucket_reso_steps=64)
    for compat, cut, said in ((None, (832, 1216), False), ("kohya", (704, 1024), True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows, _ = read_rows(large, compat=compat)
        assert [row.cut for row in rows] == [cut] and ("69 % of them; --max_bucket_reso 2048" in caplog.text) == said


def test_a_resolution_may_be_width_and_height(folder):
    assert [options(resolution=given).resolution for given in ("96,64", "96x64", [96, 64], "64,64", 64, "64")] == [
        "96,64", "96,64", "96,64", 64, 64, 64]
    policy = CropPolicy.from_options(options(resolution="96,64", enable_bucket=False))
    sample = policy.sample(row_of(folder / "01.png"), seed=0, epoch=0)
    assert (sample.shape, sample.resized) == ((64, 96), (64, 128))
    for wrong in ("0", "-64", "64,64,64", "a", "", "64.5", True):
        with pytest.raises(ValueError, match="resolution"):
            options(resolution=wrong)


def test_a_step_above_the_resolution_is_left_to_the_options_to_refuse(folder):
    opt = options(instance_data_dir=folder, resolution=32, bucket_reso_steps=64)
    rows, found = read_rows(opt)
    assert len(rows) == 4 and not found and len([*rules.problems(opt.model_dump())]) == 1


def test_an_image_smaller_than_the_smallest_bucket_is_refused_where_none_is_enlarged(tmp_path):
    folder = folder_of(tmp_path / "d", [(64, 64), (15, 100), (100, 12)])
    rows, [problem] = read_rows(options(instance_data_dir=folder, bucket_no_upscale=True))
    assert "2 of 3 images" in problem.what and "01.png, 100x15" in problem.why and "02.png, 12x100" in problem.why
    assert problem.kind == "data" and "bucket_no_upscale" in problem.fix
    assert not read_rows(options(instance_data_dir=folder))[1], "else it is enlarged"


# -- what the network is given ----------------------------------------------------------------------------------------


def corner(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder that keeps the first pixel of each block of 8, in levels."""
    mean = (pixels[:, :, ::8, ::8] + 1) * 127.5
    return mean, mean


@pytest.mark.parametrize("flags", [dict(center_crop=True), dict(random_flip=True, cached_crops=2)])
def test_sizes_and_corners_are_the_true_ones_and_cached_latents_those_of_the_pixels(folder, flags):
    opt = options(instance_data_dir=folder, image_interpolation_mode="nearest", cache_latents=True, repeats=3, **flags)
    rows, _ = read_rows(opt)
    policy = CropPolicy.from_options(opt)
    latents = cache_latents(rows, policy, corner, {}, seed=5, identity="corner")
    order = make_order(rows, 4, batch_size=4, seed=1)
    batches = [[batch for _, some in micro_batches(Images(rows, policy, seed=5, latents=kept), order, stop_step=9)
                for batch in some] for kept in (None, latents)]
    shapes = Counter(batch.pixels.shape[2:] for batch in batches[0])
    assert len(shapes) == 4
    for live, kept in zip(*batches, strict=True):
        assert torch.equal(corner(live.pixels)[0], kept.mean) and torch.equal(live.time_ids, kept.time_ids)
        for row, sizes, pixels in zip(live.rows, live.time_ids.long().tolist(), live.pixels, strict=True):
            assert sizes[:2] == [*rows[row].size] and sizes[4:] == [*rows[row].cut] == [*pixels.shape[1:]]
            resized = resized_size(rows[row].size, rows[row].cut)
            assert sizes[2] <= resized[0] - sizes[4] and sizes[3] <= resized[1] - sizes[5]
            line, scale = (pixels[2, 0, 0].item() + 1) * 127.5, rows[row].size[0] / resized[0]
            assert line == pytest.approx((sizes[2] + 0.5) * scale, abs=1), "the first line is the one it says"


# -- the order --------------------------------------------------------------------------------------------------------

CUTS = [None, (64, 64), (48, 80), (80, 48), (32, 128)]


def rows_of(counts: Sequence[int], *, is_class: bool = False) -> list[Row]:
    """So many rows of each size."""
    name = "class/" if is_class else ""
    return [Row(f"{name}{k}-{i}", Path("a"), f"prompt {i % 3}", (64, 64), f"{name}{k}-{i}", cut=CUTS[1 + k],
                loss_weight=0.25 if is_class else 1.0, is_class=is_class)
            for k, count in enumerate(counts) for i in range(count)]


COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(lambda counts: sum(map(bool, counts)) > 1)
CLASSES = st.one_of(st.just([]), st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
SPLITS = dict(world=st.sampled_from([1, 2, 3, 8]), accumulation=st.integers(1, 3), size=st.integers(1, 8))


def shards(world: int, accumulation: int) -> list[Shard]:
    return [Shard(rank, world, accumulation) for rank in range(world)]


@many
@given(counts=COUNTS, classes=CLASSES, **SPLITS, epoch=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_every_row_is_seen_exactly_once_an_epoch(counts, classes, world, accumulation, size, epoch, seed):
    rows, batch = [*rows_of(counts), *rows_of(classes, is_class=True)], world * accumulation * size
    order = BucketOrder(rows, batch, batch_size=size, seed=seed)
    for stream, first, count in ((0, 0, sum(counts)), (1, sum(counts), sum(classes)))[: 1 + bool(sum(classes))]:
        places = range(epoch * count, (epoch + 1) * count)
        slots = [order.slot(place // batch, stream * batch + place % batch) for place in places]
        assert sorted(slot.row for slot in slots) == [*range(first, first + count)]
        assert {slot.visit for slot in slots} == {epoch}


@many
@given(counts=COUNTS, classes=CLASSES, **SPLITS, step=st.integers(0, 200))
def test_any_split_fills_each_place_of_a_step_once_and_ranks_have_equally_many_batches_of_one_size(
        counts, classes, world, accumulation, size, step):
    rows, batch = [*rows_of(counts), *rows_of(classes, is_class=True)], world * accumulation * size
    order, streams = BucketOrder(rows, batch, batch_size=size, seed=3), 1 + bool(classes)
    micros = [micro for shard in shards(world, accumulation) for micro in order.slots(step, shard)]
    counted = [slot for micro in micros for slot in micro if slot.counts]
    assert sorted(counted) == [order.slot(step, place) for place in range(batch * streams)]
    assert {slot.num_instance for slot in counted} == {batch}
    assert len({order.micro_batches(step, shard) for shard in shards(world, accumulation)}) == 1
    for micro in micros:
        assert len({rows[slot.row].cut for slot in micro}) == 1 and len({slot.counts for slot in micro}) == 1
        assert 1 <= len(micro) <= size * streams
        assert [rows[slot.row].is_class for slot in micro] == sorted(rows[slot.row].is_class for slot in micro)
    assert sum(not slot.counts for micro in micros for slot in micro) < world


@many
@given(counts=COUNTS, size=st.integers(1, 8), epochs=st.integers(1, 6))
def test_full_batches_of_one_size_stay_together(counts, size, epochs):
    """In an epoch there are at most as many batches as kohya's trainers make, one more for each cut of what is left."""
    order = BucketOrder(rows_of(counts), size, batch_size=size, seed=0)
    steps = math.ceil(sum(counts) * epochs / size)
    batches = sum(order.micro_batches(step) for step in range(steps))
    kohyas = sum(math.ceil(count / size) for count in counts)
    cuts = math.ceil(sum(count % size for count in counts) / size) + 1
    assert batches <= (kohyas + cuts) * epochs + len(counts)


def test_an_epoch_is_shuffled_by_seed_and_number():
    rows = rows_of([20, 20, 5])

    def order(seed: int, epoch: int) -> list[int]:
        return BucketOrder(rows, 4, batch_size=4, seed=seed).shuffle(0, epoch)

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1)
    assert [rows[row].cut for row in order(0, 0)] != sorted(rows[row].cut for row in order(0, 0)), "sizes are mixed"


def test_rows_of_one_size_keep_the_order_that_they_have_without_buckets():
    rows = rows_of([0, 7])
    assert type(make_order(rows, 4, batch_size=2, seed=0)) is Order
    assert type(make_order(rows_of([1, 1]), 4, batch_size=2, seed=0)) is BucketOrder
    assert type(make_order([*rows, *rows_of([1], is_class=True)], 4, batch_size=2, seed=0)) is BucketOrder


# -- one gradient -----------------------------------------------------------------------------------------------------


class Drawn:
    """Images made of their names, at the size of their rows."""

    def __init__(self, rows: Sequence[Row], seed: int = 0):
        self.rows, self.policy = rows, CropPolicy(resolution=64, center_crop=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, slot: Slot):
        row = self.rows[slot.row]
        pixels = torch.randn(3, *row.cut, generator=torch.Generator().manual_seed(slot.row)) / 3
        return replace(self.policy.sample(row, seed=0, epoch=slot.visit), slot=slot, pixels=pixels)


def loss(net: nn.Module, pixels: Tensor) -> Tensor:
    return ((net(pixels) - pixels) ** 2).flatten(1).mean(1)  # [B]


def network() -> nn.Conv2d:
    net = nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return net


def gradient(net: nn.Module, rows: Sequence[Row], order: Order, ranks: Sequence[Shard], step: int) -> Tensor:
    """Of all ranks together, as the trainers add it up."""
    net.zero_grad()
    for shard in ranks:
        for _, micros in micro_batches(Drawn(rows), order, shard, start_step=step, stop_step=step + 1):
            for batch in micros:
                ((loss(net, batch.pixels) * batch.loss_weight).sum() / batch.num_instance).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def gradient_of(net: nn.Module, row: Row, place: int) -> Tensor:
    """Of one image alone."""
    pixels = Drawn([*[row] * (place + 1)])[Slot((0, 0, 0), place, 0, 1)].pixels
    parts = torch.autograd.grad(loss(net, pixels[None]).sum(), [*net.parameters()])
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("world, accumulation, size", [(1, 1, 5), (1, 5, 1), (5, 1, 1)])
def test_the_gradient_of_5_images_in_3_buckets_is_the_mean_of_their_gradients(world, accumulation, size):
    rows, net = rows_of([2, 1, 2]), network()
    order = BucketOrder(rows, 5, batch_size=size, seed=0)
    found = gradient(net, rows, order, shards(world, accumulation), 0)
    wanted = torch.stack([gradient_of(net, row, place) for place, row in enumerate(rows)]).mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@some
@given(counts=COUNTS, classes=CLASSES, **SPLITS, step=st.integers(0, 30))
def test_the_gradient_is_the_mean_over_instances_plus_the_weighted_mean_over_class_images_on_any_split(
        counts, classes, world, accumulation, size, step):
    rows, net = [*rows_of(counts), *rows_of(classes, is_class=True)], network()
    batch = world * accumulation * size
    order = BucketOrder(rows, batch, batch_size=size, seed=0)
    found = gradient(net, rows, order, shards(world, accumulation), step)
    slots = [order.slot(step, place) for place in range(batch * len(order.streams))]
    single = {row: gradient_of(net, rows[row], row) for row in {slot.row for slot in slots}}
    wanted = sum(single[slot.row] * rows[slot.row].loss_weight for slot in slots) / batch
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(num_workers):
    rows = rows_of([5, 3, 2])

    def keys(start: int) -> list[tuple[int, list[tuple[object, ...]]]]:
        order = BucketOrder(rows, 6, batch_size=3, seed=0)
        return [(step, [batch.keys for batch in some]) for step, some in micro_batches(
            Drawn(rows), order, Shard(0, 2, 1), start_step=start, stop_step=9, num_workers=num_workers)]

    assert keys(0)[4:] == keys(4)


@pytest.mark.parametrize("bucketed, said", [
    (False, "3 images lose more than 15 % of the area in each square crop: 03.png 75 %, 01.png 50 %, 02.png 50 %. "
            "--enable_bucket keeps the shape"),
    (True, None)])
def test_images_that_lose_much_of_their_area_are_named_with_the_flag_that_keeps_it(folder, caplog, bucketed, said):
    with caplog.at_level(logging.WARNING):
        read_rows(options(instance_data_dir=folder, enable_bucket=bucketed, min_bucket_reso=16, bucket_reso_steps=8))
    found = [record.getMessage() for record in caplog.records if "of the area" in record.getMessage()]
    assert not found if said is None else len(found) == 1 and found[0].startswith(said)


@pytest.mark.parametrize("sides, limits, advice", [
    ((20, 72), (64, 128), "--min_bucket_reso 32 allows narrower buckets; to choose what stays, crop it yourself"),
    ((20, 144), (16, 96), "--max_bucket_reso 192 allows longer buckets; to choose what stays, crop it yourself"),
    ((20, 144), (16, 512), "Crop it yourself")])
def test_an_image_that_no_bucket_is_narrow_enough_for_is_named_with_the_flag_that_allows_one(
        tmp_path, caplog, sides, limits, advice):
    folder = folder_of(tmp_path / "d", [(64, 64), sides])
    with caplog.at_level(logging.WARNING):
        read_rows(options(instance_data_dir=folder, min_bucket_reso=limits[0], max_bucket_reso=limits[1]))
    told = [r.getMessage() for r in caplog.records if "of the area" in r.getMessage()]
    assert len(told) == 1 and told[0].endswith(f" %. {advice}")


def test_images_that_have_many_fewer_pixels_than_asked_for_are_told(tmp_path, caplog):
    folder = folder_of(tmp_path / "d", [(64, 64), (50, 200)])
    opt = options(instance_data_dir=folder, max_bucket_reso=64)
    with caplog.at_level(logging.WARNING):
        read_rows(opt)
    assert "--max_bucket_reso 64: 1 of 2 images" in caplog.text and "--max_bucket_reso 128" in caplog.text



def test_the_steps_of_buckets_must_fit_the_model(tiny_sdxl):
    """Strides of 4 in its VAE and 4 in its UNet."""
    problem, = sdxl.problems(str(tiny_sdxl), resolution="96,64", sides={"bucket_reso_steps": 24})
    assert (problem.where, problem.fix) == ("--bucket_reso_steps 24", "--bucket_reso_steps 32")
    problem, = sdxl.problems(str(tiny_sdxl), resolution="96,70", sides={"bucket_reso_steps": 16})
    assert (problem.where, problem.fix) == ("--resolution 96,70", "--resolution 96,64")
    assert sdxl.latents(str(tiny_sdxl), "96,64") == (4, 16, 24)


def test_losses_are_checked_at_the_smallest_size_that_the_options_allow():
    assert buckets.smallest(options(enable_bucket=False, resolution="96,64")) == (64, 96)
    assert buckets.smallest(options()) == (32, 32)
    assert buckets.smallest(options(bucket_no_upscale=True)) == (16, 16)
    assert buckets.smallest(options(enable_bucket=False, resolutions="128,48")) == (48, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_latents_are_kept_in_the_format_asked_for_and_read_in_fp32(folder, dtype):
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    opt = options(instance_data_dir=folder, cache_latents=True, latent_dtype=name)
    family = SimpleNamespace(encode_pixels=corner, latents_identity="corner", vae_batch_size=3)
    rows, store = read_rows(opt)[0], {}
    images = ready_images(rows, opt, family, store, seed=0)
    assert {entry["mean"].dtype for entry in store.values()} == {dtype}
    assert images[make_order(rows, 1, batch_size=1, seed=0).slot(0, 0)].mean.dtype == torch.float32


def test_a_checkpoint_knows_the_sizes_and_without_them_is_the_one_of_before():
    rows = rows_of([2, 1])
    plain = [replace(row, cut=None) for row in rows]
    assert contents(rows) != contents([replace(row, cut=(64, 64)) for row in rows]) != contents(plain)
    assert contents(plain) == content_key(*[(row.id, row.digest, row.caption, 0) for row in rows])
    assert several_sizes(rows) and not several_sizes(plain)
