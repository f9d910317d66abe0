"""Optimizers, their learning rates as functions of the step, their state as tensors and JSON.

schedules.py · the learning-rate schedules; table.py · the table of optimizers, and any other by its dotted path;
state.py · state out of and into any torch optimizer; groups.py · one group: who trains when, and its averaged weights;
optimizers.py · `Optim`, all groups of a run; prodigy.py, hina/ · optimizers of our own; eight_bit.py · those of
bitsandbytes with fewer waits.
"""

from trainkit.optim.groups import ParamGroup
from trainkit.optim.hina import HinaAdaptive
from trainkit.optim.optimizers import Optim, make_optimizer, problems
from trainkit.optim.prodigy import Prodigy
from trainkit.optim.table import OPTIMIZERS, library

__all__ = ["OPTIMIZERS", "HinaAdaptive", "Optim", "ParamGroup", "Prodigy", "library", "make_optimizer", "problems"]
