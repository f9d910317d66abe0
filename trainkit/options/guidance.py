"""The concern of the CLIP guidance token."""

from __future__ import annotations

from typing import ClassVar

from trainkit.options.base import Concern, opt


class GuidanceOptions(Concern):
    """CLIP guidance token: the network sees the image itself, not only its caption"""

    read_with: ClassVar[str] = "guidance_token>0"

    guidance_token: float = opt(
        0.0,
        "Show the network the image itself and not only its caption. With a value above 0, the CLIP features of an "
        "image take the place of the last padding token of its caption (Yuan et al. 2024). This is only a switch: 8 "
        "and 0.1 give the same run.", unit="switch", ge=0, resume="in the data", card="CLIP guidance token", off=0.0)
    guidance_token_scale: float = opt(
        1.0, "The factor by which the features are multiplied.", unit="factor")
    guidance_token_dropout: float = opt(
        0.1,
        "The probability that an image is used without its features. The model then also learns to work without "
        "them, as in classifier-free guidance.", unit="0..1", ge=0, le=1, off=0.0)
    guidance_features: str | None = opt(
        None, "The file of features that scripts/extract_clip_features.py wrote for these images.", path=True,
        resume="in the data", min_length=1)

    def decisive(self) -> dict[str, object]:
        """Nothing where there is no token."""
        return super().decisive() if self.guidance_token else {}
