"""Colour profiles made of a few numbers: matrix and gamma, as cameras and phones embed them."""

from __future__ import annotations

import struct

P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))  # Display P3, under D50
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # Adobe RGB (1998)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def profile(primaries: tuple = P3, gamma: float = 2.2, *, grey: bool = False) -> bytes:
    """An ICC profile, version 2."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 79
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(0.9642, 1.0, 0.8249)}
    if grey:
        tags[b"kTRC"] = _gamma(gamma)
    else:
        tags |= {name + b"XYZ": _xyz(*column) for name, column in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {name + b"TRC": _gamma(gamma) for name in (b"r", b"g", b"b")}
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    space = b"GRAY" if grey else b"RGB "
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ") + b"\0" * 12
    head += b"acsp" + b"\0" * 28 + _fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
