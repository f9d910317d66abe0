"""Time our SDXL trainer against another script that takes the same flags, and against the bare UNet.

    python scripts/benchmark.py --peer path/to/diffusers/.../train_dreambooth_lora_sdxl_advanced.py --rounds 3

Runs ours and the peer in turn (A B A B …), one thread each, on the shipped model, and prints medians and ratios:
seconds a step, seconds from command to first step, peak memory. Steps are timed from outside, by the progress bar each
run draws on a terminal. `floor` is one process that does nothing but UNet + adapter forward and backward (PEFT's own
layers and ours) on batches of the same shape. The peer needs torchvision; where its wheel does not match a CPU build of
torch, give the folder it was installed to with --peer_site (`pip install --no-deps --target DIR torchvision`).
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "train_dreambooth_lora_sdxl_advanced.py"

CASES = {
    "plain": ["--instance_data_dir={plain}"],
    "captioned": ["--dataset_name={captioned}", "--caption_column=text"],
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
    first_step_seconds: float
    peak_mib: float
    total_seconds: float


def flags(model: Path, out: Path, *, steps: int, batch: int, resolution: int) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}", f"--output_dir={out}", f"--max_train_steps={steps}",
        f"--train_batch_size={batch}", f"--resolution={resolution}", "--instance_prompt=3d icon in the style of TOK",
        "--rank=4", "--learning_rate=1e-4", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0",
        "--center_crop", "--checkpointing_steps=100000", "--report_to=tensorboard",
    ]


def timed(command: list[str], *, steps: int, cwd: Path) -> Timing:
    """Run `command` on a pseudo-terminal and note when its progress bar shows each step."""
    seen: dict[int, float] = {}
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
            seen.setdefault(int(match[1]), time.monotonic() - start)
    _, status, usage = os.wait4(run.pid, 0)
    if status or steps not in seen:
        end = text.decode(errors="replace")
        raise SystemExit(f"benchmark: {' '.join(command[:3])} … failed (status {status}):\n{end}")
    warm = min(s for s in seen if s >= min(4, steps - 1))
    return Timing((seen[steps] - seen[warm]) / (steps - warm), seen[min(s for s in seen if s > 0)],
                  usage.ru_maxrss / 1024, time.monotonic() - start)


def _read(screen: int) -> bytes:
    select.select([screen], [], [])
    try:
        return os.read(screen, 4096)
    except OSError:  # the terminal's other end is closed: the run has ended
        return b""


def floor(model: Path, *, batch: int, latent: int, rounds: int = 3) -> dict[str, float]:
    """Median seconds of forward + backward of the bare UNet, with PEFT's adapter layers, and with ours."""
    code = Path(__file__).with_name("benchmark_floor.py")
    line = [sys.executable, str(code), str(model), str(batch), str(latent), str(rounds)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"benchmark: the floor failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def plain_folder(source: Path, target: Path) -> Path:
    """The pictures of `source` without its metadata: the peer opens every file of a folder as a picture."""
    target.mkdir()
    for picture in sorted(source.glob("*.png")):
        (target / picture.name).write_bytes(picture.read_bytes())
    return target


def compare(args: argparse.Namespace, work: Path) -> tuple[dict[str, dict[str, list[Timing]]], dict[str, float]]:
    """Timings by case and by who, and the floor, all taken in turn."""
    places = dict(plain=plain_folder(args.data, work / "plain"), captioned=args.data)
    found: dict[str, dict[str, list[Timing]]] = {case: {"ours": [], "peer": []} for case in args.cases}
    floors: list[dict[str, float]] = []
    for turn, case in ((t, c) for t in range(args.rounds) for c in args.cases):
        floors.append(floor(args.model, batch=args.batch, latent=args.resolution // args.vae_factor))
        data = [word.format(**places) for word in CASES[case]]
        for who in ("ours", "peer") if args.peer else ("ours",):
            out = work / f"{case}-{who}-{turn}"
            head = [str(TRAINER)] if who == "ours" else ["-c", PEER, str(args.peer_site), str(args.peer)]
            line = [sys.executable, *head, *data,
                    *flags(args.model, out, steps=args.steps, batch=args.batch, resolution=args.resolution),
                    *(f"--{flag}" for flag in args.extra)]
            timing = timed(line, steps=args.steps, cwd=ROOT)
            found[case][who].append(timing)
            print(f"{case:10} {who:5} {timing.step_seconds:.4f} s/step, first step {timing.first_step_seconds:.1f} s, "
                  f"peak {timing.peak_mib:.0f} MiB", flush=True)
    return found, {kind: statistics.median(f[kind] for f in floors) for kind in floors[0]}


def report(found: dict[str, dict[str, list[Timing]]], floors: dict[str, float]) -> None:
    for case, runs in found.items():
        median = {who: {k: statistics.median(getattr(t, k) for t in timings) for k in asdict(timings[0])}
                  for who, timings in runs.items() if timings}
        ours, peer = median["ours"], median.get("peer")
        shares = [f"{floors[kind] / ours['step_seconds']:.1%} ({kind})" for kind in ("ours", "peft")]
        print(f"\n{case}: {ours['step_seconds']:.4f} s/step; share of the floor {', '.join(shares)}")
        if peer:
            print(f"  steps/s ours ÷ peer       {peer['step_seconds'] / ours['step_seconds']:.2f}")
            print(f"  first step ours ÷ peer    {ours['first_step_seconds'] / peer['first_step_seconds']:.2f}")
            print(f"  whole run ours ÷ peer     {ours['total_seconds'] / peer['total_seconds']:.2f}")
            print(f"  peak memory ours ÷ peer   {ours['peak_mib'] / peer['peak_mib']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="the other script; without it only ours and the floor are timed")
    parser.add_argument("--peer_site", type=Path, default=Path(), help="folder with torchvision for the peer")
    parser.add_argument("--model", type=Path, default=ROOT / "assets/tiny-sdxl-icons")
    parser.add_argument("--data", type=Path, default=ROOT / "assets/icons-3d")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--vae_factor", type=int, default=4, help="pixels a side per latent: 4 here, 8 in real SDXL")
    parser.add_argument("--extra", nargs="*", default=[], help="more flags for both, such as cache_latents")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found, floors = compare(args, Path(work))
    print("\nfloor, s/step: " + ", ".join(f"{k} {v:.4f}" for k, v in floors.items()))
    report(found, floors)


if __name__ == "__main__":
    main()
