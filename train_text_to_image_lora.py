"""Teach Stable Diffusion 1.x, 2.x or SDXL from captioned pictures: a text-to-image LoRA.

    accelerate launch train_text_to_image_lora.py \\
      --pretrained_model_name_or_path=assets/tiny-sd-icons --train_data_dir=assets/icons-3d \\
      --resolution=64 --rank=4 --train_batch_size=4 --learning_rate=1e-3 --snr_gamma=5.0 \\
      --max_train_steps=300 --output_dir=runs/captioned

Takes the command lines of the Diffusers script of the same name, and of its SDXL twin: what the model folder holds
decides. `--print_config` shows every value and its origin, docs/flags.md explains them, docs/differences.md says where
we differ from the Diffusers script and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trainkit.errors import exit_with_message, refuse
from trainkit.options import (
    CaptionedDataOptions,
    CaptionedOptimizerOptions,
    CaptionedPrecisionOptions,
    CaptionedRunOptions,
    CaptionedTextOptions,
    CaptionedValidationOptions,
    FourierOptions,
    GuidanceOptions,
    LoraOptions,
    MatchingOptions,
    ModelOptions,
    ObjectiveOptions,
    OptionSet,
    parse,
)

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from trainkit import rng
    from trainkit.adapters import Adapters
    from trainkit.checkpoints import Checkpoints
    from trainkit.data.batch import Batch
    from trainkit.data.cache import Store
    from trainkit.data.rows import Row
    from trainkit.diffusion import Noise
    from trainkit.families import Family
    from trainkit.guidance import Guidance
    from trainkit.matching import Matcher
    from trainkit.optim import Optim, ParamGroup
    from trainkit.passes import Pass, Passes
    from trainkit.preview import Previews
    from trainkit.run import Run
    from trainkit.text import Text


class Options(OptionSet):
    """Everything this trainer can be told, one concern a field."""

    model: ModelOptions
    data: CaptionedDataOptions
    text: CaptionedTextOptions
    guidance: GuidanceOptions
    lora: LoraOptions
    objective: ObjectiveOptions
    fourier_loss: FourierOptions
    matching: MatchingOptions
    optimizer: CaptionedOptimizerOptions
    precision: CaptionedPrecisionOptions
    validation: CaptionedValidationOptions
    run: CaptionedRunOptions


def main(argv: list[str] | None = None) -> None:
    opt = parse(Options, argv, description=__doc__)  # frozen; --help and --print_config end here

    from trainkit import adapters, checkpoints, families, guidance, optim, preview, publish, run, run_fingerprint
    from trainkit.data import cache, loader, order

    kind = families.of(opt.model)  # SD 1.x and 2.x, or SDXL: what the model folder holds
    rows = preflight(opt, kind)  # every problem in one message
    with run.start_run(opt, "text-to-image-lora") as job:
        total, stop = opt.run.ends(len(rows), job.world)  # finished steps of the run, and of this session
        family = kind.load(opt.model, device=job.device, weight_dtype=job.weight_dtype, compat=opt.run.compat,
                           **opt.objective.schedule)  # frozen
        store = cache.open_store(opt.data.latent_cache_dir)
        guide = guidance.make_guidance(opt.guidance, rows, family)  # the picture's own token, where it is asked for
        words = make_words(opt, family, rows, store, total)  # prompts to conditioning: frozen, or LoRA
        pictures = loader.ready_pictures(rows, opt.data, family, store, **job.loading)
        lora = adapters.add_adapters(family.unet, opt.lora, targets=family.lora_targets, seed=job.seed)
        family.settle(keep_vae=pictures.live, gradient_checkpointing=opt.precision.gradient_checkpointing)
        optimizer = optim.make_optimizer(trained(opt, lora, words, job, total), opt.optimizer, total)
        train_step = make_train_step(opt, family, words, guide, job, total)
        stream = order.Order(rows, job.global_batch, seed=job.seed)  # the same on 1 or N processes
        previews = preview.Previews(
            family, opt.validation, words, job.out_dir, seed=job.seed, resolution=opt.data.resolution,
            every=opt.validation.every(stream.steps_per_epoch), averaged=optimizer.averaged)
        saves = checkpoints.Checkpoints(
            job.out_dir, keep=opt.run.checkpoints_total_limit,
            fingerprint=run_fingerprint.fingerprint(opt, rows, family, job, total, **guide.identity),
            adapters=lora, text=words, passes=train_step.passes, optimizer=optimizer, run=job)
        start = saves.resume(opt.run.resume_from_checkpoint, stop=stop)
        job.begin(start, total, previews)
        for step, batches in loader.micro_batches(pictures, stream, start_step=start, stop_step=stop, **job.share):
            optimizer.begin(step)  # who trains in this step, and at which rate
            for loss in train_step(batches):  # a part of the step's loss for each forward pass
                job.backward(loss)
            stats = train_step.passes.describe() | job.update(optimizer, step=step, then=words.after_update)
            job.log(step + 1, stats | optimizer.describe())
            after_step(step + 1, opt, job, optimizer, saves=saves, previews=previews, last=step + 1 == stop)
        if stop == total:
            with optimizer.averaged():
                publish.publish(opt.run, family, lora, words=words, num_images=len(rows) // opt.data.repeats)


@dataclass(frozen=True)
class TrainStep:
    """The forward passes of one optimizer step: noise to a drawn level, ask the network, weigh the error."""

    family: Family
    words: Text
    guide: Guidance
    job: Run
    noise: Noise
    passes: Passes

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """-> the part of the step's loss that each pass of each micro-batch has; its graph may go before the next."""
        for batch in batches:
            on_device, keys = batch.to(self.job.device), batch.keys(self.job.seed)
            x0 = self.family.sample_latents(on_device, keys)  # [B,C,h,w]
            for one in self.passes(batch.step):
                yield self.losses(one, on_device, x0, one.keys(keys)).sum() / batch.num_instance

    def losses(self, one: Pass, batch: Batch, x0: Tensor, keys: Sequence[rng.Key]) -> Tensor:
        """-> losses [B] of one pass. Every draw is a function of (seed, step, slot in the global batch)."""
        from trainkit import rng
        from trainkit.objective import Outcome

        rng.reseed_dropout(*keys[0])
        pred = one.loss.pred
        n = self.noise(x0.shape[1:], keys)  # [B,C,h,w]
        level = one.level(keys).to(x0.device)
        z = pred.add_noise(x0, self.noise.perturbed(n, keys).to(x0.device), level)
        text = self.words(batch.prompts, batch.step)  # embeds [B,T,D], pooled [B,P]
        embeds, pooled = self.guide(text, batch, batch.keys(self.job.seed))  # the same in every pass of a step
        with self.job.autocast():
            seen = pred.model_input(z, level)
            out = self.family.denoise(seen, level, text=(embeds, pooled), time_ids=batch.time_ids)
        return one.loss(Outcome(out, x0=x0, z=z, n=n.to(x0.device), level=level, share=batch.share,
                                is_class=batch.is_class, prompts=batch.prompts, pictures=batch.pictures, text=embeds,
                                step=batch.step, num_instance=batch.num_instance))


def make_words(opt: Options, family: Family, rows: Sequence[Row], store: Store, total: int) -> Text:
    """The text of the run, told every prompt it will ever be asked for."""
    from trainkit.preview import preview_prompts
    from trainkit.text import make_text

    return make_text(
        family, [caption for row in rows for caption in row.all_captions], store, also=preview_prompts(opt.validation),
        text=opt.text, pivotal=None, lora=opt.lora, total=total, seed=opt.run.seed,
        gradient_checkpointing=opt.precision.gradient_checkpointing)


def make_train_step(opt: Options, family: Family, words: Text, guide: Guidance, job: Run, total: int) -> TrainStep:
    """The step with the noise levels, noise, loss and passes that the options ask for."""
    from trainkit.diffusion import Noise, make_levels
    from trainkit.fourier import make_fourier
    from trainkit.matching import make_passes
    from trainkit.objective import make_objective
    from trainkit.passes import Pass

    levels = make_levels(opt.objective, family.schedule)  # --compat or not: these two are as in Diffusers' own
    fourier = make_fourier(opt.fourier_loss, opt.objective.loss_type, total_steps=total, note=job.note)  # or none
    loss = make_objective(opt.objective, family.schedule.prediction,
                          base_loss=opt.fourier_loss.fourier_base_loss).plus(*fourier.values())
    passes = make_passes(opt.matching, Pass(levels, loss), partial(make_matcher, opt.matching), seed=job.seed,
                         snr_gamma=opt.objective.capped_gamma, together=opt.run.train_batch_size * job.world,
                         memories=fourier)
    return TrainStep(family, words, guide, job, Noise.from_options(opt.objective), passes)


def make_matcher(o: MatchingOptions) -> Matcher:
    """The loss that --dist_match and its companions describe, over all ranks."""
    from freq_loss import DistributionMatchingLoss
    from trainkit.runtime import ranks

    return DistributionMatchingLoss(**o.loss, gather=ranks.gather_rows)


def trained(opt: Options, lora: Adapters, words: Text, job: Run, total: int) -> list[ParamGroup]:
    """Everything that learns, in groups with rates, decays and last steps of their own."""
    unet = lora.groups(lr=opt.optimizer.base_lr(global_batch=job.global_batch),
                       weight_decay=opt.optimizer.adam_weight_decay, stop=opt.lora.stop(total))
    return [*unet, *words.groups(opt.optimizer, job.global_batch)]


def after_step(done: int, opt: Options, job: Run, optimizer: Optim, *, saves: Checkpoints, previews: Previews,
               last: bool) -> None:
    """What is due after `done` finished steps: save (and end there when a signal asked for it), draw, a last look."""
    from trainkit.run import due

    if due(done, opt.run.checkpointing_steps, last=last) or job.stopping:
        job.require_finite(optimizer, done)
        job.end_if_asked(done, saves.save(done, prune=job.healthy))
    if previews.due(done, last=last):
        job.draw(done, previews)
    if last:
        job.require_progress()


def preflight(opt: Options, kind: ModuleType) -> list[Row]:
    """The rows to train on; or one message with everything that is wrong, before a weight is loaded."""
    from trainkit import adapters, fourier, guidance, matching, optim, publish
    from trainkit.data.rows import read_rows
    from trainkit.runtime.startup import leave_out

    if optim.library(opt.optimizer) != "bitsandbytes":
        leave_out("bitsandbytes")

    model, other_vae = opt.model.pretrained_model_name_or_path, opt.model.pretrained_vae_model_name_or_path
    model_problems = kind.problems(model, resolution=opt.data.resolution, vae_path=other_vae,
                                   revision=opt.model.revision, variant=opt.model.variant,
                                   clip_skip=opt.text.clip_skip, **opt.objective.schedule,
                                   timesteps=(opt.objective.min_timestep, opt.objective.max_timestep))
    rows, data_problems = read_rows(opt.data, seed=opt.run.seed)
    if not model_problems:
        unet = kind.skeleton(model, revision=opt.model.revision)
        latents = kind.latents(model, opt.data.resolution, vae_path=other_vae, revision=opt.model.revision)
        model_problems = [*adapters.problems(unet, opt.lora, targets=kind.LORA_TARGETS),
                          *guidance.problems(opt.guidance, rows, unet.config.cross_attention_dim),
                          *fourier.problems(opt.fourier_loss, opt.objective.loss_type, latents),
                          *matching.problems(opt.matching, partial(make_matcher, opt.matching),
                                             {row.digest: row.caption for row in rows}, latents)]
    asked = [*opt.problems(), *optim.problems(opt.optimizer), *publish.problems(opt.run)]
    refuse([*asked, *model_problems, *data_problems])
    return rows


if __name__ == "__main__":
    exit_with_message(main)
