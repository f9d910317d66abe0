"""The concerns of text: training the text encoders, learning new words."""

from __future__ import annotations

from trainkit.options.base import Concern, opt

PIVOTAL = "pivotal tuning"
TEXT_ENCODER = "training the text encoders"


class TextOptions(Concern):
    """Text encoders"""

    train_text_encoder: bool = opt(False, "train LoRA on both text encoders too", not_yet=TEXT_ENCODER)
    train_text_encoder_frac: float = opt(
        1.0, "share of the steps in which the text encoders are trained", unit="0..1", ge=0, le=1,
        not_yet=TEXT_ENCODER, differs="a share of the steps, not of whole epochs")
    text_encoder_lr: float = opt(
        5e-6, "learning rate of text encoders and new embeddings", unit="rate", ge=0, not_yet=TEXT_ENCODER,
        differs="0 means 0, not --learning_rate")
    adam_weight_decay_text_encoder: float | None = opt(
        None, "weight decay of text encoders and new embeddings; without it --adam_weight_decay", unit="decay", ge=0,
        not_yet=TEXT_ENCODER, differs="0 means 0, not --adam_weight_decay")
    clip_skip: int | None = opt(
        None, "layers to skip below the text encoders' last but one", unit="layers", ge=0,
        differs="honoured with frozen text encoders too")


class PivotalOptions(Concern):
    """Pivotal tuning: new words for the concept"""

    train_text_encoder_ti: bool = opt(False, "learn the embeddings of new tokens in both text encoders",
                                      not_yet=PIVOTAL)
    train_text_encoder_ti_frac: float = opt(
        0.5, "share of the steps in which the new embeddings are trained", unit="0..1", ge=0, le=1, not_yet=PIVOTAL,
        differs="a share of the steps, not of whole epochs")
    token_abstraction: str = opt(
        "TOK", "words in prompts and captions that stand for new tokens, separated by commas", unit="words",
        min_length=1, not_yet=PIVOTAL)
    num_new_tokens_per_abstraction: int = opt(2, "new tokens a word", unit="tokens", ge=1, not_yet=PIVOTAL)
