"""The state (x, v, r) of one forward pass through one run, which can walk back the way it came."""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from momconv.errors import InversionError, NotReproducible, RangeOverflow, UsageError
from momconv.momentum import seam
from momconv.momentum.equations import Rule, largest_magnitude, remainder_bounds
from momconv.momentum.measures import checksum, magnitude
from momconv.momentum.replay import version_of


class Trajectory:
    """Holds x, v, the current remainder and those put aside; nothing that a block has computed.

    The check of the way back costs no synchronisation until :meth:`verify`: at the origin x, v and
    r must have the checksums that they had there on the way out, and no |x| on the way may have
    been too large for exact sums. (The checksums alone would not do: a sum that lost bits may
    still be undone by luck.)
    """

    _checksums: Tensor  # of x, v and r at the origin

    def __init__(self, x: Tensor, rule: Rule) -> None:
        """Start at x, which is on the grid and without gaps in memory, with v = 0 and r = 0."""
        self.x = x
        self.v = torch.zeros_like(x)
        self.rule = rule
        self._bounds = [*remainder_bounds(rule.gamma, len(rule.coefficients))]
        self._remainders = [None if rule.gamma == 1 else torch.zeros_like(x, dtype=torch.int8)]
        self.n = 0
        self._version = version_of(x)
        self._limit = largest_magnitude(rule.ulp, x.dtype)
        self._origin: int | None = None
        self._mismatch: Tensor | None = None
        self._largest = x.new_zeros(())

    def mark_origin(self) -> None:
        """Remember this point as the one where the way back will end."""
        self._origin = self.n
        self._checksums = self._checksum()
        self._largest = magnitude(self.x)

    @property
    def has_origin(self) -> bool:
        """Whether there is a way back to be remembered."""
        return self._origin is not None

    def advance(self, y: Tensor) -> Tensor:
        """Take one step, given y = block(x), and return the new x."""
        self._make_room()
        y = _laid_out_like(self.x, y)
        r = self._remainders[-1]
        x = seam.advance(self.x, self.v, r, y, self._largest, self.rule, self.n)
        # An alias: the caller gets a tensor of its own to hang a graph on.
        self.x, self._version = x.detach(), version_of(x)
        self.n += 1
        return x

    def retreat(self, n: int) -> Tensor:
        """Step back to x[n], in a tensor of its own, and return it; :meth:`undo` must follow.

        Raises:
            InversionError: the state is not at n+1 (a second backward pass), or somebody wrote
                into the run's output.
        """
        if self.n != n + 1:
            raise InversionError(
                "backward came a second time through blocks whose activations are reconstructed,"
                " or skipped some of them",
                kind="inversion.second_backward",
                fix='momconv.set_strategy(model, "store")',
            )
        if version_of(self.x) != self._version:
            raise InversionError(
                "the output of a momentum run was modified in place after the forward pass",
                kind="inversion.modified_output",
                fix="use the out-of-place operation on it (inplace=False)",
            )
        if n == len(self._bounds) - 1 and not isinstance(self.x, FakeTensor):  # which has no values
            torch.autograd.Variable._execution_engine.queue_callback(self.verify)
        self.n = n
        self.x = torch.sub(self.x, self.v, alpha=self.rule.ulp)
        self._version = version_of(self.x)
        return self.x

    def undo(self, y: Tensor) -> None:
        """Bring v and r to step n as well, given y = block(x[n])."""
        y = _laid_out_like(self.x, y)
        seam.undo(self.x, self.v, self._remainders[-1], y, self.rule, self.n)
        self._restore_room()
        if self.n == self._origin:
            self._mismatch = self._checksum().ne(self._checksums).any()
            del self.x, self.v, self._remainders  # verify() needs none of them

    def verify(self) -> None:
        """Check the way back; on a GPU this waits for it to be computed.

        A non-finite activation is no error here: it has come out as such, as in any network. It
        cannot be undone, so then nothing is checked.

        Raises:
            RangeOverflow: an activation was too large for exact sums.
            NotReproducible: x, v or r at the origin are not what they were.
        """
        largest = self._largest.item()
        if not math.isfinite(largest):
            return
        if largest >= self._limit:
            raise RangeOverflow(
                f"an activation reached {largest:.4g}, but with {-math.log2(self.rule.ulp):.0f}"
                f" fraction bits a momentum run is exact only below {self._limit:.4g}",
                kind="inversion.range_overflow",
                fix="set a smaller fraction_bits on the MomentumSequential: each bit less doubles"
                " the range",
            )
        if self._mismatch is not None and self._mismatch.item():
            raise NotReproducible(
                "the backward pass did not arrive where the forward pass began: a block computed"
                " something else when it was run again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )

    def _make_room(self) -> None:
        """Before step n: begin a new remainder, or widen the current one, if it could overflow."""
        r = self._remainders[-1]
        if r is None:
            return
        is_full, bound = self._bounds[self.n]
        if is_full:
            self._remainders.append(torch.zeros_like(r, dtype=narrowest(bound)))
        elif r.dtype != narrowest(bound):
            self._remainders[-1] = r.to(narrowest(bound))

    def _restore_room(self) -> None:
        """After step n is undone: the inverse of :meth:`_make_room`."""
        r = self._remainders[-1]
        if r is None or self.n == 0:
            return
        is_full, _ = self._bounds[self.n]
        if is_full:
            self._remainders.pop()
        else:
            self._remainders[-1] = r.to(narrowest(self._bounds[self.n - 1][1]))

    def _checksum(self) -> Tensor:
        """Of x, v and r; r as int32, because its width may differ."""
        r = self._remainders[-1]
        parts = [self.x, self.v] if r is None else [self.x, self.v, r.to(torch.int32)]
        return torch.stack([checksum(part) for part in parts])


def narrowest(bound: float) -> torch.dtype:
    """The narrowest integer type that holds ±bound."""
    for dtype in (torch.int8, torch.int16):
        if bound <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """Y in x's memory layout.

    Raises:
        UsageError: It has another shape.
    """
    if y.shape != x.shape:
        raise UsageError(
            f"a block of a momentum run returned {tuple(y.shape)} for {tuple(x.shape)}",
            kind="model.changes_shape",
            fix="runs=[…] without this block",
        )
    return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)
