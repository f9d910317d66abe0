"""Captions that a text encoder reads only in part: which images they are of, and the words that nobody learns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainkit.errors import counted, listing, printable

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from trainkit.data.batch import Row

log = logging.getLogger(__name__)

START, END = 30, 50  # characters shown of what is cut off: its first, and its last, where trigger words like to stand
AT_ONCE = 1024  # captions


def warn_cut(rows: Sequence[Row], rewrite: Callable[[str], str], tokenizers: Sequence[CLIPTokenizer], *,
             preview: str | None = None) -> None:
    """Tell which captions are longer than an encoder's context, and what is cut off; also of the previews' prompt.

    rewrite  a caption as the encoders are given it, with new tokens for the words that stand for them
    """
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    first = {caption: row.id for row in reversed(rows) for caption in row.all_captions}
    captions = sorted(first, key=lambda caption: first[caption])
    lost = cut_off([rewrite(caption) for caption in captions], tokenizers)
    found = [f"{first[caption]}: {_shortened(words)!r}" for caption, words in zip(captions, lost, strict=True) if words]
    if found:
        log.warning("%s longer than the %d tokens that a text encoder reads; these words are cut off and "
                    "not learned (put what matters first, or shorten them): %s",
                    counted(len(found), "caption is", "captions are"), limit, listing(found))
    words, = cut_off([rewrite(preview or "")], tokenizers)
    if words:
        log.warning("--validation_prompt is longer than the %d tokens that a text encoder reads; these words are cut "
                    "off, and no preview shows them: %r", limit, _shortened(words))


def cut_off(prompts: Sequence[str], tokenizers: Sequence[CLIPTokenizer]) -> list[str]:
    """Of each prompt the text that does not fit, "" where all does; with several tokenizers the longest such text."""
    lost = [""] * len(prompts)
    for tokenizer in tokenizers:
        free = tokenizer.model_max_length - 2  # without BOS and EOS
        places = _maybe_longer(prompts, free, tokenizer)
        for i, spans in zip(places, _spans([prompts[i] for i in places], tokenizer), strict=True):
            if len(spans) > free:
                lost[i] = max(lost[i], prompts[i][spans[free][0] :].strip(), key=len)
    return lost


def _maybe_longer(prompts: Sequence[str], free: int, tokenizer: CLIPTokenizer) -> list[int]:
    """Where prompts stand that may have more than `free` tokens. Many prompts have few different words, and no prompt
    has more tokens than its words have one by one: no token of CLIP's reaches over a space, unless it was added.
    """
    words = list({word for prompt in prompts for word in prompt.split()})
    tokens = {word: len(spans) for word, spans in zip(words, _spans(words, tokenizer), strict=True)}
    return [i for i, prompt in enumerate(prompts) if sum(tokens[word] for word in prompt.split()) > free]


def _spans(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> Iterator[list[tuple[int, int]]]:
    """Where each token of a prompt begins and ends in it."""
    for start in range(0, len(prompts), AT_ONCE):
        some = list(prompts[start : start + AT_ONCE])
        yield from tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping


def _shortened(words: str) -> str:
    whole = printable(words)
    return whole if len(whole) <= START + END else f"{whole[:START]} … {whole[-END:]}"
