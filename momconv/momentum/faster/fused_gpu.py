"""The steps of kernels.py as one Triton kernel each: one pass over memory on a GPU.

Nothing is defined here either: for every input the bits are those of ``step`` and ``unstep``. For
that the compiler must not fuse a product into a sum, as it does by default: the product in front of
``_round`` and the subtraction in it would become one operation, which sees the exact product, and
sometimes another integer would be the nearest one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements; 4 KiB of each float tensor for one program


def advance(
    x: Tensor,
    v: Tensor,
    r: Tensor | None,
    y: Tensor,
    largest: Tensor,
    scale: float,
    gamma: float,
    ulp: float,
) -> Tensor:
    """Return x[n+1]; take v and r from n to n+1 and ``largest`` to its largest |x|, in place."""
    x_next, constants = torch.empty_like(x), (scale, gamma, -1 / gamma, ulp)
    bits = largest.view(torch.int32)
    _launch(_advance, x, v, r, y, x_next, bits, *constants, x.numel(), r is not None, BLOCK)
    return x_next


def undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float) -> None:
    """Take v and r from n+1 to n in place, where x is x[n] and y = block(x[n])."""
    constants = (scale, gamma, -1 / gamma)
    _launch(_undo, x, v, r, y, *constants, x.numel(), r is not None, BLOCK)


def _launch(kernel: Any, x: Tensor, *args: Any) -> None:
    """Run ``kernel`` on the device of x, with a program for each block of it."""
    with torch.cuda.device_of(x):  # Triton launches on the current one
        kernel[triton.cdiv(x.numel(), BLOCK),](x, *args, enable_fp_fusion=False)


@triton.jit
def _advance(
    x_ptr, v_ptr, r_ptr, y_ptr, out_ptr, largest_ptr, scale, gamma, inverse, ulp, size,
    has_r: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, inside, x, v, y = _load(x_ptr, v_ptr, y_ptr, size, block)
    if has_r:
        r = tl.load(r_ptr + at, mask=inside).to(tl.float32)
        v += _round(r * inverse)
        r += _round(v * gamma)
        v += _round(r * inverse)
        tl.store(r_ptr + at, v.to(r_ptr.dtype.element_ty), mask=inside)
        v = r
    v += _round((y - x) * scale)
    tl.store(v_ptr + at, v, mask=inside)
    out = x + v * ulp
    tl.store(out_ptr + at, out, mask=inside)
    # The bits of |x| grow with it, and NaN's are above all.
    magnitude = tl.abs(out).to(tl.int32, bitcast=True)
    tl.atomic_max(largest_ptr, tl.reduce(tl.where(inside, magnitude, 0), 0, _larger))


@triton.jit
def _undo(
    x_ptr, v_ptr, r_ptr, y_ptr, scale, gamma, inverse, size,
    has_r: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, inside, x, v, y = _load(x_ptr, v_ptr, y_ptr, size, block)
    v -= _round((y - x) * scale)
    if has_r:
        r = tl.load(r_ptr + at, mask=inside).to(tl.float32)
        r -= _round(v * inverse)
        v -= _round(r * gamma)
        r -= _round(v * inverse)
        tl.store(r_ptr + at, v.to(r_ptr.dtype.element_ty), mask=inside)
        v = r
    tl.store(v_ptr + at, v, mask=inside)


@triton.jit
def _load(x_ptr, v_ptr, y_ptr, size, block: tl.constexpr):
    """Where this program's elements are, which of them exist, and they."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside)
    v = tl.load(v_ptr + at, mask=inside)
    y = tl.load(y_ptr + at, mask=inside).to(tl.float32)
    return at, inside, x, v, y


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _round(t):
    """To the nearest integer, to the even one of two; NaN and infinities stay."""
    low = tl.floor(t)
    above = t - low
    is_odd = low - 2 * tl.floor(low * 0.5) == 1
    return tl.where((above > 0.5) | ((above == 0.5) & is_odd), low + 1, low)
