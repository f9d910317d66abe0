"""The recipes for Illustrious, NoobAI and Pony: the commands of docs/recipes.md, on a small model of one file."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.support import ROOT
from tests.support.single_files import build_folder, write_single_file
from tests.support.trainers import forked
from trainkit.options import PRESETS

CAPTIONED, DREAMBOOTH = "train_text_to_image_lora", "train_dreambooth_lora_sdxl_advanced"
NAMES = ["illustrious", "noobai-vpred", "pony"]
SHAPES = [(64, 64), (96, 64), (64, 96), (112, 63)]
SMALL = ["--resolution=64", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
         "--max_train_steps=2", "--validation_steps=2", "--report_to=none", "--mixed_precision=no"]


def recipe(name: str) -> list[str]:
    """The words of the command in docs/recipes.md, without the program."""
    blocks = (ROOT / "docs/recipes.md").read_text("utf-8").split("```")[1::2]
    commands = [code.removeprefix("text") for code in blocks if f"--preset=style,{name} " in code]
    assert len(commands) == 1, name
    return shlex.split(commands[0].replace("\\\n", " "))[2:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base file for each name, and with tagged images of several shapes."""
    root = tmp_path_factory.mktemp("bases")
    folder = build_folder(root / "sdxl", "sdxl")
    for name in NAMES:
        write_single_file(folder, root / f"{name}.safetensors",
                          markers=("v_pred", "ztsnr") if name == "noobai-vpred" else ())
    (root / "images").mkdir()
    for number, size in enumerate(SHAPES):
        Image.effect_noise(size, 60).convert("RGB").save(root / f"images/{number}.png")
        (root / f"images/{number}.txt").write_text(
            "TOK, 1girl, " + ", ".join(f"tag {number} {k}" for k in range(40)), "utf-8")
    return root


def trained(made: Path, name: str, out: Path, *, trainer: str, change: dict[str, str | None]) -> str:
    """What a short run of the recipe prints."""
    paths = {"--pretrained_model_name_or_path": str(made / f"{name}.safetensors"), "--output_dir": str(out), **change}
    words = [word for word in recipe(name) if word.split("=")[0] not in paths]
    words += [f"{flag}={value}" for flag, value in paths.items() if value is not None]
    done = forked([*words, *SMALL], trainer=trainer, log=out.with_suffix(".log"))
    assert done.code == 0, done.output
    return done.output


def header(out: Path) -> dict[str, str]:
    with safe_open(out / f"{out.name}.safetensors", framework="pt") as opened:
        return opened.metadata()


@pytest.mark.trains
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_trains(made, tmp_path, name):
    output = trained(made, name, tmp_path / "run", trainer=DREAMBOOTH,
                     change={"--instance_data_dir": str(made / "images")})
    assert "Buckets " in output, output
    metadata = header(tmp_path / "run")
    is_v = name == "noobai-vpred"
    assert metadata["modelspec.prediction_type"] == ("v" if is_v else "epsilon")
    assert (metadata.get("ss_zero_terminal_snr") == "True") is is_v
    assert list((tmp_path / "run/samples").iterdir())


@pytest.mark.trains
def test_a_base_without_marks_is_trained_with_v_in_the_other_trainer_too(made, tmp_path):
    output = trained(made, "noobai-vpred", tmp_path / "run", trainer=CAPTIONED, change={
        "--pretrained_model_name_or_path": str(made / "illustrious.safetensors"),
        "--instance_data_dir": None, "--instance_prompt": None, "--train_data_dir": str(made / "images")})
    assert "Buckets " in output and "assumed" not in output, output
    metadata = header(tmp_path / "run")
    assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_zero_terminal_snr"] == "True"


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_of_a_base_says_nothing_that_a_style_or_a_card_says(name):
    """So that they can stand in any order; only Min-SNR does not go with zero-terminal SNR."""
    others = {flag for other, values in PRESETS.items() if other not in NAMES for flag in values}
    assert set(PRESETS[name]) & others <= {"snr_gamma"}
