"""What a checkpoint and the run that resumes it must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainkit.data.cache import content_key
from trainkit.optim.table import decisive_arguments
from trainkit.options.rules import shares

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.families import Family
    from trainkit.options import OptionSet
    from trainkit.run import Run

# What decides the bits of a run: these concerns, as far as a trainer has them, but for flags whose effect is in the
# rows or in a digest, and for what one may turn while training: rates and their course, decays, the clip.
DECISIVE = ("data", "text", "pivotal", "guidance", "lora", "objective", "fourier_loss", "matching", "optimizer")
IN_CONTENT = {
    "dataset_name", "dataset_config_name", "instance_data_dir", "train_data_dir", "image_column", "caption_column",
    "instance_prompt", "max_train_samples", "repeats", "cache_dir", "latent_cache_dir",
}
TURNED = {
    "learning_rate", "scale_lr", "text_encoder_lr", "text_encoder_2_lr", "lr_warmup_steps", "lr_num_cycles",
    "lr_step_rules", "lr_power", "adam_weight_decay", "adam_weight_decay_text_encoder", "max_grad_norm",
}
STEADY = ("constant", "constant_with_warmup", "piecewise_constant")  # schedules that do not know how long the run is


def fingerprint(opt: OptionSet, rows: Sequence[Row], family: Family, job: Run, total: int, **more: object
                ) -> dict[str, object]:
    """All that decides the bits of a run of `total` optimizer steps; `more` is what a trainer adds.

    Other values of these, and going on from a checkpoint would not be going on.
    """
    unread = () if opt.objective.loss_type == "fourier" else ("fourier_loss",)
    concerns = [getattr(opt, concern) for concern in DECISIVE if concern in opt.concerns() and concern not in unread]
    decisive = {flag: value for concern in concerns for flag, value in concern.decisive().items()}
    decisive |= {"--optimizer_args": decisive_arguments(opt.optimizer)}
    matched = decisive.get("distribution matching") == "on"  # a loss compares the pictures of a micro-batch
    return {
        "base model": family.identity, "pictures": contents([row for row in rows if not row.is_class]),
        "class pictures": contents([row for row in rows if row.is_class]),
        "--prior_loss_weight": [row.share for row in rows if row.is_class][:1],
        "pictures in a step": job.global_batch, "--seed": job.seed, "--mixed_precision": job.precision,
        "pictures in a micro-batch": opt.run.train_batch_size if opt.lora.lora_dropout else None,  # it cuts the masks
        "pictures matched with one another": opt.run.train_batch_size * job.world if matched else None,
        "--allow_tf32": opt.precision.allow_tf32, "--compat": opt.run.compat,
        "steps": total if depends_on_length(opt) else None,
        **{flag: value for flag, value in decisive.items() if flag.removeprefix("--") not in IN_CONTENT | TURNED},
        **more,
    }


def contents(rows: Sequence[Row]) -> str | None:
    """Digest of pictures and captions; None without any."""
    return content_key(*[(row.id, row.digest, *row.all_captions, row.repeat) for row in rows]) if rows else None


def depends_on_length(opt: OptionSet) -> bool:
    """Whether a step means something else in a longer run: a rate or a weight moves, or a part stops at a share of it.
    """
    decays = opt.optimizer.lr_scheduler not in STEADY
    moves = opt.objective.loss_type == "fourier" and opt.fourier_loss.moves
    return decays or moves or any(0 < share < 1 for share in shares(opt.flat()).values())
