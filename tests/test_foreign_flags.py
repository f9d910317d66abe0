"""Names of other trainers lead to the flag or to what to do instead; numbers are switched off by 0 and by words."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT
from tests.support.command_lines import Captioned, Options, read, read_captioned
from trainkit.errors import UserError
from trainkit.options.base import OFF_WORDS
from trainkit.options.foreign import INSTEAD, SAME_VALUE
from trainkit.options.trainers import known_flags

FLAGS = known_flags()
DOC = (ROOT / "docs/from-kohya.md").read_text("utf-8")


def refused(argv: list[str], read=read) -> dict[str, str]:
    with pytest.raises(UserError) as error:
        read(*argv)
    return {problem.what: problem.fix for problem in error.value.problems}


@pytest.mark.parametrize("theirs", SAME_VALUE)
def test_a_renamed_flag_is_named_with_its_value(theirs):
    ours = SAME_VALUE[theirs]
    assert ours in FLAGS and theirs not in FLAGS
    fix = refused([f"--{theirs}=128"])[f"unknown flag --{theirs}"]
    assert fix == f"write --{ours} 128" if ours in Options.flags() else f"--{ours}" in fix


@pytest.mark.parametrize("theirs", INSTEAD)
def test_a_flag_without_a_twin_says_what_to_do(theirs):
    assert theirs not in FLAGS
    fix = refused([f"--{theirs}", "7"])[f"unknown flag --{theirs}"]
    named = set(re.findall(r"--(\w+)", re.sub(r"scripts/\w+\.py --\w+", "", fix)))  # a tool has flags of its own
    assert named <= FLAGS.keys(), f"no flags: {named - FLAGS.keys()}"
    assert "VALUE" not in fix and "remove it" not in fix


def rows() -> list[tuple[list[str], set[str]]]:
    """(kohya's names, our flags beside them) of each row of the page."""
    table = [re.split(r"(?<!\\)\|", line)[1:3] for line in DOC.splitlines() if re.match(r"\| .*`", line)]
    return [(re.findall(r"`(\w+)`", theirs), set(re.findall(r"--(\w+)", ours))) for theirs, ours in table]


def test_the_page_and_the_program_agree():
    listed = rows()
    assert len(listed) > 60
    for theirs, ours in listed:
        for name in [name for name in theirs if name not in FLAGS and name not in ("algo", "dora_wd", "10_name")]:
            assert name in SAME_VALUE or name in INSTEAD, f"{name} is in the page only"
            told = {SAME_VALUE[name]} if name in SAME_VALUE else set(re.findall(r"--(\w+)", INSTEAD[name]))
            assert not ours or told & ours, f"{name}: the page says {ours}, the program {told}"


@pytest.mark.parametrize("name, value", [("instance_prompt", "TOK"), ("rank", "8"), ("hub_model_id", "a/b"),
                                         ("network-dim", "8"), ("max_train_steps=3", None)])
def test_one_dash_is_told(name, value):
    found = refused([f"-{name}", *([value] if value else [])])
    written = f"-{name.partition('=')[0]}"
    assert found[f"{written} has one dash"] == f"-{written}"


def test_the_folder_of_the_other_trainer_is_named():
    assert "--instance_data_dir" in refused(["--train_data_dir=x"])["unknown flag --train_data_dir"]
    assert "--train_data_dir" in refused(["--instance_data_dir=x"], read_captioned)["unknown flag --instance_data_dir"]


def test_reg_data_dir_belongs_to_the_trainer_that_has_classes():
    fix = refused(["--reg_data_dir=x"], read_captioned)["unknown flag --reg_data_dir"]
    assert "train_dreambooth" in fix and "--class_data_dir" in fix


def test_a_key_of_kohyas_is_told(tmp_path):
    (tmp_path / "c.toml").write_text("network_dim = 32\nweighted_captions = true\n")
    found = refused([f"--config={tmp_path / 'c.toml'}"])
    assert found["unknown key network_dim"] == "write rank"
    assert "has no weight" in found["unknown key weighted_captions"]


@pytest.mark.parametrize("argv", [["--zzzzz=3"], ["--qqqq", "3"], ["--net", "8"], ["--xyz_lr=3"]])
def test_no_value_is_told_to_be_removed(argv):
    assert all("remove it" not in fix for fix in refused(argv).values())


# -- off --------------------------------------------------------------------------------------------------------------

OFF = {name: flag for name, flag in FLAGS.items() if flag.facts.can_be_off}
NAMED = ["num_validation_images", "max_grad_norm", "snr_gamma", "noise_offset", "lr_warmup_steps",
         "checkpointing_steps",
         "checkpoints_total_limit", "validation_epochs", "validation_steps", "stop_after_steps", "lora_dropout",
         "gradient_accumulation_steps", "max_train_samples", "dataloader_num_workers", "dist_match", "lora_alpha"]


def test_the_numbers_that_people_switch_off_can_be():
    assert set(NAMED) <= OFF.keys()


@pytest.mark.parametrize("word", ["0", "0.0", "-0", *OFF_WORDS, "None", "OFF"])
@pytest.mark.parametrize("name", OFF)
def test_a_number_is_switched_off(name, word):
    reader, options = (read, Options) if name in Options.flags() else (read_captioned, Captioned)
    assert options.flags()[name].facts.off == reader(f"--{name}={word}").flat()[name]


@pytest.mark.parametrize("line", ["max_grad_norm: off", "max_grad_norm: no", "max_grad_norm: null", "max_grad_norm: 0",
                                  "max_grad_norm: 0.0", "max_grad_norm: false", "max_grad_norm: 'none'"])
def test_so_in_a_config(tmp_path, line):
    (tmp_path / "c.yaml").write_text(line)
    assert read(f"--config={tmp_path / 'c.yaml'}").optimizer.max_grad_norm is None


@pytest.mark.parametrize("argv, what", [
    (["--max_grad_norm=-1"], "--max_grad_norm 0 switches it off"), (["--max_grad_norm=x"], "--max_grad_norm 0"),
    (["--num_class_images=0"], "without --with_prior_preservation"), (["--num_validation_images=-1"], "0 switches"),
    (["--max_train_steps=0"], "--max_train_steps none"),
    (["--noise_offset=-1"], "--noise_offset 0"), (["--checkpointing_steps=-1"], "--checkpointing_steps 0")])
def test_a_refused_number_says_how_it_is_switched_off(argv, what):
    assert what in next(iter(refused(argv).values()))


def test_no_limit_is_no_limit():
    assert read("--max_grad_norm=inf").optimizer.max_grad_norm is None
    assert "cannot be" in next(iter(refused(["--num_validation_images=inf"])))


# -- shares of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["lr_warmup_steps", "checkpointing_steps", "validation_steps", "stop_after_steps"])
@pytest.mark.parametrize("share, steps", [("0.05", 2), ("5%", 2), (".5", 20), ("0.001", 1)])
def test_a_share_of_the_run_is_told_in_steps(flag, share, steps):
    fix = next(iter(refused([f"--{flag}={share}", "--max_train_steps=40"]).values()))
    assert fix.startswith(f"--{flag} {steps}:") and "of 40 steps" in fix


def test_without_a_number_of_steps_it_says_what_to_count():
    assert "0.05 times" in next(iter(refused(["--lr_warmup_steps=0.05"]).values()))
    assert "times" not in next(iter(refused(["--rank=0.05"]).values()))
