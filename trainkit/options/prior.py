"""The concern of class images."""

from __future__ import annotations

from typing import ClassVar, Literal

from trainkit.options.base import Concern, always, opt


class PriorOptions(Concern):
    """Prior preservation: class images keep what the model knows of the class"""

    read_with: ClassVar[str] = "with_prior_preservation"

    with_prior_preservation: bool = opt(
        False,
        "Also train on images of the class, so that the model keeps its idea of the class. Each batch gets one class "
        "image for each of your images. This flag also needs --class_data_dir and --class_prompt.",
        resume="in the data", differs="steps and epochs count your images only")
    class_data_dir: str | None = opt(
        None,
        "The folder with the class images. The images may have captions. If the folder has too few images, the "
        "missing ones are generated into it.", path=True, resume="in the data", min_length=1,
        differs="files that are not images are ignored, captions are read, and generated images are PNG files of the "
        "size --resolution with one seed each")
    class_prompt: str | None = opt(
        None,
        "The prompt from which missing class images are generated. It is also the caption of class images without "
        "one. An example is 'a photo of a dog'.", resume="in the data")
    num_class_images: int = opt(
        100, "How many class images are trained on.", unit="images", resume="in the data", card=always("Class images"),
        ge=1)
    prior_loss_weight: float = opt(
        1.0, "The factor on the loss of a class image. The loss of your own images has the factor 1.", unit="factor",
        resume="in the data", read_with="with_prior_preservation or dataset_config", card=always("Prior loss weight"),
        ge=0)
    sample_batch_size: int = opt(
        4, "How many class images are generated at once.", unit="images", resume="in the data", ge=1)
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = opt(
        None,
        "The precision in which class images are generated. Without this flag, it is fp16 on a GPU and fp32 on a CPU.",
        resume="in the data", differs="the value no means fp32 on a GPU too")

    @property
    def images(self) -> int:
        """Class images to train on; 0 without --with_prior_preservation."""
        return self.num_class_images if self.with_prior_preservation else 0
