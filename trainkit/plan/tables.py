"""docs/memory.md: the table that users look for, made by the engine. `python -m trainkit.plan > docs/memory.md`"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import create_model

from trainkit.options import CONCERNS, PRESETS, TEXT_TO_IMAGE, OptionSet, parse
from trainkit.options.base import Concern
from trainkit.options.sources import PRESET_USES
from trainkit.plan.models import read_configs
from trainkit.plan.need import GIB, OTHERS, Need
from trainkit.plan.page import typed
from trainkit.plan.phases import Trace, trace

BATCHES = (1, 2, 4)
CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)  # GB
HALF, CHECKPOINTING = "--mixed_precision=bf16", "--gradient_checkpointing"
MODELS = {"sd15": ("SD 1.5", (512,)), "sdxl": ("SDXL", (512, 768, 1024))}
BASE = ("--pretrained_model_name_or_path=sdxl", "--rank=16", "--train_batch_size=1", "--cache_latents", HALF)
CLASS_IMAGES = ["--with_prior_preservation", "--class_data_dir=people", "--class_prompt=a photo of a person"]
ADDITIONS = {  # what is added to SDXL at 1024 px, batch 1, bf16, gradient checkpointing, rank 16, AdamW
    "`--rank=32`": ["--rank=32"], "`--rank=64`": ["--rank=64"], "`--rank=128`": ["--rank=128"],
    "`--lora_layers=all-linear`": ["--lora_layers=all-linear"], "`--use_dora`": ["--use_dora"],
    "`--optimizer=prodigy`": ["--optimizer=prodigy", "--learning_rate=1"],
    "`--use_ema`": ["--use_ema"],
    **{f"`--base_precision={name}`": [f"--base_precision={name}"] for name in ("int8", "fp8", "nf4")},
    "no `--cache_latents`": ["--no_cache_latents"],
    "`--train_text_encoder`": ["--train_text_encoder"],
    "`--train_text_encoder_ti`": ["--train_text_encoder_ti"],
    "class images (`--with_prior_preservation`)": CLASS_IMAGES,
}

LEAN = (HALF, CHECKPOINTING, "--cache_latents")
PREVIEWS = "--validation_prompt=a dog"
RECIPES = {  # what of the commands in README.md and docs/recipes.md decides memory
    "[the first command](../README.md#train-sdxl-on-your-own-images)": ["--train_batch_size=1", "--rank=16", *LEAN],
    "[a style at 8 GB](recipes.md#a-style-at-8-gb)": [
        "--preset=style", "--train_batch_size=1", "--gradient_accumulation_steps=3", *LEAN],
    "[a face or an object at 8 GB](recipes.md#a-face-or-an-object-at-8-gb)": ["--preset=face", "--rank=16", *LEAN],
    "[an object](recipes.md#an-object)": [
        "--train_batch_size=1", "--rank=16", "--optimizer=prodigy", "--learning_rate=1", *CLASS_IMAGES, *LEAN],
    "[a face](recipes.md#a-face)": ["--preset=face", PREVIEWS, *CLASS_IMAGES, *LEAN],
    "[a style](recipes.md#a-style), which has new tokens": [
        "--preset=style", "--train_text_encoder_ti", PREVIEWS, *LEAN],
}


@dataclass(frozen=True)
class Setting:
    """A line of the first table: a setting, at each of BATCHES."""

    model: str
    side: int
    flags: tuple[str, ...]

    @property
    def peaks(self) -> list[int]:
        """Bytes at the peak of training, for each batch."""
        return [planned(self.model, (f"--resolution={self.side}", f"--train_batch_size={batch}", "--rank=16",
                                     "--cache_latents", *self.flags))["training"].total for batch in BATCHES]

    def __str__(self) -> str:
        name, _ = MODELS[self.model]
        precision = "bf16" if HALF in self.flags else "fp32"
        kept = "yes" if CHECKPOINTING in self.flags else "no"
        cells = [f"{peak / GIB:.1f} → {smallest_card(peak)}" for peak in self.peaks]
        return f"| {name} | {self.side} px | {precision} | {kept} | {' | '.join(cells)} |"


ROWS = [Setting(model, side, flags) for model, (_, sides) in MODELS.items() for side in sides
        for flags in ((HALF, CHECKPOINTING), (HALF,), (CHECKPOINTING,), ())]


@cache
def planned(model: str, flags: tuple[str, ...]) -> Trace:
    opt = options(model, flags)
    return trace(opt, read_configs(opt.model))


def options(model: str, flags: Sequence[str]) -> Any:
    """Of the DreamBooth trainer for SDXL, of the text-to-image trainer for the others."""
    concerns: Mapping[str, type[Concern]] = CONCERNS if model == "sdxl" else TEXT_TO_IMAGE
    fields: dict[str, Any] = {name: (concern_class, ...) for name, concern_class in concerns.items()}
    given = ["--instance_prompt=a photo of TOK"] if model == "sdxl" else []
    return parse(create_model("Options", __base__=OptionSet, **fields),
                 [f"--pretrained_model_name_or_path={model}", *given, *flags], description="")


def smallest_card(peak: int) -> str:
    """The smallest usual card that should do; with a star where it is tight."""
    size = next((size for size in CARDS if Need(peak).fits(size * GIB - OTHERS)), None)
    return "more than 80 GB" if size is None else f"{size} GB{'*' * Need(peak).is_tight(size * GIB - OTHERS)}"


def additions() -> Iterator[str]:
    base = planned("sdxl", (*BASE, CHECKPOINTING))["training"].total
    for name, flags in ADDITIONS.items():
        more = planned("sdxl", (*BASE, CHECKPOINTING, *flags))["training"].total - base
        yield f"| {name} | {more / GIB:+.2f} GiB |"


def other_phases() -> Iterator[str]:
    flags = (*BASE, CHECKPOINTING, PREVIEWS, *CLASS_IMAGES)
    for phase in planned("sdxl", flags).phases:
        if phase.name != "training":
            yield f"| {phase.name} | {phase.peak.total / GIB:.1f} | {smallest_card(phase.peak.total)} |"


def recipes() -> Iterator[str]:
    """A line for each recipe; class images are there already."""
    for name, flags in RECIPES.items():
        peak = max(phase.peak.total for phase in planned("sdxl", tuple(flags)).phases if phase.name != "class images")
        yield f"| {name} | {peak / GIB:.1f} | {Need(peak).bytes / GIB:.1f} | {smallest_card(peak)} |"


def presets() -> Iterator[str]:
    for name, values in PRESETS.items():
        if name.endswith("gb"):
            yield f"| `--preset={name}` | {PRESET_USES[name]} | `{typed(values)}` |"


def page() -> str:
    """The whole of docs/memory.md."""
    parts = {"rows": map(str, ROWS), "recipes": recipes(), "additions": additions(), "phases": other_phases(),
             "presets": presets()}
    return PAGE.format(batches=" | ".join(f"batch {batch}" for batch in BATCHES), line="---|" * (4 + len(BATCHES)),
                       eight=f"{eight_gb() / GIB:.1f}",
                       six=f"{eight_gb('--base_precision=int8') / GIB:.1f}",
                       **{name: "\n".join(lines) for name, lines in parts.items()})


def eight_gb(*more: str) -> int:
    """Bytes that a card must have free for SDXL at 1024 px with half precision and gradient checkpointing."""
    return Need(planned("sdxl", (*BASE, CHECKPOINTING, *more))["training"].total).bytes


PAGE = """\
# Memory: does it fit my card?

You need this page to find out which card a training needs, before you download a model. **Every number
here is computed, not measured on a card.** The page is generated, with
`.venv/bin/python -m trainkit.plan`. A test fails if page and code differ.

## Ask for your own settings

```text
.venv/bin/python scripts/plan.py sdxl 8gb --rank=32
```

The first word is the base model: `sd15`, `sd21`, `sdxl`, a Diffusers folder, one `.safetensors` file, or
a name on the Hub. The second word is your card: its memory, or its name, such as `3060`. All flags of the
trainers may follow. The program needs no GPU, no images and no weights. It shows

- the memory of each phase of the run, and what takes it;
- main memory (RAM), disk space, and the amount of computing in one step;
- which flags make the run fit, and what each one costs (`✓` fits, `✗` does not);
- for a card that it knows by name, about how long an optimizer step takes.

You can also add `--plan=8gb` to a command of a trainer. The command then shows its plan and does not
train. `--plan` without a value takes the CUDA card of this machine, if there is one. The exit code is 4
if nothing makes the run fit. Otherwise it is 0, also if the run fits only with more flags. On a machine
with a CUDA card, each run says at its start whether the card has enough memory. If a run dies because
memory ran out, the message names the flags that should help.

## The table

Each cell has the **peak**: the most memory, in GiB, that the training uses at one moment. After the arrow
is the smallest usual card that should be enough. A card must have more than the peak free. We call this
the **need**: 1.05 × peak + 0.6 GiB. `plan.py` prints both, and the
[README](../README.md#does-it-fit-my-card) shows the need. All rows have rank 16, attention layers, AdamW
and `--cache_latents`. **Checkpointing** is `--gradient_checkpointing`. A star means that the run only
just fits: if it needed 0.3 GiB more, it would not fit.

| model | size | precision | checkpointing | {batches} |
|{line}
{rows}

## The recipes

All recipes are for SDXL at 1024 px. The peak is that of the largest phase. The need is what a card must
have free. Both are in GiB. The table assumes that the folder of class images is full. If it is not, see
[Other phases](#other-phases).

| recipe | peak | need | card |
|---|---|---|---|
{recipes}

## What you add

This table shows how much the peak of the training rises. It starts from SDXL at 1024 px, rank 16, batch
1, bf16, AdamW, gradient checkpointing and `--cache_latents`.

| what you add | more memory |
|---|---|
{additions}

## A base model in 8 or 4 bits

`--base_precision` sets how the frozen weights are kept. The layers still compute in `--mixed_precision`, so
no card needs to compute in 8 bits. We measured how near the gradient of the LoRA is to that of fp32, on a
CPU, with eight icons and the SDXL model in `assets/`. A cosine of 1 means the same direction.

| format | cosine | relative error |
|---|---|---|
| `int8` | 0.9998 | 2 % |
| `fp8` | 0.9988 | 5 % |
| `nf4` | 0.985 | 18 % |

Start with `int8`. It is as small as `fp8` and nearer. With `fp8` and `nf4`, convolutions are kept in int8,
because they suffer most: with convolutions in nf4, too, the cosine was 0.964. Whether styles are learned as
well is not measured yet.

A run that resumes needs the same `--base_precision`. Frozen text encoders stay in fp32, because they are
freed before the training.

## Other phases

This table is for SDXL at 1024 px, bf16, with gradient checkpointing. Phases do not add up: the largest
one decides. In the phase **class images**, missing class images are generated. In **text**, captions are
encoded, and in **caching**, images. In **publishing**, the LoRA is saved and checked.

| phase | peak, GiB | card |
|---|---|---|
{phases}

The trainer generates class images only if the folder has too few. It generates `--sample_batch_size`
images at a time. On a smaller card than in the table, put enough photos into the folder yourself. The run
then leaves out this phase.

## Presets by card

These presets set only the flags that decide memory. You can give several presets, such as
`--preset=style,sdxl-8gb`. If two presets set the same flag, the later one counts.

| preset | for | what it sets |
|---|---|---|
{presets}

Some presets lower the batch size. Each step then trains on fewer images. For example, if the batch size
was 3 and is now 1, add `--gradient_accumulation_steps=3`. A step then trains on three images again.

## How it is computed

The trainer's own code makes one optimizer step: the model from its configs, the adapters, the loss and
the backward pass. Its tensors (arrays of numbers) have a shape but no content. So they take no memory.
The peak is the largest sum of all tensors that are alive at one moment. For the optimizer's state, the
optimizer makes a step on one small tensor of each shape. We leave out what distribution matching computes
beside the network, because it is as small as the latents.

    need = 1.05 x peak + 0.6 GiB

The need is what a card must have free. The 0.6 GiB are for CUDA itself, and the 5 % are for gaps between the
pieces of memory in use. **Both are assumed.** The 0.6 GiB may be 0.3 GiB too high or too low. A card of
8 GB counts as 7.5 GiB here, because the desktop has some of it.

**Measured on a CPU.** We measured the peak of real optimizer steps of the two small models in `assets/`, in
13 configurations. The numbers come from PyTorch's allocator
(`.venv/bin/python -m pytest -m "slow or not slow" tests/test_plan_memory.py`). Without gradient
checkpointing, the computed peak is within 1 % of the measured one. With gradient checkpointing, it is up to
10 % too low: kernels need extra memory while they run, and we do not compute this memory.

**Computed:** all tables on this page. **Never tried on a real card:** all tables, the rule above, the memory
that cuDNN takes, and the time of a step.

**Published figures.** kohya's sd-scripts train SDXL on 8 GB with half precision and gradient
checkpointing. For these settings, we compute a need of {eight} GiB. OneTrainer's 4.5 to 4.9 GB need
weights in 8 bits: with `--base_precision=int8`, we compute a need of {six} GiB. For other published
figures, the settings are not known well enough to compare them.
"""
