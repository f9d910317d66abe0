"""What an option is: a frozen pydantic field whose name is the flag and whose help, unit and limits travel with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

REDACTED = "***"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # of pydantic's limits

Value = str | int | float | bool | None


def opt(
    default: object, help: str, *, unit: str = "", differs: str = "", many: bool = False, **limits: Any,
) -> Any:  # as pydantic's Field, which stands as the default of a field of any type
    """A field of a concern.

    `unit` is what the flag's value counts ("steps", "pixels", "0..1"); `differs` says where we leave the Diffusers
    script and why; `many` words on the command line are one value; `limits` are pydantic's (ge, gt, le, lt,
    min_length).
    """
    notes = {"unit": unit, "differs": differs, "many": many}
    return Field(default, description=help, json_schema_extra=notes, **limits)


def required(help: str, **settings: Any) -> Any:
    """A field the user must give."""
    return opt(..., help, **settings)


def changed(
    kind: type[Concern], name: str, default: object, *, help: str | None = None, differs: str | None = None,
) -> Any:
    """A field of `kind` for a subclass: this default, other words where given, and its own unit, limits and place."""
    flag = Flag(name, "", kind.model_fields[name])
    bounds = {bound: getattr(limit, bound) for limit in flag.field.metadata for bound in (*SIGNS, "min_length")
              if hasattr(limit, bound)}
    return opt(default, flag.help if help is None else help, unit=flag.note("unit"),
               differs=flag.note("differs") if differs is None else differs, many=flag.many, **bounds)


@dataclass(frozen=True)
class Flag:
    """One command line flag, read off a field of a concern."""

    name: str
    concern: str  # name of the concern in the option set, also the table's name in a config file
    field: FieldInfo

    @property
    def kind(self) -> object:
        """The type a value has when there is one: `int | None` -> int."""
        annotation = self.field.annotation
        if get_origin(annotation) in (Union, UnionType):
            return next(arg for arg in get_args(annotation) if arg is not NoneType)
        return annotation

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

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
        return self.kind is SecretStr

    @property
    def many(self) -> bool:
        """Whether all words after it on the command line are its value."""
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and extra["many"] is True

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def help(self) -> str:
        assert self.field.description, f"--{self.name} has no help"
        return self.field.description

    @property
    def metavar(self) -> str:
        return "CHOICE" if self.choices else self.note("unit").upper().replace(" ", "_") or "TEXT"

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

    def note(self, name: Literal["unit", "differs"]) -> str:
        extra = self.field.json_schema_extra
        assert isinstance(extra, dict), f"--{self.name} must be made by opt()"
        return str(extra[name])


def steps_of_share(share: float, total: int) -> int:
    """Optimizer steps in `share` of `total`, rounded up, so that a share above 0 is one step at least.

    The share counts as it is written: 0.07 of 100 steps are 7, though the float is a little more than 0.07.
    """
    return math.ceil(Fraction(str(share)) * total)


class Concern(BaseModel):
    """Options that belong together; frozen, so that what was asked for is what a run's record says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str] = ""  # of the flags, which the concern's own table in a config file may leave out

    @classmethod
    def flags(cls, concern: str) -> Iterator[Flag]:
        return (Flag(name, concern, field) for name, field in cls.model_fields.items())

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        return Flag(name, "", cls.model_fields[name]).choices

    @classmethod
    def shorthand(cls, value_of: Callable[[str], object]) -> tuple[str, Mapping[str, object]] | None:
        """What a flag of this concern stands for: the preset's name and its values by flag. `value_of` reads flags."""
        return None

    def decisive(self) -> dict[str, object]:
        """What of it decides the bits of a run, by flag: all, unless a concern knows better."""
        return {f"--{name}": REDACTED if isinstance(value, SecretStr) else value for name, value in self}

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or "").partition("\n")[0]

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        """Spellings that mean one value: any case in a choice, "none" for no value; and no number out of true."""
        assert info.field_name
        flag = Flag(info.field_name, "", cls.model_fields[info.field_name])
        if flag.choices:
            return _read_choice(value, flag)
        if isinstance(value, bool) and flag.kind in (int, float):
            raise ValueError("true and false are not numbers")
        if flag.optional and flag.kind is not str and _is_none(value):
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


def _is_none(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "none"
