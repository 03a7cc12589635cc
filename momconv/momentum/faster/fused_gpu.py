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

INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity
BLOCK = 1024  # elements; 4 KiB of each float tensor for one program


def advance(
    x: Tensor,
    low: Tensor,
    v: Tensor,
    r: Tensor | None,
    y: Tensor,
    largest: Tensor,
    scale: float,
    gamma: float,
    ulp: float,
    ratio: float,
) -> Tensor:
    """Return x[n+1]; take low, v and r to n+1 and ``largest`` to its magnitude, in place."""
    x_next, constants = torch.empty_like(x), (scale, gamma, -1 / gamma, ulp, 1 / ulp, ratio)
    bits = largest.view(torch.int32)
    _launch(_advance, x, low, v, r, y, x_next, bits, *constants, x.numel(), r is not None, BLOCK)
    return x_next


def retreat(x: Tensor, low: Tensor, v: Tensor, ulp: float, ratio: float) -> Tensor:
    """Return x[n]; take low to n in place."""
    x_before = torch.empty_like(x)
    _launch(_retreat, x, low, v, x_before, ulp, 1 / ulp, ratio, x.numel(), BLOCK)
    return x_before


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
    x_ptr, low_ptr, v_ptr, r_ptr, y_ptr, out_ptr, largest_ptr,
    scale: tl.float64, gamma: tl.float64, inverse: tl.float64,
    ulp: tl.float64, per_ulp: tl.float64, ratio: tl.float64, size,
    has_r: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, inside = _place(size, block)
    x, v, y = _load(x_ptr, at, inside), _load(v_ptr, at, inside), _load(y_ptr, at, inside)
    if has_r:
        r = _load(r_ptr, at, inside)
        v += _round(r * _double(inverse))
        r += _round(v * _double(gamma))
        v += _round(r * _double(inverse))
        tl.store(r_ptr + at, v.to(r_ptr.dtype.element_ty), mask=inside)
        v = r
    v += _round((y - x) * _double(scale))
    _store(v_ptr, at, v, inside)
    x = x + _load(low_ptr, at, inside) * _double(ulp) + _round(v * _double(ratio)) * _double(ulp)
    out = _pack(out_ptr, low_ptr, at, x, per_ulp, inside)
    # The bits of a magnitude grow with it, and NaN's are above all.
    size, size_v = _bits(out), _bits((v * _double(ulp)).to(tl.float32))
    most = _find_largest(size, size_v, inside)
    if most >= INFINITE:
        tl.atomic_max(largest_ptr + 1, most)
        most = _find_largest(_if_finite(size), _if_finite(size_v), inside)
    tl.atomic_max(largest_ptr, most)


@triton.jit
def _retreat(
    x_ptr, low_ptr, v_ptr, out_ptr,
    ulp: tl.float64, per_ulp: tl.float64, ratio: tl.float64, size, block: tl.constexpr,
):  # fmt: skip
    at, inside = _place(size, block)
    x = _load(x_ptr, at, inside) + _load(low_ptr, at, inside) * _double(ulp)
    x -= _round(_load(v_ptr, at, inside) * _double(ratio)) * _double(ulp)
    _pack(out_ptr, low_ptr, at, x, per_ulp, inside)


@triton.jit
def _undo(
    x_ptr, v_ptr, r_ptr, y_ptr,
    scale: tl.float64, gamma: tl.float64, inverse: tl.float64, size,
    has_r: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at, inside = _place(size, block)
    v = _load(v_ptr, at, inside)
    v -= _round((_load(y_ptr, at, inside) - _load(x_ptr, at, inside)) * _double(scale))
    if has_r:
        r = _load(r_ptr, at, inside)
        r -= _round(v * _double(inverse))
        v -= _round(r * _double(gamma))
        r -= _round(v * _double(inverse))
        tl.store(r_ptr + at, v.to(r_ptr.dtype.element_ty), mask=inside)
        v = r
    _store(v_ptr, at, v, inside)


@triton.jit
def _place(size, block: tl.constexpr):
    """Return where this program's elements are, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return at, at < size


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside).to(tl.float64)


@triton.jit
def _store(pointer, at, v, inside):
    """Store integers in double precision as the pointer's type, within its range."""
    if pointer.dtype.element_ty == tl.int32:
        v = tl.minimum(tl.maximum(v, -2147483648.0), 2147483647.0)
    tl.store(pointer + at, v.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _pack(x_ptr, low_ptr, at, x, per_ulp, inside):
    """Store x as the nearest float and a byte; that float."""
    nearest = x.to(tl.float32)
    low = (x - nearest.to(tl.float64)) * _double(per_ulp)
    tl.store(x_ptr + at, nearest, mask=inside)
    low = tl.minimum(tl.maximum(low, -128.0), 127.0)
    tl.store(low_ptr + at, low.to(tl.int8), mask=inside)
    return nearest


@triton.jit
def _double(constant):
    """Return the number in double precision; Triton's interpreter would round it to single."""
    return tl.full([], constant, tl.float64)


@triton.jit
def _bits(x):
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _if_finite(bits):
    return tl.where(bits < INFINITE, bits, 0)


@triton.jit
def _find_largest(bits, others, inside):
    return tl.reduce(tl.where(inside, _larger(bits, others), 0), 0, _larger)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _round(t):
    """Round to the nearest integer, to the even one of two; NaN and infinities stay."""
    low = tl.floor(t)
    above = t - low
    is_odd = low - 2 * tl.floor(low * 0.5) == 1
    return tl.where((above > 0.5) | ((above == 0.5) & is_odd), low + 1, low)
