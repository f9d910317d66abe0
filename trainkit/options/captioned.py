"""What the text-to-image trainer takes otherwise than the DreamBooth one: captioned images, its own defaults."""

from __future__ import annotations

from trainkit.options.base import Concern, changed, opt
from trainkit.options.inputs import ImageOptions
from trainkit.options.optimizer import OptimizerOptions
from trainkit.options.prerequisites import needs
from trainkit.options.running import OWN_ATTENTION, PrecisionOptions, RunOptions, ValidationOptions
from trainkit.options.text_encoders import TextOptions

WITHOUT_OTHERS = needs(  # a reader of the datasets library is no data set, and reads the folder
    "no dataset_name and no dataset_config or dataset_name=parquet|arrow|imagefolder|webdataset",
    "no --dataset_name and no --dataset_config")


class TrainFolderOptions(Concern):
    """Where captioned images are. A concern's own fields come after its bases': this one puts its flags first."""

    train_data_dir: str | None = opt(
        None,
        "The folder with your images. Images in subfolders are also used. The captions are in metadata.jsonl, .csv "
        "or .parquet, or in .txt files next to the images. If there is a subfolder train, the subfolders test, val "
        "and dev are left out. If you also give --dataset_name, that data set is used and this folder is not read.",
        path=True, resume="in the data", read_with=WITHOUT_OTHERS, min_length=1,
        differs=".txt files are read, and test images are left out")
    max_train_samples: int | None = opt(
        None, "Train on this many of the images. --seed decides which ones. Without this flag, all images are used.",
        unit="images", resume="in the data", ge=1,
        differs="a number above the number of images means all images and is not an error", off=None)


class CaptionedDataOptions(ImageOptions, TrainFolderOptions):
    """Images and captions"""

    folder_flag = "train_data_dir"
    captioned = True

    caption_column: str = changed(
        ImageOptions, "caption_column", "text",
        help="The column that holds the captions. A cell is one caption or a list of captions. From a list, one "
        "caption is chosen at random each time the image is used. If there is no column text, the columns caption "
        "and prompt are found without this flag.", differs="some images may lack a caption, but not all of them")
    resolution: int | str = changed(
        ImageOptions, "resolution", 512, differs="the default is 512 for SDXL too, where the SDXL script has 1024")
    center_crop: bool = changed(
        ImageOptions, "center_crop", False, differs="")

    @property
    def wanted_column(self) -> str | None:
        return self.caption_column if "caption_column" in self.model_fields_set else None

    @property
    def max_images(self) -> int | None:
        return self.max_train_samples


class CaptionedTextOptions(TextOptions):
    """Text encoders"""

    text_encoder_lr: float | None = changed(  # type: ignore[assignment]  # here it may be left open
        TextOptions, "text_encoder_lr", None,
        help="The learning rate of the text encoders. Without this flag, it is --learning_rate.", differs="")
    clip_skip: int | None = changed(
        TextOptions, "clip_skip", None,
        help="How many of the last layers of the text encoder are left out. For SD 1.x and 2.x, they are counted "
        "from the last layer. For SDXL, they are counted from the last but one, because SDXL leaves out the last "
        "layer already.", differs="")

    def lrs(self, optimizer: OptimizerOptions, *, global_batch: int) -> tuple[float, float]:
        """Learning rates of the first and the second text encoder: the UNet's unless they are given."""
        unet = optimizer.base_lr(global_batch=global_batch)
        first = unet if self.text_encoder_lr is None else self.text_encoder_lr
        return first, first if self.text_encoder_2_lr is None else self.text_encoder_2_lr


class CaptionedOptimizerOptions(OptimizerOptions):
    """Optimizer and learning rate"""

    lr_warmup_steps: int = changed(
        OptimizerOptions, "lr_warmup_steps", 500,
        differs="the warm-up is not lengthened by --gradient_accumulation_steps, as it is in the SDXL script")
    adam_weight_decay: float = changed(OptimizerOptions, "adam_weight_decay", 1e-2)
    max_grad_norm: float | None = changed(
        OptimizerOptions, "max_grad_norm", 1.0,
        differs="this flag works for SD 1.x too, where the script clips no gradient")


class CaptionedPrecisionOptions(PrecisionOptions):
    """Precision and memory"""

    enable_npu_flash_attention: bool = opt(
        False, "This flag is accepted but has no effect. PyTorch's own memory-efficient attention is always used.",
        resume="may change", notice=OWN_ATTENTION,
        differs="the flag only gives a notice, because PyTorch chooses the fastest attention of the device itself")


class CaptionedValidationOptions(ValidationOptions):
    """Previews"""

    validation_epochs: int = changed(ValidationOptions, "validation_epochs", 1)


class CaptionedRunOptions(RunOptions):
    """The run"""

    output_dir: str = changed(
        RunOptions, "output_dir", "sd-model-finetuned-lora", differs="")
    train_batch_size: int = changed(RunOptions, "train_batch_size", 16)
    num_train_epochs: int = changed(RunOptions, "num_train_epochs", 100)
    debug_loss: bool = opt(
        False,
        "This flag is accepted but has no effect. The file metrics.jsonl has the loss of every step. No loss of a "
        "single image is logged.", resume="may change",
        notice="no loss is logged by image: at one random noise level it says little of the image; metrics.jsonl has "
        "the loss of every step",
        differs="the flag only gives a notice, because that script logs the mean loss of a batch under the name of "
        "each of its files")
