"""Images during training: the same prompts from the same noise at every step, so only the adapter changes."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from trainkit.devices import empty_cache, free_memory
from trainkit.diffusion import is_edm
from trainkit.diffusion.samplers import scheduler_on
from trainkit.errors import counted
from trainkit.files import disk_errors
from trainkit.options.samplers import webui_name
from trainkit.options.sizes import size_of
from trainkit.report.facts import sample_files
from trainkit.sheets import is_of, png_parameters, save_png, sheet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image

    from trainkit.families import Family
    from trainkit.families.base import EncodePrompts
    from trainkit.options import ValidationOptions

log = logging.getLogger(__name__)

T = TypeVar("T")
Watch = Callable[[float, int], bool]  # (images done, of) -> whether to end there
OFTEN = 20  # training steps between previews, below which previews may well take longer than training
STEPS = 25  # denoising steps of the Diffusers trainers' validation
DECODER = 3 * 2**29  # bytes free on a card for the VAE and what it computes in tiles: 1.1 GiB (computed), and reserve


@dataclass(frozen=True)
class PreviewImage:
    """One image of every preview."""

    prompt: str
    number: int  # of the prompt, from 1
    seed: int

    def file_name(self, step: int) -> str:
        return f"step_{step:06d}_p{self.number:02d}_s{self.seed}.png"


def preview_prompts(options: ValidationOptions) -> list[str]:
    """What must be encoded before the text encoders are freed: the user's prompt and the empty negative one."""
    return [options.validation_prompt, ""] if options.validation_prompt else []


def grid_name(step: int) -> str:
    return f"step_{step:06d}.png"


class Previews:
    """Draws `num_validation_images` images of the validation prompt; without a prompt, none.

    The stock pipeline is put together from the training run's own network; text comes encoded, because the encoders
    are gone. Starting noise depends on the image's seed alone, so two steps differ by what was learned in between.
    It is that of the stock pipeline with `torch.Generator().manual_seed(seed)`, and so is the image.
    No global random state is read or advanced, and the UNet's modes are as before afterwards.

    averaged  context of the weights to look at, where they are not those that train (Optim.averaged)
    """

    def __init__(self, family: Family, options: ValidationOptions, encode: EncodePrompts, output_dir: str | Path, *,
                 seed: int, resolution: int | str, every: int = 0,
                 averaged: Callable[[], AbstractContextManager[None]] = nullcontext):
        self.family, self.encode, self.size, self.every = family, encode, size_of(resolution), every
        self.averaged = averaged
        self.folder = Path(output_dir) / "samples"
        count = options.num_validation_images if options.validation_prompt else 0
        self.shots = [PreviewImage(options.validation_prompt or "", 1, seed + k) for k in range(count)]
        if self.shots and 0 < every < OFTEN and options.validation_steps is None:
            log.warning("--validation_epochs %d makes previews every %s, which may take longer than the training does: "
                        "--validation_steps 100 makes fewer", options.validation_epochs,
                        "step" if every == 1 else f"{every} steps")

    def begin(self, start: int) -> None:
        """Once a run, on rank 0, before its first image: move images of another run to earlier/.

        Those of later steps than `start`, or all when starting afresh; a run without previews does so too.
        """
        others = [path for path, step in sample_files(self.folder.parent).items() if step > start or start == 0]
        put_away(others, self.folder.parent, "samples")

    def there(self, step: int) -> bool:
        """Whether this prompt's images of `step` and their grid are in samples/: a resumed run keeps them."""
        files = [*((shot, shot.file_name(step)) for shot in self.shots),
                 *((shot, grid_name(step)) for shot in self.shots[:1])]
        return all(is_of(self.folder / name, shot.prompt) for shot, name in files)

    def missing(self, start: int, *, last: bool) -> bool:
        """Whether a session that begins after `start` steps makes previews at once: before the first step, and where a
        signal has cut them off. A step at which none are due gets none.
        """
        return (start == 0 or self.due(start, last=last)) and not self.there(start)

    def due(self, step: int, *, last: bool) -> bool:
        """Whether previews are due after `step` finished steps: every `every` steps, and after the last."""
        return bool(self.shots) and (last or bool(self.every) and step % self.every == 0)

    def generate(self, step: int, watch: Watch = lambda done, total: False) -> dict[Path, Image.Image]:
        """Write samples/step_<step>_p<prompt>_s<seed>.png and the grid samples/step_<step>.png -> them, grid last.

        watch  called after every denoising step and image with how far it is; when it says yes, nothing is written
        """
        if not self.shots:
            return {}
        try:
            images = self._images(watch)
        except _Stopped:
            return {}
        with disk_errors(self.folder):
            return self._write(step, images)

    def _write(self, step: int, images: Sequence[Image.Image]) -> dict[Path, Image.Image]:
        self.folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was taken away must be told
        files = {self.folder / shot.file_name(step): one for shot, one in zip(self.shots, images, strict=True)}
        for shot, (path, image) in zip(self.shots, files.items(), strict=True):
            save_png(path, image, self._parameters(shot, image))
        grid, page = self.folder / grid_name(step), self._grid(step, images)
        save_png(grid, page, self._parameters(self.shots[0], images[0]))
        return files | {grid: page}

    def _images(self, watch: Watch) -> list[Image.Image]:
        family, dtype = self.family, self.family.weight_dtype
        parts = count(1)

        def stopping() -> bool:
            return watch(next(parts) / (STEPS + 1), len(self.shots))  # the decoder counts as a step

        precision = torch.autocast(family.device.type, dtype=dtype, enabled=dtype != torch.float32)
        pipe = family.pipeline(sampler(family))
        with self.averaged(), evaluating(family.denoiser), precision:
            latents = [self._latents(pipe, shot, stopping) for shot in self.shots]  # N × [1,C,h,w]
        if not all(bool(one.isfinite().all()) for one in latents):
            log.warning("the network generates NaN or infinity, which previews show as black")
        empty_cache(family.device)
        context = aside(family.denoiser) if free_memory(family.device) < DECODER else nullcontext()
        with context, visiting(family.vae, family.device):
            images = [image for one in latents for image in family.decode(unless(stopping, one))]
        empty_cache(family.device)
        return images

    def _latents(self, pipe: DiffusionPipeline, shot: PreviewImage, stopping: Callable[[], bool]) -> Tensor:
        """One finished latent -> [1,C,h,w]; one at a time, so that a preview never needs more memory than training."""
        height, width = self.size
        shape = self.family.latent_channels, height // self.family.vae_factor, width // self.family.vae_factor
        noise = torch.Generator().manual_seed(shot.seed)  # as in generate and in the stock pipeline
        latents = torch.randn(1, *shape, generator=noise)  # in fp32, whatever the text's precision
        return pipe(
            **self.family.pipeline_text(pipe, [shot.prompt], self.encode), latents=latents.to(self.family.device),
            height=height, width=width, num_inference_steps=STEPS,
            guidance_scale=self.family.guidance_scale,
            generator=noise, output_type="latent",
            callback_on_step_end=lambda pipe, step, timestep, now: unless(stopping, now),
        ).images

    def _grid(self, step: int, images: Sequence[Image.Image]) -> Image.Image:
        columns = [f"seed {shot.seed}" for shot in self.shots]
        return sheet([images], columns=columns, names=[self.shots[0].prompt], title=f"step {step}")

    def _parameters(self, shot: PreviewImage, image: Image.Image) -> str:
        sampled = webui_name(sampler_class(self.family), self.family.scheduler_config)
        return png_parameters(shot.prompt, {
            "Steps": STEPS, "Sampler": sampled, "CFG scale": self.family.guidance_scale,
            "Seed": shot.seed, "Size": f"{image.width}x{image.height}",
        })


class _Stopped(Exception):
    """Somebody does not want to wait for the images."""


def unless(stopping: Callable[[], bool], value: T) -> T:
    """`value`, or the end of the previews."""
    if stopping():
        raise _Stopped
    return value


def sampler(family: Family) -> SchedulerMixin:
    """DPM-Solver++ on the levels the run trains on, as upstream validates; an EDM model's own scheduler."""
    return scheduler_on(family.scheduler_config, sampler_class(family), prediction_type=family.schedule.prediction_type)


def sampler_class(family: Family) -> str:
    config = family.scheduler_config
    return str(config["_class_name"]) if is_edm(config) else "DPMSolverMultistepScheduler"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule back in its own mode afterwards, whatever happens."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` on `device` inside, back home afterwards."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def aside(network: nn.Module) -> Iterator[None]:
    """The frozen weights of `network` in host memory inside, back home afterwards, which takes seconds for SDXL's.

    What trains stays where it is: optimizers hold pieces of its memory.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    home = frozen[0].device
    move(frozen, torch.device("cpu"))
    empty_cache(home)
    try:
        yield
    finally:
        move(frozen, home)


def move(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(device)


def put_away(paths: Sequence[Path], run_dir: Path, name: str) -> None:
    """Move files of another run to `run_dir`/earlier/<name>-<time>/, and say so."""
    if not paths:
        return
    away = run_dir / "earlier" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with disk_errors(away):
        away.mkdir(parents=True)
        for path in paths:
            path.rename(away / path.name)
    log.warning("%s of an earlier run (%s, ...) moved to %s", counted(len(paths), "file"), paths[0].name, away)
