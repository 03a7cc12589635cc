"""What a run was trained and validated on, as numbers that can be kept and compared."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from momconv.data.inspection import Inspection
from momconv.data.source import ImageSet
from momconv.names import encode_name


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split. The numbers are of the images that can be read.

    Attributes:
        folder: Where it lies.
        images: Their number.
        classes: Their number in each class.
        stored: Their number by format and mode in the file, such as ``JPEG RGB``.
        converted: Their number by what had to be converted to get 8-bit RGB.
        width: The least, median and largest width in pixels.
        height: The same of their heights.
        unreadable: Why each of the others cannot be read.
    """

    folder: str
    images: int
    classes: dict[str, int]
    stored: dict[str, int]
    converted: dict[str, int]
    width: tuple[float, float, float] | None
    height: tuple[float, float, float] | None
    unreadable: dict[str, str]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The images of a run.

    Attributes:
        fingerprint: Of every file's bytes, class and split; see ``fingerprint``.
        train: What was trained on.
        val: What was validated on.
        duplicates: Each validation image that is a training image too, behind that one.
        notes: What was told about them.
    """

    fingerprint: str
    train: SplitReport
    val: SplitReport
    duplicates: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def unreadable(self) -> dict[str, str]:
        """Why each image that was left out cannot be read."""
        return self.train.unreadable | self.val.unreadable

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return asdict(self)


def report(
    train: Inspection,
    val: Inspection,
    duplicates: Sequence[tuple[Path, Path]],
    notes: Sequence[str],
) -> DataReport:
    """Return what was found in both splits."""
    digests = [
        (split, name, inspection.findings[path].sha256)
        for split, inspection in (("train", train), ("val", val))
        for path, name in name_classes(inspection.images)
    ]
    return DataReport(
        fingerprint=fingerprint(digests),
        train=_describe(train),
        val=_describe(val),
        duplicates=tuple((encode_name(ours), encode_name(theirs)) for ours, theirs in duplicates),
        notes=tuple(notes),
    )


def name_classes(images: ImageSet) -> list[tuple[Path, str]]:
    """Return every file with the name of its class."""
    return [(sample.path, images.classes[sample.label]) for sample in images.samples]


def fingerprint(files: Iterable[tuple[str, str, str]]) -> str:
    """Return the SHA-256 of each file's split, class and SHA-256, whatever their order."""
    lines = sorted("\0".join(file) for file in files)
    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


def _describe(inspection: Inspection) -> SplitReport:
    findings = [inspection.findings[sample.path] for sample in inspection.images.samples]
    return SplitReport(
        folder=encode_name(inspection.images.root),
        images=len(findings),
        classes=inspection.images.counts(),
        stored=_count(finding.stored for finding in findings),
        converted=_count(what for finding in findings for what in finding.converted),
        width=_range([finding.size[0] for finding in findings]),
        height=_range([finding.size[1] for finding in findings]),
        unreadable={encode_name(path): reason for path, reason in inspection.unreadable().items()},
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _range(values: Sequence[int]) -> tuple[float, float, float] | None:
    return (min(values), statistics.median(values), max(values)) if values else None
