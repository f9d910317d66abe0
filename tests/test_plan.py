"""The plan as a user meets it: will it fit, and what to type. Memory itself is in test_plan_memory.py."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train_dreambooth_lora_sdxl_advanced as dreambooth
import train_text_to_image_lora as text_to_image
from tests.support import ROOT
from tests.support.command_lines import read
from trainkit.errors import EXIT_CODES, Problem, UserError
from trainkit.options import PRESETS, TRAINERS
from trainkit.plan import cards, ladder, models, page, phases, report, tables
from trainkit.plan.live_bytes import GRAPH, WEIGHTS, Peak
from trainkit.plan.need import GIB, OTHERS, Need
from trainkit.plan.phases import Phase, Trace, with_flags
from trainkit.run import SAVES_MEMORY, Run
from trainkit.tools import plan as tool

EIGHT_GB = cards.find("8gb")
PARAMETERS = {  # of the published models, by network
    "sd15": {"denoiser": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"denoiser": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"denoiser": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
             "text_encoder_2": 694_659_840},
}


def of_sdxl(*flags: str):
    return tables.options("sdxl", flags)


# -- the built-in models ----------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("name", models.SIZES)
def test_built_in_sizes_are_those_of_the_published_models(name):
    opt = tables.options(name, [])
    family = phases.Skeleton(opt, models.read_configs(opt.model)).family
    networks = {"denoiser": family.denoiser, "vae": family.vae,
                **dict(zip(family.layout.text_encoders, family.text_encoders, strict=True))}
    assert {n: sum(p.numel() for p in network.parameters()) for n, network in networks.items()} == PARAMETERS[name]


def test_a_published_model_is_planned_before_it_is_downloaded():
    opt = read("--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0")
    assert models.read_configs(opt.model).is_sdxl


def test_a_folder_of_the_name_of_a_built_in_model_is_that_folder(tmp_path, monkeypatch):
    (tmp_path / "sdxl" / "unet").mkdir(parents=True)
    (tmp_path / "sdxl" / "unet" / "config.json").write_text(json.dumps({"in_channels": 4}))
    monkeypatch.chdir(tmp_path)
    assert not models.read_configs(read("--pretrained_model_name_or_path=sdxl").model).is_sdxl


# -- the rule and the cards -------------------------------------------------------------------------------------------


def test_the_rule_is_the_one_that_the_docs_state():
    assert Need(10 * GIB).bytes == pytest.approx((1.05 * 10 + 0.6) * GIB)
    assert Need(7 * GIB).fits(8 * GIB) and not Need(7 * GIB).fits(7 * GIB)


@pytest.mark.parametrize(("text", "gib", "tflops"), [
    ("8gb", 7.5, None), ("8", 7.5, None), ("8 GiB", 7.5, None), ("RTX 3060", 11.5, 25.4), ("3060", 11.5, 25.4),
    ("rtx4090", 23.5, 165.2), ("NVIDIA GeForce RTX 2080 Ti", 10.5, 53.8)])
def test_a_card_is_found_by_its_memory_or_its_name(text, gib, tflops):
    card = cards.find(text)
    assert card.free == gib * GIB and card.tflops == tflops


def test_a_card_that_is_neither_is_refused_with_what_there_is():
    with pytest.raises(UserError, match="RTX 3060"):
        cards.find("voodoo")


def test_the_card_in_the_machine_is_known_by_the_name_that_cuda_gives():
    card = cards.installed("NVIDIA GeForce RTX 4070 Ti", 11 * GIB)
    assert card.tflops == 80.2 and card.free == 11 * GIB and cards.installed("Graphics Device", 1).tflops is None


# -- the ladder -------------------------------------------------------------------------------------------------------


def made_up_trace(opt, configs, known=None) -> Trace:
    """Training needs 16 GiB in fp32, half of it in half precision, 2 GiB less with each other flag; previews 7."""
    half = (opt.precision.mixed_precision or "no") != "no"
    training = 16 * (0.5 if half else 1) - 2 * opt.precision.gradient_checkpointing + opt.run.train_batch_size - 1
    found = [Phase("training", Peak({WEIGHTS: int(training * GIB)}, flops=10**12))]
    if opt.validation.validation_prompt:
        found.append(Phase("previews", Peak({GRAPH: 7 * GIB})))
    return Trace(tuple(found), adapters=10**6, state_on_host=0, loaded=GIB, latent=10**6, prompt=10**5,
                 checkpoint=10**7, flops=10**12)


@pytest.fixture
def quick(monkeypatch):
    for module in (ladder, report):
        monkeypatch.setattr(module, "trace", made_up_trace)


def steps(opt, card):
    return [*ladder.climb(opt, models.read_configs(opt.model), card)]


def test_rungs_are_added_until_the_run_fits(quick):
    found = steps(of_sdxl("--train_batch_size=1"), EIGHT_GB)
    assert [step.flags for step in found] == [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}]
    assert [step.need.fits(EIGHT_GB.free) for step in found] == [False, False, True]


def test_a_run_that_fits_gets_no_rung(quick):
    assert len(steps(of_sdxl("--train_batch_size=1"), cards.find("24gb"))) == 1


def test_a_rung_that_helps_the_largest_phase_not_at_all_is_left_out(quick):
    """--cache_latents lowers nothing here."""
    flags = [step.flags for step in steps(of_sdxl("--train_batch_size=4"), cards.find("4gb"))]
    assert {"cache_latents": True} not in flags
    assert {"train_batch_size": 1, "gradient_accumulation_steps": 4} in flags


def test_previews_go_only_where_they_are_what_does_not_fit(quick):
    with_previews = of_sdxl("--train_batch_size=1", "--validation_prompt=a dog")
    assert {"validation_prompt": None} in [s.flags for s in steps(with_previews, cards.find("7.5gb"))]
    assert {"validation_prompt": None} not in [s.flags for s in steps(with_previews, cards.find("9gb"))]


def test_a_rung_that_helped_nothing_before_is_taken_when_its_phase_is_the_largest(monkeypatch):
    """Class images come first here, and then the batch, though its rung stands before theirs."""
    def made_up(opt, configs, known=None):
        sizes = {"class images": 10 * opt.prior.sample_batch_size, "training": 12 * opt.run.train_batch_size}
        found = tuple(Phase(name, Peak({GRAPH: gib * GIB}, flops=1)) for name, gib in sizes.items())
        return Trace(found, 1, 0, 1, 1, 1, 1, 1)

    monkeypatch.setattr(ladder, "trace", made_up)
    opt = of_sdxl("--train_batch_size=2", *tables.CLASS_IMAGES, *tables.LEAN)
    flags = [step.flags for step in steps(opt, cards.find("14gb"))]
    assert flags == [{}, {"sample_batch_size": 1}, {"train_batch_size": 1, "gradient_accumulation_steps": 2}]


def test_a_card_without_bf16_is_advised_fp16(quick):
    assert steps(of_sdxl("--train_batch_size=1"), cards.find("2080"))[1].flags == {"mixed_precision": "fp16"}


def test_every_rung_sets_flags_that_a_trainer_has():
    opt = of_sdxl("--train_batch_size=4", "--validation_prompt=a dog", *tables.CLASS_IMAGES)
    known = {name for concerns in TRAINERS.values() for kind in concerns.values() for name in kind.model_fields}
    for rung in ladder.RUNGS:
        flags = rung.flags(opt, EIGHT_GB)
        assert flags and flags.keys() <= known and rung.cost
        assert rung.flags(with_flags(opt, flags), EIGHT_GB) == {}, "a rung is taken once"


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_page_fits_a_terminal_and_ends_with_what_to_type(quick):
    opt = of_sdxl("--train_batch_size=4", "--validation_prompt=a dog")
    found = steps(opt, cards.find("3060"))
    lines = [*page.page(opt, models.read_configs(opt.model), found[0].trace, cards.find("3060"), found)]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert f"  {page.typed(page.all_flags(found))}" in lines
    assert sum(page.FITS in line for line in lines) == 1


@pytest.mark.trains
def test_a_trainer_plans_from_configs_alone(tiny_sdxl, tmp_path, capsys):
    """No weight is there, and no image."""
    for config in tiny_sdxl.glob("**/*.json"):
        target = tmp_path / config.relative_to(tiny_sdxl)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(config.read_bytes())
    with pytest.raises(SystemExit) as ended:
        dreambooth.main([f"--pretrained_model_name_or_path={tmp_path}", "--instance_prompt=a", "--resolution=64",
                         "--plan=8gb"])
    assert ended.value.code == 0 and "It fits as it is." in capsys.readouterr().out
    assert [*tmp_path.glob("**/*.safetensors")] == []


@pytest.mark.trains
def test_the_text_to_image_trainer_plans_too_and_without_a_card_says_only_what_is_needed(tiny_sd, capsys):
    with pytest.raises(SystemExit) as ended:
        text_to_image.main([f"--pretrained_model_name_or_path={tiny_sd}", "--resolution=64", "--plan"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "training" in out and page.FITS not in out


def test_nothing_that_fits_has_an_exit_code_of_its_own(quick, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["sdxl", "4gb"])
    assert ended.value.code == EXIT_CODES["memory"] == 4 and "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "side"), [(["sd15"], 512), (["sdxl"], 1024), (["sdxl", "--train_data_dir=x"], 512)])
def test_the_tool_takes_the_flags_of_the_trainer_for_the_model(words, side):
    assert tool.options(words[0], words[1:]).data.resolution == side


@pytest.mark.trains
def test_the_whole_ladder_takes_less_than_a_cpu_minute_and_a_gigabyte():
    """Every rung, down to a card that nothing fits. With previews and class images, which have phases of their own."""
    command = ("import resource, sys; from trainkit.tools import plan\n"
               "try: plan.main(sys.argv[1:])\n"
               "except SystemExit as ended: code = ended.code\n"
               "used = resource.getrusage(resource.RUSAGE_SELF)\n"
               "peak = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
               "print(code, used.ru_utime + used.ru_stime, peak / 2**20)")  # ru_maxrss would hold this process's, too
    done = subprocess.run([sys.executable, "-c", command, "sdxl", "5gb", "--validation_prompt=a dog",
                           *tables.CLASS_IMAGES], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    code, seconds, gib = map(float, done.stdout.splitlines()[-1].split())
    assert code == 4, done.stdout + done.stderr
    assert seconds <= 60 and gib <= 1  # 23 to 39 seconds, by the CPU


# -- presets by card --------------------------------------------------------------------------------------------------

CARD_PRESETS = [name for name in PRESETS if name.endswith("gb")]
MEMORY_FLAGS = {"mixed_precision", "cache_latents", "gradient_checkpointing", "train_batch_size"}


@pytest.mark.trains
@pytest.mark.parametrize("name", CARD_PRESETS)
def test_a_preset_by_card_fits_its_card(name):
    """At rank 16, with previews."""
    model, card = name.split("-")
    opt = tables.options(model, [f"--preset={name}", "--rank=16", "--validation_prompt=a dog"])
    (asked, *rungs) = steps(opt, cards.find(card))
    assert asked.need.fits(cards.find(card).free) and not rungs
    assert PRESETS[name].keys() - {"base_precision"} == MEMORY_FLAGS


def test_of_several_presets_the_later_one_wins():
    opt = read("--preset=style,sdxl-8gb")
    assert opt.lora.rank == 8 and opt.run.train_batch_size == 1 and opt.precision.gradient_checkpointing
    assert read("--preset=sdxl-8gb, style").run.train_batch_size == 3
    assert opt.origins["train_batch_size"] == "preset sdxl-8gb" and opt.origins["rank"] == "preset style"


def test_of_several_presets_an_unknown_one_is_refused():
    with pytest.raises(UserError, match="unknown preset 'sdxl-9gb'"):
        read("--preset=style,sdxl-9gb")


# -- at the start of a run, and when one has died ---------------------------------------------------------------------


@pytest.fixture
def on_a_card(monkeypatch):
    def put(gib: float):
        card = cards.installed("NVIDIA GeForce RTX 3070", int(gib * GIB))
        monkeypatch.setattr(report, "here", lambda device=None: card)
        return SimpleNamespace(device=torch.device("cuda"), saves_memory=None)

    return put


def test_a_start_with_memory_enough_is_one_line_and_no_plan(on_a_card, caplog, monkeypatch):
    monkeypatch.setattr(report, "climb", None)
    with caplog.at_level(logging.INFO):
        report.at_start(of_sdxl("--mixed_precision=bf16", "--train_batch_size=1", "--gradient_checkpointing"),
                        on_a_card(12))
    (line,) = caplog.messages
    assert line.startswith("memory") and "RTX 3070" in line


def test_a_start_with_too_little_memory_warns_and_says_what_to_add(quick, on_a_card, caplog):
    report.at_start(of_sdxl("--train_batch_size=1"), on_a_card(7.5))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Add --mixed_precision=bf16 --gradient_checkpointing" in record.getMessage()


def test_a_start_without_a_card_says_nothing(caplog):
    run = SimpleNamespace(device=torch.device("cpu"), saves_memory="as it was")
    report.at_start(of_sdxl(), run)
    assert not caplog.records and run.saves_memory == "as it was"


def test_a_run_that_died_is_told_the_first_flags_that_fit(quick, on_a_card):
    run = on_a_card(7.5)
    report.at_start(of_sdxl("--train_batch_size=1", "--mixed_precision=bf16"), run)
    assert run.saves_memory().startswith("Add --gradient_checkpointing, with which")


def test_a_run_that_died_though_it_should_have_fitted_is_told_the_next_rung(quick, on_a_card):
    run = on_a_card(24)
    report.at_start(of_sdxl("--train_batch_size=1"), run)
    assert run.saves_memory().startswith("Add --mixed_precision=bf16, with which")


def test_a_plan_that_fails_does_not_hide_that_memory_ran_out():
    def fails() -> str:
        raise UserError(Problem("no config", "there", "it is gone", "put it back"))

    assert Run._what_saves_memory(SimpleNamespace(saves_memory=fails)) == SAVES_MEMORY
    assert Run._what_saves_memory(SimpleNamespace(saves_memory=lambda: "less")) == "less"


# -- published figures, and the docs ----------------------------------------------------------------------------------


@pytest.mark.trains
def test_sdxl_fits_eight_gigabytes_as_sd_scripts_says():
    """kohya-ss/sd-scripts, docs/train_network_README: SDXL with half precision and gradient checkpointing on 8 GB."""
    assert 4.78 * GIB < tables.eight_gb() <= 8 * GIB - OTHERS


@pytest.mark.trains
def test_the_readme_shows_what_its_command_prints(capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"python scripts/plan.py (.+)\n```\n```text\n((?: .+\n)+)", text)
    assert found
    with pytest.raises(SystemExit):
        tool.main(found[1].split())
    printed = capsys.readouterr().out.splitlines()
    assert found[2].splitlines() == [line for line in printed if re.search(r"GiB [✓✗]", line)]


MEMORY_PAGE = ROOT / "docs" / "memory.md"


@pytest.mark.trains
@pytest.mark.parametrize("row", [row for row in tables.ROWS if row.side <= 512 and tables.HALF in row.flags],
                         ids=lambda row: f"{row.model} {' '.join(row.flags)}")
def test_rows_of_the_memory_page_are_what_is_computed(row):
    assert str(row) in MEMORY_PAGE.read_text("utf-8").splitlines()


@pytest.mark.slow
def test_the_memory_page_is_what_is_computed():
    assert MEMORY_PAGE.read_text("utf-8") == tables.page()


def test_the_memory_page_has_every_row_and_preset():
    text = MEMORY_PAGE.read_text("utf-8")
    assert len(re.findall(r"^\| SD", text, re.MULTILINE)) == len(tables.ROWS)
    assert all(line in text for line in tables.presets())


# -- several sources ---------------------------------------------------------------------------------------------------


def with_sources(tmp_path, *sources: str):
    config = tmp_path / "data.toml"
    config.write_text("".join(f"[[sources]]\nfolder = 'a{i}'\nprompt = 'TOK'\n{said}\n"
                              for i, said in enumerate(sources)), "utf-8")
    return of_sdxl(f"--dataset_config={config}", "--resolution=512")


def test_of_sources_of_several_sizes_the_largest_is_planned(tmp_path):
    opt = with_sources(tmp_path, "resolution = 768", "resolution = 1024", "")
    assert phases.largest(opt.data) == (1024, 1024)
    assert phases.largest(with_sources(tmp_path, "", "resolution = 256").data) == (512, 512)


def test_a_smaller_resolution_is_advised_only_where_the_flag_decides(tmp_path):
    assert ladder.smaller(512)(with_sources(tmp_path, "resolution = 1024"), EIGHT_GB) == {}
    assert ladder.smaller(256)(with_sources(tmp_path, "", "resolution = 256"), EIGHT_GB)["resolution"] == 256


def test_class_images_of_a_source_are_planned_beside_the_others(tmp_path):
    opt = with_sources(tmp_path, "", "is_class = true")
    assert phases.has_class_images(opt) and not phases.makes_class_images(opt)
    assert not phases.has_class_images(with_sources(tmp_path, "", ""))
