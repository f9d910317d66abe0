"""The difference of two base models as a LoRA: tensor by tensor, so that no network is in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.adapters.updates import LowRank
from trainkit.errors import Problem, UserError, refuse
from trainkit.families.file_names import FileNames, ModulePlace, stripped
from trainkit.families.pretrained import Repo
from trainkit.lora_file import LayerUpdate, LoraFile
from trainkit.lora_file.spectrum import cut, svd_of

UNUSED = re.compile(r"position_ids$|logit_scale$")  # of old files; no program reads them
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
# Modules that kohya's trainer and all programs have in LoRA files. Source: kohya-ss/sd-scripts, networks/lora.py
ATTENTION = re.compile(r"\.attentions\.\d+\.(?!norm)(?!.*\.norm)|^encoder\.layers\.\d+\.(self_attn|mlp)\.")
CONVOLUTIONS = re.compile(r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|\.(down|up)samplers\.0\.conv$")


@dataclass(frozen=True)
class ExtractSettings:
    """What to extract.

    rank, conv_rank  of attention layers and of text encoders; of resnets and samplers, None: these are left out
    clamp            the quantile of the factors' entries beyond which they are cut off; 1: none are
    min_diff         a module whose entries changed by no more is left out
    """

    rank: int
    conv_rank: int | None = None
    clamp: float = 1.0
    min_diff: float = 0.0

    def rank_of(self, path: str) -> int | None:
        """The rank of a module; None: it is left out."""
        if ATTENTION.search(path):
            return self.rank
        return self.conv_rank if CONVOLUTIONS.search(path) else None


@dataclass
class Coverage:
    """‖change‖² of all tensors of the networks, of those that the LoRA is for, and what of it is lost in these."""

    whole: float = 0.0
    chosen: float = 0.0
    lost: float = 0.0

    @property
    def covered(self) -> float:
        """The part of the change that lies in modules of the LoRA, by norms' squares."""
        return self.chosen / self.whole if self.whole else 0.0

    @property
    def error(self) -> float:
        """‖what is lost‖ / ‖change‖ in the modules of the LoRA."""
        return (self.lost / self.chosen) ** 0.5 if self.chosen else 0.0


def names_of_both(base: Repo, tuned: Repo) -> list[tuple[str, str, str]]:
    """Network, and the name of each tensor in the base's and in the other's files, which may lack "text_model".

    UserError: they are of different architectures.
    """
    found = []
    for network in NETWORKS:
        one, other = ({stripped(name): name for name in model.tensor_names(network) if not UNUSED.search(name)}
                      for model in (base, tuned))
        for model, names, others in ((base, one, other), (tuned, other, one)):
            if missing := sorted(others.keys() - names.keys()):
                raise UserError(other_architecture(model, f"its {network} has no {missing[0]}, and the other model's "
                                                          f"has ({len(missing)} differ)"))
        found += [(network, one[name], other[name]) for name in sorted(one)]
    return found


def other_architecture(model: Repo, why: str) -> Problem:
    return model.problem("the two models are not of one architecture", why, "name a base model and a model that was "
                         "trained from it", kind="data")


def extract(base: Repo, tuned: Repo, settings: ExtractSettings, names: FileNames, show: Callable[[float], None]
            ) -> tuple[LoraFile, Coverage]:
    """The LoRA from `base` to `tuned`, and how much of the change is in it.

    show  is told how many of the tensors are done
    UserError: the models are of different architectures, or the same, or a tensor cannot be read.
    """
    layers: dict[ModulePlace, LayerUpdate] = {}
    account = Coverage()
    for k, (network, name, change) in enumerate(changes(base, tuned)):
        size = float(change.square().sum())
        account.whole += size
        path = stripped(name.removesuffix(".weight"))
        rank = settings.rank_of(path) if change.ndim in (2, 4) and name.endswith(".weight") else None
        if rank and float(change.abs().max()) > settings.min_diff:
            account.chosen += size
            layers[network, path], lost = layer_of(change, rank, settings.clamp)
            account.lost += lost
        show(k + 1)
    if not layers:
        refuse([tuned.problem("no layer of the two models differs", f"the weights of {base.path} are the same in all "
                              "layers that a LoRA is for", "name the model that was trained from the base model")])
    return LoraFile(layers, names=names), account


def changes(base: Repo, tuned: Repo) -> Iterator[tuple[str, str, Tensor]]:
    """Network, name and tuned − base in fp64 of each tensor."""
    from safetensors import SafetensorError

    for network, name, name_there in names_of_both(base, tuned):
        try:
            before, after = base.weight(network, name), tuned.weight(network, name_there)
        except (OSError, SafetensorError) as error:
            raise UserError(tuned.problem(f"{name} cannot be read", f"{error}", "copy both models again",
                                          kind="data")) from error
        assert before is not None and after is not None, "both have the name"
        if before.shape != after.shape:
            raise UserError(other_architecture(tuned, f"{name} is {list(after.shape)}, and {list(before.shape)} in "
                                                      f"{base.path}"))
        change = after.double() - before.double()
        if not change.isfinite().all():
            raise UserError(tuned.problem(f"{name} holds NaN or infinity", f"in the {network} of one of the two models",
                                          "copy or download it again", kind="data"))
        yield network, name, change


def layer_of(change: Tensor, rank: int, clamp: float) -> tuple[LayerUpdate, float]:
    """The best LoRA of a change [out,in] or [out,in,kernel] -> it, and ‖what is lost‖²."""
    matrix = change.flatten(1)
    product, lost = cut(svd_of(matrix), rank)
    if clamp < 1:
        product = clamped(product, clamp)
        lost = float((matrix - product.delta()).square().sum())
    return LayerUpdate(product, tuple(change.shape[2:])), lost


def clamped(product: LowRank, q: float) -> LowRank:
    """Factors without entries beyond the quantile q of their entries' sizes; torch.quantile refuses more than 2²⁴."""
    sizes = torch.cat([product.A.flatten(), product.B.flatten()]).abs()
    most = float(sizes.kthvalue(max(1, round(q * len(sizes)))).values)
    return LowRank(product.A.clamp(-most, most), product.B.clamp(-most, most))
