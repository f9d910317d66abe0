"""merge_loras: the file that is written means what the method says, whichever layouts went in."""

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
from torch import Tensor

from tests.support import ROOT
from tests.support.lora_layouts import LAYOUTS, STEMS, close, deltas, write_lora
from tests.support.single_files import build_folder, write_single_file
from trainkit.errors import UserError
from trainkit.lora_file import BaseWeights, LoraFile
from trainkit.merging.methods import MergeSettings, merged_delta
from trainkit.tools import merge_loras
from trainkit.tools.checks import base_of

XL, SD = ROOT / "assets/tiny-sdxl-icons", ROOT / "assets/tiny-sd-icons"


def merge(*words: object) -> None:
    merge_loras.main([str(word) for word in words])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ----------------------------------------------------------------------------------------------------------------------
# What the methods are


@pytest.mark.parametrize("method", ["concat", "linear"])
@pytest.mark.parametrize("to", ["diffusers", "webui", "lycoris"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_is_exact_whatever_the_layouts_ranks_and_alphas(tmp_path, layout, to, method):
    """M-01. One module is in one file only, and one of a text encoder."""
    a = write_lora(tmp_path / "a.safetensors", layout, rank=3, alpha=1.5, modules=("to_k", "conv"))
    b = write_lora(tmp_path / "b.safetensors", "kohya", seed=1, rank=5, alpha=4.0, modules=("to_k", "text"))
    merge(f"{a}:0.8", f"{b}:-0.5", f"--method={method}", f"--to={to}", f"--out={tmp_path / 'm.safetensors'}",
          "--dtype=float32")
    one, other, found = deltas(a), deltas(b), deltas(tmp_path / "m.safetensors")
    assert found.keys() == STEMS.keys()
    for module, delta in found.items():
        parts = [strength * held[module] for held, strength in ((one, 0.8), (other, -0.5)) if module in held]
        assert close(delta, sum(parts), 1e-6), module
    ranks = {len(t) for name, t in load_file(tmp_path / "m.safetensors").items() if "attn2" in name and (
        "lora_A" in name or "lora_down" in name)}
    assert ranks == {8}


def test_linear_has_no_larger_rank_than_the_sum_needs(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "kohya")
    merge(f"{a}:0.75", f"{a}:0.5", "--method=linear", f"--out={tmp_path / 'm.safetensors'}", "--dtype=float32")
    found, held = deltas(tmp_path / "m.safetensors"), load_file(tmp_path / "m.safetensors")
    assert all(close(found[module], 1.25 * delta, 1e-6) for module, delta in deltas(a).items())
    assert len(held[f"{STEMS['to_k'][0]}.lora_down.weight"]) == 3


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_svd_is_the_best_of_its_rank_and_the_error_is_said(tmp_path, capsys, kind):
    a = write_lora(tmp_path / "a.safetensors", "lycoris", kind=kind, modules=("to_k", "conv"))
    b = write_lora(tmp_path / "b.safetensors", "diffusers", seed=1, modules=("to_k", "conv"))
    merge(a, b, "--method=svd", "--rank=2", "--to=webui", f"--out={tmp_path / 'm.safetensors'}", "--dtype=float32")
    one, other, found = deltas(a), deltas(b), deltas(tmp_path / "m.safetensors")
    lost = whole = 0.0
    for module, delta in found.items():
        wanted = one[module] + other[module]
        values = torch.linalg.svdvals(wanted)
        assert float((wanted - delta).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-5)
        lost, whole = lost + float(values[2:].square().sum()), whole + float(values.square().sum())
    said = re.search(r"the rank loses ([\d.]+) %", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(100 * (lost / whole) ** 0.5, rel=0.05)


def trimmed(delta: Tensor, density: float) -> Tensor:
    kept = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    return torch.where(delta.abs() >= kept, delta, 0.0)


def test_ties_keeps_the_largest_entries_of_the_elected_sign(tmp_path):
    """Against the paper's three steps, written here: trim, elect, average those that agree."""
    a = write_lora(tmp_path / "a.safetensors", "kohya", modules=("text", "conv"))
    b = write_lora(tmp_path / "b.safetensors", "diffusers", seed=1, modules=("text", "conv"))
    merge(f"{a}:0.5", f"{b}:0.5", "--method=ties", "--density=0.3", "--rank=16", "--to=webui", "--dtype=float32",
          f"--out={tmp_path / 'm.safetensors'}")
    one, other, found = deltas(a), deltas(b), deltas(tmp_path / "m.safetensors")
    for module, delta in found.items():
        each = [trimmed(of[module], 0.3) for of in (one, other)]
        sign = torch.where(sum(each) >= 0, 1.0, -1.0)
        agree = [torch.where(x.sign() == sign, x, 0.0) for x in each]
        wanted = 0.5 * sum(agree) / sum((x != 0).double() for x in agree).clamp(min=1)
        assert close(delta, wanted, 1e-5), module


def test_magnitude_prune_is_the_sum_of_the_largest_entries():
    X = [torch.randn(9, 7, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1)]
    found = merged_delta(X, [2.0, -1.0], MergeSettings("magnitude_prune", density=0.4), "m")
    assert torch.allclose(found, 2 * trimmed(X[0], 0.4) - trimmed(X[1], 0.4))


def test_dares_mean_over_seeds_is_the_sum_and_a_seed_gives_one_merge():
    """M-01: each entry within 3.5 standard errors of the mean of 200 seeds, but for some of 300 entries."""
    X = [torch.randn(20, 15, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1)]
    draws = torch.stack([merged_delta(X, [1.0, 0.5], MergeSettings("dare_linear", density=0.5, seed=seed), "m")
                         for seed in range(200)])
    wanted = X[0] + 0.5 * X[1]
    error = (draws.mean(0) - wanted).abs() / (draws.std(0) / 200**0.5)
    assert (error > 3.5).float().mean() < 0.01 and not torch.equal(draws[0], draws[1])
    again, elsewhere = (merged_delta(X, [1.0, 0.5], MergeSettings("dare_linear", density=0.5), name) for name in "mn")
    assert torch.equal(again, draws[0]) and not torch.equal(elsewhere, again), "modules share no draw"


def test_merging_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    merged_delta([torch.ones(4, 4).double()], [1.0], MergeSettings("dare_ties"), "m")
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds, embeddings, header


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_module_of_one_file_stays_of_its_kind(tmp_path, kind):
    a = write_lora(tmp_path / "a.safetensors", "lycoris", kind=kind, modules=("to_k",))
    b = write_lora(tmp_path / "b.safetensors", "kohya", modules=("text",))
    merge(f"{a}:0.5", b, f"--out={tmp_path / 'm.safetensors'}", "--dtype=float32")
    assert any(f"{'hada' if kind == 'loha' else 'lokr'}_w1" in name for name in load_file(tmp_path / "m.safetensors"))
    assert close(deltas(tmp_path / "m.safetensors")["to_k"], 0.5 * deltas(a)["to_k"], 1e-6)


def test_a_loha_needs_a_rank_to_be_cut_to(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "lycoris", kind="loha")
    with pytest.raises(UserError, match="no rank is given"):
        merge(a, a, "--method=ties", f"--out={tmp_path / 'm.safetensors'}")


def dora(path: Path) -> Path:
    module = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    W = BaseWeights(base_of(str(XL)))(("unet", module.removeprefix("unet.")))
    g = torch.Generator().manual_seed(1)
    save_file({f"{module}.lora_A.weight": torch.randn(2, W.shape[1], generator=g) / 8,
               f"{module}.lora_B.weight": torch.randn(len(W), 2, generator=g) / 8,
               f"{module}.lora_magnitude_vector.weight": W.norm(dim=1).float() * 1.2}, path)
    return path


def dora_delta(path: Path) -> tuple[Tensor, Tensor]:
    """-> W and ΔW by the paper's formula."""
    tensors = {name.rpartition("to_q.")[2]: t.double() for name, t in load_file(path).items()}
    W = BaseWeights(base_of(str(XL)))(("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"))
    V = W + tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    return W, V * (tensors["lora_magnitude_vector.weight"] / V.norm(dim=1)).unsqueeze(1) - W


def test_a_dora_is_never_merged_as_if_it_were_a_lora(tmp_path):
    """M-03. Refused without its base and where its change has no room; else its whole change."""
    a, out = dora(tmp_path / "a.safetensors"), tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="is a DoRA"):
        merge(a, a, "--method=svd", f"--out={out}")
    with pytest.raises(UserError, match="no product of"):
        merge(a, a, "--method=concat", f"--out={out}", f"--base={XL}")
    assert not out.exists()
    merge(f"{a}:0.25", f"{a}:0.5", "--method=svd", "--rank=200", f"--out={out}", f"--base={XL}")
    tensors = {name.rpartition("to_q.")[2]: t.double() for name, t in load_file(out).items()}
    assert tensors.keys() == {"lora_A.weight", "lora_B.weight"}
    assert close(tensors["lora_B.weight"] @ tensors["lora_A.weight"], 0.75 * dora_delta(a)[1], 1e-6)


def with_embedding(path: Path, name: str, value: float) -> Path:
    write_lora(path, "kohya", modules=("to_k",))
    held = {key: tensor.clone() for key, tensor in load_file(path).items()}  # the file is mapped into memory
    save_file(held | {f"bundle_emb.{name}.clip_l": torch.full((1, 768), float(value))}, path)
    return path


def test_embeddings_of_both_are_kept_and_a_clash_is_named(tmp_path):
    a, b, c = (with_embedding(tmp_path / f"{k}.safetensors", name, k) for k, name in enumerate(("dog", "cat", "dog")))
    out = tmp_path / "m.safetensors"
    merge(a, b, f"--out={out}")
    assert LoraFile.read(out).embeddings.keys() == {"dog", "cat"}
    with pytest.raises(UserError, match="dog of"):
        merge(a, c, f"--out={out}")
    for number, value in (("1", 0.0), ("2", 2.0)):
        merge(a, c, f"--out={out}", f"--embeddings_of={number}")
        assert float(LoraFile.read(out).embeddings["dog"]["clip_l"][0, 0]) == value
    merge(a, c, f"--out={out}", "--embeddings_of=0")
    assert not LoraFile.read(out).embeddings


def test_the_header_says_what_was_merged_and_how(tmp_path):
    import hashlib

    a, b = (write_lora(tmp_path / f"{k}.safetensors", "kohya", seed=k) for k in (0, 1))
    merge(f"{a}:0.8", b, "--method=dare_linear", "--density=0.7", "--seed=4", f"--out={tmp_path / 'm.safetensors'}")
    found = metadata(tmp_path / "m.safetensors")
    record = json.loads(found["ss_merged"])
    assert (record["method"], record["density"], record["seed"]) == ("dare_linear", 0.7, 4)
    assert record["from"][0] == {"name": "0.safetensors", "strength": 0.8,
                                 "sha256": hashlib.sha256(a.read_bytes()).hexdigest()}
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["ss_network_dim"] == "6"
    assert str(tmp_path) not in str(found), "no folder of the user's"


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def test_the_worked_example_of_the_help_runs(tmp_path, monkeypatch, capsys):
    command = re.findall(r"^    python scripts/merge_loras\.py (.+)$", merge_loras.__doc__, re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    Path("runs/dog").mkdir(parents=True)
    write_lora(Path("runs/dog/pytorch_lora_weights.safetensors"), "diffusers")
    write_lora(Path("style.safetensors"), "kohya", seed=1)
    merge(*shlex.split(command), "--dry_run")
    assert not Path("merged.safetensors").exists() and "strength 0.8" in capsys.readouterr().out
    merge(*shlex.split(command))
    one, other = deltas(Path("runs/dog/pytorch_lora_weights.safetensors")), deltas(Path("style.safetensors"))
    assert close(deltas(Path("merged.safetensors"))["to_k"], 0.8 * one["to_k"] + 0.5 * other["to_k"], 1e-6)
    assert "read back" in capsys.readouterr().out


def test_a_name_that_ends_like_a_strength_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lora(Path("a:0.5"), "kohya", modules=("text",))
    assert merge_loras.with_strength("a:0.5") == (Path("a:0.5"), 1.0)
    assert merge_loras.with_strength("a:0.5:2") == (Path("a:0.5"), 2.0)
    assert merge_loras.with_strength("C:\\b.safetensors") == (Path("C:\\b.safetensors"), 1.0)


@pytest.mark.parametrize("more, words", [
    (["--out=a.safetensors"], "replace itself"), (["--out=nowhere/m.safetensors"], "no folder"),
    (["--density=0", "--method=ties"], "density"), (["--rank=4"], "no effect"),
    (["--method=ziplora"], "needs the base"),
    (["--method=svd", "--rank=0"], "1 or more"), (["--embeddings_of=3"], "number of a LoRA"),
    (["--base=nowhere/at/all"], "nowhere"), (["c.safetensors:nan"], "no finite")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_lora(Path(f"{name}.safetensors"), "kohya", modules=("text",))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        merge("a.safetensors", "b.safetensors", *(more if any("--out" in m for m in more) else
                                                  ["--out=m.safetensors", *more]))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_loras_of_two_families_are_refused_by_name(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "kohya")
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{stem}.lora_down.weight": torch.ones(2, 768), f"{stem}.lora_up.weight": torch.ones(24, 2)},
              tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="different base models") as caught:
        merge(a, tmp_path / "b.safetensors", f"--out={tmp_path / 'm.safetensors'}")
    assert "SDXL" in f"{caught.value}" and "SD 1.x" in f"{caught.value}"


# ----------------------------------------------------------------------------------------------------------------------
# Into a base model


@pytest.mark.trains
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_base_model_gets_the_change_and_nothing_else(tmp_path, form):
    """A linear map, a convolution, both text encoders (one of whose layers is a third of a tensor in a file)."""
    folder = build_folder(tmp_path / "model", "sdxl")
    base = folder if form == "folder" else write_single_file(folder, tmp_path / "base.safetensors",
                                                             metadata={"modelspec.title": "mine"})
    before = BaseWeights(base_of(str(base)))
    places = [("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
              ("unet", "mid_block.resnets.0.conv1"),
              ("text_encoder", "encoder.layers.0.self_attn.k_proj"),
              ("text_encoder_2", "encoder.layers.0.self_attn.v_proj"), ("text_encoder_2", "encoder.layers.1.mlp.fc1")]
    g, tensors, wanted = torch.Generator().manual_seed(0), {}, {}
    for network, path in places:
        W = before((network, path))
        A, B = torch.randn(2, W.shape[1], generator=g), torch.randn(len(W), 2, generator=g)
        name = f"{network}.{'text_model.' * (network != 'unet')}{path}"
        tensors |= {f"{name}.lora_A.weight": A.view(2, -1, *([3, 3] * path.endswith("conv1"))),
                    f"{name}.lora_B.weight": B.view(len(W), 2, *([1, 1] * path.endswith("conv1")))}
        wanted[network, path] = W + 0.5 * B.double() @ A.double()
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / ("new" if form == "folder" else "new.safetensors")
    merge(f"{tmp_path / 'a.safetensors'}:0.5", f"--into_base={base}", f"--out={out}")
    after, untouched = base_of(str(out)), before.repo
    found = BaseWeights(after)
    for place in places:
        assert close(found(place), wanted[place], 1e-6), place
    for network in ("unet", "text_encoder", "text_encoder_2", "vae"):
        for name in sorted(after.tensor_names(network)):
            path = name.removesuffix(".weight").removeprefix("text_model.")
            if (network, path) not in wanted:
                assert torch.equal(after.weight(network, name), untouched.weight(network, name)), name
    if form == "file":
        assert metadata(out)["modelspec.title"] == "mine" and "ss_merged" in metadata(out)
    with pytest.raises(UserError, match="never overwritten"):
        merge(tmp_path / "a.safetensors", f"--into_base={base}", f"--out={out}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_dora_is_right_in_a_base_model(tmp_path):
    a = dora(tmp_path / "a.safetensors")
    merge(f"{a}:0.5", f"--into_base={XL}", f"--out={tmp_path / 'new'}")
    W, delta = dora_delta(a)
    found = BaseWeights(base_of(str(tmp_path / "new")))(
        ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"))
    assert (found - (W + 0.5 * delta)).abs().max() <= 1e-3 * (W + delta).abs().max()  # the model is in fp16


def test_a_base_that_does_not_fit_or_overflows_leaves_nothing(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", "kohya", modules=("to_k",))
    with pytest.raises(UserError, match="do not fit"):
        merge(a, f"--into_base={XL}", f"--out={tmp_path / 'new'}")
    b = dora(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="NaN or infinity"):
        merge(f"{b}:1e9", f"--into_base={XL}", f"--out={tmp_path / 'new'}")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_files_that_hold_the_old_weights_are_not_copied(tmp_path):
    base = tmp_path / "model"
    shutil.copytree(XL, base)
    for stale in (base / "whole.safetensors", base / "unet/diffusion_pytorch_model.bin"):
        stale.write_bytes(b"old")
    merge(dora(tmp_path / "a.safetensors"), f"--into_base={base}", f"--out={tmp_path / 'new'}")
    names = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert "model_index.json" in names and "tokenizer/vocab.json" in names
    assert not {"whole.safetensors", "unet/diffusion_pytorch_model.bin"} & names
