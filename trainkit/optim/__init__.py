"""Optimizers, their learning rates as functions of the step, their state as tensors and JSON.

schedules.py · the learning-rate schedules; state.py · state out of and into any torch optimizer; optimizers.py · the
table and `Optim`.
"""

from trainkit.optim.optimizers import OPTIMIZERS, Optim, ParamGroup, make_optimizer, problems

__all__ = ["OPTIMIZERS", "Optim", "ParamGroup", "make_optimizer", "problems"]
