"""What takes all values to say: which contradict each other, which nobody reads, what trains how long.

What a flag is read with, its field says (`read_with`); contradictions are spelled out here. A trainer without a concern
has no such flag, so every look-up allows for none.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

from trainkit.errors import Problem
from trainkit.options.base import Flag, Value
from trainkit.options.dataset_config import read_dataset_config
from trainkit.options.inputs import MASK_FLAGS
from trainkit.options.matching import MatchingOptions
from trainkit.options.objective import SNR_CAPPED
from trainkit.options.optimizer import EIGHT_BIT, averages_weights, estimates_step
from trainkit.options.sizes import bucket_limit, sides_of, size_of

Values = Mapping[str, Value]


def problems(values: Values) -> Iterator[Problem]:
    """Values that cannot hold together, or not without another."""
    yield from _without_class(values)
    yield from _other_optimizer(values)
    yield from _other_adapter(values)
    if not values.get("dataset_config"):  # else each source has limits of its own
        yield from bucket_problems(values)
    yield from _unclear_masks(values)
    if values.get("train_text_encoder") and values.get("train_text_encoder_ti"):
        yield Problem(
            "--train_text_encoder with --train_text_encoder_ti", "--train_text_encoder, --train_text_encoder_ti",
            "new embeddings are learned for text encoders that stay as they are: encoders that change at the same time "
            "would take their meaning away", "leave out one of the two")
    yield from _untrained_text(values)
    yield from _idle_steps(values)
    yield from _unclear_objective(values)
    yield from _perturbed(values)
    yield from _idle_fourier(values)
    if _matches(values):
        yield from _unclear_matching(values)


def bucket_problems(values: Values) -> Iterator[Problem]:
    """Limits that leave no bucket of the size of --resolution."""
    if not values.get("enable_bucket"):
        return
    step, low = (int(str(values[name])) for name in ("bucket_reso_steps", "min_bucket_reso"))
    flag = "resolutions" if values["resolutions"] else "resolution"
    given, where = str(values[flag]), f"--{flag} {values[flag]}"
    sizes = [(side, side) for side in sides_of(given)] if values["resolutions"] else [size_of(given)]
    limit, compat = values["max_bucket_reso"], values.get("compat")
    high = bucket_limit(int(str(limit)) if limit is not None else None, sizes, str(compat))
    squares = [math.isqrt(math.prod(size)) // step * step for size in sizes]
    if min(squares) < step:
        yield Problem(f"--bucket_reso_steps {step} is more than a side of --{flag} {given}", where,
                      "the sides of a bucket are multiples of it", "--bucket_reso_steps 64, or a larger resolution")
    elif values.get("bucket_no_upscale"):
        return
    elif low > high:
        yield Problem(f"--min_bucket_reso {low} is more than --max_bucket_reso {high}",
                      "--min_bucket_reso, --max_bucket_reso", "no side of a bucket lies between them",
                      f"--min_bucket_reso {min(squares) // 2} --max_bucket_reso {2 * max(squares)}")
    elif low > min(squares):
        yield Problem(f"--min_bucket_reso {low} is more than --{flag} {given}", where,
                      f"a square bucket has {min(squares)} px a side there", f"--min_bucket_reso {min(squares) // 2}")
    elif high < max(squares):
        yield Problem(f"--max_bucket_reso {high} is less than --{flag} {given}", where,
                      f"a square bucket has {max(squares)} px a side there", f"--max_bucket_reso {2 * max(squares)}")


def _unclear_masks(values: Values) -> Iterator[Problem]:
    """Masks from two places or from none, and a loss that has no places to weigh."""
    if values.get("alpha_mask") and values.get("conditioning_data_dir"):
        yield Problem("--alpha_mask with --conditioning_data_dir", "--alpha_mask, --conditioning_data_dir",
                      "an image has one mask: its own transparency, or a file of the folder",
                      "leave out one of the two")
    masked = next((f"--{flag}" for flag in MASK_FLAGS if values.get(flag)), "")
    if masked and values.get("dataset_name") and not values.get("alpha_mask"):
        yield Problem(f"{masked} with --dataset_name", f"{masked}, --dataset_name {values['dataset_name']}",
                      "masks are files named as images are, and images of a table have no names",
                      "--alpha_mask, or save the images into a folder")
    if not masked and _matches(values) and values.get("dataset_config"):
        config = read_dataset_config(Path(str(values["dataset_config"])))
        masked = next((f"{flag} in --dataset_config" for source in config.sources for flag in MASK_FLAGS
                       if source.images.get(flag)), "")
    if masked and _matches(values):
        strength = next(f"--{flag}" for flag in _STRENGTHS if values.get(flag))
        yield Problem(f"{strength} with {masked}", f"{strength}, {masked}",
                      "distribution matching compares whole images with one another, and each mask leaves another part",
                      "leave out one of the two")


def _unclear_objective(values: Values) -> Iterator[Problem]:
    """What says too little or two things about noise levels and weights."""
    weighting, first, end = values.get("loss_weighting"), values.get("min_timestep"), values.get("max_timestep")
    if weighting in SNR_CAPPED and not values.get("snr_gamma"):
        yield Problem(f"--loss_weighting {weighting} without --snr_gamma", f"--loss_weighting {weighting}",
                      "its gamma says from which SNR on samples count less", "add --snr_gamma 5, the paper's value")
    if values.get("edm_sigmas") and values.get("timestep_sampling"):
        yield Problem("--edm_sigmas with --timestep_sampling", "--edm_sigmas, --timestep_sampling",
                      "each is a distribution of the noise levels", "leave out one of the two")
    if isinstance(first, int) and isinstance(end, int) and first >= end:
        yield Problem(f"no timestep from --min_timestep {first} to below --max_timestep {end}", "--max_timestep",
                      "the last timestep is not drawn itself", f"--max_timestep {first + 1} or more")


def _idle_fourier(values: Values) -> Iterator[Problem]:
    """A fraction to be held by a weight of 0."""
    if values.get("fourier_target_share") and _weighs_nothing(values):
        yield Problem("--fourier_target_share with --fourier_weight 0", "--fourier_weight 0",
                      "it is held by a factor on the weight", "leave out one of the two")


def _perturbed(values: Values) -> Iterator[Problem]:
    """Terms on x0, which cannot be read back from an input with noise that the target does not know."""
    terms = {f"--{_STRENGTHS[0] if values.get('dist_match') else _STRENGTHS[1]}": _matches(values),
             "--fourier_space x0": _has_fourier(values) and values.get("fourier_space") == "x0"}
    for term in [name for name, there in terms.items() if there and values.get("input_perturbation")]:
        yield Problem(f"--input_perturbation with {term}", "--input_perturbation",
                      "x0 read back from a perturbed input has the perturbation in it, so the term would ask for "
                      "another output than the loss", "leave out one of the two")


def _unclear_matching(values: Values) -> Iterator[Problem]:
    """What the strength of distribution matching has to agree about; what its loss cannot compute, the loss says."""
    statistic = values.get("dist_match_statistic")
    flag, other = _STRENGTHS if values.get("dist_match") else _STRENGTHS[::-1]
    if values.get("dist_match") and values.get("dist_match_gain"):
        yield Problem("--dist_match with --dist_match_gain", "--dist_match, --dist_match_gain",
                      "each is the strength of one and the same term: of its sum form, or of its unbiased form",
                      "leave out one of the two")
    elif statistic is not None and statistic not in _STATISTICS[flag]:
        yield Problem(f"--dist_match_statistic {statistic} with --{flag}", "--dist_match_statistic",
                      f"--{flag} is the strength of {' or '.join(_STATISTICS[flag])}, --{other} that of {statistic}",
                      f"--{other} instead of --{flag}, or leave out --dist_match_statistic")
    changing = [f"--{name}" for name in _CHANGES_CAPTIONS if values.get(name)]
    if values.get("dist_match_kernel") == "class" and changing:
        yield Problem(f"--dist_match_kernel class with {changing[0]}", f"--dist_match_kernel, {', '.join(changing)}",
                      "a class is made of the images with the same caption, and captions differ at every visit",
                      "--dist_match_kernel text, or leave out the other flag")


def _other_optimizer(values: Values) -> Iterator[Problem]:
    """What the chosen optimizer makes meaningless."""
    optimizer = str(values.get("optimizer"))
    if values.get("use_8bit_adam") and optimizer not in {*EIGHT_BIT, *EIGHT_BIT.values()}:
        yield Problem(f"--use_8bit_adam with --optimizer {optimizer}", "--use_8bit_adam",
                      "only adamw and paged_adamw have an 8-bit form", "leave out one of the two")
    if values.get("use_ema") and averages_weights(optimizer):
        yield Problem(f"--use_ema with --optimizer {optimizer}", "--use_ema",
                      "a schedule-free optimizer averages its weights already", "leave out --use_ema")
    if values.get("train_text_encoder_ti") and values.get("token_std_pull") and averages_weights(optimizer):
        yield Problem(f"--token_std_pull {values['token_std_pull']:g} with --optimizer {optimizer}", "--token_std_pull",
                      "a schedule-free optimizer keeps its weights twice, and a pull on one of the two would part them",
                      "--token_std_pull 0")
    if estimates_step(optimizer) and values.get("loraplus_lr_ratio") not in (None, 1.0):
        yield Problem(f"--loraplus_lr_ratio with --optimizer {optimizer}", "--loraplus_lr_ratio",
                      "an optimizer that estimates its own step size would undo the ratio between the two rates",
                      "leave out one of the two")


_LYCORIS = {  # with --lora_type loha and lokr
    "use_dora": "PEFT has no DoRA for them", "use_rslora": "their files state the scale as alpha / r",
    "lora_dropout": "PEFT drops the inputs of LoRA layers only",
    "loraplus_lr_ratio": "they have no A and B to give two rates to",
}
_STARTED = {  # with --init_lora_weights pissa and olora
    "use_dora": "DoRA's magnitudes are those of the weight, not of what such a start leaves of it",
    "lora_dropout": "with inputs dropped the start would not be the base model",
    "network_weights": "each is where A and B start",
}


def _other_adapter(values: Values) -> Iterator[Problem]:
    """What the chosen kind of adapter, its start or its blocks cannot be combined with."""
    adapter_type, start = values.get("lora_type", "lora"), values.get("init_lora_weights", "gaussian")
    switched_on = dict(values) | {"loraplus_lr_ratio": values.get("loraplus_lr_ratio", 1.0) != 1.0}
    clashes = {("lora_type", adapter_type): _LYCORIS if adapter_type != "lora" else {},
               ("init_lora_weights", start): _STARTED if start != "gaussian" else {}}
    for (flag, value), reasons in clashes.items():
        yield from (Problem(f"--{flag} {value} with --{other}", f"--{other}", why, "leave out one of the two")
                    for other, why in reasons.items() if switched_on.get(other))
    if start != "gaussian" and adapter_type != "lora":
        yield Problem(f"--init_lora_weights {start} with --lora_type {adapter_type}", "--init_lora_weights",
                      "PiSSA and OLoRA are starts of A and B", "leave out one of the two")
    if start != "gaussian" and str(values.get("lora_layers")).endswith("+conv"):
        yield Problem(f"--init_lora_weights {start} with convolutions", f"--lora_layers {values['lora_layers']}",
                      "PiSSA and OLoRA decompose a matrix", f"--lora_layers {str(values['lora_layers'])[:-5]}")
    if values.get("use_blora") and values.get("lora_unet_blocks") is not None:
        yield Problem("--use_blora with --lora_unet_blocks", "--lora_unet_blocks",
                      "B-LoRA is a choice of blocks, too: SDXL's two of content and style", "leave out one of the two")
    if values.get("dim_from_weights"):
        yield from (Problem(f"--dim_from_weights with --{other}", f"--{other}", "the file says the ranks and alphas",
                            "leave out one of the two")
                    for other in ("lora_rank_pattern", "lora_alpha_pattern") if values.get(other))
    if values.get("lokr_factor") == 0:
        yield Problem("--lokr_factor 0", "--lokr_factor", "no matrix has a side of 0", "--lokr_factor 8, or -1")


def _untrained_text(values: Values) -> Iterator[Problem]:
    """Text that is to be trained in none of the steps."""
    for part, what in {"train_text_encoder": "adapters", "train_text_encoder_ti": "embeddings"}.items():
        if values.get(part) and values.get(f"{part}_frac") == 0:
            yield Problem(f"--{part} with --{part}_frac 0", f"--{part}_frac 0", f"the {what} would never be trained",
                          f"a fraction above 0, or leave out --{part}")


def trained_fractions(values: Values) -> dict[str, float]:
    """The fraction of the steps in which each part trains, by its flag: the UNet, and text where it is trained."""
    parts = [part for part in ("train_text_encoder", "train_text_encoder_ti") if values.get(part)]
    flags = ["train_unet_frac", *(f"{part}_frac" for part in parts)]
    return {flag: float(values.get(flag, 1.0) or 0) for flag in flags}


def _idle_steps(values: Values) -> Iterator[Problem]:
    """Fractions of the run that together leave its last steps with nothing to train."""
    parts = trained_fractions(values)
    longest = max(parts, key=lambda flag: parts[flag])
    if parts[longest] < 1:
        yield Problem(f"nothing would be trained after {parts[longest]:.0%} of the steps",
                      ", ".join(f"--{flag} {fraction:g}" for flag, fraction in parts.items()),
                      "each is the fraction of the steps in which that part is trained", f"--{longest} 1")


def _without_class(values: Values) -> Iterator[Problem]:
    """What prior preservation cannot do without."""
    needed = {"class_data_dir": "FOLDER", "class_prompt": "'a photo of a dog'"}
    for flag, example in needed.items():
        if values.get("with_prior_preservation") and not str(values.get(flag) or "").strip():
            yield Problem(f"--with_prior_preservation without --{flag}", "--with_prior_preservation",
                          "images of the class are read from a folder and, where missing, generated from the prompt",
                          f"add --{flag} {example}")


def _matches(values: Values) -> bool:
    """Whether there is a term of distribution matching."""
    return MatchingOptions.of(values).active


def _has_fourier(values: Values) -> bool:
    """Whether there is a Fourier term."""
    return values.get("loss_type") == "fourier"


def _weighs_nothing(values: Values) -> bool:
    """Whether there is a Fourier term whose weight is 0, as the loss computes, in fp32."""
    return _has_fourier(values) and float(values.get("fourier_weight") or 0) < _LEAST_FP32


def _trains_text(values: Values) -> bool:
    return bool(values.get("train_text_encoder") or values.get("train_text_encoder_ti"))


_CHANGES_CAPTIONS = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard", "caption_dropout_rate",
                     "caption_dropout_every_n_epochs")
_STRENGTHS = ("dist_match", "dist_match_gain")
_STATISTICS = {"dist_match": ("sum", "diagonal"), "dist_match_gain": ("u",)}
_LEAST_FP32 = 2.0**-149  # above 0
_HARMLESS_DECAY = 1e-3  # times a rate of 1e-4: a ten-thousandth in a thousand steps


def unread(values: Values, flags: Mapping[str, Flag]) -> Iterator[tuple[str, str]]:
    """Those of `flags` that have no effect beside these values, each with what it would be read with.

    A flag without a value has its default.
    """
    complete = {name: flag.default for name, flag in flags.items()} | dict(values)
    for name, flag in flags.items():
        missing = next((needed for needed in flag.prerequisites if not needed.holds(complete)), None)
        if missing:
            yield name, missing.words(complete)


def notices(values: Values, flags: Mapping[str, Flag], chosen: Container[str], given: Container[str]) -> Iterator[str]:
    """What the user should know though nothing is wrong.

    flags   all of the trainer
    chosen  flags the user gave another value than the default; some are read only with another flag
    given   flags that any source gave a value, be it the default's
    """
    for name, condition in unread(values, flags):
        if name in chosen:
            yield f"--{name} has no effect: it is read only with {condition}"
    has_own_rate = values.get("text_encoder_lr") is not None
    if (_trains_text(values) and has_own_rate and estimates_step(str(values.get("optimizer")))
            and "text_encoder_lr" not in given):
        yield (f"--text_encoder_lr is at its default, which means nothing to --optimizer {values['optimizer']}: "
               f"the rate of the UNet, {values['learning_rate']:g}, is used")
    yield from _shrinking_base(values)
    if _weighs_nothing(values):
        yield (f"--fourier_weight {values['fourier_weight']:g} with --loss_type fourier is no term at all: the loss is "
               f"--fourier_base_loss {values['fourier_base_loss']} alone")
    for name, flag in flags.items():
        if flag.facts.notice and values.get(name):
            yield f"--{name}: {flag.facts.notice}"


def _shrinking_base(values: Values) -> Iterator[str]:
    """Weight decay that reaches what holds a part of the base: DoRA's m, and A and B that start at its directions."""
    start = values.get("init_lora_weights", "gaussian")
    flag = "--use_dora" if values.get("use_dora") else f"--init_lora_weights {start}" if start != "gaussian" else ""
    decay = float(values.get("adam_weight_decay") or 0)
    if flag and decay > _HARMLESS_DECAY:
        yield (f"--adam_weight_decay {decay:g} with {flag} decays the base model's own part of the weights, too: "
               f"--adam_weight_decay 0 leaves it alone")
