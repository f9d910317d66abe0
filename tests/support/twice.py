"""A notebook that trains twice: the trainer's main() of the words before --then, and of those after it."""

from __future__ import annotations

import importlib
import sys

from tests.support.trainers import TRAINER

THEN = "--then"


def main() -> None:
    trainer, words = importlib.import_module(TRAINER), sys.argv[1:]
    cut = words.index(THEN)
    for argv in (words[:cut], words[cut + 1:]):
        sys.argv = [f"{TRAINER}.py", *argv]
        trainer.main()
