"""What no single field can know: features not there yet, values that contradict each other, values nobody reads.

The rules see all values by flag. A trainer without a concern has no such flag, so every look-up allows for none.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from trainkit.errors import Problem
from trainkit.options.base import Flag, Value

Values = Mapping[str, Value]


def problems(flags: Iterable[Flag], values: Values, where: Mapping[str, str]) -> Iterator[Problem]:
    """What a run cannot honour; `where` is each flag's origin."""
    yield from _not_yet(flags, values, where)
    yield from _contradictions(values)


def _not_yet(flags: Iterable[Flag], values: Values, where: Mapping[str, str]) -> Iterator[Problem]:
    """One problem for each feature that is asked for and not there, naming all the flags that ask for it."""
    asked: dict[str, list[str]] = {}
    for flag in flags:
        feature = flag.note("not_yet")
        if feature and flag.name in values and values[flag.name] != flag.default:
            asked.setdefault(feature, []).append(flag.name)
    for feature, names in asked.items():
        listed = ", ".join(f"--{name}" for name in names)
        yield Problem(f"not yet: {feature} ({listed})", ", ".join(dict.fromkeys(where[name] for name in names)),
                      "this version cannot do it, and training as if it had not been asked for would be a guess",
                      f"run without {listed}")


def _contradictions(values: Values) -> Iterator[Problem]:
    """Values that cannot hold together."""
    if values.get("use_8bit_adam") and values.get("optimizer") == "prodigy":
        yield Problem("--use_8bit_adam with --optimizer prodigy", "--use_8bit_adam", "there is no 8-bit Prodigy",
                      "leave out one of the two")


def _is(flag: str, *wanted: Value) -> Callable[[Values], bool]:
    return lambda values: values.get(flag) in wanted


def _set(flag: str) -> Callable[[Values], bool]:
    return lambda values: bool(values.get(flag))


_CLASS = ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight", "sample_batch_size",
          "prior_generation_precision")
_PRODIGY = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
_PREVIEW = ("num_validation_images", "validation_epochs", "validation_steps")

READ_ONLY_WITH: tuple[tuple[tuple[str, ...], Callable[[Values], bool], str], ...] = (
    (_CLASS, _set("with_prior_preservation"), "--with_prior_preservation"),
    (_PRODIGY, _is("optimizer", "prodigy"), "--optimizer prodigy"),
    (_PREVIEW, _set("validation_prompt"), "--validation_prompt"),
    (("cached_crops",), _set("cache_latents"), "--cache_latents"),
    (("hub_model_id", "hub_token", "hub_private"), _set("push_to_hub"), "--push_to_hub"),
    (("lr_num_cycles",), _is("lr_scheduler", "cosine_with_restarts"), "--lr_scheduler cosine_with_restarts"),
    (("lr_power",), _is("lr_scheduler", "polynomial"), "--lr_scheduler polynomial"),
    (("num_train_epochs",), _is("max_train_steps", None), "no --max_train_steps"),
    (("validation_epochs",), _is("validation_steps", None), "no --validation_steps"),
)


def notices(values: Values, chosen: Container[str]) -> Iterator[str]:
    """What the user should know though nothing is wrong: flags among `chosen` that are read only with another one."""
    for names, is_read, condition in READ_ONLY_WITH:
        for name in names:
            if name in chosen and not is_read(values):
                yield f"--{name} has no effect: it is read only with {condition}"
    if values.get("enable_xformers_memory_efficient_attention"):
        yield ("--enable_xformers_memory_efficient_attention: PyTorch's scaled_dot_product_attention is used, which is "
               "memory-efficient too")
