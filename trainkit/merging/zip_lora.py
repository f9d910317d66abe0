"""ZipLoRA: a subject LoRA and a style LoRA as one, with a learned factor for each column of both changes.

    ΔW = ΔW_c diag(m_c) + ΔW_s diag(m_s)            m_c, m_s [in] of each layer, 1 at first

The factors minimise, over noised latents x_c and x_s of the subject's and the style's images with their prompts,

    |D_m(x_c) − D_c(x_c)|² + |D_m(x_s) − D_s(x_s)|² + λ Σ_layers |cos(m_c, m_s)|

where D_c, D_s and D_m are the network's outputs with the subject LoRA, the style LoRA and both with their factors.
Since B A diag(m) = B (A diag(m)), the result is exactly a LoRA of rank r_c + r_s.

Source: Shah et al. 2023, "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs", arXiv:2311.13600. From it
are the columns' factors, the two terms and the penalty on their similarity, and at most 100 updates that end when the
similarity is 0. The rate of Adam is ours. Without images, x_c and x_s are generated with the LoRAs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit import families, rng
from trainkit.adapters.updates import LowRank
from trainkit.condition import Condition
from trainkit.data.batch import Row, Sample
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import decode
from trainkit.devices import present
from trainkit.diffusion import ScheduleChange
from trainkit.diffusion.sampling import by_time, uniform
from trainkit.errors import Problem, UserError
from trainkit.families.file_names import TEXT_MODEL, ModulePlace
from trainkit.lora_file import LayerUpdate, LoraFile
from trainkit.merging.merge import WeightedLora, base_of, stacked
from trainkit.options import ModelOptions
from trainkit.preview import sampler

if TYPE_CHECKING:
    from trainkit.families import Family

ALIKE = 1e-3  # mean |cos| below which the factors count as dissimilar
JUDGED = 16  # noise levels at which the distances before and after are measured
GENERATED, GENERATED_STEPS = 4, 25  # images of each LoRA without images of its own, and their denoising steps
Factors = tuple[Tensor, Tensor]  # A [r,in], B [out,r] with strength and scale


@dataclass(frozen=True)
class ZipSettings:
    """How the factors are learned.

    penalty  λ
    prompts  of the subject and of the style, as their LoRAs were trained
    images   folders of their images; None: they are generated
    """

    prompts: tuple[str, str]
    images: tuple[Path | None, Path | None] = (None, None)
    steps: int = 100
    rate: float = 0.01
    penalty: float = 0.01
    seed: int = 0


@dataclass
class ZipReport:
    """Mean squared distance of the network's output from that with one LoRA alone, for subject and style.

    summed   with both LoRAs added up (all factors 1)
    learned  with the learned factors
    similarity  mean |cos| of the factors at the end
    """

    summed: list[float] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    similarity: float = 1.0
    steps: int = 0


@dataclass(frozen=True)
class Example:
    """What one of the two LoRAs must still do in the merged one: x0 [N,C,h,w], and what the network is given.

    alone, merged  the prompt [1,…] by the text encoders with this LoRA's changes, and with those of both
    """

    x0: Tensor
    alone: Condition
    merged: Condition


class Mixture:
    """Two LoRAs on a frozen network: each alone, or both with a factor for each column of the modules that both change.

    active  0 or 1: this one alone; None: both
    """

    def __init__(self, network: nn.Module, factors: Mapping[str, Sequence[Factors | None]]):
        self.active: int | None = None
        weight = next(network.parameters())
        self.factors = {path: tuple(None if pair is None else (pair[0].to(weight), pair[1].to(weight)) for pair in held)
                        for path, held in factors.items()}
        self.mergers = {path: [nn.Parameter(torch.ones(pair[0].shape[1], device=weight.device)) for pair in held
                               if pair is not None]
                        for path, held in self.factors.items() if all(pair is not None for pair in held)}
        for path in self.factors:
            network.get_submodule(path).register_forward_hook(self._hook(path))

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            for k, pair in enumerate(self.factors[path]):
                if pair is None or self.active not in (None, k):
                    continue
                A, B = pair
                if self.active is None and path in self.mergers:
                    A = A * self.mergers[path][k].to(A.dtype)
                out = out + applied(module, inputs[0], A, B)
            return out

        return add

    def parameters(self) -> list[nn.Parameter]:
        return [merger for pair in self.mergers.values() for merger in pair]

    def similarities(self) -> Tensor:
        """|cos(m_c, m_s)| of each layer -> [layers]"""
        return torch.stack([F.cosine_similarity(one, other, dim=0).abs() for one, other in self.mergers.values()])


def applied(module: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x, of a linear map or a convolution."""
    if isinstance(module, nn.Conv2d):
        kernel = A.view(len(A), -1, *module.kernel_size)
        inner = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
        return F.conv2d(inner, B[:, :, None, None])
    return F.linear(F.linear(x, A), B)


# ----------------------------------------------------------------------------------------------------------------------
# Learning


def zip_loras(parts: Sequence[WeightedLora], base: str, settings: ZipSettings, show: Callable[[float], None],
              prediction_type: str | None = None) -> tuple[LoraFile, ZipReport]:
    """A subject LoRA and a style LoRA as one -> it without embeddings, and how near it is to both.

    show  is told how many steps are done
    UserError: a LoRA does not fit the base model, or an image cannot be read.
    """
    device = present()
    options = ModelOptions(pretrained_model_name_or_path=base)
    family: Family = families.of(options).load(
        options, device=device, weight_dtype=torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16,
        schedule=ScheduleChange(prediction_type))
    family.prepare_for_training(keep_vae=True, gradient_checkpointing=device.type == "cuda")
    mixture = Mixture(family.denoiser, unet_factors(family.denoiser, parts))
    if not mixture.mergers:
        raise UserError(Problem("the two LoRAs change no module of the UNet together", "--method ziplora", "there is "
                                "nothing to weight", "--method concat", "data"))
    examples = [example(family, mixture, parts, k, settings) for k in (0, 1)]
    family.free_text_encoders()
    report = learn(family, mixture, examples, settings, show)
    return merged(parts, mixture), report


def learn(family: Family, mixture: Mixture, examples: Sequence[Example], settings: ZipSettings,
          show: Callable[[float], None]) -> ZipReport:
    report = ZipReport(summed=distances(family, mixture, examples, settings.seed))
    optimizer = torch.optim.Adam(mixture.parameters(), lr=settings.rate)
    while report.steps < settings.steps and report.similarity > ALIKE:
        for k, one in enumerate(examples):
            distance(family, mixture, one, k, ("zip", settings.seed, report.steps, k)).backward()
        (settings.penalty * mixture.similarities().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        report.steps, report.similarity = report.steps + 1, float(mixture.similarities().detach().mean())
        show(report.steps)
    report.learned = distances(family, mixture, examples, settings.seed)
    if not all(bool(merger.isfinite().all()) for merger in mixture.parameters()):
        raise UserError(Problem("the learned factors are NaN or infinity", "--method ziplora", "the base model or a "
                                "LoRA gives numbers that are not finite", "--zip_rate 0.001, or another base model",
                                "nonfinite"))
    return report


def distance(family: Family, mixture: Mixture, one: Example, k: int, key: rng.Key) -> Tensor:
    """Mean squared difference of the network's outputs with both LoRAs and with LoRA k alone, at one noise level."""
    x0 = one.x0[rng.integer(len(one.x0), "image", *key)].unsqueeze(0)
    level = by_time(rng.uniform([key], "timestep"), schedule=family.schedule, distribution=uniform, first=0,
                    end=family.schedule.num_train_timesteps).to(x0.device)
    prediction = family.schedule.prediction
    z = prediction.add_noise(x0, rng.normal(x0.shape[1:], [key], "noise").to(x0.device), level)
    given = prediction.model_input(z, level)
    mixture.active = k
    with torch.no_grad():
        wanted = family.denoise(given, level, one.alone).float()
    mixture.active = None
    return F.mse_loss(family.denoise(given, level, one.merged).float(), wanted)


@torch.no_grad()
def distances(family: Family, mixture: Mixture, examples: Sequence[Example], seed: int) -> list[float]:
    """The mean over noise levels that are the same at every call -> of subject and style."""
    return [sum(float(distance(family, mixture, one, k, ("judged", seed, n, k))) for n in range(JUDGED)) / JUDGED
            for k, one in enumerate(examples)]


def merged(parts: Sequence[WeightedLora], mixture: Mixture) -> LoraFile:
    """Modules of one file as they are; those of the text encoders, which have no factors, side by side."""
    layers = {}
    for place in dict.fromkeys(place for part in parts for place in part.lora.layers):
        held = [part for part in parts if place in part.lora.layers]
        products = [stacked([(part.lora.layers[place], part.strength)]) for part in held]
        if place[0] == "unet" and place[1] in mixture.mergers:
            mergers = [merger.detach().cpu().double() for merger in mixture.mergers[place[1]]]
            products = [LowRank(product.A * m, product.B) for product, m in zip(products, mergers, strict=True)]
        whole = LowRank(torch.cat([p.A for p in products]), torch.cat([p.B for p in products], dim=1))
        layers[place] = LayerUpdate(whole, held[0].lora.kernel(place))
    first = parts[0].lora
    return LoraFile(layers, metadata=base_of(parts), layout=first.layout, names=first.names)


def unet_factors(network: nn.Module, parts: Sequence[WeightedLora]) -> dict[str, list[Factors | None]]:
    """Path of a module -> of each LoRA the factors, None where it does not change the module."""
    found: dict[str, list[Factors | None]] = {}
    for k, part in enumerate(parts):
        for (net, path), layer in part.lora.layers.items():
            if net != "unet":
                continue
            product = stacked([(layer, part.strength)])
            fitting(network, path, (product.B.shape[0], product.A.shape[1]), part)
            found.setdefault(path, [None, None])[k] = product.A.float(), product.B.float()
    return found


def fitting(network: nn.Module, path: str, shape: tuple[int, int], part: WeightedLora) -> nn.Module:
    """The module at a path. UserError: there is none, or one of another size."""
    try:
        module = network.get_submodule(path)
        there = tuple(module.weight.flatten(1).shape)  # type: ignore[operator]
    except AttributeError:
        there = ()
    if there != shape:
        raise UserError(Problem("the LoRA does not fit the base model", part.name, f"{path} is {shape[0]} × {shape[1]} "
                                f"in the LoRA, and the model has {f'{there[0]} × {there[1]}' if there else 'none'}",
                                "name the base model that it was trained on with --base", "data"))
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def example(family: Family, mixture: Mixture, parts: Sequence[WeightedLora], k: int, settings: ZipSettings) -> Example:
    prompt, folder = settings.prompts[k], settings.images[k]
    alone, both = (encoded(family, some, prompt) for some in ([parts[k]], parts))
    height, width = family.native_size
    sample = None
    if folder is None:
        mixture.active = k
        empty = encoded(family, [parts[k]], "")
        x0 = generated(family, alone, empty, (height, width), ("zip images", settings.seed, k))
        mixture.active = None
    else:
        x0, sample = encoded_images(family, folder, (height, width))
    sizes = [*(sample.row.size if sample else (height, width)), *((sample.top, sample.left) if sample else (0, 0)),
             height, width]
    time_ids = torch.tensor([sizes], dtype=torch.float32, device=family.device)
    return Example(x0.to(family.device), Condition(alone, time_ids=time_ids), Condition(both, time_ids=time_ids))


@torch.no_grad()
def generated(family: Family, given: Condition, empty: Condition, size: tuple[int, int], key: rng.Key) -> Tensor:
    """Images of a prompt by the network as it is now -> x0 [N,C,h,w]"""
    pipe = family.pipeline(sampler(family))
    text = family.pipeline_text(pipe, ["prompt"], lambda prompts: empty if prompts == [""] else given)
    latents = []
    for n in range(GENERATED):
        shape = family.latent_channels, *(side // family.vae_factor for side in size)
        noise = rng.normal(shape, [(*key, n)], "noise")
        latents.append(pipe(
            **text, latents=noise.to(family.device, family.weight_dtype), height=size[0], width=size[1],
            num_inference_steps=GENERATED_STEPS, guidance_scale=family.guidance_scale,
            generator=rng.generator("zip step", *key, n), output_type="latent").images.float())
    return torch.cat(latents)


def encoded_images(family: Family, folder: Path, size: tuple[int, int]) -> tuple[Tensor, Sample]:
    """The images of a folder, cut to the model's size -> x0 [N,C,h,w], and how the first was cut."""
    policy = CropPolicy(resolution=f"{size[1]},{size[0]}", center_crop=True)
    latents, samples = [], []
    for path in image_files(folder):
        try:
            image = decode(path.read_bytes())
        except Exception as error:  # whatever a damaged image makes of Pillow
            raise UserError(Problem(f"{path.name} cannot be read", str(path), f"{error}".partition("\n")[0],
                                    "take it out of the folder, or save it again", "data")) from error
        row = Row(id=path.name, source=path, caption="", size=(image.height, image.width), digest="")
        sample, = policy.variants(row, 0)
        latents.append(family.sample_latents(Pixels(policy.views(image, [sample]), [("zip", path.name)])))
        samples.append(sample)
    return torch.cat(latents), samples[0]


@dataclass(frozen=True)
class Pixels:
    """One image for `Family.sample_latents`: pixels [1,3,H,W]."""

    pixels: Tensor
    keys: Sequence[rng.Key]
    mean: Tensor | None = None
    logvar: Tensor | None = None


def image_files(folder: Path) -> list[Path]:
    """UserError: there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not found:
        raise UserError(Problem("the folder has no images", str(folder), "no file in it ends in .png, .jpg or .webp",
                                "name the folder of the training images, or leave the flag out", "data"))
    return found


@torch.no_grad()
def encoded(family: Family, parts: Sequence[WeightedLora], prompt: str) -> Condition:
    """A prompt by the text encoders with the changes of these LoRAs."""
    with changed_text(family, parts):
        return family.encode_prompts([prompt])


@contextmanager
def changed_text(family: Family, parts: Sequence[WeightedLora]) -> Iterator[None]:
    before: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        for place, layer in part.lora.layers.items():
            if place[0] == "unet":
                continue
            product = stacked([(layer, part.strength)])
            weight = text_module(family, place, (len(product.B), product.A.shape[1]), part).weight
            assert isinstance(weight, Tensor), "a layer of a text encoder"
            before.append((weight, weight.detach().clone()))
            weight.add_(product.delta().to(weight))
    try:
        yield
    finally:
        for weight, held in reversed(before):
            weight.copy_(held)


def text_module(family: Family, place: ModulePlace, shape: tuple[int, int], part: WeightedLora) -> nn.Module:
    network, path = place
    names = family.layout.text_encoders
    if network not in names:
        raise UserError(Problem("the LoRA does not fit the base model", part.name, f"the model has no {network}",
                                "name the base model that it was trained on with --base", "data"))
    encoder = family.text_encoders[names.index(network)]
    inner = any(name == f"{TEXT_MODEL}{path}" for name, _ in encoder.named_modules())
    return fitting(encoder, f"{TEXT_MODEL}{path}" if inner else path, shape, part)
