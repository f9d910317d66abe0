"""Weights of words, as factors on what a text encoder says of them: through the library compel.

A weight of 1 or more moves the state of a token away from that of the empty prompt, by this factor. Below 1, the prompt
is blended with the same prompt where the text encoder does not look at these words, until none of them is left at 0.
B batch, T tokens, D width of the text encoder, N chunks of a prompt.
Source: compel, embeddings_provider.py (get_embeddings_for_weighted_prompt_fragments).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.families.tokenize import chunk_spans, comma_token, framed, text_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

    from trainkit.options.prompt_weights import WeightedText

Hidden = Callable[[Tensor, Tensor | None], Tensor]  # ids [N,T] and what is attended to [N,T] or None -> [N,T,D]


@dataclass(frozen=True)
class Chunking:
    """How a prompt is cut, as `tokenize.chunked` does it.

    chunks         in how many it is read, of at most `max_chunks`
    masks_padding  whether the text encoder must not look at the padding
    """

    tokenizer: CLIPTokenizer
    chunks: int
    max_chunks: int
    masks_padding: bool = False

    def spans(self, ids: list[int]) -> list[tuple[int, int]]:
        found = chunk_spans(ids, text_tokens(self.tokenizer), comma_token(self.tokenizer), self.max_chunks)
        return found + [(found[-1][1], found[-1][1])] * (self.chunks - len(found))

    def read(self, pieces: list[str]) -> list[list[int]]:
        """Of each piece of a prompt the tokens that are read, without start and end."""
        tokens = self.tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids if pieces else []
        left, kept = self.spans(sum(tokens, []))[-1][1], []
        for piece in tokens:
            kept.append(piece[:left])
            left -= len(kept[-1])
        return kept

    def rows(self, pieces: list[str], weights: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, the weight of each, and what is attended to, [N,T] each."""
        read = self.read(pieces)
        ids = sum(read, [])
        each = [weight for piece, weight in zip(read, weights, strict=True) for _ in piece]
        spans = self.spans(ids)
        rows, attended = framed(self.tokenizer, [ids[start:end] for start, end in spans])
        factors = torch.ones(rows.shape)
        for row, (start, end) in zip(factors, spans, strict=True):
            row[1 : 1 + end - start] = torch.tensor(each[start:end])
        return rows, factors, attended if self.masks_padding else torch.ones_like(attended)


@dataclass(frozen=True)
class _Encoder:
    """A text encoder as compel calls it, which gives the hidden states that the family reads."""

    hidden: Hidden
    device: torch.device
    dtype: torch.dtype

    def __call__(self, ids: Tensor, attended: Tensor | None = None, **_: object) -> _States:
        return _States(self.hidden(ids, None if attended is None or bool(attended.all()) else attended))


@dataclass(frozen=True)
class _States:
    last_hidden_state: Tensor


@cache
def provider_class() -> Any:
    """compel's provider, with our chunks: its own are cut elsewhere."""
    from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

    class Provider(EmbeddingsProvider):
        """Gives the states of a prompt in pieces, each with its weight."""

        def __init__(self, cut: Chunking, encoder: _Encoder):
            super().__init__(cut.tokenizer, encoder, truncate=False, split_long_text_mode=SplitLongTextMode.BRUTAL)
            self.cut = cut

        def get_token_ids(self, texts: list[str], **_: object) -> list[list[int]]:
            return self.cut.read(texts)

        def get_token_ids_and_expand_weights(self, fragments: list[str], weights: list[float], device: torch.device
                                             ) -> tuple[Tensor, ...]:
            return tuple(one.flatten().to(device) for one in self.cut.rows(fragments, weights))

    return Provider


def weighted_states(cut: Chunking, encoder: PreTrainedModel, hidden: Hidden, text: WeightedText) -> Tensor:
    """What a text encoder says of a prompt with weights -> [1,N·T,D].

    hidden  the states that the family reads of `encoder`
    """
    provider = provider_class()(cut, _Encoder(hidden, encoder.device, encoder.dtype))
    pieces = [(piece, weight) for piece, weight in text.pieces if piece.strip()]
    read = cut.read([piece for piece, _ in pieces])
    kept = [piece for piece, ids in zip(pieces, read, strict=True) if ids] or [("", 1.0)]
    texts, weights = zip(*kept, strict=True)
    return provider.get_embeddings_for_weighted_prompt_fragments([[*texts]], [[*weights]], device=encoder.device)
