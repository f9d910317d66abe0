"""What a LoRA file says about one layer, and the ΔW that it stands for.

W is the base's weight, [out,in] with a convolution's kernel in a row; V = W + ΔW of the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trainkit.adapters.updates import Update, decomposed, decomposed_by_input, of_paper, over_base


@dataclass(frozen=True)
class Magnitude:
    """DoRA's m.

    by_input   one for each input, as LyCORIS had it before `wd_on_output`; else one for each output (Liu et al. 2024)
    over_base  m ‖W‖ / ‖V‖: what makes a program right that divides by ‖W‖ and not by ‖V‖ (ComfyUI, Forge)
    """

    value: Tensor  # [out], or [in]
    by_input: bool = False
    over_base: bool = False


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one module.

    kernel  of a convolution, () of a linear map; None where the file does not say it
    """

    update: Update
    kernel: tuple[int, ...] | None = None
    magnitude: Magnitude | None = None

    def delta(self, W: Tensor | None = None) -> Tensor:
        """What is added to the weight -> [out,in]; W is needed where there is a magnitude."""
        delta: Tensor = self.update.delta()
        if self.magnitude is None:
            return delta
        assert W is not None, "a DoRA's update depends on the base's weight"
        if self.magnitude.by_input:
            return decomposed_by_input(W, delta, self.magnitude.value.to(W))
        return decomposed(W, delta, self.of_paper(W).magnitude_value.to(W))

    @property
    def magnitude_value(self) -> Tensor:
        assert self.magnitude is not None, "no DoRA"
        return self.magnitude.value

    def like(self, W: Tensor) -> LayerUpdate:
        """The same with factors on W's device and in its precision."""
        return replace(self, update=self.update.map(lambda factor: factor.to(W)))

    def of_paper(self, W: Tensor) -> LayerUpdate:
        """The same with the paper's m, in the precision of W."""
        return self._with(of_paper, W, over=False)

    def over_base(self, W: Tensor) -> LayerUpdate:
        """The same with m ‖W‖ / ‖V‖, in the precision of W."""
        return self._with(over_base, W, over=True)

    def _with(self, value: Callable[[Tensor, Tensor, Tensor], Tensor], W: Tensor, *, over: bool) -> LayerUpdate:
        held = self.magnitude
        if held is None or held.by_input or held.over_base == over:
            return self
        scale = value(W, self.like(W).update.delta(), held.value.to(W))
        return replace(self, magnitude=Magnitude(scale, over_base=over))
