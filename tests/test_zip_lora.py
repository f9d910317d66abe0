"""ZipLoRA: the factors of columns are exact in the merged file, and learning them does what the paper asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support import ROOT
from tests.support.loras import random_lora
from trainkit.adapters.updates import Hadamard, LowRank
from trainkit.condition import Condition
from trainkit.diffusion import NoiseSchedule
from trainkit.errors import UserError
from trainkit.families.file_names import xl_names
from trainkit.lora_file import LayerUpdate, LoraFile
from trainkit.merging.merge import WeightedLora
from trainkit.merging.zip_lora import Example, Mixture, ZipSettings, learn, merged, unet_factors
from trainkit.tools import merge_loras

XL = ROOT / "assets/tiny-sdxl-icons"


class Small(nn.Module):
    """A network of one convolution and one linear map: z [B,4,h,w] -> [B,4,h,w]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.proj = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, z):
        return self.proj(self.conv(z).movedim(1, -1)).movedim(-1, 1)


class Family:
    """What learning asks of a family."""

    def __init__(self, network: nn.Module):
        self.denoiser = network.requires_grad_(False)
        self.schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "epsilon")

    def denoise(self, z, level, condition):
        return self.denoiser(z)


def lora(seed: int, *, conv: bool = True, kind: str = "lora") -> LoraFile:
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g) / 3

    proj = LowRank(random(2, 6), random(4, 2), 0.5) if kind == "lora" else Hadamard(
        random(4, 1), random(1, 6), random(4, 1), random(1, 6), 2.0)
    layers = {("unet", "proj"): LayerUpdate(proj, ())}
    if conv:
        layers["unet", "conv"] = LayerUpdate(LowRank(random(3, 36), random(6, 3)), (3, 3))
    return LoraFile(layers, names=xl_names())


def parts(*files: LoraFile) -> list[WeightedLora]:
    weighted = zip(files, (1.0, 0.8), strict=True)
    return [WeightedLora(file, strength, f"{k}") for k, (file, strength) in enumerate(weighted)]


def with_delta(network: nn.Module, deltas: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    held = {f"{path}.weight": network.get_submodule(path).weight + delta.view_as(network.get_submodule(path).weight)
            for path, delta in deltas.items()}
    return torch.func.functional_call(network, held, z)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_the_merged_file_is_what_the_network_computed_with_the_factors(kind):
    """M-02: A diag(m) of each, side by side, of rank r1 + r2, and no SVD."""
    network, both = Small().requires_grad_(False), parts(lora(0), lora(1, kind=kind))
    mixture = Mixture(network, unet_factors(network, both))
    with torch.no_grad():
        for merger in mixture.parameters():
            merger.copy_(torch.randn(merger.shape))
    z, file = torch.randn(2, 4, 5, 5), merged(both, mixture)
    found = network(z)
    assert {len(layer.update.A) for layer in file.layers.values()} == {2 + (2 if kind == "lora" else 1), 6}
    plain = Small()
    wanted = with_delta(plain, {path: layer.update.delta().float() for (_, path), layer in file.layers.items()}, z)
    assert torch.allclose(found, wanted, atol=1e-5)
    for (_, path), layer in file.layers.items():
        columns = [part.strength * part.lora.layers["unet", path].update.delta().double() * m.detach().double()
                   for part, m in zip(both, mixture.mergers[path], strict=True)]
        assert (layer.update.delta() - sum(columns)).abs().max() <= 1e-6 * sum(columns).abs().max()


def test_each_lora_alone_is_the_network_with_its_change():
    network, both = Small().requires_grad_(False), parts(lora(0), lora(1, conv=False))
    mixture, z = Mixture(network, unet_factors(network, both)), torch.randn(2, 4, 5, 5)
    for k, part in enumerate(both):
        mixture.active = k
        deltas = {path: part.strength * layer.update.delta() for (_, path), layer in part.lora.layers.items()}
        assert torch.allclose(network(z), with_delta(Small(), deltas, z), atol=1e-5)
    assert mixture.mergers.keys() == {"proj"}, "a module of one LoRA has no factors"
    held = merged(both, mixture).layers["unet", "conv"].update
    assert torch.allclose(held.delta(), both[0].lora.layers["unet", "conv"].update.delta().double())


def examples() -> list[Example]:
    return [Example(torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(k)), Condition(), Condition())
            for k in (5, 6)]


def test_learning_brings_the_merged_network_nearer_to_both():
    """The sum of one LoRA with itself is twice too strong; factors of a half are right."""
    file = lora(0, conv=False)
    network, both = Small(), [WeightedLora(file, 1.0, "a"), WeightedLora(file, 1.0, "b")]
    family = Family(network)
    mixture = Mixture(network, unet_factors(network, both))
    settings = ZipSettings(("", ""), steps=150, rate=0.05, penalty=0.0)
    report = learn(family, mixture, examples(), settings, lambda k: None)
    assert report.steps == 150 and all(after < before / 20 for before, after in zip(
        report.summed, report.learned, strict=True))
    one, other = mixture.mergers["proj"]
    assert torch.allclose(one + other, torch.ones(6), atol=0.2)


def test_the_penalty_ends_learning_when_the_factors_are_dissimilar():
    network, both = Small(), parts(lora(0), lora(1))
    mixture = Mixture(network, unet_factors(network, both))
    report = learn(Family(network), mixture, examples(), ZipSettings(("", ""), steps=400, rate=0.05, penalty=100.0),
                   lambda k: None)
    assert report.similarity < 0.05 and float(F.cosine_similarity(*mixture.mergers["proj"], dim=0).abs()) < 0.1


def test_a_seed_gives_one_result():
    found = []
    for seed in (0, 0, 1):
        network, both = Small(), parts(lora(0), lora(1))
        mixture = Mixture(network, unet_factors(network, both))
        learn(Family(network), mixture, examples(), ZipSettings(("", ""), steps=3, seed=seed), lambda k: None)
        found.append(torch.cat([merger.detach() for merger in mixture.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_lora_of_another_model_is_refused():
    with pytest.raises(UserError, match="does not fit"):
        unet_factors(nn.Sequential(), parts(lora(0), lora(1)))


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False])
def test_the_tool_merges_two_loras_of_the_small_model(tmp_path, capsys, images):
    a = random_lora(XL, tmp_path / "a.safetensors")
    more = [f"--subject_images={ROOT / 'assets/icons-3d'}"] if images else []
    merge_loras.main([f"{a}:0.2", f"{a}:0.1", "--method=ziplora", f"--base={XL}", "--subject_prompt=icon of a fox",
                      "--style_prompt=icon", "--zip_steps=3", f"--out={tmp_path / 'm.safetensors'}", *more])
    found = LoraFile.read(tmp_path / "m.safetensors")
    assert {len(layer.update.A) for layer in found.layers.values()} == {4}
    assert "mean squared distance from the style's LoRA alone" in capsys.readouterr().out
