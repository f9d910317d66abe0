"""What the shipped models can do, measured on the exported folders with stock pipelines; numbers go to the cards."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from experiments.base_models.captions import TEMPLATES, caption
from experiments.base_models.data import SIZE, STYLES, load_icons, read_nouns, stable_fraction, withheld_style
from experiments.base_models.export import MODEL_FOLDERS
from experiments.base_models.loop import replace_text
from experiments.base_models.style_layers import measure_layers
from experiments.base_models.vae import heldout_psnr

LOG = logging.getLogger("base_models")
PROBES, SEEDS, STEPS = 50, 4, 20
GUIDANCE = {"sdxl": 3.0, "sd": 3.0}


@dataclass(frozen=True)
class Probe:
    noun: str
    style: str
    text: str

    @property
    def withheld(self) -> bool:
        """True where the UNet never saw this noun in this style."""
        return withheld_style(self.noun) == self.style


def probes(count: int = PROBES) -> list[Probe]:
    """Nouns, styles and wordings drawn by the nouns' names, so that every build answers the same questions."""
    nouns = sorted(read_nouns().values(), key=lambda noun: stable_fraction(f"probe {noun}"))[:count]
    chosen = []
    for index, noun in enumerate(nouns):
        style = STYLES[index % len(STYLES)]
        chosen.append(Probe(noun, style, caption(TEMPLATES[index % len(TEMPLATES)], noun, style)))
    return chosen


class Judge:
    """Nearest real icon in the shipped CLIP's image space."""

    def __init__(self, work_dir: Path, clip_dir: Path) -> None:
        from transformers import CLIPModel

        self.model = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32).eval().requires_grad_(False)
        icons, pixels = load_icons(work_dir)
        chosen = [index for index, icon in enumerate(icons) if icon.noun]
        self.icons = [icons[index] for index in chosen]
        self.images = [Image.fromarray(pixels[index]) for index in chosen]
        self.gallery = self.vectors(self.images)

    @torch.no_grad()
    def vectors(self, images: list[Image.Image]) -> Tensor:
        """Unit image vectors [N,96]."""
        pixels = as_pixels(images)
        found = [self.model.get_image_features(chunk).pooler_output for chunk in pixels.split(64)]
        return functional.normalize(torch.cat(found), dim=-1)

    def nearest(self, images: list[Image.Image]) -> list[tuple[str, str]]:
        """(noun, style) of the most similar real icon of each image."""
        best = (self.vectors(images) @ self.gallery.T).argmax(1)
        return [(self.icons[index].noun, self.icons[index].style) for index in best.tolist()]

    def other_style_top1(self) -> float:
        """Share of real icons whose nearest icon of another style is of their own noun."""
        cosines = self.gallery @ self.gallery.T
        same_style = torch.tensor([[one.style == other.style for other in self.icons] for one in self.icons])
        best = cosines.masked_fill(same_style, -1).argmax(1).tolist()
        hits = [self.icons[index].noun == icon.noun for icon, index in zip(self.icons, best, strict=True)]
        return fraction_true(hits)


def as_pixels(images: list[Image.Image]) -> Tensor:
    """[N,3,64,64] in [-1,1], as the CLIP's image processor and the VAE both want."""
    import numpy as np

    planes = [torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).permute(2, 0, 1) for image in images]
    return torch.stack(planes).float() / 127.5 - 1


def as_images(pixels: Tensor) -> list[Image.Image]:
    planes = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(plane.numpy()) for plane in planes]


def draw(pipeline, texts: list[str], seeds: list[int], guidance: float, steps: int = STEPS) -> list[Image.Image]:
    """One image per caption and seed; an image depends on its caption and seed alone, not on its batch."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(texts), 20):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 20]]
        answer = pipeline(
            texts[start : start + 20],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=SIZE,
            width=SIZE,
        )
        images += answer.images
    return images


def load_pipeline(folder: Path, family: str):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    return kind.from_pretrained(folder, torch_dtype=torch.float32)


def fraction_true(hits: list[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 4)


def judge_family(
    family: str, work_dir: Path, assets_dir: Path, judge: Judge, seed: int
) -> tuple[dict, list[Image.Image]]:
    """Top-1 of noun (and style) over the probes and seeds; the images, probe by probe."""
    wanted = [probe for probe in probes() for _ in range(SEEDS)]
    seeds = [seed + index for _ in probes() for index in range(SEEDS)]
    pipeline = load_pipeline(assets_dir / MODEL_FOLDERS[family], family)
    images = draw(pipeline, [probe.text for probe in wanted], seeds, GUIDANCE[family])
    found = judge.nearest(images)
    hits = [noun == probe.noun for probe, (noun, _) in zip(wanted, found, strict=True)]
    scores = {
        "noun_top1": fraction_true(hits),
        "style_top1": fraction_true([style == probe.style for probe, (_, style) in zip(wanted, found, strict=True)]),
        "noun_top1_withheld": fraction_true([hit for hit, probe in zip(hits, wanted, strict=True) if probe.withheld]),
        "images": len(hits),
        "withheld_images": sum(probe.withheld for probe in wanted),
        "missed": sorted({f"{p.noun} -> {n}" for p, (n, _), hit in zip(wanted, found, hits, strict=True) if not hit}),
        "guidance": GUIDANCE[family],
        "steps": STEPS,
    }
    LOG.info("%s %s", family, scores)
    return scores, images


@torch.no_grad()
def ceiling(judge: Judge, vae) -> dict[str, float]:
    """The judge's score for real icons that only went through the autoencoder."""
    drawn = []
    for chunk in as_pixels(judge.images).split(64):
        drawn += as_images(vae.decode(vae.encode(chunk).latent_dist.mode()).sample)
    found = judge.nearest(drawn)
    return {
        "reconstructed_top1": fraction_true(
            [noun == icon.noun for icon, (noun, _) in zip(judge.icons, found, strict=True)]),
        "other_style_top1": judge.other_style_top1(),
    }


def contact_sheet(images: list[Image.Image], labels: list[str], columns: int, path: Path) -> None:
    """Images row by row at 64 px, each row of `columns` starting with a label; a small PNG of 128 colours."""
    rows, left = len(images) // columns, 150
    sheet = Image.new("RGB", (left + columns * SIZE, rows * SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        sheet.paste(image, (left + index % columns * SIZE, index // columns * SIZE))
    for row, label in enumerate(labels):
        pen.text((4, row * SIZE + 26), label, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)


def base_sheet(wanted_probes: list[Probe], images: list[Image.Image], path: Path) -> None:
    """The first 24 probes in two columns of four seeds each."""
    half = 12
    sides = []
    for first in (0, half):
        part = images[first * SEEDS : (first + half) * SEEDS]
        labels = [
            f"{probe.noun}\n{probe.style}{' (withheld)' if probe.withheld else ''}"
            for probe in wanted_probes[first : first + half]
        ]
        side = path.with_name(f".{path.stem}-{first}.png")
        contact_sheet(part, labels, SEEDS, side)
        sides.append(Image.open(side).convert("RGB"))
        side.unlink()
    sheet = Image.new("RGB", (sides[0].width * 2, sides[0].height), "white")
    for index, side in enumerate(sides):
        sheet.paste(side, (index * sides[0].width, 0))
    sheet.quantize(128).save(path, optimize=True)


def evaluate_all(work_dir: Path, assets_dir: Path, *, seed: int) -> None:
    """Measure everything, write evaluation.json, the sheets and the model cards."""
    from experiments.base_models.cards import write_cards

    judge = Judge(work_dir, assets_dir / MODEL_FOLDERS["clip"])
    vae = load_pipeline(assets_dir / MODEL_FOLDERS["sdxl"], "sdxl").vae
    psnr, count = heldout_psnr(vae, work_dir)
    scores: dict = {"vae": {"psnr_heldout": round(psnr, 2), "heldout": count}, "clip": ceiling(judge, vae)}
    scores["clip"]["style_layers"] = measure_layers(judge.model, work_dir)
    LOG.info("%s", scores)
    for family in ("sdxl", "sd"):
        if (assets_dir / MODEL_FOLDERS[family] / "model_index.json").exists():
            scores[family], images = judge_family(family, work_dir, assets_dir, judge, seed)
            base_sheet(probes(), images, assets_dir.parent / "docs" / "images" / f"base_{family}.png")
    replace_text(work_dir / "evaluation.json", json.dumps(scores, indent=2))
    write_cards(work_dir, assets_dir)
