"""One chunk on its way through the rules, and the sums they take over each of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainkit.optim.hina.storage import Chunk

TINY = 1e-30  # below every number that counts, and its square root is none too small for fp32


class Buffers:
    """Scratch that chunks share, so that it is in the cache already: flat tensors by name, as large as asked for."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, name: str, x: Tensor) -> Tensor:
        key = (name, x.dtype, x.device)
        if key not in self.tensors or self.tensors[key].numel() < x.numel():
            self.tensors[key] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return self.tensors[key][:x.numel()].view(x.shape)


@dataclass
class GroupContext:
    """What the whole group gives each of its chunks.

    downs    B -> A for the LoRA pairs of the group
    refresh  whether the signals of the dynamic adaptation are due
    shrink   learning rates summed since the last proximal step of the rank penalty; None: not due
    """

    downs: dict[Tensor, Tensor] = field(default_factory=dict)
    refresh: bool = False
    shrink: float | None = None


class ChunkState:
    """What the rules read and change.

    Tensors of the chunk are cut into lines, [n,lines,rest], whatever their shape is; a "row" [n,1,1] is one number for
    each of them. The update is scale · u, so that a factor for a whole tensor costs no pass over its elements:
    W <- W - lr·scale·u.

    params        the parameters whose copies the chunk has
    context       what the whole group gives each of its chunks
    shape         of each tensor, without n
    w, g, state   weights, gradient, states of the chunk, in lines or as rows
    u, scale      the update; u may be the first moment itself, so a rule writes to `out`, which may be u as well
    out, a, q     scratch; q holds the denominator sqrt(v) from the moments to the background's rule
    alive         row of booleans, False where the gradient is not finite; None: known to be all True
    norm_g, norm_w, dot_wg  ||g||, ||W||, <W,g>, rows, where a rule has taken them; None: not taken, or outdated
    growth        <g, W - W_0>, row: whether the descent leads away from the anchor of SPD (< 0) or back to it (> 0)
    radius        ||W - W_0|| before the update, row
    done          no further rule acts
    """

    def __init__(self, chunk: Chunk, context: GroupContext, buffers: Buffers):
        self.params, self.context, self.group, self.step = chunk.params, context, chunk.group, chunk.step
        self.shape = chunk.w.shape[1:]
        self.numel = self.shape.numel()
        self.lines = (len(chunk.params), math.gcd(self.numel, 64), -1)
        self.w, self.g = chunk.w.view(self.lines), chunk.g.view(self.lines)
        self.state = {name: x.view(self.lines if x.numel() == chunk.w.numel() else (-1, 1, 1))
                      for name, x in chunk.state.items()}
        self.out, self.a, self.q = (buffers.like(name, self.w) for name in ("out", "a", "q"))
        self.u = self.out
        self.scale: Tensor | float = 1.0
        self.alive: Tensor | None = None
        self.norm_g: Tensor | None = None
        self.norm_w: Tensor | None = None
        self.dot_wg: Tensor | None = None
        self.growth: Tensor | None = None
        self.radius: Tensor | None = None
        self.done = False

    def gradient_norm(self) -> Tensor:
        """||g||, taken once for each change of g."""
        if self.norm_g is None:
            self.norm_g = norm(self.g)
        return self.norm_g

    def weight_norm(self) -> Tensor:
        """||W|| before the update."""
        if self.norm_w is None:
            self.norm_w = norm(self.w)
        return self.norm_w

    def weight_dot_gradient(self) -> Tensor:
        """<W,g>, taken once for each change of g."""
        if self.dot_wg is None:
            self.dot_wg = dot(self.w, self.g, self.a)
        return self.dot_wg

    def gradient_changed(self, norm_g: Tensor | None = None) -> None:
        self.norm_g, self.dot_wg = norm_g, None

    def whole(self, x: Tensor) -> Tensor:
        """Lines -> [n,*shape], a view."""
        return x.view(-1, *self.shape)


def total(x: Tensor) -> Tensor:
    """Sum of each tensor, a row. Lines first, then the lines' sums: the number of threads changes no bit of it."""
    return x.sum(-1, keepdim=True).sum(-2, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """||x|| of each tensor, a row, lines first like `total`."""
    lines = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(lines, dim=-2, keepdim=True)


def dot(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    """<x,y> of each pair of tensors, a row; `scratch` is overwritten."""
    return total(torch.mul(x, y, out=scratch))
