"""How long a start on many images takes, from imports done to the first step, and the memory it takes.

    .venv/bin/python experiments/benchmark/start.py [IMAGES] [CAPTIONS] [FOLDER] [STARTS]

Makes IMAGES distinct images of 64 to 96 pixels with CAPTIONS distinct captions in FOLDER, where they are not there
already. Then the text-to-image trainer starts STARTS times in a process of its own, trains one step with latents and
captions on disk, and gives a line of JSON: seconds by the clock and of the CPU, and the peak of the resident memory.
The first start encodes everything, which takes minutes; what is remembered of files is kept in FOLDER, too.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

IMAGES, CAPTIONS, FOLDER, STARTS = 20_000, 300, "runs/benchmark_start", 3
SIDES = (64, 97)  # pixels
BLOCKS = 6  # random colours a side, enlarged to an image


def make_images(folder: Path, images: int, captions: int) -> None:
    import numpy as np
    from PIL import Image

    draft = folder.with_name(f"{folder.name}.part")  # under its name only when it is whole
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for i in range(images):
        width, height = map(int, rng.integers(*SIDES, 2))
        colours = Image.fromarray(rng.integers(0, 256, (BLOCKS, BLOCKS, 3), dtype=np.uint8))
        name = f"{i:06}.{'png' if i % 2 else 'jpg'}"
        colours.resize((width, height), Image.Resampling.BICUBIC).save(draft / name)
        lines.append(json.dumps({"file_name": name, "text": f"an icon of thing number {i % captions} in soft light"}))
    (draft / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    draft.rename(folder)


def measure(images: Path, folder: Path) -> None:
    """Start once and print what it took."""
    import diffusers
    import transformers

    import train_text_to_image_lora as trainer
    from trainkit import families, lora_files, preflight, preview, publish, run  # noqa: F401, imports are not timed
    from trainkit.training import step, trainables  # noqa: F401

    for name in ("StableDiffusionXLPipeline", "AutoencoderKL", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"):
        getattr(transformers, name)
    took: list[tuple[float, float, int]] = []
    forward = step.TrainStep.__call__

    def noting(self: step.TrainStep, *args: object, **more: object) -> object:
        if not took:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            took.append((time.perf_counter() - clock, time.process_time() - cpu, peak))
        return forward(self, *args, **more)  # type: ignore[arg-type]

    step.TrainStep.__call__ = noting  # type: ignore[method-assign, assignment]
    clock, cpu = time.perf_counter(), time.process_time()
    trainer.main([f"--train_data_dir={images}", f"--latent_cache_dir={folder / 'cache'}", "--cache_latents",
                  f"--output_dir={folder / 'run'}", "--pretrained_model_name_or_path=assets/tiny-sdxl-icons",
                  "--resolution=64", "--center_crop", "--train_batch_size=2", "--max_train_steps=1"])
    (seconds, cpu_seconds, peak), = took
    print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "peak_mib": peak // 1024}))


def main() -> None:
    given = sys.argv[1:]
    images, captions = (int(given[i]) if len(given) > i else default for i, default in enumerate((IMAGES, CAPTIONS)))
    folder = Path(given[2] if len(given) > 2 else FOLDER).absolute()
    data = folder / f"images-{images}-{captions}"
    if not data.exists():
        make_images(data, images, captions)
    one_thread = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(folder))
    for _ in range(int(given[3]) if len(given) > 3 else STARTS):
        start = subprocess.run([sys.executable, __file__, "--measure", str(data), str(folder)], cwd=ROOT,
                               env={**os.environ, **one_thread}, capture_output=True, encoding="utf-8")
        print(start.stdout if not start.returncode else start.stderr, end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
