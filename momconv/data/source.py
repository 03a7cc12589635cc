"""Labelled images, wherever they are: listed, opened and identified through one interface.

A folder is the first implementation (folder.py). Whatever else lists, opens and identifies images
can be trained on, evaluated on and predicted like one.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from momconv.data.splits import hold_out
from momconv.errors import DataError, UsageError
from momconv.words import describe_classes, list_some, name_some, plural, printable

Unknown = Literal["error", "skip"]  # what to do with a class that the other side does not have
Listing = tuple[dict[str, list[Path]], tuple[str, ...]]  # images by class, and notes on the others
_FEW = 5  # images of a class, below which a warning is due
_SHOWN = 5  # names in a message


@runtime_checkable
class Source(Protocol):
    """Where images are. What a path stands for is the source's own affair.

    Processes that read images get a copy of it, so what it has open must be opened again there.
    """

    @property
    def root(self) -> Path:
        """What all paths begin with: the name of the source, by which findings are remembered."""

    def list(self) -> Listing:
        """Return the images of each class that has any, and notes on what was passed over.

        The paths and their order are the same each time, unless images come or go.

        Raises:
            DataError: There are none.
        """

    def read(self, path: Path) -> bytes:
        """Return the bytes of an image, as they would be in a file.

        Raises:
            UnreadableImage: They cannot be read.
        """

    def identify(self, path: Path) -> tuple[int, ...] | None:
        """Return what changes whenever the bytes of an image do; None where nothing tells."""


# Images to train on, and to validate on; None: some of the former.
Sources = tuple[Source, Source | None]


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
        classes: In the order of their numbers; None: those of the source, as listed.
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


def to_image_set(images: ImageSet | Source, classes: Sequence[str] | None) -> ImageSet:
    """Return ``images``; those of a source with the numbers of ``classes``.

    Raises:
        DataError: As ``read_classes``.
    """
    return read_classes(images, classes) if isinstance(images, Source) else images


def to_sources(source: Source | tuple[Source, Source]) -> Sources:
    """Return where to train and where to validate; None: on a part of the former.

    Raises:
        UsageError: It is no source.
    """
    train, val = source if isinstance(source, tuple) else (source, None)
    for one in (train, val):
        if not (one is None or isinstance(one, Source)):
            raise UsageError(
                f"source= is a {type(one).__name__}, which is no source of images\n"
                "it needs root, list, read and identify, as in momconv.data.source.Source",
                kind="usage.bad_source",
            )
    return train, val


def read_splits(
    sources: Sources, *, val_frac: float = 0.2, seed: int = 0, unknown: Unknown = "error"
) -> Splits:
    """Return the images of the ``sources``; see ``divide``.

    Raises:
        DataError: There are none, they have fewer than two classes, or validation has a class that
            training does not and that must not be skipped.
        ValueError: A path does not begin with the root of its source.
    """
    train, val = sources
    training = read_classes(train)
    if len(training.classes) < 2:
        raise DataError(
            f"found 1 class in {printable(train.root)}: {printable(training.classes[0])}\n"
            "training needs at least 2",
            kind="data.too_few_classes",
        )
    owner = train.root.name
    held_out = read_classes(val, training.classes, owner=owner, unknown=unknown) if val else None
    for images in (training, held_out or training):
        _require_below(images)
    return divide(training, held_out, val_frac=val_frac, seed=seed)


def divide(training: ImageSet, held_out: ImageSet | None, *, val_frac: float, seed: int) -> Splits:
    """Return what to train on and what to validate on: the images that are ``held_out``.

    Where there are none, these are ``val_frac`` of each class (see ``hold_out``).
    """
    if held_out is None:
        train, val = map(training.select, hold_out(training.labels, val_frac, seed))
        how = f"holding out {val_frac:.0%} per class (seed {seed})" if val_frac else "none held out"
        note = (
            f"note: no val/ folder; {how}: {len(train.samples)} train / {len(val.samples)} val. "
            "Change it with --val-frac or --val-dir."
        )
        return Splits(train, val, (note, *training.notes, *_warn_of_few(train)))
    chosen = f"note: training on {_described(training)}, validating on {_described(held_out)}"
    notes = (chosen, *training.notes, *held_out.notes, *_warn_of_few(training))
    return Splits(training, held_out, notes)


def _require_below(images: ImageSet) -> None:
    above = f"{images.root}{os.sep}"
    for path in images.paths:
        if not str(path).startswith(above):
            raise ValueError(f"the path {path} must begin with its source's root, {images.root}")


def _described(images: ImageSet) -> str:
    return f"{printable(images.root)} ({plural(len(images.samples), 'image')})"


def _warn_of_few(train: ImageSet) -> tuple[str, ...]:
    few = [f"{printable(name)} ({n})" for name, n in train.counts().items() if n < _FEW]
    if not few:
        return ()
    what = f"fewer than {_FEW} training images"
    which = ", ".join(list_some(few, _SHOWN))
    return (f"warning: {plural(len(few), 'class')} with {what}: {which}",)


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
