"""Several processes share out the work before the first step, and get bit for bit what one process makes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.images import data_options, marked_folder
from tests.support.two_ranks import on_two_ranks
from trainkit import digests, publish
from trainkit.conditioning.cached_text import FrozenText
from trainkit.data import rows as data_rows
from trainkit.data import verdicts
from trainkit.data.cache import DiskStore, cache_latents, fill_together
from trainkit.data.geometry import CropPolicy
from trainkit.errors import Problem, UserError
from trainkit.families import sdxl
from trainkit.options import ModelOptions
from trainkit.runtime import ranks

pytestmark = pytest.mark.trains

PROMPTS = [f"{number} dogs" + " and a cat" * (number % 3) for number in range(40)]  # three groups: 16, 16 and 8
POLICY = CropPolicy(resolution=32, random_flip=True, cached_crops=2)


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> sdxl.SDXL:
    return sdxl.load(ModelOptions(pretrained_model_name_or_path=f"{tiny_sdxl}"), device=torch.device("cpu"),
                     weight_dtype=torch.float32)


def texts(family: sdxl.SDXL, store: object) -> dict[str, object]:
    """What a rank has in the end, and how often it asked the encoders."""
    asked, encode = [], family.encode_prompts
    family.encode_prompts = lambda prompts, skip: (asked.append(len(prompts)), encode(prompts, skip))[1]
    try:
        text = FrozenText(family, PROMPTS, store, also=["", "a preview"])
        return {"entries": dict(text(PROMPTS)), "asked": asked, "preview": dict(text(["a preview"]))}
    finally:
        del family.encode_prompts


def latents(family: sdxl.SDXL, folder: Path, store: object) -> dict[str, object]:
    """As `texts`, for the latents of the images."""
    rows, _ = data_rows.read_rows(data_options(instance_data_dir=folder))
    encoded = [0]

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoded[0] += len(pixels)
        return family.encode_pixels(pixels)

    found = cache_latents(rows, POLICY, encode, store, seed=0, identity="vae")
    samples = [POLICY.sample(row, seed=0, epoch=epoch) for row in rows for epoch in range(3)]
    return {"entries": [found(sample) for sample in samples], "encoded": encoded[0]}


def same_bits(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    pairs = one.items() if isinstance(one, dict) else enumerate(one)
    return len(one) == len(other) and all(same_bits(value, other[key]) for key, value in pairs)


STORES: dict[str, Callable[[Path], object]] = {"memory": lambda _: {}, "disk": DiskStore}


@pytest.mark.parametrize("kind", STORES)
def test_captions_are_encoded_in_parts_with_the_bits_of_one_process(kind, family, tmp_path):
    alone = texts(family, {})
    first, second = on_two_ranks(lambda: texts(family, STORES[kind](tmp_path / "cache")), tmp_path)
    assert alone["asked"] == [16, 16, 8, 2], "the groups do not depend on the number of processes"
    assert (first["asked"], second["asked"]) == ([16, 8, 2], [16]), "each asks for its own groups"
    for rank in (first, second):
        assert same_bits(rank["entries"], alone["entries"]) and same_bits(rank["preview"], alone["preview"])


@pytest.mark.parametrize("kind", STORES)
def test_latents_are_encoded_in_parts_with_the_bits_of_one_process(kind, family, tmp_path):
    folder = marked_folder(tmp_path / "d", 5)
    alone = latents(family, folder, {})
    both = on_two_ranks(lambda: latents(family, folder, STORES[kind](tmp_path / "cache")), tmp_path)
    counts = [rank["encoded"] for rank in both]
    assert sum(counts) == alone["encoded"] and max(counts) < alone["encoded"] * 0.7, (counts, alone["encoded"])
    assert all(same_bits(rank["entries"], alone["entries"]) for rank in both)


def test_more_entries_than_are_sent_at_once_reach_every_rank(tmp_path):
    def work() -> object:
        store: dict[str, object] = {"shared": {"x": torch.zeros(1)}}
        fill_together(store, range(301), range(ranks.rank(), 301, 2), lambda items: store.update(
            {f"{item}": {"x": torch.tensor([float(item)])} for item in items}))
        return sorted(store), sum(entry["x"].item() for entry in store.values())

    for names, total in on_two_ranks(work, tmp_path):
        assert names == sorted(["shared", *map(str, range(301))]) and total == sum(range(301))


# -- the images at the start ------------------------------------------------------------------------------------------


def odd_folder(folder: Path) -> Path:
    """Seven images; one is damaged, one is animated, and Pillow remarks on one."""
    from PIL import Image

    marked_folder(folder, 5)
    whole = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "moving.txt").write_text("it moves")
    Image.new("CMYK", (40, 40)).save(folder / "press.jpg", icc_profile=b"no profile")
    (folder / "press.txt").write_text("in inks")
    return folder


def told(folder: Path) -> dict[str, object]:
    """The rows, what is wrong with the images, what is logged about them, and how many this rank has decoded."""
    decoded, decode, lines = [], verdicts.decode, []
    verdicts.decode = lambda *args, **kwargs: (decoded.append(1), decode(*args, **kwargs))[1]
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("trainkit").addHandler(handler)
    try:
        rows, problems = data_rows.read_rows(data_options(instance_data_dir=folder))
    finally:
        logging.getLogger("trainkit").removeHandler(handler)
        verdicts.decode = decode
    return {"rows": [f"{row}" for row in rows], "problems": [f"{problem}" for problem in problems],
            "lines": lines, "decoded": len(decoded)}


def test_each_process_decodes_a_part_and_all_tell_the_same_about_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "FRESH_SECONDS", 1e9)  # nothing is remembered of an image
    folder = odd_folder(tmp_path / "d")
    alone = told(folder)
    first, second = on_two_ranks(lambda: told(folder), tmp_path)
    assert (alone.pop("decoded"), first.pop("decoded"), second.pop("decoded")) == (7, 4, 3)
    assert first == second == alone
    assert len(alone["rows"]) == 6 and "002.png" in alone["problems"][0]
    assert any("several frames" in line and "moving.gif" in line for line in alone["lines"])
    assert any("colour profile" in line and "press.jpg" in line for line in alone["lines"])


def test_processes_with_other_files_decode_all_of_their_own(tmp_path, monkeypatch):
    """Machines without a common disk, before the missing class images are generated on each."""
    monkeypatch.setattr(digests, "FRESH_SECONDS", 1e9)
    folders = marked_folder(tmp_path / "a", 4), marked_folder(tmp_path / "b", 2)
    counts = [rank["decoded"] for rank in on_two_ranks(lambda: told(folders[ranks.rank()]), tmp_path)]
    assert counts == [4, 2]


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_every_rank_has_what_each_has(tmp_path):
    assert on_two_ranks(lambda: ranks.gather({"rank": ranks.rank()}), tmp_path) == [[{"rank": 0}, {"rank": 1}]] * 2
    assert ranks.gather(7) == [7]


WAITS = {"barrier": ranks.barrier, "from_main": lambda: ranks.from_main(lambda: time.sleep(2)),
         "gather": lambda: ranks.gather(0)}


@pytest.mark.parametrize("how", WAITS)
def test_who_waits_for_rank_0_sees_a_signal_at_once(how, tmp_path):
    def work() -> object:
        ranks.barrier()
        begun, seen = time.monotonic(), []
        if ranks.rank() == 0:
            time.sleep(0 if how == "from_main" else 2)
        else:
            signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(time.monotonic() - begun))
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        WAITS[how]()
        return seen, time.monotonic() - begun

    _, (seen, waited) = on_two_ranks(work, tmp_path)
    assert waited > 1.5 and len(seen) == 1 and seen[0] < 1, (seen, waited)


def test_who_waits_for_rank_0_does_so_longer_than_torch_allows_a_step(tmp_path):
    """Rank 0 uploads for longer than the timeout of the group that sums gradients."""
    def work() -> object:
        ranks.barrier()
        if ranks.rank() == 0:
            time.sleep(4)
        ranks.barrier()
        return ranks.sum_over_ranks(torch.ones(1)).item()

    assert on_two_ranks(work, tmp_path, step_timeout=timedelta(seconds=2)) == [2.0, 2.0]


@pytest.mark.parametrize("how", WAITS)
def test_who_is_left_says_how_to_go_on(how, tmp_path):
    def work() -> object:
        ranks.barrier()
        if ranks.rank() == 0:
            torch.save(None, tmp_path / "0.pt")
            os._exit(0)
        with pytest.raises(UserError) as caught:
            WAITS[how]()
        return caught.value.exit_code, caught.value.problems[0].fix

    _, (code, fix) = on_two_ranks(work, tmp_path)
    assert code == 1 and "--resume_from_checkpoint latest" in fix


def test_an_upload_that_fails_on_rank_0_does_not_leave_the_others_waiting(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise UserError(Problem("offline", "", "", ""))

    def work() -> object:
        ranks.barrier()
        monkeypatch.setattr(publish, "publish_here", fail)
        with pytest.raises(UserError) as caught:
            publish.publish(None, None)
        return caught.value.problems[0].what

    assert on_two_ranks(work, tmp_path) == ["offline", "another process of this run has ended"]
