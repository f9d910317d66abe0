"""convert_lora: a LoRA of any layout in any other, and nothing half-written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.loras import random_lora
from tests.support.single_files import build_folder, write_single_file
from trainkit.errors import UserError
from trainkit.families.file_names import xl_names
from trainkit.lora_file import BaseWeights, LoraFile
from trainkit.tools import convert_lora
from trainkit.tools.checks import base_of

XL, SD = ROOT / "assets/tiny-sdxl-icons", ROOT / "assets/tiny-sd-icons"
STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def kohya_file(path: Path, **metadata: str) -> Path:
    """An SDXL LoRA of one layer as kohya's trainer writes it."""
    g = torch.Generator().manual_seed(0)
    save_file({f"{STEM}.lora_down.weight": torch.randn(4, 2048, generator=g).half(),
               f"{STEM}.lora_up.weight": torch.randn(640, 4, generator=g).half(),
               f"{STEM}.alpha": torch.tensor(1.0)}, path, {"ss_seed": "7", **metadata})
    return path


def run(lora: Path, to: str, out: Path, *more: str) -> LoraFile:
    convert_lora.main([f"--lora={lora}", f"--to={to}", f"--out={out}", *more])
    return LoraFile.read(out / "unet" if to == "peft" else out)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("to", convert_lora.LAYOUTS)
def test_a_kohya_file_is_written_in_every_layout_and_back(tmp_path, to):
    source = LoraFile.read(kohya_file(tmp_path / "a.safetensors"))
    run(tmp_path / "a.safetensors", to, tmp_path / "b")
    middle = tmp_path / "b" / "unet" if to == "peft" else tmp_path / "b"
    again = run(middle, "webui", tmp_path / "c.safetensors", "--dtype=float32")
    assert again.layers.keys() == source.layers.keys() and load_file(tmp_path / "c.safetensors").keys() == load_file(
        tmp_path / "a.safetensors").keys()
    for place, layer in again.layers.items():
        wanted = source.layers[place].update.map(lambda t: t.double()).delta()
        assert (layer.update.map(lambda t: t.double()).delta() - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_the_worked_example_of_the_help_runs(tmp_path, monkeypatch, capsys):
    """The command as it stands there, in a folder with such a run."""
    [command] = re.findall(r"^    python scripts/convert_lora\.py (.+)$", convert_lora.__doc__, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    Path("runs/dog").mkdir(parents=True)
    made = LoraFile.read(kohya_file(tmp_path / "a.safetensors"))
    made.write(Path("runs/dog/pytorch_lora_weights.safetensors"), "diffusers")
    convert_lora.main([*words, "--dry_run"])
    assert not Path(words[-1]).exists() and "1 layer of LoRA, for SDXL" in capsys.readouterr().out
    convert_lora.main(words)
    assert LoraFile.read(Path(words[-1])).layers.keys() == made.layers.keys()
    assert "read back" in capsys.readouterr().out


@pytest.mark.parametrize("level, seed", [("full", "7"), ("minimal", None), ("none", None)])
def test_the_header_says_what_the_network_is_now_and_as_much_as_was_asked_for(tmp_path, level, seed):
    kohya_file(tmp_path / "a.safetensors", ss_network_dim="999", ss_tag_frequency="{}")
    run(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors", f"--metadata={level}")
    run(tmp_path / "b.safetensors", "webui", tmp_path / "c.safetensors", f"--metadata={level}")
    found = header(tmp_path / "c.safetensors")
    assert found.get("ss_seed") == seed and found["ss_network_dim"] == "4"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and ("modelspec.title" in found) == (level != "none")
    assert header(tmp_path / "b.safetensors").get("ss_seed") == seed
    assert "lora_adapter_metadata" in header(tmp_path / "b.safetensors")


@pytest.mark.trains
@pytest.mark.parametrize("base", [XL, SD], ids=["sdxl", "sd"])
def test_a_small_models_file_needs_its_base_to_be_named(tmp_path, base):
    file = random_lora(base, tmp_path / "a.safetensors") if base == XL else small_sd(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="family is not known"):
        run(file, "webui", tmp_path / "b.safetensors")
    convert_lora.main([f"--lora={file}", "--to=webui", f"--out={tmp_path / 'b.safetensors'}", f"--base={base}"])
    assert any(name.startswith("lora_unet_input_blocks" if base == XL else "lora_unet_down_blocks")
               for name in load_file(tmp_path / "b.safetensors"))


def small_sd(file: Path) -> Path:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}, file)
    return file


def test_a_dora_of_diffusers_is_converted_with_the_weights_of_its_base(tmp_path):
    """And back; and to a plain LoRA, whose error is said."""
    path = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    W = BaseWeights(base_of(str(XL)))(("unet", path))
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, W.shape[1], generator=g) / 8, torch.randn(len(W), 2, generator=g) / 8
    m = W.norm(dim=1).float() * 1.2
    save_file({f"unet.{path}.lora_A.weight": A, f"unet.{path}.lora_B.weight": B,
               f"unet.{path}.lora_magnitude_vector.weight": m}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="family is not known"):
        run(tmp_path / "a.safetensors", "webui", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    run(tmp_path / "a.safetensors", "webui", tmp_path / "b.safetensors", f"--base={XL}", "--dtype=float32")
    assert header(tmp_path / "b.safetensors")["ss_dora_norm"] == "base"
    back = run(tmp_path / "b.safetensors", "diffusers", tmp_path / "c.safetensors", f"--base={XL}")
    assert torch.allclose(back.layers["unet", path].magnitude_value, m, rtol=1e-5)
    plain = run(tmp_path / "a.safetensors", "webui", tmp_path / "d.safetensors", f"--base={XL}", "--svd_rank=200",
                "--dtype=float32")
    V = W + B.double() @ A.double()
    wanted = V * (m.double() / V.norm(dim=1)).unsqueeze(1) - W
    assert (plain.layers["unet", path].delta() - wanted).abs().max() < 1e-5


def test_embeddings_in_a_lora_come_beside_a_diffusers_file(tmp_path):
    kohya_file(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors") | {"bundle_emb.mouse.clip_l": torch.ones(2, 768),
                                                       "bundle_emb.mouse.clip_g": torch.ones(2, 1280)}
    save_file(tensors, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    assert not any("bundle" in name for name in load_file(tmp_path / "b.safetensors"))
    assert load_file(tmp_path / "b_mouse.safetensors").keys() == {"clip_l", "clip_g"}
    both = run(tmp_path / "a.safetensors", "onetrainer", tmp_path / "c.safetensors")
    assert both.embeddings.keys() == {"mouse"} and both.layers


@pytest.mark.parametrize("more, words", [
    (["--lora=nowhere.safetensors"], "no file"), (["--out=nowhere/x.safetensors"], "no folder"),
    (["--svd_rank=0"], "rank"), (["--base=nowhere/at/all"], "nowhere")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    kohya_file(Path("a.safetensors"))
    given = {"--lora": "a.safetensors", "--to": "webui", "--out": "b.safetensors"} | dict(m.split("=") for m in more)
    with pytest.raises(UserError, match=words):
        convert_lora.main([f"{flag}={value}" for flag, value in given.items()])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_never_replaces_itself(tmp_path):
    file = kohya_file(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="replace itself"):
        run(file, "diffusers", file)


@pytest.mark.trains
@pytest.mark.parametrize("family", ["sdxl", "sd2"])
def test_a_base_of_one_file_gives_the_weights_of_its_folder(tmp_path, family):
    folder = build_folder(tmp_path / "model", family)
    file = write_single_file(folder, tmp_path / "base.safetensors")
    alone, whole = (BaseWeights(base_of(str(path))) for path in (file, folder))
    places = [("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
              ("unet", "mid_block.resnets.0.conv1"), ("text_encoder", "encoder.layers.0.self_attn.k_proj")]
    if family == "sdxl":
        places += [("text_encoder_2", f"encoder.layers.0.{end}") for end in ("mlp.fc2", "self_attn.v_proj")]
    for place in places:
        assert torch.equal(alone(place), whole(place)), place
    with pytest.raises(UserError, match="no module"):
        alone(("unet", "up_blocks.9.resnets.0.conv1"))


def test_every_layer_of_the_base_is_found_in_its_files():
    """With and without Transformers' text_model."""
    weights = BaseWeights(base_of(str(XL)))
    names = xl_names()
    for name in ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_mid_block_attentions_0_proj_in",
                 "lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_unet_down_blocks_0_resnets_0_conv1"):
        assert weights(names.read(name)).ndim == 2
    with pytest.raises(UserError, match="no module"):
        weights(("unet", "up_blocks.9.resnets.0.conv1"))


def test_a_file_that_was_not_written_well_is_removed(tmp_path, monkeypatch):
    from trainkit.lora_file import file as lora_file

    def damaged(path: Path, tensors: dict[str, torch.Tensor], *more: object) -> None:
        save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, path)

    kohya_file(tmp_path / "a.safetensors")
    monkeypatch.setattr(lora_file, "save_tensors", damaged)
    with pytest.raises(UserError, match="does not hold"):
        run(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
