"""Labels in a table beside one folder of images: a column of files and a column of classes.

The table is a text of lines with commas, semicolons or tabs between the values, and names above its
columns. A file is named by its path below the folder or from the table, by its name alone, or by
its name without the suffix, where that is one file; in other letters (upper for lower case, accents
of their own) where that is one file still.
"""

import codecs
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from unicodedata import normalize

from momconv.errors import DataError
from momconv.names import encode_name
from momconv.opening import open_regular, read_regular
from momconv.words import itemise, name_some, plural, printable

_SUFFIXES = (".csv", ".tsv", ".txt")
_FILE = (
    *("file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_path"),
    *("image_name", "image_id", "imageid", "img", "img_path", "photo", "name", "id"),
)
_CLASS = ("label", "labels", "class", "class_name", "classname", "category", "target", "species")
_SPLIT = ("split", "set", "subset", "fold")
_SHOWN = 5  # rows or files that a message names
_LONGEST_HEADER = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    file: str
    class_name: str


@dataclass(frozen=True, slots=True)
class _Table:
    path: Path
    columns: tuple[str, str]
    rows: tuple[_Row, ...]
    unused: tuple[str, ...]  # names of columns that may say more


def find_table(root: Path, images: Sequence[Path]) -> Path | None:
    """Return the table that gives most of ``images`` a class, if any.

    It lies in ``root`` or beside it, or with the images, if those are in one folder.

    Raises:
        DataError: There are several.
    """
    within = Path(os.path.commonpath([image.parent for image in images]))
    for folder in dict.fromkeys((root, within, root.absolute().parent)):
        fitting = [path for path in list_tables(folder) if _fits(path, root, images)]
        if len(fitting) > 1:
            raise DataError(
                f"{plural(len(fitting), 'table')} may hold the classes of the images in "
                f"{printable(root)}: {name_some(fitting, _SHOWN)}",
                kind="data.several_tables",
                fix="\n".join(f"--labels {quote(str(path))}" for path in fitting[:_SHOWN]),
            )
        if fitting:
            return fitting[0]
    return None


def list_tables(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that may be tables."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())


def read_table(
    path: Path, root: Path, images: Sequence[Path]
) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Return those of ``images``, below ``root``, that the table ``path`` names, by their classes.

    The second part says what was passed over.

    Raises:
        DataError: It is no such table, names none of the images, or contradicts itself.
    """
    table = _read(path)
    if table is None:
        raise DataError(
            f"{printable(path)} has no column of files and no column of classes\nlooked for one of "
            f"{', '.join(_FILE[:4])} … and one of {', '.join(_CLASS[:4])} … in its first line",
            kind="data.bad_table",
            fix="name the columns file and label",
        )
    labels, missing = _match(table, _Names(root, path.parent, images))
    _refuse_contradictions(table, labels)
    if not labels:
        raise DataError(
            f"{printable(path)} names no image in {printable(root)}\nit names "
            f"{name_some(missing, 3) or 'nothing'}; there is {name_some(images, 3) or 'nothing'}",
            kind="data.bad_table",
        )
    found: dict[str, list[Path]] = {}
    for image in sorted(labels):
        found.setdefault(labels[image][0].class_name, []).append(image)
    empty = found.pop("", [])
    rest = len(images) - len(labels)
    return dict(sorted(found.items())), tuple(_describe(table, missing, len(empty), rest))


def _match(table: _Table, known: "_Names") -> tuple[dict[Path, list[_Row]], list[str]]:
    """Return the rows of each image, and the names in rows of none."""
    labels: dict[Path, list[_Row]] = {}
    missing = []
    for row in table.rows:
        image = known.find(row.file)
        if image is None:
            missing.append(row.file)
        else:
            labels.setdefault(image, []).append(row)
    return labels, missing


def _refuse_contradictions(table: _Table, labels: Mapping[Path, Sequence[_Row]]) -> None:
    clashes = [
        f"{printable(image)}: {printable(rows[0].class_name)} in line {rows[0].line}, "
        f"{printable(other.class_name)} in line {other.line}"
        for image, rows in labels.items()
        for other in rows[1:]
        if other.class_name != rows[0].class_name
    ]
    if clashes:
        raise DataError(
            f"{printable(table.path)} gives {plural(len(clashes), 'image')} two classes\n"
            + itemise(clashes, _SHOWN),
            kind="data.contradiction",
        )


def _describe(table: _Table, missing: Sequence[str], empty: int, rest: int) -> Iterator[str]:
    name, (file, label) = printable(table.path), map(printable, table.columns)
    yield f"note: classes from {name}, columns {file} and {label}"
    if missing:
        lines = f"{plural(len(missing), 'line')} of {name}"
        yield f"warning: no image for {lines}: {name_some(missing, _SHOWN)}"
    if empty:
        yield f"warning: ignoring {plural(empty, 'image')} without a class in {name}"
    if rest:
        yield f"warning: ignoring {plural(rest, 'image')} without a line in {name}"
    if table.unused:
        yield f"warning: nothing is done with the column {printable(table.unused[0])} of {name}"


class _Names:
    """Finds images by what a table may call them."""

    def __init__(self, root: Path, beside: Path, images: Iterable[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self._names: dict[str, set[Path]] = {}
        for image in images:
            for above in (root, beside):
                if image.absolute().is_relative_to(above.absolute()):
                    below = image.absolute().relative_to(above.absolute())
                    self._paths.setdefault(below.as_posix(), image)
                    self._names.setdefault(below.with_suffix("").as_posix(), set()).add(image)
            self._paths.setdefault(str(image.absolute()), image)
            for name in (image.name, image.stem):
                self._names.setdefault(name, set()).add(image)
        self._alike: dict[str, set[Path]] = {}
        for name, image in self._paths.items():
            self._alike.setdefault(_fold(name), set()).add(image)
        for name, called in self._names.items():
            self._alike.setdefault(_fold(name), set()).update(called)

    def find(self, text: str) -> Path | None:
        """Return the image that is called ``text``, if that is one."""
        name = text.replace("\\", "/").removeprefix("./")
        if name in self._paths:
            return self._paths[name]
        last = name.rpartition("/")[2]
        called = (
            self._names.get(name)
            or self._names.get(last)
            or self._alike.get(_fold(name))
            or self._alike.get(_fold(last))
            or set()
        )
        return next(iter(called)) if len(called) == 1 else None


def _fold(name: str) -> str:
    """Return one key for names that differ in case alone, or in how accents are written."""
    return normalize("NFC", name).casefold()


def _fits(path: Path, root: Path, images: Sequence[Path]) -> bool:
    table = _read(path) if _has_columns(path) else None
    if table is None:
        return False
    known = _Names(root, path.parent, images)
    labels = {image: row.class_name for row in table.rows if (image := known.find(row.file))}
    return len(set(labels.values())) > 1 and 2 * len(labels) > min(len(images), len(table.rows))


def _has_columns(path: Path) -> bool:
    """Return whether the first line of ``path`` names the columns; the rest may be of any size."""
    try:
        with open_regular(path) as file:
            first = _decode(file.read(_LONGEST_HEADER)).splitlines()[:1]
    except OSError:
        return False
    return _parse(path, first) is not None


def _read(path: Path) -> _Table | None:
    """Return what is in ``path``; None where it has not the columns.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return _parse(path, _decode(read_regular(path)).splitlines())
    except OSError as error:
        problem = f"cannot read {printable(path)}: {error.strerror}"
        raise DataError(problem, kind="data.unreadable_table", fix="--labels FILE") from error


def _parse(path: Path, text: Sequence[str]) -> _Table | None:
    """Return the table in the ``text`` of ``path``, by the first delimiter that gives columns."""
    for delimiter in ",;\t|":
        lines = csv.reader(text, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(lines, [])]
            columns = [_find_column(header, names) for names in (_FILE, _CLASS)]
            if None in columns:
                continue
            return _Table(path, *_collect(header, columns, lines))
        except csv.Error:
            continue
    return None


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as spreadsheets may save
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def _collect(
    header: Sequence[str], columns: Sequence[int | None], lines: Iterable[Sequence[str]]
) -> tuple[tuple[str, str], tuple[_Row, ...], tuple[str, ...]]:
    file, label = (column or 0 for column in columns)
    rows = (
        _Row(number, line[file].strip(), encode_name("".join(line[label : label + 1]).strip()))
        for number, line in enumerate(lines, 2)
        if file < len(line) and line[file].strip()
    )
    unused = tuple(name for name in header if name.lower() in _SPLIT)
    return (header[file], header[label]), tuple(rows), unused


def _find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the column with the first of ``names`` that there is."""
    lower = [name.lower().replace(" ", "_") for name in header]
    return next((lower.index(name) for name in names if name in lower), None)
