"""What holds the update back: background, space, edges; and how the tensors share the learning rate.

A LoRA factor has no spatial axes: its rows and columns are features in an arbitrary order, so on matrices a rule may
look at how large an element is and not at where it stands. A convolution kernel has two spatial axes, its last.
An update is regularised and not a gradient, because Adam divides any fixed factor of the gradient out again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainkit.optim.hina.chunk_state import TINY, ChunkState, norm, total
from trainkit.optim.hina.settings import Group

BACKGROUND = 0.5  # beta of the background's gain
SCALES = (0.1, 3.0)  # range of a tensor's factor in the dynamic adaptation, before the mean is taken out
LEAST_SIGNAL = 1e-12


def no_matrix(shape: torch.Size) -> str:
    return "" if len(shape) >= 2 else "it has fewer than two axes"


def no_kernel(shape: torch.Size) -> str:
    """Kernels have their two spatial axes last, and more than one element along each."""
    return "" if is_kernel(shape) else "it has no spatial axes"


def is_kernel(shape: torch.Size) -> bool:
    return len(shape) >= 4 and min(shape[-2:]) >= 2


def background(chunk: ChunkState) -> None:
    """u <- u · min(1, (1+b) q/(q + b mu)),  q = sqrt(v), mu = rms(q), b = 1/2: an eps relative to the tensor.

    Damps coordinates with little activity, where Adam makes full steps out of noise; at q = mu the gain is 1.
    """
    mean = norm(chunk.q).mul_(BACKGROUND * chunk.numel**-0.5)
    torch.add(chunk.q, mean.clamp_(min=TINY), out=chunk.a)
    chunk.u = torch.mul(chunk.u, chunk.q.div_(chunk.a).clamp_(max=1 / (1 + BACKGROUND)), out=chunk.out)
    chunk.scale = chunk.scale * (1 + BACKGROUND)


def second_difference(x: Tensor, axis: int) -> Tensor:
    """x[i-1] - 2 x[i] + x[i+1] along an axis; beyond an end the last value goes on."""
    step = torch.diff(x, dim=axis)
    size, bent = x.shape[axis], torch.zeros_like(x)
    bent.narrow(axis, 0, size - 1).add_(step)
    bent.narrow(axis, 1, size - 1).sub_(step)
    return bent


def spatial(chunk: ChunkState) -> None:
    """u <- u - frequency_penalty · gate · H u on each plane of a kernel, H = 1 - S, S = [1,2,1]/4 along both axes.

    gate = clip((roughness - detail_preservation)/(1 - detail_preservation), 0, 1) of the plane. Its roughness is
    ||H u||²/||u||² divided by what the roughest plane of that size has: what varies from element to element is smoothed
    only where it is most of the plane. H is symmetric and 0 <= H <= 1, so ||u|| never grows.
    """
    chunk.u = chunk.out.copy_(chunk.u) if chunk.u is not chunk.out else chunk.u
    u, keep = chunk.whole(chunk.u), chunk.group["detail_preservation"]
    half = u + second_difference(u, -1) / 4
    rough = u - (half + second_difference(half, -2) / 4)
    roughness = energy(rough) / energy(u).clamp_(min=TINY) / roughest(*chunk.shape[-2:])
    gate = ((roughness - keep) / (1 - keep)).clamp_(0, 1)
    u.addcmul_(rough, gate, value=-chunk.group["frequency_penalty"])


def roughest(height: int, width: int) -> float:
    """The largest ||H u||²/||u||² of a plane. S has the eigenvalues (1 + cos(pi j/n))/2 along an axis of length n."""
    least = math.prod((1 + math.cos(math.pi * (n - 1) / n)) / 2 for n in (height, width))
    return (1 - least) ** 2


def energy(x: Tensor) -> Tensor:
    """[...,kh,kw] -> [...,1,1], sum of squares over the plane."""
    return x.square().sum((-2, -1), keepdim=True)


def edge(chunk: ChunkState) -> None:
    """u <- u / (1 + edge_penalty (e - kappa)_+), kappa = 1/(1 - edge_threshold): outliers of the update shrink.

    e = |x|/rms(x): of a matrix x = u, which any renumbering of features leaves alone; of a kernel x = its Laplacian
    over the plane. 1 + p (|x|/rms - kappa)_+ = max(1, 1 - p kappa + |x| p/rms).
    """
    penalty, kappa = chunk.group["edge_penalty"], 1 / (1 - chunk.group["edge_threshold"])
    x = chunk.u
    if is_kernel(chunk.shape):
        plane = chunk.whole(x)
        x = (second_difference(plane, -1) + second_difference(plane, -2)).view_as(x)
    slope = norm(x).clamp_(min=TINY).reciprocal_().mul_(penalty * chunk.numel**0.5)
    size = torch.abs(x, out=chunk.a)
    chunk.u = torch.div(chunk.u, size.mul_(slope).add_(1 - penalty * kappa).clamp_(min=1), out=chunk.out)


# --- factors of the learning rate -----------------------------------------------------------------------------------


def measure(chunk: ChunkState) -> None:
    """Every `relationship_discovery_interval` steps: how steady a tensor's gradients are, smoothed.

    rho = ||m^||²/||v^||_1 in [0,1]: 1 for a constant gradient, (1-b1)/(1+b1) for noise. ADOPT's gradients have unit
    variance. A tensor that has had no gradient but 0 says nothing.
    """
    if not chunk.context.refresh:
        return
    (b1, b2), signal = chunk.group["betas"], chunk.state["signal"]
    power, energy_ = norm(chunk.state["exp_avg"]).square_(), total(chunk.state["exp_avg_sq"])
    if chunk.group["use_adopt_stability"]:
        rho = power / chunk.numel
    else:
        rho = power * ((1 - b2**chunk.step) / (1 - b1**chunk.step) ** 2) / energy_.clamp(min=TINY)
    rho = rho.clamp_(LEAST_SIGNAL, 1)
    smooth = torch.where(signal > 0, torch.lerp(rho, signal, chunk.group["importance_decay"]), rho)
    signal.copy_(torch.where(energy_ > 0, smooth, signal))


def adapt(chunk: ChunkState) -> None:
    """u <- s u with the tensor's factor s of the learning rate, of the last `distribute_learning_rate`."""
    chunk.scale = chunk.state["adapt_scale"] * chunk.scale


def distribute_learning_rate(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]], group: Group,
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """s = clip((rho/geometric mean of rho)^(strength/2), 0.1, 3), divided by its own geometric mean, into the states.

    The factors of a LoRA pair share their geometric mean if min/max rho >= compatibility_threshold. Tensors that have
    said nothing keep s = 1. The mean of log s is 0, so that no learning rate decays in secret.
    """
    here = set(params)
    joined = [p for pair in pairs if here.issuperset(pair) for p in pair]
    alone = [p for p in params if p not in set(joined)]
    ordered, device = [*alone, *joined], params[0].device
    signal = torch.stack([state[p]["signal"].to(device, non_blocking=True) for p in ordered])
    known = signal > 0
    log = torch.where(known, signal, 1.0).log_()
    log[len(alone):] = shared(log[len(alone):], known[len(alone):], group["compatibility_threshold"])
    low, high = map(math.log, SCALES)
    scale = ((log - mean_of(log, known)) * (group["adaptation_strength"] / 2)).clamp_(low, high)
    scale = torch.where(known, scale - mean_of(scale, known), 0.0).exp_()
    torch._foreach_copy_([state[p]["adapt_scale"] for p in ordered], list(scale.unbind()))


def shared(log: Tensor, known: Tensor, threshold: float) -> Tensor:
    """log rho of pairs [2k], one after the other -> the same, with their mean where they are close enough."""
    pair, both = log.view(-1, 2), known.view(-1, 2).all(-1, keepdim=True)
    close = (pair[:, :1] - pair[:, 1:]).abs() <= (-math.log(threshold) if threshold > 0 else math.inf)
    return torch.where(both & close, pair.mean(-1, keepdim=True), pair).view(-1)


def mean_of(x: Tensor, known: Tensor) -> Tensor:
    """Mean over those that are known; 0 where none is."""
    return torch.where(known, x, 0.0).sum() / known.sum().clamp(min=1)
