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

    train_text_encoder: bool = opt(
        False, "Also train a LoRA on the text encoders.")
    train_text_encoder_frac: float = opt(
        1.0, "The fraction of the steps in which the text encoders are trained. 0.5 is the first half of the run.",
        unit="0..1", read_with="train_text_encoder", card="Share of the steps, text encoders", ge=0, le=1,
        differs="it is a fraction of the steps, not of whole epochs")
    text_encoder_lr: float = opt(
        5e-6,
        "The learning rate of the text encoders or of the new tokens. With Prodigy, it is --learning_rate unless you "
        "give this flag.", unit="rate", resume="may change", read_with=LEARNS, ge=0,
        differs="0 means 0, not --learning_rate")
    text_encoder_2_lr: float | None = opt(
        None, "The learning rate of the LoRA on the second text encoder. Without this flag, it is --text_encoder_lr.",
        unit="rate", resume="may change", read_with="train_text_encoder", ge=0)
    adam_weight_decay_text_encoder: float | None = opt(
        None,
        "The weight decay of the LoRA on the text encoders or of the new tokens. Without this flag, it is "
        "--adam_weight_decay.", unit="decay", resume="may change", read_with=LEARNS, card=always("Text weight decay"),
        ge=0, differs="0 means 0, not --adam_weight_decay")
    clip_skip: int | None = opt(
        None,
        "How many of the last layers of the text encoders are left out. They are counted from the last but one, "
        "because SDXL leaves out the last layer already.", unit="layers", card="CLIP skip", ge=0,
        differs="this flag also works when the text encoders are not trained")

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
    """Pivotal tuning: new tokens for your concept"""

    read_with: ClassVar[str] = "train_text_encoder_ti"

    train_text_encoder_ti: bool = opt(
        False, "Learn new tokens for your concept in both text encoders (pivotal tuning).")
    train_text_encoder_ti_frac: float = opt(
        0.5, "The fraction of the steps in which the new tokens are trained. 0.5 is the first half of the run.",
        unit="0..1", card=always("Share of the steps, new tokens"), ge=0, le=1,
        differs="it is a fraction of the steps, not of whole epochs")
    token_abstraction: str = opt(
        "TOK", "The words in captions and prompts that stand for new tokens. Separate several words with commas.",
        unit="words", min_length=1, differs="only whole words are replaced")
    num_new_tokens_per_abstraction: int = opt(
        2, "How many new tokens each of these words stands for.", unit="tokens", ge=1)
    initializer_concept: str | None = opt(
        None,
        "The words whose embeddings the new tokens start from. Give one entry for each word of --token_abstraction, "
        "separated by commas. Without an entry, a token starts with random numbers.", unit="words", min_length=1)
    token_std_pull: float = opt(
        0.1,
        "After every step, the new embeddings are scaled so that the spread of their numbers comes closer to that of "
        "the known embeddings. This value is the strength, from 0 (no scaling) to 1 (the same spread).", unit="power",
        ge=0, le=1, differs="this scaling ends when the training of the new tokens ends", off=0.0)

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
