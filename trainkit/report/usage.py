"""How to use what a run has written: Python for Diffusers, steps for user interfaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from trainkit.conditioning.new_tokens import ENCODERS, EOS_LINE
from trainkit.diffusion import ScheduleChange, effective_config
from trainkit.report.facts import RunFacts
from trainkit.runtime.weight_files import DIFFUSERS_FILE, low_rank_file

PIPELINES = {"stable-diffusion": "StableDiffusionPipeline", "stable-diffusion-xl": "StableDiffusionXLPipeline"}
YOUR_PROMPT = "your prompt"  # where the run was told none


@dataclass(frozen=True)
class Interface:
    """How to use the files in one user interface; words between backticks are literal."""

    name: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    diffusers: str
    interfaces: tuple[Interface, ...]


def usage(run: RunFacts) -> Usage:
    return Usage(diffusers_snippet(run), (Interface("ComfyUI", tuple(comfyui(run))),
                                          Interface("A1111 / Forge", tuple(webui(run)))))


def diffusers_snippet(run: RunFacts) -> str:
    """Python that loads the files and generates an image; user text goes in as string literals."""
    prompt = run.prompted(run.validation_prompt) or run.trigger or YOUR_PROMPT
    return "\n".join([
        *imports(run),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        "half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16",
        'dtype = half if device == "cuda" else torch.float32',
        *pipeline_lines(run),
        *scheduler_line(run),
        *lora_lines(run),
        *token_lines(run),
        f"image = pipe({quoted(prompt)}).images[0]",
        'image.save("image.png")',
        "",
    ])


def pipeline(run: RunFacts) -> str:
    """The pipeline class of the base model; before a file says which it is, the one that finds out."""
    return PIPELINES.get(run.base_series or "", "DiffusionPipeline")


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def imports(run: RunFacts) -> Iterator[str]:
    yield "import torch"
    yield f"from diffusers import {'AutoencoderKL, ' if run.vae else ''}{pipeline(run)}"
    if run.embeddings and run.hub_name:
        yield "from huggingface_hub import hf_hub_download"
    if run.embeddings:
        yield "from safetensors.torch import load_file"


def pipeline_lines(run: RunFacts) -> Iterator[str]:
    """The base model, with the VAE that was trained and previewed with where it is another one."""
    if run.vae:
        yield f"vae = AutoencoderKL.{reader(run.vae)}({quoted(run.vae)})"
    vae = ", vae=vae" if run.vae else ""
    if "/" not in run.base_model:
        kind = "file" if run.base_is_file else "folder"
        yield f"# {quoted(run.base_model)} was a {kind} on the computer of the training: write its path here"
    yield f"pipe = {pipeline(run)}.{reader(run.base_model)}({quoted(run.base_model)}{vae}).to(device, dtype)"


def reader(model: str) -> str:
    """Diffusers' function that reads a model; from one file, it gets the configs from the Hub."""
    return "from_single_file" if model.endswith(".safetensors") else "from_pretrained"


def scheduler_line(run: RunFacts) -> Iterator[str]:
    """The noise schedule that was trained on, where flags have changed the base model's.

    Diffusers reads none from a single file and takes that of SD 1.x, 2.x or SDXL as released.
    """
    prediction, rescaled = run.option("prediction_type"), bool(run.option("rescale_betas_zero_snr"))
    if run.base_is_file and run.header.get("modelspec.prediction_type") == "v":
        prediction, rescaled = "v_prediction", run.header.get("ss_zero_terminal_snr") == "True"
    changed = effective_config({}, ScheduleChange(prediction and str(prediction), rescaled))
    if changed:
        listed = ", ".join(f"{name}={quoted(v) if isinstance(v, str) else v}" for name, v in changed.items())
        yield f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {listed})"


def lora_lines(run: RunFacts) -> Iterator[str]:
    if run.has_lora:
        place = quoted(run.hub_name or ".")
        if not run.hub_name:
            yield f"# {place} is the folder of this file: start Python there, or write its path"
        yield f'pipe.load_lora_weights({place}, weight_name="{DIFFUSERS_FILE}", adapter_name="lora")'
        yield 'pipe.set_adapters("lora", 1.0)  # strength'


def token_lines(run: RunFacts) -> Iterator[str]:
    """One `load_textual_inversion` a text encoder."""
    if run.embeddings is None:
        return
    file = quoted(run.embeddings_file)
    place = f"hf_hub_download({quoted(run.hub_name)}, {file})" if run.hub_name else file
    yield f"embeddings = load_file({place})"
    yield f"tokens = {json.dumps(run.embeddings.names)}"
    for name, end in zip(ENCODERS, ("", "_2"), strict=True):
        yield f'pipe.load_textual_inversion(embeddings["{name}"], token=tokens,'
        yield f"                            text_encoder=pipe.text_encoder{end}, tokenizer=pipe.tokenizer{end})"
    if run.embeddings.sets_eos:
        yield "# this model's config has a wrong end token, and new tokens make it count"
        yield EOS_LINE


def comfyui(run: RunFacts) -> Iterator[str]:
    if run.has_lora:
        yield f"Put `{run.name}.safetensors` into `ComfyUI/models/loras/`."
        yield f"Add a `Load LoRA` node behind `Load Checkpoint` ({run.base_model}) and choose the file."
        yield ("Set `strength_model` and `strength_clip` to 1." if run.option("train_text_encoder") else
               "Set `strength_model` to 1. `strength_clip` changes nothing: no text encoder was trained.")
    if run.vae:
        yield (f"Connect a `Load VAE` node with the VAE {run.vae} to `VAE Decode`: it was trained and previewed with "
               "that one.")
    if run.is_dora:
        yield (f"Keep the strength at 1 and the base model {run.base_model} if you want exactly what was trained: the "
               "magnitudes of this DoRA are for ComfyUI's formula and this base's weights (Comfy-Org/ComfyUI#15458).")
    if run.embeddings:
        yield f"Put `{run.embeddings_file}` into `ComfyUI/models/embeddings/`."
    yield f"Write `{wording(run, f'embedding:{run.embeddings_stem}')}` in the positive prompt."
    yield from all_rows_at_once(run)


def webui(run: RunFacts) -> Iterator[str]:
    if run.is_dora:
        yield from dora_in_webuis(run)
    if run.has_lora and not run.is_dora:
        yield f"Put `{run.name}.safetensors` into `models/Lora/` and press Refresh in the Lora tab."
    if run.embeddings:
        yield f"Put `{run.embeddings_file}` into `embeddings/` and press Refresh in the Textual Inversion tab."
    yield f"Load the base model {run.base_model}."
    if run.vae:
        yield f"Choose the VAE {run.vae} under `SD VAE`: it was trained and previewed with that one."
    ending = f" <lora:{run.name}:1>" if run.has_lora else ""
    yield f"Prompt: `{wording(run, run.embeddings_stem)}{ending}`"
    yield from all_rows_at_once(run)


def dora_in_webuis(run: RunFacts) -> Iterator[str]:
    """Forge computes a DoRA as ComfyUI does; A1111 has another kind, and gets the plain LoRA where one was written."""
    yield f"In Forge: put `{run.name}.safetensors` into `models/Lora/` and press Refresh in the Lora tab."
    if run.setting("svd_rank"):
        yield (f"In A1111: put `{low_rank_file(run.name)}` there, a plain LoRA near the trained DoRA, and write its "
               "name in the prompt. A1111 knows another kind of DoRA.")
    else:
        yield "A1111 cannot use it: it knows another kind of DoRA. `--svd_rank=64` writes a plain LoRA for it."


def wording(run: RunFacts, name: str) -> str:
    """The instance prompt, else the validation prompt, with `name` for new tokens; else the name alone, or anything."""
    return run.spelled(name) or (name if run.embeddings else YOUR_PROMPT)


def all_rows_at_once(run: RunFacts) -> Iterator[str]:
    if run.embeddings and len(run.embeddings.tokens) > 1:
        listed = ", ".join(f"`{word}`" for word in run.embeddings.tokens)
        yield f"The file's name stands for all its vectors at once; to use {listed} apart, take Diffusers."
