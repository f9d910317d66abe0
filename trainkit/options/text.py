"""The options as text: a config file with origins for --print_config, and docs/flags.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby

from trainkit.options.base import Concern, Flag, Value
from trainkit.options.cli import shown

SOURCES = ("config", "preset", "print_config")  # they say where values come from: the printed values replace them


def config_text(flags: Mapping[str, Flag], values: Mapping[str, Value], origins: Mapping[str, str]) -> str:
    """TOML of every value with its origin; `--config` reads it back.

    Unset and secret values are comments. So are defaults: to give a value is more than to have it (--text_encoder_lr).
    """
    lines = []
    for concern, members in groupby(flags.values(), key=lambda flag: flag.concern):
        lines += ["", f"[{concern}]"]
        lines += [f"{_assignment(flag, values[flag.name], origins[flag.name]):<60} # {origins[flag.name]}"
                  for flag in members]
    return "\n".join(lines[1:]) + "\n"


def _assignment(flag: Flag, value: Value, origin: str) -> str:
    if flag.secret and value is not None:
        return f"# {flag.name} is set, not shown"
    if value is None:
        return f"# {flag.name} is not set"
    text = f"{flag.name} = {json.dumps(value, ensure_ascii=False)}"  # JSON's scalars are TOML's
    return f"# {text}" if flag.name in SOURCES or origin == "default" else text


def markdown(concerns: Mapping[str, type[Concern]], presets: Mapping[str, Mapping[str, Value]]) -> str:
    """docs/flags.md."""
    parts = [INTRODUCTION, _preset_text(presets)]
    for name, kind in concerns.items():
        parts.append(f"## {kind.title()} (`[{name}]`)\n\n{_table(kind.flags(name))}")
    return "\n\n".join(parts) + "\n"


def _table(flags: Iterable[Flag]) -> str:
    head = ["| flag | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join(head + [_row(flag) for flag in flags])


def _row(flag: Flag) -> str:
    meaning = flag.help
    if differs := flag.note("differs"):
        meaning += f". *Unlike the Diffusers script: {differs}.*"
    default = "**required**" if flag.required else f"`{shown(flag.default)}`"
    return f"| `--{flag.name}` | {_value(flag)} | {default} | {meaning} |"


def _value(flag: Flag) -> str:
    """What the flag takes: choices, or a unit and its range."""
    if flag.choices:
        return " · ".join(f"`{choice}`" for choice in flag.choices)
    return "on/off" if flag.is_switch else ", ".join(filter(None, [flag.note("unit") or "text", flag.limits]))


def _preset_text(presets: Mapping[str, Mapping[str, Value]]) -> str:
    lines = ["## Presets (`--preset`)", "", "| preset | values |", "|---|---|"]
    for name, values in presets.items():
        lines.append(f"| `{name}` | {' '.join(f'`--{flag} {shown(value)}`' for flag, value in values.items())} |")
    return "\n".join(lines)


INTRODUCTION = """\
# Flags

Generated from `trainkit/options` (`python -m trainkit.options > docs/flags.md`); a test keeps this page current.

Names, types and defaults are those of the Diffusers script `train_dreambooth_lora_sdxl_advanced.py`
(huggingface/diffusers, examples/advanced_diffusion_training); where we differ, the flag's row says so.

- A value comes from the command line, else from the environment (`LORA_RANK=8` for `--rank 8`; an empty variable counts
  as unset), else from the `--config` file, else from the `--preset`, else it is the default.
- A config file is TOML, YAML or JSON, its keys flat or in tables named after the groups below (`[lora]`).
- `--print_config` prints every value with its origin and stops. That is a config file, too, with defaults as comments.
- Dashes work for underscores (`--instance-data-dir`). Every switch has a twin `--no_…` and takes `=True` or `=False`.
- Choices are read in any case. `none` unsets a number or a choice that a preset or a config has set.
- All mistakes in a command are reported at once, each with the nearest flag or value; the exit code is 2."""
