"""The SD 1.x and 2.x family: encodes, denoises and draws as the stock pipeline, writes files it loads, says no."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.support.compare import same_bits
from tests.support.files import edit_json
from tests.support.made_up_run import make_run
from tests.support.text import train_text
from tests.support.tiny_models import build_tiny_edm, build_tiny_sd, latents_of
from trainkit import export, families, preview
from trainkit.adapters import Adapters, add_adapters
from trainkit.adapters import problems as adapter_problems
from trainkit.condition import Condition
from trainkit.conditioning.cached_text import FrozenText
from trainkit.conditioning.live_text import LiveText, make_text
from trainkit.data.cache import DiskStore
from trainkit.errors import UserError
from trainkit.families import sd, sdxl
from trainkit.families.pretrained import VAE_FLAG
from trainkit.files import load_tensors, save_tensors
from trainkit.lora_files import LoraFiles
from trainkit.options import LoraOptions, ModelOptions, OptimizerOptions, TextOptions
from trainkit.preview import Previews, preview_prompts
from trainkit.publish import publish

PROMPTS = ["a photo of a TOK dog", "", "3d icon in the style of a zebra", "red " * 100]
CPU = torch.device("cpu")
VERSIONS = pytest.mark.parametrize("version", [1, 2])


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: str) -> sd.SD:
    options = ModelOptions(pretrained_model_name_or_path=str(folder), **changes)
    return sd.load(options, device=CPU, weight_dtype=dtype)


def stock(folder: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folders(tiny_sd: Path, tiny_sd2: Path) -> dict[int, Path]:
    return {1: tiny_sd, 2: tiny_sd2}


@pytest.fixture(scope="module")
def models(folders: dict[int, Path]) -> dict[int, sd.SD]:
    return {version: load(folder) for version, folder in folders.items()}


@pytest.fixture
def clone(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


@pytest.fixture
def text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A level that Transformers 5 has dropped from CLIPTextModel; the stock pipeline's clip_skip still asks for it."""
    from transformers import CLIPTextModel

    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


# ----------------------------------------------------------------------------------------------------------------------
# Which family


def test_the_family_is_chosen_by_looking_at_the_folder(folders, tiny_sdxl, assets, tmp_path):
    layouts = {
        sd: [*folders.values(), assets / "tiny-sd-icons"],
        sdxl: [tiny_sdxl, assets / "tiny-sdxl-icons", build_tiny_edm(tmp_path / "edm", widths=(32, 32, 32))]}
    for kind, paths in layouts.items():
        assert [families.of(ModelOptions(pretrained_model_name_or_path=str(p))) for p in paths] == [kind] * len(paths)
    offered = ("problems", "latents", "native_resolution", "skeleton", "load", "LORA_TARGETS")
    for kind in layouts:
        assert all(hasattr(kind, name) for name in offered)


def without(file: Path, *names: str) -> None:
    values = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in names}), "utf-8")


def refiner(model: Path) -> None:
    edit_json(model / "model_index.json", text_encoder=[None, None], text_encoder_2=["transformers", "CLIPTextModel"])
    edit_json(model / "unet/config.json", addition_embed_type="text_time")


def flux(model: Path) -> None:
    (model / "unet").rename(model / "transformer")
    edit_json(model / "model_index.json", _class_name="FluxPipeline", unet=[None, None],
              transformer=["diffusers", "FluxTransformer2DModel"], text_encoder_2=["transformers", "T5EncoderModel"])


def emptied(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def one_file(model: Path) -> None:
    shutil.rmtree(model)
    model.touch()


STRANGE = {  # what the user is told: what is done to a good folder
    "an SDXL refiner": refiner, "a model without a UNet": flux, "not a Diffusers model folder": emptied,
    "model is no .safetensors file": one_file, "the model folder does not exist": shutil.rmtree,
    "model_index.json is damaged": lambda m: (m / "model_index.json").write_text("{"),
    "unet/config.json is damaged": lambda m: (m / "unet/config.json").write_text("[]"),
    "not an SDXL model": lambda m: edit_json(m / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
    "a UNet that asks for more than text": lambda m: edit_json(m / "unet/config.json", class_embed_type="projection"),
    "a UNet3DConditionModel cannot": lambda m: edit_json(m / "unet/config.json", _class_name="UNet3DConditionModel"),
    "not a Stable Diffusion model": lambda m: edit_json(
        m / "model_index.json", text_encoder=["transformers", "T5Encoder"]),
    "UNet and VAE do not fit": lambda m: edit_json(m / "unet/config.json", in_channels=9),  # inpainting
    "the model folder has no UNet": lambda m: shutil.rmtree(m / "unet"),
    "no VAE there": lambda m: shutil.rmtree(m / "vae"),
    "the model folder has no scheduler": lambda m: shutil.rmtree(m / "scheduler"),
    "the model folder has no text_encoder": lambda m: (m / "text_encoder/config.json").unlink(),
    "the model folder has no tokenizer": lambda m: shutil.rmtree(m / "tokenizer"),
    "no safetensors for text_encoder": lambda m: (m / "text_encoder/model.safetensors").unlink(),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_cannot_be_trained_is_one_clear_problem(clone, what):
    STRANGE[what](clone)
    problem, = families.of(ModelOptions(pretrained_model_name_or_path=str(clone))).problems(str(clone), resolution=64)
    assert what in problem.what and str(clone) in problem.where and problem.fix


@pytest.mark.parametrize("file, names", [
    ("unet/config.json", "in_channels"), ("unet/config.json", "block_out_channels"),
    ("vae/config.json", "latent_channels, block_out_channels"),
])
def test_a_config_without_its_sizes_is_one_problem_of_the_data(clone, folders, file, names):
    without(clone / file, *names.split(", "))
    problem, = sd.problems(str(clone), resolution=64)
    assert (problem.what, problem.kind) == (f"{file} lacks {names}", "data")
    found = sd.problems(str(folders[1]), resolution=64, vae_path=str(clone / "vae"))
    assert [(p.what, p.where) for p in found] == [
        (f"config.json lacks {names}", f"{VAE_FLAG} {clone / 'vae'}")] * file.startswith("vae")


def test_the_shape_of_latents_is_known_before_a_weight_is_loaded(models, folders, tiny_sdxl, assets, tmp_path):
    other = Path(shutil.copytree(assets / "tiny-sd-icons/vae", tmp_path / "vae"))
    edit_json(other / "config.json", latent_channels=16, block_out_channels=[8, 8, 8, 8])
    for version, kind in ((1, sd), (2, sdxl)):  # the two offer the same function
        mean, _ = models[version].encode_pixels(torch.zeros(1, 3, 48, 48))
        assert kind.latents(str(folders[version]), 48) == mean.shape[1:]
        assert kind.latents(str(folders[version]), 64, vae_path=str(other)) == (16, 8, 8)
    assert sdxl.latents(str(tiny_sdxl), 64)[1:] == (16, 16)


def test_the_native_resolution_is_what_the_unet_was_made_for(clone, tiny_sdxl, assets):
    assert sd.native_resolution(str(assets / "tiny-sd-icons")) == 64
    assert sdxl.native_resolution(str(tiny_sdxl)) == 16 * 4
    edit_json(clone / "unet/config.json", sample_size=[24, 40])
    assert sd.native_resolution(str(clone)) == 40 * 4
    without(clone / "unet/config.json", "sample_size")
    without(clone / "vae/config.json", "block_out_channels")
    with pytest.raises(UserError) as caught:
        sd.native_resolution(str(clone))
    assert [p.what for p in caught.value.problems] == [
        "unet/config.json lacks sample_size", "vae/config.json lacks block_out_channels"]
    with pytest.raises(UserError, match="the model folder does not exist"):
        sd.native_resolution(str(clone / "nowhere"))


def test_an_unreachable_hub_id_is_left_to_problems(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind = families.of(ModelOptions(pretrained_model_name_or_path="owner/unknown-model"))
    problem, = kind.problems("owner/unknown-model", resolution=64)
    assert kind is sd and "owner/unknown-model" in problem.where


@VERSIONS
@pytest.mark.parametrize("clip_skip, refused", [(None, False), (2, False), (3, True)])
def test_a_good_model_has_no_problems_but_those_of_the_flags(folders, models, version, clip_skip, refused, text_model):
    found = sd.problems(str(folders[version]), resolution=64, clip_skip=clip_skip)
    assert [p.fix.partition(" at most")[0] for p in found] == ["--clip_skip 2"] * refused
    if not refused:
        assert models[version].encode_prompts(["a dog"], clip_skip)
    problem, = sd.problems(str(folders[version]), resolution=70)
    assert problem.fix == "--resolution 64"


def test_the_skeleton_has_the_unets_module_paths_and_no_weights(models, folders):
    bones = sd.skeleton(str(folders[1]))
    assert [path for path, _ in bones.named_modules()] == [path for path, _ in models[1].denoiser.named_modules()]
    assert all(p.is_meta for p in bones.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Text


@VERSIONS
@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_prompts_encode_bit_for_bit_as_in_the_stock_pipeline(models, folders, version, clip_skip, text_model):
    with torch.no_grad():
        condition = models[version].encode_prompts(PROMPTS, clip_skip)
        wanted, _ = stock(folders[version]).encode_prompt(PROMPTS, CPU, 1, False, clip_skip=clip_skip)
    assert same_bits(condition, {"embeds": wanted}), "and nothing pooled"


def test_the_shipped_model_loads_and_encodes_as_the_stock_pipeline(assets):
    family = load(assets / "tiny-sd-icons")
    with torch.no_grad():
        wanted, _ = stock(assets / "tiny-sd-icons").encode_prompt(PROMPTS, CPU, 1, False)
        assert torch.equal(family.encode_prompts(PROMPTS)["embeds"], wanted)
    assert (family.architecture, family.schedule.prediction_type) == ("stable-diffusion-v1", "epsilon")


def test_each_skipped_layer_is_another_text(models):
    with torch.no_grad():
        last, again, *others = (models[2].encode_prompts(["a dog"], k)["embeds"] for k in (None, 0, 1, 2))
    torch.testing.assert_close(last, again)
    assert all((other - last).abs().max() > 0.1 for other in others)


def test_padding_is_masked_where_the_config_says_so_and_that_is_another_identity(clone):
    plain = load(clone)
    edit_json(clone / "text_encoder/config.json", use_attention_mask=True)
    masked = load(clone)
    with torch.no_grad():
        wanted, _ = stock(clone).encode_prompt(PROMPTS, CPU, 1, False)
        assert torch.equal(masked.encode_prompts(PROMPTS)["embeds"], wanted)
        assert not torch.equal(plain.encode_prompts(PROMPTS)["embeds"], wanted)
    assert {part for part in plain.identity if plain.identity[part] != masked.identity[part]} == {"text"}


def test_frozen_text_without_a_pooled_vector_comes_back_from_the_disk(tiny_sd, tmp_path):
    family, store = load(tiny_sd), DiskStore(tmp_path / "text")
    first = FrozenText(family, PROMPTS, store)(PROMPTS)
    family.free_text_encoders()
    again = FrozenText(family, PROMPTS, store)(PROMPTS)
    assert same_bits(first, again) and again.keys() == {"embeds"}


def live(family: sd.SD, **changes: object) -> LiveText:
    text = TextOptions(train_text_encoder=True, train_text_encoder_frac=0.5, text_encoder_lr=1e-2, **changes)
    return make_text(family, PROMPTS, None, text=text, pivotal=None, lora=LoraOptions(rank=2), total=4, seed=0)


def test_the_one_text_encoder_learns_at_its_rate_until_its_last_step(tiny_sd, caplog):
    words = live(load(tiny_sd), text_encoder_2_lr=7.0)
    assert "--text_encoder_2_lr has no effect" in caplog.text
    groups = words.groups(OptimizerOptions(), 4)
    assert [(g["name"], g["lr"], g["stop"]) for g in groups] == [("text_encoder", 1e-2, 2)]
    before = [p.detach().clone() for p in groups[0]["params"]]
    train_text(words, range(2), prompts=PROMPTS)
    learned = [p.detach().clone() for p in groups[0]["params"]]
    assert not any(torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    train_text(words, range(2, 4), prompts=PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(learned, groups[0]["params"], strict=True))
    other = live(load(tiny_sd))
    other.unpack(*words.pack())
    torch.testing.assert_close(dict(words(PROMPTS)), dict(other(PROMPTS)))


def test_without_new_tokens_and_adapters_text_is_frozen(tiny_sd):
    family = load(tiny_sd)
    words = make_text(family, PROMPTS, None, text=TextOptions(), pivotal=None, lora=LoraOptions(), total=4, seed=0)
    assert isinstance(words, FrozenText) and not family.text_encoders


# ----------------------------------------------------------------------------------------------------------------------
# Model


@VERSIONS
def test_denoise_asks_the_unet_what_the_stock_pipeline_would(models, folders, version):
    family, pipe = models[version], stock(folders[version])
    z, level = torch.randn(2, 4, 16, 16), family.schedule.at(torch.tensor([3, 900]))
    with torch.no_grad():
        text = family.encode_prompts(PROMPTS[:2])
        out = family.denoise(z, level, Condition(text, time_ids=torch.full((2, 6), torch.nan)))
        wanted = pipe.unet(z, level.cond, encoder_hidden_states=text["embeds"]).sample
    assert torch.equal(out, wanted)


@VERSIONS
def test_every_base_weight_is_frozen_and_only_the_unet_takes_the_weight_dtype(folders, version):
    family = load(folders[version], torch.bfloat16)
    parts = [family.denoiser, family.vae, *family.text_encoders]
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    assert [next(part.parameters()).dtype for part in parts] == [torch.bfloat16, torch.float32, torch.float32]
    with torch.no_grad():
        assert {t.dtype for t in family.encode_prompts(PROMPTS).values()} == {torch.bfloat16}


@VERSIONS
def test_schedule_and_latents_are_the_checkpoints_own(models, folders, version):
    family, pipe = models[version], stock(folders[version])
    assert family.schedule.prediction_type == ("epsilon", "v_prediction")[version - 1]
    torch.testing.assert_close(family.schedule.a**2, pipe.scheduler.alphas_cumprod)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean
    assert torch.equal(latents_of(family, family.encode_pixels(pixels)[0]), mean * pipe.vae.config.scaling_factor)


def test_identity_tells_models_apart_by_part(folders, clone):
    from safetensors.torch import load_file, save_file

    file = clone / "text_encoder/model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if name.endswith("final_layer_norm.bias")).add_(1e-3)
    save_file(tensors, file, {"format": "pt"})
    one, other = load(folders[1]).identity, load(clone).identity
    assert {part for part in one if one[part] != other[part]} == {"text"}
    assert one == load(folders[1], torch.bfloat16).identity


@VERSIONS
def test_previews_are_what_the_stock_pipeline_draws(folders, version, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 3)
    options = SimpleNamespace(validation_prompt="a red dog", num_validation_images=1)
    family, pipe = load(folders[version]), stock(folders[version])
    text = FrozenText(family, preview_prompts(options))
    family.free_text_encoders()
    path, image = next(iter(Previews(family, options, text, tmp_path, seed=42, resolution=32).generate(1).items()))
    pipe.scheduler = preview.sampler(family)
    noise = torch.Generator().manual_seed(42)
    wanted = pipe("a red dog", generator=noise, num_inference_steps=3, height=32, width=32).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    assert "CFG scale: 7.5" in path.read_bytes().decode("latin-1")


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


def targets(family: sd.SD, layers: str) -> dict[str, nn.Module]:
    adapters = add_adapters(copy.deepcopy(family.denoiser), LoraOptions(rank=2, lora_layers=layers),
                            targets=family.lora_targets, seed=0)
    return {path: layer.get_base_layer() for path, layer in adapters.layers.items()}


@VERSIONS
def test_all_linear_is_every_linear_map_of_the_transformers_whatever_it_is_made_of(models, version):
    family = models[version]
    found = targets(family, "all-linear")
    blocks = {path: m for path, m in family.denoiser.named_modules() if ".attentions." in path
              and isinstance(m, (nn.Linear, nn.Conv2d))}
    assert found.keys() == blocks.keys()
    of_proj = {type(m) for path, m in found.items() if path.endswith(("proj_in", "proj_out"))}
    assert of_proj == {nn.Conv2d if version == 1 else nn.Linear}
    more = targets(family, "all-linear+conv").keys() - found.keys()
    others = {path for path, m in family.denoiser.named_modules() if isinstance(m, nn.Conv2d) and path not in blocks}
    assert more == others - {"conv_in", "conv_out"}


@pytest.mark.parametrize("flags, what", [
    ({"use_blora": True}, "B-LoRA needs SDXL's"),
    ({"init_lora_weights": "pissa", "lora_layers": "all-linear"}, "pissa with convolutions"),
    ({"init_lora_weights": "olora", "lora_layers": "attention+ff"}, None),
])
def test_what_this_unet_cannot_take_is_refused(folders, flags, what):
    found = adapter_problems(sd.skeleton(str(folders[1])), LoraOptions(rank=2, **flags), targets=sd.LORA_TARGETS)
    assert [what in p.what and bool(p.fix) for p in found] == [True] * bool(what)


def test_decomposing_starts_take_the_linear_projections_of_2x(folders):
    options = LoraOptions(rank=2, init_lora_weights="pissa", lora_layers="all-linear")
    assert adapter_problems(sd.skeleton(str(folders[2])), options, targets=sd.LORA_TARGETS) == []


def networks(family: sd.SD, **options: object) -> list[Adapters]:
    """Adapters on UNet and text encoder, every parameter moved."""
    settings = LoraOptions(**{"rank": 4, "lora_alpha": 6, **options})
    made = [add_adapters(copy.deepcopy(family.denoiser), settings, targets=family.lora_targets, seed=0),
            add_adapters(copy.deepcopy(family.text_encoders[0]), settings, targets=family.text_lora_targets, seed=0,
                         prefix="text_encoder")]
    g, size = torch.Generator().manual_seed(7), 0.05 if settings.lora_type == "lora" else 0.2
    for parameter in (p for network in made for p in network.parameters()):
        parameter.data += torch.randn(parameter.shape, generator=g) * size
    return made


def assert_holds(pipe, made: list[Adapters], *, tolerance: float) -> None:
    """ΔW of every module of a pipeline with a fused LoRA is the trained one, and no other module has one."""
    for network in made:
        part = getattr(pipe, network.prefix)
        adapted = {path for path, m in part.named_modules() if hasattr(m, "base_layer")}
        assert adapted == network.layers.keys()
        for path in network.layers:
            wanted = network.delta_weight(path)
            found = part.get_submodule(path).base_layer.weight.detach().double().flatten(1) - network.weight(path)
            assert (found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-6, path


KINDS = [{"lora_layers": "all-linear"}, {"lora_layers": "all-linear+conv"}, {"use_dora": True},
         {"use_dora": True, "lora_layers": "all-linear"}, {"lora_type": "loha", "lora_layers": "all-linear"},
         {"lora_type": "lokr", "lora_layers": "all-linear+conv"}]
PLAIN = [kind for kind in KINDS if kind.keys() == {"lora_layers"}]  # Diffusers reads no dora_scale, hada_ and lokr_


@VERSIONS
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_stock_pipeline_holds_the_trained_weights_after_loading_our_diffusers_file(
        models, folders, version, kind, tmp_path):
    made, pipe = networks(models[version], **kind), stock(folders[version])
    export.write_diffusers(made, tmp_path / "ours.safetensors", {})
    assert export.verify(tmp_path / "ours.safetensors", made, models[version], layout="diffusers") < 1e-6
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert_holds(pipe, made, tolerance=1e-4)


@VERSIONS
@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_the_stock_pipeline_holds_the_trained_weights_after_loading_our_webui_file(
        models, folders, version, kind, tmp_path):
    made, pipe = networks(models[version], **kind), stock(folders[version])
    export.write_kohya(made, models[version], tmp_path / "others.safetensors", {})
    assert export.verify(tmp_path / "others.safetensors", made, models[version], layout="webui") < 2e-3
    pipe.load_lora_weights(tmp_path, weight_name="others.safetensors")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert_holds(pipe, made, tolerance=5e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_changed_number_in_the_webui_file_is_found_out(models, kind, tmp_path):
    made, path = networks(models[1], **kind), tmp_path / "others.safetensors"
    export.write_kohya(made, models[1], path, {})
    tensors = load_tensors(path)
    factors = [name for name in tensors if not name.endswith(".alpha")]
    for name in [next(n for n in factors if n.startswith(head)) for head in ("lora_unet_", "lora_te_")]:
        save_tensors(path, tensors | {name: tensors[name] * 1.05})
        with pytest.raises(UserError, match="does not hold what was trained"):
            export.verify(path, made, models[1], layout="webui")


RELEASED = {  # names as they stand in SD 1.x and 2.x LoRA files trained with kohya-ss/sd-scripts
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"):
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    ("unet", "mid_block.attentions.0.proj_in"): "lora_unet_mid_block_attentions_0_proj_in",
    ("unet", "up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj"):
        "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
    ("unet", "down_blocks.0.downsamplers.0.conv"): "lora_unet_down_blocks_0_downsamplers_0_conv",
    ("unet", "up_blocks.1.resnets.0.conv_shortcut"): "lora_unet_up_blocks_1_resnets_0_conv_shortcut",
    ("text_encoder", "encoder.layers.11.self_attn.q_proj"): "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
    ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj"):
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
}


@pytest.mark.parametrize("place", RELEASED, ids=str)
def test_webui_names_are_those_of_released_files(models, place):
    network, path = place
    assert models[1].names.webui(path, network) == RELEASED[place]
    assert models[1].names.read(RELEASED[place]) == (network, path.removeprefix("text_model."))


@pytest.mark.parametrize("name", ["lora_unet_text_model_encoder_layers_0_mlp_fc1", "text_lora_te_text_model_x",
                                  "lora_te_down_blocks_0_resnets_0_conv1", "lora_unet_down_blocks_0_nowhere"])
def test_a_name_of_no_module_is_not_read(models, name):
    assert models[1].names.read(name) is None


@pytest.mark.parametrize("version, predicts, architecture, base, v2", [
    (1, "epsilon", "stable-diffusion-v1", "sd_v1", "False"),
    (1, "v_prediction", "stable-diffusion-v1", "sd_v1_v", "False"),
    (2, "epsilon", "stable-diffusion-v2-512", "sd_v2", "True"),
    (2, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
])
def test_the_webui_header_names_the_base_as_kohya_and_modelspec_do(tmp_path, version, predicts, architecture, base, v2):
    from safetensors import safe_open

    family = load(build_tiny_sd(tmp_path / "sd", version=version, prediction_type=predicts, widths=(32, 32, 32)))
    made = networks(family, lora_layers="all-linear")
    export.write_kohya(made, family, tmp_path / "x.safetensors", {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert (header["ss_base_model_version"], header["ss_v2"]) == (base, v2)
    assert header["modelspec.prediction_type"] == ("v" if predicts == "v_prediction" else "epsilon")
    assert header["modelspec.implementation"] == "diffusers" and header["modelspec.resolution"] == "64x64"
    assert header["ss_network_module"] == "networks.lora" and json.loads(header["ss_network_args"]) == {}, \
        "kohya's trainer adapts 1×1 convolutions of the transformers without conv_dim"


# ----------------------------------------------------------------------------------------------------------------------
# The end of a run


def finished(folder: Path, family: sd.SD, **given: object) -> str:
    """A text-to-image run whose files are published -> its card and its report."""
    changes = {"pretrained_model_name_or_path": family.path, "instance_prompt": None, "instance_data_dir": None,
               "train_text_encoder": True, "train_data_dir": "/home/anna/private/images", **given}
    run = make_run(folder, **changes)
    record = json.loads((run / "run.json").read_text("utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"command": ["/x/train_text_to_image_lora.py"]}), "utf-8")
    rows = [json.loads(row) | {"lr/text_encoder": 1e-4} for row in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    unet, text = networks(family)
    options = SimpleNamespace(output_dir=str(run), push_to_hub=False, keep_loras=True, output_kohya_format=False,
                              metadata="full", save_paper_dora=False, svd_rank=None)
    words = SimpleNamespace(networks=[text], export=lambda *_: [])
    publish(options, LoraFiles(options, family, unet, words, num_images=22))
    return (run / "README.md").read_text("utf-8") + (run / "report.html").read_text("utf-8")


def test_card_and_report_speak_of_stable_diffusion_and_of_nothing_the_run_was_not(models, tmp_path):
    page = finished(tmp_path / "icons", models[2], dist_match=0.003, dist_match_method="wavelet", guidance_token=8.0)
    matter = yaml.safe_load(page.split("---\n")[1])
    assert matter["tags"] == ["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion"]
    assert "instance_prompt" not in matter and "Trigger words" not in page and "``" not in page.replace("```", "")
    rows = [("Distribution matching, lambda", 0.003), ("Matching, method", "wavelet"), ("CLIP guidance token", 8.0)]
    assert all(f"| {name} | {value} |" in page for name, value in rows) and "Matching, bank" not in page
    assert "trained on the UNet and the text encoder for 30 steps" in page
    assert "Prompt: `3d icon in the style of TOK, a dog <lora:icons:1>`" in page
    assert "StableDiffusionPipeline.from_pretrained" in page
    assert not re.search(r"sdxl|diffusion.?xl|dreambooth|/anna/", page, re.IGNORECASE)


def test_the_cards_snippet_draws_a_image(models, folders, tmp_path, monkeypatch):
    page = finished(tmp_path / "icons", models[1], validation_prompt=None)
    (tmp_path / "icons" / folders[1].name).symlink_to(folders[1])
    monkeypatch.chdir(tmp_path / "icons")
    monkeypatch.setattr("diffusers.utils.logging._tqdm_active", False)
    snippet = re.search(r"```python\n(.*?\n)```", page, re.DOTALL)[1]
    assert 'pipe("your prompt")' in snippet
    scope: dict = {}
    exec(snippet.replace(").images[0]", ", num_inference_steps=2).images[0]"), scope)
    assert scope["image"].size == (64, 64) and scope["pipe"].get_active_adapters() == ["lora"]
