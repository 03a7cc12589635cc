"""The state in few bytes an element: 4 + 1 for x, 4 for v, and r as narrow as it may be.

In single precision x is the nearest float32, which the next block reads and the graph keeps anyway,
and a byte of what that rounds away: together 31 bits and a sign. v, a count of at most as many
bits, is an int32. What nobody walks back, and a network in double precision, has v in doubles, and
a network in double precision x too, without that byte.

What is not finite or too large is in x as in any network; an int32 or a byte then holds anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momconv.momentum.equations import Rule


@dataclass(slots=True)
class State:
    """x, v and r of one step, of one shape and, in memory, one layout without gaps.

    Attributes:
        x: What the blocks read.
        low: x minus that in ulps; None in double precision.
        v: A count of v_ulps.
        r: The remainder; γ = 1 has none.
    """

    x: Tensor
    low: Tensor | None
    v: Tensor
    r: Tensor | None

    @classmethod
    def start(cls, x: Tensor, rule: Rule, *, is_reversible: bool) -> "State":
        """Return the state at x, which is on the grid, with v = 0 and r = 0."""
        is_single = rule.dtype == torch.float32
        return cls(
            x,
            # Allocated as what it is not, so that the planner can tell it from r.
            torch.zeros_like(x, dtype=torch.uint8).view(torch.int8) if is_single else None,
            torch.zeros_like(x, dtype=torch.int32 if is_single and is_reversible else torch.double),
            None if rule.gamma == 1 else torch.zeros_like(x, dtype=torch.int8),
        )

    def fork(self) -> "State":
        """Return the same in a memory of its own, but for x, into which no step writes."""
        low, r = (None if part is None else part.clone() for part in (self.low, self.r))
        return State(self.x, low, self.v.clone(), r)

    def unpack(self, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, v and r in double precision."""
        x, v = self.x.double(), self.v.double()
        r = torch.zeros_like(v) if self.r is None else self.r.double()
        return x if self.low is None else x + self.low * rule.ulp, v, r

    def pack(self, x: Tensor, v: Tensor, r: Tensor, rule: Rule) -> Tensor:
        """Write the others in place, and return the new x."""
        nearest = x.to(rule.dtype)
        if self.low is not None:
            _put(self.low, (x - nearest) / rule.ulp)
        _put(self.v, v)
        if self.r is not None:
            _put(self.r, r)
        return nearest


def _put(stored: Tensor, values: Tensor) -> None:
    """Write integers in double precision into another type, within its range."""
    if not stored.is_floating_point():
        limits = torch.iinfo(stored.dtype)
        values = values.nan_to_num(0, 0, 0).clamp_(limits.min, limits.max)
    stored.copy_(values)
