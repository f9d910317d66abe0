"""What a flag is read only with, as its field says it: a question to all values, and words for the user.

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

TERM = re.compile(r"(?P<no>no )?(?P<flag>\w+)((?P<sign>>0|!=|=)(?P<choices>[\w|]+)?)?")


@dataclass(frozen=True)
class Term:
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
    """Alternatives, of each of which all terms must hold."""

    alternatives: tuple[tuple[Term, ...], ...]
    said: str = ""  # instead of the words made from the terms

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for terms in self.alternatives for term in terms)

    @property
    def flags(self) -> set[str]:
        return {term.flag for term in self.terms}

    def holds(self, values: Mapping[str, object]) -> bool:
        return any(all(term.holds(values) for term in terms) for terms in self.alternatives)

    def words(self, values: Mapping[str, object]) -> str:
        """What the flag is read with, for a trainer that has these values: no word of a flag that it lacks."""
        known = [terms for terms in self.alternatives if all(term.flag in values for term in terms)]
        return self.said or " or ".join(" and ".join(term.words for term in terms) for terms in known)


@cache
def needs(condition: str, said: str = "") -> Prerequisite:
    """The prerequisite that `condition` spells out; `said` is how a notice calls it where its own words read badly."""
    alternatives = tuple(tuple(map(_term, part.split(" and "))) for part in condition.split(" or "))
    return Prerequisite(alternatives, said)


def _term(text: str) -> Term:
    found = TERM.fullmatch(text)
    assert found, f"{text!r} is no condition"
    sign = "no" if found["no"] else found["sign"] or "set"
    return Term(found["flag"], sign, tuple(found["choices"].split("|")) if found["choices"] else ())
