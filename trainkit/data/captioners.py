"""Models that say what an image shows: BLIP and Florence-2 in sentences, WD14-style ONNX taggers in tags."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainkit.data.sources.text import one_line
from trainkit.devices import present
from trainkit.errors import Problem, UserError, is_out_of_memory, refuse
from trainkit.families.pretrained import Repo, first_line, freeze, hub_errors, load_part, quiet_loading
from trainkit.reading import read_text

TAGS, GRAPH = "selected_tags.csv", "model.onnx"  # the files of a tagger
EXAMPLES = {  # what a model is called to the user: one that is on the Hub
    "BLIP": "Salesforce/blip-image-captioning-large", "Florence-2": "florence-community/Florence-2-base",
    "tagger": "SmilingWolf/wd-vit-tagger-v3",
}
KINDS = {"blip": "BLIP", "florence2": "Florence-2"}  # by model_type
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")  # before and since Transformers 5
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")
GENERAL, CHARACTER = "0", "4"  # categories of tags; 9 is the rating
WITHOUT_INPUT = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OCR>")  # tasks that say something


class Captioner(Protocol):
    """prepare(image) once an image, in any thread; then captions of several prepared ones, each a plain line."""

    def prepare(self, image: Image.Image) -> Any: ...

    def __call__(self, prepared: Sequence[Any]) -> list[str]: ...


# ----------------------------------------------------------------------------------------------------------------------
# Which kind of model it is


def kind_of(repo: Repo) -> str:
    """A key of EXAMPLES. UserError: the model cannot be reached, or is of another kind."""
    if Path(repo.path).is_file():
        refuse([repo.problem("a model folder is needed, not a file", f"a {GRAPH} is read with the {TAGS} beside it",
                             f"{repo.flag} {Path(repo.path).parent}")])
    if _has(repo, TAGS):
        refuse(_tagger_problems(repo))
        return "tagger"
    refuse(repo.unreachable("config.json"))
    config = repo.json("config.json") or {}
    model_type = f"{config.get('model_type')}"
    if model_type not in KINDS:
        found = f"its config.json says model_type {model_type}" if config else f"it has no config.json and no {TAGS}"
        refuse([repo.problem("not a model that captions images", f"{found}; known are {', '.join(EXAMPLES)}",
                             f"{repo.flag} {EXAMPLES['Florence-2']}")])
    if "auto_map" in config:
        refuse([repo.problem("this model brings its own code, which is not run",
                             "its config.json has an auto_map; Transformers has the class itself, for models in its "
                             "own layout", f"{repo.flag} {EXAMPLES[KINDS[model_type]]}")])
    refuse(_missing_files(repo))
    return KINDS[model_type]


def _has(repo: Repo, name: str) -> bool:
    try:
        return repo.has(name)
    except hub_errors():  # told when the config is read
        return False


def _missing_files(repo: Repo) -> Iterator[Problem]:
    """Of a model of Transformers, besides its config."""
    for names in (PREPROCESSING, TOKENIZERS):
        if not any(_has(repo, name) for name in names):
            yield repo.problem(f"the model has no {' or '.join(names)}", "images and text are prepared by it",
                               "copy the whole model there again", kind="data")
    yield from repo.weight_problems(("",), None)


def _tagger_problems(repo: Repo) -> Iterator[Problem]:
    """What keeps a tagger from being run: its graph, or the package that runs it, is missing."""
    if not _has(repo, GRAPH):
        yield repo.problem(f"the tagger has no {GRAPH}", f"{TAGS} is there, and the network is not",
                           f"copy {GRAPH} of the model there", kind="data")
    if find_spec("onnxruntime") is None:
        yield repo.problem("the package onnxruntime is not installed", "it runs the tagger",
                           "pip install onnxruntime (for an NVIDIA card, onnxruntime-gpu instead)")


# ----------------------------------------------------------------------------------------------------------------------
# Models that write sentences


@dataclass(frozen=True)
class Generation:
    """How words are chosen: the most probable ones, so that an image has one caption."""

    max_new_tokens: int
    num_beams: int


@dataclass(frozen=True)
class Writer:
    """BLIP or Florence-2.

    text  input_ids [1,L] and attention_mask [1,L] that go with every image; none for BLIP without a prompt
    """

    model: Any
    processor: Any
    text: dict[str, Tensor]
    generation: Generation
    device: torch.device

    def prepare(self, image: Image.Image) -> Tensor:
        """-> [3,H,W]."""
        return self.processor.image_processor([image], return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def __call__(self, prepared: Sequence[Tensor]) -> list[str]:
        pixels = torch.stack(list(prepared)).to(self.device)  # [B,3,H,W]
        text = {name: ids.repeat(len(prepared), 1).to(self.device) for name, ids in self.text.items()}
        tokens = self.model.generate(pixel_values=pixels, **text, do_sample=False,
                                     max_new_tokens=self.generation.max_new_tokens,
                                     num_beams=self.generation.num_beams)
        return [one_line(caption) for caption in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def load_blip(repo: Repo, prompt: str | None, generation: Generation, device: torch.device) -> Writer:
    """A BLIP that goes on with the words of `prompt`."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model, processor = _load(repo, BlipForConditionalGeneration, BlipProcessor, device)
    text = dict(processor.tokenizer(prompt, return_tensors="pt")) if prompt else {}
    text.pop("token_type_ids", None)
    return Writer(model, processor, text, generation, device)


def load_florence(repo: Repo, task: str, generation: Generation, device: torch.device) -> Writer:
    """A Florence-2 that does one task: "<DETAILED_CAPTION>", or what a fine-tuned one was taught."""
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    model, processor = _load(repo, Florence2ForConditionalGeneration, Florence2Processor, device)
    if task not in WITHOUT_INPUT and task in processor.tasks_answer_post_processing_type:
        refuse([Problem(f"{task} gives no caption", f"--task {task}", "it finds places in an image, or asks for one",
                        f"--task '{WITHOUT_INPUT[1]}', or another of {', '.join(WITHOUT_INPUT)}")])
    blank = Image.new("RGB", (8, 8))  # each image takes the same number of places in the text
    inputs = processor(text=[task], images=[blank], return_tensors="pt")
    return Writer(model, processor, {name: inputs[name] for name in ("input_ids", "attention_mask")}, generation,
                  device)


def _load(repo: Repo, model_class: Any, processor_class: Any, device: torch.device) -> tuple[Any, Any]:
    """(model in fp32, processor that needs Pillow alone)."""
    with quiet_loading():
        processor = load_part(repo, processor_class, "", backend="pil")
        model = load_part(repo, model_class, "", dtype=torch.float32, use_safetensors=True)
    return freeze(model).to(device), processor


# ----------------------------------------------------------------------------------------------------------------------
# Taggers


@dataclass(frozen=True)
class TagChoice:
    """Which tags go into a caption."""

    general_threshold: float
    character_threshold: float
    undesired: frozenset[str]  # without regard to letter case, and to spaces for underscores
    replace_underscores: bool

    def caption(self, tags: Sequence[Tag], probabilities: np.ndarray) -> str:
        """Names of characters, then general tags, each the most probable first. probabilities [T]."""
        thresholds = {CHARACTER: self.character_threshold, GENERAL: self.general_threshold}
        chosen = [
            tags[place].name for category, threshold in thresholds.items() for place in np.argsort(-probabilities)
            if tags[place].category == category and probabilities[place] >= threshold]
        return ", ".join(self._shown(name) for name in chosen if comparable(name) not in self.undesired)

    def _shown(self, name: str) -> str:
        return name.replace("_", " ") if self.replace_underscores and not is_emoticon(name) else name


@dataclass(frozen=True)
class Tag:
    name: str
    category: str


def comparable(tag: str) -> str:
    return tag.strip().casefold().replace(" ", "_")


def is_emoticon(tag: str) -> bool:
    """^_^ and o_o are no words: their underscores are a mouth."""
    return not re.search(r"[^\W\d_]{2}", tag)


@dataclass(frozen=True)
class Tagger:
    """An ONNX graph from images [B,S,S,3], BGR in 0 .. 255, to probabilities [B,T] of tags.

    fixed  the B that the graph is made for; None: any
    """

    session: Any
    tags: Sequence[Tag]
    choice: TagChoice
    repo: Repo
    side: int
    fixed: int | None

    def prepare(self, image: Image.Image) -> np.ndarray:
        """-> [S,S,3]: the whole image in the middle of a white square, as in the training of these models."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        resized = square.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(resized, np.float32)[:, :, ::-1]

    def __call__(self, prepared: Sequence[np.ndarray]) -> list[str]:
        size = self.fixed or len(prepared)
        parts = (prepared[start : start + size] for start in range(0, len(prepared), size))
        return [self.choice.caption(self.tags, row) for part in parts for row in self._probabilities(part, size)]

    def _probabilities(self, images: Sequence[np.ndarray], size: int) -> np.ndarray:
        """At most `size` images -> [B,T]. UserError: these are no probabilities of the tags."""
        filled = np.stack([*images, *[images[-1]] * (size - len(images))])
        try:
            found = self.session.run(None, {self.session.get_inputs()[0].name: filled})[0]
        except Exception as error:  # the runtime raises classes of its own, which have nothing in common
            raise _unusable(self.repo, error) from error
        if found.shape != (size, len(self.tags)):
            raise _unusable(self.repo, f"it gives {found.shape[-1]} numbers an image, and {TAGS} names "
                            f"{len(self.tags)} tags")
        if not ((found >= 0) & (found <= 1)).all():
            raise _unusable(self.repo, "its outputs are no probabilities: some are not from 0 to 1")
        return found[: len(images)]


def load_tagger(repo: Repo, choice: TagChoice, device: str | None) -> Tagger:
    """A tagger in the layout of the WD 1.4 and v3 models: model.onnx and selected_tags.csv."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    providers = _providers(device)
    try:
        session = onnxruntime.InferenceSession(str(repo.file(GRAPH)), settings, providers=providers)
    except Exception as error:  # as above
        raise _unusable(repo, error) from error
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or not isinstance(shape[1], int):
        raise UserError(repo.problem("the tagger is of an unknown layout",
                                     f"it takes {shape}; known are those that take [images, side, side, 3]",
                                     f"{repo.flag} {EXAMPLES['tagger']}"))
    fixed = shape[0] if isinstance(shape[0], int) else None
    return Tagger(session, read_tags(repo), choice, repo, shape[1], fixed)


def _providers(device: str | None) -> list[Any]:
    """What ONNX Runtime calls the device. None: a GPU where it can use one."""
    import onnxruntime

    kind, _, index = (device or "").partition(":")
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device and kind != "cpu" and not (kind == "cuda" and gpu):
        refuse([Problem(f"the tagger cannot run on {device}", f"--device {device}",
                        "ONNX Runtime, which runs it, has no CUDA here" if kind == "cuda" else "it runs on cpu or cuda",
                        "pip uninstall onnxruntime, then pip install onnxruntime-gpu; or --device cpu"
                        if kind == "cuda" else "--device cpu")])
    cuda = [("CUDAExecutionProvider", {"device_id": index or "0"})] if gpu and kind != "cpu" else []
    return [*cuda, "CPUExecutionProvider"]


def read_tags(repo: Repo) -> list[Tag]:
    """Name and category of each output. UserError: the table is damaged."""
    file = repo.file(TAGS)
    assert file is not None, "a tagger is told by this file"
    try:
        table = csv.DictReader(read_text(file).splitlines())
        tags = [Tag(one_line(row["name"]), row["category"].strip()) for row in table]
        if not tags:
            raise ValueError("it names no tags")
    except (OSError, ValueError, csv.Error, KeyError, AttributeError, TypeError) as error:
        why = f"{error}" if isinstance(error, (OSError, ValueError)) else "a line has no name or no category"
        raise UserError(repo.problem(f"{TAGS} is damaged", why, f"copy {TAGS} of the model there again",
                                     kind="data")) from error
    return tags


def _unusable(repo: Repo, why: Exception | str) -> UserError:
    """Raises `why` itself where memory ran out."""
    if isinstance(why, Exception) and is_out_of_memory(why):
        raise why
    text = first_line(why) if isinstance(why, Exception) else why
    return UserError(repo.problem("the tagger cannot be used", text, f"copy {GRAPH} and {TAGS} of one model there "
                                  "again", kind="data"))


# ----------------------------------------------------------------------------------------------------------------------
# The device of a model of Transformers


def torch_device(name: str | None) -> torch.device:
    """By default a GPU where there is one. UserError: there is no such device."""
    if name is None:
        return present()
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(Problem(f"there is no device {name}", f"--device {name}", first_line(error),
                                "--device cpu")) from error
