"""Teach SDXL a concept or a style from a few pictures: a DreamBooth LoRA.

    accelerate launch train_dreambooth_lora_sdxl_advanced.py \\
      --pretrained_model_name_or_path=assets/tiny-sdxl-icons --instance_data_dir=assets/icons-3d \\
      --instance_prompt="3d icon in the style of TOK" --resolution=64 --rank=8 \\
      --optimizer=prodigy --learning_rate=1.0 --snr_gamma=5.0 --max_train_steps=400 --output_dir=runs/icons

Takes the command lines of the Diffusers script of the same name. `--print_config` shows every value and its origin,
docs/flags.md explains them, docs/differences.md says where we differ from the Diffusers script and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.errors import exit_with_message, refuse
from trainkit.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    OptionSet,
    PivotalOptions,
    PrecisionOptions,
    PriorOptions,
    RunOptions,
    TextOptions,
    ValidationOptions,
    parse,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.checkpoints import Checkpoints
    from trainkit.data.batch import Batch
    from trainkit.data.rows import Row
    from trainkit.diffusion import LevelSampler, Noise
    from trainkit.families.sdxl import SDXL
    from trainkit.families.text import FrozenText
    from trainkit.objective import Objective
    from trainkit.preview import Previews
    from trainkit.run import Run


class Options(OptionSet):
    """Everything this trainer can be told, one concern a field."""

    model: ModelOptions
    data: DataOptions
    prior: PriorOptions
    text: TextOptions
    pivotal: PivotalOptions
    lora: LoraOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    precision: PrecisionOptions
    validation: ValidationOptions
    run: RunOptions


def main(argv: list[str] | None = None) -> None:
    opt = parse(Options, argv, description=__doc__)  # frozen; --help and --print_config end here

    from trainkit import adapters, checkpoints, diffusion, objective, optim, preview, publish, run
    from trainkit.data import cache, loader, order
    from trainkit.families import sdxl, text

    rows = preflight(opt)  # every problem in one message
    with run.start_run(opt) as job:
        family = sdxl.load(opt.model, device=job.device, weight_dtype=job.weight_dtype,
                           prediction_type=opt.objective.prediction_type, compat=opt.run.compat)  # frozen
        store = cache.open_store(opt.data.latent_cache_dir)
        prompts = text.FrozenText(family, captions(opt, rows), store, opt.text.clip_skip)  # each encoded once
        family.free_text_encoders()
        pictures = loader.ready_pictures(rows, opt.data, family, store, **job.loading)
        lora = adapters.add_lora(family.unet, opt.lora, targets=family.lora_targets, seed=job.seed)  # all that trains
        family.settle(keep_vae=pictures.live, gradient_checkpointing=opt.precision.gradient_checkpointing)
        levels = diffusion.make_levels(opt.objective, family.schedule)
        loss = objective.make_objective(opt.objective, family.schedule.prediction, opt.run.compat)
        train_step = TrainStep(family, prompts, job, levels, diffusion.Noise(opt.objective.noise_offset), loss)
        total, stop = opt.run.ends(len(rows), job.world)  # finished steps of the run, and of this session
        optimizer = optim.make_optimizer(lora.groups(opt.optimizer, job.global_batch), opt.optimizer, total)
        stream = order.Order(rows, job.global_batch, seed=job.seed)  # the same on 1 or N processes
        previews = preview.Previews(
            family, opt.validation, prompts, job.out_dir, seed=job.seed, resolution=opt.data.resolution,
            every=opt.validation.every(stream.steps_per_epoch))
        saves = checkpoints.Checkpoints(
            job.out_dir, keep=opt.run.checkpoints_total_limit, fingerprint=fingerprint(opt, rows, family, job, total),
            adapters=lora, optimizer=optimizer, run=job)
        start = saves.resume(opt.run.resume_from_checkpoint, stop=stop)
        job.begin(start, total, previews)
        for step, batches in loader.micro_batches(pictures, stream, start_step=start, stop_step=stop, **job.share):
            for batch in batches:
                losses = train_step(batch.to(job.device))  # [B]
                job.backward(losses.sum() / batch.num_instance)
            stats = job.update(optimizer, step=step)
            job.log(step + 1, stats | optimizer.describe())
            after_step(step + 1, opt, job=job, saves=saves, previews=previews, last=step + 1 == stop)
        if stop == total:
            publish.publish(opt.run, family, lora, num_images=len(rows) // opt.data.repeats)


@dataclass(frozen=True)
class TrainStep:
    """One micro-batch forward: noise it to a drawn level, ask the network, weigh the error."""

    family: SDXL
    prompts: FrozenText
    job: Run
    levels: LevelSampler
    noise: Noise
    loss: Objective

    def __call__(self, batch: Batch) -> Tensor:
        """-> losses [B]. Every draw is a function of (seed, step, slot in the global batch)."""
        from trainkit import rng

        keys, device = batch.keys(self.job.seed), batch.time_ids.device
        rng.reseed_dropout(*keys[0])
        x0 = self.family.sample_latents(batch, keys)  # [B,C,h,w]
        n = self.noise(x0.shape[1:], keys).to(device)  # [B,C,h,w]
        level = self.levels(rng.uniform(keys, "timestep")).to(device)
        z = self.loss.pred.add_noise(x0, n, level)
        text = self.prompts(batch.prompts)  # embeds [B,T,D], pooled [B,P]
        with self.job.autocast():
            seen = self.loss.pred.model_input(z, level)
            out = self.family.denoise(seen, level, text=text, time_ids=batch.time_ids)
        return self.loss(out, x0=x0, z=z, n=n, level=level, share=batch.share)


def after_step(done: int, opt: Options, *, job: Run, saves: Checkpoints, previews: Previews, last: bool) -> None:
    """What is due after `done` finished steps: save (and end there when a signal asked for it), draw, a last look."""
    from trainkit.run import due

    if due(done, opt.run.checkpointing_steps, last=last) or job.stopping:
        job.end_if_asked(done, saves.save(done, prune=job.healthy))
    if previews.due(done, last=last):
        job.draw(done, previews)
    if last:
        job.require_progress()


def preflight(opt: Options) -> list[Row]:
    """The rows to train on; or one message with everything that is wrong, before a weight is loaded."""
    from trainkit import adapters, optim, publish
    from trainkit.data.rows import read_rows
    from trainkit.families import sdxl
    from trainkit.runtime.startup import leave_out

    if opt.optimizer.algorithm != "adamw8bit":
        leave_out("bitsandbytes")

    model, other_vae = opt.model.pretrained_model_name_or_path, opt.model.pretrained_vae_model_name_or_path
    model_problems = sdxl.problems(model, resolution=opt.data.resolution, vae_path=other_vae,
                                   revision=opt.model.revision, variant=opt.model.variant,
                                   clip_skip=opt.text.clip_skip, prediction_type=opt.objective.prediction_type)
    if opt.lora.lora_unet_blocks and not model_problems:
        unet = sdxl.skeleton(model, revision=opt.model.revision)
        model_problems = adapters.problems(unet, opt.lora, targets=sdxl.LORA_TARGETS)
    rows, data_problems = read_rows(opt.data)
    asked = [*opt.problems(), *optim.problems(opt.optimizer), *publish.problems(opt.run)]
    refuse([*asked, *model_problems, *data_problems])
    return rows


def captions(opt: Options, rows: list[Row]) -> list[str]:
    """Every prompt the run will ever need encoded."""
    from trainkit.preview import preview_prompts

    return [row.caption for row in rows] + preview_prompts(opt.validation)


# What decides the bits of a run beside model, pictures and seed. Rates and decays may be changed on resume.
DECISIVE = (
    "resolution", "center_crop", "random_flip", "image_interpolation_mode", "cache_latents", "cached_crops",
    "clip_skip", "rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_unet_blocks", "prediction_type",
    "snr_gamma", "noise_offset", "compat", "optimizer", "use_8bit_adam", "lr_scheduler",
)


def fingerprint(opt: Options, rows: list[Row], family: SDXL, job: Run, total: int) -> dict[str, object]:
    """What a checkpoint and the run that resumes it must agree on, or going on would not be going on."""
    from trainkit.data.cache import content_key

    flags = opt.flat()
    return {
        "base model": family.identity, "pictures": content_key(*[
            (row.id, row.digest, row.caption, row.repeat) for row in rows]),
        "pictures in a step": job.global_batch, "--seed": job.seed, "--mixed_precision": job.precision,
        "steps": None if opt.optimizer.lr_scheduler.startswith("constant") else total,  # a decay depends on its length
        **{f"--{flag}": flags[flag] for flag in DECISIVE},
    }


if __name__ == "__main__":
    exit_with_message(main)
