"""--base_precision: frozen weights in few bytes give nearly the same gradients, and everything reads one weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support import ROOT
from tests.support.trainers import command, forked, make_images
from trainkit import frozen_weights
from trainkit.adapters import add_adapters
from trainkit.condition import Condition
from trainkit.diffusion import Level
from trainkit.errors import UserError
from trainkit.families import sdxl
from trainkit.frozen_weights import FORMATS, Storage, StoredLinear, make_storage, store_layer
from trainkit.options import LoraOptions, ModelOptions

CPU, SMALL = torch.device("cpu"), ("int8", "fp8", "nf4")
NEAREST = {"bf16": 0.9999, "int8": 0.999, "fp8": 0.998, "nf4": 0.98}  # cosine with fp32's gradient, at least


def adapted(precision: str | None, **lora: object):
    family = sdxl.load(ModelOptions(pretrained_model_name_or_path=str(ROOT / "assets" / "tiny-sdxl-icons"),
                                    base_precision=precision), device=CPU, weight_dtype=torch.float32)
    return family, add_adapters(family.denoiser, LoraOptions(rank=4, **lora), targets=family.lora_targets, seed=0)


def answer(family) -> torch.Tensor:
    drawn, config = torch.Generator().manual_seed(0), family.denoiser.config
    z = torch.randn(2, family.latent_channels, 8, 8, generator=drawn)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    scale = torch.ones(2)
    given = Condition({"embeds": torch.randn(2, 77, config.cross_attention_dim, generator=drawn),
                       "pooled": torch.randn(2, pooled, generator=drawn), "time_ids": torch.full((2, 6), 64.0)})
    return family.denoise(z, Level(scale, scale, cond=torch.tensor([300, 700]), time=scale), given)


def gradient(family, lora) -> torch.Tensor:
    """Of all LoRA tensors; B is not zero, or A's gradient would be."""
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in lora.named_parameters().items():
        parameter.grad = None
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=drawn)
    answer(family).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in lora.parameters()])


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return gradient(*adapted(None))


@pytest.mark.trains
@pytest.mark.parametrize("precision", NEAREST)
def test_the_gradient_is_nearly_that_of_fp32_and_checkpointing_changes_no_bit(precision, exact):
    family, lora = adapted(precision)
    found = gradient(family, lora)
    assert NEAREST[precision] <= F.cosine_similarity(found, exact, dim=0) < 1
    family.denoiser.enable_gradient_checkpointing()
    assert torch.equal(gradient(family, lora), found)


@pytest.mark.trains
def test_no_weight_of_the_blocks_is_left_whole(exact):
    family, _ = adapted("int8")
    whole = [name for name, p in family.denoiser.named_parameters()
             if p.ndim > 1 and "lora_" not in name and "_blocks." in name]
    assert not whole and family.weight_dtype == torch.float32 and family.storage == Storage("int8")


@pytest.mark.trains
@pytest.mark.parametrize("adapter", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"lora_type": "loha"},
                                     {"lora_type": "lokr"}], ids=str)
def test_every_adapter_starts_at_the_weight_that_is_computed_with(adapter):
    """PiSSA decomposes it, DoRA takes its norms; the answer is the stored base's in any case."""
    family, lora = adapted("int8", **adapter)
    plain, _ = adapted("int8")
    assert torch.allclose(answer(family), answer(plain), atol=1e-5)
    path, layer = next(iter(lora.layers.items()))
    W = layer.base_layer.stored.to(torch.float32)
    assert torch.equal(lora.weight(path), W.double())
    if "use_dora" in adapter:
        assert torch.allclose(lora.magnitude(path), W.norm(dim=1))


@pytest.mark.parametrize("precision", SMALL)
def test_zeros_stay_zeros_and_an_outlier_spoils_no_other_row(precision):
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    form, plain = FORMATS[precision], W.clone()
    W[1], W[3, 5] = 0, 1e4
    found, before = (form.unpack(form.pack(given), given.shape, torch.float32) for given in (W, plain))
    others = [0, 2, 4, 5]
    assert torch.equal(found[1], torch.zeros(64)) and torch.equal(found[others], before[others])
    assert found[3, 5] == pytest.approx(1e4, rel=0.04)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    layer = nn.Linear(4, 3)
    layer.weight.data[1, 2] = bad
    with pytest.raises(UserError, match=r"to_q"):
        store_layer(layer, FORMATS["int8"], "mid_block.to_q")


@pytest.mark.parametrize("precision", SMALL)
def test_another_dtype_of_the_products_leaves_what_is_kept(precision):
    layer = nn.Linear(64, 8)
    store_layer(layer, FORMATS[precision], "")
    kept = [part.clone() for part in layer.stored.parts]
    layer.to(torch.bfloat16)
    assert isinstance(layer, StoredLinear) and layer.weight.dtype == torch.bfloat16
    assert all(one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
               for one, other in zip(kept, layer.stored.parts, strict=True))


def test_what_is_as_wide_as_the_products_is_refused_and_the_same_changes_nothing():
    assert make_storage("bf16", torch.bfloat16, CPU) == make_storage(None, torch.float32, CPU) == Storage()
    for name, dtype in (("fp32", torch.bfloat16), ("fp16", torch.bfloat16), ("bf16", torch.float16)):
        with pytest.raises(UserError, match="base_precision"):
            make_storage(name, dtype, CPU)


def test_fp8_is_refused_where_pytorch_has_none():
    with pytest.raises(UserError, match="int8"):
        make_storage("fp8", torch.float32, torch.device("mps"))
    assert frozen_weights.make_storage("int8", torch.float32, torch.device("mps")).name == "int8"


@pytest.mark.trains
def test_another_base_precision_cannot_resume(tiny_sdxl, tmp_path):
    images = make_images(tmp_path / "data", n=3)
    settings = dict(max_train_steps=2, base_precision="int8")
    assert forked(command(tiny_sdxl, images, tmp_path / "out", **settings), log=tmp_path / "log").code == 0
    other = settings | dict(base_precision="fp8", resume_from_checkpoint="latest", max_train_steps=3)
    done = forked(command(tiny_sdxl, images, tmp_path / "out", **other), log=tmp_path / "log2")
    assert done.code != 0 and "--base_precision" in done.output
