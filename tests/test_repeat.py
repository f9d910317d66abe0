"""What a report and a card say can be done: the command repeats the run, names load, numbers compare with like."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.command_lines import Options
from tests.support.made_up_run import make_run
from trainkit.conditioning.new_tokens import embeddings_file
from trainkit.options import parse
from trainkit.publish import write_card
from trainkit.report import first_loss, write_report
from trainkit.report.facts import RunFacts
from trainkit.report.usage import usage

NOT_REPEATED = {"config", "preset", "print_config", "resume_from_checkpoint", "local_rank", "debug", "hub_token"}


def recorded(folder: Path, options: Options, **facts: object) -> RunFacts:
    """A run with the record that these options leave."""
    make_run(folder)
    record = json.loads((folder / "run.json").read_text())
    record["options"] = {flag: {"value": value, "origin": options.origins[flag]}
                         for flag, value in options.flat().items()}
    (folder / "run.json").write_text(json.dumps(record | facts))
    return RunFacts(folder)


BASE = ["--pretrained_model_name_or_path=assets/tiny-sdxl-icons", "--instance_data_dir=assets/icons-3d",
        "--output_dir=runs/mine"]
COMMANDS = {
    "plain": ["--instance_prompt=a photo of TOK", "--rank=8"],
    "quotes": ["--instance_prompt=it's \"TOK\" $HOME `x` \\ & ; é 猫", "--validation_prompt=--a"],
    "lists": ["--instance_prompt=x", "--optimizer_args", "d_coef=0.5", "betas=(0.9,0.99)", "--optimizer=prodigy"],
    "switches": ["--instance_prompt=x", "--cache_latents", "--no_prodigy_decouple", "--hub_private=False"],
    "a preset": ["--instance_prompt=x", "--preset=style", "--snr_gamma=none"],
    "a Fourier preset": ["--instance_prompt=x", "--loss_type=fourier", "--fourier_config=balanced"],
    "off": ["--instance_prompt=x", "--max_grad_norm=0", "--num_validation_images=0", "--checkpointing_steps=none"],
    "another VAE": ["--instance_prompt=x", "--pretrained_vae_model_name_or_path=other/vae"],
    "a resumed run": ["--instance_prompt=x", "--resume_from_checkpoint=runs/mine/checkpoint-3", "--debug"],
    "small numbers": ["--instance_prompt=x", "--learning_rate=1e-7", "--adam_epsilon=1e-30", "--noise_offset=0.05"],
    "a token": ["--instance_prompt=x", "--hub_token=hf_abcdefghijklmnop", "--push_to_hub", "--hub_model_id=a/b"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_the_report_repeats_the_run(tmp_path, name):
    options = parse(Options, [*BASE, *COMMANDS[name]], description="")
    run = recorded(tmp_path / "run", options)
    python, script, *words = shlex.split(run.command)
    assert (python, script) == ("python", "train_dreambooth_lora_sdxl_advanced.py")
    again = parse(Options, words, description="").flat()
    assert {k: v for k, v in again.items() if k not in NOT_REPEATED} == {
        k: v for k, v in options.flat().items() if k not in NOT_REPEATED}
    assert "***" not in run.command and not run.private_paths


def test_a_config_is_not_needed_to_repeat(tmp_path):
    (tmp_path / "c.toml").write_text('rank = 16\ninstance_prompt = "a TOK"\n')
    options = parse(Options, [*BASE, f"--config={tmp_path / 'c.toml'}"], description="")
    run = recorded(tmp_path / "run", options)
    assert "--rank=16" in run.command and "c.toml" not in run.command


@pytest.mark.parametrize("path, shown", [
    ("/home/anna/icons", "icons"), ("../anna/icons", "icons"), ("~/icons", "icons"), ("data/icons", "data/icons"),
    ("D:\\anna\\icons", "icons")])
def test_a_path_that_leads_elsewhere_is_named_as_cut(tmp_path, path, shown):
    options = parse(Options, [*BASE[::2], f"--instance_data_dir={path}", "--instance_prompt=x"], description="")
    run = recorded(tmp_path / "run", options)
    assert f"--instance_data_dir={shown}" in shlex.split(run.command)
    assert run.private_paths == ([] if shown == path else ["--instance_data_dir"])
    page = write_report(tmp_path / "run").read_text("utf-8")
    assert ("your own paths behind --instance_data_dir" in page) == (shown != path) and "anna" not in page


def test_a_path_below_the_folder_of_the_run_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse(Options, [*BASE[::2], f"--instance_data_dir={tmp_path}/data/icons", "--instance_prompt=x"],
                    description="")
    assert "--instance_data_dir=data/icons" in recorded(tmp_path / "run", options).command


def test_launch_and_precision_of_accelerate_are_repeated(tmp_path):
    options = parse(Options, [*BASE, "--instance_prompt=x"], description="")
    command = recorded(tmp_path / "run", options, world=2, precision="bf16").command
    assert command.startswith("accelerate launch --num_processes=2 train_") and "--mixed_precision=bf16" in command


# -- another VAE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae, shown", [("madebyollin/sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix"),
                                        ("/home/anna/other-vae", "other-vae")])
def test_another_vae_is_in_card_code_and_steps(tmp_path, vae, shown):
    folder = make_run(tmp_path / "run", pretrained_vae_model_name_or_path=vae)
    card = write_card(folder).read_text("utf-8")
    assert f'vae = AutoencoderKL.from_pretrained("{shown}")' in card and ", vae=vae)" in card
    assert "from diffusers import AutoencoderKL, " in card and "| VAE |" in card and "anna" not in card
    assert card.count(shown.replace("-", "-")) >= 4, "code, table, ComfyUI and WebUIs"


def test_without_one_the_code_loads_none(tmp_path):
    assert "AutoencoderKL" not in usage(RunFacts(make_run(tmp_path / "run"))).diffusers


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my style v1.0", "a\tb", "style (v2)", "a:b", "a,b", "[x] {y}", "ohwx's-words", "x"])
def test_the_name_of_embeddings_is_one_word_in_a_prompt(name):
    """ComfyUI ends a name at a blank and weighs what stands in parentheses; `embedding:NAME` must be one such word."""
    stem = Path(embeddings_file(name)).stem
    assert len(f"embedding:{stem}".split()) == 1 and not set(stem) & set("()[]{}<>:,;|\\")
    assert embeddings_file("plain-name_1.0") == "plain-name_1.0_emb.safetensors"


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses, words", [
    ([9.0] + [1.0] * 99, "1.8 over the first 10 steps"), ([1.0] * 10 + [2.0] * 990, "over the first 50 steps"),
    ([4.0, 2.0, 1.0, 1.0], "3 over the first 2 steps"), ([4.0, 2.0], ""), ([4.0], ""), ([], "")])
def test_the_loss_at_the_start_is_a_mean_like_the_one_at_the_end(tmp_path, losses, words):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, 1)))
    said = first_loss(RunFacts(folder))
    assert words in said and bool(said) == bool(words)
