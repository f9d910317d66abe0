"""Captions that a text encoder reads only in part: which images they are of, and the words that nobody learns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from trainkit.errors import counted, listing, printable
from trainkit.families.tokenize import chunk_spans, comma_token, read_tokens, text_tokens
from trainkit.options.captions import LENGTHS, TOKENS

if TYPE_CHECKING:
    from transformers import BatchEncoding, CLIPTokenizer

    from trainkit.data.batch import Row

log = logging.getLogger(__name__)

START, END = 30, 50  # characters shown of what is cut off: its first, and its last, where trigger words like to stand
AT_ONCE = 1024  # captions


class Reader(Protocol):
    """What of a model family says how much of a prompt it reads."""

    @property
    def tokenizers(self) -> Sequence[CLIPTokenizer]: ...

    @property
    def max_chunks(self) -> int: ...


def warn_cut(rows: Sequence[Row], rewrite: Callable[[str], str], family: Reader,
             texts_of: Callable[[Row], Sequence[str]] = lambda row: row.all_captions, preview: str | None = None
             ) -> None:
    """Tell which captions are longer than an encoder's context, and what is cut off; also of the previews' prompt.

    rewrite   a caption as the encoders are given it, with new tokens for the words that stand for them
    texts_of  what a row is trained with: its captions, or their variants
    """
    tokenizers, max_chunks = family.tokenizers, family.max_chunks
    limit = min(read_tokens(tokenizer, max_chunks) for tokenizer in tokenizers)
    tokens = f"{limit} tokens that {'a text encoder reads' if max_chunks == 1 else 'are read'}"
    once = [row for row in reversed(rows) if row.repeat == 0]  # repeats have the same captions
    first = {text: row.id for row in once for text in reversed(texts_of(row))}
    texts = sorted(first, key=lambda text: first[text])
    lost = cut_off([rewrite(text) for text in texts], tokenizers, max_chunks)
    found: dict[str, str] = {}  # an image, and the first of its texts that is cut
    for text, words in zip(texts, lost, strict=True):
        if words:
            found.setdefault(first[text], words)
    if found:
        longer = f", or read more with --max_token_length {LENGTHS[-1]}" if max_chunks * TOKENS < LENGTHS[-1] else ""
        log.warning("%s longer than the %s; these words are cut off and not learned (put what matters first, or "
                    "shorten them%s): %s", counted(len(found), "caption is", "captions are"), tokens, longer,
                    listing(f"{name}: {_shortened(words)!r}" for name, words in found.items()))
    words, = cut_off([rewrite(preview or "")], tokenizers, max_chunks)
    if words:
        log.warning("--validation_prompt is longer than the %s; these words are cut off, and no preview shows them: %r",
                    tokens, _shortened(words))


def cut_off(prompts: Sequence[str], tokenizers: Sequence[CLIPTokenizer], max_chunks: int = 1) -> list[str]:
    """Of each prompt the text that does not fit, "" where all does; with several tokenizers the longest such text."""
    lost = [""] * len(prompts)
    for tokenizer in tokenizers:
        size, comma = text_tokens(tokenizer), comma_token(tokenizer)
        places = _maybe_longer(prompts, size, tokenizer)  # with commas, chunks may be smaller than `size`
        for i, (ids, spans) in zip(places, _read([prompts[i] for i in places], tokenizer), strict=True):
            end = chunk_spans(ids, size, comma, max_chunks)[-1][1]
            if end < len(ids):
                lost[i] = max(lost[i], prompts[i][spans[end][0] :].strip(), key=len)
    return lost


def _maybe_longer(prompts: Sequence[str], free: int, tokenizer: CLIPTokenizer) -> list[int]:
    """Where prompts stand that may have more than `free` tokens. Many prompts have few different words, and no prompt
    has more tokens than its words have one by one: no token of CLIP's reaches over a space, unless it was added.
    """
    words = list({word for prompt in prompts for word in prompt.split()})
    tokens = {word: len(ids) for word, (ids, _) in zip(words, _read(words, tokenizer), strict=True)}
    return [i for i, prompt in enumerate(prompts) if sum(tokens[word] for word in prompt.split()) > free]


def _read(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of each prompt, and where each begins and ends in it."""
    for start in range(0, len(prompts), AT_ONCE):
        some = list(prompts[start : start + AT_ONCE])
        read: BatchEncoding = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        yield from zip(read.input_ids, read.offset_mapping, strict=True)


def _shortened(words: str) -> str:
    whole = printable(words)
    return whole if len(whole) <= START + END else f"{whole[:START]} … {whole[-END:]}"
