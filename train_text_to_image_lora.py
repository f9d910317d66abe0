"""Train a LoRA for Stable Diffusion 1.x, 2.x or SDXL on images with captions.

    python train_text_to_image_lora.py \\
      --pretrained_model_name_or_path=assets/tiny-sd-icons --train_data_dir=assets/icons-3d \\
      --resolution=64 --rank=4 --train_batch_size=4 --learning_rate=1e-3 --snr_gamma=5.0 \\
      --max_train_steps=300 --output_dir=runs/captioned

The trainer accepts the command lines of two Diffusers scripts: the one of the same name, and its version for SDXL. It
finds out from the model folder which model it is. `--print_config` shows every value and where it came from.
docs/flags.md explains every flag. docs/differences.md lists the differences from the Diffusers scripts.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from trainkit.errors import exit_with_message, refuse
from trainkit.options import (
    CaptionedDataOptions,
    CaptionedOptimizerOptions,
    CaptionedPrecisionOptions,
    CaptionedRunOptions,
    CaptionedTextOptions,
    CaptionedValidationOptions,
    CaptionOptions,
    FourierOptions,
    GuidanceOptions,
    LoraOptions,
    MatchingOptions,
    ModelOptions,
    ObjectiveOptions,
    OptionSet,
    parse,
)
from trainkit.process import own_settings, say

if TYPE_CHECKING:
    from types import ModuleType

    from trainkit.data.rows import Rows


class Options(OptionSet):
    """Everything that can be set for this trainer, one concern a field."""

    model: ModelOptions
    data: CaptionedDataOptions
    captions: CaptionOptions
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


@own_settings()
def main(argv: list[str] | None = None) -> None:
    opt = parse(Options, argv, description=__doc__)  # frozen; --help and --print_config end here
    announce(opt)  # --plan ends here
    from trainkit import checkpoints, families, lora_files, preview, publish, run_fingerprint, summary
    from trainkit.conditioning import caption_length, clip_token, live_text
    from trainkit.data import cache, caption_changes, loader, sampler
    from trainkit.diffusion import ScheduleChange, make_noise
    from trainkit.losses.matching_term import make_passes
    from trainkit.losses.passes import plain_objective
    from trainkit.run import start_run
    from trainkit.training.step import TrainStep
    from trainkit.training.trainables import make_trainables

    family_module = families.of(opt.model)  # SD 1.x and 2.x, or SDXL: what the file or folder holds
    rows = preflight(opt, family_module)  # every problem in one message
    with start_run(opt, "text-to-image-lora") as run:
        total, stop = opt.run.ends(rows.per_epoch, run.world)  # finished steps of the run, and of this session
        summary.log_plan(opt, rows, run, steps=total)
        stream = sampler.make_order(rows, run.global_batch, batch_size=opt.run.train_batch_size, seed=run.seed)
        captions = caption_changes.make_changes(opt.captions, rows, seed=run.seed, live=live_text.reads_anew(opt.text))
        # The frozen model. Prompts become conditioning (cached, or by LoRA on the encoders), images become latents.
        family = family_module.load(opt.model, device=run.device, weight_dtype=run.weight_dtype, compat=opt.run.compat,
                           schedule=ScheduleChange.from_options(opt.objective), max_chunks=opt.captions.max_chunks)
        token = clip_token.make_clip_token(opt.guidance, rows, family, captions)  # the image's own, where asked for
        store = cache.open_store(opt.data.latent_cache_dir, run.out_dir)
        text = live_text.make_text(family, captions.announced(rows), store, progress=run.show_task, text=opt.text,
                                   also=preview.preview_prompts(opt.validation), lora=opt.lora, total=total,
                                   seed=run.seed, gradient_checkpointing=opt.precision.gradient_checkpointing)
        caption_length.warn_cut(rows, text.rewrite, family, captions.examples, opt.validation.validation_prompt)
        images = loader.ready_images(rows, opt.data, family, store, seed=run.seed, progress=run.show_task,
                                     num_workers=opt.run.dataloader_num_workers, captions=captions)

        # Everything that learns: adapters on the network, and what trains in the text encoders.
        lora, optimizer = make_trainables(opt, family, text, run, keep_vae=images.live, total_steps=total)

        # The forward passes of a step: one, or with distribution matching as its mode says.
        plain, memories = plain_objective(opt.objective, opt.fourier_loss, family.schedule, total_steps=total,
                                          note=run.note)  # --compat or not: levels and loss are as in Diffusers' own
        passes = make_passes(opt.matching, plain, seed=run.seed, snr_gamma=opt.objective.capped_gamma,
                             together=opt.run.train_batch_size * run.world, memories=memories)
        train_step = TrainStep(family, text, make_noise(opt.objective), passes, run.autocast,
                               adds=(token,) if token else ())

        # Previews, and checkpoints: a killed run goes on from them, and each holds the LoRA of its step.
        previews = preview.Previews(
            family, opt.validation, text, run.out_dir, seed=run.seed, resolution=opt.data.resolution,
            every=opt.validation.every(stream.steps_per_epoch), averaged=optimizer.averaged)
        exports = lora_files.LoraFiles(opt.run, family, lora, text, num_images=rows.account.images,
                                       averaged=optimizer.averaged)
        saves = checkpoints.Checkpoints(
            run.out_dir, keep=opt.run.checkpoints_total_limit, every=opt.run.checkpointing_steps,
            after_last=opt.run.compat != "diffusers", exports=exports,
            fingerprint=run_fingerprint.fingerprint(opt, rows, family, run, total, **(token.identity if token else {})),
            adapters=lora, text=text, passes=passes, optimizer=optimizer, run=run)
        start = saves.resume(opt.run.resume_from_checkpoint, stop=stop)
        batches = loader.micro_batches(images, stream, run.shard, start_step=start, stop_step=stop,
                                       num_workers=opt.run.dataloader_num_workers)
        run.train(train_step, batches, optimizer, text, saves, previews, start=start, stop=stop, total=total)
        if stop == total:
            publish.publish(opt.run, exports)


def announce(opt: Options) -> None:
    """Say what comes; or with --plan print it and end the program, with exit code 4 where nothing makes the run fit."""
    if opt.run.plan is None:
        say("loading PyTorch and Diffusers, then the model and the images")
        return
    from trainkit.plan import report

    sys.exit(report.show(opt, opt.run.plan))


def preflight(opt: Options, family_module: ModuleType) -> Rows:
    """The rows to train on; or one message with everything that is wrong, before a weight is loaded."""
    from trainkit import checkpoints, optim, preflight, publish
    from trainkit.conditioning import clip_token
    from trainkit.data.rows import read_rows
    from trainkit.losses import matching_term
    from trainkit.runtime import ranks

    preflight.leave_out_unused(opt.optimizer)
    ranks.join(os.environ)  # several processes share out the decoding of images
    model = preflight.check_model(opt, family_module)
    rows, data_problems = read_rows(opt.data, opt.captions, seed=opt.run.seed, compat=opt.run.compat)
    captions = {row.digest: row.caption for row in rows if not row.is_class}
    input_problems = [] if model.latents is None else [
        *clip_token.problems(opt.guidance, rows, model.text_width),
        *matching_term.problems(opt.matching, captions, model.latents)]
    option_problems = [*opt.problems(), *optim.problems(opt.optimizer), *publish.problems(opt.run),
                       *checkpoints.problems(opt.run)]
    refuse([*option_problems, *model.problems, *input_problems, *data_problems, *preflight.output_problems(opt)])
    return rows


if __name__ == "__main__":
    exit_with_message(main)
