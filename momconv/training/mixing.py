"""Mixup and CutMix over an optimisation batch, however it is split into micro-batches.

torchvision's transforms pair each image with the one before it in the batch, the first with the
last, and draw one weight or one box for the whole batch. Here a batch comes in parts. Each is mixed
with the image before it in front, so the parts together are exactly the mixed batch: what a step
learns does not depend on the micro-batch. The numbers depend on seed, epoch and step alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from momconv.recipe import TrainRecipe

Part = tuple[Tensor, Tensor]  # the images and labels of a micro-batch


class Mixer:
    """Mixes the steps of a run; without mixup and CutMix it passes them through."""

    def __init__(self, recipe: TrainRecipe, num_classes: int) -> None:
        kinds = [(v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)]
        self._transforms = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a]
        self._seed = recipe.seed

    def extend(self, parts: Sequence[Sequence[int]], *, before: int) -> list[list[int]]:
        """The images to read for ``parts`` of a batch, in which ``before`` is in front of them."""
        if not (parts and self._transforms):
            return [list(part) for part in parts]
        first, *rest = map(list, parts)
        return [[before, *first], *rest]

    def mix(self, parts: Iterator[Part], *, epoch: int, step: int) -> Iterator[Part]:
        """The ``parts`` of a step as :meth:`extend` had them read, mixed.

        Labels become probabilities of the classes.
        """
        if not self._transforms:
            return parts
        return map(_Mixing(partial(self._draw, epoch=epoch, step=step)), parts)

    def _draw(self, images: Tensor, *, epoch: int, step: int) -> tuple[Any, dict[str, Any]]:
        """A transform, and the numbers that it draws for a batch."""
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
