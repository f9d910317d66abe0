"""A pretrained model on disk or on the Hub: its JSON files, what its folder lacks, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainkit.errors import Problem

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Json = Mapping[str, object]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FINGERPRINT_VALUES = 4096  # per tensor, evenly spaced


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
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            self.json(probe)
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            revision = f" at revision {self.revision}" if self.revision else ""
            return [self.problem(
                f"cannot read {self.path}{revision} from the Hub", str(error).strip().splitlines()[0],
                "check the id and the network, log in (hf auth login) if it is gated, or name a folder")]
        return []

    def _local_problem(self) -> list[Problem]:
        path = Path(self.path)
        if path.is_dir():
            return []
        if path.is_file():
            return [self.problem(
                "a model folder is needed, not a file", f"{path.name} is a single file",
                "convert it once: python -c \"from diffusers import StableDiffusionXLPipeline as P; "
                f"P.from_single_file('{path}').save_pretrained('{path.with_suffix('')}')\"")]
        return [self.problem("the model folder does not exist", "no folder of this name, and not a Hub id (owner/name)",
                             f"correct {self.flag}")]

    def problem(self, what: str, why: str, fix: str, *, kind: str = "usage") -> Problem:
        return Problem(what, f"{self.flag} {self.path}", why, fix, kind)

    def json(self, name: str) -> Json | None:
        """A JSON file of the repository, or None where it has no such file."""
        file = Path(self.path) / name if self.is_local else self._download(name)
        if file is None or not file.is_file():
            return None
        return json.loads(file.read_text("utf-8"))

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

    def _no_weights(self, component: str, files: set[str], variant: str | None) -> Problem:
        wanted = f"{variant} safetensors" if variant else "safetensors"
        others = sorted(file for file in files if file.endswith((".safetensors", ".bin")))
        why = f"{self.path}/{component} has {', '.join(others) if others else 'no weight file'}"
        fix = f"leave --variant {variant} out, or name a folder that has it" if variant else (
            "add --variant fp16 if the weights are the fp16 ones; pickled .bin weights are not read, re-save them once "
            "with save_pretrained")
        return self.problem(f"no {wanted} for {component or 'the model'}", why, fix, kind="data")


def weight_name(variant: str | None) -> re.Pattern[str]:
    """File names of the weights Diffusers and Transformers look for, whole or in shards."""
    dotted = re.escape(f".{variant}") if variant else ""
    shard = r"(-\d+-of-\d+)?"
    return re.compile(rf"(diffusion_pytorch_)?model{shard}{dotted}{shard}\.safetensors")


def fingerprint(module: nn.Module) -> str:
    """Digest of a module's tensors: names, shapes and up to 4,096 evenly spaced values of each.

    Any fine-tune or merge changes it; it costs milliseconds where hashing gigabytes would cost seconds, and it is the
    same for a folder and a Hub id. Values are read as fp32, so the file's precision counts and the caller's does not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(spaced_values(tensor).numpy().tobytes())
    return digest.hexdigest()


def spaced_values(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // FINGERPRINT_VALUES)].cpu().float()  # [<= 2·4096]


def json_digest(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Digest of everything that decides a prompt's ids: vocabulary, merges, added tokens, padding, length."""
    return json_digest(tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length, tokenizer.pad_token_id)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No library progress bars inside: they tear the run's own progress line."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    noisy = [room for room in (diffusers_logging, transformers_logging) if room.is_progress_bar_enabled()]
    for room in noisy:
        room.disable_progress_bar()
    try:
        yield
    finally:
        for room in noisy:
            room.enable_progress_bar()


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: what the base model stays throughout."""
    return module.eval().requires_grad_(False)


def empty_device_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
