"""The steps of equations.py computed in place: in one pass over memory, or a piece at a time.

These functions define nothing: for every input they give the same bits as ``step`` and ``unstep``.
x, v, r and y have one shape and, in memory, one layout without gaps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from momconv.momentum.equations import Rule
from momconv.momentum.faster import fused
from momconv.momentum.measures import magnitude

# Elements. Large enough that an operation outweighs its call, or runs at full speed on a GPU, and
# small enough that the scratch weighs nothing, and stays in cache on a CPU.
PIECE = 2**17
GPU_PIECE = 2**22


def advance(  # noqa: PLR0913 (the state, what changes it, and by which rule)
    x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, largest: Tensor, rule: Rule, n: int
) -> Tensor:
    """Return x[n+1], and take v and r from n to n+1 in place. γ = 1 has no r.

    ``largest``, a scalar, becomes the largest |x[n+1]| if that is larger.
    """
    scale = rule.coefficients[n] / rule.ulp
    if fused.are_for(x, y):
        x_next: Tensor = fused.advance(x, v, r, y, largest, scale, rule.gamma, rule.ulp)
        return x_next
    x_next = torch.empty_like(x)
    for x_, v_, r_, y_, out in _pieces(x, v, r, y, x_next):
        v_scaled = v_ if r_ is None else _multiply(v_, r_, rule.gamma)
        torch.add(v_scaled, (y_ - x_).mul_(scale).round_(), out=v_)
        torch.add(x_, v_, alpha=rule.ulp, out=out)
    torch.maximum(largest, magnitude(x_next), out=largest)
    return x_next


def undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, rule: Rule, n: int) -> None:
    """Take v and r from n+1 to n in place, where x is x[n] and y = block(x[n])."""
    scale = rule.coefficients[n] / rule.ulp
    if fused.are_for(x, y):
        fused.undo(x, v, r, y, scale, rule.gamma)
        return
    for x_, v_, r_, y_ in _pieces(x, v, r, y):
        v_.sub_((y_ - x_).mul_(scale).round_())
        if r_ is not None:
            _divide(v_, r_, rule.gamma)


def _multiply(v: Tensor, r: Tensor, gamma: float) -> Tensor:
    """γ v, with −r/γ left in r. Uses v up."""
    scaled = r.to(v.dtype)
    v.add_(scaled.mul(-1 / gamma).round_())
    scaled.add_(v.mul(gamma).round_())
    r.copy_(v.add_(scaled.mul(-1 / gamma).round_()))
    return scaled


def _divide(v: Tensor, r: Tensor, gamma: float) -> None:
    """Undo :func:`_multiply`, in place."""
    remainder = r.to(v.dtype)
    remainder.sub_(v.mul(-1 / gamma).round_())
    v.sub_(remainder.mul(gamma).round_())
    remainder.sub_(v.mul(-1 / gamma).round_())
    r.copy_(v)
    v.copy_(remainder)


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors' memory in slices (of fakes, one is enough); a missing tensor stays missing."""
    first = next(t for t in tensors if t is not None)
    length = GPU_PIECE if first.is_cuda else PIECE
    if first.numel() <= length:
        yield tensors
        return
    flat = [None if t is None else t.as_strided((t.numel(),), (1,)) for t in tensors]
    stop = length if isinstance(first, FakeTensor) else first.numel()
    for start in range(0, stop, length):
        yield tuple(None if t is None else t[start : start + length] for t in flat)
