"""The end of a run: files that hold the trained weights, a card whose snippet runs, uploads by name."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from pydantic import SecretStr

from tests.support.made_up_run import HOSTILE, make_run
from trainkit import lora_files, rng
from trainkit import publish as room
from trainkit.adapters import BF16_ROUNDING, FP16_ROUNDING, Adapters, add_adapters, largest_change
from trainkit.errors import UserError
from trainkit.families import sdxl
from trainkit.files import atomic_write
from trainkit.lora_files import LoraFiles, header
from trainkit.options import LoraOptions
from trainkit.publish import problems, uploads, write_card
from trainkit.report import write_report
from trainkit.report.facts import RunFacts
from trainkit.runtime.weight_files import embeddings_file, step_name

TOKEN = "hf_plantedSecretToken123456"


def options(folder: Path, **changes) -> SimpleNamespace:
    defaults = dict(output_dir=str(folder), push_to_hub=False, hub_model_id=None, hub_token=None, hub_private=True,
                    keep_loras=True, output_kohya_format=False, metadata="full",
                    save_paper_dora=False, svd_rank=None)
    return SimpleNamespace(**defaults | changes)


def publish(options: SimpleNamespace, family: sdxl.SDXL, adapters: Adapters) -> list[Path]:
    return room.publish(options, LoraFiles(options, family, adapters, num_images=22))


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> sdxl.SDXL:
    model = SimpleNamespace(pretrained_model_name_or_path=str(tiny_sdxl), pretrained_vae_model_name_or_path=None,
                            revision=None, variant=None, vae_batch_size=1, base_precision=None)
    return sdxl.load(model, device=torch.device("cpu"), weight_dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(family: sdxl.SDXL) -> Adapters:
    made = add_adapters(family.denoiser, LoraOptions(rank=2, lora_alpha=1), targets=family.lora_targets, seed=0)
    with torch.no_grad():
        for path in made.layers:
            B = made.factors(path)[1]
            B.copy_(torch.randn(B.shape, generator=rng.generator("test", path)) / 10)
    return made


def card(folder: Path) -> tuple[dict, str]:
    _, matter, body = write_card(folder).read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(matter), body


def python_block(body: str) -> str:
    return re.search(r"```python\n(.*?\n)```", body, re.DOTALL)[1]


def test_a_run_ends_with_verified_files_a_card_and_a_report(family, adapters, tmp_path):
    folder = make_run(tmp_path / "my-icons")
    files = publish(options(folder), family, adapters)
    assert [f.name for f in files] == ["pytorch_lora_weights.safetensors", "my-icons.safetensors", "README.md",
                                       "report.html"]
    matter, body = card(folder)
    for file in RunFacts(folder).files:
        assert file.sha256 in body and file.sha256 in (folder / "report.html").read_text("utf-8")
    assert matter["base_model"] == "assets/tiny-sdxl-icons" or matter["base_model"] == "tiny-sdxl-icons"
    assert matter["tags"] == ["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl"]
    assert matter["widget"][0] == {"text": "3d icon in the style of TOK, a dog",
                                   "output": {"url": "samples/step_000030_p01_s0.png"}}


@pytest.fixture
def at_scale(adapters):
    """Multiplies what the adapters have learned, and gives it back afterwards."""
    kept = {path: adapters.factors(path)[1].detach().clone() for path in adapters.layers}

    def scale(by: float) -> None:
        with torch.no_grad():
            for path, B in kept.items():
                adapters.factors(path)[1].copy_(B * by)

    yield scale
    scale(1)


def told(adapters, folder: Path) -> list[str]:
    return [*room.standstills([adapters], RunFacts(folder))]


def test_adapters_that_hardly_moved_are_told_with_what_to_do(adapters, at_scale, tmp_path):
    """The measure is what rounding to fp16 does to a weight, 2⁻¹¹ of its size."""
    folder = make_run(tmp_path / "run")
    largest = largest_change(adapters, enough=math.inf)
    assert largest > FP16_ROUNDING and told(adapters, folder) == []
    at_scale(1.01 * FP16_ROUNDING / largest)
    assert told(adapters, folder) == []
    at_scale(0.99 * FP16_ROUNDING / largest)
    (sentence,) = told(adapters, folder)
    assert "the adapters of unet have hardly moved" in sentence and "--learning_rate" in sentence
    at_scale(0)
    assert "more than 0e+00 of their size" in told(adapters, folder)[0]


def test_one_layer_that_moved_is_enough(adapters, at_scale, tmp_path):
    at_scale(0)
    with torch.no_grad():
        adapters.factors(list(adapters.layers)[-1])[1].fill_(1)
    assert told(adapters, make_run(tmp_path / "run")) == []


@pytest.mark.parametrize("ds, size, told_of", [
    ([1e-6, 1e-6, 1.04e-6], 2 * FP16_ROUNDING, True),  # Prodigy grows its estimate from a tiny start, or has none
    ([1e-6, 1e-6, 4e-6], 2 * FP16_ROUNDING, False),
    ([1e-4, 1e-4, 1e-4], 2 * BF16_ROUNDING, False),  # a start that was given, and right
])
def test_a_step_size_that_never_left_its_start_is_told(adapters, at_scale, tmp_path, ds, size, told_of):
    at_scale(size / largest_change(adapters, enough=math.inf))
    folder = make_run(tmp_path / "run", optimizer="prodigy")
    rows = [{"step": i, "loss": 1.0, "lr/unet": 1.0, "d/unet": d, "d/tokens": 1.0} for i, d in enumerate(ds, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sentences = told(adapters, folder)
    assert len(sentences) == told_of
    assert not told_of or "In 3 steps, prodigy has found no step size: it is 1.0e-06" in sentences[0]


def test_the_end_of_a_run_warns_of_a_blank_lora_and_names_the_files(family, adapters, at_scale, tmp_path, caplog):
    at_scale(0)
    folder = make_run(tmp_path / "mine")
    with caplog.at_level("INFO", logger="trainkit"):
        publish(options(folder), family, adapters)
    assert "hardly moved" in next(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    end = [r.getMessage() for r in caplog.records if r.name == "trainkit.summary"]
    assert re.match(rf"Done +30 steps.*{folder}:", end[0])
    assert [line.split()[0] for line in end[1:]] == [
        "pytorch_lora_weights.safetensors", "mine.safetensors", "README.md", "report.html"]


def test_the_files_headers_describe_the_run_without_its_folders(family, adapters, tmp_path):
    from safetensors import safe_open

    folder = make_run(tmp_path / "my-icons", pretrained_model_name_or_path="/home/anna/base", snr_gamma=5.0)
    for path in publish(options(folder), family, adapters)[:2]:
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert header["ss_steps"] == "30" and header["ss_num_epochs"] == "6" and header["ss_min_snr_gamma"] == "5.0"
        assert header["modelspec.trigger_phrase"] == "3d icon in the style of TOK" and "ss_clip_skip" not in header
        assert "anna" not in str(header) and str(tmp_path) not in str(header)


def test_the_cards_snippet_draws_a_image(family, adapters, tiny_sdxl, tmp_path, monkeypatch):
    """As a user would: in the LoRA's folder, with the base model's folder beside the files."""
    folder = make_run(tmp_path / "run", pretrained_model_name_or_path=str(tiny_sdxl))
    publish(options(folder), family, adapters)
    (folder / tiny_sdxl.name).symlink_to(tiny_sdxl)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("diffusers.utils.logging._tqdm_active", False)
    snippet = python_block(card(folder)[1])
    exec(snippet.replace(").images[0]", ", num_inference_steps=2).images[0]"), {})
    assert Image.open("image.png").size == (64, 64)


@pytest.mark.parametrize("capability, dtype", [(None, "float32"), (7, "float16"), (8, "bfloat16")])
def test_the_cards_snippet_takes_fp16_only_where_there_is_no_bf16(tmp_path, monkeypatch, capability, dtype):
    """SDXL's own VAE overflows in fp16."""
    lines = python_block(card(make_run(tmp_path / "run"))[1]).splitlines()
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=capability))
    found: dict[str, object] = {}
    exec("\n".join(["import torch", *(line for line in lines if re.match("device|half|dtype", line))]), found)
    assert found["dtype"] is getattr(torch, dtype)


def table(body: str) -> dict[str, str]:
    """The rows of the card's settings."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body.partition("## Training")[2].partition("## Files")[0],
                           re.MULTILINE))


def test_the_card_tells_what_was_used_not_what_was_said(tmp_path):
    """Prodigy's text group has the UNet's rate, --use_8bit_adam another optimizer, P2 no Min-SNR gamma."""
    folder = make_run(tmp_path / "run", optimizer="adamw", use_8bit_adam=True, train_text_encoder=True,
                      text_encoder_lr=5e-6, loss_weighting="p2", snr_gamma=5.0, learning_rate=1e-4, lr_warmup_steps=500)
    rows = [json.dumps({"step": step, "lr/unet": lr, "lr/text_encoder": lr}) for step, lr in ((1, 0.0), (2, 1.0))]
    (folder / "metrics.jsonl").write_text("\n".join(rows), "utf-8")
    told = table(card(folder)[1])
    assert told["Optimizer"] == "adamw8bit" and told["Loss weighting"] == "p2" and told["Seed"] == "0"
    assert told["Learning rate, unet"] == told["Learning rate, text\\_encoder"] == "1"
    assert "Min-SNR gamma" not in told and "Warm-up, steps" not in told
    assert "5e-06" not in str(told) and "0.0001" not in str(told)
    described = header(RunFacts(folder), num_images=1, step=30)
    assert described["ss_optimizer"] == "adamw8bit" and not {"ss_min_snr_gamma", "ss_lr_warmup_steps"} & set(described)


def test_the_card_tells_every_choice_that_was_made_and_no_default(tmp_path):
    plain = table(card(make_run(tmp_path / "plain"))[1])
    made = {"lora_type": "lokr", "use_rslora": True, "init_lora_weights": "pissa", "loss_type": "huber",
            "do_edm_style_training": True, "with_prior_preservation": True, "prior_loss_weight": 0.0,
            "num_class_images": 48, "train_unet_frac": 0.5, "train_text_encoder_ti": True,
            "train_text_encoder_ti_frac": 0.25, "use_ema": True, "ema_decay": 0.9, "noise_offset": 0.05}
    chosen = table(card(make_run(tmp_path / "chosen", **made))[1])
    new = {name.replace("\\", ""): value for name, value in chosen.items() if name not in plain}
    assert new == {
        "Kind": "lokr", "rsLoRA": "True", "Start": "pissa", "Loss": "huber", "EDM training": "True",
        "Prior loss weight": "0.0", "Class images": "48", "Share of the steps, UNet": "0.5",
        "Share of the steps, new tokens": "0.25", "EMA decay": "0.9", "Noise offset": "0.05"}


def test_the_card_of_a_dora_sends_nobody_to_a_webui_that_cannot_draw_it(tmp_path):
    for name in ("dora", "plain"):
        folder = make_run(tmp_path / name, use_dora=name == "dora")
        (folder / f"{name}.safetensors").write_bytes(b"weights")
    body = card(tmp_path / "dora")[1]
    assert "| `dora.safetensors` | ComfyUI, Forge: see above |" in body
    assert "A1111 cannot use it" in body and "Comfy-Org/ComfyUI\\#15458" in body
    assert "A1111 cannot" in (write_report(tmp_path / "dora")).read_text("utf-8")
    body = card(tmp_path / "plain")[1]
    assert "| `plain.safetensors` | ComfyUI, A1111, Forge, InvokeAI |" in body and "DoRA" not in body


@pytest.mark.parametrize("flags, changed", [
    ({}, {}),
    ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
])
def test_the_snippets_scheduler_is_the_one_that_was_trained_on(tiny_sdxl, tmp_path, monkeypatch, flags, changed):
    folder = make_run(tmp_path / "run", pretrained_model_name_or_path=str(tiny_sdxl), **flags)
    (folder / tiny_sdxl.name).symlink_to(tiny_sdxl)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("diffusers.utils.logging._tqdm_active", False)
    lines = python_block(card(folder)[1]).splitlines()
    seen: dict = {}
    exec("\n".join(line for line in lines if not line.startswith(("pipe.load", "pipe.set", "image"))), seen)
    from diffusers import StableDiffusionXLPipeline

    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl).scheduler
    assert type(seen["pipe"].scheduler) is type(stock)
    now = {**seen["pipe"].scheduler.config}
    assert {name: now[name] for name in changed} == changed
    assert ("pipe.scheduler" in "\n".join(lines)) == bool(changed)


def test_a_file_that_does_not_hold_the_trained_weights_ends_the_run_badly(family, adapters, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    write = lora_files.write_kohya

    def damaged(*args, **more) -> None:
        write(*args, **more)
        path = args[2]
        data = bytearray(path.read_bytes())
        data[-2:] = b"\x00\x7c"  # an infinity in the last tensor
        path.write_bytes(bytes(data))

    monkeypatch.setattr(lora_files, "write_kohya", damaged)
    with pytest.raises(UserError) as caught:
        publish(options(folder), family, adapters)
    assert caught.value.problems[0].kind == "disk" and "run.safetensors" in str(caught.value)


def test_only_rank_0_writes_and_uploads_and_the_others_wait_for_it(family, adapters, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("trainkit.runtime.ranks.is_main", lambda: False)
    monkeypatch.setattr("trainkit.runtime.ranks.barrier", lambda: waited.append(1))
    monkeypatch.setattr("huggingface_hub.HfApi", None)  # calling it would fail
    folder = make_run(tmp_path / "run")
    before = sorted(folder.rglob("*"))
    asked = options(folder, push_to_hub=True, hub_token=SecretStr(TOKEN))
    assert publish(asked, family, adapters) == []
    assert sorted(folder.rglob("*")) == before and waited == [1]


def test_only_the_runs_own_files_are_described(family, adapters, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "someone_elses.safetensors").write_bytes(b"private")
    publish(options(folder), family, adapters)
    assert [f.name for f in RunFacts(folder).files] == ["pytorch_lora_weights.safetensors", "run.safetensors"]
    assert "someone_elses" not in (folder / "README.md").read_text("utf-8")


def test_hostile_prompts_change_neither_metadata_nor_snippet_nor_layout(tmp_path):
    prompt = HOSTILE + "\nlicense: mit\n```\n# Heading | cell"
    matter, body = card(make_run(tmp_path / "run", instance_prompt=prompt, validation_prompt=prompt))
    assert matter["instance_prompt"] == prompt and matter["license"] == "other"
    texts = [node.value for node in ast.walk(ast.parse(python_block(body))) if isinstance(node, ast.Constant)]
    assert prompt in texts, "the snippet draws exactly this prompt"
    _, body = card(make_run(tmp_path / "other", pretrained_model_name_or_path="/models/base\nimport this"))
    names = [name.name for node in ast.walk(ast.parse(python_block(body))) if isinstance(node, ast.Import)
             for name in node.names]
    assert names == ["torch"], "a folder's name became code"
    outside = re.sub(r"```.*?\n```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert "\n# Heading" not in body and not re.search(r"(?<!\\)<", outside)


def test_card_and_report_name_no_private_folder(tmp_path):
    matter, body = card(make_run(tmp_path / "run", pretrained_model_name_or_path="/home/anna/models/base",
                                 dataset_name="/home/anna/cats"))
    assert "anna" not in body + str(matter) and str(tmp_path) not in body
    assert matter["base_model"] == "base"


@pytest.mark.parametrize("base_card, licence", [
    ("---\nlicense: mit\n---\n# base", "mit"), ("---\ntags: [a]\n---\n", "other"), ("# no front matter", "other"),
    ("---\nlicense: [mit\n---\n", "other"), ("---\nlicense: mit\ndate: 2024-99-99\n---\n", "other"),
    ("---\nlicense: [mit, other]\n---\n", "other"), ("---\nlicense: caf\u00e9\n---\n".encode("latin-1"), "other"),
])
def test_the_licence_is_the_base_models_own_or_said_to_be_unknown(tmp_path, base_card, licence):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_bytes(base_card if isinstance(base_card, bytes) else base_card.encode())
    matter, body = card(make_run(tmp_path / "run", pretrained_model_name_or_path=str(base)))
    assert matter["license"] == licence
    assert ("was not found" in body) == (licence == "other")


# -- the Hub -----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Records what would be sent."""

    calls: dict[str, object] = {}

    def __init__(self, token: str | None = None):
        type(self).calls = {"token": token}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        self.calls.update(repo_id=repo_id, private=private)
        return SimpleNamespace(repo_id=repo_id, url=f"https://hub/{repo_id}")

    def create_commit(self, repo_id: str, *, operations: list, commit_message: str) -> None:
        self.calls["files"] = sorted(op.path_in_repo for op in operations)


@pytest.fixture
def cluttered(tmp_path: Path) -> Path:
    """A run directory with everything that must stay at home."""
    folder = make_run(tmp_path / "run", samples=(30,))
    for name in ("checkpoint-500/adapters.safetensors", "logs/events.out", "earlier/metrics.jsonl", "wandb/debug.log",
                 "cache/latents.safetensors", "someone_elses.safetensors", ".env", "samples/notes.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"private")
    return folder


def test_only_named_files_are_uploaded_to_a_private_repository(family, adapters, cluttered, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    asked = options(cluttered, push_to_hub=True, hub_model_id="anna/icons", hub_token=SecretStr(TOKEN))
    publish(asked, family, adapters)
    assert FakeHub.calls == {
        "token": TOKEN, "repo_id": "anna/icons", "private": True,
        "files": ["README.md", "pytorch_lora_weights.safetensors", "report.html", "run.safetensors",
                  "samples/step_000030.png", "samples/step_000030_p01_s0.png", "samples/step_000030_p01_s1.png"],
    }


def test_a_run_without_previews_uploads_its_card_weights_and_report(family, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    folder = make_run(tmp_path / "run", samples=(), validation_prompt=None)
    asked = options(folder, push_to_hub=True, hub_model_id="anna/icons", hub_token=SecretStr(TOKEN))
    publish(asked, family, adapters)
    assert FakeHub.calls["files"] == [
        "README.md", "pytorch_lora_weights.safetensors", "report.html", "run.safetensors"]
    matter, body = card(folder)
    assert "widget" not in matter and "![" not in body


def test_the_token_is_in_no_file(family, adapters, cluttered, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    publish(options(cluttered, push_to_hub=True, hub_token=SecretStr(TOKEN)), family, adapters)
    assert not [p for p in cluttered.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_samples_that_are_links_stay_at_home(cluttered):
    (cluttered / "samples" / "step_000031.png").symlink_to("/etc/hostname")
    assert not [p for p in uploads(cluttered, []) if p.is_symlink()]


def test_images_of_a_longer_run_in_the_same_folder_stay_at_home(family, adapters, cluttered, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    for name in ("step_000400.png", "step_000400_p01_s0.png", "step_other.png"):
        shutil.copy(cluttered / "samples" / "step_000030.png", cluttered / "samples" / name)
    publish(options(cluttered, push_to_hub=True, hub_token=SecretStr(TOKEN)), family, adapters)
    assert [f for f in FakeHub.calls["files"] if "samples" in f] == [
        "samples/step_000030.png", "samples/step_000030_p01_s0.png", "samples/step_000030_p01_s1.png"]
    assert "step_000400" not in (cluttered / "README.md").read_text("utf-8")


def test_a_failed_upload_says_what_is_safe_and_hides_the_token(family, adapters, cluttered, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError(f"401 for Bearer {TOKEN}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError) as caught:
        publish(options(cluttered, push_to_hub=True, hub_token=SecretStr(TOKEN)), family, adapters)
    assert TOKEN not in str(caught.value) and "--resume_from_checkpoint latest" in str(caught.value)
    assert (cluttered / "pytorch_lora_weights.safetensors").exists() and (cluttered / "README.md").exists()


@pytest.mark.parametrize("changes, complaints", [
    ({}, 0),
    ({"push_to_hub": True}, 1),
    ({"push_to_hub": True, "hub_token": SecretStr(TOKEN)}, 0),
    ({"push_to_hub": True, "hub_token": SecretStr(TOKEN), "hub_model_id": "a b/c"}, 1),
    ({"push_to_hub": True, "hub_model_id": "a/b/c"}, 2),
])
def test_what_would_fail_at_the_upload_is_said_at_the_start(tmp_path, monkeypatch, changes, complaints):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert len(list(problems(options(tmp_path / "run", **changes)))) == complaints


@pytest.mark.parametrize("name, what", [
    ("pytorch_lora_weights", "taken"), ("Pytorch_Lora_Weights", "taken"), ("sub/../pytorch_lora_weights/", "taken"),
    ("x" * 205, "too long"), ("é" * 103, "too long"), ("x" * 300, "too long"),
])
def test_a_folder_whose_name_cannot_name_the_webui_file_is_refused(tmp_path, name, what):
    problem, = problems(options(tmp_path / name))
    assert what in problem.what and problem.kind == "usage" and "--output_dir" in problem.where


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    name = "x" * 204
    assert not list(problems(options(tmp_path / name)))
    atomic_write(tmp_path / embeddings_file(step_name(name, 99_999_999)), b"")


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = write_card(make_run(tmp_path / "run"))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    shutil.rmtree(tmp_path / "run")
