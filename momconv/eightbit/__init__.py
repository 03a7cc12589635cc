"""Optimisers whose state takes a byte a value instead of four.

The format is that of bitsandbytes and torchao. In reading order: blocks (the format), optimizers
(SGD and AdamW on it), loops (their steps on a CPU in one pass over memory).
"""

from momconv.eightbit.blocks import count_blocks, state_bytes
from momconv.eightbit.optimizers import ORDER, SCALES, AdamW8bit, SGD8bit

__all__ = ["ORDER", "SCALES", "AdamW8bit", "SGD8bit", "count_blocks", "state_bytes"]
