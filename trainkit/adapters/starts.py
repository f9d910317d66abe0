"""Initial values. Each is a function of (seed, module path): neither global random state nor the process's rank, nor
which other modules have adapters, plays a part. Training starts at the base model, whatever the kind.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainkit import rng
from trainkit.adapters.updates import rows_norm
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

ZERO = ("lora_B", "hada_w2_b", "lokr_w1")  # the factor that is zero, so that ΔW is
POWER_STEPS = 4  # of the randomised SVD; PiSSA's own choice (Meng et al. 2024, §5.4) lies between 1 and 16


def own_parameters(layer: BaseTunerLayer, adapter: str) -> dict[str, nn.Parameter]:
    """What the adapter adds to a layer, by PEFT's names without the adapter's: "lora_A.weight", "hada_w1_a"."""
    return {name.replace(f".{adapter}", ""): p for name, p in layer.named_parameters()
            if not name.startswith("base_layer.")}


@torch.no_grad()
def initialise(layer: BaseTunerLayer, adapter: str, *, seed: int, path: str, how: str) -> None:
    """Set fp32 parameters: a factor that is zero, the others random; DoRA's magnitude is the norm of W's rows.

    how  "gaussian", or "pissa" and "olora", which start from the weight itself
    """
    for name, parameter in own_parameters(layer, adapter).items():
        parameter.data = first_value(name, parameter.float(), seed, path)
    magnitude = dict(getattr(layer, "lora_magnitude_vector", {}))
    if adapter in magnitude:
        norms = rows_norm(layer.get_base_layer().weight.float().flatten(1))
        magnitude[adapter].weight.data = norms.view_as(magnitude[adapter].weight)
    if how != "gaussian":
        start_from_weight(layer, adapter, seed=seed, path=path, how=how)


def first_value(name: str, like: Tensor, seed: int, path: str) -> Tensor:
    """LoRA's A ~ N(0, 1/r²), which PEFT calls "gaussian"; LoHa's and LoKr's factors as PEFT draws them."""
    if name.startswith(ZERO):
        return torch.zeros_like(like)
    if name.startswith("lora_A"):
        drawn = torch.randn(like.shape, generator=rng.generator("lora", seed, path)) / len(like)
        return drawn.to(like.device)
    drawn = torch.empty(like.shape)
    if drawn.ndim > 1:
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng.generator(name, seed, path))
    return drawn.to(like.device)


def start_from_weight(layer: LoraLayer, adapter: str, *, seed: int, path: str, how: str) -> None:
    """A0 and B0 taken from W. Rank 0 computes: a decomposition's last bits depend on the machine."""
    from trainkit import lean_lora  # imports PEFT

    W, c = layer.get_base_layer().weight, layer.scaling[adapter]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    choose = {"pissa": principal_directions, "olora": orthogonal_columns}[how]
    A0, B0 = ranks.from_main(lambda: choose(W.cpu().float(), len(A), c, rng.seed_of(how, seed, path)))
    A.copy_(A0)
    B.copy_(B0)
    lean_lora.install_started(layer, adapter)


def principal_directions(W: Tensor, r: int, c: float, seed: int) -> tuple[Tensor, Tensor]:
    """PiSSA: c B0 A0 is the best rank-r part of W [out,in] -> A0 [r,in], B0 [out,r].

    U S Vᵀ ≈ W,   A0 = √(S/c) Vᵀ,   B0 = U √(S/c)
    Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948,
    eq. 2 and 3; the randomised SVD of its §5.4 is Halko et al. 2011.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=min(2 * r, *W.shape), niter=POWER_STEPS)
    root = (S[:r] / c).sqrt()
    return root.unsqueeze(1) * V[:, :r].t(), U[:, :r] * root


def orthogonal_columns(W: Tensor, r: int, c: float, seed: int) -> tuple[Tensor, Tensor]:
    """OLoRA: W = Q R,   B0 = Q[:, :r],   A0 = R[:r], not divided by c -> A0 [r,in], B0 [out,r].

    Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation", arXiv:2406.01775, §3.1.
    """
    Q = torch.linalg.qr(W[:, :r]).Q  # the first r columns of Q need no more than W's first r
    return Q.t() @ W, Q
