"""What the text-to-image trainer takes otherwise than the DreamBooth one: captioned images, its own defaults."""

from __future__ import annotations

from trainkit.options.base import Concern, changed, opt
from trainkit.options.inputs import ImageOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.running import OWN_ATTENTION, PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.text_encoders import TextOptions


class TrainFolderOptions(Concern):
    """Where captioned images are. A concern's own fields come after its bases': this one puts its flags first."""

    train_data_dir: str | None = opt(
        None, "folder of images and its subfolders, in the layout that the datasets library calls imagefolder: "
        "captions are in metadata.jsonl, .csv or .parquet files there, or in .txt files beside the images. Of train/ "
        "and test/ in it only train/ is read. One of this and --dataset_name", path=True, resume="in the data",
        read_with="no dataset_name", min_length=1,
        differs="not read with --dataset_name, as the help says there; .txt files are read too; test/ is left out")
    max_train_samples: int | None = opt(
        None, "train on so many of the images only, chosen by --seed; without it all", unit="images",
        resume="in the data", ge=1,
        differs="more than there are is all of them, not an error", off=None)


class CaptionedDataOptions(ImageOptions, TrainFolderOptions):
    """Images and captions"""

    folder_flag = "train_data_dir"
    captioned = True

    caption_column: str = changed(
        ImageOptions, "caption_column", "text",
        help="column with a caption an image, or a list of captions, one of which is drawn at every visit. The "
        "columns caption and prompt are found without it where there is no text",
        differs="an image may lack a caption, if not all do")
    resolution: int = changed(
        ImageOptions, "resolution", 512, differs="512 for SDXL too, whose own script has 1024")
    center_crop: bool = changed(ImageOptions, "center_crop", False, differs="")

    @property
    def wanted_column(self) -> str | None:
        return self.caption_column if "caption_column" in self.model_fields_set else None

    @property
    def max_images(self) -> int | None:
        return self.max_train_samples


class CaptionedTextOptions(TextOptions):
    """Text encoders"""

    text_encoder_lr: float | None = changed(  # type: ignore[assignment]  # here it may be left open
        TextOptions, "text_encoder_lr", None, help="learning rate of the text encoders; without it --learning_rate",
        differs="")
    clip_skip: int | None = changed(
        TextOptions, "clip_skip", None, differs="",
        help="layers to skip at the text encoder's end, which in SDXL is the last but one")

    def lrs(self, optimizer: OptimizerOptions, *, global_batch: int) -> tuple[float, float]:
        """Learning rates of the first and the second text encoder: the UNet's unless they are given."""
        unet = optimizer.base_lr(global_batch=global_batch)
        first = unet if self.text_encoder_lr is None else self.text_encoder_lr
        return first, first if self.text_encoder_2_lr is None else self.text_encoder_2_lr


class CaptionedOptimizerOptions(OptimizerOptions):
    """Optimizer and learning rate"""

    lr_warmup_steps: int = changed(
        OptimizerOptions, "lr_warmup_steps", 500,
        differs="not stretched by --gradient_accumulation_steps, as those of the SDXL script are")
    adam_weight_decay: float = changed(OptimizerOptions, "adam_weight_decay", 1e-2)
    max_grad_norm: float | None = changed(
        OptimizerOptions, "max_grad_norm", 1.0, differs="it is; the script for SD 1.x scales nothing down")


class CaptionedPrecisionOptions(PrecisionOptions):
    """Precision and memory"""

    enable_npu_flash_attention: bool = opt(
        False, "accepted; PyTorch's own memory-efficient attention is always on", resume="may change",
        notice=OWN_ATTENTION,
        differs="a notice, since torch's scaled_dot_product_attention chooses the device's own kernel")


class CaptionedValidationOptions(ValidationOptions):
    """Previews"""

    validation_epochs: int = changed(ValidationOptions, "validation_epochs", 1)


class CaptionedRunOptions(RunOptions):
    """The run"""

    output_dir: str = changed(RunOptions, "output_dir", "sd-model-finetuned-lora", differs="")
    train_batch_size: int = changed(RunOptions, "train_batch_size", 16)
    num_train_epochs: int = changed(RunOptions, "num_train_epochs", 100)
    debug_loss: bool = opt(
        False, "accepted; metrics.jsonl has the loss of every step, and no loss of a single image",
        resume="may change",
        notice="no loss is logged by image: at one random noise level it says little of the image; metrics.jsonl "
        "has the loss of every step",
        differs="a notice: there the mean over a micro-batch is logged under the name of every file in it")
