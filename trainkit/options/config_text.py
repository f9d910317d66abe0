"""The options as text: a config file with origins for --print_config, and docs/flags.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import groupby

from trainkit.options.base import Concern, Flag, Value
from trainkit.options.cli import shown
from trainkit.options.trainers import merged
from trainkit.redact import redact

Concerns = Mapping[str, type[Concern]]  # of one trainer, by the name of the table in a config file

SOURCES = ("config", "preset", "print_config", "plan")  # where values come from, and what ends a command


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
    if value is not None and (flag.secret or redact(f"{value}") != f"{value}"):
        return f"# {flag.name} is set, not shown"
    if value is None and origin == "default":
        return f"# {flag.name} is not set"
    written = "none" if value is None else value  # switched off, or set by a preset and taken back
    scalar = json.dumps(written, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's are TOML's, but for DEL
    text = f"{flag.name} = {scalar}"
    return f"# {text}" if flag.name in SOURCES or origin == "default" else text


def readable_anywhere(toml: str) -> str:
    """The same TOML in ASCII, where standard output has an encoding that --config would not read."""
    if (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8":
        return toml
    return "".join(c if c.isascii() else f"\\U{ord(c):08x}" for c in toml)


def markdown(trainers: Mapping[str, Concerns], presets: Mapping[str, Mapping[str, Value]]) -> str:
    """docs/flags.md: every flag once, with what a trainer has otherwise; `trainers` is by name."""
    parts = [INTRODUCTION, _preset_text(presets)]
    for concern in reduce(merged, map(list, trainers.values())):
        concern_classes = {trainer: concerns[concern] for trainer, concerns in trainers.items() if concern in concerns}
        only = "" if len(concern_classes) == len(trainers) else f", {' and '.join(concern_classes)} only"
        title = next(iter(concern_classes.values())).title()
        parts.append(f"## {title} (`[{concern}]`{only})\n\n{_table(concern, concern_classes)}")
    return "\n\n".join(parts) + "\n"


def _table(concern: str, concern_classes: Mapping[str, type[Concern]]) -> str:
    """A concern's flags, as its trainers have them."""
    lines = ["| flag | value | default | meaning |", "|---|---|---|---|"]
    for name in reduce(merged, (list(concern_class.model_fields) for concern_class in concern_classes.values())):
        flags = {trainer: concern_class.flag(name, concern) for trainer, concern_class in concern_classes.items()
                 if name in concern_class.model_fields}
        only = "" if len(flags) == len(concern_classes) else f" ({' and '.join(flags)} only)"
        cells = [f"`--{name}`{only}", _agreed(flags, _value), _agreed(flags, _default), _meaning(flags)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreed(flags: Mapping[str, Flag], text: Callable[[Flag], str]) -> str:
    """What the flags of all trainers say, or else each one's after its trainer's name."""
    texts = {trainer: text(flag) for trainer, flag in flags.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{trainer}: {text}" for trainer, text in texts.items())


def _meaning(flags: Mapping[str, Flag]) -> str:
    notes = {trainer: flag.facts.differs for trainer, flag in flags.items()}
    if len(set(notes.values())) == 1:
        notes = {"": next(iter(notes.values()))}
    unlike = [f" *Unlike in the Diffusers {f'{trainer} ' if trainer else ''}script, {note}.*"
              for trainer, note in notes.items() if note]
    texts = {trainer: flag.help for trainer, flag in flags.items()}
    if len(set(texts.values())) == 1:
        texts = {"": flags[next(iter(flags))].help}
    helps = [f"**{trainer}:** {text}" if trainer else text for trainer, text in texts.items()]
    return " ".join(helps) + "".join(unlike)


def _default(flag: Flag) -> str:
    return "**required**" if flag.required else f"`{shown(flag.default)}`"


def _value(flag: Flag) -> str:
    """What the flag takes: choices, or a unit and its range."""
    if flag.choices:
        return " · ".join(f"`{choice}`" for choice in flag.choices)
    off = "or 0 for off" if flag.facts.off is None else ""  # which no limit shows
    return "on/off" if flag.is_switch else ", ".join(filter(None, [flag.facts.unit or "text", flag.limits, off]))


def _preset_text(presets: Mapping[str, Mapping[str, Value]]) -> str:
    lines = ["## Presets (`--preset`)", "", PRESET_STEPS, "", "| preset | values |", "|---|---|"]
    for name, values in presets.items():
        lines.append(f"| `{name}` | {' '.join(f'`--{flag} {shown(value)}`' for flag, value in values.items())} |")
    return "\n".join(lines)


PRESET_STEPS = """\
The 1000 steps of `style` are right for 25 images. For another number of images, add
`--num_train_epochs=120`: what you type is stronger than the preset.

The presets that are named after a card set only what decides memory ([memory.md](memory.md)).
`illustrious`, `noobai-vpred` and `pony` set only what these base models need
([recipes.md](recipes.md#illustrious-noobai-pony)). Several presets can be given, as in
`--preset=style,sdxl-8gb`. If two of them set a flag, the later one wins."""

INTRODUCTION = """\
# Flags

You need this page when you look for a flag or its default. To learn which flags to use, start with
[recipes.md](recipes.md). This page is generated from the flags in the code, with
`.venv/bin/python -m trainkit.options`. A test fails if page and code differ.

Two trainers have these flags. In the tables, DreamBooth means `train_dreambooth_lora_sdxl_advanced.py`,
and text-to-image means `train_text_to_image_lora.py`. A flag without a mark is in both trainers.

The Diffusers scripts of the same names have many of these flags, with the same names and types. Two
defaults differ: `--seed` is 0 here and unset there, and `--resolution` of text-to-image is 512 here
and 1024 in the Diffusers script for SDXL. Some flags have the same name, but do something different.
Their rows say so in italics. So the same command may give another result here than there.

**Where a value comes from.** If several sources give a value, the one that is higher in this list wins:

1. the command line: `--rank=8`
2. the environment: `LORA_` and the name of the flag in capitals, such as `LORA_RANK=8` or
   `LORA_OUTPUT_DIR=runs/a`. An empty variable counts as not set.
3. the file of `--config`
4. the preset of `--preset`
5. the default

**Config files.** A config file is TOML, YAML or JSON. Write a flag at the top level, or in the table of
its group. The headings on this page have the names of the groups, such as `[lora]`:

```toml
# my.toml
preset = "style"
[lora]
rank = 16
```

Give the file to the trainer with `--config=my.toml`. `--print_config` prints every value with its
source, and stops. If you add `--print_config > my.toml` to a command, you get a config file with the
values of this command.

**How to write flags.**

- `--instance-data-dir` is the same as `--instance_data_dir`.
- A flag with the value on/off is a switch. `--cache_latents` and `--cache_latents=True` switch it on.
  `--no_cache_latents` and `--cache_latents=False` switch it off.
- In the choices of a flag, capital and small letters make no difference.
- Some flags have the default `none`. For these, the value `none` removes a value that a preset or a
  config file has set. For example, `--preset=style --snr_gamma=none` trains without Min-SNR.
- Many numbers can be switched off: `--max_grad_norm=0`, `--num_validation_images=0`. Their rows say
  "or 0 for off" or "≥ 0". Instead of 0, you can also write `none` or `off`.
- If a command has mistakes, the trainer lists all of them in one message, with the nearest flag or
  value for each. The exit code is then 2.

A **batch** is the images of one forward pass on one device: `--train_batch_size` images of yours, and as
many class images with prior preservation. An **optimizer step** is one update of the weights. It uses one
batch on each device, or several with `--gradient_accumulation_steps`. All images of one optimizer step
together are the **global batch**."""
