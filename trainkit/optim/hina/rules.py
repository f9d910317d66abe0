"""The rules of HinaAdaptive over one chunk, in the order in which they act.

    g   gradient        W   weight        m, v   moments        u   update        lr   learning rate, of the schedule

`RULES` is that order: what changes the gradient, the moments, what changes the update without its direction being
final, what makes its direction final, what only scales it, and then the weights. Each rule is a function of a
`ChunkState`; a rule without a flag always acts. What a rule needs of a tensor's shape stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.optim.hina import rank, regularize
from trainkit.optim.hina.chunk_state import TINY, ChunkState, dot, norm, total
from trainkit.optim.hina.roles import Role
from trainkit.optim.hina.settings import Group

TAM_EPS = 1e-8
LEAST_REST = 1e-3  # the fraction of ||g|| that ⊥Grad finds orthogonal at least, where it restores the norm
AGREEMENT = 1e-3  # the fraction of coordinates that the cautious rule finds in agreement at least


def run(chunk: ChunkState, rules: Sequence[Rule]) -> None:
    """Everything a step does to a chunk: weights and states change in place."""
    for rule in rules:
        rule.act(chunk)
        if chunk.done:
            return


def active(group: Group, shape: torch.Size, role: Role) -> list[Rule]:
    """The rules that act on tensors of a shape and a role, in order."""
    fit = [rule for rule in RULES if (not rule.flag or group[rule.flag]) and not rule.inapplicable(shape)]
    return [rule for rule in fit if not (role.spared and rule.flag == "lora_rank_penalty")]


# --- the gradient ---------------------------------------------------------------------------------------------------


def agr(chunk: ChunkState) -> None:
    """g <- (1 - |g|/||g||_1) g: what stands out is held back; a tensor of one element gets none at all.

    Source: Jiang et al. 2024, "An Adaptive Gradient Regularization Method", arXiv:2407.16944.
    """
    shrinkage = torch.abs(chunk.g, out=chunk.a)
    shrinkage.mul_(total(shrinkage).clamp_(min=TINY).reciprocal_().neg_())
    chunk.g.addcmul_(chunk.g, shrinkage)
    chunk.gradient_changed()


def skip_infinite(chunk: ChunkState) -> None:
    """A tensor whose gradient is not finite: its gradient counts as 0 here, and its weights stay where they are.

    Its moments decay as by a gradient of 0, and the rank penalty goes on. A gradient whose norm is beyond fp32 counts
    as infinite. After AGR, which spreads what is not finite over its own tensor only.
    """
    length = chunk.gradient_norm()
    if length.device.type == "cpu" and math.isfinite(float(length.sum())):  # elsewhere the look would wait
        return
    chunk.alive = length.isfinite()
    chunk.g.copy_(torch.where(chunk.alive, chunk.g, 0.0))
    chunk.gradient_changed(torch.where(chunk.alive, length, 0.0))


def remember_growth(chunk: ChunkState) -> None:
    """For SPD, before ⊥Grad takes the very component it looks at: <g, W - W_0> and ||W - W_0||."""
    anchor = chunk.state.get("anchor")
    if anchor is None:
        chunk.growth, chunk.radius = chunk.weight_dot_gradient(), chunk.weight_norm()
        return
    away = torch.sub(chunk.w, anchor, out=chunk.q)
    chunk.radius = norm(away)
    chunk.growth = dot(away, chunk.g, chunk.a)


def orthogonal(chunk: ChunkState) -> None:
    """g <- g - <W,g>/||W||² W, then as long as it was: no step changes the scale of W to first order.

    Left alone where ||W|| <= 1e-12. Restoring lengthens by 1000 at most: what is left of a gradient along W is noise.
    Source: Prieto et al. 2025, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.
    """
    weight, along, length = chunk.weight_norm(), chunk.weight_dot_gradient(), chunk.gradient_norm()
    projection = along / weight.square().clamp_(min=TINY) * (weight > 1e-12)
    lost = projection * weight / length.clamp(min=TINY)  # the cosine between g and W
    rest = (1 - lost.square_()).clamp_(min=0).sqrt_()  # ||g - projection W|| / ||g||
    if chunk.group["orthogonal_restore_norm"]:
        stretch = rest.clamp(min=LEAST_REST).reciprocal_()
        chunk.g.mul_(stretch)
        projection, rest = projection * stretch, rest * stretch
    chunk.g.addcmul_(chunk.w, projection.neg_())
    chunk.gradient_changed(rest.mul_(length))


# --- the moments ----------------------------------------------------------------------------------------------------


def adopt_start(chunk: ChunkState) -> None:
    """ADOPT's first step: v_0 = g_0², and nothing moves."""
    if chunk.step == 1:
        chunk.state["exp_avg_sq"].addcmul_(chunk.g, chunk.g)
        chunk.done = True


def moments(chunk: ChunkState) -> None:
    """Adam's u, or ADOPT's; TAM damps what enters the first moment of either.

    Adam:   m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g²,  u = m^ / (sqrt(v^) + eps)
    ADOPT:  g <- clip(g / max(sqrt(v), eps), ±t^(1/4)) with v of the step before,  m <- b1 m + (1-b1) g,  u = m
    Sources: Loshchilov & Hutter 2019, arXiv:1711.05101; Taniguchi et al. 2024, "ADOPT", arXiv:2411.02853.
    """
    (b1, b2), eps, v = chunk.group["betas"], chunk.group["eps"], chunk.state["exp_avg_sq"]
    if chunk.group["use_adopt_stability"]:
        torch.sqrt(v, out=chunk.q).clamp_(min=max(eps, TINY))
        v.mul_(b2).addcmul_(chunk.g, chunk.g, value=1 - b2)
        bound = (chunk.step - 1) ** 0.25
        chunk.g.div_(chunk.q).clamp_(-bound, bound)
        chunk.gradient_changed()
        chunk.u = first_moment(chunk, b1)
        return
    v.mul_(b2).addcmul_(chunk.g, chunk.g, value=1 - b2)
    correction = 1 - b1**chunk.step, (1 - b2**chunk.step) ** 0.5
    torch.sqrt(v, out=chunk.q)
    below = torch.add(chunk.q, max(eps * correction[1], TINY), out=chunk.out)
    chunk.u = torch.div(first_moment(chunk, b1), below, out=chunk.out)
    chunk.scale = correction[1] / correction[0]


def first_moment(chunk: ChunkState, b1: float) -> Tensor:
    """m <- b1 m + (1-b1) d g, where TAM's d measures how steadily gradients agree with the momentum; else 1.

    s = cos(m, g) of the m before,  s^ <- c s^ + (1-c) s,  d = eps + (1 + s^)/2 in [0,1], 1/2 for pure noise
    Source: Malviya et al. 2024, "Torque-Aware Momentum", arXiv:2412.18790 (AdaTAM).
    """
    m = chunk.state["exp_avg"]
    if not chunk.group["use_tam"]:
        return m.lerp_(chunk.g, 1 - b1)
    length = (norm(m) * chunk.gradient_norm()).clamp_(min=TINY)
    cosine = (dot(m, chunk.g, chunk.a) / length).clamp_(-1, 1)
    smooth = chunk.state["tam"]
    smooth.lerp_(cosine, 1 - chunk.group["tam_beta"])
    return m.mul_(b1).addcmul_(chunk.g, smooth.add(1 + 2 * TAM_EPS).mul_((1 - b1) / 2))


# --- the direction --------------------------------------------------------------------------------------------------


def grams(chunk: ChunkState) -> None:
    """u <- sign(g) |u|: the moments say how far, the gradient where to.

    Source: Cao, Li & Song 2024, "Grams: Gradient Descent with Adaptive Momentum Scaling", arXiv:2412.17107.
    """
    chunk.u = torch.abs(chunk.u, out=chunk.out).mul_(torch.sign(chunk.g, out=chunk.a))


def cautious(chunk: ChunkState) -> None:
    """u <- u·1[u g > 0] / mean(1[u g > 0]): no coordinate moves against its gradient. After Grams none would.

    Source: Liang et al. 2024, "Cautious Optimizers", arXiv:2411.16085.
    """
    if chunk.group["use_grams"]:
        return
    agrees = torch.mul(chunk.u, chunk.g, out=chunk.a).gt_(0)
    fraction = total(agrees).div_(chunk.numel)
    chunk.u = torch.mul(chunk.u, agrees, out=chunk.out)
    chunk.scale = fraction.clamp_(min=AGREEMENT).reciprocal_() * chunk.scale


# --- scales ---------------------------------------------------------------------------------------------------------


def lr_mask(chunk: ChunkState) -> None:
    """u <- M/M_0 u, with a learning rate M for each element that grows while its updates keep their sign.

    M <- clip(M + bump · sign(u) · sign(last u that was not 0), min_lr, max_lr), from M_0, the constructor's lr. The
    state holds M with that last sign as its own. The first step moves no M, nor does any after `warmup_steps`.
    Source: the Automagic optimizer of ostris/ai-toolkit.
    """
    group, kept = chunk.group, chunk.state["lr_mask"]
    rate = torch.abs(kept, out=chunk.a)
    if group["lr_mask_always"] or chunk.step <= max(1, group["warmup_steps"]):
        if chunk.step > 1:
            agreement = torch.mul(chunk.u, kept, out=chunk.q).sign_()
            rate.add_(agreement, alpha=group["lr_bump"]).clamp_(group["min_lr"], group["max_lr"])
        sign = torch.add(chunk.u, kept, alpha=TINY, out=chunk.q)  # u's, and the kept one's where u is 0
        torch.copysign(rate, sign, out=kept)
    chunk.u = torch.mul(chunk.u, rate, out=chunk.out)
    chunk.scale = chunk.scale / group["mask_lr"]


# --- the weights ----------------------------------------------------------------------------------------------------


def decay_rate(group: Group, step: int) -> float:
    """lambda · max(wd_min_ratio, wd_decay_factor^((t - T)/T)) in step t > T = wd_transition_steps; before it lambda."""
    late = step / group["wd_transition_steps"] - 1
    if not group["dynamic_weight_decay"] or late <= 0:
        return group["weight_decay"]
    return group["weight_decay"] * max(group["wd_min_ratio"], group["wd_decay_factor"] ** late)


def apply(chunk: ChunkState) -> None:
    """W <- W (1 - lr lambda_t) - lr scale u."""
    lr, scale = chunk.group["lr"], chunk.scale
    keep = 1 - lr * decay_rate(chunk.group, chunk.step)
    if chunk.alive is not None:
        scale = torch.where(chunk.alive, scale, 0.0)
        keep = torch.where(chunk.alive, keep, 1.0)
    if isinstance(keep, Tensor) or keep != 1:
        chunk.w.mul_(keep)
    if isinstance(scale, Tensor):
        chunk.w.addcmul_(chunk.u, scale * -lr)
    else:
        chunk.w.add_(chunk.u, alpha=-lr * scale)


def spd(chunk: ChunkState) -> None:
    """Where the descent leads back to W_0, shorten the way that is left: W <- W - lambda r (W - W_0).

    r = max(0, 1 - ||W_before - W_0||/||W - W_0||), so that lambda = 1 gives back the radius before the step.
    Source: Tian, Huang & Kira 2024, "Rethinking Weight Decay for Robust Fine-Tuning", arXiv:2411.01713.
    """
    assert chunk.radius is not None and chunk.growth is not None, "remember_growth acts before"
    anchor = chunk.state.get("anchor")
    now = norm(chunk.w if anchor is None else torch.sub(chunk.w, anchor, out=chunk.a))
    ratio = (1 - chunk.radius / now.clamp(min=TINY)).clamp_(min=0)
    back = ratio.mul_(chunk.growth > 0).mul_(chunk.group["spd_lambda"])
    if anchor is None:
        chunk.w.mul_(1 - back)  # exactly 1 where nothing is to be done
    else:
        chunk.w.addcmul_(torch.sub(anchor, chunk.w, out=chunk.a), back)


# --- the order ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """flag: the setting that switches it on, "" for what always acts.

    inapplicable  why it cannot act on a shape, else ""
    """

    flag: str
    act: Callable[[ChunkState], None]
    inapplicable: Callable[[torch.Size], str] = lambda shape: ""


RULES = (
    Rule("use_agr", agr),
    Rule("", skip_infinite),
    Rule("use_spd", remember_growth),
    Rule("use_orthogonal_grad", orthogonal, regularize.no_matrix),
    Rule("use_adopt_stability", adopt_start),
    Rule("", moments),  # Adam's or ADOPT's, with or without TAM
    Rule("use_dynamic_adaptation", regularize.measure),
    Rule("background_regularization", regularize.background),
    Rule("spatial_awareness", regularize.spatial, regularize.no_kernel),
    Rule("edge_suppression", regularize.edge, regularize.no_matrix),
    Rule("use_grams", grams),
    Rule("use_cautious", cautious),
    Rule("use_lr_mask", lr_mask),
    Rule("use_dynamic_adaptation", regularize.adapt),
    Rule("", apply),
    Rule("use_spd", spd),
    Rule("lora_rank_penalty", rank.proximal, regularize.no_matrix),
)


def states(group: Group, role: Role) -> tuple[list[str], list[str]]:
    """Names of what is kept for each element, and for each tensor, of a group and a role in it."""
    elements = ["exp_avg", "exp_avg_sq"] + ["lr_mask"] * group["use_lr_mask"] + ["anchor"] * role.anchored
    return elements, ["tam"] * group["use_tam"] + ["signal", "adapt_scale"] * group["use_dynamic_adaptation"]


def initial(group: Group) -> dict[str, float | Callable[[Tensor], Tensor]]:
    """How states begin that do not begin at 0."""
    return {"lr_mask": group["mask_lr"], "anchor": lambda w: w, "adapt_scale": 1.0}
