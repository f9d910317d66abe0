#!/usr/bin/env python3
"""List the classes and functions of ours on the road from a row of the data set to the scalar loss.

    .venv/bin/python experiments/road.py            # counts
    .venv/bin/python experiments/road.py --list     # and names

Runs two steps of a plain SDXL DreamBooth training on the shipped model (LoRA, AdamW, cached latents, frozen text
encoders) and watches the second one with sys.setprofile: from the moment the data loader asks for the first row until
the loss is handed to `Run.backward`. A function counts when it is called there. A class counts when one of its objects
is the receiver, an argument or the answer of such a call. Comprehensions do not count, and neither does what the
optimizer does at the start of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRAINER = "train_dreambooth_lora_sdxl_advanced.py"
STEP = 2  # which optimizer step is watched; the first one also builds what is kept
COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>", "<module>")
ARGS = [
    "--pretrained_model_name_or_path=assets/tiny-sdxl-icons", "--instance_data_dir=assets/icons-3d",
    "--instance_prompt=icon", "--resolution=64", "--rank=4", "--train_batch_size=2", f"--max_train_steps={STEP}",
    "--learning_rate=1e-4", "--center_crop", "--report_to=none",
]


class Road:
    """Functions and classes between the first row of the watched step and its loss; use as sys.setprofile's callback.

    starts  (file name, function name) of the call with which the road begins, once a row
    ends    the same of the call with which it ends
    aside   calls on the way that do not belong to it, with all that they call
    """

    starts = ("data/loader.py", "__getitem__")
    ends = ("trainkit/run.py", "backward")
    aside = ("optim/optimizers.py", "begin")

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.classes: set[str] = set()
        self.steps, self.watching = 0, False
        self.outside: FrameType | None = None  # the call aside that is running

    def __call__(self, frame: FrameType, event: str, value: object) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not self._is_ours(file):
            return
        if event == "call":
            self._note_the_ends(frame)
        if not self.watching:
            return
        if event == "return" and frame is self.outside:
            self.outside = None
        elif event == "call" and self.outside is None and self._is(frame, self.aside):
            self.outside = frame
        elif self.outside is None and frame.f_code.co_name not in COMPREHENSIONS:
            self._note(frame, event, value)

    def _note_the_ends(self, frame: FrameType) -> None:
        if self._is(frame, self.ends):
            self.steps, self.watching = self.steps + 1, False
        elif self._is(frame, self.starts) and self.steps == STEP - 1 and not self.functions:
            self.watching = True

    def _note(self, frame: FrameType, event: str, value: object) -> None:
        code = frame.f_code
        if event == "call":
            place = Path(code.co_filename).relative_to(ROOT).with_suffix("")
            self.functions.add(f"{'.'.join(place.parts)}.{code.co_qualname}")
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            passed = [frame.f_locals.get(name) for name in arguments]
        else:
            passed = [value]
        for one in passed:
            self._note_class(one)

    def _note_class(self, value: object, *, depth: int = 1) -> None:
        kind = value if isinstance(value, type) else type(value)
        if kind.__module__.partition(".")[0] in ("trainkit", "__main__", Path(TRAINER).stem):
            self.classes.add(f"{kind.__module__}.{kind.__qualname__}")
        if depth and isinstance(value, (list, tuple)):
            for item in value[:4]:
                self._note_class(item, depth=depth - 1)

    @staticmethod
    def _is(frame: FrameType, where: tuple[str, str]) -> bool:
        file, name = where
        return frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)

    @staticmethod
    def _is_ours(file: str) -> bool:
        return file.startswith((f"{ROOT}/trainkit", f"{ROOT}/train_"))


def walk() -> Road:
    """Train two steps in a temporary folder and watch the second one."""
    import importlib

    trainer = importlib.import_module(Path(TRAINER).stem)
    road = Road()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
        sys.setprofile(road)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                trainer.main([*ARGS, f"--output_dir={folder}/road"])
        finally:
            sys.setprofile(None)
    return road


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name them, too")
    args = parser.parse_args()
    road = walk()
    for title, names in (("classes", road.classes), ("functions", road.functions)):
        print(f"{len(names)} {title}")
        if args.list:
            print("".join(f"    {name}\n" for name in sorted(names)), end="")


if __name__ == "__main__":
    main()
