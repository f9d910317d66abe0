"""What run.py measures of a run: its images beside real ones, its steps, its optimizer's state."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from experiments import ROOT
from experiments.learning.cases import BASE, CLASS
from experiments.learning.results import Result
from trainkit.evaluation import load_clip, power_spectrum, style_distance, to_pixels
from trainkit.files import load_tensors, read_json, tensor_bytes
from trainkit.inference import lora_file
from trainkit.runtime.weight_files import embeddings_file
from trainkit.sheets import sheet
from trainkit.tools.evaluate import (
    GenerationSettings,
    Real,
    Wanted,
    enough,
    generate,
    images_in,
    opened,
    read_reference,
)

CLIP, REFERENCE = ROOT / "assets/tiny-clip-icons", ROOT / "assets/icons-3d-reference"
SIDE = 64  # pixels of a generated image
DRIFT_PROMPTS = 50
SHOWN = 10  # untaught nouns, to be looked at
ROW = "untaught-row.png"  # these side by side, without labels
BASE_ROW, REAL_ROW = "base-row.png", "real-row.png"  # the same of the base model, and of real icons
WARM_UP = 1 / 6  # fraction of a run after which its steps are timed


class Exam:
    """The images every run is judged by; those of the base are generated once."""

    def __init__(self, steps: int, denoising_steps: int, guidance_scale: float):
        self.steps, self.denoising_steps, self.guidance_scale = steps, denoising_steps, guidance_scale

    def result(self, folder: Path, seconds: float, flags: str) -> Result:
        style = self.images(folder, self.style_prompts)
        found = self.beside_real(style)
        self.sheet(folder, style)
        return Result(
            gap_closed=(self.base_distance - found["style_distance"]) / (self.base_distance - self.floor),
            prior_drift=drift(self.images(folder, self.prior_prompts), self.base_prior), seconds=seconds,
            steps=self.steps, denoising_steps=self.denoising_steps, guidance_scale=self.guidance_scale, flags=flags,
            **found,
            step_seconds=step_seconds(folder), state_bytes=state_bytes(folder / f"checkpoint-{self.steps}"))

    def rows(self, out: Path) -> None:
        """The images that the figures show beside those of the runs."""
        if not (out / BASE_ROW).is_file():
            row_of([self.base_style[i] for i in self.shown]).save(out / BASE_ROW)
        row_of([self.real[i] for i in self.shown]).save(out / REAL_ROW)

    def references(self) -> dict[str, dict[str, object]]:
        """What a run's style and spectrum are to be seen beside."""
        groups = {"base": self.base_style, "training images": self.training,
                  "real icons through the VAE": self.passed}
        return {name: self.beside_real(images) for name, images in groups.items()}

    def beside_real(self, images: Sequence[Image.Image]) -> dict[str, object]:
        """Style distance and spectrum of images of any nouns, fields of a Result."""
        power = power_of(images)
        passed = {f"{name}_vae": value for name, value in against(power, self.passed_power).items() if name != "ratios"}
        return {"style_distance": self.distance(images)} | against(power, self.real_power) | passed

    def distance(self, images: Sequence[Image.Image]) -> float:
        """Style distance to the real icons."""
        return style_distance(images, self.real, CLIP)

    @cached_property
    def reference(self) -> list[Real]:
        return read_reference(REFERENCE)

    @cached_property
    def real(self) -> list[Image.Image]:
        return [opened(real.path) for real in self.reference]

    @cached_property
    def real_power(self) -> Tensor:
        return power_of(self.real)

    @cached_property
    def passed(self) -> list[Image.Image]:
        """Real icons through the VAE: no LoRA of the UNet brings back what is lost here."""
        return through_vae(self.real)

    @cached_property
    def passed_power(self) -> Tensor:
        return power_of(self.passed)

    @cached_property
    def training(self) -> list[Image.Image]:
        return [opened(path) for path in images_in(ROOT / "assets/icons-3d")]

    @cached_property
    def floor(self) -> float:
        return self.distance(self.training)

    @cached_property
    def base_style(self) -> list[Image.Image]:
        return self.images(None, self.style_prompts)

    @cached_property
    def base_distance(self) -> float:
        return self.distance(self.base_style)

    @cached_property
    def base_prior(self) -> list[Image.Image]:
        return self.images(None, self.prior_prompts)

    @property
    def style_prompts(self) -> list[Wanted]:
        return enough(self.reference, None)

    @property
    def shown(self) -> range:
        step = len(self.style_prompts) // SHOWN
        return range(0, SHOWN * step, step)

    @property
    def prior_prompts(self) -> list[Wanted]:
        taught = {json.loads(line)["noun"] for line in (CLASS / "metadata.jsonl").read_text("utf-8").splitlines()}
        others = [real for real in self.reference if real.noun not in taught][:DRIFT_PROMPTS]
        named = {real.noun: real.caption.partition(", ")[2] for real in others}  # "a cat"
        return [Wanted(noun, f"icon of {name} in the style of noto", 0) for noun, name in named.items()]

    def images(self, folder: Path | None, wanted: list[Wanted]) -> list[Image.Image]:
        """Generated with the LoRA (and embeddings) in `folder`; None: by the base alone."""
        settings = GenerationSettings(str(BASE), strengths=(0.0,), steps=self.denoising_steps,
                                      guidance_scale=self.guidance_scale)
        if folder:
            embeddings = folder / embeddings_file(folder.name)
            settings = replace(settings, lora=lora_file(folder), strengths=(1.0,),
                               embeddings=embeddings if embeddings.is_file() else None)
        _, images = next(generate(settings, wanted))
        return images

    def sheet(self, folder: Path, style: list[Image.Image]) -> None:
        """Ten untaught nouns, to be looked at."""
        some = [style[i] for i in self.shown]
        page = sheet([some], columns=[self.style_prompts[i].noun for i in self.shown], names=[folder.name],
                     title="untaught nouns")
        page.save(folder / "untaught.png")
        row_of(some).save(folder / ROW)


def row_of(images: Sequence[Image.Image]) -> Image.Image:
    """Side by side, SIDE pixels each."""
    page = Image.new("RGB", (SIDE * len(images), SIDE))
    for i, image in enumerate(images):
        page.paste(image.convert("RGB").resize((SIDE, SIDE)), (SIDE * i, 0))
    return page


def drift(images: list[Image.Image], base: list[Image.Image]) -> float:
    """Mean over pairs of 1 − cosine of their vectors in the shipped CLIP."""
    model, mean, std = load_clip(CLIP)
    side = model.config.vision_config.image_size
    with torch.no_grad():
        a, b = (model.get_image_features(to_pixels(some, side, mean, std)) for some in (images, base))
    a, b = (getattr(x, "pooler_output", x) for x in (a, b))
    return float((1 - torch.nn.functional.cosine_similarity(a, b)).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Spectra


def power_of(images: Sequence[Image.Image]) -> Tensor:
    """Power of each ring of frequencies, [SIDE/2]."""
    return power_spectrum(images, SIDE)


def against(power: Tensor, real: Tensor) -> dict[str, object]:
    """Two power spectra [rings] -> `ratios`, `high` and `spectrum` of a Result."""
    ratios, half = (power / real).tolist(), len(real) // 2
    return {"ratios": ratios, "high": float(power[half:].sum() / real[half:].sum()),
            "spectrum": math.sqrt(statistics.mean(math.log(ratio) ** 2 for ratio in ratios))}


def through_vae(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encoded (the posterior's mean) and decoded."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(BASE, subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        pixels = vae.decode(vae.encode(to_pixels(images, SIDE)).latent_dist.mean).sample  # [N,3,H,W]
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


# ----------------------------------------------------------------------------------------------------------------------
# Costs


def step_seconds(folder: Path) -> float | None:
    """Median time from one step to the next, after the first of the run; None without two such steps."""
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [row["seconds"] for row in rows[int(len(rows) * WARM_UP):]]
    found = [after - before for before, after in zip(times, times[1:], strict=False)]
    return statistics.median(found) if found else None


def state_bytes(checkpoint: Path) -> float | None:
    """Bytes of the optimizer's state in a checkpoint by the numbers it trains, a step's counter included.

    A checkpoint keeps every tensor in its own type, so this is what the state takes wherever it lies; None where there
    is no checkpoint any more.
    """
    if not (checkpoint / "optimizer.safetensors").is_file():
        return None
    groups: Mapping[str, dict] = read_json(checkpoint / "state.json")["optimizer"]["groups"]
    tensors = load_tensors(checkpoint / "optimizer.safetensors")
    state = {name: t for name, t in tensors.items() if name.partition("/")[2].startswith("state.")}
    numbers = sum(math.prod(p["shape"]) for group in groups.values() for p in group["params"])
    return tensor_bytes(state) / numbers
