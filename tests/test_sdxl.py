"""The SDXL family: frozen, encodes and denoises exactly as the stock pipeline, refuses what cannot be trained."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.compare import same_bits
from tests.support.files import edit_json
from tests.support.tiny_models import build_tiny_sdxl, latents_of, tiny_vae
from trainkit.condition import Condition
from trainkit.conditioning.cached_text import FrozenText
from trainkit.data import cache
from trainkit.data.cache import DiskStore
from trainkit.diffusion import ScheduleChange
from trainkit.errors import UserError
from trainkit.families import sdxl, sgm
from trainkit.families.tokenize import tokens
from trainkit.options import ModelOptions

PROMPTS = ["a photo of a TOK dog", "", "3d icon in the style of a zebra", "red " * 100]
CPU = torch.device("cpu")


def options(folder: Path, **changes: str) -> ModelOptions:
    return ModelOptions(pretrained_model_name_or_path=str(folder), **changes)


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: str) -> sdxl.SDXL:
    return sdxl.load(options(folder, **changes), device=CPU, weight_dtype=dtype)


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> sdxl.SDXL:
    return load(tiny_sdxl)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)


@pytest.fixture
def copy(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))


# ----------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_prompts_encode_bit_for_bit_as_in_the_stock_pipeline(family, pipeline, clip_skip):
    with torch.no_grad():
        condition = family.encode_prompts(PROMPTS, clip_skip)
        stock = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip)
    assert condition.keys() == {"embeds", "pooled"}
    assert torch.equal(condition["embeds"], stock[0]) and torch.equal(condition["pooled"], stock[2])


def test_prompts_begin_with_bos_end_with_eos_and_pad_as_each_tokenizer_does(family):
    for tokenizer in family.tokenizers:
        ids = tokens(tokenizer, ["a dog"]).input_ids[0].tolist()
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        assert ids == [bos, *ids[1:3], eos] + [pad] * 73
    assert family.tokenizers[0].pad_token_id != family.tokenizers[1].pad_token_id


def test_pooled_vector_is_the_true_end_tokens_though_new_tokens_have_larger_ids(tmp_path):
    family = load(build_tiny_sdxl(tmp_path / "old", eos_in_config=False))
    for tokenizer, encoder in zip(family.tokenizers, family.text_encoders, strict=True):
        tokenizer.add_tokens(["<s0>"])
        encoder.resize_token_embeddings(len(tokenizer))
    prompt = "a <s0> dog"
    ids = tokens(family.tokenizers[1], [prompt]).input_ids
    end = ids[0].tolist().index(family.tokenizers[1].eos_token_id)
    assert ids.argmax() != end, "the new token has the largest id: the trap this test is about"
    second = family.text_encoders[1]
    with torch.no_grad():
        expected = second.text_projection(second.text_model(ids).last_hidden_state[:, end])
        pooled = family.encode_prompts([prompt])["pooled"]
    torch.testing.assert_close(pooled, expected)


def test_a_config_with_eos_2_pools_like_one_with_the_true_id(family, tmp_path):
    old = load(build_tiny_sdxl(tmp_path / "old", eos_in_config=False))
    with torch.no_grad():
        assert torch.equal(old.encode_prompts(PROMPTS)["pooled"], family.encode_prompts(PROMPTS)["pooled"])


def test_frozen_text_asks_the_encoders_once_per_distinct_prompt_and_outlives_them(tiny_sdxl, monkeypatch):
    family, asked = load(tiny_sdxl), []
    encode = type(family).encode_prompts
    monkeypatch.setattr(type(family), "encode_prompts", lambda f, p, skip: (asked.extend(p), encode(f, p, skip))[1])
    prompts = [f"{k} dog" for k in range(20)] * 3
    text = FrozenText(family, prompts)
    assert sorted(asked) == sorted(set(prompts))
    encoders = [weakref.ref(encoder) for encoder in family.text_encoders]
    with torch.no_grad():
        expected = encode(family, ["7 dog", "3 dog", "7 dog"])
    family.free_text_encoders()
    assert not any(ref() for ref in encoders)
    torch.testing.assert_close(dict(text(["7 dog", "3 dog", "7 dog"])), dict(expected))


def test_frozen_text_reads_the_same_bits_from_the_disk_in_a_second_run(tiny_sdxl, tmp_path):
    family, store = load(tiny_sdxl), DiskStore(tmp_path / "text")
    first = FrozenText(family, PROMPTS, store)(PROMPTS)
    skipped = FrozenText(family, PROMPTS, store, clip_skip=1)(PROMPTS)
    assert not torch.equal(first["embeds"], skipped["embeds"]), "clip skip belongs in the key"
    family.free_text_encoders()
    again = FrozenText(family, PROMPTS, store)(PROMPTS)
    assert same_bits(first, again)


def test_a_start_reads_no_encoded_caption_and_a_damaged_one_is_encoded_anew(tiny_sdxl, tmp_path, monkeypatch):
    family, folder = load(tiny_sdxl), tmp_path / "text"
    text = FrozenText(family, PROMPTS, DiskStore(folder))
    before, damaged = text(PROMPTS), text.store._path(text.keys[PROMPTS[0]])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_entry", lambda path: pytest.fail("read at the start"))
        text = FrozenText(family, PROMPTS, DiskStore(folder))
    with pytest.raises(UserError, match="damaged"):
        text(PROMPTS)
    assert same_bits(before, FrozenText(family, PROMPTS, DiskStore(folder))(PROMPTS))


def test_a_half_cached_group_is_encoded_whole_and_what_was_there_stays(family, tmp_path):
    prompts = [f"{k} dog" for k in range(5)]
    whole, store = FrozenText(family, prompts), DiskStore(tmp_path / "text")
    theirs = {"embeds": torch.zeros(77, 56), "pooled": torch.zeros(32)}  # in truth the same but for its last bits
    store[whole.keys["2 dog"]] = theirs
    restarted, new = FrozenText(family, prompts, store), [p for p in prompts if p != "2 dog"]
    assert same_bits(whole(new), restarted(new))
    assert torch.equal(restarted(["2 dog"])["embeds"][0], theirs["embeds"]), "another run may be reading this entry"


# ----------------------------------------------------------------------------------------------------------------------
# Model


def test_every_base_weight_is_frozen_and_only_the_unet_takes_the_weight_dtype(tiny_sdxl):
    family = load(tiny_sdxl, torch.bfloat16)
    parts = [family.denoiser, family.vae, *family.text_encoders]
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    assert [next(part.parameters()).dtype for part in parts] == [torch.bfloat16] + [torch.float32] * 3
    with torch.no_grad():
        assert {t.dtype for t in family.encode_prompts(PROMPTS).values()} == {torch.bfloat16}


def test_latents_scale_and_decode_as_the_vae_config_says(family, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "use_slicing", True)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, logvar = family.encode_pixels(pixels)
    stock = pipeline.vae.encode(pixels).latent_dist
    assert torch.equal(mean, stock.mean) and torch.equal(logvar, stock.logvar)
    x0 = latents_of(family, mean)
    torch.testing.assert_close(x0, mean * 0.6)
    assert x0.shape == (2, family.latent_channels, 64 // family.vae_factor, 64 // family.vae_factor)
    with torch.no_grad():
        wanted = pipeline.image_processor.postprocess(pipeline.vae.decode(x0 / 0.6).sample, output_type="pil")
    assert [p.tobytes() for p in family.decode(x0)] == [p.tobytes() for p in wanted]


def test_latent_statistics_of_a_config_are_removed_and_put_back(copy):
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.5]
    edit_json(copy / "vae/config.json", latents_mean=mean, latents_std=std)
    family = load(copy)
    sample = torch.randn(2, 4, 8, 8)
    x0 = latents_of(family, sample)
    torch.testing.assert_close(x0[:, 1], (sample[:, 1] + 1) * 0.6 / 2)
    raw = x0 / 0.6 * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(raw, sample)
    with torch.no_grad():
        wanted = (family.vae.decode(sample).sample / 2 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1)
    for image, pixels in zip(family.decode(x0), wanted, strict=True):
        assert (torch.from_numpy(np.array(image)) - pixels).abs().max() < 0.51, "the VAE is given the raw latents again"


def test_denoise_asks_the_unet_what_the_stock_pipeline_would(family, pipeline):
    z, level = torch.randn(2, 4, 16, 16), family.schedule.at(torch.tensor([3, 900]))
    time_ids = torch.tensor([[640, 480, 0, 8, 64, 64], [64, 64, 4, 0, 64, 64]])
    with torch.no_grad():
        condition = Condition(family.encode_prompts(PROMPTS[:2]), time_ids=time_ids)
        added = {"text_embeds": condition["pooled"], "time_ids": time_ids.float()}
        out = family.denoise(z, level, condition)
        stock = pipeline.unet(z, level.cond, encoder_hidden_states=condition["embeds"], added_cond_kwargs=added).sample
    assert torch.equal(out, stock)


def test_denoise_calls_the_familys_unet(tiny_sdxl):
    family, calls = load(tiny_sdxl), []
    unet = family.denoiser
    family.denoiser = lambda *a, **k: (calls.append(1), unet(*a, **k))[1]
    with torch.no_grad():
        condition = Condition(family.encode_prompts(["a dog"]), time_ids=torch.full((1, 6), 64))
    family.denoise(torch.randn(1, 4, 16, 16), family.schedule.at(torch.tensor([3])), condition)
    assert calls


def test_sizes_are_not_rounded_in_half_precision(tiny_sdxl):
    family, seen = load(tiny_sdxl, torch.bfloat16), []
    family.denoiser = lambda *a, added_cond_kwargs, **k: (seen.append(added_cond_kwargs["time_ids"]), (a[0],))[1]
    condition = Condition(embeds=torch.zeros(1, 77, 56), pooled=torch.zeros(1, 32), time_ids=torch.full((1, 6), 1023))
    family.denoise(torch.zeros(1, 4, 16, 16), family.schedule.at(torch.tensor([3])), condition)
    assert (seen[0] == 1023).all()


def test_the_schedule_is_the_checkpoints_own(tiny_sdxl, tmp_path):
    from diffusers import DDPMScheduler

    family = load(build_tiny_sdxl(tmp_path / "v", prediction_type="v_prediction"))
    stock = DDPMScheduler.from_pretrained(tiny_sdxl, subfolder="scheduler")
    assert family.schedule.prediction_type == "v_prediction" and family.schedule.num_train_timesteps == 1000
    torch.testing.assert_close(family.schedule.a**2, stock.alphas_cumprod)


def test_another_vae_is_taken_from_the_root_of_its_folder(tiny_sdxl, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = tiny_vae()
    other.save_pretrained(tmp_path / "vae")
    family = load(tiny_sdxl, pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    weights, own = (vae.state_dict()["quant_conv.weight"] for vae in (family.vae, other))
    assert torch.equal(weights, own)


def test_variant_is_the_base_models_and_not_another_vaes(copy, tmp_path):
    shutil.copytree(copy / "vae", tmp_path / "vae")
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    vae = str(tmp_path / "vae")
    assert not sdxl.problems(str(copy), resolution=64, variant="fp16", vae_path=vae)
    assert load(copy, variant="fp16", pretrained_vae_model_name_or_path=vae).vae


def test_variant_names_the_weight_files(copy):
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert not sdxl.problems(str(copy), resolution=64, variant="fp16")
    assert load(copy, variant="fp16").denoiser
    found = sdxl.problems(str(copy), resolution=64)
    assert len(found) == 4 and all("--variant fp16" in p.fix and p.kind == "data" for p in found)


def test_identity_tells_models_apart_by_part_and_not_by_precision(tiny_sdxl, copy):
    from safetensors.torch import load_file, save_file

    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.weight"] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    one, other = load(tiny_sdxl).identity, load(copy).identity
    assert {part for part in one if one[part] != other[part]} == {"unet"}
    assert one == load(tiny_sdxl, torch.bfloat16).identity == load(tiny_sdxl, torch.float16).identity


def test_identity_is_that_of_the_weights_in_one_file_or_in_shards(tiny_sdxl, copy):
    family = load(tiny_sdxl)
    shutil.rmtree(copy / "unet")
    family.denoiser.save_pretrained(copy / "unet", max_shard_size="200KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    assert load(copy).identity == family.identity


def test_each_part_moves_to_the_device_when_it_is_first_asked(tiny_sdxl):
    there = torch.device("meta")
    family = sdxl.load(options(tiny_sdxl), device=there, weight_dtype=torch.float32)

    def on_device():
        parts = {"unet": family.denoiser, "vae": family.vae} | dict(enumerate(family.text_encoders))
        return {name for name, part in parts.items() if part.device == there}

    assert on_device() == set()
    family.encode_prompts(["a dog"])
    assert on_device() == {0, 1}
    family.free_text_encoders()
    assert on_device() == set()
    family.encode_pixels(torch.zeros(1, 3, 64, 64))
    assert on_device() == {"vae"}
    family.prepare_for_training(keep_vae=True)
    assert on_device() == {"unet", "vae"}


def test_the_skeleton_has_the_unets_module_paths_and_no_weights(family, tiny_sdxl):
    bones = sdxl.skeleton(str(tiny_sdxl))
    assert [path for path, _ in bones.named_modules()] == [path for path, _ in family.denoiser.named_modules()]
    assert all(p.is_meta for p in bones.parameters())


def test_freeing_the_vae_keeps_it_for_previews(tiny_sdxl):
    family = load(tiny_sdxl)
    family.free_vae()
    assert family.decode(torch.zeros(1, 4, 16, 16))[0].size == (64, 64)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_good_model_has_no_problems(tiny_sdxl):
    assert sdxl.problems(str(tiny_sdxl), resolution=64, vae_path=str(tiny_sdxl / "vae")) == []


BROKEN = {
    "not an SDXL model": lambda m: edit_json(m / "unet/config.json", addition_embed_type=None),
    "refiner": lambda m: edit_json(m / "model_index.json", text_encoder=[None, None]),
    "do not fit": lambda m: edit_json(m / "unet/config.json", in_channels=9),
    "EDM scheduler": lambda m: edit_json(m / "scheduler/scheduler_config.json", _class_name="EDMHeunScheduler"),
    "no UNet": lambda m: shutil.rmtree(m / "unet"),
    "no scheduler": lambda m: shutil.rmtree(m / "scheduler"),
    "no VAE": lambda m: shutil.rmtree(m / "vae"),
    "no safetensors": lambda m: (m / "unet/diffusion_pytorch_model.safetensors").rename(m / "unet/model.bin"),
    "not a Diffusers model folder": lambda m: (m / "model_index.json").unlink(),
    "model_index.json is damaged": lambda m: (m / "model_index.json").write_text('{"_class_name": "Sta'),
    "vae/config.json is damaged": lambda m: (m / "vae/config.json").write_bytes(b"\xff\x00"),
    "text_encoder/config.json is damaged": lambda m: (m / "text_encoder/config.json").write_text("[]"),
    "no text_encoder_2": lambda m: (m / "text_encoder_2/config.json").unlink(),
    "no tokenizer_2": lambda m: shutil.rmtree(m / "tokenizer_2"),
    "ends at SNR 0": lambda m: edit_json(m / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
    "prediction type 'sample'": lambda m: edit_json(m / "scheduler/scheduler_config.json", prediction_type="sample"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_unfit_model_is_refused_in_the_users_words(copy, what):
    BROKEN[what](copy)
    found = sdxl.problems(str(copy), resolution=64)
    assert len(found) == 1 and what in found[0].what and found[0].fix
    assert str(copy) in found[0].where or "--prediction_type" in found[0].where


def test_a_prediction_type_named_by_flag_counts_before_loading_too(copy):
    BROKEN["ends at SNR 0"](copy)
    assert sdxl.problems(str(copy), resolution=64, schedule=ScheduleChange("v_prediction")) == []


@pytest.mark.parametrize("timesteps, refused", [
    ((0, None), False), ((0, 1000), False), ((999, None), False), ((500, 501), False),
    ((0, 5000), True), ((1000, None), True), ((0, 1001), True), ((600, 500), False),  # the last: options/rules.py
])
def test_timesteps_the_model_lacks_are_refused_before_loading(tiny_sdxl, timesteps, refused):
    found = sdxl.problems(str(tiny_sdxl), resolution=64, timesteps=timesteps)
    assert [p.why for p in found] == ["the model has 1000"] * refused


@pytest.mark.parametrize("clip_skip, refused", [(None, False), (0, False), (2, False), (3, True), (50, True)])
def test_a_clip_skip_beyond_the_encoders_layers_is_refused(tiny_sdxl, family, clip_skip, refused):
    found = sdxl.problems(str(tiny_sdxl), resolution=64, clip_skip=clip_skip)
    assert [p.fix.partition(" at most")[0] for p in found] == ["--clip_skip 2"] * 2 * refused
    if not refused:
        assert family.encode_prompts(["a dog"], clip_skip)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer"])
def test_a_file_cut_short_is_a_user_error_that_names_the_part(copy, part):
    for file in [*(copy / part).glob("*.safetensors"), *(copy / part).glob("tokenizer.json")]:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part} cannot be loaded") as caught:
        load(copy)
    assert caught.value.exit_code == 3 and str(copy) in caught.value.problems[0].where


def test_all_problems_of_a_model_come_at_once(copy):
    BROKEN["EDM scheduler"](copy)
    BROKEN["no safetensors"](copy)
    assert len(sdxl.problems(str(copy), resolution=70)) == 3


@pytest.mark.parametrize("resolution, near", [(70, 64), (72, 64), (8, 16), (0, 16), (1000, 992)])
def test_a_resolution_the_model_cannot_take_names_the_nearest_it_can(tiny_sdxl, resolution, near):
    problem, = sdxl.problems(str(tiny_sdxl), resolution=resolution)
    assert problem.fix == f"--resolution {near}" and "VAE factor 4 × UNet stride 4" in problem.why


@pytest.mark.parametrize("path", ["no/such/folder/at/all", "/nowhere", "owner/unknown-model"])
def test_a_model_that_is_not_there_is_one_problem(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem, = sdxl.problems(path, resolution=64)
    assert path in problem.where


def test_a_missing_vae_folder_is_named_by_its_own_flag(tiny_sdxl, tmp_path):
    problem, = sdxl.problems(str(tiny_sdxl), resolution=64, vae_path=str(tmp_path / "none"))
    assert problem.where.startswith("--pretrained_vae_model_name_or_path")


# ----------------------------------------------------------------------------------------------------------------------
# Names

RELEASED = {  # names as they stand in SDXL LoRA files trained with kohya-ss/sd-scripts
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0":
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
    "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj":
        "lora_unet_middle_block_1_transformer_blocks_3_ff_net_0_proj",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2":
        "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_2",
    "up_blocks.1.attentions.2.proj_in": "lora_unet_output_blocks_5_1_proj_in",
    "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "up_blocks.2.resnets.0.conv_shortcut": "lora_unet_output_blocks_6_0_skip_connection",
    "mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
    "down_blocks.1.resnets.0.conv1": "lora_unet_input_blocks_4_0_in_layers_2",
    "conv_in": "lora_unet_input_blocks_0_0", "conv_out": "lora_unet_out_2",
    "add_embedding.linear_2": "lora_unet_label_emb_0_2", "time_embedding.linear_1": "lora_unet_time_embed_0",
}
LAYOUT = {
    "layers_per_block": 2, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


@pytest.mark.parametrize("path", RELEASED)
def test_webui_names_are_those_of_released_files(path):
    assert sgm.webui_name(path, LAYOUT) == RELEASED[path]
    assert sgm.module_name(RELEASED[path], LAYOUT) == path.replace(".", "_")


def test_every_layer_of_the_unet_has_a_name_and_every_name_reads_back(assets):
    unet = sdxl.skeleton(str(assets / "tiny-sdxl-icons"))
    layers = [path for path, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    names = {sgm.webui_name(path, unet.config): path for path in layers}
    assert len(names) == len(layers) > 200
    for name, path in names.items():
        assert sgm.module_name(name, unet.config) == path.replace(".", "_")
