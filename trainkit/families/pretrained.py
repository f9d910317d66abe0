"""A pretrained model on disk or on the Hub: its JSON files, what its folder lacks, and digests of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit.digests import remembered
from trainkit.errors import Category, Problem, UserError, counted, is_out_of_memory, listing, printable, refuse
from trainkit.reading import parse_json, read_text

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

Config = Mapping[str, Any]  # a JSON file of a model folder

MODEL_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"
ANOTHER_VAE = f"{VAE_FLAG} madebyollin/sdxl-vae-fp16-fix for SDXL, stabilityai/sd-vae-ft-mse for SD 1.x and 2.x"
CLASS_INPUTS = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")  # a UNet with these asks for more
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PAGE = re.compile(rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?:datasets/)?({HUB_ID.pattern})(?:/.*)?")
# What libraries raise for values that a config cannot have
BAD_CONFIG = (AttributeError, KeyError, TypeError, ValueError, NotImplementedError)
MISMATCHED = "ignore_mismatched_sizes"  # in what Transformers raises, a RuntimeError, where shapes differ
OTHER_SIZES = "its config and its weight files disagree about the sizes of tensors"
SAMPLED_VALUES = 256  # of each tensor at least, if it has as many
DIGEST_BITS, HASHING_THREADS = 256, 4


@dataclass(frozen=True)
class Repo:
    """A model folder, or a model id on the Hub; `flag` is how the user named it."""

    path: str
    flag: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists() or not HUB_ID.fullmatch(self.path)

    def unreachable(self, probe: str) -> list[Problem]:
        """The problem that keeps us from reading the small file `probe`, if any; a repository without it is reached."""
        if self.is_local:
            return self._local_problem()
        try:
            self.json(probe)
        except hub_errors() as error:
            beside = self._folders_beside()
            if beside is not None:
                return [self.problem(f"there is no folder {self.path}, and it cannot be read from the Hub",
                                     f"folders there: {beside or 'none'}", f"correct {self.flag}")]
            revision = f" at revision {self.revision}" if self.revision else ""
            return [self.problem(
                f"cannot read {self.path}{revision} from the Hub", str(error).strip().splitlines()[0],
                "check the id and the network, log in (hf auth login) if it is gated, or name a folder")]
        return []

    def _folders_beside(self) -> str | None:
        """Where the name begins with a folder that is here, the folders in that: the nearest in name, or the first."""
        parent, name = Path(self.path).parent, Path(self.path).name
        if parent == Path() or not parent.is_dir():
            return None
        names = sorted(path.name for path in parent.iterdir() if path.is_dir())
        return listing(get_close_matches(name, names, n=3) or names[:3])

    def _local_problem(self) -> list[Problem]:
        if Path(self.path).is_dir():
            return []
        hub = hub_id(self.path)
        return [self.problem("the model folder does not exist", "no folder of this name, and not a Hub id (owner/name)",
                             f"{self.flag} {hub}" if hub else f"correct {self.flag}")]

    def problem(self, what: str, why: str, fix: str, *, kind: Category = "usage") -> Problem:
        return Problem(what, f"{self.flag} {self.path}", why, fix, kind)

    def json(self, name: str) -> Config | None:
        """A JSON object of the repository, or None where it has no such file. UserError for a file that holds none."""
        file = self.file(name)
        if file is None:
            return None
        try:
            content = parse_json(read_text(file))
        except (OSError, ValueError) as error:
            raise UserError(self.problem(f"{name} is damaged", f"{error}", f"copy {name} of the model there again",
                                         kind="data")) from error
        if not isinstance(content, dict):
            raise UserError(self.problem(f"{name} is damaged", f"it holds a {type(content).__name__}, not an object",
                                         f"copy {name} of the model there again", kind="data"))
        return content

    def glance(self, name: str) -> Config:
        """As `json`, but {} where there is no such file or none that can be read."""
        try:
            return self.json(name) or {}
        except UserError:
            return {}
        except hub_errors():
            return {}

    def has(self, name: str) -> bool:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self.file(name) is not None
        except LocalEntryNotFoundError:  # offline, and not among the files fetched before
            return False

    def file(self, name: str) -> Path | None:
        """A file of the repository on this machine, fetched if need be; None where the repository has none."""
        file = Path(self.path) / name if self.is_local else self._download(name)
        return file if file is not None and file.is_file() else None

    def folder(self, component: str) -> Path:
        """Where a component's files lie; those of a Hub id must have been fetched."""
        if self.is_local:
            return Path(self.path) / component
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True)) / component

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except RemoteEntryNotFoundError:
            return None

    def weight_problems(self, components: Sequence[str], variant: str | None) -> Iterator[Problem]:
        """Components of a local folder without safetensors of this variant; "" is the folder itself."""
        if not self.is_local:
            return
        for name in components:
            files = {file.name for file in (Path(self.path) / name).glob("*")}
            if not any(weight_name(variant).fullmatch(file) for file in files):
                yield self._no_weights(name, files, variant)

    def digest(self, component: str, variant: str | None) -> str:
        """Of the weights of a component, see `weights_digest`."""
        return weights_digest(self.folder(component), variant)

    def sampled(self, component: str, variant: str | None) -> str:
        """As checkpoints from before have it, see `sampled_digest`."""
        return sampled_digest(self.folder(component), variant)

    def weight(self, component: str, name: str) -> Tensor | None:
        """One tensor of a component, read alone; None where it has none of this name."""
        from safetensors import safe_open

        path = tensor_files(self.folder(component)).get(name)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def tensor_names(self, component: str) -> set[str]:
        """Names of the tensors of a component, as `weight` takes them; none where the model has no such component."""
        folder = self.folder(component)
        return {*tensor_files(folder)} if folder.is_dir() else set()

    def unsaid(self, prediction_type: str | None) -> Iterator[Problem]:
        """What the model does not say of itself and the user must; the configs of a folder say all of it."""
        yield from ()

    @property
    def assumes(self) -> bool:
        """Whether what the UNet predicts is not said anywhere and taken to be ε."""
        return False

    def file_metadata(self) -> dict[str, str]:
        """What LoRA files say of the file that they were trained on; nothing of a folder."""
        return {}

    def part(self, part_class: Any, folder: str, settings: Mapping[str, Any]) -> Any:
        """See `load_part`."""
        return from_pretrained(self, part_class, folder, **settings)

    def _no_weights(self, component: str, files: set[str], variant: str | None) -> Problem:
        wanted = f"{variant} safetensors" if variant else "safetensors"
        others = sorted(file for file in files if file.endswith((".safetensors", ".bin")))
        why = f"{self.path}/{component} has {', '.join(others) if others else 'no weight file'}"
        fix = f"leave --variant {variant} out, or name a folder that has it" if variant else (
            "add --variant fp16 if the weights are the fp16 ones; pickled .bin weights are not read, re-save them once "
            "with save_pretrained")
        return self.problem(f"no {wanted} for {component or 'the model'}", why, fix, kind="data")


def hub_id(address: str) -> str | None:
    """owner/name in the address of a page of the Hub; None in other text."""
    found = HUB_PAGE.fullmatch(address) if ".co/" in address or address.endswith("/") else None
    return found[1] if found else None


def part_class(index: Config, name: str) -> str | None:
    """The class that model_index.json names for a part; None where it names none."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where a file cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled


def weight_name(variant: str | None) -> re.Pattern[str]:
    """File names of the weights Diffusers and Transformers look for, whole or in shards."""
    dotted = re.escape(f".{variant}") if variant else ""
    shard = r"(-\d+-of-\d+)?"
    return re.compile(rf"(diffusion_pytorch_)?model{shard}{dotted}{shard}\.safetensors")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if weight_name(variant).fullmatch(path.name))
    assert found, f"{folder} was loaded from other files than these"
    return found


@lru_cache(maxsize=8)
def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of a tensor -> its file in a component's folder; of full precision where there is a choice."""
    from safetensors import safe_open

    names: dict[str, Path] = {}
    for variant in ("fp16", None):
        for path in (path for path in sorted(folder.iterdir()) if weight_name(variant).fullmatch(path.name)):
            with safe_open(path, framework="pt") as file:
                names |= dict.fromkeys(file.keys(), path)
    return names


def weights_digest(folder: Path, variant: str | None) -> str:
    """Digest of a component's weights: name, type, shape and every byte of each tensor, as its files hold them.

    It is the same for a folder and a Hub id, and for one file and several shards: a sum over tensors knows no order.
    The precision of the files counts, and the precision a run loads them in does not. A file that was not touched is
    read once.
    """
    parts = [int(remembered(path, "tensors", tensors_digest), 16) for path in weight_files(folder, variant)]
    return f"{sum(parts) % 2 ** DIGEST_BITS:0{DIGEST_BITS // 4}x}"


def tensors_digest(path: Path, prefix: str = "") -> str:
    """Sum of the digests of a file's tensors, those whose names begin with `prefix`.

    Threads, for hashing takes longer than reading what is in memory.
    """
    from safetensors import safe_open

    def one(name: str) -> int:
        tensor = file.get_tensor(name)
        kind = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
        digest = hashlib.blake2b(kind.encode(), digest_size=DIGEST_BITS // 8)
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return int(digest.hexdigest(), 16)

    with safe_open(path, framework="pt") as file, ThreadPoolExecutor(HASHING_THREADS) as pool:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return f"{sum(pool.map(one, names)) % 2 ** DIGEST_BITS:x}"


def sampled_digest(folder: Path, variant: str | None) -> str:
    """Digest of names, shapes and some evenly spaced values of each tensor: fast, and blind to all other values.

    It compares with checkpoints from before `weights_digest`.
    """
    from safetensors import safe_open

    digests: dict[str, bytes] = {}
    for path in weight_files(folder, variant):
        with safe_open(path, framework="pt") as file:
            digests |= {name: tensor_digest(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return hashlib.blake2b(b"".join(digests[name] for name in sorted(digests)), digest_size=16).hexdigest()


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    flat = tensor.flatten()
    values = flat[:: max(1, len(flat) // SAMPLED_VALUES)].float()  # [< 2·SAMPLED_VALUES]
    return hashlib.blake2b(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes(), digest_size=16).digest()


def json_digest(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Digest of everything that decides a prompt's ids: vocabulary, merges, added tokens, padding, length."""
    return json_digest(tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length, tokenizer.pad_token_id)


def load_part(repo: Repo, part_class: Any, folder: str, **settings: object) -> Any:
    """A part of a model, or with "" a pipeline of all or the model's own network. Raises UserError.

    settings  those of `part_class.from_pretrained`
    """
    return repo.part(part_class, folder, settings)


def from_pretrained(repo: Repo, part_class: Any, folder: str, **settings: object) -> Any:
    """`part_class.from_pretrained` on one folder of a model, "" for the model's own.

    Raises UserError: a file is damaged, or config and weights are not of one network.
    """
    from huggingface_hub.errors import StrictDataclassError  # of Transformers' configs: a value of another type
    from safetensors import SafetensorError

    place, is_network = {"subfolder": folder} if folder else {}, issubclass(part_class, nn.Module)
    if is_network:
        settings["output_loading_info"] = True
    try:
        part = part_class.from_pretrained(repo.path, revision=repo.revision, **place, **settings)
    except Exception as error:
        expected = (OSError, *BAD_CONFIG, RecursionError, SafetensorError, StrictDataclassError)
        # The tokenizers library raises bare Exceptions; what is left is no file's fault
        known = isinstance(error, expected) or type(error) is Exception or MISMATCHED in f"{error}"
        if not known or is_out_of_memory(error):
            raise
        why = OTHER_SIZES if MISMATCHED in f"{error}" else first_line(error)
        raise UserError(unloadable(repo, folder or part_class.__name__, why)) from error
    if not is_network:
        return part
    network, found = part
    missing = sorted(found["missing_keys"])
    if missing:  # the libraries would leave random or no values there
        refuse([unloadable(repo, folder or part_class.__name__, f"its config asks for {len(missing)} tensors that its "
                           f"files lack, such as {missing[0]}")])
    return network


def refuse_unknown_ids(repo: Repo, folder: str, tokenizer: CLIPTokenizer, encoder: PreTrainedModel) -> None:
    """Raises UserError where the tokenizer has ids that the text encoder has no embedding for."""
    known = encoder.get_input_embeddings().num_embeddings
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= known}
    if beyond:
        token, number = max(beyond.items(), key=lambda pair: pair[1])
        refuse([unloadable(repo, folder, f"{counted(len(beyond), 'token has', 'tokens have')} no embedding in the text "
                           f"encoder, which knows {known}: {printable(token)} is number {number}")])


def unloadable(repo: Repo, name: str, why: str) -> Problem:
    return repo.problem(f"{name} cannot be loaded", why, f"copy the files of {name} there again, or name another model",
                        kind="data")


def first_line(error: Exception) -> str:
    """What a library says in short: its first line, and the next one where the first only announces it."""
    lines = [line.strip() for line in f"{error}".strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No library progress bars inside: they tear the run's own progress line."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    noisy = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in noisy:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in noisy:
            library.enable_progress_bar()


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: what the base model stays throughout."""
    return module.eval().requires_grad_(False)


def vae_place(model: Repo, vae_path: str | None) -> tuple[Repo, str]:
    """Whose VAE it is, and the folder in there."""
    return (Repo(str(vae_path), VAE_FLAG), "") if vae_path else (model, "vae")
