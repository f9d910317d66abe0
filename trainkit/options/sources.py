"""Where values come from: command line > environment > config file > preset > default."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainkit.errors import Problem, UserError
from trainkit.options.base import Concern, Flag
from trainkit.options.cli import MISSING, make_parser, one_dash, split_leftovers, underscored
from trainkit.options.dataset_config import read_dataset_config
from trainkit.options.foreign import INSTEAD, SAME_VALUE, advice
from trainkit.options.names import nearest
from trainkit.options.trainers import known_flags, only_script_with
from trainkit.reading import parse_json, parse_toml, parse_yaml, read_text

ENV_PREFIX = "LORA_"
NO_SUCH = "--help lists all flags, docs/from-kohya.md those of kohya's trainers"
OTHER_DATA = {"train_data_dir": "instance_data_dir", "instance_data_dir": "train_data_dir"}  # of the two trainers
CONFIGS = {".toml": parse_toml, ".json": parse_json, ".yaml": parse_yaml, ".yml": parse_yaml}

PRESET_USES = {
    "style": "a style from about 25 images", "face": "a face from about six photographs",
    "sd15-4gb": "SD 1.5 at 512 px on a card with 4 GB", "sd15-8gb": "SD 1.5 at 512 px on a card with 8 GB",
    "sdxl-6gb": "SDXL at 1024 px on a card with 6 GB",
    "sdxl-8gb": "SDXL at 1024 px on a card with 8 GB", "sdxl-12gb": "SDXL at 1024 px on a card with 12 GB",
    "sdxl-16gb": "SDXL at 1024 px on a card with 16 GB", "sdxl-24gb": "SDXL at 1024 px on a card with 24 GB",
    "illustrious": "Illustrious, with tags", "noobai-vpred": "NoobAI V-Pred, with tags", "pony": "Pony V6, with tags",
}
# What SDXL's descendants that are prompted with tags have in common: photos of every shape, and long lists of tags.
OF_TAGS: dict[str, str | int | float | bool] = {
    "resolution": 1024, "enable_bucket": True, "shuffle_caption": True, "keep_tokens": 1,
    "max_token_length": 225,
}
PRESETS: dict[str, dict[str, str | int | float | bool]] = {
    # A style from about 25 images: a small rank and Prodigy finding the rate; larger ranks learn the images.
    "style": {
        "rank": 8, "optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "snr_gamma": 5.0, "train_batch_size": 3, "max_train_steps": 1000,
    },
    # A face from about six photographs: rank 32 (64 gives airbrushed skin), 120 steps a photograph.
    "face": {
        "rank": 32, "optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "snr_gamma": 5.0, "train_batch_size": 1, "num_train_epochs": 120,
    },
    # By card, only what decides memory; trainkit.plan proves each in tests/test_plan.py. Cards of 4 GB have no bf16.
    "sd15-4gb": {"mixed_precision": "fp16", "cache_latents": True, "gradient_checkpointing": True,
                 "train_batch_size": 1},
    "sd15-8gb": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": False,
                 "train_batch_size": 4},
    "sdxl-6gb": {"mixed_precision": "fp16", "base_precision": "int8", "cache_latents": True,
                 "gradient_checkpointing": True, "train_batch_size": 1},
    "sdxl-8gb": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": True,
                 "train_batch_size": 1},
    "sdxl-12gb": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": True,
                  "train_batch_size": 4},
    "sdxl-16gb": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": False,
                  "train_batch_size": 1},
    "sdxl-24gb": {"mixed_precision": "bf16", "cache_latents": True, "gradient_checkpointing": False,
                  "train_batch_size": 2},
    # By base model, only what the base needs; so they go with a style or a face, and with a card.
    "illustrious": OF_TAGS, "pony": OF_TAGS,
    # Min-SNR's weight is 0 where the SNR is 0, so it would take away the very levels that zero-terminal SNR adds.
    "noobai-vpred": {**OF_TAGS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                     "snr_gamma": "none"},
}


@dataclass(frozen=True)
class Layer:
    """The values one source gives, by flag, still as they were written."""

    origin: str
    values: Mapping[str, object]

    def spelling(self, flag: str) -> str:
        """How the user finds the value: `environment: LORA_RANK`."""
        return f"{self.origin}: " + (ENV_PREFIX + flag.upper() if self.origin == "environment" else f"--{flag}")


def read_layers(
    argv: Sequence[str], flags: Mapping[str, Flag], *, concerns: Mapping[str, type[Concern]], description: str
) -> tuple[list[Layer], list[Problem]]:
    """Every source that says something, strongest first, and what could not be read."""
    titles = {name: concern_class.title() for name, concern_class in concerns.items()}
    command, problems = _command_line(argv, flags, make_parser(flags.values(), description, titles))
    environment, more = _environment(flags)
    problems += more
    layers = [Layer("command line", command), Layer("environment", environment)]
    if (path := first_value(layers, "config")) is not None:
        data = _table_in(Path(str(path)), problems)
        values, more = _config(data, f"config {path}", flags, concerns)
        layers.append(Layer(f"config {path}", values))
        problems += more
    if (names := first_value(layers, "preset")) is not None:
        chosen = [name.strip() for name in str(names).split(",") if name.strip()]
        problems += [_unknown_preset(name, layers) for name in chosen if name not in PRESETS]
        layers += [Layer(f"preset {name}", {k: v for k, v in PRESETS[name].items() if k in flags})
                   for name in reversed(chosen) if name in PRESETS]  # the later one wins
    layers, more = with_dataset_config(layers, flags)
    problems += more
    shorthands = [concern_class.shorthand(partial(first_value, layers)) for concern_class in concerns.values()]
    layers += [Layer(f"preset {name}", values) for name, values in filter(None, shorthands)]
    return without_overruled(layers, flags), problems


def without_overruled(layers: Sequence[Layer], flags: Mapping[str, Flag]) -> list[Layer]:
    """The layers without the values that would keep a flag of a stronger layer from being read.

    --num_train_epochs is not read with --max_train_steps, so epochs on the command line remove the steps of a preset.
    """
    overruled: set[str] = set()
    found = []
    for layer in layers:
        found.append(Layer(layer.origin, {k: value for k, value in layer.values.items() if k not in overruled}))
        overruled |= {other for flag in layer.values for other in flags[flag].overrules} - layer.values.keys()
    return found


def with_dataset_config(layers: list[Layer], flags: Mapping[str, Flag]) -> tuple[list[Layer], list[Problem]]:
    """What the file of --dataset_config says goes before everything else, as in kohya's trainers."""
    path = first_value(layers, "dataset_config")
    if path is None or path is MISSING:
        return layers, []
    config = read_dataset_config(Path(str(path)))
    values = {name: _as_written(value) for name, value in config.run_values().items() if name in flags}
    return [Layer(f"dataset_config {path}", values), *layers], [*config.problems]


def _as_written(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def overruled_by_data(layers: Sequence[Layer]) -> list[str]:
    """Flags of the command line whose value the file of --dataset_config replaces."""
    first = layers[0] if layers and layers[0].origin.startswith("dataset_config ") else None
    given = next((layer.values for layer in layers if layer.origin == "command line"), {})
    return [f"--{name} {given[name]} is not used: {first.origin.partition(' ')[2]} says {first.values[name]}, and goes "
            "first, as in kohya's trainers" for name in given
            if first and name in first.values and f"{first.values[name]}" != f"{given[name]}"]


def first_value(layers: Sequence[Layer], flag: str) -> object:
    return next((layer.values[flag] for layer in layers if flag in layer.values), None)


def _command_line(
    argv: Sequence[str], flags: Mapping[str, Flag], parser: ArgumentParser
) -> tuple[dict[str, object], list[Problem]]:
    known = list(flags) + [f"no_{name}" for name, flag in flags.items() if flag.is_switch]
    words, single = one_dash(argv, {*known, *SAME_VALUE, *INSTEAD, *known_flags()})
    found, leftovers = parser.parse_known_args(underscored(words))
    values = {name: " ".join(value) or MISSING if isinstance(value, list) else value
              for name, value in vars(found).items()}
    problems = [_without_value(flags[name]) for name, value in values.items() if value is MISSING]
    problems += [Problem(f"{name} has one dash", "command line", "names of flags begin with two", f"-{name}")
                 for name in single]
    unknown, unassigned = split_leftovers(leftovers)
    problems += [_unknown(f"--{word}", value, "command line", "flag", known=known) for word, value in unknown.items()]
    problems += [_unassigned_words(unassigned)] if unassigned else []
    return {name: value for name, value in values.items() if value is not MISSING}, problems


def given_again(argv: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """Flags of one value that the command line gives more than once, where the last one counts."""
    words = [word[2:].partition("=")[0] for word in underscored(argv) if word.startswith("--")]
    names = [word if word in flags else word.removeprefix("no_") for word in words]
    return [name for name in dict.fromkeys(names) if name in flags and names.count(name) > 1 and not flags[name].many]


def _environment(flags: Mapping[str, Flag]) -> tuple[dict[str, object], list[Problem]]:
    """Variables LORA_<FLAG>; an empty one counts as unset, one that is nearly a flag's name as a slip."""
    values: dict[str, object] = {}
    problems = []
    for variable, value in os.environ.items():
        word = variable.removeprefix(ENV_PREFIX).lower()
        if not variable.startswith(ENV_PREFIX) or not value:
            continue
        if word in flags:
            values[word] = value
        elif match := nearest(word, list(flags)):
            problems.append(Problem(f"unknown variable {variable}", "environment", "no variable has this name",
                                    f"did you mean {ENV_PREFIX}{match.upper()}? otherwise remove it"))
    return values, problems


def _table_in(path: Path, problems: Sequence[Problem]) -> dict[str, object]:
    """The table in a config file. Raises UserError where there is none, with the problems that are known already.

    Others are not looked for: what is missing or contradictory then may be in the file.
    """
    try:
        return _load(path)
    except (OSError, ValueError) as error:
        raise UserError(*problems, _unreadable_config(path, error)) from error


def _config(
    data: Mapping[str, object], origin: str, flags: Mapping[str, Flag], concerns: Mapping[str, type[Concern]],
) -> tuple[dict[str, object], list[Problem]]:
    values: dict[str, object] = {}
    problems = []
    for key, value in data.items():
        if problem := _no_table(key, value, flags, concerns, origin):
            problems.append(problem)
    for table, written, value in _entries(data, flags, concerns):
        prefix = concerns[table].prefix if table else ""
        name = written.replace("-", "_")
        name = prefix + name if prefix + name in flags else name
        where = origin + (f", [{table}]" if table else "")
        if name == "config":
            problems.append(_file_in_file(where, flags))
        elif name not in flags:
            problems.append(_unknown(written, f"{value}", where, "key", known=flags,
                                     match=_nearest_key(name, flags, table, prefix)))
        elif table not in (None, flags[name].concern):
            problems.append(_wrong_table(name, flags[name].concern, where))
        elif name in values:
            problems.append(_twice(name, where))
        else:
            many = flags[name].many and isinstance(value, list)
            values[name] = " ".join(map(str, value)) if many and isinstance(value, list) else value
    return values, problems


def _entries(
    data: Mapping[str, object], flags: Container[str], concerns: Mapping[str, type[Concern]],
) -> Iterator[tuple[str | None, str, object]]:
    """(table or None, key, value) of a config: flat keys and tables named after concerns."""
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in concerns and isinstance(value, dict):
            yield from ((name, str(inner), leaf) for inner, leaf in value.items())
        elif not _no_table(key, value, flags, concerns, ""):
            yield None, str(key), value


def _no_table(
    key: object, value: object, flags: Container[str], concerns: Mapping[str, type[Concern]], where: str,
) -> Problem | None:
    """What is wrong with a table of a name that is none, or with a table's name that has no table."""
    name = str(key).replace("-", "_")
    if name in concerns and name not in flags and not isinstance(value, dict):
        first = next(iter(concerns[name].model_fields)).removeprefix(concerns[name].prefix)
        return Problem(f"{name} is no table", where, f"[{name}] is a table of keys, and stands there once",
                       f"write [{name}] and below it its keys, such as {first}; or remove it")
    tables = value if isinstance(value, list) and value else [value]
    if name in flags or name in concerns or not all(isinstance(table, dict) for table in tables):
        return None
    match = nearest(name, list(concerns))
    return Problem(f"unknown table [{key}]", where, f"the tables are {', '.join(concerns)}",
                   f"did you mean [{match}]? otherwise remove it" if match else "remove it, or name one of these")


def _nearest_key(name: str, flags: Mapping[str, Flag], table: str | None, prefix: str) -> str | None:
    """The key most likely meant, without its prefix in the table that may leave it out."""
    short = [key.removeprefix(prefix) for key, flag in flags.items() if prefix and flag.concern == table]
    return nearest(name, short) or nearest(name, list(flags))


def _load(path: Path) -> dict[str, object]:
    """The table in a config file; ValueError when it is not one."""
    parse = CONFIGS.get(path.suffix.lower())
    if parse is None:
        raise ValueError(f"{path.suffix or 'no ending'} is not one of .toml, .yaml, .yml, .json")
    data = parse(read_text(path, of_windows=True))
    if not isinstance(data, dict):
        raise ValueError("it holds no table of flags")
    return data


def _without_value(flag: Flag) -> Problem:
    return Problem(f"--{flag.name} has no value", "command line", f"it takes {flag.takes}",
                   f"write --{flag.name} VALUE, or leave it out")


def _unknown(written: str, value: str | None, where: str, noun: str, *, known: Collection[str],
             match: str | None = None) -> Problem:
    """A flag or key that this trainer does not have: the other trainer's, another program's, or a slip.

    match  the known one most likely meant, where it is not simply the nearest name
    """
    dashes = "--" if noun == "flag" else ""
    name = written.removeprefix(dashes).lower().replace("-", "_")
    what, unread = f"unknown {noun} {written}", f"no {noun} has this name"
    script = only_script_with(name.removeprefix("no_"))
    if script:
        fix = f"write {dashes}{OTHER_DATA[name]}, or use {script}" if name in OTHER_DATA else (
            f"use {script}, which has it" + (f"; or did you mean {dashes}{match}?" if match else ""))
        return Problem(what, where, f"{unread} here: {written} belongs to {script}", fix)
    ours, todo = advice(name, value) or (None, "")
    if todo:
        elsewhere = ours and ours not in known and only_script_with(ours)
        todo = f"use {elsewhere}: there it is {dashes}{ours}" if elsewhere else todo
        return Problem(what, where, "another trainer's name for it, which this one does not read",
                       todo if dashes or elsewhere or ours is None else f"write {ours}")
    match = match or nearest(name, list(known))
    return Problem(what, where, unread, (f"did you mean {dashes}{match}? " if match else "") + NO_SUCH)


def _file_in_file(where: str, flags: Container[str]) -> Problem:
    preset = ", or write fourier_config for a preset of the Fourier loss" if "fourier_config" in flags else ""
    return Problem("config cannot stand in a config file", where, "--config names the file, on the command line",
                   f"remove it{preset}")


def _unassigned_words(words: Sequence[str]) -> Problem:
    return Problem(f"belonging to no flag: {' '.join(words)}", "command line", "a value with blanks needs quotes",
                   'quote the whole value: --flag "a value with blanks"')


def _unreadable_config(path: Path, error: Exception) -> Problem:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Problem(f"cannot read the config file {path}", "--config", reason, "fix the file or give another path")


def _wrong_table(name: str, concern: str, where: str) -> Problem:
    return Problem(f"{name} stands in the wrong table", where, f"it belongs to [{concern}]",
                   f"move it to [{concern}] or above all tables")


def _twice(name: str, where: str) -> Problem:
    return Problem(f"{name} is given twice", where, "which of the two counts would be a guess", "remove one")


def _unknown_preset(name: str, layers: Sequence[Layer]) -> Problem:
    layer = next(layer for layer in layers if "preset" in layer.values)
    match = nearest(name, list(PRESETS))
    return Problem(f"unknown preset {name!r}", layer.spelling("preset"), f"presets are {', '.join(PRESETS)}",
                   f"--preset {match or next(iter(PRESETS))}")
