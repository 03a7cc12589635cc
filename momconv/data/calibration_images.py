"""The images that a conversion is calibrated on: a random sample of a folder, labels unused."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from momconv.data.dataset import prepare
from momconv.data.decoding import UnreadableImage, read_bytes, read_values
from momconv.data.folder import list_images
from momconv.data.splits import shuffle
from momconv.data.transforms import evaluation_transform
from momconv.data.values import find_ranges
from momconv.errors import DataError
from momconv.zoo.description import Preprocessing, ValueRanges

_BATCH = 250  # images
_PIXELS = 64 * 224**2  # of a batch, which bounds its memory: 1.3 GB of activations in a ResNet-152
_KEPT = 2**28  # bytes of decoded images: 5000 of 64×64


def choose_images(folder: Path, count: int, seed: int) -> list[Path]:
    """Return a random choice of at most ``count`` of the images anywhere below ``folder``.

    Raises:
        DataError: The folder is missing or holds no image.
    """
    return choose(list_images(folder), count, seed)


def choose(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    """Return a random choice of at most ``count`` of ``paths``."""
    return shuffle(paths, seed)[:count]


def find_ranges_of(paths: Sequence[Path]) -> ValueRanges:
    """Return what is black and white in all images of ``paths`` together that are not 8-bit."""
    with ThreadPoolExecutor() as pool:
        return find_ranges(values for values in pool.map(read_values, paths) if values)


class CalibrationImages:
    """Files as batches of one size, preprocessed as for evaluation.

    They can be iterated again and again, and give the same tensors each time, which must not be
    written to. Few or small ones are decoded only once.

    Attributes:
        paths: The files.
        unreadable: Those that had to be left out, known after the iteration.
        outside: How many values of an image are outside of the network's range, where any are.
        guessed: Images for whose values the network knows no range.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        progress: Callable[[int], None] | None = None,
        read: Callable[[Path], bytes] = read_bytes,
    ) -> None:
        self.paths = paths
        self._read_bytes = read
        self.unreadable: list[UnreadableImage] = []
        self.outside: dict[Path, int] = {}
        self.guessed: set[Path] = set()
        self._transform = evaluation_transform(preprocessing)
        self._ranges = preprocessing.ranges
        largest = max(1, min(_BATCH, _PIXELS // preprocessing.resolution**2))
        self._batches = math.ceil(len(paths) / largest)
        self._progress = progress
        self._fits = 3 * 4 * preprocessing.resolution**2 * len(paths) <= _KEPT
        self._kept: list[tuple[Tensor, list[Path]]] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Return the batches; ``progress`` hears how many files are decoded.

        Raises:
            DataError: No file can be read.
        """
        return (images for images, _ in self.read())

    def read(self) -> Iterator[tuple[Tensor, list[Path]]]:
        """Yield the batches, each with the files that its images are from.

        Raises:
            DataError: No file can be read.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for batch in self._decode():
            if self._fits:
                kept.append(batch)
            yield batch
        self._kept = kept if self._fits else None

    def read_sha256s(self) -> Iterator[str]:
        """Yield the SHA-256 of each file that can be read, in hexadecimal."""
        for path in self.paths:
            with suppress(UnreadableImage):
                yield hashlib.sha256(self._read_bytes(path)).hexdigest()

    def _decode(self) -> Iterator[tuple[Tensor, list[Path]]]:
        self.unreadable = []
        with ThreadPoolExecutor() as pool:
            for start, stop in self._bounds():
                results = list(pool.map(self._load, self.paths[start:stop]))
                self.unreadable += [r for r in results if isinstance(r, UnreadableImage)]
                paths = self.paths[start:stop]
                if images := [r for r in results if isinstance(r, Tensor)]:
                    readable = zip(results, paths, strict=True)
                    yield torch.stack(images), [p for r, p in readable if isinstance(r, Tensor)]
                if self._progress:
                    self._progress(stop)
        if len(self.unreadable) == len(self.paths):
            raise DataError(
                f"none of {len(self.paths)} images can be read\n{self.unreadable[0].message}",
                kind="data.unreadable_image",
                fix="name another folder",
            )

    def _bounds(self) -> list[tuple[int, int]]:
        """Return where each batch starts and stops, such that all are of one size, or one less."""
        ends = [len(self.paths) * n // self._batches for n in range(self._batches + 1)]
        return list(pairwise(ends))

    def _load(self, path: Path) -> Tensor | UnreadableImage:
        try:
            tensor, picture = prepare(path, self._transform, self._ranges, self._read_bytes)
        except UnreadableImage as error:
            return error
        if picture.values:
            self.guessed.add(path)
        elif picture.outside:
            self.outside[path] = picture.outside
        return tensor
