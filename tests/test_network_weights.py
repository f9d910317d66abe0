"""Training that starts from a LoRA file: at the file's update, whatever its layout, kind and rank."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.tiny_models import tiny_unet
from trainkit.adapters import Adapters, add_adapters
from trainkit.errors import UserError
from trainkit.export import TrainedLayers
from trainkit.families.file_names import xl_names
from trainkit.families.sdxl import LORA_TARGETS
from trainkit.lora_file import LoraFile, start
from trainkit.options import LoraOptions
from trainkit.runtime import checkpoint_folders


@pytest.fixture(scope="module")
def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_unet((32, 64)).eval().requires_grad_(False)


def adapters_of(base: nn.Module, options: LoraOptions, seed: int = 0) -> Adapters:
    file = start.read(options, xl_names(base.config))
    found = add_adapters(copy.deepcopy(base), start.sized(options, file), targets=LORA_TARGETS, seed=seed)
    start.begin(found, file, options)
    return found


def trained(base: nn.Module, **options: object) -> Adapters:
    found = adapters_of(base, LoraOptions(**options))
    g = torch.Generator().manual_seed(2)
    for parameter in found.parameters():
        parameter.data += torch.randn(parameter.shape, generator=g) * 0.05
    return found


def written(adapters: Adapters, path: Path, layout: str = "webui", dtype: torch.dtype = torch.float32) -> Path:
    layers = TrainedLayers([adapters])
    LoraFile(layers, names=xl_names(adapters.network.config)).save(path, layout, dtype=dtype, weights=layers.weight)
    return path


def largest_difference(found: Adapters, wanted: Adapters) -> float:
    """Of ΔW, relative to its norm."""
    return max(float(torch.linalg.matrix_norm(found.delta_weight(path) - wanted.delta_weight(path))
                     / torch.linalg.matrix_norm(wanted.delta_weight(path))) for path in wanted.layers)


def problem_of(base: nn.Module, options: LoraOptions) -> str:
    found = start.problems(options, xl_names(base.config), base, LORA_TARGETS)
    return " · ".join(f"{problem.what}: {problem.why}: {problem.fix}" for problem in found)


KINDS = {"lora": {"rank": 4, "lora_alpha": 2.0}, "dora": {"rank": 4, "use_dora": True},
         "conv": {"rank": 4, "lora_layers": "attention+ff+conv"},
         "loha": {"rank": 4, "lora_type": "loha", "lora_alpha": 2.0}, "lokr": {"rank": 2, "lora_type": "lokr"}}


@pytest.mark.parametrize("kind, layout", [
    (kind, layout) for kind in KINDS for layout in ("diffusers", "webui", "lycoris", "onetrainer")
    if layout != "diffusers" or kind not in ("loha", "lokr")])  # Diffusers' files hold products only
def test_training_starts_at_the_files_update(base, tmp_path, kind, layout):
    options = KINDS[kind]
    first = trained(base, **options)
    file = written(first, tmp_path / "first.safetensors", layout)
    second = adapters_of(base, LoraOptions(**(options | {"lora_alpha": 4.0}), network_weights=str(file)), seed=1)
    assert not problem_of(base, LoraOptions(**options, network_weights=str(file)))
    assert largest_difference(second, first) < 2e-6


def test_a_plain_lora_goes_on_as_dora(base, tmp_path):
    first = trained(base, rank=4)
    file = written(first, tmp_path / "first.safetensors")
    second = adapters_of(base, LoraOptions(rank=4, use_dora=True, network_weights=str(file)))
    assert largest_difference(second, first) < 1e-5


def test_a_larger_rank_keeps_the_whole_update_and_has_room(base, tmp_path):
    first = trained(base, rank=3)
    file = written(first, tmp_path / "first.safetensors")
    second = adapters_of(base, LoraOptions(rank=8, network_weights=str(file)), seed=5)
    assert largest_difference(second, first) < 2e-6
    plain = adapters_of(base, LoraOptions(rank=8), seed=5)
    for path in second.layers:  # the new components can learn: A is random, B is zero
        assert torch.equal(second.factors(path)[0][3:], plain.factors(path)[0][3:])
        assert not second.factors(path)[1][:, 3:].any()


def test_a_smaller_rank_is_the_nearest_and_says_what_it_lost(base, tmp_path, caplog):
    first = trained(base, rank=6)
    file = written(first, tmp_path / "first.safetensors")
    with caplog.at_level(logging.INFO):
        second = adapters_of(base, LoraOptions(rank=2, network_weights=str(file)))
    lost = whole = 0.0
    for path in second.layers:
        values = torch.linalg.svdvals(first.delta_weight(path))
        error = torch.linalg.matrix_norm(second.delta_weight(path) - first.delta_weight(path))
        assert torch.isclose(error, values[2:].square().sum().sqrt(), rtol=1e-4)
        lost, whole = lost + float(values[2:].square().sum()), whole + float(values.square().sum())
    assert f"it lost {100 * (lost / whole) ** 0.5:.2g} % of its size" in caplog.text


@pytest.mark.parametrize("layout", ["diffusers", "webui"])
def test_the_file_can_say_ranks_and_alphas(base, tmp_path, layout):
    first = trained(base, rank=3, lora_alpha=1.5, lora_rank_pattern="attn2=5", lora_alpha_pattern="to_v=2")
    file = written(first, tmp_path / "first.safetensors", layout)
    second = adapters_of(base, LoraOptions(rank=64, dim_from_weights=True, network_weights=str(file)))
    assert {path: second.rank_of(path) for path in second.layers} == {
        path: first.rank_of(path) for path in first.layers}
    if layout == "webui":  # Diffusers' files have the scale in B
        assert all(abs(second.scale_of(path) - first.scale_of(path)) < 1e-6 for path in first.layers)
    assert largest_difference(second, first) < 2e-6


def test_layers_the_file_has_nothing_of_start_at_the_base(base, tmp_path):
    file = written(trained(base, rank=2), tmp_path / "first.safetensors")
    second = adapters_of(base, LoraOptions(rank=2, lora_layers="attention+ff", network_weights=str(file)))
    moved = {path for path in second.layers if second.delta_weight(path).any()}
    assert moved and all(".ff." not in path for path in moved) and len(moved) < len(second.layers)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_a_lora_of_more_layers_names_the_choice(base, tmp_path):
    file = written(trained(base, rank=2, lora_layers="attention+ff"), tmp_path / "first.safetensors")
    words = problem_of(base, LoraOptions(rank=2, network_weights=str(file)))
    assert "that this run does not train" in words and "--lora_layers attention+ff" in words


@pytest.mark.parametrize("first, second, words", [
    ({"lora_type": "loha"}, {}, "--lora_type loha"), ({}, {"lora_type": "lokr"}, "--lora_type lora"),
    ({"use_dora": True}, {}, "add --use_dora")])
def test_another_kind_names_the_flag(base, tmp_path, first, second, words):
    file = written(trained(base, rank=2, **first), tmp_path / "first.safetensors")
    assert words in problem_of(base, LoraOptions(rank=2, network_weights=str(file), **second))


def test_another_base_model_is_named(base, tmp_path):
    torch.manual_seed(0)
    other = tiny_unet((64, 96)).requires_grad_(False)
    file = written(trained(other, rank=2), tmp_path / "first.safetensors")
    assert "made for another base model" in problem_of(base, LoraOptions(rank=2, network_weights=str(file)))


def test_damaged_and_missing_files_are_named(base, tmp_path):
    file = written(trained(base, rank=2), tmp_path / "first.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_up" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "nan.safetensors")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "pickle.ckpt").write_bytes(b"\x80\x02}q\x00.")
    for name, words in {"nan.safetensors": "no finite", "short.safetensors": "short.safetensors",
                        "none.safetensors": "none", "pickle.ckpt": "pickle.ckpt"}.items():
        options = LoraOptions(rank=2, network_weights=str(tmp_path / name))
        found = start.problems(options, xl_names(base.config), base, LORA_TARGETS)
        assert len(found) == 1 and words in str(found[0]), name


def test_a_lora_given_to_resume_is_answered_with_the_flag(base, tmp_path):
    file = written(trained(base, rank=2), tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    for named in (file, tmp_path):
        problem, = checkpoint_folders.problems(tmp_path / "out", str(named))
        assert f"--network_weights {file}" in problem.fix


def test_text_encoders_that_are_not_trained_are_said(caplog):
    layers = {("unet", "a"): None, ("text_encoder", "b"): None}
    start.say_unused(LoraFile(layers), {"unet"}, tokens=False)
    assert "text_encoder" in caplog.text and "--train_text_encoder goes on" in caplog.text


def test_embeddings_of_another_number_are_refused(tmp_path):
    rows = {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 12)}
    save_file(rows, tmp_path / "dog_emb.safetensors")
    save_file({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 8),
               "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(8, 1)},
              tmp_path / "dog.safetensors")
    options = LoraOptions(network_weights=str(tmp_path / "dog.safetensors"))
    found = start.embeddings(options, None, {"clip_l": (2, 8), "clip_g": (2, 12)})
    assert {name: torch.equal(found[name], rows[name]) for name in rows} == {"clip_l": True, "clip_g": True}
    with pytest.raises(UserError, match="other embeddings"):
        start.embeddings(options, None, {"clip_l": (3, 8), "clip_g": (3, 12)})
