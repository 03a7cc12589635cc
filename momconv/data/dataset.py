"""Image files as datasets for a DataLoader.

A worker process cannot hand over an UnreadableImage: PyTorch turns it into a RuntimeError with the
text of a traceback. The datasets therefore remember, in memory that all processes share, which file
failed, and ``read_batches`` raises the error that names it.
"""

import hashlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from momconv.data.decoding import Picture, UnreadableImage, blame, decode_bytes, read_bytes
from momconv.data.source import ImageSet
from momconv.data.transforms import Transform
from momconv.errors import ResourceError
from momconv.zoo.description import ValueRanges

_NONE = -1
_NO_RANGES = ValueRanges()
_SHARED_MEMORY = Path("/dev/shm")  # where processes hand over tensors, on Linux
_ALMOST_NOTHING = 2**20  # bytes of free space
_BATCHES_ON_THE_WAY = 2  # of a process, as DataLoader has it
_MOST_WORKERS = {"cpu": 8, "cuda": 32}  # for a network there
_IMAGES_PER_WORKER = 32  # fewer are read before a process has started


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """The transformed images of an ``ImageSet`` with their labels.

    With a ``seed``, a random transform of an image depends only on (seed, epoch, index): neither on
    the number of workers nor on the order, and the global random state stays as it was. Without,
    transforms draw from the global random state. ``ranges`` are those of the network for values
    that are not 8-bit.
    """

    def __init__(
        self,
        image_set: ImageSet,
        transform: Transform,
        *,
        seed: int | None,
        ranges: ValueRanges = _NO_RANGES,
    ) -> None:
        self.source = image_set.source
        self.paths = image_set.paths
        self.labels = image_set.labels
        self.transform = transform
        self.seed = seed
        self.ranges = ranges
        self._epoch = _shared(0)  # so that persistent workers see it change
        self._failed = _shared(_NONE)

    def __len__(self) -> int:
        return len(self.paths)

    def set_epoch(self, epoch: int) -> None:
        """Draw the random transforms of ``epoch`` from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self._prepare(index), self.labels[index]
        except UnreadableImage:
            if get_worker_info():
                self._failed.fill_(index)
            raise

    def _prepare(self, index: int) -> Tensor:
        if self.seed is None:
            return self._read(index)
        # Only the CPU's generator: torch.manual_seed and fork_rng would go through the GPUs' too.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(_mix(self.seed, int(self._epoch), index))
        try:
            return self._read(index)
        finally:
            generator.set_state(before)

    def _read(self, index: int) -> Tensor:
        path, read = self.paths[index], self.source.read
        return prepare(path, self.transform, self.ranges, read)[0]

    def raise_failure(self) -> None:
        """Raise the error of the file that a worker could not prepare, once, if there is one.

        Raises:
            UnreadableImage: There is.
        """
        index = int(self._failed)
        if index != _NONE:
            self._failed.fill_(_NONE)
            self._prepare(index)
            raise UnreadableImage(self.paths[index], "could not be read")  # but is back now


def prepare(
    path: Path,
    transform: Transform,
    ranges: ValueRanges,
    read: Callable[[Path], bytes] = read_bytes,
) -> tuple[Tensor, Picture]:
    """Return the transformed image in ``path``, and what it was before.

    ``ranges`` is as for ``decode``.

    Raises:
        UnreadableImage: It cannot be decoded, or transformed.
    """
    picture = decode_bytes(read(path), path, ranges)
    try:
        return transform(picture.image), picture
    except RuntimeError:  # PyTorch's, which are about the process
        raise
    except Exception as error:
        raise blame(path, error) from error


def make_loader(dataset: Dataset[Any], *, workers: int, **options: Any) -> "DataLoader[Any]":
    """Return a loader that leaves the global random state alone, and Ctrl-C to its parent."""
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
        **options,
    )


def count_workers(images: int, device: torch.device) -> int:
    """Return how many processes should read so many images: one processor is left to the network.

    A network on a CPU needs more of them, and is not faster than a few can read.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(_MOST_WORKERS[device.type], cores - 1, images // _IMAGES_PER_WORKER)


def count_workers_that_fit(workers: int, batch_bytes: int) -> int:
    """Return how many of the processes can hand over batches of that size in shared memory.

    Each has two on the way, and one is in use.
    """
    if not _SHARED_MEMORY.is_dir():
        return workers
    batches = shutil.disk_usage(_SHARED_MEMORY).free // batch_bytes
    return max(0, min(workers, (batches - 1) // _BATCHES_ON_THE_WAY))


def read_batches(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Yield the batches of a loader of ``LabelledImages``.

    Raises:
        UnreadableImage: a file cannot be decoded, whichever process found out.
        ResourceError: a process was killed, or there is no shared memory left.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except (MemoryError, RuntimeError) as error:
        _explain_death(iterator, error)
        # The traceback holds the loader's iterator. Without it the workers stop at once; as cyclic
        # garbage, of which this frame may become a part, it cannot tell them to.
        traceback.clear_frames(error.__traceback__)
        del iterator
        dataset = loader.dataset
        if isinstance(dataset, LabelledImages):
            dataset.raise_failure()
        raise


def end_workers(loader: "DataLoader[Any]") -> None:
    """End the processes that read for ``loader``, if they wait for more.

    As part of cyclic garbage, such as of an exception, the loader does not tell them to end, and
    the program waits for them when it ends.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None


def _explain_death(iterator: object, error: Exception) -> None:
    """Raise what a reading process died of, if it did; DataLoader says it in a long text only."""
    codes = {process.exitcode for process in getattr(iterator, "_workers", ())}
    if -signal.SIGBUS in codes or _is_full(_SHARED_MEMORY):
        raise ResourceError(
            f"no shared memory left for the processes that read images: {_SHARED_MEMORY} is full",
            kind="memory.shared",
            fix="--workers 0\ndocker run --shm-size=8g …",
        ) from error
    if -signal.SIGKILL in codes:
        raise ResourceError(
            "a process that reads images was killed, as happens where memory runs out",
            kind="memory.killed",
            fix="--workers 0",
        ) from error
    if died := codes - {0, None}:
        raise ResourceError(
            f"a process that reads images ended by itself, with code {min(died)}",
            kind="run.lost_reader",
            fix="--workers 0",
        ) from error


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < _ALMOST_NOTHING


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Work on, in a worker process that a terminal signals too, until the parent is done.

    A second SIGTERM ends the worker, as it ends the parent: else one that the parent lost track of
    would keep it from ending.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def _shared(number: int) -> Tensor:
    """Return a number that worker processes and their parent see and set."""
    shared: Tensor = torch.tensor(number).share_memory_()
    return shared


def _mix(*numbers: int) -> int:
    """Return a seed that differs for all different ``numbers`` and is the same on every machine."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little")
