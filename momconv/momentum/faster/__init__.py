"""The same bits in less memory and time: nothing here defines anything, and all may be deleted.

seam.py is the one place that asks for it. In reading order: kernels (the steps in place), fused (in
one pass over memory), norms (what the second run of a block need not compute), parts (running a
block twice more, a part at a time).
"""

from momconv.momentum.faster.fused import NEEDED, find_obstacle
from momconv.momentum.faster.kernels import advance, retreat, undo
from momconv.momentum.faster.norms import Norms
from momconv.momentum.faster.parts import Cut

__all__ = ["NEEDED", "Cut", "Norms", "advance", "find_obstacle", "retreat", "undo"]
