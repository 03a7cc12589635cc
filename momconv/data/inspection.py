"""Looking at every image once, before a long run depends on it."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from momconv.data.examination import examine_all
from momconv.data.findings import Findings
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
    findings: Findings
    notes: tuple[str, ...] = ()

    def sha256s(self) -> Iterator[str]:
        """Yield the SHA-256 of each of the ``images``."""
        return self.findings.sha256s(self.images.paths)

    def unreadable(self) -> dict[Path, str]:
        """Return the files that cannot be decoded, and why."""
        return _find_unreadable(self.findings)


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
    unreadable = _find_unreadable(findings)
    bad_names = {*map(str, unreadable)}  # as text, by which a million paths are sooner compared
    good = (index for index, path in enumerate(paths) if str(path) not in bad_names)
    readable = image_set.select(good) if unreadable else image_set
    bad = [f"{printable(path)}: {problem}" for path, problem in unreadable.items()]
    warnings = _warn_of_bad(bad, len(paths), max_bad_fraction)
    if lost := _find_lost_classes(image_set, readable):
        problem = f"no image can be read of {describe_classes(lost)}"
        if every_class:
            raise _lost(problem, lost[0], bad)
        warnings += (f"warning: {problem}",)
    return Inspection(readable, findings, (*warnings, *_note_converted(findings)))


def _find_unreadable(findings: Findings) -> dict[Path, str]:
    return {path: str(f.problem) for path, f in findings.where(lambda kind: kind.problem).items()}


def find_outside(findings: Findings, ranges: ValueRanges) -> dict[Path, int]:
    """Return about how many values of each image are outside of the ``ranges``, where any are."""
    found = {
        path: count_outside(finding.values, bounds)
        for path, finding in findings.where(lambda kind: kind.values).items()
        if finding.values and (bounds := getattr(ranges, finding.values.kind))
    }
    return {path: count for path, count in found.items() if count}


def find_guessed(findings: Findings, ranges: ValueRanges) -> set[Path]:
    """Return images for whose values there is no range."""
    return {*findings.where(lambda kind: kind.values and getattr(ranges, kind.values.kind) is None)}


def find_duplicates(train: Inspection, val: Inspection) -> list[tuple[Path, Path]]:
    """Return each validation image that is a training image too, byte for byte, behind that one."""
    held_out, first = {*val.sha256s()}, dict[str, Path]()
    for sha256, path in zip(train.sha256s(), train.images.paths, strict=True):
        if sha256 in held_out:
            first.setdefault(sha256, path)
    every = zip(val.sha256s(), val.images.paths, strict=True)
    return [(first[sha256], path) for sha256, path in every if sha256 in first]


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
    known = (seen or SeenImages()).find(val.sha256s())
    every = zip(val.sha256s(), paths, strict=True)
    before = [path for sha256, path in every if sha256 in known and path not in duplicates]
    trained_on = {*duplicates, *before}
    left = [n for n, path in enumerate(paths) if path not in trained_on]
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


def count_converted(findings: Findings) -> Counter[str]:
    """Return how many images needed each conversion to 8-bit RGB."""
    converted = Counter[str]()
    for kind, number in findings.count_kinds():
        converted.update(dict.fromkeys(kind.converted, number))
    return converted


def _note_converted(findings: Findings) -> tuple[str, ...]:
    converted = count_converted(findings)
    if not converted:
        return ()
    return (
        "note: images converted to 8-bit RGB: "
        + "; ".join(f"{count} {what}" for what, count in sorted(converted.items())),
    )


def _shown(bad: Sequence[str]) -> str:
    return itemise(bad, _SHOWN)
