"""Loops over the elements of arrays, which Numba compiles when it first meets their types."""

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit

_njit = partial(njit, nogil=True, error_model="numpy")


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``loop`` as machine code, which is kept for later processes.

    No product is fused into a sum, as ``fastmath`` is off. Numba keeps the code beside the source
    or, where that cannot be written, in the user's cache; it compiles anew when the file changes.
    """
    try:
        compiled: Callable[..., Any] = _njit(cache=True)(loop)
    except RuntimeError:  # neither can be written
        compiled = _njit(loop)
    return compiled
