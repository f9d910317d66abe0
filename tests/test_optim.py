"""Schedules against Diffusers', optimizers against an uninterrupted run, state through safetensors and JSON."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainkit.errors import UserError
from trainkit.optim import OPTIMIZERS, make_optimizer, problems
from trainkit.optim.schedules import SCHEDULES, Plan, parse_rules
from trainkit.options import OptimizerOptions

RULES = "1:10,0.1:20,0.01"
LR = {"adamw": 1e-2, "adamw8bit": 1e-2, "prodigy": 1.0}


def options(**kwargs):
    return OptimizerOptions(**{"lr_warmup_steps": 0, "adam_weight_decay": 0.01} | kwargs)


def model():
    """A LoRA in small: a down matrix, a zero up matrix; both of 4,096 elements so that 8-bit state exists."""
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(16, 256, generator=g) / 16), torch.nn.Parameter(torch.zeros(256, 16))]


def optim_for(params, name, *, total_steps=100, **kwargs):
    o = options(optimizer=name, learning_rate=LR[name], **kwargs)
    group = {"name": "unet", "params": params, "lr": o.learning_rate, "weight_decay": o.adam_weight_decay}
    return make_optimizer([group], o, total_steps=total_steps)


def loss_at(step, params):
    """Squared error of up @ down against a fixed matrix of rank 2, on fresh data every step; a function of the step."""
    down, up = params
    a, b = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(9)) / 5
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
    return ((x @ down.T @ up.T - x @ a @ b.T) ** 2).mean()


def train(optim, params, steps):
    for step in steps:
        loss_at(step, params).backward()
        optim.set_lr(step)
        optim.step()
        optim.zero_grad()


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
    plan = Plan(warmup, total, cycles=3, power=2.0, base_lr=lr, rules=RULES)
    ours = [SCHEDULES[name](step, plan) for step in range(total + 6)]
    assert ours == pytest.approx([theirs.lr_lambdas[0](step) for step in range(total + 6)], rel=1e-12, abs=1e-15)


def test_the_schedules_are_exactly_those_of_diffusers_and_of_the_flag():
    from diffusers.optimization import SchedulerType

    assert set(SCHEDULES) == {s.value for s in SchedulerType}
    assert set(SCHEDULES) == set(OptimizerOptions.model_fields["lr_scheduler"].annotation.__args__)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "piecewise_constant"])
def test_rate_is_a_function_of_the_step_alone(name):
    optim = optim_for(model(), "adamw", lr_scheduler=name, lr_warmup_steps=5, total_steps=20)
    rates = {}
    for step in [*range(20), *reversed(range(20))]:
        optim.set_lr(step)
        assert rates.setdefault(step, optim.describe()["lr/unet"]) == optim.describe()["lr/unet"]
    assert max(rates.values()) == pytest.approx(LR["adamw"])


def test_groups_keep_their_own_base_rate_name_and_decay():
    (down, up), o = model(), options(lr_scheduler="linear")
    groups = [{"name": "unet", "params": [down], "lr": 1e-3, "weight_decay": 0.1},
              {"name": "text_encoder", "params": [up], "lr": 1e-5, "weight_decay": 0.0}]
    optim = make_optimizer(groups, o, total_steps=10)
    optim.set_lr(5)
    assert optim.describe() == pytest.approx({"lr/unet": 5e-4, "lr/text_encoder": 5e-6})
    assert [g["weight_decay"] for g in optim.inner.param_groups] == [0.1, 0.0]
    assert [g["lr"] for g in groups] == [1e-3, 1e-5], "the caller's groups are not written to"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(name, tmp_path):
    shape = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "total_steps": 100}
    params = model()
    optim = optim_for(params, name, **shape)
    train(optim, params, range(60))
    fresh, copies = resumed(optim, params, tmp_path, **shape)
    train(optim, params, range(60, 80))
    train(fresh, copies, range(60, 80))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert fresh.describe() == optim.describe()
    _same(optim.pack(), fresh.pack())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_before_the_first_step_resumes_too(name, tmp_path):
    params = model()
    optim = optim_for(params, name)
    fresh, copies = resumed(optim, params, tmp_path)
    train(optim, params, range(3))
    train(fresh, copies, range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_eight_bit_state_is_eight_bit_and_packed_as_such():
    params = model()
    optim = optim_for(params, "adamw8bit")
    train(optim, params, range(2))
    assert optim.pack()[0]["state.0.state1"].dtype == torch.uint8


def test_prodigy_estimate_survives_the_files_exactly(tmp_path):
    params = model()
    optim = optim_for(params, "prodigy")
    train(optim, params, range(60))
    fresh, copies = resumed(optim, params, tmp_path)
    then, now = optim.inner.param_groups[0], fresh.inner.param_groups[0]
    for key in ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k", "d0", "betas", "beta3", "decouple"):
        assert now[key] == then[key] and type(now[key]) is type(then[key]), key
    assert then["d"] > then["d0"], "60 steps must have moved the estimate, else this proves nothing"
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(optim.inner.state[p]["p0"], fresh.inner.state[q]["p0"])
        assert torch.equal(optim.inner.state[p]["s"], fresh.inner.state[q]["s"])


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
    group = fresh.inner.param_groups[0]
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
    del tensors["state.1.exp_avg"]
    with pytest.raises(UserError, match=r"state\.1\.exp_avg"):
        optim_for(params, "adamw").unpack(tensors, data)


def test_adamw_is_one_fused_kernel_on_fp32_and_equals_torchs_default():
    params, reference = model(), model()
    optim = optim_for(params, "adamw")
    assert optim.inner.param_groups[0]["fused"]
    plain = optim_for(reference, "adamw")
    plain.inner = torch.optim.AdamW(reference, lr=LR["adamw"], weight_decay=0.01, foreach=False)
    train(optim, params, range(5))
    train(plain, reference, range(5))
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adamw_is_not_fused_over_half_precision_parameters():
    optim = optim_for([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], "adamw")
    assert not optim.inner.param_groups[0]["fused"]


def test_every_prodigy_flag_reaches_the_optimizer():
    optim = optim_for(
        model(), "prodigy", adam_beta1=0.8, adam_beta2=0.98, prodigy_beta3=0.97, adam_weight_decay=0.02,
        adam_epsilon=1e-6, prodigy_decouple=False, prodigy_use_bias_correction=False, prodigy_safeguard_warmup=False)
    wanted = {"betas": (0.8, 0.98), "beta3": 0.97, "weight_decay": 0.02, "eps": 1e-6, "decouple": False,
              "use_bias_correction": False, "safeguard_warmup": False}
    assert {k: optim.inner.param_groups[0][k] for k in wanted} == wanted


def test_prodigy_is_silent_on_stdout_and_reports_its_estimate(capfd):
    optim = optim_for(model(), "prodigy")
    assert capfd.readouterr().out == ""
    assert optim.describe() == {"lr/unet": 1.0, "d/unet": 1e-6}


def test_a_small_rate_with_prodigy_is_warned_about(caplog):
    params = model()
    group = {"name": "unet", "params": params, "lr": 1e-4, "weight_decay": 0.0}
    make_optimizer([group], options(optimizer="prodigy", learning_rate=1e-4), total_steps=10)
    assert "--learning_rate 0.0001 with Prodigy" in caplog.text


def test_a_warmup_longer_than_the_run_is_warned_about(caplog):
    optim_for(model(), "adamw", lr_scheduler="cosine", lr_warmup_steps=500, total_steps=300)
    assert "--lr_warmup_steps 500" in caplog.text
    caplog.clear()
    optim_for(model(), "adamw", lr_scheduler="constant", lr_warmup_steps=500, total_steps=300)
    assert not caplog.text


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_named_with_its_pip_command(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        optim_for(model(), name)
    problem, = problems(options(optimizer=name))
    assert problem.fix == f"pip install {package}"


def test_a_package_that_was_never_installed_is_found_missing_without_an_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "prodigyopt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    assert [p.fix for p in problems(options(optimizer="prodigy"))] == ["pip install prodigyopt"]


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


@pytest.mark.parametrize(("kwargs", "flag"), [
    ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "polynomial"),
    ({"lr_scheduler": "piecewise_constant"}, "--lr_step_rules"),
    ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10"}, "--lr_step_rules 1:10"),
])
def test_options_nothing_can_obey_are_refused(kwargs, flag):
    group = {"name": "unet", "params": model(), "lr": 1.0, "weight_decay": 0.0}
    with pytest.raises(UserError, match=flag):
        make_optimizer([group], options(**kwargs), total_steps=10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_fits_a_small_regression(name):
    params = model()
    before = loss_at(10_000, params).item()
    train(optim_for(params, name), params, range(200))
    assert loss_at(10_000, params).item() < 0.05 * before


def _same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][k], other[0][k]) for k in one[0])
