"""How long a training step takes, about: from what its operations compute, read and write.

The time is taken for a sum: so much for starting each operation, for each floating-point operation
and for each byte that is read or written. What the three are on a device is estimated, or fitted to
two measured steps (speed.py). benchmarks/cost.py compares with measured steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from momconv.vocabulary import Precision

aten = torch.ops.aten
_ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)


@dataclass(frozen=True, slots=True)
class Work:
    """What operations amount to.

    Attributes:
        operations: How many there are, without those that only look at a tensor in another way.
        flops: Multiplications and additions of convolutions, matrix products and attention.
        bytes: That all read and write, at least.
    """

    operations: int = 0
    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.operations + other.operations,
            self.flops + other.flops,
            self.bytes + other.bytes,
        )

    def scale(self, factor: float) -> "Work":
        """Return the same operations on ``factor`` times as many images."""
        return Work(self.operations, self.flops * factor, self.bytes * factor)


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device takes for work, in seconds, and whether that was fitted to measured steps."""

    per_operation: float
    per_flop: float
    per_byte: float
    is_measured: bool = False

    def seconds(self, work: Work) -> float:
        """Return about the time that ``work`` takes."""
        throughput = self.per_flop * work.flops + self.per_byte * work.bytes
        return self.per_operation * work.operations + throughput

    def fit(self, few: tuple[Work, float], many: tuple[Work, float]) -> Self:
        """Return the speed at which two steps with few and many images take the measured seconds.

        Flops and bytes keep their ratio: the steps of a network cannot tell them apart.

        >>> speed = Speed(1, 1, 0).fit((Work(2, 10), 9.0), (Work(2, 20), 14.0))
        >>> speed.per_operation, speed.per_flop, speed.seconds(Work(2, 30))
        (2.0, 0.5, 19.0)
        """
        free = replace(self, per_operation=0)
        (small, less), (large, more) = ((free.seconds(work), s) for work, s in (few, many))
        factor = (more - less) / (large - small)
        start = (less - factor * small) / few[0].operations
        if factor <= 0 or start < 0:  # too close to each other for the clock
            factor, start = more / large, 0.0
        return replace(
            self,
            per_operation=start,
            per_flop=self.per_flop * factor,
            per_byte=self.per_byte * factor,
            is_measured=True,
        )


def estimate_speed(device_type: str, precision: Precision) -> Speed:
    """Return the order of magnitude: a few cores of a server, or a GPU for data centres."""
    if device_type == "cpu":
        return Speed(1e-5, 1 / 60e9, 1 / 10e9)
    return Speed(1e-5, 1 / (20e12 if precision == "fp32" else 200e12), 1 / 1.5e12)


def count_work(func: OpOverload, args: Any, results: Sequence[Tensor]) -> Work:
    """Return what ``func(*args)`` does, which gave ``results``."""
    if func.is_view or func.overloadpacket in _ALLOCATIONS:
        return Work()
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    traffic = sum(t.numel() * t.element_size() for t in (*tensors, *results))
    return Work(1, _count_flops(func, args, results), traffic)


def _count_flops(func: OpOverload, args: Any, results: Sequence[Tensor]) -> int:
    kind = func.overloadpacket
    if kind is aten.convolution:
        return _convolution_flops(args[0], args[1], results[0], transposed=args[6])
    if kind is aten.convolution_backward:
        wanted = sum(map(int, args[-1][:2]))  # of the gradients of images and of weights
        return wanted * _convolution_flops(args[1], args[2], args[0], transposed=args[7])
    if kind is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if kind is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return int(flop_registry[kind](*args, out_val=results[0])) if kind in flop_registry else 0


def _convolution_flops(x: Tensor, weight: Tensor, y: Tensor, *, transposed: bool) -> int:
    """Return a convolution's operations; PyTorch's formula for gradients is wrong for groups."""
    once_a_weight = x if transposed else y
    return 2 * once_a_weight.numel() * weight[0].numel()
