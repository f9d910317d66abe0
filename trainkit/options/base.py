"""What an option is: a frozen pydantic field whose name is the flag and which carries all facts about it.

--help, config files, docs/flags.md, the notices about flags without effect, the fingerprint of a checkpoint, the model
card and the report are made from these facts. A new flag is one field here and one use of its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from trainkit.errors import unwritable
from trainkit.options.prerequisites import Prerequisite, needs
from trainkit.redact import REDACTED

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # of pydantic's limits

Value = str | int | float | bool | None
Resume = Literal["decisive", "may change", "in the data"]
Compat = Literal["diffusers", "kohya"]  # the trainer that --compat names
PathKind = Literal["or Hub name"] | bool
OFF_WORDS = ("none", "off", "no", "never", "null", "disabled")  # and 0, for a number that can be switched off


@dataclass(frozen=True)
class CardRow:
    """How the table of settings in the model card names a flag, and whether it shows the default too."""

    label: str
    always: bool = False


def always(label: str) -> CardRow:
    """For `opt(card=...)`: a setting that the card shows at its default too."""
    return CardRow(label, always=True)


class NoOff(Enum):
    """Stands for the value of a number that cannot be switched off."""

    NO_OFF = "no off"


NO_OFF = NoOff.NO_OFF


@dataclass(frozen=True)
class Facts:
    """What is known of a flag beside its type, default, limits and help. See `opt`."""

    unit: str = ""
    differs: str = ""
    many: bool = False
    resume: Resume = "decisive"
    read_with: Prerequisite | None = None
    card: CardRow | None = None
    path: PathKind = False
    notice: str = ""
    off: int | float | None | NoOff = NO_OFF
    bare: str | None = None

    @property
    def can_be_off(self) -> bool:
        return not isinstance(self.off, NoOff)


def opt(
    default: object, help: str, *, unit: str = "", differs: str = "", many: bool = False, resume: Resume = "decisive",
    read_with: str | Prerequisite = "", card: str | CardRow = "", path: PathKind = False, notice: str = "",
    off: int | float | None | NoOff = NO_OFF, bare: str | None = None, **limits: Any,
) -> Any:  # as pydantic's Field, which stands as the default of a field of any type
    """A field of a concern, with everything that the suite knows about the flag.

    unit       what the value counts ("steps", "pixels", "0..1"); a path has a unit without it
    differs    where we leave the Diffusers script, and why
    many       words on the command line are one value
    resume     "decisive": a resumed run must repeat the value, which is part of the checkpoint's fingerprint.
               "may change": a resumed run may have another value.
               "in the data": the fingerprint holds what the value leads to: digests of images, captions and model
               files, the images in a step, the length of the run, the values of a preset.
               A flag that does not say is decisive, since refusing to resume is the smaller mistake
    read_with  what the flag is read only with, such as "use_ema" or "lora_type=lokr"; prerequisites.py has the syntax.
               Otherwise the flag has no effect: a notice says so, and the card leaves it out
    card       the label of the value in the model card, which shows it when it is not the default; always("Rank")
               shows it in any case
    path       the value is a file or folder, of which the report shows the last part only; "or Hub name" if it may
               also be a name on the Hub
    notice     what the log says when a switch that does nothing is on
    off        the value that a number has when it is switched off, which 0 and the words of OFF_WORDS then mean
    bare       the value that the flag has where none is written behind it; else it must have one
    limits     pydantic's ge, gt, le, lt and min_length
    """
    unit = unit or {"or Hub name": "path or name", True: "path"}.get(path, "")
    facts = Facts(unit=unit, differs=differs, many=many, resume=resume, read_with=_prerequisite(read_with),
                  card=_card_row(card), path=path, notice=notice, off=off, bare=bare)
    return _field(default, help, facts, limits)


def required(help: str, **settings: Any) -> Any:
    """A field the user must give."""
    return opt(..., help, **settings)


def changed(
    concern_class: type[Concern], name: str, default: object, *, help: str | None = None, differs: str | None = None,
) -> Any:
    """A field of `concern_class` for a subclass: this default, other texts where given, its facts, limits and place."""
    flag = concern_class.flag(name)
    bounds = {bound: getattr(limit, bound) for limit in flag.field.metadata for bound in (*SIGNS, "min_length")
              if hasattr(limit, bound)}
    facts = flag.facts if differs is None else replace(flag.facts, differs=differs)
    return _field(default, flag.help if help is None else help, facts, bounds)


def _field(default: object, help: str, facts: Facts, limits: Mapping[str, Any]) -> Any:
    notes: Any = {"facts": facts}  # pydantic carries it along and looks at none of it
    return Field(default, description=help, json_schema_extra=notes, **limits)


def _prerequisite(read_with: str | Prerequisite) -> Prerequisite | None:
    if isinstance(read_with, Prerequisite):
        return read_with
    return needs(read_with) if read_with else None


def _card_row(card: str | CardRow) -> CardRow | None:
    if isinstance(card, CardRow):
        return card
    return CardRow(card) if card else None


@dataclass(frozen=True)
class Flag:
    """One command line flag, read off a field of a concern."""

    name: str
    concern: str  # name of the concern in the option set, also the table's name in a config file
    field: FieldInfo
    shared: Prerequisite | None = None  # of all flags of the concern but those it names itself

    @property
    def facts(self) -> Facts:
        extra: Any = self.field.json_schema_extra
        assert isinstance(extra, dict), f"--{self.name} must be made by opt()"
        facts: Facts = extra["facts"]
        return facts

    @property
    def prerequisites(self) -> Iterator[Prerequisite]:
        """What the flag is read only with: first what its concern is, unless the flag names that, too; then its own."""
        named = self.facts.read_with.flags if self.facts.read_with else set()
        if self.shared and self.name not in self.shared.flags and not named & self.shared.flags:
            yield self.shared
        if self.facts.read_with:
            yield self.facts.read_with

    @property
    def overrules(self) -> set[str]:
        """Flags of weaker sources that give way to this one: those without which alone it is read."""
        needed = self.facts.read_with
        alone = needed.alternatives[0] if needed else ()
        return {term.flag for term in alone} if all(term.sign == "no" for term in alone) else set()

    @property
    def value_type(self) -> object:
        """The type a value has when there is one: `int | None` -> int."""
        annotation = self.field.annotation
        if get_origin(annotation) in (Union, UnionType):
            return next(arg for arg in get_args(annotation) if arg is not NoneType)
        return annotation

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.value_type) if get_origin(self.value_type) is Literal else ()

    @property
    def is_open(self) -> bool:
        """Whether other words than the choices are read too."""
        return bool(self.choices) and str in get_args(self.field.annotation)

    @property
    def optional(self) -> bool:
        return NoneType in get_args(self.field.annotation)

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Value:
        return None if self.required else self.field.default

    @property
    def secret(self) -> bool:
        return self.value_type is SecretStr

    @property
    def many(self) -> bool:
        """Whether all words after it on the command line are its value."""
        return self.facts.many

    @property
    def is_switch(self) -> bool:
        return self.value_type is bool

    @property
    def help(self) -> str:
        assert self.field.description, f"--{self.name} has no help"
        return self.field.description

    @property
    def metavar(self) -> str:
        return "CHOICE" if self.choices else self.facts.unit.upper().replace(" ", "_") or "TEXT"

    @property
    def takes(self) -> str:
        """What a value looks like, in words."""
        return " or ".join(filter(None, [", ".join(self.choices[:-1]), *self.choices[-1:]])) or self.metavar

    @property
    def limits(self) -> str:
        """The range of a number, such as "≥ 1, ≤ 4096"; a length says nothing here."""
        bounds = [(sign, getattr(limit, name)) for limit in self.field.metadata for name, sign in SIGNS.items()
                  if hasattr(limit, name)]
        return ", ".join(f"{sign} {bound}" for sign, bound in bounds)


def steps_of_fraction(fraction: float, total: int) -> int:
    """Optimizer steps in `fraction` of `total`, rounded up, so that a fraction above 0 is one step at least.

    The fraction counts as it is written: 0.07 of 100 steps are 7, though the float is a little more than 0.07.
    """
    return math.ceil(Fraction(str(fraction)) * total)


class Concern(BaseModel):
    """Options that belong together; frozen, so that what was asked for is what a run's record says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str] = ""  # of the flags, which the concern's own table in a config file may leave out
    read_with: ClassVar[str | Prerequisite] = ""  # as in `opt`, for all flags of the concern but those it names

    @classmethod
    def flags(cls, concern: str = "") -> Iterator[Flag]:
        return (cls.flag(name, concern) for name in cls.model_fields)

    @classmethod
    def flag(cls, name: str, concern: str = "") -> Flag:
        return Flag(name, concern, cls.model_fields[name], cls.prerequisite())

    @classmethod
    def prerequisite(cls) -> Prerequisite | None:
        """What its flags are read only with, but for those that this names."""
        return _prerequisite(cls.read_with)

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """The concern that has its part of these values, by flag, which are taken as they are."""
        known: dict[str, Any] = {name: values[name] for name in cls.model_fields if name in values}
        built: Any = cls.model_construct(**known)
        return built

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        return cls.flag(name).choices

    @classmethod
    def shorthand(cls, value_of: Callable[[str], object]) -> tuple[str, Mapping[str, object]] | None:
        """What a flag of this concern stands for: the preset's name and its values by flag. `value_of` reads flags."""
        return None

    def decisive(self) -> dict[str, object]:
        """What of it decides the bits of a run, by flag: the decisive flags, unless a concern knows better."""
        return {f"--{flag.name}": REDACTED if flag.secret else getattr(self, flag.name) for flag in self.flags()
                if flag.facts.resume == "decisive"}

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or "").partition("\n")[0]

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        """Spellings that mean one value: any case in a choice, "none" for no value; and no number out of true."""
        assert info.field_name
        flag = cls.flag(info.field_name)
        if isinstance(value, str) and (why := unwritable(value)):
            raise ValueError(why)
        if flag.choices:
            return _read_choice(value, flag)
        if flag.facts.can_be_off and _is_off(value, flag.facts.off):
            return flag.facts.off
        if isinstance(value, bool) and flag.value_type in (int, float):
            raise ValueError("true and false are not numbers")
        if flag.optional and _is_none(value):
            return None
        return value


def _read_choice(value: object, flag: Flag) -> object:
    if value is False and "no" in flag.choices:
        return "no"  # YAML 1.1 reads a bare `no` as false
    if not isinstance(value, str):
        return value
    lowered = value.lower()
    if flag.is_open and lowered not in flag.choices:
        return value
    return None if flag.optional and lowered == "none" and "none" not in flag.choices else lowered


def _is_off(value: object, off: object) -> bool:
    """Whether a number's value says that it is off; YAML reads `off` and `no` as false, and `null` as nothing."""
    if value is None or value is False or isinstance(value, (int, float)) and value == 0:
        return True
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in OFF_WORDS or (off is None and word in ("inf", "infinity", "unlimited")):
        return True
    try:
        return bool(word) and float(word) == 0
    except ValueError:
        return False


def _is_none(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "none"
