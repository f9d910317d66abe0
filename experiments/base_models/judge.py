"""The CLIP's image side, trained on with both text towers frozen: the judge of generated icons.

The text towers are final before the UNets see them; the image tower may go on. Batches hold the three styles of 48
nouns, half of the images went through the autoencoder (some with noise on the latents), as the judged ones will have.
Then the last layer alone learns to know bent and wobbly images; the layers below, which measure style, stay.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.base_models.augment import move, soften, tint, wobble
from experiments.base_models.captions import TEMPLATES, caption
from experiments.base_models.clip import MEAN, STD, CaptionedIcons, TwoTextClip, contrast, noun_contrast, save_clip
from experiments.base_models.data import STYLES
from experiments.base_models.loop import Budget, Training, generator, load_average
from experiments.base_models.vae import load_vae

LOG = logging.getLogger("base_models")
NOUNS_PER_BATCH = 48
LATENT_NOISE = (0.0, 0.0, 0.25, 0.5)  # of four reconstructions of each icon, in units of the latents' deviation


@torch.no_grad()
def reconstructions(pixels: Tensor, vae, draw: torch.Generator) -> Tensor:
    """uint8 [N,3,64,64] -> uint8 [4,N,3,64,64]: two plain passes through the autoencoder, two with noisy latents."""
    versions = []
    for noise in LATENT_NOISE:
        parts = []
        for chunk in pixels.split(64):
            latent = vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()
            latent = latent + noise * torch.randn(latent.shape, generator=draw)
            parts.append((vae.decode(latent).sample.clamp(-1, 1) + 1) * 127.5)
        versions.append(torch.cat(parts).round().to(torch.uint8))
    return torch.stack(versions)


@torch.no_grad()
def text_vectors(model: TwoTextClip, data: CaptionedIcons) -> tuple[Tensor, Tensor]:
    """Unit text vectors of each icon's styled captions: [N,T,96] and [N,T,128]."""
    first, second = [], []
    for template in TEMPLATES:
        ids, ids_2 = data.tokens([caption(template, icon.noun, icon.style) for icon in data.icons])
        pooled = model.clip.text_projection(model.clip.text_model(ids).pooler_output)
        first.append(functional.normalize(pooled, dim=-1))
        second.append(functional.normalize(model.text_2(ids_2).text_embeds, dim=-1))
    return torch.stack(first, 1), torch.stack(second, 1)


class JudgeTask:
    """Batches and losses of the image tower."""

    def __init__(self, work_dir: Path, model: TwoTextClip, seed: int, *, wobble_strength: float = 0.0) -> None:
        self.wobble_strength = wobble_strength
        self.data, self.seed = CaptionedIcons(work_dir, seed), seed
        self.texts = text_vectors(model.eval(), self.data)
        self.drawn = reconstructions(self.data.pixels, load_vae(work_dir), generator(seed, 0))
        nouns = sorted({icon.noun for icon in self.data.icons})
        place = {(icon.noun, icon.style): index for index, icon in enumerate(self.data.icons)}
        self.rows = torch.tensor([[place[noun, style] for style in STYLES] for noun in nouns])  # [nouns,3]

    def images(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Augmented images [B,3,64,64], half of them reconstructions."""
        version = torch.randint(len(self.drawn), (len(rows),), generator=draw)
        through = (torch.rand(len(rows), generator=draw) < 0.5)[:, None, None, None]
        pixels = torch.where(through, self.drawn[version, rows], self.data.pixels[rows]).float() / 255
        pixels = move(pixels, scale=(0.75, 1.15), shift=0.08, angle=0.12, draw=draw)
        if self.wobble_strength:
            pixels = wobble(pixels, self.wobble_strength, draw)
        return (soften(tint(pixels, 0.25, draw), draw) - MEAN) / STD

    def losses(self, model: TwoTextClip, step: int) -> dict[str, Tensor]:
        draw = generator(self.seed, step)
        rows = self.rows[torch.randperm(len(self.rows), generator=draw)[:NOUNS_PER_BATCH]].flatten()  # [B]
        weight = model.visual_projection_2.weight
        vision = model.clip.vision_model(self.images(rows, draw).to(weight.device, weight.dtype)).pooler_output
        vision, vision_2 = model.clip.visual_projection(vision), model.visual_projection_2(vision)
        vision, vision_2 = (functional.normalize(vector.float().cpu(), dim=-1) for vector in (vision, vision_2))
        wording = torch.randint(len(TEMPLATES), (len(rows),), generator=draw)
        text, text_2 = (vectors[rows, wording] for vectors in self.texts)
        alone, noun = torch.eye(len(rows)), torch.arange(len(rows)) // len(STYLES)
        same_noun = (noun[:, None] == noun[None]).float()
        scale, scale_2 = model.clip.logit_scale.float().cpu(), model.scale_2.float().cpu()
        return {
            "clip": contrast(vision, text, alone, scale),
            "clip_2": 0.3 * contrast(vision_2, text_2, alone, scale_2),
            "noun": noun_contrast(vision, same_noun, scale),
        }


def trained_parts(model: TwoTextClip, last_only: bool) -> list[nn.Module]:
    """The image tower and both projections, or of the tower the last layer and norm only."""
    vision = model.clip.vision_model
    tower = [vision.encoder.layers[-1], vision.post_layernorm] if last_only else [vision]
    return [*tower, model.clip.visual_projection, model.visual_projection_2]


def train_part(work_dir: Path, name: str, start: str, *, minutes: float, seed: int) -> None:
    """One of the two parts, `name`, from the averaged weights of the run `start`."""
    last_only = name == "judge_last"
    model = TwoTextClip(vocabulary=len(CaptionedIcons(work_dir, seed).tokenizers[0]), attention="eager")
    model.load_state_dict(load_average(work_dir, start))
    task = JudgeTask(work_dir, model, seed, wobble_strength=0.07 if last_only else 0.0)
    model.requires_grad_(False)
    for module in trained_parts(model, last_only):
        module.requires_grad_(True)
    training = Training(name, model, work_dir, budget=Budget(minutes), lr=1e-3, ema=0.995, half=True)
    training.run(lambda step: task.losses(training.worker, step))
    save_clip(training.average, work_dir)


def train_judge(work_dir: Path, *, minutes: float, seed: int) -> None:
    """60 % of the time for the whole image tower, 40 % for its last layer."""
    train_part(work_dir, "judge", "clip", minutes=0.6 * minutes, seed=seed)
    train_part(work_dir, "judge_last", "judge", minutes=0.4 * minutes, seed=seed)
