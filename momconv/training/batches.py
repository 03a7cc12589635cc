"""Which images make up each optimisation step, and each micro-batch of a step.

The order depends on the seed and the epoch alone, so that a run can go on in the middle of an
epoch, on another machine, as if nothing had happened.
"""

import itertools
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from momconv.data.shuffling import shuffle
from momconv.planner.micro_batch import count_steps, split_evenly


def split_epoch(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The images 0 … count − 1, shuffled, in batches of ``batch_size``; the last may be smaller.

    >>> [len(batch) for batch in split_epoch(9, 4, seed=0, epoch=0)]
    [4, 5]
    """
    return split_order(shuffle(range(count), f"{seed} {epoch}"), batch_size)


def split_order(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """The images of an epoch in batches of ``batch_size``; the last may be smaller.

    A single image left over joins the batch before, as BatchNorm may not be able to take it alone.
    """
    count = len(order)
    starts = list(range(0, count, batch_size))
    del starts[count_steps(count, batch_size) :]
    return [list(order[i:j]) for i, j in itertools.pairwise([*starts, count])]


def split_batch(
    batch: Sequence[int], micro_batch: int, *, largest: int | None = None
) -> list[list[int]]:
    """``batch`` in even parts of at most ``micro_batch`` images.

    If it is the share of a process, and ``largest`` the images of the largest share, which has one
    more at most, it has as many parts as that one.

    >>> split_batch([5, 3, 8, 1, 2], 4), split_batch([5, 3, 8, 1, 2], 2)
    ([[5, 3, 8], [1, 2]], [[5, 3, 8], [1, 2]])
    >>> split_batch([5, 3, 8], 2), split_batch([5, 3, 8], 2, largest=4)
    ([[5, 3, 8]], [[5, 3], [8]])
    """
    if not batch:
        return []
    parts = len(split_evenly(largest or len(batch), micro_batch))
    size, larger = divmod(len(batch), parts)
    rest = iter(batch)
    return [list(itertools.islice(rest, size + (part < larger))) for part in range(parts)]


class MicroBatches(Sampler[list[int]]):
    """The micro-batches of the steps in ``steps``, which changes from epoch to epoch."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.chain.from_iterable(self.steps)
