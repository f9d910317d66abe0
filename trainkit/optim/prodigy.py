"""Prodigy with one wait for the device in a step, in few large operations.

prodigyopt reads two numbers of every tensor in every step, and waits for the device each time. Here all are read
together. On a CPU in fp32 the weights, d and the state are those of prodigyopt 1.1.2 bit for bit, and so is the layout
of the state, but for the counter `step`, which nothing reads. On other devices sums are formed in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTS = {"cpu": 1 << 17}  # of a chunk: small enough for a core's cache
ALIGNED = 64  # bytes: torch's tensors on a CPU begin on multiples
ON_A_CARD = 1 << 22  # few launches, and 32 MiB of scratch memory in fp32


@dataclass
class PartOfSums:
    """A tensor's part of d's numerator and denominator.

    gradient, gone  its pieces of a chunk's buffers: the gradient, and what the weights have gone, later |s|
    dot, length     the two numbers, scalars on the device
    aligned         whether the pieces begin where tensors of their own would
    """

    gradient: Tensor
    gone: Tensor
    dot: Tensor
    length: Tensor
    aligned: bool


@dataclass
class TensorGroup:
    """Tensors of one dtype on one device, whose states are pieces of common buffers [N].

    order  positions of the tensors among all
    start  the weights at the first step, every slice_p-th of them; a scalar 0 where all of them were 0
    gradient, scratch  buffers [N] that chunks share: to allocate them in every step takes as long as to fill them
    sums   [2,n] the parts of d's numerator and denominator: on a CPU one of each for a tensor, as prodigyopt adds them
           up, and elsewhere one for the chunk
    terms  those of the tensors, on a CPU; views are made once, as they take longer than the sums
    """

    order: list[int]
    params: list[Tensor]
    weights: list[Tensor]  # the parameters, flat
    exp_avg: Tensor
    exp_avg_sq: Tensor
    s: Tensor
    start: Tensor
    gradient: Tensor
    scratch: Tensor
    sums: Tensor
    terms: list[PartOfSums]


class Prodigy(torch.optim.Optimizer):
    """Adam whose step size d is estimated from the distance that the weights have gone.

    Source: Mishchenko & Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
    Algorithm 4. Arguments are those of prodigyopt 1.1.2:

    lr                   factor on d, 1.0 as a rule
    betas, eps           of Adam; eps is relative to d
    beta3                decay of the sums that estimate d; None: the square root of the second beta
    weight_decay         as in AdamW; added to the gradient without `decouple`
    use_bias_correction  Adam's, on the step
    safeguard_warmup     leave lr out of the estimate's denominator
    d0, d_coef           the first d, a factor on the estimate
    growth_rate          most by which d grows in a step
    slice_p              estimate from every slice_p-th element only: less memory

    Raises ValueError for several parameter groups: one d is estimated over all parameters of an optimizer.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999), beta3: float | None = None, eps: float = 1e-8,
        weight_decay: float = 0.0, decouple: bool = True, use_bias_correction: bool = False,
        safeguard_warmup: bool = False, d0: float = 1e-6, d_coef: float = 1.0, growth_rate: float = math.inf,
        slice_p: int = 1,
    ):
        for name, value, fits in (
            ("d0", d0, d0 > 0), ("lr", lr, lr > 0), ("eps", eps, eps > 0), ("slice_p", slice_p, slice_p >= 1),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not fits:
                raise ValueError(f"{name} cannot be {value}")
        super().__init__(params, dict(
            lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay, d=d0, d0=d0, d_max=d0, d_numerator=0.0,
            d_coef=d_coef, k=0, growth_rate=growth_rate, use_bias_correction=use_bias_correction, decouple=decouple,
            safeguard_warmup=safeguard_warmup, slice_p=slice_p))
        if len(self.param_groups) > 1:
            raise ValueError("Prodigy takes one parameter group: one d is estimated over all of them")
        self._chunks: list[TensorGroup] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._chunks = []  # laid out anew at the next step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        if {id(p) for p in params} != {id(p) for chunk in self._chunks for p in chunk.params}:
            self._chunks = self._lay_out(params, group["slice_p"])
        if not params or group["lr"] <= 0:
            return loss
        (beta1, beta2), k = group["betas"], group["k"] + 1
        correction = (1 - beta2**k) ** 0.5 / (1 - beta1**k) if group["use_bias_correction"] else 1
        dlr = group["d"] * group["lr"] * correction
        for chunk in self._chunks:
            self._accumulate(chunk, group, dlr)
        if self._estimate(group, dlr):
            for chunk in self._chunks:
                self._move(chunk, group, dlr)
            group["k"] = k
        return loss

    def _accumulate(self, chunk: TensorGroup, group: dict[str, Any], dlr: float) -> None:
        """Take the gradients into the moving averages, and the parts of d's numerator and denominator into `sums`."""
        (beta1, beta2), d, every = group["betas"], group["d"], group["slice_p"]
        gradient, gone = self._gradient(chunk, group), chunk.scratch[: chunk.s.numel()]
        sliced = gradient if every == 1 else _slices(gradient.split([w.numel() for w in chunk.weights]), every)
        torch.sub(chunk.start, _slices(chunk.weights, every, out=gone), out=gone)
        if chunk.terms:
            for term in chunk.terms:
                _dot(term, every)
        else:
            torch.dot(sliced, gone, out=chunk.sums[0, 0])
        if beta1 > 0:
            chunk.exp_avg.mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
        chunk.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
        chunk.s.mul_(_beta3(group)).add_(sliced, alpha=d / group["d0"] * (d if group["safeguard_warmup"] else dlr))
        torch.abs(chunk.s, out=gone)
        for part, length in [(term.gone, term.length) for term in chunk.terms] or [(gone, chunk.sums[1, 0])]:
            torch.sum(part, 0, out=length)

    def _estimate(self, group: dict[str, Any], dlr: float) -> bool:
        """A new d -> whether there is one: with gradients of 0 alone nothing moves. The step's one wait."""
        dots, lengths = torch.cat([chunk.sums for chunk in self._chunks], 1).tolist()
        order = [place for chunk in self._chunks for place in chunk.order]
        terms = list(zip(dots, lengths, strict=True))
        if len(terms) == len(order):  # one for each tensor: prodigyopt goes through them in the user's order
            terms = [term for _, term in sorted(zip(order, terms, strict=True))]
        d, numerator, denominator = group["d"], 0.0, 0.0
        for dot, length in terms:
            numerator += d / group["d0"] * dlr * dot
            denominator += length
        if denominator == 0:
            return False
        total = group["d_numerator"] * _beta3(group) + numerator
        d_hat = group["d_coef"] * total / denominator
        d_max = max(group["d_max"], d_hat)
        d = min(d_max, (max(d, d_hat) if d == group["d0"] else d) * group["growth_rate"])
        group.update(d=d, d_max=d_max, d_hat=d_hat, d_numerator=total, d_denom=denominator)
        return True

    def _move(self, chunk: TensorGroup, group: dict[str, Any], dlr: float) -> None:
        d, decay, beta1 = group["d"], group["weight_decay"], group["betas"][0]
        step, length = (chunk.exp_avg, dlr) if beta1 > 0 else (self._gradient(chunk, group).clone(), dlr * d)
        root = torch.sqrt(chunk.exp_avg_sq, out=chunk.gradient).add_(d * group["eps"])
        weights = torch.cat(chunk.weights, out=chunk.scratch)
        if decay and group["decouple"]:
            weights.add_(weights, alpha=-decay * dlr)
        weights.addcdiv_(step, root, value=-length)
        torch._foreach_copy_(chunk.weights, weights.split([w.numel() for w in chunk.weights]))

    def _gradient(self, chunk: TensorGroup, group: dict[str, Any]) -> Tensor:
        """The gradients of a chunk [N], with the weights' decay where it is a part of them."""
        gradient = torch.cat([p.grad.reshape(-1) for p in chunk.params if p.grad is not None], out=chunk.gradient)
        if group["weight_decay"] and not group["decouple"]:
            gradient.add_(torch.cat(chunk.weights, out=chunk.scratch), alpha=group["weight_decay"])
        return gradient

    def _lay_out(self, params: Sequence[Tensor], every: int) -> list[TensorGroup]:
        """Chunks of the parameters; states that there are move into their buffers."""
        new = [p for p in params if "s" not in self.state[p]]
        moved = torch.stack([p.any() for p in new]).tolist() if new else []
        for p, anything in zip(new, moved, strict=True):
            sliced = p.detach().flatten()[::every]
            self.state[p] = {"p0": sliced.clone() if anything else torch.zeros_like(sliced[0]),
                             "s": torch.zeros_like(sliced),
                             "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        groups: dict[object, list[list[int]]] = {}
        for place, p in enumerate(params):
            from_0 = self.state[p]["p0"].dim() == 0
            full = groups.setdefault((p.device, p.dtype, from_0), [[]])
            if sum(params[other].numel() for other in full[-1]) >= ELEMENTS.get(p.device.type, ON_A_CARD):
                full.append([])
            full[-1].append(place)
        orders = [order for full in groups.values() for order in full]
        sizes = [sum(params[place].numel() for place in order) for order in orders]
        shared = {(p.device, p.dtype): torch.empty(2, max(sizes), dtype=p.dtype, device=p.device) for p in params}
        return [self._chunk(order, [params[place] for place in order], every, shared) for order in orders]

    def _chunk(self, order: list[int], params: list[Tensor], every: int, shared: Mapping[tuple, Tensor]) -> TensorGroup:
        size = sum(p.numel() for p in params)
        gradient, scratch = shared[params[0].device, params[0].dtype][:, :size]
        buffers = {"gradient": gradient, "scratch": scratch}
        for name in ("exp_avg", "exp_avg_sq", "s"):
            states = [self.state[p][name] for p in params]
            buffers[name] = torch.cat([state.flatten() for state in states])
            for p, piece in zip(params, buffers[name].split([state.numel() for state in states]), strict=True):
                self.state[p][name] = piece.view_as(self.state[p][name])
        starts = [self.state[p]["p0"] for p in params]
        start = starts[0] if starts[0].dim() == 0 else torch.cat(starts)
        if start.dim():
            for p, piece in zip(params, start.split([s.numel() for s in starts]), strict=True):
                self.state[p]["p0"] = piece
        weights = [p.detach().view(-1) for p in params]
        on_cpu = start.device.type == "cpu"
        sums = gradient.new_empty(2, len(params) if on_cpu else 1)
        terms = _terms(gradient, scratch, [w.numel() for w in weights], every, sums) if on_cpu else []
        return TensorGroup(order, params, weights, start=start, **buffers, sums=sums, terms=terms)


def _terms(gradient: Tensor, scratch: Tensor, sizes: Sequence[int], every: int, sums: Tensor) -> list[PartOfSums]:
    """Those of tensors of these sizes that lie one behind another."""
    parts = [-(-size // every) for size in sizes]
    pieces = zip(gradient.split(list(sizes)), scratch[: sum(parts)].split(parts), strict=True)
    return [PartOfSums(piece, part, sums[0, i], sums[1, i],
                       aligned=piece.data_ptr() % ALIGNED == part.data_ptr() % ALIGNED == 0)
            for i, (piece, part) in enumerate(pieces)]


def _beta3(group: dict[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]


def _dot(term: PartOfSums, every: int) -> None:
    """As for tensors of their own: how BLAS forms a sum depends on strides and on where in memory it begins."""
    gradient, gone = (term.gradient, term.gone) if term.aligned else (term.gradient.clone(), term.gone.clone())
    torch.dot(gradient if every == 1 else gradient[::every], gone, out=term.dot)


def _slices(tensors: Sequence[Tensor], every: int, out: Tensor | None = None) -> Tensor:
    """Every `every`-th element of each tensor, one behind another."""
    return torch.cat([tensor[::every] for tensor in tensors] if every > 1 else [*tensors], out=out)
