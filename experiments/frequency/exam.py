"""What run.py measures of a run: what its network has wrong on images that were held out, and its steps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from experiments import ROOT
from experiments.frequency.arms import BASE, COMMON
from experiments.frequency.results import BANDS, DRAWS, KINDS, TIMESTEPS, Bin, Result
from freq_loss import DistributionMatchingLoss
from trainkit import families, rng
from trainkit.condition import Condition
from trainkit.evaluation import style_distance, to_pixels
from trainkit.families import Family
from trainkit.inference import lora_file
from trainkit.options import ModelOptions
from trainkit.tools.evaluate import GenerationSettings, Real, enough, generate, opened, read_reference

REFERENCE, CLIP = ROOT / "assets/icons-3d-reference", ROOT / "assets/tiny-clip-icons"
PILOT_EVERY = 4  # every fourth image is the pilot's
AT_ONCE = 30  # images in the network
DENOISING_STEPS = 10


class Exam:
    """The held-out images, and what a network has wrong on them."""

    def __init__(self, *, pilot: bool):
        self.pilot = pilot

    def result(self, folder: Path, plan: dict[str, object], *, styled: bool) -> Result:
        rows = rows_of(folder)
        return Result(asked=plan, bins=self.bins(folder), seconds=seconds_a_step(rows), telemetry=telemetry(rows),
                      style_distance=self.style_distance(folder) if styled and not self.pilot else None)

    def bins(self, folder: Path | None) -> list[Bin]:
        """Of the network with the LoRA in `folder`; None: of the base model alone."""
        with torch.no_grad(), with_lora(self.family.denoiser, folder):
            return [self.bin(timestep) for timestep in TIMESTEPS]

    def bin(self, timestep: int) -> Bin:
        """Every held-out image at one timestep, DRAWS times with other noise.

        U is of the images of one draw: two draws of an image share what is the image's own. Means over draws.
        """
        meter = DistributionMatchingLoss(gain=1.0, band_norm="dof")  # in units of x0
        errors = []
        for draw in range(DRAWS):
            error, x0_hat, snr = self.answer(timestep, draw)
            errors.append(error)
            meter(x0_hat, self.x0, snr=snr, weight=snr.new_ones(len(snr)))
        found = meter.describe()
        return {"timestep": timestep, "error": statistics.mean(errors)} | {
            f"{kind}_{band}": found[f"dist_match/{kind}_{band}"] for kind in KINDS for band in BANDS}

    def answer(self, timestep: int, draw: int) -> tuple[float, Tensor, Tensor]:
        """What the network says of every image -> mean |out − n|², x̂0 [N,C,h,w], snr [N]."""
        schedule, prediction = self.family.schedule, self.family.schedule.prediction
        level = schedule.at(torch.full((len(self.x0),), timestep))
        keys = [("frequency", real.noun, timestep, draw) for real in self.reference]
        n = rng.normal(self.x0.shape[1:], keys, "held out")
        z = prediction.add_noise(self.x0, n, level)
        out = self.network(z, timestep)
        error = (out - prediction.target(self.x0, n, level)).square().mean()
        return float(error), prediction.to_x0(out, z, level), level.snr

    def network(self, z: Tensor, timestep: int) -> Tensor:
        """The network's output for z [N,C,h,w], AT_ONCE images at a time."""
        outs = []
        for some in torch.arange(len(z)).split(AT_ONCE):
            level = self.family.schedule.at(torch.full((len(some),), timestep))
            condition = Condition(self.text.take(some), time_ids=torch.zeros(len(some), 6))
            outs.append(self.family.denoise(z[some], level, condition))
        return torch.cat(outs)

    @cached_property
    def reference(self) -> list[Real]:
        """Held-out images; every PILOT_EVERYth is the pilot's."""
        every = read_reference(REFERENCE)
        return [real for i, real in enumerate(every) if (i % PILOT_EVERY == 0) == self.pilot]

    @cached_property
    def family(self) -> Family:
        """The base model as the trainer loads it."""
        options = ModelOptions(pretrained_model_name_or_path=str(ROOT / BASE))
        return families.of(options).load(options, device=torch.device("cpu"), weight_dtype=torch.float32)

    @cached_property
    def x0(self) -> Tensor:
        """Clean latents, the means of the VAE's posteriors -> [N,C,h,w]."""
        pixels = to_pixels([opened(real.path) for real in self.reference], COMMON["resolution"])
        mean, _ = self.family.encode_pixels(pixels)
        keys = [("reference", real.noun) for real in self.reference]
        certain = SimpleNamespace(pixels=None, mean=mean, logvar=torch.full_like(mean, -math.inf), keys=keys)
        return self.family.sample_latents(certain)

    @cached_property
    def text(self) -> Condition:
        with torch.no_grad():
            return self.family.encode_prompts([real.caption for real in self.reference])

    def style_distance(self, folder: Path) -> float:
        """Of images drawn with the LoRA to the real ones, as the learning experiment takes it."""
        every = read_reference(REFERENCE)
        settings = GenerationSettings(str(ROOT / BASE), lora_file(folder), strengths=(1.0,), steps=DENOISING_STEPS)
        _, images = next(generate(settings, enough(every, None)))
        return style_distance(images, [opened(real.path) for real in every], CLIP)


@contextmanager
def with_lora(unet: nn.Module, folder: Path | None) -> Iterator[None]:
    """The run's Diffusers file in the network inside, by Diffusers' own loading."""
    if folder is None:
        yield
        return
    unet.load_lora_adapter(str(folder), weight_name=lora_file(folder).name, prefix="unet")
    try:
        yield
    finally:
        unet.unload_lora()


# ----------------------------------------------------------------------------------------------------------------------
# What the run itself wrote


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def seconds_a_step(rows: Sequence[Mapping[str, float]]) -> float:
    """Median of the time from one step to the next."""
    times = [row["seconds"] for row in rows]
    return statistics.median(after - before for before, after in zip(times, times[1:], strict=False))


def telemetry(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what the term logged, over the steps that have it."""
    names = sorted({name for row in rows for name in row if name.startswith("dist_match/")})
    return {name: statistics.mean(row[name] for row in rows if row.get(name) is not None) for name in names}
