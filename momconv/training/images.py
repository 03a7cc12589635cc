"""The images of a run: looked at once, and remembered in its folder as split.json."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from momconv.data.examination import examine_all
from momconv.data.findings import Findings
from momconv.data.folder import Folder, find_splits
from momconv.data.inspection import (
    Inspection,
    check_images,
    find_duplicates,
    leave_out_trained_on,
    warn_of_duplicates,
)
from momconv.data.report import DataReport, fingerprint, report
from momconv.data.source import ImageSet, Sample, Source, Sources, Splits, read_splits
from momconv.data.splits import hold_out
from momconv.errors import DataError, ModelFileError, MomconvError, UsageError
from momconv.files.atomic import write_atomically, write_text
from momconv.names import NamedPath, decode_name, encode_name, name_below
from momconv.opening import read_regular
from momconv.recipe import PATHS, DataRecipe
from momconv.states import pausing_search_for_cycles
from momconv.training.omission import take_back
from momconv.training.processes import Processes
from momconv.training.progress import SILENT, Listener, Progress
from momconv.training.run_folder import RunFolder
from momconv.words import describe_classes, itemise, plural, printable
from momconv.zoo.seen import SeenImages

Place = Path | Sources  # where images are: in folders of the recipe's layout, or of the caller's
_SHOWN = 5  # files that an error names


def _below(text: str) -> str:
    name = decode_name(text)
    if os.path.isabs(name) or ".." in name.split(os.sep):
        raise ValueError(f"{printable(name)} is not below a folder")
    return name


# Its path below the folder of its part, its class and its SHA-256; there may be millions of them.
_File = tuple[Annotated[str, AfterValidator(_below)], str, str]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: NamedPath  # below the data folder, or anywhere
    files: tuple[_File, ...]


class _Split(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    data: NamedPath
    classes: tuple[str, ...]
    train: _Part
    val: _Part
    unused: tuple[NamedPath, ...] = ()  # below the data folder, or anywhere; found at the start

    @model_validator(mode="after")
    def _know_all_classes(self) -> Self:
        if unknown := {
            class_name for part in (self.train, self.val) for _, class_name, _ in part.files
        }.difference(self.classes):
            raise ValueError(f"unknown class {min(unknown)}")
        return self


@dataclass(frozen=True, slots=True)
class CheckedImages:
    """The images of a run, which can be decoded, and what was found in these and others."""

    splits: Splits
    report: DataReport
    train: Findings
    val: Findings


def require_folder(recipe: DataRecipe) -> Path:
    """Return the folder of images.

    Raises:
        UsageError: The recipe names none.
    """
    folder = recipe.path or recipe.train_dir
    if folder is None:
        raise UsageError(
            "no folder of images to train on\nit has one folder of images for each class",
            kind="usage.no_data",
            fix="--data FOLDER",
        )
    return folder


def find_place(recipe: DataRecipe, sources: Sources | None) -> Place:
    """Return where the images are: in the ``sources``, if there are any.

    Raises:
        UsageError: The recipe names no folder, or names one beside the sources.
    """
    if sources is None:
        return require_folder(recipe)
    if named := [key for key in PATHS if getattr(recipe, key)]:
        raise UsageError(
            f"both data.{named[0]} and source= say where the images are",
            kind="usage.two_sources",
            fix=f"--set data.{named[0]}=null",
        )
    return sources


def find_root(place: Place) -> Path:
    """Return the folder of the images, or the name of their source."""
    return place if isinstance(place, Path) else place[0].root


def find_images(place: Place, recipe: DataRecipe, listener: Listener) -> Splits:
    """Return the images of ``place``, divided into training and validation, not yet opened.

    Raises:
        DataError: They cannot be used.
    """
    found = _find(place, recipe)
    _tell(found.notes, recipe, listener)
    if recipe.limit == 1 and recipe.max_images is None:
        return found
    train, val = (_limit(images, recipe) for images in (found.train, found.val))
    counts = f"{len(train.samples)} train / {len(val.samples)} val"
    parts = [f"only {recipe.limit:.3g} of the images of each class"] if recipe.limit < 1 else []
    parts += [f"at most {recipe.max_images} images of a split"] if recipe.max_images else []
    note = f"note: {', '.join(parts)}: {counts}"
    listener.tell(note)
    return Splits(train, val, (*found.notes, note), unused=_list_rest(found, train, val))


def _list_rest(splits: Splits, *kept: ImageSet) -> tuple[Path, ...]:
    """Return the images of ``splits`` that are not in those of it that are ``kept``."""
    every = (*splits.train.samples, *splits.val.samples)
    if len(every) == sum(len(images.samples) for images in kept):
        return ()
    known = {sample.path for images in kept for sample in images.samples}
    return tuple(sample.path for sample in every if sample.path not in known)


def _limit(images: ImageSet, recipe: DataRecipe) -> ImageSet:
    """Return a part of each class, of at least one image, then at most so many of all, evenly."""
    kept, _ = hold_out(images.labels, 1 - recipe.limit, recipe.split_seed)
    count = min(recipe.max_images or len(kept), len(kept))
    return images.select(kept[n * len(kept) // count] for n in range(count))


def examine_together(find: Callable[[], Splits], processes: Processes) -> None:
    """Let each of several processes look at a share of the images that they ``find``.

    All of them have to call it. What is in the images is remembered where the one finds it that
    looks at all of them then, and that tells what is wrong.

    Raises:
        ResourceError: A process is gone.
    """
    if processes.count == 1:
        return
    processes.wait()
    with suppress(MomconvError):
        found = find()
        for images in (found.train, found.val):
            examine_all(images.source, images.paths[processes.rank :: processes.count])
    processes.wait()


def keep_readable(
    splits: Splits, recipe: DataRecipe, listener: Listener, seen: SeenImages | None = None
) -> CheckedImages:
    """Return the images that can be decoded; each is tried once, before a run depends on it.

    Held-out images that the run trains on too, or that the network has ``seen`` before, are left
    out, unless all are.

    Raises:
        DataError: Too many cannot.
    """
    train = _check(splits.train, recipe, listener, every_class=True)
    val = _check(splits.val, recipe, listener)
    duplicates = find_duplicates(train, val)
    warnings = warn_of_duplicates(duplicates, len(val.images.samples))
    val, more = leave_out_trained_on(val, {path for _, path in duplicates}, seen)
    warnings += more
    rest = (*splits.unused, *_list_rest(splits, train.images, val.images))
    readable = Splits(train.images, val.images, splits.notes, unused=rest)
    if readable.uncovered:
        which = describe_classes(readable.uncovered)
        warnings += (
            f"warning: val top-1 and macro F1 do not cover {which}, without a validation image",
        )
    _tell(warnings, recipe, listener)
    found = report(train, val, duplicates, (*splits.notes, *train.notes, *val.notes, *warnings))
    readable = replace(readable, fingerprint=found.fingerprint)
    return CheckedImages(readable, found, train.findings, val.findings)


def remember_images(
    images: CheckedImages, root: Path, run: RunFolder, listener: Listener = SILENT
) -> None:
    """Write down which images below ``root`` a run trains on, which it holds out, and the rest."""
    splits = images.splits
    document = {
        "data": encode_name(root.absolute()),
        "classes": splits.train.classes,
        "train": _to_json(splits.train, root, images.train),
        "val": _to_json(splits.val, root, images.val),
        "unused": [encode_name(_relate(path, root)) for path in splits.unused],
    }
    write_atomically(run.split, partial(_write_lines, document))
    write_text(run.data_report, json.dumps(images.report.to_json(), indent=1) + "\n")
    if images.report.unreadable:
        listener.tell(f"note: all unreadable images are listed in {run.data_report}")


def recall_images(
    path: Path,
    place: Place | None = None,
    listener: Listener = SILENT,
    *,
    progress: Progress | None = None,
) -> Splits:
    """Return the images that ``remember_images`` wrote to ``path``, now perhaps in ``place``.

    Those that were left out according to ``progress`` may be anything; which are back, it learns.

    Raises:
        ModelFileError: ``path`` is missing or damaged.
        DataError: Some of the images are gone, or are not what they were.
    """
    split = _read(path)
    root = find_root(place or split.data)
    parts = {"train": split.train, "val": split.val}
    sources = _reopen(place or split.data, split)
    train, val = map(_from_part, sources, parts.values(), [split.classes] * 2)
    recalled = Splits(train, val, (), unused=tuple(root / unused for unused in split.unused))
    found = _examine(train, listener) | _examine(val, listener)
    changed = {
        path: None
        for images, part in ((train, split.train), (val, split.val))
        for path, now, (*_, then) in zip(
            images.paths, found.sha256s(images.paths), part.files, strict=True
        )
        if now != then
    }
    if progress:
        for path in take_back(recalled, progress, found, changed, listener):
            del changed[path]
    if changed:
        raise _changed(root, [*changed], found)
    digest = fingerprint((name, *file[1:]) for name, part in parts.items() for file in part.files)
    return replace(recalled, fingerprint=digest)


def list_new(known: Splits, place: Place, recipe: DataRecipe) -> Splits:
    """Return the images of ``place`` that came after the run of the images ``known`` began.

    Raises:
        DataError: It cannot be used any more.
    """
    parts = (known.train, known.val)
    paths = {s.path for part in parts for s in part.samples}.union(known.unused)
    old = {os.path.abspath(path) for path in paths}

    def select(images: ImageSet) -> ImageSet:
        every = enumerate(images.samples)
        return images.select(n for n, s in every if os.path.abspath(s.path) not in old)

    found = _find(place, recipe)
    return Splits(select(found.train), select(found.val), ())


@pausing_search_for_cycles()
def _find(place: Place, recipe: DataRecipe) -> Splits:
    how: dict[str, Any] = {
        "val_frac": recipe.val_frac,
        "seed": recipe.split_seed,
        "unknown": recipe.unknown_classes,
    }
    if isinstance(place, tuple):
        return read_splits(place, **how)
    train, val = recipe.train_dir, recipe.val_dir
    return find_splits(place, train=train, val=val, labels=recipe.labels, **how)


def _check(
    images: ImageSet, recipe: DataRecipe, listener: Listener, *, every_class: bool = False
) -> Inspection:
    """Look at the training images, of which every class needs some, or those held out."""
    if not images.samples:
        return Inspection(images, Findings.collect(()))
    title = f"checking the {'training' if every_class else 'held-out'} images"
    inspection = check_images(
        images,
        max_bad_fraction=recipe.max_bad_fraction,
        every_class=every_class,
        progress=partial(listener.advance, title),
    )
    _tell(inspection.notes, recipe, listener)
    return inspection


def _tell(notes: Iterable[str], recipe: DataRecipe, listener: Listener) -> None:
    for note in notes:
        label, _, text = note.partition(": ")
        if recipe.strict and label == "warning":
            raise DataError(f"{text}\n(a mere warning without --strict)", kind="data.strict")
        listener.tell(note)


def _examine(images: ImageSet, listener: Listener) -> Findings:
    tell = partial(listener.advance, "comparing the images")
    return examine_all(images.source, images.paths, tell)


def _reopen(place: Place, split: _Split) -> tuple[Source, Source]:
    """Return the sources of the training and of the held-out images.

    Raises:
        DataError: There is no such folder.
    """
    if isinstance(place, tuple):
        train, val = place
        return train, val or train
    folders = [place / part.folder for part in (split.train, split.val)]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"the images of the run are gone: there is no folder {printable(folder)}\n"
                "it may have moved, is not mounted, or was a source= in Python",
                kind="data.missing_folder",
                fix="--data FOLDER",
            )
    train, val = map(Folder, folders)
    return train, val


def _changed(root: Path, changed: Sequence[Path], found: Findings) -> DataError:
    """Return the error of images that cannot be read, which come first, or are others now."""
    paths = sorted(changed, key=lambda path: found.sha256(path) != "")
    lines = [
        f"{printable(path)}: {'changed' if found.sha256(path) else found[path].problem}"
        for path in paths
    ]
    return DataError(
        f"{plural(len(changed), 'image')} of the run changed since in {printable(root)}\n"
        + itemise(lines, _SHOWN),
        kind="data.changed",
        fix="--data FOLDER",
    )


def _to_json(images: ImageSet, root: Path, findings: Findings) -> Iterator[str]:
    """Yield the parts of a document like ``_Part``, which need not be in memory as a whole."""
    yield f'{{"folder": {_dump(encode_name(_relate(images.root, root)))}, "files": ['
    separator = "\n"
    sha256s = findings.sha256s(images.paths)
    for sample, sha256 in zip(images.samples, sha256s, strict=True):
        name = name_below(sample.path, images.root)
        yield separator + _dump([name, images.classes[sample.label], sha256])
        separator = ",\n"
    yield "]}"


def _write_lines(document: Mapping[str, object], path: Path) -> None:
    """Write the ``document``, in which an iterator has parts of JSON."""
    separator = "{"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for key, value in document.items():
            file.write(f"{separator}\n{_dump(key)}: ")
            file.writelines(value if isinstance(value, Iterator) else [_dump(value)])
            separator = ","
        file.write("\n}\n")


_dump = partial(json.dumps, ensure_ascii=False)


def _relate(path: Path, root: Path) -> Path:
    """Return ``path`` below ``root`` if it is there, or else from the top."""
    path, above = path.absolute(), root.absolute()
    return path.relative_to(above) if path.is_relative_to(above) else path


@pausing_search_for_cycles()
def _from_part(source: Source, part: _Part, classes: tuple[str, ...]) -> ImageSet:
    root, number = source.root, {name: label for label, name in enumerate(classes)}
    samples = (Sample(root / name, number[class_name]) for name, class_name, _ in part.files)
    return ImageSet(source, classes, tuple(samples))


@pausing_search_for_cycles()
def _read(path: Path) -> _Split:
    try:
        return _Split.model_validate_json(read_regular(path))
    except OSError as error:
        problem = f"cannot read {path}: {error.strerror}"
        raise ModelFileError(problem, kind="run.no_split") from error
    except ValidationError as error:
        problem = f"{path} is damaged: {error.errors()[0]['msg']}"
        raise ModelFileError(problem, kind="run.bad_split") from error
