"""The concern of the CLIP guidance token."""

from __future__ import annotations

from typing import ClassVar

from trainkit.options.base import Concern, opt


class GuidanceOptions(Concern):
    """CLIP guidance token: the image's own CLIP features beside its caption"""

    read_with: ClassVar[str] = "guidance_token>0"

    guidance_token: float = opt(
        0.0, "above 0, the CLIP features of each image take the place of the last padding of its caption "
        "(Yuan et al. 2024); a switch only: 8 and 0.1 are the same run", unit="switch", ge=0,
        resume="in the data", card="CLIP guidance token")
    guidance_token_scale: float = opt(1.0, "factor of the features", unit="factor")
    guidance_token_dropout: float = opt(
        0.1, "share of visits without the token, so that the model can do without it, as classifier-free guidance does",
        unit="0..1", ge=0, le=1)
    guidance_features: str | None = opt(
        None, "the features: what the tool extract-clip-features wrote for these images", path=True,
        resume="in the data", min_length=1)

    def decisive(self) -> dict[str, object]:
        """Nothing where there is no token."""
        return super().decisive() if self.guidance_token else {}
