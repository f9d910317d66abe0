"""A CLIP-format byte-pair tokenizer of about 4,000 entries, cut from CLIP's own merges.

Kept words get exactly the pieces CLIP gives them: byte-pair encoding applies the earliest merge that fits, the cut
keeps the order, and it keeps every merge that encoding a kept word uses (Sennrich et al. 2016, arXiv:1508.07909).
"""

import gzip
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from experiments.base_models.captions import all_words

LOG = logging.getLogger("base_models")
SOURCE = ("open-clip-torch", "3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz")
CLIP_MERGES = 49152 - 256 - 2  # merges of the released CLIP vocabulary; the file holds more
FIRST_MERGES = 3000
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77

Merge = tuple[str, str]


def read_clip_merges(work_dir: Path) -> list[Merge]:
    """CLIP's merges in order, from the wheel of open_clip (MIT), fetched once."""
    folder = work_dir / "wheels"
    name, version, member = SOURCE
    if not list(folder.glob("open_clip_torch-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}", "-d", str(folder)]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("open_clip_torch-*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read(member)).decode("utf-8").splitlines()
    return [tuple(line.split()) for line in lines[1 : 1 + CLIP_MERGES]]


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2 and CLIP, printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def merges_of_word(word: str, ranks: dict[Merge, int]) -> set[Merge]:
    """The merges that byte-pair encoding applies to an ASCII word."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    used = set()
    while len(pieces) > 1:
        best = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        pieces = apply_merge(pieces, best)
    return used


def apply_merge(pieces: list[str], merge: Merge) -> list[str]:
    joined, index = [], 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == merge:
            joined.append("".join(merge))
            index += 2
        else:
            joined.append(pieces[index])
            index += 1
    return joined


def cut_merges(merges: list[Merge], words: list[str]) -> list[Merge]:
    """The first merges and all that `words` need, in CLIP's order."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    needed = set(merges[:FIRST_MERGES]).union(*(merges_of_word(word, ranks) for word in words))
    return [merge for merge in merges if merge in needed]


def write_tokenizer(folder: Path, merges: list[Merge], pad_token: str) -> None:
    """vocab.json and merges.txt (older loaders need them) and the two files of today's tokenizers."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges), BOS, EOS]
    vocab = {entry: index for index, entry in enumerate(entries)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH, **special).save_pretrained(folder)


def build_tokenizers(work_dir: Path) -> None:
    """Two folders with one vocabulary: `tokenizer` pads with the end token, `tokenizer_2` with "!" as SDXL's does."""
    merges = cut_merges(read_clip_merges(work_dir), all_words())
    write_tokenizer(work_dir / "tokenizer", merges, pad_token=EOS)
    write_tokenizer(work_dir / "tokenizer_2", merges, pad_token="!")
    LOG.info("tokenizer: %d entries", 512 + len(merges) + 2)
