"""What a command that only asks is told: --help and its kinds, --preset list, --version, --print_completion."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from trainkit import __version__
from trainkit.errors import Problem, UserError
from trainkit.options.base import Flag
from trainkit.options.cli import flags_help, make_parser, shown, underscored, wrapped
from trainkit.options.names import nearest
from trainkit.options.sources import PRESET_USES, PRESETS

# What most runs set, in the order of the questions that a user has.
ESSENTIAL = {
    "What to train on": (
        "pretrained_model_name_or_path", "instance_data_dir", "train_data_dir", "dataset_name", "caption_column",
        "instance_prompt", "resolution", "random_flip", "cache_latents"),
    "What to train": ("rank", "lora_alpha", "train_text_encoder", "train_text_encoder_ti"),
    "How": (
        "preset", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate",
        "snr_gamma", "mixed_precision", "gradient_checkpointing", "seed"),
    "What to see and to keep": (
        "output_dir", "validation_prompt", "validation_steps", "checkpointing_steps", "resume_from_checkpoint"),
}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")  # that --version names
SHELLS = ("bash", "zsh")
QUESTIONS = {  # how to ask -> what the answer is
    "--help GROUP": "the flags of a group",
    "--help FLAG": "one flag, such as --help snr_gamma",
    "--help_all": "every flag",
    "--preset list": "the presets and what they set",
    "--print_config": "every value of a command, and where it comes from",
    "--print_completion bash|zsh": "a script that completes flags in your shell",
    "--version": "versions of this suite and of its libraries",
}


def answer(
    argv: Sequence[str], flags: Mapping[str, Flag], *, titles: Mapping[str, str], description: str,
) -> str | None:
    """The text that a command line asks for; None when it asks for none.

    titles  of the groups of flags, by name
    Raises UserError: there is no such topic or shell, or completion lacks its package.
    """
    words = underscored(argv)
    for word, following in pairwise([*words, ""]):
        name, sign, value = word.partition("=")
        value = value if sign else "" if following.startswith("-") else following
        match name:
            case "-h" | "--help":
                return help_on(value, flags, titles, description)
            case "--help_all":
                return help_on("all", flags, titles, description)
            case "--version":
                return versions()
            case "--print_completion":
                return completion(value, flags, titles)
            case "--preset" if value == "list":
                return presets(flags)
    return None


def help_on(topic: str, flags: Mapping[str, Flag], titles: Mapping[str, str], description: str) -> str:
    """"" the flags that matter, "all", or the name of a group or a flag."""
    word = topic.lstrip("-").replace("-", "_")
    name = word if word in flags else word.removeprefix("no_")
    if not word:
        return essential(flags, titles, description)
    if word == "all":
        return make_parser(flags.values(), wrapped(description), titles).format_help()
    if word in titles:
        return flags_help(titles[word], [flag for flag in flags.values() if flag.concern == word])
    if name in flags:
        return flags_help(f"In the group {flags[name].concern}", [flags[name]])
    match = nearest(word, [*titles, *flags])
    raise UserError(Problem(f"no help on {topic}", "--help", "it is neither a group of flags nor a flag",
                            f"--help {match}" if match else f"--help GROUP, which is one of {', '.join(titles)}"))


def essential(flags: Mapping[str, Flag], titles: Mapping[str, str], description: str) -> str:
    """The opening of the description, the flags that matter, and the way to the others."""
    paragraphs = description.strip().split("\n\n")
    opening = wrapped("\n\n".join(paragraphs[:2]))  # what it does, and a command
    sections = [flags_help(title, [flags[name] for name in names if name in flags])
                for title, names in ESSENTIAL.items() if any(name in flags for name in names)]
    counts = {name: sum(flag.concern == name for flag in flags.values()) for name in titles}
    groups = {name: f"{title.partition(':')[0]} ({counts[name]})" for name, title in titles.items()}
    usage = f"usage: {Path(sys.argv[0]).name} --flag VALUE ..."
    return "\n".join([usage, "", opening, "", *sections, f"All {len(flags)} flags are in these groups:", *table(groups),
                      "", "To ask for more:", *table(QUESTIONS)]) + "\n"


def table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


def presets(flags: Mapping[str, Flag]) -> str:
    parts = []
    for name, values in PRESETS.items():
        settings = " ".join(f"--{flag}={shown(value)}" for flag, value in values.items() if flag in flags)
        parts.append(f"--preset {name}: {PRESET_USES[name]}\n{wrapped(settings, indent='    ')}\n")
    return "\n".join(parts)


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
    return f"lora-trainer-suite {__version__}\n{', '.join(found)}\n"


def completion(shell: str, flags: Mapping[str, Flag], titles: Mapping[str, str]) -> str:
    """The script for a shell, made by shtab."""
    if shell not in SHELLS:
        raise UserError(Problem(f"no completion for {shell or 'no shell'}", "--print_completion",
                                f"there is one for {' and '.join(SHELLS)}", f"--print_completion {SHELLS[0]}"))
    if importlib.util.find_spec("shtab") is None:
        raise UserError(Problem("the package shtab is not installed", "--print_completion",
                                "it writes the script, and nothing else needs it", "pip install shtab"))
    import shtab

    script: str = shtab.complete(completing_parser(flags, titles), shell)
    return script


def completing_parser(flags: Mapping[str, Flag], titles: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser of the command line, which also tells a shell what a flag takes. It reads no command line."""
    parser = make_parser(flags.values(), "", titles)
    for action in parser._actions:
        flag = flags[action.dest]
        action.choices = flag.choices or None
        if action.dest == "preset":
            action.choices = [*PRESETS, "list"]
        if flag.facts.path:
            action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]
    parser.add_argument("--help", nargs="?", choices=["all", *titles], help="the flags that matter, or a group")
    parser.add_argument("--help_all", action="store_true", help=QUESTIONS["--help_all"])
    parser.add_argument("--version", action="store_true", help=QUESTIONS["--version"])
    parser.add_argument("--print_completion", choices=SHELLS, help="a script for this shell")
    return parser
