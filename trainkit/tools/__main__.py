"""`lora-tools NAME ...`, and `python -m trainkit.tools NAME ...` without an installation: the tools by name."""

from trainkit.commands import Command, Program
from trainkit.errors import exit_with_message

PROGRAM = Program("lora-tools", "trainkit.tools", (
    Command("generate", "trainkit.tools.generate", "generate images with a base model and LoRAs"),
    Command("evaluate", "trainkit.tools.evaluate", "measure how far a LoRA moves the base model towards its style"),
    Command("check-dataset", "trainkit.tools.check_dataset", "find what is wrong with training images and captions"),
    Command("caption-images", "trainkit.tools.caption_images", "write captions of training images with a model"),
    Command("plan", "trainkit.tools.plan", "show how much memory a training needs, and what makes it fit a card"),
    Command("cache", "trainkit.tools.cache", "show, check and clean up folders of cached latents and captions"),
    Command("convert-lora", "trainkit.tools.convert_lora", "write a LoRA in the layout of another program"),
    Command("inspect-lora", "trainkit.tools.inspect_lora", "say what a LoRA file is, and what loads it"),
    Command("merge-loras", "trainkit.tools.merge_loras", "merge LoRAs into one, or into a base model"),
    Command("resize-lora", "trainkit.tools.resize_lora", "make a LoRA smaller, and say what is lost"),
    Command("extract-lora", "trainkit.tools.extract_lora", "write the difference of two models as a LoRA"),
    Command("extract-clip-features", "trainkit.tools.extract_clip_features", "write the CLIP features of images"),
))


def main() -> None:
    exit_with_message(PROGRAM.main)


if __name__ == "__main__":
    main()
