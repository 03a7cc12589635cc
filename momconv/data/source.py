"""Labelled images, wherever they are: listed, opened and identified through one interface.

A folder is the first implementation (folder.py). Whatever else lists, opens and identifies images
can be checked, trained on and evaluated on like one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from momconv.errors import DataError
from momconv.words import describe_classes, list_some, name_some, plural, printable

Unknown = Literal["error", "skip"]  # what to do with a class that the other side does not have
Listing = tuple[dict[str, list[Path]], tuple[str, ...]]  # images by class, and notes on the others
_SHOWN = 5  # names in a message


class Source(Protocol):
    """Where images are. What a path stands for is the source's own affair."""

    @property
    def root(self) -> Path:
        """Where all of them are, for messages."""

    def list(self) -> Listing:
        """Return the images of each class that has any, and notes on what was passed over.

        Raises:
            DataError: There are none.
        """

    def read(self, path: Path) -> bytes:
        """Return the bytes of an image.

        Raises:
            UnreadableImage: They cannot be read.
        """

    def identify(self, path: Path) -> tuple[int, ...] | None:
        """Return what changes whenever the bytes of an image do; None where nothing tells."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and the number of its class."""

    path: Path
    label: int


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images of a source with their classes; ``notes`` say what was left out, and why."""

    source: Source
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """Where all of them are, for messages."""
        return self.source.root

    @property
    def paths(self) -> list[Path]:
        """The path of every sample."""
        return [sample.path for sample in self.samples]

    @property
    def labels(self) -> list[int]:
        """The class number of every sample."""
        return [sample.label for sample in self.samples]

    def counts(self) -> dict[str, int]:
        """Return the number of samples of every class, in the order of the classes."""
        count = Counter(self.labels)
        return {name: count[label] for label, name in enumerate(self.classes)}

    def select(self, indices: Iterable[int]) -> "ImageSet":
        """Return the same classes with only the samples at ``indices``."""
        return replace(self, samples=tuple(self.samples[index] for index in indices))


@dataclass(frozen=True, slots=True)
class Splits:
    """What to train on and what to validate on; both have the same classes."""

    train: ImageSet
    val: ImageSet
    notes: tuple[str, ...]
    fingerprint: str | None = None  # of the files' content, once they were read
    unused: tuple[Path, ...] = ()  # images that were found and are in neither

    @property
    def uncovered(self) -> list[str]:
        """The classes of which no image is validated on, if any image is."""
        return [name for name, count in self.val.counts().items() if not count and self.val.samples]


def read_classes(
    source: Source,
    classes: Sequence[str] | None = None,
    *,
    listing: Listing | None = None,
    owner: str = "the model",
    unknown: Unknown = "error",
) -> ImageSet:
    """Return the images of a source with the numbers of their classes.

    Args:
        source: Where they are.
        classes: In the order of their numbers; None: those of the source, by name.
        listing: What the source lists, if that is known.
        owner: Who knows ``classes``, for messages.
        unknown: What to do with a class that is none of them.

    Raises:
        DataError: There are no images, or there is a class that must not be skipped.
    """
    found, notes = listing or source.list()
    names = tuple(found) if classes is None else tuple(classes)
    others = {name: paths for name, paths in found.items() if name not in names}
    found = {name: paths for name, paths in found.items() if name in names}
    if others and (unknown == "error" or not found):
        raise _unknown_classes(source.root, others, owner, may_skip=bool(found))
    if others:
        notes += (f"warning: ignoring {_counted(others, owner)}",)
    if missing := [name for name in names if name not in found]:
        where = f"{printable(source.root)} has no images of {describe_classes(missing)}"
        notes += (f"warning: {where}",)
    number = {name: label for label, name in enumerate(names)}
    samples = (Sample(path, number[name]) for name, paths in found.items() for path in paths)
    return ImageSet(source, names, tuple(samples), notes)


def _unknown_classes(
    root: Path, unknown: Mapping[str, list[Path]], owner: str, *, may_skip: bool
) -> DataError:
    return DataError(
        f"{printable(root.name or root)} has {_counted(unknown, owner)}\nin {printable(root)}; to "
        f"learn it takes training images of {name_some([*unknown], _SHOWN)}",
        kind="data.unknown_class",
        fix="--unknown-classes skip" if may_skip else None,
    )


def _counted(unknown: Mapping[str, list[Path]], owner: str) -> str:
    """Return words such as ``1 class that train does not have: wolf (1 image)``."""
    counted = [f"{printable(n)} ({plural(len(paths), 'image')})" for n, paths in unknown.items()]
    shown = ", ".join(list_some(counted, _SHOWN))
    return f"{plural(len(unknown), 'class')} that {owner} does not have: {shown}"
