"""Prompts into token ids, as the stock pipelines make them, and long ones in chunks. B batch, T tokens, N chunks.

A prompt that is longer than an encoder reads is cut into chunks, each encoded by itself between start and end token:
their states stand behind one another, and the pooled vector is that of the first. AUTOMATIC1111 (modules/
sd_hijack_clip.py), Forge and ComfyUI (comfy/sd1_clip.py) read long prompts so. kohya's sd-scripts (library/
strategy_sdxl.py) do so too, but leave out the start and end tokens between chunks and give every prompt equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.condition import UNCONDITIONAL, equally_long

if TYPE_CHECKING:
    from transformers import BatchEncoding, CLIPTokenizer

BACKTRACK = 20  # tokens behind a comma that go into the next chunk together: AUTOMATIC1111's default


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> BatchEncoding:
    """As the stock pipelines make them: BOS, text, EOS, padding to the tokenizer's length.

    -> input_ids [B,T], attention_mask [B,T]
    """
    return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt")


# ----------------------------------------------------------------------------------------------------------------------
# Chunks


@dataclass(frozen=True)
class TokenChunks:
    """The chunks of several prompts, one prompt's behind the other's.

    ids, attended  [N,T] for each tokenizer
    counts         chunks of each prompt; N is their sum
    """

    ids: list[Tensor]
    attended: list[Tensor]
    counts: list[int]

    @cached_property
    def firsts(self) -> list[int]:
        """Where the first chunk of each prompt is."""
        return [0, *accumulate(self.counts)][:-1]

    def joined(self, states: Tensor) -> Tensor:
        """What an encoder says of every chunk [N,T,D] -> of every prompt [B,T',D]; T' is a multiple of T."""
        if max(self.counts) == 1:
            return states
        return torch.stack(equally_long([part.flatten(0, 1) for part in states.split(self.counts)]))

    def first(self, pooled: Tensor) -> Tensor:
        """One vector a chunk [N,P] -> one a prompt [B,P]."""
        return pooled if max(self.counts) == 1 else pooled[self.firsts]


def chunked(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str], most: int = 1) -> TokenChunks:
    """Prompts in at most `most` chunks. With one chunk it is what the stock pipelines make.

    All encoders get equally many chunks of a prompt; where a tokenizer needs fewer, the rest are empty.
    """
    texts = ["" if prompt == UNCONDITIONAL else prompt for prompt in prompts]
    if most == 1:
        given = [tokens(tokenizer, texts) for tokenizer in tokenizers]
        return TokenChunks([one.input_ids for one in given], [one.attention_mask for one in given], [1] * len(texts))
    parts = [_parts(tokenizer, texts, most) for tokenizer in tokenizers]
    counts = [max(map(len, of_prompt)) for of_prompt in zip(*parts, strict=True)]
    filled = [[part for of_prompt, count in zip(of_tokenizer, counts, strict=True)
               for part in (*of_prompt, *[[]] * (count - len(of_prompt)))] for of_tokenizer in parts]
    given = [framed(tokenizer, chunks) for tokenizer, chunks in zip(tokenizers, filled, strict=True)]
    return TokenChunks([ids for ids, _ in given], [attended for _, attended in given], counts)


def chunk_counts(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str], most: int) -> list[int]:
    """How many chunks each prompt is encoded in."""
    return [1] * len(prompts) if most == 1 else [
        max(map(len, of_prompt)) for of_prompt in zip(*(_parts(t, prompts, most) for t in tokenizers), strict=True)]


def prompt_lengths(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str], most: int) -> list[int]:
    """Positions that each prompt takes, before it is repeated beside longer ones."""
    return [count * tokenizers[0].model_max_length for count in chunk_counts(tokenizers, prompts, most)]


def has_free_place(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str], most: int = 1) -> list[bool]:
    """Whether each prompt leaves the last position of its last chunk to padding, for every text encoder."""
    parts = [_parts(tokenizer, prompts, most) for tokenizer in tokenizers]
    return [all(len(one) < max(map(len, of_prompt)) or len(one[-1]) < text_tokens(tokenizer)
                for one, tokenizer in zip(of_prompt, tokenizers, strict=True))
            for of_prompt in zip(*parts, strict=True)]


def text_tokens(tokenizer: CLIPTokenizer) -> int:
    """Tokens of text in one chunk, which has BOS and EOS besides."""
    return tokenizer.model_max_length - 2


def read_tokens(tokenizer: CLIPTokenizer, most: int) -> int:
    """Tokens of a prompt that are read: with BOS and EOS where it is one chunk, as models count them, else of text."""
    return tokenizer.model_max_length if most == 1 else most * text_tokens(tokenizer)


def chunk_spans(ids: Sequence[int], size: int, comma: int | None, most: int
                ) -> list[tuple[int, int]]:
    """(first token, the one behind the last) of each chunk of a prompt: `size` tokens, or fewer up to a comma.

    AUTOMATIC1111's rule: what a full chunk holds behind its last comma moves into the next chunk when it is at most
    BACKTRACK tokens, so that a tag stays whole. The last chunk is filled, and what is left is not read.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    while len(spans) + 1 < most and len(ids) - start > size:
        end = start + size
        commas = [i for i in range(max(start, end - BACKTRACK), end) if ids[i] == comma]
        end = commas[-1] + 1 if commas and ids[end] != comma else end
        spans.append((start, end))
        start = end
    return [*spans, (start, min(start + size, len(ids)))]


def comma_token(tokenizer: CLIPTokenizer) -> int | None:
    return tokenizer.get_vocab().get(",</w>")


def _parts(tokenizer: CLIPTokenizer, prompts: Sequence[str], most: int) -> list[list[list[int]]]:
    """Of each prompt the ids of each chunk, without BOS, EOS and padding."""
    size, comma = text_tokens(tokenizer), comma_token(tokenizer)
    given = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids if prompts else []
    return [[ids[start:end] for start, end in chunk_spans(ids, size, comma, most)] for ids in given]


def framed(tokenizer: CLIPTokenizer, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [N,T] of chunks: BOS, text, EOS, padding."""
    size, rows, masks = tokenizer.model_max_length, [], []
    for chunk in chunks:
        ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
        rows.append([*ids, *[tokenizer.pad_token_id] * (size - len(ids))])
        masks.append([1] * len(ids) + [0] * (size - len(ids)))
    return torch.tensor(rows), torch.tensor(masks)
