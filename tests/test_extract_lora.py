"""extract_lora: the difference of two models, and nothing else, is in the LoRA."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.lora_layouts import close
from tests.support.single_files import build_folder, write_single_file
from trainkit.adapters.updates import LowRank
from trainkit.errors import UserError
from trainkit.lora_file import LoraFile
from trainkit.merging.extract import ATTENTION, CONVOLUTIONS, Coverage, clamped, layer_of
from trainkit.tools import extract_lora
from trainkit.tools.checks import base_of, names_of

XL, SD = ROOT / "assets/tiny-sdxl-icons", ROOT / "assets/tiny-sd-icons"
CHANGED = {  # network, module -> the rank of its change
    ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"): 3,
    ("unet", "mid_block.resnets.0.conv1"): 2, ("text_encoder_2", "encoder.layers.0.mlp.fc1"): 1,
}


def tuned_model(folder: Path, source: Path = XL) -> dict[tuple[str, str], torch.Tensor]:
    """A copy in fp32 whose modules are changed -> the changes [out,in]."""
    shutil.copytree(source, folder)
    g, changes = torch.Generator().manual_seed(0), {}
    for network in ("unet", "text_encoder_2"):
        [file] = (folder / network).glob("*.safetensors")
        tensors = {name: t.float() for name, t in load_file(file).items()}
        for (where, path), rank in CHANGED.items():
            name = next((name for name in tensors if name.endswith(f"{path}.weight")), None)
            if where == network:
                W = tensors[name].flatten(1)
                change = torch.randn(len(W), rank, generator=g) @ torch.randn(rank, W.shape[1], generator=g) / 8
                tensors[name] = (W + change).view(tensors[name].shape)
                changes[where, path] = tensors[name].double().flatten(1) - W.double()
        save_file(tensors, file)
    return changes


def run(base: Path, tuned: Path, out: Path, *more: str) -> LoraFile:
    extract_lora.main([f"--base={base}", f"--tuned={tuned}", f"--out={out}", "--rank=4", "--dtype=float32", *more])
    return LoraFile.read(out, names=names_of(base_of(str(base))))


@pytest.mark.trains
def test_the_changed_modules_are_found_and_no_others(tmp_path, capsys):
    changes = tuned_model(tmp_path / "tuned")
    found = run(XL, tmp_path / "tuned", tmp_path / "a.safetensors", "--conv_dim=4", "--to=diffusers")
    assert found.layers.keys() == changes.keys()
    for place, layer in found.layers.items():
        assert close(layer.update.delta().double(), changes[place], 1e-5), place
    assert "100 % of the squared difference" in capsys.readouterr().out
    without = run(XL, tmp_path / "tuned", tmp_path / "b.safetensors")
    assert without.layers.keys() == changes.keys() - {("unet", "mid_block.resnets.0.conv1")}
    covered = float(re.search(r"([\d.]+) % of the squared", capsys.readouterr().out)[1])
    sizes = {place: float(change.square().sum()) for place, change in changes.items()}
    wanted = 100 * sum(sizes[place] for place in without.layers) / sum(sizes.values())
    assert covered == pytest.approx(wanted, rel=0.01)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        record = json.loads(file.metadata()["ss_extracted"])
    assert record["base"] == XL.name and record["tuned"] == "tuned"
    with pytest.raises(UserError, match="no layer of the two models differs"):
        run(XL, XL, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="not of one architecture"):
        run(SD, XL, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.slow
def test_a_file_and_its_folder_differ_in_nothing(tmp_path):
    folder = build_folder(tmp_path / "model", "sdxl")
    file = write_single_file(folder, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match="no layer of the two models differs"):
        run(file, folder, tmp_path / "a.safetensors", "--conv_dim=2")


@pytest.mark.parametrize("shape, rank", [((9, 14), 4), ((6, 5, 3, 3), 3), ((5, 4), 50)])
def test_the_factors_are_the_best_of_their_rank(shape, rank):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    layer, lost = layer_of(change, rank, 1.0)
    values = torch.linalg.svdvals(change.flatten(1))
    assert lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-9, abs=1e-12)
    assert float((layer.update.delta() - change.flatten(1)).square().sum()) == pytest.approx(lost, rel=1e-9, abs=1e-12)
    assert layer.kernel == shape[2:]


def test_a_clamp_cuts_what_is_beyond_the_quantile_and_its_loss_counts():
    change = torch.randn(9, 14, generator=torch.Generator().manual_seed(0)).double()
    plain, cut = (layer_of(change, 14, q) for q in (1.0, 0.5))
    both = torch.cat([plain[0].update.A.flatten(), plain[0].update.B.flatten()]).abs()
    most = max(float(cut[0].update.A.abs().max()), float(cut[0].update.B.abs().max()))
    assert most == pytest.approx(float(both.quantile(0.5)), rel=0.05) and plain[1] < 1e-12 < cut[1]
    same = clamped(LowRank(torch.ones(1, 2), torch.ones(2, 1)), 0.99)
    assert torch.equal(same.delta(), torch.ones(2, 2))


def test_modules_are_those_of_lora_files():
    inside = ["down_blocks.1.attentions.0.proj_in", "up_blocks.0.attentions.2.transformer_blocks.1.ff.net.0.proj",
              "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "encoder.layers.0.mlp.fc1"]
    outside = ["conv_in", "mid_block.attentions.0.norm", "mid_block.attentions.0.transformer_blocks.0.norm1",
               "embeddings.token_embedding", "encoder.layers.0.layer_norm1", "time_embedding.linear_1"]
    assert all(map(ATTENTION.search, inside)) and not any(map(ATTENTION.search, outside))
    assert all(map(CONVOLUTIONS.search, ["mid_block.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"]))
    assert not any(map(CONVOLUTIONS.search, [*inside, *outside, "mid_block.resnets.0.norm1"]))


def test_nothing_is_covered_of_no_change():
    assert Coverage().covered == Coverage().error == 0.0


def test_the_worked_example_of_the_help_parses(tmp_path, monkeypatch):
    [command] = re.findall(r"^    python scripts/extract_lora\.py (.+)$", extract_lora.__doc__, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    args = extract_lora.parse(shlex.split(command))
    assert (args.base, args.tuned, args.rank) == ("sdxl", "my-model.safetensors", 32)
    kohya = extract_lora.parse(["--model_org=a", "--model_tuned=b", "--save_to=c", "--dim=8", "--clamp_quantile=0.99"])
    assert (kohya.base, kohya.tuned, kohya.out, kohya.rank) == ("a", "b", Path("c"), 8)
    Path("sdxl").symlink_to(XL, target_is_directory=True)
    tuned_model(Path("t"))
    extract_lora.main([word.replace("my-model.safetensors", "t") for word in shlex.split(command)] + ["--dry_run"])
    assert not Path("mine.safetensors").exists()


@pytest.mark.parametrize("more, words", [
    (["--rank=0"], "1 or more"), (["--clamp_quantile=0"], "part of the entries"), (["--min_diff=-1"], "a size"),
    (["--out=nowhere/a.safetensors"], "no folder"), (["--tuned=nowhere/at/all"], "nowhere")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    given = {"--base": str(XL), "--tuned": str(XL), "--out": "a.safetensors", "--rank": "2"} | dict(
        m.split("=") for m in more)
    with pytest.raises(UserError, match=words):
        extract_lora.main([f"{flag}={value}" for flag, value in given.items()])
    assert not [*tmp_path.iterdir()]
