"""The state (x, v, r) of one forward pass through one run, which can walk back the way it came."""

import copy

import torch
from torch import Tensor

from momconv.errors import InversionError, NotReproducible, UsageError
from momconv.momentum import seam
from momconv.momentum.equations import Rule, remainder_bounds
from momconv.momentum.measures import checksum, no_magnitudes
from momconv.momentum.storage import State
from momconv.states import is_fake, version_of


class Trajectory:
    """Holds x, v, the current remainder and those put aside; nothing that a block has computed.

    The check of the way back costs no synchronisation until :meth:`verify`: at the origin x, v and
    r must have the checksums that they had there on the way out. Whoever asks for the
    way out must see whether ``largest`` stayed below the rule's limit: a sum that lost bits may be
    undone by luck.

    Attributes:
        rule: The rule of the run.
        n: The step at which the state is.
        largest: The largest |x|, or |v| times ulp/v_ulp, so far, as ``note_magnitudes`` has it.
    """

    _checksums: Tensor  # of x, v and r at the origin

    def __init__(self, x: Tensor, rule: Rule, *, is_reversible: bool) -> None:
        """Start at x, which is on the grid and without gaps in memory, with v = 0 and r = 0."""
        self._state = State.start(x, rule, is_reversible=is_reversible)
        self.rule = rule
        self._bounds = [*remainder_bounds(rule.gamma, len(rule.coefficients))]
        self._full: list[Tensor] = []  # remainders that were put aside
        self.n = 0
        self._end = 0  # the last step, where the way back begins
        self._version = version_of(x)
        self._origin: int | None = None
        self._mismatch: Tensor | None = None
        self.largest = no_magnitudes(x)

    def fork(self) -> "Trajectory":
        """Return another one, which goes on from here; this one's way back begins here."""
        other = copy.copy(self)
        other._state, other._full = self._state.fork(), []
        return other

    def mark_origin(self) -> None:
        """Remember this point as the one where the way back will end."""
        self._origin = self.n
        self._checksums = self._checksum()

    @property
    def has_origin(self) -> bool:
        """Whether there is a way back to be remembered."""
        return self._origin is not None

    def advance(self, y: Tensor) -> Tensor:
        """Take one step, given y = block(x), and return the new x."""
        self._make_room()
        y = _laid_out_like(self._state.x, y)
        x = seam.advance(self._state, y, self.largest, self.rule, self.n)
        self._put(x)
        self.n += 1
        self._end = self.n
        return x

    def _put(self, x: Tensor) -> None:
        # An alias: the caller gets a tensor of its own to hang a graph on.
        self._state.x, self._version = x.detach(), version_of(x)

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
        if version_of(self._state.x) != self._version:
            raise InversionError(
                "the output of a momentum run was modified in place after the forward pass",
                kind="inversion.modified_output",
                fix="use the out-of-place operation on it (inplace=False)",
            )
        if self.n == self._end and not is_fake(self._state.x):
            torch.autograd.Variable._execution_engine.queue_callback(self.verify)
        self.n = n
        self._put(x := seam.retreat(self._state, self.rule))
        return x

    def undo(self, y: Tensor) -> None:
        """Bring v and r to step n as well, given y = block(x[n])."""
        y = _laid_out_like(self._state.x, y)
        seam.undo(self._state, y, self.rule, self.n)
        self._restore_room()
        if self.n == self._origin:
            self._mismatch = self._checksum().ne(self._checksums).any()
            del self._state, self._full  # verify() needs none of them

    @property
    def can_be_undone(self) -> bool:
        """Whether all was finite; what was not is no error, and has come out as in any network."""
        return is_fake(self.largest) or bool(self.largest[1].isfinite())

    def verify(self) -> None:
        """Check the way back, if all can be undone; on a GPU this waits for it to be computed.

        Raises:
            NotReproducible: x, v or r at the origin are not what they were.
        """
        if self._mismatch is not None and self._mismatch and self.can_be_undone:
            raise NotReproducible(
                "the backward pass did not arrive where the forward pass began: a block computed"
                " something else when it was run again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )

    def _make_room(self) -> None:
        """Begin a new remainder before step n, or widen the current one, if it could overflow."""
        r = self._state.r
        if r is None:
            return
        is_full, bound = self._bounds[self.n]
        if is_full:
            self._full.append(r)
            self._state.r = torch.zeros_like(r, dtype=narrowest(bound))
        else:
            self._state.r = r.to(narrowest(bound))

    def _restore_room(self) -> None:
        """Undo :meth:`_make_room`, after step n is undone."""
        if self._state.r is None or self.n == 0:
            return
        is_full, _ = self._bounds[self.n]
        if is_full:
            self._state.r = self._full.pop()
        else:
            self._state.r = self._state.r.to(narrowest(self._bounds[self.n - 1][1]))

    def _checksum(self) -> Tensor:
        """Return a checksum of x, low, v and r; r as int32, because its width may differ."""
        x, low, v, r = self._state.x, self._state.low, self._state.v, self._state.r
        parts = [x, low, v, None if r is None else r.to(torch.int32)]
        return torch.stack([checksum(part) for part in parts if part is not None])


def narrowest(bound: float) -> torch.dtype:
    """Return the narrowest integer type that holds ±bound."""
    for dtype in (torch.int8, torch.int16):
        if bound <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """Return y in x's memory layout.

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
