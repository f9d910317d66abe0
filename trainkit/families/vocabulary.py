"""CLIP's tokenizer from the merges that ship with us: a model of one file has none of its own.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; the merges are of
github.com/openai/CLIP, clip/bpe_simple_vocab_16e6.txt.gz (MIT), cut by experiments/build_clip_vocabulary.py.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).resolve().parents[1] / "templates/clip_merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 49408
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the tokens: bytes, bytes that end a word, merges, and the marks of start and end; and the merges."""
    others = range(256 - len(PRINTABLE))
    symbols = [*map(chr, PRINTABLE), *(chr(256 + k) for k in others)]
    pairs = (line.split(" ") for line in gzip.decompress(MERGES.read_bytes()).decode().split("\n"))
    merges = [(first, second) for first, second in pairs]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {word: number for number, word in enumerate(words)}, merges


def clip_tokenizer(*, pad_token: str, model_max_length: int) -> CLIPTokenizer:
    """pad_token  "<|endoftext|>" for CLIP's text encoder, "!" (id 0) for OpenCLIP's"""
    from transformers import CLIPTokenizer

    ids, merges = vocabulary()
    return CLIPTokenizer(vocab=dict(ids), merges=list(merges), unk_token=END, bos_token=START, eos_token=END,
                         pad_token=pad_token, model_max_length=model_max_length)
