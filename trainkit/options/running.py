"""The concerns around training: precision, previews, and the run itself."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import SecretStr

from trainkit.options.base import Compat, Concern, always, opt

OWN_ATTENTION = "PyTorch's scaled_dot_product_attention is used, which is memory-efficient too"
MAX_SEED = 2**63 - 1  # a whole number of TOML, and one that torch.manual_seed takes


class PrecisionOptions(Concern):
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = opt(
        None,
        "The precision of the frozen weights and of the forward pass. Without this flag, Accelerate's configuration "
        "decides. The adapters and the optimizer are always in fp32.", card=always("Mixed precision"),
        differs="the adapters are in fp32 under bf16 too")
    allow_tf32: bool = opt(
        False,
        "Allow matrix products and convolutions in TF32. This works on NVIDIA GPUs since Ampere (RTX 30 series).",
        differs="without the flag, convolutions are not in TF32 either")
    deterministic: bool = opt(
        False,
        "Use only operations that give the same bits in every run on the same GPU. This is slower; how much is not "
        "measured. If an operation has no such form, the run ends with PyTorch's message. On a CPU, runs have the same "
        "bits without this flag.", resume="may change")
    gradient_checkpointing: bool = opt(
        False,
        "Compute activations again in the backward pass instead of keeping them. This needs less memory and more "
        "time.", resume="may change")
    enable_xformers_memory_efficient_attention: bool = opt(
        False, "This flag is accepted but has no effect. PyTorch's own memory-efficient attention is always used.",
        resume="may change", notice=OWN_ATTENTION,
        differs="the flag only gives a notice, because PyTorch's own attention has replaced xFormers")


class ValidationOptions(Concern):
    """Previews"""

    read_with: ClassVar[str] = "validation_prompt"

    validation_prompt: str | None = opt(
        None, "The prompt of the preview images. Without this flag, there are no previews.", resume="may change")
    num_validation_images: int = opt(
        4, "How many images one preview has.", unit="images", resume="may change", ge=0, off=0)
    validation_epochs: int = opt(
        50, "A preview is generated every time this many epochs are over.", unit="epochs", resume="may change",
        read_with="no validation_steps", ge=0, off=0)
    validation_steps: int | None = opt(
        None,
        "A preview is generated every time this many optimizer steps are over. This flag replaces "
        "--validation_epochs.", unit="steps", resume="may change", ge=1, off=None)

    def every(self, steps_per_epoch: int) -> int:
        """Optimizer steps between previews."""
        return self.validation_steps or self.validation_epochs * steps_per_epoch


class RunOptions(Concern):
    """The run"""

    output_dir: str = opt(
        "lora-dreambooth-model",
        "The folder for everything that the run writes. Its last part is the name of the LoRA file.", path=True,
        resume="may change", min_length=1, differs="absolute and nested paths work")
    seed: int = opt(
        0, "The seed. The noise, the crops, the order of the images and the first weights depend on it.", unit="number",
        card=always("Seed"), ge=0, le=MAX_SEED,
        differs="the default is 0 and not unset, so every run can be repeated and resumed exactly")
    train_batch_size: int = opt(
        4, "The batch size, which is the number of images in one forward pass on one device.", unit="images",
        resume="in the data", card=always("Batch size"), ge=1)
    gradient_accumulation_steps: int = opt(
        1, "How many such batches make one optimizer step.", unit="batches", resume="in the data",
        card=always("Accumulation"), ge=1, off=1)
    num_train_epochs: int = opt(
        1,
        "How many times the run goes through all images. --max_train_steps is stronger if both come from the same "
        "source. On the command line, this flag is stronger than the steps of a config file or a preset.",
        unit="epochs", resume="in the data", read_with="no max_train_steps", ge=1)
    max_train_steps: int | None = opt(
        None, "The length of the run in optimizer steps. This flag replaces --num_train_epochs.", unit="steps",
        resume="in the data", ge=1)
    stop_after_steps: int | None = opt(
        None,
        "Save and stop when this many steps of a longer run are finished. --resume_from_checkpoint continues the run "
        "later.", unit="steps", resume="may change", ge=1, off=None)
    checkpointing_steps: int = opt(
        500, "A checkpoint is saved every time this many optimizer steps are over.", unit="steps", resume="may change",
        ge=0, off=0)
    checkpoints_total_limit: int | None = opt(
        None,
        "How many checkpoints are kept. When there are more, the oldest ones are deleted. Without this flag, all are "
        "kept. A checkpoint at the end of a run does not count when its step is no multiple of --checkpointing_steps.",
        unit="checkpoints", resume="may change", ge=1,
        differs="an old checkpoint is deleted only after the new one is complete, and the last step is always saved "
        "(with --compat diffusers only when it is a multiple of --checkpointing_steps)", off=None)
    keep_loras: bool = opt(
        True,
        "Every checkpoint leaves a LoRA for WebUIs in --output_dir, such as NAME-step00000500.safetensors. It is kept "
        "when its checkpoint is deleted.", resume="may change")
    resume_from_checkpoint: str | None = opt(
        None,
        "The checkpoint from which the run continues. It is the word latest, a name such as checkpoint-500, or a "
        "path. With latest and no checkpoint, the run starts at the beginning. A LoRA file is no checkpoint.",
        unit="path or name", path=True, resume="may change", min_length=1,
        differs="a path is used as it is, and on a CPU the result is exactly that of a run without a stop")
    max_skipped_steps: int = opt(
        10,
        "A step whose loss or gradient is not finite is skipped. The run ends with an error after more than this "
        "many such steps in a row. With 0, the first one ends it.", unit="steps", resume="may change", ge=0, off=0)
    dataloader_num_workers: int = opt(
        0, "The number of processes that prepare images. With 0, the main process prepares them.", unit="processes",
        resume="may change", ge=0, off=0)
    logging_dir: str = opt(
        "logs", "The folder for the logs of TensorBoard and other trackers. It is inside --output_dir.", path=True,
        resume="may change", min_length=1)
    report_to: Literal["tensorboard", "wandb", "all", "none"] = opt(
        "tensorboard", "The trackers that get the numbers of the run. The file metrics.jsonl is always written.",
        resume="may change",
        differs="wandb can be used with --hub_token, because the token is left out of every record")
    output_kohya_format: bool = opt(
        False, "The LoRA for WebUIs is also written as pytorch_lora_weights_kohya.safetensors.", resume="may change",
        differs="the same LoRA is always written as NAME.safetensors, too")
    save_paper_dora: bool = opt(
        False,
        "Also write NAME_lycoris.safetensors, a DoRA with the magnitudes of the paper, for LyCORIS. Those in "
        "NAME.safetensors suit ComfyUI and Forge.", resume="may change", read_with="use_dora")
    svd_rank: int | None = opt(
        None,
        "Also write NAME_svd.safetensors, the plain LoRA of this rank that is nearest to the trained DoRA. A1111 and "
        "InvokeAI need it. The log says how much is lost.", unit="rank", resume="may change", read_with="use_dora",
        ge=1, le=4096, off=None)
    metadata: Literal["full", "minimal", "none"] = opt(
        "full",
        "What the headers of the LoRA files say. full: the settings of the run, the trigger words and a small preview. "
        "minimal: the title, the base model's family and the hashes. none: only what programs need to load the file.",
        resume="may change")
    push_to_hub: bool = opt(
        False, "Upload the finished files to the Hub.", resume="may change")
    hub_model_id: str | None = opt(
        None, "The name of the repository on the Hub. Without this flag, it is the last part of --output_dir.",
        unit="name", resume="may change", read_with="push_to_hub", min_length=1)
    hub_token: SecretStr | None = opt(
        None, "The token for the upload. The environment variable HF_TOKEN is a safer place for it.", unit="token",
        resume="may change", read_with="push_to_hub", min_length=1)
    hub_private: bool = opt(
        True, "Make the repository on the Hub private.", resume="may change", read_with="push_to_hub",
        differs="it is private unless you give --no_hub_private")
    local_rank: int = opt(
        -1, "Launchers set this flag. Only the environment variable LOCAL_RANK counts.", unit="rank",
        resume="may change", ge=-1)
    compat: Compat | None = opt(
        None,
        "Do as another trainer where this suite does differently. diffusers: compute as the script of that name, to "
        "compare runs with it (docs/differences.md). kohya: choose the bucket of an image as kohya's trainers do "
        "(docs/from-kohya.md), and nothing else.")
    preset: str | None = opt(
        None,
        "A name for several values at once: style and face are recipes, sdxl-8gb, for example, is what fits a card, "
        "and illustrious, noobai-vpred and pony are what a base model needs. Separate several names with commas. The "
        "later one wins. --preset list shows them all.", unit="names",
        resume="in the data", min_length=1)
    config: str | None = opt(
        None,
        "A file with flags, in TOML, YAML or JSON. The flags are at the top level or in tables that are named after "
        "the groups.", unit="file", path=True, resume="in the data", min_length=1)
    plan: str | None = opt(
        None,
        "Show how much memory the run needs in each phase, and stop. This needs no GPU, no images and no weights. With "
        "a card, such as --plan=8gb or --plan=3060, it also shows which flags make the run fit. The exit code is 4 if "
        "nothing makes it fit.", unit="card", resume="may change", bare="")
    print_config: bool = opt(
        False, "Print every value and where it came from, in TOML, and stop.", resume="may change")
    debug: bool = opt(
        False, "Show a traceback with every error message.", resume="may change")

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
