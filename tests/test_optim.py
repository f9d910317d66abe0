"""Schedules against Diffusers', optimizers against an uninterrupted run, state through safetensors and JSON.

Every row of the table, and some classes by their path, must: learn, resume to the bit, stand still once stopped, show
its averaged weights and take them back.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainkit.devices import synchronize
from trainkit.errors import UserError
from trainkit.optim import OPTIMIZERS, library, make_optimizer, problems
from trainkit.optim.schedules import SCHEDULES, SchedulePlan, parse_rules
from trainkit.optim.state import pack_state
from trainkit.optim.table import decisive_arguments
from trainkit.options import OptimizerOptions
from trainkit.options.base import Flag
from trainkit.options.cli import make_parser

RULES = "1:10,0.1:20,0.01"
LR = {"prodigy": 1.0, "pytorch_optimizer.Prodigy": 1.0, "lion": 5e-3}  # others: 1e-2
CLASSES = ["torch.optim.NAdam", "pytorch_optimizer.Ranger", "pytorch_optimizer.Prodigy"]
ALL = [*OPTIMIZERS, *CLASSES]


def options(**kwargs):
    return OptimizerOptions(**{"lr_warmup_steps": 0, "adam_weight_decay": 0.01} | kwargs)


def rate(name):
    return LR.get(name, 1e-2)


def model():
    """A LoRA in small: a down matrix, a zero up matrix; both of 4,096 elements so that 8-bit state exists."""
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(16, 256, generator=g) / 16), torch.nn.Parameter(torch.zeros(256, 16))]


def group(params, *, name="unet", lr=1e-2, weight_decay=0.01, stop=None):
    return {"name": name, "params": params, "lr": lr, "weight_decay": weight_decay, "stop": stop}


def optim_for(params, name, *, total_steps=100, stop=None, **kwargs):
    o = options(optimizer=name, learning_rate=rate(name), **kwargs)
    unet = group(params, lr=o.learning_rate, weight_decay=o.adam_weight_decay, stop=stop)
    return make_optimizer([unet], o, total_steps=total_steps)


def loss_at(step, params):
    """Squared error of up @ down against a fixed matrix of rank 2, on fresh data every step; a function of the step."""
    down, up = params
    a, b = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(9)) / 5
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
    return ((x @ down.T @ up.T - x @ a @ b.T) ** 2).mean()


def train(optim, params, steps):
    for step in steps:
        optim.begin(step)
        if any(p.requires_grad for p in params):
            loss_at(step, params).backward()
        optim.step()
        optim.zero_grad()


def bits(params):
    return [p.detach().clone() for p in params]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def through_files(packed, folder):
    tensors, data = packed
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(data, allow_nan=False))
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "state.json").read_text())


def resumed(optim, params, folder, **kwargs):
    """A fresh optimizer over copies of the parameters, given the packed state of `optim`."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = optim_for(copies, optim.name, **kwargs)
    fresh.unpack(*through_files(optim.pack(), folder))
    return fresh, copies


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_diffusers(name, warmup):
    from diffusers.optimization import get_scheduler

    lr, total = 3e-4, 50
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(
        name, inner, step_rules=RULES, num_warmup_steps=warmup, num_training_steps=total, num_cycles=3, power=2.0)
    plan = SchedulePlan(warmup, total, cycles=3, power=2.0, base_lr=lr, rules=RULES)
    ours = [SCHEDULES[name](step, plan) for step in range(total + 6)]
    assert ours == pytest.approx([theirs.lr_lambdas[0](step) for step in range(total + 6)], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("base", [0.0, 1e-8, 1e-7])
def test_polynomial_decay_raises_no_rate_up_to_its_end(base):
    plan = SchedulePlan(2, 10, base_lr=base)
    assert [base * SCHEDULES["polynomial"](step, plan) for step in range(14)] == pytest.approx(
        [0, base / 2, *[base] * 12], abs=0)


def test_the_schedules_are_exactly_those_of_diffusers_and_of_the_flag():
    from diffusers.optimization import SchedulerType

    assert set(SCHEDULES) == {s.value for s in SchedulerType}
    assert set(SCHEDULES) == set(OptimizerOptions.model_fields["lr_scheduler"].annotation.__args__)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "piecewise_constant"])
def test_rate_is_a_function_of_the_step_alone(name):
    optim = optim_for(model(), "adamw", lr_scheduler=name, lr_warmup_steps=5, total_steps=20)
    rates = {}
    for step in [*range(20), *reversed(range(20))]:
        optim.begin(step)
        assert rates.setdefault(step, optim.describe()["lr/unet"]) == optim.describe()["lr/unet"]
    assert max(rates.values()) == pytest.approx(rate("adamw"))


@pytest.mark.parametrize("name", ALL)
def test_groups_keep_their_own_base_rate_name_and_decay(name):
    """Unequal rates work under every optimizer, Prodigy too: one optimizer a group."""
    (down, up), o = model(), options(optimizer=name, lr_scheduler="linear")
    groups = [group([down], lr=1.0, weight_decay=0.1), group([up], name="text_encoder", lr=0.5, weight_decay=0.0)]
    optim = make_optimizer(groups, o, total_steps=10)
    train(optim, [down, up], range(6))
    rates = {k: v for k, v in optim.describe().items() if k.startswith("lr/")}
    assert rates == pytest.approx({"lr/unet": 0.5, "lr/text_encoder": 0.25})
    assert [inner.param_groups[0]["weight_decay"] for inner in optim.active] == [0.1, 0.0]
    assert [g["lr"] for g in groups] == [1.0, 0.5], "the caller's groups are not written to"


def test_a_group_without_parameters_is_left_out():
    optim = make_optimizer([group([]), group(model(), name="tokens")], options(), total_steps=10)
    assert optim.describe().keys() == {"lr/tokens"}


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(name, tmp_path):
    shape = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "total_steps": 100}
    params = model()
    optim = optim_for(params, name, **shape)
    train(optim, params, range(60))
    fresh, copies = resumed(optim, params, tmp_path, **shape)
    train(optim, params, range(60, 80))
    train(fresh, copies, range(60, 80))
    assert same(params, copies)
    assert fresh.describe() == optim.describe()
    _same(optim.pack(), fresh.pack())


@pytest.mark.parametrize("name", ALL)
def test_state_before_the_first_step_resumes_too(name, tmp_path):
    params = model()
    optim = optim_for(params, name)
    fresh, copies = resumed(optim, params, tmp_path)
    train(optim, params, range(3))
    train(fresh, copies, range(3))
    assert same(params, copies)


def test_eight_bit_state_is_eight_bit_and_packed_as_such():
    params = model()
    optim = optim_for(params, "adamw8bit")
    train(optim, params, range(2))
    assert optim.pack()[0]["unet/state.0.state1"].dtype == torch.uint8


@pytest.mark.parametrize("name, plain", [("adamw8bit", "AdamW8bit"), ("paged_adamw", "PagedAdamW")])
def test_bitsandbytes_waits_once_a_step_and_computes_what_it_does_by_itself(name, plain, monkeypatch):
    import bitsandbytes.optim

    waits = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waits.append)
    ours, bare = model(), model()
    optim = optim_for(ours, name, lr_scheduler="constant")
    train(optim, ours, range(3))
    assert len(waits) == 3
    by_itself = getattr(bitsandbytes.optim, plain)(bare, lr=rate(name), weight_decay=0.01)
    for step in range(3):
        loss_at(step, bare).backward()
        by_itself.step()
        by_itself.zero_grad()
    assert len(waits) > 6, "the library no longer waits after every tensor: optim/eight_bit.py may go"
    assert same(ours, bare)


def test_prodigy_estimate_survives_the_files_exactly(tmp_path):
    params = model()
    optim = optim_for(params, "prodigy")
    train(optim, params, range(60))
    fresh, copies = resumed(optim, params, tmp_path)
    then, now = optim.active[0].param_groups[0], fresh.active[0].param_groups[0]
    for key in ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k", "d0", "betas", "beta3", "decouple"):
        assert now[key] == then[key] and type(now[key]) is type(then[key]), key
    assert then["d"] > then["d0"], "60 steps must have moved the estimate, else this proves nothing"
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(optim.active[0].state[p]["p0"], fresh.active[0].state[q]["p0"])
        assert torch.equal(optim.active[0].state[p]["s"], fresh.active[0].state[q]["s"])


def test_packed_state_is_a_snapshot():
    params = model()
    optim = optim_for(params, "adamw")
    train(optim, params, range(2))
    tensors, _ = optim.pack()
    before = {k: v.clone() for k, v in tensors.items()}
    other = optim_for(params, "adamw")
    other.unpack(tensors, optim.pack()[1])
    train(optim, params, range(2, 4))
    train(other, params, range(2, 4))
    assert all(torch.equal(before[k], tensors[k]) for k in before)


def test_hyper_parameters_come_from_the_command_line_after_a_resume(tmp_path):
    params = model()
    optim = optim_for(params, "adamw")
    train(optim, params, range(2))
    fresh, _ = resumed(optim, params, tmp_path, adam_beta1=0.5, adam_weight_decay=0.3)
    group = fresh.active[0].param_groups[0]
    assert group["betas"] == (0.5, 0.999) and group["weight_decay"] == 0.3


def test_state_of_other_shapes_is_refused(tmp_path):
    params = model()
    optim = optim_for(params, "adamw")
    train(optim, params, range(1))
    with pytest.raises(UserError, match=r"2 tensors differ in shape, first \(16, 256\) there, \(8, 256\) here"):
        optim_for([torch.nn.Parameter(torch.zeros(8, 256)), torch.nn.Parameter(torch.zeros(256, 8))],
                  "adamw").unpack(*optim.pack())
    with pytest.raises(UserError, match="holds 2 tensors, this run trains 1"):
        optim_for(params[:1], "adamw").unpack(*optim.pack())


def test_state_of_another_optimizer_is_refused():
    with pytest.raises(UserError, match="trained with adamw, this run asks for prodigy"):
        optim_for(model(), "prodigy").unpack(*optim_for(model(), "adamw").pack())


def test_state_with_a_tensor_missing_is_refused():
    params = model()
    optim = optim_for(params, "adamw")
    train(optim, params, range(1))
    tensors, data = optim.pack()
    del tensors["unet/state.1.exp_avg"]
    with pytest.raises(UserError, match=r"state\.1\.exp_avg"):
        optim_for(params, "adamw").unpack(tensors, data)


def test_state_of_other_groups_is_refused():
    down, up = model()
    two = make_optimizer([group([down]), group([up], name="tokens")], options(), total_steps=10)
    with pytest.raises(UserError, match="holds the groups unet, tokens, this run trains unet"):
        make_optimizer([group([down, up])], options(), total_steps=10).unpack(*two.pack())


# -- who trains when --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_d8_after_its_stop_a_group_does_not_move_by_one_bit(name):
    (down, up), o = model(), options(optimizer=name)
    groups = [group([down], lr=rate(name)), group([up], name="text", lr=rate(name), stop=4)]
    optim = make_optimizer(groups, o, total_steps=10)
    train(optim, [down, up], range(4))
    assert "lr/text" in optim.describe() and len(optim.active) == 2
    up.grad = torch.ones_like(up)
    optim.begin(4)
    assert "lr/text" not in optim.describe() and len(optim.active) == 1
    assert up.grad is None and not up.requires_grad and down.requires_grad
    before, other = bits([up]), bits([down])
    train(optim, [down, up], range(4, 10))
    assert same([up], before) and not same([down], other)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("saved", [3, 4, 6])
def test_a_run_resumes_to_the_bit_before_at_and_after_a_stop(name, saved, tmp_path):
    def fresh():
        down, up = model()
        groups = [group([down], lr=rate(name)), group([up], name="text", lr=rate(name), stop=4)]
        return make_optimizer(groups, options(optimizer=name), total_steps=8), [down, up]

    optim, params = fresh()
    train(optim, params, range(saved))
    again, copies = fresh()
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p.data)
    again.unpack(*through_files(optim.pack(), tmp_path))
    with again.averaged():  # previews are drawn before the first step of a session
        pass
    train(optim, params, range(saved, 8))
    train(again, copies, range(saved, 8))
    assert same(params, copies)
    _same(optim.pack(), again.pack())


def test_a_group_with_stop_0_never_trains():
    params = model()
    before = bits(params)
    train(optim_for(params, "adamw", stop=0), params, range(3))
    assert same(params, before) and not any(p.requires_grad for p in params)


def test_d8_two_prodigies_with_gradients_1000_times_apart_each_find_their_own_step():
    """One d over both groups would fit neither. Each group moves as it would alone, to the bit."""
    o = options(optimizer="prodigy")

    def run(scales):
        params = {s: torch.nn.Parameter(torch.ones(8)) for s in scales}
        optim = make_optimizer([group([p], name=f"x{s:g}", lr=1.0) for s, p in params.items()], o, total_steps=50)
        for step in range(50):
            optim.begin(step)
            sum(s * (p - 3).square().sum() for s, p in params.items()).backward()
            optim.step()
            optim.zero_grad()
        return params, optim.describe()

    both, told = run([1.0, 1000.0])
    for scale in (1.0, 1000.0):
        alone, only = run([scale])
        assert torch.equal(both[scale], alone[scale])
        assert told[f"d/x{scale:g}"] == only[f"d/x{scale:g}"] > 1e-6


def test_d8_prodigy_with_the_default_text_rate_does_not_crash_and_takes_the_unets():
    """--text_encoder_lr stays at 5e-6 in many a command that says --learning_rate 1.0."""
    o = options(optimizer="prodigy", learning_rate=1.0)
    (down, up), lr = model(), o.text_lr(5e-6, given=False, global_batch=4)
    optim = make_optimizer([group([down], lr=1.0), group([up], name="text_encoder", lr=lr)], o, total_steps=10)
    train(optim, [down, up], range(2))
    assert optim.describe()["lr/text_encoder"] == 1.0
    assert o.text_lr(5e-6, given=True, global_batch=4) == 5e-6, "a rate that was asked for is kept"
    assert options().text_lr(5e-6, given=False, global_batch=4) == 5e-6


# -- averaged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_training_weights_come_back_to_the_bit_after_a_look_at_the_average(name, ema):
    params, twins = model(), model()
    optim, plain = (optim_for(p, name, use_ema=ema) for p in (params, twins))
    for step in range(6):
        train(optim, params, [step])
        train(plain, twins, [step])
        own = bits(params)
        with optim.averaged(), optim.averaged():
            changed = not same(params, own)
        assert same(params, own)
    assert changed == (ema or name == "schedule_free_adamw")
    assert same(params, twins), "looking must not change the training"


def test_schedule_free_shows_the_running_mean_of_its_fast_weights():
    """x_t of Defazio et al. 2024, eq. 5: with a constant rate the plain mean of z_1 .. z_t."""
    params = model()
    optim = optim_for(params, "schedule_free_adamw")
    fast = []
    for step in range(5):
        train(optim, params, [step])
        fast.append(optim.active[0].state[params[0]]["z"].clone())
    with optim.averaged():
        torch.testing.assert_close(params[0].detach(), torch.stack(fast).mean(0), rtol=1e-5, atol=1e-6)


def test_a_schedule_free_group_ends_in_its_averaged_weights():
    params = model()
    optim = optim_for(params, "schedule_free_adamw", stop=5, total_steps=8)
    train(optim, params, range(5))
    with optim.averaged():
        shown = bits(params)
    optim.begin(5)
    assert same(params, shown)


def test_warm_up_is_the_schedules_affair_also_without_schedules():
    params = model()
    optim = optim_for(params, "schedule_free_adamw", lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    optim.begin(2)
    assert optim.describe()["lr/unet"] == pytest.approx(rate("schedule_free_adamw") / 2)
    assert optim.active[0].param_groups[0]["warmup_steps"] == 0


def test_the_average_is_that_of_diffusers_over_the_unets_adapters_only(tmp_path):
    from diffusers.training_utils import EMAModel

    (down, up), o = model(), options(use_ema=True, ema_decay=0.5)
    groups = [group([down]), group([up], name="text_encoder")]
    optim, reference = make_optimizer(groups, o, total_steps=20), EMAModel([down], decay=0.5)
    for step in range(20):
        train(optim, [down, up], [step])
        reference.step([down])
    own = bits([up])
    with optim.averaged():
        assert torch.allclose(down, reference.shadow_params[0], rtol=1e-6) and same([up], own)
    copy = torch.nn.Parameter(down.detach().clone())
    fresh = make_optimizer([group([copy]), group([up], name="text_encoder")], o, 20)
    fresh.unpack(*through_files(optim.pack(), tmp_path))
    _same(optim.pack(), fresh.pack())


def test_the_average_stays_when_its_group_stops():
    params = model()
    optim = optim_for(params, "adamw", use_ema=True, stop=4, total_steps=8)
    train(optim, params, range(4))
    with optim.averaged():
        shown = bits(params)
    train(optim, params, range(4, 8))
    with optim.averaged():
        assert same(params, shown)


def test_a_checkpoint_without_the_average_is_refused():
    with pytest.raises(UserError, match="without an average of the weights, this one is with"):
        optim_for(model(), "adamw", use_ema=True).unpack(*optim_for(model(), "adamw").pack())


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_and_the_choices_of_the_flag_are_one_list():
    assert tuple(OPTIMIZERS) == Flag("optimizer", "", OptimizerOptions.model_fields["optimizer"]).choices


def test_the_page_of_optimizers_describes_each_and_the_decay_of_the_average():
    from diffusers.training_utils import EMAModel

    page = (Path(__file__).parents[1] / "docs/optimizers.md").read_text("utf-8")
    assert all(f"| `{name}`" in page or f", `{name}` |" in page for name in OPTIMIZERS)
    average = EMAModel([torch.zeros(1)], decay=0.999)
    assert "`min(n / (n + 9), --ema_decay)`" in page
    for n in (2, 10, 100, 8991, 20000):
        assert average.get_decay(n) == pytest.approx(min(n / (n + 9), 0.999))


def test_adamw_is_one_fused_kernel_on_fp32_and_equals_torchs_default():
    params, reference = model(), model()
    optim = optim_for(params, "adamw")
    assert optim.active[0].param_groups[0]["fused"]
    plain = optim_for(reference, "adamw")
    plain.members[0].inner = torch.optim.AdamW(reference, lr=rate("adamw"), weight_decay=0.01, foreach=False)
    train(optim, params, range(5))
    train(plain, reference, range(5))
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adamw_is_not_fused_over_half_precision_parameters():
    optim = optim_for([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], "adamw")
    assert not optim.active[0].param_groups[0]["fused"]


def test_every_prodigy_flag_reaches_the_optimizer():
    optim = optim_for(
        model(), "prodigy", adam_beta1=0.8, adam_beta2=0.98, prodigy_beta3=0.97, adam_weight_decay=0.02,
        adam_epsilon=1e-6, prodigy_decouple=False, prodigy_use_bias_correction=False, prodigy_safeguard_warmup=False)
    wanted = {"betas": (0.8, 0.98), "beta3": 0.97, "weight_decay": 0.02, "eps": 1e-6, "decouple": False,
              "use_bias_correction": False, "safeguard_warmup": False}
    assert {k: optim.active[0].param_groups[0][k] for k in wanted} == wanted


def test_prodigy_is_silent_on_stdout_and_reports_its_estimate(capfd):
    optim = optim_for(model(), "prodigy")
    assert capfd.readouterr().out == ""
    assert optim.describe() == {"lr/unet": 1.0, "d/unet": 1e-6}


def test_a_small_rate_with_prodigy_is_warned_about(caplog):
    make_optimizer([group(model(), lr=1e-4)], options(optimizer="prodigy", learning_rate=1e-4), total_steps=10)
    assert "a learning rate of 0.0001 (unet) with prodigy" in caplog.text


def test_a_warmup_longer_than_the_run_is_warned_about(caplog):
    optim_for(model(), "adamw", lr_scheduler="cosine", lr_warmup_steps=500, total_steps=300)
    assert "--lr_warmup_steps 500" in caplog.text
    caplog.clear()
    optim_for(model(), "adamw", lr_scheduler="constant", lr_warmup_steps=500, total_steps=300)
    assert not caplog.text


@pytest.mark.parametrize(("name", "package"), [
    ("adamw8bit", "bitsandbytes"), ("came", "pytorch_optimizer")])
def test_a_missing_package_is_named_with_its_pip_command(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        optim_for(model(), name)
    problem, = problems(options(optimizer=name))
    assert problem.fix == f"pip install {package}"


def test_the_package_of_an_optimizer_is_known_without_importing_it():
    assert library(options(use_8bit_adam=True)) == "bitsandbytes"
    assert library(options(optimizer="bitsandbytes.optim.LAMB")) == "bitsandbytes"
    assert library(options()) == "torch"


@pytest.mark.parametrize(("path", "why", "fix"), [
    ("torch.optim.Nadam", "there is no torch.optim.Nadam", "torch.optim.NAdam"),
    ("pytorch_optimizer.optimizers.CAME", "there is no", "pytorch_optimizer.CAME"),
    ("torch.nn.Linear", "is no optimizer", "torch.optim.NAdam"),
    ("no_such_package.Adam", "needs the package no_such_package", "fix the path"),
    ("pytorch_optimizer.Lookahead", "takes no learning rate", "another class"),
])
def test_a_path_that_leads_to_no_optimizer_is_refused_before_anything_is_loaded(path, why, fix):
    problem, = problems(options(optimizer=path))
    assert why in problem.what and fix in problem.fix


@pytest.mark.parametrize(("path", "why"), [
    ("torch.optim.LBFGS", "closure"), ("pytorch_optimizer.SOAP", "its state 'GG' is a list")])
def test_a_class_that_cannot_be_driven_or_saved_is_refused_before_training(path, why):
    with pytest.raises(UserError, match=why):
        optim_for(model(), path)


def test_arguments_reach_the_constructor_and_are_stronger_than_flags():
    text = "betas=(0.8, 0.9) amsgrad=true   weight_decay=0.5 eps=1e-6"
    wanted = {"betas": (0.8, 0.9), "amsgrad": True, "weight_decay": 0.5, "eps": 1e-6}
    for name in ("adamw", "torch.optim.Adam"):
        values = optim_for(model(), name, optimizer_args=text).active[0].param_groups[0]
        assert {k: values[k] for k in wanted} == wanted


def test_blanks_around_an_equals_sign_do_not_count():
    spaced = optim_for(model(), "adamw", optimizer_args="eps = 1e-6 amsgrad= true betas =(0.8, 0.9)")
    values = spaced.active[0].param_groups[0]
    assert (values["eps"], values["amsgrad"], values["betas"]) == (1e-6, True, (0.8, 0.9))


def read_words(*argv):
    parser = make_parser(OptimizerOptions.flags("optimizer"), "", {"optimizer": "Optimizer"})
    return parser.parse_known_args(argv)


def test_arguments_under_the_flag_given_twice_are_joined():
    found, _ = read_words("--optimizer_args", "a=1", "b=2", "--use_ema", "--optimizer_args=c=3")
    assert found.optimizer_args == ["a=1", "b=2", "c=3"]


def test_an_argument_written_as_a_flag_is_told_to_have_no_dashes():
    with pytest.raises(UserError, match="no dashes") as caught:
        read_words("--optimizer_args", "a=1", "--use_agr=True")
    assert caught.value.problems[0].fix == "--optimizer_args use_agr=True"
    _, slips = read_words("--optimizer_args", "a=1", "--learning_rat=3")
    assert slips == ["--learning_rat=3"], "a slip in a flag's name stays one"


@pytest.mark.parametrize("name", ["adamw", "hina_adaptive"])
def test_a_kernel_that_is_asked_for_is_stronger_than_the_fused_one(name):
    values = optim_for(model(), name, optimizer_args="foreach=True").active[0].param_groups[0]
    assert values["foreach"] and not values["fused"]


@pytest.mark.parametrize(("text", "same_as"), [
    ("edge_suppression=True edge_penalty=1", "edge_penalty=1.0 edge_suppression=True"),
    ("use_tam=True tam_beta=0.9 use_agr=False", "use_tam=True"),
    ("preset=adamw", ""),
    ("preset=fork use_tam=False", "use_spd=True use_cautious=True use_adopt_stability=True use_agr=True "
     "use_dynamic_adaptation=True use_lr_mask=True dynamic_weight_decay=True reduce_precision=True "
     "adaptive_features=True emergency_simplify=True"),
    ("betas=(0, 0.99)", "betas=(0.0,0.99)"),
])
def test_spellings_of_one_run_have_one_fingerprint(text, same_as):
    one, two = (decisive_arguments(options(optimizer="hina_adaptive", optimizer_args=t or None))
                for t in (text, same_as))
    assert one == two


@pytest.mark.parametrize(("name", "text"), [
    ("hina_adaptive", "eps=1e-8"), ("hina_adaptive", "weight_decay=0.01"), ("prodigy", "d0=1e-6"),
    ("hina_adaptive", "use_tam=True tam_beta=0.8"), ("adamw", "amsgrad=True")])
def test_an_argument_that_a_flag_could_change_or_that_is_no_default_stays_in_the_fingerprint(name, text):
    assert decisive_arguments(options(optimizer=name, optimizer_args=text)) is not None


@pytest.mark.parametrize(("name", "text", "said", "fix"), [
    ("adamw", "momentum=0.9", "AdamW takes no momentum", "fix"),
    ("lion", "use_gc=true lr=1", "Lion takes no use_gc, lr", "--learning_rate gives lr"),
    ("prodigy", "d_coef=big", "Prodigy takes no word as d_coef", "for example"),
    ("hina_adaptive", "use_spd=yes", "HinaAdaptive takes no word as use_spd", "use_spd=True or False"),
    ("adamw", "eps=1e-6 amsgrad=true eps=1e-5", "eps is given twice", "remove one"),
    ("adamw", "=5", "cannot hold '=5'", "for example"),
    ("adamw", "--eps=1e-6", "cannot hold '--eps=1e-6'", "for example"),
    ("adamw", "eps= amsgrad=true", "cannot hold 'eps='", "for example"),
    ("prodigy", "d_coef=1+", "cannot hold 'd_coef=1+'", "for example"),
    ("prodigy", "d_coef", "cannot hold 'd_coef'", "for example"),
    ("adamw", "betas=(2, 0.9)", "refuses its arguments", "betas=(2, 0.9)"),
])
def test_arguments_nothing_can_take_are_refused(name, text, said, fix):
    problem, = problems(options(optimizer=name, learning_rate=rate(name), optimizer_args=text))
    assert said in problem.what and fix in problem.fix
    if "takes no" in said and "takes no word" not in said:
        assert "weight_decay" in problem.why, "the accepted ones are named"


@pytest.mark.parametrize(("text", "why"), [
    ("fourier_feature_loss=True", "--loss_type fourier"), ("edge_supression=True", "did you mean edge_suppression?"),
    ("optim_bits=8 use_tamm=True", "use_tamm: did you mean use_tam?"), ("zzzz=1", "it takes betas"),
    ("lr=1e-4", "it takes betas")])
def test_hina_answers_a_name_it_does_not_take_with_what_was_meant(text, why):
    problem, = problems(options(optimizer="hina_adaptive", learning_rate=1e-4, optimizer_args=text))
    assert problem.what.startswith("HinaAdaptive takes no") and why in problem.why
    assert "reduce_precision=True" in problem.why or "optim_bits" not in text


@pytest.mark.parametrize("name", ["adamw", "prodigy", "lion", "torch.optim.NAdam", "pytorch_optimizer.Ranger"])
def test_only_a_class_that_wants_names_is_given_any(name):
    """A class of somebody else's may take a tensor for nothing but a tensor."""
    lora = group(model(), lr=rate(name)) | {"names": ["q.lora_A.weight", "q.lora_B.weight"]}
    theirs = make_optimizer([lora], options(optimizer=name, learning_rate=rate(name)), total_steps=9)
    assert "param_names" not in theirs.active[0].param_groups[0]
    ours = make_optimizer([lora], options(optimizer="hina_adaptive", learning_rate=1e-4), total_steps=9)
    assert ours.active[0].param_groups[0]["param_names"] == ["q.lora_A.weight", "q.lora_B.weight"]


def test_names_are_no_part_of_a_checkpoint(tmp_path):
    """A state that was packed with names goes on without, and the other way round."""
    names = {"names": ["q.lora_A.weight", "q.lora_B.weight"]}
    o = options(optimizer="hina_adaptive", optimizer_args="use_cautious=True use_spd=True")

    def made(params, extra):
        return make_optimizer([group(params) | extra], o, total_steps=9)

    with_names, plain = model(), model()
    one, two = made(with_names, names), made(plain, {})
    train(one, with_names, range(3))
    train(two, plain, range(3))
    _same(one.pack(), two.pack())  # names of a pair tell what its shapes tell, and nothing of them is saved
    crossed = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    fresh = made(crossed, names)
    fresh.unpack(*through_files(two.pack(), tmp_path))
    train(fresh, crossed, range(3, 6))
    train(one, with_names, range(3, 6))
    assert same(with_names, crossed)


def test_the_log_says_at_the_start_what_is_on_and_where_it_acts(caplog):
    """Once for each group that trains; in silence for optimizers that cannot tell."""
    o = options(optimizer="hina_adaptive", learning_rate=1e-4,
                optimizer_args="edge_suppression=True spatial_awareness=True use_spd=True")
    groups = [group(model(), weight_decay=0.0), group(model()[:1], name="tokens", weight_decay=0.0),
              group(model(), name="text_encoder", lr=0.0, weight_decay=0.0)]
    with caplog.at_level("INFO", logger="trainkit"):
        make_optimizer(groups, o, total_steps=10)
        make_optimizer(groups[:1], options(), total_steps=10)
    assert [r.message for r in caplog.records] == [
        "hina_adaptive, unet: spatial_awareness on 0 of 2 tensors: it has no spatial axes; "
        "edge_suppression on 2 of 2 tensors; use_spd on 2 of 2 tensors, drawn to 0",
        "hina_adaptive, tokens: spatial_awareness on 0 of 1 tensors: it has no spatial axes; "
        "edge_suppression on 1 of 1 tensors; use_spd on 1 of 1 tensors, drawn to their start"]
    caplog.clear()
    with caplog.at_level("INFO", logger="trainkit"):
        make_optimizer(groups[:1], options(optimizer="hina_adaptive"), total_steps=10)
    assert [r.message for r in caplog.records] == ["hina_adaptive, unet: no rule is on"]


def test_what_changes_no_bit_may_change_at_a_resume_and_what_moves_a_number_may_not(tmp_path):
    rules, memory = "use_cautious=True reduce_precision=True", "memory_efficient=True cpu_offload_states=True"
    more = f"{memory} vram_budget_gb=4 max_buffer_memory_mb=0.01 {rules}"

    def decisive(text):
        return decisive_arguments(options(optimizer="hina_adaptive", optimizer_args=text))

    assert decisive(rules) == decisive(more) == "reduce_precision=True use_cautious=True"
    assert decisive(memory) is None and decisive("adaptive_features=True") == "adaptive_features=True"
    params = model()
    optim = optim_for(params, "hina_adaptive", optimizer_args=rules)
    train(optim, params, range(3))
    fresh, copies = resumed(optim, params, tmp_path, optimizer_args=more)
    train(optim, params, range(3, 6))
    train(fresh, copies, range(3, 6))
    assert same(params, copies)


def test_a_changed_rate_takes_effect_at_a_resume_under_lr_mask(tmp_path):
    """M is measured against the rate it started from, so it is saved with that rate."""
    def run_on(learning_rate):
        params = model()
        optim = made(params, 1e-4)
        train(optim, params, range(3))
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        fresh = made(copies, learning_rate)
        fresh.unpack(*through_files(optim.pack(), tmp_path))
        train(fresh, copies, range(3, 4))
        return [c.detach() - p.detach() for c, p in zip(copies, params, strict=True)]

    def made(params, learning_rate):
        o = options(optimizer="hina_adaptive", learning_rate=learning_rate, optimizer_args="use_lr_mask=True")
        return make_optimizer([group(params, lr=learning_rate, weight_decay=0.0)], o, total_steps=9)

    for same_rate, double in zip(run_on(1e-4), run_on(2e-4), strict=True):
        torch.testing.assert_close(double, 2 * same_rate, rtol=1e-3, atol=1e-7)


def test_a_group_at_rate_0_is_not_refused_for_it():
    o = options(optimizer="hina_adaptive", learning_rate=1e-4, optimizer_args="use_lr_mask=True")
    make_optimizer([group(model(), lr=1e-4), group(model(), name="text_encoder", lr=0.0)], o, total_steps=10)
    still = options(optimizer="hina_adaptive", learning_rate=0.0, optimizer_args="use_lr_mask=True")
    make_optimizer([group(model(), lr=0.0), group(model(), name="text_encoder", lr=1e-4)], still, total_steps=10)


@pytest.mark.parametrize(("name", "flag"), [
    ("unet", "--learning_rate"), ("unet.B", "--loraplus_lr_ratio"), ("text_encoder", "--text_encoder_lr"),
    ("text_encoder_2", "--text_encoder_2_lr"), ("tokens", "--text_encoder_lr")])
@pytest.mark.parametrize("rate", [0.1, 1e300])
def test_a_rate_that_cannot_be_is_told_by_its_own_flag(name, flag, rate):
    o = options(optimizer="hina_adaptive", learning_rate=1e-4, optimizer_args="use_lr_mask=True")
    with pytest.raises(UserError) as caught:
        make_optimizer([group(model(), lr=1e-4, name="other"), group(model(), lr=rate, name=name)], o, total_steps=10)
    where = caught.value.problems[0].where
    assert where.endswith(flag) and ("--learning_rate" in where) == name.startswith("unet")


@pytest.mark.parametrize("name", ["prodigy", "adamw", "hina_adaptive"])
def test_a_rate_beyond_all_weights_is_one_message_and_no_traceback(name):
    assert [p.where for p in problems(options(optimizer=name, learning_rate=1e300))] == ["--learning_rate"]


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_rate_of_0_is_0_and_one_rate_must_not_be(name):
    with pytest.raises(UserError, match="nothing would be trained"):
        make_optimizer([group(model(), lr=0.0)], options(optimizer=name), total_steps=10)
    still, moving = model(), model()
    groups = [group(still, lr=0.0, name="tokens"), group(moving, lr=rate(name))]
    optimizer = make_optimizer(groups, options(optimizer=name), total_steps=10)
    before = [p.detach().clone() for p in still]
    optimizer.begin(0)
    for p in [*still, *moving]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, still, strict=True))
    assert "lr/tokens" not in optimizer.describe()


def test_paging_without_a_gpu_is_said_to_be_none(caplog):
    optim_for(model(), "paged_adamw8bit")
    assert "on a CPU nothing is paged, it works as adamw8bit" in caplog.text


@pytest.mark.parametrize("rules", [
    "1e:10,1", "1.2.3:10,1", "1:10,", ",1", "1", "", "1:1.5,1", "1:-1,1", "nan:10,1", "1:10,inf", "1:10:20,1",
    "1e999:9,1", "1:10,-1", "1_0:10,1", "1:10, 1", "--:1,1"])
def test_step_rules_that_do_not_parse_are_refused_and_never_followed(rules):
    found = list(problems(options(lr_scheduler="piecewise_constant", lr_step_rules=rules)))
    assert [p.where for p in found] == ["--lr_step_rules"]
    with pytest.raises(ValueError, match="is not"):
        parse_rules(rules)


def test_step_rules_are_read_in_any_order_and_notation():
    assert parse_rules(".1:20,1.:10,1e-2") == ([(10, 1.0), (20, 0.1)], 0.01)


def test_use_8bit_adam_is_adamw8bit():
    assert optim_for(model(), "adamw", use_8bit_adam=True).name == "adamw8bit"
    assert optim_for(model(), "paged_adamw", use_8bit_adam=True).name == "paged_adamw8bit"


@pytest.mark.parametrize(("kwargs", "flag"), [
    ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "polynomial"),
    ({"lr_scheduler": "piecewise_constant"}, "--lr_step_rules"),
    ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10"}, "--lr_step_rules 1:10"),
])
def test_options_nothing_can_obey_are_refused(kwargs, flag):
    with pytest.raises(UserError, match=flag):
        make_optimizer([group(model())], options(**kwargs), total_steps=10)


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_fits_a_small_regression(name):
    params = model()
    before = loss_at(10_000, params).item()
    optim = optim_for(params, name)
    train(optim, params, range(200))
    with optim.averaged():
        assert loss_at(10_000, params).item() < 0.05 * before


def _same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][k], other[0][k]) for k in one[0])


# ----------------------------------------------------------------------------------------------------------------------
# Devices


DEVICE_MODULES = {  # type of device -> how its module waits: an Apple GPU's takes no argument
    "mps": lambda waits: lambda: waits.append("mps"),
    "cuda": lambda waits: lambda device=None: waits.append(device),
    "xpu": lambda waits: lambda device: waits.append(device),
}


@pytest.mark.parametrize("category", DEVICE_MODULES)
def test_a_device_is_waited_for_as_its_module_wants_it(monkeypatch, category):
    waits, device = [], torch.device(category, 0)
    module = SimpleNamespace(synchronize=DEVICE_MODULES[category](waits))
    monkeypatch.setattr(torch, "get_device_module", {device: module}.get)
    synchronize(device)
    synchronize(torch.device("cpu"))
    assert waits == ["mps" if category == "mps" else device]


def test_a_checkpoint_of_a_run_on_an_apple_gpu_waits_for_it(monkeypatch):
    """A parameter on a device that is not the CPU; its module's function takes no argument."""
    waits = []
    module = SimpleNamespace(synchronize=DEVICE_MODULES["mps"](waits))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1)
    assert pack_state(inner, {})[0] == {} and waits == ["mps"]
