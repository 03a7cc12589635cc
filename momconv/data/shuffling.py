"""A random order that depends on its seed alone: the same on every machine."""

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def shuffle(items: Iterable[T], seed: int | str) -> list[T]:
    """``items`` in random order.

    >>> shuffle("abcde", seed=0), shuffle("abcde", seed="0")
    (['d', 'c', 'e', 'b', 'a'], ['e', 'a', 'c', 'b', 'd'])
    """
    # Only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(seed).random
    return sorted(items, key=lambda _: draw())
