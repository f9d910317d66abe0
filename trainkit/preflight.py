"""What can be known about a run before a weight is loaded: the checks that every trainer makes of its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from trainkit import adapters, optim
from trainkit.data.buckets import smallest
from trainkit.data.sources.parts import image_options
from trainkit.diffusion import ScheduleChange
from trainkit.errors import Problem, UserError, shell_word
from trainkit.families import sgm
from trainkit.lora_file import start
from trainkit.losses import fourier_term
from trainkit.options.dataset_config import FLAG, found_path, read_dataset_config
from trainkit.options.sizes import sides_of
from trainkit.runtime.startup import bring_back, leave_out

if TYPE_CHECKING:
    from trainkit.options import (
        FourierOptions,
        ImageOptions,
        LoraOptions,
        ModelOptions,
        ObjectiveOptions,
        OptimizerOptions,
        RunOptions,
        TextOptions,
    )


class ModelCheckOptions(Protocol):
    """What of a trainer's options is about the model."""

    @property
    def model(self) -> ModelOptions: ...

    @property
    def data(self) -> ImageOptions: ...

    @property
    def text(self) -> TextOptions: ...

    @property
    def lora(self) -> LoraOptions: ...

    @property
    def objective(self) -> ObjectiveOptions: ...

    @property
    def fourier_loss(self) -> FourierOptions: ...


@dataclass(frozen=True)
class ModelCheck:
    """What a model folder's JSON files say.

    latents     shape (C,h,w) of the smallest latents; None where there are problems, for these are told first
    text_width  of what the network's cross-attention takes
    """

    problems: list[Problem]
    latents: tuple[int, int, int] | None = None
    text_width: int = 0


def check_model(opt: ModelCheckOptions, family: ModuleType) -> ModelCheck:
    """Everything that keeps the model, a module of trainkit.families, from being trained as the options ask.

    Where the model can be read, the checks of adapters and losses follow, which need its modules and sizes.
    """
    o, schedule = opt.model, ScheduleChange.from_options(opt.objective)
    path, vae_path = o.pretrained_model_name_or_path, o.pretrained_vae_model_name_or_path
    found = family.problems(path, resolution=opt.data.resolution, vae_path=vae_path, revision=o.revision,
                            variant=o.variant, clip_skip=opt.text.clip_skip, schedule=schedule,
                            timesteps=(opt.objective.min_timestep, opt.objective.max_timestep),
                            sides=further_sides(opt.data))
    if found:
        return ModelCheck(found)
    try:
        network = family.skeleton(path, revision=o.revision)
    except UserError as error:
        return ModelCheck([*error.problems])
    height, width = map(min, zip(*map(smallest, image_options(opt.data)), strict=True))
    latents = family.latents(path, f"{width},{height}", vae_path=vae_path, revision=o.revision)
    found = [*start.problems(opt.lora, family.names_of(network), network, family.LORA_TARGETS),
             *adapters.problems(network, opt.lora, targets=family.LORA_TARGETS,
                                blocks=sgm.numbered(network.config)),
             *fourier_term.problems(opt.fourier_loss, opt.objective.loss_type, latents)]
    return ModelCheck(found, latents, network.config.cross_attention_dim)


def further_sides(data: ImageOptions) -> dict[str, int | str]:
    """What else the sides of images come from, by flag."""
    if data.dataset_config:
        return {"dataset_config": ",".join(map(str, sorted({side for one in image_options(data)
                                                            for side in sides_given(one)})))}
    if data.enable_bucket:
        return {"bucket_reso_steps": data.bucket_reso_steps}
    return {"resolutions": data.resolutions} if data.resolutions else {}


def sides_given(data: ImageOptions) -> list[int]:
    """What the sides of the images of one source have to be multiples of, or are."""
    if data.enable_bucket:
        return [data.bucket_reso_steps]
    return sides_of(data.resolutions or data.resolution)


def leave_out_unused(o: OptimizerOptions) -> None:
    """Keep libraries from importing bitsandbytes where nothing of it is asked for, as an earlier run may have done."""
    bring_back()
    if optim.library(o) != "bitsandbytes":
        leave_out("bitsandbytes")


# ----------------------------------------------------------------------------------------------------------------------
# Folders

WRITTEN = ("samples", "previous-*", "checkpoint-*")  # folders that a run makes in --output_dir


class FolderOptions(Protocol):
    """What of a trainer's options names the folders it reads and writes."""

    @property
    def data(self) -> ImageOptions: ...

    @property
    def run(self) -> RunOptions: ...


def output_problems(opt: FolderOptions) -> list[Problem]:
    """That a run would write among the images it reads, so that the next start trains on its previews and files."""
    out, data = Path(opt.run.output_dir), opt.data
    prior = getattr(opt, "prior", None)
    folders = {f"--{data.folder_flag}": data.folder, "--dataset_name": data.dataset_name,
               **source_folders(data),
               "--class_data_dir": prior.class_data_dir if prior and prior.with_prior_preservation else None}
    problems = []
    for flag, name in folders.items():
        folder = Path(name or "")
        if not name or flag == "--dataset_name" and not folder.is_dir():  # it may be on the Hub
            continue
        if lies_in(out, folder):
            where = "is the folder of the images" if lies_in(folder, out) else "lies in the folder of the images"
            name = "mine" if out.absolute().name == "runs" else out.absolute().name
            fix = f"--output_dir {shell_word(folder.absolute().parent / 'runs' / name)}"
            problems.append(_mixed(f"--output_dir {where}", out, f"{flag} {folder}", fix))
        elif writes_into(out, folder):
            problems.append(_mixed("the images lie where the run writes its own files", out, f"{flag} {folder}",
                                   "--output_dir ANOTHER_FOLDER"))
    return problems


def source_folders(data: ImageOptions) -> dict[str, str | None]:
    """The folders that a file of sources names, by what a message calls them."""
    if not data.dataset_config:
        return {}
    path = Path(data.dataset_config)
    return {f"{FLAG} {path.name}, {source.name}": f"{found_path(source.image_dir, path)[0]}"
            for source in read_dataset_config(path).sources if source.image_dir}


def _mixed(what: str, out: Path, data: str, fix: str) -> Problem:
    return Problem(what, f"--output_dir {out}, {data}",
                   "the next start would find previews and other files of this run among the images", fix)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not be there yet, is `folder` or below it, links followed."""
    whole = path.resolve()
    return any(_same(above, folder) for above in (whole, *whole.parents))


def _same(path: Path, folder: Path) -> bool:
    try:
        return path.samefile(folder)  # also where letter case or a mount gives one folder two names
    except OSError:
        return path == folder.resolve()


def writes_into(out: Path, folder: Path) -> bool:
    """Whether `folder` is or lies in one of those that a run makes in `out`."""
    whole = folder.resolve()
    if not lies_in(folder, out):
        return False
    try:
        first = whole.relative_to(out.resolve()).parts[0]
    except ValueError:
        return False
    return any(Path(first).match(pattern) for pattern in WRITTEN)
