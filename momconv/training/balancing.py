"""Classes of unequal size: weights for their images, and epochs in which rare ones come up more."""

import bisect
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

from momconv.data.folder import ImageSet
from momconv.recipe import DataRecipe

_BETA = 0.999  # 1 / (1 − β) images say all that there is to say about a class
_UNEQUAL = 3  # times as many images in the largest class as in the smallest


def weigh_classes(counts: Sequence[int]) -> list[float]:
    """A weight for the images of each class, by its effective number (Cui et al. 2019), mean 1.

    Few images weigh in inverse proportion to their number; far beyond 1 / (1 − β), all the same.

    >>> [round(weight, 2) for weight in weigh_classes([30, 10, 0]) + weigh_classes([10, 10])]
    [0.67, 1.99, 0.0, 1.0, 1.0]
    """
    raw = [(1 - _BETA) / (1 - _BETA**count) if count else 0.0 for count in counts]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in raw]


def weigh_images(images: ImageSet) -> list[float]:
    """The weight of each image, that of its class."""
    weights = weigh_classes(list(images.counts().values()))
    return [weights[label] for label in images.labels]


def repeat(images: ImageSet) -> ImageSet:
    """``images`` as often as :func:`draw` may draw one: number i + k n is its k-th repetition.

    A number of its own gives each repetition an augmentation of its own.
    """
    times = math.floor(max(weigh_images(images)) + 1e-6) + 1
    return images.select(itertools.chain.from_iterable([range(len(images.samples))] * times))


def draw(weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """As many numbers of images as there are ``weights``, in random order.

    Each comes up as often as its weight says, rounded up or down at random (systematic sampling).
    """
    count = len(weights)
    number = random.Random(f"balance {seed} {epoch}").random
    order = sorted(range(count), key=lambda _: number())
    sums = list(itertools.accumulate(weights[index] for index in order))
    offset = number()
    places = (
        bisect.bisect(sums, (n + offset) / count * sums[-1], hi=count - 1) for n in range(count)
    )
    drawn, times = [], Counter[int]()
    for index in (order[place] for place in places):
        drawn.append(index + count * times[index])
        times[index] += 1
    return sorted(drawn, key=lambda _: number())


def describe_imbalance(images: ImageSet, recipe: DataRecipe) -> str | None:
    """What to tell about classes of unequal size, if they are or something is done about it."""
    counts = {name: count for name, count in images.counts().items() if count}
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    ratio = counts[largest] / counts[smallest]
    if recipe.balance == "none" and ratio < _UNEQUAL:
        return None
    if ratio == 1:
        return (
            f"note: all classes have {counts[largest]} images, so --balance {recipe.balance} "
            "changes nothing"
        )
    means = {
        "none": "--balance loss or --balance sampler makes up for that",
        "loss": "in the loss, images of small classes weigh more",
        "sampler": "images of small classes come up more often",
    }
    return (
        f"note: {largest} has {counts[largest]} images and {smallest} {counts[smallest]} "
        f"({ratio:.1f}:1); {means[recipe.balance]}"
    )
