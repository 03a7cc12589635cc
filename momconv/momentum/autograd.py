"""A run of blocks as a differentiable function, for each way of giving backward its activations.

The graph is the same whatever the strategy: the blocks' own graphs, joined by one ``_Step`` each.
So are its values, bit for bit. A strategy only decides where the tensors come from that the blocks
need in backward:

* store: autograd keeps them;
* checkpoint: x[n] is kept, and the block runs again;
* segment: only the input of a whole stage is kept; x[n] is computed again before the block is;
* momentum: x[n] is reconstructed from x[n+1] and v[n+1], and the block runs again.

The last blocks of a run may be stored, where those before are treated in another way.

The graph sees x in the type in which the blocks compute, and so do its gradients; the state that
is integrated, and inverted, has single precision at least. v is in the graph for its gradient only,
as a tensor without memory.

The adjoint of a step: with g = ∂L/∂x[n+1] + ∂L/∂v[n+1] (v[n+1] feeds x[n+1] and the next step)
and u = c g, the block receives u, x[n] receives ∂L/∂x[n+1] − u directly, and ∂L/∂v[n] = γ g. The
last is passed on as u, which exists already, and scaled by γ/c where it is used. Rounding to the
grid counts as the identity.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from momconv.momentum.equations import Rule, remainder_bounds, step, to_grid, widen
from momconv.momentum.measures import no_magnitudes
from momconv.momentum.replay import Replay, before_backward, evaluate
from momconv.momentum.segment import Call
from momconv.momentum.trajectory import Trajectory
from momconv.states import is_graph_made
from momconv.vocabulary import Strategy as Strategy


def run(
    blocks: Sequence[nn.Module],
    x: Tensor,
    args: tuple[Tensor, ...],
    rule: Rule,
    calls: Sequence[Call | None],
    *,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x after all steps, in x's type, and the largest magnitude on the way.

    The blocks are called with x and ``args``, each by its own of ``calls``, or else backward
    reconstructs its input, which it can if the magnitude, as ``note_magnitudes`` has it, is below
    the rule's limit. After a block that is called none is reconstructed.
    """
    if is_graph_made():
        return _compose(blocks, x, args, rule), no_magnitudes(x)
    x = _ToGrid.apply(x, rule.ulp)
    trajectory = Trajectory(widen(x.detach()), rule, is_reversible=None in calls)
    v = _without_memory(x)
    for n, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        if call:
            if n and calls[n - 1] is None:
                trajectory = trajectory.fork()
            y = call(block, x, *args)
        else:
            y = _reconstruct(Replay(block, in_parts=in_parts), x, args, trajectory, n)
        x, v = _Step.apply(x, v, y, trajectory)
    return x, trajectory.largest


def _compose(
    blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule
) -> Tensor:
    """Compute the run in operations that have derivatives; nothing is reconstructed."""
    x = _with_value_of(to_grid(x.detach().double(), rule.ulp), x)
    v = torch.zeros_like(x)
    state = x.detach().double(), v.detach().double(), v.detach().double()
    for n, (is_full, _) in enumerate(remainder_bounds(rule.gamma, len(blocks))):
        y = evaluate(blocks[n], x, *args)
        if is_full:
            state = *state[:2], torch.zeros_like(state[2])
        state = step(*state, partial(_take, y.detach()), rule, n)
        v = rule.gamma * v + rule.coefficients[n] * (y - x)
        x = _with_value_of(state[0], x + v)
    return x


def _take(y: Tensor, _x: Tensor) -> Tensor:
    return y


def _with_value_of(value: Tensor, x: Tensor) -> Tensor:
    """Return x with a value that is hardly another, and x's derivatives."""
    return x + (value.to(x.dtype) - x.detach())


def _reconstruct(
    replay: Replay, x: Tensor, args: tuple[Tensor, ...], trajectory: Trajectory, n: int
) -> Tensor:
    """Return block(x, *args), for which backward walks the trajectory back from n+1 to n."""
    y = replay.first(x, *args)
    if y.requires_grad and not trajectory.has_origin:
        trajectory.mark_origin()
    return before_backward(y, partial(_restore, replay, trajectory, n, x.dtype))


def _restore(replay: Replay, trajectory: Trajectory, n: int, dtype: torch.dtype) -> None:
    x = trajectory.retreat(n)
    trajectory.undo(replay.repeat(x.to(dtype), is_same=trajectory.can_be_undone))


class _ToGrid(torch.autograd.Function):
    """:func:`to_grid`, which counts as the identity in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ulp: float) -> Tensor:
        # Narrower types have gaps that are multiples of ulp, or none as small.
        return to_grid(x, ulp).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Step(torch.autograd.Function):
    """One step of (2). It saves nothing: its adjoint is linear with known constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, y: Tensor, trajectory: Trajectory
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, ctx.n = trajectory.rule, trajectory.n
        ctx.set_materialize_grads(False)
        return trajectory.advance(y).to(x.dtype), _without_memory(x)

    @staticmethod
    def backward(ctx: Any, gx: Tensor | None, u_next: Tensor | None) -> tuple[Tensor | None, ...]:
        if gx is None:  # as where a function of the output has none
            return None, None, None, None
        c = ctx.rule.coefficients[ctx.n]
        if u_next is None:  # the last v is not used
            u = gx * c
        else:
            u = torch.add(gx, u_next, alpha=ctx.rule.gamma / ctx.rule.coefficients[ctx.n + 1])
            u.mul_(c)
        return gx - u, u, u, None


def _without_memory(x: Tensor) -> Tensor:
    """Return zeros of x's type and shape, which share one element of memory."""
    return x.new_zeros(()).expand(x.shape)
