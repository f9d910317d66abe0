"""Every number of a model's configs has bounds: what is outside is one message with file and value, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.support.files import edit_json
from trainkit.errors import UserError
from trainkit.families import numbers, sd, sdxl
from trainkit.families.pretrained import CLASS_INPUTS

FILES = {
    "unet/config.json": numbers.UNET, "vae/config.json": numbers.VAE, "text_encoder/config.json": numbers.TEXT_ENCODER,
    "text_encoder_2/config.json": numbers.TEXT_ENCODER, "scheduler/scheduler_config.json": numbers.SCHEDULER,
}
ODD = [0, -1, 10**30, float("nan"), float("-inf"), "64", True, {"a": 1}, [[]], [None], [10**9] * 3, [1] * 5_000, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(shutil.copytree(ROOT / "assets/tiny-sdxl-icons", tmp_path_factory.mktemp("values") / "model"))


def problems(model: Path, family=sdxl) -> list:
    return family.problems(str(model), resolution=64)


def with_value(folder: Path, file: str, key: str, value: object) -> list:
    """What is said against the model with another value; the file is as before afterwards."""
    path = folder / file
    before = path.read_text()
    try:
        edit_json(path, **{key: value})
        return problems(folder)
    finally:
        path.write_text(before)


def numeric(file: str) -> list[str]:
    config = json.loads((ROOT / "assets/tiny-sdxl-icons" / file).read_text())
    return [key for key, value in config.items() if key in FILES[file] or isinstance(value, (int, float))]


@pytest.mark.parametrize("file, key", [(file, key) for file in FILES for key in numeric(file)])
def test_no_value_of_a_number_ends_in_a_traceback(folder, file, key):
    """Each is taken as it is, or named with its file."""
    for value in ODD:
        for found in with_value(folder, file, key, value):
            assert file.partition("/")[0] in f"{found}" or key in f"{found}", f"{key} {value}: {found}"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_a_number_that_is_none_is_named_under_every_key_with_bounds(folder, file, value):
    for key, rule in FILES[file].items():
        if isinstance(rule, numbers.Number) and rule.low != float("-inf"):
            found = with_value(folder, file, key, value)
            said = f"{found[0].what} {found[0].why}"
            assert len(found) == 1 and file in said and f"{key} is" in said, key
            assert found[0].kind == "data" or key in CLASS_INPUTS, key  # those make it another kind of model


CASES = {
    "no channels": ("unet/config.json", dict(block_out_channels=[])),
    "negative channels": ("unet/config.json", dict(block_out_channels=[-32, 64, 64])),
    "a nested list of channels": ("unet/config.json", dict(block_out_channels=[[64], [96], [96]])),
    "channels are a text": ("unet/config.json", dict(block_out_channels="64")),
    "unknown blocks": ("unet/config.json", dict(down_block_types=["Nope"] * 3)),
    "blocks are a number": ("unet/config.json", dict(down_block_types=3)),
    "one block less": ("unet/config.json", dict(up_block_types=["UpBlock2D"] * 2)),
    "no groups": ("unet/config.json", dict(norm_num_groups=0)),
    "groups that do not divide": ("unet/config.json", dict(norm_num_groups=7)),
    "activation": ("unet/config.json", dict(act_fn="nope")),
    "switch in quotes": ("unet/config.json", dict(use_linear_projection="false")),
    "another text width": ("unet/config.json", dict(cross_attention_dim=225)),
    "another pooled width": ("unet/config.json", dict(projection_class_embeddings_input_dim=100)),
    "two outputs a latent": ("unet/config.json", dict(out_channels=8)),
    "classes": ("unet/config.json", dict(num_class_embeds=7)),
    "weights in 4 bits": ("unet/config.json", dict(quantization_config={"quant_method": "bitsandbytes"})),
    "text encoder in 8 bits": ("text_encoder_2/config.json", dict(quantization_config={"quant_method": "torchao"})),
    "VAE in 8 bits": ("vae/config.json", dict(quantization_config={"quant_method": "quanto"})),
    "layers without end": ("unet/config.json", dict(layers_per_block=10**9)),
    "transformers without end": ("unet/config.json", dict(transformer_layers_per_block=[1, 1, 10**9])),
    "VAE scale 0": ("vae/config.json", dict(scaling_factor=0)),
    "VAE scale below 0": ("vae/config.json", dict(scaling_factor=-0.18)),
    "VAE scale true": ("vae/config.json", dict(scaling_factor=True)),
    "VAE of grey images": ("vae/config.json", dict(in_channels=1)),
    "VAE blocks": ("vae/config.json", dict(down_block_types=["Nope"] * 3)),
    "VAE means of other channels": ("vae/config.json", dict(latents_mean=[0.0])),
    "VAE deviation 0": ("vae/config.json", dict(latents_std=[0.0] * 4)),
    "vocabulary": ("text_encoder/config.json", dict(vocab_size=10**10)),
    "heads that do not divide": ("text_encoder/config.json", dict(num_attention_heads=7)),
    "text activation": ("text_encoder_2/config.json", dict(hidden_act="nope")),
    "text epsilon": ("text_encoder/config.json", dict(layer_norm_eps=-1)),
    "text width as a text": ("text_encoder/config.json", dict(hidden_size="96")),
    "steps": ("scheduler/scheduler_config.json", dict(num_train_timesteps=10**9)),
    "no steps": ("scheduler/scheduler_config.json", dict(num_train_timesteps=0)),
    "half a step": ("scheduler/scheduler_config.json", dict(num_train_timesteps=1000.5)),
    "beta above 1": ("scheduler/scheduler_config.json", dict(beta_start=3, beta_end=-5)),
    "beta 0": ("scheduler/scheduler_config.json", dict(beta_start=0)),
    "beta schedule": ("scheduler/scheduler_config.json", dict(beta_schedule="../../x")),
    "beta schedule is a list": ("scheduler/scheduler_config.json", dict(beta_schedule=["linear"])),
    "betas of other steps": ("scheduler/scheduler_config.json", dict(trained_betas=[0.1, 0.2])),
    "betas of NaN": ("scheduler/scheduler_config.json", dict(trained_betas=[float("nan")] * 1000)),
    "spacing": ("scheduler/scheduler_config.json", dict(timestep_spacing="nope")),
    "flow matching": ("scheduler/scheduler_config.json", dict(_class_name="FlowMatchEulerDiscreteScheduler")),
    "EDM upside down": ("scheduler/scheduler_config.json", dict(
        _class_name="EDMEulerScheduler", sigma_min=9, sigma_max=1)),
    "EDM grid": ("scheduler/scheduler_config.json", dict(
        _class_name="EDMEulerScheduler", sigma_schedule="nope", sigma_min=0.002, sigma_max=80)),
    "EDM σ below 0": ("scheduler/scheduler_config.json", dict(_class_name="EDMEulerScheduler", sigma_data=-1)),
    "tokens": ("tokenizer/tokenizer_config.json", dict(model_max_length=True)),
    "infinite tokens": ("tokenizer/tokenizer_config.json", dict(model_max_length=float("inf"))),
    "NaN deep in a tokenizer": ("tokenizer/tokenizer_config.json", dict(added={"a": [float("nan")]})),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_right_is_named_with_its_file(tmp_path, name):
    file, changes = CASES[name]
    model = Path(shutil.copytree(ROOT / "assets/tiny-sdxl-icons", tmp_path / "model"))
    edit_json(model / file, **changes)
    found = problems(model)
    assert found, "accepted"
    assert any(file in f"{one.what} {one.why} {one.fix}" for one in found) and all(one.fix for one in found)


def test_everything_that_is_wrong_is_in_one_message(tmp_path):
    model = Path(shutil.copytree(ROOT / "assets/tiny-sdxl-icons", tmp_path / "model"))
    for file in FILES:
        key = next(key for key, rule in FILES[file].items() if isinstance(rule, numbers.Number))
        edit_json(model / file, **{key: -7})
    found = problems(model)
    assert [one.what.partition(" ")[0] for one in found] == [*FILES] and "is -7" in UserError(*found).report()


@pytest.mark.parametrize("asset, family", [("tiny-sdxl-icons", sdxl), ("tiny-sd-icons", sd)])
def test_the_shipped_models_are_fine(asset, family):
    assert problems(ROOT / "assets" / asset, family) == []


REAL = {  # of models on the Hub: values that look odd and are right
    "unet/config.json": [
        dict(attention_head_dim=[5, 10, 20], upcast_attention=None, sample_size=128, time_cond_proj_dim=None),
        dict(transformer_layers_per_block=[0, 2, 10], only_cross_attention=[True, False, False]),
        dict(reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1], mid_block_scale_factor=1.4142),
        dict(dropout=0, attention_head_dim=8, sample_size=[96, 64], norm_eps=1e-6)],
    "vae/config.json": [dict(scaling_factor=0.13025, latents_mean=None), dict(scaling_factor=1, shift_factor=0.1159),
                        dict(latents_mean=[-1.6574, 1.886, -1.383, 2.5155], latents_std=[8.4927, 5.9022, 6.5, 5.2])],
    "text_encoder/config.json": [dict(eos_token_id=2, bos_token_id=0, pad_token_id=1, dropout=0.0, projection_dim=768),
                                 dict(initializer_factor=1.0, layer_norm_eps=1e-5, eos_token_id=[49407, 2])],
    "scheduler/scheduler_config.json": [
        dict(lambda_min_clipped=float("-inf"), trained_betas=None, solver_order=2, sample_max_value=1.0),
        dict(clip_sample=False, steps_offset=1, sigma_min=None, timestep_spacing=None, num_train_timesteps=1000)],
}


@pytest.mark.parametrize("file, values", [(file, values) for file, some in REAL.items() for values in some])
def test_values_of_real_models_are_taken(file, values):
    assert not [*numbers.wrong_values(values, FILES[file])]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_under_any_key_is_taken_or_named(folder, data):
    file = data.draw(st.sampled_from([*FILES, "model_index.json", "tokenizer/tokenizer_config.json"]))
    keys = [*json.loads((folder / file).read_text())]
    for found in with_value(folder, file, data.draw(st.sampled_from(keys)), data.draw(JSON)):
        assert found.what and found.fix
