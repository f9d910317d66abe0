"""generate.py --memory: what is computed for a card, what is done about it, and that the images stay what they are."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support.fake_cuda import hooks
from tests.support.loras import random_lora
from tests.support.trainers import require_mark
from trainkit import devices
from trainkit.plan.cards import Card, find
from trainkit.plan.need import GIB, Need
from trainkit.runtime.weight_files import DIFFUSERS_FILE
from trainkit.tools import generate, memory
from trainkit.tools.memory import LOW, NORMAL, Drawing, Way
from trainkit.tools.second_pass import SecondPass

TWO_PASSES = ("--steps=2", "--hires_scale=1.5", "--hires_steps=2", "--batch_size=2")


def asked(base: str = "sd15", **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"base": base, "dtype": None, "prediction_type": None, "max_token_length": 75,
                                 "memory": "auto", **changes})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


@pytest.mark.trains
def test_on_a_cpu_nothing_changes(tiny_sd, tmp_path, monkeypatch, capsys):
    """Nothing is computed or said, and the files have the same bits with the flag and without it."""
    monkeypatch.setattr(memory, "needs", None)
    for name, flags in (("before", []), ("auto", ["--memory=auto"]), ("low", ["--memory=low"])):
        generate.main([f"--base={tiny_sd}", f"--out={tmp_path / name}", "--prompt=a (red:1.3) dog", "--seeds=0,1",
                       *TWO_PASSES, *flags])
    first = digests(tmp_path / "before")
    assert len(first) == 3 and digests(tmp_path / "auto") == digests(tmp_path / "low") == first
    assert "memory" not in capsys.readouterr().err


@pytest.mark.trains
def test_parts_that_come_one_after_the_other_give_the_same_images(tiny_sdxl, tmp_path, monkeypatch):
    """The device is the CPU itself, under a name that is not "the CPU": hooks and moves are those of a card."""
    lora = random_lora(tiny_sdxl, tmp_path / DIFFUSERS_FILE)
    flags = [f"--base={tiny_sdxl}", "--prompt=a (red:1.3) dog", f"--lora={lora}", "--grid=strength=0,1", *TWO_PASSES]
    generate.main([*flags, f"--out={tmp_path / 'before'}"])
    ways = []
    monkeypatch.setattr(generate, "way_for", lambda args, batches, copies: ways.append(copies) or LOW)
    drawing = []
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.enable_model_cpu_offload",
                        lambda pipe, device: drawing.append((pipe.vae.use_tiling, f"{device}")))
    generate.main([*flags, f"--out={tmp_path / 'low'}"])
    assert digests(tmp_path / "low") == digests(tmp_path / "before")
    assert ways == [True] and drawing == [(True, "cpu")] * 2


def test_the_first_way_that_fits_is_taken(monkeypatch, capsys, caplog):
    """The numbers are those of `needs`; a card of one byte less takes the next way."""
    args, batches = asked(), [Drawing(1, 512, 512), Drawing(1, 1024, 768)]
    computed = {way: Need(peak).bytes for way, peak in memory.needs(args, batches)}
    normal, tiles, low = computed.values()
    assert [*computed] == [NORMAL, Way(tiles=True), LOW] and normal > tiles > low
    monkeypatch.setattr(memory, "needs", lambda *_, **__: ((way, peak) for way, peak in peaks.items()))
    peaks = {way: int((need - Need(0).bytes) / 1.05) for way, need in computed.items()}

    def taken(free: int) -> tuple[Way, str]:
        way = memory.fitting(args, Card("card", free), batches)
        return way, capsys.readouterr().err

    assert taken(normal) == (NORMAL, f"memory: about {normal / GIB:.1f} GiB are needed (computed, "
                                     f"{normal / GIB:.1f} GiB are free)\n")
    way, said = taken(tiles + 9)
    assert way == Way(tiles=True) and f"about {normal / GIB:.1f} GiB would be needed" in said and "in tiles" in said
    assert f"needs about {tiles / GIB:.1f} GiB" in said and said.count("\n") == 1
    assert taken(low + 9)[0] == LOW and not caplog.records
    assert taken(low - 2**20)[0] == LOW and "memory may be short" in caplog.text and "--batch_size" in caplog.text


def test_copies_of_the_weights_count_on_the_card_only(tiny_sd):
    args = asked(f"{tiny_sd}")
    alone, kept = (dict(memory.needs(args, [Drawing(1, None, None)], copies=copies)) for copies in (False, True))
    weights = sum(file.stat().st_size for name in ("unet", "text_encoder") for file in tiny_sd.glob(f"{name}/*tensors"))
    assert kept[NORMAL] - alone[NORMAL] == pytest.approx(weights / 2, rel=0.2), "16 bits, in blocks of 512 bytes"
    assert kept[LOW] == alone[LOW]


def test_the_largest_pass_decides():
    assert Drawing(1, None, 256).size((512, 640)) == (256, 640)
    assert Drawing(1, 512, 256, SecondPass(2, 0.5, 1)).size((64, 64)) == (512, 1024)


@pytest.mark.slow
def test_sdxl_fits_cards_that_people_have():
    """One image of 1024 px: 8 GB are enough for the parts one after the other, 12 GB for all of them."""
    needed = {way: Need(peak).bytes for way, peak in memory.needs(asked("sdxl"), [Drawing(1, None, None)])}
    assert needed[LOW] <= find("8gb").free < needed[NORMAL] <= find("12gb").free


@pytest.mark.parametrize("device, mode, way", [
    ("cpu", "low", NORMAL), ("cuda", "normal", NORMAL), ("cuda", "low", LOW), ("mps", "low", LOW),
    ("mps", "auto", NORMAL), ("xpu", "auto", NORMAL), ("cuda", "auto", Way(tiles=True))])
def test_what_a_device_gets(device, mode, way, monkeypatch):
    """Only of an NVIDIA card it is known how much is free."""
    monkeypatch.setattr(devices, "present", lambda: torch.device(device))
    monkeypatch.setattr("trainkit.plan.report.here", lambda device: Card("card", 8 * GIB))
    monkeypatch.setattr(memory, "fitting", lambda *_, **__: Way(tiles=True))
    assert memory.way_for(asked(memory=mode), [], copies=False) == way


@pytest.mark.trains
@pytest.mark.slow
@pytest.mark.skipif(not hooks.available(), reason="the fake card needs g++: apt install g++")
def test_low_memory_runs_on_a_card(tiny_sdxl, tmp_path):
    """Two batches of two passes and long prompts, with other LoRAs in between: nothing is on two devices at once."""
    require_mark()
    lora = random_lora(tiny_sdxl, tmp_path / DIFFUSERS_FILE)
    flags = [f"--base={tiny_sdxl}", "--memory=low", "--prompt=a dog", "--prompt=a cat",
             f"--lora={lora}", "--grid=strength=0,1", *TWO_PASSES]
    rows = [{"name": name, "trainer": "trainkit.tools.generate", "argv": [*flags, *more, f"--out={tmp_path / 'drawn'}"]}
            for name, more in (("plain", ["--batch_size=1"]), ("long", ["--max_token_length=150", "--clip_skip=1"]))]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    done = subprocess.run([sys.executable, "-m", "tests.support.fake_cuda.runs", "rows.json", "results.jsonl", "cuda"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run in map(json.loads, (tmp_path / "results.jsonl").read_text("utf-8").splitlines()):
        assert run["code"] == 0 and "and sheet.png in" in run["output"], run["output"]
        assert "only the part that works is on the card (--memory low)" in run["output"]
