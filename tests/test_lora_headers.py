"""A LoRA file is drawn with as it was trained, or refused in our words before an image is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import ROOT
from tests.support.loras import random_lora
from trainkit import inference, lora_headers
from trainkit.errors import UserError
from trainkit.tools import generate

SD, XL = ROOT / "assets/tiny-sd-icons", ROOT / "assets/tiny-sdxl-icons"
SD_UNET = {"cross_attention_dim": 768}
XL_UNET = {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}
STEM = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
PLAIN = {f"{STEM}.lora_down.weight": (4, 64), f"{STEM}.lora_up.weight": (64, 4), f"{STEM}.alpha": ()}


def written(folder: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    file = folder / "mine.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file, metadata or None)
    return file


def said(folder: Path, shapes: dict[str, tuple[int, ...]], unet: dict = SD_UNET, **metadata: str) -> str:
    return "\n".join(map(str, lora_headers.problems(written(folder, shapes, **metadata), unet)))


UNREAD = {
    "OFT": {f"{STEM}.oft_blocks": (8, 8, 8)}, "biases": {f"{STEM}.diff_b": (64,)}, "norms": {f"{STEM}.w_norm": (64,)},
    "GLoRA": {f"{STEM}.a1.weight": (4, 64)},
    "Flux": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 64)},
    "nowhere": {"lora_unet_nowhere.lora_down.weight": (4, 8)},
}
READ = {
    "dora_scale": {f"{STEM}.dora_scale": (64, 1)}, "LoHa": {f"{STEM}2.hada_w1_a": (64, 4)},
    "full": {f"{STEM}2.diff": (64, 64)}, "LoCon in three parts": {f"{STEM}.lora_mid.weight": (4, 4, 3, 3)},
    "an embedding in it": {"bundle_emb.tok.clip_l": (2, 768)},
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_tensor_that_is_not_known_is_refused_by_name_and_kind(tmp_path, kind):
    text = said(tmp_path, PLAIN | UNREAD[kind])
    assert kind in text and next(iter(UNREAD[kind])) in text


@pytest.mark.parametrize("kind", READ)
def test_what_other_programs_write_is_not_refused(tmp_path, kind):
    assert not said(tmp_path, PLAIN | {name.replace("to_q2", "to_k"): shape for name, shape in READ[kind].items()})


@pytest.mark.parametrize("data, words", [
    (b"PK\x03\x04" + b"x" * 99, "run code"), (b"\x80\x02}q" + b"x" * 99, "run code"), (b"<html>xxxxxxx", "web page"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"", "0 bytes"), (b"\xff" * 64, "header"),
    ((1000).to_bytes(8, "little") + b"{", "rror"), ((2).to_bytes(8, "little") + b"[]", "rror")])
def test_what_is_no_lora_file_is_told_in_one_message(tmp_path, data, words):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(data)
    found = [*lora_headers.problems(file, SD_UNET)]
    assert len(found) == 1 and words in str(found[0]) and found[0].kind == "data"


@pytest.mark.parametrize("shapes, words", [
    ({"a": (1,)}, "none of its 1 tensors"), ({}, "no tensor at all"), ({"clip_l": (2, 768)}, "--embeddings"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (1,)}, "none of its 1 tensors")])
def test_a_file_without_a_lora_is_told(tmp_path, shapes, words):
    assert words in said(tmp_path, shapes)


@pytest.mark.parametrize("name", [
    "unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora.down.weight",
    f"{STEM.replace('to_q', 'to_k')}.lora_down.weight"])
def test_a_layer_with_one_of_its_two_matrices_is_a_damaged_file(tmp_path, name):
    assert not said(tmp_path, PLAIN)
    text = said(tmp_path, PLAIN | {name: (4, 64)})
    other = name.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    assert "damaged" in text and other in text


CROSS_NAMES = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.lora.down.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
]


@pytest.mark.parametrize("name", CROSS_NAMES)
@pytest.mark.parametrize("width, unet, words", [
    (2048, SD_UNET, ["2048 wide (SDXL)", "768 wide (SD 1.x)"]), (768, XL_UNET, ["768 wide", "2048 wide"]),
    (1024, SD_UNET, ["1024 wide (SD 2.x)"]), (768, {"cross_attention_dim": [1024] * 4}, ["1024 wide"])])
def test_another_family_is_told_by_the_width_of_the_text(tmp_path, name, width, unet, words):
    text = said(tmp_path, {name: (4, width)}, unet)
    assert "does not fit the base model" in text and all(word in text for word in words)
    assert "does not fit" not in said(tmp_path, {name: (4, 768)}, SD_UNET)


@pytest.mark.parametrize("metadata, unet, refused", [
    (dict(ss_base_model_version="sdxl_base_v1-0"), SD_UNET, True),
    (dict(ss_base_model_version="sd_v1"), XL_UNET, True), (dict(ss_base_model_version="sd_v1"), SD_UNET, False),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, XL_UNET, False),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, SD_UNET, True),
    ({"modelspec.architecture": "stable-diffusion-v2-512/lora"}, XL_UNET, True), ({}, SD_UNET, False)])
def test_another_family_is_told_by_metadata(tmp_path, metadata, unet, refused):
    assert bool(said(tmp_path, PLAIN, unet, **metadata)) == refused


@pytest.mark.trains
def test_a_lora_of_unknown_or_too_many_layers_is_refused_in_our_words(tmp_path):
    pipe = inference.load_pipeline(str(XL), "float32")
    good = random_lora(XL, tmp_path / "good.safetensors")
    inference.fuse_loras(pipe, [(good, 1.0)])
    tensors = load_file(good)
    strange = {"lora_unet_nowhere.lora_down.weight": (4, 8), "lora_unet_nowhere.lora_up.weight": (8, 4),
               "lora_unet_nowhere.alpha": ()}
    more = {**tensors, "unet.nowhere.lora_A.weight": torch.zeros(2, 8), "unet.nowhere.lora_B.weight": torch.zeros(8, 2)}
    save_file(more, tmp_path / "more.safetensors")
    elsewhere = {"unet.up_blocks.7.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 8),
                 "unet.up_blocks.7.attentions.0.proj_in.lora_B.weight": torch.zeros(8, 2)}
    save_file({**tensors, **elsewhere}, tmp_path / "elsewhere.safetensors")
    for file, words in ((written(tmp_path, strange), "nowhere"), (tmp_path / "more.safetensors", "nowhere"),
                        (tmp_path / "elsewhere.safetensors", "does not fit the base model")):
        with pytest.raises(UserError, match=words):
            inference.fuse_loras(pipe, [(file, 1.0)])


@pytest.mark.trains
@pytest.mark.parametrize("shapes", [
    {"lora_unet_nowhere.lora_down.weight": (4, 8)}, {"unet.x.lora_A.weight": (4, 8)}, {"lora_A.weight": (4, 8)},
    {"unet.lora_A.weight": (4, 8)}, {"base.model.lora_down.weight": (3,)}])
def test_generate_with_names_that_mean_nothing_ends_in_a_message(tmp_path, shapes):
    file = written(tmp_path, shapes)
    with pytest.raises(UserError) as refused:
        generate.main([f"--base={SD}", f"--lora={file}", "--prompt=a fox", "--steps=1", "--width=64", "--height=64",
                       f"--out={tmp_path / 'o'}"])
    assert "LoRA" in refused.value.report() and not list((tmp_path / "o").glob("*.png"))
