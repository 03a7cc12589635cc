"""The steps of equations.py on a stored state: in one pass over memory, or a piece at a time.

These functions define nothing: for every input they give the same bits as those of seam.py. The
tensors have one shape and, in memory, one layout without gaps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from momconv.momentum.equations import Rule, divide, multiply, to_grid
from momconv.momentum.faster import fused
from momconv.momentum.measures import note_magnitudes
from momconv.momentum.storage import State
from momconv.states import is_fake

# Elements. Large enough that an operation outweighs its call, or runs at full speed on a GPU, and
# small enough that the scratch weighs nothing, and stays in cache on a CPU.
PIECE = 2**16
GPU_PIECE = 2**21


def advance(state: State, y: Tensor, largest: Tensor, rule: Rule, n: int) -> Tensor:
    """Return x[n+1], and take low, v and r from n to n+1 in place; ``largest`` takes note."""
    scale = rule.coefficients[n] / rule.v_ulp
    if fused.are_for(state.x, y):
        x: Tensor = fused.advance(
            state.x, state.low, state.v, state.r, y, largest, scale, *_constants(rule)
        )
        return x
    out = torch.empty_like(state.x)
    for piece, y_, out_ in _pieces(state, y, out):
        x, v, r = piece.unpack(rule)
        v, r = multiply(v, r, rule.gamma)
        v = v.add_((y_.double() - piece.x).mul_(scale).round_())
        x = x + to_grid(v * rule.v_ulp, rule.ulp)
        out_.copy_(piece.pack(x, v, r, rule))
        note_magnitudes(largest, out_, v * rule.ulp)
    return out


def retreat(state: State, rule: Rule) -> Tensor:
    """Return x[n], and take low from n+1 to n in place; v and r stay at n+1."""
    if fused.are_for(state.x, state.x):
        x: Tensor = fused.retreat(state.x, state.low, state.v, *_constants(rule)[1:])
        return x
    out = torch.empty_like(state.x)
    for piece, _, out_ in _pieces(state, state.x, out):
        x, v, r = piece.unpack(rule)
        out_.copy_(piece.pack(x - to_grid(v * rule.v_ulp, rule.ulp), v, r, rule))
    return out


def undo(state: State, y: Tensor, rule: Rule, n: int) -> None:
    """Take v and r from n+1 to n in place, where x and low are at n and y = block(x[n])."""
    scale = rule.coefficients[n] / rule.v_ulp
    if fused.are_for(state.x, y):
        fused.undo(state.x, state.v, state.r, y, scale, rule.gamma)
        return
    for piece, y_, _ in _pieces(state, y, y):
        x, v, r = piece.unpack(rule)
        v = v.sub_((y_.double() - piece.x).mul_(scale).round_())
        piece.pack(x, *divide(v, r, rule.gamma), rule)


def _constants(rule: Rule) -> tuple[float, float, float]:
    return rule.gamma, rule.ulp, rule.v_ulp / rule.ulp


def _pieces(state: State, *tensors: Tensor) -> Iterator[tuple[State, Any, Any]]:
    """Yield the memory of all tensors in slices (of fakes, one is enough)."""
    x, low, v, r = state.x, state.low, state.v, state.r
    size, length = x.numel(), GPU_PIECE if x.is_cuda else PIECE
    flat = [None if t is None else t.as_strided((size,), (1,)) for t in (x, low, v, r, *tensors)]
    for start in range(0, min(size, length) if is_fake(x) else size, length):
        cut = [None if t is None else t[start : start + length] for t in flat]
        yield State(*cut[:4]), *cut[4:]  # type: ignore[arg-type, misc]
