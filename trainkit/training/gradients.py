"""From losses to one safe update: sum over ranks, check, clip, step.

A step whose loss or gradient is not finite never reaches the weights.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainkit.devices import upload
from trainkit.errors import Problem, UserError
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.files import Json

log = logging.getLogger(__name__)

HISTORY = 20  # losses kept for the message when a run diverges
NOT_THE_RATE = (  # where no step of a run was finite: no rate has changed a weight yet, and the VAE was checked
    "under fp16 use --mixed_precision bf16 or no; else name another base model")
WEAKER = "lower --learning_rate, or what else may be too strong (--optimizer_args, --fourier_weight, --dist_match)"


class Steppable(Protocol):
    """What an update needs of an optimizer; see trainkit.optim.Optim."""

    @property
    def active(self) -> Sequence[torch.optim.Optimizer]: ...

    @property
    def params(self) -> list[Tensor]: ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    loss: float  # of the whole step: all ranks, all micro-batches
    grad_norm: float  # before clipping
    skipped: bool
    votes: tuple[float, ...]  # the votes given, summed over ranks


class Gradients:
    """Collects the gradients of one optimizer step and applies them once.

    Data parallel without a wrapper: trainable tensors are few megabytes, so their gradients are *summed* over ranks
    in one all-reduce per optimizer step. Losses are already divided by the step's number of rows over all ranks,
    so the sum is the gradient one process would compute, whichever modules the tensors live in.
    With fp16 a GradScaler keeps small gradients from rounding to zero; the sum comes before its check, so that every
    rank finds the same overflow.
    """

    def __init__(
        self, device: torch.device, *, fp16: bool = False, max_skipped: int = 10,
        last_checkpoint: Callable[[], str | None] = lambda: None,
    ):
        self.device, self.max_skipped, self.last_checkpoint = device, max_skipped, last_checkpoint
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None
        self.loss = torch.zeros((), device=device)
        self.history: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0  # in the whole run
        self.in_a_row = 0

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss (a scalar) to the gradients.

        A loss that depends on nothing that trains adds none: new tokens alone, in captions that hold none of them.
        """
        self.loss += loss.detach()
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        if scaled.requires_grad:
            scaled.backward()

    def update(
        self, optimizer: Steppable, *, step: int, max_grad_norm: float | None, votes: Sequence[float] = (),
    ) -> StepOutcome:
        """Apply optimizer step `step` (from 0), or skip it on every rank when loss or gradient are not finite.

        Summed and clipped are the groups that train in this step, all of them as one vector; `Optim.begin` has chosen
        them and set their rates. What got no gradient has gradient 0, on one rank as on several.
        Raises UserError(kind="nonfinite") when more than `max_skipped` steps in a row were skipped.
        """
        params = [p for inner in optimizer.active for group in inner.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        tail = self._sum_over_ranks(params, votes)
        if self.scaler is not None:
            for inner in optimizer.active:
                self.scaler.unscale_(inner)
        grads = gradients_of(params)
        norm, loss, *summed = torch.cat([total_norm(grads).view(1), tail]).tolist()  # the one wait for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            clip(grads, norm, max_grad_norm)
            optimizer.step()
        self._close(optimizer, loss)
        self._count(step, loss, norm, finite=finite)
        if self.in_a_row > self.max_skipped:
            raise self._diverged(step, optimizer.params)
        return StepOutcome(loss, norm, skipped=not finite, votes=tuple(summed))

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {}, {"scaler": scaler, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        self.skipped, self.in_a_row = data["skipped"], data["in_a_row"]
        if self.scaler is not None and data["scaler"] is not None:
            self.scaler.load_state_dict(data["scaler"])

    def _sum_over_ranks(self, params: Sequence[Tensor], votes: Sequence[float]) -> Tensor:
        """Sum gradients in place -> [1 + len(votes)]: loss and votes, summed too."""
        tail = torch.cat([self.loss.view(1), *upload([torch.tensor(votes)], self.device)])
        if ranks.world() == 1:
            return tail
        grads = gradients_of(params)
        flat = ranks.sum_over_ranks(torch.cat([*(g.flatten().float() for g in grads), tail]))  # [N]
        *pieces, tail = flat.split([*(g.numel() for g in grads), len(tail)])
        for grad, piece in zip(grads, pieces, strict=True):
            grad.copy_(piece.view_as(grad))
        return tail

    def _close(self, optimizer: Steppable, loss: float) -> None:
        if self.scaler is not None:
            self.scaler.update()
        optimizer.zero_grad()
        self.loss = torch.zeros_like(self.loss)
        self.history.append(loss)

    def _count(self, step: int, loss: float, norm: float, *, finite: bool) -> None:
        if finite:
            self.in_a_row = 0
            return
        self.skipped += 1
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self.in_a_row += not (math.isfinite(loss) and scale > 1)  # a scaler looking for its scale is no news
        log.warning("step %d skipped: loss %g, gradient norm %g; weights are unchanged", step + 1, loss, norm)

    def _diverged(self, step: int, params: Sequence[Tensor]) -> UserError:
        """The end of a run at optimizer step `step`: whether the weights are still usable, and what to do."""
        first = step + 2 - self.in_a_row  # of the steps in a row, counted from 1
        whole = all(p.isfinite().all().item() for p in params)
        if whole and self.skipped == step + 1:
            return self.never_finite(step + 1, "the losses: " + ", ".join(f"{x:.4g}" for x in self.history))
        precision = ", or use --mixed_precision bf16 or no" if whole else ""
        return UserError(Problem(
            what=f"{self.in_a_row} steps in a row were not finite, the last one step {step + 1}", kind="nonfinite",
            where="losses before it: " + ", ".join(f"{x:.4g}" for x in self.history),
            why="the weights are those of the last finite step; more steps would not change them" if whole else
                "the weights themselves are not finite: the update of the last finite step was too large for them",
            fix=f"{WEAKER}{precision}, and start anew; or go back to a checkpoint from before step "
                f"{first if whole else first - 1} (the newest is {self.last_checkpoint() or 'none'})",
        ))

    @staticmethod
    def never_finite(steps: int, where: str) -> UserError:
        """The end of a run of which no step was finite: what the base model makes of the latents, not the training."""
        return UserError(Problem(
            f"nothing was learned: all {steps} steps were skipped", where, "no loss or gradient was finite from the "
            "first step on, so the base model overflows in this precision or is damaged; it is not the learning rate",
            NOT_THE_RATE, "nonfinite"))


def gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, which all are there."""
    return [p.grad for p in params if p.grad is not None]


def total_norm(grads: list[Tensor]) -> Tensor:
    """2-norm of all gradients as one vector -> a scalar on their device; a LoRA's hundreds of tensors in one call."""
    assert grads, "nothing trains in this step"
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def clip(grads: list[Tensor], norm: float, limit: float | None) -> None:
    """Scale `grads` in place so that their total norm is at most `limit` (None: no limit)."""
    scale = 1.0 if limit is None else limit / (norm + 1e-6)  # the same guard against 0 as torch's clip_grad_norm_
    if scale < 1:
        torch._foreach_mul_(grads, scale)
