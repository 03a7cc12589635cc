"""How many images go through the network at once, so that a batch fits the memory.

What is alive at a given moment of a training step is linear in the number of images, and the peak
is the highest of all moments: a curve of straight pieces. The batch that the optimiser sees never
changes: it is split into micro-batches whose gradients add up. All functions here are pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of the images."""

    fixed_bytes: int
    bytes_per_image: int  # at least 1

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> Self:
        """Return the line through two ``(images, bytes)``, in whole bytes and never below them.

        >>> Line.through((1, 110), (3, 130))
        Line(fixed_bytes=100, bytes_per_image=10)
        """
        (few, low), (many, high) = sorted((first, second))
        slope = max(1, math.ceil((high - low) / (many - few)))
        return cls(max(0, low - slope * few), slope)

    def at(self, batch: int) -> int:
        """Return the bytes of ``batch`` images."""
        return self.fixed_bytes + self.bytes_per_image * batch

    def largest_batch(self, budget_bytes: int) -> int:
        """Return the most images that take at most ``budget_bytes``; 0 where not even one fits."""
        return max(0, (budget_bytes - self.fixed_bytes) // self.bytes_per_image)


@dataclass(frozen=True, slots=True)
class Curve:
    """Peak bytes of a training step as a function of its images: the highest of some lines."""

    lines: tuple[Line, ...]

    @classmethod
    def through(cls, first: tuple[int, Sequence[int]], second: tuple[int, Sequence[int]]) -> Self:
        """Return the curve of a step from two ``(images, bytes at each of its moments)``.

        >>> curve = Curve.through((2, [100, 40]), (4, [100, 80]))
        >>> curve.at(3), curve.at(6), curve.largest_batch(200)
        (101, 120, 10)
        """
        (few, low), (many, high) = first, second
        if len(low) != len(high):  # other operations for another size, so moments cannot be matched
            low, high = [max(low)], [max(high)]
        fixed: dict[int, int] = {}
        for pair in set(zip(low, high, strict=True)):
            line = Line.through((few, pair[0]), (many, pair[1]))
            fixed[line.bytes_per_image] = max(line.fixed_bytes, fixed.get(line.bytes_per_image, 0))
        return cls(tuple(Line(fixed[slope], slope) for slope in sorted(fixed)))

    @property
    def bytes_per_image(self) -> int:
        """What one image more takes where there are many."""
        return max(line.bytes_per_image for line in self.lines)

    def at(self, batch: int) -> int:
        """Return the peak bytes of ``batch`` images."""
        return max(line.at(batch) for line in self.lines)

    def largest_batch(self, budget_bytes: int) -> int:
        """Return the most images whose peak is at most ``budget_bytes``; 0 if not even one fits."""
        return min(line.largest_batch(budget_bytes) for line in self.lines)


@dataclass(frozen=True, slots=True)
class StaticBytes:
    """What training holds whatever the batch is."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    ema: int = 0  # the average of the weights

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.optimizer + self.ema


# Splitting


def count_steps(count: int, batch_size: int) -> int:
    """Return how many batches an epoch of ``count`` images has.

    A single image left over joins the batch before, as BatchNorm may not be able to take it alone.

    >>> count_steps(9, 4), count_steps(10, 4), count_steps(3, 1), count_steps(1, 4)
    (2, 3, 3, 1)
    """
    left_alone = count > batch_size > 1 and count % batch_size == 1
    return math.ceil(count / batch_size) - left_alone


def split_evenly(batch: int, micro_batch: int) -> tuple[int, ...]:
    """Return ``batch`` images in even parts of at most ``micro_batch``, larger ones first.

    Of an odd batch in pairs, one part has three, so that none has one.

    >>> split_evenly(64, 24), split_evenly(5, 2)
    ((22, 21, 21), (3, 2))
    """
    steps = math.ceil(batch / micro_batch)
    if micro_batch > 1:
        steps = min(steps, max(1, batch // 2))
    size, larger = divmod(batch, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def largest_part(count: int, batch_size: int, micro_batch: int) -> int:
    """Return the images of the largest micro-batch in an epoch of ``count`` images."""
    steps = count_steps(count, batch_size)
    last = count - (steps - 1) * batch_size
    batches = {last, batch_size} if steps > 1 else {last}
    return max(split_evenly(batch, micro_batch)[0] for batch in batches)
