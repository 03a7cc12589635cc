"""What a run was trained and validated on, as numbers that can be kept and compared."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from momconv.data.inspection import Inspection, count_converted
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
    digests = (
        (split, inspection.images.classes[label], sha256)
        for split, inspection in (("train", train), ("val", val))
        for label, sha256 in zip(inspection.images.labels, inspection.sha256s(), strict=True)
    )
    return DataReport(
        fingerprint=fingerprint(digests),
        train=_describe(train),
        val=_describe(val),
        duplicates=tuple((encode_name(ours), encode_name(theirs)) for ours, theirs in duplicates),
        notes=tuple(notes),
    )


def fingerprint(files: Iterable[tuple[str, str, str]]) -> str:
    """Return the SHA-256 of each file's split, class and SHA-256, whatever their order."""
    return hashlib.sha256("\0\0".join(sorted(map("\0".join, files))).encode()).hexdigest()


def _describe(inspection: Inspection) -> SplitReport:
    names = [str(sample.path) for sample in inspection.images.samples]
    findings = inspection.findings.select(names)
    stored = Counter[str]()
    for kind, number in findings.count_kinds():
        stored[kind.stored] += number
    width, height = findings.sizes.T.tolist()
    return SplitReport(
        folder=encode_name(inspection.images.root),
        images=len(names),
        classes=inspection.images.counts(),
        stored=dict(sorted(stored.items())),
        converted=dict(sorted(count_converted(findings).items())),
        width=_range(width),
        height=_range(height),
        unreadable={encode_name(path): reason for path, reason in inspection.unreadable().items()},
    )


def _range(values: Sequence[int]) -> tuple[float, float, float] | None:
    return (min(values), statistics.median(values), max(values)) if values else None
