"""The concern of class images."""

from __future__ import annotations

from typing import ClassVar, Literal

from trainkit.options.base import Concern, always, opt


class PriorOptions(Concern):
    """Prior preservation: class images keep the model's idea of the class"""

    read_with: ClassVar[str] = "with_prior_preservation"

    with_prior_preservation: bool = opt(
        False, "train on images of the class beside the instance's, one to one in every batch",
        resume="in the data",
        differs="steps and epochs count instance images only")
    class_data_dir: str | None = opt(
        None, "folder of class images, with captions beside them if you like; missing ones are generated there",
        path=True, resume="in the data", min_length=1,
        differs="other files than images are ignored, captions are read; generated images are PNG of --resolution, "
        "each from its own seed")
    class_prompt: str | None = opt(
        None, "what missing class images are generated from, and the caption of those that have none, such as "
        "'a photo of a dog'", resume="in the data")
    num_class_images: int = opt(100, "class images to train on", unit="images", resume="in the data",
                                card=always("Class images"), ge=1)
    prior_loss_weight: float = opt(1.0, "weight of a class image's loss beside an instance's 1", unit="factor",
                                   resume="in the data", card=always("Prior loss weight"), ge=0)
    sample_batch_size: int = opt(
        4, "class images generated at once", unit="images", resume="in the data", ge=1)
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = opt(
        None, "precision of generating class images; without it fp16 on a GPU, else fp32",
        resume="in the data", differs="no is fp32 on a GPU too")

    @property
    def images(self) -> int:
        """Class images to train on; 0 without --with_prior_preservation."""
        return self.num_class_images if self.with_prior_preservation else 0
