"""How far the style of one set of images is from another's: unbiased KID in one named layer of a CLIP vision tower.

Compare the same nouns on both sides, at least 100 images of each; a set against its own other half gives about 0,
and, the estimate being unbiased, may fall a little below.

`power_spectrum` tells how much of a set's images is fine detail, whatever the style.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.reading import parse_json, read_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPModel

STYLE_LAYER = "vision_model.encoder.layers.3.layer_norm1"  # chosen by measurement: assets/tiny-clip-icons/README.md
Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)
LUMA: Channels = (0.299, 0.587, 0.114)  # ITU-R BT.601


def features(
    images: "Sequence[Image]",
    model: "CLIPModel",
    layer: str,
    *,
    mean: Channels = HALF,
    std: Channels = HALF,
    batch: int = 64,
) -> Tensor:
    """Mean and deviation over tokens of what a named layer puts out, one row per image.

    These two statistics of each channel are what carries a drawing style (Huang and Belongie 2017, arXiv:1703.06868).
    Shapes: N images of any size -> float32 [N,2D]; a layer that puts out one vector per image is taken as it is.
    Errors: AttributeError for a layer the model does not have; ValueError for no images.
    """
    if not images:
        raise ValueError("features: no images given")
    pooled: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        tokens = (output[0] if isinstance(output, tuple) else output).float()
        rows = torch.cat((tokens.mean(1), tokens.std(1)), dim=1) if tokens.dim() == 3 else tokens
        pooled.append(rows.cpu())  # [B,T,D] -> [B,2D]

    side = model.config.vision_config.image_size
    hook = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.no_grad():
            for start in range(0, len(images), batch):
                pixels = to_pixels(images[start : start + batch], side, mean, std)
                model.get_image_features(pixels.to(model.device, model.dtype))
    finally:
        hook.remove()
    return torch.cat(pooled)


def to_pixels(images: "Sequence[Image]", side: int, mean: Channels = HALF, std: Channels = HALF) -> Tensor:
    """Images on white, resized to a square (bicubic) and normalised: [N,3,side,side]."""
    import numpy as np
    from PIL import Image

    planes = []
    for image in images:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        small = white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        planes.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    pixels = torch.stack(planes).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased kernel inception distance: squared MMD with the kernel k(a,b) = (a·b/d + 1)³.

    MMD² = Σ_{i≠j} k(x_i,x_j) / m(m-1) + Σ_{i≠j} k(y_i,y_j) / n(n-1) - 2 Σ_{i,j} k(x_i,y_j) / mn

    Shapes: x [M,D], y [N,D], M and N at least 2. Source: Binkowski et al. 2018, arXiv:1801.01401, section 4 and eq. 4
    of its appendix on the unbiased estimator (Gretton et al. 2012, lemma 6).
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"kid: needs [M,D] and [N,D] with M, N >= 2, got {list(x.shape)} and {list(y.shape)}")
    x, y = x.double(), y.double()
    within = sum(off_diagonal_mean(cubic_kernel(rows, rows)) for rows in (x, y))
    return float(within - 2 * cubic_kernel(x, y).mean())


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/d + 1)³: [M,D], [N,D] -> [M,N]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def off_diagonal_mean(square: Tensor) -> Tensor:
    """Mean over i ≠ j of a square matrix."""
    rows = len(square)
    return (square.sum() - square.diagonal().sum()) / (rows * (rows - 1))


def style_distance(
    images: "Sequence[Image]", reference: "Sequence[Image]", clip_dir: str | Path, layer: str = STYLE_LAYER
) -> float:
    """KID between two sets of images in the style layer of the CLIP in `clip_dir`."""
    model, mean, std = load_clip(clip_dir)
    x, y = (features(group, model, layer, mean=mean, std=std) for group in (images, reference))
    return kid(x, y)


def load_clip(clip_dir: str | Path) -> "tuple[CLIPModel, Channels, Channels]":
    """The CLIP in fp32, frozen, and the channel mean and deviation its image processor names."""
    from transformers import CLIPModel

    settings = parse_json(read_text(Path(clip_dir) / "preprocessor_config.json"))
    given: dict[str, Any] = settings if isinstance(settings, dict) else {}
    colours: list[Any] = [given.get(name) for name in ("image_mean", "image_std")]
    if not all(map(_is_colour, colours)):
        raise ValueError("preprocessor_config.json has no image_mean and image_std of three numbers each")
    model, found = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32, use_safetensors=True,
                                             output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"its weights lack {sorted(found['missing_keys'])[0]}")
    return model.eval().requires_grad_(False), tuple(colours[0]), tuple(colours[1])


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(x, (int, float)) for x in value)


def power_spectrum(images: "Sequence[Image]", side: int) -> Tensor:
    """Variance of the luminance by frequency: mean over images of Σ_ring |FFT₂(y)|² / side⁴, y in 0..1.

    Ring k = 1 … side/2 holds the frequencies whose distance from 0, rounded, is k cycles an image; the last is
    Nyquist's. Neither the mean (0) nor the corners beyond the last ring are in any. A wave of k cycles and amplitude a
    counts a²/2 in ring k; white noise of variance σ² counts σ² by the fraction of the frequencies that a ring holds.

    Shapes: N images of any size, on white and resized to side × side -> float64 [side/2], the first for k = 1.
    Errors: ValueError for no images, and for a side that is not even.
    """
    if not images or side < 2 or side % 2:
        raise ValueError(f"power_spectrum: needs images and an even side, got {len(images)} and {side}")
    pixels = to_pixels(images, side, mean=(0, 0, 0), std=(1, 1, 1)).double()  # [N,3,side,side]
    luminance = torch.einsum("nchw,c->nhw", pixels, torch.tensor(LUMA, dtype=torch.float64))
    power = torch.fft.fft2(luminance).abs().square().mean(0) / side**4
    cycles = torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)
    rings = torch.hypot(cycles[:, None], cycles[None, :]).round().long()
    return torch.bincount(rings.flatten(), weights=power.flatten())[1 : side // 2 + 1]
