"""Exported files: stock loaders read the trained weights from them, and a file that differs is found out."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.loaders import LOADERS
from trainkit import export
from trainkit.adapters import Adapters, add_adapters, updates
from trainkit.errors import UserError
from trainkit.families import sdxl
from trainkit.files import load_tensors, save_tensors
from trainkit.lora_file.layouts import balanced
from trainkit.lora_file.rounding import Rounded
from trainkit.options import LoraOptions, ModelOptions

METADATA = {"ss_output_name": "icons", "modelspec.title": "icons", "ss_seed": "0"}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> sdxl.SDXL:
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_sdxl))
    return sdxl.load(options, device=torch.device("cpu"), weight_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)


def trained(family: sdxl.SDXL, *, size: float = 0.05, **options: object) -> Adapters:
    """Adapters as after training: B away from zero."""
    settings = LoraOptions(**{"rank": 4, "lora_alpha": 6, **options})
    adapters = add_adapters(copy.deepcopy(family.denoiser), settings, targets=family.lora_targets, seed=0)
    g = torch.Generator().manual_seed(7)
    for name, parameter in adapters.named_parameters().items():
        if not name.endswith(("lora_A.weight", "lora_magnitude_vector.weight")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * size)
    return adapters


@pytest.fixture(scope="module")
def adapters(family: sdxl.SDXL) -> Adapters:
    return trained(family, lora_layers="all-linear")


def write(adapters: Adapters, family: sdxl.SDXL, folder: Path) -> tuple[Path, Path]:
    ours, others = folder / "pytorch_lora_weights.safetensors", folder / "icons.safetensors"
    export.write_diffusers([adapters], ours, METADATA)
    export.write_kohya([adapters], family, others, METADATA)
    return ours, others


def header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def output(unet: torch.nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(1, 32, generator=g), "time_ids": torch.full((1, 6), 64.0)}
    z, text = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, 56, generator=g)
    return unet(z, torch.tensor([500]), encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.fixture(params=[False, True], ids=["by products", "by factors"])
def both_ways(request, monkeypatch) -> None:
    """Every ΔW computed, as at the end of a run; and only those that the factors do not prove, as for checkpoints."""
    monkeypatch.setattr(export, "verify", partial(export.verify, by_factors=request.param))


@pytest.mark.trains
@pytest.mark.parametrize("options", [
    {}, {"lora_layers": "all-linear"}, {"lora_alpha": 4}, {"rank": 1, "lora_alpha": 3},
    {"lora_unet_blocks": "up_blocks.0.attentions.1,mid_block", "lora_layers": "attention+ff"}], ids=str)
def test_the_stock_pipeline_draws_with_both_files_what_was_trained(family, pipeline, tmp_path, options):
    adapters = trained(family, **options)
    wanted, base = output(adapters.network), output(family.denoiser)
    effect = (wanted - base).abs().max()
    assert effect > 1e-3
    ours, half = write(adapters, family, tmp_path)
    full = tmp_path / "fp32.safetensors"
    export.write_kohya([adapters], family, full, METADATA, dtype=torch.float32)
    for path, tolerance in ((ours, 1e-4), (full, 1e-4), (half, 0.03)):
        pipeline.load_lora_weights(tmp_path, weight_name=path.name)
        found = output(pipeline.unet.eval())
        pipeline.unload_lora_weights()
        assert (found - wanted).abs().max() < tolerance * effect, path.name
    assert torch.equal(output(pipeline.unet), base), "the next case starts from the base"


KINDS = [
    {"lora_layers": "all-linear+conv"}, {"use_dora": True}, {"use_dora": True, "lora_layers": "attention+conv"},
    {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"lora_type": "loha"},
    {"lora_type": "loha", "lora_layers": "attention+conv"}, {"lora_type": "lokr", "lora_layers": "attention+conv"},
    {"lora_type": "lokr", "rank": 64, "lora_layers": "attention+conv"}]


@pytest.fixture(scope="module")
def icons() -> sdxl.SDXL:
    options = ModelOptions(pretrained_model_name_or_path="assets/tiny-sdxl-icons")
    return sdxl.load(options, device=torch.device("cpu"), weight_dtype=torch.float32)


@pytest.fixture(scope="module")
def icons_pipeline():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained("assets/tiny-sdxl-icons")


@pytest.fixture(scope="module", params=KINDS, ids=str)
def networks(request: pytest.FixtureRequest, icons: sdxl.SDXL) -> list[Adapters]:
    """Adapters of one kind on the UNet's first up block and on both text encoders, every parameter moved."""
    settings = LoraOptions(**{"rank": 4, "lora_alpha": 6, "lora_unet_blocks": "up_blocks.0", **request.param})
    unet = add_adapters(copy.deepcopy(icons.denoiser), settings, targets=icons.lora_targets, seed=0)
    texts = [add_adapters(copy.deepcopy(encoder), settings, targets=icons.text_lora_targets, seed=0, prefix=prefix)
             for encoder, prefix in zip(icons.text_encoders, ("text_encoder", "text_encoder_2"), strict=True)]
    g, size = torch.Generator().manual_seed(7), 0.05 if settings.lora_type == "lora" else 0.2
    for network in (unet, *texts):
        for parameter in network.parameters():
            parameter.data += torch.randn(parameter.shape, generator=g) * size
    return [unet, *texts]


@torch.no_grad()
def answers(unet: torch.nn.Module, *encoders: torch.nn.Module) -> list[Tensor]:
    """What the three networks say to one input."""
    g = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(1, 128, generator=g), "time_ids": torch.full((1, 6), 64.0)}
    z, text = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, 224, generator=g)
    ids = torch.randint(0, 3900, (1, 77), generator=g)
    return [unet.eval()(z, torch.tensor([500]), encoder_hidden_states=text, added_cond_kwargs=added).sample,
            *(encoder.eval()(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders)]


def all_near(found: list[Tensor], wanted: list[Tensor], base: list[Tensor], tolerance: float) -> bool:
    return all((f - w).abs().max() < tolerance * (w - b).abs().max() + 5e-6 * w.abs().max()
               for f, w, b in zip(found, wanted, base, strict=True))


def test_the_stock_pipeline_loads_every_kind_into_unet_and_text_encoders(networks, icons, icons_pipeline, tmp_path):
    """D9. `load_lora_weights` with the Diffusers file, whatever was trained."""
    pipe = icons_pipeline
    wanted, base = answers(*(n.network for n in networks)), answers(icons.denoiser, *icons.text_encoders)
    assert not all_near(base, wanted, base, 0.5)
    export.write_diffusers(networks, tmp_path / "ours.safetensors", METADATA)
    assert export.verify(tmp_path / "ours.safetensors", networks, icons, layout="diffusers") < 1e-6
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    found = answers(pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    pipe.unload_lora_weights()
    assert all_near(found, wanted, base, 1e-4)


@pytest.mark.parametrize("loader, layout", [("ComfyUI", "webui"), ("LyCORIS", "lycoris"), ("A1111", "webui"),
                                            ("InvokeAI", "webui")])
def test_the_webui_file_read_by_other_programs_rules_is_what_was_trained(networks, icons, tmp_path, loader, layout):
    """D9. UNet and both text encoders in one file; of a DoRA, A1111 and InvokeAI get the whole update as a LoRA."""
    wanted, base = answers(*(n.network for n in networks)), answers(icons.denoiser, *icons.text_encoders)
    path, tolerance = tmp_path / "others.safetensors", 0.02
    if networks[0].decomposed and loader in ("A1111", "InvokeAI"):
        export.write_low_rank(networks, icons, path, METADATA, rank=96)
    else:
        export.write_kohya(networks, icons, path, METADATA, layout=layout)
        assert export.verify(path, networks, icons, layout=layout) < 2e-3
    tensors = load_tensors(path)
    merged = [copy.deepcopy(part) for part in (icons.denoiser, *icons.text_encoders)]
    for network, bare in zip(networks, merged, strict=True):
        for module in network.layers:
            head = f"{icons.names.webui(module, network.prefix)}."
            parts = {k.removeprefix(head): tensors.pop(k).float() for k in list(tensors) if k.startswith(head)}
            weight = bare.get_submodule(module).weight
            weight.data = LOADERS[loader](weight.detach(), parts)
    assert not tensors
    assert all_near(answers(*merged), wanted, base, tolerance)


@pytest.mark.parametrize("kind, module, args", [
    ({}, "networks.lora", {}),
    ({"lora_layers": "attention+conv"}, "networks.lora", {"conv_dim": "4", "conv_alpha": "6.0"}),
    ({"use_dora": True}, "lycoris.kohya", {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
    ({"lora_type": "loha"}, "lycoris.kohya", {"algo": "loha"}),
    ({"lora_type": "lokr"}, "lycoris.kohya", {"algo": "lokr", "factor": "8"}),
])
def test_the_webui_header_names_the_module_that_reads_the_kind(family, tmp_path, kind, module, args):
    _, others = write(trained(family, **kind), family, tmp_path)
    metadata = header(others)
    assert metadata["ss_network_module"] == module and json.loads(metadata["ss_network_args"]) == args
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == ("4.0" if "lora_type" in kind else "6.0"), "LoHa's scale is in its factors"
    assert metadata.get("ss_dora_norm") == ("base" if "use_dora" in kind else None)


def test_a_pissa_file_is_a_plain_lora_of_twice_the_rank(family, tmp_path):
    adapters = trained(family, init_lora_weights="pissa")
    _, others = write(adapters, family, tmp_path)
    metadata, tensors = header(others), load_tensors(others)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "12.0")
    assert {len(t) for name, t in tensors.items() if name.endswith("lora_down.weight")} == {8}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("layout", ["diffusers", "webui"])
def test_any_changed_number_of_any_kind_is_found_out(networks, icons, tmp_path, layout):
    path = tmp_path / "file.safetensors"
    if layout == "diffusers":
        export.write_diffusers(networks, path, {})
    else:
        export.write_kohya(networks, icons, path, {})
    tensors = load_tensors(path)
    ends = {name.partition(".lora_")[2] or name.rpartition(".")[2]: name for name in tensors}
    if networks[0].rank == 64:
        ends.pop("alpha", None)  # nothing reads it where both of LoKr's factors are whole
    for name in ends.values():
        changed = tensors | {name: tensors[name] * 1.01}
        save_tensors(path, changed)
        with pytest.raises(UserError, match="does not hold what was trained"):
            export.verify(path, networks, icons, layout=layout)


def test_both_files_verify(adapters, family, tmp_path):
    ours, others = write(adapters, family, tmp_path)
    assert export.verify(ours, [adapters], family, layout="diffusers") <= 1e-6
    assert 0 < export.verify(others, [adapters], family, layout="webui") <= 1e-3


def test_the_diffusers_file_needs_no_alpha_and_says_so(adapters, family, tmp_path):
    """Readers that ignore the header's alpha are right, and those that read it find alpha = rank."""
    ours, _ = write(adapters, family, tmp_path)
    tensors, metadata = load_tensors(ours), header(ours)
    path = next(iter(adapters.layers))
    A, B = (tensors[f"unet.{path}.lora_{letter}.weight"] for letter in "AB")
    torch.testing.assert_close((B @ A).double(), adapters.delta_weight(path), rtol=1e-5, atol=1e-8)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 4
    assert sorted(config["unet.target_modules"]) == sorted(adapters.layers)
    assert {t.dtype for t in tensors.values()} == {torch.float32} and len(tensors) == 2 * len(adapters.layers)


def test_the_webui_file_is_kohyas_rule_in_fp16(adapters, family, tmp_path):
    _, others = write(adapters, family, tmp_path)
    tensors = load_tensors(others)
    name = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.dtype == up.dtype == torch.float16 and alpha.ndim == 0
    found = (up.double() @ down.double()) * (alpha.item() / down.shape[0])
    wanted = adapters.delta_weight("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert len(tensors) == 3 * len(adapters.layers)
    assert all(key.startswith(("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks"))
               for key in tensors)


def test_the_webui_header_has_what_model_browsers_read(adapters, family, tmp_path):
    ours, others = write(adapters, family, tmp_path)
    metadata = header(others)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6.0")
    assert metadata["modelspec.resolution"] == "64x64" and metadata["modelspec.prediction_type"] == "epsilon"
    data = others.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    assert metadata["sshs_model_hash"] == digest and metadata["modelspec.hash_sha256"] == f"0x{digest}"
    for path in (ours, others):
        assert METADATA.items() <= header(path).items() and header(path)["format"] == "pt"
        assert str(family.path) not in str(header(path)), "the header travels; folder names stay at home"


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-9, 1e-30, 1e-38, 1e5])
def test_an_adapter_of_any_size_keeps_its_digits(family, tmp_path, size):
    """A short Prodigy run, or a learning rate of 1e-9, ends with a B far below what fp16 can hold."""
    adapters = trained(family, size=size)
    ours, others = write(adapters, family, tmp_path)
    assert export.verify(ours, [adapters], family, layout="diffusers") <= 1e-6
    assert export.verify(others, [adapters], family, layout="webui") <= 1e-3


def test_modules_are_fp16_unless_their_numbers_leave_its_normal_range(family, tmp_path):
    adapters = trained(family)
    small = [*adapters.layers][3]
    adapters.factors(small)[1].data.mul_(1e-10)
    _, others = write(adapters, family, tmp_path)
    full = {name.partition(".")[0] for name, t in load_tensors(others).items()
            if t.dtype == torch.float32 and not name.endswith(".alpha")}
    assert full == {family.names.webui(small)}


@pytest.mark.usefixtures("both_ways")
def test_one_column_far_below_the_others_rounds_to_subnormals_and_is_no_error(family, tmp_path):
    """The shape of a young Prodigy run: entries of very different size in one factor."""
    adapters = trained(family, size=1e-6)
    for path in adapters.layers:
        adapters.factors(path)[1].data[:, 1:].mul_(1e-4)
        adapters.factors(path)[0].data[0].mul_(1e-5)
    _, others = write(adapters, family, tmp_path)
    export.verify(others, [adapters], family, layout="webui")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-4, 1e-6), (1e-7, 1.0)])
def test_rounding_stays_within_its_bound_and_the_bound_is_tight(dtype, sizes):
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=g, dtype=torch.float64) * size
            for shape, size in zip(((4, 90), (60, 4)), sizes, strict=True))
    found = (Rounded.read(B.to(dtype)) @ Rounded.read(A.to(dtype))) * 1.5
    error = (found.value - 1.5 * (B @ A)).abs()
    assert (error <= found.error).all()
    assert (error / found.error).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounding_is_bounded_through_every_formula(dtype):
    """Hadamard and Kronecker products and DoRA's rows, each bound held and no more than some times too wide."""
    g = torch.Generator().manual_seed(0)
    W, A, B, C, D = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in (
        (12, 10), (2, 10), (12, 2), (3, 2), (4, 5)))
    m = torch.rand(12, generator=g, dtype=torch.float64).float().double() + 1
    exact = {"had": updates.Hadamard(B, A, B.flip(0), A.flip(1), 1.5), "kron": updates.Kronecker(C, D=D),
             "dora": updates.LowRank(A, B * 1e-3, 1.5)}
    for name, update in exact.items():
        found = update.map(lambda t: Rounded.read(t.to(dtype))).delta()
        wanted = update.delta()
        if name == "dora":
            found, wanted = found.decomposed(W, m), updates.decomposed(W, wanted, m)
        error = (found.value - wanted).abs()
        assert (error <= found.error).all() and (error / found.error).max() > 0.03


@pytest.mark.usefixtures("both_ways")
def test_a_small_error_in_a_large_fp32_file_is_found_out(adapters, family, tmp_path):
    """Five units in the seventh digit of one number are more than rounding."""
    path, _ = write(adapters, family, tmp_path)
    tensors = load_tensors(path)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors[name][0] *= 1 + 3e-6
    save_tensors(path, tensors)
    with pytest.raises(UserError, match="does not hold what was trained"):
        export.verify(path, [adapters], family, layout="diffusers")


@pytest.mark.usefixtures("both_ways")
def test_a_file_of_the_other_layout_is_found_out(adapters, family, tmp_path):
    ours, others = write(adapters, family, tmp_path)
    for path, layout in ((ours, "webui"), (others, "diffusers")):
        with pytest.raises(UserError, match="does not hold what was trained"):
            export.verify(path, [adapters], family, layout=layout)


@pytest.mark.usefixtures("both_ways")
def test_an_untrained_adapter_is_written_and_verified(family, tmp_path):
    adapters = trained(family, size=0.0)
    ours, others = write(adapters, family, tmp_path)
    files = ((ours, "diffusers"), (others, "webui"))
    assert [export.verify(path, [adapters], family, layout=layout) for path, layout in files] == [0.0, 0.0]


def change(name_end: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        key = next(k for k in tensors if k.endswith(name_end))
        tensors[key] = edit(tensors[key])
    return damage


def drop(name_end: str) -> Callable[[Tensors], Tensor]:
    return lambda tensors: tensors.pop(next(k for k in tensors if k.endswith(name_end)))


def one_value(t: Tensor) -> Tensor:
    t[0, 0] += 0.5
    return t


def not_a_number(t: Tensor) -> Tensor:
    return t * float("nan")


DAMAGE = {  # file: what may go wrong with it
    0: [change("lora_A.weight", one_value), change("lora_B.weight", not_a_number), drop("lora_B.weight"),
        lambda t: t.clear(), lambda t: t.update({"unet.conv_in.lora_A.weight": torch.zeros(1)}),
        lambda t: t.update({"unet.nowhere.lora_A.weight": torch.zeros(4, 8),
                            "unet.nowhere.lora_B.weight": torch.zeros(8, 4)})],
    1: [change("lora_down.weight", one_value), change("alpha", lambda t: t * 1.5), drop(".alpha"),
        change("lora_up.weight", lambda t: t[:-1]), change("lora_up.weight", lambda t: t[:, :-1]),
        change("lora_down.weight", lambda t: t * float("inf")),
        lambda t: t.update({"lora_te1_x.alpha": torch.ones(())})],
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("which, damage", [(which, d) for which in DAMAGE for d in DAMAGE[which]])
def test_a_file_that_differs_from_the_trained_weights_is_found_out(adapters, family, tmp_path, which, damage):
    path = write(adapters, family, tmp_path)[which]
    tensors = load_tensors(path)
    damage(tensors)
    save_tensors(path, tensors)
    with pytest.raises(UserError, match="does not hold what was trained") as caught:
        export.verify(path, [adapters], family, layout=("diffusers", "webui")[which])
    assert caught.value.exit_code == 74


@pytest.mark.usefixtures("both_ways")
def test_swapped_modules_are_found_out(adapters, family, tmp_path):
    """Both modules have the same shape: only the values can tell."""
    _, path = write(adapters, family, tmp_path)
    tensors = load_tensors(path)
    q, k = ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_" + end for end in ("q", "k"))
    for part in (".lora_down.weight", ".lora_up.weight"):
        tensors[q + part], tensors[k + part] = tensors[k + part], tensors[q + part]
    save_tensors(path, tensors)
    with pytest.raises(UserError, match="2 of"):
        export.verify(path, [adapters], family, layout="webui")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_the_umask_asks_for(adapters, family, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        paths = write(adapters, family, tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]


def test_a_disk_that_refuses_is_a_users_problem(adapters, family, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError) as caught:
        export.write_diffusers([adapters], tmp_path / "file" / "x.safetensors", {})
    assert caught.value.exit_code == 74


def test_balancing_changes_no_product():
    A, B = torch.randn(4, 9), torch.randn(6, 4) * 1e-9
    down, up = balanced(A, B)
    assert torch.equal(up @ down, B @ A)
    assert 0.25 < down.abs().max() / up.abs().max() < 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-44])
def test_balancing_survives_any_number(value):
    down, up = balanced(torch.ones(4, 9), torch.full((6, 4), value))
    assert torch.equal((up @ down).isfinite(), torch.full((6, 9), value < 1))
