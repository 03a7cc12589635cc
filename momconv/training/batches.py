"""Which images make up each optimisation step, and each micro-batch of a step; how they are mixed.

The order depends on the seed and the epoch alone, so that a run can go on in the middle of an
epoch, on another machine, as if nothing had happened.
"""

import bisect
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms import v2

from momconv.data.source import ImageSet
from momconv.data.splits import shuffle
from momconv.data.transforms import ERASED
from momconv.planner.micro_batch import count_steps, split_evenly
from momconv.recipe import DataRecipe, Recipe, TrainRecipe

Part = tuple[Tensor, Tensor]  # the images and labels of a micro-batch

_BETA = 0.999  # 1 / (1 − β) images say all that there is to say about a class
_UNEQUAL = 3  # times as many images in the largest class as in the smallest


def split_epoch(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return the images 0 … count − 1, shuffled, in batches; the last may be smaller.

    >>> [len(batch) for batch in split_epoch(9, 4, seed=0, epoch=0)]
    [4, 5]
    """
    return split_order(shuffle(range(count), f"{seed} {epoch}"), batch_size)


def split_order(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the images of an epoch in batches of ``batch_size``; the last may be smaller.

    A single image left over joins the batch before, as BatchNorm may not be able to take it alone.
    """
    count = len(order)
    starts = list(range(0, count, batch_size))
    del starts[count_steps(count, batch_size) :]
    return [list(order[i:j]) for i, j in itertools.pairwise([*starts, count])]


def split_batch(
    batch: Sequence[int], micro_batch: int, *, largest: int | None = None
) -> list[list[int]]:
    """Return ``batch`` in even parts of at most ``micro_batch`` images.

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


def are_bytes(recipe: Recipe) -> bool:
    """Return whether images are bytes until the network takes them: none is mixed or erased."""
    train, data = recipe.train, recipe.data
    return not (train.mixup or train.cutmix or data.augment in ERASED)


class MicroBatches(Sampler[list[int]]):
    """The micro-batches of the steps in ``steps``, which changes from epoch to epoch."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.chain.from_iterable(self.steps)


class Mixer:
    """Mixes the steps of a run by mixup and CutMix; without them it passes steps through.

    torchvision's transforms pair each image with the one before it in the batch, the first with the
    last, and draw one weight or one box for the whole batch. Here a batch comes in parts. Each is
    mixed with the image before it in front, so the parts together are exactly the mixed batch: what
    a step learns does not depend on the micro-batch, and the numbers on seed, epoch and step alone.
    """

    def __init__(self, recipe: TrainRecipe, num_classes: int) -> None:
        kinds = [(v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)]
        self._transforms = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a]
        self._seed = recipe.seed

    def extend(self, parts: Sequence[Sequence[int]], *, before: int) -> list[list[int]]:
        """Return the images to read for ``parts`` of a batch, of which ``before`` is in front."""
        if not (parts and self._transforms):
            return [list(part) for part in parts]
        first, *rest = map(list, parts)
        return [[before, *first], *rest]

    def mix(self, parts: Iterator[Part], *, epoch: int, step: int) -> Iterator[Part]:
        """Return the ``parts`` of a step as :meth:`extend` had them read, mixed.

        Labels become probabilities of the classes.
        """
        if not self._transforms:
            return parts
        return map(_Mixing(partial(self._draw, epoch=epoch, step=step)), parts)

    def _draw(self, images: Tensor, *, epoch: int, step: int) -> tuple[Any, dict[str, Any]]:
        """Return a transform, and the numbers that it draws for a batch."""
        text = f"mix {self._seed} {epoch} {step}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            chosen = int(torch.randint(len(self._transforms), ()))
            transform = self._transforms[chosen]
            return transform, transform.make_params([images])


class _Mixing:
    """Mixes the parts of one step in turn; of a part before, it keeps the last image alone."""

    def __init__(self, draw: Callable[[Tensor], tuple[Any, dict[str, Any]]]) -> None:
        self._draw = draw
        self._before: Part | None = None

    def __call__(self, part: Part) -> Part:
        images, labels = part
        if self._before is None:
            self._transform, self._drawn = self._draw(images)
        else:
            images, labels = map(torch.cat, zip(self._before, part, strict=True))
        self._before = images[-1:].clone(), labels[-1:].clone()
        params = {"labels": labels, "batch_size": len(labels)} | self._drawn
        mix = self._transform.transform
        return mix(images, params)[1:], mix(labels, params)[1:]


def weigh_classes(counts: Sequence[int]) -> list[float]:
    """Return a weight for each class by its effective number (Cui et al. 2019), of mean 1.

    Few images weigh in inverse proportion to their number; far beyond 1 / (1 − β), all the same.

    >>> [round(weight, 2) for weight in weigh_classes([30, 10, 0]) + weigh_classes([10, 10])]
    [0.67, 1.99, 0.0, 1.0, 1.0]
    """
    raw = [(1 - _BETA) / (1 - _BETA**count) if count else 0.0 for count in counts]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in raw]


def weigh_images(images: ImageSet) -> list[float]:
    """Return the weight of each image, that of its class."""
    weights = weigh_classes(list(images.counts().values()))
    return [weights[label] for label in images.labels]


def repeat(images: ImageSet) -> ImageSet:
    """Return ``images`` as often as :func:`draw` may draw one: i + k n is the k-th repetition.

    A number of its own gives each repetition an augmentation of its own.
    """
    times = math.floor(max(weigh_images(images)) + 1e-6) + 1
    return images.select(itertools.chain.from_iterable([range(len(images.samples))] * times))


def draw(weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Return as many numbers of images as there are ``weights``, drawn by these.

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
    """Return what to tell of classes of unequal size, if they are or something is done about it."""
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
