"""Folders of images: which files count, which class each belongs to, and which split.

    data/<class>/…                              one folder of classes; a part of it is held out
    data/train/<class>/… and data/val/<class>/…     two splits; val may be valid, validation or dev

A class is a folder of the first level, and everything below it belongs to it. Classes are numbered
in the order of their names in the training folder; other folders are matched to them by name. What
was left out or decided is told in notes. Nothing is ever written into a data folder.
"""

import difflib
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from momconv.data.decoding import SUFFIXES, read_bytes
from momconv.data.source import ImageSet, Listing, Splits, Unknown, divide, read_classes
from momconv.data.table import find_table, list_tables, read_table
from momconv.errors import DataError
from momconv.names import decode_name, encode_name
from momconv.opening import is_special
from momconv.words import name_some, plural, printable

_LEFT_BY_PROGRAMS = {"__MACOSX", "__pycache__"}  # .ipynb_checkpoints is hidden anyway
_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev")
SPLITS = {*_TRAIN, *_VAL, "test"}
_SHOWN = 5  # paths that a message names
_KINDS = 8  # suffixes that a message lists
_RECENT = 2 * 10**9  # nanoseconds, in which a file may change again without its times changing


def name_images(folder: Path) -> str:
    """Return what people call the images in ``folder``: by the folder around train/ and the like.

    >>> name_images(Path("/data/photos")), name_images(Path("/data/photos/train"))
    ('photos', 'photos')
    """
    path = folder.absolute()
    return path.parent.name if path.name.lower() in SPLITS and path.parent.name else path.name


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that has one folder for each class, as a source of images."""

    root: Path

    def list(self) -> Listing:
        """Return the images of every class folder that has any, and what was passed over.

        Raises:
            DataError: ``root`` is missing or has none.
        """
        return _read_class_folders(self.root)

    def read(self, path: Path) -> bytes:
        """Return the content of a file.

        Raises:
            UnreadableImage: It cannot be read, is no regular file or too large to be a picture.
        """
        return read_bytes(path)

    def identify(self, path: Path) -> tuple[int, ...] | None:
        """Return size, times and inode of a file; None if it was written just now, or is gone."""
        try:
            status = path.stat()
        except OSError:
            return None
        if status.st_mtime_ns >= time.time_ns() - _RECENT:
            return None
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True, slots=True)
class TableFolder(Folder):
    """A folder of images whose classes a table says."""

    table: Path

    def list(self) -> Listing:
        """Return the images of every class in the table, and what was passed over.

        Raises:
            DataError: ``root`` is missing, or the table does not name its images and their classes.
        """
        _require_folder(self.root)
        return read_table(self.table, self.root, list_images(self.root))


def find_splits(  # noqa: PLR0913 (one for each choice)
    root: Path,
    *,
    train: Path | None = None,
    val: Path | None = None,
    val_frac: float = 0.2,
    seed: int = 0,
    unknown: Unknown = "error",
    labels: Path | None = None,
) -> Splits:
    """Return the training and validation images below ``root``, or in ``train`` and ``val``.

    A table ``labels`` says their classes instead of folders; without folders of classes, one that
    lies in ``root`` or beside it is found.

    Without a validation folder, ``val_frac`` of each class is held out (see ``hold_out``). A test
    folder is never validated on. ``unknown`` says what to do with a class of the validation folder
    that is not one of training.

    Raises:
        DataError: ``root`` is missing or not laid out as above, has fewer than two classes, or
            validation has a class that training does not.
    """
    if train is None and (table := labels or _find_table(root)):
        return divide(read_table_set(root, table), None, val_frac=val_frac, seed=seed)
    folders = _split_folders(root)
    train_folder = train or (_first(_TRAIN, folders) if folders else root)
    if train_folder is None:
        raise DataError(
            f"no folder of training images in {printable(root)}\nfound: {_listed(folders)}",
            kind="data.no_train_split",
            fix=f"put training images into {printable(root / 'train')}/<class>/",
        )
    training = read_classes_folder(train_folder)
    _require_two_classes(training)
    held_out = None
    if folder := val or _first(_VAL, folders):
        owner, classes = train_folder.name, training.classes
        held_out = read_classes_folder(folder, classes, owner=owner, unknown=unknown)
    return divide(training, held_out, val_frac=val_frac, seed=seed)


def find_evaluation_set(
    root: Path,
    classes: Sequence[str] | None = None,
    *,
    split: str = "val",
    unknown: Unknown = "error",
    labels: Path | None = None,
) -> ImageSet:
    """Return the images to evaluate on: a split of ``root`` if it has splits, else ``root`` itself.

    A table of ``labels`` is as for ``find_splits``.

    Raises:
        DataError: as ``read_classes_folder``, or ``root`` has no such split but others.
    """
    if table := labels or _find_table(root):
        return read_table_set(root, table, classes, unknown=unknown)
    folders = _split_folders(root)
    if not folders and split == "val":
        return read_classes_folder(root, classes, unknown=unknown)
    folder = _first({"train": _TRAIN, "val": _VAL}.get(split, (split,)), folders)
    if folder is None:
        which = {"train": "training", "val": "validation"}.get(split, split)
        others = min(folders.values(), default=root)
        raise DataError(
            f"no folder of {which} images in {printable(root)}\n"
            f"found: {_listed(folders) or 'no splits'}",
            kind=f"data.no_{split}_split",
            fix=f"name one of them, as in {printable(others)}",
        )
    return read_classes_folder(folder, classes, unknown=unknown)


def read_classes_folder(
    root: Path,
    classes: Sequence[str] | None = None,
    *,
    owner: str = "the model",
    unknown: Unknown = "error",
) -> ImageSet:
    """Return the images of a folder that has one folder for each class.

    ``classes`` fixes the numbers: folders are matched to it by name. ``owner`` is who knows those
    classes, for messages.

    Raises:
        DataError: ``root`` is missing, is no such folder, has no images, or has a class that is
            not in ``classes`` and must not be skipped.
    """
    source = Folder(root)
    found, _ = listing = source.list()
    if all(name.lower() in SPLITS and name not in (classes or ()) for name in found):
        raise DataError(
            f"{printable(root)} holds splits, not classes: {_listed(found)}",
            kind="data.wrong_level",
            fix=f"name one of them, as in {printable(root / min(found))}",
        )
    return read_classes(source, classes, listing=listing, owner=owner, unknown=unknown)


def read_table_set(
    root: Path,
    table: Path,
    classes: Sequence[str] | None = None,
    *,
    unknown: Unknown = "error",
) -> ImageSet:
    """Return the images below ``root`` whose classes a ``table`` names.

    Raises:
        DataError: ``root`` is missing, or ``table`` does not name its images and their classes.
    """
    source = TableFolder(root, table)
    found, _ = listing = source.list()
    if classes is None and len(found) < 2:
        raise DataError(
            f"found 1 class in {printable(table)}: {_listed(found)}\ntraining needs at least 2",
            kind="data.too_few_classes",
        )
    return read_classes(source, classes, listing=listing, unknown=unknown)


def _find_table(root: Path) -> Path | None:
    """Return the table of the images below ``root``, where folders do not say their classes."""
    _require_folder(root)
    if sum(map(_has_images, _subfolders(root))) > 1:
        return None
    images = sorted(_images(root))
    return find_table(root, images) if images else None


def list_images(root: Path) -> list[Path]:
    """Return every image below ``root``, whatever the folders between, sorted by path.

    Raises:
        DataError: ``root`` is missing, is not a folder or holds no image.
    """
    _require_folder(root)
    return sorted(_images(root)) or _refuse_empty(root)


def _walk(root: Path, *above: Path) -> Iterator[tuple[Path, bool]]:
    """Yield every visible file below ``root`` and whether it is special, like a pipe or a device.

    Each folder is entered once, those ``above`` never: that matters where links lead back to one. A
    dead link is a file too: who reads it says what it is.
    """
    seen, waiting = {os.path.realpath(folder) for folder in above}, [root]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in seen:
            continue
        seen.add(real)
        folders = []
        for entry in _scan(parent):
            path = parent / entry.name
            if _holds(entry.is_dir):
                folders.append(path)
            else:
                yield path, not _holds(entry.is_file) and is_special(path)
        waiting += reversed(folders)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is visible in ``folder``, by name."""
    try:
        with os.scandir(folder) as entries:
            named = {entry.name: entry for entry in entries}
    except OSError as error:
        _refuse_unreadable(error)
    return [named[name] for name in _visible(named)]


def _holds(question: Callable[[], bool]) -> bool:
    """Return whether the file system says yes."""
    try:
        return question()
    except OSError:
        return False


def _images(root: Path) -> Iterator[Path]:
    return (path for path, _ in _walk(root) if _is_image(path))


def _has_images(folder: Path) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:  # of millions, the first will do
        if any(map(_is_visible_image, entries)):
            return True
    return any(True for _ in _images(folder))


def _is_visible_image(entry: os.DirEntry[str]) -> bool:
    return bool(_visible([entry.name])) and _is_image(Path(entry.name)) and entry.is_file()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(n for n in names if not n.startswith(".") and n not in _LEFT_BY_PROGRAMS)


def _subfolders(root: Path) -> list[Path]:
    try:
        names = _visible(os.listdir(root))
    except OSError as error:
        _refuse_unreadable(error)
    return [root / name for name in names if (root / name).is_dir()]


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits by lower-case name; none where ``root`` has no splits.

    A class may be called "train" too (beside "bus" and "car"), so one such name is not enough.
    """
    _require_folder(root)
    folders = {f.name.lower(): f for f in _subfolders(root) if _has_images(f)}
    divided = folders.keys() <= SPLITS or (_first(_TRAIN, folders) and _first(_VAL, folders))
    return folders if divided else {}


def _first(names: Sequence[str], folders: Mapping[str, Path]) -> Path | None:
    return next((folders[name] for name in names if name in folders), None)


def _read_class_folders(root: Path) -> Listing:
    """Return the images of every class folder that has any, and notes on what was passed over."""
    _require_folder(root)
    found: dict[str, list[Path]] = {}
    special: list[Path] = []
    others, deep = Counter[str](), 0
    for folder in _subfolders(root):
        images = []
        for path, is_odd in _walk(folder, root):
            if is_odd:
                special.append(path)
            elif _is_image(path):
                images.append(path)
            else:
                others[path.suffix.lower()] += 1
        start = len(f"{folder}{os.sep}")
        deep += sum(os.sep in str(path)[start:] for path in images)
        found[encode_name(folder.name)] = images
    if not any(found.values()):
        _refuse_empty(root)
    empty = [name for name, paths in found.items() if not paths]
    loose = sum(_is_image(root / name) for name in _visible(os.listdir(root)) if name not in found)
    notes = (*_notes(root, empty, others, loose), *_warn_of_special(special))
    if deep:
        where = "deeper than the folder of their class, and belong to it"
        notes += (f"note: {plural(deep, 'image')} in {printable(root)} lie {where}",)
    return {n: paths for n, paths in found.items() if paths}, notes


def _kinds(suffixes: Counter[str]) -> str:
    most = suffixes.most_common(_KINDS)
    kinds = [f"{printable(end) or 'no suffix'} ({n})" for end, n in most]
    return ", ".join([*kinds, "…"] if len(suffixes) > _KINDS else kinds)


def _notes(root: Path, empty: list[str], others: Counter[str], loose: int) -> tuple[str, ...]:
    notes = []
    if empty:
        count = plural(len(empty), "folder")
        notes.append(f"warning: ignoring {count} with no images: {_listed(empty)}")
    if others:
        count = plural(others.total(), "file")
        where = f"in {printable(root)} that are not images"
        notes.append(f"note: ignoring {count} {where}: {_kinds(others)}")
    if loose:
        count = plural(loose, "image")
        notes.append(f"warning: ignoring {count} directly in {printable(root)}, in no class folder")
    return tuple(notes)


def _warn_of_special(paths: Sequence[Path]) -> tuple[str, ...]:
    if not paths:
        return ()
    which = name_some(paths, _SHOWN)
    what = "that is not a regular file" if len(paths) == 1 else "that are not regular files"
    return (f"warning: ignoring {plural(len(paths), 'path')} {what}: {which}",)


def _listed(names: Iterable[str]) -> str:
    return name_some([*names], _SHOWN)


def _require_folder(path: Path) -> None:
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        raise DataError(
            f"data folder is a file: {printable(path)}",
            kind="data.not_a_folder",
            fix="name the folder of class folders; unpack an archive first",
        )
    raise DataError(
        f"data folder does not exist: {printable(path)}",
        kind="data.missing_folder",
        fix=f"closest existing folder is {printable(_closest(path))}",
    )


def _closest(path: Path) -> Path:
    path = path.absolute()
    parent = next(p for p in path.parents if os.path.isdir(p))
    wanted = path.relative_to(parent).parts[0]
    names = [folder.name for folder in _subfolders(parent)]
    return parent.joinpath(*difflib.get_close_matches(wanted, names, n=1))


def _require_two_classes(train: ImageSet) -> None:
    if len(train.classes) >= 2:
        return
    (name,) = train.classes
    below = [folder.name for folder in _subfolders(train.root / decode_name(name))]
    one_level_down = (
        f"the classes may lie one level down: {printable(train.root / decode_name(name))}"
    )
    told, fixes = _offer_tables(dict.fromkeys((train.root, train.samples[0].path.parent)))
    raise DataError(
        f"found 1 class in {printable(train.root)}: {printable(name)} "
        f"({plural(len(train.samples), 'image')})\ntraining needs at least 2{told}",
        kind="data.too_few_classes",
        fix=fixes + (one_level_down if below else f"add {printable(train.root)}/<other class>/"),
    )


def _offer_tables(folders: Iterable[Path]) -> tuple[str, str]:
    """Return a line on tables in ``folders`` without classes, and lines with fixes."""
    tables = [p for folder in folders for p in list_tables(folder) if p.suffix.lower() != ".txt"]
    told = f"\nno classes were found in {name_some(tables, _SHOWN)}; --labels says why"
    fixes = [f"--labels {shlex.quote(str(path))}\n" for path in tables[:_SHOWN]]
    return told if tables else "", "".join(fixes)


def _refuse_empty(root: Path) -> NoReturn:
    loose = sum(1 for _ in _images(root))
    here = f"{printable(root)}/"
    expected = f"expected: {here}<class>/*.jpg or {here}train/<class>/*.jpg (and val/)"
    told, fixes = _offer_tables([root, root.absolute().parent])
    if loose:
        raise DataError(
            f"found {plural(loose, 'image')} directly in {here} but no class folders\n{expected}"
            f"{told}",
            kind="data.no_class_folders",
            fix=f"{fixes}move the images into one folder for each class: {here}<class>/",
        )
    others = Counter(path.suffix.lower() for path, _ in _walk(root))
    found = f", only files of other kinds: {_kinds(others)}" if others else ""
    raise DataError(
        f"no images in {here}{found}\n{expected}",
        kind="data.no_images",
        fix=f"name another folder, or put images into {here}<class>/, as .jpg or .png",
    )


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise DataError(
        f"cannot read folder {printable(error.filename)}: {error.strerror}",
        kind="data.unreadable_folder",
        fix="check its permissions",
    ) from error
