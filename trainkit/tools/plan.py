"""Show how much memory a training needs, and which flags make it fit your card. Needs no GPU, no images, no download.

    python scripts/plan.py sdxl 8gb
    python scripts/plan.py sd15 "RTX 3060" --train_batch_size=4 --validation_prompt="a lighthouse"

The first word is the base model: sd15, sd21, sdxl, a folder, one .safetensors file, or a name on the Hub. The second
one is the card: its memory, or its name; without it, only the memory of each phase is shown. All flags of the trainers
may follow. SDXL is planned for the DreamBooth trainer, and the others, or SDXL with --train_data_dir, for the
text-to-image trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import create_model

from trainkit.options import CONCERNS, TEXT_TO_IMAGE, ModelOptions, OptionSet, parse
from trainkit.options.cli import underscored
from trainkit.options.trainers import SCRIPTS, only_script_with
from trainkit.process import own_settings


@own_settings()
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0].startswith("-"):
        asked = bool(words) and words[0] in ("-h", "--help")
        usage = f"usage: {Path(sys.argv[0]).name} MODEL [CARD] --flag VALUE ..."
        sys.stdout.write(f"{usage}\n\n{__doc__}\nA trainer's --help lists the flags, such as --rank and --debug.\n")
        sys.exit(0 if asked else 2)
    from trainkit.plan import report

    model, card = words[0], "".join(words[1:2]) if not "".join(words[1:2]).startswith("-") else ""
    opt = options(model, words[2 if card else 1:])
    sys.exit(report.show(opt, card))


def options(model: str, flags: Sequence[str]) -> Any:
    """The options of the trainer for the model, whose other required flags need not be given."""
    from trainkit.plan.models import read_configs

    names = [word[2:].partition("=")[0].removeprefix("no_") for word in underscored(flags) if word.startswith("--")]
    asks = any(only_script_with(name) == SCRIPTS["text-to-image"] for name in names)
    captioned = asks or not read_configs(ModelOptions(pretrained_model_name_or_path=model)).is_sdxl
    concerns: dict[str, Any] = {name: (concern_class, ...)
                                for name, concern_class in (TEXT_TO_IMAGE if captioned else CONCERNS).items()}
    given = [] if captioned or "instance_prompt" in names else ["--instance_prompt=a photo of TOK"]
    return parse(create_model("Options", __base__=OptionSet, **concerns),
                 [f"--pretrained_model_name_or_path={model}", *given, *flags], description=__doc__ or "")
