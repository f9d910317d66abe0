"""From slots to batches: each slot's row is made ready, alone or in worker processes, and comes grouped by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.data.batch import Batch, Sample, Slot, collate
from trainkit.data.cache import Latents, Store, cache_latents, unguarded
from trainkit.data.caption_changes import CaptionChanges
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import load_image
from trainkit.data.masks import Masks
from trainkit.data.sampler import WHOLE, Order, Shard
from trainkit.errors import UserError
from trainkit.options.captions import CaptionOptions
from trainkit.rng import generator

if TYPE_CHECKING:
    from trainkit.data.batch import Row
    from trainkit.options import ImageOptions

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Encoder(Protocol):
    """What this package asks of a model family."""

    vae_batch_size: int  # images that `encode_pixels` encodes at once

    @property
    def vae_factor(self) -> int:
        """Pixels a side of a place of the latent."""

    @property
    def latents_identity(self) -> str: ...

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


class Images(Dataset["Sample | UserError"]):
    """Slot -> Sample: a row as this visit sees it, with its pixels or its cached posterior.

    An image that can no longer be read is a UserError instead, see `trainkit.data.cache.unguarded`.
    """

    def __init__(self, rows: Sequence[Row], policy: CropPolicy, *, seed: int, latents: Latents | None = None,
                 captions: Callable[[Row, int], str] | None = None, masks: Masks | None = None):
        self.rows, self.policy, self.seed, self.latents, self.masks = rows, policy, seed, latents, masks
        self.caption = captions or CaptionChanges(CaptionOptions(), seed)  # (row, epoch) -> what it is trained with

    @property
    def live(self) -> bool:
        """Whether the VAE has to encode at every visit."""
        return self.latents is None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, slot: Slot) -> Sample | UserError:
        row = self.rows[slot.row]
        sample = replace(self.policy.sample(row, seed=self.seed, epoch=slot.visit), slot=slot,
                         prompt=self.caption(row, slot.visit))
        try:
            sample = replace(sample, mask=self.masks(sample)) if self.masks else sample
            if self.latents is None:
                return replace(sample, pixels=self.policy.views(load_image(row), [sample])[0])
            mean, logvar = self.latents(sample)
            return replace(sample, mean=mean, logvar=logvar)
        except UserError as error:
            return error


def ready_images(
    rows: Sequence[Row], options: ImageOptions, family: Encoder, store: Store, *, seed: int, num_workers: int = 0,
    progress: Callable[[str, int, int], None] | None = None, captions: Callable[[Row, int], str] | None = None,
) -> Images:
    """The rows as --cache_latents and its companions want them: encoded now into `store`, or at each visit.

    family    offers encode_pixels (pixels [B,3,H,W] -> mean, logvar [B,C,h,w]) and latents_identity
    captions  (row, epoch) -> what this visit is trained with; by default one of the row's captions
    """
    policy = CropPolicy.from_options(options)
    caches = options.cache_latents and policy.cacheable and all(policy.of(row).cacheable for row in rows)
    masks = _ready_masks(rows, options, policy, family, store if caches else None, seed=seed)
    if not caches:
        if options.cache_latents:
            log.warning("--cached_crops 0: fresh random crops cannot be cached, so the VAE runs at every visit")
        return Images(rows, policy, seed=seed, captions=captions, masks=masks)
    latents = cache_latents(rows, policy, family.encode_pixels, store, seed=seed, identity=family.latents_identity,
                            batch_size=family.vae_batch_size, dtype=DTYPES[options.latent_dtype],
                            num_workers=num_workers, progress=progress and partial(progress, "caching latents"))
    return Images(rows, policy, seed=seed, latents=latents, captions=captions, masks=masks)


def _ready_masks(rows: Sequence[Row], options: ImageOptions, policy: CropPolicy, family: Encoder, store: Store | None,
                 *, seed: int) -> Masks | None:
    """The masks of the rows, kept in the store where there is one; None where the loss has none."""
    if not (options.masked or any(row.mask for row in rows)):  # a source may have masks of its own
        return None
    masks = Masks(policy, factor=family.vae_factor, least=options.unmasked_weight,
                  normalized=options.normalize_masked_area_loss, store=store)
    if store is not None:
        masks.fill(rows, seed=seed)
    return masks


def micro_batches(
    images: Images, order: Order, shard: Shard = WHOLE, *, start_step: int = 0, stop_step: int | None = None,
    num_workers: int = 0,
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, this rank's micro-batches of that step) from `start_step` up to, without, `stop_step`; None never ends.

    The batches do not depend on num_workers, and what a step holds does not depend on where the run started. Raises
    UserError when an image can no longer be read.
    """
    steps = partial(range, start_step, stop_step) if stop_step is not None else partial(count, start_step)
    slots = (micro for step in steps() for micro in order.slots(step, shard))
    loader: DataLoader[Any] = DataLoader(images, batch_sampler=slots, num_workers=num_workers, collate_fn=collate,
                        generator=generator("loader"))  # its own: the global one must not move with the loader
    batches: Iterator[Batch] = unguarded(loader)
    for step in steps():
        yield step, list(islice(batches, order.micro_batches(step, shard)))
