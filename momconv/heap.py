"""Where freed memory goes on a CPU.

glibc returns the free end of its heap to the system and, for the next activation, gets it back page
by page, each of them cleared: up to a fifth of a training step, most of it where memory is saved.
What is freed elsewhere stays with the process, in pieces that the next activation may not fit: in
steps of vision transformers, several times what is alive.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The parameters of mallopt.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_NEVER = -1
_LARGEST = 32 * 2**20  # that glibc takes; single tensors above go back to the system as before
_SMALL = 2**16  # tensors that weigh nothing next to the others


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Inside, what is freed stays with this process, for its next tensor; the peak is the same."""
    with _allocating(device, largest=_LARGEST, trim=_NEVER):
        yield


@contextmanager
def returning_freed_memory(device: torch.device) -> Iterator[None]:
    """Inside, what is freed goes back to the system, so that no more is held than is alive."""
    with _allocating(device, largest=_SMALL, trim=_SMALL):
        yield


@contextmanager
def _allocating(device: torch.device, *, largest: int, trim: int) -> Iterator[None]:
    """Inside, tensors up to ``largest`` are on the heap, of which ``trim`` bytes may be free."""
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type != "cpu" or not hasattr(libc, "mallopt"):  # as in musl
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, largest)
    libc.mallopt(_TRIM_THRESHOLD, trim)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)  # what glibc comes to by itself
        libc.malloc_trim(0)
