"""Whether a base model that does not say what it predicts predicts what was assumed, seen in its first batches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from trainkit.diffusion import Eps, Level, V

if TYPE_CHECKING:
    from trainkit.families import Family

log = logging.getLogger(__name__)

FIRST_STEPS = 10  # in which the LoRA has changed the base's prediction by little
CLEARLY = 0.5  # of the other error


class Doubt:
    """Compares the network's own prediction with ε and with v, and warns once where it is v although ε is assumed.

        error of ε = mean (out − n)²,   error of v = mean (out − (a·n − s·x0))²

    At low noise both targets are nearly n, so a batch of such levels settles nothing and the next one is looked at.
    """

    def __init__(self, family: Family):
        self.family, self.open = family, True

    def __call__(self, step: int, out: Tensor, *, x0: Tensor, n: Tensor, level: Level) -> None:
        """out, x0, n [B,C,h,w]"""
        self.open = self.open and step < FIRST_STEPS
        if not self.open:
            return
        found = out.detach().float()
        as_eps, as_v = (prediction.target(x0, n, level).float() for prediction in (Eps(), V()))
        eps_error, v_error = (float((found - target).square().mean()) for target in (as_eps, as_v))
        if v_error < CLEARLY * eps_error:
            log.warning(
                "%s seems to predict v, not epsilon, which was assumed: the error of its first predictions is %.3g as "
                "v and %.3g as epsilon. Stop here and add --prediction_type v_prediction, and --rescale_betas_zero_snr "
                "if the model was trained with zero-terminal SNR", self.family.name, v_error, eps_error)
            self.open = False
        elif eps_error < CLEARLY * v_error:
            self.open = False
