"""The concerns that say what is trained on: model, pictures, class pictures, text."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from trainkit.options.base import Concern, opt, required

PIVOTAL = "pivotal tuning"
TEXT_ENCODER = "training the text encoders"
PRIOR = "prior preservation"


class ModelOptions(Concern):
    """The base model"""

    pretrained_model_name_or_path: str = required(
        "base model: a folder in the Diffusers layout or a Hub name", unit="path or name", min_length=1)
    pretrained_vae_model_name_or_path: str | None = opt(
        None, "another VAE to train with, for instance one that is stable in fp16", unit="path or name", min_length=1)
    revision: str | None = opt(None, "branch, tag or commit of the base model on the Hub", unit="name", min_length=1)
    variant: str | None = opt(
        None, "weight files to take, 'fp16' for *.fp16.safetensors", unit="name", min_length=1)


class DataOptions(Concern):
    """Pictures and captions"""

    dataset_name: str | None = opt(
        None, "Hub name of a dataset, or a local folder of the imagefolder kind; its train split is used. Exactly one "
        "of this and --instance_data_dir", unit="path or name", min_length=1)
    dataset_config_name: str | None = opt(None, "subset of the dataset", unit="name", min_length=1)
    instance_data_dir: str | None = opt(
        None, "folder of pictures; captions in .txt files beside them or in metadata.jsonl or .csv are used",
        unit="path", min_length=1,
        differs="other files than pictures are ignored, captions are read, the order is by name")
    cache_dir: str | None = opt(None, "where the datasets library keeps its cache", unit="path", min_length=1)
    image_column: str = opt("image", "column of the dataset with the pictures", unit="name", min_length=1)
    caption_column: str | None = opt(
        None, "column with one caption a picture; a picture without caption gets --instance_prompt. The columns text, "
        "caption and prompt of a folder's metadata are found without it", unit="name",
        min_length=1)
    repeats: int = opt(1, "times each picture is visited an epoch, with fresh crops and flips", unit="times", ge=1)
    instance_prompt: str = required(
        "caption of pictures that have none of their own, with the trigger word, such as 'a photo of TOK dog'")
    resolution: int = opt(1024, "side of the square the pictures are scaled and cropped to", unit="pixels", ge=1)
    center_crop: bool = opt(
        False, "crop the middle; otherwise a random square",
        differs="random crops and flips are drawn anew at every visit, not once at the start")
    random_flip: bool = opt(False, "mirror each visit with probability 1/2")
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"] = opt(
        "lanczos", "filter of the scaling; nearest_exact is nearest, Pillow has but one")
    cache_latents: bool = opt(
        False, "encode each picture once before training and free the VAE",
        differs="latents are kept by picture, so that captions and sizes stay with them")
    cached_crops: int = opt(
        4, "random crops cached a picture with --cache_latents; 0 encodes at every visit", unit="crops", ge=0)
    latent_cache_dir: str | None = opt(
        None, "keep encoded captions, and latents with --cache_latents, on disk here, shared by runs; without it they "
        "are kept in memory", unit="path", min_length=1)

    @field_validator("instance_prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is blank, so a picture without a caption would teach no word")
        return value

    @field_validator("image_interpolation_mode", mode="before")
    @classmethod
    def _pillow_has_one_nearest(cls, value: object) -> object:
        return "nearest" if value == "nearest_exact" else value


class PriorOptions(Concern):
    """Prior preservation: class pictures keep the model's idea of the class"""

    with_prior_preservation: bool = opt(False, "train on pictures of the class beside the instance's", not_yet=PRIOR)
    class_data_dir: str | None = opt(
        None, "folder of class pictures; missing ones are generated", unit="path", min_length=1)
    class_prompt: str | None = opt(None, "caption of the class pictures, such as 'a photo of a dog'")
    num_class_images: int = opt(100, "class pictures wanted", unit="pictures", ge=1)
    prior_loss_weight: float = opt(1.0, "weight of a class picture's loss beside an instance's 1", unit="factor", ge=0)
    sample_batch_size: int = opt(4, "class pictures generated at once", unit="pictures", ge=1)
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = opt(
        None, "precision of generating class pictures; without it fp16 on a GPU, else fp32")


class TextOptions(Concern):
    """Text encoders"""

    train_text_encoder: bool = opt(False, "train LoRA on both text encoders too", not_yet=TEXT_ENCODER)
    train_text_encoder_frac: float = opt(
        1.0, "share of the steps in which the text encoders are trained", unit="0..1", ge=0, le=1,
        not_yet=TEXT_ENCODER, differs="a share of the steps, not of whole epochs")
    text_encoder_lr: float = opt(
        5e-6, "learning rate of text encoders and new embeddings", unit="rate", ge=0, not_yet=TEXT_ENCODER,
        differs="0 means 0, not --learning_rate")
    adam_weight_decay_text_encoder: float | None = opt(
        None, "weight decay of text encoders and new embeddings; without it --adam_weight_decay", unit="decay", ge=0,
        not_yet=TEXT_ENCODER, differs="0 means 0, not --adam_weight_decay")
    clip_skip: int | None = opt(
        None, "layers to skip below the text encoders' last but one", unit="layers", ge=0,
        differs="honoured with frozen text encoders too")


class PivotalOptions(Concern):
    """Pivotal tuning: new words for the concept"""

    train_text_encoder_ti: bool = opt(False, "learn the embeddings of new tokens in both text encoders",
                                      not_yet=PIVOTAL)
    train_text_encoder_ti_frac: float = opt(
        0.5, "share of the steps in which the new embeddings are trained", unit="0..1", ge=0, le=1, not_yet=PIVOTAL,
        differs="a share of the steps, not of whole epochs")
    token_abstraction: str = opt(
        "TOK", "words in prompts and captions that stand for new tokens, separated by commas", unit="words",
        min_length=1, not_yet=PIVOTAL)
    num_new_tokens_per_abstraction: int = opt(2, "new tokens a word", unit="tokens", ge=1, not_yet=PIVOTAL)
