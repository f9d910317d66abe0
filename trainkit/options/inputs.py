"""The concerns that say what is trained on: model, images."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from trainkit.options.base import Concern, always, opt, required


class ModelOptions(Concern):
    """The base model"""

    pretrained_model_name_or_path: str = required(
        "base model: a folder in the Diffusers layout or a Hub name", path="or Hub name", resume="in the data",
        min_length=1)
    pretrained_vae_model_name_or_path: str | None = opt(
        None, "another VAE to train with, for instance one that is stable in fp16", path="or Hub name", card="VAE",
        resume="in the data", min_length=1)
    revision: str | None = opt(
        None, "branch, tag or commit of the base model on the Hub", unit="name", resume="in the data", min_length=1)
    variant: str | None = opt(
        None, "weight files to take, 'fp16' for *.fp16.safetensors", unit="name", resume="in the data", min_length=1)


class InstanceOptions(Concern):
    """What DreamBooth trains on. A concern's own fields come after its bases': this one puts its flags first."""

    instance_data_dir: str | None = opt(
        None, "folder of images; captions in .txt files beside them or in metadata.jsonl, .csv or .parquet are used. "
        "Exactly one of this and --dataset_name", path=True, resume="in the data", min_length=1,
        differs="other files than images are ignored, captions are read, the order is by name")
    instance_prompt: str = required(
        "caption of images that have none of their own, with the trigger word, such as 'a photo of TOK dog'",
        resume="in the data")

    @field_validator("instance_prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is blank, so an image without a caption would teach no word")
        return value


class ImageOptions(Concern):
    """What every trainer takes of its images; the class variables say what a trainer's own flags mean."""

    folder_flag: ClassVar[str]  # name of the flag that gives a folder of images
    prompt_flag: ClassVar[str | None] = None  # name of the flag that gives images without a caption one
    captioned: ClassVar[bool] = False  # subfolders are read too, and an image may have several captions

    dataset_name: str | None = opt(
        None, "Hub name of a dataset, or a local folder of the imagefolder kind; its train split is used",
        path="or Hub name", resume="in the data", min_length=1)
    dataset_config_name: str | None = opt(
        None, "subset of the dataset", unit="name", resume="in the data", read_with="dataset_name", min_length=1)
    cache_dir: str | None = opt(
        None, "where the datasets library keeps its cache", path=True, resume="may change", read_with="dataset_name",
        min_length=1)
    image_column: str = opt(
        "image", "column of the dataset with the images; in a folder's metadata, the names of the files are in "
        "file_name, or in this name and _file_name", unit="name", resume="in the data", min_length=1)
    caption_column: str | None = opt(
        None, "column with one caption an image; an image without caption gets --instance_prompt. The columns text, "
        "caption and prompt of a folder's metadata are found without it", unit="name", resume="in the data",
        min_length=1)
    repeats: int = opt(1, "times each image is visited an epoch, with fresh crops and flips", unit="times",
                      resume="in the data", ge=1)
    resolution: int = opt(
        1024, "side of the square the images are scaled and cropped to; SDXL wants 1024, SD 1.x 512", unit="pixels",
        card=always("Resolution, pixels"), ge=1)
    center_crop: bool = opt(
        False, "crop the middle; otherwise a random square",
        differs="random crops and flips are drawn anew at every visit, not once at the start")
    random_flip: bool = opt(False, "mirror each visit with probability 1/2", card="Random flips")
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"] = opt(
        "lanczos", "filter of the scaling; nearest_exact is nearest, Pillow has but one")
    cache_latents: bool = opt(
        False, "encode each image once before training and free the VAE",
        differs="latents are kept by image, so that captions and sizes stay with them")
    cached_crops: int = opt(
        4, "random crops cached an image with --cache_latents; 0 encodes at every visit", unit="crops",
        read_with="cache_latents", ge=0, off=0)
    latent_cache_dir: str | None = opt(
        None, "keep encoded captions, and latents with --cache_latents, on disk here, shared by runs; without it they "
        "are kept in memory", path=True, resume="may change", min_length=1)

    @field_validator("image_interpolation_mode", mode="before")
    @classmethod
    def _pillow_has_one_nearest(cls, value: object) -> object:
        return "nearest" if value == "nearest_exact" else value

    @property
    def folder(self) -> str | None:
        """The folder of images, as it was given."""
        return getattr(self, self.folder_flag)

    @property
    def prompt(self) -> str:
        """The caption of an image that has none of its own."""
        return getattr(self, self.prompt_flag) if self.prompt_flag else ""

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
