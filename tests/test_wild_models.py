"""Base models as they are found: each is trained on, or refused in words that say which file, why and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_text_to_image_lora as trainer
from tests.support.made_up_pass import batch_of
from trainkit import export, families, preflight, preview, rng
from trainkit.adapters import add_adapters
from trainkit.condition import Condition
from trainkit.diffusion import ScheduleChange, draw_noise
from trainkit.errors import UserError
from trainkit.families import Family
from trainkit.families.pretrained import MODEL_FLAG, Repo, load_part
from trainkit.losses.objective import make_objective
from trainkit.losses.passes import Passes, always
from trainkit.options import OptionSet, parse
from trainkit.training.step import TrainStep

SIDE = 32
UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
Change = Callable[[Path], object]


# -- what is done to a good folder ------------------------------------------------------------------------------------


def edit(pattern: str, **changes: object) -> Change:
    """Other values in every JSON file of that name."""
    return rewritten(pattern, lambda values: {**values, **changes})


def without(pattern: str, *names: str) -> Change:
    return rewritten(pattern, lambda values: {name: v for name, v in values.items() if name not in names})


def rewritten(pattern: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def apply(model: Path) -> None:
        files = [*model.glob(pattern)]
        assert files
        for file in files:
            file.write_text(json.dumps(change(json.loads(file.read_text("utf-8")))), "utf-8")

    return apply


def sharded(model: Path) -> None:
    """Every part's weights in two files and an index, as large models are saved."""
    for file in [*model.glob("*/*.safetensors")]:
        tensors, stem = load_file(file), file.name.removesuffix(".safetensors")
        names = sorted(tensors)
        halves = {f"{stem}-0000{k}-of-00002.safetensors": names[k - 1::2] for k in (1, 2)}
        for name, held in halves.items():
            save_file({key: tensors[key] for key in held}, file.with_name(name), {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, held in halves.items()
                                                                for key in held}}
        file.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        file.unlink()


def in_fp16(model: Path, *, alone: bool = True) -> None:
    for file in [*model.glob("*/*.safetensors")]:
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor
                  for name, tensor in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        if alone:
            file.unlink()


def crowded(model: Path) -> None:
    """What else lies about in folders: other formats of the weights, a safety checker, documentation."""
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        (model / name).parent.mkdir()
        (model / name).write_text("{}")
    for name in ("v1-5-pruned.ckpt", "README.md", "model.safetensors", "unet/diffusion_pytorch_model.bin",
                 "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_flax_model.msgpack"):
        (model / name).write_bytes(b"not for us")
    edit("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         feature_extractor=["transformers", "CLIPImageProcessor"])(model)


def old_tokenizers(model: Path) -> None:
    """vocab.json and merges.txt in the place of tokenizer.json, and special tokens written out, as in 2022."""
    for file in [*model.glob("tokenizer*/tokenizer.json")]:
        known = json.loads(file.read_text("utf-8"))["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["merges"]]
        file.with_name("vocab.json").write_text(json.dumps(known["vocab"]), "utf-8")
        file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", "utf-8")
        file.unlink()
    rewritten("tokenizer*/tokenizer_config.json", lambda values: {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14", "tokenizer_class": "CLIPTokenizer",
        "pad_token": values["pad_token"], **{name: written_out(values[name])
                                             for name in ("bos_token", "eos_token", "unk_token")}})(model)


def written_out(token: str) -> dict[str, object]:
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}


def no_merges(model: Path) -> None:
    old_tokenizers(model)
    for file in [*model.glob("tokenizer*/merges.txt")]:
        file.unlink()


TRAINED: dict[str, Change] = {
    "no sample_size": without(UNET, "sample_size"),
    "sample_size null": edit(UNET, sample_size=None),
    "sample_size is a list": edit(UNET, sample_size=[16, 24]),
    "scheduler without prediction_type": without(SCHEDULER, "prediction_type"),
    "scheduler without its class and steps": without(SCHEDULER, "_class_name", "num_train_timesteps"),
    "scheduler of 2022": edit(SCHEDULER, _class_name="LMSDiscreteScheduler", trained_betas=None, clip_sample=False),
    "scheduler with nulls": edit(SCHEDULER, timestep_spacing=None, trained_betas=None, variance_type=None),
    "sharded": sharded,
    "fp16 beside fp32": lambda model: in_fp16(model, alone=False),
    "other files": crowded,
    "heads listed": edit(UNET, attention_head_dim=[2, 2, 2]),
    "heads, transformer layers and text width listed": lambda model: rewritten(UNET, lambda values: {
        **values, "cross_attention_dim": [values["cross_attention_dim"]] * 3})(model),
    "UNet config of 2022": edit(UNET, upcast_attention=None, class_embed_type=None, num_class_embeds=None,
                                _diffusers_version="0.6.0"),
    "UNet config with an unknown key": edit(UNET, of_another_version=3),
    "configs without their class": without("*/config.json", "_class_name", "_diffusers_version"),
    "VAE without scaling_factor": without(VAE, "scaling_factor"),
    "VAE of 2022": without(VAE, "sample_size", "force_upcast", "scaling_factor", "use_quant_conv"),
    "tokenizers without tokenizer.json": old_tokenizers,
    "tokenizers without their class": without("tokenizer*/tokenizer_config.json", "tokenizer_class"),
    "text encoders with nulls": edit("text_encoder*/config.json", gradient_checkpointing=None, dropout=0.0),
    "a bare model_index": without("model_index.json", "force_zeros_for_empty_prompt", "requires_safety_checker",
                                  "safety_checker", "feature_extractor", "image_encoder"),
}


def fewer_embeddings(model: Path) -> None:
    """As where a tokenizer was extended and the text encoder was not."""
    for folder in model.glob("text_encoder*"):
        file, = folder.glob("*.safetensors")
        tensors = load_file(file)
        name, = (name for name in tensors if name.endswith("token_embedding.weight"))
        tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, file, {"format": "pt"})
        edit(f"{folder.name}/config.json", vocab_size=len(tensors[name]))(model)


REFUSED: dict[str, tuple[Change, str]] = {  # and the file or folder that is named
    "scaling_factor null": (edit(VAE, scaling_factor=None), "vae/config.json"),
    "scaling_factor in quotes": (edit(VAE, scaling_factor="0.18215"), "vae/config.json"),
    "no tokenizer length": (without("tokenizer*/tokenizer_config.json", "model_max_length"), "tokenizer"),
    "tokenizer without an end": (edit("tokenizer*/tokenizer_config.json", model_max_length=10**30), "tokenizer"),
    "no merges": (no_merges, "tokenizer"),
    "heads null": (edit(UNET, attention_head_dim=None), "unet/config.json"),
    "layers null": (edit("text_encoder*/config.json", num_hidden_layers=None), "text_encoder"),
    "steps null": (edit(SCHEDULER, num_train_timesteps=None), "scheduler_config.json"),
    "unknown betas": (edit(SCHEDULER, beta_schedule="of another version"), "scheduler_config.json"),
    "layers beyond the weights": (edit("text_encoder*/config.json", num_hidden_layers=5), "text_encoder"),
    "a VAE of more layers": (edit(VAE, layers_per_block=2), "vae"),
    "a token without an embedding": (fewer_embeddings, "tokenizer"),
    "another vocabulary": (edit("text_encoder*/config.json", vocab_size=99), "text_encoder"),
    "no tokenizer inside": (lambda model: [file.write_text('{"model": null}')
                                           for file in model.glob("tokenizer*/tokenizer.json")], "tokenizer"),
    "a shard lost": (lambda model: (sharded(model), next(model.glob("unet/*-00002-*")).unlink()), "unet"),
    "text width missing": (without(UNET, "cross_attention_dim"), "unet"),
}


# -- how each is met --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(f"tiny_{request.param}"), tmp_path / "model"))


def options(model: Path, *more: str) -> OptionSet:
    argv = [f"--pretrained_model_name_or_path={model}", "--train_data_dir=data", f"--resolution={SIDE}", "--rank=2",
            "--validation_prompt=a cat", "--num_validation_images=1", *more]
    return parse(trainer.Options, argv, description="")


def loaded(opt: OptionSet) -> Family:
    """Raises UserError as a trainer would, before the weights are loaded or at that."""
    family_module = families.of(opt.model)
    found = preflight.check_model(opt, family_module).problems
    if found:
        raise UserError(*found)
    return family_module.load(opt.model, device=torch.device("cpu"), weight_dtype=torch.float32,
                              schedule=ScheduleChange.from_options(opt.objective))


def loss(family: Family, opt: OptionSet) -> Tensor:
    """Of two images, from their pixels."""
    keys = [(0, 0, place) for place in range(2)]
    batch = batch_of(keys, pixels=rng.normal((3, SIDE, SIDE), keys, "pixels").clamp(-1, 1), num_instance=2,
                     prompts=("a cat", "a dog"))

    def text(prompts: list[str], step: int | None = None) -> Condition:
        return family.encode_prompts(prompts)

    passes = Passes(always(make_objective(opt.objective, family.schedule)))
    with torch.no_grad():
        part, = TrainStep(family, text, draw_noise, passes, nullcontext)([batch])
    return part


@pytest.mark.trains
@pytest.mark.parametrize("name", TRAINED)
def test_a_model_as_it_is_found_is_trained_previewed_and_exported(model, name, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 1)
    TRAINED[name](model)
    opt = options(model)
    family = loaded(opt)
    assert loss(family, opt).isfinite()
    previews = preview.Previews(family, opt.validation, family.encode_prompts, tmp_path, seed=0, resolution=SIDE)
    assert len(previews.generate(0)) == 2
    adapters = add_adapters(family.denoiser, opt.lora, targets=family.lora_targets, seed=0)
    file = tmp_path / "lora.safetensors"
    export.write_kohya([adapters], family, file, {})
    export.verify(file, [adapters], family, layout="webui")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_read_is_refused_by_file(model, name):
    """One problem for each folder it is about, and no traceback."""
    change, file = REFUSED[name]
    change(model)
    with pytest.raises(UserError) as error:
        loaded(options(model))
    for problem in error.value.problems:
        assert file in f"{problem.what} {problem.where} {problem.why}"
        assert str(model) in problem.where and problem.fix
    folders = {path.name for path in model.iterdir() if path.name.startswith(file)}
    assert len(error.value.problems) <= max(1, len(folders))


def test_a_model_in_fp16_alone_is_refused_with_the_flag_that_takes_it(model):
    in_fp16(model)
    with pytest.raises(UserError) as error:
        loaded(options(model))
    assert all("--variant fp16" in problem.fix for problem in error.value.problems)
    opt = options(model, "--variant=fp16")
    assert loss(loaded(opt), opt).isfinite()


@pytest.mark.parametrize(("change", "sides"), [
    (edit(UNET, sample_size=[16, 24]), {"sd": "96x64", "sdxl": "96x64"}),
    (without(UNET, "sample_size"), {"sd": "512x512", "sdxl": "1024x1024"})])
def test_the_exported_file_says_width_and_height_that_the_model_was_made_for(model, change, sides, tmp_path):
    """Those of the released models where the model does not say."""
    change(model)
    opt = options(model)
    family = loaded(opt)
    adapters = add_adapters(family.denoiser, opt.lora, targets=family.lora_targets, seed=0)
    export.write_kohya([adapters], family, tmp_path / "lora.safetensors", {})
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.resolution"] == sides[type(family).__name__.lower()]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("can't allocate memory")], ids=repr)
def test_running_out_of_memory_while_loading_is_not_taken_for_a_damaged_file(error):
    class Part(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise error

    with pytest.raises(type(error)):
        load_part(Repo("model", MODEL_FLAG), Part, "unet")
