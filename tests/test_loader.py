"""What belongs together stays together, and batches do not depend on workers, ranks or restarts."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.images import data_options, marked, marked_folder, open_files, row_of
from trainkit.data.batch import Batch, Row, Sample, Slot, collate
from trainkit.data.cache import DiskStore, cache_latents
from trainkit.data.geometry import CropPolicy
from trainkit.data.loader import Images, micro_batches
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Order, Shard
from trainkit.errors import Problem, UserError

POLICY = CropPolicy(resolution=32, random_flip=True, cached_crops=3, interpolation="nearest")


def corner(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder that keeps the first pixel, in levels: (number, column, line) of its image."""
    mean = (pixels[:, :, :1, :1] + 1) * 127.5
    return mean, mean


def images_of(folder: Path, *, cached: bool, repeats: int = 1, policy: CropPolicy = POLICY) -> Images:
    rows, problems = read_rows(data_options(instance_data_dir=folder, repeats=repeats))
    assert not problems
    latents = cache_latents(rows, policy, corner, {}, seed=5, identity="corner") if cached else None
    return Images(rows, policy, seed=5, latents=latents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return marked_folder(tmp_path_factory.mktemp("data") / "d", 25)


def slots_of(batch: Batch, order: Order) -> list[Slot]:
    """The slots that a batch was made for, found by its keys."""
    return [order.slot(step, index) for _, step, index in batch.keys]


def assert_belongs_together(batch: Batch, i: int, marker: Tensor, images: Images, order: Order) -> None:
    """`marker`: number, column and line of the first pixel; check caption, sizes and crop against them."""
    number, column, line = marker.round().long().tolist()
    h, w = (32, 33 + number) if number % 2 else (33 + number, 32)
    key, place, epoch, num_instance, _ = slots_of(batch, order)[i]
    assert (batch.keys[i], batch.rows[i], batch.num_instance) == (key, place, num_instance)
    row = images.rows[place]
    flip = images.policy.sample(row, seed=5, epoch=epoch).flip
    _, _, top, left, *target = batch.time_ids[i].long().tolist()
    assert batch.prompts[i] == row.caption == f"image {number}" and batch.images[i] == row.digest
    assert batch.time_ids[i, :2].tolist() == [h, w] and target == [32, 32]
    assert (line, column) == (top, w - 1 - left if flip else left)


@pytest.mark.parametrize("cached", [False, True])
def test_latent_caption_size_and_crop_belong_together_over_1000_shuffled_samples(folder: Path, cached: bool) -> None:
    images = images_of(folder, cached=cached, repeats=2)
    order, seen = Order(images.rows, 20, seed=1), 0
    for _, micros in micro_batches(images, order, Shard(accumulation=2), stop_step=50):
        for batch in micros:
            markers = batch.mean[:, :, 0, 0] if cached else (batch.pixels[:, :, 0, 0] + 1) * 127.5
            assert (batch.pixels is None) == cached and batch.num_instance == 20
            for i, marker in enumerate(markers):
                assert_belongs_together(batch, i, marker, images, order)
                seen += 1
    assert seen == 1000


# ------------------------------------------------------------------------------------------------------- class images


def class_rows(folder: Path, n: int) -> list[Row]:
    """Class images numbered from 100 on, of shapes no instance has; every other one has a caption of its own."""
    folder.mkdir()
    rows = []
    for number in range(100, 100 + n):
        path = folder / f"{number}.png"
        marked(number, 40, number).save(path)
        rows.append(row_of(path, caption=f"image {number}" if number % 2 else "a photo of a cat"))
    return [replace(row, id=f"class/{row.id}", is_class=True, loss_weight=0.25) for row in rows]


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return [*images_of(folder, cached=False).rows, *class_rows(tmp_path_factory.mktemp("data") / "class", 7)]


@pytest.mark.parametrize("cached", [False, True])
def test_prompt_size_share_and_pixels_of_every_slot_belong_together_beside_class_images_d3(
    mixed: list[Row], cached: bool
) -> None:
    latents = cache_latents(mixed, POLICY, corner, {}, seed=5, identity="corner") if cached else None
    images, order, seen = Images(mixed, POLICY, seed=5, latents=latents), Order(mixed, 2, seed=1), []
    for step, [batch] in micro_batches(images, order, stop_step=60):
        assert batch.step == step and batch.num_instance == 2
        assert batch.is_class.tolist() == [False, False, True, True]
        assert batch.loss_weight.tolist() == [1.0, 1.0, 0.25, 0.25]
        markers = batch.mean[:, :, 0, 0] if cached else (batch.pixels[:, :, 0, 0] + 1) * 127.5
        for i in (0, 1):
            assert_belongs_together(batch, i, markers[i], images, order)
        for i in (2, 3):
            number = markers[i, 0].round().int().item()
            assert batch.prompts[i] == (f"image {number}" if number % 2 else "a photo of a cat")
            assert batch.time_ids[i, :2].tolist() == [40, number]
            seen.append(number)
    assert set(seen) == set(range(100, 107))


def test_class_images_leave_the_samples_and_draws_of_the_instances_as_they_are(mixed: list[Row]) -> None:
    instances = [row for row in mixed if not row.is_class]
    orders = [Order(rows, 4, seed=1) for rows in (instances, mixed)]
    off, on = (micro_batches(Images(rows, POLICY, seed=5), order, Shard(accumulation=2), stop_step=8)
               for rows, order in zip((instances, mixed), orders, strict=True))
    for (_, some), (_, others) in zip(off, on, strict=True):
        for one, other in zip(some, others, strict=True):
            assert slots_of(one, orders[0]) == slots_of(other, orders[1])[:2]
            assert one.rows == other.rows[:2] and one.prompts == other.prompts[:2]
            assert torch.equal(one.pixels, other.pixels[:2]) and torch.equal(one.time_ids, other.time_ids[:2])
            assert one.keys == other.keys[:2] and not set(one.keys) & set(other.keys[2:])


def test_the_gradient_is_the_mean_over_instances_plus_the_weighted_mean_over_class_images(mixed: list[Row]) -> None:
    net = nn.Conv2d(3, 3, 1)
    nn.init.eye_(net.weight.data[:, :, 0, 0]).mul_(0.5)
    images, order = Images(mixed, POLICY, seed=5), Order(mixed, 6, seed=1)

    def loss(pixels: Tensor) -> Tensor:
        return ((net(pixels) - pixels) ** 2).flatten(1).mean(1)  # [B]

    (_, [whole]), = micro_batches(images, order, stop_step=1)
    by_hand = loss(whole.pixels[:6]).sum() / 6 + 0.25 * loss(whole.pixels[6:]).sum() / 6
    wanted, = torch.autograd.grad(by_hand, [net.weight])
    for world, accumulation in ((1, 1), (1, 3), (2, 1), (3, 2)):
        net.zero_grad()
        for rank in range(world):
            (_, micros), = micro_batches(images, order, Shard(rank, world, accumulation), stop_step=1)
            for batch in micros:
                ((loss(batch.pixels) * batch.loss_weight).sum() / batch.num_instance).backward()
        torch.testing.assert_close(net.weight.grad, wanted)


# ----------------------------------------------------------------------------------------------- steps, workers, ranks


def test_the_loss_divisor_is_what_the_order_counts_in_each_step(folder: Path) -> None:
    class Uneven(Order):
        def slot(self, step: int, index: int) -> Slot:
            return super().slot(step, index)._replace(num_instance=3 + step)

    images = images_of(folder, cached=True)
    steps = micro_batches(images, Uneven(images.rows, 4, seed=1), Shard(accumulation=2), stop_step=3)
    assert [[batch.num_instance for batch in micros] for _, micros in steps] == [[3, 3], [4, 4], [5, 5]]


def same(a: Batch | Sample, b: Batch | Sample) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("cached", [False, True])
def test_workers_change_nothing(folder: Path, cached: bool) -> None:
    images = images_of(folder, cached=cached)
    order = Order(images.rows, 4, seed=1)
    alone, helped = (list(micro_batches(images, order, Shard(accumulation=2), stop_step=8, num_workers=n))
                     for n in (0, 2))
    assert [step for step, _ in alone] == [step for step, _ in helped] == list(range(8))
    for (_, some), (_, others) in zip(alone, helped, strict=True):
        assert len(some) == len(others) == 2 and all(map(same, some, others))


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(folder: Path) -> None:
    images = images_of(folder, cached=False)

    def batches(start_step: int) -> list[tuple[int, Batch]]:
        order = Order(images.rows, 4, seed=1)
        steps = micro_batches(images, order, Shard(accumulation=2), start_step=start_step, stop_step=12)
        return [(step, batch) for step, micros in steps for batch in micros]

    whole = batches(0)
    for k in (1, 7):
        rest = batches(k)
        assert [step for step, _ in rest] == [step for step in range(k, 12) for _ in range(2)]
        assert all(same(a, b) for (_, a), (_, b) in zip(whole[2 * k:], rest, strict=True))


def test_two_processes_share_one_global_batch(folder: Path) -> None:
    images = images_of(folder, cached=True)
    order = Order(images.rows, 8, seed=1)
    alone = micro_batches(images, order, stop_step=6)
    ranks = [micro_batches(images, order, Shard(rank, world=2), stop_step=6) for rank in range(2)]
    for (_, [one]), *halves in zip(alone, *ranks, strict=True):
        assert slots_of(one, order) == [s for _, [half] in halves for s in slots_of(half, order)]
        assert one.rows == tuple(row for _, [half] in halves for row in half.rows)
        assert torch.equal(one.mean, torch.cat([half.mean for _, [half] in halves]))
        assert one.keys == tuple(key for _, [half] in halves for key in half.keys)
        assert {half.num_instance for _, [half] in halves} == {one.num_instance}


def test_without_a_last_step_it_never_ends(folder: Path) -> None:
    images = images_of(folder, cached=True)
    order = Order(images.rows, 5, seed=1)
    steps = islice(micro_batches(images, order, start_step=95), 10)
    seen = [(step, batch.rows[0], *slots_of(batch, order)[0][1:3]) for step, [batch] in steps]
    assert [(step, epoch) for step, _, _, epoch in seen] == [(step, step // 5) for step in range(95, 105)]
    assert all(row == place for _, row, place, _ in seen)


def test_the_global_generator_does_not_move(folder: Path) -> None:
    images = images_of(folder, cached=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(micro_batches(images, Order(images.rows, 4, seed=1), stop_step=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_image_that_vanishes_is_a_user_error_from_any_worker(tmp_path: Path, num_workers: int) -> None:
    images = images_of(marked_folder(tmp_path / "d", 4), cached=False)
    (tmp_path / "d" / "002.png").unlink()
    with pytest.raises(UserError, match=r"002\.png") as caught:
        list(micro_batches(images, Order(images.rows, 2, seed=1), stop_step=4, num_workers=num_workers))
    assert caught.value.exit_code == 3 and caught.value.problems[0].fix


@pytest.mark.parametrize("cached", [False, True])
def test_an_unreadable_image_is_an_item_of_the_data_set_with_all_it_says(tmp_path: Path, cached: bool) -> None:
    """A worker of a DataLoader would raise it again with its text alone, and lose kind and parts."""
    images = images_of(marked_folder(tmp_path / "d", 3), cached=cached)
    if cached:
        images.latents.store = DiskStore(tmp_path / "cache")  # an empty one: every entry is gone
    else:
        (tmp_path / "d" / "001.png").write_bytes(b"no image")
    item = images[Slot((1, 0, 0), 1, 0, 3)]
    assert isinstance(item, UserError) and item.problems[0].kind == ("disk" if cached else "data")
    assert ("a cache entry is gone" if cached else "001.png") in item.problems[0].what and item.problems[0].fix
    assert cached or isinstance(images[Slot((1, 0, 0), 2, 0, 3)], Sample), "the others can be read"


def test_images_reach_spawned_workers(folder: Path) -> None:
    images = images_of(folder, cached=False)
    slot, = Order(images.rows, 1, seed=1).slots(0)[0]
    assert same(pickle.loads(pickle.dumps(images))[slot], images[slot])


def test_files_are_closed_after_each_visit(folder: Path) -> None:
    images = images_of(folder, cached=False)
    before = open_files()
    list(micro_batches(images, Order(images.rows, 5, seed=1), stop_step=10))
    assert open_files() == before


# ------------------------------------------------------------------------------------------------------------- collate


def a_sample(place: int, **changes: object) -> Sample:
    """A sample with latents of 1 channel and 2x3 places, of a row 50 high and 40 + place wide."""
    row = Row(f"{place}.png", Path(f"{place}.png"), f"image {place}", (50, 40 + place), f"digest {place}")
    latent = torch.full((1, 2, 3), float(place))
    slot = Slot((7, 4, place), place, 0, 6)
    sample = Sample(row, (40, 32), top=place, left=2, flip=False, shape=(32, 24), slot=slot, prompt=row.caption,
                    mean=latent, logvar=-latent)
    return replace(sample, **changes)


def test_a_batch_holds_in_one_order_what_its_samples_hold() -> None:
    batch = collate([a_sample(3), a_sample(1)])
    assert (batch.step, batch.keys, batch.rows) == (4, ((7, 4, 3), (7, 4, 1)), (3, 1))
    assert (batch.prompts, batch.images) == (("image 3", "image 1"), ("digest 3", "digest 1"))
    assert batch.num_instance == 6
    assert torch.equal(batch.mean, torch.tensor([3.0, 1.0])[:, None, None, None].expand(2, 1, 2, 3))
    assert torch.equal(batch.logvar, -batch.mean) and batch.pixels is None and batch.mask is None


def test_sizes_are_the_originals_the_corners_and_the_targets_height_first() -> None:
    """SDXL's size conditioning; the target need not be a square."""
    sizes = collate([a_sample(3), a_sample(1)]).time_ids
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == [[50, 43, 3, 2, 32, 24], [50, 41, 1, 2, 32, 24]]


def test_weights_and_classes_are_the_rows() -> None:
    of_class = replace(a_sample(1).row, is_class=True, loss_weight=0.25)
    batch = collate([a_sample(0), a_sample(1, row=of_class)])
    assert batch.loss_weight.tolist() == [1.0, 0.25] and batch.loss_weight.dtype == torch.float32
    assert batch.is_class.tolist() == [False, True]


def test_masks_are_stacked_where_there_are_any() -> None:
    masks = [torch.rand(1, 2, 3) for _ in range(2)]
    batch = collate([a_sample(i, mask=mask) for i, mask in enumerate(masks)])
    assert torch.equal(batch.mask, torch.stack(masks)) and batch.mask.shape == (2, 1, 2, 3)
    assert torch.equal(batch.to(torch.device("cpu")).mask, batch.mask)


def test_samples_of_two_shapes_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="samples of one shape"):
        collate([a_sample(0), a_sample(1, shape=(24, 32))])


def test_the_first_error_of_a_batch_is_returned_instead() -> None:
    first, second = (UserError(Problem(f"image {i}", "here", "why", "fix", kind="data")) for i in (1, 2))
    assert collate([a_sample(0), first, a_sample(1, shape=(24, 32)), second]) is first
