"""What is wrong with a pass but need not end it.

Where the blocks' weights are divided among processes, all of them go through a pass together: one
that stopped in the midst of it would leave the others waiting. So it computes on, with values that
are of no use, and what was wrong is told at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from momconv.errors import MomconvError

_postponed: list[list[MomconvError]] = []  # by the contexts that are open; any thread may add


def is_postponing() -> bool:
    """Return whether passes are to end whatever is wrong with them."""
    return bool(_postponed)


def tell_fault(error: MomconvError) -> None:
    """Raise ``error``, or let :func:`postponing` have it."""
    if not _postponed:
        raise error
    _postponed[-1].append(error)


@contextmanager
def postponing() -> Iterator[list[MomconvError]]:
    """Inside, what is told is put into the list instead of being raised."""
    faults: list[MomconvError] = []
    _postponed.append(faults)
    try:
        yield faults
    finally:
        _postponed.pop()
