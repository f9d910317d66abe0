"""HinaAdaptive as an optimizer: AdamW when all is off, state, resume, settings, reports. Rules: test_hina_rules.py."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import logging
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit.optim.hina import HinaAdaptive
from trainkit.optim.hina.settings import DEFAULTS, FORK, RULE_FLAGS

SHAPES = ((4, 12), (20, 4), (4, 12), (20, 4), (6, 3, 3, 3), (7,), (), (0, 3))
ALL = dict.fromkeys(RULE_FLAGS, True)
OFTEN = {"relationship_discovery_interval": 3, "rank_penalty_interval": 2, "lr": 5e-4}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def parameters(seed: int = 0, shapes=SHAPES, dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params: list, step: int, without: set[int] = frozenset()) -> None:
    """Noise around a constant, a function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator) + 0.3
        p.grad = None if i in without else noise.to(p)


def train(opt: torch.optim.Optimizer, params: list, steps: range, without=lambda step: frozenset()) -> None:
    for step in steps:
        give_gradients(params, step, without(step))
        opt.step()


def saved(opt: torch.optim.Optimizer) -> dict:
    """The state dict as it comes back from a file that may hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"tensor {i} of shape {tuple(a.shape)}: {(a - b).abs().max():g} apart"


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip((p for g in a.param_groups for p in g["params"]), (q for g in b.param_groups for q in g["params"]),
                    strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype
            assert torch.equal(value, b.state[q][name]), name


# --- all off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.1])
def test_all_off_is_adamw_bit_for_bit(kernel, weight_decay):
    """H1: two groups, mixed shapes, gradients that come and go."""
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2, "betas": (0.8, 0.99)}]

    a = HinaAdaptive(groups(ours), lr=1e-3, weight_decay=weight_decay, memory_efficient=True, **kernel)
    b = torch.optim.AdamW(groups(theirs), lr=1e-3, weight_decay=weight_decay, **kernel)
    for step in range(200):
        without = {step % 5, 4}
        give_gradients(ours, step, without)
        give_gradients(theirs, step, without)
        a.step()
        b.step()
    assert_same(ours, theirs)
    assert_same_state(a, b)


def test_the_rules_path_without_an_active_rule_is_adamw_to_rounding():
    """H1: space is off on matrices, so only the path differs from AdamW's, and not its arithmetic."""
    ours, theirs = parameters(shapes=SHAPES[:4]), parameters(shapes=SHAPES[:4])
    a, b = HinaAdaptive(ours, spatial_awareness=True, weight_decay=0.1), torch.optim.AdamW(theirs, weight_decay=0.1)
    train(a, ours, range(200))
    train(b, theirs, range(200))
    assert max((x - y).abs().max() for x, y in zip(ours, theirs, strict=True)) <= 1e-6


def test_it_and_adamw_load_each_others_state():
    ours, theirs = parameters(), parameters()
    a, b = HinaAdaptive(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
    train(b, theirs, range(5))
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    a.load_state_dict(saved(b))
    train(a, ours, range(5, 9))
    train(b, theirs, range(5, 9))
    assert_same(ours, theirs)
    fresh = torch.optim.AdamW(theirs, lr=7.0)
    fresh.load_state_dict(saved(a))
    train(fresh, theirs, range(9, 12))
    train(a, ours, range(9, 12))
    assert_same(ours, theirs)


def test_a_state_dict_with_amsgrad_or_of_another_schema_is_refused():
    params = parameters()
    with pytest.raises(ValueError, match="amsgrad"):
        HinaAdaptive(params).load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())
    other = HinaAdaptive(params).state_dict()
    other["param_groups"][0]["schema"] = 99
    with pytest.raises(ValueError, match="99"):
        HinaAdaptive(params).load_state_dict(other)


@pytest.mark.parametrize("flags", [{}, ALL], ids=["plain", "all"])
def test_a_schedule_multiplies_every_step(flags):
    """H2: lr scales the way of a step without decay, SPD and rank penalty, which have their own measure."""
    flags = flags | dict.fromkeys(("use_spd", "lora_rank_penalty"), False) if flags else flags

    def way(factor: float) -> list[Tensor]:
        params = parameters(shapes=SHAPES[:7])
        opt = HinaAdaptive(params, lr=5e-4, weight_decay=0.0, **flags)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 if step < 4 else factor)
        for step in range(5):
            start = [p.detach().double().clone() for p in params]
            give_gradients(params, step)
            opt.step()
            schedule.step()
        return [p.detach() - s for p, s in zip(params, start, strict=True)]

    for whole, half in zip(way(1.0), way(0.5), strict=True):
        assert torch.allclose(whole, 2 * half, atol=1e-6)


# --- state ----------------------------------------------------------------------------------------------------------

FEATURES = {flag: {flag: True} for flag in RULE_FLAGS} | {
    "plain": {},
    "anchor": {"use_spd": True, "spd_anchor": "init"},
    "mask always": {"use_lr_mask": True, "lr_mask_always": True},
    "product": {"lora_rank_penalty": True, "rank_penalty_target": "product"},
    "reduced": {"reduce_precision": True, "use_lr_mask": True},
    "fork": {"preset": "fork"},
    "all": ALL,
    "all reduced": ALL | {"reduce_precision": True, "spd_anchor": "init"},
}


@pytest.mark.trains
@pytest.mark.parametrize("settings", [ALL, FEATURES["all reduced"]], ids=["all", "all reduced"])
def test_two_hundred_steps_keep_no_more_tensors_than_ten(settings):
    """H27: no leak with every rule on, in the states or beside them."""
    params = parameters()
    opt = HinaAdaptive(params, **(OFTEN | settings))

    def kept() -> tuple[int, int, int]:
        gc.collect()
        alive = [x for x in gc.get_objects() if isinstance(x, Tensor)]
        return len(alive), sum(x.numel() for x in alive), opt.get_memory_stats()["state_bytes"]["total"]

    train(opt, params, range(10))
    before = kept()
    train(opt, params, range(10, 200))
    assert kept() == before


@pytest.mark.parametrize("settings", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run_it_resumes(settings, dtype):
    """H3, H5: bit for bit, into a new object with other settings, parameters without gradients included."""
    settings = OFTEN | settings
    whole, other = parameters(dtype=dtype), parameters(1, dtype=dtype)

    def absent(step):
        return {5} if step < 6 else {0, step % 3}

    a = HinaAdaptive(whole, **settings)
    train(a, whole, range(7), absent)
    b = HinaAdaptive(other, lr=0.5, **({"use_tam": True} if not settings.get("use_tam") else {}))
    b.load_state_dict(saved(a))
    with torch.no_grad():
        for p, q in zip(whole, other, strict=True):
            q.copy_(p)
    train(a, whole, range(7, 12), absent)
    train(b, other, range(7, 12), absent)
    assert_same(whole, other)
    assert_same_state(a, b)


def test_a_copy_of_the_optimizer_steps_like_it():
    params = parameters()
    opt = HinaAdaptive(params, **OFTEN, **ALL)
    train(opt, params, range(4))
    both = copy.deepcopy({"opt": opt, "params": params})
    train(opt, params, range(4, 8))
    train(both["opt"], both["params"], range(4, 8))
    assert_same(params, both["params"])


def test_state_appears_with_the_first_gradient_and_never_for_frozen_parameters():
    """H9"""
    params = parameters()
    params[1].requires_grad_(False)
    opt = HinaAdaptive(params, **ALL)
    assert not opt.state
    train(opt, params, range(3), lambda step: {1, 2})
    assert params[1] not in opt.state and params[2] not in opt.state
    assert {"step", "exp_avg", "exp_avg_sq", "lr_mask", "tam", "signal", "adapt_scale"} == opt.state[params[0]].keys()


def test_anchor_zero_keeps_no_anchor():
    """H18"""
    params = parameters()
    zero, init = (HinaAdaptive(params, use_spd=True, spd_anchor=anchor) for anchor in ("zero", "init"))
    train(zero, params, range(1))
    before = [p.detach().clone() for p in params]
    train(init, params, range(3))
    assert "anchor" not in zero.state[params[0]]
    assert_same([init.state[p]["anchor"] for p in params[:4]], before[:4])


ADAPTER = {
    "down.0.conv.lora_A.weight": (4, 3, 3, 3), "down.0.conv.lora_B.weight": (12, 4, 1, 1),
    "down.0.conv.lora_magnitude_vector.weight": (1, 12, 1, 1),
    "up.q.lora_A.weight": (4, 12), "up.q.lora_B.weight": (20, 4),
    "up.k.hada_w1_a": (4, 12), "up.v.lokr_w1": (3, 3), "clip_l.token_embedding.new.weight": (4, 12),
    "up.norm.weight": (12,), "up.proj.weight": (20, 12)}
AT_START = {"down.0.conv.lora_magnitude_vector.weight", "clip_l.token_embedding.new.weight", "up.norm.weight",
            "up.proj.weight"}


def named(seed: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    """One of every kind of tensor that the trainers train, and two of full fine-tuning."""
    return list(zip(ADAPTER, parameters(seed, ADAPTER.values()), strict=True))


def test_factors_are_drawn_to_0_and_keep_no_anchor_and_all_else_is_drawn_to_its_start():
    """H18, "auto" by names: each tensor goes as with "zero" or with "init", and three of one shape differ."""
    def go(anchor: str) -> tuple[HinaAdaptive, dict[str, Tensor]]:
        weights = dict(named())
        opt = HinaAdaptive(weights.items(), lr=1e-2, weight_decay=0.0, use_spd=True, spd_lambda=0.5, spd_anchor=anchor)
        for step in range(30):
            give_gradients([*weights.values()], step % 7)
            opt.step()
        return opt, weights

    (opt, auto), (_, zero), (_, init) = map(go, ("auto", "zero", "init"))
    assert {name for name, p in auto.items() if "anchor" in opt.state[p]} == AT_START
    for name, p in auto.items():
        assert torch.equal(p, (init if name in AT_START else zero)[name]), name
        assert not torch.equal(init[name], zero[name]), "else this proves nothing"
    assert opt.get_optimization_info()["active_on"]["use_spd"] == (
        "10 of 10 tensors, 4 drawn to their start and the others to 0")


def test_without_names_the_members_of_a_pair_are_drawn_to_0():
    params = parameters()
    opt = HinaAdaptive(params, use_spd=True)
    train(opt, params, range(1))
    assert ["anchor" in opt.state[p] for p in params[:7]] == [False] * 4 + [True] * 3
    lora = HinaAdaptive(params[:4], use_spd=True).get_optimization_info()["active_on"]["use_spd"]
    assert lora == "4 of 4 tensors, drawn to 0"


@pytest.mark.parametrize("target", ["factors", "product"])
def test_the_rank_penalty_spares_new_tokens_and_magnitudes(target):
    """The magnitude of a convolution has four axes, and is no matrix for that."""
    def go(weights: list) -> list[Tensor]:
        opt = HinaAdaptive(weights, lr=0.1, weight_decay=0.0, lora_rank_penalty=True, rank_penalty_strength=1.0,
                           rank_penalty_interval=1, rank_penalty_target=target)
        params = opt.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        words.append(opt.get_optimization_info()["active_on"]["lora_rank_penalty"])
        return [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]

    words: list[str] = []
    moved = dict(zip(ADAPTER, go(named()), strict=True))
    spared = {"clip_l.token_embedding.new.weight", "down.0.conv.lora_magnitude_vector.weight", "up.norm.weight"}
    wanted = {n for n in ADAPTER if "lora_B" in n} if target == "product" else ADAPTER.keys() - spared
    assert {name for name, far in moved.items() if far} == wanted
    assert f"{len(wanted)} of 10 tensors: " in words[0]
    assert "its rows are tokens" in words[0] and "magnitude" in words[0]
    if target == "factors":
        assert sum(go([p for _, p in named()])) == 9, "a name is what tells"


def test_a_run_of_named_tensors_resumes_bit_for_bit():
    """H3, where tensors of one shape differ in what is kept of them."""
    settings = OFTEN | ALL | {"reduce_precision": True}
    whole, other = named(), named(1)
    a = HinaAdaptive(whole, **settings)
    train(a, [p for _, p in whole], range(5))
    b = HinaAdaptive(other, **settings)
    b.load_state_dict(saved(a))
    with torch.no_grad():
        for (_, p), (_, q) in zip(whole, other, strict=True):
            q.copy_(p)
    train(a, [p for _, p in whole], range(5, 9))
    train(b, [p for _, p in other], range(5, 9))
    assert_same([p for _, p in whole], [p for _, p in other])
    assert_same_state(a, b)


# --- determinism ----------------------------------------------------------------------------------------------------


def run_of(shapes, **settings) -> list[Tensor]:
    params = parameters(shapes=shapes)
    opt = HinaAdaptive(params, **OFTEN, **settings)
    train(opt, params, range(3))
    return [p.detach() for p in params]


LARGE = ((16, 4096), (300, 16), (70000,), (1, 40001))  # some past the 32768 elements from which torch uses threads


def numbers_with(threads: int) -> list[np.ndarray]:
    torch.set_num_threads(threads)
    random.seed(threads), torch.manual_seed(threads)
    return [p.numpy() for p in run_of(LARGE, **ALL, reduce_precision=True)]


@pytest.mark.trains
def test_threads_and_the_seeds_of_python_change_no_bit():
    """H6, with states that are rounded at random. In a child: trainers are forked from processes of one thread."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as child:
        one, two = (child.submit(numbers_with, threads).result() for threads in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("settings", [{}, ALL, ALL | {"rank_penalty_target": "product"}, {"reduce_precision": True}],
                         ids=["plain", "all", "product", "reduced"])
def test_memory_limits_change_no_bit(settings):
    whole = run_of(LARGE, **settings)
    assert_same(whole, run_of(LARGE, **settings, memory_efficient=True, max_buffer_memory_mb=0.5, vram_budget_gb=0.1))


def test_tensors_are_updated_alike_alone_and_among_others():
    """A bucket of equal shapes is one stack; what happens to its rows must not depend on their neighbours."""
    flags = {flag: flag != "use_dynamic_adaptation" for flag in RULE_FLAGS} | {"spd_anchor": "init"}
    params, alone = parameters(), parameters()
    together = HinaAdaptive(params, **OFTEN, **flags)
    single = [HinaAdaptive([p], **OFTEN, **flags) for p in alone]
    for step in range(6):
        give_gradients(params, step)
        give_gradients(alone, step)
        together.step()
        for opt in single:
            opt.step()
    assert_same(params, alone)


def test_permuting_the_parameters_permutes_what_happens_to_them():
    order = [3, 0, 5, 2, 1, 6, 4]
    params, mixed = parameters(shapes=SHAPES[:7]), parameters(shapes=SHAPES[:7])
    flags = ALL | {"use_dynamic_adaptation": False, "spd_anchor": "init"}  # pairs are found by neighbourhood here
    a, b = HinaAdaptive(params, **OFTEN, **flags), HinaAdaptive([mixed[i] for i in order], **OFTEN, **flags)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(mixed, step)
        a.step()
        b.step()
    assert_same(params, mixed)


# --- odd inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, ALL], ids=["plain", "all"])
def test_a_closure_runs_with_gradients_on(flags):
    """H7"""
    params = parameters(shapes=SHAPES[:2])
    opt = HinaAdaptive(params, **flags)

    def closure():
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(40)]
    assert losses[-1] < losses[0]


def test_layout_of_weights_and_gradients_does_not_matter():
    """H7: channels_last weights, transposed gradients."""
    plain, odd = parameters(shapes=((6, 3, 3, 3), (5, 9))), parameters(shapes=((6, 3, 3, 3), (5, 9)))
    odd[0].data = odd[0].data.to(memory_format=torch.channels_last)
    a, b = HinaAdaptive(plain, **OFTEN, **ALL), HinaAdaptive(odd, **OFTEN, **ALL)
    for step in range(5):
        give_gradients(plain, step)
        give_gradients(odd, step)
        odd[0].grad = odd[0].grad.to(memory_format=torch.channels_last)
        odd[1].grad = odd[1].grad.T.contiguous().T
        a.step()
        b.step()
    assert_same(plain, odd)
    assert odd[0].is_contiguous(memory_format=torch.channels_last)


def test_empty_groups_and_steps_without_gradients_pass():
    opt = HinaAdaptive([{"params": []}, {"params": parameters()}], **ALL)
    opt.step()
    assert not opt.state


def test_sparse_gradients_complex_and_half_parameters_are_refused():
    """H7"""
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    for flags in ({}, ALL):
        with pytest.raises(ValueError, match="SparseAdam"):
            HinaAdaptive(embedding.parameters(), **flags).step()
    for dtype in (torch.float16, torch.complex64):
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            HinaAdaptive([torch.nn.Parameter(torch.zeros(2, dtype=dtype))])


@pytest.mark.parametrize("settings", [ALL, ALL | {"use_adopt_stability": False, "use_grams": False},
                                      {"reduce_precision": True}], ids=["all", "adam", "reduced"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_one_infinite_gradient_harms_its_own_tensor_only_and_that_one_stands_still(settings, bad):
    """H32: among neighbours of its own shape, so in one stack with them."""
    settings = OFTEN | settings | {"use_dynamic_adaptation": False, "rank_penalty_interval": 3}
    params, clean = parameters(), parameters()
    a, b = HinaAdaptive(params, **settings), HinaAdaptive(clean, **settings)
    for step in range(8):
        give_gradients(params, step)
        give_gradients(clean, step)
        before = params[0].detach().clone()
        if step == 3:
            params[0].grad[1, 2] = bad
        a.step()
        b.step()
        if step == 3:
            assert torch.equal(params[0], before)
    assert_same(params[1:], clean[1:])
    assert all(x.isfinite().all() for x in (*params, *a.state[params[0]].values()))
    assert not torch.equal(params[0], before)  # and goes on afterwards


def test_an_infinite_gradient_leaves_the_shares_of_the_others_finite():
    params = parameters()
    opt = HinaAdaptive(params, use_dynamic_adaptation=True, relationship_discovery_interval=2)
    for step in range(8):
        give_gradients(params, step)
        params[0].grad[0] = float("nan")
        opt.step()
    assert all(p.isfinite().all() for p in params)
    assert all(opt.state[p]["adapt_scale"].isfinite() for p in params[:7])


# --- cost -----------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [ALL, ALL | {"reduce_precision": True}], ids=["all", "reduced"])
def test_kernels_do_not_grow_with_the_number_of_tensors(settings):
    """H11, in a step without the rank penalty's eigenproblem; views of states are no kernels but count here."""
    def ops(tensors: int) -> int:
        params = parameters(shapes=((4, 8),) * tensors)
        opt = HinaAdaptive(params, **settings)
        train(opt, params, range(3))
        give_gradients(params, 3)
        with Count() as count:
            opt.step()
        return count.ops

    few, many = ops(10), ops(100)
    assert many <= 1.2 * few, (few, many)


@cuda
@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    """H10"""
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
    opt = HinaAdaptive(params, **ALL | {"lora_rank_penalty": False}, relationship_discovery_interval=2)
    for step in range(4):
        give_gradients(params, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hint"), [
    ("fourier_feature_loss", "loss_type fourier"), ("super_resolution_mode", "FourierLoss"),
    ("fourier_anything", "FourierLoss"), ("amsgrad", "AdamW"), ("optim_bits", "reduce_precision"),
    ("block_wise", "adamw8bit"), ("args", "never read"),
    ("background_regularization_mode", "background_regularization=True"),
    ("edge_supression", "did you mean edge_suppression"), ("weight_deacy", "did you mean weight_decay"),
    ("zzzz", "leave it out"),
])
def test_a_setting_that_is_none_is_refused_with_what_to_do(name, hint):
    """H8, in the constructor and in a group."""
    with pytest.raises(TypeError, match=hint):
        HinaAdaptive(parameters(), **{name: True})
    with pytest.raises(TypeError, match=hint):
        HinaAdaptive([{"params": parameters(), name: True}])


@pytest.mark.parametrize("settings", [
    {"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"betas": 0.9}, {"eps": "small"}, {"use_tam": 1},
    {"spd_anchor": "nowhere"}, {"rank_penalty_target": "both"}, {"warmup_steps": 2.5}, {"edge_threshold": 1.0},
    {"detail_preservation": 1.0}, {"frequency_penalty": 1.5}, {"low_rank_emphasis": 3.0}, {"rank_penalty_interval": 0},
    {"eps": 0.0}, {"eps": 1e-60}, {"lr": 1e300}, {"edge_penalty": 1e300}, {"weight_decay": 1e300},
    {"weight_decay": 1e5}, {"vram_budget_gb": 1e300}, {"lr": 10**400}, {"lr": torch.ones(2)},
    {"min_lr": 1e-2}, {"use_lr_mask": True, "lr": 0.1}, {"foreach": True, "fused": True}, {"preset": "forked"},
], ids=str)
def test_a_value_that_cannot_be_is_refused_with_its_name(settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        HinaAdaptive(parameters(), **settings)


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_numbers_of_numpy_and_tensors_without_axes_become_plain_ones(number):
    rate, decay = number(0.25), number(0.5)
    opt = HinaAdaptive([{"params": parameters(), "lr": rate}], weight_decay=decay, betas=(number(0.5), 0.75))
    group = opt.param_groups[0]
    assert (group["lr"], group["mask_lr"], group["weight_decay"], group["betas"]) == (0.25, 0.25, 0.5, (0.5, 0.75))
    assert {type(v) for v in (group["lr"], group["mask_lr"], group["weight_decay"], *group["betas"])} == {float}
    saved(opt)


def test_a_state_of_other_shapes_is_refused_and_changes_nothing():
    params, others = parameters(shapes=((4, 8),)), parameters(shapes=((8, 4),))
    opt, other = HinaAdaptive(params, lr=1e-3), HinaAdaptive(others, lr=1e-4)
    train(opt, params, range(2))
    train(other, others, range(2))
    before = copy.deepcopy(saved(opt))
    with pytest.raises(ValueError, match=r"exp_avg of tensor 0 is \(8, 4\), the tensor here \(4, 8\)"):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == before["param_groups"][0]["lr"] == 1e-3
    assert torch.equal(opt.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])


@pytest.mark.parametrize("target", ["factors", "product"])
def test_neighbours_without_elements_pass(target):
    params = parameters(shapes=((0, 3), (5, 0), (0, 3), (4, 12), (20, 4)))
    opt = HinaAdaptive(params, **ALL | OFTEN, rank_penalty_target=target)
    train(opt, params, range(4))
    opt.get_optimization_info()


def test_groups_have_settings_of_their_own():
    params, lone = parameters(shapes=((4, 8),) * 2), parameters(shapes=((4, 8),) * 2)
    opt = HinaAdaptive([{"params": params[:1], "use_tam": True, "lr": 3e-4}, {"params": params[1:]}], lr=1e-3)
    tam, plain = HinaAdaptive(lone[:1], lr=3e-4, use_tam=True), HinaAdaptive(lone[1:], lr=1e-3)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(lone, step)
        for each in (opt, tam, plain):
            each.step()
    assert_same(params, lone)
    assert "tam" in opt.state[params[0]] and "tam" not in opt.state[params[1]]


def test_the_constructor_shows_every_setting_with_its_default():
    shown = inspect.signature(HinaAdaptive).parameters
    assert {n: p.default for n, p in shown.items() if n not in ("params", "preset")} == DEFAULTS
    assert all(shown[name].default is False for name in FORK)


def test_the_preset_is_the_forks_and_yields_to_what_is_given():
    group = HinaAdaptive(parameters(), preset="fork", use_tam=False, weight_decay=0.0).param_groups[0]
    assert {name for name in (*RULE_FLAGS, *FORK) if group[name]} == FORK.keys() - {"use_tam"}
    assert group["weight_decay"] == 0.0


def test_contradictions_are_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        opt = HinaAdaptive([{"params": [p]} for p in parameters()], use_grams=True, use_cautious=True, use_spd=True)
        opt.load_state_dict(opt.state_dict())
    assert sum("use_grams" in r.message for r in caplog.records) == 1
    assert sum("use_spd" in r.message for r in caplog.records) == 1
    assert len(opt.get_optimization_info()["warnings"]) == 2


def test_a_knob_that_no_switch_reads_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        opt = HinaAdaptive([{"params": [p]} for p in parameters()], edge_penalty=0.3, edge_threshold=0.5, use_tam=True,
                           tam_beta=0.8)
    assert [r.message for r in caplog.records] == [
        "edge_penalty, edge_threshold: read with edge_suppression=True only, which is off"]
    assert opt.get_optimization_info()["warnings"] == [r.message for r in caplog.records]


@pytest.mark.parametrize(("target", "error"), [
    ("6", TypeError), (None, TypeError), (0, ValueError), (float("inf"), ValueError), (float("nan"), ValueError)])
def test_a_target_that_is_no_size_is_refused_with_a_sentence(target, error):
    with pytest.raises(error, match="6.0 for example"):
        HinaAdaptive(parameters()).optimize_for_vram(target)


# --- reports and the guide ------------------------------------------------------------------------------------------


def test_active_on_says_where_a_rule_acts_and_why_not_elsewhere():
    """H23, H31"""
    lora = HinaAdaptive(parameters(shapes=SHAPES[:4]), **ALL).get_optimization_info()
    assert lora["active_on"]["spatial_awareness"] == "0 of 4 tensors: it has no spatial axes"
    assert lora["active_on"]["use_cautious"].startswith("0 of 4 tensors: Grams")
    assert lora["active_on"]["edge_suppression"] == "4 of 4 tensors"
    mixed = HinaAdaptive(parameters(), spatial_awareness=True, lora_rank_penalty=True, rank_penalty_target="product")
    active = mixed.get_optimization_info()["active_on"]
    assert active.keys() == {"spatial_awareness", "lora_rank_penalty"}
    assert active["spatial_awareness"].startswith("1 of 8 tensors")
    assert active["lora_rank_penalty"].startswith("2 of 8 tensors")
    assert lora["features"] == ALL


def test_active_on_says_when_pairs_are_parted_as_by_loraplus():
    groups = [{"params": [(n, p) for n, p in named() if factor in n]} for factor in ("lora_A", "lora_B")]
    active = HinaAdaptive(groups, lora_rank_penalty=True, rank_penalty_target="product", use_dynamic_adaptation=True
                          ).get_optimization_info()["active_on"]
    assert active["lora_rank_penalty"] == "0 of 4 tensors: the group holds no LoRA pair (LoRA+ parts A from B)"
    assert active["use_dynamic_adaptation"] == (
        "4 of 4 tensors, partners left apart because the group holds no LoRA pair (LoRA+ parts A from B)")
    together = HinaAdaptive(named(), use_dynamic_adaptation=True).get_optimization_info()["active_on"]
    assert together["use_dynamic_adaptation"] == "10 of 10 tensors"


def test_reports_have_the_keys_of_the_guide():
    params = parameters()
    opt = HinaAdaptive(params, **ALL)
    train(opt, params, range(2))
    info, stats = opt.get_optimization_info(), opt.get_memory_stats()
    assert info.keys() == {"features", "active_on", "memory_optimization", "adaptation_config",
                           "edge_overfitting_control", "training_stats", "warnings"}
    assert info["training_stats"]["steps"] == 2
    assert info["training_stats"]["parameters"] == sum(map(Tensor.numel, params))
    assert f"{stats['memory_pressure']:.2%}" and f"{stats['buffer_pool_stats']['current_memory_mb']:.2f}MB"


EDGE = {"edge_suppression": True}
SPACE = {"spatial_awareness": True}
GUIDE = {
    "basic": {"memory_efficient": True, "vram_budget_gb": 8.0, "edge_penalty": 0.1, "frequency_penalty": 0.05}
    | EDGE | SPACE,
    "advanced": {
        "memory_efficient": True, "vram_budget_gb": 12.0, "reduce_precision": True, "cpu_offload_states": True,
        "edge_penalty": 0.1, "frequency_penalty": 0.05, "background_regularization": True, "lora_rank_penalty": True,
        "rank_penalty_strength": 0.01, "use_dynamic_adaptation": True, "use_tam": True, "use_cautious": True,
        "use_spd": True} | EDGE | SPACE,
    "edges": EDGE | {"edge_penalty": 0.1, "edge_threshold": 0.6},
    "space": SPACE | {"frequency_penalty": 0.05, "detail_preservation": 0.8},
    "background": {"background_regularization": True},
    "rank": {"lora_rank_penalty": True, "rank_penalty_strength": 0.01, "low_rank_emphasis": 1.2},
    "lora": EDGE | {"lora_rank_penalty": True, "rank_penalty_strength": 0.01, "low_rank_emphasis": 1.2,
                    "edge_penalty": 0.08, "memory_efficient": True, "vram_budget_gb": 8.0},
    "large": EDGE | SPACE | {
        "lr": 8e-5, "edge_penalty": 0.12, "frequency_penalty": 0.06, "background_regularization": True,
        "use_dynamic_adaptation": True, "memory_efficient": True, "vram_budget_gb": 16.0, "reduce_precision": True,
        "cpu_offload_states": True},
    "fast": EDGE | {"edge_penalty": 0.1, "memory_efficient": True, "vram_budget_gb": 6.0},
    "memory": {"memory_efficient": True, "vram_budget_gb": 8.0},
    "more memory": {"memory_efficient": True, "vram_budget_gb": 12.0, "reduce_precision": True,
                    "cpu_offload_states": True, "max_buffer_memory_mb": 500},
    "least memory": {"memory_efficient": True, "vram_budget_gb": 4.0, "reduce_precision": True,
                     "cpu_offload_states": True, "max_buffer_memory_mb": 200, "adaptive_features": True},
    "stage 1": {"memory_efficient": True},
    "stage 2": {"memory_efficient": True, "edge_penalty": 0.1} | EDGE,
    "stage 3": {"memory_efficient": True, "edge_penalty": 0.1, "frequency_penalty": 0.05,
                "background_regularization": True} | EDGE | SPACE,
    "unsteady": {"edge_penalty": 0.05, "frequency_penalty": 0.02} | EDGE | SPACE,
    "moved": {"edge_penalty": 0.1, "frequency_penalty": 0.05, "background_regularization": True,
              "memory_efficient": True, "vram_budget_gb": 8.0} | EDGE | SPACE,
}


@pytest.mark.parametrize("recipe", GUIDE.values(), ids=GUIDE)
def test_every_recipe_of_the_guide_trains(recipe):
    """H31: with its reports and its way to make room."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    optimizer = HinaAdaptive(model.parameters(), **{"lr": 1e-4} | recipe)
    image = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = (model(image) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    memory_stats = optimizer.get_memory_stats()
    assert optimizer.get_optimization_info()["features"] and "memory_pressure" in memory_stats
    optimizer.optimize_for_vram(target_vram_gb=6.0)
    optimizer.step()


# --- all features against each other --------------------------------------------------------------------------------

SWITCHES = (*RULE_FLAGS, "reduce_precision", "memory_efficient", "lr_mask_always", "product", "init")


def covering_rows(names: tuple[str, ...], seed: int = 0) -> list[dict[str, bool]]:
    """Random rows until every two switches have stood in all four ways at once; a row is kept for what it adds."""
    rng, rows = random.Random(seed), []
    missing = {(a, b, x, y) for a, b in itertools.combinations(names, 2) for x in (False, True) for y in (False, True)}

    def covers(row):
        return {(a, b, row[a], row[b]) for a, b in itertools.combinations(names, 2)}

    while missing:
        best = max(({n: rng.random() < 0.5 for n in names} for _ in range(30)), key=lambda r: len(missing & covers(r)))
        missing -= covers(best)
        rows.append(best)
    return rows


@pytest.mark.parametrize("row", covering_rows(SWITCHES), ids=lambda row: "+".join(n for n in row if row[n])[:60])
def test_any_two_features_together_train_and_resume(row):
    """H33: 50 steps on a quadratic, finite, downhill, and bitwise the same when resumed in the middle."""
    settings = {n: on for n, on in row.items() if n not in ("product", "init")} | {
        "rank_penalty_target": "product" if row["product"] else "factors",
        "spd_anchor": "init" if row["init"] else "zero"}
    params, again = parameters(shapes=SHAPES[:7]), parameters(shapes=SHAPES[:7])
    aims = parameters(1, shapes=SHAPES[:7])

    def steps(opt, weights, count):
        for _ in range(count):
            loss = sum((w - a.detach()).square().sum() for w, a in zip(weights, aims, strict=True))
            opt.zero_grad()
            loss.backward()
            opt.step()
        return float(loss.detach())

    one = HinaAdaptive(params, **OFTEN, **settings)
    first = steps(one, params, 1)
    steps(one, params, 24)
    two = HinaAdaptive(again, lr=5e-4)
    two.load_state_dict(saved(one))
    with torch.no_grad():
        for p, q in zip(params, again, strict=True):
            q.copy_(p)
    last = steps(one, params, 25)
    assert last < first and last == steps(two, again, 25)
    assert_same(params, again)
    assert all(p.isfinite().all() for p in params)
