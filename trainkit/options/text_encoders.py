"""The concerns of text: training the text encoders, learning new words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from trainkit.options.base import Concern, always, opt, steps_of_fraction

if TYPE_CHECKING:
    from trainkit.options.optimizer import OptimizerOptions

LEARNS = "train_text_encoder or train_text_encoder_ti"  # whether anything of the text encoders is trained


class TextOptions(Concern):
    """Text encoders"""

    train_text_encoder: bool = opt(False, "train LoRA on the text encoders too")
    train_text_encoder_frac: float = opt(
        1.0, "share of the steps in which the text encoders are trained", unit="0..1", read_with="train_text_encoder",
        card="Share of the steps, text encoders", ge=0, le=1,
        differs="a share of the steps, not of whole epochs")
    text_encoder_lr: float = opt(
        5e-6, "learning rate of text encoders and new embeddings; with Prodigy, --learning_rate unless this is given",
        unit="rate", resume="may change", read_with=LEARNS, ge=0, differs="0 means 0, not --learning_rate")
    text_encoder_2_lr: float | None = opt(
        None, "learning rate of the second text encoder's LoRA; without it --text_encoder_lr", unit="rate",
        resume="may change", read_with="train_text_encoder", ge=0)
    adam_weight_decay_text_encoder: float | None = opt(
        None, "weight decay of what is trained of the text encoders; without it --adam_weight_decay", unit="decay",
        resume="may change", read_with=LEARNS, card=always("Text weight decay"), ge=0,
        differs="0 means 0, not --adam_weight_decay")
    clip_skip: int | None = opt(
        None, "layers to skip below the text encoders' last but one", unit="layers", card="CLIP skip", ge=0,
        differs="honoured with frozen text encoders too")

    def lrs(self, optimizer: OptimizerOptions, *, global_batch: int) -> tuple[float, float]:
        """Learning rates of the first and the second text encoder; new embeddings of both have the first."""
        given = "text_encoder_lr" in self.model_fields_set
        first = optimizer.text_lr(self.text_encoder_lr, given=given, global_batch=global_batch)
        return first, first if self.text_encoder_2_lr is None else self.text_encoder_2_lr

    def decay(self, of_unet: float) -> float:
        """--adam_weight_decay_text_encoder, or without it the UNet's."""
        return of_unet if self.adam_weight_decay_text_encoder is None else self.adam_weight_decay_text_encoder

    def stop(self, total: int) -> int:
        """Finished steps of `total` after which the text encoders' LoRA no longer changes."""
        return steps_of_fraction(self.train_text_encoder_frac, total)


class PivotalOptions(Concern):
    """Pivotal tuning: new words for the concept"""

    read_with: ClassVar[str] = "train_text_encoder_ti"

    train_text_encoder_ti: bool = opt(False, "learn the embeddings of new tokens in both text encoders")
    train_text_encoder_ti_frac: float = opt(
        0.5, "share of the steps in which the new embeddings are trained", unit="0..1",
        card=always("Share of the steps, new tokens"), ge=0, le=1,
        differs="a share of the steps, not of whole epochs")
    token_abstraction: str = opt(
        "TOK", "words in prompts and captions that stand for new tokens, separated by commas", unit="words",
        min_length=1, differs="matched as whole words")
    num_new_tokens_per_abstraction: int = opt(2, "new tokens a word", unit="tokens", ge=1)
    initializer_concept: str | None = opt(
        None, "words whose embeddings the new tokens start from, one entry for each of --token_abstraction, separated "
        "by commas; an empty entry, or none at all: random, as large as the vocabulary's", unit="words", min_length=1)
    token_std_pull: float = opt(
        0.1, "power by which every step pulls the new embeddings' standard deviation towards the vocabulary's; 0: off",
        unit="power", ge=0, le=1, differs="stops with the training of the embeddings", off=0.0)

    @property
    def abstractions(self) -> list[str]:
        """The words of --token_abstraction, as they are listed."""
        return [word.strip() for word in self.token_abstraction.split(",") if word.strip()]

    @property
    def concepts(self) -> list[str]:
        """--initializer_concept entry by entry, "" where embeddings start at random."""
        if self.initializer_concept is None:
            return [""] * len(self.abstractions)
        return [concept.strip() for concept in self.initializer_concept.split(",")]

    @property
    def tokens(self) -> dict[str, list[str]]:
        """Each abstraction's new tokens: {"TOK": ["<s0>", "<s1>"]}."""
        n = self.num_new_tokens_per_abstraction
        return {word: [f"<s{i * n + k}>" for k in range(n)] for i, word in enumerate(self.abstractions)}

    def rewrite(self, prompt: str) -> str:
        """The prompt the text encoders see: new tokens for abstractions; as it is without pivotal tuning."""
        if not self.train_text_encoder_ti:
            return prompt
        return replace_words(prompt, {word: "".join(names) for word, names in self.tokens.items()})

    def stop(self, total: int) -> int:
        """Finished steps of `total` after which the embeddings no longer change: the pivot."""
        return steps_of_fraction(self.train_text_encoder_ti_frac, total)


def replace_words(prompt: str, table: Mapping[str, str]) -> str:
    """`prompt` with whole words replaced, all in one pass: TOK is found neither in TOK2 nor in what replaced TOK2."""
    listed = "|".join(re.escape(word) for word in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{listed})(?!\w)", lambda found: table[found[0]], prompt) if table else prompt
