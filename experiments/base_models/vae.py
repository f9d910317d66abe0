"""The autoencoder: AutoencoderKL, f4, four latent channels, trained on icons of all base styles."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from experiments.base_models.augment import move, shade, tint
from experiments.base_models.data import load_icons
from experiments.base_models.loop import DEVICE, Budget, Training, generator

LOG = logging.getLogger("base_models")
BATCH = 16
KL_WEIGHT = 1e-5  # per latent element


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def pixel_pools(work_dir: Path) -> tuple[Tensor, Tensor]:
    """Icons of the nouns and the other training icons, uint8 [N,3,64,64]."""
    icons, pixels = load_icons(work_dir)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    nouns = [index for index, icon in enumerate(icons) if icon.noun]
    extra = [index for index, icon in enumerate(icons) if icon.split == "extra"]
    return planes[nouns], planes[extra]


def train_vae(work_dir: Path, *, minutes: float, seed: int) -> None:
    torch.manual_seed(seed)
    pools = pixel_pools(work_dir)
    training = Training("vae", make_vae(), work_dir, budget=Budget(minutes), lr=2e-3, ema=0.995)

    def losses_at(step: int) -> dict[str, Tensor]:
        draw = generator(seed, step)
        picks = [pool[torch.randint(len(pool), (BATCH // 2,), generator=draw)] for pool in pools]
        pixels = torch.cat(picks).float() / 255  # [B,3,64,64]
        pixels = move(pixels, scale=(0.8, 1.2), shift=0.06, angle=0.1, draw=draw)
        pixels = (tint(shade(pixels, draw) if step % 2 else pixels, 0.3, draw) * 2 - 1).to(DEVICE)
        posterior = training.module.encode(pixels).latent_dist
        drawn = training.module.decode(posterior.sample(generator=draw)).sample
        error = drawn - pixels
        return {
            "mse": error.square().mean(),
            "l1": 0.1 * error.abs().mean(),
            "kl": KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    training.run(losses_at)
    centre_latents(training.average.cpu(), pools[0])
    training.average.save_pretrained(work_dir / "models" / "vae")


@torch.no_grad()
def centre_latents(vae, pixels: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 over the training icons, and set scaling_factor from the result.

    The shift and scale go into the 1x1 convolution after the encoder, their inverse into the one before the decoder:
    z' = (z - m)/s, log var' = log var - 2 log s, W'z' + b' = W(s z' + m) + b. Reconstructions stay what they were.
    """
    means = torch.cat([vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in pixels.split(64)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))  # [4]
    channels = len(mean)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= deviation[None, :, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / deviation
    vae.quant_conv.weight[:channels] /= deviation[:, None, None, None]
    vae.quant_conv.bias[channels:] -= 2 * deviation.log()
    latents = vae.encode(pixels[:256].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    LOG.info("latents had means %s, deviations %s; std is now %.3f", mean.tolist(), deviation.tolist(), latents.std())


def load_vae(work_dir: Path):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(work_dir / "models" / "vae").eval().requires_grad_(False)


@torch.no_grad()
def heldout_psnr(vae, work_dir: Path) -> tuple[float, int]:
    """Mean PSNR in dB of RGB in [0,1] on white over icons the VAE never saw, and their number."""
    icons, pixels = load_icons(work_dir)
    chosen = [index for index, icon in enumerate(icons) if icon.split == "heldout"]
    images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2).float() / 255
    drawn = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    error = (drawn.clamp(-1, 1) / 2 + 0.5 - images).square().mean((1, 2, 3))  # [N]
    return (-10 * error.log10()).mean().item(), len(chosen)
