"""The images that a conversion is compared with its original on, with labels where they fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from momconv.data.calibration_images import CalibrationImages, choose
from momconv.data.folder import ImageSet, find_evaluation_set, list_images
from momconv.errors import DataError
from momconv.words import plural
from momconv.zoo.description import Description


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
        """The batches; they can be read again and again.

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
    """At most ``count`` images of ``folder``, or of its validation split, a random choice.

    Raises:
        DataError: The folder is missing or holds no image.
    """
    found = _find(folder, description.classes)
    fits = found is not None and len(found.classes) == description.num_classes
    found = found or _find(folder)
    if found is not None:
        paths, labels = [sample.path for sample in found.samples], found.labels
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
    """The images of a folder of classes, such as ``classes``; None if it is none."""
    try:
        return find_evaluation_set(folder, classes)
    except DataError:
        return None
