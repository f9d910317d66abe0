"""Base models and VAEs of one file: read exactly, trained as the folder they convert to, or refused by name."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.compare import same_bits, same_tensors
from tests.support.single_files import (
    build_folder,
    clip_tensors,
    open_clip_tensors,
    text_encoder,
    unet,
    unet_name,
    vae,
    vae_tensors,
    write_single_file,
)
from tests.support.trainers import command, forked, make_images
from trainkit import families
from trainkit.data import class_images
from trainkit.diffusion import AS_SAVED, Eps, Level, ScheduleChange, V, make_schedule
from trainkit.families import single_file
from trainkit.families.pretrained import MODEL_FLAG
from trainkit.families.single_file import model_at
from trainkit.families.vocabulary import clip_tokenizer
from trainkit.inference import base_problems, generate_images, load_pipeline
from trainkit.options import ModelOptions, ObjectiveOptions, PriorOptions
from trainkit.reading import read_tensor_header
from trainkit.runtime.weight_files import DIFFUSERS_FILE
from trainkit.training.doubt import Doubt
from trainkit.training.step import TrainStep

CAPTIONED, DREAMBOOTH = "train_text_to_image_lora", "train_dreambooth_lora_sdxl_advanced"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def models(root: Path):
    """name -> a model's folder and its file, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def model(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = build_folder(root / name, name, prediction_type="v_prediction" if name == "sd2" else "epsilon")
            made[name] = folder, write_single_file(
                folder, root / f"{name}.safetensors", markers=("v_pred",) if name == "sd2" else ())
        return made[name]

    return model


@pytest.fixture(scope="module")
def images(root: Path) -> Path:
    return make_images(root / "images", n=3)


def loaded(path: Path, *, schedule: ScheduleChange = AS_SAVED, dtype: torch.dtype = torch.float32, **more: object):
    options = ModelOptions(pretrained_model_name_or_path=str(path), **more)
    return families.of(options).load(options, device=CPU, weight_dtype=dtype, schedule=schedule)


def problems(path: Path, **more: object) -> list[str]:
    options = ModelOptions(pretrained_model_name_or_path=str(path))
    return [str(problem) for problem in families.of(options).problems(str(path), resolution=64, **more)]


# ----------------------------------------------------------------------------------------------------------------------
# The vocabulary that ships


def test_clips_vocabulary_gives_the_known_ids():
    ids = clip_tokenizer(pad_token="!", model_max_length=16)("a photo of an astronaut riding a horse",
                                                             padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407, *[0] * 6]


def test_the_first_encoders_padding_is_the_end_token():
    assert clip_tokenizer(pad_token="<|endoftext|>", model_max_length=5)("a cat", padding="max_length").input_ids == [
        49406, 320, 2368, 49407, 49407]


# ----------------------------------------------------------------------------------------------------------------------
# Read exactly


@pytest.mark.trains
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_file_is_the_model_of_its_folder(models, name):
    folder, file = models(name)
    assert problems(file) == []
    one, two = loaded(file), loaded(folder)
    parts = [(one.denoiser, two.denoiser), (one.vae, two.vae), *zip(one.text_encoders, two.text_encoders, strict=True)]
    for ours, theirs in parts:
        assert same_bits(ours.state_dict(), theirs.state_dict())
        assert same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert one.schedule.prediction_type == two.schedule.prediction_type == ("v_prediction" if name == "sd2" else
                                                                             "epsilon")
    assert torch.equal(one.schedule.a, two.schedule.a)
    prompts = ["a photo of an astronaut riding a horse", ""]
    assert same_bits(dict(one.encode_prompts(prompts)), dict(two.encode_prompts(prompts)))


@pytest.mark.trains
def test_diffusers_reads_the_test_files_as_we_do(models):
    """Evidence that the writer here and the reader agree on the original layout, and not only with each other."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for name in ("sd1", "sdxl"):
        folder, file = models(name)
        ours = loaded(file)
        for network, part in ((ours.denoiser, UNet2DConditionModel), (ours.vae, AutoencoderKL)):
            place = "unet" if part is UNet2DConditionModel else "vae"
            theirs = part.from_single_file(str(file), config=str(folder), subfolder=place)
            assert same_bits(network.state_dict(), theirs.state_dict())


@pytest.mark.trains
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_a_smaller_format_are_cast_on_load(models, tmp_path, dtype):
    folder, _ = models("sd1")
    small = loaded(write_single_file(folder, tmp_path / "small.safetensors", dtype=dtype), dtype=torch.bfloat16)
    name = "down_blocks.0.resnets.0.conv1.weight"
    whole = loaded(folder).denoiser.state_dict()[name]
    assert torch.equal(small.denoiser.state_dict()[name], whole.to(dtype).to(torch.bfloat16))
    assert small.vae.dtype == torch.float32


@pytest.mark.trains
def test_a_text_encoder_without_the_level_text_model_is_read(models, tmp_path):
    folder, _ = models("sdxl")
    bare = write_single_file(folder, tmp_path / "bare.safetensors", text_model=False)
    assert problems(bare) == []
    assert same_bits(loaded(bare).text_encoders[0].state_dict(), loaded(folder).text_encoders[0].state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Trained, and drawn with


@pytest.mark.trains
@pytest.mark.parametrize("trainer, name", [(DREAMBOOTH, "sdxl"), (CAPTIONED, "sd1"), (CAPTIONED, "sd2")])
def test_file_and_folder_train_the_same_adapters(models, images, tmp_path, trainer, name):
    outs = []
    for kind, path in zip(("folder", "file"), models(name), strict=True):
        data = {"instance_data_dir": images} if trainer == DREAMBOOTH else {
            "instance_data_dir": None, "instance_prompt": None, "train_data_dir": images}
        argv = command(path, images, tmp_path / kind, **data)
        done = forked(argv, trainer=trainer, log=tmp_path / f"{kind}.log")
        assert done.code == 0, done.output
        assert ("epsilon is assumed" in done.output) == (kind == "file" and name != "sd2")
        outs.append(tmp_path / kind)
    same_tensors(*(out / DIFFUSERS_FILE for out in outs))
    check_metadata(outs[1] / "file.safetensors", models(name)[1])


def check_metadata(lora: Path, base: Path) -> None:
    """WebUIs find the base model of a LoRA by these."""
    data = base.read_bytes()
    with safe_open(lora, framework="pt") as opened:
        metadata = opened.metadata()
    found = {key: value for key, value in metadata.items() if key.startswith(("ss_sd_model", "ss_new_sd_model"))}
    assert found == {
        "ss_sd_model_name": base.name, "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
        "ss_sd_model_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]}


@pytest.mark.trains
def test_a_run_goes_on_with_a_copy_of_the_file_and_not_with_other_weights(models, images, tmp_path):
    _, file = models("sd1")
    base, out = tmp_path / "base.safetensors", tmp_path / "run"
    shutil.copy(file, base)
    argv = command(base, images, out, instance_data_dir=None, instance_prompt=None, train_data_dir=images,
                   checkpointing_steps=1, max_train_steps=2)
    assert forked(argv, trainer=CAPTIONED, log=tmp_path / "log").code == 0
    resume = [*argv, "--resume_from_checkpoint=checkpoint-1"]
    base.unlink()
    shutil.copy(file, base)  # another inode and date
    shutil.copy(out / DIFFUSERS_FILE, first := tmp_path / "first.safetensors")
    done = forked(resume, trainer=CAPTIONED, log=tmp_path / "log")
    assert done.code == 0, done.output
    same_tensors(out / DIFFUSERS_FILE, first)
    tensors = load_file(base)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, base)
    done = forked(resume, trainer=CAPTIONED, log=tmp_path / "log")
    assert done.code == 2 and "base model" in done.output, done.output


@pytest.mark.trains
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_tools_draw_with_a_file_what_they_draw_with_its_folder(models, name):
    pipes = [load_pipeline(str(path), "float32") for path in models(name)]
    one, two = (generate_images(pipe, ["a cat"], [torch.Generator().manual_seed(0)], steps=2, guidance_scale=5.0,
                                batch_size=1) for pipe in pipes)
    assert type(pipes[0].scheduler) is type(pipes[1].scheduler)
    assert one[0].tobytes() == two[0].tobytes()


@pytest.mark.trains
def test_generate_takes_a_file(models, tmp_path):
    argv = ["--base", str(models("sd1")[1]), "--prompt", "a cat", "--width=64", "--height=64", "--steps=1",
            "--out", str(tmp_path / "out")]
    done = forked(argv, trainer="trainkit.tools.generate", log=tmp_path / "log")
    assert done.code == 0 and [*(tmp_path / "out").glob("*.png")], done.output


@pytest.mark.trains
def test_class_images_are_made_with_a_file(models, images, tmp_path):
    prior = dict(with_prior_preservation=True, class_data_dir=tmp_path / "class", class_prompt="an icon",
                 num_class_images=2, max_train_steps=1)
    done = forked(command(models("sdxl")[1], images, tmp_path / "run", **prior), log=tmp_path / "log")
    assert done.code == 0 and len([*(tmp_path / "class").glob("*.png")]) == 2, done.output


# ----------------------------------------------------------------------------------------------------------------------
# A VAE of one file


@pytest.mark.trains
@pytest.mark.parametrize("layout", ["original", "Diffusers", "old Diffusers", "whole model"])
@pytest.mark.parametrize("base", ["file", "folder"])
def test_a_vae_of_one_file_replaces_that_of_the_model(models, tmp_path, layout, base):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = vae("sdxl")
    file = tmp_path / "vae.safetensors"
    if layout == "whole model":
        file = models("sd1")[1]
        other = loaded(file).vae
    elif layout == "original":
        save_file({name: tensor.contiguous() for name, tensor in vae_tensors(other, "")}, file)
    else:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if "old" in layout else {}
        save_file({renamed(name, names): tensor for name, tensor in other.state_dict().items()}, file)
    model = models("sdxl")[base == "file"]
    assert problems(model, vae_path=str(file)) == []
    found = loaded(model, pretrained_vae_model_name_or_path=str(file))
    assert same_bits(found.vae.state_dict(), other.state_dict())
    assert found.vae.config.scaling_factor == 0.13025  # the model's: a file does not tell
    assert found.file_metadata["ss_new_vae_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.file_metadata["ss_vae_name"] == file.name


@pytest.mark.trains
def test_a_base_without_a_vae_is_read_with_another_vae(models, tmp_path):
    bare = header_only(tmp_path, left_out="^first_stage")
    assert problems(bare, vae_path=str(models("sdxl")[1])) == []


def renamed(name: str, names: dict[str, str]) -> str:
    for now, before in names.items():
        name = name.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
    return name


def test_a_file_that_is_no_vae_is_refused(models, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"model.layers.0.weight": torch.zeros(2)}, file)
    found, = problems(models("sdxl")[0], vae_path=str(file))
    assert "no VAE of Stable Diffusion" in found and f"--pretrained_vae_model_name_or_path {file}" in found


# ----------------------------------------------------------------------------------------------------------------------
# What it predicts

MARKED = {
    "v_pred": (("v_pred",), {}, "v_prediction", False),
    "v_pred and ztsnr": (("v_pred", "ztsnr"), {}, "v_prediction", True),
    "ModelSpec's key": ((), {"modelspec.prediction_type": "v"}, "v_prediction", False),
    "ComfyUI's key": ((), {"modelspec.predict_key": "epsilon"}, "epsilon", False),
    "the marker outranks metadata": (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
}


@pytest.mark.parametrize("case", MARKED)
def test_marks_and_metadata_say_what_a_file_predicts(case, tmp_path):
    markers, metadata, prediction_type, zero_snr = MARKED[case]
    model = model_at(str(header_only(tmp_path, markers, metadata)), MODEL_FLAG)
    config = model.json("scheduler/scheduler_config.json")
    assert not model.assumes and config["prediction_type"] == prediction_type
    assert bool(config.get("rescale_betas_zero_snr")) == zero_snr
    assert make_schedule(config).ends_at_zero_snr == zero_snr


def test_a_file_without_marks_is_assumed_to_predict_epsilon(tmp_path):
    model = model_at(str(header_only(tmp_path)), MODEL_FLAG)
    assert model.assumes and model.json("scheduler/scheduler_config.json")["prediction_type"] == "epsilon"


@pytest.mark.trains
def test_sd_2_without_marks_needs_prediction_type(models, tmp_path):
    bare = write_single_file(models("sd2")[0], tmp_path / "sd2.safetensors")
    found, = problems(bare)
    assert "does not say what its UNet predicts" in found and "--prediction_type v_prediction" in found
    for chosen in ("v_prediction", "epsilon"):
        assert problems(bare, schedule=ScheduleChange(chosen)) == []
    marked = write_single_file(models("sd2")[0], tmp_path / "v.safetensors",
                               metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert problems(marked) == []


@pytest.mark.parametrize("truth, level, warned, open_after", [
    ("v", 0.6, True, False), ("epsilon", 0.6, False, False), ("v", 0.001, False, True), ("epsilon", 0.001, False, True),
])
def test_the_first_batch_warns_where_the_base_predicts_v(caplog, truth, level, warned, open_after):
    generator = torch.Generator().manual_seed(0)
    x0, n, error = torch.randn(3, 2, 4, 8, 8, generator=generator)
    s = torch.full((2,), level).sqrt()
    at = Level((1 - s**2).sqrt(), s, cond=s, time=s)
    target = {"v": V(), "epsilon": Eps()}[truth].target(x0, n, at)
    doubt = Doubt(SimpleNamespace(name="base.safetensors"))
    for _ in range(2):
        doubt(0, target + 0.3 * error, x0=x0, n=n, level=at)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == warned and doubt.open == open_after
    assert not warned or ("base.safetensors seems to predict v" in warnings[0]
                          and "--prediction_type v_prediction" in warnings[0])


def test_a_resumed_run_is_not_doubted(caplog):
    x0, n = torch.randn(2, 1, 4, 8, 8)
    half = torch.full((1,), 0.5).sqrt()
    at = Level(half, half, cond=half, time=half)
    Doubt(SimpleNamespace(name="base"))(400, V().target(x0, n, at), x0=x0, n=n, level=at)
    assert not caplog.records


@pytest.mark.parametrize("doubted", [True, False])
def test_only_a_model_that_does_not_say_what_it_predicts_is_doubted(doubted):
    step = TrainStep(SimpleNamespace(doubted=doubted), *[None] * 4)
    assert [type(watch) for watch in step.watches] == [Doubt] * doubted


# ----------------------------------------------------------------------------------------------------------------------
# Refused by name

UNET = "model.diffusion_model."


def header_only(folder: Path, markers: tuple[str, ...] = (), metadata: dict[str, str] | None = None, *,
                left_out: str = "^$", **more: torch.Tensor) -> Path:
    """A file with the tensors of a tiny SDXL model, all zeros."""
    with torch.device("meta"):
        shapes = {f"{UNET}{unet_name(name, network.config)}": tensor for network in [unet("sdxl")]
                  for name, tensor in network.state_dict().items()}
        shapes |= dict(clip_tensors(text_encoder("sdxl", 0), "conditioner.embedders.0.transformer.", True))
        shapes |= dict(open_clip_tensors(text_encoder("sdxl", 1), "conditioner.embedders.1.model."))
        shapes |= dict(vae_tensors(vae("sdxl"), "first_stage_model."))
    tensors = {name: torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn) for name, tensor in shapes.items()
               if not re.search(left_out, name)}
    tensors |= {name: torch.zeros(0) for name in markers}
    save_file(tensors | more, file := folder / "made.safetensors", metadata)
    return file


ALONE = {  # tensors of a file -> what the message says
    "LoRA of kohya": (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "the file is a LoRA"),
    "LoRA of PEFT": (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "the file is a LoRA"),
    "embedding": (["clip_l", "clip_g"], "an embedding (textual inversion)"),
    "FLUX": (["double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
    "FLUX in a checkpoint": ([f"{UNET}double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
    "SD 3": ([f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"], "an SD 3 model"),
    "VAE": (["encoder.down.0.block.0.conv2.weight"], "a VAE, not a base model"),
    "Diffusers' UNet": (["down_blocks.0.resnets.0.conv1.weight"], "the UNet of a Diffusers folder alone"),
    "ControlNet": (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    "something": (["model.layers.0.mlp.weight"], "not a base model of SD 1.x, SD 2.x or SDXL"),
    "nothing": ([], "no tensor at all"),
}


@pytest.mark.parametrize("case", ALONE)
def test_other_files_are_named(case, tmp_path):
    names, words = ALONE[case]
    save_file({name: torch.zeros(1) for name in names}, file := tmp_path / "x.safetensors")
    found, = problems(file)
    assert words in found and f"{MODEL_FLAG} {file}" in found


CHANGED = {  # changes of a good SDXL file -> what the message says
    "refiner": (dict(left_out=r"^conditioner", **{"conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}),
                "an SDXL refiner cannot be trained"),
    "inpainting": ({f"{UNET}input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}, "an inpainting model"),
    "instruct-pix2pix": ({f"{UNET}input_blocks.0.0.weight": torch.zeros(64, 8, 3, 3)}, "an instruct-pix2pix model"),
    "ComfyUI's fp8": ({f"{UNET}out.2.scale_weight": torch.zeros(1)}, "quantised for ComfyUI"),
    "scaled_fp8": ({"scaled_fp8": torch.zeros(2)}, "quantised for ComfyUI"),
    "comfy_quant": ({f"{UNET}out.2.comfy_quant": torch.zeros(2, dtype=torch.uint8)}, "quantised for ComfyUI"),
    "bitsandbytes": ({f"{UNET}out.2.weight.absmax": torch.zeros(2)}, "quantised by bitsandbytes"),
    "int8": ({f"{UNET}out.2.weight": torch.zeros(4, 64, 3, 3, dtype=torch.int8)}, "stored as I8"),
    "EDM": ({"edm_mean": torch.zeros(4)}, "a model of EDM"),
    "UNet alone": (dict(left_out="^(conditioner|first_stage)"), "lacks a text encoder"),
    "one text encoder": (dict(left_out=r"^conditioner\.embedders\.1"), "lacks text encoder 2"),
    "no VAE": (dict(left_out="^first_stage"), "no VAE there"),
    "a missing layer": (dict(left_out=r"output_blocks\.1\.0\.in_layers\.2\.bias"),
                        "it lacks model.diffusion_model.output_blocks.1.0.in_layers.2.bias"),
    "a layer too many": ({f"{UNET}output_blocks.0.0.adapter.weight": torch.zeros(1)}, "belong to no layer"),
    "another shape": ({f"{UNET}out.2.bias": torch.zeros(5)}, "is [5], which makes no [4]"),
}


@pytest.mark.trains
@pytest.mark.parametrize("case", CHANGED)
def test_what_cannot_be_trained_is_named(case, tmp_path):
    changes, words = CHANGED[case]
    found, = problems(header_only(tmp_path, **changes))
    assert words in found, found


def test_a_pickled_file_is_refused_with_the_command_that_converts_it(tmp_path):
    """The command runs, and its file is read."""
    whole = load_file(header_only(tmp_path))
    torch.save({"state_dict": whole, "global_step": 1}, pickled := tmp_path / "a model.ckpt")
    found, = problems(pickled)
    assert "is pickled and not read" in found
    code = shlex.split(found.rpartition("convert it once: ")[2])
    assert code[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *code[1:]], check=True)
    assert problems(tmp_path / "a model.safetensors") == []


@pytest.mark.parametrize("name", ["model.gguf", "model", "model.safetensors.part"])
def test_a_file_of_another_suffix_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    found, = problems(tmp_path / name)
    assert "is no .safetensors file" in found


def edited(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


A_TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "no safetensors file"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in to download</body></html>", "no safetensors file"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "no safetensors file"),
    "a huge header": ((2**40).to_bytes(8, "little") + b"{}", "no safetensors file"),
    "a header beyond the end": ((1000).to_bytes(8, "little") + b"{}", "its header has 1,000 bytes, and the file 10"),
    "cut": (edited({"a": A_TENSOR}, bytes(7)), "was not copied whole"),
    "with more behind": (edited({"a": A_TENSOR}, bytes(9)), "was not copied whole"),
    "no JSON": (edited(b"{never"), "its header is damaged"),
    "no object": (edited([1]), "it is no object"),
    "deep JSON": (edited(b"[" * 100_000), "its header is damaged"),
    "a shape that does not fit": (edited({"a": {**A_TENSOR, "shape": [3]}}, bytes(8)), "its header is damaged: a is"),
    "a negative size": (edited({"a": {**A_TENSOR, "shape": [-2, -1]}}, bytes(8)), "its header is damaged: a is"),
    "no entry": (edited({"a": 1}, bytes(8)), "its header is damaged: a is 1"),
    "metadata that are no texts": (edited({"__metadata__": {"a": 1}}), "the metadata are not texts"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_message(case, tmp_path):
    data, words = DAMAGED[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    found, = problems(tmp_path / "x.safetensors")
    assert "x.safetensors cannot be read" in found and words in found


def test_the_folder_of_a_single_file_is_answered_with_the_file(tmp_path):
    file = header_only(tmp_path)
    found, = problems(tmp_path)
    assert "not a Diffusers model folder" in found and f"a model of one file: {file}" in found


@pytest.mark.trains
def test_whatever_the_shapes_are_it_is_one_message(tmp_path, monkeypatch):
    """Tensors are taken away, or have another shape, one at a time."""
    file = header_only(tmp_path)
    whole, drawn = read_tensor_header(file), random.Random(0)
    names = [*whole.shapes]
    assert model_at(str(file), MODEL_FLAG).unreachable("") == []
    for name in [*drawn.sample(names, 8), "conditioner.embedders.1.model.text_projection",
                 "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"]:
        for shape in (None, (), (2, 0)):
            shapes = {**whole.shapes, name: shape}
            if shape is None:
                del shapes[name]
            monkeypatch.setattr(single_file, "_header", lambda *_, shapes=shapes: replace(whole, shapes=shapes))
            found = model_at(str(file), MODEL_FLAG).unreachable("")
            assert len(found) == (not single_file.UNUSED.search(name)), (name, shape, found)


def test_a_single_file_has_no_variant(models):
    found, = problems(models("sdxl")[1], variant="fp16")
    assert "leave --variant out" in found


# ----------------------------------------------------------------------------------------------------------------------
# What is said of it afterwards


@pytest.mark.trains
def test_a_model_of_v_prediction_and_zero_terminal_snr_from_its_marks_to_the_card(models, images, tmp_path):
    marked = write_single_file(models("sdxl")[0], tmp_path / "noob.safetensors", markers=("v_pred", "ztsnr"))
    done = forked(command(marked, images, tmp_path / "run", max_train_steps=1), log=tmp_path / "log")
    assert done.code == 0 and "assumed" not in done.output, done.output
    with safe_open(tmp_path / "run/run.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_zero_terminal_snr"] == "True"
    card = (tmp_path / "run/README.md").read_text("utf-8")
    assert 'StableDiffusionXLPipeline.from_single_file("noob.safetensors")' in card
    assert ('pipe.scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction", '
            'rescale_betas_zero_snr=True, timestep_spacing="trailing")') in card
    assert str(tmp_path) not in card


def test_generate_says_how_a_file_of_sd_2_is_told(models, tmp_path):
    bare = write_single_file(models("sd2")[0], tmp_path / "sd2.safetensors")
    found, = base_problems(str(bare), None)
    assert "--prediction_type v_prediction" in found.fix and found.where == f"--base {bare}"
    assert base_problems(str(bare), None, prediction_type="v_prediction") == []


@pytest.mark.trains
def test_prediction_type_changes_what_the_tools_and_class_images_draw_with(models):
    _, file = models("sdxl")
    assert load_pipeline(str(file), "float32", "v_prediction").scheduler.config.prediction_type == "v_prediction"
    assert load_pipeline(str(file), "float32").scheduler.config.prediction_type == "epsilon"
    painters = [class_images.Painter.load(SimpleNamespace(
        model=ModelOptions(pretrained_model_name_or_path=str(file)), prior=PriorOptions(class_prompt="a cat"),
        objective=ObjectiveOptions(prediction_type=told), data=SimpleNamespace(resolution=64)),
        SimpleNamespace(device=CPU, seed=0)) for told in (None, "v_prediction")]
    assert [painter.pipe.scheduler.config.prediction_type for painter in painters] == ["epsilon", "v_prediction"]


# ----------------------------------------------------------------------------------------------------------------------
# Full width

RELEASED = {  # channels, text, depth of the transformers, and layers of the text encoders
    "unet": dict(block_out_channels=(320, 640, 1280), cross_attention_dim=2048, layers_per_block=2,
                 transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                 projection_class_embeddings_input_dim=2816),
    "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                         projection_dim=768),
    "text_encoder_2": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                           projection_dim=1280),
}


def full_width() -> Iterator[tuple[str, torch.Tensor]]:
    """Names and shapes of SDXL as released, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config({**unet("sdxl").config, **RELEASED["unet"]})
        yield from ((f"{UNET}{unet_name(name, network.config)}", tensor)
                    for name, tensor in network.state_dict().items())
        yield from clip_tensors(CLIPTextModel(CLIPTextConfig(**RELEASED["text_encoder"])),
                                "conditioner.embedders.0.transformer.", True)
        yield from open_clip_tensors(CLIPTextModelWithProjection(CLIPTextConfig(**RELEASED["text_encoder_2"])),
                                     "conditioner.embedders.1.model.")
        yield from vae_tensors(AutoencoderKL.from_config({**vae("sdxl").config, **RELEASED["vae"]}),
                               "first_stage_model.")


def write_streaming(file: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Random fp16 weights, one tensor in memory at a time."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    header, place = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, place + 2 * math.prod(shape)]}
        place += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.Generator().manual_seed(0)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            out.write((0.02 * torch.randn(shape, generator=noise)).half().numpy().tobytes())


LOAD = """
import json, sys, torch
from trainkit import families
from trainkit.options import ModelOptions
options = ModelOptions(pretrained_model_name_or_path=sys.argv[1])
module = families.of(options)
assert module.problems(sys.argv[1], resolution=1024) == []
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
family = module.load(options, device=torch.device("cpu"), weight_dtype=torch.bfloat16)
print(json.dumps(dict(module=module.__name__, size=family.native_size, anonymous=anonymous() * 1024, weights=sum(
    p.numel() * p.element_size() for part in (family.denoiser, family.vae, *family.text_encoders)
    for p in part.parameters()))))
"""


@pytest.mark.slow
def test_a_file_of_full_width_is_read_with_the_memory_of_its_weights(tmp_path):
    """6.9 GB in the layout of SDXL as released; what stays in memory is each weight once, in its format."""
    write_streaming(file := tmp_path / "sdxl.safetensors", full_width())
    assert file.stat().st_size > 6.9e9
    done = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["module"] == "trainkit.families.sdxl" and found["size"] == [1024, 1024]
    assert found["weights"] > 8e9  # the UNet in bf16, the rest in fp32
    assert found["anonymous"] < found["weights"] + 1e9
