"""One reader and writer of LoRA files: what it reads is what other programs mean, and what it writes they read so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.loaders import LOADERS, Parts
from trainkit import lora_file
from trainkit.adapters.updates import Hadamard, Kronecker, LowRank, Whole
from trainkit.errors import UserError
from trainkit.families.file_names import SD_NAMES, kernel_of, xl_names
from trainkit.lora_file import LayerUpdate, LoraFile, Magnitude
from trainkit.lora_file.rounding import Rounded

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.0.resnets.1.conv1"
TEXT = "encoder.layers.3.self_attn.q_proj"
STEMS = {  # as kohya's trainer names these modules of SDXL
    ("unet", QUERY): "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ("unet", CONV): "lora_unet_output_blocks_1_0_in_layers_2",
    ("text_encoder_2", TEXT): "lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
}
SHAPES = {("unet", QUERY): (24, 16), ("unet", CONV): (12, 8, 3, 3), ("text_encoder_2", TEXT): (16, 16)}
KINDS = ("LoRA", "DoRA", "DoRA by input", "LoHa", "LoKr", "LoKr of whole factors", "full")


def drawn(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g)


def example(kind: str, seed: int = 0) -> tuple[LoraFile, dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor]]:
    """A LoRA of three modules -> it, the base's weights in their shapes, and the ΔW [out,in] computed here."""
    random, layers, weights, deltas = drawn(seed), {}, {}, {}
    for place, (out, width, *kernel) in SHAPES.items():
        side = width * (9 if kernel else 1)
        W, B, A = random(out, width, *kernel), random(out, 3) / 4, random(3, side) / 4
        V = W.flatten(1).double() + 1.5 * B.double() @ A.double()
        made = LayerUpdate(LowRank(A, B, 1.5), tuple(kernel))
        delta = V - W.flatten(1)
        if kind == "DoRA":
            m = 1 + random(out).abs()
            made = LayerUpdate(made.update, made.kernel, Magnitude(m))
            delta = V * m.double().view(-1, 1) / V.norm(dim=1, keepdim=True) - W.flatten(1)
        elif kind == "DoRA by input":
            m, cube = 1 + random(width).abs(), V.view(out, width, -1)
            made = LayerUpdate(made.update, made.kernel, Magnitude(m, by_input=True))
            delta = (cube * (m.double() / cube.norm(dim=(0, 2))).view(1, -1, 1)).flatten(1) - W.flatten(1)
        elif kind == "LoHa":
            B2, A2 = random(out, 3), random(3, side)
            made = LayerUpdate(Hadamard(B, A, B2, A2, 0.5), tuple(kernel))
            delta = 0.5 * (B.double() @ A.double()) * (B2.double() @ A2.double())
        elif kind.startswith("LoKr"):
            C, D = random(2, 4), random(out // 2, side // 4)
            block = {"B": D[:, :2].contiguous(), "A": random(2, side // 4)}
            whole = kind.endswith("factors")
            made = LayerUpdate(Kronecker(C, scale=0.5, **({"D": D} if whole else block)), tuple(kernel))
            delta = 0.5 * torch.kron(C.double(), D.double() if whole else block["B"].double() @ block["A"].double())
        elif kind == "full":
            made, delta = LayerUpdate(Whole(random(out, side)), tuple(kernel)), None
            delta = made.update.D.double()
        layers[place], weights[place], deltas[place] = made, W, delta
    return LoraFile(layers, names=xl_names()), weights, deltas


def flat(weights: dict[tuple[str, str], Tensor]) -> Callable[[tuple[str, str]], Tensor]:
    return lambda place: weights[place].double().flatten(1)


def parts_of(path: Path, stem: str) -> Parts:
    return {name.removeprefix(f"{stem}."): t.double() for name, t in load_file(path).items()
            if name.startswith(f"{stem}.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr of whole factors", "full"])
@pytest.mark.parametrize("loader, layout", [("ComfyUI", "webui"), ("LyCORIS", "lycoris"), ("A1111", "webui")])
def test_other_programs_compute_from_our_file_what_was_meant(tmp_path, loader, layout, kind, dtype):
    """N-11: fp32 to 1e-6 of the largest entry, and every entry of half precision within its rounding."""
    made, weights, deltas = example(kind)
    if kind == "DoRA" and loader == "A1111":  # the whole update, at a rank that loses nothing
        made, lost = made.low_rank(24, flat(weights))
        assert lost < 1e-7
    path = tmp_path / "mine.safetensors"
    made.write(path, layout, dtype=dtype, weights=flat(weights))
    read = LoraFile.read(path, names=xl_names())
    for place, stem in STEMS.items():
        W, parts = weights[place].double(), parts_of(path, stem)
        error = ((LOADERS[loader](W, parts) - W).flatten(1) - deltas[place]).abs()
        found = read.layers[place]
        stated = found.update.map(Rounded.read).delta()
        if found.magnitude is not None:
            over = found.magnitude.over_base
            stated = stated.over_base(W.flatten(1), found.magnitude.value) if over else stated.decomposed(
                W.flatten(1), found.magnitude.value.double())
        if dtype == torch.float32:
            assert error.max() <= 1e-6 * deltas[place].abs().max()
        assert (error <= stated.error + 1e-6 * deltas[place].abs().max()).all()


def test_a_dora_is_exact_in_comfyui_and_was_not_with_the_papers_magnitudes(tmp_path):
    """Comfy-Org/ComfyUI#15458. Our own reader turns the magnitudes back."""
    made, weights, deltas = example("DoRA")
    errors = {}
    for layout in ("webui", "lycoris"):
        path = tmp_path / f"{layout}.safetensors"
        made.write(path, layout, weights=flat(weights))
        errors[layout] = max(float(((LOADERS["ComfyUI"](weights[place].double(), parts_of(path, stem)) - weights[place])
                                    .flatten(1) - deltas[place]).abs().max() / deltas[place].abs().max())
                             for place, stem in STEMS.items())
        read = LoraFile.read(path, names=xl_names())
        assert read.metadata.get("ss_dora_norm") == ("base" if layout == "webui" else None)
        for place, layer in read.layers.items():
            W = flat(weights)(place)
            assert torch.allclose(layer.like(W).delta(W), deltas[place], atol=2e-3 * float(deltas[place].abs().max()))
            m, trained = layer.of_paper(W).magnitude_value.double(), made.layers[place].magnitude_value.double()
            assert torch.allclose(m, trained, rtol=1e-3)
    assert errors["webui"] <= 1e-3 and errors["lycoris"] > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [("webui", "diffusers"), ("diffusers", "lycoris"), ("onetrainer", "peft"),
                                     ("peft", "webui"), ("lycoris", "onetrainer")], ids=" to ".join)
def test_a_file_means_the_same_after_two_conversions(tmp_path, kind, through):
    """No base model but for the magnitudes of a DoRA."""
    made, weights, deltas = example(kind)
    if kind == "DoRA by input" and {"diffusers", "peft"} & {*through}:
        with pytest.raises(UserError, match="cannot be written for Diffusers"):
            for layout in through:
                made.write(tmp_path / layout, layout, dtype=torch.float32, weights=flat(weights))
        return
    given = flat(weights) if kind == "DoRA" else None
    for layout in through:
        place = tmp_path / layout
        made.write(place, layout, dtype=torch.float32, weights=given)
        networks = [place / "unet", place / "text_encoder_2"] if layout == "peft" else [place]
        files = [LoraFile.read(p, names=xl_names(), network="text_encoder_2" if layout == "peft" else None)
                 for p in networks]
        made = LoraFile({at: layer for file in files for at, layer in file.layers.items()}, names=xl_names())
    assert made.layers.keys() == deltas.keys()
    for at, layer in made.layers.items():
        W = flat(weights)(at)
        assert torch.allclose(layer.like(W).delta(W), deltas[at], atol=2e-6 * float(deltas[at].abs().max()))


def test_a_dora_is_not_converted_to_another_norm_without_its_base(tmp_path):
    made, weights, _ = example("DoRA")
    made.write(tmp_path / "a.safetensors", "webui", weights=flat(weights))
    read = LoraFile.read(tmp_path / "a.safetensors")
    read.write(tmp_path / "same.safetensors", "webui")
    with pytest.raises(UserError, match="needs its base model"):
        read.write(tmp_path / "b.safetensors", "diffusers")
    assert not (tmp_path / "b.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Other programs' layouts, synthesised by rule

A, B = drawn(5)(2, 16), drawn(6)(24, 2)
LAYOUTS = {  # how each program names A and B of one module -> the two names
    "Diffusers": (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"),
    "Diffusers, adapter named": (f"unet.{QUERY}.lora_A.default.weight", f"unet.{QUERY}.lora_B.default.weight"),
    "Diffusers 0.20": (f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
    "Diffusers 0.17": tuple(f"unet.{QUERY.replace('to_q', 'processor.to_q_lora')}.{w}.weight" for w in ("down", "up")),
    "no prefix": (f"{QUERY}.lora.down.weight", f"{QUERY}.lora.up.weight"),
    "kohya": tuple(f"{STEMS['unet', QUERY]}.lora_{w}.weight" for w in ("down", "up")),
    "OneTrainer": tuple(f"lora_unet_{QUERY.replace('.', '_')}.lora_{w}.weight" for w in ("down", "up")),
    "OneTrainer, dotted": tuple(f"unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{w}.weight"
                                for w in ("down", "up")),
    "SimpleTuner": tuple(f"lycoris_{QUERY.replace('.', '_')}.lora_{w}.weight" for w in ("down", "up")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_every_programs_names_are_read(tmp_path, layout, alpha):
    down, up = LAYOUTS[layout]
    tensors = {down: A, up: B}
    if alpha:
        stem = down.partition(".processor")[0] + ".to_q" if "processor" in down else down
        for end in (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight"):
            stem = stem.removesuffix(end)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    read = LoraFile.read(tmp_path / "x.safetensors")
    assert [*read.layers] == [("unet", QUERY)]
    assert torch.allclose(read.layers["unet", QUERY].delta(), (alpha or 2.0) / 2 * B @ A)


@pytest.mark.parametrize("name, place", [
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", ("text_encoder", "encoder.layers.0.mlp.fc1")),
    ("lora_te1_text_model_encoder_layers_11_self_attn_v_proj", ("text_encoder", "encoder.layers.11.self_attn.v_proj")),
    ("clip_g.text_model.encoder.layers.31.mlp.fc2", ("text_encoder_2", "encoder.layers.31.mlp.fc2")),
    ("text_encoder.text_model.encoder.layers.2.mlp.fc1", ("text_encoder", "encoder.layers.2.mlp.fc1")),
    ("text_encoder_2.encoder.layers.2.self_attn.k_proj", ("text_encoder_2", "encoder.layers.2.self_attn.k_proj")),
    ("lora_unet_output_blocks_2_2_conv", ("unet", "up_blocks.0.upsamplers.0.conv")),
    ("lora_unet_down_blocks_0_attentions_1_proj_in", ("unet", "down_blocks.0.attentions.1.proj_in")),
    ("lora_unet_input_blocks_4_7_proj_in", None), ("lora_unet_output_blocks_4_2_proj_in", None),
    ("lora_te1_down_blocks_0_resnets_0_conv1", None), ("unet.down_blocks_0.resnets.0.conv1", None),
    ("unet.encoder.layers.0.mlp.fc1", None), ("lora_unet_", None), ("lora_unet_down_blocks_0_", None), ("", None)])
def test_a_name_means_one_module_or_none(name, place):
    assert xl_names().read(name) == place


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr", "pattern"])
def test_a_peft_checkpoint_is_what_peft_computes(tmp_path, tiny_sdxl, kind):
    """adapter_model.safetensors and adapter_config.json as PEFT itself saves them."""
    import peft
    from diffusers import UNet2DConditionModel

    modules = ["to_q", "conv1"] if kind != "dora" else ["to_q"]
    given = {"r": 4, "target_modules": modules}
    config = {
        "lora": lambda: peft.LoraConfig(**given, lora_alpha=6), "dora": lambda: peft.LoraConfig(**given, use_dora=True),
        "rslora": lambda: peft.LoraConfig(**given, lora_alpha=6, use_rslora=True),
        "loha": lambda: peft.LoHaConfig(**given, alpha=6), "lokr": lambda: peft.LoKrConfig(**given, alpha=6),
        "pattern": lambda: peft.LoraConfig(**given, lora_alpha=6, alpha_pattern={"attn1.to_q": 1}, rank_pattern={
            "attn2.to_q": 2}),
    }[kind]()
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    weights = {name: m.weight.detach().clone() for name, m in unet.named_modules() if hasattr(m, "weight")}
    model = peft.get_peft_model(unet, config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(drawn(number)(*parameter.shape) / 8)
    model.save_pretrained(tmp_path / "unet")
    read = LoraFile.read(tmp_path / "unet")
    model.merge_and_unload()
    merged = dict(unet.named_modules())
    assert read.layers
    for (_, path), layer in read.layers.items():
        W = weights[path].flatten(1)
        wanted = merged[path].weight.detach().flatten(1) - W
        assert torch.allclose(layer.like(W).delta(W), wanted, atol=1e-5), path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd1", "sd2"])
def test_every_module_of_the_released_models_has_a_name_in_every_layout(family):
    """Full-width skeletons without weights: 3,000 names there and back, and the kernels that a file may not say."""
    unet = released_unet(family)
    names = xl_names(unet.config) if family == "sdxl" else SD_NAMES
    layers = {path: m for path, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for layout in ("diffusers", "webui", "lycoris", "onetrainer", "peft"):
        stems = {lora_file.layouts.stem_of(("unet", path), layout, names): path for path in layers}
        assert len(stems) == len(layers)
        assert {stem: names.read(stem) for stem in stems} == {stem: ("unet", path) for stem, path in stems.items()}
    for path, module in layers.items():
        kernel = tuple(module.weight.shape[2:])
        assert kernel_of(("unet", path), linear_projections=family != "sd1") == kernel, path


def released_unet(family: str):
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    settings = {
        "sd1": dict(cross_attention_dim=768, attention_head_dim=8, down_block_types=down, up_block_types=up),
        "sd2": dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
                    down_block_types=down, up_block_types=up),
        "sdxl": dict(cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
                     block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
                     down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                     up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                     addition_embed_type="text_time", addition_time_embed_dim=256,
                     projection_class_embeddings_input_dim=2816)}
    with torch.device("meta"):
        return UNet2DConditionModel(**settings[family])


# ----------------------------------------------------------------------------------------------------------------------
# Tucker's form, and LoKr whose small matrix is the larger one


def test_convolutions_in_three_parts_are_read_by_their_formula(tmp_path):
    """LyCORIS: ΔW[o,i,h,w] = Σ up[o,m] mid[m,n,h,w] down[n,i]; LoHa's and LoKr's cores likewise."""
    random, stem = drawn(1), STEMS["unet", CONV]
    up, mid, down = random(12, 3, 1, 1), random(3, 2, 3, 3), random(2, 8, 1, 1)
    w = {name: random(3, n) for name, n in (("w1_a", 12), ("w1_b", 8), ("w2_a", 12), ("w2_b", 8))}
    t1, t2, t = random(3, 3, 3, 3), random(3, 3, 3, 3), random(2, 2, 3, 3)
    C, kb, ka = random(2, 2), random(2, 4), random(2, 6)
    first = torch.einsum("mn...,om,ni->oi...", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    hada = [torch.einsum("rs...,ro,si->oi...", core, w[a], w[b]) for core, a, b in ((t1, "w1_a", "w1_b"),
                                                                                    (t2, "w2_a", "w2_b"))]
    block = torch.einsum("rs...,ro,si->oi...", t, ka, kb).contiguous()
    files = {
        "lora": ({"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, first),
        "loha": ({"hada_t1": t1, "hada_t2": t2} | {f"hada_{k}": v for k, v in w.items()}, hada[0] * hada[1]),
        "lokr": ({"lokr_w1": C, "lokr_w2_a": ka, "lokr_w2_b": kb, "lokr_t2": t}, torch.kron(C[..., None, None], block)),
        "both": ({"lokr_w1_a": C, "lokr_w1_b": ka[:, :2], "lokr_w2": block},
                 torch.kron((C @ ka[:, :2])[..., None, None], block)),
    }
    for name, (tensors, wanted) in files.items():
        save_file({f"{stem}.{end}": t.contiguous() for end, t in tensors.items()},
                  tmp_path / name)
        read = LoraFile.read(tmp_path / name).layers["unet", CONV]
        assert torch.allclose(read.delta(), wanted.flatten(1), atol=1e-4), name
        assert read.kernel == (3, 3)


def test_a_lokr_that_lycoris_could_not_load_is_written_as_a_lora(tmp_path):
    C, D = drawn(2)(8, 8), drawn(3)(3, 2)
    LoraFile({("unet", QUERY): LayerUpdate(Kronecker(C, D=D), ())}, names=xl_names()).write(tmp_path / "x", "lycoris")
    assert {name.rpartition("to_q.")[2] for name in load_file(tmp_path / "x")} == {
        "lora_down.weight", "lora_up.weight", "alpha"}


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings and headers


@pytest.mark.parametrize("tensors, wanted", [
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {"": {"clip_l": (2, 768), "clip_g": (2, 1280)}}),
    ({"emb_params": (3, 768)}, {"": {"clip_l": (3, 768)}}), ({"<cat>": (768,)}, {"<cat>": {"clip_l": (1, 768)}}),
    ({"bundle_emb.mouse.clip_l": (2, 768), "bundle_emb.mouse.clip_g": (2, 1280)},
     {"mouse": {"clip_l": (2, 768), "clip_g": (2, 1280)}}),
    ({"bundle_emb.mouse.string_to_param.*": (2, 768)}, {"mouse": {"clip_l": (2, 768)}})], ids=str)
def test_embeddings_of_every_program_are_read_and_written_again(tmp_path, tensors, wanted):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x")
    read = LoraFile.read(tmp_path / "x")
    shapes = {name: {e: tuple(t.shape) for e, t in held.items()} for name, held in read.embeddings.items()}
    assert not read.layers and shapes == wanted
    read.write(tmp_path / "again", "webui")
    again = LoraFile.read(tmp_path / "again")
    assert again.embeddings.keys() == read.embeddings.keys()


@pytest.mark.parametrize("metadata, width, family", [
    ({}, 768, "sd1"), ({}, 1024, "sd2"), ({}, 2048, "sdxl"), ({"ss_base_model_version": "sdxl_base_v1-0"}, 96, "sdxl"),
    ({"ss_base_model_version": "sd_v1"}, 96, "sd1"), ({"ss_v2": "True"}, 96, "sd2"), ({}, 96, None),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, 96, "sd2")])
def test_the_base_models_family_is_known_by_the_text_else_by_the_header(tmp_path, metadata, width, family):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"unet.{path}.lora_A.weight": torch.ones(2, width), f"unet.{path}.lora_B.weight": torch.ones(8, 2)},
              tmp_path / "x", metadata or None)
    assert LoraFile.read(tmp_path / "x").family == family


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files

STEM = STEMS["unet", QUERY]
GOOD = {f"{STEM}.lora_down.weight": A, f"{STEM}.lora_up.weight": B, f"{STEM}.alpha": torch.tensor(1.0)}
HUGE, WIDE = torch.ones(2**15, 1), torch.ones(1, 2**15)


def raw(header: dict[str, object]) -> bytes:
    """A safetensors file of a header and 8 bytes."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


HOSTILE: dict[str, dict[str, Tensor] | bytes] = {
    "nothing": b"", "7 bytes": b"1234567", "a header of 2^60 bytes": (2**60).to_bytes(8, "little") + b"{}",
    "a header that is cut": (500).to_bytes(8, "little") + b'{"a":', "no object": (4).to_bytes(8, "little") + b"[1] ",
    "a zip": b"PK\x03\x04" + bytes(60), "a pickle": b"\x80\x02}q\x00X" + bytes(60), "a page": b"<!DOCTYPE html><html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "text": b"a prompt and some more words",
    "an object nested 10,000 deep": (20008).to_bytes(8, "little") + b'{"a":' + b"[" * 10000 + b"]" * 10000 + b"} ",
    "offsets behind the end": raw({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "a shape of 2^62": raw({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}}),
    "a NaN": GOOD | {f"{STEM}.lora_up.weight": B * float("nan")},
    "an infinity": GOOD | {f"{STEM}.lora_down.weight": A / 0},
    "an infinite alpha": GOOD | {f"{STEM}.alpha": torch.tensor(float("inf"))},
    "whole numbers": GOOD | {f"{STEM}.lora_up.weight": B.int()},
    "ranks that differ": GOOD | {f"{STEM}.lora_up.weight": B[:, :1].contiguous()},
    "no up": {k: v for k, v in GOOD.items() if "up" not in k}, "alpha alone": {f"{STEM}.alpha": torch.tensor(1.0)},
    "two alphas": GOOD | {f"{STEM}.alpha": torch.ones(2)},
    "a factor of five sides": GOOD | {f"{STEM}.lora_up.weight": torch.ones(24, 2, 1, 1, 1)},
    "a rank of zero": {f"{STEM}.lora_up.weight": torch.ones(24, 0), f"{STEM}.lora_down.weight": torch.ones(0, 16)},
    "an unknown module": GOOD | {"lora_unet_nowhere.lora_up.weight": B}, "an unknown part": GOOD | {f"{STEM}.magic": A},
    "one module twice": GOOD | {f"lora_unet_{QUERY.replace('.', '_')}.lora_up.weight": B},
    "an update of 2^60": {f"{STEM}.lokr_w1": HUGE, f"{STEM}.lokr_w2": WIDE},
    "a product of 2^30": {f"{STEM}.lora_up.weight": HUGE, f"{STEM}.lora_down.weight": WIDE},
    "half a LoHa": {f"{STEM}.hada_w1_a": B, f"{STEM}.hada_w1_b": A}, "half a LoKr": {f"{STEM}.lokr_w2": B},
    "magnitudes of nothing": GOOD | {f"{STEM}.dora_scale": torch.ones(7, 1)},
    "Flux": {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": B}, "SD 3": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": A},
    "changed biases": GOOD | {f"{STEM}.diff_b": torch.ones(24)},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_ends_in_one_message_and_nothing_is_written(tmp_path, what):
    file, content = tmp_path / "evil.safetensors", HOSTILE[what]
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file({name: tensor.clone() for name, tensor in content.items()}, file)
    with pytest.raises(UserError) as refused:
        LoraFile.read(file).write(tmp_path / "out.safetensors", "diffusers")
    [problem] = refused.value.problems
    assert "evil.safetensors" in problem.what and problem.why and problem.fix and problem.kind == "data"
    assert [p.name for p in tmp_path.iterdir()] == ["evil.safetensors"]


@pytest.mark.parametrize("metadata", ["{", "[1]", '{"unet.r": []}' * 2, "[" * 100_000])
def test_a_hostile_header_of_diffusers_is_told(tmp_path, metadata):
    down, up = LAYOUTS["Diffusers"]
    save_file({down: A, up: B}, tmp_path / "evil.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match="evil"):
        LoraFile.read(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("config", [None, "{", "[]", '{"lora_alpha": "six"}', '{"alpha_pattern": [1]}'])
def test_a_peft_folder_without_a_good_config_is_told(tmp_path, config):
    save_file({f"base_model.model.{QUERY}.lora_A.weight": A, f"base_model.model.{QUERY}.lora_B.weight": B},
              tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError):
        LoraFile.read(tmp_path)
