"""The trainers by short names, for a suite that is installed as a package.

    lora-train dreambooth-sdxl --flag VALUE ...
    accelerate launch -m trainkit.train dreambooth-sdxl --flag VALUE ...

Each trainer is a program of one file, which a clone has at its top and a wheel has as a module of its own. They are
started by name: nothing imports a trainer.
"""

from trainkit.commands import Command, Program
from trainkit.errors import exit_with_message

PROGRAM = Program("lora-train", "trainkit.train", (
    Command("dreambooth-sdxl", "train_dreambooth_lora_sdxl_advanced", "teach SDXL a concept from a few images"),
    Command("text-to-image", "train_text_to_image_lora", "teach SD 1.x, 2.x or SDXL from captioned images"),
))


def main() -> None:
    exit_with_message(PROGRAM.main)


if __name__ == "__main__":
    main()
