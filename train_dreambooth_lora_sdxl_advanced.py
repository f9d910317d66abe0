"""Train an SDXL LoRA on a few images of a style, an object or a person (DreamBooth).

    python train_dreambooth_lora_sdxl_advanced.py \\
      --pretrained_model_name_or_path=assets/tiny-sdxl-icons --instance_data_dir=assets/icons-3d \\
      --instance_prompt="3d icon in the style of TOK" --resolution=64 --rank=8 \\
      --optimizer=prodigy --learning_rate=1.0 --snr_gamma=5.0 --max_train_steps=400 --output_dir=runs/icons

The trainer accepts the command lines of the Diffusers script of the same name. `--print_config` shows every value and
where it came from. docs/flags.md explains every flag. docs/differences.md lists the differences from the Diffusers
script.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from trainkit.errors import exit_with_message, refuse
from trainkit.options import (
    CaptionOptions,
    DataOptions,
    FourierOptions,
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
from trainkit.process import own_settings, say

if TYPE_CHECKING:
    from trainkit.data.rows import Rows


class Options(OptionSet):
    """Everything that can be set for this trainer, one concern a field."""

    model: ModelOptions
    data: DataOptions
    captions: CaptionOptions
    prior: PriorOptions
    text: TextOptions
    pivotal: PivotalOptions
    lora: LoraOptions
    objective: ObjectiveOptions
    fourier_loss: FourierOptions
    optimizer: OptimizerOptions
    precision: PrecisionOptions
    validation: ValidationOptions
    run: RunOptions


@own_settings()
def main(argv: list[str] | None = None) -> None:
    opt = parse(Options, argv, description=__doc__)  # frozen; --help and --print_config end here
    announce(opt)  # --plan ends here
    from trainkit import checkpoints, lora_files, preview, publish, run_fingerprint, summary
    from trainkit.conditioning import caption_length, live_text, new_tokens
    from trainkit.data import cache, caption_changes, class_images, loader, sampler
    from trainkit.diffusion import ScheduleChange, make_noise
    from trainkit.families import sdxl
    from trainkit.losses.passes import Passes, always, plain_objective
    from trainkit.run import start_run
    from trainkit.training.step import TrainStep
    from trainkit.training.trainables import make_trainables

    instances = preflight(opt)  # every problem in one message
    with start_run(opt, "dreambooth-lora-sdxl") as run:
        total, stop = opt.run.ends(instances.per_epoch, run.world)  # finished steps of the run, and of this session
        summary.log_plan(opt, instances, run, steps=total, class_images=opt.prior.images)
        rows = [*instances, *class_images.class_rows(opt, run)]  # of its class with the prior, generated where missing
        stream = sampler.make_order(rows, run.global_batch, batch_size=opt.run.train_batch_size, seed=run.seed)
        new_tokens.warn(opt.pivotal, rows)
        captions = caption_changes.make_changes(opt.captions, rows, seed=run.seed, live=live_text.reads_anew(opt.text))

        # The frozen model. Prompts become conditioning (cached, by new tokens or by LoRA), images become latents.
        family = sdxl.load(opt.model, device=run.device, weight_dtype=run.weight_dtype, compat=opt.run.compat,
                           schedule=ScheduleChange.from_options(opt.objective), max_chunks=opt.captions.max_chunks)
        store = cache.open_store(opt.data.latent_cache_dir, run.out_dir)
        text = live_text.make_text(family, captions.announced(rows), store, progress=run.show_task, text=opt.text,
                                   also=preview.preview_prompts(opt.validation), lora=opt.lora, total=total,
                                   pivotal=opt.pivotal, seed=run.seed,
                                   gradient_checkpointing=opt.precision.gradient_checkpointing)
        caption_length.warn_cut(rows, text.rewrite, family, captions.examples, opt.validation.validation_prompt)
        images = loader.ready_images(rows, opt.data, family, store, seed=run.seed, progress=run.show_task,
                                     num_workers=opt.run.dataloader_num_workers, captions=captions)

        # Everything that learns: adapters on the network, and what trains in the text encoders.
        lora, optimizer = make_trainables(opt, family, text, run, keep_vae=images.live, total_steps=total)

        # One forward pass a step: noise to a drawn level, ask the network, weigh the error.
        plain, memories = plain_objective(opt.objective, opt.fourier_loss, family.schedule, total_steps=total,
                                          note=run.note, compat=opt.run.compat)
        passes = Passes(always(plain), memories)
        train_step = TrainStep(family, text, make_noise(opt.objective), passes, run.autocast)

        # Previews, and checkpoints: a killed run goes on from them, and each holds the LoRA of its step.
        previews = preview.Previews(
            family, opt.validation, text, run.out_dir, seed=run.seed, resolution=opt.data.resolution,
            every=opt.validation.every(stream.steps_per_epoch), averaged=optimizer.averaged)
        exports = lora_files.LoraFiles(opt.run, family, lora, text, num_images=instances.account.images,
                                       averaged=optimizer.averaged)
        saves = checkpoints.Checkpoints(
            run.out_dir, keep=opt.run.checkpoints_total_limit, every=opt.run.checkpointing_steps,
            after_last=opt.run.compat != "diffusers", exports=exports,
            fingerprint=run_fingerprint.fingerprint(opt, rows, family, run, total), adapters=lora, text=text,
            passes=passes, optimizer=optimizer, run=run)
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


def preflight(opt: Options) -> Rows:
    """The rows to train on; or one message with everything that is wrong, before a weight is loaded."""
    from trainkit import checkpoints, optim, preflight, publish
    from trainkit.conditioning import new_tokens
    from trainkit.data import class_images
    from trainkit.data.rows import read_rows
    from trainkit.families import sdxl
    from trainkit.runtime import ranks

    preflight.leave_out_unused(opt.optimizer)
    ranks.join(os.environ)  # several processes share out the decoding of images
    model = preflight.check_model(opt, sdxl)
    rows, data_problems = read_rows(opt.data, opt.captions, compat=opt.run.compat, prior=opt.prior)
    option_problems = [*opt.problems(), *optim.problems(opt.optimizer), *publish.problems(opt.run),
                       *checkpoints.problems(opt.run)]
    token_problems = new_tokens.problems(opt.pivotal, [caption for row in rows for caption in row.all_captions])
    refuse([*option_problems, *model.problems, *data_problems, *class_images.problems(opt), *token_problems,
            *preflight.output_problems(opt)])
    return rows


if __name__ == "__main__":
    exit_with_message(main)
