"""Every checkpoint holds a LoRA that works: the weights of its step, averaged where averages train, in both layouts."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.compare import same_tensors
from tests.support.made_up_run import make_run
from tests.support.text import load_sdxl
from tests.support.trainers import command, forked, make_images
from trainkit import lora_files, rng
from trainkit.adapters import Adapters, add_adapters
from trainkit.errors import UserError
from trainkit.export import verify
from trainkit.inference import embeddings_of, fused_loras, load_pipeline, lora_file, lora_problems, missing_file
from trainkit.lora_file import LoraFile, rounding
from trainkit.lora_files import LoraFiles
from trainkit.options import LoraOptions
from trainkit.report.facts import RunFacts
from trainkit.runtime.weight_files import DIFFUSERS_FILE, KOHYA_FILE, at_step, step_files

KINDS = {
    "lora": {}, "dora": dict(use_dora=True), "loha": dict(lora_type="loha"), "lokr": dict(lora_type="lokr"),
    "convolutions": dict(lora_layers="all-linear+conv"), "pissa": dict(init_lora_weights="pissa"),
    "rslora": dict(use_rslora=True),
}


def options(folder: Path, **changes) -> SimpleNamespace:
    return SimpleNamespace(**dict(output_dir=str(folder), keep_loras=True, output_kohya_format=False, metadata="full",
               save_paper_dora=False, svd_rank=None) | changes)


def trained(family, **changes) -> Adapters:
    """Adapters that do something."""
    made = add_adapters(family.denoiser, LoraOptions(rank=2, **changes), targets=family.lora_targets, seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters().items():
            parameter.add_(torch.randn(parameter.shape, generator=rng.generator("test", name)) / 20)
    return made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "dog") / "checkpoint-12"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_both_files_of_every_kind_verified(tiny_sdxl, checkpoint, monkeypatch, kind):
    family = load_sdxl(tiny_sdxl)
    adapters, run = trained(family, **KINDS[kind]), checkpoint.parent
    files = LoraFiles(options(run), family, adapters, num_images=22)
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "compare", None)  # the factors prove every module, and no product is computed
        files.write(checkpoint, 12)
    webui = run / "dog-step00000012.safetensors"
    assert {p.name for p in run.glob("*.safetensors")} == {webui.name} and files.beside() == {webui: 12}
    assert [p.name for p in checkpoint.iterdir()] == [DIFFUSERS_FILE]
    assert verify(checkpoint / DIFFUSERS_FILE, [adapters], family, layout="diffusers") < 1e-6
    assert verify(webui, [adapters], family, layout="webui") < 2e-3
    for path, told in ((checkpoint / DIFFUSERS_FILE, files.bytes_in()), (webui, files.bytes_beside())):
        assert told == pytest.approx(path.stat().st_size, rel=0.35), "what is told at the start is about right"


def test_the_headers_tell_the_step_and_not_how_far_the_run_is(tiny_sdxl, checkpoint):
    family = load_sdxl(tiny_sdxl)
    LoraFiles(options(checkpoint.parent), family, trained(family), num_images=22).write(checkpoint, 12)
    for path in (checkpoint / DIFFUSERS_FILE, checkpoint.parent / "dog-step00000012.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_steps"] == "12" and file.metadata()["ss_max_train_steps"] == "30"


@pytest.mark.parametrize("layout", ["write_diffusers", "write_kohya"])
def test_a_checkpoint_whose_lora_does_not_hold_the_trained_weights_is_told(
        tiny_sdxl, checkpoint, monkeypatch, layout):
    family, write = load_sdxl(tiny_sdxl), getattr(lora_files, layout)

    def damaged(*args, **more) -> None:
        write(*args, **more)
        path = next(arg for arg in args if isinstance(arg, Path))
        path.write_bytes(path.read_bytes()[:-2] + b"\x00\x7c")

    monkeypatch.setattr(lora_files, layout, damaged)
    with pytest.raises(UserError) as caught:
        LoraFiles(options(checkpoint.parent), family, trained(family)).write(checkpoint, 12)
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("asked", [False, True])
def test_the_webui_file_comes_under_the_diffusers_scripts_name_too_where_it_is_asked_for(tiny_sdxl, checkpoint, asked):
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    written = LoraFiles(options(run, output_kohya_format=asked), family, trained(family)).final()
    assert [p.name for p in written] == [DIFFUSERS_FILE, "dog.safetensors", *([KOHYA_FILE] if asked else [])]
    if asked:
        same_tensors(run / KOHYA_FILE, run / "dog.safetensors")


def test_a_dora_comes_for_lycoris_and_as_a_plain_lora_where_it_is_asked_for(tiny_sdxl, checkpoint, caplog):
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    adapters = trained(family, use_dora=True)
    with caplog.at_level("INFO"):
        written = LoraFiles(options(run, save_paper_dora=True, svd_rank=4), family, adapters).final()
    assert [p.name for p in written] == [DIFFUSERS_FILE, "dog.safetensors", "dog_lycoris.safetensors",
                                         "dog_svd.safetensors"]
    paper, plain = (LoraFile.read(run / f"dog_{end}.safetensors", names=family.names) for end in ("lycoris", "svd"))
    lost = [0.0, 0.0]
    for path in adapters.layers:
        place = ("unet", path)
        assert torch.equal(paper.layers[place].magnitude_value, adapters.magnitude(path))
        wanted = adapters.delta_weight(path)
        found = plain.layers[place].update.map(lambda t: t.double()).delta()
        assert torch.linalg.matrix_rank(found) <= 4 and plain.layers[place].magnitude is None
        lost[0], lost[1] = lost[0] + float((wanted - found).square().sum()), lost[1] + float(wanted.square().sum())
    said = re.search(r"rank 4: it lacks ([\d.]+) %", caplog.text)
    assert said and float(said[1]) == pytest.approx(100 * (lost[0] / lost[1]) ** 0.5, abs=0.2)


def test_a_plain_lora_has_no_files_of_a_dora(tiny_sdxl, checkpoint):
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    written = LoraFiles(options(run, save_paper_dora=True, svd_rank=4), family, trained(family)).final()
    assert [p.name for p in written] == [DIFFUSERS_FILE, "dog.safetensors"]


@pytest.mark.parametrize("level, kept, left_out", [
    ("full", ["ss_seed", "modelspec.trigger_phrase", "modelspec.thumbnail", "sshs_model_hash"], []),
    ("minimal", ["modelspec.title", "sshs_model_hash", "ss_base_model_version"],
     ["ss_seed", "modelspec.trigger_phrase", "modelspec.thumbnail", "modelspec.date", "ss_sd_model_name"]),
    ("none", ["ss_base_model_version", "ss_network_dim", "format"], ["modelspec.title", "ss_output_name", "ss_seed"])])
def test_the_headers_say_as_much_as_was_asked_for(tiny_sdxl, checkpoint, level, kept, left_out):
    """Every file can be read whatever its header says; a DoRA's too, which needs to say its norm."""
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    LoraFiles(options(run, metadata=level), family, trained(family, use_dora=True)).final()
    for name in (DIFFUSERS_FILE, "dog.safetensors"):
        with safe_open(run / name, "pt") as file:
            said = file.metadata()
        assert not said.keys() & {*left_out}
        assert said.keys() >= {*kept} or name == DIFFUSERS_FILE
    assert said["ss_dora_norm"] == "base"
    assert RunFacts(run).base_series == "stable-diffusion-xl", "the model card needs no more than the least"


def test_the_thumbnail_is_the_last_preview_made_small(tiny_sdxl, checkpoint):
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    Image.new("RGB", (1024, 512), (240, 20, 20)).save(run / "samples" / "step_000030_p01_s0.png")
    LoraFiles(options(run), family, trained(family)).final()
    with safe_open(run / "dog.safetensors", "pt") as file:
        kind, data = file.metadata()["modelspec.thumbnail"].split(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (256, 128) and image.getpixel((9, 9))[0] > 200


# ----------------------------------------------------------------------------------------------------------------------
# Which file a user means


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints 10 and 20, of which 10 was deleted but for what it left; a LoRA and new tokens."""
    folder = tmp_path / "dog"
    for name in ("checkpoint-20/" + DIFFUSERS_FILE, "checkpoint-20/dog_emb.safetensors", DIFFUSERS_FILE,
                 "dog.safetensors", "dog_emb.safetensors", "dog-step00000010.safetensors",
                 "dog-step00000010_emb.safetensors", "dog-step00000020.safetensors",
                 "dog-step00000020_emb.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("said, lora, embeddings", [
    ("dog", DIFFUSERS_FILE, "dog_emb.safetensors"),
    ("dog@20", f"checkpoint-20/{DIFFUSERS_FILE}", "checkpoint-20/dog_emb.safetensors"),
    ("dog@0020", f"checkpoint-20/{DIFFUSERS_FILE}", "checkpoint-20/dog_emb.safetensors"),
    ("dog/checkpoint-20", f"checkpoint-20/{DIFFUSERS_FILE}", "checkpoint-20/dog_emb.safetensors"),
    ("dog@10", "dog-step00000010.safetensors", "dog-step00000010_emb.safetensors"),
    ("dog/dog.safetensors", "dog.safetensors", "dog.safetensors"),
    ("dog@30", f"checkpoint-30/{DIFFUSERS_FILE}", "checkpoint-30/dog_emb.safetensors"),
])
def test_a_run_a_checkpoint_or_a_step_names_its_files(run, said, lora, embeddings):
    path = run.parent / said
    assert (lora_file(path), embeddings_of(path)) == (run / lora, run / embeddings)


def test_a_renamed_run_is_still_found(run):
    moved = run.rename(run.with_name("wolf"))
    assert lora_file(moved.with_name("wolf@20")).is_file() and embeddings_of(moved).name == "dog_emb.safetensors"


def test_a_path_with_an_at_sign_that_is_there_means_itself(run):
    odd = run.rename(run.with_name("me@2024"))
    assert lora_file(odd) == odd / DIFFUSERS_FILE and at_step(odd) == (odd, None)
    assert lora_file(Path(f"{odd}@20")).is_file()
    assert at_step(Path("dog@x")) == (Path("dog@x"), None) and at_step(Path("@7")) == (Path("@7"), None)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(run):
    problem = missing_file("--lora", lora_file(run.parent / "dog@15"), "")
    assert problem.why == f"{run} has files of the steps 10, 20" and problem.fix == f"--lora {run}@20"
    assert "name a file" in missing_file("--lora", lora_file(run.parent / "cat@15"), "").fix


def test_files_of_steps_are_told_from_others(run):
    (run / "hotdog-step00000010.safetensors").touch()
    (run / "dog-step10.safetensors").touch()
    assert list(step_files(run, "dog").values()) == [10, 10, 20, 20]


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "convolutions"])
def test_both_files_of_a_run_put_the_trained_weights_into_the_stock_pipeline(tiny_sdxl, checkpoint, kind):
    """A DoRA for WebUIs too, whose magnitudes are turned back with the base's weights."""
    family, run = load_sdxl(tiny_sdxl), checkpoint.parent
    adapters = trained(family, **KINDS[kind])
    LoraFiles(options(run), family, adapters).write(checkpoint, 12)
    for path, tolerance in ((checkpoint / DIFFUSERS_FILE, 1e-5), (run / "dog-step00000012.safetensors", 2e-3)):
        assert not [*lora_problems([path], str(tiny_sdxl))]
        pipe = load_pipeline(str(tiny_sdxl), "float32")
        before = {module: pipe.unet.get_submodule(module).weight.detach().clone() for module in adapters.layers}
        with fused_loras(pipe, [(path, 0.5)]):
            for module, W in before.items():
                moved = (pipe.unet.get_submodule(module).weight - W).flatten(1).double()
                wanted = 0.5 * adapters.delta_weight(module)
                assert (moved - wanted).abs().max() < tolerance * wanted.abs().max() + 1e-7, path.name
        assert all(torch.equal(pipe.unet.get_submodule(module).weight, W) for module, W in before.items())


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

RUNS = {
    "plain": {},
    "averages": dict(use_ema=True, ema_decay=0.5),
    "schedule-free": dict(optimizer="schedule_free_adamw"),
    "text encoders": dict(train_text_encoder=True, text_encoder_lr=1e-3),
    "new tokens": dict(train_text_encoder_ti=True, token_abstraction="TOK", train_text_encoder_ti_frac=1),
    "tokens alone": dict(train_text_encoder_ti=True, token_abstraction="TOK", train_text_encoder_ti_frac=1,
                         train_unet_frac=0),
}


@pytest.mark.trains
@pytest.mark.parametrize("kind", RUNS)
def test_the_lora_of_a_checkpoint_is_the_one_a_run_of_so_many_steps_ends_with(tiny_sdxl, tmp_path, kind):
    """Averaged weights, new tokens and all, to the bit; and the stock pipeline loads it from the folder's name."""
    data = make_images(tmp_path / "data", n=4)
    common = dict(checkpointing_steps=2, lr_scheduler="constant") | RUNS[kind]
    for name, steps in (("long", 3), ("short", 2)):
        asked = command(tiny_sdxl, data, tmp_path / name / "dog", max_train_steps=steps, **common)
        done = forked(asked, log=tmp_path / f"{name}.log")
        assert done.code == 0, done.output
    long, short = tmp_path / "long" / "dog", tmp_path / "short" / "dog"
    finals = {p.name for p in short.glob("*.safetensors") if "-step" not in p.name}
    for name in finals:
        step = re.sub(r"^dog", "dog-step00000002", name)
        same_tensors(short / name, long / "checkpoint-2" / name if name == DIFFUSERS_FILE else long / step)
    assert finals == {p.name.replace("-step00000002", "") for p in long.glob("*-step00000002*")} | (
        {DIFFUSERS_FILE} if kind != "tokens alone" else set())
    if "tokens" in kind:
        same_tensors(short / "dog_emb.safetensors", long / "checkpoint-2" / "dog_emb.safetensors")
    if kind != "tokens alone":
        loads_in_the_stock_pipeline(tiny_sdxl, long / "checkpoint-2")


def loads_in_the_stock_pipeline(model: Path, folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(folder))
    held = {name.replace(".default_0", "") for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    written = {name.removeprefix("unet.") for name in load_file(folder / DIFFUSERS_FILE) if name.startswith("unet.")}
    assert held == written and written


@pytest.mark.trains
@pytest.mark.parametrize("changes, checkpoints, loras", [
    (dict(), [4, 6, 7], [2, 4, 6, 7]), (dict(no_keep_loras=True), [4, 6, 7], [4, 6, 7]),
    (dict(compat="diffusers"), [4, 6], [2, 4, 6]),
], ids=str)
def test_seven_steps_with_two_kept(tiny_sdxl, tmp_path, changes, checkpoints, loras):
    out = tmp_path / "dog"
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=4), out, max_train_steps=7, checkpointing_steps=2,
                   checkpoints_total_limit=2, output_kohya_format=True, **changes)
    done = forked(argv, log=tmp_path / "log")
    assert done.code == 0, done.output
    assert sorted(int(p.name.partition("-")[2]) for p in out.glob("checkpoint-*")) == checkpoints
    assert sorted(step_files(out, "dog").values()) == loras
    assert "LoRA for WebUIs" in done.output and (out / KOHYA_FILE).is_file()
    assert KOHYA_FILE in (out / "README.md").read_text("utf-8")
    for folder in out.glob("checkpoint-*"):
        (folder / DIFFUSERS_FILE).write_bytes(b"damaged")
    again = forked([*argv, "--resume_from_checkpoint=latest"], log=tmp_path / "log2")
    assert again.code == 0, again.output
    assert sorted(int(p.name.partition("-")[2]) for p in out.glob("checkpoint-*")) == checkpoints


@pytest.mark.trains
def test_a_command_that_is_run_twice_keeps_the_first_runs_files(tiny_sdxl, tmp_path):
    out = tmp_path / "dog"
    argv = command(tiny_sdxl, make_images(tmp_path / "data", n=4), out, report_to="tensorboard", checkpointing_steps=1)
    first = forked(argv, log=tmp_path / "log")
    assert first.code == 0, first.output
    (out / "notes.txt").write_text("the user's")
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "notes.txt"}
    second = forked([*argv, "--seed=5"], log=tmp_path / "log2")
    assert second.code == 0, second.output
    assert "previous-1" in second.output and (out / "notes.txt").read_text() == "the user's"
    after = {p.relative_to(out / "previous-1"): p.read_bytes() for p in (out / "previous-1").rglob("*") if p.is_file()}
    assert after == {path: data for path, data in before.items() if path.name != ".run.lock"}
    with pytest.raises(AssertionError):
        same_tensors(out / DIFFUSERS_FILE, out / "previous-1" / DIFFUSERS_FILE)
    assert len(list(out.glob("logs/*/events*"))) == 1, "two runs in one curve"
    shutil.rmtree(out / "previous-1")


def test_headers_have_width_and_height_and_count_the_epochs_of_all_resolutions(tmp_path):
    """As kohya's trainers write them; the made-up run has 30 steps of 4 images."""
    run = RunFacts(make_run(tmp_path / "run", resolution="96,64", resolutions="32,64", repeats=2))
    found = lora_files.header(run, num_images=5, step=30)
    assert found["ss_resolution"] == "(96, 64)" and found["ss_num_epochs"] == "6"
    assert not [name for name in found if "bucket" in name]
    limits = dict(min_bucket_reso=256, max_bucket_reso=2048, bucket_no_upscale=False)
    run = RunFacts(make_run(tmp_path / "buckets", enable_bucket=True, **limits))
    assert lora_files.header(run, num_images=5, step=30).items() >= {
        "ss_enable_bucket": "True", "ss_min_bucket_reso": "256", "ss_max_bucket_reso": "2048",
        "ss_bucket_no_upscale": "False"}.items()
    run = RunFacts(make_run(tmp_path / "default", enable_bucket=True, resolution="96,64",
                            **limits | {"max_bucket_reso": None}))
    assert lora_files.header(run, num_images=5, step=30)["ss_max_bucket_reso"] == "192"
    run = RunFacts(make_run(tmp_path / "none", enable_bucket=False, **limits))
    assert not [name for name in lora_files.header(run, num_images=5, step=30) if "bucket" in name]
