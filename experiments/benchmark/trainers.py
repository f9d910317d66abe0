"""Time a trainer of ours against another script that takes the same flags, and against the networks alone.

    .venv/bin/python experiments/benchmark/trainers.py --rounds 3 \\
        --peer DIFFUSERS/.../train_dreambooth_lora_sdxl_advanced.py
    .venv/bin/python experiments/benchmark/trainers.py --cases plain ti dora --clock cpu   ours alone, on a busy machine
    .venv/bin/python experiments/benchmark/trainers.py --trainer text_to_image \\
        --peer DIFFUSERS/.../train_text_to_image_lora.py

Runs ours and the peer in turn (A B A B …), one thread each, on the shipped model, and prints medians and ratios as a
table: seconds a step, seconds from command to first step, peak memory. Steps are timed from outside, by the progress
bar each run draws on a terminal. The floor is a process that does nothing but forward and backward of the networks that
train (see floor.py); a mode's own passes are its floor less that of the plain case.

Pivotal tuning trains two rows of a table that holds a vocabulary. The shipped model's has some 4,000 entries, SDXL's
49,408: --vocabulary 49408 gives the model as many, ours and the peer's alike.

The peer needs torchvision; where its wheel does not match a CPU build of torch, give the folder it was installed to
with --peer_site (`pip install --no-deps --target DIR torchvision`).
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import ROOT

FOLDER = ("--instance_data_dir={images}",)
TOKENS = ("--train_text_encoder_ti", "--token_abstraction=TOK", "--text_encoder_lr=1e-4")
PRIOR = ("--with_prior_preservation", "--class_data_dir={others}", "--class_prompt=icon", "--num_class_images={number}")
CACHED = "--cache_latents"  # of the text-to-image scripts only ours has it
MATCHED = (CACHED, "--dist_match_gain=0.3")
PIVOT = 2  # steps before it where the steps after it are timed
WARM = 4  # steps that are not timed


@dataclass(frozen=True)
class Case:
    """Flags that ours and the peer both take, and which of floor.py's kinds of step they make.

    own     flags that ours takes besides
    passes  steps of that kind in one of ours
    peer    whether the peer has something to compare
    """

    flags: tuple[str, ...]
    floor: str = "plain"
    our_flags: tuple[str, ...] = ()
    passes: int = 1
    peer: bool = True


@dataclass(frozen=True)
class Trainer:
    """One of ours, what it is timed on unless told otherwise, and flags that it and its peer take in every case."""

    script: str
    model: str
    batch: int
    flags: tuple[str, ...]
    cases: dict[str, Case]


def matched(mode: str, *more: str, passes: int = 1) -> Case:
    """Distribution matching, which only ours has."""
    return Case((), our_flags=(*MATCHED, f"--dist_match_mode={mode}", *more), passes=passes, peer=False)


DREAMBOOTH = {
    "plain": Case(FOLDER),
    "captioned": Case(("--dataset_name={captioned}", "--caption_column=text")),
    "edm": Case((*FOLDER, "--do_edm_style_training")),
    "dora": Case((*FOLDER, "--use_dora"), "dora"),
    "te": Case((*FOLDER, "--train_text_encoder"), "te"),
    "ti": Case((*FOLDER, *TOKENS, "--train_text_encoder_ti_frac=1"), "ti"),
    # the peer pivots before its first step, since its share is one of whole epochs, rounded down
    "ti_after": Case((*FOLDER, *TOKENS, "--train_text_encoder_ti_frac={pivot}")),
    # with new tokens, because with frozen encoders and one prompt the peer fails
    "prior": Case((*FOLDER, *PRIOR, *TOKENS, "--train_text_encoder_ti_frac=1"), "prior"),
}
TEXT_TO_IMAGE = {
    "plain": Case((), our_flags=(CACHED,)),
    "live": Case(()),
    "swap": matched("swap"),
    "reuse": matched("reuse"),
    "extra": matched("extra", passes=2),
    "combo": matched("combo", passes=2),
    "combo_bank": matched("combo", "--dist_match_bank=0.95", passes=2),
}
TRAINERS = {
    "dreambooth": Trainer("train_dreambooth_lora_sdxl_advanced.py", "assets/tiny-sdxl-icons", 2,
                          ("--instance_prompt=3d icon in the style of TOK",), DREAMBOOTH),
    "text_to_image": Trainer("train_text_to_image_lora.py", "assets/tiny-sd-icons", 4,
                             ("--train_data_dir={captioned}",), TEXT_TO_IMAGE),
}
# torchvision's PyPI wheel registers no operators on a CPU build of torch and then fails on their fake versions;
# declaring the two schemas first lets its transforms import.
PEER = """
import runpy, sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.append(sys.argv.pop(1))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Timing:
    """One run, seen from outside."""

    step_seconds: float
    first_step_seconds: float  # wall, whatever the clock
    peak_mib: float
    total_seconds: float


Timings = dict[str, dict[str, list[Timing]]]  # by case, by "ours" or "peer"


def flags(model: Path, *, steps: int, batch: int, resolution: int) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}", "--output_dir=run", f"--max_train_steps={steps}",
        f"--train_batch_size={batch}", f"--resolution={resolution}", "--rank=4", "--learning_rate=1e-4",
        "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0", "--center_crop", "--checkpointing_steps=100000",
        "--report_to=tensorboard",
    ]


def timed(command: list[str], *, steps: int, cwd: Path, clock: str) -> Timing:
    """Run `command` on a pseudo-terminal and note when its progress bar shows each step."""
    reached: dict[int, dict[str, float]] = {}
    pattern = re.compile(rf"(\d+)/{steps}\b")
    screen, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (50, 200))  # a terminal without a width shows no bar
    start = time.monotonic()
    run = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=its_end, stderr=its_end,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    os.close(its_end)
    text = b""
    while chunk := _read(screen):
        text = (text + chunk)[-4000:]
        for match in pattern.finditer(text.decode(errors="replace")):
            reached.setdefault(int(match[1]), {"wall": time.monotonic() - start, "cpu": cpu_seconds(run.pid)})
    _, status, usage = os.wait4(run.pid, 0)
    if status or steps not in reached:
        end = text.decode(errors="replace")
        raise SystemExit(f"benchmark: {' '.join(command[:3])} … failed (status {status}):\n{end}")
    warm = min(s for s in reached if s >= min(WARM, steps - 1))
    return Timing((reached[steps][clock] - reached[warm][clock]) / (steps - warm),
                  reached[min(s for s in reached if s > 0)]["wall"], usage.ru_maxrss / 1024, time.monotonic() - start)


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, in user and kernel mode; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(screen: int) -> bytes:
    select.select([screen], [], [])
    try:
        return os.read(screen, 4096)
    except OSError:  # the terminal's other end is closed: the run has ended
        return b""


def floor(model: Path, *, batch: int, latent: int, clock: str, rounds: int = 3) -> dict[str, float]:
    """Median seconds of forward and backward of the networks alone, by kind of step."""
    code = Path(__file__).with_name("floor.py")
    line = [sys.executable, str(code), str(model), str(batch), str(latent), str(rounds), clock]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"benchmark: the floor failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# What both are given


def plain_folder(source: Path, target: Path) -> Path:
    """The images of `source` without its metadata: the peer opens every file of a folder as an image."""
    target.mkdir()
    for image in sorted(source.glob("*.png")):
        (target / image.name).write_bytes(image.read_bytes())
    return target


def with_vocabulary(model: Path, rows: int, target: Path) -> Path:
    """A copy of a model whose tokenizers know `rows` entries; the added ones are in no text, their rows random."""
    shutil.copytree(model, target)
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if not (target / encoder).is_dir():
            continue  # SD 1.x and 2.x have one
        known = json.loads((target / tokenizer / "vocab.json").read_text("utf-8"))
        if rows < len(known):
            raise SystemExit(f"benchmark: --vocabulary {rows} is less than the {len(known)} entries there are")
        longer = known | {f"filler{i}": i for i in range(len(known), rows)}
        edit_json(target / tokenizer / "vocab.json", lambda words, longer=longer: longer)
        edit_json(target / tokenizer / "tokenizer.json",
                  lambda whole, longer=longer: whole | {"model": whole["model"] | {"vocab": longer}})
        edit_json(target / encoder / "config.json", lambda config: config | {"vocab_size": rows})
        lengthen_table(target / encoder / "model.safetensors", rows)
    return target


def edit_json(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), ensure_ascii=False), "utf-8")


def lengthen_table(path: Path, rows: int) -> None:
    """Random rows, as large as the others, at the end of the token embedding."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("token_embedding.weight"))
    table = tensors[name]  # [V,D]
    new = torch.randn(rows - len(table), table.shape[1]) * table.float().std()
    save_file(tensors | {name: torch.cat([table, new.to(table.dtype)])}, path, {"format": "pt"})


# ----------------------------------------------------------------------------------------------------------------------
# Runs and report


def compare(args: argparse.Namespace, trainer: Trainer, work: Path) -> tuple[Timings, dict[str, float]]:
    """Timings by case and by who, and the floor, all taken in turn."""
    model = args.model.resolve()
    if args.vocabulary:
        model = with_vocabulary(model, args.vocabulary, work / "model")
    images, others = (plain_folder(args.data, work / name) for name in ("images", "others"))
    given = dict(captioned=args.data.resolve(), images=images, others=others, pivot=PIVOT / args.steps,
                 number=len(list(others.iterdir())))
    scripts = {"ours": [ROOT / trainer.script]}
    if args.peer:
        scripts["peer"] = ["-c", PEER, args.peer_site.resolve(), args.peer.resolve()]
    found: Timings = {name: {who: [] for who in scripts if who == "ours" or trainer.cases[name].peer}
                      for name in args.cases}
    floors: list[dict[str, float]] = []
    for turn in range(args.rounds):
        floors.append(floor(model, batch=args.batch, latent=args.resolution // args.vae_factor, clock=args.clock))
        for name, who in ((name, who) for name, runs in found.items() for who in runs):
            cwd = work / f"{name}-{who}-{turn}"  # the peer's new tokens need an --output_dir that is a bare name
            cwd.mkdir()
            case = trainer.cases[name]
            case_flags = (*trainer.flags, *case.flags, *(case.our_flags if who == "ours" else ()))
            line = [sys.executable, *map(str, scripts[who]), *(flag.format(**given) for flag in case_flags),
                    *flags(model, steps=args.steps, batch=args.batch, resolution=args.resolution),
                    *(f"--{flag}" for flag in args.extra)]
            timing = timed(line, steps=args.steps, cwd=cwd, clock=args.clock)
            shutil.rmtree(cwd)
            found[name][who].append(timing)
            print(f"{name:10} {who:5} {timing.step_seconds:.4f} s/step, first step {timing.first_step_seconds:.1f} s, "
                  f"peak {timing.peak_mib:.0f} MiB", flush=True)
    return found, {kind: statistics.median(f[kind] for f in floors) for kind in floors[0]}


COLUMNS = {
    "s/step": "ours", "÷ plain": "ours over the plain case", "÷ (plain + own passes)": "its floor less the plain floor",
    "floor": "share of the step", "peer s/step": "", "peer ÷ plain": "over the peer's plain case",
    "ours faster": "steps a second, ours over the peer's", "first step": "seconds to it, ours over the peer's",
    "whole run": "seconds, ours over the peer's", "memory": "peak, ours over the peer's",
}


def report(found: Timings, floors: dict[str, float], cases: dict[str, Case]) -> None:
    """The table; a cell without its plain case or its peer is empty."""
    middle = {who: {name: medians(runs[who]) for name, runs in found.items() if who in runs}
              for who in ("ours", "peer")}
    print("\nfloor, s/step: " + ", ".join(f"{kind} {v:.4f}" for kind, v in floors.items()) + "\n")
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items() if meaning))
    print(f"\n| case | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in found:
        case_floor = floors[cases[name].floor] * cases[name].passes
        cells = [cell(*numbers) for numbers in row(name, middle["ours"], middle["peer"], case_floor, floors["plain"])]
        print(f"| {name} | {' | '.join(cells)} |")


def medians(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(values) for values in zip(*map(astuple, timings), strict=True)))


def cell(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def row(case: str, ours: dict[str, Timing], peers: dict[str, Timing], case_floor: float,
        plain_floor: float) -> Iterator[tuple[float | None, str]]:
    """A number and its format for each of COLUMNS; case_floor: that of the case's passes."""
    mine, peer = ours[case], peers.get(case)
    plain, peer_plain = (timings["plain"].step_seconds if "plain" in timings else None for timings in (ours, peers))
    yield mine.step_seconds, ".4f"
    yield plain and mine.step_seconds / plain, ".2f"
    yield plain and mine.step_seconds / (plain + case_floor - plain_floor), ".3f"
    yield case_floor / mine.step_seconds, ".1%"
    yield peer and peer.step_seconds, ".4f"
    yield peer and peer_plain and peer.step_seconds / peer_plain, ".2f"
    yield peer and peer.step_seconds / mine.step_seconds, ".2f"
    for name in ("first_step_seconds", "total_seconds", "peak_mib"):
        yield peer and getattr(mine, name) / getattr(peer, name), ".2f"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="the other script; without it only ours and the floor are timed")
    parser.add_argument("--peer_site", type=Path, default=Path(), help="folder with torchvision for the peer")
    parser.add_argument("--trainer", choices=TRAINERS, default="dreambooth")
    parser.add_argument("--model", type=Path, help="without it the shipped one that the trainer is for")
    parser.add_argument("--data", type=Path, default=ROOT / "assets/icons-3d")
    parser.add_argument("--cases", nargs="+", help="; ".join(
        f"of {name} {', '.join(trainer.cases)}" for name, trainer in TRAINERS.items()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40,
                        help="another number than the files of --data, to which other bars of a run count")
    parser.add_argument("--batch", type=int, help="; ".join(
        f"{trainer.batch} for {name}" for name, trainer in TRAINERS.items()))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--vae_factor", type=int, default=4, help="pixels a side per latent: 4 here, 8 in real SDXL")
    parser.add_argument("--vocabulary", type=int, help="entries of the tokenizers and rows of the token embeddings")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="what a step's seconds are of; CPU time counts on a machine that does other things too")
    parser.add_argument("--extra", nargs="*", default=[], help="more flags for both, such as cache_latents")
    args = parser.parse_args()
    trainer = TRAINERS[args.trainer]
    args.model, args.batch = args.model or ROOT / trainer.model, args.batch or trainer.batch
    args.cases = args.cases or list(trainer.cases)
    if unknown := [name for name in args.cases if name not in trainer.cases]:
        parser.error(f"--trainer {args.trainer} has no case {', '.join(unknown)}: see --help")
    with tempfile.TemporaryDirectory() as work:
        found, floors = compare(args, trainer, Path(work))
    report(found, floors, trainer.cases)


if __name__ == "__main__":
    main()
