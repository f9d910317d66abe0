"""The rank penalty: a proximal step on singular values, and the LoRA pairs it can be taken on.

Penalised is the Schatten-q quasi-norm with q = 2 - low_rank_emphasis (0: weight decay, 1: nuclear norm). On both
factors of W = B A it acts on the product as Schatten-q/2 (Shang, Liu & Cheng 2016, arXiv:1606.00668), which is why
plain decay of both factors already is a nuclear norm of the product (Kobayashi et al. 2024, arXiv:2410.23819).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from trainkit.devices import in_fp64
from trainkit.optim.hina.chunk_state import ChunkState
from trainkit.optim.hina.settings import Group

LEAST = 1e-6  # singular values below this fraction of the largest shrink as those at it
NAMES = (("lora_A", "lora_B"), ("lora_down", "lora_up"))  # the factor next to the input, the one next to the output


def proximal(chunk: ChunkState) -> None:
    """Every `rank_penalty_interval` steps, with the learning rates of all of them: each factor, or B of each pair.

    The eigenproblem makes the host wait for the device in these steps, and in no others.
    """
    lr, group = chunk.context.shrink, chunk.group
    if lr is None:
        return
    amount = lr * group["rank_penalty_strength"], group["low_rank_emphasis"]
    if group["rank_penalty_target"] == "product":
        shrink_products(chunk, amount)
    else:
        shrink_factors(chunk.w.view(-1, chunk.shape[0], chunk.numel // chunk.shape[0]), amount)


def kept(sigma: Tensor, amount: float, emphasis: float) -> Tensor:
    """sigma [n,r] -> sigma'/sigma [n,r].

    sigma' = max(0, sigma - amount · sigma_1 · max(sigma/sigma_1, 1e-6)^(1-emphasis)): the relative shrink
    amount · (sigma/sigma_1)^(-emphasis) grows as sigma falls, so the stable rank falls. Tensors of zeros stay.
    """
    largest = sigma.amax(-1, keepdim=True)
    ratio = torch.where(largest > 0, sigma / largest, 1.0)
    left = (ratio - amount * ratio.clamp(min=LEAST) ** (1 - emphasis)).clamp_(min=0)
    return torch.where(ratio > 0, left / ratio, 0.0)


def shrink_factors(w: Tensor, amount: tuple[float, float]) -> None:
    """W <- U diag(sigma') V^T for each of w [n,a,b], in place, by the smaller side's Gram matrix in fp64.

    With W W^T = Q diag(sigma²) Q^T:  W <- W - Q diag(1 - sigma'/sigma) Q^T W; the other side in the same way.
    """
    wide = w.shape[-2] <= w.shape[-1]
    exact = in_fp64(w)
    gram = exact @ exact.mT if wide else exact.mT @ exact
    squares, q = torch.linalg.eigh(finite(gram))
    loss = 1 - kept(squares.clamp_(min=0).sqrt_(), *amount)
    removed = (q * loss[:, None]) @ q.mT
    w.copy_(exact - (removed @ exact if wide else exact @ removed))


def shrink_products(chunk: ChunkState, amount: tuple[float, float]) -> None:
    """For the B's among the weights: singular values of B A shrink by a change of B alone, which leaves A as it is.

    B = Q_B R_B, A^T = Q_A R_A, R_B R_A^T = U diag(sigma) V^T:  B <- B - U_B diag(1 - sigma'/sigma) U_B^T B with
    U_B = Q_B U.
    """
    rows = [i for i, p in enumerate(chunk.params) if p in chunk.context.downs]
    if not rows:
        return
    b = in_fp64(torch.stack([chunk.whole(chunk.w)[i].flatten(1) for i in rows]))
    basis, left = torch.linalg.qr(finite(b))
    core = left @ triangles([chunk.context.downs[chunk.params[i]] for i in rows]).mT
    u, sigma, _ = torch.linalg.svd(core)
    ub, loss = basis @ u, 1 - kept(sigma, *amount)
    change = (ub * loss[:, None]) @ (ub.mT @ b)
    for i, exact, part in zip(rows, b, change, strict=True):
        chunk.w[i].copy_((exact - part).view_as(chunk.w[i]))


def triangles(downs: Sequence[Tensor]) -> Tensor:
    """R_A [n,r,r] of A^T = Q_A R_A, for A's [r,in,...] that go into layers of any width."""
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for i, a in enumerate(downs):
        places[a.shape].append(i)
    rank = downs[0].shape[0]
    found = in_fp64(downs[0]).new_zeros(len(downs), rank, rank)
    for same in places.values():
        exact = in_fp64(torch.stack([downs[i].detach().flatten(1) for i in same]))
        r = torch.linalg.qr(finite(exact).mT).R  # [k,min(in,r),r]
        found[same, :r.shape[1]] = r
    return found


def finite(matrices: Tensor) -> Tensor:
    """[n,a,b] with zeros for a matrix that is not finite, which would fail the whole batch."""
    return torch.where(matrices.isfinite().flatten(1).all(-1)[:, None, None], matrices, 0.0)


def lora_pairs(group: Group) -> list[tuple[Tensor, Tensor]]:
    """The LoRA pairs (A, B) of a group: by its parameters' names where it has them, else neighbours that fit.

    A [r,in,...] and B [out,r,...]; without names r must be less than both in and out.
    """
    params, names = group["params"], group.get("param_names")
    if names is None:
        return [(a, b) for a, b in zip(params, params[1:], strict=False) if fits(a, b) and a.shape[0] < narrow(a, b)]
    by_name = dict(zip(names, params, strict=True))
    partners = [(a, by_name.get(name.replace(down, up))) for name, a in by_name.items() for down, up in NAMES
                if down in name]
    return [(a, b) for a, b in partners if b is not None and fits(a, b)]


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether B A is a product, of two shapes: of one shape they could change in the same chunk."""
    return a.ndim >= 2 and b.ndim >= 2 and a.shape != b.shape and a.shape[0] == b.shape[1:].numel()


def narrow(a: Tensor, b: Tensor) -> int:
    """The smaller of what goes into A and what comes out of B."""
    return min(a.shape[1:].numel(), b.shape[0])
