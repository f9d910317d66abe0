"""Our Prodigy is prodigyopt's, bit for bit on a CPU, and asks the device for numbers once a step."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout

import prodigyopt
import pytest
import torch
from torch import Tensor, nn

from trainkit.optim import Prodigy, prodigy

SETTINGS: dict[str, dict] = {
    "defaults": {},
    "as the trainers give them": dict(safeguard_warmup=True, use_bias_correction=True, weight_decay=0.01, d_coef=4.0),
    "weight decay in the gradient": dict(decouple=False, weight_decay=0.1),
    "no momentum": dict(betas=(0.0, 0.99), weight_decay=0.01),
    "own beta3, a coefficient, slow growth": dict(beta3=0.9, d_coef=0.5, growth_rate=1.02),
    "every third element": dict(slice_p=3, safeguard_warmup=True, d0=1e-4),
    "a rate": dict(lr=0.3, use_bias_correction=True),
}
SHAPES = [(4, 7), (5, 4), (11,), (2, 3, 3, 3), (4, 16), (16, 4)]


def start() -> list[nn.Parameter]:
    """Weights as a LoRA's: every second one begins at 0."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * (i % 2 == 0)) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    """One direction, and noise: d grows."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) / 4 + (-1) ** i for i, shape in enumerate(SHAPES)]


def make(kind: type, **settings: object) -> torch.optim.Optimizer:
    with redirect_stdout(io.StringIO()):  # prodigyopt prints
        return kind(start(), **settings)


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def step(optimizer: torch.optim.Optimizer, number: int, *, rate: float | None = None, without: int = -1) -> None:
    for i, (p, gradient) in enumerate(zip(weights(optimizer), gradients(number), strict=True)):
        p.grad = None if i == without else gradient
    if rate is not None:
        optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    numbers = [[o.param_groups[0][name] for name in ("d", "d_max", "d_numerator", "k")] for o in (a, b)]
    states = [[o.state[p][name] for p in weights(o) for name in ("p0", "s", "exp_avg_sq")] for o in (a, b)]
    return (numbers[0] == numbers[1] and all(map(torch.equal, weights(a), weights(b)))
            and all(map(torch.equal, *states)))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("elements", [1, 40, 1 << 17], ids=["a chunk a tensor", "several", "one"])
def test_it_is_prodigyopts_bit_for_bit(name, elements, monkeypatch):
    monkeypatch.setitem(prodigy.ELEMENTS, "cpu", elements)
    theirs, ours = (make(kind, **SETTINGS[name]) for kind in (prodigyopt.Prodigy, Prodigy))
    for number in range(12):
        rate = 0.0 if number == 5 else SETTINGS[name].get("lr", 1.0)  # a schedule may pass through 0
        for optimizer in (theirs, ours):
            step(optimizer, number, rate=rate, without=2 if number == 7 else -1)
        assert same(theirs, ours), f"after step {number}"
    assert ours.param_groups[0]["d"] > ours.param_groups[0]["d0"], "d never moved: a vacuous test"


@pytest.mark.parametrize("first", [prodigyopt.Prodigy, Prodigy], ids=["of prodigyopt", "of ours"])
def test_it_goes_on_from_a_saved_state(first):
    whole, before, after = (make(kind, weight_decay=0.01) for kind in (Prodigy, first, Prodigy))
    for number in range(8):
        step(whole, number)
    for number in range(4):
        step(before, number)
    with torch.no_grad():
        torch._foreach_copy_(weights(after), weights(before))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for number in range(4, 8):
        step(after, number)
    assert same(whole, after)


def test_gradients_of_0_move_nothing():
    optimizer = make(Prodigy, weight_decay=0.1)
    for p in weights(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, weights(optimizer), start())) and optimizer.param_groups[0]["k"] == 0


def test_one_read_of_the_device_a_step(monkeypatch):
    optimizer, reads = make(Prodigy), []
    step(optimizer, 0)
    for name in ("item", "tolist"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor, real=real: reads.append(tensor.shape) or real(tensor))
    step(optimizer, 1)
    assert len(reads) == 1


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"d0": 0.0}, {"eps": 0.0}, {"betas": (1.0, 0.9)}, {"slice_p": 0}])
def test_numbers_that_it_cannot_use_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(Prodigy, **wrong)


def test_several_groups_are_refused():
    with pytest.raises(ValueError, match="one parameter group"):
        Prodigy([{"params": [p]} for p in start()])
