"""TensorBoard and Weights & Biases through accelerate, and what else writes to the screen."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import Problem, UserError, is_out_of_memory
from trainkit.files import Json
from trainkit.process import quiet_imported
from trainkit.runtime.record import redacted_command
from trainkit.runtime.weight_files import run_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

KNOWN = ("tensorboard", "wandb")
FLUSH_SECONDS = 10


def chosen_trackers(report_to: str) -> list[str]:
    """--report_to as a list of names: "all" means those that are installed. Raises UserError for a missing package."""
    installed = [name for name in KNOWN if importlib.util.find_spec(name)]
    if report_to in ("none", "all"):
        return installed if report_to == "all" else []
    if report_to not in installed:
        raise UserError(Problem(
            what=f"--report_to {report_to}: the package is not installed", where="--report_to",
            why="nothing would be logged there", fix=f"pip install {report_to}, or --report_to none",
        ))
    return [report_to]


def start_trackers(accelerator: Accelerator, project: str, options: Mapping[str, Json], *, out_dir: Path) -> None:
    """Open the trackers the accelerator was made with. `options` must hold no secret.

    Both call the run by its name. accelerate would call TensorBoard's folder by the project, as that of all runs.
    W&B records sys.argv by itself, so a token on the command line is masked there first.
    """
    from accelerate.tracking import TensorBoardTracker

    names = [*map(str, accelerator.log_with)]
    if "tensorboard" in names:
        require_folder(Path(accelerator.logging_dir))
        accelerator.log_with[names.index("tensorboard")] = TensorBoardTracker(
            run_name(out_dir), accelerator.logging_dir, flush_secs=FLUSH_SECONDS)
    sys.argv[1:] = redacted_command(sys.argv)[1:]
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in options.items()}
    try:
        accelerator.init_trackers(project, plain, {"wandb": {"dir": str(out_dir), "name": run_name(out_dir)}})
    except Exception as error:  # what W&B raises is not always its own class
        if "wandb" not in names or is_out_of_memory(error):
            raise
        accelerator.trackers = []  # half started: ending them would raise once more
        said = f"{error}".strip().partition("\n")[0] or type(error).__name__
        raise UserError(Problem(
            what=f"Weights & Biases would not start: {said}", where="--report_to wandb",
            why="it needs a login, or to be told to stay offline",
            fix="wandb login, or WANDB_MODE=offline in the environment, or --report_to tensorboard",
        )) from error


def require_folder(folder: Path) -> None:
    """Raises UserError when the trackers' logs have no place to go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(
            what=f"--logging_dir: cannot make the folder ({os.strerror(error.errno or 0)})", where=str(folder),
            why="the trackers would have nowhere to write", kind="disk",
            fix="give another --logging_dir, or --report_to none",
        )) from error


def log_values(accelerator: Accelerator, values: Mapping[str, float], *, step: int) -> None:
    """Numbers to every tracker. accelerate flushes TensorBoard at each call (4 ms a step); its writer does in time."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for name, value in values.items():
                tracker.writer.add_scalar(name, value, step)
        else:
            tracker.log(dict(values), step=step)


def log_images(accelerator: Accelerator, images: Mapping[str, list[Image]], *, step: int) -> None:
    """Images of one size per name, to every tracker that shows images."""
    import numpy as np

    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacks = {k: np.stack([np.asarray(image.convert("RGB")) for image in v]) for k, v in images.items()}
            tracker.log_images(stacks, step=step, dataformats="NHWC")  # [N,H,W,3]
        elif tracker.name == "wandb":
            tracker.log_images(images, step=step)


def quiet_libraries() -> None:
    """Loading bars and advice of the libraries would tear the progress line; their errors still show."""
    warnings.filterwarnings("ignore", message=".*torchvision.*")
    import diffusers.utils.logging  # noqa: F401  (to be quiet, they must be there)
    import transformers.utils.logging  # noqa: F401

    quiet_imported()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
