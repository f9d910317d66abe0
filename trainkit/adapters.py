"""The only trainable tensors: LoRA adapters on chosen layers of the UNet, fp32 whatever the base's precision.

    y = (W + (α/r) · B A) x        A [r,in] Gaussian, B [out,r] zero, so training starts at the base model

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", §4.1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainkit import rng
from trainkit.errors import Problem, UserError, refuse

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from trainkit.optim import ParamGroup
    from trainkit.options import LoraOptions, OptimizerOptions

NAME = "default"  # PEFT's name of our adapter
Targets = Mapping[str, Sequence[str]]  # --lora_layers -> ends of module paths


class Adapters:
    """The adapters of one UNet, in module order."""

    def __init__(self, unet: nn.Module, *, rank: int, alpha: float):
        from peft.tuners.lora import LoraLayer

        self.unet, self.rank, self.alpha = unet, rank, alpha
        self.layers: dict[str, LoraLayer] = {p: m for p, m in unet.named_modules() if isinstance(m, LoraLayer)}

    @property
    def scale(self) -> float:
        """α/r, what B A is multiplied by."""
        return self.alpha / self.rank

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """A [r,in] and B [out,r] of the module at `path`, not scaled."""
        layer = self.layers[path]
        return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Whatever PEFT trains in our layers, by its names without the adapter's: "<module path>.lora_A.weight"."""
        return {f"{path}.{name.replace(f'.{NAME}', '')}": parameter for path, layer in self.layers.items()
                for name, parameter in layer.named_parameters() if parameter.requires_grad}

    def groups(self, options: OptimizerOptions, global_batch: int) -> list[ParamGroup]:
        """Parameter groups for the optimizer, one for now."""
        lr = options.base_lr(global_batch=global_batch)
        return [{"name": "unet", "params": self.parameters(), "lr": lr, "weight_decay": options.adam_weight_decay}]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as they are trained (B not scaled), by PEFT's names."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        return self.state_dict(), {"rank": self.rank, "alpha": self.alpha}

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor], data: Mapping[str, float]) -> None:
        """Continue from `pack`'s answer. Raises UserError where it belongs to other adapters."""
        own = self.named_parameters()
        shapes, other = ({n: tuple(t.shape) for n, t in d.items()} for d in (own, tensors))
        if shapes != other or data != {"rank": self.rank, "alpha": self.alpha}:
            raise UserError(Problem(
                "the checkpoint holds other adapters than this run", f"{len(other)} tensors, {dict(data)}",
                f"this run has {len(shapes)} tensors, rank {self.rank}, alpha {self.alpha}",
                "resume with the rank, alpha, layers and blocks of the first run, or name a new --output_dir"))
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def delta_weight(self, path: str) -> Tensor:
        """ΔW = (α/r) · B A of one module -> [out,in] fp64 on the CPU."""
        A, B = (factor.detach().cpu().double() for factor in self.factors(path))
        return B @ (self.scale * A)


def add_lora(unet: nn.Module, options: LoraOptions, *, targets: Targets, seed: int) -> Adapters:
    """Inject adapters into a frozen UNet.

    targets  the family's table from --lora_layers to ends of module paths
    seed     decides A together with the module's path, so neither global random state nor the rank of the process,
             nor which other modules have adapters, plays a part
    Raises UserError for blocks that name nothing.
    """
    from peft import LoraConfig

    from trainkit import lean_lora

    refuse(problems(unet, options, targets=targets))
    alpha = options.rank if options.lora_alpha is None else options.lora_alpha
    unet.add_adapter(LoraConfig(
        r=options.rank, lora_alpha=alpha, lora_dropout=options.lora_dropout, init_lora_weights="gaussian",
        target_modules=target_modules(unet, options, targets=targets)), adapter_name=NAME)
    adapters = Adapters(unet, rank=options.rank, alpha=alpha)
    for path, layer in adapters.layers.items():
        initialise(layer, seed, path)
        lean_lora.install(layer, NAME)
    unet.train()
    return adapters


@torch.no_grad()
def initialise(layer: LoraLayer, seed: int, path: str) -> None:
    """fp32 factors: A ~ N(0, 1/r²), which PEFT calls "gaussian", and B = 0."""
    for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
        factor.weight.data = factor.weight.data.float()
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight  # [r,in], [out,r]
    A.copy_(torch.randn(A.shape, generator=rng.generator("lora", seed, path)) / len(A))
    B.zero_()


def problems(unet: nn.Module, options: LoraOptions, *, targets: Targets) -> list[Problem]:
    """Blocks of --lora_unet_blocks that no adapted layer lies in; `unet` may be on the meta device."""
    paths = list(linear_paths(unet, targets[options.lora_layers]))
    assert paths, f"no layer of this UNet ends in {targets[options.lora_layers]}"
    if options.lora_unet_blocks is not None and not blocks(options):
        return [Problem("no block is named", f"--lora_unet_blocks {options.lora_unet_blocks!r}",
                        "the value holds nothing but commas and spaces",
                        "name blocks, such as unet.up_blocks.0, or leave the flag out to adapt all of them")]
    return [unknown_block(block, unet) for block in blocks(options) if not any(inside(p, block) for p in paths)]


def target_modules(unet: nn.Module, options: LoraOptions, *, targets: Targets) -> list[str]:
    """Full paths of the layers that get adapters: the right kind, in one of the chosen blocks."""
    chosen = blocks(options)
    return [path for path in linear_paths(unet, targets[options.lora_layers])
            if not chosen or any(inside(path, block) for block in chosen)]


def linear_paths(unet: nn.Module, ends: Iterable[str]) -> Iterator[str]:
    dotted = tuple(f".{end}" for end in ends)
    return (path for path, m in unet.named_modules() if isinstance(m, nn.Linear) and path.endswith(dotted))


def blocks(options: LoraOptions) -> list[str]:
    """--lora_unet_blocks as module paths; a leading "unet." is allowed, as in published commands."""
    listed = (options.lora_unet_blocks or "").split(",")
    return [block.strip().removeprefix("unet.") for block in listed if block.strip()]


def inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def unknown_block(block: str, unet: nn.Module) -> Problem:
    known = [path for path, m in unet.named_modules() if path.count(".") in (1, 3) and "attentions" in path]
    near = difflib.get_close_matches(block, known, n=3, cutoff=0.0)
    return Problem(
        f"no layer to adapt in the block {block!r}", "--lora_unet_blocks",
        "entries are exact module paths of the UNet, cut at any dot; --lora_layers picks within them",
        f"the nearest blocks are {', '.join('unet.' + path for path in near)}")
