"""The images of a run: looked at once, and remembered in its folder as split.json."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from momconv.data.folder import ImageSet, Sample, Splits, find_splits, plural, printable
from momconv.data.inspection import check_images
from momconv.errors import DataError, ModelFileError, UsageError
from momconv.files.atomic import write_text
from momconv.recipe import DataRecipe
from momconv.training.progress import Listener


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path  # below the data folder
    files: tuple[tuple[Path, str], ...]  # below ``folder``, with the class


class _Split(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    classes: tuple[str, ...]
    train: _Part
    val: _Part

    @model_validator(mode="after")
    def _know_all_classes(self) -> Self:
        if unknown := {
            name for part in (self.train, self.val) for _, name in part.files
        }.difference(self.classes):
            raise ValueError(f"unknown class {min(unknown)}")
        return self


def require_folder(recipe: DataRecipe) -> Path:
    """The folder of images.

    Raises:
        UsageError: The recipe names none.
    """
    if recipe.path is None:
        raise UsageError(
            "no folder of images to train on",
            kind="usage.no_data",
            fix="--data FOLDER, with one folder of images for each class",
        )
    return recipe.path


def find_images(root: Path, recipe: DataRecipe, listener: Listener) -> Splits:
    """The images below ``root``, divided into training and validation, not yet opened.

    Raises:
        DataError: The folder cannot be used.
    """
    found = find_splits(root, val_frac=recipe.val_frac, seed=recipe.split_seed)
    for note in found.notes:
        listener.tell(note)
    return found


def keep_readable(splits: Splits, recipe: DataRecipe, listener: Listener) -> Splits:
    """The images that can be decoded: each is, once, before a long run depends on it.

    Raises:
        DataError: Too many cannot.
    """
    check = partial(_check, recipe=recipe, listener=listener)
    train = check(splits.train, title="checking the training images")
    return replace(splits, train=train, val=check(splits.val, title="checking the held-out images"))


def remember_images(splits: Splits, root: Path, path: Path) -> None:
    """Write to ``path`` which images below ``root`` are trained on and which are held out."""
    train, val = (_to_part(images, root) for images in (splits.train, splits.val))
    split = _Split(data=root.absolute(), classes=splits.train.classes, train=train, val=val)
    write_text(path, split.model_dump_json(indent=1) + "\n")


def recall_images(path: Path, root: Path | None = None) -> Splits:
    """The images that ``remember_images`` wrote to ``path``, which may be below ``root`` now.

    Raises:
        ModelFileError: ``path`` is missing or damaged.
        DataError: Some of the images are gone.
    """
    split = _read(path)
    root = root or split.data
    train, val = (_from_part(part, split.classes, root) for part in (split.train, split.val))
    gone = [s.path for s in (*train.samples, *val.samples) if not s.path.is_file()]
    if gone:
        raise DataError(
            f"{plural(len(gone), 'image')} of the run are not in {printable(root)}, "
            f"such as {printable(gone[0])}",
            kind="data.changed",
            fix="--data with the folder where they are now, or start a new run with -o",
        )
    return Splits(train, val, ())


def find_held_out(path: Path, root: Path) -> ImageSet | None:
    """The images that the run of the split file ``path`` held out of the one folder ``root``.

    None where the run trained on another folder, or found a validation folder in it.
    """
    if not path.is_file():
        return None
    split = _read(path)
    one_folder = split.train.folder == split.val.folder == Path()
    if split.data != root.absolute() or not one_folder or not split.val.files:
        return None
    return _from_part(split.val, split.classes, root)


def _check(images: ImageSet, recipe: DataRecipe, listener: Listener, title: str) -> ImageSet:
    if not images.samples:
        return images
    readable, notes = check_images(
        images,
        max_bad_fraction=recipe.max_bad_fraction,
        progress=partial(listener.advance, title),
    )
    for note in notes:
        listener.tell(note)
    return readable


def _to_part(images: ImageSet, root: Path) -> _Part:
    files = (
        (sample.path.relative_to(images.root), images.classes[sample.label])
        for sample in images.samples
    )
    return _Part(folder=images.root.relative_to(root), files=tuple(files))


def _from_part(part: _Part, classes: tuple[str, ...], root: Path) -> ImageSet:
    folder, number = root / part.folder, {name: label for label, name in enumerate(classes)}
    return ImageSet(
        folder, classes, tuple(Sample(folder / path, number[name]) for path, name in part.files)
    )


def _read(path: Path) -> _Split:
    try:
        return _Split.model_validate_json(path.read_bytes())
    except OSError as error:
        problem = f"cannot read {path}: {error.strerror}"
        raise ModelFileError(problem, kind="run.no_split") from error
    except ValidationError as error:
        problem = f"{path} is damaged: {error.errors()[0]['msg']}"
        raise ModelFileError(problem, kind="run.bad_split") from error
