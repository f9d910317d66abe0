"""The style distance: a KID one can check by hand, features of the image alone; and the power spectrum."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit.evaluation import features, kid, power_spectrum, style_distance, to_pixels


def kid_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The estimator as the paper writes it, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    def within(rows: np.ndarray) -> float:
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * float(np.mean([[kernel(a, b) for b in y] for a in x]))


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP of the shipped layout; the claims below hold for any weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63, "projection_dim": 16}
    vision = tower | {"image_size": 64, "patch_size": 16, "projection_dim": 16}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)


def noise_images(count: int, seed: int, low: int = 0) -> list[Image.Image]:
    drawn = np.random.default_rng(seed).integers(low, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def test_kid_equals_the_paper_s_formula_pair_by_pair():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(0.3, 1, size=(9, 5))
    assert kid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(kid_by_loops(x, y), rel=1e-12)


def test_kid_of_two_constant_sets_has_its_closed_value():
    x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0]])
    assert kid(x, y) == pytest.approx((1 + 1) ** 3 + 1 - 2 * 1)  # k(1,1) = 8, k(0,0) = 1, k(1,0) = 1


def test_kid_is_centred_on_zero_for_two_halves_of_one_distribution():
    halves = [torch.randn(200, 16, generator=torch.Generator().manual_seed(seed)).split(100) for seed in range(20)]
    values = torch.tensor([kid(x, y) for x, y in halves])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    shifted = [kid(x, y + 0.5) for x, y in halves]
    assert min(shifted) > values.max()


def test_kid_does_not_depend_on_order_or_on_which_set_comes_first():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(11, 4, generator=generator), torch.randn(13, 4, generator=generator)
    shuffled = kid(x[torch.randperm(11, generator=generator)], y.flip(0))
    assert shuffled == pytest.approx(kid(x, y), rel=1e-12) == pytest.approx(kid(y, x), rel=1e-12)


def test_kid_refuses_sets_it_cannot_compare():
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        kid(torch.zeros(1, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="needs"):
        kid(torch.zeros(3, 4), torch.zeros(3, 5))


def test_features_of_a_image_do_not_depend_on_its_batch(clip_dir: str):
    from trainkit.evaluation import load_clip

    model, mean, std = load_clip(clip_dir)
    images = noise_images(5, seed=0)
    layer = "vision_model.encoder.layers.0"
    together = features(images, model, layer, mean=mean, std=std)
    singly = features(images, model, layer, mean=mean, std=std, batch=1)
    assert together.shape == (5, 64)  # mean and deviation of 32 channels
    torch.testing.assert_close(together, singly)
    with pytest.raises(AttributeError):
        features(images, model, "vision_model.encoder.layers.9")


def test_transparent_pixels_count_as_white():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert torch.equal(to_pixels([clear], 64), torch.ones(1, 3, 64, 64))


def test_style_distance_tells_another_style_from_the_same_one(clip_dir: str):
    layer = "vision_model.encoder.layers.0"
    same = style_distance(noise_images(40, 1), noise_images(40, 2), clip_dir, layer)
    other = style_distance(noise_images(40, 1), noise_images(40, 2, low=128), clip_dir, layer)
    assert other > 20 * abs(same)


# -- power spectrum ----------------------------------------------------------------------------------------------------

SIDE = 64


def wave(x_cycles: int, y_cycles: int, amplitude: float) -> Image.Image:
    places = np.arange(SIDE) / SIDE
    phase = 2 * np.pi * (x_cycles * places[None, :] + y_cycles * places[:, None])
    return Image.fromarray(np.round(127.5 + 255 * amplitude * np.cos(phase)).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(("x_cycles", "y_cycles", "ring"), [(1, 0, 1), (0, 7, 7), (3, 4, 5), (-20, 21, 29)])
def test_a_wave_is_in_the_ring_of_its_cycles(x_cycles: int, y_cycles: int, ring: int):
    """Amplitude a has the variance a²/2; 8-bit levels leave about 1e-6 elsewhere."""
    power = power_spectrum([wave(x_cycles, y_cycles, 0.4)], SIDE)
    assert power.shape == (SIDE // 2,)
    assert power[ring - 1] == pytest.approx(0.08, rel=1e-3)
    assert power.sum() - power[ring - 1] < 1e-5


def test_a_set_has_the_mean_of_its_images_power():
    images = [wave(5, 0, 0.4), wave(5, 0, 0.2), wave(30, 0, 0.1)]
    power = power_spectrum(images, SIDE)
    assert power[4] == pytest.approx((0.08 + 0.02) / 3, rel=1e-2)
    assert power[29] == pytest.approx(0.005 / 3, rel=5e-2)  # 8-bit levels


def test_neither_brightness_nor_the_corners_are_in_the_power_spectrum():
    """White noise keeps its variance by the share of the frequencies within Nyquist's circle, about π/4."""
    assert power_spectrum([Image.new("RGB", (SIDE, SIDE), "#c08040")], SIDE).abs().max() < 1e-12
    grey = [image.convert("L").convert("RGB") for image in noise_images(20, seed=3)]
    variance = np.mean([np.asarray(image.convert("L"), dtype=float).var() for image in grey]) / 255**2
    assert float(power_spectrum(grey, SIDE).sum()) == pytest.approx(variance * np.pi / 4, rel=0.05)


def test_a_blurred_image_has_less_of_the_high_frequencies():
    from PIL import ImageFilter

    sharp = noise_images(5, seed=4)
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in sharp]
    ratio = power_spectrum(blurred, SIDE) / power_spectrum(sharp, SIDE)
    assert ratio[0] > 0.9 and ratio[16:].max() < 0.1


def test_the_power_spectrum_refuses_what_it_cannot_measure():
    for images, side in (([], SIDE), (noise_images(1, 0), 63)):
        with pytest.raises(ValueError, match="even side"):
            power_spectrum(images, side)
