"""What is said and done about a card, tried without one; what runs on it is in test_fake_card.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from trainkit import devices
from trainkit.errors import UserError
from trainkit.families import Family, base, sdxl
from trainkit.options import ModelOptions
from trainkit.process import own_settings

CARD = torch.device("cuda")


@pytest.fixture
def family(tiny_sdxl) -> Family:
    return sdxl.load(ModelOptions(pretrained_model_name_or_path=str(tiny_sdxl)), device=torch.device("cpu"),
                     weight_dtype=torch.float32)


@pytest.mark.parametrize("capability, precision, said", [
    ((8, 6), "no", "--mixed_precision bf16"), ((7, 5), "no", "--mixed_precision fp16"),
    ((7, 5), "bf16", "--mixed_precision fp16"), ((8, 6), "bf16", ""), ((7, 5), "fp16", ""),
])
def test_a_precision_that_costs_much_on_a_card_is_told(monkeypatch, capability, precision, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    notices = list(devices.precision_notices(CARD, precision))
    assert len(notices) == bool(said) and all(said in notice for notice in notices)
    assert not list(devices.precision_notices(torch.device("cpu"), precision)), "a CPU asks for no other precision"


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_tools_take_the_gpu_that_is_there(name, monkeypatch):
    for other in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(torch.get_device_module(other), "is_available", lambda there=other == name: there)
    assert devices.present() == torch.device(name)
    monkeypatch.setattr(torch.get_device_module(name), "is_available", lambda: False)
    assert devices.present() == torch.device("cpu")


def test_fp64_is_as_exact_as_the_tensor_was():
    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    assert devices.in_fp64(weights).dtype == torch.float64 and torch.equal(devices.in_fp64(weights).float(), weights)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_the_flag_says_also_in_convolutions(allowed):
    with own_settings():
        devices.allow_tf32(allowed)
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
        assert devices.uses_tf32(CARD) is allowed and not devices.uses_tf32(torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32, "as PyTorch has it for the next user of this process"


def test_deterministic_operations_end_with_the_run():
    with own_settings():
        devices.only_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_latents_in_tf32_are_other_entries_of_the_cache(family):
    assert family.latents_identity == family.identity["vae"]
    family.device = CARD
    with own_settings():
        devices.allow_tf32(False)
        plain = family.latents_identity
        devices.allow_tf32(True)
        assert family.latents_identity != plain == family.identity["vae"]


def test_the_vae_encodes_one_image_at_a_time_or_as_many_as_asked_for(family, monkeypatch):
    """With one at a time, a latent is that of the image alone, to the last bit; other numbers are other entries."""
    encode, asked = family.vae.encode, []
    monkeypatch.setattr(family.vae, "encode", lambda x: (asked.append(len(x)), encode(x))[1])
    pixels = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    together, alone = family.encode_pixels(pixels), [family.encode_pixels(image[None]) for image in pixels]
    assert asked == [1] * 10 and together[0].shape == (5, family.latent_channels, 8, 12)
    for i, one in enumerate(alone):
        assert all(torch.equal(part[i], of_one[0]) for part, of_one in zip(together, one, strict=True))
    asked.clear()
    monkeypatch.setattr(family, "vae_batch_size", 2)
    for part, other in zip(family.encode_pixels(pixels), together, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)
    assert asked == [2, 2, 1] and family.latents_identity != family.identity["vae"]


def test_large_images_to_look_at_are_decoded_in_tiles(family, monkeypatch):
    """Tiles of a small side show that nothing but the seams changes, and that encoding is never tiled."""
    largest = []
    decoder = family.vae.decoder.forward
    monkeypatch.setattr(family.vae.decoder, "forward", lambda z: (largest.append(max(z.shape[-2:])), decoder(z))[1])
    monkeypatch.setattr(base, "TILE", 32)
    side = 64 // family.vae_factor
    image, = family.decode(torch.zeros(1, family.latent_channels, side, side))
    assert image.size == (64, 64) and len(largest) > 1 and max(largest) <= 32 // family.vae_factor
    assert not family.vae.use_tiling, "what is encoded for training has no seams"


def test_a_vae_of_nan_is_found_at_the_first_batch_and_named(family):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(keys=[(0, 0, 0)], pixels=pixels, mean=None, logvar=None)
    weight = family.vae.encoder.conv_out.bias.data
    before = weight.clone()
    weight[0] = float("inf")
    with pytest.raises(UserError, match="VAE turns images into NaN") as caught:
        family.sample_latents(batch)
    problem, = caught.value.problems
    assert problem.kind == "nonfinite" and "madebyollin/sdxl-vae-fp16-fix" in problem.fix
    weight.copy_(before)
    assert family.sample_latents(batch).isfinite().all()
    weight[0] = float("inf")
    family.sample_latents(batch)  # no later batch waits for the device


def test_a_vae_that_cannot_decode_is_named_and_a_network_that_diverged_is_not(family):
    latents = torch.zeros(1, family.latent_channels, 8, 8)
    assert family.decode(latents.fill_(float("nan"))), "the weights that make the latents are another matter"
    family.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE turns latents into NaN"):
        family.decode(latents.zero_())


def test_the_vae_takes_one_image_at_a_time(family, monkeypatch):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([family.encode_pixels(one[None])[0] for one in pixels])
    assert torch.equal(family.encode_pixels(pixels)[0], alone), "what an image is trained as depends on its neighbours"


def test_tensors_go_up_together_and_come_as_they_were():
    """On a CPU nothing is copied; the packed way is that of CUDA, tried on the fake card."""
    tensors = [torch.arange(3), torch.tensor([True]), torch.randn(2, 2), torch.tensor(1.0)]
    assert all(a is b for a, b in zip(devices.upload(tensors, torch.device("cpu")), tensors, strict=True))
