"""The concerns around training: precision, previews, and the run itself."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import SecretStr

from trainkit.options.base import Concern, always, opt

OWN_ATTENTION = "PyTorch's scaled_dot_product_attention is used, which is memory-efficient too"
MAX_SEED = 2**63 - 1  # a whole number of TOML, and one that torch.manual_seed takes


class PrecisionOptions(Concern):
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = opt(
        None, "precision of the frozen weights and the forward pass; without it accelerate's configuration. Adapters "
        "and optimizer stay in fp32", card=always("Mixed precision"), differs="adapters are fp32 under bf16 too")
    allow_tf32: bool = opt(False, "TF32 matrix products on NVIDIA GPUs since Ampere")
    gradient_checkpointing: bool = opt(
        False, "recompute activations in the backward pass: less memory, slower", resume="may change")
    enable_xformers_memory_efficient_attention: bool = opt(
        False, "accepted; PyTorch's own memory-efficient attention is always on", resume="may change",
        notice=OWN_ATTENTION, differs="a notice, since torch's scaled_dot_product_attention replaced xFormers")


class ValidationOptions(Concern):
    """Previews"""

    read_with: ClassVar[str] = "validation_prompt"

    validation_prompt: str | None = opt(
        None, "prompt of the preview images; without it there are none", resume="may change")
    num_validation_images: int = opt(4, "images a preview", unit="images", resume="may change", ge=1)
    validation_epochs: int = opt(50, "a preview every so many epochs", unit="epochs", resume="may change",
                                 read_with="no validation_steps", ge=1)
    validation_steps: int | None = opt(
        None, "a preview every so many optimizer steps, instead of --validation_epochs", unit="steps",
        resume="may change", ge=1)

    def every(self, steps_per_epoch: int) -> int:
        """Optimizer steps between previews."""
        return self.validation_steps or self.validation_epochs * steps_per_epoch


class RunOptions(Concern):
    """The run"""

    output_dir: str = opt(
        "lora-dreambooth-model", "folder of everything the run writes; its last part names the LoRA file", path=True,
        resume="may change", min_length=1, differs="absolute and nested paths work")
    seed: int = opt(
        0, "noise, crops, order and initial weights follow from it", unit="number", card=always("Seed"), ge=0,
        le=MAX_SEED, differs="0, not unset: a run that was not seeded can be repeated and resumed exactly too")
    train_batch_size: int = opt(4, "images in a micro-batch on one device", unit="images", resume="in the data",
                                card=always("Batch size"), ge=1)
    gradient_accumulation_steps: int = opt(1, "micro-batches in an optimizer step", unit="micro-batches",
                                           resume="in the data", card=always("Accumulation"), ge=1)
    num_train_epochs: int = opt(
        1, "visits to the whole data set", unit="epochs", resume="in the data", read_with="no max_train_steps", ge=1)
    max_train_steps: int | None = opt(
        None, "optimizer steps, instead of --num_train_epochs", unit="steps", resume="in the data", ge=1)
    stop_after_steps: int | None = opt(
        None, "save and stop after so many finished steps of a longer run; resuming goes on", unit="steps",
        resume="may change", ge=1)
    checkpointing_steps: int = opt(
        500, "a checkpoint every so many optimizer steps", unit="steps", resume="may change", ge=1)
    checkpoints_total_limit: int | None = opt(
        None, "this many of the newest checkpoints are kept; without it, all are. A checkpoint that the run ends with "
        "between two of --checkpointing_steps does not count", unit="checkpoints", resume="may change", ge=1,
        differs="old ones go only after the new one is safe. The last step is saved in any case, and not counted; "
        "with --compat diffusers only where --checkpointing_steps says so")
    keep_loras: bool = opt(
        True, "when a checkpoint is deleted, its LoRA for WebUIs stays: NAME-step00000500.safetensors in --output_dir",
        resume="may change")
    resume_from_checkpoint: str | None = opt(
        None, "'latest', a name such as checkpoint-500, or a path. It names a checkpoint folder, not a LoRA file",
        unit="path or name", path=True,
        resume="may change", min_length=1,
        differs="a path is taken as it is; the run goes on bit for bit")
    max_skipped_steps: int = opt(
        10, "optimizer steps in a row that may be skipped for a gradient that is not finite", unit="steps",
        resume="may change", ge=0)
    dataloader_num_workers: int = opt(0, "processes that prepare images; 0 does it in the main one",
                                      unit="processes", resume="may change", ge=0)
    logging_dir: str = opt(
        "logs", "folder of the trackers' logs under --output_dir", path=True, resume="may change", min_length=1)
    report_to: Literal["tensorboard", "wandb", "all", "none"] = opt(
        "tensorboard", "trackers; metrics.jsonl is written in any case", resume="may change",
        differs="wandb may be used with --hub_token: the token is left out of every record")
    output_kohya_format: bool = opt(
        False, "the LoRA for WebUIs is also written as pytorch_lora_weights_kohya.safetensors", resume="may change",
        differs="NAME.safetensors is written without it as well, with the names and numbers that WebUIs read")
    push_to_hub: bool = opt(False, "upload the finished files to the Hub", resume="may change")
    hub_model_id: str | None = opt(
        None, "repository on the Hub; without it the last part of --output_dir", unit="name",
        resume="may change", read_with="push_to_hub", min_length=1)
    hub_token: SecretStr | None = opt(
        None, "token for the upload; HF_TOKEN in the environment is the safer place", unit="token",
        resume="may change", read_with="push_to_hub", min_length=1)
    hub_private: bool = opt(True, "make the repository private", resume="may change", read_with="push_to_hub",
                            differs="private unless --no_hub_private")
    local_rank: int = opt(
        -1, "set by launchers; the environment's LOCAL_RANK counts", unit="rank", resume="may change", ge=-1)
    compat: Literal["diffusers"] | None = opt(
        None, "repeat the algebra of the Diffusers script where ours differs, to compare with its runs")
    preset: str | None = opt(
        None, "start from a named set of values: style, face", unit="name", resume="in the data", min_length=1)
    config: str | None = opt(
        None, "TOML, YAML or JSON file of flags, flat or in tables named as the groups here", unit="file", path=True,
        resume="in the data", min_length=1)
    print_config: bool = opt(
        False, "print every value and where it came from, in TOML, and stop", resume="may change")
    debug: bool = opt(False, "show a traceback with an error message", resume="may change")

    def global_batch(self, world: int) -> int:
        """Images in an optimizer step over all processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * world

    def ends(self, rows: int, world: int) -> tuple[int, int]:
        """Finished steps at which the run ends, and this session: earlier with --stop_after_steps."""
        total = self.total_steps(rows, world)
        return total, min(total, self.stop_after_steps or total)

    def total_steps(self, rows: int, world: int) -> int:
        """Optimizer steps of the run: --max_train_steps, or ceil(epochs · rows / global batch); rows with repeats."""
        assert rows > 0, "no rows"
        return self.max_train_steps or math.ceil(self.num_train_epochs * rows / self.global_batch(world))
