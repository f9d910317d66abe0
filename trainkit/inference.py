"""A stock Diffusers pipeline with the LoRA and the new tokens of a run on it, and the images it generates.

The tools and the experiments share this. Large libraries are imported where they are used, so that a tool's --help is
fast.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.digests import remembered
from trainkit.errors import Problem, UserError, refuse
from trainkit.options.text_encoders import replace_words
from trainkit.runtime.weight_files import (
    DIFFUSERS_FILE,
    STEP,
    at_step,
    embeddings_file,
    run_name,
    step_files,
    step_name,
    step_of,
)

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin
    from PIL.Image import Image
    from torch import Generator, Tensor

    from trainkit.families.file_names import FileNames, ModulePlace
    from trainkit.families.pretrained import Repo
    from trainkit.lora_file import LoraFile
    from trainkit.lora_file.layer import LayerUpdate
    from trainkit.options.prompt_weights import WeightedText

Module = Any  # a torch Module with a weight
Pipeline = Any  # StableDiffusionPipeline or StableDiffusionXLPipeline; importing them takes seconds
DTYPES = ("float32", "float16", "bfloat16")
PREDICTION_TYPES = ("epsilon", "v_prediction")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # of a pipeline, where a LoRA may train
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
PICKLED = (".pt", ".bin", ".ckpt", ".pth")
CONVERSION = (  # of an embedding of A1111
    "python -c \"import torch, safetensors.torch as s; e = torch.load(r'{}', weights_only=True)['string_to_param']; "
    "s.save_file({{'emb_params': e['*'].detach().float().contiguous()}}, r'{}.safetensors')\"")
ANY_SIDE = 2**20  # pixels: any model halves it; the pipelines check the sides of the images


def unseen(done: float) -> None:
    """For whom nobody watches."""


def lora_file(path: Path) -> Path:
    """The LoRA file that a user names by itself, by the folder of its run or checkpoint, or as RUN@STEP.

    Where the checkpoint of that step is gone, the file for WebUIs that it left.
    """
    return of_step(path, lambda folder, name: folder / DIFFUSERS_FILE, "{}.safetensors")


def lora_and_strength(text: str) -> tuple[Path, float | None]:
    """What a user writes behind --lora: a file or folder as `lora_file` takes it, or that with :STRENGTH behind it.

    The part behind the last colon is a strength where it is a number and there is no file or folder of the whole name.
    """
    name, colon, end = text.rpartition(":")
    if colon and NUMBER.fullmatch(end) and not Path(text).exists() and not lora_file(Path(text)).exists():
        return Path(name), float(end)
    return Path(text), None


@cache
def lora_hash(file: Path) -> str:
    """What WebUIs write of a LoRA file: 12 digits of the SHA-256 of its tensors, without the header.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/hashes.py and extensions-builtin/Lora/network.py.
    """
    return remembered(file, "sha256 of tensors", digest_behind_header)[:12]


def digest_behind_header(file: Path) -> str:
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def model_hash(base: str) -> str:
    """What WebUIs write of a base model of one file: 10 digits of its SHA-256; "" for a folder."""
    from trainkit.files import sha256

    return remembered(Path(base), "sha256", sha256)[:10] if Path(base).is_file() else ""


def embeddings_of(path: Path) -> Path:
    """The file of new tokens that a user names in one of these ways."""
    return of_step(path, own_embeddings, "{}_emb.safetensors")


def lora_name(file: Path) -> str:
    """What an image sheet calls a LoRA file: dog of a run, dog@500 of its checkpoint, else the file's own name."""
    folder, step = file.parent, step_of(file.parent)
    if file.name != DIFFUSERS_FILE:
        return file.stem
    return folder.absolute().name if step is None else f"{folder.absolute().parent.name}@{step}"


def of_step(path: Path, in_folder: Callable[[Path, str], Path], beside: str) -> Path:
    run, step = at_step(path)
    if step is None:
        return in_folder(path, run_name(path)) if path.is_dir() else path
    name = run_name(run)
    in_checkpoint = in_folder(run / f"checkpoint-{step}", name)
    left = run / beside.format(step_name(name, step))
    return left if left.is_file() and not in_checkpoint.is_file() else in_checkpoint


def own_embeddings(folder: Path, name: str) -> Path:
    """Those of a run's or a checkpoint's folder; a checkpoint carries its run's name, and folders are renamed."""
    found = [path for path in folder.glob(embeddings_file("*")) if not STEP.search(path.name)]
    return found[0] if len(found) == 1 else folder / embeddings_file(name)


def missing_file(flag: str, file: Path, why: str) -> Problem:
    """A file that is not there; where a step of a run was asked for, which steps there are."""
    run = file.parent.parent
    in_checkpoints = [step_of(path.parent) for path in run.glob(f"checkpoint-*/{file.name}")]
    steps = sorted({*step_files(run, run_name(run)).values(), *(at for at in in_checkpoints if at is not None)})
    if steps and step_of(file.parent) is not None:
        return Problem(f"no file {file}", flag, f"{run} has files of the steps {', '.join(map(str, steps))}",
                       f"{flag} {run}@{steps[-1]}", "data")
    return Problem(f"no file {file}", flag, why, "name a file that is there, or the folder of a run", "data")


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def base_problems(base: str, embeddings: Path | None, *, sized: bool = True, prediction_type: str | None = None
                  ) -> list[Problem]:
    """What the small files, or the header, of the base model say against generating images with it.

    sized            whether the model must say how large its images are
    prediction_type  what the user says that it predicts
    """
    from trainkit.families.single_file import model_at

    repo = model_at(base, "--base")
    if found := repo.unreachable("model_index.json"):
        return found
    if repo.json("model_index.json") is None or repo.json("unet/config.json") is None:
        return [repo.problem("not a Stable Diffusion model folder", "model_index.json or unet/config.json is missing",
                             "--base FOLDER_OF_A_DIFFUSERS_MODEL (SDXL, SD 1.x or 2.x)", kind="data")]
    if found := [*repo.unsaid(prediction_type)] or family_problems(repo, prediction_type):
        return found
    if sized and repo.glance("unet/config.json").get("sample_size") is None:
        return [repo.problem("the model does not say how large its images are", "unet/config.json has no sample_size",
                             "add sample_size, pixels divided by 8, to unet/config.json", kind="data")]
    if embeddings and repo.json("text_encoder_2/config.json") is None:
        return [Problem("embeddings of two text encoders for a model with one", f"--embeddings {embeddings}",
                        f"{base} has no text_encoder_2: new tokens are trained on SDXL", "leave --embeddings out, or "
                        "name the SDXL model they were trained on with --base")]
    return embeddings_problems(repo, embeddings) if embeddings and embeddings.is_file() else []


def family_problems(repo: Repo, prediction_type: str | None) -> list[Problem]:
    """What keeps the model from being trained keeps it from generating images; flags of the trainers are not named."""
    from trainkit import families
    from trainkit.diffusion import ScheduleChange
    from trainkit.options import ModelOptions

    family = families.of(ModelOptions(pretrained_model_name_or_path=repo.path))
    return [replace(repo.problem(found.what.replace("trained", "used"), found.why, "name a complete SDXL, SD 1.x "
                                 "or 2.x base model, its weights in safetensors, with --base"), kind=found.kind)
            for found in family.problems(repo.path, resolution=ANY_SIDE, schedule=ScheduleChange(prediction_type))]


def embeddings_problems(repo: Repo, file: Path) -> list[Problem]:
    """Is it a file of a run's new tokens, as wide as the text encoders?"""
    from trainkit import lora_file
    from trainkit.conditioning.new_tokens import ENCODERS, read_header

    try:
        names, held = read_header(file).names, lora_file.read_header(file).shapes
        shapes = [tuple(held[name]) for name in ENCODERS]
    except UserError as error:
        return [replace(problem, what="no file of embeddings", where=f"--embeddings {file}")
                for problem in error.problems]
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return [Problem("no file of embeddings", f"--embeddings {file}", f"{error}".partition("\n")[0],
                        "give the path of the NAME_emb.safetensors that the run wrote", "data")]
    configs = [repo.glance(f"{folder}/config.json") for folder in ("text_encoder", "text_encoder_2")]
    wanted = [(len(names), config.get("hidden_size")) for config in configs]
    return [] if shapes == wanted else [
        Problem("the embeddings do not fit the base model", f"--embeddings {file}", f"their shapes are {shapes}, and "
                f"{wanted} are asked for", "name the base model they were trained on with --base", "data")]


def lora_problems(files: Sequence[Path], base: str) -> Iterator[Problem]:
    """What the headers of those files that are there say against using them on the base model."""
    from trainkit import lora_headers
    from trainkit.families.single_file import model_at

    unet = model_at(base, "--base").glance("unet/config.json")
    for file in (file for file in files if file.is_file() and file.suffix == ".safetensors"):
        yield from lora_headers.problems(file, unet)


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline, and what is put on it


def load_pipeline(base: str, dtype: str | None, prediction_type: str | None = None, *, aside: bool = False
                  ) -> Pipeline:
    """The stock pipeline of a base model, without what would paint over its images: watermark and safety checker.

    dtype            one of DTYPES; None: bfloat16 on a GPU, float32 on a CPU and on Apple's GPUs
    prediction_type  what the user says that it predicts; None: what its scheduler's config says
    aside            whether it stays in the memory of the machine, and its parts come to the GPU when they work
    """
    from trainkit.runtime.trackers import quiet_libraries

    quiet_libraries()
    from diffusers import AutoPipelineForText2Image

    from trainkit.devices import present
    from trainkit.diffusion import ScheduleChange, rescheduled
    from trainkit.families.pretrained import load_part
    from trainkit.families.single_file import model_at

    device = present()
    pipe = load_part(model_at(base, "--base"), AutoPipelineForText2Image, "", use_safetensors=True,
                     add_watermarker=False, safety_checker=None)
    pipe.scheduler = rescheduled(pipe.scheduler, ScheduleChange(prediction_type))
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # one image at a time: decoding takes most of the memory
    return pipe.to("cpu" if aside else device, dtype_on(device, dtype), silence_dtype_warnings=aside)


def dtype_on(device: torch.device, name: str | None) -> torch.dtype:
    """One of DTYPES; None: bfloat16 on a GPU, float32 on a CPU and on Apple's GPUs."""
    import torch

    return getattr(torch, name or ("float32" if device.type in ("cpu", "mps") else "bfloat16"))


def scheduler_of(pipe: Pipeline, name: str | None) -> SchedulerMixin:
    """The pipeline's own, or that of a name of trainkit/options/samplers.py on the model's schedule."""
    from trainkit.diffusion.samplers import sampler_on

    return sampler_on(pipe.scheduler.config, name) if name else pipe.scheduler


@contextmanager
def sampled_by(pipe: Pipeline, name: str | None) -> Iterator[None]:
    """The pipeline has the scheduler of this name inside."""
    before, pipe.scheduler = pipe.scheduler, scheduler_of(pipe, name)
    try:
        yield
    finally:
        pipe.scheduler = before


def networks(pipe: Pipeline) -> list[str]:
    return [name for name in NETWORKS if getattr(pipe, name, None) is not None]


def fuse_loras(pipe: Pipeline, loras: Sequence[tuple[Path, float]], *, blocks: Sequence[str] = (), keep: bool = False
               ) -> dict[Module, Tensor]:
    """Make LoRAs part of the weights, W + Σ strength · ΔW in fp32 -> with `keep`, the weights before it.

    loras   files of any layout and any kind, each with its strength, which may be negative or 0
    blocks  of each LoRA the factors on its strength, MID=0 IN04=0.5, see adapters/patterns.py; "" has none
    A DoRA's ΔW too is that of W as it is before all of them, so their order does not count.
    UserError: a file is damaged, or of another kind of model.
    """
    import torch

    from trainkit.lora_file import LoraFile

    updates: dict[Module, list[tuple[Path, str, float, LayerUpdate]]] = {}
    for (file, strength), text in zip(loras, blocks or [""] * len(loras), strict=True):
        found = LoraFile.read(file, names=names_of(pipe), where=f"--lora {file}")
        factors = block_factors(pipe, text, found.layers)
        for place, module in modules_of(pipe, found, file).items():
            changes = updates.setdefault(module, [])
            changes.append((file, place[1], strength * factors.get(place, 1.0), found.layers[place]))
        add_bundled(pipe, found)
    before: dict[Module, Tensor] = {}
    with torch.no_grad():
        for module, changes in updates.items():
            weight = module.weight
            W = weight.float().flatten(1)
            deltas = [strength * delta_of(W, layer, file, path) for file, path, strength, layer in changes if strength]
            if keep:
                before[module] = weight.detach().clone()
            weight.copy_(sum(deltas, W).view_as(weight))
    return before


def block_factors(pipe: Pipeline, text: str, places: Iterable[ModulePlace]) -> dict[ModulePlace, float]:
    """The factors that a text such as MID=0 IN04=0.5 puts on the strength of layers; others have 1."""
    from trainkit.adapters import patterns
    from trainkit.families import sgm

    numbered, found = sgm.numbered(pipe.unet.config), {}
    for network, path in places if text else ():
        pattern = patterns.read(text, network)
        key = patterns.key_for(path, pattern, numbered if network == "unet" else {})
        if key is not None:
            found[network, path] = pattern[key]
    return found


def delta_of(W: Tensor, layer: LayerUpdate, file: Path, path: str) -> Tensor:
    """ΔW of a module's W [out,in] at strength 1. UserError: it has another shape."""
    delta = layer.like(W).delta(W)
    if delta.shape != W.shape:
        refuse([does_not_fit(file, f"{path} is {tuple(W.shape)} in this model, and {tuple(delta.shape)} in the file")])
    return delta


def does_not_fit(file: Path, why: str) -> Problem:
    return Problem("the LoRA does not fit the base model", f"--lora {file}", why,
                   "name the base model it was trained on with --base", "data")


def names_of(pipe: Pipeline) -> FileNames:
    from trainkit.families.file_names import SD_NAMES, xl_names

    return xl_names(pipe.unet.config) if getattr(pipe, "text_encoder_2", None) is not None else SD_NAMES


def module_at(pipe: Pipeline, place: ModulePlace) -> Module | None:
    """The module of a pipeline that a file means; Transformers 5 has no "text_model" in some text encoders."""
    from trainkit.families.file_names import TEXT_MODEL

    network, path = place
    part = getattr(pipe, network, None)
    for name in (path, f"{TEXT_MODEL}{path}"):
        try:
            return part.get_submodule(name) if part is not None else None
        except AttributeError:
            continue
    return None


def modules_of(pipe: Pipeline, found: LoraFile, file: Path) -> dict[ModulePlace, Module]:
    """UserError: the model lacks a part of the LoRA."""
    modules = {place: module for place in found.layers if (module := module_at(pipe, place)) is not None}
    if not modules:
        refuse([does_not_fit(file, "it has no layer of this model")])
    if len(modules) < len(found.layers):
        refuse([does_not_fit(file, f"this model has {len(modules)} of its {len(found.layers)} layers")])
    return modules


def add_bundled(pipe: Pipeline, found: LoraFile) -> None:
    """Embeddings inside of the LoRA file, as tokens of their names."""
    parts = {"clip_l": (pipe.tokenizer, pipe.text_encoder)}
    if getattr(pipe, "text_encoder_2", None) is not None:
        parts["clip_g"] = (pipe.tokenizer_2, pipe.text_encoder_2)
    for name, encoders in found.embeddings.items():
        for encoder, rows in encoders.items():
            tokenizer, text_encoder = parts[encoder]
            if name not in tokenizer.get_vocab():
                pipe.load_textual_inversion(rows, token=name, tokenizer=tokenizer, text_encoder=text_encoder)


@contextmanager
def fused_loras(pipe: Pipeline, loras: Sequence[tuple[Path, float]], blocks: Sequence[str] = ()) -> Iterator[None]:
    """The LoRAs are part of the weights inside: images take no longer than with the base alone."""
    before = fuse_loras(pipe, loras, blocks=blocks, keep=True)
    yield
    for module, weight in before.items():
        module.weight.data.copy_(weight)


def add_new_tokens(pipe: Pipeline, file: Path) -> Callable[[str], str]:
    """Give the pipeline the new tokens of an embeddings file -> what puts their names for their words in a prompt."""
    from trainkit.conditioning.new_tokens import ENCODERS, read_header
    from trainkit.files import load_tensors

    header, rows = read_header(file), load_tensors(file)
    pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for name, (tokenizer, encoder) in zip(ENCODERS, pairs, strict=True):
        pipe.load_textual_inversion(rows[name], token=header.names, tokenizer=tokenizer, text_encoder=encoder)
    if header.sets_eos:
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    table = {word: "".join(names) for word, names in header.tokens.items()}
    return lambda prompt: replace_words(prompt, table)


def add_embedding(pipe: Pipeline, file: Path) -> Callable[[str], str]:
    """Give the pipeline the embedding of any program's file -> what puts its tokens for its word in a prompt.

    The word is the file's name without its ending, as in WebUIs, or the name that the file gives it. A file of a run
    of ours has its own words. UserError: it holds no embedding, or one of another kind of model.
    """
    from trainkit.conditioning.new_tokens import TOKENS, read_header

    found = read_embedding(file)
    if TOKENS in found.metadata and "" in found.embeddings:
        table = {word: "".join(names) for word, names in read_header(file).tokens.items()}
        named = [(read_header(file).names, found.embeddings[""])]
    else:
        named = [(token_names(name or file.stem, rows), rows) for name, rows in found.embeddings.items()]
        table = {name or file.stem: "".join(tokens)
                 for name, (tokens, _) in zip(found.embeddings, named, strict=True)}
    for tokens, rows in named:
        load_rows(pipe, tokens, rows, file)
    return lambda prompt: replace_words(prompt, table)


def read_embedding(file: Path) -> LoraFile:
    """UserError: it cannot be read, or holds no embedding."""
    from trainkit.lora_file import LoraFile

    where = f"--embedding {file}"
    if file.suffix in PICKLED:
        refuse([Problem(f"{file.name} is a pickled file", where, "such files could run code when they are read",
                        f"convert it, then name {file.stem}.safetensors: {CONVERSION.format(file, file.stem)}",
                        "data")])
    try:
        found = LoraFile.read(file, where=where)
    except UserError as error:
        raise UserError(*(replace(problem, what=f"the embedding {file.name} cannot be read")
                          for problem in error.problems)) from error
    if found.layers or not found.embeddings:
        refuse([Problem(f"{file.name} is no file of embeddings", where, "it is a LoRA" if found.layers else
                        "it has no rows for a text encoder", "name it with --lora" if found.layers else
                        "name another file", "data")])
    return found


def unreadable(loras: Sequence[Path], embeddings: Sequence[Path], base: str) -> Iterator[Problem]:
    """Files of LoRAs and embeddings that cannot be used, before a model is loaded for minutes."""
    from trainkit.families.file_names import SD_NAMES, xl_names
    from trainkit.families.single_file import model_at
    from trainkit.lora_file import LoraFile

    unet = model_at(base, "--base").glance("unet/config.json")
    names = xl_names(unet) if unet.get("addition_embed_type") == "text_time" else SD_NAMES
    for read, files in ((lambda file: LoraFile.read(file, names=names, where=f"--lora {file}"), loras),
                        (read_embedding, embeddings)):
        for file in dict.fromkeys(files):
            try:
                read(file)
            except UserError as error:
                yield from error.problems


def token_names(word: str, rows: Mapping[str, Tensor]) -> list[str]:
    return [f"<{word}-{k}>" for k in range(len(next(iter(rows.values()))))]


def load_rows(pipe: Pipeline, tokens: list[str], rows: Mapping[str, Tensor], file: Path) -> None:
    """New tokens for each text encoder of the pipeline. UserError: they are for other text encoders."""
    parts = {"clip_l": (pipe.tokenizer, pipe.text_encoder)}
    if getattr(pipe, "text_encoder_2", None) is not None:
        parts["clip_g"] = (pipe.tokenizer_2, pipe.text_encoder_2)
    wanted = {name: encoder.config.hidden_size for name, (_, encoder) in parts.items()}
    widths = {name: tensor.shape[-1] for name, tensor in rows.items()}
    if widths != wanted:
        refuse([Problem("the embedding does not fit the base model", f"--embedding {file}", f"its rows are "
                        f"{' and '.join(map(str, widths.values()))} wide, and the text encoders are "
                        f"{' and '.join(map(str, wanted.values()))} wide", "name the base model it was made for with "
                        "--base, or leave it out", "data")])
    for name, (tokenizer, encoder) in parts.items():
        pipe.load_textual_inversion(rows[name], token=tokens, tokenizer=tokenizer, text_encoder=encoder)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def tokenizers(pipe: Pipeline) -> list:
    return [one for one in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if one is not None]


def encode_prompts(pipe: Pipeline, prompts: Sequence[str], negative: Sequence[str] | None, *, max_chunks: int = 1,
                   clip_skip: int | None = None) -> dict[str, Tensor]:
    """Prompts as those arguments of the pipeline that take them encoded.

    negative    None: what the pipeline takes without a negative prompt
    max_chunks  of tokens that a long prompt is read in, as in training; with one, the pipeline itself encodes
    clip_skip   layers of the text encoders that are left out, as in training
    """
    if max_chunks == 1 and clip_skip is None:  # Diffusers 0.42 cannot leave out layers with Transformers 5
        return dict(zip(EMBEDS, pipe.encode_prompt(
            prompt=list(prompts), device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=negative and list(negative)), strict=False))  # SD has the first two
    import torch

    from trainkit.condition import equally_long

    given = _encoded_in_chunks(pipe, prompts, max_chunks, clip_skip)
    if negative is None and pipe.config.get("force_zeros_for_empty_prompt"):
        absent = [torch.zeros_like(tensor) for tensor in given]
    else:
        absent = _encoded_in_chunks(pipe, negative or [""] * len(prompts), max_chunks, clip_skip)
    embeds = equally_long([given[0], absent[0]])
    return dict(zip(EMBEDS, [*embeds, *given[1:], *absent[1:]], strict=False))


def encode_weighted(pipe: Pipeline, prompts: Sequence[WeightedText], negative: Sequence[WeightedText] | None, *,
                    max_chunks: int = 1, clip_skip: int | None = None) -> dict[str, Tensor]:
    """As `encode_prompts`, with the weights of words. What has no weights is the same, and so is the pooled text."""
    import torch

    from trainkit.condition import equally_long
    from trainkit.families import sd, sdxl

    plain = [one.text for one in negative] if negative else None
    given = encode_prompts(pipe, [prompt.text for prompt in prompts], plain, max_chunks=max_chunks,
                           clip_skip=clip_skip)
    encoders = networks(pipe)[1:]
    encode, parts = (sd.encode_weighted, pipe.text_encoder) if len(encoders) == 1 else (
        sdxl.encode_weighted, (pipe.text_encoder, pipe.text_encoder_2))
    for name, branch in zip(EMBEDS, (prompts, negative or ()), strict=False):
        if any(prompt.is_weighted for prompt in branch):
            rows = [encode(tokenizers(pipe), parts, prompt, clip_skip, max_chunks)[0].to(as_is) if prompt.is_weighted
                    else as_is for prompt, as_is in zip(branch, given[name], strict=True)]
            given[name] = torch.stack(equally_long(rows))
    return given | dict(zip(EMBEDS, equally_long([given[name] for name in EMBEDS[:2]]), strict=False))


def _encoded_in_chunks(pipe: Pipeline, prompts: Sequence[str], max_chunks: int, clip_skip: int | None
                       ) -> list[Tensor]:
    """-> [embeds [B,T,D]], and of SDXL the pooled text [B,P]."""
    from trainkit.families import sd, sdxl

    if hasattr(pipe, "text_encoder_2"):
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        return [*sdxl.encode(tokenizers(pipe), encoders, prompts, clip_skip, max_chunks)]
    return [sd.encode(tokenizers(pipe), pipe.text_encoder, prompts, clip_skip, max_chunks)]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def generate_images(pipe: Pipeline, prompts: Sequence[str], noise: Sequence[Generator], *, steps: int,
                    guidance_scale: float, batch_size: int, max_chunks: int = 1,
                    show: Callable[[float], None] = unseen) -> list[Image]:
    """An image of each prompt from its own starting noise, `batch_size` of them at once.

    max_chunks  of tokens that a long prompt is read in, as in training
    show        is told how many are done, a part of a batch after each denoising step
    """
    import torch

    images: list[Image] = []
    for start in range(0, len(prompts), batch_size):
        some = slice(start, start + batch_size)
        with torch.no_grad():
            text = encode_prompts(pipe, prompts[some], None, max_chunks=max_chunks)
        images += finite_images(
            pipe, **text, num_inference_steps=steps, guidance_scale=guidance_scale,
            generator=list(noise[some]), callback_on_step_end=after_denoising_step(show, start, len(prompts[some])))
        show(len(images))
    return images


def after_denoising_step(show: Callable[[float], None], done: int, size: int, *, passes: int = 1, before: int = 0
                         ) -> Callable[..., dict[str, object]]:
    """The pipeline's callback after each denoising step: with `done` images before, how far the batch of `size` is.

    passes  over each image, of which `before` are done
    The decoding that follows the last step counts as one step more.
    """
    def after_step(pipe: Pipeline, step: int, timestep: object, tensors: dict[str, object]) -> dict[str, object]:
        show(done + size * (before + (step + 1) / (pipe.num_timesteps + 1)) / passes)
        return {}

    return after_step


def finite_images(pipe: Pipeline, **settings: object) -> list[Image]:
    """What the pipeline generates. UserError: values that are not finite, which a PNG would show as black."""
    pixels = pipe(**settings, output_type="pt").images  # [B,3,H,W] in 0..1
    if not pixels.isfinite().all():
        dtype = str(pipe.unet.dtype).removeprefix("torch.")
        refuse([Problem("the model generated images of NaN or infinity", f"--dtype {dtype}",
                        "activations overflow the number format, or the weights of the model or the LoRA are damaged; "
                        "they were not saved", "--dtype float32, a smaller strength, or another file", "nonfinite")])
    return pipe.numpy_to_pil(pipe.image_processor.pt_to_numpy(pixels))
