"""The command line of the Diffusers script parses to the same values, every source of a value is known, and all
mistakes in a command come back in one message."""

from __future__ import annotations

import importlib
import json
import pickle
import random
import re
import shlex
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

import trainkit
from tests.support import ROOT
from tests.support.command_lines import REQUIRED, Captioned, Options, read, read_captioned
from tests.support.trainers import make_images
from trainkit.errors import Problem, UserError, refuse
from trainkit.families import sd
from trainkit.options import (
    CONCERNS,
    PRESETS,
    TEXT_TO_IMAGE,
    TRAINERS,
    CaptionedOptimizerOptions,
    CaptionedTextOptions,
    LoraOptions,
    MatchingOptions,
    ModelOptions,
    OptimizerOptions,
    OptionSet,
    RunOptions,
    parse,
)
from trainkit.options.cli import help_text
from trainkit.options.config_text import markdown
from trainkit.options.help import ESSENTIAL, answer
from trainkit.options.names import nearest
from trainkit.options.rules import trained_fractions, unread
from trainkit.options.trainers import SCRIPTS as TRAINER_SCRIPTS

# The flags of train_dreambooth_lora_sdxl_advanced.py (huggingface/diffusers): name -> (a value as typed, what it means,
# the default there). `...` marks a flag that must be given.
UPSTREAM: dict[str, tuple[str, object, object]] = {
    "pretrained_model_name_or_path": ("m", "m", ...),
    "pretrained_vae_model_name_or_path": ("v", "v", None),
    "revision": ("main", "main", None),
    "variant": ("fp16", "fp16", None),
    "dataset_name": ("u/d", "u/d", None),
    "dataset_config_name": ("sub", "sub", None),
    "instance_data_dir": ("pics", "pics", None),
    "cache_dir": ("c", "c", None),
    "image_column": ("img", "img", "image"),
    "caption_column": ("text", "text", None),
    "repeats": ("3", 3, 1),
    "class_data_dir": ("cls", "cls", None),
    "instance_prompt": ("a TOK", "a TOK", ...),
    "token_abstraction": ("TOK,TOK2", "TOK,TOK2", "TOK"),
    "num_new_tokens_per_abstraction": ("4", 4, 2),
    "class_prompt": ("a dog", "a dog", None),
    "validation_prompt": ("p", "p", None),
    "num_validation_images": ("2", 2, 4),
    "validation_epochs": ("7", 7, 50),
    "do_edm_style_training": ("true", True, False),
    "with_prior_preservation": ("true", True, False),
    "prior_loss_weight": ("0.5", 0.5, 1.0),
    "num_class_images": ("150", 150, 100),
    "output_dir": ("/a/b", "/a/b", "lora-dreambooth-model"),
    "seed": ("7", 7, None),
    "resolution": ("512", 512, 1024),
    "center_crop": ("true", True, False),
    "random_flip": ("true", True, False),
    "train_text_encoder": ("true", True, False),
    "train_batch_size": ("3", 3, 4),
    "sample_batch_size": ("2", 2, 4),
    "num_train_epochs": ("9", 9, 1),
    "max_train_steps": ("1000", 1000, None),
    "checkpointing_steps": ("2000", 2000, 500),
    "checkpoints_total_limit": ("2", 2, None),
    "resume_from_checkpoint": ("latest", "latest", None),
    "gradient_accumulation_steps": ("8", 8, 1),
    "gradient_checkpointing": ("true", True, False),
    "learning_rate": ("1e-3", 1e-3, 1e-4),
    "text_encoder_lr": ("1.0", 1.0, 5e-6),
    "scale_lr": ("true", True, False),
    "lr_scheduler": ("cosine", "cosine", "constant"),
    "snr_gamma": ("5.0", 5.0, None),
    "lr_warmup_steps": ("0", 0, 500),
    "lr_num_cycles": ("2", 2, 1),
    "lr_power": ("2.0", 2.0, 1.0),
    "dataloader_num_workers": ("4", 4, 0),
    "train_text_encoder_ti": ("true", True, False),
    "train_text_encoder_ti_frac": ("0.25", 0.25, 0.5),
    "train_text_encoder_frac": ("0.5", 0.5, 1.0),
    "optimizer": ("prodigy", "prodigy", "AdamW"),
    "use_8bit_adam": ("true", True, False),
    "adam_beta1": ("0.8", 0.8, 0.9),
    "adam_beta2": ("0.99", 0.99, 0.999),
    "prodigy_beta3": ("0.9", 0.9, None),
    "prodigy_decouple": ("False", False, True),
    "adam_weight_decay": ("0.01", 0.01, 1e-4),
    "adam_weight_decay_text_encoder": ("0", 0.0, None),
    "adam_epsilon": ("1e-6", 1e-6, 1e-8),
    "prodigy_use_bias_correction": ("False", False, True),
    "prodigy_safeguard_warmup": ("False", False, True),
    "max_grad_norm": ("0.5", 0.5, 1.0),
    "push_to_hub": ("true", True, False),
    "hub_token": ("hf_abc", "***", None),
    "hub_model_id": ("me/x", "me/x", None),
    "logging_dir": ("tb", "tb", "logs"),
    "allow_tf32": ("true", True, False),
    "report_to": ("wandb", "wandb", "tensorboard"),
    "mixed_precision": ("bf16", "bf16", None),
    "prior_generation_precision": ("fp32", "fp32", None),
    "local_rank": ("1", 1, -1),
    "enable_xformers_memory_efficient_attention": ("true", True, False),
    "noise_offset": ("0.05", 0.05, 0),
    "rank": ("8", 8, 4),
    "use_dora": ("true", True, False),
    "cache_latents": ("true", True, False),
    "clip_skip": ("1", 1, None),
    "lora_dropout": ("0.1", 0.1, 0.0),
    "use_blora": ("true", True, False),
    "lora_unet_blocks": ("unet.up_blocks.0", "unet.up_blocks.0", None),
    "image_interpolation_mode": ("bicubic", "bicubic", "lanczos"),
}
# Those of train_text_to_image_lora.py, and what train_text_to_image_lora_sdxl.py has beside them.
IN_BOTH = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column center_crop
    checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name dataset_name
    enable_xformers_memory_efficient_attention gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token
    image_column image_interpolation_mode learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps
    max_grad_norm max_train_steps mixed_precision noise_offset num_train_epochs num_validation_images output_dir
    pretrained_model_name_or_path push_to_hub random_flip rank report_to resolution resume_from_checkpoint revision
    scale_lr seed snr_gamma train_batch_size use_8bit_adam validation_epochs validation_prompt variant
"""
TEXT_TO_IMAGE_UPSTREAM = {name: UPSTREAM[name] for name in IN_BOTH.split()} | {
    "train_data_dir": ("pics", "pics", None),
    "max_train_samples": ("10", 10, None),
    "prediction_type": ("v_prediction", "v_prediction", None),
    "caption_column": ("words", "words", "text"),
    "resolution": ("768", 768, 512),
    "validation_epochs": ("7", 7, 1),
    "output_dir": ("/a/b", "/a/b", "sd-model-finetuned-lora"),
    "train_batch_size": ("3", 3, 16),
    "num_train_epochs": ("9", 9, 100),
    "adam_weight_decay": ("0.1", 0.1, 1e-2),
}
SDXL_UPSTREAM = {
    "pretrained_vae_model_name_or_path": ("v", "v", None),
    "train_text_encoder": ("true", True, False),
    "enable_npu_flash_attention": ("true", True, False),
    "debug_loss": ("true", True, False),
}
SCRIPTS = {"DreamBooth": (Options, UPSTREAM), "text-to-image": (Captioned, TEXT_TO_IMAGE_UPSTREAM | SDXL_UPSTREAM)}
OTHER_DEFAULTS = {"seed": 0}  # where upstream's default is a defect; docs/flags.md says why


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in Options.flags() | Captioned.flags():
        monkeypatch.delenv(f"LORA_{flag.upper()}", raising=False)


def read_by(trainer: str, *argv: str) -> OptionSet:
    return {"DreamBooth": read, "text-to-image": read_captioned}[trainer](*argv)


def refused(*argv: str, required: bool = True) -> dict[str, Problem]:
    """The problems a command is refused for, by what they say."""
    with pytest.raises(UserError) as error:
        options = parse(Options, [*(REQUIRED if required else []), *argv], description="")
        refuse(options.problems())
    assert error.value.exit_code == 2
    assert all(p.what and p.where and p.why and p.fix for p in error.value.problems)
    return {p.what: p for p in error.value.problems}


# The 81, and 51 + 4, flags ------------------------------------------------------------------------------------------


def test_upstream_has_so_many_flags_and_we_have_them_all():
    assert len(UPSTREAM) == 81 and set(UPSTREAM) <= set(Options.flags())
    assert len(TEXT_TO_IMAGE_UPSTREAM) == 51 and len(SDXL_UPSTREAM) == 4
    assert {*TEXT_TO_IMAGE_UPSTREAM, *SDXL_UPSTREAM} <= set(Captioned.flags())


@pytest.mark.parametrize(("trainer", "script"), [
    ("DreamBooth", "train_dreambooth_lora_sdxl_advanced"), ("text-to-image", "train_text_to_image_lora")])
def test_a_trainer_is_told_what_the_page_of_flags_says(trainer, script):
    assert importlib.import_module(script).Options.concerns() == TRAINERS[trainer]
    assert TRAINER_SCRIPTS[trainer] == f"{script}.py"


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_default_is_upstreams(trainer):
    kind, upstream = SCRIPTS[trainer]
    for name, (_, _, default) in upstream.items():
        flag, default = kind.flags()[name], OTHER_DEFAULTS.get(name, default)
        if default is ...:
            assert flag.required, f"a command without --{name} is refused there and would run here"
            continue
        same = flag.default == default
        if isinstance(default, str):
            same = isinstance(flag.default, str) and flag.default.lower() == default.lower()
        assert same, f"a command without --{name} would train with {flag.default!r} here and with {default!r} there"


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_value_round_trips(trainer):
    for name, (typed, meant, _) in SCRIPTS[trainer][1].items():
        dashed = name.replace("_", "-")
        for argv in ([f"--{name}", typed], [f"--{name}={typed}"], [f"--{dashed}", typed], [f"--{dashed}={typed}"]):
            value = read_by(trainer, *argv).flat()[name]
            assert value == meant and type(value) is type(meant), (
                f"{' '.join(argv)} would be read as {value!r}, and the Diffusers script reads {meant!r}")


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_every_switch_works_bare_negated_and_with_a_value(trainer):
    switches = [name for name, (typed, _, _) in SCRIPTS[trainer][1].items() if typed in ("true", "False")]
    assert switches
    for name in switches:
        written = {(f"--{name}",): True, (f"--no_{name}",): False, (f"--no-{name.replace('_', '-')}",): False}
        for typed, meant in {"True": True, "False": False, "true": True, "0": False}.items():
            written |= {(f"--{name}={typed}",): meant, (f"--{name}", typed): meant}
        for argv, meant in written.items():
            assert read_by(trainer, *argv).flat()[name] is meant, f"{' '.join(argv)} would not mean {meant}"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_defaults_are_valid_values_of_their_own_fields(trainer):
    for name, kind in TRAINERS[trainer].items():
        stand_in = {f.name: "x" for f in kind.flags(name) if f.required}
        kind(**{f.name: f.default for f in kind.flags(name) if not f.required}, **stand_in)


def test_a_changed_default_keeps_the_unit_limits_and_place_of_the_field():
    for name in {**Options.flags()}.keys() & {**Captioned.flags()}.keys():
        one, other = Options.flags()[name], Captioned.flags()[name]
        assert (one.facts.unit, one.limits, one.choices) == (other.facts.unit, other.limits, other.choices), name
    for concern in ("text", "optimizer", "validation"):
        assert list(TEXT_TO_IMAGE[concern].model_fields) == list(CONCERNS[concern].model_fields)
    with pytest.raises(UserError, match="--train_batch_size cannot be '0'"):
        read_captioned("--train_batch_size=0")
    with pytest.raises(UserError, match="--output_dir cannot be ''"):
        read_captioned("--output_dir=")


# Published commands of the Diffusers documentation's kind, as argument lists ------------------------------------------

LORA = """--pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0"
    --pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix" --output_dir="3d-icon-SDXL-LoRA" """
COMMANDS = {
    "pivotal tuning, Prodigy": (LORA + """--dataset_name="linoyts/3d_icon" --caption_column="prompt" --repeats=1
        --instance_prompt="3d icon in the style of TOK" --validation_prompt="a TOK icon of an astronaut riding a horse"
        --mixed_precision="bf16" --resolution=1024 --train_batch_size=3 --gradient_accumulation_steps=1
        --gradient_checkpointing --learning_rate=1.0 --text_encoder_lr=1.0 --optimizer="prodigy"
        --train_text_encoder_ti --train_text_encoder_ti_frac=0.5 --snr_gamma=5.0 --lr_scheduler="constant"
        --lr_warmup_steps=0 --rank=8 --max_train_steps=1000 --checkpointing_steps=2000 --seed="0" --report_to="wandb"
        --push_to_hub"""),
    "a dog, plain LoRA": (LORA + """--instance_data_dir="dog" --instance_prompt="a photo of sks dog" --resolution=1024
        --mixed_precision="fp16" --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=1e-4
        --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
        --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0" --push_to_hub"""),
    "a low-memory run": (LORA + """--instance_data_dir="dog" --instance_prompt="a photo of sks dog" --resolution=1024
        --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing --use_8bit_adam --cache_latents
        --enable_xformers_memory_efficient_attention --mixed_precision="fp16" --allow_tf32
        --max_train_steps=500"""),
    "a style, Prodigy with its switches": (LORA + """--dataset_name="linoyts/3d_icon" --caption_column="prompt"
        --instance_prompt="3d icon in the style of TOK" --optimizer="prodigy" --learning_rate=1.0
        --prodigy_safeguard_warmup=True --prodigy_use_bias_correction=True --adam_beta1=0.9 --adam_beta2=0.99
        --adam_weight_decay=0.01 --snr_gamma=5.0 --rank=8 --cache_latents --random_flip --max_train_steps=1000"""),
    "DoRA": (LORA + """--dataset_name="linoyts/3d_icon" --caption_column="prompt" --optimizer="prodigy"
        --instance_prompt="3d icon in the style of TOK" --learning_rate=1.0 --rank=8 --use_dora
        --max_train_steps=3000"""),
    "a face with class images, B-LoRA and EDM": (LORA + """--instance_data_dir="face" --class_data_dir="person"
        --instance_prompt="a photo of TOK" --with_prior_preservation --class_prompt="a photo of a person"
        --num_class_images=150 --prior_loss_weight=1.0 --rank=32 --use_blora --do_edm_style_training
        --train_text_encoder"""),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_published_commands_parse(name):
    refuse(parse(Options, shlex.split(COMMANDS[name]), description="").problems())


CAPTIONED_COMMANDS = {
    "SD 1.x": """--pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4" --center_crop --random_flip
        --dataset_name="lambdalabs/naruto-blip-captions" --caption_column="text" --resolution=512 --train_batch_size=1
        --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler="constant"
        --lr_warmup_steps=0 --seed=42 --output_dir="sd-naruto-model-lora" --report_to="wandb"
        --validation_prompt="cute dragon creature" --max_grad_norm=1 --mixed_precision="fp16" """,
    "SDXL": """--pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0" --enable_npu_flash_attention
        --pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix" --train_text_encoder --debug_loss
        --dataset_name="lambdalabs/naruto-blip-captions" --resolution=1024 --random_flip --train_batch_size=1
        --gradient_accumulation_steps=4 --num_train_epochs=2 --max_train_samples=100 --mixed_precision="fp16" """,
    "frequency-aware, in the sum form": """--pretrained_model_name_or_path="CompVis/stable-diffusion-v1-4" --rank=4
        --train_data_dir="pics" --train_batch_size=4 --snr_gamma=5 --dist_match=0.003 --guidance_token=8.0
        --guidance_features=features.safetensors --dist_match_method=wavelet --dist_match_mode=extra""",
}


@pytest.mark.parametrize("name", CAPTIONED_COMMANDS)
def test_published_commands_of_the_text_to_image_trainer_parse(name):
    refuse(parse(Captioned, shlex.split(CAPTIONED_COMMANDS[name]), description="").problems())


# Sources ------------------------------------------------------------------------------------------------------------


def test_a_value_comes_from_the_strongest_source(tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text('rank = 5\nlearning_rate = 0.5\nresolution = 256\npreset = "style"\n')
    monkeypatch.setenv("LORA_RESOLUTION", "128")
    monkeypatch.setenv("LORA_RANK", "6")
    options = read("--rank=7", "--config", str(file))
    assert (options.lora.rank, options.data.resolution, options.optimizer.learning_rate) == (7, 128, 0.5)
    assert (options.objective.snr_gamma, options.run.seed) == (5.0, 0)
    wanted = {"rank": "command line", "resolution": "environment", "learning_rate": f"config {file}",
              "snr_gamma": "preset style", "seed": "default"}
    assert {name: options.origins[name] for name in wanted} == wanted


def test_epochs_on_the_command_line_are_stronger_than_the_steps_of_a_preset_or_a_config(tmp_path, monkeypatch):
    options = read("--preset=style", "--num_train_epochs=120")
    assert options.run.total_steps(25, 1) == 1000 and options.run.total_steps(15, 1) == 600  # 120 · 15 / 3
    assert options.run.max_train_steps is None and not options.notices()
    assert options.origins["max_train_steps"] == "default"
    (tmp_path / "run.toml").write_text("max_train_steps = 50\nnum_train_epochs = 4\n")
    assert read(f"--config={tmp_path / 'run.toml'}").run.total_steps(25, 1) == 50  # from one source: the steps
    assert read(f"--config={tmp_path / 'run.toml'}", "--preset=face").run.total_steps(25, 1) == 50
    assert read(f"--config={tmp_path / 'run.toml'}", "--num_train_epochs=8").run.total_steps(25, 1) == 50  # 8 · 25 / 4
    assert read(f"--config={tmp_path / 'run.toml'}", "--num_train_epochs=16").run.total_steps(25, 1) == 100
    monkeypatch.setenv("LORA_MAX_TRAIN_STEPS", "7")
    assert read("--num_train_epochs=16").run.max_train_steps is None
    assert read("--num_train_epochs=16", "--max_train_steps=9").run.total_steps(25, 1) == 9


@pytest.mark.parametrize(("name", "text"), [
    ("flat.toml", 'rank = 8\noptimizer = "Prodigy"\nlearning_rate = 1e-3\ncache-latents = true\n'),
    ("tables.toml", '[lora]\nrank = 8\n[optimizer]\noptimizer = "prodigy"\nlearning_rate = 1e-3\n'
                    "[data]\ncache_latents = true\n"),
    ("flat.yaml", "rank: 8\noptimizer: prodigy\nlearning_rate: 1e-3\ncache_latents: yes\nmixed_precision: no\n"),
    ("tables.json", json.dumps({"lora": {"rank": 8}, "optimizer": {"optimizer": "prodigy", "learning_rate": 1e-3},
                                "cache_latents": True, "snr_gamma": None})),
])
def test_config_files_are_read_flat_or_in_tables(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    options = read(f"--config={tmp_path / name}")
    assert (options.lora.rank, options.optimizer.optimizer, options.optimizer.learning_rate) == (8, "prodigy", 1e-3)
    assert options.data.cache_latents is True
    assert options.precision.mixed_precision == ("no" if name == "flat.yaml" else None)


@pytest.mark.parametrize(("text", "said", "fix"), [
    ("rnak = 8", "unknown key rnak", "rank"),
    ("[lroa]\nrank = 8", "unknown table [lroa]", "did you mean [lora]?"),
    ("[fourier]\nweight = 1", "unknown table [fourier]", "did you mean [fourier_loss]?"),
    ("[[fourier]]\nweight = 1", "unknown table [fourier]", "did you mean [fourier_loss]?"),
    ('fourier_loss = "balanced"', "fourier_loss is no table", "[fourier_loss] and below it its keys, such as config"),
    ("[[fourier_loss]]\nweight = 1", "fourier_loss is no table", "write [fourier_loss]"),
    ("[zzz]\nrank = 8", "unknown table [zzz]", "remove it"),
    ("[data]\nrank = 8", "rank stands in the wrong table", "[lora]"),
    ("rank = 8\n[lora]\nrank = 9", "rank is given twice", "remove one"),
    ("rank = true", "--rank cannot be True", "--rank"),
    ("rank = [8]", "--rank cannot be [8]", "--rank"),
    ("rank = ", "cannot read the config file", "fix"),
    ('config = "other.toml"', "config cannot stand in a config file", "remove it, or write fourier_config"),
    ('[run]\nconfig = "other.toml"', "config cannot stand in a config file", "remove it"),
])
def test_a_bad_config_is_refused(tmp_path, text, said, fix):
    (tmp_path / "c.toml").write_text(text)
    ((what, problem),) = refused(f"--config={tmp_path / 'c.toml'}").items()
    assert what.startswith(said) and fix in problem.fix
    assert "c.toml" in what + problem.where


def test_a_config_that_cannot_be_read_is_not_followed_by_what_it_may_have_given():
    with pytest.raises(UserError) as caught:
        parse(Options, ["--config=nope.toml", "--rankk=4"], description="")
    assert [problem.what for problem in caught.value.problems] == [
        "unknown flag --rankk", "cannot read the config file nope.toml"]


def test_none_takes_back_a_text_too(tmp_path):
    """`none` would else be a prompt that previews are generated with."""
    file = tmp_path / "c.toml"
    file.write_text('validation_prompt = "a fox"\nresume_from_checkpoint = "latest"\n')
    options = read(f"--config={file}", "--validation_prompt=none", "--resume_from_checkpoint=None", "--variant=none")
    assert options.validation.validation_prompt is None and options.model.variant is None
    assert options.run.resume_from_checkpoint is None


def test_a_number_that_is_off_by_default_is_not_said_to_be_off_at_another():
    flags = Options.flags()
    assert "0 is off" in help_text(flags["max_grad_norm"]) and "0 is off" in help_text(flags["adam_weight_decay"])
    for name in ("gradient_accumulation_steps", "loraplus_lr_ratio"):
        assert help_text(flags[name]).endswith("(default: 1)")


def test_an_empty_table_of_a_yaml_file_is_said_to_be_none(tmp_path):
    (tmp_path / "c.yaml").write_text("fourier_loss:\nrank: 8\n")
    (problem,) = refused(f"--config={tmp_path / 'c.yaml'}").values()
    assert "[fourier_loss] is a table of keys" in problem.why


def test_config_is_a_key_of_the_fourier_table_and_tables_may_have_dashes(tmp_path):
    for name in ("fourier_loss", "fourier-loss"):
        (tmp_path / "c.toml").write_text(f'[{name}]\nconfig = "balanced"\n')
        assert read(f"--config={tmp_path / 'c.toml'}").fourier_loss.fourier_config == "balanced"


def test_a_list_in_a_config_file_joins_as_the_words_of_the_command_line_do(tmp_path):
    (tmp_path / "c.toml").write_text('optimizer_args = ["a=1", "b=(2,3)"]\n')
    assert read(f"--config={tmp_path / 'c.toml'}").optimizer.optimizer_args == "a=1 b=(2,3)"


def test_no_message_has_an_empty_default_as_its_example(tmp_path):
    (tmp_path / "c.toml").write_text("fourier_bands = true\n")
    (problem,) = refused(f"--config={tmp_path / 'c.toml'}").values()
    assert problem.fix == "give --fourier_bands RANGE:WEIGHT"
    assert "" not in [flag.default for kind in TRAINERS.values() for each in kind.values() for flag in each.flags("")]


@pytest.mark.parametrize("name", ["none.toml", "c.ini", "list.json"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, name):
    (tmp_path / "c.ini").write_text("rank=8")
    (tmp_path / "list.json").write_text("[1, 2]")
    (what,) = refused(f"--config={tmp_path / name}")
    assert name in what


def test_what_print_config_prints_is_a_config_that_gives_the_same_values(tmp_path, capsys):
    argv = ["--preset=face", "--no_prodigy_decouple", "--validation_prompt=ein \"Bild\" \\ 画", "--lora_alpha=3"]
    with pytest.raises(SystemExit) as stop:
        read(*argv, "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r'^rank = 32 +# preset face$', printed, re.M)
    assert re.search(r'^prodigy_decouple = false +# command line$', printed, re.M)
    assert re.search(r'^# text_encoder_lr = 5e-06 +# default$', printed, re.M), "else the config would give it"
    (tmp_path / "again.toml").write_text(printed)
    again = parse(Options, [f"--config={tmp_path / 'again.toml'}"], description="").flat()
    wanted = read(*argv).flat()
    assert {k: v for k, v in again.items() if k not in ("config", "preset")} == {
        k: v for k, v in wanted.items() if k not in ("config", "preset")}


def test_none_unsets_what_a_preset_sets():
    options = read("--preset=style", "--snr_gamma=none", "--max_train_steps=None", "--mixed_precision=none")
    assert options.objective.snr_gamma is options.run.max_train_steps is options.precision.mixed_precision is None
    assert options.run.report_to == "tensorboard" and read("--report_to=none").run.report_to == "none"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_presets_are_runnable_as_they_are(trainer, name):
    assert set(PRESETS[name]) <= set(SCRIPTS[trainer][0].flags())
    options = read_by(trainer, f"--preset={name}")
    assert not list(options.problems()) and not options.notices()


def test_an_unknown_preset_names_the_near_one():
    assert "--preset style" in refused("--preset=stile")["unknown preset 'stile'"].fix


def test_a_slip_in_a_variable_is_refused_and_other_variables_are_not_ours(monkeypatch):
    monkeypatch.setenv("LORA_HOME", "/somewhere")
    monkeypatch.setenv("LORA_SEED", "")
    assert read().origins["seed"] == "default"
    monkeypatch.setenv("LORA_RESOLUTON", "512")
    assert "LORA_RESOLUTION" in refused()["unknown variable LORA_RESOLUTON"].fix


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_all_mistakes_come_at_once():
    problems = refused("--rnak=8", "--optimizer=adamm", "--lora_dropout=2", "--lora_type=dora", "--train_batch_size",
                       "a", "photo", "--report_to=wandbb", required=False)
    assert set(problems) == {
        "unknown flag --rnak", "--optimizer cannot be 'adamm'", "--lora_dropout cannot be '2'",
        "--lora_type cannot be 'dora'", "--train_batch_size cannot be 'a'", "belonging to no flag: photo",
        "--report_to cannot be 'wandbb'", "--pretrained_model_name_or_path is missing", "--instance_prompt is missing"}
    assert "--rank" in problems["unknown flag --rnak"].fix
    assert "adamw8bit" in problems["--optimizer cannot be 'adamm'"].fix
    assert "--optimizer adamw" in problems["--optimizer cannot be 'adamm'"].fix


@pytest.mark.parametrize(("trainer", "flag", "script"), [
    ("text-to-image", "instance_prompt", "train_dreambooth_lora_sdxl_advanced.py"),
    ("text-to-image", "no-with-prior-preservation", "train_dreambooth_lora_sdxl_advanced.py"),
    ("DreamBooth", "dist_match", "train_text_to_image_lora.py"),
])
def test_a_flag_of_the_other_trainer_is_known_as_such(trainer, flag, script):
    with pytest.raises(UserError) as error:
        read_by(trainer, f"--{flag}=1")
    (problem,) = error.value.problems
    written = f"--{flag.replace('-', '_')}"
    assert problem.what == f"unknown flag {written}" and script in problem.fix
    assert problem.why == f"no flag has this name here: {written} belongs to {script}"


def test_a_key_of_the_other_trainer_is_known_as_such_and_one_of_both_is_not(tmp_path):
    (tmp_path / "c.toml").write_text('dist-match = 1\nconfig = "c.toml"')
    problems = refused(f"--config={tmp_path / 'c.toml'}")
    assert problems["unknown key dist-match"].why.endswith("dist-match belongs to train_text_to_image_lora.py")
    assert "on the command line" in problems["config cannot stand in a config file"].why


def test_messages_carry_no_links_and_no_library_words():
    text = "\n".join(map(str, refused("--rank=x", "--center_crop=maybe", "--learning_rate=nan").values()))
    assert "http" not in text and "pydantic" not in text.lower()


@pytest.mark.parametrize("argument", [
    "--rank=0", "--rank=4097", "--rank=true", "--lora_alpha=-1", "--lora_dropout=1", "--lora_dropout=-0.1",
    "--resolution=0", "--max_train_steps=0", "--train_batch_size=0", "--num_train_epochs=0", "--repeats=0",
    "--checkpointing_steps=-1", "--checkpoints_total_limit=-1", "--learning_rate=-1", "--learning_rate=inf",
    "--snr_gamma=-1", "--noise_offset=-1", "--adam_beta1=1", "--adam_epsilon=0", "--max_grad_norm=-1", "--seed=-1",
    "--seed=1.5", "--validation_epochs=-1", "--validation_steps=-1", "--cached_crops=-1", "--clip_skip=-1",
    "--mixed_precision=fp8", "--lr_scheduler=cosin", "--prediction_type=x", "--instance_data_dir=",
    "--lora_layers=all", "--compat=onetrainer", "--image_interpolation_mode=area", "--max_skipped_steps=-1",
    "--resolution=64,64,64", "--resolutions=64,a", "--min_bucket_reso=0", "--bucket_reso_steps=0",
    f"--seed={2**63}", "--instance_prompt=", "--instance_prompt= \t",
    "--loss_type=l3", "--loss_weighting=min_snr_diffusers", "--huber_c=0", "--huber_schedule=linear", "--p2_k=0",
    "--multires_noise_discount=0", "--multires_noise_iterations=-1", "--input_perturbation=-0.1", "--logit_std=0",
    "--timestep_sampling=sigmoid", "--mode_scale=2", "--min_timestep=-1", "--max_timestep=0", "--edm_p_std=0",
    "--edm_sigmas=normal",
])
def test_values_out_of_range_are_refused(argument):
    name = argument[2:].partition("=")[0]
    ((what, problem),) = refused(argument).items()
    assert what.startswith(f"--{name} cannot be") and problem.where == f"command line: --{name}"


def test_choices_are_read_in_any_case():
    options = read("--optimizer=AdamW8bit", "--mixed_precision=BF16", "--image_interpolation_mode=nearest_exact")
    assert (options.optimizer.optimizer, options.precision.mixed_precision) == ("adamw8bit", "bf16")
    assert options.data.image_interpolation_mode == "nearest"


def test_an_optimizers_path_is_taken_as_it_is_written():
    assert read("--optimizer=pytorch_optimizer.CAME").optimizer.optimizer == "pytorch_optimizer.CAME"
    assert read("--optimizer=Schedule_Free_AdamW").optimizer.optimizer == "schedule_free_adamw"
    for wrong in ("torch.", ".Adam", "torch/Adam", "torch.1Adam"):
        assert list(refused(f"--optimizer={wrong}")) == [f"--optimizer cannot be {wrong!r}"]


def test_the_default_text_rate_is_said_to_be_the_unets_where_the_optimizer_finds_its_own_step():
    text = ["--train_text_encoder", "--learning_rate=1"]
    for name in ("prodigy", "pytorch_optimizer.DAdaptAdam"):
        (notice,) = read(*text, f"--optimizer={name}").notices()
        assert notice.startswith("--text_encoder_lr is at its default") and "the UNet, 1, is used" in notice
    for rate in (0.5, 5e-6):
        assert not read(*text, "--optimizer=prodigy", f"--text_encoder_lr={rate}").notices()
    assert not read(*text).notices()


def test_typos_get_the_right_suggestion_in_95_of_100():
    pick, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz_"
    names = list(Options.flags())
    right = 0
    for _ in range(400):
        name = pick.choice(names)
        at = pick.randrange(1, len(name))
        typo = pick.choice([name[:at] + name[at + 1:], name[:at] + pick.choice(letters) + name[at:],
                            name[:at] + pick.choice(letters) + name[at + 1:]])
        right += typo in names or nearest(typo, names) == name
    assert right >= 380


def test_an_abbreviation_is_named_but_not_taken():
    assert "--resume_from_checkpoint" in refused("--resume=latest")["unknown flag --resume"].fix


B = "--enable_bucket"


@pytest.mark.parametrize(("argv", "said"), [
    (["--use_8bit_adam", "--optimizer=prodigy"], "--use_8bit_adam with --optimizer prodigy"),
    (["--with_prior_preservation", "--class_prompt=a cat"], "--with_prior_preservation without --class_data_dir"),
    (["--with_prior_preservation", "--class_data_dir=d"], "--with_prior_preservation without --class_prompt"),
    (["--with_prior_preservation", "--class_data_dir=d", "--class_prompt= "],
     "--with_prior_preservation without --class_prompt"),
    (["--use_8bit_adam", "--optimizer=torch.optim.NAdam"], "--use_8bit_adam with --optimizer torch.optim.NAdam"),
    (["--optimizer=schedule_free_adamw", "--use_ema"], "--use_ema with --optimizer schedule_free_adamw"),
    (["--optimizer=a.AdamWScheduleFree", "--use_ema"], "--use_ema with --optimizer a.AdamWScheduleFree"),
    (["--optimizer=prodigy", "--loraplus_lr_ratio=16"], "--loraplus_lr_ratio with --optimizer prodigy"),
    (["--lora_type=loha", "--use_dora"], "--lora_type loha with --use_dora"),
    (["--lora_type=lokr", "--use_rslora"], "--lora_type lokr with --use_rslora"),
    (["--lora_type=lokr", "--lora_dropout=0.1"], "--lora_type lokr with --lora_dropout"),
    (["--lora_type=loha", "--loraplus_lr_ratio=16"], "--lora_type loha with --loraplus_lr_ratio"),
    (["--lora_type=loha", "--init_lora_weights=pissa"], "--init_lora_weights pissa with --lora_type loha"),
    (["--init_lora_weights=pissa", "--use_dora"], "--init_lora_weights pissa with --use_dora"),
    (["--init_lora_weights=olora", "--lora_dropout=0.1"], "--init_lora_weights olora with --lora_dropout"),
    (["--init_lora_weights=olora", "--lora_layers=attention+conv"], "--init_lora_weights olora with convolutions"),
    (["--use_blora", "--lora_unet_blocks=unet.mid_block"], "--use_blora with --lora_unet_blocks"),
    (["--lora_type=lokr", "--lokr_factor=0"], "--lokr_factor 0"),
    (["--train_text_encoder", "--train_text_encoder_ti"], "--train_text_encoder with --train_text_encoder_ti"),
    (["--loss_weighting=min_snr"], "--loss_weighting min_snr without --snr_gamma"),
    (["--loss_weighting=soft_min_snr"], "--loss_weighting soft_min_snr without --snr_gamma"),
    (["--edm_sigmas=karras", "--timestep_sampling=uniform"], "--edm_sigmas with --timestep_sampling"),
    (["--min_timestep=500", "--max_timestep=500"], "no timestep from --min_timestep 500 to below --max_timestep 500"),
    ([B, "--min_bucket_reso=3000"], "--min_bucket_reso 3000 is more than --max_bucket_reso 2048"),
    ([B, "--resolution=128"], "--min_bucket_reso 256 is more than --resolution 128"),
    ([B, "--compat=kohya", "--resolution=2000,1000"], "--max_bucket_reso 1024 is less than --resolution 2000,1000"),
    ([B, "--max_bucket_reso=640", "--resolutions=512,768"], "--max_bucket_reso 640 is less than --resolutions 512,768"),
    ([B, "--bucket_no_upscale", "--resolution=32"], "--bucket_reso_steps 64 is more than a side of --resolution 32"),
    (["--train_unet_frac=0.5"], "nothing would be trained after 50% of the steps"),
    (["--train_unet_frac=0", "--train_text_encoder_ti"], "nothing would be trained after 50% of the steps"),
    (["--train_unet_frac=0", "--train_text_encoder_ti_frac=1"], "nothing would be trained after 0% of the steps"),
    (["--train_text_encoder_ti", "--train_text_encoder_ti_frac=0"],
     "--train_text_encoder_ti with --train_text_encoder_ti_frac 0"),
    (["--train_text_encoder", "--train_text_encoder_frac=0"], "--train_text_encoder with --train_text_encoder_frac 0"),
    (["--train_text_encoder_ti", "--optimizer=schedule_free_adamw"],
     "--token_std_pull 0.1 with --optimizer schedule_free_adamw"),
])
def test_contradictions_are_refused(argv, said):
    assert list(refused(*argv)) == [said]


TOKENS_ALONE = ["--train_text_encoder_ti", "--train_text_encoder_ti_frac=1", "--train_unet_frac=0"]


@pytest.mark.parametrize(("argv", "flag"), [
    (["--class_data_dir=c"], "--class_data_dir"), (["--class_prompt=c"], "--class_prompt"),
    (["--token_abstraction=A"], "--token_abstraction"), (["--initializer_concept=dog"], "--initializer_concept"),
    (["--text_encoder_lr=1e-4"], "--text_encoder_lr"), (["--train_text_encoder_frac=0.5"], "--train_text_encoder_frac"),
    (["--train_text_encoder_ti", "--text_encoder_2_lr=1e-4"], "--text_encoder_2_lr"),
    (["--optimizer=lion", "--adam_beta1=0.8"], "--adam_beta1"), (["--ema_decay=0.99"], "--ema_decay"),
    (["--optimizer=prodigyopt.Prodigy", "--prodigy_beta3=0.9"], "--prodigy_beta3"),
    (["--validation_steps=5"], "--validation_steps"), (["--prodigy_beta3=0.9"], "--prodigy_beta3"),
    (["--enable_xformers_memory_efficient_attention"], "--enable_xformers"), (["--lr_power=2"], "--lr_power"),
    (["--num_train_epochs=2", "--max_train_steps=5"], "--num_train_epochs"), (["--hub_model_id=a/b"], "--hub_model_id"),
    (["--loss_weighting=p2", "--snr_gamma=5"], "--snr_gamma"), (["--p2_k=2"], "--p2_k"), (["--huber_c=1"], "--huber_c"),
    (["--multires_noise_discount=0.5"], "--multires_noise_discount"), (["--logit_std=2"], "--logit_std"),
    (["--timestep_sampling=cosmap", "--mode_scale=1"], "--mode_scale"),
    (["--lr_step_rules=1:10,0.1"], "--lr_step_rules"), (["--lr_warmup_steps=100"], "--lr_warmup_steps"),
    (["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:10,0.1", "--lr_warmup_steps=100"], "--lr_warmup_steps"),
    ([*TOKENS_ALONE, "--rank=8"], "--rank"), ([*TOKENS_ALONE, "--use_dora"], "--use_dora"),
    ([*TOKENS_ALONE, "--lora_dropout=0.1"], "--lora_dropout"), ([*TOKENS_ALONE, "--use_ema"], "--use_ema"),
    (["--train_text_encoder", "--train_unet_frac=0", "--use_ema"], "--use_ema"),
    (["--train_text_encoder", "--train_unet_frac=0", "--use_blora"], "--use_blora"),
])
def test_flags_without_effect_are_said_to_be(argv, flag):
    options = read(*argv)
    assert not list(options.problems())
    assert [n.startswith(flag) for n in options.notices()] == [True]


@pytest.mark.parametrize("argv", [
    ["--train_text_encoder", "--text_encoder_lr=1e-4", "--adam_weight_decay_text_encoder=0"],
    ["--train_text_encoder_ti", "--text_encoder_lr=1e-4", "--adam_weight_decay_text_encoder=0"],
    ["--train_text_encoder_ti", "--train_text_encoder_ti_frac=1", "--train_unet_frac=0"]])
def test_text_rates_are_read_with_either_way_to_train_text(argv):
    options = read(*argv)
    assert not list(options.problems()) and not options.notices()


@pytest.mark.parametrize("kind", ["--use_dora", "--init_lora_weights=pissa", "--init_lora_weights=olora"])
def test_a_decay_that_shrinks_the_base_is_said_to(kind):
    assert not read(kind).notices() and not read("--adam_weight_decay=0.01").notices()
    (notice,) = read(kind, "--adam_weight_decay=0.01").notices()
    assert f"--adam_weight_decay 0.01 with {kind.replace('=', ' ')}" in notice


def test_the_shares_are_those_of_the_parts_that_train():
    assert trained_fractions(read().flat()) == {"train_unet_frac": 1.0}
    text = read("--train_text_encoder", "--train_text_encoder_frac=0.5", "--train_text_encoder_ti_frac=0.1")
    assert trained_fractions(text.flat()) == {"train_unet_frac": 1.0, "train_text_encoder_frac": 0.5}
    assert trained_fractions(read(*TOKENS_ALONE).flat()) == {"train_unet_frac": 0.0, "train_text_encoder_ti_frac": 1.0}


@pytest.mark.parametrize("argv", [
    ["--lr_scheduler=cosine", "--lr_warmup_steps=100"],
    ["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:10,0.1", "--lr_warmup_steps=0"],
    ["--train_text_encoder", "--train_unet_frac=0", "--rank=8", "--use_dora", "--lora_dropout=0.1"]])
def test_flags_with_an_effect_are_not_said_to_have_none(argv):
    assert not read(*argv).notices()


def test_objective_flags_that_go_together_pass():
    options = read("--do_edm_style_training", "--edm_p_mean=-0.4", "--snr_gamma=5", "--loss_weighting=soft_min_snr",
                   "--loss_type=huber", "--huber_c=0.2", "--min_timestep=10", "--max_timestep=900",
                   "--multires_noise_iterations=6", "--multires_noise_discount=0.4", "--rescale_betas_zero_snr")
    assert not list(options.problems()) and not options.notices()


def test_captions_are_kept_in_a_latent_cache_without_cache_latents():
    options = read("--latent_cache_dir=c")
    assert not list(options.problems()) and not options.notices()


def test_the_largest_seed_and_a_fraction_of_alpha_are_taken():
    options = read(f"--seed={2**63 - 1}", "--lora_alpha=0.5")
    assert (options.run.seed, options.lora.lora_alpha) == (2**63 - 1, 0.5)


def test_limits_of_buckets_that_are_not_read_are_told():
    notices = read("--min_bucket_reso=128", "--enable_bucket", "--bucket_no_upscale").notices()
    assert len(notices) == 1 and "--min_bucket_reso" in notices[0]
    assert "--enable_bucket" in read("--bucket_reso_steps=32").notices()[0]
    assert not list(read("--enable_bucket", "--bucket_no_upscale", "--resolution=1280").problems())


def test_a_plain_command_gives_no_notice():
    assert read("--prodigy_decouple=True", "--lr_warmup_steps=0").notices() == []


# What only the text-to-image trainer has -----------------------------------------------------------------------------


U = "--dist_match_gain=0.1"


@pytest.mark.parametrize(("argv", "said"), [
    (["--dist_match=0.003", U], "--dist_match with --dist_match_gain"),
    (["--dist_match=0.003", "--dist_match_statistic=u"], "--dist_match_statistic u with --dist_match"),
    ([U, "--dist_match_statistic=sum"], "--dist_match_statistic sum with --dist_match_gain"),
    ([U, "--dist_match_statistic=diagonal"], "--dist_match_statistic diagonal with --dist_match_gain"),
    (["--dist_match=0.003", "--input_perturbation=0.1"], "--input_perturbation with --dist_match"),
    ([U, "--input_perturbation=0.1"], "--input_perturbation with --dist_match_gain"),
])
def test_contradictions_of_distribution_matching_are_refused(argv, said):
    (problem,) = read_captioned(*argv).problems()
    assert problem.what == said and problem.where and problem.why and problem.fix
    calm = [word for word in argv if word.partition("=")[0] not in ("--dist_match", "--dist_match_gain")]
    assert not list(read_captioned(*calm).problems()), "without a strength nothing of this is read"


@pytest.mark.parametrize(("argv", "said"), [
    (["--dist_match=0.003", "--dist_match_bank=0.9"], "statistic u"),
    ([U, "--dist_match_bank=0.9", "--dist_match_kernel=text"], "kernel none or class"),
    ([U, "--dist_match_bank=0.9", "--dist_match_kernel=latent"], "kernel none or class"),
    (["--dist_match=1", "--dist_match_statistic=diagonal", "--dist_match_kernel=text"], "compares no two samples"),
    ([U, "--dist_match_min_snr=3.07"], "window of SNR 3.07 to 3.07"),
    ([U, "--dist_match_weights=1"], "1 bands"), ([U, "--dist_match_weights=1,1,1,1"], "4 bands"),
    ([U, "--dist_match_weights=1,1,1", "--dist_match_method=wavelet"], "3 bands would overlap"),
    (["--dist_match=0.003", "--dist_match_weights=1,1,1"], "3 bands would overlap"),
    ([U, "--dist_match_backend=pytorch_wavelets"], "computes wavelets only"),
])
def test_what_the_matching_loss_cannot_compute_is_one_problem_before_the_run(argv, said, tiny_sd, tmp_path):
    trainer = importlib.import_module("train_text_to_image_lora")
    model = [f"--pretrained_model_name_or_path={tiny_sd}", f"--train_data_dir={make_images(tmp_path / 'p', n=2)}",
             "--resolution=32"]
    with pytest.raises(UserError) as error:
        trainer.preflight(parse(trainer.Options, [*model, *argv], description=""), sd)
    (problem,) = error.value.problems
    assert said in f"{problem.why} {problem.fix}"


@pytest.mark.parametrize("argv", [
    [U, "--dist_match_statistic=u", "--dist_match_bank=0.9", "--dist_match_kernel=class"],
    ["--dist_match=0.003", "--dist_match_statistic=diagonal"],
    ["--dist_match=0.003", "--dist_match_wavelet=db2", "--dist_match_boundary=periodization"],
    ["--dist_match=0.003", "--dist_match_method=wavelet", "--dist_match_backend=pytorch_wavelets"],
    [U, "--dist_match_weights=3,2,1"], [U, "--dist_match_weights=0,1", "--dist_match_levels=3"],
    [U, "--dist_match_weights=1,2,3", "--dist_match_method=wavelet", "--dist_match_boundary=periodization"],
    [U, "--dist_match_mode=swap", "--dist_match_swap=0.3"],
    ["--guidance_token=8", "--guidance_features=f", "--guidance_token_dropout=1", "--guidance_token_scale=-1"],
    ["--train_text_encoder", "--text_encoder_lr=1e-5", "--text_encoder_2_lr=1e-6", "--clip_skip=1"],
])
def test_what_goes_together_passes_without_a_word(argv):
    options = read_captioned(*argv)
    assert not list(options.problems()) and not options.notices()


@pytest.mark.parametrize("argument", [
    "--dist_match=-1", "--dist_match_gain=-1", "--dist_match_weights=a,b", "--dist_match_weights=-1,2",
    "--dist_match_weights=0,0", "--dist_match_weights=nan,1", "--dist_match_weights=1,,2", "--dist_match_levels=0",
    "--dist_match_swap=0", "--dist_match_swap=1", "--dist_match_bank=1", "--dist_match_mode=both",
    "--dist_match_max_snr=0", "--dist_match_boundary=symmetric", "--guidance_token=-1", "--guidance_token_dropout=1.1",
    "--max_train_samples=-1", "--train_data_dir=",
])
def test_values_out_of_range_are_refused_by_the_text_to_image_trainer(argument):
    with pytest.raises(UserError) as error:
        read_captioned(argument)
    (problem,) = error.value.problems
    assert problem.what.startswith(f"{argument.partition('=')[0]} cannot be")


@pytest.mark.parametrize(("argv", "said"), [
    (["--dataset_name=u/d"], "--train_data_dir has no effect: it is read only with no --dataset_name"),
    (["--dataset_config_name=x"], "--dataset_config_name has no effect: it is read only with --dataset_name"),
    (["--cache_dir=x"], "--cache_dir has no effect: it is read only with --dataset_name"),
    (["--guidance_features=f"], "--guidance_features has no effect: it is read only with --guidance_token above 0"),
    (["--text_encoder_lr=1e-4"], "--text_encoder_lr has no effect: it is read only with --train_text_encoder"),
    (["--enable_npu_flash_attention"], "--enable_npu_flash_attention: PyTorch's scaled_dot_product_attention"),
    (["--enable_xformers_memory_efficient_attention"], "--enable_xformers_memory_efficient_attention: PyTorch's"),
    (["--debug_loss"], "--debug_loss: no loss is logged by image"),
    (["--dist_match_mode=swap"], "--dist_match_mode has no effect: it is read only with --dist_match or "),
    (["--dist_match_swap=0.3"], "--dist_match_swap has no effect: it is read only with --dist_match or "),
    ([U, "--dist_match_swap=0.3"], "--dist_match_swap has no effect: it is read only with --dist_match_mode swap"),
    ([U, "--dist_match_wavelet=db2"], "--dist_match_wavelet has no effect: it is read only with --dist_match_method"),
    ([U, "--dist_match_boundary=periodization"], "--dist_match_boundary has no effect: it is read only with"),
    (["--dist_match=1", "--dist_match_method=fft", "--dist_match_wavelet=db2"], "--dist_match_wavelet has no effect"),
    (["--use_dora"], "--adam_weight_decay 0.01 with --use_dora decays"),
])
def test_the_text_to_image_trainer_says_what_has_no_effect(argv, said):
    options = read_captioned(*argv)
    assert not list(options.problems())
    (notice,) = options.notices()
    assert notice.startswith(said)


def test_no_message_advises_a_flag_that_the_trainer_lacks():
    rows = [row for kind in SCRIPTS for row in _unread_by(kind)]
    assert len(rows) > 60
    for trainer, flag, condition in rows:
        named = set(re.findall(r"--(\w+)", condition))
        assert named <= set(SCRIPTS[trainer][0].flags()), (trainer, flag, condition)


def _unread_by(trainer: str) -> list[tuple[str, str, str]]:
    """(trainer, flag, what it is read with) of every flag of the trainer that has no effect in a few commands."""
    commands = [[], ["--optimizer=came", "--max_train_steps=5", "--validation_steps=5"],
                ["--train_unet_frac=0", "--loss_weighting=p2", "--timestep_sampling=cosmap"]]
    values = [read_by(trainer, *argv).flat() for argv in commands]
    flags = SCRIPTS[trainer][0].flags()
    return [(trainer, flag, condition) for each in values for flag, condition in unread(each, flags)]


def test_what_the_text_to_image_trainer_trains_of_text_has_the_rate_of_the_unet_unless_given():
    optimizer = CaptionedOptimizerOptions(learning_rate=2e-4, scale_lr=True)
    assert CaptionedTextOptions().lrs(optimizer, global_batch=8) == (16e-4, 16e-4)
    assert CaptionedTextOptions(text_encoder_2_lr=1e-6).lrs(optimizer, global_batch=8) == (16e-4, 1e-6)
    assert CaptionedTextOptions(text_encoder_lr=0).lrs(optimizer, global_batch=8) == (0, 0)
    assert not read_captioned("--train_text_encoder", "--optimizer=prodigy", "--learning_rate=1").notices()


@pytest.mark.parametrize(("given", "active", "statistic", "norm", "weight"), [
    (dict(), False, "u", "whiten", "x0"),
    (dict(dist_match=0.003), True, "sum", "grid", "x0"),
    (dict(dist_match=0.003, dist_match_statistic="diagonal"), True, "diagonal", "grid", "x0"),
    (dict(dist_match_gain=1, dist_match_mode="reuse"), True, "u", "whiten", "x0"),
    (dict(dist_match=1, dist_match_mode="reuse"), True, "sum", "grid", "eps"),
    (dict(dist_match_gain=1, dist_match_band_norm="dof", dist_match_timestep_weight="whiten"), True, "u", "dof",
     "whiten"),
])
def test_what_is_left_open_of_distribution_matching_follows_from_the_rest(given, active, statistic, norm, weight):
    options = MatchingOptions(**given, dist_match_weights="1, 0.5,2e-1")
    assert options.active == active
    assert (options.loss["statistic"], options.loss["band_norm"], options.loss["timestep_weight"]) == (
        statistic, norm, weight)
    assert options.gain == max(given.get("dist_match", 0), given.get("dist_match_gain", 0))
    assert options.loss["weights"] == (1, 0.5, 0.2)


# What the values are good for ---------------------------------------------------------------------------------------


def test_the_hub_token_is_nowhere_but_in_its_field(monkeypatch, capsys):
    options = read("--hub_token=hf_secret", "--push_to_hub")
    assert options.run.hub_token.get_secret_value() == "hf_secret"
    assert options.flat()["hub_token"] == "***"
    assert "hf_secret" not in repr(options) + str(options) + json.dumps(options.flat()) + options.model_dump_json()
    monkeypatch.setenv("LORA_HUB_TOKEN", "hf_secret")
    with pytest.raises(SystemExit):
        read("--print_config")
    assert "hf_secret" not in capsys.readouterr().out
    monkeypatch.setenv("LORA_HUB_TOKEN", "")
    problems = refused("--hub_token=", "--rank=0")
    assert "hf_secret" not in str(problems)


def test_options_cannot_be_changed_and_unknown_fields_are_refused():
    options = read()
    with pytest.raises(ValidationError):
        options.lora.rank = 8
    with pytest.raises(ValidationError):
        options.lora = LoraOptions(rank=8)
    with pytest.raises(ValidationError):
        LoraOptions(rnak=8)


def test_options_survive_a_trip_to_a_worker_process():
    options = read("--rank=8")
    again = pickle.loads(pickle.dumps(options))
    assert again == options and again.origins == options.origins


def test_flat_is_json_and_covers_every_flag():
    flat = read().flat()
    assert list(flat) == list(Options.flags()) == list(read().origins)
    assert json.loads(json.dumps(flat)) == flat


@pytest.mark.parametrize(("given", "rows", "world", "steps"), [
    (dict(max_train_steps=7, num_train_epochs=99), 22, 1, 7),
    (dict(num_train_epochs=2, train_batch_size=3), 22, 1, 15),  # 44 / 3
    (dict(num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=4), 22, 2, 5),  # 66 / 16
    (dict(), 1, 8, 1),
])
def test_total_steps_follow_from_epochs_unless_given(given, rows, world, steps):
    assert RunOptions(**given).total_steps(rows, world) == steps


def test_scale_lr_multiplies_by_the_global_batch():
    assert OptimizerOptions(learning_rate=2e-4).base_lr(global_batch=8) == 2e-4
    assert OptimizerOptions(learning_rate=2e-4, scale_lr=True).base_lr(global_batch=8) == 16e-4


def test_8bit_adam_has_two_spellings():
    assert OptimizerOptions(use_8bit_adam=True).algorithm == OptimizerOptions(optimizer="adamw8bit").algorithm
    assert OptimizerOptions().algorithm == "adamw"


def test_a_trainer_may_leave_out_a_concern():
    class Fewer(OptionSet):
        model: ModelOptions
        lora: LoraOptions

    options = parse(Fewer, ["--pretrained_model_name_or_path=m", "--rank=2"], description="")
    assert options.lora.rank == 2 and not list(options.problems()) and not options.notices()
    with pytest.raises(UserError, match="unknown flag --snr_gamma"):
        parse(Fewer, ["--pretrained_model_name_or_path=m", "--snr_gamma=5"], description="")


# Help and documentation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_is_grouped_short_of_100_columns_and_names_default_and_unit(capsys, trainer):
    with pytest.raises(SystemExit) as stop:
        parse(SCRIPTS[trainer][0], ["--help_all"], description="Train a LoRA, 100 % offline.")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for name, kind in TRAINERS[trainer].items():
        assert f"{kind.title()}:" in flat
        for flag in kind.flags(name):
            assert re.search(rf"--(\[no_\])?{flag.name}\b", flat)
    size = TRAINERS[trainer]["data"].model_fields["resolution"].default
    assert "--rank RANK" in flat and "--resolution PIXELS" in flat and f"(default: {size})" in flat
    assert "adamw, adamw8bit, " in flat and "schedule_free_adamw or hina_adaptive" in flat
    assert "(required)" in flat


def asked(capsys, *words, trainer="DreamBooth", description="Train a LoRA."):
    """What a command that only asks prints, on a clean exit."""
    with pytest.raises(SystemExit) as stop:
        parse(SCRIPTS[trainer][0], words, description=description)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--rank=4", "--help", "--seed=1"]])
def test_plain_help_has_the_flags_that_matter_and_the_way_to_the_others(capsys, trainer, words):
    text = asked(capsys, *words, trainer=trainer)
    found = set(re.findall(r"^  --(?:\[no_\])?(\w+)", text, re.MULTILINE)) & SCRIPTS[trainer][0].flags().keys()
    assert 20 <= len(found) <= 30
    assert {"pretrained_model_name_or_path", "resolution", "rank", "learning_rate", "output_dir"} <= found
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in TRAINERS[trainer])
    assert len(text.splitlines()) < 120 and max(map(len, text.splitlines())) <= 100


def test_the_flags_that_matter_are_flags():
    known = Options.flags().keys() | Captioned.flags().keys()
    assert {name for names in ESSENTIAL.values() for name in names} <= known


def test_help_on_a_group_and_on_a_flag(capsys):
    group = asked(capsys, "--help", "lora")
    assert "--rank RANK" in group and "--learning_rate" not in group
    assert "--no_center_crop" not in asked(capsys, "--help", "no-center-crop")
    assert asked(capsys, "--help=snr-gamma").count("  --") == 1
    assert asked(capsys, "--help", "all") == asked(capsys, "--help_all")
    with pytest.raises(UserError, match="no help on lorra(.|\n)*--help lora"):
        parse(Options, ["--help", "lorra"], description="")


def test_a_command_without_words_is_refused_not_helped():
    with pytest.raises(UserError, match="pretrained_model_name_or_path is missing"):
        parse(Options, [], description="")


def test_a_flag_that_is_given_again_is_told_with_what_counts():
    words = ["--validation_prompt=a fox", "--validation-prompt", "a cat", "--cache_latents", "--no_cache_latents",
             "--optimizer_args", "a=1", "--optimizer_args", "b=2", "--rank=8"]
    told = [notice for notice in read(*words).notices() if "more than once" in notice]
    assert told == ["--validation_prompt is given more than once: only the last one counts, a cat",
                    "--cache_latents is given more than once: only the last one counts, off"]


def test_help_is_as_wide_as_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr("trainkit.terminal.is_terminal", lambda stream: True)
    monkeypatch.setattr("trainkit.terminal.columns", lambda stream: 60)
    titles = {name: kind.title() for name, kind in TRAINERS["DreamBooth"].items()}
    text = answer(["--help", "lora"], Options.flags(), titles=titles, description="")
    assert max(map(len, text.splitlines())) <= 60


def test_presets_and_versions_are_told(capsys):
    text = asked(capsys, "--preset", "list")
    assert all(f"--preset {name}: " in text for name in PRESETS) and "--rank=32" in text
    assert asked(capsys, "--version").startswith(f"lora-trainer-suite {trainkit.__version__}\npython ")


def test_completion_needs_its_package_and_a_shell(monkeypatch):
    with pytest.raises(UserError, match="no completion for fish"):
        parse(Options, ["--print_completion", "fish"], description="")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install shtab"):
        parse(Options, ["--print_completion", "bash"], description="")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_flags_and_choices(capsys, shell):
    pytest.importorskip("shtab")
    text = asked(capsys, "--print_completion", shell)
    assert "--lora_alpha" in text and "schedule_free_adamw" in text and "--help" in text


def test_every_number_has_a_unit_and_every_flag_help():
    for flag in [*Options.flags().values(), *Captioned.flags().values()]:
        assert flag.help
        assert flag.facts.unit or flag.value_type not in (int, float), flag.name


def test_help_is_in_whole_sentences():
    """A help text is whole sentences; what differs completes the page's "Unlike in the Diffusers script, …"."""
    for flag in [*Options.flags().values(), *Captioned.flags().values()]:
        assert re.fullmatch(r"[A-Zk].*\.", flag.help), f"--{flag.name}: {flag.help}"
        assert not re.search(r"^[A-Z]|[.;:]$", flag.facts.differs), f"--{flag.name}: {flag.facts.differs}"
        words = set(re.findall(r"[a-z]+", flag.help))
        assert not words & {"beside", "share", "law", "visit", "visits"}, f"--{flag.name}: {flag.help}"


def test_help_names_no_flag_that_the_trainer_lacks():
    for kind in (Options, Captioned):
        for flag in kind.flags().values():
            named = set(re.findall(r"--(\w+)", flag.help))
            assert named <= set(kind.flags()), flag.name


def test_help_answers_at_once_without_torch(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys\n"
        "from trainkit.options import LoraOptions, ModelOptions, OptionSet, parse\n"
        "class Options(OptionSet):\n    model: ModelOptions\n    lora: LoraOptions\n"
        "try: parse(Options, ['--help'], description='')\n"
        "finally: sys.stderr.write(' '.join(sorted(m for m in sys.modules if '.' not in m)))\n")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and "--rank" in done.stdout
    assert not {"torch", "diffusers", "transformers", "numpy", "yaml"} & set(done.stderr.split())
    assert seconds < 5  # promised: 1; measured: 0.3 on a quiet machine; the rest is for a busy one


def test_the_flags_page_is_current():
    assert (ROOT / "docs/flags.md").read_text("utf-8") == markdown(TRAINERS, PRESETS), (
        "python -m trainkit.options > docs/flags.md")


def test_the_flags_page_has_every_flag_once_and_says_whose_it_is():
    page = markdown(TRAINERS, PRESETS)
    for name in Options.flags() | Captioned.flags():
        assert page.count(f"| `--{name}`") == 1, name
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `--")}
    assert lines["--instance_prompt"].startswith("| `--instance_prompt` (DreamBooth only) |")
    assert lines["--train_data_dir"].startswith("| `--train_data_dir` (text-to-image only) |")
    assert "| DreamBooth: `4`; text-to-image: `16` |" in lines["--train_batch_size"]
    assert "(`[pivotal]`, DreamBooth only)" in page and "(`[matching]`, text-to-image only)" in page
    assert "only" not in lines["--rank"] and "Unlike in the Diffusers DreamBooth script" in lines["--center_crop"]
