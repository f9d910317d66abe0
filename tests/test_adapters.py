"""Adapters: the only trainable tensors, fp32, on exactly the chosen layers; and a forward pass equal to PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny import TEXT_WIDTHS, tiny_unet
from trainkit import lean_lora
from trainkit.adapters import NAME, Adapters, add_lora, problems
from trainkit.errors import UserError
from trainkit.families.sdxl import LORA_TARGETS
from trainkit.lean_lora import LeanLinear, LowRankUpdate
from trainkit.options import LoraOptions, OptimizerOptions

Inputs = dict[str, object]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_unet((32, 64, 64)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(2, TEXT_WIDTHS[1], generator=g), "time_ids": torch.full((2, 6), 64.0)}
    return {"sample": torch.randn(2, 4, 16, 16, generator=g), "timestep": torch.tensor([3, 800]),
            "encoder_hidden_states": torch.randn(2, 77, sum(TEXT_WIDTHS), generator=g), "added_cond_kwargs": added}


def lora(base: nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> Adapters:
    unet = copy.deepcopy(base).to(dtype)
    return add_lora(unet, LoraOptions(**options), targets=LORA_TARGETS, seed=seed)


def train_a_little(adapters: Adapters) -> None:
    """B away from zero, as after some steps."""
    g = torch.Generator().manual_seed(2)
    for path in adapters.layers:
        B = adapters.factors(path)[1]
        B.data.copy_(torch.randn(B.shape, generator=g) * 0.1)


def gradients(adapters: Adapters, inputs: Inputs) -> dict[str, Tensor]:
    adapters.unet.zero_grad()
    adapters.unet(**inputs).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in adapters.named_parameters().items()}


def without_lean(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Adapters]) -> Adapters:
    with monkeypatch.context() as patch:
        patch.setattr(lean_lora, "install", lambda layer, adapter: False)
        return build()


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("layers, per_block, per_attention", [
    ("attention", 8, 0), ("attention+ff", 10, 0), ("all-linear", 10, 2)])
def test_each_choice_of_layers_adapts_what_it_says(base, layers, per_block, per_attention):
    adapters = lora(base, lora_layers=layers)
    transformers = [m for m in base.modules() if type(m).__name__ == "Transformer2DModel"]
    blocks = sum(len(t.transformer_blocks) for t in transformers)
    assert len(adapters.layers) == per_block * blocks + per_attention * len(transformers)


def test_only_adapters_get_gradients_and_every_adapter_gets_one(base, inputs):
    adapters = lora(base, lora_layers="all-linear")
    train_a_little(adapters)
    own = {id(p) for p in adapters.parameters()}
    assert {id(p) for p in adapters.unet.parameters() if p.requires_grad} == own
    grads = gradients(adapters, inputs)
    assert all(g.abs().max() > 0 for g in grads.values())
    assert all(p.grad is None for p in adapters.unet.parameters() if id(p) not in own)


def test_a_fresh_adapter_changes_nothing(base, inputs):
    with torch.no_grad():
        assert torch.equal(lora(base).unet(**inputs).sample, base(**inputs).sample)


def test_adapters_are_fp32_over_a_bf16_base(base):
    adapters = lora(base, dtype=torch.bfloat16)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert adapters.unet.conv_in.weight.dtype == torch.bfloat16


def test_the_start_depends_on_seed_and_path_and_on_nothing_else(base):
    torch.manual_seed(1)
    one = lora(base, seed=3).state_dict()
    torch.manual_seed(2)
    wider = lora(base, seed=3, lora_layers="all-linear", lora_unet_blocks="up_blocks.0").state_dict()
    shared = one.keys() & wider.keys()
    assert shared and all(torch.equal(one[name], wider[name]) for name in shared)
    other = lora(base, seed=4).state_dict()
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    bf16 = lora(base, seed=3, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(one[name], bf16[name]) for name in one)


def test_the_start_is_pefts_gaussian(base):
    adapters = lora(base, rank=16)
    A = torch.cat([adapters.factors(path)[0].flatten() for path in adapters.layers])
    assert abs(A.std().item() * 16 - 1) < 0.02 and abs(A.mean().item()) < 1e-3
    assert not any(adapters.factors(path)[1].any() for path in adapters.layers)


@pytest.mark.parametrize("listed", ["up_blocks.0.attentions.1", "unet.up_blocks.0.attentions.1, mid_block"])
def test_blocks_are_exact_path_prefixes(base, listed):
    paths = lora(base, lora_unet_blocks=listed).layers
    wanted = tuple(f"{block.strip().removeprefix('unet.')}." for block in listed.split(","))
    assert paths and all(path.startswith(wanted) for path in paths)
    assert all(any(path.startswith(block) for path in paths) for block in wanted)


@pytest.mark.parametrize("wrong", ["up_blocks.0.attention.1", "up_blocks.0.attentions.11", "0.attentions.1", "conv_in"])
def test_a_block_that_matches_nothing_is_refused_with_the_nearest_names(base, wrong):
    options = LoraOptions(lora_unet_blocks=f"mid_block,{wrong}")
    problem, = problems(base, options, targets=LORA_TARGETS)
    assert wrong in problem.what and "attentions" in problem.fix
    with pytest.raises(UserError):
        add_lora(copy.deepcopy(base), options, targets=LORA_TARGETS, seed=0)


@pytest.mark.parametrize("listed", [" , ", ",", "  "])
def test_a_list_that_names_no_block_is_refused_and_does_not_mean_all(base, listed):
    problem, = problems(base, LoraOptions(lora_unet_blocks=listed), targets=LORA_TARGETS)
    assert "no block" in problem.what and problem.kind == "usage"


def test_the_nearest_name_to_a_slip_is_the_block_that_was_meant(base):
    options = LoraOptions(lora_unet_blocks="unet.up_blocks.0.attention.1")
    assert "unet.up_blocks.0.attentions.1" in problems(base, options, targets=LORA_TARGETS)[0].fix


def test_packed_adapters_continue_bit_for_bit_and_others_are_refused(base):
    adapters = lora(base, rank=4, lora_alpha=8)
    train_a_little(adapters)
    tensors, data = adapters.pack()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fresh = lora(base, rank=4, lora_alpha=8, seed=9)
    fresh.unpack(tensors, data)
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), fresh.parameters(), strict=True))
    for other in ({"rank": 8}, {"rank": 4}, {"rank": 4, "lora_alpha": 8, "lora_layers": "all-linear"}):
        with pytest.raises(UserError, match="other adapters"):
            lora(base, **other).unpack(tensors, data)


def test_delta_weight_is_pefts(base):
    adapters = lora(base, rank=4, lora_alpha=6)
    train_a_little(adapters)
    for path, layer in adapters.layers.items():
        torch.testing.assert_close(adapters.delta_weight(path).float(), layer.get_delta_weight(NAME))


def test_whatever_peft_trains_in_a_layer_is_trained_saved_and_resumed(base):
    """A DoRA layer has a magnitude beside A and B."""
    from peft import LoraConfig

    unet = copy.deepcopy(base)
    unet.add_adapter(LoraConfig(r=2, target_modules=["mid_block.attentions.0.proj_in"], use_dora=True))
    adapters = Adapters(unet, rank=2, alpha=2)
    path = "mid_block.attentions.0.proj_in"
    assert [*adapters.named_parameters()][:2] == [f"{path}.lora_A.weight", f"{path}.lora_B.weight"]
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in unet.parameters() if p.requires_grad}
    assert len(adapters.parameters()) == 3 and adapters.pack()[0].keys() == adapters.named_parameters().keys()


def test_groups_hold_every_parameter_once(base):
    adapters = lora(base)
    group, = adapters.groups(OptimizerOptions(learning_rate=1e-4, adam_weight_decay=0.01), global_batch=4)
    assert group["name"] == "unet" and group["lr"] == 1e-4 and group["weight_decay"] == 0.01
    assert [id(p) for p in group["params"]] == [id(p) for p in adapters.parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# The lean forward

SMALL, LARGE = (48, 32), (200, 400)  # in, out: merged, and not


def layer_pair(sizes: tuple[int, int], *, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
    """The same PEFT layer twice, the second one lean."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout)
    stock = Linear(nn.Linear(*sizes, bias=bias).requires_grad_(False), NAME, config, r=4, lora_alpha=6)
    nn.init.normal_(stock.lora_B[NAME].weight, std=0.1)
    stock.base_layer.to(dtype)
    lean = copy.deepcopy(stock)
    assert lean_lora.install(lean, NAME)
    return stock, lean


def run(layer: nn.Module, x: Tensor, *, needs_dx: bool = True) -> list[Tensor | None]:
    """Output and gradients of x, A and B."""
    x = x.clone().requires_grad_(needs_dx)
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return [y, x.grad, layer.lora_A[NAME].weight.grad, layer.lora_B[NAME].weight.grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_written_out_backward_is_the_derivative(bias, needs_dx):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, W, b, A, B = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)
    args = (x.requires_grad_(needs_dx), W, b if bias else None, A.requires_grad_(), B.requires_grad_(), 1.5)
    assert torch.autograd.gradcheck(LowRankUpdate.apply, args)
    y = F.linear(x, W + 1.5 * B @ A, args[2])
    torch.testing.assert_close(LowRankUpdate.apply(*args), y)


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["merged", "low rank"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), ()])
def test_lean_equals_peft_in_output_and_gradients(sizes, bias, shape):
    stock, lean = layer_pair(sizes, bias=bias)
    x = torch.randn(*shape, sizes[0])
    for found, wanted in zip(run(lean, x), run(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.detach().abs().max()))
        assert found.dtype == wanted.dtype


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_no_gradient_is_made_for_an_input_that_needs_none(sizes):
    _, lean = layer_pair(sizes)
    assert run(lean, torch.randn(3, sizes[0]), needs_dx=False)[1] is None


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_a_bf16_base_keeps_its_dtype_and_gives_fp32_gradients(sizes):
    stock, lean = layer_pair(sizes, dtype=torch.bfloat16)
    x = torch.randn(5, sizes[0], dtype=torch.bfloat16)
    for found, wanted in zip(run(lean, x), run(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * float(wanted.detach().abs().max()))
        assert found.dtype == wanted.dtype


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_under_autocast_products_run_in_bf16_and_gradients_return_in_fp32(sizes):
    stock, lean = layer_pair(sizes)
    x = torch.randn(5, sizes[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = run(lean, x), run(stock, x)
    assert found[0].dtype == torch.bfloat16 and {t.dtype for t in found[1:]} == {torch.float32}
    for f, w in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(f, w, rtol=0.05, atol=0.02 * float(w.abs().max()))


def test_nothing_is_merged_in_half_precision_where_a_young_update_would_be_rounded_away():
    x, W = torch.zeros(1, 8), torch.zeros(8, 8)
    assert lean_lora.worth_merging(x, W) and not lean_lora.worth_merging(x, torch.zeros(512, 512))
    assert not lean_lora.worth_merging(x.bfloat16(), W.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not lean_lora.worth_merging(x, W)


def test_lean_steps_aside_where_something_else_is_asked_of_the_layer(monkeypatch):
    from peft import LoraConfig

    def lean_calls(prepare: Callable[[nn.Module], object], **options: float) -> int:
        stock, lean = layer_pair(LARGE, **options)
        for layer in (stock, lean):
            prepare(layer)
        x, calls = torch.randn(3, LARGE[0]), []
        apply = LowRankUpdate.apply
        with monkeypatch.context() as patch:
            patch.setattr(LowRankUpdate, "apply", lambda *a: (calls.append(1), apply(*a))[1])
            torch.manual_seed(0)
            y = lean(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, stock(x))
        return len(calls)

    def second_adapter(layer):
        layer.update_layer("second", 4, 4, config=LoraConfig())
        layer.set_adapter([NAME, "second"])

    def wrapped_base(layer):
        forward = layer.base_layer.forward
        layer.base_layer.forward = lambda x: forward(x) + 1

    assert lean_calls(lambda layer: None) == 1
    assert lean_calls(lambda layer: layer.train(), dropout=0.5) == 0
    assert lean_calls(lambda layer: layer.eval(), dropout=0.5) == 1
    assert lean_calls(lambda layer: layer.enable_adapters(False)) == 0
    assert lean_calls(lambda layer: layer.merge()) == 0
    assert lean_calls(lambda layer: layer.base_layer.requires_grad_(True)) == 0
    assert lean_calls(second_adapter) == 0
    assert lean_calls(wrapped_base) == 0
    assert lean_calls(lambda layer: layer.set_scale(NAME, 0.5)) == 1


def test_dora_and_other_variants_are_never_made_lean():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=4, lora_alpha=4, use_dora=True)
    layer = Linear(nn.Linear(8, 8), NAME, config, r=4, lora_alpha=4)
    assert not lean_lora.install(layer, NAME) and type(layer) is Linear


@pytest.mark.parametrize("layers", ["attention", "all-linear"])
def test_a_unet_trains_the_same_with_lean_layers_as_with_pefts(base, inputs, monkeypatch, layers):
    build = lambda: lora(base, lora_layers=layers, rank=4, lora_alpha=6)  # noqa: E731
    lean, stock = build(), without_lean(monkeypatch, build)
    assert all(isinstance(layer, LeanLinear) for layer in lean.layers.values())
    assert not any(isinstance(layer, LeanLinear) for layer in stock.layers.values())
    assert lean.unet.state_dict().keys() == stock.unet.state_dict().keys()
    for adapters in (lean, stock):
        train_a_little(adapters)
    found, wanted = gradients(lean, inputs), gradients(stock, inputs)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-4 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("merge_up_to", [0, lean_lora.MERGE_UP_TO], ids=["low rank", "merged"])
def test_gradient_checkpointing_changes_no_gradient(base, inputs, monkeypatch, merge_up_to):
    monkeypatch.setattr(lean_lora, "MERGE_UP_TO", merge_up_to)
    adapters = lora(base)
    train_a_little(adapters)
    plain = gradients(adapters, inputs)
    adapters.unet.enable_gradient_checkpointing()
    again = gradients(adapters, inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_adapters_train_under_ddp(base, inputs, tmp_path):
    adapters = lora(base)
    train_a_little(adapters)
    alone = gradients(adapters, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapters.unet)
        adapters.unet.zero_grad()
        wrapped(**inputs).sample.square().mean().backward()
        for name, parameter in adapters.named_parameters().items():
            torch.testing.assert_close(parameter.grad, alone[name])
    finally:
        torch.distributed.destroy_process_group()
