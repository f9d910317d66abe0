"""The shape of the code is a promise: functions fit on a screen, imports go one way, --help imports no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.sources import module_imports

FOLDERS = ("trainkit", "scripts", "experiments")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))])
PACKAGE = sorted(ROOT.glob("trainkit/**/*.py"))
QUICK_START = ROOT / "scripts" / "quickstart.py"
PROGRAMS = {"trainers": sorted(ROOT.glob("train_*.py")), "faces": sorted({*ROOT.glob("scripts/*.py")} - {QUICK_START})}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)

# The layers of CONTRIBUTING's list, lowest first. A room imports rooms of its own layer or below.
LAYERS = (
    {"redact", "reading", "digests", "terminal", "process", "errors", "commands", "files", "devices", "rng",
     "condition", "frequency"},
    {"options", "diffusion"},
    {"optim", "runtime", "losses", "adapters", "lean_lora", "frozen_weights",
     "evaluation", "sheets"},
    {"families"},
    {"data", "lora_file"},
    {"conditioning", "training", "summary"},
    {"checkpoints", "export", "run_fingerprint", "plan"},
    {"lora_headers", "inference", "report"},
    {"lora_files", "preview", "publish", "doctor", "merging"},
    {"run", "preflight"},
    {"tools", "train"},
)
LIGHT = {  # third-party packages a room may import at module level, where the rule is stricter than its layer
    "redact": set(), "reading": {"yaml"}, "terminal": set(), "process": set(), "errors": set(), "commands": set(),
    "train": set(), "options": {"pydantic", "yaml", "tomllib"}, "rng": {"torch"}, "devices": {"torch"},
    "condition": {"torch"},
    "frequency": {"torch"}, "diffusion": {"torch"},
    "losses": {"torch"}, "optim": {"torch"},
}
TOOLS = {path.stem for path in PROGRAMS["faces"]}  # in trainkit/tools, each with a face in scripts/


@dataclass(frozen=True)
class Function:
    where: str
    lines: int
    nesting: int


def depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below `node`; `elif` does not nest, inner functions are counted on their own."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and name == "orelse" and len(value) == 1
            deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def code_lines(node: ast.FunctionDef) -> int:
    """Lines from `def` to the end, docstring excepted: prose is welcome, code is rationed."""
    first = node.body[0]
    doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
    return node.end_lineno - node.lineno + 1 - doc


def functions() -> list[Function]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found.append(Function(where, code_lines(node), depth(node)))
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "trainkit").parts[0].removesuffix(".py")


def test_functions_fit_on_a_screen():
    """A trainer's main may be longer: it is a story that reads in order."""
    stories = {f"{path.name} main" for path in ROOT.glob("train_*.py")}
    too_big = [f for f in functions() if f.nesting > 3
               or f.lines > (60 if re.sub(r":[0-9]+", "", f.where) in stories else 40)]
    assert not too_big, "split: " + ", ".join(f"{f.where} ({f.lines} lines, nesting {f.nesting})" for f in too_big)


def test_every_room_has_a_layer():
    rooms = {room(path) for path in PACKAGE} - {"__init__"}
    assert rooms <= set().union(*LAYERS), f"give a layer to {rooms - set().union(*LAYERS)}"


def test_contributing_lists_the_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = re.findall(r"^\d+\. (.+)$", text.partition("Imports go one way")[2].partition("\n## ")[0], re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", layer)) for layer in listed] == [*LAYERS, set()]
    assert "trainers" in listed[-1], "what may import every layer comes last"


def test_imports_go_one_way():
    """So that each file can be read, and changed, with only those below it in mind."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE:
        where, names = path.relative_to(ROOT), module_imports(path, everywhere=True)
        imported = {n.split(".")[1] for n in names if n.startswith("trainkit.")}
        upward = {n for n in imported if n in level and level[n] > level.get(room(path), 0)}
        assert not upward, f"{where} imports upward: {upward}"
        outside = [n for n in names if n.startswith(("train_", "scripts", "experiments"))]
        assert not outside, f"{where} imports {outside}: nothing imports a trainer"
        assert not any(n.startswith("freq_loss") for n in names), f"{where}: import trainkit.frequency instead"
        tools = {n.removeprefix("trainkit.tools.").partition(".")[0] for n in names if n.startswith("trainkit.tools.")}
        assert room(path) != "tools" or not tools & TOOLS, f"{where} imports another tool: {tools & TOOLS}"


def test_no_test_module_imports_another():
    """What two of them need stands in tests/support, so that each can be run, moved and read alone."""
    imports = {path.name: [name for name in module_imports(path, everywhere=True) if re.match(r"(tests\.)?test_", name)]
               for path in ROOT.glob("tests/**/*.py")}
    found = {name: names for name, names in imports.items() if names}
    assert not found, f"move what is shared to tests/support: {found}"


def file_imports() -> dict[str, set[str]]:
    """Module of trainkit -> the modules of trainkit it imports anywhere, for its annotations too."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
             for p in PACKAGE}
    return {module: (module_imports(path, everywhere=True) & paths.keys()) - {module} for module, path in paths.items()}


def packages_above(module: str) -> set[str]:
    """The packages whose __init__ is read before the module."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def test_no_two_files_import_each_other():
    """Neither directly nor by way of others. A package's __init__ gathers its files; that alone is no circle."""
    imports = {m: {n for n in names if n not in packages_above(m)} for m, names in file_imports().items()}
    reached: dict[str, set[str]] = {}

    def walk(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, "import circle: " + " -> ".join([*path[path.index(module):], module])
        if module not in reached:
            reached[module] = set().union(*(walk(name, (*path, module)) | {name} for name in imports[module]))
        return reached[module]

    for module in imports:
        walk(module, ())


def test_light_rooms_stay_light():
    assert LIGHT.keys() <= {room(path) for path in PACKAGE}
    for path in [path for path in PACKAGE if room(path) in LIGHT]:
        roots = {n.split(".")[0] for n in module_imports(path, everywhere=False)}
        heavy = roots - set(sys.stdlib_module_names) - LIGHT[room(path)] - {"trainkit"}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at module level: who needs little waits for them"


def test_trainers_import_only_options_and_errors_at_module_level():
    ours = ("trainkit.options", "trainkit.errors", "trainkit.process")
    for trainer in PROGRAMS["trainers"]:
        others = {n.split(".")[0] for n in module_imports(trainer, everywhere=False) if not n.startswith(ours)}
        slow = others - set(sys.stdlib_module_names)
        assert not slow, f"{trainer.name} --help, and every refused command, would wait for {slow}"


def test_a_face_is_the_tool_of_its_name_and_no_more():
    for face in PROGRAMS["faces"]:
        tools = {n for n in module_imports(face, everywhere=True) if n.startswith("trainkit.tools.")}
        assert tools == {f"trainkit.tools.{face.stem}", f"trainkit.tools.{face.stem}.main"}, (
            f"scripts/{face.name} would not be trainkit/tools/{face.name}")
        functions = [node for node in ast.walk(ast.parse(face.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        assert not functions, f"scripts/{face.name} would do more than the tool, where no test of it looks"


@pytest.mark.parametrize("program", [*PROGRAMS["trainers"], *PROGRAMS["faces"]], ids=lambda p: p.name)
def test_help_imports_no_torch(program):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(program)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{program.name} --help would take seconds, or fail: {done.stderr}"
    flag = "--pretrained_model_name_or_path" if program.parent == ROOT else "--debug"
    assert flag in done.stdout
