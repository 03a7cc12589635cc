"""The steps of kernels.py as one loop each, which Numba compiles when it first meets their types.

Nothing is defined here either: for every input the bits are those of ``step`` and ``unstep``. The
compiler fuses no product into a sum, as ``fastmath`` is off.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from momconv.machine_code import compiled

_SHARE = 2**16  # elements; fewer are not worth another thread

_threads = ThreadPoolExecutor(thread_name_prefix="momconv")


def advance(
    x: Tensor,
    low: Tensor | None,
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
    x_next = torch.empty_like(x)
    constants = (scale, gamma, -1 / gamma, ulp, 1 / ulp, ratio)
    magnitudes = _run(_advance, (x, low, v, r, y, x_next), constants)
    bits = largest.numpy().view(f"i{largest.itemsize}")
    for finite, other in magnitudes:
        bits[:] = max(bits[0], finite), max(bits[1], other)
    return x_next


def retreat(x: Tensor, low: Tensor | None, v: Tensor, ulp: float, ratio: float) -> Tensor:
    """Return x[n]; take low to n in place."""
    x_before = torch.empty_like(x)
    _run(_retreat, (x, low, v, x_before), (ulp, 1 / ulp, ratio))
    return x_before


def undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float) -> None:
    """Take v and r from n+1 to n in place, where x is x[n] and y = block(x[n])."""
    _run(_undo, (x, v, r, y), (scale, gamma, -1 / gamma))


def _run(
    loop: Callable[..., Any], tensors: Sequence[Tensor | None], constants: Sequence[float]
) -> list[Any]:
    """Call ``loop`` on the tensors' memory, in a part for each thread; what it returns for each."""
    arrays = [None if t is None else _flatten(t) for t in tensors]
    size = arrays[0].size if arrays[0] is not None else 0
    # PyTorch's own threads keep their cores busy for a while after each operation: with as many
    # again, a step took longer on two cores than with one.
    threads = max(1, torch.get_num_threads() // 2)
    share = max(_SHARE, math.ceil(size / threads))
    parts = [_cut(arrays, start, share) for start in range(0, size, share)]
    futures = [_threads.submit(loop, *part, *constants) for part in parts[1:]]
    first_results = [loop(*part, *constants) for part in parts[:1]]  # none of an empty batch
    return [*first_results, *(future.result() for future in futures)]


def _flatten(x: Tensor) -> np.ndarray:
    """Return the memory of x; NumPy has no bfloat16, whose bits become integers."""
    flat = x.as_strided((x.numel(),), (1,))
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def _cut(arrays: Sequence[np.ndarray | None], start: int, size: int) -> list[np.ndarray | None]:
    return [None if array is None else array[start : start + size] for array in arrays]


def _read(y: Any, i: int) -> Any:
    """Return y[i]; where y has bfloat16's bits, they are the upper half of a float's."""
    raise NotImplementedError  # outside compiled loops


@overload(_read)
def _compile_read(y, i):
    if y.dtype == types.uint16:
        return lambda y, i: np.uint32(y[i] << 16).view(np.float32)
    return lambda y, i: y[i]


def _magnitude(x: Any, value: Any) -> Any:
    """Return the bits of |value| in x's precision, which grow with it; NaN's are above all.

    Unlike floats, compilers compare them many at once: their largest does not depend on the order.
    """
    raise NotImplementedError  # outside compiled loops


@overload(_magnitude)
def _compile_magnitude(x, value):
    if x.dtype == types.float32:
        return lambda x, value: np.float32(abs(value)).view(np.int32)
    return lambda x, value: np.float64(abs(value)).view(np.int64)


def _pack(x: Any, low: Any, i: int, value: Any, ulp: float, per_ulp: float) -> None:
    """Write a double into x[i] and low[i]."""
    raise NotImplementedError  # outside compiled loops


@overload(_pack)
def _compile_pack(x, low, i, value, ulp, per_ulp):
    if isinstance(low, types.NoneType):

        def pack(x, low, i, value, ulp, per_ulp):
            x[i] = value
    else:

        def pack(x, low, i, value, ulp, per_ulp):
            nearest = np.float32(value)
            x[i] = nearest
            low[i] = np.int8(min(max((value - nearest) * per_ulp, -128.0), 127.0))

    return pack


def _unpack(x: Any, low: Any, i: int, ulp: float) -> Any:
    """Return the double that x[i] and low[i] hold."""
    raise NotImplementedError  # outside compiled loops


@overload(_unpack)
def _compile_unpack(x, low, i, ulp):
    if isinstance(low, types.NoneType):
        return lambda x, low, i, ulp: x[i]
    return lambda x, low, i, ulp: np.float64(x[i]) + low[i] * ulp


def _put(v: Any, i: int, value: Any) -> None:
    """Write an integer in double precision into v[i]."""
    raise NotImplementedError  # outside compiled loops


@overload(_put)
def _compile_put(v, i, value):
    if v.dtype == types.float64:

        def put(v, i, value):
            v[i] = value
    else:

        def put(v, i, value):
            v[i] = np.int32(min(max(value, -2147483648.0), 2147483647.0))

    return put


@compiled
def _advance(x, low, v, r, y, x_next, scale, gamma, inverse, ulp, per_ulp, ratio):
    nothing, beyond = _magnitude(x, 0.0), _magnitude(x, np.inf)
    finite = most = nothing
    for i in range(x.size):
        v_next = np.float64(v[i])
        if r is not None:
            kept = np.float64(r[i])
            rest = v_next + np.rint(kept * inverse)
            v_next = kept + np.rint(rest * gamma)
            r[i] = rest + np.rint(v_next * inverse)
        v_next += np.rint((np.float64(_read(y, i)) - np.float64(x[i])) * scale)
        now = _unpack(x, low, i, ulp) + np.rint(v_next * ratio) * ulp
        _put(v, i, v_next)
        _pack(x_next, low, i, now, ulp, per_ulp)
        size, size_v = _magnitude(x, now), _magnitude(x, v_next * ulp)
        most = max(most, max(size, size_v))
        size, size_v = size if size < beyond else nothing, size_v if size_v < beyond else nothing
        finite = max(finite, max(size, size_v))
    return finite, most if most >= beyond else nothing


@compiled
def _retreat(x, low, v, x_before, ulp, per_ulp, ratio):
    for i in range(x.size):
        before = _unpack(x, low, i, ulp) - np.rint(v[i] * ratio) * ulp
        _pack(x_before, low, i, before, ulp, per_ulp)


@compiled
def _undo(x, v, r, y, scale, gamma, inverse):
    for i in range(x.size):
        v_now = np.float64(v[i]) - np.rint((np.float64(_read(y, i)) - np.float64(x[i])) * scale)
        if r is not None:
            rest = np.float64(r[i]) - np.rint(v_now * inverse)
            kept = v_now - np.rint(rest * gamma)
            v_now = rest - np.rint(kept * inverse)
            r[i] = kept
        _put(v, i, v_now)
