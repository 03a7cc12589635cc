"""Which images are held out for validation, and random orders: the same on every machine."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from momconv.errors import UsageError

T = TypeVar("T")


def hold_out(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices to train on and the indices to validate on, both ascending.

    Each class gives ``fraction`` of its images, rounded, but at least one if it has two, and never
    its last one. With ``fraction`` 0 nothing is held out. The choice depends only on the arguments:
    it is the same on every machine, and adding images to one class leaves the others as they were.

    >>> hold_out([0, 0, 0, 0, 1, 1, 2], 0.25, seed=0)
    ([0, 1, 2, 5, 6], [3, 4])

    Raises:
        UsageError: ``fraction`` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(
            f"cannot hold out {fraction:g} of the images for validation: not in [0, 1)",
            kind="usage.bad_value",
            fix="--val-frac 0.2",
        )
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    held_out = [
        index
        for label, indices in members.items()
        for index in shuffle(indices, f"{seed} {label}")[: _share(len(indices), fraction)]
    ]
    return sorted(set(range(len(labels))).difference(held_out)), sorted(held_out)


def _share(count: int, fraction: float) -> int:
    if fraction == 0:
        return 0
    return min(max(int(count * fraction + 0.5), 1), count - 1)


def shuffle(items: Iterable[T], seed: int | str) -> list[T]:
    """Return ``items`` in a random order that depends on the ``seed`` alone.

    >>> shuffle("abcde", seed=0), shuffle("abcde", seed="0")
    (['d', 'c', 'e', 'b', 'a'], ['e', 'a', 'c', 'b', 'd'])
    """
    # Only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(seed).random
    return sorted(items, key=lambda _: draw())
