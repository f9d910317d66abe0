"""argparse, generated from the options: upstream's names, `--no_x` for every switch, dashes for underscores."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import NoReturn

from trainkit import terminal
from trainkit.errors import Problem, UserError, refuse
from trainkit.options.base import Flag

MISSING = object()  # stands for the value of a flag that was given none
HELP_WIDTH = 100  # at most; a narrower terminal has its own
HELP_INDENT = 34

EPILOG = """\
If several sources give a value, the first of this list counts: the command line, the environment
(LORA_RANK=8 for --rank=8), the --config file, the --preset. Otherwise the value is the default.
--print_config shows every value and its source. You can write dashes instead of underscores. To
switch something off, write --no_ before its name (--no_cache_latents), or =False after it.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(Problem("the command line cannot be read", "command line", message, "see --help"))

    def parse_known_args(  # type: ignore[override]  # ours is called in one way, the base class has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        found, leftovers = super().parse_known_args(args, namespace)
        refuse(self._dashed(args or [], leftovers))
        return found, leftovers

    def _dashed(self, args: Sequence[str], leftovers: Sequence[str]) -> Iterator[Problem]:
        """--name=value behind a flag of many words, and like no flag: it is one of those words."""
        flags = self._option_string_actions
        many = None
        for word in args:
            name = word.partition("=")[0]
            if name in flags:
                many = name if flags[name].nargs == "*" else None
            elif many and name != word and word in leftovers and not get_close_matches(name, flags, cutoff=0.85):
                yield Problem(f"no flag is called {name}", many, f"if it is one of the words of {many}: those have no "
                              "dashes", f"{many} {word.lstrip('-')}")


def make_parser(flags: Iterable[Flag], description: str, titles: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser that leaves every value as it was written and every flag that was not given out of the namespace."""
    parser = _Parser(
        description=description, epilog=EPILOG, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False,
        usage="%(prog)s --flag VALUE ...", formatter_class=_Formatter,
    )
    for concern, members in groupby(flags, key=lambda flag: flag.concern):
        add_group(parser, titles[concern], members)
    return parser


def flags_help(title: str, flags: Iterable[Flag]) -> str:
    """Help on these flags, as the parser's own."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, formatter_class=_Formatter)
    add_group(parser, title, flags)
    return parser.format_help()


def wrapped(text: str, *, indent: str = "") -> str:
    """Paragraphs as wide as the help; indented ones, which are commands, stay as they are."""
    return "\n\n".join(
        part if part.startswith(" ") else textwrap.fill(part, help_width(), initial_indent=indent,
                                                        subsequent_indent=indent, break_on_hyphens=False)
        for part in text.strip().split("\n\n"))


def help_width() -> int:
    return min(HELP_WIDTH, terminal.columns(sys.stdout)) if terminal.is_terminal(sys.stdout) else HELP_WIDTH


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=HELP_INDENT, width=help_width())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--rank RANK`, `--[no_]cache_latents`; a bare --rank is read too, but only to say that a value is missing."""
        name = action.option_strings[-1]
        if action.const == "true":
            return f"--[no_]{action.dest}"
        return f"{name} {action.metavar}" if action.metavar else ", ".join(action.option_strings)


def add_group(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """A value that is missing behind its flag is read as MISSING."""
    group = parser.add_argument_group(title)
    for flag in flags:
        _add(group, flag)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text = help_text(flag).replace("%", "%%")
    if not flag.is_switch:
        bare = MISSING if flag.facts.bare is None else flag.facts.bare
        words = {"nargs": "*", "action": "extend"} if flag.many else {"nargs": "?", "const": bare}
        group.add_argument(f"--{flag.name}", **words, metavar=flag.metavar, help=text)
        return
    group.add_argument(f"--{flag.name}", nargs="?", const="true", help=text)
    group.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_const", const="false", help=argparse.SUPPRESS)


def help_text(flag: Flag) -> str:
    """Meaning, choices and default."""
    choices = f" Choices: {flag.takes}." if flag.choices else ""
    on = flag.default not in (0, None, flag.facts.off)
    off = "; 0 is off" if on and flag.facts.can_be_off and "0" not in flag.help else ""
    return f"{flag.help}{choices} ({'required' if flag.required else f'default: {shown(flag.default)}'}{off})"


def shown(value: object) -> str:
    """A value as the user would write it; `none` where there is none."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def underscored(argv: Sequence[str]) -> list[str]:
    """--instance-data-dir=x -> --instance_data_dir=x; values stay as they are."""
    return [_underscore(word) if word.startswith("--") else word for word in argv]


def _underscore(word: str) -> str:
    name, sign, value = word.partition("=")
    return word if " " in name else "--" + name[2:].replace("-", "_") + sign + value


def split_leftovers(words: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Unknown flags with their values, and words that belong to no flag.

    The word right after an unknown flag is its value.
    """
    unknown: dict[str, str | None] = {}
    unassigned: list[str] = []
    waiting = None  # an unknown flag whose value may follow
    for word in words:
        if word.startswith("-") and " " not in word:
            waiting, sign, value = word.lstrip("-").partition("=")
            unknown[waiting] = value if sign else None
            waiting = None if sign else waiting
        elif waiting is not None:
            unknown[waiting], waiting = word, None
        else:
            unassigned.append(word)
    return unknown, unassigned


def one_dash(argv: Sequence[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """The words with two dashes before names of flags that had one, and those names. -h is argparse's."""
    words, names = list(argv), []
    for i, word in enumerate(argv):
        name = word[1:].partition("=")[0].replace("-", "_")
        if word.startswith("-") and not word.startswith("--") and len(name) > 1 and name in known:
            words[i] = f"-{word}"
            names.append(word.partition("=")[0])
    return words, names
