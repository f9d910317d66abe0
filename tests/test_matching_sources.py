"""Distribution matching of several sources, of which some hold class images."""

from __future__ import annotations

import pytest

import train_text_to_image_lora
from tests.support.trainers import make_images
from trainkit.errors import UserError
from trainkit.families import sd
from trainkit.options import parse


@pytest.mark.trains
def test_a_class_among_class_images_alone_is_none(tiny_sd, tmp_path):
    """Class images share a caption, but the term is about the user's own."""
    images, of_class = make_images(tmp_path / "mine", n=3), make_images(tmp_path / "class", n=3, captions=False)
    config = tmp_path / "data.toml"
    config.write_text(f"[[sources]]\nfolder = '{images}'\n[[sources]]\nfolder = '{of_class}'\nis_class = true\n"
                      "prompt = 'an icon'\n", "utf-8")
    flags = [f"--pretrained_model_name_or_path={tiny_sd}", f"--dataset_config={config}", "--resolution=32",
             f"--output_dir={tmp_path / 'out'}", "--dist_match=0.1"]

    def options(kernel: str) -> train_text_to_image_lora.Options:
        argv = [*flags, f"--dist_match_kernel={kernel}"]
        return parse(train_text_to_image_lora.Options, argv, description="")

    train_text_to_image_lora.preflight(options("none"), sd)
    with pytest.raises(UserError, match="no two images are of one class"):
        train_text_to_image_lora.preflight(options("class"), sd)
