"""The guidance token: features are extracted once, found by content, and stand only where a caption has a pad."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.images import noise_image
from tests.support.tiny_models import CLIP_WIDTH, build_tiny_clip
from tests.support.trainers import forked
from trainkit.condition import Condition
from trainkit.conditioning import clip_token
from trainkit.conditioning.clip_token import ClipToken, has_free_place, make_clip_token, with_token
from trainkit.data.batch import Batch
from trainkit.data.caption_changes import CaptionChanges
from trainkit.data.clip_features import Clip, Features, load_clip, read_features, write_features
from trainkit.data.images import content_digest, decode
from trainkit.diffusion import Level, NoiseSchedule, make_noise
from trainkit.errors import Problem, UserError
from trainkit.losses.objective import make_objective
from trainkit.losses.passes import Passes, always
from trainkit.options import CaptionOptions, GuidanceOptions, ObjectiveOptions
from trainkit.rng import uniform
from trainkit.tools import extract_clip_features as script
from trainkit.training.step import TrainStep


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images, some in a folder below, with names that are not ASCII."""
    for seed, name in enumerate(("a.png", "b.png", "müde 狐.png", "below/a.png", "below/ß.webp", "below/z z.bmp")):
        noise_image(tmp_path / "images" / name, seed)
    return tmp_path / "images"


def digest(path: Path) -> str:
    return content_digest(path.read_bytes())


def extract(images: Path, clip: Path, out: Path, *more: str) -> Features:
    script.main([f"--images={images}", f"--clip={clip}", f"--out={out}", *more])
    return read_features(out)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images CLIP was asked for, call by call."""
    sizes: list[int] = []
    ask = Clip.__call__

    def counted(clip: Clip, pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return ask(clip, pixels)

    monkeypatch.setattr(Clip, "__call__", counted)
    return sizes


def refused(run: Callable[[], object]) -> Sequence[Problem]:
    with pytest.raises(UserError) as caught:
        run()
    return caught.value.problems


# ----------------------------------------------------------------------------------------------------------------------
# Extraction


def test_features_are_clips_own_after_the_projection(assets, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    features = extract(assets / "icons-3d", assets / "tiny-clip-icons", tmp_path / "f.safetensors", "--batch_size=5")
    model = CLIPModel.from_pretrained(assets / "tiny-clip-icons", dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(assets / "tiny-clip-icons")
    paths = sorted((assets / "icons-3d").glob("*.png"))
    assert len(features.digests) == len(paths) == 22 and features.rows.dtype == torch.float32
    for path in paths:
        pixels = processor([decode(path.read_bytes())], return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model.get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(features[digest(path)], expected, rtol=1e-4, atol=1e-5)


def test_a_clip_without_its_preprocessing_gets_clips_standard_one(tiny_clip):
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))  # what a centre crop sees
    clip = load_clip(str(tiny_clip))
    blue = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor(clip.processor.image_mean)) / torch.tensor(
        clip.processor.image_std)
    torch.testing.assert_close(clip.pixels(wide)[:, 16, 16], blue)
    assert clip.pixels(wide).shape == (3, 32, 32) and clip.processor.image_mean[0] == pytest.approx(0.48145466)


def test_images_are_found_by_content_whatever_their_names(images, tiny_clip, tmp_path, asked):
    before = extract(images, tiny_clip, out := tmp_path / "f.safetensors")
    (images / "a.png").rename(images / "below" / "renamed ☃.png")
    (images / "copy.png").write_bytes((images / "b.png").read_bytes())
    new = noise_image(images / "new.png", 99)
    after = extract(images, tiny_clip, out)
    assert sum(asked) == 6 + 1, "a moved image, and a copy of one, have their features already"
    assert digest(new) in after and len(after.digests) == 7
    assert all(torch.equal(after[d], before[d]) for d in before.digests)
    assert list(after.digests) == sorted(after.digests)


@pytest.mark.trains
def test_a_killed_extraction_goes_on_where_it_was(images, tiny_clip, tmp_path, asked, monkeypatch):
    whole = extract(images, tiny_clip, tmp_path / "whole.safetensors", "--batch_size=1")
    asked.clear()
    out, ask = tmp_path / "f.safetensors", Clip.__call__

    def slowly(clip: Clip, pixels: Tensor) -> Tensor:
        time.sleep(0.1)
        return ask(clip, pixels)

    def three_there() -> bool:
        return out.exists() and len(read_features(out).digests) >= 3

    with monkeypatch.context() as patch:
        patch.setattr(script, "SAVE_SECONDS", 0)
        patch.setattr(script, "SAVE_FACTOR", 0)
        patch.setattr(Clip, "__call__", slowly)
        done = forked([f"--images={images}", f"--clip={tiny_clip}", f"--out={out}", "--batch_size=1"],
                      trainer="trainkit.tools.extract_clip_features", log=tmp_path / "log", kill_when=three_there)
    assert done.code == -9, done.output
    there = len(read_features(out).digests)
    assert 3 <= there < 6
    (tmp_path / ".f.safetensors.123-abcd.tmp").write_bytes(b"half")  # as a process killed while writing leaves it
    again = extract(images, tiny_clip, out, "--batch_size=1")
    assert len(asked) == 6 - there and again.digests == whole.digests
    torch.testing.assert_close(again.rows, whole.rows)
    assert not list(tmp_path.glob(".f.safetensors.*.tmp"))


def test_processes_at_once_add_to_one_file(images, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    monkeypatch.setattr(script, "SAVE_FACTOR", 0)
    for seed in range(20):
        noise_image(images / "other" / f"{seed}.png", 1000 + seed)
    out, children = tmp_path / "f.safetensors", []
    for folder in (images / "other", images / "below", images):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                extract(folder, tiny_clip, out, "--batch_size=1")
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(read_features(out).digests) == 26


def test_two_writers_keep_each_others_rows(tmp_path):
    one, other = (script.Growing(tmp_path / "f.safetensors", clip="c", made_by="m", width=2) for _ in range(2))
    one.add("0" * 32, torch.zeros(2))
    other.add("1" * 32, torch.ones(2))
    one.save()
    assert other.save().rows.tolist() == [[0, 0], [1, 1]]


def test_a_data_set_of_the_datasets_library(images, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "f.safetensors"
    script.main([f"--dataset_name={images}", f"--clip={tiny_clip}", f"--out={out}"])
    assert set(read_features(out).digests) == {digest(p) for p in images.rglob("*.*")}
    problem, = refused(lambda: script.main([f"--dataset_name={images}", "--image_column=photo", f"--out={out}"]))
    assert "no column 'photo'" in problem.what and "image" in problem.why


def test_images_that_cannot_be_read_are_named_after_the_others_are_done(images, tiny_clip, tmp_path):
    (images / "torn 画.png").write_bytes((images / "a.png").read_bytes()[:100])
    problem, = refused(lambda: extract(images, tiny_clip, tmp_path / "f.safetensors"))
    assert "torn 画.png" in problem.why and problem.what.startswith("1 of 7") and problem.kind == "data"
    assert len(read_features(tmp_path / "f.safetensors").digests) == 6


def test_damaged_weights_leave_no_features(images, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(Clip, "__call__", lambda clip, pixels: torch.full((len(pixels), CLIP_WIDTH), torch.nan))
    problem, = refused(lambda: extract(images, tiny_clip, tmp_path / "f.safetensors"))
    assert problem.kind == "nonfinite" and not (tmp_path / "f.safetensors").exists()


def test_a_folder_that_cannot_be_written_is_one_message(images, tiny_clip, tmp_path):
    (tmp_path / "file").write_text("")
    problem, = refused(lambda: extract(images, tiny_clip, tmp_path / "file" / "f.safetensors"))
    assert problem.kind == "disk" and "cannot write" in problem.what


def test_what_cannot_be_extracted_is_refused(images, tiny_clip, assets, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "f.safetensors"
    for run, said in (
        (lambda: extract(tmp_path / "empty", tiny_clip, out), "no images"),
        (lambda: extract(tmp_path / "nowhere", tiny_clip, out), "no folder"),
        (lambda: extract(images, tmp_path / "nowhere", out), "does not exist"),
        (lambda: extract(images, assets / "tiny-sd-icons" / "text_encoder", out), "not a CLIP model"),
        (lambda: script.main([f"--out={out}"]), "no images"),
        (lambda: script.main([f"--out={out}", f"--images={images}", "--dataset_name=x"]), "two sources"),
        (lambda: extract(images, tiny_clip, tmp_path / "f.pt"), "no name of a safetensors file"),
    ):
        problem, = refused(run)
        assert said in problem.what
    assert not out.exists()


def test_a_file_belongs_to_one_clip(images, tiny_clip, assets, tmp_path):
    extract(images, tiny_clip, out := tmp_path / "f.safetensors")
    content = out.read_bytes()
    problem, = refused(lambda: extract(images, assets / "tiny-clip-icons", out))
    assert "another CLIP" in problem.what and out.read_bytes() == content


def test_a_damaged_file_is_told_from_a_missing_one(images, tiny_clip, assets, tmp_path):
    extract(images, tiny_clip, out := tmp_path / "f.safetensors")
    content = bytearray(out.read_bytes())
    content[-3] ^= 1
    other = (assets / "tiny-clip-icons/model.safetensors").read_bytes()
    for damaged in (bytes(content), bytes(content[:-9]), b"", other):
        out.write_bytes(damaged)
        problem, = refused(lambda: read_features(out))
        assert "cannot be read" in problem.what and "python -m trainkit.tools extract-clip-features" in problem.fix
    out.unlink()
    problem, = refused(lambda: read_features(out))
    assert "no file" in problem.what and "python -m trainkit.tools extract-clip-features" in problem.fix


# ----------------------------------------------------------------------------------------------------------------------
# Features of other programs


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickled_features_are_converted(images, tmp_path):
    legacy = tmp_path / "pt"
    (legacy / "below").mkdir(parents=True)
    batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    paths = sorted(images.rglob("*.*"))
    lines = []
    for row, path in zip(batch, paths, strict=True):
        name = path.relative_to(images)
        torch.save(row.half(), legacy / f"{name}.pt" if path.suffix == ".webp" else legacy / name.with_suffix(".pt"))
    torch.save(batch[0][None].half(), legacy / "first one.pt")
    (legacy / paths[0].relative_to(images).with_suffix(".pt")).unlink()
    lines.append(json.dumps({"file_name": str(paths[0].relative_to(images)), "img_features": "first one.pt"}))
    (images / "metadata.jsonl").write_text("\n".join([*lines, json.dumps({"file_name": "b.png"})]), "utf-8")
    script.main([f"--images={images}", f"--legacy={legacy}", f"--out={tmp_path / 'f.safetensors'}"])
    features = read_features(tmp_path / "f.safetensors")
    assert features.width == 5 and len(features.digests) == 6
    for row, path in zip(batch, paths, strict=True):
        assert torch.equal(features[digest(path)], row.half().float())


def test_hostile_files_and_paths_are_refused_with_one_message(images, tmp_path):
    legacy, witness = tmp_path / "pt", tmp_path / "it ran"
    legacy.mkdir()
    (legacy / "a.pt").write_bytes(pickle.dumps(Evil(witness)))
    torch.save(Evil(witness), legacy / "b.pt")
    torch.save(torch.zeros(5), tmp_path / "outside.pt")
    (legacy / "müde 狐.pt").symlink_to(tmp_path / "outside.pt")
    told = {"below/a.png": "../outside.pt", "below/ß.webp": str(tmp_path / "outside.pt")}
    (images / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": name, "img_features": path}) for name, path in told.items()), "utf-8")
    out = tmp_path / "f.safetensors"
    problem, = refused(lambda: script.main([f"--images={images}", f"--legacy={legacy}", f"--out={out}"]))
    assert not witness.exists() and not out.exists()
    assert problem.why.count("is refused") == 2 and problem.why.count("lies outside") == 3
    assert "below/z z.png" not in problem.why and "there is no below/z z.pt or below/z z.bmp.pt" in problem.why


@pytest.mark.parametrize("content", [
    [torch.zeros(5), torch.zeros(6)], [torch.zeros(2, 5)] * 2, [torch.full((5,), torch.nan)] * 2, [{"a": 1}] * 2,
    [torch.tensor(1.0)] * 2,
], ids=["several widths", "a batch", "not a number", "no tensor", "no vector"])
def test_a_pickle_must_hold_one_vector(tmp_path, content):
    for seed, one in enumerate(content):
        noise_image(tmp_path / "images" / f"{seed}.png", seed)
        (tmp_path / "pt").mkdir(exist_ok=True)
        torch.save(one, tmp_path / "pt" / f"{seed}.pt")
    refused(lambda: script.main([f"--images={tmp_path / 'images'}", f"--legacy={tmp_path / 'pt'}",
                                 f"--out={tmp_path / 'f.safetensors'}"]))
    assert not (tmp_path / "f.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The token in training

CAPTIONS = ("a red dog", "a cat " * 60, "the moon")  # the second fills the context


def rows_of(captions: Sequence[str] = CAPTIONS) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=f"p{i}.png", source=Path(f"/data/sub {i}/p.png"), digest=f"{i:032x}", caption=caption,
                            all_captions=(caption,), repeat=0, is_class=False, handling=None)
            for i, caption in enumerate(captions)]


def written(folder: Path, rows: Sequence[SimpleNamespace], width: int = CLIP_WIDTH) -> Path:
    """A file of features in which image i has rows of i + 1; in another order than the rows."""
    own = {row.digest: torch.full((width,), i + 1.0) for i, row in reversed([*enumerate(rows)])}
    none = Features(torch.zeros(0, width), [], "assets/a clip", "made")
    write_features(folder / "f.safetensors", none.with_rows(own))
    return folder / "f.safetensors"


@pytest.fixture
def tokenizer(tiny_sd: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tiny_sd, subfolder="tokenizer")


def clip_token_of(options: GuidanceOptions, rows: Sequence[SimpleNamespace], tokenizer) -> ClipToken | None:
    """Of captions that stay as they are, read in one chunk."""
    family = SimpleNamespace(tokenizers=(tokenizer,), max_chunks=1)
    return make_clip_token(options, rows, family, CaptionChanges(CaptionOptions(), 0))


def token_of(folder: Path, tokenizer, **changes: float) -> ClipToken:
    rows = rows_of()
    given = {"guidance_token": 8.0, "guidance_token_dropout": 0.0, **changes}
    options = GuidanceOptions(guidance_features=str(written(folder, rows)), **given)
    return clip_token_of(options, rows, tokenizer)


def batch_of(rows: Sequence[int], step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(rows=tuple(rows), keys=tuple((0, step, i) for i in range(len(rows))),
                           prompts=tuple(CAPTIONS[row] for row in rows))


def text_of(n: int) -> Condition:
    g = torch.Generator().manual_seed(0)
    return Condition(embeds=torch.randn(n, 77, CLIP_WIDTH, generator=g), pooled=torch.randn(n, 8, generator=g))


def test_image_i_is_fed_its_own_features_at_the_last_position_only(tmp_path, tokenizer):
    token, text = token_of(tmp_path, tokenizer, guidance_token_scale=0.5), text_of(3)
    fed = token(text, batch_of([2, 0, 2]))
    assert fed["embeds"][:, -1].tolist() == [[1.5] * CLIP_WIDTH, [0.5] * CLIP_WIDTH, [1.5] * CLIP_WIDTH]
    assert torch.equal(fed["embeds"][:, :-1], text["embeds"][:, :-1]) and fed["pooled"] is text["pooled"]
    assert fed.keys() == text.keys()


def test_a_caption_that_fills_the_context_keeps_its_end(tmp_path, tokenizer, caplog):
    token = token_of(tmp_path, tokenizer)
    assert len(caplog.records) == 1 and "a cat a cat" in caplog.text and "the moon" not in caplog.text
    text = text_of(2)
    fed = token(text, batch_of([1, 0]))["embeds"]
    assert torch.equal(fed[0], text["embeds"][0]) and not torch.equal(fed[1], text["embeds"][1])
    assert len(caplog.records) == 1, "said once, at the start"


def test_room_is_where_the_last_id_is_padding(tokenizer):
    words = [" ".join(["dog"] * n) for n in (0, 1, 74, 75, 76, 200)]
    ids = tokenizer(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    lengths = [len(tokenizer(one).input_ids) for one in words]
    assert has_free_place([tokenizer], words) == [length < 77 for length in lengths] == [True] * 3 + [False] * 3
    assert ids[3, -1] == tokenizer.eos_token_id and lengths[3] == 77
    shorter = copy.deepcopy(tokenizer)
    shorter.model_max_length = 76
    assert has_free_place([tokenizer, shorter], words) == [True] * 2 + [False] * 4, "every encoder must have room"


def test_cached_text_stays_as_it_is_and_the_rest_learns(tmp_path, tokenizer):
    token, text = token_of(tmp_path, tokenizer), text_of(2)
    embeds, before = text["embeds"].requires_grad_(), text["embeds"].detach().clone()
    token(text, batch_of([0, 1]))["embeds"].sum().backward()
    assert text["embeds"] is embeds and torch.equal(embeds.detach(), before)
    assert embeds.grad[0, -1].abs().max() == 0 and (embeds.grad[0, :-1] == 1).all() and (embeds.grad[1] == 1).all()


def test_a_share_of_the_visits_is_without_the_token(tmp_path, tokenizer):
    token = token_of(tmp_path, tokenizer, guidance_token_dropout=0.3)
    text = Condition(embeds=torch.zeros(2000, 77, CLIP_WIDTH))

    def fed(step: int) -> Tensor:
        return token(text, batch_of([0, 2] * 1000, step))["embeds"][:, -1, 0] > 0

    assert 0.66 < fed(0).float().mean() < 0.74
    assert torch.equal(fed(0), fed(0)), "a resumed run drops the same"
    assert not torch.equal(fed(0), fed(1))
    never = token_of(tmp_path, tokenizer, guidance_token_dropout=1.0)
    assert torch.equal(never(text, batch_of([0, 2] * 1000))["embeds"], text["embeds"])


def test_half_precision_text_stays_half(tmp_path, tokenizer):
    embeds = text_of(1)["embeds"]
    fed = token_of(tmp_path, tokenizer)(Condition(embeds=embeds.bfloat16()), batch_of([0]))
    assert fed["embeds"].dtype == torch.bfloat16
    assert with_token(embeds, torch.ones(1, CLIP_WIDTH), torch.tensor([False])) is not embeds


def test_without_the_flag_the_text_passes_through(tokenizer):
    assert clip_token_of(GuidanceOptions(), rows_of(), tokenizer) is None
    text = text_of(2)
    condition, = conditions_of_a_step(text)
    assert all(condition[name] is tensor for name, tensor in text.items())
    assert condition.keys() == {"embeds", "pooled", "time_ids"}


def test_in_a_step_the_token_is_added_to_the_text_of_each_pass_alike(tmp_path, tokenizer):
    token, text = token_of(tmp_path, tokenizer, guidance_token_dropout=0.5), text_of(2)
    first, second = conditions_of_a_step(text, token, names=("", "again"))
    assert torch.equal(first["embeds"], second["embeds"]) and first["time_ids"] is second["time_ids"]
    kept = [index for index in range(2) if not torch.equal(first["embeds"][index], text["embeds"][index])]
    wanted = [index for index in range(2) if uniform([(0, 0, index)], "guidance dropout") >= 0.5]
    assert kept == wanted == [1] and first["pooled"] is text["pooled"]


def conditions_of_a_step(text: Condition, *adds: ClipToken, names: Sequence[str] = ("",)) -> list[Condition]:
    """What the network is told in each pass of a step of two samples whose prompts encode to `text`."""
    conditions = []

    def denoise(z: Tensor, level: Level, condition: Condition) -> Tensor:
        conditions.append(condition)
        return z

    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon")
    plain = make_objective(ObjectiveOptions(), schedule)
    family = SimpleNamespace(device=torch.device("cpu"), denoise=denoise, sample_latents=lambda batch: batch.mean,
                             doubted=False)
    step = TrainStep(family, lambda prompts, step: text, make_noise(ObjectiveOptions()),
                     Passes(always(*(replace(plain, name=name) for name in names))), nullcontext, adds)
    batch = Batch(step=0, keys=((0, 0, 0), (0, 0, 1)), rows=(0, 2), prompts=(CAPTIONS[0], CAPTIONS[2]),
                  time_ids=torch.zeros(2, 6), loss_weight=torch.ones(2), is_class=torch.zeros(2, dtype=torch.bool),
                  num_instance=2, mean=torch.zeros(2, 4, 8, 8))
    list(step([batch]))
    return conditions


def test_the_flag_is_a_switch(tmp_path, tokenizer):
    tokens = [token_of(tmp_path, tokenizer, guidance_token=value) for value in (8.0, 0.1)]
    one, other = (token(text_of(2), batch_of([0, 2]))["embeds"] for token in tokens)
    assert torch.equal(one, other)


def test_other_features_are_another_run(tmp_path, tokenizer):
    one = token_of(tmp_path, tokenizer).identity
    assert one == token_of(tmp_path, tokenizer).identity and "--guidance_features" in one
    features = read_features(tmp_path / "f.safetensors")
    write_features(tmp_path / "f.safetensors", Features(features.rows + 1, features.digests, "c", "m"))
    options = GuidanceOptions(guidance_token=1.0, guidance_features=str(tmp_path / "f.safetensors"))
    assert clip_token_of(options, rows_of(), tokenizer).identity != one


# ----------------------------------------------------------------------------------------------------------------------
# Before the run


def told(options: GuidanceOptions, rows: Sequence[SimpleNamespace], width: int) -> list[Problem]:
    return list(clip_token.problems(options, rows, width))


def test_nothing_is_asked_without_the_flag_and_nothing_is_wrong_with_all_there(tmp_path):
    rows = rows_of()
    assert told(GuidanceOptions(), rows, 2048) == []
    there = GuidanceOptions(guidance_token=1.0, guidance_features=str(written(tmp_path, rows)))
    assert told(there, rows, CLIP_WIDTH) == []


def test_without_features_the_command_that_extracts_them_is_named():
    problem, = told(GuidanceOptions(guidance_token=1.0), rows_of(), 768)
    assert problem.fix.startswith("python -m trainkit.tools extract-clip-features --images /data "
                                  "--clip openai/clip-vit-large-patch14 --out features.safetensors")
    flags = [word for word in problem.fix.split() if word.startswith("--")][:-1]
    script.parse([word for flag in flags for word in (flag, "x")])  # SystemExit if there were no such flag
    of_table = [SimpleNamespace(id="row 0", source=object(), digest="0" * 32)]
    assert "--dataset_name NAME" in told(GuidanceOptions(guidance_token=1.0), of_table, 768)[0].fix
    for width in (1280, 2048):  # not every model of wide text is SDXL
        problem, = told(GuidanceOptions(guidance_token=1.0), rows_of(), width)
        assert f"{width}; no CLIP we know projects images to more than 1024" in problem.why


def test_images_without_features_are_named(tmp_path):
    file = written(tmp_path, rows_of()[1:2])
    problem, = told(GuidanceOptions(guidance_token=1.0, guidance_features=str(file)), rows_of(), CLIP_WIDTH)
    assert "2 images" in problem.what and "p0.png" in problem.why and "p1.png" not in problem.why
    assert f"--images /data --clip 'assets/a clip' --out {file}" in problem.fix and problem.kind == "data"


@pytest.mark.parametrize(("width", "fix"), [
    (768, "openai/clip-vit-large-patch14"), (1024, "laion/CLIP-ViT-H-14"), (2048, "leave the token out"), (640, "640"),
])
def test_features_of_another_width_are_refused_with_both_numbers(tmp_path, width, fix):
    file = written(tmp_path, rows_of())
    more = [*rows_of(), *rows_of(["new"] * 4)]  # adding their features to this file would not help
    problem, = told(GuidanceOptions(guidance_token=1.0, guidance_features=str(file)), more, width)
    assert f"{CLIP_WIDTH} wide" in problem.what and f"{width} wide" in problem.what and fix in problem.fix


def test_a_missing_file_is_one_problem(tmp_path):
    problem, = told(GuidanceOptions(guidance_token=1.0, guidance_features=str(tmp_path / "no")), rows_of(), CLIP_WIDTH)
    assert problem.where == f"--guidance_features {tmp_path / 'no'}"
