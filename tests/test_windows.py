"""What Windows does otherwise and can be tried without it: encodings, names of files, paths."""

from __future__ import annotations

import ast
import ntpath
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest

from tests.support import ROOT
from tests.support.command_lines import REQUIRED, Options, read
from trainkit.families.pretrained import Repo
from trainkit.options.config_text import config_text
from trainkit.runtime.weight_files import portable_name, run_name

SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in ("trainkit", "scripts", "experiments")
                                        for path in ROOT.glob(f"{folder}/**/*.py"))])
PROGRAMS = [*sorted(ROOT.glob("train_*.py")), *sorted(ROOT.glob("scripts/*.py"))]
POSITIONS = {"open": 2, "read_text": 0, "write_text": 1, "fdopen": 3}  # of `encoding` among a method's arguments
OTHER_OPENS = {"Image", "archive", "os", "run", "tarfile"}  # their `open` takes no encoding


# -- encodings: Windows reads and writes text as cp1252, unless it is told ---------------------------------------------


def test_every_text_file_is_opened_with_its_encoding():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in SOURCES
             for line in opens_without_encoding(path.read_text("utf-8"))]
    assert not found, f'write encoding="utf-8": {found}'


def opens_without_encoding(source: str) -> Iterator[int]:
    """Lines that open a file as text, or read a program's output as text, in the encoding of the machine."""
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        named = {word.arg: word.value for word in call.keywords}
        if text_of_programs(named) or opened_as_text(call, named):
            yield call.lineno


def text_of_programs(named: dict[str | None, ast.expr]) -> bool:
    text = named.get("text")
    return isinstance(text, ast.Constant) and text.value is True and "encoding" not in named


def opened_as_text(call: ast.Call, named: dict[str | None, ast.expr]) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    owner = call.func.value.id if is_method and isinstance(call.func.value, ast.Name) else ""
    if name not in POSITIONS or "encoding" in named or (name == "open" and owner in OTHER_OPENS):
        return False
    place = POSITIONS[name] + (name == "open" and not is_method)  # the function's first argument is the file
    words = [] if name == "write_text" else [*call.args, *named.values()]
    modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return len(call.args) <= place and not any("b" in mode for mode in modes)


@pytest.mark.parametrize(("line", "wrong"), [
    ('open("x")', True), ('path.open("a")', True), ("path.read_text()", True), ("path.write_text(text)", True),
    ("subprocess.run(words, text=True)", True), ('os.fdopen(1, "w")', True),
    ('open("x", "rb")', False), ('path.open("a", encoding="utf-8")', False), ('path.read_text("utf-8")', False),
    ('path.write_text("abc")', True), ('path.write_text(text, "utf-8")', False), ("Image.open(path)", False),
])
def test_that_test_sees(line, wrong):
    assert bool(list(opens_without_encoding(line))) == wrong


@pytest.mark.parametrize("words", [*([str(path), "--help"] for path in PROGRAMS), ["-m", "trainkit.options"]],
                         ids=lambda words: Path(words[0]).name + words[-1])
def test_a_console_without_a_letter_gets_it_escaped(words):
    done = output(*words, PYTHONIOENCODING="cp1252")
    done.stdout.decode("cp1252")
    assert done.returncode == 0, done.stderr.decode("cp1252")


def test_a_message_with_any_letters_reaches_such_a_console():
    done = output(str(PROGRAMS[0]), "--rankk=猫", PYTHONIOENCODING="cp1252")
    assert done.returncode == 2 and b"cannot go on" in done.stderr


def test_a_config_that_is_printed_into_a_file_is_read_back(tmp_path):
    """Where the machine's encoding is not UTF-8, too; and with the mark that Windows editors put before the text."""
    written = "ein Löwe, 猫 → ε"
    other_machine = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}
    given = tmp_path / "given.toml"
    given.write_text(f'validation_prompt = "{written}"\n', "utf-8")
    done = output(str(PROGRAMS[0]), *REQUIRED, f"--config={given}", "--print_config", **other_machine)
    for mark in (b"", b"\xef\xbb\xbf"):
        file = tmp_path / "printed.toml"
        file.write_bytes(mark + done.stdout)
        assert read(f"--config={file}").validation.validation_prompt == written


def output(*words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | env, capture_output=True)


# -- names -------------------------------------------------------------------------------------------------------------

AWKWARD = {
    "con": "_con", "NUL": "_NUL", "aux.v2": "_aux.v2", "Com1": "_Com1", "lpt9 .x": "_lpt9 .x", "CONIN$": "_CONIN$",
    "com²": "_com²", "icons.": "icons", "icons . ": "icons", "...": "_", "2026-11-30T12:00": "2026-11-30T12_00",
    'a<b>c"d|e?f*g\\h': "a_b_c_d_e_f_g_h", "bell\x07": "bell_",
}
PLAIN = ["icons", "icons v2", "icons.v2", "Löwe", "猫", "console", "com10", "nullify", ".hidden", "a,b;c'd(e)[f]{g}!"]


@pytest.mark.parametrize(("name", "wanted"), AWKWARD.items(), ids=repr)
def test_a_name_that_windows_does_not_take_is_changed(name, wanted, tmp_path):
    assert portable_name(name) == wanted
    assert portable_name(wanted) == wanted
    file = PureWindowsPath("loras", f"{wanted}.safetensors")
    assert file.name == f"{wanted}.safetensors" and not file.drive and not reserved(file)
    assert run_name(tmp_path / name) == wanted, "the run's files would have another name"


@pytest.mark.parametrize("name", PLAIN)
def test_any_other_name_stays(name):
    assert portable_name(name) == name


def reserved(path: PureWindowsPath) -> bool:
    return ntpath.isreserved(path) if hasattr(ntpath, "isreserved") else path.is_reserved()


# -- paths -------------------------------------------------------------------------------------------------------------

WINDOWS_PATHS = [r"C:\models\sdxl", r"models\sdxl", "D:/models/sdxl", "D:/sdxl", r"\\server\share\sdxl", r".\sdxl"]


@pytest.mark.parametrize("path", WINDOWS_PATHS)
def test_a_path_of_windows_is_never_taken_for_a_name_on_the_hub(path):
    (problem,) = Repo(path, "--pretrained_model_name_or_path").unreachable("model_index.json")
    assert "does not exist" in problem.what and path in problem.where


@pytest.mark.parametrize("path", WINDOWS_PATHS)
def test_a_path_of_windows_goes_through_a_printed_config(path, tmp_path):
    options = read(f"--instance_data_dir={path}")
    file = tmp_path / "printed.toml"
    file.write_text(config_text(Options.flags(), options.flat(), options.origins), "utf-8")
    assert read(f"--config={file}").data.instance_data_dir == path


@pytest.mark.slow
def test_types_hold_on_windows_and_macos():
    """mypy knows what the standard library lacks there: os.fork, signal.SIGUSR1, fcntl."""
    for platform in ("win32", "darwin"):
        done = output("-m", "mypy", "--platform", platform, "--cache-dir", os.devnull)
        assert done.returncode == 0, done.stdout.decode()
