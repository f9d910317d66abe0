"""resize_lora: the best LoRA of the rank that the rule says, in the same layout, and the loss is what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.lora_layouts import LAYOUTS, close, deltas, write_lora
from trainkit.adapters.updates import LowRank
from trainkit.errors import UserError
from trainkit.lora_file import BaseWeights, LayerUpdate, LoraFile, Magnitude
from trainkit.merging.resize import RankRule, resized
from trainkit.tools import resize_lora
from trainkit.tools.checks import base_of

XL = ROOT / "assets/tiny-sdxl-icons"
PLACE = ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")


def run(lora: Path, out: Path, *more: str) -> None:
    resize_lora.main([f"--lora={lora}", f"--out={out}", *more])


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_is_the_best_of_its_rank_in_the_same_layout(tmp_path, capsys, layout, kind):
    """Its error is the tail of the singular values, and the message says how large it is."""
    a = write_lora(tmp_path / "a.safetensors", layout, rank=6, alpha=3.0, kind=kind, modules=("to_k", "conv"))
    run(a, tmp_path / "b.safetensors", "--new_rank=2", "--new_conv_rank=3", "--dtype=float32")
    before, after, lost = deltas(a), deltas(tmp_path / "b.safetensors"), [0.0, 0.0]
    for module, rank in (("to_k", 2), ("conv", 3)):
        values = torch.linalg.svdvals(before[module])
        assert float((before[module] - after[module]).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        assert int((torch.linalg.svdvals(after[module]) > 1e-5 * values[0]).sum()) == rank
        lost = [lost[0] + float(values[rank:].square().sum()), lost[1] + float(values.square().sum())]
    said = re.search(r"^([\d.]+) % of the change", capsys.readouterr().out, re.MULTILINE)
    assert float(said[1]) == pytest.approx(100 * (lost[0] / lost[1]) ** 0.5, rel=0.05)
    assert any("lora_A" in name for name in load_file(tmp_path / "b.safetensors")) == (layout == "diffusers")


def test_alpha_goes_down_with_the_rank(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "kohya", rank=6, alpha=3.0, modules=("to_k",))
    run(a, tmp_path / "b.safetensors", "--new_rank=2")
    held = load_file(tmp_path / "b.safetensors")
    assert [float(t) for name, t in held.items() if name.endswith("alpha")] == [1.0]
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_network_dim"] == "2" and found["ss_network_alpha"] == "1.0"
    record = json.loads(found["ss_resized"])
    assert record["new_rank"] == 2 and record["from"][0]["name"] == "a.safetensors"


def test_a_larger_rank_changes_no_number(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "kohya")
    run(a, tmp_path / "b.safetensors", "--new_rank=64", "--dtype=float32")
    assert all(close(delta, deltas(a)[module], 1e-6) for module, delta in deltas(tmp_path / "b.safetensors").items())


@pytest.mark.parametrize("method, param, rank", [
    (None, 1.0, 3), ("sv_ratio", 4.0, 2), ("sv_ratio", 4.01, 3), ("sv_ratio", 1.5, 1), ("sv_cumulative", 0.8, 2),
    ("sv_cumulative", 0.81, 3), ("sv_fro", 0.9, 2), ("sv_fro", 0.5, 1), ("sv_fro", 1.0, 3), ("energy", 0.81, 2),
    ("energy", 1.0, 3)])
def test_rules_choose_ranks_as_kohyas_program_does(method, param, rank):
    """S = 4, 2, 1, 0.5, and at most three: sums 4, 6, 7, 7.5; squares 16, 20, 21, 21.25."""
    S = torch.tensor([4.0, 2.0, 1.0, 0.5]).double()
    assert RankRule(3, 3, method, param).rank(S, ()) == rank


def test_a_change_of_zero_has_rank_one_and_convolutions_have_their_own():
    S = torch.tensor([0.0, 0.0]).double()
    assert RankRule(8, 8, "sv_fro", 0.9).rank(S, ()) == RankRule(8, 8).rank(S, ()) == 1
    four = torch.ones(9).double()
    assert [RankRule(4, 2).rank(four, kernel) for kernel in ((), (1, 1), (3, 3))] == [4, 4, 2]


@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0])
def test_any_scale_is_kept(scale):
    g = torch.Generator().manual_seed(0)
    layer = LayerUpdate(LowRank(torch.randn(5, 9, generator=g), torch.randn(7, 5, generator=g), scale), ())
    found, report = resized(PLACE, layer, RankRule(2, 2), None)
    values = torch.linalg.svdvals(layer.update.delta().double())
    assert report.lost == pytest.approx(float(values[2:].square().sum()), rel=1e-6, abs=1e-9)
    assert float((found.update.delta() - layer.update.delta()).double().norm()) == pytest.approx(
        float(values[2:].norm()), rel=1e-4, abs=1e-6)


def test_a_dora_keeps_its_magnitudes_and_needs_its_base(tmp_path):
    W = BaseWeights(base_of(str(XL)))(PLACE)
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(6, W.shape[1], generator=g) / 8, torch.randn(len(W), 6, generator=g) / 8
    name = f"unet.{PLACE[1]}"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B,
               f"{name}.lora_magnitude_vector.weight": W.norm(dim=1).float() * 1.2}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="depends on the base"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--new_rank=2")
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--new_rank=2", f"--base={XL}")
    held = {key.rpartition("to_q.")[2]: t.double() for key, t in load_file(tmp_path / "b.safetensors").items()}
    assert torch.allclose(held["lora_magnitude_vector.weight"], W.norm(dim=1) * 1.2, rtol=1e-6)
    U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    assert close(held["lora_B.weight"] @ held["lora_A.weight"], U[:, :2] * S[:2] @ Vh[:2], 1e-6)


def test_what_is_lost_of_a_dora_is_of_its_whole_change():
    g = torch.Generator().manual_seed(2)
    W, A, B = (torch.randn(*shape, generator=g).double() for shape in ((7, 9), (5, 9), (7, 5)))
    m = 1 + torch.rand(7, generator=g)
    found, report = resized(PLACE, LayerUpdate(LowRank(A, B), (), Magnitude(m)), RankRule(2, 2), W)

    def change(delta):
        return (W + delta) * (m.double() / (W + delta).norm(dim=1)).unsqueeze(1) - W

    wanted = (change(found.update.delta()) - change(B @ A)).square().sum()
    assert report.lost == pytest.approx(float(wanted)) and report.size == pytest.approx(
        float(change(B @ A).square().sum()))


def test_the_worked_example_of_the_help_runs(tmp_path, monkeypatch, capsys):
    [command] = re.findall(r"^    python scripts/resize_lora\.py (.+)$", resize_lora.__doc__, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    write_lora(Path("big.safetensors"), "kohya", rank=24, modules=("to_k", "text"))
    resize_lora.main([*shlex.split(command), "--dry_run"])
    assert not Path("small.safetensors").exists() and "down_blocks.1 attentions" in capsys.readouterr().out
    resize_lora.main(shlex.split(command))
    assert LoraFile.read(Path("small.safetensors")).layers and "read back" in capsys.readouterr().out


@pytest.mark.parametrize("more, words", [
    (["--new_rank=0"], "1 or more"), (["--dynamic_method=sv_fro"], "belong together"),
    (["--dynamic_method=sv_ratio", "--dynamic_param=0.5"], "times smaller"),
    (["--dynamic_method=sv_fro", "--dynamic_param=2"], "part that is kept"),
    (["--out=a.safetensors"], "replace itself"), (["--lora=nowhere.safetensors"], "no file")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("a.safetensors"), "kohya", modules=("text",))
    given = {"--lora": "a.safetensors", "--out": "b.safetensors", "--new_rank": "2"} | dict(m.split("=") for m in more)
    with pytest.raises(UserError, match=words):
        resize_lora.main([f"{flag}={value}" for flag, value in given.items()])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
