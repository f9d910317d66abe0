"""Two passes for large images: the first in the model's own size, then enlarged and denoised again from the middle.

A model repeats its subject in images that are much larger than those it was made for. WebUIs call this "Hires. fix".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.errors import Problem
from trainkit.inference import finite_images
from trainkit.options.prompt_lines import SIDE_STEP, PromptLine

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from trainkit.inference import Pipeline

MOST = 8.0  # times a side
STRENGTH = 0.5
UPSCALER = "Lanczos"  # Pillow's; WebUIs have one of this name
FLAGS = ("hires_strength", "hires_steps")


@dataclass(frozen=True)
class SecondPass:
    """How an image is enlarged and denoised again.

    scale     factor of the sides
    strength  how much of the schedule is gone through again: 0 keeps the enlarged image, 1 starts from noise
    steps     denoising steps that are made, as in WebUIs
    """

    scale: float
    strength: float
    steps: int

    @property
    def all_steps(self) -> int:
        """Steps of the whole schedule, of which the pipelines of Diffusers make the last ⌊all · strength⌋."""
        return next(n for n in range(self.steps, math.ceil(self.steps / self.strength) + 2)
                    if int(n * self.strength) >= self.steps)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Of the large image of one of that size, in pixels."""
        return scaled(width, self.scale), scaled(height, self.scale)

    def facts(self) -> dict[str, str | int | float]:
        """For the text of the PNG file, as WebUIs name it."""
        return {"Denoising strength": self.strength, "Hires upscale": self.scale, "Hires steps": self.steps,
                "Hires upscaler": UPSCALER}


def scaled(side: int, scale: float) -> int:
    return max(SIDE_STEP, round(side * scale / SIDE_STEP) * SIDE_STEP)


def add_second_pass(add: Callable[..., object]) -> None:
    """The flags."""
    add("--hires_scale", type=float, metavar="X", help="Enlarge each image by X (with a Lanczos filter) and denoise it "
        "again, as \"Hires. fix\" of WebUIs does. Then --width and --height are those of the first pass.")
    add("--hires_strength", type=float, metavar="X", help="How much the second pass may change, from 0 to 1: the "
        f"denoising strength. The default is {STRENGTH:g}.")
    add("--hires_steps", type=int, metavar="N", help="The denoising steps of the second pass. The default is --steps.")


def second_pass_of(args: argparse.Namespace, line: PromptLine, steps: int) -> SecondPass | None:
    """What the flags and the line of a prompt ask for. steps: of the first pass"""
    if not args.hires_scale:
        return None
    strength = next(given for given in (line.strength, args.hires_strength, STRENGTH) if given is not None)
    return SecondPass(args.hires_scale, strength, args.hires_steps or steps)


def second_pass_problems(args: argparse.Namespace) -> Iterator[Problem]:
    if args.hires_scale is None:
        yield from (Problem(f"--{flag} without --hires_scale", f"--{flag}", "there is no second pass",
                            f"add --hires_scale 2, or leave --{flag} out")
                    for flag in FLAGS if getattr(args, flag) is not None)
        if any(line.strength is not None for line in args.lines):
            yield Problem("--t in a line of prompts without --hires_scale", "--prompts_file", "it is the strength of "
                          "the second pass, and there is none", "add --hires_scale 2, or take --t out of the file")
        return
    if not 1 < args.hires_scale <= MOST:
        yield Problem(f"--hires_scale {args.hires_scale:g}", "--hires_scale", f"it is above 1, and {MOST:g} at most",
                      "--hires_scale 2")
    if args.hires_strength is not None and not 0 < args.hires_strength <= 1:
        yield Problem(f"--hires_strength {args.hires_strength:g}", "--hires_strength", "it is above 0, and 1 at most",
                      f"--hires_strength {STRENGTH:g}")
    if args.hires_steps is not None and args.hires_steps < 1:
        yield Problem(f"--hires_steps {args.hires_steps}", "--hires_steps", "it is a count", "--hires_steps 1 or more")


def enlarged(pipe: Pipeline, images: Sequence[Image], second: SecondPass, text: Mapping[str, Tensor],
             seeds: Sequence[int], **settings: object) -> list[Image]:
    """The second pass over some images, in the stock pipeline for images, on the first one's own parts.

    text      encoded, as the first pass took it
    seeds     of each image; the noise of the second pass is that of its seed, too
    settings  of both passes
    """
    import torch
    from diffusers import AutoPipelineForImage2Image
    from PIL.Image import Resampling

    again = AutoPipelineForImage2Image.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    large = [image.resize(second.size(*image.size), Resampling.LANCZOS) for image in images]
    return finite_images(again, **text, image=large, strength=second.strength, num_inference_steps=second.all_steps,
                         generator=[torch.Generator().manual_seed(seed) for seed in seeds], **settings)
