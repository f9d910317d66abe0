"""Both trainers' main() on a made-up CUDA card: no mismatch of devices or dtypes, and few waits in a step.

Numbers on the card are made up, so nothing here says what is learned; see tests/support/fake_cuda.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.fake_cuda import hooks
from tests.support.pairs import every_value_first, pairwise
from tests.support.tiny_models import build_tiny_clip
from tests.support.trainers import command, make_images, require_mark

pytestmark = [
    pytest.mark.trains, pytest.mark.xdist_group("fake card"),
    pytest.mark.skipif(not hooks.available(), reason="the fake card needs g++: apt install g++"),
]

DREAMBOOTH, CAPTIONED = "train_dreambooth_lora_sdxl_advanced", "train_text_to_image_lora"
HINA = "preset=fork reduce_precision=True cpu_offload_states=True"
FEATURES: dict[str, list[dict[str, object]]] = {
    "adapter": [{}, {"use_dora": True}, {"lora_type": "loha"}, {"lora_layers": "attention+conv", "use_ema": True}],
    "optimizer": [{}, {"optimizer": "prodigy", "learning_rate": 1.0}, {"optimizer": "schedule_free_adamw"},
                  {"optimizer": "hina_adaptive", "optimizer_args": HINA},
                  {"optimizer": "adamw8bit", "optimizer_args": "min_8bit_size=16"}],  # else small ones keep 32 bits
    "precision": [{"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}, {}],
    "text": [{}, {"train_text_encoder_ti": True}, {"train_text_encoder": True}],
    "loss": [{}, {"snr_gamma": 5.0, "noise_offset": 0.1}, {"loss_type": "fourier"}, {"loss_type": "huber"}],
    "images": [{}, {"cache_latents": True}],
    "checkpointing": [{}, {"gradient_checkpointing": True, "deterministic": True}],
    "class images": [{}, {"with_prior_preservation": True, "class_prompt": "an icon", "num_class_images": 2}],
    "previews": [{}, {"validation_prompt": "a TOK icon", "num_validation_images": 1, "validation_epochs": 1}],
    "resume": [{}, {"resume_from_checkpoint": "latest"}],
}
FIRST, OTHERS = every_value_first(pairwise(FEATURES))
NOT_CAPTIONED = ("train_text_encoder_ti", "token_std_pull", "with_prior_preservation", "class_prompt",
                 "num_class_images")
ASYNCHRONOUS = ", asynchronous"
WAITS = {  # for the card in a step, by what for and the file that waits: how many there may be; nobody else waits
    "item, gradients.py": 1,  # the loss and the gradients' norm
    "item, prodigy.py": 3,  # its sums, for each group
    "synchronize, eight_bit.py": 3,  # bitsandbytes, for each group
    "device to host, cached_text.py": 8,  # in the step of the pivot: what the text encoders said last
    "item, distribution_matching.py": 3,  # its report, and with a bank keys and weights; the bank's counts go up
    "host to device, distribution_matching.py": 1,
}
WAITS_OF_A_PREVIEW = 320  # up to 314 were counted; 248 are those of the VAE of SDXL, which comes to the card and goes


def named(row: tuple[int, ...]) -> str:
    return "".join(map(str, row))


def flags_of(row: tuple[int, ...]) -> dict[str, object]:
    flags = {name: value for choices, index in zip(FEATURES.values(), row, strict=True)
             for name, value in choices[index].items()}
    if flags.get("optimizer") == "schedule_free_adamw":  # it averages by itself, which refuses both
        flags.pop("use_ema", None)
        flags |= {"token_std_pull": 0} if "train_text_encoder_ti" in flags else {}
    return flags


def rows_of(table: list[tuple[int, ...]], folder: Path, sdxl: Path, sd: Path) -> list[dict]:
    """A command line for each row, for the two trainers in turn; a row that resumes is two of them."""
    images, class_images = make_images(folder / "images", n=5), make_images(folder / "class", n=2, captions=False)
    rows = []
    for number, row in enumerate(table):
        flags = flags_of(row)
        resumes = flags.pop("resume_from_checkpoint", None) is not None
        trainer = (DREAMBOOTH, CAPTIONED)[number % 2]
        if trainer == CAPTIONED:
            flags = {name: value for name, value in flags.items() if name not in NOT_CAPTIONED} | dict(
                pretrained_model_name_or_path=sd, train_data_dir=images, instance_data_dir=None, instance_prompt=None)
        elif "class_prompt" in flags:
            flags["class_data_dir"] = class_images
        argv = command(sdxl, images, folder / named(row), max_train_steps=3, checkpointing_steps=2, **flags)
        parts = ["--stop_after_steps=1"], ["--resume_from_checkpoint=latest"]
        for part, more in enumerate(parts if resumes else [[]]):
            rows.append({"name": f"{named(row)}-{part}", "trainer": trainer, "argv": argv + more})
    return rows


def on_the_card(folder: Path, rows: list[dict], device: str = "cuda") -> list[dict]:
    """Run the rows in one process -> what became of each."""
    require_mark()
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    command = [sys.executable, "-m", "tests.support.fake_cuda.runs", "rows.json", "results.jsonl", device]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


def test_modes_run_on_a_card(tiny_sdxl, tiny_sd, tmp_path):
    check(on_the_card(tmp_path, rows_of(FIRST, tmp_path, tiny_sdxl, tiny_sd)))


@pytest.mark.slow
def test_every_pair_of_modes_runs_on_a_card(tiny_sdxl, tiny_sd, tmp_path):
    check(on_the_card(tmp_path, rows_of(OTHERS, tmp_path, tiny_sdxl, tiny_sd)))


@pytest.mark.slow
def test_what_the_table_has_not_runs_on_a_card_too(tiny_sdxl, tiny_sd, tmp_path):
    """Class images that are generated, both extra terms of the captioned trainer, other starts, and the tools."""
    images = make_images(tmp_path / "images", n=5)
    dreambooth = partial(command, tiny_sdxl, images, max_train_steps=2, mixed_precision="bf16")
    captioned = partial(dreambooth, pretrained_model_name_or_path=tiny_sd, train_data_dir=images,
                        instance_data_dir=None, instance_prompt=None)
    class_images = dict(with_prior_preservation=True, class_prompt="an icon", num_class_images=3,
                        class_data_dir=tmp_path / "generated")
    matching = dict(dist_match_gain=0.3, dist_match_mode="combo", dist_match_bank=0.9)
    lora = [f"--base={tiny_sd}", f"--lora={tmp_path / 'matching'}"]
    features, clip = tmp_path / "features.safetensors", build_tiny_clip(tmp_path / "clip")
    rows = [
        ("trainkit.tools.extract_clip_features", [f"--images={images}", f"--clip={clip}", f"--out={features}"]),
        (DREAMBOOTH, dreambooth(tmp_path / "class-images", **class_images)),
        (DREAMBOOTH, dreambooth(tmp_path / "pissa", init_lora_weights="pissa", lora_layers="attention+ff")),
        (DREAMBOOTH, dreambooth(tmp_path / "dora", use_dora=True, train_text_encoder=True)),
        (CAPTIONED, captioned(tmp_path / "matching", **matching)),
        (CAPTIONED, captioned(tmp_path / "guidance", guidance_token=0.5, guidance_features=features)),
        ("trainkit.tools.generate", [*lora, "--prompt=a fox", "--steps=2", f"--out={tmp_path / 'drawn'}"]),
        ("trainkit.tools.evaluate", [*lora, "--steps=2", "--nouns=apple,axe", f"--out={tmp_path / 'evaluated'}"]),
    ]
    runs = on_the_card(tmp_path, [{"name": f"{number}", "trainer": trainer, "argv": argv}
                                  for number, (trainer, argv) in enumerate(rows)])
    check(runs)
    assert len(list((tmp_path / "generated").glob("*.png"))) == 3


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_both_trainers_and_the_tools_run_on_other_devices(device, tiny_sdxl, tiny_sd, tmp_path):
    """torch.cuda is asked nothing, and no fp64 goes to a GPU that has none."""
    images, out = make_images(tmp_path / "images", n=3), tmp_path / "captioned"
    shared = dict(max_train_steps=2, validation_prompt="an icon", num_validation_images=1, validation_epochs=2)
    class_images = dict(with_prior_preservation=True, class_prompt="an icon", num_class_images=1,
                        class_data_dir=tmp_path / "generated")
    rank_penalty = "preset=fork lora_rank_penalty=True rank_penalty_interval=1 cpu_offload_states=True"
    rows = [
        (DREAMBOOTH, command(tiny_sdxl, images, tmp_path / "dreambooth", mixed_precision="fp16", use_dora=True,
                             train_text_encoder=True, optimizer="hina_adaptive", optimizer_args=rank_penalty,
                             allow_tf32=True, gradient_checkpointing=True, **class_images, **shared)),
        (CAPTIONED, command(tiny_sd, None, out, instance_prompt=None, train_data_dir=images, mixed_precision="bf16",
                            optimizer="prodigy", learning_rate=1.0, cache_latents=True, loss_type="fourier",
                            fourier_warmup_steps=0, **shared)),
        (CAPTIONED, command(tiny_sd, None, tmp_path / "matching", instance_prompt=None, train_data_dir=images,
                            dist_match_gain=0.3, dist_match_mode="combo", dist_match_bank=0.9, max_train_steps=2)),
        (DREAMBOOTH, command(tiny_sdxl, images, tmp_path / "pivotal", train_text_encoder_ti=True, use_ema=True,
                             max_train_steps=2)),
        ("trainkit.tools.generate", [f"--base={tiny_sd}", f"--lora={out}", "--prompt=a fox", "--steps=2",
                                     f"--out={tmp_path / 'drawn'}"]),
    ]
    runs = on_the_card(tmp_path, [{"name": f"{number}", "trainer": trainer, "argv": argv}
                                  for number, (trainer, argv) in enumerate(rows)], device)
    ended_well(runs)
    assert all("Device" in run["output"] and device.upper() in run["output"] for run in runs[:-1])


@pytest.mark.slow
def test_sdxl_at_its_released_sizes_runs_on_a_card(tiny_sdxl, tmp_path):
    """At 1024 px as the README trains it, with previews: no weight has numbers, so it needs little memory here."""
    argv = command(tiny_sdxl, make_images(tmp_path / "images", n=2, captions=False), tmp_path / "out", resolution=1024,
                   rank=16, train_batch_size=1, max_train_steps=2, mixed_precision="bf16", optimizer="prodigy",
                   learning_rate=1.0, gradient_checkpointing=True, cache_latents=True, validation_prompt="a TOK icon",
                   num_validation_images=1, validation_epochs=1)
    run, = on_the_card(tmp_path, [{"name": "full", "trainer": DREAMBOOTH, "argv": argv, "full_size": True}])
    check([run])
    assert "560 layers" in run["output"] and "23.22 M" in run["output"], run["output"]
    assert run["peak_rss"] < 3e9


@pytest.mark.slow
def test_the_hour_on_a_card_can_be_run_and_continued(tiny_sdxl, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "utf-8")
    argv = [f"--out={tmp_path / 'hour'}", f"--model={tiny_sdxl}", "--resolution=32", "--steps=3", f"--docs={page}"]
    rows = [{"name": "first", "trainer": "experiments.gpu_hour", "argv": [*argv, "--parts", "modes", "--minutes=0"]},
            {"name": "again", "trainer": "experiments.gpu_hour", "argv": argv}]
    first, again = on_the_card(tmp_path, rows)
    assert (first["code"], again["code"]) == (0, 0), first["output"] + again["output"]
    assert "modes:" not in first["output"], "no time is left for a run"
    found = json.loads((tmp_path / "hour" / "results.json").read_text("utf-8"))
    ended = {f"{part}, {name}": run["ended"] for part in ("modes", "bits", "waits", "gaps")
             for name, run in found[part].items()}
    assert len(ended) == 21 and set(ended.values()) == {"trained"}, ended
    assert "made-up card" in page.read_text("utf-8")


MISTAKES = """
import sys
from tests.support.fake_cuda import hooks
hooks.load(sys.argv[1])
import torch
from tests.support.fake_cuda.machine import machine
from trainkit.optim.hina import memory

device = sys.argv[1]
mistakes = [
    lambda: torch.ones(2, device=device) + torch.ones(2),
    lambda: torch.randn(2, device=device, generator=torch.Generator()),
    lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device=device)],
    lambda: torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device, dtype=torch.bfloat16),
    lambda: torch.nn.functional.layer_norm(torch.ones(2, 2, device=device, dtype=torch.bfloat16), (2,),
                                           torch.ones(2, device=device)),
    *([lambda: torch.ones(2, device=device).double()] if device == "mps" else []),
    *([] if device == "cuda" else [lambda: memory._device_used(torch.device("cuda"))]),
]
with machine(device=device) as card:
    for number, mistake in enumerate(mistakes):
        try:
            mistake()
        except (RuntimeError, TypeError, AssertionError) as error:
            continue
        print("passed", number)
    before = len(card.waits)
    torch.ones(2, device=device).sum().item(), torch.ones(2).to(device), torch.ones(2, device=device).tolist()
    print("waits", len(card.waits) - before)
"""


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_made_up_device_refuses_what_a_real_one_does(device):
    """Else every run on it would end well."""
    done = subprocess.run([sys.executable, "-c", MISTAKES, device], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["waits 3"], done.stdout


def check(runs: list[dict]) -> None:
    """Each run ended well, and waited only where it may in a step that is not the first of its session."""
    ended_well(runs)
    for run in runs:
        for step in run["steps"][1:]:
            waits = Counter((f"{kind}, {lines.partition(':')[0]}", lines) for kind, lines in step
                            if not kind.endswith(ASYNCHRONOUS))
            places = Counter(place for place, _ in waits.elements())
            assert places["item, gradients.py"] == 1, "the machine does not count"
            assert all(number <= WAITS.get(place, 0) for place, number in places.items()), (
                f"{run['name']} waits for the card: {waits.most_common(8)}")
        for preview in run["previews"]:
            assert sum(not kind.endswith(ASYNCHRONOUS) for kind, _ in preview) <= WAITS_OF_A_PREVIEW, run["name"]


def ended_well(runs: list[dict]) -> None:
    failed = [f"{run['name']}, exit {run['code']}: {run['output'][-3000:]}" for run in runs if run["code"]]
    assert not failed, "\n\n".join(failed)
    for run in runs:
        ended = ("holds the trained weights", "stopped after", "/features.safetensors", "/drawn", "gap closed")
        assert any(words in run["output"] for words in ended), run["output"]
