"""What is black and what is white in images whose values are not 8-bit, alike in a whole data set.

Instruments record reflectance from 0 to 1, metres above the sea or 12 of 16 bits. An image cannot
tell its own scale: with one of its own each, the same value would be bright here and dark there. So
the values of the training images together give one range for integers and one for floating-point
values, which the model file keeps. One odd pixel must not set it, nor one that means "no data".
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from momconv.words import plural, printable
from momconv.zoo.description import ValueRange, ValueRanges, attach, describe

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["integers", "floats"]

# The shares of an image's values that are at most the quantiles that are kept of them.
_TAIL = (0, 1e-6, 1e-5, 1e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
_SHARES = np.array([*_TAIL, 0.5, *(1 - share for share in reversed(_TAIL))])
_WEIGHTS = np.gradient(_SHARES)
_MOST_VALUES = 2**22  # of an image that are looked at
_ODD = 0.01  # share of all values at either end that may be anything
_REACH = 2  # values so many times the others' spread away from them do not count
_USUAL = (1.0, 255.0)  # what floating-point values often are at most
_USED = 0.25  # share of such a range that values must fill
_LEVELS = 8  # the range of a number of bits is taken if its 8th part is filled
# What often stands for "no data" where no range of the other values comes near.
_NO_DATA = (-999, -9999, -99999, -32768, -32767, 32767, 65535, -(2**31), 2**31 - 1, 2**32 - 1)
_DISTINCT = 16  # so many different values are measured ones, no labels of classes
_BLOCK = 2**20  # values that are scaled at a time


@dataclass(frozen=True, slots=True)
class Values:
    """The values of one image, without those that stand for no data.

    Attributes:
        kind: What they are.
        count: Their number.
        quantiles: From the least to the greatest; none where there are no values.
    """

    kind: Kind
    count: int
    quantiles: tuple[float, ...]


def summarise(values: "NDArray[Any]", no_data: float | None = None) -> Values:
    """Return the quantiles of ``values``, in which ``no_data`` stands for none."""
    kind: Kind = "floats" if values.dtype.kind == "f" else "integers"
    some = values.ravel()[:: math.ceil(values.size / _MOST_VALUES) or 1].astype(np.float64)
    some = _drop_no_data(some[np.isfinite(some) & (some != no_data)])
    if not some.size:
        return Values(kind, 0, ())
    quantiles = np.quantile(some, _SHARES, method="nearest")
    return Values(kind, values.size, tuple(quantiles.tolist()))


def find_ranges(images: Iterable[Values]) -> ValueRanges:
    """Return what is black and white in all ``images``, each of which counts the same."""
    kinds: dict[Kind, list[Values]] = {"integers": [], "floats": []}
    for values in images:
        if values.quantiles:
            kinds[values.kind].append(values)
    integers, floats = kinds["integers"], kinds["floats"]
    return ValueRanges(
        integers=_find_range(integers) if integers else None,
        floats=_find_range(floats) if floats else None,
    )


def guess_range(values: Values) -> ValueRange:
    """Return the usual range that holds the ``values`` of an image, or their own.

    This is for a network that keeps no range for them.
    """
    if not values.quantiles:
        return 0.0, 1.0
    low, high = np.interp((_ODD, 1 - _ODD), _SHARES, values.quantiles)
    usual = _USUAL if values.kind == "floats" else (65535.0,)
    top = next((top for top in usual if low >= 0 and high <= top), None)
    return _find_range([values]) if top is None else (0.0, top)


def to_eight_bits(
    values: "NDArray[Any]", bounds: ValueRange, no_data: float | None = None
) -> tuple["NDArray[np.uint8]", int]:
    """Return ``values`` with the range ``bounds`` on 0…255, and how many of them lie outside.

    What is not a number or stands for no data becomes black.
    """
    low, high = bounds
    scaled, outside = np.empty(values.shape, np.uint8), 0
    rows = max(1, _BLOCK * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            block = values[start : start + rows].astype(np.float64)
        block[block == no_data] = np.nan
        inside = block.clip(low, high)
        outside += int(((inside != block) & np.isfinite(block)).sum())
        levels = (inside - low) / (high - low) * 255
        scaled[start : start + rows] = np.nan_to_num(levels).round()
    return scaled, outside


def count_outside(values: Values, bounds: ValueRange) -> int:
    """Return about how many of the ``values`` of an image are outside of ``bounds``."""
    low, high = bounds
    if not values.quantiles or (values.quantiles[0] >= low and values.quantiles[-1] <= high):
        return 0
    points = np.array(values.quantiles)
    return max(1, round(float(_WEIGHTS[(points < low) | (points > high)].sum()) * values.count))


def settle_ranges(model: nn.Module, found: ValueRanges) -> tuple[str, ...]:
    """Let ``model`` know what is black and white in new images, and return a line on that, if any.

    A range that it was trained with before is kept if it holds the one that was ``found`` in these
    images, and this is an eighth of it at least.
    """
    if found == ValueRanges():
        return ()
    description = describe(model)
    preprocessing = description.preprocessing
    before = preprocessing.ranges
    ranges = ValueRanges(
        integers=_keep_fitting(before.integers, found.integers),
        floats=_keep_fitting(before.floats, found.floats),
    )
    attach(model, replace(description, preprocessing=replace(preprocessing, ranges=ranges)))
    origin = "as the network has learned it" if ranges == before else "by all training images"
    return (f"note: values that are not 8-bit, {origin}: {describe_ranges(ranges)}",)


def describe_ranges(ranges: ValueRanges) -> str:
    """Return what is black and white, in words; empty where all is as in 8-bit images."""
    named = {"integers": ranges.integers, "floating-point values": ranges.floats}
    return ", ".join(
        f"{name} from {bounds[0]:g} (black) to {bounds[1]:g} (white)"
        for name, bounds in named.items()
        if bounds
    )


def warn_of_values(
    outside: Mapping[Path, int], guessed: Collection[Path], *, approximate: bool = False
) -> tuple[str, ...]:
    """Return lines on pixels ``outside`` of a network's range, and images without one."""
    lines = []
    if outside:
        count = plural(sum(outside.values()), "value")
        about = "about " if approximate and sum(outside.values()) > 1 else ""
        lines.append(
            f"note: {about}{count} in {plural(len(outside), 'image')} outside of the network's "
            f"range of values became black or white, such as in {printable(min(outside))}"
        )
    if guessed:
        lines.append(
            f"warning: the network knows no range for the values of "
            f"{plural(len(guessed), 'image')}, such as {printable(min(guessed))}: each is taken to "
            "be 0 to 1, 0 to 255 or 16-bit, or has a range of its own where it is none of these, so"
            " that equal values need not look equal; fine-tuning finds and keeps one"
        )
    return tuple(lines)


def _drop_no_data(values: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return ``values`` without a least or greatest one that nothing comes near."""
    for extreme in (np.min, np.max, np.min):
        if not values.size:
            break
        end = extreme(values)
        others = values[values != end]
        if others.size and _is_no_data(float(end), others):
            values = others
    return values


def _is_no_data(end: float, others: "NDArray[np.float64]") -> bool:
    """Return whether ``end``, below or above all ``others``, stands for no data."""
    low, high = float(others.min()), float(others.max())
    gap, spread = max(low - end, end - high), high - low
    if end in _NO_DATA and gap >= spread / 2:
        return True
    if len(np.unique(others[:: math.ceil(others.size / 10_000)])) <= _DISTINCT:
        return False  # a drawing, a mask
    negative = end < 0 <= low and -end >= high / 2
    return negative or abs(end) > 10 * max(abs(low), abs(high))


def _find_range(images: Sequence[Values]) -> ValueRange:
    points = np.array([values.quantiles for values in images]).ravel()
    weights = np.tile(_WEIGHTS, len(images))
    order = points.argsort()
    shares = weights[order].cumsum() / weights.sum()
    low, high = (float(points[order][shares.searchsorted(s)]) for s in (_ODD, 1 - _ODD))
    reach = _REACH * (high - low) if high > low else math.inf
    near = points[(points >= low - reach) & (points <= high + reach)]
    bottom, top = float(near.min()), float(near.max())
    if images[0].kind == "integers":
        return _fit_bits(low, bottom, top) or _round(bottom, top)
    usual = (t for t in _USUAL if low >= 0 and _USED * t <= high <= t)
    return next(((0.0, top) for top in usual), None) or _round(bottom, top)


def _fit_bits(low: float, bottom: float, top: float) -> ValueRange | None:
    """Return the range of the fewest bits that hold ``top``; None where few are used."""
    if low < 0 or top > 2**32:
        return None
    greatest = 2.0 ** max(8, math.ceil(math.log2(top + 1))) - 1
    return (0.0, greatest) if top - max(0.0, bottom) >= greatest / _LEVELS else None


def _round(bottom: float, top: float) -> ValueRange:
    """Return ``bottom`` to ``top`` in few digits, from 0 where that costs less than half."""
    if 0 <= bottom < top / 2:
        bottom = 0.0
    if top == bottom:
        return bottom, bottom + (abs(bottom) or 1.0)
    digits = 1 - math.floor(math.log10(top - bottom))
    step = 10.0**-digits
    return round(math.floor(bottom / step) * step, digits), round(
        math.ceil(top / step) * step, digits
    )


def _keep_fitting(before: ValueRange | None, found: ValueRange | None) -> ValueRange | None:
    if before is None or found is None:
        return found or before
    spread = before[1] - before[0]
    holds = before[0] <= found[0] and found[1] <= before[1]
    return before if holds and found[1] - found[0] >= spread / _LEVELS else found
