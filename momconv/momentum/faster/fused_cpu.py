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
from numba import njit, types
from numba.extending import overload
from torch import Tensor

_SHARE = 2**16  # elements; fewer are not worth another thread

_threads = ThreadPoolExecutor(thread_name_prefix="momconv")


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
    x_next = torch.empty_like(x)
    magnitudes = _run(_advance, x, (v, r, y, x_next), (scale, gamma, -1 / gamma, ulp))
    bits = largest.numpy().view(f"i{largest.itemsize}")
    bits[()] = max([bits[()], *magnitudes])
    return x_next


def undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float) -> None:
    """Take v and r from n+1 to n in place, where x is x[n] and y = block(x[n])."""
    _run(_undo, x, (v, r, y), (scale, gamma, -1 / gamma))


def _run(
    loop: Callable[..., Any],
    x: Tensor,
    others: Sequence[Tensor | None],
    constants: Sequence[float],
) -> list[Any]:
    """Call ``loop`` on the tensors' memory, in a part for each thread; what it returns for each."""
    first = _flatten(x)
    arrays = [first, *(None if t is None else _flatten(t) for t in others)]
    scalars = [first.dtype.type(constant) for constant in constants]  # or products were double
    # PyTorch's own threads keep their cores busy for a while after each operation: with as many
    # again, a step took longer on two cores than with one.
    threads = max(1, torch.get_num_threads() // 2)
    share = max(_SHARE, math.ceil(first.size / threads))
    parts = [_cut(arrays, start, share) for start in range(0, first.size, share)]
    futures = [_threads.submit(loop, *part, *scalars) for part in parts[1:]]
    first_results = [loop(*part, *scalars) for part in parts[:1]]  # none of an empty batch
    return [*first_results, *(future.result() for future in futures)]


def _flatten(x: Tensor) -> np.ndarray:
    """The memory of x; NumPy has no bfloat16, whose bits become integers."""
    flat = x.as_strided((x.numel(),), (1,))
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def _cut(arrays: Sequence[np.ndarray | None], start: int, size: int) -> list[np.ndarray | None]:
    return [None if array is None else array[start : start + size] for array in arrays]


def _read(y: Any, i: int) -> Any:
    """y[i], in single precision where y has bfloat16's bits: the upper half of a float's."""
    raise NotImplementedError  # outside compiled loops


@overload(_read)
def _compile_read(y, i):
    if y.dtype == types.uint16:
        return lambda y, i: np.uint32(y[i] << 16).view(np.float32)
    return lambda y, i: y[i]


def _magnitude(x: Any) -> Any:
    """The bits of |x|, which grow with it; those of NaN are above all others.

    Unlike floats, compilers compare them many at once: their largest does not depend on the order.
    """
    raise NotImplementedError  # outside compiled loops


@overload(_magnitude)
def _compile_magnitude(x):
    if x == types.float32:
        return lambda x: np.float32(abs(x)).view(np.int32)
    return lambda x: np.float64(abs(x)).view(np.int64)


@njit(nogil=True, error_model="numpy")
def _advance(x, v, r, y, x_next, scale, gamma, inverse, ulp):
    largest = _magnitude(v.dtype.type(0))
    for i in range(x.size):
        v_next = v[i]
        if r is not None:
            kept = v.dtype.type(r[i])
            rest = v_next + np.rint(kept * inverse)
            v_next = kept + np.rint(rest * gamma)
            r[i] = rest + np.rint(v_next * inverse)
        v_next += np.rint((_read(y, i) - x[i]) * scale)
        v[i] = v_next
        x_next[i] = x[i] + v_next * ulp
        largest = max(largest, _magnitude(x_next[i]))
    return largest


@njit(nogil=True, error_model="numpy")
def _undo(x, v, r, y, scale, gamma, inverse):
    for i in range(x.size):
        v_now = v[i] - np.rint((_read(y, i) - x[i]) * scale)
        if r is not None:
            rest = v.dtype.type(r[i]) - np.rint(v_now * inverse)
            kept = v_now - np.rint(rest * gamma)
            v_now = rest - np.rint(kept * inverse)
            r[i] = kept
        v[i] = v_now
