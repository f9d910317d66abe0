"""Files: one content has one set of bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

from trainkit.files import load_tensors, save_tensors


def test_one_content_has_one_sha256_whatever_the_order_of_its_metadata(tmp_path: Path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.float16), "näme": torch.zeros(())}
    metadata = {f"key {k}": f'"{k}" ünïcode\n' for k in range(20)}
    digests = set()
    for turn in range(4):
        file = tmp_path / f"{turn}.safetensors"
        save_tensors(file, tensors, dict(sorted(metadata.items(), key=lambda item: hash((item, turn)))))
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
        read = load_tensors(file)
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == metadata
    assert len(digests) == 1
