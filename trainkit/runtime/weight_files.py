"""What the files that other programs load are called, those of a run and of its steps, and its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # in the run's folder, and in every checkpoint
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"  # the WebUI file under the Diffusers script's name
UNREADABLE = r"[\s()\[\]{}<>:,;|\\]+"  # in a prompt of a user interface: they end a name or weigh it
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STEP = re.compile(r"-step(\d{8,})(?:_emb)?\.safetensors")
NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # characters that Windows takes in no name
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)  # not files there


def run_name(out_dir: Path) -> str:
    """What the files of a run are called: the last part of its folder's path, as every system takes it."""
    return portable_name(out_dir.resolve().name)


def portable_name(name: str) -> str:
    """`name` as Windows takes it too. A LoRA's file moves from system to system; `:` also ends <lora:NAME:1>."""
    allowed = NOT_IN_NAMES.sub("_", name).rstrip(". ")
    return f"_{allowed}" if not allowed or DEVICES.fullmatch(allowed) else allowed


def weight_names(name: str) -> tuple[str, str]:
    """What the two weight files of a run are called, the one for Diffusers first."""
    return DIFFUSERS_FILE, f"{name}.safetensors"


def lycoris_file(name: str) -> str:
    """A DoRA with the paper's magnitudes (--save_paper_dora)."""
    return f"{name}_lycoris.safetensors"


def low_rank_file(name: str) -> str:
    """A DoRA as the nearest plain LoRA (--svd_rank)."""
    return f"{name}_svd.safetensors"


def embeddings_file(name: str) -> str:
    """A name that ComfyUI finds behind `embedding:`, and WebUIs in a prompt: blanks and marks with a meaning end it."""
    return f"{re.sub(UNREADABLE, '_', name)}_emb.safetensors"


def step_name(name: str, step: int) -> str:
    """The run's name in the files of one of its steps: dog-step00000500.safetensors, dog-step00000500_emb.safetensors.

    Eight digits, so that a WebUI lists the steps in their order.
    """
    return f"{name}-step{step:08d}"


def at_step(path: Path) -> tuple[Path, int | None]:
    """`runs/dog@500` -> runs/dog, 500; a path that is there means itself, and so does one without a step."""
    run, sign, step = path.name.rpartition("@")
    if not sign or not run or not re.fullmatch(r"[0-9]+", step) or path.exists():
        return path, None
    return path.with_name(run), int(step)


def step_of(folder: Path) -> int | None:
    """Step in a name `checkpoint-<step>`; None for any other name."""
    match = CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_files(folder: Path, name: str) -> dict[Path, int]:
    """The files of single steps in a run's folder, with the step of each, in the order of steps."""
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name.startswith(name)]
    ends = {path: STEP.fullmatch(path.name.removeprefix(name)) for path in files}
    return {path: int(end[1]) for path, end in ends.items() if end}
