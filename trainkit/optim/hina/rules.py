"""The rules of HinaAdaptive over one chunk, in the order in which they act.

    g   gradient        W   weight        m, v   moments        u   update        lr   learning rate, of the schedule

`RULES` is that order: what changes the gradient, the moments, what changes the update without its direction being
final, what makes its direction final, what only scales it, and then the weights. Each rule is a function of a `Work`;
a rule without a flag always acts. What a rule needs of a tensor's shape stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.optim.hina import rank, regularize
from trainkit.optim.hina.roles import Role
from trainkit.optim.hina.settings import Group
from trainkit.optim.hina.work import TINY, Work, dot, norm, total

TAM_EPS = 1e-8
LEAST_REST = 1e-3  # the share of ||g|| that ⊥Grad finds orthogonal at least, where it restores the norm
AGREEMENT = 1e-3  # the share of coordinates that the cautious rule finds in agreement at least


def run(work: Work, rules: Sequence[Rule]) -> None:
    """Everything a step does to a chunk: weights and states change in place."""
    for rule in rules:
        rule.act(work)
        if work.done:
            return


def active(group: Group, shape: torch.Size, role: Role) -> list[Rule]:
    """The rules that act on tensors of a shape and a role, in order."""
    fit = [rule for rule in RULES if (not rule.flag or group[rule.flag]) and not rule.unfit(shape)]
    return [rule for rule in fit if not (role.spared and rule.flag == "lora_rank_penalty")]


# --- the gradient ---------------------------------------------------------------------------------------------------


def agr(work: Work) -> None:
    """g <- (1 - |g|/||g||_1) g: what stands out is held back; a tensor of one element gets none at all.

    Source: Jiang et al. 2024, "An Adaptive Gradient Regularization Method", arXiv:2407.16944.
    """
    shrinkage = torch.abs(work.g, out=work.a)
    shrinkage.mul_(total(shrinkage).clamp_(min=TINY).reciprocal_().neg_())
    work.g.addcmul_(work.g, shrinkage)
    work.gradient_changed()


def skip_infinite(work: Work) -> None:
    """A tensor whose gradient is not finite: its gradient counts as 0 here, and its weights stay where they are.

    Its moments decay as by a gradient of 0, and the rank penalty goes on. A gradient whose norm is beyond fp32 counts
    as infinite. After AGR, which spreads what is not finite over its own tensor only.
    """
    length = work.gradient_norm()
    if length.device.type == "cpu" and math.isfinite(float(length.sum())):  # elsewhere the look would wait
        return
    work.alive = length.isfinite()
    work.g.copy_(torch.where(work.alive, work.g, 0.0))
    work.gradient_changed(torch.where(work.alive, length, 0.0))


def remember_growth(work: Work) -> None:
    """For SPD, before ⊥Grad takes the very component it looks at: <g, W - W_0> and ||W - W_0||."""
    anchor = work.state.get("anchor")
    if anchor is None:
        work.growth, work.radius = work.weight_dot_gradient(), work.weight_norm()
        return
    away = torch.sub(work.w, anchor, out=work.q)
    work.radius = norm(away)
    work.growth = dot(away, work.g, work.a)


def orthogonal(work: Work) -> None:
    """g <- g - <W,g>/||W||² W, then as long as it was: no step changes the scale of W to first order.

    Left alone where ||W|| <= 1e-12. Restoring lengthens by 1000 at most: what is left of a gradient along W is noise.
    Source: Prieto et al. 2025, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.
    """
    weight, along, length = work.weight_norm(), work.weight_dot_gradient(), work.gradient_norm()
    projection = along / weight.square().clamp_(min=TINY) * (weight > 1e-12)
    lost = projection * weight / length.clamp(min=TINY)  # the cosine between g and W
    rest = (1 - lost.square_()).clamp_(min=0).sqrt_()  # ||g - projection W|| / ||g||
    if work.group["orthogonal_restore_norm"]:
        stretch = rest.clamp(min=LEAST_REST).reciprocal_()
        work.g.mul_(stretch)
        projection, rest = projection * stretch, rest * stretch
    work.g.addcmul_(work.w, projection.neg_())
    work.gradient_changed(rest.mul_(length))


# --- the moments ----------------------------------------------------------------------------------------------------


def adopt_start(work: Work) -> None:
    """ADOPT's first step: v_0 = g_0², and nothing moves."""
    if work.step == 1:
        work.state["exp_avg_sq"].addcmul_(work.g, work.g)
        work.done = True


def moments(work: Work) -> None:
    """Adam's u, or ADOPT's; TAM damps what enters the first moment of either.

    Adam:   m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g²,  u = m^ / (sqrt(v^) + eps)
    ADOPT:  g <- clip(g / max(sqrt(v), eps), ±t^(1/4)) with v of the step before,  m <- b1 m + (1-b1) g,  u = m
    Sources: Loshchilov & Hutter 2019, arXiv:1711.05101; Taniguchi et al. 2024, "ADOPT", arXiv:2411.02853.
    """
    (b1, b2), eps, v = work.group["betas"], work.group["eps"], work.state["exp_avg_sq"]
    if work.group["use_adopt_stability"]:
        torch.sqrt(v, out=work.q).clamp_(min=max(eps, TINY))
        v.mul_(b2).addcmul_(work.g, work.g, value=1 - b2)
        bound = (work.step - 1) ** 0.25
        work.g.div_(work.q).clamp_(-bound, bound)
        work.gradient_changed()
        work.u = first_moment(work, b1)
        return
    v.mul_(b2).addcmul_(work.g, work.g, value=1 - b2)
    correction = 1 - b1**work.step, (1 - b2**work.step) ** 0.5
    torch.sqrt(v, out=work.q)
    below = torch.add(work.q, max(eps * correction[1], TINY), out=work.out)
    work.u = torch.div(first_moment(work, b1), below, out=work.out)
    work.scale = correction[1] / correction[0]


def first_moment(work: Work, b1: float) -> Tensor:
    """m <- b1 m + (1-b1) d g, where TAM's d measures how steadily gradients agree with the momentum; else 1.

    s = cos(m, g) of the m before,  s^ <- c s^ + (1-c) s,  d = eps + (1 + s^)/2 in [0,1], 1/2 for pure noise
    Source: Malviya et al. 2024, "Torque-Aware Momentum", arXiv:2412.18790 (AdaTAM).
    """
    m = work.state["exp_avg"]
    if not work.group["use_tam"]:
        return m.lerp_(work.g, 1 - b1)
    length = (norm(m) * work.gradient_norm()).clamp_(min=TINY)
    cosine = (dot(m, work.g, work.a) / length).clamp_(-1, 1)
    smooth = work.state["tam"]
    smooth.lerp_(cosine, 1 - work.group["tam_beta"])
    return m.mul_(b1).addcmul_(work.g, smooth.add(1 + 2 * TAM_EPS).mul_((1 - b1) / 2))


# --- the direction --------------------------------------------------------------------------------------------------


def grams(work: Work) -> None:
    """u <- sign(g) |u|: the moments say how far, the gradient where to.

    Source: Cao, Li & Song 2024, "Grams: Gradient Descent with Adaptive Momentum Scaling", arXiv:2412.17107.
    """
    work.u = torch.abs(work.u, out=work.out).mul_(torch.sign(work.g, out=work.a))


def cautious(work: Work) -> None:
    """u <- u·1[u g > 0] / mean(1[u g > 0]): no coordinate moves against its gradient. After Grams none would.

    Source: Liang et al. 2024, "Cautious Optimizers", arXiv:2411.16085.
    """
    if work.group["use_grams"]:
        return
    agrees = torch.mul(work.u, work.g, out=work.a).gt_(0)
    fraction = total(agrees).div_(work.numel)
    work.u = torch.mul(work.u, agrees, out=work.out)
    work.scale = fraction.clamp_(min=AGREEMENT).reciprocal_() * work.scale


# --- scales ---------------------------------------------------------------------------------------------------------


def lr_mask(work: Work) -> None:
    """u <- M/M_0 u, with a learning rate M for each element that grows while its updates keep their sign.

    M <- clip(M + bump · sign(u) · sign(last u that was not 0), min_lr, max_lr), from M_0, the constructor's lr. The
    state holds M with that last sign as its own. The first step moves no M, nor does any after `warmup_steps`.
    Source: the Automagic optimizer of ostris/ai-toolkit.
    """
    group, kept = work.group, work.state["lr_mask"]
    rate = torch.abs(kept, out=work.a)
    if group["lr_mask_always"] or work.step <= max(1, group["warmup_steps"]):
        if work.step > 1:
            agreement = torch.mul(work.u, kept, out=work.q).sign_()
            rate.add_(agreement, alpha=group["lr_bump"]).clamp_(group["min_lr"], group["max_lr"])
        sign = torch.add(work.u, kept, alpha=TINY, out=work.q)  # u's, and the kept one's where u is 0
        torch.copysign(rate, sign, out=kept)
    work.u = torch.mul(work.u, rate, out=work.out)
    work.scale = work.scale / group["mask_lr"]


# --- the weights ----------------------------------------------------------------------------------------------------


def decay_rate(group: Group, step: int) -> float:
    """lambda · max(wd_min_ratio, wd_decay_factor^((t - T)/T)) in step t > T = wd_transition_steps; before it lambda."""
    late = step / group["wd_transition_steps"] - 1
    if not group["dynamic_weight_decay"] or late <= 0:
        return group["weight_decay"]
    return group["weight_decay"] * max(group["wd_min_ratio"], group["wd_decay_factor"] ** late)


def apply(work: Work) -> None:
    """W <- W (1 - lr lambda_t) - lr scale u."""
    lr, scale = work.group["lr"], work.scale
    keep = 1 - lr * decay_rate(work.group, work.step)
    if work.alive is not None:
        scale = torch.where(work.alive, scale, 0.0)
        keep = torch.where(work.alive, keep, 1.0)
    if isinstance(keep, Tensor) or keep != 1:
        work.w.mul_(keep)
    if isinstance(scale, Tensor):
        work.w.addcmul_(work.u, scale * -lr)
    else:
        work.w.add_(work.u, alpha=-lr * scale)


def spd(work: Work) -> None:
    """Where the descent leads back to W_0, shorten the way that is left: W <- W - lambda r (W - W_0).

    r = max(0, 1 - ||W_before - W_0||/||W - W_0||), so that lambda = 1 gives back the radius before the step.
    Source: Tian, Huang & Kira 2024, "Rethinking Weight Decay for Robust Fine-Tuning", arXiv:2411.01713.
    """
    assert work.radius is not None and work.growth is not None, "remember_growth acts before"
    anchor = work.state.get("anchor")
    now = norm(work.w if anchor is None else torch.sub(work.w, anchor, out=work.a))
    ratio = (1 - work.radius / now.clamp(min=TINY)).clamp_(min=0)
    back = ratio.mul_(work.growth > 0).mul_(work.group["spd_lambda"])
    if anchor is None:
        work.w.mul_(1 - back)  # exactly 1 where nothing is to be done
    else:
        work.w.addcmul_(torch.sub(anchor, work.w, out=work.a), back)


# --- the order ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """flag: the setting that switches it on, "" for what always acts; unfit: why it cannot act on a shape, else ""."""

    flag: str
    act: Callable[[Work], None]
    unfit: Callable[[torch.Size], str] = lambda shape: ""


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
