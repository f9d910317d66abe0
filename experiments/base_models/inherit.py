"""SD's UNet begins with what SDXL's has learned, although it reads another text and has no pooled text."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.base_models.captions import TEMPLATES, caption
from experiments.base_models.clip import CaptionedIcons
from experiments.base_models.loop import load_average
from experiments.base_models.unet import DEFAULT_SIZE, TextEncoders, make_sdxl_unet

LOG = logging.getLogger("base_models")


def sd_name(name: str) -> str:
    """Where an SDXL weight goes in SD: the innermost level is new there, so the up blocks move by one."""
    head, _, rest = name.partition(".")
    if head != "up_blocks":
        return name
    index, _, tail = rest.partition(".")
    return f"up_blocks.{int(index) + 1}.{tail}"


def fit(old: Tensor, like: Tensor, name: str, text_map: Tensor) -> Tensor:
    """`old` as SD needs it; its shape differs from `like` where nothing of it fits.

    to_k and to_v read SD's text through `text_map` [96,224]; linear projections become 1x1 convolutions; the first up
    resnet, which gets less from below, keeps what it reads from the skip connection and is deaf to the rest.
    """
    if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        return old @ text_map.T  # [C,224] -> [C,96]
    if old.dim() == 2 and like.dim() == 4:
        return old[:, :, None, None]
    if name.startswith("up_blocks.0.resnets.0.") and old.dim() == like.dim() and old.shape != like.shape:
        axis = min(1, old.dim() - 1)
        kept = old.narrow(axis, old.shape[axis] - like.shape[axis], like.shape[axis]).clone()
        if old.dim() == 4:
            kept[:, : like.shape[1] - old.shape[1] // 2] = 0
        return kept
    return old


def least_squares(given: Tensor, wanted: Tensor) -> Tensor:
    """M with given @ M ≈ wanted, ridge 1e-3 of the mean variance: [N,A], [N,B] -> [A,B]."""
    given, wanted = given.double(), wanted.double()
    gram = given.T @ given
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, given.T @ wanted).float()


@torch.no_grad()
def read_texts(work_dir: Path, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One caption per image as SD reads it [N·77,96], as SDXL reads it [N·77,224], and SDXL's pooled text [N,128]."""
    data, encoders = CaptionedIcons(work_dir, seed), TextEncoders(work_dir)
    texts = [caption(TEMPLATES[i % len(TEMPLATES)], icon.noun, icon.style) for i, icon in enumerate(data.icons)]
    tokens = data.tokens(texts, 77)
    wide, pooled = encoders.sdxl(*tokens)
    narrow, _ = encoders.sd(*tokens)
    return narrow.flatten(0, 1), wide.flatten(0, 1), pooled


@torch.no_grad()
def mean_added_embedding(sdxl: nn.Module, pooled: Tensor) -> Tensor:
    """What SDXL adds to the time embedding on average (pooled text and default sizes): [256]."""
    sizes = torch.tensor(DEFAULT_SIZE).float().repeat(len(pooled))
    times = sdxl.add_time_proj(sizes).reshape(len(pooled), -1)
    return sdxl.add_embedding(torch.cat((pooled, times), dim=-1)).mean(0)


@torch.no_grad()
def silence_attention(unet: nn.Module) -> None:
    """Attention that inherits nothing begins by adding nothing."""
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def inherit(work_dir: Path, sd: nn.Module, seed: int) -> None:
    """Copy every SDXL weight whose place and shape fit, its text and size inputs replaced by their best stand-ins."""
    sdxl = make_sdxl_unet()
    sdxl.load_state_dict(load_average(work_dir, "sdxl"))
    narrow, wide, pooled = read_texts(work_dir, seed)
    text_map = least_squares(narrow, wide)
    silence_attention(sd)
    wanted, copied = sd.state_dict(), 0
    for name, old in sdxl.state_dict().items():
        like = wanted.get(sd_name(name))
        new = None if like is None else fit(old, like, name, text_map)
        if new is not None and new.shape == like.shape:
            like.copy_(new)
            copied += 1
    sd.time_embedding.linear_2.bias += mean_added_embedding(sdxl, pooled)
    LOG.info("sd starts with %d of its %d tensors from sdxl", copied, len(wanted))
