"""Make trainkit/templates/clip_merges.txt.gz: the byte-pair merges of CLIP's tokenizer, which single-file models lack.

    .venv/bin/python -m pip download --no-deps open-clip-torch==3.3.0
    .venv/bin/python experiments/build_clip_vocabulary.py open_clip_torch-3.3.0-py3-none-any.whl

The wheel holds OpenAI's bpe_simple_vocab_16e6.txt.gz (github.com/openai/CLIP, MIT). CLIP uses its first 48,894 merges:
49,408 tokens are 2 · 256 bytes, the merges, and two marks.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

SOURCE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
TARGET = Path(__file__).resolve().parents[1] / "trainkit/templates/clip_merges.txt.gz"
MERGES = 49408 - 2 * 256 - 2


def main(wheel: Path) -> None:
    data = zipfile.ZipFile(wheel).read(SOURCE)
    found = hashlib.sha256(data).hexdigest()
    assert found == SHA256, f"{SOURCE} in {wheel} has the SHA-256 {found}"
    lines = gzip.decompress(data).decode().split("\n")[1 : MERGES + 1]  # the first line is a version
    with TARGET.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed:
        packed.write("\n".join(lines).encode())
    print(f"{TARGET}: {len(lines):,} merges, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
