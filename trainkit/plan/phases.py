"""What a run has on the card in each phase: the trainer's own code, traced on the meta device.

    text           the text encoders encode a group of prompts
    caching        the VAE encodes one image
    training       one optimizer step, from noise to gradients
    previews       the UNet with guidance, then the decoder in tiles, beside all that trains
    class images   the whole pipeline, before anything else is loaded
    publishing     what trains, and the averaged weights where there are any

What kernels need inside, cuDNN's workspaces for example, is not seen here: `need.py` adds for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from trainkit import lean_lora
from trainkit.adapters import Adapters, add_adapters
from trainkit.condition import Condition
from trainkit.conditioning.cached_text import PROMPTS_AT_ONCE
from trainkit.conditioning.live_text import EncoderAdapters, prepare_to_learn
from trainkit.conditioning.new_tokens import TokenRows
from trainkit.data.batch import Batch
from trainkit.data.geometry import CropPolicy
from trainkit.data.sources.parts import image_options
from trainkit.devices import WEIGHT_DTYPES
from trainkit.diffusion import ScheduleChange, make_noise
from trainkit.families import Family
from trainkit.frozen_weights import make_storage
from trainkit.lora_file import start
from trainkit.losses.passes import Passes, always, plain_objective
from trainkit.options import (
    CaptionOptions,
    Concern,
    FourierOptions,
    ImageOptions,
    LoraOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    PivotalOptions,
    PrecisionOptions,
    PriorOptions,
    RunOptions,
    TextOptions,
    ValidationOptions,
)
from trainkit.options.dataset_config import read_dataset_config
from trainkit.options.sizes import Size, size_of
from trainkit.plan import optimizer_state
from trainkit.plan.as_on_cuda import Attention, Autocast, as_on_cuda, cuda_attention
from trainkit.plan.drawing import GUIDED, denoised, draw, in_dtype, latent_shape
from trainkit.plan.live_bytes import (
    ADAPTERS,
    BLOCK,
    GRADIENTS,
    META,
    OPTIMIZER,
    WEIGHTS,
    LiveBytes,
    Peak,
    bytes_of,
    weights_of,
)
from trainkit.plan.models import ModelConfigs
from trainkit.plan.skeleton import family_on_meta
from trainkit.training.step import TrainStep

NOTHING: Mapping[str, Peak] = {}


class TracedOptions(Protocol):
    """What of a trainer's options decides its memory; `prior` and `pivotal` are read where a trainer has them."""

    @property
    def model(self) -> ModelOptions: ...

    @property
    def data(self) -> ImageOptions: ...

    @property
    def captions(self) -> CaptionOptions: ...

    @property
    def text(self) -> TextOptions: ...

    @property
    def lora(self) -> LoraOptions: ...

    @property
    def objective(self) -> ObjectiveOptions: ...

    @property
    def fourier_loss(self) -> FourierOptions: ...

    @property
    def optimizer(self) -> OptimizerOptions: ...

    @property
    def precision(self) -> PrecisionOptions: ...

    @property
    def validation(self) -> ValidationOptions: ...

    @property
    def run(self) -> RunOptions: ...

    @classmethod
    def concerns(cls) -> dict[str, type[Concern]]: ...

    def model_copy(self, *, update: Mapping[str, Any]) -> Self: ...


PlannedOptions = TypeVar("PlannedOptions", bound=TracedOptions)


@dataclass(frozen=True)
class Phase:
    """A part of a run, and the most that is on the card in it."""

    name: str
    peak: Peak


@dataclass(frozen=True)
class Trace:
    """Every phase of a run, and what it leaves outside of the card.

    adapters         numbers that are trained
    state_on_host    bytes of optimizer state that are kept in host memory
    loaded           bytes of all networks as they are loaded, before the first of them moves to the card
    latent, prompt   bytes of a cached latent and of a cached prompt
    checkpoint       bytes of adapters and optimizer state in a checkpoint
    flops            floating-point operations of an optimizer step
    """

    phases: tuple[Phase, ...]
    adapters: int
    state_on_host: int
    loaded: int
    latent: int
    prompt: int
    checkpoint: int
    flops: int

    def __getitem__(self, name: str) -> Peak:
        return next(phase.peak for phase in self.phases if phase.name == name)


class Skeleton:
    """A run's networks, adapters and optimizer as they are when training begins, without their numbers.

    block  bytes that the allocator hands out at once
    """

    def __init__(self, opt: TracedOptions, configs: ModelConfigs, *, block: int = BLOCK):
        self.opt, self.block = opt, block
        self.dtype = WEIGHT_DTYPES[opt.precision.mixed_precision or "no"]
        self.autocast = partial(Autocast, "meta", self.dtype, enabled=self.dtype != torch.float32)
        self.family = family_on_meta(configs, self.dtype, ScheduleChange.from_options(opt.objective),
                                     storage=make_storage(opt.model.base_precision, self.dtype, META),
                                     max_chunks=opt.captions.max_chunks)
        self.frozen_text, self.vae = self.family.text_encoders, self.family.vae
        self.family.vae_checked = True  # there are no numbers to look at
        self.loaded = bytes_of(weights_of([self.family.denoiser, self.vae, *self.frozen_text]))

    def live(self, known: dict[str, list[Tensor]]) -> LiveBytes:
        return LiveBytes("meta", known, block=self.block)

    # Before training

    def encode_text(self) -> Peak:
        with self.live({WEIGHTS: weights_of(self.frozen_text)}) as live, torch.no_grad():
            self.given = self.family.encode_prompts([""] * PROMPTS_AT_ONCE, self.opt.text.clip_skip)
        return live.peak

    def encode_image(self) -> Peak:
        known = weights_of([self.vae, *(self.family.text_encoders if learns_text(self.opt) else ())])
        with self.live({WEIGHTS: known}) as live:
            self.family.encode_pixels(torch.empty(1, 3, *self.size, device=META))
        return live.peak

    @property
    def size(self) -> Size:
        """The largest that images are trained at; a bucket has about as many pixels as its square."""
        return largest(self.opt.data)

    # What trains

    def add_trainables(self) -> None:
        """As the trainer's `make_trainables` and `make_text` do."""
        opt, family = self.opt, self.family
        self.lora = add_adapters(family.denoiser, planned(opt.lora, family),
                                 targets=family.lora_targets, seed=0, blocks=family.numbered_blocks)
        self.started = start_elsewhere(self.lora) if opt.lora.init_lora_weights != "gaussian" else []
        if opt.precision.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        self.trained: list[Tensor] = [*self.lora.parameters()]
        if learns_text(opt):
            prepare_to_learn(family, gradient_checkpointing=opt.precision.gradient_checkpointing)
            self.trained += learned_text(opt, family)
        self.state = optimizer_state.measure(opt.optimizer, self.trained)
        frozen = [family.denoiser, *(family.text_encoders if learns_text(opt) else ()),
                  *(() if caches(opt) else (self.vae,))]
        trained = {id(parameter) for parameter in self.trained}
        self.resident = {
            WEIGHTS: [tensor for tensor in weights_of(frozen) if id(tensor) not in trained],
            ADAPTERS: [*self.trained, *self.started],
            OPTIMIZER: [torch.empty(self.state.on_card, dtype=torch.uint8, device=META)]}

    def step(self) -> Peak:
        """One micro-batch, with the gradients of those before it where several make a step."""
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter) if self.opt.run.gradient_accumulation_steps > 1 else None
        gradients = [p.grad for p in self.trained if p.grad is not None]
        train_step = self.train_step()
        with self.live({**self.resident, GRADIENTS: gradients}) as live:
            live.watch_gradients([] if gradients else self.trained)
            for loss in train_step([self.batch()]):
                loss.backward()
                del loss
        return live.peak

    def train_step(self) -> TrainStep:
        opt, family = self.opt, self.family
        plain, memories = plain_objective(opt.objective, opt.fourier_loss, family.schedule, total_steps=1,
                                          note=lambda **facts: None, compat=opt.run.compat)
        return TrainStep(family, self.text, make_noise(opt.objective), Passes(always(plain), memories), self.autocast)

    def text(self, prompts: Sequence[str], step: int | None = None) -> Condition:
        """Looked up, or from the encoders that train: each prompt of a batch is another one here."""
        if learns_text(self.opt):
            return self.family.encode_prompts(prompts, self.opt.text.clip_skip)
        rows = [place % PROMPTS_AT_ONCE for place in range(len(prompts))]
        return self.given.take(torch.tensor(rows, device=META))

    def batch(self) -> Batch:
        rows = self.opt.run.train_batch_size * (2 if has_class_images(self.opt) else 1)
        places = range(rows)
        latent = torch.empty(rows, *self.latent_shape(self.size))
        pixels = {"pixels": torch.empty(rows, 3, *self.size)}
        content: dict[str, Any] = {"mean": latent, "logvar": latent} if caches(self.opt) else pixels
        if self.opt.data.masked:
            content["mask"] = torch.empty(rows, 1, *self.latent_shape(self.size)[1:])
        return Batch(
            step=0, keys=tuple((0, 0, place) for place in places), rows=tuple(places), prompts=("",) * rows,
            time_ids=torch.zeros(rows, 6), loss_weight=torch.ones(rows), is_class=torch.zeros(rows, dtype=torch.bool),
            num_instance=rows, images=("",) * rows, **content)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C,h,w) of the latents of an image of that size"""
        return latent_shape(self.family, size)

    # Beside and after training

    def preview(self) -> Peak:
        """One image: the UNet under guidance, then the decoder in tiles; nothing has a gradient."""
        averaged = [torch.empty_like(p) for p in self.trained] if self.state.averages else []
        known = {**self.resident, ADAPTERS: [*self.resident[ADAPTERS], *averaged]}
        if caches(self.opt):
            known[WEIGHTS] = known[WEIGHTS] + weights_of([self.vae])
        with self.live(known) as live, torch.no_grad():
            with self.autocast():
                latents = denoised(self.family, self.given, GUIDED, size_of(self.opt.data.resolution))
            self.family.decode_pixels(latents[:1])
        return live.peak

    def published(self) -> Peak:
        live = self.live(self.resident)
        return live.peak


def trace(opt: TracedOptions, configs: ModelConfigs, *, known: Mapping[str, Peak] = NOTHING,
          attention: Attention = cuda_attention, block: int = BLOCK) -> Trace:
    """Every phase of the run that the options ask for. Needs no weight and no GPU; 2 to 4 CPU seconds for SDXL.

    known             peaks of phases that are not traced again
    attention, block  of another device than a card
    """
    found: list[Phase] = []

    def add(name: str, work: Callable[[], Peak]) -> None:
        found.append(Phase(name, known[name] if name in known else work()))

    with as_on_cuda(attention):
        if makes_class_images(opt):
            add("class images", partial(generate_class_images, opt, configs, block=block))
        skeleton = Skeleton(opt, configs, block=block)
        found.append(Phase("text", skeleton.encode_text()))
        if caches(opt):
            add("caching", skeleton.encode_image)
        skeleton.add_trainables()
        add("training", skeleton.step)
        if opt.validation.validation_prompt and opt.validation.num_validation_images:
            add("previews", skeleton.preview)
        add("publishing", skeleton.published)
        return account(skeleton, tuple(found))


def account(skeleton: Skeleton, phases: tuple[Phase, ...]) -> Trace:
    """The phases, and what is outside of the card."""
    state, places = skeleton.state, math.prod(skeleton.latent_shape(skeleton.size))
    given = sum(tensor[:1].nbytes for tensor in skeleton.given.values())
    trained = sum(parameter.numel() for parameter in skeleton.trained)
    flops = next(phase.peak.flops for phase in phases if phase.name == "training")
    return Trace(
        phases, adapters=trained, state_on_host=state.on_host, loaded=skeleton.loaded,
        latent=2 * 4 * places, prompt=given, checkpoint=4 * trained + state.on_card + state.on_host,
        flops=flops * skeleton.opt.run.gradient_accumulation_steps)


def generate_class_images(opt: TracedOptions, configs: ModelConfigs, *, block: int) -> Peak:
    """The stock pipeline with all its parts: UNet and text encoders in half precision, the VAE in fp32."""
    prior: Any = getattr(opt, "prior", None)
    precision = {"fp32": "no", None: "fp16"}.get(prior.prior_generation_precision, prior.prior_generation_precision)
    skeleton = Skeleton(with_flags(opt, {"mixed_precision": precision}), configs, block=block)
    family = in_dtype(skeleton.family, skeleton.dtype, vae=torch.float32)
    return draw(family, prior.sample_batch_size, size_of(opt.data.resolution), tiles=True, block=block)


# ----------------------------------------------------------------------------------------------------------------------
# What the options ask for


def largest(data: ImageOptions) -> Size:
    """(h, w) in pixels of the largest images that are trained on, of whichever source."""
    return max((size for source in image_options(data) for size in source.sizes), key=math.prod)


def caches(opt: TracedOptions) -> bool:
    """Whether latents are cached, as `trainkit.data.loader.ready_images` decides it."""
    return opt.data.cache_latents and CropPolicy.from_options(opt.data).cacheable


def has_class_images(opt: TracedOptions) -> bool:
    """Whether each image brings one of the class along."""
    config = opt.data.dataset_config
    return makes_class_images(opt) or bool(config) and any(
        source.is_class for source in read_dataset_config(Path(f"{config}")).sources)


def makes_class_images(opt: TracedOptions) -> bool:
    """Whether there are class images that may have to be generated first."""
    prior: PriorOptions | None = getattr(opt, "prior", None)
    return prior is not None and prior.with_prior_preservation


def new_tokens(opt: TracedOptions) -> int:
    """How many new tokens are learned."""
    pivotal: PivotalOptions | None = getattr(opt, "pivotal", None)
    if pivotal is None or not pivotal.train_text_encoder_ti:
        return 0
    return len(pivotal.abstractions) * pivotal.num_new_tokens_per_abstraction


def learns_text(opt: TracedOptions) -> bool:
    return opt.text.train_text_encoder or new_tokens(opt) > 0


def planned(options: LoraOptions, family: Family) -> LoraOptions:
    """The adapters' sizes without what fills them: --network_weights, PiSSA and OLoRA read weights."""
    unfilled = {"init_lora_weights": "gaussian", "network_weights": None, "dim_from_weights": False}
    return start.sized(options, start.read(options, family.names)).model_copy(update=unfilled)


def learned_text(opt: TracedOptions, family: Family) -> list[Tensor]:
    """What trains in the text encoders, put into them as `trainkit.conditioning.live_text.make_text` does."""
    if not new_tokens(opt):
        learner = EncoderAdapters(family, planned(opt.lora, family), seed=0)
        return [parameter for network in learner.networks for parameter in network.parameters()]
    found: list[Tensor] = []
    encoders: tuple[Any, ...] = family.text_encoders
    for encoder in encoders:
        table = encoder.get_input_embeddings()
        rows = torch.empty(new_tokens(opt), table.weight.shape[1], device=META)
        part = TokenRows(table, rows, first=len(table.weight))
        encoder.set_input_embeddings(part)
        found.append(part.rows)
    return found


def start_elsewhere(lora: Adapters) -> list[Tensor]:
    """Let the adapters begin as PiSSA's and OLoRA's do -> where they began, which is kept."""
    layers: Any = lora.layers.values()
    for layer in layers:
        lean_lora.start_here(layer)
    return [tensor for layer in layers for tensor in layer.start().values()]


def with_flags(opt: PlannedOptions, values: Mapping[str, object]) -> PlannedOptions:
    """The options with other values of these flags; those that the trainer has not got are left out."""
    changed = {}
    for name, concern_class in type(opt).concerns().items():
        own_values = {flag: value for flag, value in values.items() if flag in concern_class.model_fields}
        if own_values:
            changed[name] = getattr(opt, name).model_copy(update=own_values)
    return opt.model_copy(update=changed)
