"""How many images go through the network at once, so that a batch fits the memory.

Activation memory is linear in the number of images, so two measured batches give the line

    peak = fixed + slope · images

and the largest micro-batch under a limit. The batch that the optimiser sees never changes: it is
split into micro-batches whose gradients add up. All functions here are pure.
"""

import math
from dataclasses import dataclass
from typing import Self

from momconv.errors import ResourceError
from momconv.units import format_bytes

_GRID = 32  # pixels; the resolutions that classification networks divide evenly


@dataclass(frozen=True, slots=True)
class Line:
    """Peak bytes of one training step as a function of its images."""

    fixed_bytes: int
    bytes_per_image: int  # at least 1

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int]) -> Self:
        """The line through two ``(images, peak bytes)``, in whole bytes and never below them.

        >>> Line.through((1, 110), (3, 130))
        Line(fixed_bytes=100, bytes_per_image=10)
        """
        (few, low), (many, high) = sorted((first, second))
        slope = max(1, math.ceil((high - low) / (many - few)))
        return cls(max(0, low - slope * few), slope)

    def at(self, batch: int) -> int:
        """The peak bytes of ``batch`` images."""
        return self.fixed_bytes + self.bytes_per_image * batch

    def largest_batch(self, budget_bytes: int) -> int:
        """The most images whose peak is at most ``budget_bytes``; 0 where not even one fits."""
        return max(0, (budget_bytes - self.fixed_bytes) // self.bytes_per_image)


@dataclass(frozen=True, slots=True)
class StaticBytes:
    """What training holds whatever the batch is."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """A batch in parts that fit the memory."""

    sizes: tuple[int, ...]  # images of each micro-batch, larger ones first
    peak_bytes: int  # predicted, with everything in StaticBytes

    @property
    def steps(self) -> int:
        """The micro-batches whose gradients are added before one step of the optimiser."""
        return len(self.sizes)


def choose_micro_batch(
    line: Line, static: StaticBytes, limit_bytes: int, batch_size: int, *, resolution: int
) -> MicroBatchPlan:
    """The fewest, evenly filled micro-batches that keep ``batch_size`` images under the limit.

    ``resolution`` is the one that ``line`` was measured at; it only serves the advice that an
    error gives.

    >>> nothing = StaticBytes(weights=0, gradients=0, optimizer=0)
    >>> choose_micro_batch(Line(0, 10), nothing, 240, batch_size=64, resolution=224).sizes
    (22, 21, 21)

    Raises:
        ResourceError: Not even one image fits.
    """
    largest = line.largest_batch(limit_bytes - static.total)
    if largest == 0:
        raise _does_not_fit(line, static, limit_bytes, resolution)
    sizes = split_evenly(batch_size, math.ceil(batch_size / largest))
    return MicroBatchPlan(sizes, static.total + line.at(sizes[0]))


def split_evenly(batch_size: int, steps: int) -> tuple[int, ...]:
    """``batch_size`` images in so many parts that differ by at most one, larger ones first."""
    size, larger = divmod(batch_size, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def _does_not_fit(
    line: Line, static: StaticBytes, limit_bytes: int, resolution: int
) -> ResourceError:
    needed = static.total + line.at(1)
    parts = {
        "weights": static.weights,
        "gradients": static.gradients,
        "optimizer": static.optimizer,
        "one image": line.at(1),
    }
    breakdown = " · ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
    more_memory = f"--set train.memory={math.ceil(needed / 2**20)}MiB, if there is as much"
    smaller = _resolution_that_fits(line, limit_bytes - static.total, resolution)
    return ResourceError(
        f"a micro-batch of 1 image does not fit: it needs {format_bytes(needed)}, "
        f"the limit is {format_bytes(limit_bytes)}\n{breakdown}",
        kind="memory.does_not_fit",
        fix=f"--set data.resolution={smaller} (estimated), or {more_memory}"
        if smaller
        else more_memory,
    )


def _resolution_that_fits(line: Line, budget_bytes: int, resolution: int) -> int:
    """The resolution at which one image fits, if an image's bytes follow its area; 0 if none."""
    share = max(0, budget_bytes - line.fixed_bytes) / line.bytes_per_image
    return math.floor(resolution * math.sqrt(share) / _GRID) * _GRID
