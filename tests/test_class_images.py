"""Class images: read with their captions, generated where missing, the same after a kill and on any ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.images import data_options, marked, marked_folder
from tests.support.tiny_models import build_tiny_edm
from tests.support.two_ranks import on_two_ranks
from trainkit.data import class_images
from trainkit.data.batch import Row
from trainkit.data.class_images import Painter, class_rows, problems, recipe
from trainkit.errors import UserError
from trainkit.families import base
from trainkit.options import ModelOptions, ObjectiveOptions, PriorOptions
from trainkit.rng import generator
from trainkit.runtime import ranks
from trainkit.runtime.progress import Progress

pytestmark = pytest.mark.trains  # every test draws with a whole pipeline

JOB = SimpleNamespace(seed=3, device=torch.device("cpu"), show_task=Progress().task)


def options(folder: Path | None, model: Path | str = "no/model", *, resolution: int = 32, instances: Path | None = None,
            **changes: object) -> SimpleNamespace:
    prior = dict(with_prior_preservation=True, class_data_dir=folder and str(folder), class_prompt="a photo of a cat",
                 num_class_images=6, sample_batch_size=2) | changes
    return SimpleNamespace(model=ModelOptions(pretrained_model_name_or_path=str(model)), prior=PriorOptions(**prior),
                           objective=ObjectiveOptions(), run=SimpleNamespace(compat=None),
                           data=data_options(resolution=resolution, instance_data_dir=instances))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The batches of numbers a painter was asked for; it draws a colour for each seed and number, and its batch."""
    batches: list[list[int]] = []

    def paint(opt: SimpleNamespace, run: SimpleNamespace) -> Callable[[Sequence[int]], list[Image.Image]]:
        def draw(numbers: Sequence[int]) -> list[Image.Image]:
            batches.append([*numbers])
            return [Image.new("RGB", (8, 8), (run.seed, number, sum(numbers))) for number in numbers]
        return draw

    monkeypatch.setattr(class_images.Painter, "load", paint)
    return batches


def names(rows: Sequence[Row]) -> list[str]:
    return [row.id for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- reading


def test_without_the_flag_there_are_no_class_rows_and_no_problems(tmp_path: Path) -> None:
    opt = options(tmp_path / "nope", with_prior_preservation=False)
    assert class_rows(opt, JOB) == [] and problems(opt) == []


def test_real_images_keep_their_sizes_and_captions_and_junk_counts_for_nothing(tmp_path: Path, drawn: list) -> None:
    folder = marked_folder(tmp_path / "Ünïcode 猫", 3)
    (folder / "001.txt").unlink()
    for junk in (".DS_Store", "._000.png", "notes.md", "Thumbs.db", ".generated-00000000-00000.png.7-ab.tmp"):
        (folder / junk).write_bytes(b"junk")
    (folder / "sub").mkdir()
    opt = options(folder, num_class_images=3, prior_loss_weight=0.25)
    assert problems(opt) == []
    rows = class_rows(opt, JOB)
    assert names(rows) == ["class/000.png", "class/001.png", "class/002.png"] and not drawn
    assert [row.caption for row in rows] == ["image 0", "a photo of a cat", "image 2"]
    assert [row.size for row in rows] == [(33, 32), (32, 34), (35, 32)]
    assert all(row.is_class and row.loss_weight == 0.25 and row.repeat == 0 for row in rows)


def test_a_folder_with_more_images_than_wanted_gives_the_first(tmp_path: Path, drawn: list) -> None:
    folder = marked_folder(tmp_path / "d", 5)
    (folder / "004.png").write_text("not looked at")
    opt = options(folder, num_class_images=2)
    assert problems(opt) == [] and names(class_rows(opt, JOB)) == ["class/000.png", "class/001.png"]
    assert not drawn


# -------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("there", [False, True])
def test_missing_images_are_generated_once(tmp_path: Path, drawn: list, there: bool) -> None:
    folder = tmp_path / "not" / "there"
    if there:
        folder.mkdir(parents=True)
    opt = options(folder)
    assert problems(opt) == []
    rows = class_rows(opt, JOB)
    assert drawn == [[0, 1], [2, 3], [4, 5]]
    assert names(rows) == [f"class/generated-{recipe(opt)}-{number:05d}.png" for number in range(6)]
    assert {row.caption for row in rows} == {"a photo of a cat"}
    assert class_rows(opt, JOB) == rows and len(drawn) == 3, "the second run finds them"


def test_the_users_images_count_are_kept_and_come_first(tmp_path: Path, drawn: list) -> None:
    folder = marked_folder(tmp_path / "d", 3)
    marked(9, 40, 40).save(folder / "zebra.png")
    before = contents(folder)
    rows = class_rows(options(folder), JOB)
    assert names(rows)[:4] == ["class/000.png", "class/001.png", "class/002.png", "class/zebra.png"]
    assert drawn == [[0, 1]] and len(rows) == 6
    assert before.items() <= contents(folder).items()


def test_a_caption_beside_a_generated_image_is_used(tmp_path: Path, drawn: list) -> None:
    opt = options(tmp_path / "d", num_class_images=2)
    class_rows(opt, JOB)
    (tmp_path / "d" / f"generated-{recipe(opt)}-00001.txt").write_text("a sleeping cat")
    assert [row.caption for row in class_rows(opt, JOB)] == ["a photo of a cat", "a sleeping cat"]


def test_images_of_another_prompt_size_or_model_are_left_alone_but_another_seed_shares_them(
    tmp_path: Path, drawn: list, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "d"
    cats = class_rows(options(folder), JOB)
    others = [dict(class_prompt="a photo of a dog"), dict(resolution=64), dict(model="other/base")]
    for k, change in enumerate(others, 1):
        rows = class_rows(options(folder, **change), JOB)
        assert len(rows) == 6 and not set(names(rows)) & set(names(cats))
        assert len(list(folder.iterdir())) == 6 * (k + 1)
    assert "6 class images generated for another prompt, size or model" in caplog.text
    drawn.clear()
    assert class_rows(options(folder), SimpleNamespace(**vars(JOB) | {"seed": 4})) == cats and not drawn


def test_a_recipe_tells_models_of_one_folder_name_apart(tiny_sdxl: Path, tmp_path: Path) -> None:
    """By their weights, scheduler, revision and VAE; a folder that cannot be read still has a recipe."""
    from safetensors.torch import load_file, save_file

    def made_by(parent: str, **changes: object) -> str:
        return recipe(options(None, tmp_path / parent / "base", **changes))

    for parent in ("a", "b", "tuned", "scheduled"):
        shutil.copytree(tiny_sdxl, tmp_path / parent / "base")
    weights = tmp_path / "tuned/base/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    config = tmp_path / "scheduled/base/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"_class_name": "DDIMScheduler"}), "utf-8")
    plain, pinned, other_vae = options(None, "owner/base"), options(None, "owner/base"), options(None, "owner/base")
    pinned.model = plain.model.model_copy(update={"revision": "v2"})
    other_vae.model = plain.model.model_copy(update={"pretrained_vae_model_name_or_path": "owner/vae"})
    assert made_by("a") == made_by("b"), "a copy draws the same"
    different = [made_by("a"), made_by("tuned"), made_by("scheduled"), *map(recipe, (plain, pinned, other_vae))]
    assert len(set(different)) == len(different)
    weights.write_bytes(b"cut short")
    assert len(made_by("tuned")) == len(made_by("nowhere")) == 8


def test_a_images_bytes_do_not_depend_on_how_many_are_asked_for(tmp_path: Path, drawn: list) -> None:
    """Matrix products round differently in batches of other sizes, so a batch is drawn whole."""
    for count in (3, 4):
        class_rows(options(tmp_path / str(count), num_class_images=count), JOB)
    few, more = (contents(tmp_path / count) for count in ("3", "4"))
    assert len(few) == 3 and len(more) == 4 and few.items() <= more.items()
    assert drawn == [[0, 1], [2, 3]] * 2


def test_only_what_is_wanted_is_written(tmp_path: Path, drawn: list) -> None:
    """One image of four was sorted out and its neighbours too: one is wanted, one is written."""
    opt = options(tmp_path / "d", num_class_images=8, sample_batch_size=4)
    class_rows(opt, JOB)
    for number in (1, 2, 3):
        (tmp_path / "d" / f"generated-{recipe(opt)}-{number:05d}.png").unlink()
    assert len(class_rows(options(tmp_path / "d", num_class_images=6, sample_batch_size=4), JOB)) == 6
    assert len(contents(tmp_path / "d")) == 6


@pytest.mark.parametrize("survivors", [[], [0], [0, 1, 2], [2, 3], [1, 4]])
def test_an_interrupted_generation_ends_with_the_same_bytes_and_rows(
    tmp_path: Path, drawn: list, survivors: list[int]
) -> None:
    whole, broken = options(tmp_path / "whole", num_class_images=5), options(tmp_path / "broken", num_class_images=5)
    wanted = class_rows(whole, JOB)
    (tmp_path / "broken").mkdir()
    for number in survivors:
        name = f"generated-{recipe(whole)}-{number:05d}.png"
        (tmp_path / "broken" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    rows = class_rows(broken, JOB)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert [(row.id, row.digest) for row in rows] == [(row.id, row.digest) for row in wanted]


def test_more_images_wanted_later_keep_those_that_are_there(tmp_path: Path, drawn: list) -> None:
    opt = options(tmp_path / "d", num_class_images=4)
    class_rows(opt, JOB)
    before = contents(tmp_path / "d")
    assert len(class_rows(options(tmp_path / "d", num_class_images=7), JOB)) == 7
    assert before.items() <= contents(tmp_path / "d").items()
    drawn.clear()
    assert len(class_rows(opt, JOB)) == 4 and not drawn
    (tmp_path / "d" / f"generated-{recipe(opt)}-00001.png").unlink()
    assert len(class_rows(opt, JOB)) == 4 and not drawn, "there are enough without the one that was sorted out"


def test_two_ranks_share_the_work_and_make_what_one_makes_d20(tmp_path: Path, drawn: list) -> None:
    alone = class_rows(options(tmp_path / "one", num_class_images=7), JOB)
    assert drawn == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len({row.digest for row in alone}) == 7, "every image has a seed of its own"
    drawn.clear()
    opt = options(tmp_path / "two", num_class_images=7)
    (first, one), (second, two) = on_two_ranks(lambda: ([f"{row}" for row in class_rows(opt, JOB)], drawn), tmp_path)
    assert (one, two) == ([[0, 1], [4, 5]], [[2, 3], [6, 7]])
    assert first == second and contents(tmp_path / "two") == contents(tmp_path / "one")


def test_ranks_on_different_disks_make_every_image_on_each(tmp_path: Path, drawn: list) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    counts = on_two_ranks(lambda: len(class_rows(options(folders[ranks.rank()]), JOB)), tmp_path)
    assert counts == [6, 6] and contents(folders[0]) == contents(folders[1]) and len(contents(folders[0])) == 6


def test_a_image_another_run_wrote_meanwhile_is_not_replaced(tmp_path: Path, drawn: list) -> None:
    path = tmp_path / "generated.png"
    path.write_bytes(b"theirs")
    class_images.write(path, Image.new("RGB", (8, 8)))
    assert path.read_bytes() == b"theirs"


# ------------------------------------------------------------------------------------------------------ with a model


def test_each_image_is_the_stock_pipelines_for_its_own_seed(tiny_sdxl: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    rows = class_rows(options(tmp_path / "d", tiny_sdxl, num_class_images=2), JOB)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, use_safetensors=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for number, row in enumerate(rows):
        stock, = pipe("a photo of a cat", height=32, width=32, generator=generator("class picture", 3, number)).images
        difference = torch.tensor([*Image.open(row.source).tobytes()]) - torch.tensor([*stock.tobytes()])
        assert difference.abs().max() <= 1, "more than rounding: batches of two and of one"
    assert len({row.digest for row in rows}) == 2


def test_an_edm_checkpoint_draws_with_its_own_scheduler(tmp_path: Path) -> None:
    model = build_tiny_edm(tmp_path / "edm")
    opt = options(tmp_path / "d", model, num_class_images=1)
    assert "EDM" in type(Painter.load(opt, JOB).pipe.scheduler).__name__
    row, = class_rows(opt, JOB)
    assert row.size == (32, 32)


def test_kill_9_while_generating_loses_nothing_and_changes_nothing(tiny_sdxl: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  (imported here, not in the child)

    whole, killed = (options(tmp_path / name, tiny_sdxl, num_class_images=5) for name in ("whole", "killed"))
    pid = os.fork()
    if pid == 0:
        try:
            class_rows(killed, JOB)
        finally:
            os._exit(1)
    end = time.monotonic() + 120
    while time.monotonic() < end and len(list((tmp_path / "killed").glob("generated-*"))) < 2:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
    early = contents(tmp_path / "killed")
    assert 2 <= len(early) < 5
    rows = class_rows(killed, JOB)
    assert [row.digest for row in rows] == [row.digest for row in class_rows(whole, JOB)]
    assert all(contents(tmp_path / "killed")[name] == data for name, data in early.items())


def test_the_global_generator_and_the_base_files_do_not_move(tiny_sdxl: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    class_rows(options(tmp_path / "d", tiny_sdxl, num_class_images=1), JOB)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_keeps_the_vae_whole(tiny_sdxl: Path) -> None:
    opt = options(Path("d"), tiny_sdxl, prior_generation_precision="bf16")
    painter = Painter.load(opt, JOB)
    assert (painter.pipe.unet.dtype, painter.pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert painter([0])[0].size == (32, 32)


def test_large_class_images_are_decoded_in_tiles(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    """The UNet and the text encoders are on the card too; tiles of a small side show it."""
    largest: list[int] = []
    load = Painter.load

    def watched(opt: SimpleNamespace, run: SimpleNamespace) -> Painter:
        painter = load(opt, run)
        decoder = painter.pipe.vae.decoder
        forward = decoder.forward
        decoder.forward = lambda z: (largest.append(max(z.shape[-2:])), forward(z))[1]
        return painter

    monkeypatch.setattr(Painter, "load", watched)
    monkeypatch.setattr(base, "TILE", 16)
    class_rows(options(tmp_path / "d", tiny_sdxl, num_class_images=1), JOB)
    assert len(largest) > 1 and max(largest) <= 16 // 4


def test_images_of_nan_are_an_error_not_black_squares(tiny_sdxl: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    load = Painter.load

    def damaged(opt: SimpleNamespace, run: SimpleNamespace) -> Painter:
        painter = load(opt, run)
        painter.pipe.unet.conv_out.bias.data.fill_(torch.nan)
        return painter

    monkeypatch.setattr(Painter, "load", damaged)
    with pytest.raises(UserError, match="NaN") as caught:
        class_rows(options(tmp_path / "d", tiny_sdxl, num_class_images=1), JOB)
    assert caught.value.problems[0].kind == "nonfinite" and not list((tmp_path / "d").iterdir())


# ---------------------------------------------------------------------------------------------------------- problems


def test_class_and_instance_images_may_not_share_a_folder(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 2)
    (tmp_path / "link").symlink_to(folder)
    problem, = problems(options(tmp_path / "link", instances=folder))
    assert "share a folder" in problem.what and problem.fix.startswith("--class_data_dir")
    assert problems(options(tmp_path / "other", instances=folder)) == []


def test_unreadable_class_images_are_one_problem(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 4)
    for name in ("000.png", "002.png"):
        (folder / name).write_bytes(b"\x89PNG")
    problem, = problems(options(folder, num_class_images=4))
    assert problem.what == "2 of 4 images cannot be read" and problem.kind == "data"
    with pytest.raises(UserError, match="2 of 4"):
        class_rows(options(folder, num_class_images=4), JOB)


def test_a_folder_that_cannot_take_images_is_told_before_the_run(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    problem, = problems(options(tmp_path / "file"))
    assert "it is a file" in problem.why and problem.where.startswith("--class_data_dir")
    problem, = problems(options(tmp_path / "file" / "below"))
    assert "it is a file" in problem.why and problem.kind == "disk"
    folder = marked_folder(tmp_path / "d", 2)
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write anywhere
    problem, = problems(options(folder))
    assert "cannot be written" in problem.why
    assert problems(options(folder, num_class_images=2)) == [], "nothing has to be written"


def test_images_the_metadata_forgot_are_said_once_to_get_the_class_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = marked_folder(tmp_path / "d", 2)
    (folder / "001.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a cat asleep"}\n')
    opt = options(folder, num_class_images=2)
    assert problems(opt) == []
    assert [row.caption for row in class_rows(opt, JOB)] == ["a cat asleep", "a photo of a cat"]
    assert caplog.text.count("--class_prompt is used: 001.png") == 1


def test_bad_metadata_of_the_class_folder_is_a_problem(tmp_path: Path) -> None:
    folder = marked_folder(tmp_path / "d", 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    problem, = problems(options(folder))
    assert "metadata.jsonl" in problem.what and "gone.png" in problem.why


def test_one_other_value_in_the_unet_makes_other_class_images(tiny_sdxl: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sdxl, base)
    before = recipe(options(None, base))
    weights, = (base / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    largest = max(tensors.values(), key=torch.Tensor.numel)
    largest.view(-1)[1] += 1
    save_file(tensors, weights)
    assert recipe(options(None, base)) != before, "class images of another model would be trained on"
