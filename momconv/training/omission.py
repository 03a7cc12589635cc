"""Going on without an image that cannot be read any more, although it could before the run.

The others keep their places in the order, and what is left out is part of the state: a run that is
resumed goes on without it too, whether or not the file is back.
"""

from dataclasses import replace
from pathlib import Path

from momconv.data.decoding import UnreadableImage
from momconv.data.examination import examine
from momconv.data.folder import ImageSet, Splits
from momconv.data.inspection import refuse_many_unreadable
from momconv.recipe import DataRecipe
from momconv.training.job import Job
from momconv.training.progress import Listener, Omission, Progress, SplitName
from momconv.training.saving import save_event
from momconv.words import printable


def leave_out(job: Job, progress: Progress, split: SplitName, error: UnreadableImage) -> None:
    """As ``omit``, in a run that has a folder, whose state knows of it at once."""
    omit(progress, split, job.splits, error, recipe=job.recipe.data, listener=job.listener)
    save_event(job, progress)


def omit(
    progress: Progress,
    split: SplitName,
    splits: Splits,
    error: UnreadableImage,
    *,
    recipe: DataRecipe,
    listener: Listener,
) -> None:
    """Go on without the image of the ``split`` that the ``error`` is about.

    Raises:
        DataError: Too many are left out now, or the recipe is strict.
    """
    images, path = select(splits, split), error.path
    image = find_number(images, error)
    reason = _find_reason(path)
    if recipe.strict:
        raise UnreadableImage(path, reason)
    total = len(images.samples)
    paths = [images.samples[number].path for number in (*progress.left_out(split), image)]
    problems = [f"{printable(other)}: {_find_reason(other)}" for other in paths]
    refuse_many_unreadable(problems, total, recipe.max_bad_fraction)
    step = progress.step + 1 if split == "train" else None
    progress.omissions.append(Omission(progress.epoch + 1, step, split, image, str(path)))
    listener.tell(
        f"warning: {printable(path)}: {reason}; going on without it "
        f"({len(paths)} of {total} images unreadable since the start)"
    )


def _find_reason(path: Path) -> str:
    return examine(path).problem or "could not be read"  # the file may be back by now


def keep_rest(splits: Splits, progress: Progress) -> Splits:
    """The images that are not left out."""

    def rest(split: SplitName) -> ImageSet:
        images, left_out = select(splits, split), progress.left_out(split)
        return images.select(n for n in range(len(images.samples)) if n not in left_out)

    return replace(splits, train=rest("train"), val=rest("val"))


def select(splits: Splits, split: SplitName) -> ImageSet:
    """The images of the ``split``."""
    return splits.train if split == "train" else splits.val


def find_number(images: ImageSet, error: UnreadableImage) -> int:
    """The number of the image that the ``error`` is about."""
    return [sample.path for sample in images.samples].index(error.path)
