"""What a checkpoint and the run that resumes it must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trainkit.checkpoints import UNKNOWN_BEFORE
from trainkit.data.cache import content_key, content_key_of
from trainkit.optim.table import decisive_arguments
from trainkit.options.rules import trained_fractions

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.families import Family
    from trainkit.options import (
        Concern,
        FourierOptions,
        ImageOptions,
        LoraOptions,
        ObjectiveOptions,
        OptimizerOptions,
        RunOptions,
    )
    from trainkit.options.base import Value

STEADY = ("constant", "constant_with_warmup", "piecewise_constant")  # schedules that do not know how long the run is


class FingerprintOptions(Protocol):
    """A trainer's options, an OptionSet with these concerns."""

    @property
    def run(self) -> RunOptions: ...

    @property
    def lora(self) -> LoraOptions: ...

    @property
    def optimizer(self) -> OptimizerOptions: ...

    @property
    def objective(self) -> ObjectiveOptions: ...

    @property
    def fourier_loss(self) -> FourierOptions: ...

    @property
    def data(self) -> ImageOptions: ...

    def flat(self) -> dict[str, Value]: ...

    def concerns(self) -> dict[str, type[Concern]]: ...


class RunIdentity(Protocol):
    """What of the run decides bits."""

    world: int
    precision: str

    @property
    def global_batch(self) -> int: ...


def fingerprint(
    opt: FingerprintOptions, rows: Sequence[Row], family: Family, run: RunIdentity, total: int, **more: object,
) -> dict[str, object]:
    """All that decides the bits of a run of `total` optimizer steps; `more` is what a trainer adds.

    A run with other values of these cannot go on from a checkpoint. They are the options whose fields say that they are
    decisive (`resume` in trainkit/options/base.py), and what the options "in the data" lead to.
    """
    decisive = decisive_options(opt)
    matched = decisive.get("distribution matching") == "on"  # a loss compares the images of a micro-batch
    return {
        "base model": family.sampled_identity, UNKNOWN_BEFORE: family.identity,
        "images": contents([row for row in rows if not row.is_class]),
        "class images": contents([row for row in rows if row.is_class]),
        "masks": masks(rows, opt.data),
        "--prior_loss_weight": class_weights(rows),
        "images in a step": run.global_batch,
        # Dropout's masks and the images of a step depend on the batch size, the latter where images have several sizes.
        "images in a micro-batch": opt.run.train_batch_size if opt.lora.lora_dropout or several_sizes(rows) else None,
        "images that the VAE encodes at once": family.vae_batch_size if family.vae_batch_size > 1 else None,
        "--base_precision": family.storage.name or None,
        "cached latents": "bf16" if rounded_latents(opt) else None,
        "images matched with one another": opt.run.train_batch_size * run.world if matched else None,
        "steps": total if depends_on_length(opt) else None,
        **decisive,
        "--mixed_precision": run.precision,  # where it is left open, accelerate's configuration says it
        "--optimizer_args": decisive_arguments(opt.optimizer),
        **more,
    }


def decisive_options(opt: FingerprintOptions) -> dict[str, object]:
    """What each concern says is decisive, by flag.

    A concern that is switched on by a flag of another concern is left out while it is off. A concern with its own
    switch is not: the switch is one of its decisive flags.
    """
    values = opt.flat()
    found: dict[str, object] = {}
    for name, concern_class in opt.concerns().items():
        needed = concern_class.prerequisite()
        if needed is None or needed.flags & concern_class.model_fields.keys() or needed.holds(values):
            found |= getattr(opt, name).decisive()
    return found


def contents(rows: Sequence[Row]) -> str | None:
    """Digest of images and captions; None without any."""
    return content_key_of((row.id, row.digest, *row.all_captions, row.repeat, *(row.cut or ()), *of_source(row))
                          for row in rows) if rows else None


def of_source(row: Row) -> list[Any]:
    """What the source of a row decides, where it is not what the flags say."""
    weight: list[Any] = [] if row.is_class or row.loss_weight == 1 else ["weight", row.loss_weight]
    handling = row.handling
    if handling is None:
        return weight
    return [*weight, handling.captions.model_dump(exclude_defaults=True), handling.random_flip, handling.center_crop,
            handling.interpolation, handling.batch_size]


def class_weights(rows: Sequence[Row]) -> list[float]:
    """Of all class images, or where they differ of each."""
    weights = [row.loss_weight for row in rows if row.is_class]
    return weights if len(set(weights)) > 1 else weights[:1]


def masks(rows: Sequence[Row], data: ImageOptions) -> str | None:
    """Digest of the masks and of how they weigh the loss; None without any, as in checkpoints of before."""
    found = [(row.id, row.mask.digest, row.mask.alpha, *(["filled"] if row.mask.fills else []))
             for row in rows if row.mask]
    return content_key(*found, data.unmasked_weight, data.normalize_masked_area_loss) if found else None


def several_sizes(rows: Sequence[Row]) -> bool:
    """Whether images are cut to more than one size."""
    return len({row.cut for row in rows}) > 1


def rounded_latents(opt: FingerprintOptions) -> bool:
    return opt.data.cache_latents and opt.data.latent_dtype == "bf16"


def depends_on_length(opt: FingerprintOptions) -> bool:
    """Whether a step means something else in a longer run: a rate or a weight moves, or a part stops before its end."""
    decays = opt.optimizer.lr_scheduler not in STEADY
    moves = opt.objective.loss_type == "fourier" and opt.fourier_loss.moves
    return decays or moves or any(0 < fraction < 1 for fraction in trained_fractions(opt.flat()).values())
