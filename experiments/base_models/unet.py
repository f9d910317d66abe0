"""The two UNets: SDXL's block layout first, then SD 1.x's from its weights; frozen text encoders, cached text."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from experiments.base_models.captions import PLAIN_TEMPLATES, TEMPLATES, caption, caption_texts, unknown_style_texts
from experiments.base_models.clip import CaptionedIcons
from experiments.base_models.data import SIZE, STYLES, UNET_STYLES, load_icons
from experiments.base_models.loop import generator
from experiments.base_models.vae import load_vae

LOG = logging.getLogger("base_models")
BATCH = 24
LATENT = SIZE // 4
LEVEL_BINS = 20
EMPTY_FRACTION = 0.10
UNKNOWN_STYLES = 24  # captions with a meaningless style per noun
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DEFAULT_SIZE = (SIZE, SIZE, 0, 0, SIZE, SIZE)


def make_sdxl_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 96, 96),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 3),
        cross_attention_dim=224,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
        norm_num_groups=16,
    )


def make_sd_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 96, 96, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(2, 3, 3, 1),  # heads, as in SD 1.x
        cross_attention_dim=96,
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class Text:
    """Encoded captions; `pooled` is empty for SD."""

    states: Tensor  # fp16 [T,77,C]
    pooled: Tensor  # fp16 [T,P]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.states[index].float(), self.pooled[index].float()


class TextEncoders:
    """The frozen encoders, called as the stock pipelines call them."""

    def __init__(self, work_dir: Path) -> None:
        from transformers import CLIPModel, CLIPTextModelWithProjection

        models = work_dir / "models"
        self.first = CLIPModel.from_pretrained(models / "clip").eval().requires_grad_(False).text_model
        self.second = (
            CLIPTextModelWithProjection.from_pretrained(models / "text_encoder_2").eval().requires_grad_(False)
        )

    def sdxl(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate states of both encoders side by side [B,77,224] and the second's projected pool [B,128]."""
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids_2, output_hidden_states=True)
        return torch.cat((first, second.hidden_states[-2]), dim=-1), second.text_embeds

    def sd(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Final states of the first encoder [B,77,96]; nothing pooled."""
        return self.first(ids).last_hidden_state, torch.zeros(len(ids), 0)


@torch.no_grad()
def encode_texts(texts: list[str], data: CaptionedIcons, encode: Callable) -> Text:
    states, pooled = [], []
    for start in range(0, len(texts), 64):
        out = encode(*data.tokens(texts[start : start + 64], 77))
        states.append(out[0].half())
        pooled.append(out[1].half())
    return Text(torch.cat(states), torch.cat(pooled))


class Captions:
    """Every caption of every noun once: styled, plain, with a meaningless style, and the empty one last."""

    def __init__(self, data: CaptionedIcons) -> None:
        self.texts: list[str] = []
        self.styled: dict[tuple[str, str], range] = {}
        self.plain: dict[str, range] = {}
        self.unknown: dict[str, range] = {}
        for noun in sorted({icon.noun for icon in data.icons}):
            for style in (*STYLES, *UNET_STYLES):
                self.styled[noun, style] = self.add(caption_texts(noun, style))
            self.plain[noun] = self.add([caption(template, noun) for template in PLAIN_TEMPLATES])
            self.unknown[noun] = self.add(unknown_style_texts(noun, data.words, UNKNOWN_STYLES, str(data.seed)))
        self.empty = self.add([""])[0]
        assert len(self.styled[noun, STYLES[0]]) == len(TEMPLATES)

    def add(self, texts: list[str]) -> range:
        start = len(self.texts)
        self.texts += texts
        return range(start, len(self.texts))

    def pick(self, noun: str, style: str, draw: Generator) -> int:
        """Index of a caption: 10 % empty, 60 % styled, 5 % plain, 25 % with a meaningless style."""
        kind, place = torch.rand(2, generator=draw).tolist()
        if kind < EMPTY_FRACTION:
            return self.empty
        pool = self.styled[noun, style] if kind < 0.70 else self.plain[noun] if kind < 0.75 else self.unknown[noun]
        return pool[int(place * len(pool))]


@dataclass(frozen=True)
class Variants:
    """Latents of each training icon as it is, cropped after enlargement and from a small original, with size ids."""

    latents: Tensor  # [V,N,4,16,16]; variant 0 is the icon as it is
    sizes: Tensor  # [V,N,6] original height and width, crop top and left, target height and width


CROPS, SMALL = 3, 2


@torch.no_grad()
def encode_variants(pixels: Tensor, vae, draw: Generator) -> Variants:
    """`pixels` uint8 [N,3,64,64] -> scaled latent means of 1 + CROPS + SMALL variants."""
    pixels = pixels.float() / 127.5 - 1
    images = [(pixels, torch.tensor(DEFAULT_SIZE).expand(len(pixels), 6))]
    images += [crop_variant(pixels, draw) for _ in range(CROPS)]
    images += [small_variant(pixels, draw) for _ in range(SMALL)]
    latents = [
        torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in image.split(64)]) * vae.config.scaling_factor
        for image, _ in images
    ]
    return Variants(torch.stack(latents), torch.stack([sizes for _, sizes in images]))


def crop_variant(pixels: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    """Each image enlarged to 70-92 px and cropped back to 64 at a random place."""
    crops, sizes = [], []
    for image in pixels:
        side = int(torch.randint(70, 93, (), generator=draw))
        top, left = torch.randint(0, side - SIZE + 1, (2,), generator=draw).tolist()
        large = functional.interpolate(image[None], size=(side, side), mode="bicubic").clamp(-1, 1)[0]
        crops.append(large[:, top : top + SIZE, left : left + SIZE])
        sizes.append((SIZE, SIZE, top, left, SIZE, SIZE))
    return torch.stack(crops), torch.tensor(sizes)


def small_variant(pixels: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    """Each image as if its original had 24-48 px: blurred, and the size ids say so."""
    blurred, sizes = [], []
    for image in pixels:
        side = int(torch.randint(24, 49, (), generator=draw))
        small = functional.interpolate(image[None], size=(side, side), mode="area")
        blurred.append(functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear")[0])
        sizes.append((side, side, 0, 0, SIZE, SIZE))
    return torch.stack(blurred), torch.tensor(sizes)


def alphas_cumprod() -> Tensor:
    """ᾱ of the scaled-linear schedule, float [1000] (Ho et al. 2020, arXiv:2006.11239; betas of Stable Diffusion)."""
    root = torch.linspace(
        NOISE["beta_start"] ** 0.5, NOISE["beta_end"] ** 0.5, NOISE["num_train_timesteps"], dtype=torch.float64
    )
    return (1 - root.square()).cumprod(0).float()


class UNetTask:
    """Batches and loss of one UNet."""

    def __init__(self, work_dir: Path, family: str, seed: int) -> None:
        self.family, self.seed = family, seed
        data = CaptionedIcons(work_dir, seed)
        self.captions = Captions(data)
        encoders = TextEncoders(work_dir)
        self.text = encode_texts(self.captions.texts, data, encoders.sdxl if family == "sdxl" else encoders.sd)
        if family == "sdxl":  # as force_zeros_for_empty_prompt does at inference
            self.text.states[self.captions.empty], self.text.pooled[self.captions.empty] = 0, 0
        rows = [index for index, icon in enumerate(data.icons) if icon.split == "train"]
        more, more_pixels = load_icons(work_dir, "unet_icons")
        self.icons = [data.icons[index] for index in rows] + more
        pixels = torch.cat((data.pixels[rows], torch.from_numpy(more_pixels).permute(0, 3, 1, 2)))
        self.variants = encode_variants(pixels, load_vae(work_dir), generator(seed, 0))
        self.alphas = alphas_cumprod()
        self.level_errors = torch.full((LEVEL_BINS,), float("nan"))  # running mean of |ε - ε̂|² by noise level
        LOG.info(
            "%s: %d images, %d captions, latent std %.3f",
            family,
            len(self.icons),
            len(self.captions.texts),
            self.variants.latents[0].std(),
        )

    def sizes_and_latents(self, rows: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """65 % as they are, 15 % as they are but called large originals, 12 % crops, 8 % small originals."""
        kind = torch.rand(len(rows), generator=draw)
        crop = torch.randint(1, 1 + CROPS, (len(rows),), generator=draw)
        small = torch.randint(1 + CROPS, 1 + CROPS + SMALL, (len(rows),), generator=draw)
        variant = torch.where(kind < 0.80, 0, torch.where(kind < 0.92, crop, small))
        sizes = self.variants.sizes[variant, rows].clone()
        large = torch.randint(SIZE + 8, 4 * SIZE, (len(rows), 1), generator=draw)
        called_large = ((kind >= 0.65) & (kind < 0.80))[:, None]
        sizes[:, :2] = torch.where(called_large, large, sizes[:, :2])
        return sizes, self.variants.latents[variant, rows]

    def guess(
        self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, states: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """The predicted noise in fp32 on the CPU, whatever the UNet computes in."""
        noisy, states = (tensor.to(unet.device, unet.dtype) for tensor in (noisy, states))
        added = {key: value.to(unet.device, unet.dtype) for key, value in added.items()}
        given = added if self.family == "sdxl" else None
        return unet(noisy, timesteps.to(unet.device), states, added_cond_kwargs=given).sample.float().cpu()

    def losses(self, unet: nn.Module, step: int) -> dict[str, Tensor]:
        """Mean of |ε - ε̂|² over its running mean at that noise level, so that every level contributes alike.

        Min-SNR (Hang et al. 2023, arXiv:2303.09556) spends so little on the noisy levels that after 2,000 steps the
        layout hardly followed the caption. Karras et al. 2024 (arXiv:2312.02696, section 4) learn the same balance.
        """
        draw = generator(self.seed, step)
        rows = torch.randint(len(self.icons), (BATCH,), generator=draw)
        sizes, latents = self.sizes_and_latents(rows, draw)
        written = [self.captions.pick(self.icons[row].noun, self.icons[row].style, draw) for row in rows.tolist()]
        states, pooled = self.text.rows(torch.tensor(written))
        spread = torch.randperm(BATCH, generator=draw) + torch.rand(BATCH, generator=draw)  # every level in each batch
        timesteps = (spread / BATCH * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        alpha = self.alphas[timesteps][:, None, None, None]
        noise = torch.randn(latents.shape, generator=draw)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise  # [B,4,16,16]
        guess = self.guess(unet, noisy, timesteps, states, {"text_embeds": pooled, "time_ids": sizes.float()})
        error = (guess - noise).square().mean((1, 2, 3))  # [B]
        return {"balanced": (error / self.follow_errors(timesteps, error.detach())).mean()}

    def follow_errors(self, timesteps: Tensor, error: Tensor) -> Tensor:
        """Move each level's running error towards the batch's and return it for each sample: [B]."""
        bins = timesteps * LEVEL_BINS // len(self.alphas)
        for index in bins.unique():
            now = error[bins == index].mean()
            before = self.level_errors[index]
            self.level_errors[index] = now if before.isnan() else before + 0.01 * (now - before)
        return self.level_errors[bins]
