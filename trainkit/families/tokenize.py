"""Prompts into token ids, as the stock pipelines make them. B batch, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import BatchEncoding, CLIPTokenizer


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> BatchEncoding:
    """As the stock pipelines make them: BOS, text, EOS, padding to the tokenizer's length.

    -> input_ids [B,T], attention_mask [B,T]
    """
    return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt")


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """-> [B,T]"""
    return tokens(tokenizer, prompts).input_ids
