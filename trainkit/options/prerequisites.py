"""What a flag is read only with: a condition on the values of other flags, and words for the user.

    flag         its value is set: a switch that is on, a number other than 0, a text
    flag>0       the same of a number, in other words
    no flag      its value is not set
    flag=a|b     its value is one of these
    flag!=a|b    its value is none of these
    A and B, A or B
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

TERM = re.compile(r"(?P<flag>\w+)(?:(?P<above>>0)|(?P<sign>!?=)(?P<choices>\w+(?:\|\w+)*))?|no (?P<unset>\w+)")


@dataclass(frozen=True)
class FlagTerm:
    """A question about one flag."""

    flag: str
    sign: str  # "set", ">0", "no", "=" or "!="
    choices: tuple[str, ...] = ()

    def holds(self, values: Mapping[str, object]) -> bool:
        value = values.get(self.flag)
        match self.sign:
            case "=":
                return value in self.choices
            case "!=":
                return value not in self.choices
        return bool(value) != (self.sign == "no")

    @property
    def words(self) -> str:
        listed = " or ".join(self.choices)
        return {"no": f"no --{self.flag}", ">0": f"--{self.flag} above 0", "=": f"--{self.flag} {listed}",
                "!=": f"--{self.flag} other than {listed}"}.get(self.sign, f"--{self.flag}")


@dataclass(frozen=True)
class Prerequisite:
    """It holds if all terms of one of the alternatives do."""

    alternatives: tuple[tuple[FlagTerm, ...], ...]
    said: str = ""  # instead of the words made from the terms

    @property
    def terms(self) -> tuple[FlagTerm, ...]:
        return tuple(term for terms in self.alternatives for term in terms)

    @property
    def flags(self) -> set[str]:
        return {term.flag for term in self.terms}

    def holds(self, values: Mapping[str, object]) -> bool:
        return any(all(term.holds(values) for term in terms) for terms in self.alternatives)

    def words(self, values: Mapping[str, object]) -> str:
        """What the flag is read with, in words; alternatives with a flag that has no value here are left out."""
        known = [terms for terms in self.alternatives if all(term.flag in values for term in terms)]
        return self.said or " or ".join(" and ".join(term.words for term in terms) for terms in known)


@cache
def needs(condition: str, said: str = "") -> Prerequisite:
    """The prerequisite written as `condition`; `said` replaces the words made from it where those read badly."""
    alternatives = tuple(tuple(map(_term, part.split(" and "))) for part in condition.split(" or "))
    return Prerequisite(alternatives, said)


def _term(text: str) -> FlagTerm:
    found = TERM.fullmatch(text)
    assert found, f"{text!r} is no condition"
    if found["unset"]:
        return FlagTerm(found["unset"], "no")
    choices = tuple(found["choices"].split("|")) if found["choices"] else ()
    return FlagTerm(found["flag"], found["above"] or found["sign"] or "set", choices)
