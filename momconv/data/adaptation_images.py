"""The images that a conversion is adapted on, and those on which its effect is measured."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from momconv.data.calibration_images import CalibrationImages, choose, choose_images
from momconv.data.folder import find_evaluation_set, list_images
from momconv.data.source import ImageSet
from momconv.errors import DataError
from momconv.words import plural, printable
from momconv.zoo.description import Description

_HELD_OUT = 5  # one image in so many
_MOST_HELD_OUT = 500
_RANDOM = 8  # images of noise
_LARGEST = 112  # pixels of their side: a self-test is as good on small ones, and much faster


@dataclass(frozen=True, slots=True)
class AdaptationImages:
    """What there is to work with.

    Attributes:
        adapting: Images to calibrate and distil on; None without a folder of them.
        measuring: Batches of other images, or pairs with labels, which may be read repeatedly.
        origin: What the images to measure on are, for people.
        is_noise: Whether they are no pictures at all.
        more: Whether the folder to adapt on may hold more images.
        note: What is to be known about their classes.
    """

    adapting: CalibrationImages | None
    measuring: Iterable[Tensor | tuple[Tensor, Tensor]]
    origin: str
    is_noise: bool = False
    more: bool = False
    note: str | None = None


def gather_images(
    adapting: Path | None, measuring: Path | None, description: Description, count: int, seed: int
) -> AdaptationImages:
    """Return a random choice of at most ``count`` images from either folder.

    Without a folder to measure on, a fifth of the others is held out for that, and without any
    folder it is a little noise.

    Raises:
        DataError: A folder is missing or holds no image.
    """
    preprocessing = description.preprocessing
    files = choose_images(adapting, count, seed) if adapting else []
    more = len(files) == count
    if measuring:
        images = CalibrationImages(files, preprocessing) if files else None
        found = find_verification_images(measuring, description, count, seed)
        origin = f"from {printable(measuring)}"
        return AdaptationImages(images, found, origin, more=more, note=found.note)
    if adapting is None:
        side = min(preprocessing.resolution, _LARGEST)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(_RANDOM, 3, side, side, generator=generator)
        return AdaptationImages(None, [noise], "of noise", is_noise=True)
    held_out = min(_MOST_HELD_OUT, len(files) // _HELD_OUT)
    images = CalibrationImages(files[held_out:], preprocessing)
    if not held_out:
        return AdaptationImages(images, images, "that it was calibrated on", more=more)
    others = CalibrationImages(files[:held_out], preprocessing)
    return AdaptationImages(images, others, f"held out of {printable(adapting)}", more=more)


@dataclass(frozen=True, slots=True)
class VerificationImages:
    """Files as batches of images or, with labels, of pairs.

    Attributes:
        images: The files as batches.
        labels: The number of each file's class in the network; None if the folder has others.
        note: Why there are no labels, or what they were taken for.
    """

    images: CalibrationImages
    labels: Mapping[Path, int] | None
    note: str | None

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yield the batches, the same each time.

        Raises:
            DataError: No file can be read.
        """
        for images, paths in self.images.read():
            if self.labels is None:
                yield images
            else:
                yield images, torch.tensor([self.labels[path] for path in paths])


def find_verification_images(
    folder: Path, description: Description, count: int, seed: int
) -> VerificationImages:
    """Return a random choice of at most ``count`` images of ``folder`` or its validation split.

    Raises:
        DataError: The folder is missing or holds no image.
    """
    found = _find(folder, description.classes)
    fits = found is not None and len(found.classes) == description.num_classes
    found = found or _find(folder)
    if found is not None:
        paths, labels = found.paths, found.labels
    else:
        paths, labels = list_images(folder), []
    note = None
    if not fits:
        note = (
            f"the classes in {folder} are not the {description.num_classes} of the network, so the "
            "networks are only compared with each other"
        )
    elif description.classes is None:
        count_of_classes = plural(description.num_classes, "class")
        note = f"the network names no classes; taking the {count_of_classes} of {folder} in order"
    chosen = choose(paths, count, seed)
    return VerificationImages(
        CalibrationImages(chosen, description.preprocessing),
        dict(zip(paths, labels, strict=True)) if fits else None,
        note,
    )


def _find(folder: Path, classes: tuple[str, ...] | None = None) -> ImageSet | None:
    """Return the images of a folder of classes, such as ``classes``; None if it is none."""
    try:
        return find_evaluation_set(folder, classes)
    except DataError:
        return None
