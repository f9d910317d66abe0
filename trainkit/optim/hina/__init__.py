"""HinaAdaptive: AdamW with rules that can each be switched on, and states that can lie in 16 bits or in main memory.

optimizer.py · the class; settings.py · what can be set; rules.py · what happens to a tensor, in order;
regularize.py · background, space, edges and factors of the learning rate; rank.py · the rank penalty; chunk_state.py ·
a chunk under way; info.py · what the optimizer reports; storage.py · chunks out of states and back, with placing.py,
offload_stream.py and rounding.py · where states lie, how they travel, in how many bits; memory.py · what they take, and
making it less.
"""

from trainkit.optim.hina.optimizer import HinaAdaptive

__all__ = ["HinaAdaptive"]
