"""A trainer's options: one frozen field for each concern, read from every source, checked as one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretStr, ValidationError

from trainkit.errors import IN_UTF8, Problem, refuse, unwritable
from trainkit.options import help, rules
from trainkit.options.base import Concern, Flag, Value, steps_of_fraction
from trainkit.options.cli import shown
from trainkit.options.config_text import config_text, readable_anywhere
from trainkit.options.names import nearest
from trainkit.options.sources import Layer, given_again, overruled_by_data, read_layers
from trainkit.redact import REDACTED

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class OptionSet(BaseModel):
    """Subclass it with one field a concern: `class Options(OptionSet): model: ModelOptions; data: DataOptions`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _given_again: list[str] = PrivateAttr(default_factory=list)  # on the command line
    _overruled: list[str] = PrivateAttr(default_factory=list)  # sentences about what --dataset_config replaces

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        names = [name for concern_class in cls.concerns().values() for name in concern_class.model_fields]
        assert len(set(names)) == len(names), f"{cls.__name__}: two concerns share a flag"

    @classmethod
    def concerns(cls) -> dict[str, type[Concern]]:
        return {name: field.annotation for name, field in cls.model_fields.items()}  # type: ignore[misc]

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """Every flag by name, in the order of --help."""
        return {flag.name: flag for concern, concern_class in cls.concerns().items()
                for flag in concern_class.flags(concern)}

    @property
    def origins(self) -> dict[str, str]:
        """Where each flag's value came from: command line, environment, config FILE, preset NAME or default."""
        return {name: self._origins.get(name, "default") for name in self.flags()}

    def flat(self) -> dict[str, Value]:
        """Every value by flag, fit for JSON; a token is replaced by ***."""
        return _flat({name: getattr(self, name) for name in self.concerns()})

    def problems(self) -> Iterator[Problem]:
        """Values that contradict each other."""
        return rules.problems(self.flat())

    def notices(self) -> list[str]:
        """Sentences for the log about values that have no effect."""
        flags, values = self.flags(), self.flat()
        chosen = {name for name, origin in self._origins.items()
                  if not origin.startswith("preset ") and values[name] != flags[name].default}
        given = {name for concern in self.concerns() for name in getattr(self, concern).model_fields_set}
        again = [f"--{name} is given more than once: only the last one counts, {shown(values[name])}"
                 for name in self._given_again]
        return [*again, *self._overruled, *rules.notices(values, flags, chosen, given)]


AnyOptions = TypeVar("AnyOptions", bound=OptionSet)


def parse(cls: type[AnyOptions], argv: Sequence[str] | None = None, *, description: str) -> AnyOptions:
    """Options from the command line (sys.argv when None), environment, --config, --preset and defaults.

    Raises one UserError for everything that keeps a value from being read: unknown flags and keys, missing and invalid
    values. Contradictions between readable values are left to `OptionSet.problems`, so that a trainer can report them
    together with those of its model and data. Exits 0 after --help, --print_config and what else only asks.
    """
    flags = cls.flags()
    words = sys.argv[1:] if argv is None else argv
    titles = {name: concern_class.title() for name, concern_class in cls.concerns().items()}
    if (text := help.answer(words, flags, titles=titles, description=description)) is not None:
        _print(text)
    layers, problems = read_layers(words, flags, concerns=cls.concerns(), description=description)
    sources = {name: layer for layer in reversed(layers) for name in layer.values}
    origins = {name: layer.origin for name, layer in sources.items()}
    built: dict[str, Concern] = {}
    for concern, concern_class in cls.concerns().items():
        values = {name: sources[name].values[name] for name in concern_class.model_fields if name in sources}
        part, errors = _build(concern_class, values)
        built |= {concern: part} if part else {}
        problems += [_invalid_value(flags[str(error["loc"][0])], error, sources) for error in errors]
    if problems:
        refuse([*problems, *rules.problems(_flat(built))])
    options = cls(**built)
    options._origins.update(origins)
    options._given_again.extend(given_again(words, flags))
    options._overruled.extend(overruled_by_data(layers))
    if options.flat().get("print_config"):
        _print(readable_anywhere(config_text(options.flags(), options.flat(), options.origins)))
    return options


def _build(concern_class: type[Concern], values: Mapping[str, object]) -> tuple[Concern | None, list[ErrorDetails]]:
    """The concern and what was wrong with its values; defaults stand in for those, None when one is required."""
    try:
        return concern_class(**values), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    invalid = {error["loc"][0] for error in errors}
    if any(concern_class.model_fields[str(name)].is_required() for name in invalid):
        return None, errors
    return concern_class(**{name: value for name, value in values.items() if name not in invalid}), errors


def _flat(concerns: Mapping[str, Concern]) -> dict[str, Value]:
    pairs = [pair for concern in concerns.values() for pair in concern]
    return {name: REDACTED if isinstance(value, SecretStr) else value for name, value in pairs}


def _print(text: str) -> NoReturn:
    """The whole answer of a command that only asks."""
    with suppress(BrokenPipeError):  # `| head` has seen enough
        sys.stdout.write(text)
        sys.stdout.flush()
        raise SystemExit(0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at its end
    raise SystemExit(0)


def _invalid_value(flag: Flag, error: ErrorDetails, sources: Mapping[str, Layer]) -> Problem:
    """A value its field refuses, in the user's words."""
    if error["type"] == "missing":
        return Problem(f"--{flag.name} is missing", "command line, environment and config", flag.help,
                       f"add --{flag.name} {flag.metavar}")
    written = REDACTED if flag.secret else repr(error["input"])
    why = error["msg"].removeprefix("Value error, ").replace("Input should", "it should").partition(", unable")[0]
    fix = _steps_of_fraction(flag, str(error["input"]), sources) or _better(flag, str(error["input"]))
    return Problem(f"--{flag.name} cannot be {written}", sources[flag.name].spelling(flag.name), why, fix)


def _steps_of_fraction(flag: Flag, written: str, sources: Mapping[str, Layer]) -> str:
    """What a fraction of the run, as other trainers take it, is in steps; "" for other values and flags."""
    try:
        fraction = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        return ""
    if flag.facts.unit != "steps" or flag.value_type is not int or not 0 < fraction < 1:
        return ""
    try:
        total = int(str(sources["max_train_steps"].values["max_train_steps"]))
    except (KeyError, ValueError):
        return f"--{flag.name} counts steps: write {fraction:g} times those of the run (epochs x images / batch)"
    return f"--{flag.name} {steps_of_fraction(fraction, total)}: {fraction:g} would be that many of {total} steps"


def _better(flag: Flag, written: str) -> str:
    if unwritable(written):
        return IN_UTF8
    if flag.choices:
        match = nearest(written.lower(), flag.choices)
        return f"choose {flag.takes}" + (f"; did you mean --{flag.name} {match}?" if match else "")
    if flag.is_switch:
        return f"--{flag.name} or --no_{flag.name}"
    example = f", for example the default {flag.default}" if flag.default is not None else ""
    return f"give --{flag.name} {flag.takes}{example}{_how_off(flag, written)}"


def _how_off(flag: Flag, written: str) -> str:
    """How a number is switched off: by a value of its own, or with what it is read with."""
    if flag.value_type not in (int, float):
        return ""
    asks_off = written.strip().lower() in ("0", "none", "off", "no", "false", "null", "")
    if flag.facts.can_be_off:
        return f"; --{flag.name} 0 switches it off"
    if flag.optional:
        return f"; --{flag.name} none leaves it open"
    needed = next(flag.prerequisites, None)
    words = needed and (needed.said or " or ".join(sorted(f"--{name}" for name in needed.flags)))
    return f"; it has no effect without {words}" if words and asks_off else ""

