"""From the bytes that tensors have at the peak to what a card must have free. This rule is an assumption.

    need = 1.05 · peak + 0.6 GiB

CUDA's context takes 0.3 to 0.5 GB, cuBLAS keeps a workspace of some megabytes, cuDNN one of up to some hundred for
convolutions, and the gaps between the pieces in use are some per cent of them: all from general knowledge, none of it
measured by us. The 0.6 GiB may be 0.3 GiB too high or too low.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GAPS = 0.05  # of the peak
CUDA = int(0.6 * GIB)  # bytes: context and workspaces
UNSURE = int(0.3 * GIB)  # bytes by which it may be too low
OTHERS = int(0.5 * GIB)  # bytes of a card that the desktop and other programs have


@dataclass(frozen=True)
class Need:
    """Bytes that a card must have free for a peak of so many bytes of tensors."""

    peak: int

    @property
    def bytes(self) -> int:
        return int((1 + GAPS) * self.peak) + CUDA

    def fits(self, free: int) -> bool:
        return self.bytes <= free

    def is_tight(self, free: int) -> bool:
        """Whether it fits only if the rule is not too low."""
        return self.fits(free) and not self.fits(free - UNSURE)
