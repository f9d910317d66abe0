"""The concern of class pictures."""

from __future__ import annotations

from typing import ClassVar, Literal

from trainkit.options.base import Concern, always, opt


class PriorOptions(Concern):
    """Prior preservation: class pictures keep the model's idea of the class"""

    read_with: ClassVar[str] = "with_prior_preservation"

    with_prior_preservation: bool = opt(
        False, "train on pictures of the class beside the instance's, one to one in every batch",
        resume="in the data",
        differs="steps and epochs count instance pictures only")
    class_data_dir: str | None = opt(
        None, "folder of class pictures, with captions beside them if you like; missing ones are generated there",
        path=True, resume="in the data", min_length=1,
        differs="other files than pictures are ignored, captions are read; generated pictures are PNG of --resolution, "
        "each from its own seed")
    class_prompt: str | None = opt(
        None, "what missing class pictures are generated from, and the caption of those that have none, such as "
        "'a photo of a dog'", resume="in the data")
    num_class_images: int = opt(100, "class pictures to train on", unit="pictures", resume="in the data",
                                card=always("Class pictures"), ge=1)
    prior_loss_weight: float = opt(1.0, "weight of a class picture's loss beside an instance's 1", unit="factor",
                                   resume="in the data", card=always("Prior loss weight"), ge=0)
    sample_batch_size: int = opt(
        4, "class pictures generated at once", unit="pictures", resume="in the data", ge=1)
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = opt(
        None, "precision of generating class pictures; without it fp16 on a GPU, else fp32",
        resume="in the data", differs="no is fp32 on a GPU too")
