"""The installed package: what the wheel holds, and that its programs run where there is no clone."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.trainers import Done, command, make_images
from trainkit import __version__
from trainkit.runtime.weight_files import portable_name

TOP = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")  # what a build reads beside the code
NOT_IN_WHEELS = {"__pycache__"}
BUILD = "import sys, setuptools.build_meta as back; getattr(back, f'build_{sys.argv[1]}')(sys.argv[2])"
DREAMBOOTH, TEXT_TO_IMAGE = ("lora-train", "dreambooth-sdxl"), ("lora-train", "text-to-image")
TOOLS = [("lora-tools", name) for name in (
    "generate", "evaluate", "check-dataset", "caption-images", "plan", "cache", "convert-lora", "inspect-lora",
    "merge-loras", "resize-lora", "extract-lora", "extract-clip-features")]


def code_files() -> set[str]:
    """Every file of the package and the modules beside it, as paths in the repository."""
    inner = {path for path in (ROOT / "trainkit").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return {path.relative_to(ROOT).as_posix() for path in {*inner, *ROOT.glob("*.py")}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built: a build leaves folders beside its sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in TOP:
        shutil.copy(ROOT / name, copy)
    for name in code_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def built(kind: str, sources: Path, out: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", sources, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path, file: str = "METADATA") -> str:
    (name,) = [name for name in names(wheel) if name.endswith(f".dist-info/{file}")]
    return zipfile.ZipFile(wheel).read(name).decode()


# -- the wheel ---------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_the_trainers_and_no_assets(wheel):
    code = {name for name in names(wheel) if ".dist-info/" not in name}
    assert code == code_files()
    assert wheel.stat().st_size < 2**20, "assets or outputs of runs came in"


def test_the_source_archive_builds_the_same_wheel(sources, wheel, tmp_path):
    archive = built("sdist", sources, tmp_path / "sdist")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (unpacked,) = [path for path in tmp_path.iterdir() if path.name.startswith("lora_trainer_suite")]
    assert names(built("wheel", unpacked, tmp_path / "wheel")) == names(wheel)


def test_facts_of_the_package_have_one_home(wheel):
    facts: Message = email.message_from_string(metadata(wheel))
    assert facts["Version"] == __version__
    assert facts["License-Expression"] == "Apache-2.0" and "Apache License" in metadata(wheel, "licenses/LICENSE")
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    needed = [line.partition("#")[0].strip() for line in lines]
    assert sorted(map(parts, facts.get_all("Requires-Dist"))) == sorted(map(parts, filter(None, needed)))
    assert not [line for line in needed if re.match("pytest|ruff|mypy", line)], "a user would install our tests' tools"


def parts(requirement: str) -> tuple[str, ...]:
    """Name and limits, whose order a build changes."""
    name = re.match(r"[\w-]+", requirement)[0]
    return (name, *sorted(requirement.removeprefix(name).split(",")))


def test_the_docker_image_is_built_from_files_that_are_there_and_not_ignored():
    text = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text("utf-8"))
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {*TOP, "constraints.txt", "trainkit", *(path.name for path in ROOT.glob("*.py"))} == set(copied)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert [name for name in copied if not any(Path(name).match(pattern) for pattern in allowed)] == []
    torch = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch and "-c constraints.txt" in text


# -- its programs, installed, in a folder that is no clone -------------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """A wheel in a folder of its own; the other packages are those that run this test."""

    prefix: Path
    elsewhere: Path  # the working folder

    def run(self, program: str, *words: str, timeout: float = 300) -> Done:
        (site,) = self.prefix.glob("lib/python*/site-packages")
        python = Path(sys.executable).parent
        env = os.environ | {"PYTHONPATH": str(site), "PATH": f"{self.prefix / 'bin'}:{python}:{os.environ['PATH']}",
                            "OMP_NUM_THREADS": "1"}
        done = subprocess.run([program, *words], cwd=self.elsewhere, env=env, timeout=timeout, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return Done(done.returncode, done.stdout)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    prefix = tmp_path_factory.mktemp("installed")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--prefix", str(prefix), str(wheel)], check=True)
    return Installed(prefix, tmp_path_factory.mktemp("elsewhere"))


def test_the_code_that_runs_is_the_installed_one(installed):
    done = installed.run(sys.executable, "-c", "import trainkit; print(trainkit.__file__)")
    assert done.output.startswith(str(installed.prefix)), "these tests would test the clone"


@pytest.mark.parametrize("words", [DREAMBOOTH, TEXT_TO_IMAGE, *TOOLS], ids=" ".join)
def test_help_of_an_installed_program_names_it(words, installed):
    done = installed.run(*words, "--help")
    assert done.code == 0 and f"usage: {' '.join(words)}" in done.output


def test_without_an_installation_the_modules_do_the_same():
    for module, name in (("trainkit.train", "text-to-image"), ("trainkit.tools", "extract_clip_features")):
        done = subprocess.run([sys.executable, "-m", module, name, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert f"usage: python -m {module} {name.replace('_', '-')}" in done.stdout


def test_a_name_that_there_is_not_is_answered_with_the_nearest(installed):
    done = installed.run("lora-train", "dreambooth", "--rank=4")
    assert done.code == 2 and "next:  lora-train dreambooth-sdxl --help" in done.output
    alone = installed.run("lora-tools")
    assert alone.code == 2 and all(f"  {name} " in alone.output for _, name in TOOLS)
    assert installed.run("lora-tools", "--version").output == f"lora-tools {__version__}\n"


def test_every_tool_has_a_name():
    files = (ROOT / "trainkit/tools").glob("[!_]*.py")
    with_main = [path.stem for path in files if "\ndef main(" in path.read_text("utf-8")]
    assert sorted(name.replace("_", "-") for name in with_main) == sorted(name for _, name in TOOLS)


@pytest.mark.trains  # imports torch
def test_a_default_that_only_a_clone_has_is_asked_for(installed, tiny_sd, tmp_path):
    made = make_images(tmp_path / "images")
    given = (f"--base={tiny_sd}", f"--lora={tmp_path / 'lora.safetensors'}", f"--training={made}")
    done = installed.run("lora-tools", "evaluate", *given, "--out=e")
    asked = re.findall(r"--(\w+) is missing", done.output)
    assert done.code != 0 and asked == ["clip", "reference"], done.output
    assert "site-packages" not in done.output, "a folder that nobody knows of would be named"
    done = installed.run("lora-tools", "extract-clip-features", f"--images={made}", "--out=f.safetensors")
    assert done.code == 2 and "its default is assets/tiny-clip-icons of the repository" in done.output


@pytest.mark.trains
def test_an_installed_trainer_trains_and_its_files_have_names_that_windows_takes(installed, tiny_sdxl, tmp_path):
    """In a folder whose own name Windows would not take."""
    out = tmp_path / "aux: v2."
    done = installed.run(*DREAMBOOTH, *command(tiny_sdxl, make_images(tmp_path / "images"), out, checkpointing_steps=1,
                                               validation_prompt="TOK", validation_steps=1, num_validation_images=1))
    assert done.code == 0, done.output
    written = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert {"aux_ v2.safetensors", "report.html", "README.md"} <= written
    assert [name for name in written if any(part != portable_name(part) for part in name.split("/"))] == []
    assert "lora-train dreambooth-sdxl --" in (out / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def trained(installed: Installed, tiny_sd: Path) -> tuple[str, str]:
    """--base and --lora of a run that Accelerate started."""
    images, out = make_images(installed.elsewhere / "images"), installed.elsewhere / "mine"
    words = command(tiny_sd, images, out, instance_data_dir=None, instance_prompt=None, train_data_dir=images)
    single = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--cpu")
    done = installed.run("accelerate", "launch", *single, "-m", "trainkit.train", "text-to-image", *words)
    assert done.code == 0, done.output
    return f"--base={tiny_sd}", f"--lora={out}/pytorch_lora_weights.safetensors"


@pytest.mark.trains
def test_an_installed_tool_takes_the_files_of_an_installed_trainer(installed, trained):
    asked = ("--prompt=a thing", "--steps=1", "--width=32", "--height=32", "--out=drawn")
    done = installed.run("lora-tools", "generate", *trained, *asked)
    assert done.code == 0, done.output
    assert (installed.elsewhere / "drawn/sheet.png").is_file()


@pytest.mark.slow
@pytest.mark.trains
def test_installed_tools_that_look_at_images_write_their_files(installed, trained, assets):
    done = installed.run("lora-tools", "extract-clip-features", f"--images={assets / 'icons-3d'}",
                         f"--clip={assets / 'tiny-clip-icons'}", "--out=f.safetensors")
    assert done.code == 0, done.output
    assert (installed.elsewhere / "f.safetensors").is_file()
    shipped = [f"--{flag}={assets / name}" for flag, name in (
        ("clip", "tiny-clip-icons"), ("training", "icons-3d"), ("reference", "icons-3d-reference"))]
    done = installed.run("lora-tools", "evaluate", *trained, *shipped, "--strengths=1", "--steps=1", "--out=page",
                         timeout=900)
    assert done.code == 0, done.output
    assert (installed.elsewhere / "page/grid.png").is_file()
