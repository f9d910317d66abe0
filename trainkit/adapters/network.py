"""The adapters of one network: what is trained, what a checkpoint keeps, the ΔW they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trainkit.adapters import patterns, starts, updates
from trainkit.adapters import targets as layer_targets
from trainkit.adapters.patterns import Blocks, Pattern
from trainkit.adapters.targets import Targets
from trainkit.adapters.updates import Update
from trainkit.errors import Problem, UserError, refuse
from trainkit.frozen_weights import frozen_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    from trainkit.optim import ParamGroup
    from trainkit.options import LoraOptions

NAME = "default"  # PEFT's name of our adapter
Prefix = Literal["unet", "text_encoder", "text_encoder_2"]
UNET: Prefix = "unet"
AdapterType = Literal["lora", "loha", "lokr"]


class Adapters:
    """The adapters of one network, in module order; without layers where nothing of it is trained.

    prefix    what Diffusers calls the network
    adapter_type  what ΔW is made of; see updates.py
    rank, alpha, scale  r, α and c of a layer that no pattern names; `rank_of` and `scale_of` know each layer's own
    b_ratio   how many times A's learning rate B learns with (LoRA+)
    factor    of LoKr
    rates     what the learning rate of layers is multiplied by, see patterns.py, which also explains `blocks`
    """

    def __init__(self, network: nn.Module, *, rank: int, alpha: float, prefix: Prefix = UNET,
                 adapter_type: AdapterType = "lora", scale: float | None = None, b_ratio: float = 1.0,
                 factor: int | None = None, rates: Pattern | None = None, blocks: Blocks | None = None):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network, self.prefix, self.adapter_type = network, prefix, adapter_type
        self.rank, self.alpha, self.b_ratio, self.factor = rank, alpha, b_ratio, factor
        self.scale = alpha / rank if scale is None else scale
        self.rates, self.blocks = rates or {}, blocks or {}
        self.layers: dict[str, BaseTunerLayer] = {
            path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}

    @property
    def decomposed(self) -> bool:
        """Whether the layers are DoRA's."""
        return any(self.magnitude(path) is not None for path in self.layers)

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """LoRA's A [r,in] and B [out,r] of the module at `path`, not scaled; a convolution's have a kernel, too."""
        layer = self.layers[path]
        return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Whatever PEFT trains in our layers, by its names without the adapter's: "<module path>.lora_A.weight"."""
        return {f"{path}.{name}": parameter for path, layer in self.layers.items()
                for name, parameter in starts.own_parameters(layer, NAME).items()}

    def groups(self, *, lr: float, weight_decay: float, stop: int | None = None) -> list[ParamGroup]:
        """Parameter groups for the optimizer: one; with a LoRA+ ratio the Bs have their own, and so has each key of
        --lora_lr_pattern; none without layers.

        Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354.
        """
        rates: dict[str, float] = {}
        members: dict[str, list[str]] = {}
        named = self.named_parameters()
        for name in named:
            group, rate = str(self.prefix), lr
            if (key := patterns.key_for(name, self.rates, self.blocks)) is not None:
                group, rate = f"{group}[{key}]", rate * self.rates[key]
            if self.b_ratio != 1 and name.endswith(".lora_B.weight"):
                group, rate = f"{group}.B", rate * self.b_ratio
            rates[group] = rate
            members.setdefault(group, []).append(name)
        return [{"name": group, "params": [named[n] for n in members[group]], "names": members[group],
                 "lr": rates[group], "weight_decay": weight_decay, "stop": stop} for group in sorted(members)]

    # ------------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as they are trained (B not scaled), by PEFT's names, and where PiSSA and OLoRA started."""
        started = {f"{path}.{name}": tensor for path, layer in self.layers.items()
                   for name, tensor in getattr(layer, "start", dict)().items()}
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()} | started

    @property
    def identity(self) -> dict[str, float | str]:
        return {"rank": self.rank, "alpha": self.alpha, "scale": self.scale, "kind": self.adapter_type}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, float | str]]:
        return self.state_dict(), self.identity

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor], data: Mapping[str, float | str]) -> None:
        """Continue from `pack`'s answer. Raises UserError where it belongs to other adapters."""
        expected = self.state_dict()
        shapes, other = ({n: tuple(t.shape) for n, t in d.items()} for d in (expected, tensors))
        if shapes != other or data != self.identity:
            raise UserError(Problem(
                "the checkpoint holds other adapters than this run", f"{len(other)} tensors, {dict(data)}",
                f"this run has {len(shapes)} tensors, {self.identity}",
                "resume with the rank, alpha, kind, layers and blocks of the first run, or name a new --output_dir"))
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])

    # ------------------------------------------------------------------------------------------------------------------
    # What was trained

    def rank_of(self, path: str) -> int:
        return self.layers[path].r[NAME]

    def scale_of(self, path: str) -> float:
        """c of one layer."""
        return self.layers[path].scaling[NAME]

    def shape(self, path: str) -> torch.Size:
        """[out,in] of one module's weight, or a convolution's [out,in,h,w]."""
        return frozen_weight(self.layers[path].get_base_layer()).shape

    def weight(self, path: str) -> Tensor:
        """The base's W of one module, as its layer computes with it -> [out,in] fp64 on the CPU."""
        return self.layers[path].get_base_layer().weight.detach().cpu().double().flatten(1)

    def update(self, path: str) -> Update:
        """The factors of one module, fp64 on the CPU, a convolution's kernel laid out in a row."""
        return update_of(self.layers[path], self.adapter_type, self.scale_of(path)).map(
            lambda t: t.detach().cpu().double())

    def magnitude(self, path: str) -> Tensor | None:
        """DoRA's m -> [out] fp32 on the CPU, None for the other kinds."""
        held = dict(getattr(self.layers[path], "lora_magnitude_vector", {}))
        return held[NAME].weight.detach().cpu().flatten() if NAME in held else None

    def delta_weight(self, path: str) -> Tensor:
        """What training added to the weight of one module -> [out,in] fp64 on the CPU."""
        delta, magnitude = self.update(path).delta(), self.magnitude(path)
        return delta if magnitude is None else updates.decomposed(self.weight(path), delta, magnitude.double())


def update_of(layer: BaseTunerLayer, adapter_type: AdapterType, scale: float) -> Update:
    """PEFT's parameters as the factors of `updates`."""
    if adapter_type == "lora":
        A, B = layer.low_rank() if hasattr(layer, "low_rank") else (
            layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
        return updates.LowRank(A.flatten(1), B.flatten(1), scale)
    held = {name: p.flatten(1) for name, p in starts.own_parameters(layer, NAME).items()}
    if adapter_type == "loha":
        B1, A1, B2, A2 = (held[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return updates.Hadamard(B1, A1, B2, A2, scale)
    return updates.Kronecker(
        C=held["lokr_w1"], B=held.get("lokr_w2_a"), A=held.get("lokr_w2_b"), D=held.get("lokr_w2"), scale=scale)


def add_adapters(network: UNet2DConditionModel | PreTrainedModel, options: LoraOptions, *, targets: Targets, seed: int,
                 prefix: Prefix = UNET, blocks: Blocks | None = None) -> Adapters:
    """Inject adapters into a frozen network; none into a UNet that is not to be trained (--train_unet_frac 0).

    targets  the family's table from --lora_layers to ends of module paths
    seed     decides the initial values together with the module's path
    blocks   how WebUIs number the UNet's blocks, for patterns
    Raises UserError for what the network has not got.
    """
    from trainkit import lean_lora

    in_unet, blocks = prefix == UNET, blocks or {}
    alpha = options.rank if options.lora_alpha is None else options.lora_alpha
    adapt = not (in_unet and options.train_unet_frac == 0)
    if adapt:
        refuse(layer_targets.problems(network, options, targets=targets, in_blocks=in_unet, blocks=blocks))
        modules = layer_targets.target_modules(network, options, targets=targets, in_blocks=in_unet)
        layer_sizes = patterns.sizes(options, modules, prefix, blocks)
        with smaller_factor_first():
            network.add_adapter(peft_config(options, alpha, layer_sizes), adapter_name=NAME)
    adapters = Adapters(network, rank=options.rank, alpha=alpha, prefix=prefix, adapter_type=options.lora_type,
                        scale=alpha / (options.rank**0.5 if options.use_rslora else options.rank),
                        b_ratio=options.loraplus_lr_ratio, factor=options.lokr_factor,
                        rates=patterns.read(options.lora_lr_pattern, prefix), blocks=blocks)
    for path, layer in adapters.layers.items():
        place = path if in_unet else f"{prefix}.{path}"
        starts.initialise(layer, NAME, seed=seed, path=place, how=options.init_lora_weights)
        lean_lora.install(layer, NAME)
    if adapt:
        network.train()
    return adapters


@contextmanager
def smaller_factor_first() -> Iterator[None]:
    """Inside, LoKr's small matrix is not larger than its block, as LyCORIS needs it to load the file.

    PEFT takes the factor that it is given for the small matrix, also where a side has fewer than factor² entries.
    """
    from peft.tuners.lokr import layer as lokr

    as_given = lokr.factorization
    lokr.factorization = lambda *given: tuple(sorted(as_given(*given)))
    try:
        yield
    finally:
        lokr.factorization = as_given


def peft_config(options: LoraOptions, alpha: float, layer_sizes: Mapping[str, tuple[int, float]]) -> PeftConfig:
    """PEFT's words for a rank and an alpha of each module."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    ranks: dict[float, list[str]] = {}
    alphas: dict[float, list[str]] = {}
    for path, (rank, own_alpha) in layer_sizes.items():
        ranks.setdefault(rank, []).append(re.escape(path))
        alphas.setdefault(own_alpha, []).append(re.escape(path))
    shared = {"r": options.rank, "target_modules": [*layer_sizes],
              "rank_pattern": {"|".join(paths): rank for rank, paths in ranks.items() if rank != options.rank},
              "alpha_pattern": {"|".join(paths): value for value, paths in alphas.items() if value != alpha}}
    if options.lora_type == "loha":
        return LoHaConfig(**shared, alpha=alpha)
    if options.lora_type == "lokr":
        return LoKrConfig(**shared, alpha=alpha, decompose_factor=options.lokr_factor)
    return LoraConfig(**shared, lora_alpha=alpha, lora_dropout=options.lora_dropout, use_dora=options.use_dora,
                      use_rslora=options.use_rslora, init_lora_weights="gaussian")
