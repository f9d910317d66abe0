"""Low-rank adapters: what is trained in the UNet and the text encoders, fp32 whatever the base's precision.

network.py · the adapters of one network; targets.py · which layers get one; patterns.py · ranks, alphas and rates of
single layers; updates.py · each kind's ΔW as a formula; starts.py · initial values; movement.py · how far training has
moved the weights.

W a layer's weight, out × in, where in counts a convolution's kernel too; c the scale, α/r or α/√r.
"""

from trainkit.adapters.movement import BF16_ROUNDING, FP16_ROUNDING, largest_change
from trainkit.adapters.network import NAME, UNET, Adapters, Prefix, add_adapters
from trainkit.adapters.targets import BLORA_BLOCKS, Targets, problems

__all__ = [
    "BF16_ROUNDING", "BLORA_BLOCKS", "FP16_ROUNDING", "NAME", "UNET", "Adapters", "Prefix", "Targets", "add_adapters",
    "largest_change", "problems",
]
