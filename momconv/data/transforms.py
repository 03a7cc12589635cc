"""From a decoded image to the tensor that a network sees.

The evaluation transform equals the preset that came with the weights (``weights.transforms()``) bit
for bit, given the same Preprocessing.
"""

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import InterpolationMode, ToTensor, v2

from momconv.zoo.description import Preprocessing

_SMALLEST_SCALE = 0.35  # of the image's area in a random crop; 0.08 is for training from scratch
_TINY = 64  # pixels; images of CIFAR's kind are shifted rather than cropped
_SHIFT = 4  # pixels


def evaluation_transform(p: Preprocessing) -> v2.Compose:
    """The centre crop of ``p.resolution`` pixels, after the shorter side is made ``p.resize``."""
    return v2.Compose([_resize(p), v2.CenterCrop(p.resolution), *_to_normalised_tensor(p)])


def training_transform(p: Preprocessing, *, flip: bool = True) -> v2.Compose:
    """A random crop, mirrored half of the time if ``flip``."""
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([*_random_crop(p), *mirror, *_to_normalised_tensor(p)])


def _random_crop(p: Preprocessing) -> list[v2.Transform]:
    if p.resolution <= _TINY:
        return [_resize(p), v2.RandomCrop(p.resolution, padding=_SHIFT)]
    mode = InterpolationMode(p.interpolation)
    scale = (_SMALLEST_SCALE, 1.0)
    return [v2.RandomResizedCrop(p.resolution, scale, interpolation=mode, antialias=True)]


def _resize(p: Preprocessing) -> v2.Transform:
    return v2.Resize(p.resize, InterpolationMode(p.interpolation), antialias=True)


def _to_normalised_tensor(p: Preprocessing) -> list[Callable[..., Tensor]]:
    # ToTensor divides by 255, as presets do; v2.ToDtype multiplies by 1/255: not the same.
    return [ToTensor(), v2.Normalize(p.mean, p.std)]
