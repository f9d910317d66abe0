"""Defects of the Diffusers script, by the labels of docs/differences.md: each test fails where its defect is.

The docstrings say what the script does (huggingface/diffusers at 58eb52c; bare #numbers are its issues).
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.support import ROOT
from tests.support.compare import same_checkpoint, same_tensors
from tests.support.text import load_sdxl, text_of
from tests.support.tiny_models import build_tiny_sdxl
from tests.support.trainers import command, forked, forked_ranks, make_images, metrics
from train_dreambooth_lora_sdxl_advanced import Options
from trainkit import publish, rng
from trainkit.data.batch import collate
from trainkit.data.geometry import CropPolicy
from trainkit.data.loader import Images
from trainkit.data.rows import read_rows
from trainkit.data.sampler import Order, Shard
from trainkit.diffusion import draw_noise
from trainkit.errors import UserError
from trainkit.lora_files import LoraFiles
from trainkit.optim import make_optimizer
from trainkit.options import DataOptions, OptimizerOptions, PivotalOptions, RunOptions, TextOptions, parse
from trainkit.training.gradients import Gradients

pytestmark = pytest.mark.trains

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
NEW_TOKENS = PivotalOptions(train_text_encoder_ti=True)
TI = dict(train_text_encoder_ti=True, optimizer="prodigy", learning_rate=1.0, text_encoder_lr=0.5,
          checkpointing_steps=1, max_train_steps=None, num_train_epochs=1)  # 8 images by 2: 4 steps, pivot after 2
PRIOR = dict(with_prior_preservation=True, class_prompt="a drawing of a boat", num_class_images=3, prior_loss_weight=0)
CUTS = {"before the pivot": 1, "at the pivot": 2, "after the pivot": 3}


class Runs:
    """Runs of the trainer by name, each made once, when it is first asked for."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.folder = model, folder
        self.data = make_images(folder / "data", n=8)
        self.bare = make_images(folder / "bare", n=4, captions=False)
        self.classes = make_images(folder / "classes", n=3, captions=False)
        for name in (".DS_Store", "notes.md", "Thumbs.db", "subfolder/notes.txt"):
            (self.data / name).parent.mkdir(exist_ok=True)
            (self.data / name).write_bytes(b"no image")

    def __call__(self, name: str, *, data: Path | None = None, **flags: object) -> Path:
        """-> the output folder; `name` may have folders in it."""
        out = self.folder / "out" / name
        if not out.exists():
            flags |= {"class_data_dir": self.classes} if "class_prompt" in flags else {}
            done = forked(command(self.model, data or self.data, out, **flags), log=self.log(out))
            assert done.code == 0, f"{name}\n{done.output}"
        return out

    def log(self, out: Path) -> Path:
        return self.folder / f"{'-'.join(out.parts[-2:])}.log"

    def pivotal(self) -> Path:
        return self("deep/er/ti", **TI)


@pytest.fixture(scope="module")
def runs(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_sdxl, tmp_path_factory.mktemp("defects"))


@pytest.fixture(scope="module")
def watched(runs: Runs) -> Iterator[tuple[Path, list[str]]]:
    """A bf16 run of 3 steps with frozen text and previews -> its folder, and what was loaded and called, in order."""
    notes = runs.folder / "notes"
    with pytest.MonkeyPatch.context() as patch:
        spy_on_models(patch, notes)
        out = runs("watched", mixed_precision="bf16", max_train_steps=3, checkpointing_steps=1, learning_rate=1e-6,
                   validation_prompt="a TOK cat", num_validation_images=1)
    yield out, notes.read_text().splitlines()


def spy_on_models(patch: pytest.MonkeyPatch, notes: Path) -> None:
    """Let every model that is loaded or called, and the end of publishing, leave a line in the file."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def note(line: str) -> None:
        with notes.open("a") as file:
            file.write(f"{line}\n")

    def spied(kind: type, name: str, line) -> None:
        method = getattr(kind, name)

        def spy(*args: object, **kwargs: object) -> object:
            note(line(*args))
            return method(*args, **kwargs)

        patch.setattr(kind, name, spy)

    for kind in (DiffusionPipeline, UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection):
        spied(kind, "from_pretrained", lambda *args, kind=kind: f"load {kind.__name__}")
    spied(CLIPTextModelWithProjection, "forward", lambda *args: "encode")  # the second encoder
    spied(UNet2DConditionModel, "forward", lambda unet, *args: f"denoise {unet.training} {torch.is_grad_enabled()}")
    publish_here = publish.publish

    def published(options: RunOptions, exports: LoraFiles) -> object:
        files = publish_here(options, exports)
        dtypes = {str(p.dtype) for name, p in exports.family.denoiser.named_parameters() if "lora" not in name}
        note(f"published {' '.join(sorted(dtypes))}")
        return files

    patch.setattr(publish, "publish", published)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def rows_after(out: Path, step: int) -> dict[str, Tensor]:
    """The new tokens' rows in a checkpoint."""
    return load_file(out / f"checkpoint-{step}" / "text.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and bool(a) and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_d01_class_prompt_and_clip_skip_with_frozen_text(runs):
    """There: TypeError for prior preservation with frozen encoders, and their --clip_skip is ignored (since #8715)."""
    plain = runs("prior", data=runs.bare, max_train_steps=1, **PRIOR)
    skipped = runs("prior with clip_skip", data=runs.bare, max_train_steps=1, clip_skip=1, **PRIOR)
    assert losses(plain) != losses(skipped)


def test_d02_every_kind_of_text_is_tokenised_as_at_inference(tiny_sdxl):
    """There: prompts of frozen and of LoRA-trained encoders are trained without BOS and EOS (since #5883)."""
    from diffusers import StableDiffusionXLPipeline

    pipe, prompts = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), ["a photo of a dog", ""]
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    for concern in ({}, {"pivotal": NEW_TOKENS}, {"text": TextOptions(train_text_encoder=True)}):
        ours = text_of(load_sdxl(tiny_sdxl), [*prompts, "a TOK"], **concern)(prompts, 0)
        torch.testing.assert_close(dict(ours), {"embeds": embeds, "pooled": pooled}, rtol=0, atol=1e-6)


def test_d11_the_pooled_vector_is_the_end_tokens_beside_new_tokens(tmp_path):
    """There: with eos_token_id 2 it is taken at the largest id, a new token, which sees no word behind (#10754)."""
    old, new = (text_of(load_sdxl(build_tiny_sdxl(tmp_path / str(eos), eos_in_config=eos)), ["a TOK dog", "a TOK cat"],
                        pivotal=NEW_TOKENS) for eos in (False, True))
    dog, cat = old(["a TOK dog", "a TOK cat"])["pooled"]
    assert not torch.allclose(dog, cat, atol=1e-3), "what stands behind the tokens counts"
    assert torch.equal(torch.stack([dog, cat]), new(["a TOK dog", "a TOK cat"])["pooled"])


def test_d16_words_are_replaced_whole_and_must_be_there(runs):
    """There: TOK in TOK2 is replaced too, and a data set without the word trains tokens nobody shows."""
    words = PivotalOptions(train_text_encoder_ti=True, token_abstraction="TOK,TOK2,TOK3")
    assert words.rewrite("TOK2, TOK3 in a TOKEN of TOK") == "<s2><s3>, <s4><s5> in a TOKEN of <s0><s1>"
    argv = command(runs.model, runs.bare, runs.folder / "idle", train_text_encoder_ti=True, instance_prompt="a TOKEN")
    refused = forked(argv, log=runs.folder / "refused")
    assert refused.code == 3 and "no caption contains TOK" in refused.output, refused.output


def test_d17_frozen_encoders_are_let_go_and_never_loaded_again(watched, tiny_sdxl):
    """There: they stay on the device, each validation loads them again (#9358) and draws with dropout on."""
    family = load_sdxl(tiny_sdxl)
    encoders = [weakref.ref(encoder) for encoder in family.text_encoders]
    words = text_of(family)
    gc.collect()
    assert words and [encoder() for encoder in encoders] == [None, None]
    notes = watched[1]
    assert sum(line.startswith("load CLIP") for line in notes) == 2
    calls = [line for line in notes if line.startswith("denoise")]
    assert calls.count("denoise True True") == 3, "a training step each"
    assert set(calls) == {"denoise True True", "denoise False False"}, "previews are drawn with dropout off"


def test_d22_captions_of_frozen_encoders_are_encoded_once(watched):
    """There: both encoders run at every step when there are captions."""
    assert watched[1].count("encode") == 2, "8 captions in one batch, 2 prompts of previews in another"


# ----------------------------------------------------------------------------------------------------------------------
# Prior preservation and EDM


def test_d03_instances_keep_their_prompt_beside_class_images(runs):
    """There: prompts are tiled i,c,i,c against images i,i,c,c, so instances learn the class prompt (#12292)."""
    alone = runs("no prior", data=runs.bare, max_train_steps=1)
    beside = runs("prior", data=runs.bare, max_train_steps=1, **PRIOR)
    assert losses(beside) == pytest.approx(losses(alone), rel=1e-5), "at weight 0 class images count for nothing"


@pytest.mark.parametrize("batch", [1, 2])
def test_d05_instances_keep_their_own_edm_weights_beside_class_images(runs, batch):
    """There: weights of the whole batch meet half of the errors: both count at batch 1, RuntimeError at 2 (#13743)."""
    edm, cut = dict(do_edm_style_training=True, max_train_steps=1, data=runs.bare), 2 // batch
    alone = runs("edm", **edm)
    beside = runs(f"edm, prior {batch}", **edm, **PRIOR, train_batch_size=batch, gradient_accumulation_steps=cut)
    assert losses(beside) == pytest.approx(losses(alone), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_d04_cached_latents_keep_their_captions_and_sizes(runs):
    """There: the cache follows a first shuffle's steps, so later latents meet other images' captions (cf. #13712)."""
    steps = dict(max_train_steps=6, train_batch_size=2, center_crop=True)
    live, cached = runs("live", **steps), runs("cached", cache_latents=True, **steps)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4) and len({*losses(live)}) == 6


def test_d13_the_recorded_corner_is_the_one_that_was_cut_of_a_single_image_too(tmp_path):
    """There: a single image's random crop is recorded as centred, except with --repeats, whose copies it counts."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (32, 96, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    for repeats in (1, 3):
        options = DataOptions(instance_data_dir=str(tmp_path), instance_prompt="TOK", resolution=32, repeats=repeats)
        images = Images(read_rows(options)[0], CropPolicy.from_options(options), seed=0)
        samples = [images[Order(images.rows, 1, seed=0).slot(step, 0)] for step in range(8)]
        recorded = [int(collate([sample]).time_ids[0, 3]) for sample in samples]
        assert recorded == [round(float((sample.pixels[0, 0, 0] + 1) / 2 * 255 / 2)) for sample in samples]
        assert len(set(recorded)) > 4, "crops are random"


def test_d25_only_images_are_read_and_only_results_are_uploaded(runs):
    """There: every entry of the folder is opened as an image; the upload is public, with checkpoints (#8225)."""
    out = runs.pivotal()
    assert len(losses(out)) == 4 and metrics(out)[-1]["images"] == 8, "an epoch is the 8 images"
    weights = [out / name for name in (DIFFUSERS_FILE, "ti.safetensors", "ti_emb.safetensors")]
    names = {path.relative_to(out).as_posix() for path in publish.uploads(out, weights)}
    assert names == {DIFFUSERS_FILE, "ti.safetensors", "ti_emb.safetensors", "README.md", "report.html"}
    assert RunOptions().hub_private


# ----------------------------------------------------------------------------------------------------------------------
# Pivotal tuning


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_d06_a_resumed_run_is_the_uninterrupted_one_on_either_side_of_the_pivot(runs, cut):
    """There: a resumed run starts with new random embeddings, under moments of the old ones, and forgets the pivot."""
    whole = runs.pivotal()
    resumed = runs(f"from {cut}/ti", **TI, resume_from_checkpoint=whole / f"checkpoint-{cut}")
    same_checkpoint(whole / "checkpoint-4", resumed / "checkpoint-4")
    for name in (DIFFUSERS_FILE, "ti_emb.safetensors"):
        same_tensors(whole / name, resumed / name)
    assert losses(resumed) == losses(whole)[cut:]


def test_d07_every_file_lands_in_a_nested_absolute_folder(runs):
    """There: the last save repeats --output_dir in its path and fails, after hours of training (#6685)."""
    out = runs.pivotal()
    assert out.is_absolute() and out.parts[-3:] == ("deep", "er", "ti")
    wanted = {DIFFUSERS_FILE, "ti.safetensors", "ti_emb.safetensors", "README.md", "report.html"}
    assert wanted <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.rglob("ti_emb.safetensors") if path.parent == out / "checkpoint-4"], "with each"


def test_d08a_prodigy_takes_unequal_rates(runs):
    """There: Prodigy with pivotal tuning and any --text_encoder_lr but the UNet's, as by default: RuntimeError."""
    first = metrics(runs.pivotal())[0]
    assert (first["lr/unet"], first["lr/tokens"]) == (1.0, 0.5)


def test_d08b_after_the_pivot_no_bit_moves_under_prodigy(runs):
    """There: the pivot sets the rate to 0, at which Prodigy goes on along its momentum and decays."""
    out = runs.pivotal()
    assert not equal(rows_after(out, 1), rows_after(out, 2)), "trained up to the pivot"
    assert equal(rows_after(out, 2), rows_after(out, 3)) and equal(rows_after(out, 2), rows_after(out, 4))
    assert equal(rows_after(out, 2), load_file(out / "ti_emb.safetensors"))
    unet = [load_file(out / f"checkpoint-{step}" / "adapters.safetensors") for step in (2, 4)]
    assert not equal(*unet)


def test_d08c_prodigys_step_size_for_the_tokens_is_theirs_alone():
    """There: one d for all, estimated from UNet, tokens and restored rows of the vocabulary together."""
    def estimate(others_gradient: float) -> float:
        rows, other = (torch.nn.Parameter(torch.ones(2, 4)) for _ in range(2))
        groups = [{"name": name, "params": [p], "lr": 1.0, "weight_decay": 0.0}
                  for name, p in (("tokens", rows), ("unet", other))]
        optimizer = make_optimizer(groups, OptimizerOptions(optimizer="prodigy", lr_scheduler="constant"), 9)
        for step in range(40):
            optimizer.begin(step)
            rows.grad, other.grad = torch.full_like(rows, 0.1), torch.full_like(other, others_gradient)
            optimizer.step()
        return optimizer.describe()["d/tokens"]

    assert estimate(1.0) == estimate(1e3) > 1e-6, "it grew from its start and asks nobody else"


def test_d10_final_images_show_the_learned_tokens(runs):
    """There: the last images read <s0><s1> as plain text, since the embeddings are not loaded (lost in #8406)."""
    out = runs("tokens alone", train_text_encoder_ti=True, train_text_encoder_ti_frac=1.0, train_unet_frac=0,
               text_encoder_lr=1.0, validation_prompt="TOK, TOK", num_validation_images=1)
    first, last = (np.asarray(Image.open(out / "samples" / f"step_{step:06d}_p01_s0.png"), np.int16) for step in (0, 2))
    assert (first != last).mean() > 0.1, "nothing but the embeddings was trained"
    assert "load_textual_inversion" in (out / "README.md").read_text("utf-8")
    assert not (out / DIFFUSERS_FILE).exists()


def test_d12_the_new_rows_are_all_that_is_trained_clipped_and_remembered(runs, tiny_sdxl):
    """There: the whole vocabulary is optimized, counts in the clipped norm, and is restored at every micro-step."""
    family = load_sdxl(tiny_sdxl)
    tables = [encoder.get_input_embeddings().weight for encoder in family.text_encoders]
    before = [table.clone() for table in tables]
    words = text_of(family, pivotal=NEW_TOKENS)
    options = OptimizerOptions(lr_scheduler="constant")
    optimizer, gradients = make_optimizer(words.groups(options, 1), options, 4), Gradients(torch.device("cpu"))
    optimizer.begin(0)
    gradients.backward(sum(part.square().sum() for part in words(["a TOK dog", "a photo of a dog"], 0).values()))
    own = torch.cat([rows.grad.flatten() for rows in words.learner.rows]).norm().item()
    assert gradients.update(optimizer, step=0, max_grad_norm=1.0).grad_norm == pytest.approx(own)
    assert all(table.grad is None and not table.requires_grad for table in tables)
    assert all(torch.equal(*pair) for pair in zip(tables, before, strict=True))
    state = load_file(runs.pivotal() / "checkpoint-2" / "optimizer.safetensors")
    sizes = {t.numel() for name, t in state.items() if name.startswith("tokens/") and t.ndim}
    assert sizes == {2 * 24, 2 * 32}, "what Prodigy remembers of two rows in each encoder"


def test_d15_the_pivot_is_a_share_of_steps_and_ends_the_encoders_work(runs, tiny_sdxl):
    """There: it falls on whole epochs, so one epoch trains no tokens; after it the text's graph is still built."""
    assert ["lr/tokens" in row for row in metrics(runs.pivotal())] == [True, True, False, False], "one epoch"
    family = load_sdxl(tiny_sdxl)
    words = text_of(family, pivotal=NEW_TOKENS)
    asked = ["a TOK dog", "a TOK cat"]
    assert all(part.requires_grad for part in words(asked, 1).values())
    assert not any(part.requires_grad for part in words(asked, 2).values()) and not family.text_encoders


# ----------------------------------------------------------------------------------------------------------------------
# Adapters, text encoders' and DoRA's; the update


@pytest.fixture(scope="module")
def dora(runs: Runs) -> Path:
    return runs("dora", train_text_encoder=True, use_dora=True, checkpointing_steps=1, gradient_checkpointing=True)


def test_d09_the_webui_file_of_dora_and_text_encoders_has_the_names_uis_read(dora):
    """There: …_to_q_lora.down.weight and …lora_magnitude_vector, and no alpha (Comfy-Org/ComfyUI#3494)."""
    tensors = load_file(dora / "dora.safetensors")
    modules: dict[str, set[str]] = {}
    for name in tensors:
        module, _, part = name.partition(".")
        modules.setdefault(module, set()).add(part)
    assert all(parts == {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"} for parts in modules.values())
    assert {"lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_2_self_attn_out_proj"} <= modules.keys()
    assert {re.match("lora_(unet|te1|te2)_", module)[1] for module in modules} == {"unet", "te1", "te2"}
    for module in modules:
        up, scale = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.dora_scale"]
        assert scale.shape == (len(up), 1), "one magnitude for each output"


def test_d23_embedding_tables_beside_text_encoder_lora_get_no_gradient(dora, tiny_sdxl):
    """There: whole tables require gradients for the sake of checkpointing, and nobody clears them."""
    family = load_sdxl(tiny_sdxl)
    words = text_of(family, text=TextOptions(train_text_encoder=True), gradient_checkpointing=True)
    sum(part.sum() for part in words(["a TOK dog"], 0).values()).backward()
    tables = [encoder.get_input_embeddings().weight for encoder in family.text_encoders]
    assert all(table.grad is None and not table.requires_grad for table in tables)
    grown = [p for network in words.networks for p in network.network.parameters() if p.grad is not None]
    trained = [p for group in words.groups(OptimizerOptions(), 1) for p in group["params"]]
    assert grown and {id(p) for p in grown} <= {id(p) for p in trained}
    state = load_file(dora / "checkpoint-2" / "optimizer.safetensors")
    assert not [name for name, t in state.items() if len(tables[0]) in t.shape], "as many rows as there are words"


def test_d14_under_bf16_small_updates_are_not_rounded_away(watched):
    """There: adapters and their moments are bf16, in which a rate of 1e-6 moves nothing (cf. #6514)."""
    out = watched[0]
    two, three = (load_file(out / f"checkpoint-{step}" / "adapters.safetensors") for step in (2, 3))
    state = load_file(out / "checkpoint-3" / "optimizer.safetensors")
    assert all(t.dtype == torch.float32 for t in [*two.values(), *state.values()])
    moved = torch.cat([(two[name] != three[name]).flatten() for name in two])
    assert moved.float().mean() > 0.5


def test_d24_zero_is_zero_false_is_false_and_a_slip_is_an_error(runs, tiny_sdxl):
    """There: a text rate or decay of 0 falls back, =False is True, an unknown optimizer becomes AdamW."""
    out = runs("zero", train_text_encoder_ti=True, text_encoder_lr=0, token_std_pull=0, checkpointing_steps=1,
               train_text_encoder_ti_frac=1.0)
    assert equal(rows_after(out, 1), rows_after(out, 2)) and "lr/tokens" not in metrics(out)[0], "out of every update"
    text = TextOptions(train_text_encoder=True, adam_weight_decay_text_encoder=0)
    groups = text_of(load_sdxl(tiny_sdxl), text=text).groups(OptimizerOptions(adam_weight_decay=0.1), 1)
    assert len(groups) == 2 and all(group["weight_decay"] == 0 for group in groups)
    argv = command(runs.model, runs.bare, out)
    assert parse(Options, [*argv, "--prodigy_decouple=False"], description="").optimizer.prodigy_decouple is False
    with pytest.raises(UserError, match="adamv"):
        parse(Options, [*argv, "--optimizer=adamv"], description="")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def test_d20_every_rank_draws_its_own_noise_and_levels(tmp_path):
    """There: all ranks have one seed and so one noise and one timestep (huggingface/accelerate#236)."""
    options = DataOptions(instance_data_dir=str(make_images(tmp_path / "data", n=4)), instance_prompt="TOK")
    order = Order(read_rows(options)[0], 4, seed=0)
    keys = [key for rank in range(2) for key, *_ in order.slots(0, Shard(rank, world=2))[0]]
    assert len(rng.uniform(keys, "timestep").unique()) == 4
    assert all(len(noise.unique(dim=0)) == 4 for noise in draw_noise((4, 8, 8), keys))


def close_but_for_rounding(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Nearly all entries agree; Adam moves one whose gradient is rounding noise by a part of the rate, 1e-3 a step."""
    assert theirs.keys() == ours.keys()
    off = torch.cat([((theirs[name] - ours[name]).abs() - 1e-3 * ours[name].abs()).flatten() for name in ours])
    assert (off > 2e-5).float().mean() < 0.01 and off.max() < 1e-4, off.max()


def test_d21_two_processes_train_tokens_and_prior_as_one_does(tiny_sdxl, tmp_path):
    """There: only the UNet's gradients are shared, rank 0 alone saves and logs its own loss (#2606, #6705)."""
    changes = dict(train_text_encoder_ti=True, train_text_encoder_ti_frac=1.0, text_encoder_lr=1e-3, **PRIOR) | {
        "prior_loss_weight": 1.0, "class_data_dir": make_images(tmp_path / "class", n=3), "checkpointing_steps": 2}
    data = make_images(tmp_path / "data", n=5)
    one, two = tmp_path / "one" / "lora", tmp_path / "two" / "lora"
    alone = forked(command(tiny_sdxl, data, one, train_batch_size=2, **changes), log=tmp_path / "log")
    assert alone.code == 0, alone.output
    both = forked_ranks(command(tiny_sdxl, data, two, train_batch_size=1, **changes), log=tmp_path / "log")
    assert all(rank.code == 0 for rank in both), both
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name in (DIFFUSERS_FILE, "lora_emb.safetensors"):
        close_but_for_rounding(load_file(two / name), load_file(one / name))
    assert (two / "checkpoint-2" / "manifest.json").is_file()


# ----------------------------------------------------------------------------------------------------------------------
# The end


def test_d18_the_end_loads_no_second_model_and_keeps_the_precision(watched):
    """There: the whole UNet is upcast and a second pipeline loaded beside it: out of memory at the end (#10829)."""
    notes = watched[1]
    assert [line for line in notes if line.startswith("load") and "CLIP" not in line] == ["load UNet2DConditionModel"]
    assert notes[-1] == "published torch.bfloat16"


def test_d19_the_card_is_written_and_names_this_runs_base_and_files(runs):
    """There: the card is built but never written (since #7615), and names the stock SDXL and folders."""
    out = runs.pivotal()
    card = (out / "README.md").read_text("utf-8")
    assert all(name in card for name in (runs.model.name, "ti.safetensors", "ti_emb.safetensors", "<s0><s1>"))
    assert "stabilityai/" not in card and str(runs.folder) not in card


# ----------------------------------------------------------------------------------------------------------------------
# The list


def test_each_defect_has_one_row_in_the_docs_which_names_its_test():
    page = (ROOT / "docs" / "differences.md").read_text("utf-8")
    rows = re.findall(r"^\| D(\d+) \|.*test_upstream_defects\.py::test_d(\d+)", page, re.MULTILINE)
    assert sorted(int(label) for label, _ in rows) == [*range(1, 26)]
    assert all(int(label) == int(test) for label, test in rows)
