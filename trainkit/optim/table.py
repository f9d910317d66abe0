"""The table of optimizers, and any other class by its dotted path.

A new optimizer is a row in OPTIMIZERS, and its name among the choices of --optimizer.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError, refuse
from trainkit.optim.eight_bit import one_wait
from trainkit.optim.groups import ParamGroup, averages

if TYPE_CHECKING:
    from trainkit.options import OptimizerOptions

Arguments = dict[str, Any]  # of a constructor, by name
OURS = ("params", "lr")  # arguments of a constructor that only we give
WORDS = {"true": True, "false": False, "none": None}
RATE_FLAGS = {"unet": "--learning_rate", "unet.B": "--learning_rate, --loraplus_lr_ratio",
              "text_encoder_2": "--text_encoder_2_lr"}  # of groups by name; of all others it is --text_encoder_lr


class Word(str):
    """A text that was given without quotes."""


def no_arguments(o: OptimizerOptions, group: ParamGroup) -> Arguments:
    return {}


def adam(o: OptimizerOptions, group: ParamGroup) -> Arguments:
    return {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_epsilon}


def fused_adam(o: OptimizerOptions, group: ParamGroup) -> Arguments:
    """LoRA has hundreds of small tensors, so a step is mostly launches: fused is about 8 times faster."""
    places = ("cpu", "cuda", "mps", "xpu")
    fused = all(p.dtype == torch.float32 and p.device.type in places for p in group["params"])
    return adam(o, group) | {"fused": fused}


def prodigy(o: OptimizerOptions, group: ParamGroup) -> Arguments:
    """d starts at its own 1e-6, or at the group's `first_step`: from far too low, d never leaves a noisy gradient."""
    start = {"d0": group["first_step"]} if "first_step" in group else {}
    return adam(o, group) | start | {
        "beta3": o.prodigy_beta3, "decouple": o.prodigy_decouple, "use_bias_correction": o.prodigy_use_bias_correction,
        "safeguard_warmup": o.prodigy_safeguard_warmup}


def adafactor(o: OptimizerOptions, group: ParamGroup) -> Arguments:
    """No momentum, and the rate as it is: steps relative to a weight's size would hardly move LoRA's B away from 0."""
    return {"betas": (None, 0.999), "scale_parameter": False, "relative_step": False}


@dataclass(frozen=True)
class OptimizerEntry:
    """The class and what the flags give its constructor beside rate and decay; its own defaults hold for the rest."""

    path: str
    arguments: Callable[[OptimizerOptions, ParamGroup], Arguments] = no_arguments

    @property
    def package(self) -> str:
        """What must be installed; `pip install` knows it by the same name."""
        return self.path.partition(".")[0]


OPTIMIZERS = {
    # Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101
    "adamw": OptimizerEntry("torch.optim.AdamW", fused_adam),
    # Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861; small tensors keep 32 bits
    "adamw8bit": OptimizerEntry("bitsandbytes.optim.AdamW8bit", adam),
    # its state may leave the GPU for main memory: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3
    "paged_adamw": OptimizerEntry("bitsandbytes.optim.PagedAdamW", adam),
    "paged_adamw8bit": OptimizerEntry("bitsandbytes.optim.PagedAdamW8bit", adam),
    # Mishchenko & Defazio 2024, "Prodigy", arXiv:2306.06101, algorithm 4
    "prodigy": OptimizerEntry("trainkit.optim.Prodigy", prodigy),
    # Shazeer & Stern 2018, "Adafactor", arXiv:1804.04235
    "adafactor": OptimizerEntry("pytorch_optimizer.AdaFactor", adafactor),
    # Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675
    "lion": OptimizerEntry("pytorch_optimizer.Lion"),
    # Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", arXiv:2307.02047
    "came": OptimizerEntry("pytorch_optimizer.CAME"),
    # Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682
    "schedule_free_adamw": OptimizerEntry("pytorch_optimizer.ScheduleFreeAdamW", adam),
    # AdamW and what --optimizer_args switches on beside it; sources in trainkit/optim/hina
    "hina_adaptive": OptimizerEntry("trainkit.optim.HinaAdaptive", fused_adam),
}


def entry_of(o: OptimizerOptions) -> OptimizerEntry:
    return OptimizerEntry(o.algorithm) if o.is_class else OPTIMIZERS[o.algorithm]


def library(o: OptimizerOptions) -> str:
    """The package the optimizer comes from."""
    return entry_of(o).package


def make_inner(group: ParamGroup, o: OptimizerOptions) -> torch.optim.Optimizer:
    """The torch optimizer the options ask for, over one group, ready to train.

    Raises UserError for a class that is not there or is no optimizer, and for arguments it does not take.
    """
    optimizer_class = find_class(o)
    accepted = parameters_of(optimizer_class)  # name -> default
    given = read_arguments(o.optimizer_args or "")
    refuse(_argument_problems(optimizer_class, accepted, given))
    common = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    arguments: Arguments = {k: v for k, v in common.items() if k in accepted} | entry_of(o).arguments(o, group) | given
    if given.get("foreach") and "fused" not in given:
        arguments.pop("fused", None)  # our choice of a kernel, and the user has made another
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some constructors print, into our progress line
            params = parameters_for(optimizer_class, group)
            inner = optimizer_class([{"name": group["name"], "params": params}], **arguments)
    except (TypeError, ValueError, IndexError, ArithmeticError, AssertionError, RuntimeError) as error:
        flag = RATE_FLAGS.get(group["name"], "--text_encoder_lr")
        raise UserError(Problem(
            f"--optimizer {o.optimizer} refuses its arguments", f"group {group['name']}: --optimizer_args, {flag}",
            str(error),
            f"it was given {', '.join(f'{k}={v!r}' for k, v in arguments.items())}; change what it names")) from error
    if averages(inner):
        inner.train()
    return inner


def parameters_for(optimizer_class: type, group: ParamGroup) -> list[Tensor] | list[tuple[str, Tensor]]:
    """With names for a class that has WANTS_NAMES; others may take a tensor for nothing but a tensor."""
    named = getattr(optimizer_class, "WANTS_NAMES", False) and "names" in group
    return list(zip(group["names"], group["params"], strict=True)) if named else group["params"]


def find_class(o: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """The class the options mean. Raises UserError naming the pip command, or the nearest class."""
    path, package, flag = entry_of(o).path, entry_of(o).package, f"--optimizer {o.algorithm}"
    module_path, _, name = path.rpartition(".")
    try:
        importlib.import_module(package)
    except ImportError as error:
        ours = any(package == row.package for row in OPTIMIZERS.values())
        raise UserError(Problem(
            f"{flag} needs the package {package}", flag, f"it cannot be imported here ({error})",
            f"pip install {package}" if ours else "fix the path, or install what provides it")) from error
    try:
        optimizer_class = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise UserError(Problem(f"there is no {path}", flag, str(error), _nearest_class(package, name))) from error
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise UserError(Problem(f"{path} is no optimizer", flag, "it is not a subclass of torch.optim.Optimizer",
                                _nearest_class(package, name)))
    return one_wait(optimizer_class) if package == "bitsandbytes" else optimizer_class


def _nearest_class(package: str, name: str) -> str:
    place = "torch.optim" if package == "torch" else package
    found = importlib.import_module(place)
    classes = {k.lower(): k for k, v in vars(found).items() if isinstance(v, type)}
    near = difflib.get_close_matches(name.lower(), classes, n=3, cutoff=0.6)
    return "did you mean " + ", ".join(f"{place}.{classes[k]}" for k in near) + "?" if near else (
        "give the full path of an optimizer class, such as torch.optim.NAdam")


def parameters_of(optimizer_class: type) -> dict[str, object]:
    """The arguments that a class's constructor declares, with their defaults; what is in **kwargs does not count."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p.default for name, p in inspect.signature(optimizer_class).parameters.items() if p.kind in named}


def read_arguments(text: str) -> Arguments:
    """"momentum=0.9 betas=(0.9, 0.99)" -> its pairs. Raises UserError for what is no name=VALUE, or given twice."""
    found: Arguments = {}
    for part in filter(None, re.split(r"\s+(?=[A-Za-z_]\w*\s*=)", text.strip())):
        name, _, value = map(str.strip, part.partition("="))
        if not name.isidentifier():
            raise _unreadable(part, "it stands for no argument's name, which is written without dashes")
        if name in found:
            raise UserError(Problem(f"{name} is given twice", "--optimizer_args",
                                    "which of the two counts would be a guess", "remove one"))
        found[name] = _read_value(part, value)
    return found


def _read_value(part: str, value: str) -> object:
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        return Word(value) if value.isidentifier() else ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise _unreadable(part, "a value is a number, true, false, none, a word, a tuple, or text in quotes") from error


def _unreadable(part: str, why: str) -> UserError:
    return UserError(Problem(f"--optimizer_args cannot hold {part!r}", "--optimizer_args", why,
                             "--optimizer_args \"d_coef=0.5 betas=(0.9, 0.99) mode=fast\", for example"))


def decisive_arguments(o: OptimizerOptions) -> str | None:
    """What --optimizer_args come to, in order of their names: spellings of one run give one text.

    Presets are spelled out and numbers compared as numbers. Left out is what changes no bit of a run and what the class
    has by default, unless another flag has a say in it.
    """
    optimizer_class = find_class(o)
    defaults, free = parameters_of(optimizer_class), getattr(optimizer_class, "CHANGE_NO_BIT", ())
    flags = {"weight_decay", *entry_of(o).arguments(o, _ANY_GROUP)}
    given = getattr(optimizer_class, "spelled_out", dict)(read_arguments(o.optimizer_args or ""))
    counts = {name: _number(value) for name, value in sorted(given.items()) if name not in free and (
        name in flags or name not in defaults or _number(value) != _number(defaults[name]))}
    return " ".join(f"{name}={value}" for name, value in counts.items()) or None


_ANY_GROUP: ParamGroup = {"name": "", "params": [], "lr": 1.0, "weight_decay": 0.0, "first_step": 1.0}


def _number(value: object) -> object:
    """Numbers, in tuples too, as floats: 1 and 1.0 are one value."""
    if isinstance(value, tuple | list):
        return tuple(map(_number, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value


def _argument_problems(
    optimizer_class: type, accepted: Mapping[str, object], given: Mapping[str, object],
) -> Iterator[Problem]:
    class_name = optimizer_class.__name__
    if "lr" not in accepted:
        yield Problem(f"{class_name} takes no learning rate", "--optimizer",
                      "the rate follows --lr_scheduler, so its constructor must take lr", "choose another class")
    open_ones = [name for name in accepted if name not in OURS]
    unknown = [name for name in given if name not in open_ones]
    if unknown:
        why = _why_unknown(optimizer_class, set(unknown) - accepted.keys()) or f"it takes {', '.join(open_ones)}"
        yield Problem(f"{class_name} takes no {', '.join(unknown)} from --optimizer_args", "--optimizer_args", why,
                      "fix or remove it; --learning_rate gives lr")
    for name, value in given.items():
        default = accepted.get(name, "")
        if isinstance(value, Word) and not isinstance(default, str):
            wanted = "True or False" if isinstance(default, bool) else f"{default}, for example"
            yield Problem(f"{class_name} takes no word as {name}", f"--optimizer_args {name}={value}",
                          f"its default is {default}", f"--optimizer_args {name}={wanted}")


def _why_unknown(optimizer_class: type, names: Collection[str]) -> str:
    """What the class itself says to names that it does not take, if it says anything."""
    explain = getattr(optimizer_class, "why_unknown", lambda name: "")
    return "; ".join(f"{name}: {why}" for name in sorted(names) if (why := explain(name)))
