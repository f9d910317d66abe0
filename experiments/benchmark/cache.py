"""How much slower it is to cache latents than to encode images that are there already, one by one.

    .venv/bin/python experiments/benchmark/cache.py [IMAGES] [WORKERS] [SIDE]

Makes IMAGES photographs of 12 million pixels out of noise. A VAE of Stable Diffusion's size, with random weights,
encodes them at SIDE pixels three times: as tensors that are in memory (the bare loop), through the cache with WORKERS
processes that read and scale the images, and through the cache with none. Gives a line of JSON for each: seconds by the
clock and of the process that encodes, and the speed compared with the bare loop of the same round (1 is as fast). The
three take turns, ROUNDS times; each figure is the median.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

IMAGES, WORKERS, SIDE, ROUNDS = 12, 2, 512, 5
PIXELS = 4000, 3000
BLOCKS = (128, 256, 512, 512)  # channels


def make_images(folder: Path, images: int) -> None:
    import numpy as np
    from PIL import Image

    for i in range(images):
        colours = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(PIXELS, Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=92)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def encoder() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A VAE of Stable Diffusion's size, with random weights."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=BLOCKS, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2).eval()

    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    return encode


def ways(folder: Path, workers: int, side: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from trainkit.data.cache import DiskStore, cache_latents
    from trainkit.data.geometry import CropPolicy
    from trainkit.data.images import load_image
    from trainkit.data.rows import read_rows
    from trainkit.options import DataOptions

    rows, _ = read_rows(DataOptions(instance_data_dir=str(folder), instance_prompt="a photo", resolution=side))
    policy, encode = CropPolicy(resolution=side, center_crop=True), encoder()
    tensors = [policy.views(load_image(row), [policy.sample(row, seed=0, epoch=0)]) for row in rows]

    def cached(num_workers: int) -> None:
        store = DiskStore(tempfile.mkdtemp(dir=folder.parent))
        cache_latents(rows, policy, encode, store, seed=0, identity="random", num_workers=num_workers)

    encode(tensors[0])  # a warm-up
    return {"bare loop": lambda: [encode(pixels) for pixels in tensors],
            f"cache, {workers} workers": lambda: cached(workers), "cache, no workers": lambda: cached(0)}


def main() -> None:
    given = [int(word) for word in sys.argv[1:]]
    defaults = enumerate((IMAGES, WORKERS, SIDE))
    images, workers, side = (given[i] if len(given) > i else default for i, default in defaults)
    folder = Path(tempfile.mkdtemp()) / "images"
    folder.mkdir()
    make_images(folder, images)
    timed_ways = ways(folder, workers, side)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in timed_ways}
    for _ in range(ROUNDS):
        for name, work in timed_ways.items():
            found[name].append(timed(work))
    for name, times in found.items():
        rounds = list(zip(found["bare loop"], times, strict=True))
        figures = {}
        for k, clock in enumerate(("seconds", "cpu_seconds")):
            figures[clock] = round(statistics.median(taken[k] for taken in times), 2)
            figures[f"speed_by_{clock}"] = round(statistics.median(bare[k] / taken[k] for bare, taken in rounds), 3)
        print(json.dumps({"what": name, **figures}), flush=True)
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
