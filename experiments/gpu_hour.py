"""One hour on a real card: what this suite needs and how fast it is there, in parts of at most ten minutes.

    .venv/bin/python experiments/gpu_hour.py --out runs/gpu-hour \\
        --peer DIFFUSERS/examples/advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py

It trains SDXL at its released sizes with random weights (7 GB, written once to the folder --out), so nothing is
downloaded and no LoRA means anything. The parts, the most telling first:

    modes  whether each mode trains at 1024 px, its peak of memory, and its steps per second
    bits   whether two equal runs, and a resumed one, end with the same bits, with --deterministic and without
    peer   steps per second and memory of ours and of the Diffusers script, at batch 1 and 4
    waits  where a step makes the host wait for the card, as PyTorch tells it
    gaps   how much of a step the card has nothing to do

The same command goes on where it was stopped. Each result is in results.json as soon as it is there, and at the end
the section about GPUs in docs/benchmarks.md is written from them. --minutes ends a part before its next run.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_dreambooth_lora_sdxl_advanced as dreambooth
from experiments import ROOT
from experiments.benchmark import sdxl
from trainkit import options
from trainkit.errors import UserError, is_out_of_memory
from trainkit.plan.models import read_configs
from trainkit.plan.phases import trace

log = logging.getLogger(__name__)

Result = dict[str, Any]
GIB = 2**30
BEGIN, END = "<!-- gpu_hour: begin -->", "<!-- gpu_hour: end -->"
WARM = 2  # steps that are not timed
LEAN = ("--mixed_precision=bf16", "--gradient_checkpointing", "--cache_latents")
MODES: dict[str, tuple[str, ...]] = {
    "README's first command": LEAN,
    "no gradient checkpointing": ("--mixed_precision=bf16", "--cache_latents"),
    "batch 4": (*LEAN, "--train_batch_size=4"),
    "previews": (*LEAN, "--validation_prompt=a TOK icon", "--num_validation_images=1", "--validation_steps=1000"),
    "Prodigy": (*LEAN, "--optimizer=prodigy", "--learning_rate=1"),
    "fp16": ("--mixed_precision=fp16", "--gradient_checkpointing", "--cache_latents"),
    "VAE in every step": ("--mixed_precision=bf16", "--gradient_checkpointing"),
    "new tokens": (*LEAN, "--train_text_encoder_ti", "--train_text_encoder_ti_frac=1"),
    "DoRA": (*LEAN, "--use_dora"),
    "8-bit AdamW": (*LEAN, "--optimizer=adamw8bit"),
    "HinaAdaptive": (*LEAN, "--optimizer=hina_adaptive", "--optimizer_args=preset=fork cpu_offload_states=True"),
    "--deterministic": (*LEAN, "--deterministic"),
    "class images": (*LEAN, "--with_prior_preservation", "--class_prompt=an icon", "--num_class_images=2",
                     "--class_data_dir={out}/class", "--sample_batch_size=1"),
    "fp32": ("--gradient_checkpointing", "--cache_latents"),
}
PEER = """
import json, runpy, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
times = []
register_optimizer_step_post_hook(lambda *a: (torch.cuda.synchronize(), times.append(time.perf_counter())))
out, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
open(out, "w", encoding="utf-8").write(json.dumps({"times": times, "peak": peak}))
"""


# ----------------------------------------------------------------------------------------------------------------------
# One run of a trainer


def flags(args: argparse.Namespace, name: str, *, steps: int) -> list[str]:
    """What every run has, ours and the peer's alike."""
    return [f"--pretrained_model_name_or_path={args.model}", f"--instance_data_dir={args.out}/images",
            "--instance_prompt=a TOK icon", f"--output_dir={args.out}/{name}", f"--resolution={args.resolution}",
            f"--max_train_steps={steps}", "--train_batch_size=1", "--rank=16", "--learning_rate=1e-4",
            "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0", "--checkpointing_steps=100000"]


@contextmanager
def step_times() -> Iterator[list[float]]:
    """The clock after each update, when the card has done it."""
    times: list[float] = []

    def note(*args: object) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(note)
    try:
        yield times
    finally:
        hook.remove()


def train(argv: list[str]) -> Result:
    """A run in this process -> how it ended, its peaks in bytes above what was there before, and steps per second."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ended = "trained"
    with step_times() as times:
        try:
            dreambooth.main([*argv, "--report_to=none"])
        except UserError as error:
            memory = error.problems[0].kind == "memory"
            ended = "out of memory" if memory else f"refused: {error.problems[0].what}"
        except RuntimeError as error:  # a mode that breaks must not end the hour
            ended = "out of memory" if is_out_of_memory(error) else f"failed: {f'{error}'.partition(chr(10))[0]}"
    return {"ended": ended, "planned": planned(argv), "allocated": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved(), "steps_per_second": rate(times)}


def planned(argv: list[str]) -> str:
    """GiB of tensors at the peak of this command, as the plan computes it."""
    opt = options.parse(dreambooth.Options, argv, description="")
    return f"{max(phase.peak.total for phase in trace(opt, read_configs(opt.model)).phases) / GIB:.2f}"


def rate(times: list[float]) -> float | None:
    gaps = [after - before for before, after in zip(times[WARM - 1:], times[WARM:], strict=False)]
    return 1 / statistics.median(gaps) if gaps and min(gaps) > 0 else None


# ----------------------------------------------------------------------------------------------------------------------
# The parts: name of a run -> what makes its result


def modes(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    def run(name: str, more: tuple[str, ...]) -> Result:
        given = [word.format(out=args.out) for word in more]
        return train([*flags(args, f"modes/{list(MODES).index(name)}", steps=args.steps), *given])

    chosen = {name: more for name, more in MODES.items() if name in (args.modes or MODES)}
    return {name: lambda name=name, more=more: run(name, more) for name, more in chosen.items()}


def bits(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    def compare(kind: str, more: tuple[str, ...]) -> Result:
        digests = []
        for number, parts in enumerate(([[]], [[]], [["--stop_after_steps=2"], ["--resume_from_checkpoint=latest"]])):
            base = flags(args, f"bits/{kind}{number}", steps=4)
            ended = [train([*base, *LEAN, *more, *part])["ended"] for part in parts]
            if set(ended) != {"trained"}:
                return {"ended": ended[-1]}
            file = args.out / f"bits/{kind}{number}/pytorch_lora_weights.safetensors"
            digests.append(tensors_of(file))
        return {"ended": "trained", "same": digests[0] == digests[1], "same_resumed": digests[0] == digests[2]}

    return {"as it is": lambda: compare("plain", ()), "--deterministic": lambda: compare("exact", ("--deterministic",))}


def tensors_of(file: Path) -> str:
    """A digest of the weights; the header has the date."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def peer(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    def theirs(batch: int) -> Result:
        result = (args.out / f"peer{batch}.json").resolve()
        argv = [*flags(args, f"peer{batch}", steps=args.steps), *LEAN, f"--train_batch_size={batch}"]
        done = subprocess.run([sys.executable, "-c", PEER, str(result), str(args.peer), *argv], check=False)
        if done.returncode:
            return {"ended": f"exit code {done.returncode}"}
        found = json.loads(result.read_text("utf-8"))
        return {"ended": "trained", "allocated": found["peak"][0], "reserved": found["peak"][1],
                "steps_per_second": rate(found["times"])}

    def ours(batch: int) -> Result:
        return train([*flags(args, f"ours{batch}", steps=args.steps), *LEAN, f"--train_batch_size={batch}"])

    runs: dict[str, Callable[[], Result]] = {}
    for batch in (1, 4) if args.peer else ():
        runs |= {f"ours, batch {batch}": lambda batch=batch: ours(batch),
                 f"Diffusers, batch {batch}": lambda batch=batch: theirs(batch)}
    return runs


def waits(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    """In sync-debug mode PyTorch warns at each call that waits; counted are those between the last two updates."""
    def count(name: str, more: tuple[str, ...]) -> Result:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            marks: list[int] = []
            hook = register_optimizer_step_post_hook(lambda *a: marks.append(len(caught)))
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = train([*flags(args, f"waits/{name}", steps=4), *LEAN, *more])
            finally:
                torch.cuda.set_sync_debug_mode("default")
                hook.remove()
            step = caught[marks[-2]:marks[-1]] if len(marks) > 1 else []
        lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in step if "synchroniz" in f"{w.message}")
        return {"ended": found["ended"], "waits": dict(lines.most_common(8)), "count": lines.total()}

    optimizers = {"AdamW": (), "Prodigy": MODES["Prodigy"][len(LEAN):], "8-bit AdamW": ("--optimizer=adamw8bit",)}
    return {name: lambda name=name, more=more: count(name, more) for name, more in optimizers.items()}


def gaps(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    """In the steps that are timed: kernels, and how long the card was busy with them."""
    def profile(batch: int) -> Result:
        from torch.profiler import schedule, supported_activities

        kernels: list[float] = []  # seconds of each
        active = args.steps - WARM

        def ready(profiler: torch.profiler.profile) -> None:
            events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            kernels.extend(event.time_range.elapsed_us() / 1e6 for event in events)

        argv = [*flags(args, f"gaps{batch}", steps=args.steps), *LEAN, f"--train_batch_size={batch}"]
        with step_times() as times, torch.profiler.profile(
                activities=supported_activities(), on_trace_ready=ready,
                schedule=schedule(wait=0, warmup=WARM, active=active, repeat=1)) as profiler:
            hook = register_optimizer_step_post_hook(lambda *a: profiler.step())
            try:
                found = train(argv)
            finally:
                hook.remove()
        return {"ended": found["ended"], "kernels": len(kernels), "busy_seconds": sum(kernels),
                "seconds": times[-1] - times[WARM - 1] if len(times) > WARM else 0.0, "steps": active}

    return {f"batch {batch}": lambda batch=batch: profile(batch) for batch in (1, 4)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Callable[[], Result]]]] = {
    "modes": modes, "bits": bits, "peer": peer, "waits": waits, "gaps": gaps}


# ----------------------------------------------------------------------------------------------------------------------
# The hour


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no NVIDIA card here: .venv/bin/python -c 'import torch; print(torch.version.cuda)'")
    args.out.mkdir(parents=True, exist_ok=True)
    args.model = args.model or sdxl.write(args.out / "sdxl")
    write_images(args.out / "images", args.resolution)
    file = args.out / "results.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if results.setdefault("card", card()) != card():
        sys.exit(f"{file} is from {results['card']['name']}, or of other versions: give another --out")
    for part in args.parts:
        begun, found = time.monotonic(), results.setdefault(part, {})
        for name, run in PARTS[part](args).items():
            if name in found or time.monotonic() - begun > 60 * args.minutes:
                continue
            print(f"{part}: {name}", flush=True)
            found[name] = run()
            file.write_text(json.dumps(results, indent=1), "utf-8")
    text = args.docs.read_text("utf-8")
    args.docs.write_text(with_section(text, section(results)), "utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="The folder for the model, the runs and results.json.")
    add("--peer", type=Path, help="The Diffusers script to compare with. Without it, that part is left out.")
    add("--model", help="A model folder. Without it, SDXL with random weights is written to --out.")
    add("--resolution", type=int, default=1024)
    add("--steps", type=int, default=8, help=f"Steps of a run; the first {WARM} are not timed.")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--modes", nargs="+", choices=MODES, help="Only these modes.")
    add("--minutes", type=float, default=10, help="After this long, a part begins no further run.")
    add("--docs", type=Path, default=ROOT / "docs" / "benchmarks.md", help="The page with the section about GPUs.")
    return parser.parse_args(argv)


def write_images(folder: Path, side: int, number: int = 6) -> None:
    folder.mkdir(exist_ok=True)
    draws = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(draws.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"{index}.png")


def card() -> dict[str, str]:
    import diffusers

    facts = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, encoding="utf-8", check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"name": facts.name, "GiB": f"{facts.total_memory / GIB:.1f}", "driver": driver,
            "torch": torch.__version__, "CUDA": f"{torch.version.cuda}", "diffusers": diffusers.__version__}


# ----------------------------------------------------------------------------------------------------------------------
# The section


def section(results: dict[str, Any]) -> str:
    facts = results["card"]
    lines = [f"Measured by `experiments/gpu_hour.py` on one {facts['name']} ({facts['GiB']} GiB), driver "
             f"{facts['driver']}, torch {facts['torch']}, CUDA {facts['CUDA']}, Diffusers {facts['diffusers']}. The "
             "model is SDXL at its released sizes with random weights, 1024 px, rank 16, batch 1 if nothing else is "
             "said.", ""]
    for part in ("modes", "peer"):
        if results.get(part):
            lines += ["| run | ended | planned, GiB | allocated, GiB | reserved, GiB | steps per second |",
                      "|---|---|---|---|---|---|", *(speed_row(*found) for found in results[part].items()), ""]
    for name, found in results.get("bits", {}).items():
        lines += [f"- Two equal runs, {name}: {outcome(found, 'same')}; a resumed run: "
                  f"{outcome(found, 'same_resumed')}."]
    for name, found in results.get("waits", {}).items():
        lines += [f"- Waits in a step with {name}: {found['count']} ({found['waits'] or 'none'})."]
    for name, found in results.get("gaps", {}).items():
        lines += [f"- {name}: {found['kernels']} kernels in {found['steps']} steps, which kept the card busy for "
                  f"{found['busy_seconds']:.2f} of {found['seconds']:.2f} s (with the profiler on)."]
    return "\n".join(lines).rstrip()


def speed_row(name: str, found: Result) -> str:
    speed = found.get("steps_per_second")
    peaks = [f"{found[key] / GIB:.2f}" if key in found else "" for key in ("allocated", "reserved")]
    cells = [name, found["ended"], found.get("planned", ""), *peaks, "" if speed is None else f"{speed:.2f}"]
    return f"| {' | '.join(cells)} |"


def outcome(found: Result, key: str) -> str:
    return found["ended"] if key not in found else "the same bits" if found[key] else "other bits"


def with_section(page: str, text: str) -> str:
    """The page with another text between the two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


if __name__ == "__main__":
    main()
