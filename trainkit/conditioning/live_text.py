"""Prompts into conditioning while the text encoders learn: new tokens (pivotal tuning) or LoRA, up to a step.

A text is asked as `text(prompts, step)`; which of the three it is (frozen, new tokens, LoRA) the caller never asks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from trainkit import adapters
from trainkit.condition import Condition
from trainkit.conditioning.cached_text import FrozenText, OnProgress
from trainkit.conditioning.new_tokens import NewTokens, unseen
from trainkit.data.cache import Store
from trainkit.devices import upload
from trainkit.errors import refuse
from trainkit.lora_file import start

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.families import Family
    from trainkit.families.sdxl import SDXL
    from trainkit.files import Json
    from trainkit.optim import ParamGroup
    from trainkit.options import LoraOptions, OptimizerOptions, PivotalOptions, TextOptions

log = logging.getLogger(__name__)


class Learner(Protocol):
    """What trains in the text encoders: `NewTokens`, or `EncoderAdapters`."""

    @property
    def networks(self) -> Sequence[Adapters]: ...

    @property
    def embeddings(self) -> Mapping[str, Tensor]: ...

    def rewrite(self, prompt: str) -> str: ...

    def learns_from(self, text: str) -> bool: ...

    def groups(self, *, lrs: tuple[float, float], weight_decay: float, stop: int | None) -> list[ParamGroup]: ...

    def after_update(self) -> None: ...

    def export(self, folder: Path, name: str) -> list[Path]: ...

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


class EncoderAdapters:
    """LoRA on every text encoder of the family."""

    embeddings: Mapping[str, Tensor] = {}

    def __init__(self, family: Family, options: LoraOptions, *, seed: int):
        file = start.read(options, family.names)
        self.networks = [
            adapters.add_adapters(encoder, start.sized(options, file), prefix=prefix, targets=family.text_lora_targets,
                                  seed=seed)
            for prefix, encoder in zip(family.layout.text_encoders, family.text_encoders, strict=True)]
        for network in self.networks:
            start.begin(network, file, options)

    def rewrite(self, prompt: str) -> str:
        return prompt

    def learns_from(self, text: str) -> bool:
        return True

    def groups(self, *, lrs: tuple[float, float], weight_decay: float, stop: int | None) -> list[ParamGroup]:
        """Each encoder's own, at its rate; a family with one encoder has the first."""
        return [group for network, lr in zip(self.networks, lrs, strict=False)
                for group in network.groups(lr=lr, weight_decay=weight_decay, stop=stop)]

    def after_update(self) -> None:
        """Nothing follows an update."""

    def export(self, folder: Path, name: str) -> list[Path]:
        return []  # the LoRA files hold every network

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        packed = {network.prefix: network.pack() for network in self.networks}
        tensors = {f"{prefix}.{key}": t for prefix, (part, _) in packed.items() for key, t in part.items()}
        return tensors, {prefix: data for prefix, (_, data) in packed.items()}

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        for network in self.networks:
            start = f"{network.prefix}."
            part = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
            network.unpack(part, data.get(network.prefix, {}))


class LiveText:
    """Text encoders in training, in the weight dtype, until step `stop`; from there on each prompt is looked up.

    prompts    every prompt to train on, as the user wrote it; None: they come with the steps, and all are learned from
    also       every other that will ever be asked, see FrozenText
    store      keeps what frozen encoders say; what trained ones say is this run's own and stays in memory
    stop       finished steps after which nothing in the encoders changes: the pivot

    A prompt the learner does not learn from is encoded once, at the start. From step `stop` on, a function of the step
    alone, all others are too: no graph is built any more, the encoders leave the device, and a run that resumes on
    either side of the pivot sees the bits of an uninterrupted one (see FrozenText).
    """

    def __init__(self, family: Family, learner: Learner, prompts: Iterable[str] | None, store: Store | None,
                 options: TextOptions, *, stop: int, also: Iterable[str] = (), progress: OnProgress | None = None):
        self.family, self.learner, self.options, self.stop = family, learner, options, stop
        self.endless = prompts is None
        texts, others = ([learner.rewrite(prompt) for prompt in part] for part in (prompts or (), also))
        self.texts = {*texts, *others}
        (learned, plain), (other_learned, other_plain) = self._parted(texts), self._parted(others)
        self.learned = learned, other_learned
        self._train_mode(False)
        self.table = FrozenText(family, plain, store, options.clip_skip, also=other_plain, state=self._precision,
                                progress=progress)
        self.frozen_tokens: FrozenText | None = None

    @property
    def networks(self) -> Sequence[Adapters]:
        return self.learner.networks

    @property
    def embeddings(self) -> Mapping[str, Tensor]:
        return self.learner.embeddings

    def rewrite(self, prompt: str) -> str:
        """The prompt as the encoders and other programs are given it: new tokens for the words that stand for them."""
        return self.learner.rewrite(prompt)

    def __call__(self, prompts: Sequence[str], step: int | None = None) -> Condition:
        """What the network is given for each prompt, on the device.

        step  optimizer step (from 0) that asks, after `Optim.begin`; None asks for the weights as they are, without
              gradient, to look at
        """
        texts = [self.rewrite(prompt) for prompt in prompts]
        assert self.endless or self.texts.issuperset(texts), f"not announced before training: {set(texts) - self.texts}"
        if step is not None and step >= self.stop and self.frozen_tokens is None:
            self._freeze_tokens()
        with torch.set_grad_enabled(step is not None):
            return self._rows(texts, training=step is not None)

    def _parted(self, texts: Iterable[str]) -> tuple[list[str], list[str]]:
        """Each distinct text once: those the learner learns from, and the rest."""
        distinct = dict.fromkeys(texts)
        learned = [text for text in distinct if self.learner.learns_from(text)]
        return learned, [text for text in distinct if not self.learner.learns_from(text)]

    def _rows(self, texts: Sequence[str], *, training: bool) -> Condition:
        """Each distinct text once: what is learned from by the encoders or as they froze, the rest by the table."""
        learned, plain = self._parted(texts)
        parts = [self._learned(learned, training=training)] if learned else []
        parts += [self.table(plain)] if plain else []
        place = {text: row for row, text in enumerate([*learned, *plain])}
        rows, = upload([torch.tensor([place[text] for text in texts])], self.family.device)
        return Condition.cat(parts).take(rows)

    def _learned(self, texts: Sequence[str], *, training: bool) -> Condition:
        if self.frozen_tokens is not None:
            return self.frozen_tokens(texts)
        self._train_mode(training)
        return self.family.encode_prompts(texts, self.options.clip_skip)

    def _freeze_tokens(self) -> None:
        """The pivot: encode what is left, all of it in one fixed order, and let the encoders go."""
        self._train_mode(False)
        texts, others = self.learned
        self.frozen_tokens = FrozenText(self.family, texts, None, self.options.clip_skip, also=others)
        for network in self.networks:
            network.network.to("cpu")  # adapters outlive the training: checkpoints and files are written from them
        self.family.free_text_encoders()

    @property
    def _precision(self) -> str:
        """"" where encoders run as frozen ones do, so that the entries of a shared store are the same."""
        return "" if self.family.weight_dtype == torch.float32 else str(self.family.weight_dtype)

    def _train_mode(self, on: bool) -> None:
        """Adapters' dropout and gradient checkpointing work in train mode only; CLIP itself is the same in both."""
        for encoder in self.family.text_encoders:
            if encoder.training != on:
                encoder.train(on)

    def groups(self, optimizer: OptimizerOptions, global_batch: int) -> list[ParamGroup]:
        """Parameter groups: "tokens", or one for each encoder's LoRA. global_batch: images in an optimizer step."""
        return self.learner.groups(
            lrs=self.options.lrs(optimizer, global_batch=global_batch),
            weight_decay=self.options.decay(optimizer.adam_weight_decay),
            stop=self.stop)

    def after_update(self, done: int) -> None:
        """Call after the optimizer's update, with the number of finished steps, this one included."""
        if done <= self.stop:
            self.learner.after_update()

    def export(self, folder: Path, name: str) -> list[Path]:
        """Write the files besides LoRA that other programs load, each read back -> their paths."""
        return self.learner.export(folder, name)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        return self.learner.pack()

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None:
        assert self.frozen_tokens is None, "restore before the first step"
        self.learner.unpack(tensors, data)


Text = FrozenText | LiveText


def reads_anew(text: TextOptions) -> bool:
    """Whether every prompt of the run is read by encoders in training, so that it need not be known before.

    New tokens end before: prompts without one are looked up from the start, and all others from the pivot on.
    """
    return text.train_text_encoder and text.train_text_encoder_frac == 1


def make_text(family: Family, prompts: Iterable[str] | None, store: Store | None, *, text: TextOptions,
              pivotal: PivotalOptions | None = None, lora: LoraOptions, total: int, seed: int, also: Iterable[str] = (),
              gradient_checkpointing: bool = False, progress: OnProgress | None = None) -> Text:
    """The text of a run of `total` optimizer steps: frozen, with new tokens, or with LoRA on the encoders.

    prompts  every prompt to train on: the captions; None, as only `reads_anew` allows: they come with the steps
    also     every other the run will need encoded: those of previews
    pivotal  None in a trainer without new tokens
    progress  is told how many prompts are encoded, see FrozenText
    Frozen encoders are freed here, those in training stay on the device.
    Raises UserError where the base model has the new tokens already, or every caption is cut before one of them.
    """
    learns_tokens = pivotal is not None and pivotal.train_text_encoder_ti
    if not (text.train_text_encoder or learns_tokens):
        assert prompts is not None, "frozen encoders are asked before the run"
        frozen = FrozenText(family, prompts, store, text.clip_skip, also=also, progress=progress)
        family.free_text_encoders()
        return frozen
    prepare_to_learn(family, gradient_checkpointing=gradient_checkpointing)
    if text.text_encoder_2_lr is not None and len(family.text_encoders) == 1:
        log.warning("--text_encoder_2_lr has no effect: %s has one text encoder", family.name)
    if pivotal is None or not learns_tokens:
        learner = EncoderAdapters(family, lora, seed=seed)
        return LiveText(family, learner, prompts, store, text, stop=text.stop(total), also=also,
                        progress=progress)
    assert prompts is not None, "new tokens are frozen in the run"
    prompts, tokens = list(prompts), NewTokens(cast("SDXL", family), pivotal, seed=seed, lora=lora)
    refuse(unseen(tokens.names, family.tokenizers[0], [tokens.rewrite(prompt) for prompt in prompts],
                  family.max_chunks))
    return LiveText(family, tokens, prompts, store, text, stop=pivotal.stop(total), also=also,
                    progress=progress)


def prepare_to_learn(family: Family, *, gradient_checkpointing: bool) -> None:
    """The text encoders on the device, in the weight dtype or as the run stores it, while anything in them trains."""
    for encoder in family.text_encoders:
        encoder.to(family.device, family.weight_dtype)
        family.storage.store(encoder)
        if gradient_checkpointing:  # called gradient_checkpointing_enable before Transformers 5.23
            part: Any = encoder
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # needs no gradient at the input
