"""From a decoded image to the tensor that a network sees.

The evaluation transform equals the preset that came with the weights (``weights.transforms()``) bit
for bit, given the same Preprocessing.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_modes_mapping

from momconv.pixels import normalise
from momconv.zoo.description import Preprocessing

_SMALLEST_SCALE = 0.35  # of the image's area in a random crop; 0.08 is for training from scratch
_TINY = 64  # pixels; images of CIFAR's kind are shifted rather than cropped
_SHIFT = 4  # pixels
_STRIP = 16  # how often the longer side of one has the shorter one in it
ERASED = {"trivial": 0.1, "randaug": 0.25}  # share of the images from which a rectangle is erased

Transform = Callable[[Image.Image], Tensor]
Augmentation = Literal["none", "light", "trivial", "randaug"]


def evaluation_transform(p: Preprocessing) -> v2.Compose:
    """Return the transform: shorter side to ``p.resize``, then centre crop of ``p.resolution``."""
    return v2.Compose([_Resize(p), _CentreCrop(p.resolution), NormalisedTensor(p)])


def training_transform(
    p: Preprocessing,
    *,
    level: Augmentation = "light",
    flip: bool = True,
    as_bytes: bool = False,
) -> v2.Compose:
    """Return what an image goes through in training.

    Args:
        p: As for evaluation.
        level: "none": as in evaluation. "light": a random crop, mirrored half of the time.
            "trivial": TrivialAugment too (Müller and Hutter 2021), and a tenth of the images lose
            a random rectangle, as in torchvision's recipes of 2021. "randaug": RandAugment instead
            (Cubuk et al. 2020; two operations of magnitude 9), and a quarter, as DeiT's recipes.
        flip: Whether to mirror at all.
        as_bytes: Whether it stays bytes, which are not normalised and cannot be erased.
    """
    last = read_pixels if as_bytes else NormalisedTensor(p)
    if level == "none":
        return v2.Compose([_Resize(p), _CentreCrop(p.resolution), last])
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    steps = [*_random_crop(p), *mirror, *_policy(level), last]
    return v2.Compose([*steps, *_erasing(level)])


def read_pixels(image: Image.Image) -> Tensor:
    """Return red, green and blue of an 8-bit RGB image as bytes: shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class _Resize:
    """``v2.Resize``, which takes a while to find that there is nothing to do.

    Of a strip only the middle, all that a network sees of it, is computed: with its shorter side
    made as long as usual, an image of 1 × 40,000 pixels has thousands of millions of them.
    """

    def __init__(self, p: Preprocessing) -> None:
        self._side, self._seen = p.resize, p.resolution
        mode = InterpolationMode(p.interpolation)
        self._resize = v2.Resize(p.resize, mode, antialias=True)
        self._filter = pil_modes_mapping[mode]

    def __call__(self, image: Image.Image) -> Image.Image:
        if max(image.size) > _STRIP * min(image.size):
            return self._resize_middle(image)
        return image if min(image.size) == self._side else self._resize(image)

    def _resize_middle(self, image: Image.Image) -> Image.Image:
        lengths = [self._side * length // min(image.size) for length in image.size]
        kept = [length if length == self._side else self._seen for length in lengths]
        starts = [round((length - part) / 2) for length, part in zip(lengths, kept, strict=True)]
        stops = [start + part for start, part in zip(starts, kept, strict=True)]
        x, y = (size / length for size, length in zip(image.size, lengths, strict=True))
        box = (starts[0] * x, starts[1] * y, stops[0] * x, stops[1] * y)
        return image.resize((kept[0], kept[1]), self._filter, box)


class _CentreCrop:
    """``v2.CenterCrop``, which copies where there is nothing to do."""

    def __init__(self, resolution: int) -> None:
        self._size = (resolution, resolution)
        self._crop = v2.CenterCrop(resolution)

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.size == self._size else self._crop(image)


class NormalisedTensor:
    """``ToTensor`` and ``v2.Normalize`` of an 8-bit RGB image, in a third of their time."""

    def __init__(self, p: Preprocessing) -> None:
        self._mean, self._std = torch.tensor(p.mean), torch.tensor(p.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return red, green and blue, normalised: shape (3, height, width)."""
        return normalise(read_pixels(image), self._mean, self._std)


def _random_crop(p: Preprocessing) -> list[Callable[[Image.Image], Image.Image]]:
    if p.resolution <= _TINY:
        return [_Resize(p), v2.RandomCrop(p.resolution, padding=_SHIFT)]
    mode = InterpolationMode(p.interpolation)
    scale = (_SMALLEST_SCALE, 1.0)
    return [v2.RandomResizedCrop(p.resolution, scale, interpolation=mode, antialias=True)]


def _policy(level: Augmentation) -> list[v2.Transform]:
    mode = InterpolationMode.BILINEAR  # what Pillow resizes with, it may not rotate with
    if level == "trivial":
        return [v2.TrivialAugmentWide(interpolation=mode)]
    return [v2.RandAugment(interpolation=mode)] if level == "randaug" else []


def _erasing(level: Augmentation) -> list[v2.Transform]:
    return [v2.RandomErasing(ERASED[level])] if level in ERASED else []
