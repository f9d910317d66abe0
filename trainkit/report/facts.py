"""What may be told about a run: its record and metrics, read from the run directory and cleaned of private paths."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainkit import lora_file
from trainkit.conditioning.new_tokens import EmbeddingsHeader, read_header
from trainkit.errors import UserError
from trainkit.files import Json, read_json, sha256, size_text
from trainkit.options import MatchingOptions, OptimizerOptions
from trainkit.options.rules import unread
from trainkit.options.text_encoders import replace_words
from trainkit.options.trainers import known_flags
from trainkit.runtime.record import metric_rows
from trainkit.runtime.weight_files import KOHYA_FILE, embeddings_file, low_rank_file, lycoris_file, weight_names

SAMPLE = re.compile(r"step_(\d+)(?:_p(\d+)_s(\d+))?\.png")  # a single image, or without p and s a step's grid
NOT_REPEATED = {"config", "preset", "print_config", "resume_from_checkpoint", "local_rank", "debug"}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Changed:
    """An option that is not at its default."""

    flag: str
    value: str
    origin: str


@dataclass(frozen=True)
class WrittenFile:
    name: str
    size: str
    sha256: str


class RunFacts:
    """run.json and metrics.jsonl of `folder`, as a report or a model card may show them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.record: dict[str, Json] = read_json(folder / "run.json")

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return list(read_metrics(self.folder / "metrics.jsonl"))

    def option(self, flag: str) -> Json:
        """Resolved value of a flag, None for a flag the run did not have."""
        return self._values.get(flag)

    def setting(self, flag: str) -> Json:
        """As `option`, but None for a flag that had no effect beside the others."""
        return None if flag in self._unread else self.option(flag)

    @cached_property
    def _unread(self) -> set[str]:
        return {name for name, _ in unread(self._values, known_flags())}

    @cached_property
    def _values(self) -> dict[str, Json]:
        return {flag: option["value"] for flag, option in self.record["options"].items()}

    @property
    def optimizer(self) -> str:
        """The optimizer that was used, with --use_8bit_adam read."""
        return OptimizerOptions.of(self._values).algorithm

    @property
    def matching_mode(self) -> str | None:
        """The mode of distribution matching that was used, where it was left open too; None without matching."""
        matching = MatchingOptions.of(self._values)
        return matching.mode if matching.active else None

    @property
    def rates(self) -> dict[str, float]:
        """The highest learning rate of each parameter group: what its schedule rises to or falls from."""
        found: dict[str, float] = {}
        for row in self.metrics:
            for key in row:
                group = key.removeprefix("lr/")
                if group != key:
                    found[group] = max(row[key], found.get(group, 0.0))
        return found

    @property
    def step_sizes(self) -> dict[str, tuple[float, float]]:
        """Where the optimizer estimates a step size d: its first and its last value, by parameter group."""
        found: dict[str, tuple[float, float]] = {}
        for row in self.metrics:
            for key, value in row.items():
                group = key.removeprefix("d/")
                if group != key:
                    found[group] = found.get(group, (value, value))[0], value
        return found

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def base_path(self) -> str:
        return str(self.option("pretrained_model_name_or_path"))

    @property
    def base_model(self) -> str:
        return public("pretrained_model_name_or_path", self.base_path)

    @property
    def base_is_file(self) -> bool:
        return self.base_path.endswith(".safetensors")

    @property
    def vae(self) -> str | None:
        """Another VAE than the base model's, where one was trained with."""
        path = self.option("pretrained_vae_model_name_or_path")
        return str(public("pretrained_vae_model_name_or_path", str(path))) if path else None

    @cached_property
    def base_series(self) -> str | None:
        """What the base model is one of, "stable-diffusion-xl" for example; None before a written file says it.

        ModelSpec's name of its architecture, without the version: stable-diffusion-xl-v1-base/lora.
        """
        return self.header.get("modelspec.architecture", "").partition("-v")[0] or None

    @cached_property
    def header(self) -> Mapping[str, str]:
        """The metadata of the written LoRA, or of the new tokens where there is none."""
        return read_metadata(self.folder / (weight_names(self.name)[1] if self.has_lora else self.embeddings_file))

    @property
    def trigger(self) -> str:
        return self.prompted(str(self.option("instance_prompt") or ""))

    @property
    def validation_prompt(self) -> str:
        return str(self.option("validation_prompt") or "")

    @property
    def has_lora(self) -> bool:
        """Whether a network was trained, not new tokens alone."""
        return self.option("train_unet_frac") != 0 or bool(self.option("train_text_encoder"))

    @property
    def is_dora(self) -> bool:
        return self.has_lora and bool(self.option("use_dora"))

    @property
    def embeddings_file(self) -> str:
        return embeddings_file(self.name)

    @property
    def embeddings_stem(self) -> str:
        """What user interfaces call the embeddings."""
        return Path(self.embeddings_file).stem

    @cached_property
    def embeddings(self) -> EmbeddingsHeader | None:
        """What the run's file of embeddings says; None when it has learned none, or not written them yet."""
        path = self.folder / self.embeddings_file
        return read_header(path) if self.option("train_text_encoder_ti") and path.is_file() else None

    def prompted(self, prompt: str) -> str:
        """`prompt` as Diffusers must be given it: with new tokens for the words that stand for them."""
        tokens = self.embeddings.tokens if self.embeddings else {}
        return replace_words(prompt, {word: "".join(names) for word, names in tokens.items()})

    def spelled(self, name: str) -> str:
        """The instance prompt, else the validation prompt, with `name` for every word that stands for new tokens."""
        words = self.embeddings.tokens if self.embeddings else {}
        prompt = str(self.option("instance_prompt") or self.validation_prompt)
        return replace_words(prompt, dict.fromkeys(words, name))

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else int(self.record["step"] or 0)

    @property
    def start_step(self) -> int:
        """Finished steps at the start of its last session."""
        return int(self.record.get("start_step") or 0)

    @property
    def total_steps(self) -> int | None:
        total = self.record.get("total_steps")
        return int(total) if total else None

    @property
    def seconds(self) -> float | None:
        """Wall time of the run; while it still runs, the time of the last logged step."""
        seconds = self.record.get("seconds") or (self.metrics[-1].get("seconds") if self.metrics else None)
        return float(seconds) if seconds else None

    @property
    def ended_well(self) -> bool:
        return self.record["status"] == "done" or (self.record["status"] == "running" and self.all_steps_made)

    @property
    def all_steps_made(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    @property
    def status(self) -> str:
        return "finished" if self.ended_well else str(self.record["status"])

    @property
    def started(self) -> str:
        """`2026-11-21 22:05`."""
        return str(self.record["started"] or "")[:16].replace("T", " ")

    @cached_property
    def changed(self) -> list[Changed]:
        options: dict[str, dict[str, Json]] = self.record["options"]
        return [Changed(flag, shown(public(flag, o["value"])), origin_shown(o["origin"]))
                for flag, o in options.items() if o["origin"] != "default"]

    @property
    def command(self) -> str:
        """A command line that repeats the run in the folder it was started from.

        Values of a preset or a config stand in it themselves, so that neither is needed. A path that leads elsewhere is
        reduced to its last part: `private_paths` names those flags.
        """
        words = [f"--{flag}={shlex.quote(shown(in_command(flag, value)))}" for flag, value in self._repeated.items()]
        precision = str(self.record.get("precision") or "no")
        if self.option("mixed_precision") is None and precision != "no":  # accelerate's configuration said it
            words.append(f"--mixed_precision={precision}")
        world = int(self.record.get("world") or 1)
        script = re.split(r"[\\/]", str(self.record["command"][0]))[-1]
        start = ["accelerate", "launch", f"--num_processes={world}"] if world > 1 else ["python"]
        installed = world == 1 and not script.endswith(".py")  # lora-train
        return " ".join([*([] if installed else start), script, *words])

    @property
    def private_paths(self) -> list[str]:
        """Flags whose paths the command reduces to their last parts."""
        return [f"--{flag}" for flag, value in self._repeated.items() if in_command(flag, value) != value]

    @cached_property
    def _repeated(self) -> dict[str, Json]:
        """What was set, without secrets and without what only says where values or steps come from."""
        options: dict[str, dict[str, Json]] = self.record["options"]
        return {flag: "none" if option["value"] is None else option["value"] for flag, option in options.items()
                if option["origin"] != "default" and flag not in NOT_REPEATED and not is_secret(flag)}

    @property
    def versions(self) -> dict[str, str]:
        return dict(self.record["versions"])

    @property
    def hub_name(self) -> str | None:
        """`owner/name` when the files were meant for the Hub."""
        name = self.option("hub_model_id")
        return str(name) if name and "/" in str(name) else None

    @cached_property
    def files(self) -> list[WrittenFile]:
        """The run's own weight files, the one for Diffusers first; others in the folder are nobody's to describe."""
        kohya = [KOHYA_FILE] if self.option("output_kohya_format") else []
        of_dora = [lycoris_file(self.name)] if self.setting("save_paper_dora") else []
        of_dora += [low_rank_file(self.name)] if self.setting("svd_rank") else []
        names = [*((*weight_names(self.name), *kohya, *of_dora) if self.has_lora else ()),
                 *([self.embeddings_file] if self.embeddings else ())]
        paths = [self.folder / name for name in names]
        return [WrittenFile(p.name, size_text(p.stat().st_size), sha256(p)) for p in paths if p.is_file()]


def read_metadata(path: Path) -> dict[str, str]:
    """The header of a safetensors file; {} where there is none."""
    try:
        return dict(lora_file.read_header(path).metadata)
    except UserError:
        return {}


def sample_files(folder: Path) -> dict[Path, int]:
    """The previews in samples/, images and grids, with the step each shows; links and other files are left out."""
    found = {path: SAMPLE.fullmatch(path.name) for path in sorted((folder / "samples").glob("step_*.png"))}
    return {path: int(match[1]) for path, match in found.items() if match and not path.is_symlink()}


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """One dict of finite numbers per logged step; a line cut short by a kill is left out."""
    for row in metric_rows(path):
        yield {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def public(flag: str, value: Json) -> Json:
    """An option's value without the folders it lies in: these are nobody's business once a file is shared."""
    known = known_flags().get(flag)
    if not isinstance(value, str) or known is None or not known.facts.path:
        return value
    if known.facts.path == "or Hub name" and HUB_NAME.fullmatch(value) and not Path(value).exists():
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1]


def in_command(flag: str, value: Json) -> Json:
    """An option's value as a command line may show it: a path below the folder that the run was started from stays."""
    if public(flag, value) == value or not isinstance(value, str):
        return value
    path = Path(value)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    inside = not path.is_absolute() and ".." not in path.parts and not value.startswith("~") and "\\" not in value
    return path.as_posix() if inside else public(flag, value)


def is_secret(flag: str) -> bool:
    known = known_flags().get(flag)
    return known is not None and known.secret


def shown(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def origin_shown(origin: Json) -> str:
    """`config FILE` may name a folder."""
    source, _, rest = str(origin).partition(" ")
    return f"{source} {public('config', rest)}" if source == "config" else str(origin)
