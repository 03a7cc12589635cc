"""Tensors of a byte a value (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization).

Each block of 256 values has a scale, its largest magnitude. A byte stands for one of 256 numbers
from -1 or 0 to 1, which lie the closer together the smaller they are, times that scale. Numbers,
blocks and scales are those of bitsandbytes and torchao.optim, but that the last block of a tensor
may be shorter. Values are in the order in which the parameter's lie in memory.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # values with one scale
SMALLEST = 4096  # values; smaller tensors keep single precision, as in those libraries
LEAST_SCALE = 1e-12

_DECADES = 7  # powers of ten among the numbers


def state_bytes(count: int) -> int:
    """Return the bytes that a state of so many values takes.

    >>> state_bytes(4095), state_bytes(4096), state_bytes(4097)
    (16380, 4160, 4165)
    """
    return 4 * count if count < SMALLEST else count + 4 * count_blocks(count)


def count_blocks(count: int) -> int:
    """Return the blocks of so many values."""
    return math.ceil(count / BLOCK)


@cache
def numbers(*, signed: bool) -> Tensor:
    """Return what the bytes stand for, in ascending order.

    Beside 0 and 1, these are in each power of ten evenly twice as many as in the one below.
    """
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = 10 ** (decade + 1 - _DECADES) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles.tolist(), *(-middles[: len(middles) * signed]).tolist()]
    return torch.tensor(sorted(found))


@cache
def borders(*, signed: bool) -> Tensor:
    """Return from where on each byte but the first stands for a value.

    It is the nearest, except that no second moment becomes 0: the step that divides by its root
    would have no bound.
    """
    values = numbers(signed=signed)
    between = (values[:-1] + values[1:]) / 2
    if not signed:
        between[0] = 0
    return between


@dataclass(frozen=True, slots=True)
class Blocks:
    """A state of a byte a value.

    Attributes:
        codes: The bytes, flat.
        scales: One for each block.
        signed: Whether values may be negative.
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    def read(self, start: int, stop: int) -> Tensor:
        """Return some of the values, from the beginning of a block on."""
        values = numbers(signed=self.signed).to(self.codes.device)
        return values[self.codes[start:stop].int()] * self._spread(start, stop)

    def write(self, start: int, values: Tensor) -> None:
        """Let values from the beginning of a block on be the nearest to these that there are."""
        stop = start + len(values)
        rows = F.pad(values.abs(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
        first = start // BLOCK
        self.scales[first : first + len(rows)] = rows.amax(1).clamp_(min=LEAST_SCALE)
        limits = borders(signed=self.signed).to(values.device)
        nearest = torch.bucketize(values / self._spread(start, stop), limits, right=True)
        self.codes[start:stop] = nearest.to(torch.uint8)

    def _spread(self, start: int, stop: int) -> Tensor:
        scales = self.scales[start // BLOCK : math.ceil(stop / BLOCK)]
        return scales.repeat_interleave(BLOCK)[: stop - start]
