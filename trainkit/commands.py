"""Programs by short names: `lora-train NAME ...` and `lora-tools NAME ...`. A name and the module that it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from trainkit import __version__
from trainkit.errors import EXIT_CODES, Problem, refuse


@dataclass(frozen=True)
class Command:
    """A name to type, the module whose `main` it starts, and what that does in one line."""

    name: str
    module: str
    summary: str


@dataclass(frozen=True)
class Program:
    """A program that is installed as `script`, and that `python -m module` starts without an installation."""

    script: str
    module: str
    commands: Sequence[Command]

    def main(self) -> None:
        """Start the command that the first word names. It gets the words behind, and sees its own name as sys.argv[0].

        Raises UserError for a name that there is not.
        """
        program = self.script if Path(sys.argv[0]).stem == self.script else f"python -m {self.module}"
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name in ("", "-h", "--help"):
            sys.stdout.write(self.usage(program))
            sys.exit(0 if name else EXIT_CODES["usage"])
        if name == "--version":
            sys.stdout.write(f"{self.script} {__version__}\n")
            return
        command = self.find(name, program)
        sys.argv = [f"{program} {command.name}", *sys.argv[2:]]
        import_module(command.module).main()

    def find(self, name: str, program: str) -> Command:
        names = {command.name: command for command in self.commands}
        if name.replace("_", "-") not in names:
            nearest = get_close_matches(name, names, n=1) or list(names)
            refuse([Problem(f"{program} knows no {name!r}", "the first word of the command line",
                            f"the names are {', '.join(names)}", f"{program} {nearest[0]} --help")])
        return names[name.replace("_", "-")]

    def usage(self, program: str) -> str:
        width = max(len(command.name) for command in self.commands)
        rows = [f"  {command.name:<{width}}  {command.summary}" for command in self.commands]
        return "\n".join([f"usage: {program} NAME --flag VALUE ...", "", *rows, "",
                          f"{program} NAME --help lists the flags. {program} --version prints the version.", ""])


def tool(name: str) -> str:
    """How one of our tools is called here, by its file name: in a clone `python scripts/NAME.py`."""
    face = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    return f"python scripts/{name}.py" if face.is_file() else f"lora-tools {name.replace('_', '-')}"
