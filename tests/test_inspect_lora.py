"""inspect_lora: what it says of a file is what is in it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainkit.adapters.updates import Hadamard, Kronecker, LowRank, Whole
from trainkit.errors import UserError
from trainkit.families.file_names import xl_names
from trainkit.lora_file import LayerUpdate, LoraFile, Magnitude, loaded_by
from trainkit.lora_file.spectrum import effective_rank, norm, singular_values
from trainkit.tools import inspect_lora

PLACES = [("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
          ("unet", "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"),
          ("unet", "mid_block.attentions.0.proj_in"), ("unet", "up_blocks.0.resnets.2.conv1"),
          ("text_encoder_2", "encoder.layers.3.self_attn.q_proj")]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UPDATES = {
    "LoRA": LowRank(drawn(1, 4, 30), drawn(2, 20, 4), 0.5),
    "wide LoRA": LowRank(drawn(1, 25, 30), drawn(2, 20, 25), -2.0),
    "LoHa": Hadamard(drawn(1, 20, 2), drawn(2, 2, 30), drawn(3, 20, 2), drawn(4, 2, 30), 3.0),
    "LoKr": Kronecker(drawn(1, 4, 5), drawn(2, 5, 1), drawn(3, 1, 6)), "full": Whole(drawn(1, 20, 30)),
}


@pytest.mark.parametrize("kind", UPDATES)
def test_singular_values_are_those_of_the_product(kind):
    wanted = torch.linalg.svdvals(UPDATES[kind].delta().double())
    found = singular_values(LayerUpdate(UPDATES[kind]))
    assert torch.allclose(found, wanted[: len(found)], rtol=1e-5, atol=1e-5) and (wanted[len(found):] < 1e-4).all()
    assert norm(found) == pytest.approx(float(UPDATES[kind].delta().double().norm()), rel=1e-5)


def test_a_doras_size_is_that_of_the_whole_change_where_the_base_is_known():
    W, layer = drawn(5, 20, 30).double(), LayerUpdate(UPDATES["LoRA"], (), Magnitude(drawn(6, 20).abs() + 1))
    assert norm(singular_values(layer, W)) == pytest.approx(float(layer.like(W).delta(W).norm()), rel=1e-9)
    assert norm(singular_values(layer)) == pytest.approx(float(UPDATES["LoRA"].delta().norm()), rel=1e-5)


def test_effective_ranks_count_the_directions_of_ninety_per_cent():
    assert [effective_rank(torch.tensor(values)) for values in ([3.0, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0])] == [
        1, 4, 0]


def file(folder: Path, **metadata: str) -> Path:
    widths = [2048 if "to_k" in path else 9 for _, path in PLACES]
    layers = {place: LayerUpdate(LowRank(drawn(k, 2, widths[k]), drawn(9 + k, 8, 2) * (k + 1)), ())
              for k, place in enumerate(PLACES)}
    folder.mkdir(parents=True, exist_ok=True)
    made = LoraFile(layers, metadata=metadata, names=xl_names())
    made.write(folder / "pytorch_lora_weights.safetensors", "diffusers")
    return folder


def test_the_worked_example_of_the_help_runs_and_says_what_is_there(tmp_path, monkeypatch, capsys):
    [command] = re.findall(r"^    python scripts/inspect_lora\.py (.+)$", inspect_lora.__doc__, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    file(Path("runs/dog"), ss_optimizer="prodigy", ss_tag_frequency="private")
    inspect_lora.main([*shlex.split(command), "--plot=blocks.png"])
    said = capsys.readouterr().out
    assert "5 layers of LoRA, for SDXL" in said and re.search(r"optimizer +prodigy", said) and "private" not in said
    lines = [line.split("  layers")[0] for line in said.splitlines() if " layers  size" in line]
    names = [re.match(r"\s*([\w. ]+?)\s+\d+ layers", line)[1] for line in said.splitlines() if " layers  size" in line]
    assert len(lines) == 4 and names == ["down_blocks.1 attentions", "mid_block attentions", "up_blocks.0 resnets",
                                         "text_encoder_2"]
    assert re.search(r"Diffusers +yes", said) and re.search(r"A1111 +no: ", said)
    assert Image.open("blocks.png").width == 640


def test_json_has_every_number(tmp_path, capsys):
    folder = file(tmp_path / "dog")
    inspect_lora.main([f"--lora={folder}", "--json"])
    said = json.loads(capsys.readouterr().out)
    first, *_, last = said["blocks"]
    read = LoraFile.read(folder / "pytorch_lora_weights.safetensors")
    wanted = sum(float(read.layers[place].delta().square().sum()) for place in PLACES[:2]) ** 0.5
    assert first["layers"] == 2 and first["norm"] == pytest.approx(wanted, rel=1e-5) and first["rank"] == 2
    assert last["name"] == "text_encoder_2" and said["programs"]["Diffusers"] == ""


def of(update, layout, magnitude=None) -> dict[str, str]:
    return loaded_by(LoraFile({PLACES[0]: LayerUpdate(update, (), magnitude)}, layout=layout))


@pytest.mark.parametrize("found, loads", [
    (of(UPDATES["LoRA"], "webui"), {"Diffusers", "ComfyUI, Forge", "A1111", "InvokeAI", "LyCORIS"}),
    (of(UPDATES["LoRA"], "diffusers"), {"Diffusers"}), (of(UPDATES["LoRA"], "peft"), set()),
    (of(UPDATES["LoHa"], "webui"), {"ComfyUI, Forge", "A1111", "InvokeAI"}),
    (of(UPDATES["LoKr"], "webui"), {"ComfyUI, Forge", "A1111", "InvokeAI", "LyCORIS"}),
    (of(UPDATES["LoRA"], "webui", Magnitude(torch.ones(20), over_base=True)), {"ComfyUI, Forge"}),
    (of(UPDATES["LoRA"], "webui", Magnitude(torch.ones(20))), {"LyCORIS"}),
    (of(UPDATES["LoRA"], "webui", Magnitude(torch.ones(30), by_input=True)),
     {"ComfyUI, Forge", "A1111", "InvokeAI", "LyCORIS"})])
def test_what_loads_a_file_is_what_the_page_says(found, loads):
    assert {program for program, why in found.items() if not why} == loads


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="no file"):
        inspect_lora.main([f"--lora={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="no folder"):
        inspect_lora.main([f"--lora={file(tmp_path / 'dog')}", f"--plot={tmp_path / 'nowhere' / 'x.png'}"])
