"""Looking at every image once, before a long run depends on it."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from momconv.data.examination import Finding, examine_all
from momconv.data.source import ImageSet
from momconv.data.values import count_outside
from momconv.errors import DataError
from momconv.words import describe_classes, itemise, plural, printable
from momconv.zoo.description import ValueRanges
from momconv.zoo.seen import SeenImages

_SHOWN = 5  # unreadable files that a message names


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a set of images.

    Attributes:
        images: Those that can be read.
        findings: What is in each file, readable or not.
        notes: What of that people should know.
    """

    images: ImageSet
    findings: Mapping[Path, Finding]
    notes: tuple[str, ...] = ()

    def unreadable(self) -> dict[Path, str]:
        """Return the files that cannot be decoded, and why."""
        return {path: found.problem for path, found in self.findings.items() if found.problem}


def check_images(
    image_set: ImageSet,
    *,
    max_bad_fraction: float = 0.05,
    every_class: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Decode every image that was not decoded before, and leave out those that cannot be read.

    ``progress`` is called with the number of images done and the number of all.

    Raises:
        DataError: more than ``max_bad_fraction`` of the images cannot be read; or, with
            ``every_class``, none of a class.
    """
    paths = image_set.paths
    findings = examine_all(image_set.source, paths, progress)
    good = [index for index, path in enumerate(paths) if findings[path].problem is None]
    readable = image_set.select(good)
    bad = [f"{printable(p)}: {f.problem}" for p, f in findings.items() if f.problem]
    warnings = _warn_of_bad(bad, len(paths), max_bad_fraction)
    if lost := _find_lost_classes(image_set, readable):
        problem = f"no image can be read of {describe_classes(lost)}"
        if every_class:
            raise _lost(problem, lost[0], bad)
        warnings += (f"warning: {problem}",)
    return Inspection(readable, findings, (*warnings, *_note_converted(findings)))


def find_outside(findings: Mapping[Path, Finding], ranges: ValueRanges) -> dict[Path, int]:
    """Return about how many values of each image are outside of the ``ranges``, where any are."""
    found = {
        path: count_outside(finding.values, bounds)
        for path, finding in findings.items()
        if finding.values and (bounds := getattr(ranges, finding.values.kind))
    }
    return {path: count for path, count in found.items() if count}


def find_guessed(findings: Mapping[Path, Finding], ranges: ValueRanges) -> set[Path]:
    """Return images for whose values there is no range."""
    return {
        path
        for path, finding in findings.items()
        if finding.values and getattr(ranges, finding.values.kind) is None
    }


def find_duplicates(train: Inspection, val: Inspection) -> list[tuple[Path, Path]]:
    """Return each validation image that is a training image too, byte for byte, behind that one."""
    first: dict[str, Path] = {}
    for sample in train.images.samples:
        first.setdefault(train.findings[sample.path].sha256, sample.path)
    return [
        (first[sha256], sample.path)
        for sample in val.images.samples
        if (sha256 := val.findings[sample.path].sha256) in first
    ]


def warn_of_duplicates(duplicates: Sequence[tuple[Path, Path]], validation: int) -> tuple[str, ...]:
    """Return a line on what ``find_duplicates`` found among so many validation images."""
    if not duplicates:
        return ()
    ours, theirs = duplicates[0]
    return (
        f"warning: {len(duplicates)} of {plural(validation, 'validation image')} are training "
        f"images too, byte for byte, such as {printable(theirs)} = {printable(ours)}",
    )


def leave_out_trained_on(
    val: Inspection, duplicates: Collection[Path], seen: SeenImages | None
) -> tuple[Inspection, tuple[str, ...]]:
    """Return the held-out images but for ``duplicates`` of training images and those ``seen``.

    All are kept if nothing else is left. The second part says what was done.
    """
    paths = val.images.paths
    known = (seen or SeenImages()).find(val.findings[path].sha256 for path in paths)
    before = [p for p in paths if val.findings[p].sha256 in known and p not in duplicates]
    left = [n for n, path in enumerate(paths) if path not in {*duplicates, *before}]
    warnings = []
    if before:
        warnings.append(
            f"warning: the network was trained on {len(before)} of "
            f"{plural(len(paths), 'validation image')} before, such as {printable(before[0])}"
        )
    if len(left) == len(paths):
        return val, ()
    if not left:
        warnings.append("warning: so its scores do not say how it does on new images")
        return val, tuple(warnings)
    warnings.append(f"note: validating on the {plural(len(left), 'image')} it is not trained on")
    return replace(val, images=val.images.select(left)), tuple(warnings)


def _find_lost_classes(before: ImageSet, after: ImageSet) -> list[str]:
    left = after.counts()
    return [name for name, n in before.counts().items() if n and not left[name]]


def _lost(problem: str, name: str, bad: Sequence[str]) -> DataError:
    return DataError(
        f"{problem}\n{_shown(bad)}\n"
        f"without the folder {printable(name)}, the others can be trained on",
        kind="data.class_unreadable",
    )


def _warn_of_bad(bad: Sequence[str], total: int, limit: float) -> tuple[str, ...]:
    if not bad:
        return ()
    refuse_many_unreadable(bad, total, limit)
    return (f"warning: {_summarise(bad, total)}\n{_shown(bad)}",)


def refuse_many_unreadable(bad: Sequence[str], total: int, limit: float) -> None:
    """Do nothing if the unreadable images ``bad`` are at most the fraction ``limit`` of ``total``.

    Raises:
        DataError: They are more.
    """
    fraction = len(bad) / total
    if fraction > limit:
        enough = math.ceil(fraction * 20) / 20
        raise DataError(
            f"{_summarise(bad, total)}, more than the accepted {limit:.1%}\n{_shown(bad)}",
            kind="data.too_many_unreadable",
            fix=f"--max-bad-fraction {enough:g}",
        )


def _summarise(bad: Sequence[str], total: int) -> str:
    return f"{len(bad)} of {plural(total, 'image')} unreadable ({len(bad) / total:.1%})"


def _note_converted(findings: Mapping[Path, Finding]) -> tuple[str, ...]:
    converted = Counter(what for finding in findings.values() for what in finding.converted)
    if not converted:
        return ()
    return (
        "note: images converted to 8-bit RGB: "
        + "; ".join(f"{count} {what}" for what, count in sorted(converted.items())),
    )


def _shown(bad: Sequence[str]) -> str:
    return itemise(bad, _SHOWN)
