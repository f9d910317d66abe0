"""Adapters: fp32, on exactly the chosen layers, starting at the base model; and a forward pass equal to PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.tiny_models import TEXT_WIDTHS, tiny_unet
from trainkit import lean_lora
from trainkit.adapters import BLORA_BLOCKS, NAME, Adapters, add_adapters, patterns, problems
from trainkit.errors import UserError
from trainkit.families import sgm
from trainkit.families.file_names import RELEASED_XL
from trainkit.families.sdxl import LORA_TARGETS, TEXT_LORA_TARGETS
from trainkit.lean_lora import DecomposedUpdate, LeanDora, LeanLinear, LeanLoha, LeanLokr, LowRankUpdate
from trainkit.options import LoraOptions

Inputs = dict[str, object]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_unet((32, 64)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(2, TEXT_WIDTHS[1], generator=g), "time_ids": torch.full((2, 6), 64.0)}
    return {"sample": torch.randn(2, 4, 16, 16, generator=g), "timestep": torch.tensor([3, 800]),
            "encoder_hidden_states": torch.randn(2, 77, sum(TEXT_WIDTHS), generator=g), "added_cond_kwargs": added}


def lora(base: nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> Adapters:
    unet = copy.deepcopy(base).to(dtype)
    return add_adapters(unet, LoraOptions(**options), targets=LORA_TARGETS, seed=seed)


def train_a_little(adapters: Adapters) -> None:
    """B away from zero, as after some steps."""
    g = torch.Generator().manual_seed(2)
    for path in adapters.layers:
        B = adapters.factors(path)[1]
        B.data.copy_(torch.randn(B.shape, generator=g) * 0.1)


def train_everything_a_little(adapters: Adapters, size: float = 0.05) -> None:
    """Every parameter of any kind moved."""
    g = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters():
        parameter.data += torch.randn(parameter.shape, generator=g) * size


def gradients(adapters: Adapters, inputs: Inputs) -> dict[str, Tensor]:
    adapters.network.zero_grad()
    adapters.network(**inputs).sample.square().mean().backward()
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
    linear = per_block * blocks + per_attention * len(transformers)
    assert len(adapters.layers) == linear
    with_convolutions = lora(base, lora_layers=f"{layers}+conv")
    resnets = [m for m in base.modules() if type(m).__name__ == "ResnetBlock2D"]
    shortcuts = [r for r in resnets if r.conv_shortcut is not None]
    assert len(with_convolutions.layers) == linear + 2 * len(resnets) + len(shortcuts) + 1 + 1  # two levels
    assert shortcuts and not any("conv_in" in path or "conv_out" in path for path in with_convolutions.layers)


def test_only_adapters_get_gradients_and_every_adapter_gets_one(base, inputs):
    adapters = lora(base, lora_layers="all-linear")
    train_a_little(adapters)
    own = {id(p) for p in adapters.parameters()}
    assert {id(p) for p in adapters.network.parameters() if p.requires_grad} == own
    grads = gradients(adapters, inputs)
    assert all(g.abs().max() > 0 for g in grads.values())
    assert all(p.grad is None for p in adapters.network.parameters() if id(p) not in own)


KINDS = [  # every kind of adapter, what it stands on and how it starts
    {}, {"lora_layers": "attention+conv", "lora_alpha": 2}, {"use_rslora": True}, {"use_dora": True, "lora_alpha": 6},
    {"use_dora": True, "lora_layers": "attention+conv"}, {"init_lora_weights": "pissa", "lora_alpha": 6},
    {"init_lora_weights": "olora"}, {"lora_type": "loha"}, {"lora_type": "loha", "lora_layers": "attention+conv"},
    {"lora_type": "lokr"}, {"lora_type": "lokr", "lora_layers": "attention+conv", "lokr_factor": 4},
    {"lora_type": "lokr", "rank": 64, "lora_alpha": 6}, {"use_blora": True},
]


@pytest.mark.parametrize("factor", [8, 4, -1])
def test_lokrs_small_matrix_is_never_the_larger_one_so_that_lycoris_can_load_it(base, factor):
    """PEFT would make it 8 × 8 next to a block of 2 × 2 where a layer has 16 inputs and outputs."""
    adapters = lora(base, lora_type="lokr", lokr_factor=factor, lora_layers="attention+conv")
    for path in adapters.layers:
        update, (out, width, *_) = adapters.update(path), adapters.shape(path)
        a, c = update.C.shape
        assert a <= out // a and c <= width // c, path


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_starts_at_the_base_in_any_precision(base, inputs, kind, dtype):
    adapters, alone = lora(base, dtype=dtype, **kind), copy.deepcopy(base).to(dtype)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    cast = {k: v.to(dtype) if k in ("sample", "encoder_hidden_states") else v for k, v in inputs.items()}
    cast["added_cond_kwargs"] = {k: v.to(dtype) for k, v in inputs["added_cond_kwargs"].items()}
    with torch.no_grad():
        found, wanted = adapters.network(**cast).sample, alone(**cast).sample
    if kind.get("use_dora"):  # m / ‖W‖ is 1 to within rounding
        limit = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert (found - wanted).abs().max() < limit * wanted.abs().max()
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_gives_the_same_start_whatever_was_drawn_before(base, kind):
    torch.manual_seed(1)
    one = lora(base, seed=3, **kind).state_dict()
    torch.manual_seed(2)
    two, other = lora(base, seed=3, **kind).state_dict(), lora(base, seed=4, **kind).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "init_lora_weights" in kind or any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_said_to_be_added_to_the_weight_is_what_the_network_does(base, inputs, kind):
    """ΔW put into the bare base gives the trained network's answer, and PEFT agrees where it can say."""
    adapters, merged = lora(base, **kind), copy.deepcopy(base)
    train_everything_a_little(adapters)
    for path, layer in adapters.layers.items():
        delta = adapters.delta_weight(path)
        weight = merged.get_submodule(path).weight
        weight += delta.view(weight.shape).float()
        if not kind.get("use_dora"):
            torch.testing.assert_close(delta.float(), layer.get_delta_weight(NAME).flatten(1), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        found, wanted, bare = (net(**inputs).sample for net in (adapters.network, merged, base))
    effect, rounding = (wanted - bare).abs().max(), 5e-6 * wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * effect + rounding and effect > 10 * rounding


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_trains_every_parameter_and_continues_bit_for_bit(base, inputs, kind):
    adapters = lora(base, **kind)
    train_everything_a_little(adapters)
    assert all(g.abs().max() > 0 for g in gradients(adapters, inputs).values())
    tensors, data = adapters.pack()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    fresh = lora(base, seed=9, **kind)
    fresh.unpack(tensors, data)
    with torch.no_grad():
        assert torch.equal(fresh.network(**inputs).sample, adapters.network(**inputs).sample)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_pissa_and_olora_start_in_main_directions_and_leave_the_base_alone(base, inputs, how):
    adapters = lora(base, init_lora_weights=how, rank=8, lora_alpha=4)
    before = base(**inputs).sample
    train_everything_a_little(adapters)
    for path in adapters.layers:
        A0, B0 = adapters.state_dict()[f"{path}.start_A"], adapters.state_dict()[f"{path}.start_B"]
        W = base.get_submodule(path).weight
        assert torch.equal(adapters.network.get_submodule(path).get_base_layer().weight, W)
        if how == "pissa":
            best = torch.linalg.svdvals(W)[8:].square().sum().sqrt()
            assert (W - 0.5 * B0 @ A0).norm() < 1.05 * best
        else:
            torch.testing.assert_close(B0.t() @ B0, torch.eye(8), rtol=0, atol=1e-5)
            Q, R = torch.linalg.qr(W)
            torch.testing.assert_close(B0 @ A0, Q[:, :8] @ R[:8], rtol=1e-4, atol=1e-5)
    adapters.network.disable_adapters()
    assert torch.equal(adapters.network(**inputs).sample, before)


def test_a_rank_above_what_a_weight_has_is_refused_for_pissa(base):
    options = LoraOptions(init_lora_weights="pissa", rank=100)
    problem, = problems(base, options, targets=LORA_TARGETS)
    assert "--rank 100" in problem.what and "--rank 56 at most" in problem.fix


def test_blora_adapts_the_two_blocks_and_composes_with_the_layers(base):
    paths = lora(base, use_blora=True, lora_layers="attention+ff").layers
    assert {".".join(path.split(".")[:4]) for path in paths} == set(BLORA_BLOCKS)
    assert any("ff.net" in path for path in paths)


def test_blora_is_refused_where_there_are_no_such_blocks(base):
    flat = nn.ModuleDict({"down_blocks": nn.ModuleDict({"attentions": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})})
    problem, = problems(flat, LoraOptions(use_blora=True), targets=LORA_TARGETS)
    assert "B-LoRA" in problem.what and "up_blocks.0.attentions.0" in problem.why


def test_rslora_scales_by_the_root_of_the_rank(base):
    assert lora(base, use_rslora=True, rank=16, lora_alpha=8).scale == 2.0
    assert next(iter(lora(base, use_rslora=True, rank=16, lora_alpha=8).layers.values())).scaling[NAME] == 2.0


def test_without_a_share_of_the_steps_the_unet_has_no_adapters(base):
    adapters = lora(base, train_unet_frac=0)
    assert not adapters.layers and not adapters.parameters() and adapters.groups(lr=1.0, weight_decay=0.0) == []
    adapters.unpack(*adapters.pack())
    assert adapters.network.state_dict().keys() == base.state_dict().keys()


def test_text_encoders_take_adapters_of_their_own_and_no_blocks(text_encoders):
    options = LoraOptions(lora_unet_blocks="up_blocks.0", lora_layers="all-linear", train_unet_frac=0)
    for prefix, encoder in zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True):
        adapters = add_adapters(copy.deepcopy(encoder), options, prefix=prefix, targets=TEXT_LORA_TARGETS, seed=0)
        assert len(adapters.layers) == 4 * 3 and adapters.groups(lr=1.0, weight_decay=0.0)[0]["name"] == prefix
        assert all("self_attn" in path for path in adapters.layers)


@pytest.fixture(scope="module")
def text_encoders(tiny_sdxl):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return [kind.from_pretrained(tiny_sdxl / folder).requires_grad_(False) for kind, folder in (
        (CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))]


def test_adapters_are_fp32_over_a_bf16_base(base):
    adapters = lora(base, dtype=torch.bfloat16)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert adapters.network.conv_in.weight.dtype == torch.bfloat16


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
        add_adapters(copy.deepcopy(base), options, targets=LORA_TARGETS, seed=0)


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
    group, = adapters.groups(lr=1e-4, weight_decay=0.01, stop=7)
    assert group["name"] == "unet" and group["lr"] == 1e-4 and group["weight_decay"] == 0.01 and group["stop"] == 7
    assert [id(p) for p in group["params"]] == [id(p) for p in adapters.parameters()]
    assert group["names"] == list(adapters.named_parameters())


def test_groups_out_of_training_are_still_packed(base):
    adapters = lora(base)
    for parameter in adapters.parameters():
        parameter.requires_grad_(False)
    assert len(adapters.pack()[0]) == 2 * len(adapters.layers)


def test_loraplus_gives_the_bs_their_own_rate(base):
    adapters = lora(base, loraplus_lr_ratio=16, use_dora=True)
    first, second = adapters.groups(lr=1e-4, weight_decay=0.01)
    assert (first["name"], second["name"]) == ("unet", "unet.B") and second["lr"] == pytest.approx(1.6e-3)
    assert {id(p) for p in second["params"]} == {id(adapters.factors(path)[1]) for path in adapters.layers}
    assert len(first["params"]) == 2 * len(adapters.layers)  # A and the magnitude
    named = adapters.named_parameters()
    assert all(p is named[n] for g in (first, second) for n, p in zip(g["names"], g["params"], strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The lean forward

SMALL, LARGE = (48, 32), (200, 400)  # in, out: merged, and not


def layer_pair(sizes: tuple[int, int], *, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32,
               dora: bool = False):
    """The same PEFT layer twice, the second one lean."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=dora)
    stock = Linear(nn.Linear(*sizes, bias=bias).requires_grad_(False), NAME, config, r=4, lora_alpha=6)
    nn.init.normal_(stock.lora_B[NAME].weight, std=0.1)
    for magnitude in stock.lora_magnitude_vector.parameters():
        nn.init.uniform_(magnitude, 0.5, 2)
    stock.base_layer.to(dtype)
    lean = copy.deepcopy(stock)
    assert lean_lora.install(lean, NAME)
    return stock, lean


def run(layer: nn.Module, x: Tensor, *, needs_dx: bool = True) -> list[Tensor | None]:
    """Output and gradients of x, A and B."""
    x = x.clone().requires_grad_(needs_dx)
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return [y, x.grad, layer.lora_A[NAME].weight.grad, layer.lora_B[NAME].weight.grad,
            *(magnitude.grad for magnitude in layer.lora_magnitude_vector.parameters())]


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_doras_written_out_backward_is_the_derivative_at_a_constant_norm(bias, needs_dx):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2), (4,))
    x, W, b, A, B, s = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)
    args = (x.requires_grad_(needs_dx), W, b if bias else None, A.requires_grad_(), B.requires_grad_(),
            s.requires_grad_(), 1.5)
    assert torch.autograd.gradcheck(DecomposedUpdate.apply, args)
    V = W + 1.5 * B @ A
    torch.testing.assert_close(DecomposedUpdate.apply(*args), F.linear(x, s[:, None] * V, args[2]))


def test_row_norms_need_no_product_of_the_factors():
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=g) for shape in ((40, 30), (4, 30), (40, 4)))
    found = lean_lora.row_norms(W, A, B, 0.7, W.square().sum(1))
    torch.testing.assert_close(found, (W + 0.7 * B @ A).norm(dim=1))


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["merged", "low rank"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), ()])
@pytest.mark.parametrize("dora", [False, True])
def test_lean_equals_peft_in_output_and_gradients(sizes, bias, shape, dora):
    stock, lean = layer_pair(sizes, bias=bias, dora=dora)
    x = torch.randn(*shape, sizes[0])
    for found, wanted in zip(run(lean, x), run(stock, x), strict=True):
        wanted = wanted.view_as(found)  # PEFT's DoRA gives a lone vector a dimension more
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.detach().abs().max()))
        assert found.dtype == wanted.dtype


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_no_gradient_is_made_for_an_input_that_needs_none(sizes):
    _, lean = layer_pair(sizes)
    assert run(lean, torch.randn(3, sizes[0]), needs_dx=False)[1] is None


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("dora", [False, True])
def test_a_bf16_base_keeps_its_dtype_and_gives_fp32_gradients(sizes, dora):
    stock, lean = layer_pair(sizes, dtype=torch.bfloat16, dora=dora)
    x = torch.randn(5, sizes[0], dtype=torch.bfloat16)
    for found, wanted in zip(run(lean, x), run(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * float(wanted.detach().abs().max()))
        assert found.dtype == wanted.dtype


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("dora", [False, True])
def test_under_autocast_products_run_in_bf16_and_gradients_return_in_fp32(sizes, dora):
    stock, lean = layer_pair(sizes, dora=dora)
    x = torch.randn(5, sizes[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = run(lean, x), run(stock, x)
    assert found[0].dtype == torch.bfloat16 and {t.dtype for t in found[1:]} == {torch.float32}
    for f, w in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(f, w, rtol=0.05, atol=0.02 * float(w.abs().max()))


def test_nothing_is_merged_in_half_precision_where_a_young_update_would_be_rounded_away():
    x, W = torch.zeros(1, 8), torch.zeros(8, 8)
    assert lean_lora.should_merge(x, W) and not lean_lora.should_merge(x, torch.zeros(512, 512))
    assert not lean_lora.should_merge(x.bfloat16(), W.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not lean_lora.should_merge(x, W)


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


def test_other_variants_and_convolutions_are_never_made_lean(base):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=4, lora_alpha=4, lora_bias=True)
    layer = Linear(nn.Linear(8, 8), NAME, config, r=4, lora_alpha=4)
    assert not lean_lora.install(layer, NAME) and type(layer) is Linear
    adapted = lora(base, lora_layers="attention+conv").layers
    assert {isinstance(layer, LeanLinear) for path, layer in adapted.items() if "conv" in path} == {False}


@pytest.mark.parametrize("kind, lean_class", [
    ({"lora_layers": "attention"}, LeanLinear), ({"lora_layers": "all-linear"}, LeanLinear),
    ({"use_dora": True}, LeanDora), ({"lora_type": "loha"}, LeanLoha), ({"lora_type": "lokr"}, LeanLokr)], ids=str)
def test_a_unet_trains_the_same_with_lean_layers_as_with_pefts(base, inputs, monkeypatch, kind, lean_class):
    build = lambda: lora(base, rank=4, lora_alpha=6, **kind)  # noqa: E731
    lean, stock = build(), without_lean(monkeypatch, build)
    assert {type(layer) for layer in lean.layers.values()} == {lean_class}
    assert all(type(layer).__module__.startswith("peft.") for layer in stock.layers.values())
    assert lean.network.state_dict().keys() == stock.network.state_dict().keys()
    for adapters in (lean, stock):
        train_everything_a_little(adapters, 0.2 if "lora_type" in kind else 0.05)
    found, wanted = gradients(lean, inputs), gradients(stock, inputs)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-4 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("merge_up_to", [0, lean_lora.MERGE_UP_TO], ids=["low rank", "merged"])
def test_gradient_checkpointing_changes_no_gradient(base, inputs, monkeypatch, merge_up_to, use_dora):
    monkeypatch.setattr(lean_lora, "MERGE_UP_TO", merge_up_to)
    adapters = lora(base, use_dora=use_dora)
    train_a_little(adapters)
    plain = gradients(adapters, inputs)
    adapters.network.enable_gradient_checkpointing()
    again = gradients(adapters, inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_adapters_train_under_ddp(base, inputs, tmp_path):
    adapters = lora(base)
    train_a_little(adapters)
    alone = gradients(adapters, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapters.network)
        adapters.network.zero_grad()
        wrapped(**inputs).sample.square().mean().backward()
        for name, parameter in adapters.named_parameters().items():
            torch.testing.assert_close(parameter.grad, alone[name])
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, alphas and rates of single layers


def ranks(adapters: Adapters) -> dict[str, int]:
    return {path: len(adapters.factors(path)[0]) for path in adapters.layers}


def test_the_first_key_that_fits_gives_a_layer_its_rank(base):
    found = ranks(lora(base, rank=2, lora_rank_pattern="mid_block=7, attn2.to_k=3 down_blocks.1=5"))
    assert set(found.values()) == {2, 3, 5, 7}
    for path, rank in found.items():
        expected = 7 if path.startswith("mid_block.") else 3 if path.endswith("attn2.to_k") else (
            5 if path.startswith("down_blocks.1.") else 2)
        assert rank == expected, path


@pytest.mark.parametrize("adapter_type", ["lora", "loha", "lokr"])
def test_an_alpha_that_nobody_gives_is_the_layers_rank(base, adapter_type):
    adapters = lora(base, lora_type=adapter_type, rank=2, lora_rank_pattern="attn2=4", lora_alpha_pattern="attn1=1")
    for path in adapters.layers:
        assert adapters.scale_of(path) == (0.5 if ".attn1." in path else 1)
        assert adapters.rank_of(path) == (4 if ".attn2." in path else 2)


def test_a_given_alpha_stays_where_a_rank_changes(base):
    adapters = lora(base, rank=2, lora_alpha=2, use_rslora=True, lora_rank_pattern="attn2=4")
    assert {adapters.scale_of(p) for p in adapters.layers if ".attn2." in p} == {1.0}
    train_a_little(adapters)
    path = next(p for p in adapters.layers if ".attn2." in p)
    A, B = adapters.factors(path)
    assert torch.allclose(adapters.delta_weight(path), (B @ A).double(), rtol=1e-5)


def test_blocks_are_named_as_webuis_number_them(base):
    options = LoraOptions(rank=2, lora_rank_pattern="MID=3 OUT01=4 IN0[1-3]=5")
    adapters = add_adapters(copy.deepcopy(base), options, targets=LORA_TARGETS, seed=0,
                            blocks=sgm.numbered(base.config))
    for path, rank in ranks(adapters).items():
        block = ".".join(path.split(".")[:4])
        assert rank == (3 if path.startswith("mid_block.") else 4 if block == "up_blocks.0.attentions.1" else
                        5 if block.startswith("down_blocks.1.") else 2), path


def test_numbers_of_the_released_sdxls_blocks():
    found = sgm.numbered(RELEASED_XL)
    assert (found["down_blocks.1.attentions.0"], found["down_blocks.2.attentions.1"]) == ("IN04", "IN08")
    assert (found["mid_block.attentions.0"], found["up_blocks.0.attentions.0"]) == ("MID", "OUT00")
    assert found["up_blocks.1.attentions.2"] == "OUT05"


def test_rates_of_layers_have_groups_of_their_own(base):
    adapters = lora(base, rank=2, lora_lr_pattern="mid_block=0.5", loraplus_lr_ratio=4)
    groups = {group["name"]: group for group in adapters.groups(lr=1e-3, weight_decay=0)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "unet": 1e-3, "unet.B": 4e-3, "unet[mid_block]": 5e-4, "unet[mid_block].B": 2e-3}
    assert all(name.startswith("mid_block.") for name in groups["unet[mid_block]"]["names"])
    assert sum(len(group["params"]) for group in groups.values()) == len(adapters.parameters())


@pytest.mark.parametrize("options, words", [
    ({"lora_rank_pattern": "attn9=4"}, "no adapted layer of the UNet fits 'attn9'"),
    ({"lora_rank_pattern": "IN04=4"}, "no adapted layer of the UNet fits 'IN04'"),
    ({"lora_rank_pattern": "attn2"}, "cannot read 'attn2'"),
    ({"lora_rank_pattern": "attn2=2.5"}, "cannot be '2.5'"),
    ({"lora_rank_pattern": "attn2=0"}, "cannot be '0'"),
    ({"lora_alpha_pattern": "attn2=nan"}, "cannot be 'nan'"),
    ({"lora_lr_pattern": "attn2=-1"}, "cannot be '-1'"),
    ({"lora_rank_pattern": "at(tn2=4"}, "is no regular expression"),
    ({"lora_lr_pattern": " , "}, "names no layer"),
])
def test_patterns_that_say_nothing_are_named(base, options, words):
    found = problems(base, LoraOptions(**options), targets=LORA_TARGETS)
    assert [words in problem.what for problem in found] == [True], found


def test_text_encoders_have_keys_of_their_own():
    pattern = "text_encoder_2.layers.0=8 attn2=3 text_encoder.q_proj=6"
    assert patterns.read(pattern, "unet") == {"attn2": 3}
    assert patterns.read(pattern, "text_encoder") == {"q_proj": 6}
    assert patterns.read(pattern, "text_encoder_2") == {"layers.0": 8}
