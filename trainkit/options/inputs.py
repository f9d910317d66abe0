"""The concerns that say what is trained on: model, images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from trainkit.options.base import Compat, Concern, always, opt, required
from trainkit.options.numbered import numbered_folders
from trainkit.options.prerequisites import needs
from trainkit.options.sizes import Size, bucket_limit, read_resolution, read_sides, sides_of, size_of

BUCKETED = "enable_bucket and no bucket_no_upscale"
MASK_FLAGS = ("conditioning_data_dir", "alpha_mask", "masked_loss")  # each switches masks on
MASKED = " or ".join(MASK_FLAGS)


class ModelOptions(Concern):
    """The base model"""

    pretrained_model_name_or_path: str = required(
        "The base model. It is a .safetensors file, a folder in the Diffusers layout, or a name on the Hub.",
        path="or Hub name", resume="in the data", min_length=1)
    pretrained_vae_model_name_or_path: str | None = opt(
        None,
        "A separate VAE that replaces the VAE of the base model. It is a .safetensors file, a folder, or a name on the "
        "Hub.",
        path="or Hub name", resume="in the data", card="VAE", min_length=1)
    revision: str | None = opt(
        None, "The branch, tag or commit of the base model on the Hub.", unit="name", resume="in the data",
        min_length=1)
    variant: str | None = opt(
        None, "The variant of the weight files. For example, fp16 loads the files named *.fp16.safetensors.",
        unit="name", resume="in the data", min_length=1)
    vae_batch_size: int = opt(
        1,
        "How many images the VAE encodes at once. With 1, the latent of an image does not depend on other images. "
        "Latents that were cached with another number are not used.", unit="images", resume="in the data", ge=1)
    base_precision: Literal["fp32", "fp16", "bf16", "fp8", "int8", "nf4"] | None = opt(
        None,
        "How the frozen weights of linear layers and convolutions are kept in memory. With int8 or fp8, the base model "
        "needs about half the memory that it needs with bf16, and with nf4 about a third. It computes in the precision "
        "of --mixed_precision, as before. Text encoders are kept in the same way if they train. Without this flag, the "
        "weights are kept in the precision of --mixed_precision.", resume="in the data", card="Base model kept in")


class InstanceOptions(Concern):
    """What DreamBooth trains on. A concern's own fields come after its bases': this one puts its flags first."""

    instance_data_dir: str | None = opt(
        None,
        "The folder with your images. A run with images in subfolders is refused, unless they are named as kohya's "
        "trainers want them, such as '10_sks dog'. The captions are in .txt files next to the images, or in "
        "metadata.jsonl, .csv or .parquet. Give either this flag or --dataset_name, not both.",
        path=True, resume="in the data", read_with="no dataset_config", min_length=1,
        differs="files that are not images are ignored, captions are read, and the order of the images is that of "
        "their names")
    instance_prompt: str | None = required(
        "The caption of every image that has no caption of its own. Include the trigger word, for example 'a photo "
        "of TOK dog'. It may be left out with --dataset_config, and with folders such as '10_sks dog', whose images "
        "are captioned 'sks dog'.", resume="in the data")

    @field_validator("instance_prompt")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it is blank, so an image without a caption would teach no word")
        return value

    @classmethod
    def shorthand(cls, value_of: Callable[[str], object]) -> tuple[str, Mapping[str, object]] | None:
        """Sources that bring their prompts along need none."""
        folder = value_of("instance_data_dir")
        if value_of("dataset_config") or folder and numbered_folders(Path(str(folder))):
            return "of the sources", {"instance_prompt": None}
        return None


# Flags of images that scripts/check_dataset.py takes, too
CHECKED_FLAGS = ("resolution", "resolutions", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
                 "bucket_reso_steps", "bucket_no_upscale", "center_crop", "caption_column", "repeats", "masked_loss",
                 "conditioning_data_dir", "alpha_mask")


class ImageOptions(Concern):
    """What every trainer takes of its images; the class variables say what a trainer's own flags mean."""

    folder_flag: ClassVar[str]  # name of the flag that gives a folder of images
    prompt_flag: ClassVar[str | None] = None  # name of the flag that gives images without a caption one
    captioned: ClassVar[bool] = False  # subfolders are read too, and an image may have several captions

    dataset_name: str | None = opt(
        None,
        "A data set. It is a name on the Hub, a local folder that the datasets library can load, a Parquet file, or a "
        "WebDataset: a .tar file or a folder of them. Only its train split is used.", path="or Hub name",
        resume="in the data", read_with="no dataset_config", min_length=1)
    dataset_config_name: str | None = opt(
        None, "The subset of the data set, if it has several.", unit="name", resume="in the data",
        read_with="dataset_name", min_length=1)
    dataset_revision: str | None = opt(
        None, "The branch, tag or commit of the data set on the Hub.", unit="name", resume="in the data",
        read_with="dataset_name", min_length=1)
    dataset_config: str | None = opt(
        None,
        "A .toml or .json file that names several sources of images, each with its own repeats, captions and sizes, as "
        "kohya's trainers read it. What it says goes before other flags.", path=True, resume="in the data",
        min_length=1)
    cache_dir: str | None = opt(
        None, "The folder in which the datasets library keeps its cache.", path=True, resume="may change",
        read_with="dataset_name", min_length=1)
    image_column: str = opt(
        "image",
        "The column of the data set that holds the images. In the metadata of a folder, the names of the image files "
        "are in the column file_name, or in NAME_file_name, where NAME is the value of this flag.", unit="name",
        resume="in the data", min_length=1)
    caption_column: str | None = opt(
        None,
        "The column that holds the captions, one for each image. An image without a caption gets --instance_prompt. "
        "In a folder, the columns text, caption and prompt are found without this flag. In a data set, captions are "
        "read only with this flag.", unit="name", resume="in the data", min_length=1)
    bad_images: Literal["error", "skip"] = opt(
        "error",
        "What happens if an image cannot be read. With error, the run does not start, and every such image is named. "
        "With skip, these images are left out, and they are named and counted at the start.", resume="in the data")
    repeats: int = opt(
        1, "How often each image is used in one epoch. Each use has its own random crop and flip. With "
        "--cache_latents, the crop is one of the --cached_crops of the image.", unit="times", resume="in the data",
        ge=1)
    resolution: int | str = opt(
        1024,
        "The side of the squares that are trained on, or width and height as 1024,768. An image is scaled until it "
        "covers this size, and the rest is cut off. With --enable_bucket, only the number of pixels counts. SDXL was "
        "made for 1024 pixels, SD 1.x for 512.", unit="pixels", card=always("Resolution, pixels"))
    resolutions: str | None = opt(
        None,
        "Several sides, for example 768,1024. Each image is trained on at each of them, so an epoch has that many "
        "times as many images. Previews keep --resolution.", unit="pixels", resume="in the data",
        card="Resolutions, pixels", min_length=1)
    enable_bucket: bool = opt(
        False,
        "Keep the shape of wide and tall images. Each image is cut to the bucket that is nearest to its shape. All "
        "buckets have about as many pixels as the square of --resolution.", resume="in the data",
        card="Aspect buckets")
    min_bucket_reso: int = opt(
        256, "The shortest side of a bucket.", unit="pixels", resume="in the data", read_with=BUCKETED, ge=1)
    max_bucket_reso: int | None = opt(
        None,
        "The longest side of a bucket. Without this flag, it is twice the longest side of --resolution, or of "
        "--resolutions. With --compat kohya, it is 1024, as in kohya's scripts: then wide and tall images have fewer "
        "pixels than square ones at --resolution 1024.", unit="pixels", resume="in the data", read_with=BUCKETED, ge=1)
    bucket_reso_steps: int = opt(
        64, "The sides of buckets are multiples of this number.", unit="pixels", resume="in the data",
        read_with="enable_bucket", ge=1)
    bucket_no_upscale: bool = opt(
        False,
        "Never enlarge an image. A small image has a bucket of its own size, rounded down to --bucket_reso_steps.",
        resume="in the data", read_with="enable_bucket")
    center_crop: bool = opt(
        False, "Cut the square out of the middle of the image. Without this flag, the place is random.",
        differs="a new random crop is chosen each time an image is used, not once at the start")
    random_flip: bool = opt(
        False, "Mirror an image with probability 1/2 each time it is used.", card="Random flips")
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"] = opt(
        "lanczos", "The filter that scales the images. The value nearest_exact means nearest.")
    cache_latents: bool = opt(
        False, "Encode every image once before training, and then free the memory of the VAE.",
        differs="each latent stays with the caption and the size of its image")
    cached_crops: int = opt(
        4,
        "How many random crops of each image are encoded with --cache_latents. With 0, the image is encoded each "
        "time it is used, with a new crop.", unit="crops", read_with="cache_latents", ge=0, off=0)
    latent_dtype: Literal["fp32", "bf16"] = opt(
        "fp32", "The number format of cached latents. The format bf16 needs half the space, and rounds them.",
        resume="in the data", read_with="cache_latents")
    latent_cache_dir: str | None = opt(
        None,
        "A folder on disk for the encoded captions and, with --cache_latents, for the latents. Several runs can use "
        "the same folder. Without this flag, they are kept in memory.", path=True, resume="may change", min_length=1)

    masked_loss: bool = opt(
        False,
        "Train only on a part of each image. A grey image says which part: white is trained on, black is not, and grey "
        "counts in part. It lies next to the image, with its name and -masklabel: for cat.jpg, it is "
        "cat-masklabel.png. An image without a mask is trained on as a whole.", resume="in the data",
        card="Masked loss")
    conditioning_data_dir: str | None = opt(
        None,
        "A folder with the masks. This flag switches --masked_loss on. A mask has the name of its image, with any "
        "ending. Of a mask with colours, the red channel is read, as kohya's trainers do.", path=True,
        resume="in the data", min_length=1)
    alpha_mask: bool = opt(
        False,
        "Use the transparency of each image as its mask: what is transparent is not trained on. This flag switches "
        "--masked_loss on.", resume="in the data", card="Transparency as mask")
    unmasked_weight: float = opt(
        0.0,
        "The least weight of a place in the loss, also where the mask is black. With 0.1, the rest of the image is "
        "learned a little, too.", unit="weight", resume="in the data", read_with=MASKED,
        card="Weight outside of the mask", ge=0, le=1)
    normalize_masked_area_loss: bool = opt(
        False,
        "Divide the loss of an image by the mean of its mask, so that an image with a small mask counts as much as "
        "one with a large mask. Without this flag, it counts by the area of its mask.", resume="in the data",
        read_with=MASKED, card="Loss normalized by the mask's area")
    fill_masked_area: bool = opt(
        False,
        "Before the VAE reads an image, fill the places where its mask is black with the mean colour of the rest. The "
        "VAE spreads colours of what is masked out over its surroundings, which are learned. The model then does not "
        "see what was there.", resume="in the data", read_with=MASKED, card="Masked area filled")

    @field_validator("image_interpolation_mode", mode="before")
    @classmethod
    def _pillow_has_one_nearest(cls, value: object) -> object:
        return "nearest" if value == "nearest_exact" else value

    @field_validator("resolution", mode="before")
    @classmethod
    def _one_side_or_two(cls, value: object) -> object:
        return read_resolution(value)

    @field_validator("resolutions", mode="before")
    @classmethod
    def _sides(cls, value: object) -> object:
        return value if value is None or value == "none" else read_sides(value)

    @property
    def sizes(self) -> list[Size]:
        """(h, w) that images are trained at: those of --resolutions, or that of --resolution."""
        if self.resolutions is None:
            return [size_of(self.resolution)]
        return [(side, side) for side in sides_of(self.resolutions)]

    def longest_side(self, compat: Compat | None = None) -> int:
        """Of a bucket, in pixels; compat is the trainer to choose like."""
        return bucket_limit(self.max_bucket_reso, self.sizes, compat)

    @property
    def masked(self) -> bool:
        """Whether masks weigh the loss."""
        return needs(MASKED).holds(dict(self))

    @property
    def folder(self) -> str | None:
        """The folder of images, as it was given."""
        return getattr(self, self.folder_flag)

    @property
    def prompt(self) -> str:
        """The caption of an image that has none of its own."""
        return getattr(self, self.prompt_flag) or "" if self.prompt_flag else ""

    @property
    def source(self) -> str:
        """What names the images: a file of several sources, a data set or a folder; "" where nothing does."""
        return self.dataset_config or self.dataset_name or self.folder or ""

    @property
    def wanted_column(self) -> str | None:
        """The column of captions, where one was asked for by name."""
        return self.caption_column

    @property
    def max_images(self) -> int | None:
        """Images to train on at most; None: all."""
        return None


class DataOptions(ImageOptions, InstanceOptions):
    """Images and captions"""

    folder_flag = "instance_data_dir"
    prompt_flag = "instance_prompt"
