"""How far training has moved the weights of a network, in units of what rounding them does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainkit.adapters.network import Adapters


def change(adapters: Adapters, path: str) -> float:
    """‖ΔW‖ / ‖W‖ of one module (Frobenius)."""
    base = torch.linalg.vector_norm(adapters.weight(path)).item()
    moved = torch.linalg.vector_norm(adapters.delta_weight(path)).item()
    return moved / base if base else float(moved > 0)
