"""The images that a conversion is calibrated on: a random sample of a folder, labels unused."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from momconv.data.dataset import Transform
from momconv.data.decoding import decode
from momconv.data.folder import list_images
from momconv.data.transforms import evaluation_transform
from momconv.errors import DataError
from momconv.zoo.description import Preprocessing

_BATCH = 250  # images
_PIXELS = 64 * 224**2  # of a batch, which bounds its memory: 1.3 GB of activations in a ResNet-152


def choose_images(folder: Path, count: int, seed: int) -> list[Path]:
    """At most ``count`` of the images anywhere below ``folder``, a random choice of all of them.

    Raises:
        DataError: The folder is missing or holds no image.
    """
    # Only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(seed).random
    return sorted(list_images(folder), key=lambda _: draw())[:count]


class CalibrationImages:
    """Files as batches of one size, preprocessed as for evaluation.

    Attributes:
        paths: The files.
        unreadable: What was wrong with those that had to be left out, known after the iteration.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.paths = paths
        self.unreadable: list[str] = []
        self._transform = evaluation_transform(preprocessing)
        largest = max(1, min(_BATCH, _PIXELS // preprocessing.resolution**2))
        self._batches = math.ceil(len(paths) / largest)
        self._progress = progress

    def __iter__(self) -> Iterator[Tensor]:
        """The batches; ``progress`` hears how many files are done.

        Raises:
            DataError: No file can be read.
        """
        self.unreadable = []
        load = partial(_load, transform=self._transform)
        with ThreadPoolExecutor() as pool:
            for start, stop in self._bounds():
                results = list(pool.map(load, self.paths[start:stop]))
                self.unreadable += [r.message for r in results if isinstance(r, DataError)]
                if images := [r for r in results if isinstance(r, Tensor)]:
                    yield torch.stack(images)
                if self._progress:
                    self._progress(stop)
        if len(self.unreadable) == len(self.paths):
            raise DataError(
                f"none of {len(self.paths)} images can be read\n{self.unreadable[0]}",
                kind="data.unreadable_image",
                fix="name another folder with --calibrate",
            )

    def _bounds(self) -> list[tuple[int, int]]:
        """Where each batch starts and stops, such that all are of one size, or one less."""
        ends = [len(self.paths) * n // self._batches for n in range(self._batches + 1)]
        return list(pairwise(ends))


def _load(path: Path, transform: Transform) -> Tensor | DataError:
    try:
        return transform(decode(path))
    except DataError as error:
        return error
