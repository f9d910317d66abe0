"""What README and docs say is so: their commands run, and every link, path, flag and test they name exists."""

from __future__ import annotations

import re
import shlex
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.trainers import Done, forked_script, launched
from trainkit.options import TRAINERS, parse, prompt_lines
from trainkit.train import PROGRAM

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, *sorted({*ROOT.glob("*.md")} - {*PAGES}), ROOT / "assets/README.md", ROOT / "experiments/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEW = {"STEPS": "8", "DENOISING_STEPS": "1"}  # what scripts/quickstart.py reads
OTHER_TOOLS = {"num_processes", "cpu", "nproc_per_node", "logdir",  # accelerate launch, torchrun, TensorBoard
               "from", "with", "constraints", "python",  # uvx
               "build_arg", "rm", "gpus", "shm_size", "entrypoint",  # Docker
               "fp32_vae", "no_half_vae", "vae_in_fp32"}  # ComfyUI, A1111, Forge
PYTHON = ".venv/bin/python"
IS_THIS_SUITE = "scripts/test.sh"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks in these languages; "" is a block without one."""
    return [(m[1], m[2]) for m in FENCE.finditer(page.read_text("utf-8")) if m[1] in languages]


# -- commands ----------------------------------------------------------------------------------------------------------

PAGES_TO_RUN = [page for page in PAGES if blocks(page, "bash", "python")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository as links, so that runs/ is not written into it; .venv is what runs this test, nothing installs."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "build", "scripts"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(Path(sysconfig.get_path("scripts")).parent)
    (tmp_path / "scripts").mkdir()
    for script in (ROOT / "scripts").iterdir():
        (tmp_path / "scripts" / script.name).symlink_to(script)
    (tmp_path / "scripts" / "install.sh").unlink()
    (tmp_path / "scripts" / "install.sh").write_text("# installed: this test is running\n")
    return tmp_path


@pytest.mark.trains
@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=named)
def test_every_block_runs_in_order_and_leaves_what_the_page_says(page, checkout):
    for language, code in blocks(page, "bash", "python"):
        if IS_THIS_SUITE in code:
            continue
        for command in commands(language, shortened(code), checkout):
            done = run(command, checkout)
            assert done.code == 0, f"{named(page)}:\n{code}\n{done.output}"
    promised = re.findall(r"`(runs/[\w./-]+)`", page.read_text("utf-8"))
    assert [path for path in promised if not (checkout / path).exists()] == []


@pytest.mark.trains
def test_a_second_quick_start_repeats_nothing_and_says_so(checkout):
    quick = ["env", "-C", str(checkout), PYTHON, "scripts/quickstart.py", "runs/quick"]
    few = {"STEPS": "1", "DENOISING_STEPS": "1"}
    first = launched(quick, env=few, timeout=900)
    assert first.code == 0 and "Training" in first.output, first.output
    grid = checkout / "runs/quick/evaluation/grid.png"
    made = grid.stat().st_mtime_ns
    again = launched(quick, env=few, timeout=900)
    assert again.code == 0 and grid.stat().st_mtime_ns == made, again.output
    assert "runs/quick is finished already" in again.output and "images are there already" in again.output
    assert "Training" not in again.output and "Generating" not in again.output


def shortened(code: str) -> str:
    few = "--max_train_steps=2" + " --num_validation_images=1" * ("--validation_prompt" in code)
    return re.sub(r"--max_train_steps=\d+", few, code)


def commands(language: str, code: str, checkout: Path) -> Iterator[str]:
    """The block's command lines; Python is one that runs a file."""
    if language == "python":
        (checkout / "block.py").write_text(code, "utf-8")
        yield f"{PYTHON} block.py"
    else:
        joined = code.replace("\\\n", "")
        yield from filter(None, re.split(r"\n+(?=\.venv/bin/python )", joined.strip()))


def run(command: str, checkout: Path) -> Done:
    """A lone call of Python forks this process, which has imported what takes seconds; bash runs everything else."""
    if re.fullmatch(rf"{PYTHON} [^\n$;&|<>`]+", command):
        return forked_script(shlex.split(command)[1:], cwd=checkout, log=checkout / "log")
    return launched(["env", "-C", str(checkout), "bash", "-euo", "pipefail", "-c", command], env=FEW, timeout=900)


def test_the_quick_start_reads_what_shortens_it_here():
    assert "scripts/quickstart.py" in (ROOT / "scripts" / "quickstart.sh").read_text("utf-8")
    script = (ROOT / "scripts" / "quickstart.py").read_text("utf-8")
    assert all(f'os.environ.get("{name}"' in script for name in FEW)


# -- commands that need a GPU or a model from the Hub, and so do not run here ------------------------------------------

LAUNCH = re.compile(r"^\S*(?:accelerate launch|python) (train_\w+)\.py (--.+)$|"
                    r"^.*(?:lora-train|-m trainkit\.train|lora-trainers) ([a-z-]+) (--.+)$", re.MULTILINE)
SHORT = {command.name: command.module for command in PROGRAM.commands}
PAGES_TO_PARSE = [page for page in PAGES if any(LAUNCH.search(code) for _, code in blocks(page, "text"))]


@pytest.mark.parametrize("page", PAGES_TO_PARSE, ids=named)
def test_a_command_that_does_not_run_here_is_accepted_and_every_flag_in_it_has_an_effect(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, config in blocks(page, "toml"):
        Path(config.partition("\n")[0].removeprefix("# ")).write_text(config, "utf-8")
    for trainer, words in shown_commands(page):
        options = parse(import_module(trainer).Options, words, description="")
        assert [*options.problems(), *options.notices()] == [], words


def shown_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(trainer, its arguments) of the page's `text` blocks, but for those that leave something out."""
    for _, code in blocks(page, "text"):
        for script, its_words, name, words in LAUNCH.findall(re.sub(r"[\\`]\n\s*", "", code)):
            arguments = its_words or words
            if "…" not in arguments and arguments != "--help":
                yield script or SHORT[name], [word for word in shlex.split(arguments) if word != "--print_config"]


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_relative_link_leads_to_a_file():
    dead = [f"{named(page)}: {file}" for page in TEXTS for file in linked(page) if not (page.parent / file).exists()]
    assert not dead, f"a reader would follow a link to nothing: {dead}"


def linked(page: Path) -> Iterator[str]:
    """The files that the page's relative links and images lead to."""
    prose = FENCE.sub("", page.read_text("utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose)
    files = [target.partition("#")[0] for pair in targets for target in pair if "://" not in target]
    yield from filter(None, files)


def test_every_path_in_the_tree_of_contributing_exists():
    (tree,) = [code for _, code in blocks(ROOT / "CONTRIBUTING.md", "") if "├──" in code]
    entries = list(tree_entries(tree))
    assert len(entries) > 20
    assert [path for path in entries if not any(place.exists() for place in path)] == []


def tree_entries(tree: str) -> Iterator[tuple[Path, ...]]:
    """Where each name of the tree may lie: an entry in its folder; a file named beside it, in it or next to it."""
    folders = [ROOT]
    for indent, text in re.findall(r"^((?:│   |    )*)[├└]── (.+)$", tree, re.MULTILINE):
        folder = folders[len(indent) // 4]
        head, _, remark = text.partition("  ")
        names = re.findall(r"[\w-]+(?:\.(?:py|sh)\b|/(?=\s|$))", head)
        yield from ((folder / name,) for name in names)
        inner = folder / names[0]
        folders[len(indent) // 4 + 1:] = [inner]
        for name in re.findall(r"[\w-]+(?:\.(?:py|sh|md)\b|/(?=[\s:]))", remark):
            yield (inner / name, folder / name)


def test_every_flag_exists():
    known = known_flags()
    for page in TEXTS:
        words = re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text("utf-8"))
        written = {name.replace("-", "_") for name in words}
        stems = {name for name in written if name.endswith("_")}  # `--no_…`
        unknown = sorted(written - stems - known)
        assert not unknown, f"a command copied from {named(page)} would be refused for {unknown}"


def known_flags() -> set[str]:
    """Flags of the trainers, of our tools and experiments, and of the programs that our pages name."""
    flags = [flag for kinds in TRAINERS.values() for name, kind in kinds.items() for flag in kind.flags(name)]
    known = OTHER_TOOLS | {*prompt_lines.OPTIONS}
    known |= {"help", "help_all", "version", "print_completion", *(flag.name for flag in flags)}
    known |= {f"no_{flag.name}" for flag in flags if flag.is_switch}
    for program in [*(ROOT / "trainkit" / "tools").glob("*.py"), *(ROOT / "experiments").glob("**/*.py")]:
        known |= set(re.findall(r"\badd(?:_argument)?\(\s*\"--(\w+)\"", program.read_text("utf-8")))
    return known


def test_every_test_that_a_page_names_exists():
    cited = [(page, file, name) for page in TEXTS
             for file, name in re.findall(r"\b(test_\w+)\.py::(\w+)", page.read_text("utf-8"))]
    sources = {file: (ROOT / "tests" / f"{file}.py").read_text("utf-8") for _, file, _ in cited}
    lost = [f"{named(page)}: {file}.py::{name}" for page, file, name in cited if f"def {name}(" not in sources[file]]
    assert not lost, f"a reader would look for the proof of a claim in vain: {lost}"
