"""The LoRA files of a run: in every checkpoint, beside it, and at the end. All are read back and compared.

    checkpoint-500/pytorch_lora_weights.safetensors   for Diffusers   checkpoint-500/dog_emb.safetensors   new tokens
    dog-step00000500.safetensors                      for WebUIs      dog-step00000500_emb.safetensors
    pytorch_lora_weights.safetensors, dog.safetensors, dog_emb.safetensors: the same at the end
    dog_lycoris.safetensors, dog_svd.safetensors   a DoRA for other programs, where it was asked for, at the end
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.export import file_bytes, verify, write_diffusers, write_kohya, write_low_rank
from trainkit.files import Json, tensor_bytes
from trainkit.lora_file import Layout
from trainkit.options.sizes import bucket_limit, sides_of, size_of
from trainkit.report import newest_preview
from trainkit.report.facts import RunFacts
from trainkit.runtime.weight_files import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    low_rank_file,
    lycoris_file,
    run_name,
    step_files,
    step_name,
    weight_names,
)

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.conditioning.live_text import Text
    from trainkit.families import Family
    from trainkit.options import RunOptions

log = logging.getLogger(__name__)


class LoraFiles:
    """Writes the files other programs load; the slot `exports` of `Checkpoints`, and what `publish` begins with.

    text        the text of the run, which may have learned embeddings, or have adapters itself
    num_images  images trained on, without repeats, for the files' headers
    averaged    context of the weights to write, where they are not those that train (Optim.averaged)
    Rank 0 writes. Every method raises UserError when a file does not hold the trained weights.
    """

    def __init__(
        self, options: RunOptions, family: Family, adapters: Adapters, text: Text | None = None, *,
        num_images: int | None = None, averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.folder, self.family, self.text = Path(options.output_dir), family, text
        self.num_images, self.averaged = num_images, averaged
        self.keep, self.with_kohya_name, self.options = options.keep_loras, options.output_kohya_format, options
        self.networks = [n for n in (adapters, *(text.networks if text else ())) if n.layers]

    def write(self, folder: Path, step: int) -> None:
        """The files of a checkpoint into its folder, and those for WebUIs beside it."""
        run = RunFacts(self.folder)
        name, metadata = step_name(run.name, step), header(run, num_images=self.num_images, step=step)
        with self.averaged():
            if self.text:
                self.text.export(folder, run.name)
                self.text.export(self.folder, name)
            self._lora(folder / DIFFUSERS_FILE, "diffusers", metadata, by_factors=True)
            named = metadata | {"ss_output_name": name}
            self._lora(self.folder / f"{name}.safetensors", "webui", named, by_factors=True)

    def final(self) -> list[Path]:
        """The files at the end of the run -> them, the one for Diffusers first.

        No LoRA where no network has adapters, as in pure textual inversion.
        """
        run = RunFacts(self.folder)
        metadata = header(run, num_images=self.num_images, step=run.step)
        ours, webui = (self.folder / name for name in weight_names(run.name))
        with self.averaged():
            embeddings = self.text.export(self.folder, run.name) if self.text else []
            written = self._lora(ours, "diffusers", metadata)
            metadata |= thumbnail(self.folder, run.step)
            written += self._lora(webui, "webui", metadata)
            if self.with_kohya_name:
                written += self._lora(self.folder / KOHYA_FILE, "webui", metadata)
            written += self._of_dora(run, metadata)
        for path, error in written:
            log.info("%s holds the trained weights (largest error %.1e of its largest entry)", path.name, error)
        return [*(path for path, _ in written), *embeddings]

    def _of_dora(self, run: RunFacts, metadata: Mapping[str, str]) -> list[tuple[Path, float]]:
        """A DoRA for the programs that compute it otherwise than ComfyUI, where they were asked for."""
        if not any(network.decomposed for network in self.networks):
            return []
        written = []
        if self.options.save_paper_dora:
            written += self._lora(self.folder / lycoris_file(run.name), "lycoris", metadata)
        if self.options.svd_rank:
            path = self.folder / low_rank_file(run.name)
            lost, error = write_low_rank(self.networks, self.family, path, metadata, rank=self.options.svd_rank,
                                         level=self.options.metadata)
            log.info("%s is the nearest LoRA of rank %d: it lacks %.1f %% of the DoRA's change of the weights",
                     path.name, self.options.svd_rank, 100 * lost)
            written.append((path, error))
        return written

    def bytes_in(self) -> int:
        """About what a checkpoint's own files take."""
        return file_bytes(self.networks, "diffusers") + self._embedding_bytes()

    def bytes_beside(self) -> int:
        """About what those beside it take."""
        return file_bytes(self.networks, "webui") + self._embedding_bytes()

    def beside(self) -> Mapping[Path, int]:
        """The files beside the checkpoints, with the step of each."""
        return step_files(self.folder, run_name(self.folder))

    def _lora(self, path: Path, layout: Layout, metadata: Mapping[str, str], *, by_factors: bool = False
              ) -> list[tuple[Path, float]]:
        """Write a LoRA and read it back -> it, with its largest error; none where no network has adapters.

        by_factors  the faster comparison, see `verify`
        """
        if not self.networks:
            return []
        if layout == "diffusers":
            write_diffusers(self.networks, path, metadata, level=self.options.metadata)
        else:
            write_kohya(self.networks, self.family, path, metadata, layout=layout, level=self.options.metadata)
        return [(path, verify(path, self.networks, self.family, layout=layout, by_factors=by_factors))]

    def _embedding_bytes(self) -> int:
        return tensor_bytes(self.text.embeddings) if self.text else 0


def max_bucket_reso(run: RunFacts) -> int | None:
    """The longest side of a bucket, in pixels; None where no bucket was limited."""
    if run.setting("min_bucket_reso") is None:  # it is read together with the other limit
        return None
    several = run.option("resolutions")
    sizes = [(side, side) for side in sides_of(several)] if several else [size_of(run.option("resolution"))]
    return bucket_limit(run.option("max_bucket_reso"), sizes, run.option("compat"))


def header(run: RunFacts, *, num_images: int | None, step: int) -> dict[str, str]:
    """What the files say about their run after `step` finished steps: strings only, no path.

    Source: kohya-ss/sd-scripts, library/train_util.py and train_network.py (ss_* keys); Stability-AI/ModelSpec 1.0.1.
    """
    height, width = size_of(run.option("resolution"))
    visits = (num_images or 0) * int(run.option("repeats") or 1) * len(sides_of(run.option("resolutions") or 0))
    values = {
        "ss_output_name": run.name, "ss_sd_model_name": run.base_model, "ss_resolution": f"({width}, {height})",
        "ss_enable_bucket": run.option("enable_bucket") or None, "ss_min_bucket_reso": run.setting("min_bucket_reso"),
        "ss_max_bucket_reso": max_bucket_reso(run),
        "ss_bucket_no_upscale": run.setting("bucket_no_upscale"),
        "ss_num_train_images": num_images, "ss_steps": step, "ss_max_train_steps": run.total_steps,
        "ss_num_epochs": math.ceil(step * int(run.record["global_batch"]) / visits) if visits else None,
        "ss_seed": run.record["seed"], "ss_learning_rate": run.option("learning_rate"),
        "ss_optimizer": run.optimizer, "ss_lr_scheduler": run.option("lr_scheduler"),
        "ss_lr_warmup_steps": run.setting("lr_warmup_steps"), "ss_min_snr_gamma": run.setting("snr_gamma"),
        "ss_loss_type": run.option("loss_type"), "ss_fourier_loss": packed(run.record.get("fourier_loss")),
        "ss_noise_offset": run.option("noise_offset"), "ss_clip_skip": run.option("clip_skip"),
        "ss_max_token_length": run.option("max_token_length"), "ss_shuffle_caption": run.option("shuffle_caption"),
        "ss_keep_tokens": run.option("keep_tokens"), "ss_caption_dropout_rate": run.option("caption_dropout_rate"),
        "ss_caption_tag_dropout_rate": run.option("caption_tag_dropout_rate"),
        "ss_batch_size_per_device": run.option("train_batch_size"),
        "ss_gradient_accumulation_steps": run.option("gradient_accumulation_steps"),
        "modelspec.title": run.name, "modelspec.date": run.record["started"],
        "modelspec.trigger_phrase": run.trigger, "modelspec.description": f"LoRA for {run.base_model}",
        "modelspec.tags": "lora, text-to-image",
    }
    return {key: str(value) for key, value in values.items() if value not in (None, "")}


def thumbnail(folder: Path, step: int) -> dict[str, str]:
    """ModelSpec's small image, about 256 pixels a side, from the last preview."""
    image = newest_preview(folder, last=step, px=256)
    return {"modelspec.thumbnail": image} if image else {}


def packed(value: Json) -> str | None:
    """Settings as one string."""
    return json.dumps(value) if value else None
