"""Going on without an image that cannot be read any more, although it could before the run.

The others keep their places in the order, and what is left out is part of the state: a run that is
resumed tries it again, and goes on without it if it is not back. A folder that goes away is no loss
of single images: it ends the run, to be resumed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from momconv.data.decoding import UnreadableImage
from momconv.data.examination import examine
from momconv.data.findings import Finding
from momconv.data.inspection import refuse_many_unreadable
from momconv.data.source import ImageSet, Source, Splits
from momconv.errors import DataError
from momconv.names import encode_name
from momconv.training.progress import Listener, Omission, Progress, SplitName
from momconv.training.run import TrainingRun
from momconv.training.saving import save_event
from momconv.words import itemise, name_some, plural, printable

_ASKED = 16  # other images, whether they can be read
_SHOWN = 5  # files that a message names
_SPLITS: tuple[SplitName, ...] = ("train", "val")


def leave_out(run: TrainingRun, split: SplitName, error: UnreadableImage) -> None:
    """Go on without the image of the ``split`` that the ``error`` is about.

    Once the run has begun, its state knows of it at once.

    Raises:
        DataError: Too many are left out now, the folder of images is gone, or the recipe is strict.
    """
    recipe, progress, path = run.recipe.data, run.progress, error.path
    images = select(run.splits, split)
    image = find_number(images, error)
    go_on = run.folder.resume_command if run.has_begun else None
    _refuse_lost_folder(images, path, progress.left_out(split), go_on)
    reason = _find_reason(images.source, path)
    if recipe.strict:
        raise UnreadableImage(path, reason)
    total = len(images.samples)
    paths = [images.samples[number].path for number in (*progress.left_out(split), image)]
    problems = [f"{printable(other)}: {_find_reason(images.source, other)}" for other in paths]
    refuse_many_unreadable(problems, total, recipe.max_bad_fraction)
    step = progress.step + 1 if split == "train" else None
    progress.omissions.append(Omission(progress.epoch + 1, step, split, image, encode_name(path)))
    run.listener.tell(
        f"warning: {printable(path)}: {reason}; going on without it "
        f"({len(paths)} of {total} images unreadable since the start)"
    )
    if run.has_begun:
        save_event(run)


def take_back(
    splits: Splits,
    progress: Progress,
    found: Mapping[Path, Finding],
    changed: Collection[Path],
    listener: Listener,
) -> set[Path]:
    """Go on with those images again that were left out and are back, not ``changed``; tell of all.

    Returns those that stay left out, and may have changed.
    """
    back, still = list[Path](), list[Path]()
    for split in _SPLITS:
        samples = select(splits, split).samples
        paths = {number: samples[number].path for number in progress.left_out(split)}
        here = {n: path for n, path in paths.items() if path not in changed}
        progress.take_back(split, here.keys())
        back += here.values()
        still += [path for path in paths.values() if path in changed]
    if back:
        listener.tell(
            f"note: {plural(len(back), 'image')} that had been left out can be read again, and "
            f"{'counts' if len(back) == 1 else 'count'} from here on: {name_some(sorted(back))}"
        )
    if still:
        problems = [f"{printable(p)}: {found[p].problem or 'changed'}" for p in sorted(still)]
        listener.tell(
            f"warning: going on without {plural(len(still), 'image')} that had been left out:\n"
            + itemise(problems, _SHOWN)
        )
    return set(still)


def _refuse_lost_folder(
    images: ImageSet, path: Path, left_out: Collection[int], go_on: str | None
) -> None:
    """Do nothing if images around ``path``, which failed, can be read: then it is that one alone.

    Raises:
        DataError: They cannot.
    """
    source = images.source
    if _is_readable(source, path):
        return
    samples = enumerate(images.samples)
    others = [s.path for n, s in samples if n not in left_out and s.path != path]
    near = [other for other in others if other.parent == path.parent]
    far = [other for other in others if other.parent != path.parent]
    if _are_readable(source, near or far):
        return
    folder = path.parent if _are_readable(source, far) else images.root
    raise DataError(
        f"the images in {printable(folder)} cannot be read any more, such as {printable(path)}: "
        f"{_find_reason(source, path)}\nonce they are back, the run can go on with all of them",
        kind="data.lost_folder",
        fix=go_on,
    )


def _are_readable(source: Source, paths: Sequence[Path]) -> bool:
    """Return whether at least half of some of ``paths`` can be read."""
    asked = paths[:: max(1, len(paths) // _ASKED)]
    return 2 * sum(_is_readable(source, path) for path in asked) >= len(asked)


def _is_readable(source: Source, path: Path) -> bool:
    """Return whether the content of ``path`` can be read, whatever it is."""
    try:
        source.read(path)
    except UnreadableImage:
        return False
    return True


def _find_reason(source: Source, path: Path) -> str:
    return examine(path, source.read).problem or "could not be read"  # the file may be back by now


def keep_rest(run: TrainingRun) -> Splits:
    """Return the images of the run that are not left out."""

    def rest(split: SplitName) -> ImageSet:
        images, left_out = select(run.splits, split), run.progress.left_out(split)
        return images.select(n for n in range(len(images.samples)) if n not in left_out)

    return replace(run.splits, train=rest("train"), val=rest("val"))


def select(splits: Splits, split: SplitName) -> ImageSet:
    """Return the images of the ``split``."""
    return splits.train if split == "train" else splits.val


def find_number(images: ImageSet, error: UnreadableImage) -> int:
    """Return the number of the image that the ``error`` is about."""
    return images.paths.index(error.path)
