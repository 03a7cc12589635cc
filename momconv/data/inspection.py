"""Looking at every image once, before a long run depends on it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from momconv.data.decoding import decode_and_explain
from momconv.data.folder import ImageSet, plural, printable
from momconv.errors import DataError

_SHOWN = 5  # unreadable files that a message names


def check_images(
    image_set: ImageSet,
    *,
    max_bad_fraction: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageSet, tuple[str, ...]]:
    """Decode every image; the set without those that cannot be read, and notes on what was found.

    ``progress`` is called with the number of images done and the number of all.

    Raises:
        DataError: more than ``max_bad_fraction`` of the images cannot be read, or none of a class.
    """
    good, bad, converted = [], [], Counter[str]()
    results = _examine_all([sample.path for sample in image_set.samples])
    for index, result in enumerate(results):
        if isinstance(result, DataError):
            bad.append(result.message)
        else:
            good.append(index)
            converted.update(result)
        if progress:
            progress(index + 1, len(image_set.samples))
    readable = image_set.select(good)
    _refuse_lost_class(image_set, readable, bad)
    return readable, (
        *_warn_of_bad(bad, len(image_set.samples), max_bad_fraction),
        *_note_converted(converted),
    )


def _examine_all(paths: Sequence[Path]) -> Iterator[DataError | tuple[str, ...]]:
    pool = ThreadPoolExecutor()
    try:
        yield from pool.map(_examine, paths)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted check must not decode all the rest


def _examine(path: Path) -> DataError | tuple[str, ...]:
    """What had to be converted in one image, or the error if it cannot be read."""
    try:
        _, converted = decode_and_explain(path)
    except DataError as error:
        return error
    return converted


def _refuse_lost_class(before: ImageSet, after: ImageSet, bad: Sequence[str]) -> None:
    left = after.counts()
    lost = [name for name, count in before.counts().items() if count and not left[name]]
    if lost:
        raise DataError(
            f"no image of {plural(len(lost), 'class')} can be read: "
            f"{', '.join(printable(name) for name in lost)}\n{_shown(bad)}",
            kind="data.class_unreadable",
            fix=f"replace the images of {printable(lost[0])}, or take its folder away",
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
            fix=f"--max-bad-fraction {enough:g} to continue without them",
        )


def _summarise(bad: Sequence[str], total: int) -> str:
    return f"{len(bad)} of {plural(total, 'image')} unreadable ({len(bad) / total:.1%})"


def _note_converted(converted: Counter[str]) -> tuple[str, ...]:
    if not converted:
        return ()
    return (
        "note: images converted to 8-bit RGB: "
        + "; ".join(f"{count} {what}" for what, count in sorted(converted.items())),
    )


def _shown(bad: Sequence[str]) -> str:
    more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return "\n".join(f"  {line}" for line in [*bad[:_SHOWN], *more])
